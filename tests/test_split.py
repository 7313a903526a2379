"""Tests of writing a split: every row once, bytes independent of the input layout, and atomic files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import ScoreError
from mmaudit.audit.scores.table import read_scores, write_scores
from mmaudit.rebalance import manifest, score_files, split
from mmaudit.rebalance import selection as external_sort
from mmaudit.rebalance.balanced import BalancedConfig, plan_balanced
from mmaudit.rebalance.manifest import (
    COLUMNS,
    DROPPED_COLUMNS,
    RANGES,
    dropped_path,
    read_dropped,
    read_manifest,
    read_stated_digests,
    table_digest,
)
from mmaudit.rebalance.score_tables import open_scores
from mmaudit.rebalance.selection import select_rows
from mmaudit.rebalance.split import write_split

pytestmark = pytest.mark.usefixtures("quick_scores")

PROVENANCE = {"source": "data", "config": {"seed": 0}, "ranges": {}, "schema": "mmaudit.scores/1", "paths": ["wav"]}


def table(n: int, *, seed: int = 0, **changes: Any) -> pa.Table:
    """Return a score table with all columns that a manifest copies, sorted by id; columns set to None are left out."""
    rng = np.random.default_rng(seed)
    holes = rng.random(n) < 0.1
    columns: dict[str, Any] = {
        "sample_id": [f"s{number:05d}" for number in range(n)],
        "label": pa.array(rng.integers(0, 5, n) * 7 - 3, pa.int32()),
        "label_name": None,
        "split": rng.choice(["test", "train", "validation"], n).tolist(),
        "group": pa.array([f"g{number}" for number in rng.integers(0, 40, n)], mask=holes),
        "confidence_audio": rng.random(n).astype(np.float32),
        "confidence_visual": rng.random(n).astype(np.float32),
        "balance": pa.array(rng.uniform(-1, 1, n).astype(np.float32), mask=holes),
        "p_balanced": rng.random(n).astype(np.float32),
        "content": [f"{number:032x}" for number in range(n)],
        "wav": [f"clips/{number}.wav" for number in range(n)],
    }
    columns["label_name"] = [f"class {number}" for number in columns["label"].to_pylist()]
    scores = pa.table({name: values for name, values in {**columns, **changes}.items() if values is not None})
    return scores.replace_schema_metadata({b"mmaudit": json.dumps(PROVENANCE).encode()})


def split_to(
    path: Path | None, source: Any, *, num_bins: int = 5, tolerance: float = 0.2, seed: int = 0
) -> dict[str, Any]:
    score_files = open_scores(source, seed=seed)
    rule = plan_balanced(score_files, BalancedConfig(bins=num_bins, tolerance=tolerance))
    selection = select_rows(score_files, rule, scratch=Path("unused") if path is None else path.parent / "scratch")
    return write_split(selection, path, name="even", recipe={"seed": seed}, num_bins=num_bins)


def file_hashes(path: Path) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, dropped_path(path))]


@settings(max_examples=examples(20))
@given(
    st.lists(st.integers(1, 299), max_size=5, unique=True).map(sorted),
    st.integers(5, 300),
    st.integers(5, 300),
    st.sampled_from([4, 1 << 18]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_bytes_are_independent_of_files_and_batches(
    tmp_path_factory: pytest.TempPathFactory,
    cuts: list[int],
    group: int,
    batch: int,
    part: int,
    coded: bool,
    random: Any,
) -> None:
    """For any file names, order, row groups and batches, sorted in memory or on disk, strings or dictionaries."""
    folder, scores = tmp_path_factory.mktemp("split"), table(300)
    pq.write_table(scores, folder / "whole.parquet")
    slices = list(zip([0, *cuts], [*cuts, 300], strict=True))
    paths = random.sample([folder / f"{label}.parquet" for label in "abcdefgh"], len(slices))
    for path, (first, end) in zip(paths, slices, strict=True):
        shard = scores.slice(first, end - first)
        for name in ("label_name", "group", "split") if coded else ():
            codes = shard[name].combine_chunks().dictionary_encode()
            shard = shard.set_column(shard.column_names.index(name), name, codes)
        pq.write_table(shard, path, row_group_size=group)
    random.shuffle(paths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "GROUP_ROWS", 50)
        patch.setattr(manifest, "GROUP_ROWS", 50)
        split_to(folder / "one" / "m.parquet", folder / "whole.parquet")
        patch.setattr(score_files, "BATCH_ROWS", batch)
        patch.setattr(external_sort, "_PART_ROWS", part)
        split_to(folder / "other" / "m.parquet", paths)
        assert file_hashes(folder / "one" / "m.parquet") == file_hashes(folder / "other" / "m.parquet")
        read = read_manifest(folder / "one" / "m.parquet")
        stated = read_stated_digests(folder / "one" / "m.parquet")
        assert stated == {"rows": len(read), "digest": read.digest(), "metadata": read.digests.metadata}
        dropped = read_dropped(folder / "one" / "m.parquet", read)
        assert dropped is not None
        dropped_stated = read_stated_digests(dropped_path(folder / "one" / "m.parquet"))
        digests = {"digest": table_digest(dropped), "metadata": read.digests.metadata}
        assert dropped_stated == {"rows": len(dropped), **digests, "dropped_from": read.digest()}
    groups = [
        pq.read_metadata(folder / "one" / "m.parquet").row_group(label).num_rows for label in range(len(read) // 50)
    ]
    assert groups == [50] * (len(read) // 50)


def test_table_in_memory_gives_the_bytes_of_its_file(tmp_path: Path) -> None:
    balance = np.random.default_rng(1).uniform(-1, 1, 80).astype(np.float32)  # a ScoreTable has no nulls in balance
    pq.write_table(table(80, balance=balance), tmp_path / "plain.parquet")
    scores = read_scores(tmp_path / "plain.parquet")
    write_scores(scores, tmp_path / "ours.parquet")
    split_to(tmp_path / "a" / "m.parquet", scores)
    split_to(tmp_path / "b" / "m.parquet", tmp_path / "ours.parquet")
    assert file_hashes(tmp_path / "a" / "m.parquet") == file_hashes(tmp_path / "b" / "m.parquet")


def test_numbers_are_the_same_without_a_path(tmp_path: Path) -> None:
    pq.write_table(table(80), tmp_path / "scores.parquet")
    numbers = split_to(None, tmp_path / "scores.parquet")
    assert numbers == split_to(tmp_path / "out" / "m.parquet", tmp_path / "scores.parquet")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["m.dropped.parquet", "m.parquet"]


def test_every_scored_row_is_written_once_unchanged(tmp_path: Path) -> None:
    scores = table(120)
    pq.write_table(scores, tmp_path / "scores.parquet")
    numbers = split_to(tmp_path / "m.parquet", tmp_path / "scores.parquet")
    read = read_manifest(tmp_path / "m.parquet")
    dropped = read_dropped(tmp_path / "m.parquet", read)
    assert dropped is not None
    assert {field.name: field.type for field in read.table.schema} == {**COLUMNS, "wav": pa.string()}
    assert {field.name: field.type for field in dropped.schema} == {**DROPPED_COLUMNS, "wav": pa.string()}
    rows = read.table.to_pylist() + dropped.to_pylist()
    assert (len(read), len(dropped)) == (numbers["kept"], numbers["dropped"])
    assert 0 < len(dropped) < 120
    scored = {row["sample_id"]: row for row in scores.to_pylist()}
    assert sorted(row["sample_id"] for row in rows) == sorted(scored)
    for row in rows:
        expected = scored[row["sample_id"]]
        for name in ("label", "label_name", "split", "group", "balance", "p_balanced", "content", "wav"):
            assert row[name] == expected[name]
        assert row["discrepancy"] == np.float32(expected["confidence_audio"]) - np.float32(
            expected["confidence_visual"]
        )
        assert row["gap"] == abs(row["discrepancy"])
        assert row["subset"] == "even"
    assert all(row["threshold"] <= row["score"] and row["reason"] == "bin-full" for row in dropped.to_pylist())
    in_order = [expected for expected in scored if expected in set(read.table["sample_id"].to_pylist())]
    assert read.table["sample_id"].to_pylist() == in_order


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "required columns only": dict.fromkeys(("label_name", "split", "group", "balance", "p_balanced", "content", "wav")),
    "label_name only": {"label": None},
    "strings as labels": {"label": [f"w{number % 4}" for number in range(60)], "label_name": None},
    "numbers as strings": {
        "sample_id": pa.array(range(60)),
        "label": [number % 3 for number in range(60)],
        "label_name": [number % 3 for number in range(60)],
        "group": [number % 7 for number in range(60)],
        "content": list(range(60)),
    },
    "nulls": {
        "split": pa.nulls(60),
        "group": pa.nulls(60, pa.string()),
        "balance": pa.nulls(60),
        "p_balanced": pa.nulls(60, pa.float32()),
        "content": pa.nulls(60),
    },
    "some nulls": {
        "split": [None, "train"] * 30,
        "label": [number % 2 for number in range(60)],
        "label_name": [None, "b"] * 30,
        "group": [None, "g"] * 30,
    },
    "views": {
        "sample_id": pa.array([f"v{number}" for number in range(60)]).cast(pa.string_view()),
        "group": pa.array([f"v{number % 3}" for number in range(60)]).cast(pa.string_view()),
        "content": pa.array([f"v{number}" for number in range(60)]).cast(pa.string_view()),
    },
    "codes": {"label": [number % 4 for number in range(60)]}
    | {
        name: pa.array(
            [f"v{number % 4 if name != 'sample_id' else number}" for number in range(60)]
        ).dictionary_encode()
        for name in ("sample_id", "label_name", "group", "content", "wav")
    }
    | {"split": pa.array(["train", "test"] * 30).dictionary_encode()},
    "large": {
        name: pa.array([f"v{number}" for number in range(60)], pa.large_string())
        for name in ("sample_id", "group", "content", "wav")
    }
    | {"split": pa.array(["train", "test"] * 30, pa.large_string())},
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_manifest_types_are_independent_of_score_types(tmp_path: Path, variant: str) -> None:
    scores = table(60, **VARIANTS[variant])
    pq.write_table(scores, tmp_path / "scores.parquet")
    split_to(tmp_path / "m.parquet", tmp_path / "scores.parquet")
    read = read_manifest(tmp_path / "m.parquet")
    dropped = read_dropped(tmp_path / "m.parquet", read)
    assert dropped is not None
    paths = {"wav": pa.string()} if "wav" in scores.column_names else {}
    assert {field.name: field.type for field in read.table.schema} == {**COLUMNS, **paths}
    assert len(read) + len(dropped) == 60
    scored = {str(row["sample_id"]): row for row in scores.to_pylist()}
    for row in read.table.to_pylist() + dropped.to_pylist():
        expected = scored[row["sample_id"]]
        for name in ("split", "group", "content", "wav"):
            assert name not in row or row[name] == (None if expected.get(name) is None else str(expected[name]))
        if isinstance(expected.get("label"), int):
            assert row["label"] == expected["label"]
        if expected.get("label_name") is not None:
            assert row["label_name"] == str(expected["label_name"])
        elif "label_name" not in scores.column_names:
            assert row["label_name"] == str(expected["label"])


def test_files_record_their_provenance(tmp_path: Path) -> None:
    pq.write_table(table(60), tmp_path / "scores.parquet")
    split_to(tmp_path / "m.parquet", tmp_path / "scores.parquet", seed=3)
    for path in (tmp_path / "m.parquet", tmp_path / "m.dropped.parquet"):
        metadata = json.loads(pq.read_schema(path).metadata[b"mmaudit"])
        assert metadata["schema"] == "mmaudit.manifest/3"
        assert (metadata["subset"], metadata["between"]) == ("even", "audio:visual")
        assert metadata["recipe"] == {"seed": 3}
        assert metadata["scores"] == {"config": {"seed": 0}}  # no path, so that the bytes do not depend on the folder
        assert {name: (entry["range"], entry["meaning"]) for name, entry in metadata["ranges"].items()} == {
            name: entry[:2] for name, entry in RANGES.items()
        }


@pytest.mark.parametrize("when", ["source", "writer", "interrupt"])
def test_interrupted_split_leaves_the_old_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    pq.write_table(table(60), tmp_path / "scores.parquet")
    out = tmp_path / "out"
    for has_old_files in (False, True):
        if has_old_files:
            split_to(out / "m.parquet", tmp_path / "scores.parquet")
        before = file_hashes(out / "m.parquet") if has_old_files else []
        with monkeypatch.context() as patch:
            error = fail(patch, when)
            with pytest.raises(error, match="half-way"):
                split_to(out / "m.parquet", tmp_path / "scores.parquet", seed=1)
        file_names = sorted(file.name for file in out.iterdir())
        assert file_names == (["m.dropped.parquet", "m.parquet"] if has_old_files else [])
        assert not has_old_files or file_hashes(out / "m.parquet") == before


def fail(patch: pytest.MonkeyPatch, when: str) -> type[BaseException]:
    """Patch the second batch of rows, or the second write, to fail."""
    patch.setattr(score_files, "BATCH_ROWS", 20)
    patch.setattr(split, "GROUP_ROWS", 5)
    if when == "writer":
        write = pq.ParquetWriter.write_table
        calls = []

        def stop(self: Any, *args: Any, **options: Any) -> None:
            calls.append(1)
            if len(calls) > 1:
                raise OSError("half-way: disk full")
            write(self, *args, **options)

        patch.setattr(pq.ParquetWriter, "write_table", stop)
        return OSError
    error = ScoreError if when == "source" else KeyboardInterrupt
    original = split._columns
    calls = []

    def columns(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise error("half-way")
        return original(*args, **options)

    patch.setattr(split, "_columns", columns)
    return error


def test_relative_path_like_a_url_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("hf:/owner/even.parquet")
    path.parent.mkdir(parents=True)
    pq.write_table(table(40), "scores.parquet")
    split_to(path, Path("scores.parquet"))
    assert read_manifest(path).table.num_rows > 0
