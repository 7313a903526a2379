"""Samples: unique ids, sorted classes, and a test split that is stratified and drawn by id."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.dataset.labels import NO_LABEL, UNKNOWN_LABEL
from mmaudit.audit.dataset.samples import Samples, cut_by_keys, read_samples, stratified_cut
from mmaudit.audit.errors import DatasetError

Read = Callable[..., Samples]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Write these columns and two columns of vectors, and read the samples."""

    def write_and_read(config: DataConfig | None = None, *, seed: int = 0, **columns: Any) -> Samples:
        num_rows = len(next(iter(columns.values())))
        table = pa.table({**columns, "u": [[0.5]] * num_rows, "v": [[0.5]] * num_rows})
        pq.write_table(table, tmp_path / "d.parquet", row_group_size=3)
        return read_samples(open_dataset(tmp_path / "d.parquet", config), seed=seed, test_fraction=0.2)

    return write_and_read


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([10, 2, 2, 1], ("1", "2", "10"), [2, 1, 1, 0]),
        (["10", "2", "-1"], ("-1", "2", "10"), [2, 1, 0]),
        (["dog", "cat", "10"], ("10", "cat", "dog"), [2, 1, 0]),
        ([3.0, 1.0, 10.0], ("1", "3", "10"), [1, 0, 2]),
        ([3.0, float("nan"), None], ("3",), [0, NO_LABEL, NO_LABEL]),
        ([True, False], ("False", "True"), [1, 0]),
        (["b", None, "a"], ("a", "b"), [1, NO_LABEL, 0]),
        (["1", "01", "001"], ("001", "01", "1"), [2, 1, 0]),
        ([0, 2**40], ("0", str(2**40)), [0, 1]),
    ],
)
def test_classes_are_sorted_by_label(
    read: Read, labels: list[object], names: tuple[str, ...], numbers: list[int]
) -> None:
    samples = read(label=labels)
    assert samples.class_names == names
    assert samples.label.tolist() == numbers
    assert samples.label.dtype == np.int32


def test_class_names_come_from_label_name(read: Read) -> None:
    samples = read(label=[2, 1, 5, None], label_name=["two", "one", None, "none"])
    assert samples.class_names == ("one", "two", "5")
    assert samples.label.tolist() == [1, 0, 2, NO_LABEL]


@pytest.mark.parametrize(
    ("labels", "words"),
    [([0.5, 1.0], "fractions"), ([[1], [2]], "lists"), ([{"a": 1}, {"a": 2}], "structs of several fields")],
)
def test_labels_that_are_not_classes_are_rejected(read: Read, labels: list[object], words: str) -> None:
    with pytest.raises(DatasetError, match=f"the labels are {words}: .* choose the column with --label"):
        read(DataConfig(modality=("u=u", "v=v")), label=labels)


def test_repeated_ids_are_rejected(read: Read) -> None:
    ids, labels = ["a", "b", "a", "b", "c"], [0, 1, 0, 1, 0]
    with pytest.raises(DatasetError, match=r"2 ids are repeated in id \(a, b\): ids must be unique; choose another"):
        read(id=ids, label=labels)
    with pytest.raises(DatasetError, match=r"2 ids are repeated in id .* unique; they are with --id name$"):
        read(id=ids, label=labels, name=list("vwxyz"))


def test_id_within_videos_is_composed_with_the_video(read: Read) -> None:
    columns = {"clip_id": [1, 2, 1, 2], "video_id": ["v", "v", "w", "w"], "label": [0, 1, 0, 1], "text": list("abcd")}
    with pytest.raises(DatasetError, match=r"2 ids are repeated in clip_id \(1, 2\): .* --id video_id,clip_id$"):
        read(**columns)
    samples = read(DataConfig(id="video_id,clip_id", group="video_id"), **columns)
    assert samples.sample_id.tolist() == ["v,1", "v,2", "w,1", "w,2"]
    assert read(DataConfig(id="none"), **columns).sample_id.tolist() == [f"row-{row:09d}" for row in range(4)]


def test_null_id_is_rejected(read: Read) -> None:
    with pytest.raises(DatasetError, match="column 'id' has 1 rows without an id"):
        read(id=["a", None], label=[0, 1])


def test_splits_are_read_without_blanks_and_case(read: Read) -> None:
    samples = read(label=[0, 1, 0], split=["Train ", " test", "DEV"])
    assert samples.split.tolist() == ["train", "test", "validation"]


def test_ids_are_strings_in_dataset_order(tmp_path: Path, read: Read) -> None:
    samples = read(id=[7, 8, 10, 9], label=[0, 1, 0, 1])
    assert samples.sample_id.tolist() == ["7", "8", "10", "9"]


def test_split_names_are_normalised(read: Read) -> None:
    names_of_split = {
        "train": ["train", "Training", "TRN"],
        "validation": ["val", "valid", "dev", "Development", "validation"],
        "test": ["test", "tst", "EVAL", "evaluation", "testing"],
    }
    names_in_order = [name for names in names_of_split.values() for name in names]
    expected = [split for split, names in names_of_split.items() for _ in names]
    assert read(label=[0] * len(names_in_order), split=names_in_order).split.tolist() == expected


