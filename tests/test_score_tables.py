"""Tests of score tables: the same rows for any layout of files, and a clear error for each invalid table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import ConfigError, ManifestError, ScoreError
from mmaudit.audit.hashing import hash_ids
from mmaudit.audit.scores.table import ScoreTable, read_scores, write_scores
from mmaudit.rebalance import score_files as score_files_py
from mmaudit.rebalance.score_tables import ManifestMembers, ScoreFiles, check_same_dataset, hash_keys, open_scores

N = 24


def table(n: int = N, *, start: int = 0, **changes: Any) -> pa.Table:
    """Return a score table; columns set to None are left out."""
    rng = np.random.default_rng(start)
    numbers = np.arange(start, start + n)
    columns: dict[str, Any] = {
        "sample_id": [f"s{number:03d}" for number in numbers],
        "label": pa.array(numbers % 3, pa.int32()),
        "label_name": [f"class {number % 3}" for number in numbers],
        "split": ["test" if number % 4 == 0 else "train" for number in numbers],
        "confidence_audio": rng.random(n).astype(np.float32),
        "confidence_visual": rng.random(n).astype(np.float32),
    }
    return pa.table({name: values for name, values in {**columns, **changes}.items() if values is not None})


def write_tables(folder: Path, *tables: pa.Table, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, table_ in enumerate(tables):
        pq.write_table(table_, folder / f"part-{number}.parquet", **options)
    return folder


def all_of(score_files: ScoreFiles) -> dict[str, list[Any]]:
    """Read all values of the rows."""
    values: dict[str, list[Any]] = {"id": [], "key": [], "class": [], "name": [], "split": [], "confidence": []}
    for batch in score_files.batches():
        values["id"] += batch.table["sample_id"].to_pylist()
        values["key"] += batch.key.tolist()
        values["class"] += [score_files.classes[index].as_py() for index in batch.label]
        values["name"] += [score_files.class_names[index] for index in batch.label]
        values["split"] += [score_files.splits[index] for index in batch.split]
        values["confidence"] += batch.confidence.tolist()
    return values


@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, N - 1), max_size=4, unique=True).map(sorted),
    st.integers(1, N),
    st.integers(1, N),
    st.randoms(use_true_random=False),
)
def test_rows_are_independent_of_files_and_batches(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], group: int, batch: int, random: Any
) -> None:
    scores, folder = table(), tmp_path_factory.mktemp("shards")
    expected = all_of(open_scores(write_tables(folder / "one", scores), seed=3))
    assert expected["id"] == scores["sample_id"].to_pylist()
    assert expected["class"] == scores["label"].to_pylist()
    assert expected["name"] == scores["label_name"].to_pylist()
    assert expected["split"] == scores["split"].to_pylist()
    slices = list(zip([0, *cuts], [*cuts, N], strict=True))
    paths = random.sample([folder / f"{letter}.parquet" for letter in "abcdefgh"], len(slices))
    for path, (first, end) in zip(paths, slices, strict=True):
        pq.write_table(scores.slice(first, end - first), path, row_group_size=group)
    random.shuffle(paths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_files_py, "BATCH_ROWS", batch)
        for source in (folder, paths, str(folder / "*.parquet")):
            score_files = open_scores(source, seed=3)
            assert all_of(score_files) == expected
            assert (score_files.num_rows, score_files.splits) == (N, ("test", "train"))


def test_table_in_memory_equals_its_file(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "plain.parquet")
    scores = read_scores(tmp_path / "plain.parquet")
    write_scores(scores, tmp_path / "ours.parquet")
    assert isinstance(scores, ScoreTable)
    from_file, from_memory = (open_scores(source, seed=0) for source in (tmp_path / "ours.parquet", scores))
    assert all_of(from_file) == all_of(from_memory)
    assert from_file.columns == from_memory.columns
    assert from_file.modalities == from_memory.modalities == ("audio", "visual")


def test_keys_are_hashes_of_ids() -> None:
    ids = table()["sample_id"]
    assert hash_keys(ids, seed=5).tolist() == hash_ids(ids.combine_chunks(), seed=5, purpose="split").tolist()
    assert set(hash_keys(ids, seed=5).tolist()).isdisjoint(hash_keys(ids, seed=6).tolist())


WORDS = pa.array([f"class {number % 3}" for number in range(N)])
VARIANTS: dict[str, dict[str, Any]] = {
    "label alone": {"label_name": None},
    "label_name alone": {"label": None},
    "odd numbers": {"label": pa.array([(-5, 2_000_000_000, 7)[number % 3] for number in range(N)])},
    "wide numbers": {"label": pa.array([number % 3 for number in range(N)], pa.uint64())},
    "numbers as floats": {"label": pa.array([float(number % 3) for number in range(N)])},
    "words for numbers": {"label": WORDS, "label_name": None},
    "codes": {
        "sample_id": pa.array([f"s{number:03d}" for number in range(N)]).dictionary_encode(),
        "label": pa.array([number % 3 for number in range(N)]).dictionary_encode(),
        "label_name": WORDS.dictionary_encode(),
        "split": pa.array(["train"] * N).dictionary_encode(),
    },
    "large strings": {
        "sample_id": pa.array([f"s{number:03d}" for number in range(N)], pa.large_string()),
        "label_name": WORDS.cast(pa.large_string()),
    },
    "numbers as ids": {"sample_id": pa.array(range(N))},
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_labels_and_ids_of_any_type_are_read(tmp_path: Path, variant: str) -> None:
    scores = table(**VARIANTS[variant])
    score_files = open_scores(write_tables(tmp_path, scores), seed=0)
    values = all_of(score_files)
    ids = [str(sample_id) for sample_id in scores["sample_id"].to_pylist()]
    assert [str(sample_id) for sample_id in values["id"]] == ids
    assert values["key"] == hash_ids(pa.array(ids), seed=0, purpose="split").tolist()
    labels = scores["label" if "label" in scores.column_names else "label_name"].to_pylist()
    assert values["class"] == labels
    assert values["name"] == (
        scores["label_name"].to_pylist() if "label_name" in scores.column_names else list(map(str, labels))
    )
    assert len(score_files.class_names) == 3


@pytest.mark.parametrize(
    ("split", "splits"),
    [
        (None, {"all"}),
        (pa.nulls(N), {"all"}),
        (pa.nulls(N, pa.string()), {"all"}),
        (pa.array(["train", None] * (N // 2)), {"all", "train"}),
    ],
)
def test_row_without_split_is_in_all(tmp_path: Path, split: Any, splits: set[str]) -> None:
    score_files = open_scores(write_tables(tmp_path, table(split=split)), seed=0)
    assert sorted(splits) == list(score_files.splits)
    expected = ["all" if name is None else str(name) for name in ([None] * N if split is None else split.to_pylist())]
    assert all_of(score_files)["split"] == expected


def test_test_rows_are_masked_unless_test_is_the_only_split(tmp_path: Path) -> None:
    score_files = open_scores(write_tables(tmp_path / "a", table()), seed=0)
    non_test_mask = np.concatenate([score_files.non_test_mask(batch) for batch in score_files.batches()])
    assert non_test_mask.tolist() == [number % 4 != 0 for number in range(N)]
    test_only = open_scores(write_tables(tmp_path / "b", table(split=["test"] * N)), seed=0)
    assert all(test_only.non_test_mask(batch).all() for batch in test_only.batches())


def test_missing_modality_is_nan_and_ignored_by_the_gap(tmp_path: Path) -> None:
    third = pa.array([None if number % 2 else 0.5 for number in range(N)], pa.float32())
    score_files = open_scores(write_tables(tmp_path, table(confidence_text=third)), seed=0)
    (batch,) = score_files.batches()
    values = batch.confidence
    assert np.isnan(values[:, 2]).tolist() == [bool(number % 2) for number in range(N)]
    assert batch.gap == pytest.approx(np.nanmax(values, axis=1) - np.nanmin(values, axis=1))
    assert np.isnan(batch.discrepancy("audio:text")).tolist() == np.isnan(values[:, 2]).tolist()
    assert batch.discrepancy("audio:visual").tolist() == (values[:, 0] - values[:, 1]).tolist()
    assert batch.numbers("balance") is None


@pytest.mark.parametrize("options", [{}, {"write_statistics": False}])
@pytest.mark.parametrize("type_", [pa.null(), pa.float32()])
def test_column_of_nulls_counts_as_absent(tmp_path: Path, type_: pa.DataType, options: Any) -> None:
    nulls = table(balance=pa.nulls(N, type_))
    score_files = open_scores(write_tables(tmp_path / "a", nulls, **options), seed=0)
    assert "balance" not in score_files.columns
    partly_filled = table(start=N, balance=pa.array([None] * (N - 1) + [0.5], pa.float32()))
    two_files = open_scores(write_tables(tmp_path / "b", nulls, partly_filled, **options), seed=0)
    values = np.concatenate([batch.numbers("balance") for batch in two_files.batches()])
    assert np.isnan(values[:-1]).all()
    assert values[-1] == 0.5


def test_default_between_is_the_most_confident_modality(tmp_path: Path) -> None:
    third = np.where(np.arange(N) % 4 == 0, 0.0, 1.0)  # 0 in the test samples, which are not used
    score_files = open_scores(write_tables(tmp_path, table(confidence_text=third)), seed=0)
    assert score_files.default_between() == "text"
    assert open_scores(write_tables(tmp_path / "two", table()), seed=0).default_between() == "audio:visual"


@pytest.mark.parametrize("include", [True, False])
def test_members_include_or_exclude_rows(tmp_path: Path, include: bool) -> None:
    folder = write_tables(tmp_path, table())
    score_files = open_scores(folder, seed=0)
    member_ids = pa.chunked_array([table()["sample_id"].combine_chunks().slice(4, 6)])
    members = ManifestMembers(name="some", keys=np.sort(hash_keys(member_ids, seed=0)), include=include)
    assert members.reason == ("not-in-some" if include else "in-some")
    key = np.array(all_of(score_files)["key"], dtype=np.uint64)
    assert members.admitted_mask(key).tolist() == [(4 <= number < 10) == include for number in range(N)]


def value_at(index: int, value: float | None) -> pa.Array:
    values: list[float | None] = [0.5] * N
    values[index] = value
    return pa.array(values, pa.float32())


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "too large": (
        {"confidence_audio": value_at(3, 1.5)},
        r"part-0\.parquet: confidence_audio of sample s003 is 1.5, outside \[0, 1\]: rescore, or correct the table",
    ),
    "too small": ({"confidence_visual": value_at(0, -0.1)}, "confidence_visual of sample s000 is -0.1, outside"),
    "not a number": ({"confidence_audio": value_at(7, float("nan"))}, "confidence_audio of sample s007 is nan"),
    "infinite": ({"confidence_audio": value_at(7, float("inf"))}, "confidence_audio of sample s007 is inf"),
    "balance": ({"balance": value_at(5, -1.01)}, r"balance of sample s005 is -1.01, outside \[-1, 1\]"),
    "posterior": ({"p_balanced": value_at(5, -0.5)}, r"p_balanced of sample s005 is -0.5, outside \[0, 1\]"),
    "one confidence": ({"confidence_audio": value_at(9, None)}, "sample s009 has fewer than two values of confidence"),
    "null id": ({"sample_id": pa.array([None, *map(str, range(1, N))])}, "column sample_id holds nulls"),
    "null label": ({"label": pa.array([1, None] * (N // 2))}, "column label holds nulls; every sample needs"),
    "null name": ({"label": None, "label_name": ["a", None] * (N // 2)}, "column label_name holds nulls"),
    "fraction": ({"label": pa.array([0.5] * N)}, "column label does not hold classes"),
    "wide label": ({"label": pa.array([1, 2**31] * (N // 2))}, "label 2147483648 has more than 32 bits"),
    "lists": ({"label": pa.array([[1]] * N)}, r"column label holds list<.*>; it must hold one string or number"),
    "words": ({"confidence_audio": ["high"] * N}, "column confidence_audio does not hold numbers"),
    "bytes": (
        {"sample_id": pa.array([b"\xff%d" % number for number in range(N)])},
        "column sample_id holds binary; it must hold",
    ),
    "two names": ({"label_name": [f"class {number % 2}" for number in range(N)]}, "have more than one label_name"),
    "bool label": ({"label": pa.array([number % 2 == 0 for number in range(N)])}, "column label holds bool; it must"),
    "date label": ({"label": pa.array([1] * N, pa.int32()).cast(pa.date32())}, "column label holds date32"),
    "group bytes": ({"group": pa.array([b"g"] * N)}, "column group holds binary; it must hold one string or number"),
    "group list": ({"group": pa.array([[1]] * N)}, r"column group holds list<.*>; it must hold one string or number"),
    "one modality": ({"confidence_visual": None}, "is not a score table: it needs sample_id, label"),
    "no label": ({"label": None, "label_name": None}, "is not a score table: it needs sample_id, label"),
    "no id": ({"sample_id": None}, "is not a score table: it needs sample_id, label"),
}


@pytest.mark.parametrize("fault", sorted(INVALID))
def test_invalid_table_raises_a_one_line_message(tmp_path: Path, fault: str) -> None:
    columns, message = INVALID[fault]
    write_tables(tmp_path, table(**columns))
    with pytest.raises(ScoreError, match=message) as caught:
        all_of(open_scores(tmp_path, seed=0))
    assert "\n" not in str(caught.value)


def test_confidence_just_above_one_is_accepted(tmp_path: Path) -> None:
    assert all_of(open_scores(write_tables(tmp_path, table(confidence_audio=value_at(3, 1 + 5e-7))), seed=0))["id"]


def test_first_invalid_row_is_named_in_a_later_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_files_py, "BATCH_ROWS", 5)
    write_tables(tmp_path, table(confidence_audio=pa.array([0.5] * 17 + [2.0, 3.0] + [0.5] * 5, pa.float32())))
    with pytest.raises(ScoreError, match="confidence_audio of sample s017 is 2,"):
        all_of(open_scores(tmp_path, seed=0))


def test_files_of_different_tables_raise(tmp_path: Path) -> None:
    with pytest.raises(
        ScoreError, match=r"part-1.* and .*part-0.* are not shards of one table: only one of them has x"
    ):
        open_scores(write_tables(tmp_path / "a", table(), table(start=N, x=[1] * N)), seed=0)
    with pytest.raises(ScoreError, match="column label is int in one shard and str in another"):
        open_scores(write_tables(tmp_path / "b", table(), table(start=N, label=WORDS)), seed=0)
    repeated = pa.Table.from_arrays([*table().columns, table()["label"]], names=[*table().column_names, "label"])
    with pytest.raises(ScoreError, match=r"part-0\.parquet has 2 columns named label"):
        open_scores(write_tables(tmp_path / "c", repeated), seed=0)


def test_shards_may_differ_in_types_and_column_order(tmp_path: Path) -> None:
    wide = table(start=N, label=pa.array([1_000] * N, pa.int64()), label_name=["many"] * N)
    score_files = open_scores(
        write_tables(
            tmp_path,
            table(label=pa.array([1] * N, pa.uint8()), label_name=["one"] * N),
            wide.select(wide.column_names[::-1]),
        ),
        seed=0,
    )
    assert all_of(score_files)["class"] == [1] * N + [1_000] * N


def test_empty_shards_are_ignored(tmp_path: Path) -> None:
    score_files = open_scores(write_tables(tmp_path / "a", table().slice(0, 0), table(), table().slice(0, 0)), seed=0)
    assert len(score_files.files) == 1
    assert len(all_of(score_files)["id"]) == N
    with pytest.raises(ScoreError, match="the score table has no rows"):
        open_scores(write_tables(tmp_path / "b", table().slice(0, 0)), seed=0)


def test_missing_or_invalid_file_raises(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "none.parquet", str(tmp_path / "*.parquet"), [tmp_path / "none"]):
        with pytest.raises(ScoreError, match=r"score table .* not found: pass a Parquet file, a folder of"):
            open_scores(source, seed=0)
    (tmp_path / "text.parquet").write_text("sample_id,label\n")
    with pytest.raises(ScoreError, match=r"text\.parquet cannot be read as Parquet"):
        open_scores(tmp_path / "text.parquet", seed=0)


def test_repeated_file_is_read_once(tmp_path: Path) -> None:
    path = write_tables(tmp_path, table()) / "part-0.parquet"
    assert open_scores([path, path, tmp_path], seed=0).num_rows == N


def test_unknown_modality_raises(tmp_path: Path) -> None:
    (batch,) = open_scores(write_tables(tmp_path, table()), seed=0).batches()
    with pytest.raises(ConfigError, match="--between audio:smell: no modality 'smell'"):
        batch.discrepancy("audio:smell")


def test_different_fingerprints_raise() -> None:
    check_same_dataset({"fingerprint": "a"}, {"fingerprint": "a"}, name="m")
    check_same_dataset({"fingerprint": "a"}, {}, name="m")
    with pytest.raises(ManifestError, match="m was made from another dataset than these scores"):
        check_same_dataset({"fingerprint": "a"}, {"fingerprint": "b"}, name="m")
