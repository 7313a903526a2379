"""Encoded samples: which are scored, why others are excluded, and the fingerprint of a dataset."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaudit.audit.dataset.dataset import DataConfig, Dataset, open_dataset
from mmaudit.audit.dataset.labels import NO_LABEL, UNKNOWN_LABEL
from mmaudit.audit.dataset.modalities import Modality
from mmaudit.audit.dataset.samples import Samples, read_samples
from mmaudit.audit.errors import Quarantined, Reason, ScoreError
from mmaudit.audit.features.cached_matrix import FeatureMatrix
from mmaudit.audit.features.encode import encode_dataset
from mmaudit.audit.features.encoded_samples import (
    EncodedSamples,
    Status,
    collect_encoded,
    content_hashes,
    missing_in_source,
    select_usable,
)
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress

BROKEN = "!"  # a cell that cannot be read; None is a null
NAMES = ("a", "b", "c")


def status_of(name: str, cells: Sequence[str | None]) -> Status:
    problems: list[tuple[int, Reason, str]] = []
    for row, cell in enumerate(cells):
        if cell is None:
            problems.append((row, Reason.MISSING, f"{name} is null"))
        elif cell == BROKEN:
            problems.append((row, Reason.CORRUPT, "cannot be decoded"))
    return Status(
        modality=Modality(name=name, column=name, kind="audio"),
        usable=np.array([cell not in (None, BROKEN) for cell in cells]),
        content=np.array([(cell or "null").ljust(32, ".") for cell in cells], dtype="S32"),  # digests have equal length
        recurs=np.zeros(len(cells), dtype=bool),
        problem=tuple(problems),
    )


def samples_of(num_rows: int, **changes: Any) -> Samples:
    fields = {
        "sample_id": [f"s{row}" for row in range(num_rows)],
        "split": ["train"] * num_rows,
        "group": [f"g{row}" for row in range(num_rows)],
    }
    strings = {name: np.array(changes.get(name, values), dtype=object) for name, values in fields.items()}
    return Samples(
        sample_id=strings["sample_id"],
        label=np.array(changes.get("label", np.arange(num_rows) % 2), dtype=np.int32),
        class_names=tuple(changes.get("class_names", ["x", "y"])),
        split=strings["split"],
        group=strings["group"] if changes.get("grouped", True) else None,
        paths=pa.table({}),
        unknown=changes.get("unknown", ()),
    )


def encoded_of(*cells: Sequence[str | None], **changes: Any) -> EncodedSamples:
    """Return encoded samples of modalities a, b, ... with these cells; `changes` are fields of the samples."""
    statuses = tuple(status_of(name, column) for name, column in zip(NAMES, cells, strict=False))
    return EncodedSamples(samples=samples_of(len(cells[0]), **changes), statuses=statuses)


def reasons(quarantined: Sequence[Quarantined]) -> list[tuple[str, str | None, Reason, str]]:
    return [(entry.sample_id, entry.modality, entry.reason, entry.detail) for entry in quarantined]


def test_smallest_id_of_duplicates_is_kept() -> None:
    encoded = encoded_of("xyxx", "xyxx", sample_id=["s9", "s1", "s3", "s10"], label=[0, 1, 0, 1])
    rows, quarantined = select_usable(encoded, keep_duplicates=False)
    assert encoded.samples.sample_id[rows].tolist() == ["s1", "s10"]
    assert sorted(reasons(quarantined)) == [
        ("s3", None, Reason.DUPLICATE, "the same content as s10, which has another label"),
        ("s9", None, Reason.DUPLICATE, "the same content as s10, which has another label"),
    ]
    alike, copies = select_usable(encoded_of("xyxx", "xyxx", label=[0, 1, 0, 0]), keep_duplicates=False)
    assert alike.tolist() == [0, 1]
    assert {entry.detail for entry in copies} == {"the same content as s0"}
    assert select_usable(encoded, keep_duplicates=True)[0].tolist() == [0, 1, 2, 3]
    assert select_usable(encoded, keep_duplicates=True)[1] == []


def test_equal_content_in_one_modality_is_not_a_duplicate() -> None:
    rows, quarantined = select_usable(encoded_of("xxxx", "abcd"), keep_duplicates=False)
    assert (rows.tolist(), quarantined) == ([0, 1, 2, 3], [])


def test_copy_of_unscorable_sample_is_scored() -> None:
    """The smallest id has no label, so that the other sample is not a duplicate of a scored one."""
    rows, quarantined = select_usable(encoded_of("xxy", "xxy", label=[NO_LABEL, 1, 0]), keep_duplicates=False)
    assert rows.tolist() == [1, 2]
    assert reasons(quarantined) == [("s0", None, Reason.NO_LABEL, "the label is null")]


def test_null_is_allowed_with_two_other_modalities() -> None:
    three = encoded_of(["p", None, "r"], "xyz", "uvw")
    rows, quarantined = select_usable(three, keep_duplicates=False)
    assert (rows.tolist(), quarantined) == ([0, 1, 2], [])
    assert missing_in_source(three.statuses[0]).tolist() == [False, True, False]
    rows, quarantined = select_usable(encoded_of(["p", None, "r"], "xyz"), keep_duplicates=False)
    assert rows.tolist() == [0, 2]
    assert reasons(quarantined) == [("s1", "a", Reason.MISSING, "a is null")]


def test_sample_with_one_usable_modality_is_excluded() -> None:
    rows, quarantined = select_usable(encoded_of(["p", None], ["x", None], "uv"), keep_duplicates=False)
    assert rows.tolist() == [0]
    assert [(entry.sample_id, entry.modality) for entry in quarantined] == [("s1", "a"), ("s1", "b")]


def test_damaged_file_excludes_the_sample() -> None:
    encoded = encoded_of(["p", "q", BROKEN], ["x", BROKEN, None], "uvw")
    rows, quarantined = select_usable(encoded, keep_duplicates=False)
    assert rows.tolist() == [0]
    assert [(entry.sample_id, entry.modality, entry.reason) for entry in quarantined] == [
        ("s2", "a", Reason.CORRUPT),
        ("s1", "b", Reason.CORRUPT),
        ("s2", "b", Reason.MISSING),
    ]


def test_missing_file_counts_as_damaged_not_as_null() -> None:
    encoded = encoded_of("pq", "xy", "uv")
    missing_file = (1, Reason.MISSING, "q.wav does not exist")
    status = Status(
        modality=encoded.statuses[0].modality,
        usable=np.array([True, False]),
        content=encoded.statuses[0].content,
        recurs=encoded.statuses[0].recurs,
        problem=(missing_file,),
    )
    assert not missing_in_source(status).any()
    encoded = EncodedSamples(samples=encoded.samples, statuses=(status, *encoded.statuses[1:]))
    rows, quarantined = select_usable(encoded, keep_duplicates=False)
    assert rows.tolist() == [0]
    assert [entry.detail for entry in quarantined] == ["q.wav does not exist"]


def test_clip_without_a_track_lacks_the_modality() -> None:
    """A silent film among films with sound is not damaged: it is scored by two other modalities."""
    without_sound = Status(
        modality=Modality(name="a", column="a", kind="audio"),
        usable=np.array([True, False, True]),
        content=np.full(3, b"c" * 32),
        recurs=np.zeros(3, bool),
        problem=((1, Reason.NO_TRACK, "no audio stream; streams in the file: video"),),
    )
    assert missing_in_source(without_sound).tolist() == [False, True, False]
    others = tuple(status_of(name, ["x", "y", "z"]) for name in ("b", "c"))
    three = EncodedSamples(samples=samples_of(3), statuses=(without_sound, *others))
    assert select_usable(three, keep_duplicates=False)[0].tolist() == [0, 1, 2]
    two = EncodedSamples(samples=samples_of(3), statuses=(without_sound, others[0]))
    rows, quarantined = select_usable(two, keep_duplicates=False)
    assert rows.tolist() == [0, 2]
    assert reasons(quarantined) == [("s1", "a", Reason.NO_TRACK, "no audio stream; streams in the file: video")]


def test_unknown_label_and_missing_label_have_different_reasons() -> None:
    encoded = encoded_of("pqr", "xyz", label=[0, NO_LABEL, UNKNOWN_LABEL], unknown=((2, "zebra"),))
    rows, quarantined = select_usable(encoded, keep_duplicates=False)
    assert rows.tolist() == [0]
    assert reasons(quarantined) == [
        ("s1", None, Reason.NO_LABEL, "the label is null"),
        ("s2", None, Reason.UNKNOWN_LABEL, "'zebra' is not among the classes"),
    ]


def test_number_without_a_stratum_is_said_to_be_no_number() -> None:
    encoded = encoded_of("pq", "xy", label=[0, UNKNOWN_LABEL], unknown=((1, "inf"),))
    encoded = replace(encoded, samples=replace(encoded.samples, task="regression"))
    _, quarantined = select_usable(encoded, keep_duplicates=False)
    assert reasons(quarantined) == [("s1", None, Reason.UNKNOWN_LABEL, "inf is not a number of at most 1e+15")]


def test_no_scorable_sample_is_rejected_with_first_reason() -> None:
    with pytest.raises(
        ScoreError,
        match=r"at least two usable modalities and no damaged one; the first problem: .*a is null",
    ):
        select_usable(encoded_of([None, None], "xy"), keep_duplicates=False)


CELL = st.sampled_from(["x", "y", None, BROKEN])
ROW = st.tuples(CELL, CELL, CELL, st.sampled_from([0, 1, NO_LABEL, UNKNOWN_LABEL]))


@settings(deadline=None)
@given(st.lists(ROW, min_size=1, max_size=24), st.booleans(), st.permutations(range(24)))
def test_samples_are_scored_or_excluded_independent_of_order(
    rows: list[tuple[Any, ...]], keep_duplicates: bool, order: list[int]
) -> None:
    """Scored: no damaged modality, at least two of three, a label, and the smallest id of equal cells."""
    scorable = {
        f"s{row}": cells[:3]
        for row, cells in enumerate(rows)
        if BROKEN not in cells and sum(cell is not None for cell in cells[:3]) >= 2 and cells[3] >= 0
    }
    expected = {
        name
        for name, cells in scorable.items()
        if keep_duplicates or name == min(key for key, values in scorable.items() if values == cells)
    }
    problems = []
    for indices in (range(len(rows)), [index for index in order if index < len(rows)]):
        reordered = [rows[index] for index in indices]
        encoded = encoded_of(
            *(list(column) for column in list(zip(*reordered, strict=True))[:3]),
            sample_id=[f"s{index}" for index in indices],
            label=[cells[3] for cells in reordered],
            unknown=tuple((row, "odd") for row, cells in enumerate(reordered) if cells[3] == UNKNOWN_LABEL),
        )
        if not expected:
            with pytest.raises(ScoreError, match="no sample has a label, at least two usable modalities"):
                select_usable(encoded, keep_duplicates=keep_duplicates)
            continue
        scored, quarantined = select_usable(encoded, keep_duplicates=keep_duplicates)
        assert set(encoded.samples.sample_id[scored]) == expected
        assert {entry.sample_id for entry in quarantined} == {f"s{row}" for row in range(len(rows))} - expected
        problems.append(sorted(map(str, quarantined)))
    assert problems == problems[:1] * len(problems)


def test_fingerprint_does_not_depend_on_row_order() -> None:
    encoded = encoded_of("pqrs", "wxyz", label=[0, 1, 1, NO_LABEL])
    reordered = encoded_of(
        "srqp",
        "zyxw",
        sample_id=["s3", "s2", "s1", "s0"],
        group=["g3", "g2", "g1", "g0"],
        label=[NO_LABEL, 1, 1, 0],
    )
    assert encoded.fingerprint == reordered.fingerprint
    assert encoded.content.tolist() == reordered.content.tolist()[::-1]


@pytest.mark.parametrize(
    "change",
    [
        {"sample_id": ["s0", "s1", "s2", "other"]},
        {"label": [0, 1, 1, 1]},
        {"label": [0, 1, 0, NO_LABEL]},
        {"class_names": ["x", "z"]},
        {"split": ["train", "train", "test", "train"]},
        {"group": ["g0", "g1", "g2", "g0"]},
        {"grouped": False},
    ],
)
def test_every_change_of_samples_changes_the_fingerprint(change: dict[str, Any]) -> None:
    before = encoded_of("pqrs", "wxyz").fingerprint
    assert encoded_of("pqrs", "wxyz").fingerprint == before
    assert encoded_of("pqrs", "wxyz", **change).fingerprint != before


@pytest.mark.parametrize("cells", [("pqrt", "wxyz"), ("qprs", "wxyz"), ("wxyz", "pqrs"), ("pqrs",)])
def test_other_content_changes_the_fingerprint(cells: tuple[str, ...]) -> None:
    assert encoded_of(*cells).fingerprint != encoded_of("pqrs", "wxyz").fingerprint


def read_encoded(data: Path, cache: Path, config: DataConfig) -> EncodedSamples:
    dataset = open_dataset(data, config)
    tasks = encode_dataset(dataset, cache, media=MediaConfig(image_size=16), num_workers=0, progress=no_progress)
    return collect_encoded(dataset, read_samples(dataset, seed=0, test_fraction=0.2), tasks)


def test_metadata_format_does_not_change_the_fingerprint(clips: Path, tmp_path: Path) -> None:
    with (clips / "metadata.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows[5]["label"] = rows[7]["label"] = ""
    written = [{name: value or None for name, value in row.items()} for row in rows]
    (clips / "metadata.csv").unlink()
    datasets = []
    for number, name in enumerate(("metadata.csv", "metadata.jsonl", "metadata.parquet")):
        table = pa.Table.from_pylist(written[::-1] if number else written)
        if name.endswith("parquet"):
            pq.write_table(table, clips / name)
        elif name.endswith("csv"):
            table.to_pandas().to_csv(clips / name, index=False)
        else:
            table.to_pandas().to_json(clips / name, orient="records", lines=True)
        config = DataConfig(group="speaker", shard_rows=256 if number else 7)
        datasets.append(read_encoded(clips, tmp_path / str(number), config))
        (clips / name).unlink()
    assert len({encoded.fingerprint for encoded in datasets}) == 1
    contents = [dict(zip(encoded.samples.sample_id, encoded.content, strict=True)) for encoded in datasets]
    assert contents[0] == contents[1] == contents[2]
    assert [len(select_usable(encoded, keep_duplicates=False)[0]) for encoded in datasets] == [22] * 3


def test_nulls_and_unknown_classes_on_disk_are_excluded(tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "id": [f"s{row}" for row in range(6)],
        "label": ["x", "y", "x", "zebra", None, "y"],
        **{name: np.random.default_rng(0).random((6, 2)).tolist() for name in NAMES},
    }
    columns["a"][1] = columns["a"][2] = columns["b"][2] = None
    columns["c"][5] = [float("nan"), 0.0]
    pq.write_table(pa.table(columns), tmp_path / "d.parquet", row_group_size=4)
    encoded = read_encoded(tmp_path / "d.parquet", tmp_path / "cache", DataConfig(classes=("x", "y")))
    rows, quarantined = select_usable(encoded, keep_duplicates=False)
    assert encoded.samples.sample_id[rows].tolist() == ["s0", "s1"]
    assert {(entry.sample_id, entry.modality, entry.reason) for entry in quarantined} == {
        ("s2", "a", Reason.MISSING),
        ("s2", "b", Reason.MISSING),
        ("s3", None, Reason.UNKNOWN_LABEL),
        ("s4", None, Reason.NO_LABEL),
        ("s5", "c", Reason.NOT_FINITE),
    }


def open_clips(folder: Path) -> Dataset:
    return open_dataset(folder, DataConfig(id="id"))


def test_hashes_of_media_equal_those_of_encoding(clips: Path, tmp_path: Path) -> None:
    (clips / "4.wav").unlink()
    dataset = open_clips(clips)
    tasks = encode_dataset(dataset, tmp_path / "cache", media=MediaConfig(), num_workers=0, progress=no_progress)
    encoded = collect_encoded(dataset, read_samples(dataset, seed=0, test_fraction=0.2), tasks)
    all_hashes = list(content_hashes(dataset))
    assert [hashes.sample_id for hashes in all_hashes] == encoded.samples.sample_id.tolist()
    assert [hashes.content for hashes in all_hashes] == encoded.content.tolist()
    assert {hashes.sample_id: hashes.problem for hashes in all_hashes if hashes.problem} == {"004": "no file 4.wav"}


def test_hashes_of_vectors_equal_those_of_encoding(planted: Callable[..., Path], tmp_path: Path) -> None:
    dataset = open_dataset(planted(num_samples=30))
    tasks = encode_dataset(dataset, tmp_path / "cache", media=MediaConfig(), num_workers=0, progress=no_progress)
    encoded = collect_encoded(dataset, read_samples(dataset, seed=0, test_fraction=0.2), tasks)
    assert [hashes.content for hashes in content_hashes(dataset)] == encoded.content.tolist()


def test_hashes_do_not_depend_on_where_vectors_and_texts_are_stored(tmp_path: Path) -> None:
    """Vectors in .npy files and words in text files have the content, and the scores, of those in the rows."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((12, 4)).astype(np.float32)
    texts = [f"words of sample {row}" for row in range(12)]
    for row, (vector, text) in enumerate(zip(vectors, texts, strict=True)):
        np.save(tmp_path / f"{row}.npy", vector[None])
        (tmp_path / f"{row}.txt").write_text(text)
    names = {"id": [f"s{row}" for row in range(12)], "label": [str(row % 2) for row in range(12)]}
    paths = {kind: [f"{row}.{kind}" for row in range(12)] for kind in ("npy", "txt")}
    inside = {**names, "vector": list(vectors), "text": texts}
    outside = {**names, "vector": paths["npy"], "text": paths["txt"]}
    hashes, encoded_vectors = [], []
    for name, columns in (("inside", inside), ("outside", outside)):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        dataset = open_dataset(tmp_path / f"{name}.parquet")
        assert [(modality.kind, modality.length) for modality in dataset.modalities] == [
            ("features", 4),
            ("text", None),
        ]
        hashes.append([entry.content for entry in content_hashes(dataset)])
        cache = tmp_path / f"cache-{name}"
        samples = read_samples(dataset, seed=0, test_fraction=0.2)
        tasks = encode_dataset(dataset, cache, media=MediaConfig(), num_workers=0, progress=no_progress)
        encoded = collect_encoded(dataset, samples, tasks)
        assert encoded.content.tolist() == hashes[-1]
        rows = np.arange(12)
        encoded_vectors.append([FeatureMatrix.of(tasks, status, rows).read(rows) for status in encoded.statuses])
    assert hashes[0] == hashes[1]
    for first, second in zip(*encoded_vectors, strict=True):
        np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(encoded_vectors[1][0], vectors)


def test_hash_depends_only_on_own_files(clips: Path) -> None:
    before = {hashes.sample_id: hashes.content for hashes in content_hashes(open_clips(clips))}
    (clips / "5.wav").write_bytes((clips / "3.wav").read_bytes())
    after = {hashes.sample_id: hashes.content for hashes in content_hashes(open_clips(clips))}
    assert [name for name in before if before[name] != after[name]] == ["005"]