@pytest.mark.parametrize("unknown", ["holdout", None])
def test_unknown_split_is_rejected_or_ignored_on_request(read: Read, unknown: str | None) -> None:
    columns = {"label": [0, 1] * 5, "split": ["train"] * 9 + [unknown]}
    with pytest.raises(DatasetError, match=f"column 'split' holds {unknown}; a split is train, validation or test"):
        read(**columns)
    assert read(DataConfig(split="none"), **columns).split.tolist().count("test") == 2


def test_groups_are_strings(read: Read) -> None:
    group = read(label=[0, 1], group=[3, 4]).group
    assert group is not None
    assert group.tolist() == ["3", "4"]
    assert read(label=[0, 1]).group is None


def test_path_columns_are_kept(clip_source: Path) -> None:
    samples = read_samples(open_dataset(clip_source, DataConfig(shard_rows=7)), seed=0, test_fraction=0.2)
    assert len(samples) == 24
    assert samples.paths.column_names == ["audio_file_name", "image_file_name"]
    assert samples.paths["audio_file_name"].to_pylist() == [f"{number}.wav" for number in range(24)]


def sample_ids(count: int) -> NDArray[np.object_]:
    return np.array([f"s{number}" for number in range(count)], dtype=object)


LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=80).map(lambda labels: np.array(labels, dtype=np.int32))


@settings(deadline=None)
@given(LABELS, st.floats(0.05, 0.95), st.integers(0, 5))
def test_drawn_fraction_is_equal_in_every_class(label: NDArray[np.int32], fraction: float, seed: int) -> None:
    """The total is exact; a class deviates by at most half a row plus half a row of each other class."""
    drawn = stratified_cut(sample_ids(len(label)), label, None, fraction=fraction, seed=seed, purpose="p")
    assert drawn.sum() == max(1, round(fraction * len(label)))
    classes = np.unique(label)
    for stratum in classes:
        assert abs(drawn[label == stratum].sum() - fraction * (label == stratum).sum()) <= (1 + len(classes)) / 2


def test_equal_classes_get_equal_shares() -> None:
    label = np.repeat(np.arange(4, dtype=np.int32), 25)
    drawn = stratified_cut(sample_ids(100), label, None, fraction=0.2, seed=0, purpose="p")
    assert np.bincount(label[drawn]).tolist() == [5, 5, 5, 5]


@settings(deadline=None)
@given(LABELS, st.lists(st.integers(0, 6), min_size=80, max_size=80), st.floats(0.05, 0.95), st.integers(0, 5))
def test_whole_groups_are_drawn_independent_of_order(
    label: NDArray[np.int32], numbers: list[int], fraction: float, seed: int
) -> None:
    group = np.array([f"g{number}" for number in numbers[: len(label)]], dtype=object)
    order = np.random.default_rng(seed).permutation(len(label))
    for group_or_none in (None, group):
        drawn = stratified_cut(sample_ids(len(label)), label, group_or_none, fraction=fraction, seed=seed, purpose="p")
        group_reordered = None if group_or_none is None else group_or_none[order]
        drawn_reordered = stratified_cut(
            sample_ids(len(label))[order], label[order], group_reordered, fraction=fraction, seed=seed, purpose="p"
        )
        np.testing.assert_array_equal(drawn_reordered, drawn[order])
    assert all(len(set(drawn[group == group_name].tolist())) == 1 for group_name in set(group))
    largest = max(np.unique(group.astype(str), return_counts=True)[1])
    if len(set(group)) > 1:
        assert drawn.any()
        assert abs(drawn.sum() - fraction * len(label)) <= largest


@settings(deadline=None)
@given(LABELS, st.lists(st.integers(0, 6), min_size=80, max_size=80), st.floats(0.02, 0.95), st.integers(0, 5))
def test_at_most_as_many_rows_are_drawn_as_without_groups(
    label: NDArray[np.int32], numbers: list[int], fraction: float, seed: int
) -> None:
    group = np.array([f"g{number}" for number in numbers[: len(label)]], dtype=object)
    options: dict[str, Any] = {"fraction": fraction, "seed": seed, "purpose": "p"}
    drawn = stratified_cut(sample_ids(len(label)), label, group, at_most=True, **options)
    allowed = int(stratified_cut(sample_ids(len(label)), label, None, **options).sum())
    sizes = np.unique(group.astype(str), return_counts=True)[1]
    assert drawn.sum() <= allowed
    assert all(len(set(drawn[group == group_name].tolist())) == 1 for group_name in set(group))
    assert drawn.any() == (sizes.min() <= allowed and len(sizes) > 1)
    assert not drawn.all()


def test_seed_and_purpose_change_the_draw() -> None:
    label = np.zeros(200, dtype=np.int32)
    first, other_seed, other_purpose = (
        stratified_cut(sample_ids(200), label, None, fraction=0.5, seed=seed, purpose=purpose)
        for seed, purpose in ((0, "a"), (1, "a"), (0, "b"))
    )
    assert 60 < (first & other_seed).sum() + (~first & ~other_seed).sum() < 140
    assert 60 < (first & other_purpose).sum() + (~first & ~other_purpose).sum() < 140


def draw_plainly(keys: NDArray[np.uint64], label: NDArray[np.int32], fraction: float) -> NDArray[np.bool_]:
    """Draw the rows with the smallest (rank + 1/2) / size within their class, ties by key, from sorted columns."""
    order = np.lexsort((keys, label))
    starts = np.flatnonzero(np.r_[True, label[order][1:] != label[order][:-1]])
    sizes = np.diff(np.r_[starts, len(label)])
    position = np.empty(len(label))
    position[order] = (np.arange(len(label)) - np.repeat(starts, sizes) + 0.5) / np.repeat(sizes, sizes)
    drawn = np.zeros(len(label), bool)
    drawn[np.lexsort((keys, position))[: max(1, round(fraction * len(label)))]] = True
    return drawn


@given(LABELS, st.floats(0, 1), st.sampled_from([2**64 - 1, 3]))
def test_cut_is_that_of_sorted_columns(label: NDArray[np.int32], fraction: float, largest_key: int) -> None:
    keys = np.random.default_rng(0).integers(0, largest_key, len(label), dtype=np.uint64)
    expected = draw_plainly(keys, label, fraction)
    np.testing.assert_array_equal(cut_by_keys(keys, label, None, fraction=fraction), expected)


def test_cut_of_many_rows_is_that_of_sorted_columns() -> None:
    rng = np.random.default_rng(0)
    keys, label = rng.integers(0, 2**64, 70_000, dtype=np.uint64), rng.integers(-1, 900, 70_000).astype(np.int32)
    np.testing.assert_array_equal(cut_by_keys(keys, label, None, fraction=0.2), draw_plainly(keys, label, 0.2))


def test_missing_split_is_drawn_by_class_or_group(read: Read) -> None:
    samples = read(label=[number % 3 for number in range(60)])
    assert set(samples.split.tolist()) == {"train", "test"}
    assert [int(((samples.split == "test") & (samples.label == stratum)).sum()) for stratum in range(3)] == [
        4,
        4,
        4,
    ]
    groups = [f"g{number // 6}" for number in range(60)]
    grouped = read(label=[number % 3 for number in range(60)], group=groups)
    assert grouped.group is not None
    assert (grouped.split == "test").sum() == 12
    assert len(set(grouped.group[grouped.split == "test"].tolist())) == 2


def test_outputs_of_classification_are_the_classes(read: Read) -> None:
    samples = read(DataConfig(classes=("b", "a")), label=["a", "b", "c", None])
    assert (samples.task, samples.values, samples.outputs) == ("classification", None, ("b", "a"))
    assert samples.label.tolist() == [1, 0, UNKNOWN_LABEL, NO_LABEL]
    assert samples.unknown == ((2, "c"),)
    assert (samples.target.task, samples.target.num_outputs, len(samples.target)) == ("classification", 2, 4)


def test_declared_class_names_are_used(tmp_path: Path) -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["zebra", "ape"])})
    rows = pa.table({"label": [1, 0, -1]}, schema=features.arrow_schema)
    for name in ("u", "v"):
        rows = rows.append_column(name, pa.array([[0.5]] * 3))
    pq.write_table(rows, tmp_path / "d.parquet")
    samples = read_samples(open_dataset(tmp_path / "d.parquet"), seed=0, test_fraction=0.2)
    assert samples.class_names == ("zebra", "ape")
    assert samples.label.tolist() == [1, 0, UNKNOWN_LABEL]
    assert samples.unknown == ((2, "-1"),)


@pytest.mark.parametrize("labels", [[["a", "b"], ["b"], None, []], ["a|b", "b", None, ";"]])
def test_label_sets_are_read_as_indicator_values(read: Read, labels: list[object]) -> None:
    config = DataConfig(task="multilabel", modality=("u=u", "v=v"))
    samples = read(config, label=labels)
    assert (samples.task, samples.outputs) == ("multilabel", ("a", "b"))
    assert samples.values is not None
    assert samples.values[[0, 1, 3]].tolist() == [[1, 1], [0, 1], [0, 0]]
    assert samples.label.tolist() == [0, 0, NO_LABEL, 0]
    assert samples.class_names == ("other",)
    assert samples.target.num_outputs == 2


def test_regression_targets_are_read_with_deciles(read: Read) -> None:
    samples = read(DataConfig(task="regression"), label=[number / 10 for number in range(20)])
    assert (samples.task, samples.outputs, len(samples.class_names)) == ("regression", ("label",), 10)
    assert samples.values is not None
    assert samples.values[:, 0] == pytest.approx(np.arange(20) / 10)
    assert samples.label.tolist() == [number // 2 for number in range(20)]
    assert (samples.split == "test").sum() == 4
