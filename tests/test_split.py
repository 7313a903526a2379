"""Laws of writing a split: every scored row once, the same bytes however the scores lie, and whole files or none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import ScoreError
from mmaudit.audit.scores.table import read_scores, write_scores
from mmaudit.rebalance import external_sort as spill
from mmaudit.rebalance import manifest, split
from mmaudit.rebalance import score_files as parts
from mmaudit.rebalance.balanced import BalancedConfig, plan_balanced
from mmaudit.rebalance.manifest import (
    COLUMNS,
    DROPPED_COLUMNS,
    RANGES,
    digest_of,
    dropped_path,
    read_dropped,
    read_manifest,
    rows_of,
)
from mmaudit.rebalance.score_tables import open_scores
from mmaudit.rebalance.selection import select_rows
from mmaudit.rebalance.split import write_split

PROVENANCE = {"source": "data", "config": {"seed": 0}, "ranges": {}, "schema": "mmaudit.scores/1", "paths": ["wav"]}


def table(n: int, *, seed: int = 0, **more: Any) -> pa.Table:
    """Give a score table with all that a manifest takes over, sorted by id; a column of None is left out."""
    rng = np.random.default_rng(seed)
    holes = rng.random(n) < 0.1
    columns: dict[str, Any] = {
        "sample_id": [f"s{one:05d}" for one in range(n)],
        "label": pa.array(rng.integers(0, 5, n) * 7 - 3, pa.int32()),
        "label_name": None,
        "split": rng.choice(["test", "train", "validation"], n).tolist(),
        "group": pa.array([f"g{one}" for one in rng.integers(0, 40, n)], mask=holes),
        "confidence_audio": rng.random(n).astype(np.float32),
        "confidence_visual": rng.random(n).astype(np.float32),
        "balance": pa.array(rng.uniform(-1, 1, n).astype(np.float32), mask=holes),
        "p_balanced": rng.random(n).astype(np.float32),
        "content": [f"{one:032x}" for one in range(n)],
        "wav": [f"clips/{one}.wav" for one in range(n)],
    }
    columns["label_name"] = [f"class {one}" for one in columns["label"].to_pylist()]
    found = pa.table({name: values for name, values in {**columns, **more}.items() if values is not None})
    return found.replace_schema_metadata({b"mmaudit": json.dumps(PROVENANCE).encode()})


def split_to(
    path: Path | None, source: Any, *, num_bins: int = 5, tolerance: float = 0.2, seed: int = 0
) -> dict[str, Any]:
    found = open_scores(source, seed=seed)
    rule = plan_balanced(found, BalancedConfig(bins=num_bins, tolerance=tolerance))
    made = select_rows(found, rule, scratch=Path("unused") if path is None else path.parent / "scratch")
    return write_split(made, path, name="even", recipe={"seed": seed}, num_bins=num_bins)


def sums(path: Path) -> list[str]:
    return [hashlib.sha256(each.read_bytes()).hexdigest() for each in (path, dropped_path(path))]


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.integers(1, 299), max_size=5, unique=True).map(sorted),
    st.integers(5, 300),
    st.integers(5, 300),
    st.sampled_from([4, 1 << 18]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_the_bytes_are_the_same_however_the_scores_lie(
    tmp_path_factory: pytest.TempPathFactory,
    cuts: list[int],
    group: int,
    batch: int,
    part: int,
    coded: bool,
    random: Any,
) -> None:
    """Of any names, order, number of shards, row groups and batches, in memory or spilled, of texts or codes."""
    folder, whole = tmp_path_factory.mktemp("split"), table(300)
    pq.write_table(whole, folder / "whole.parquet")
    places = list(zip([0, *cuts], [*cuts, 300], strict=True))
    names = random.sample([folder / f"{one}.parquet" for one in "abcdefgh"], len(places))
    for path, (first, end) in zip(names, places, strict=True):
        some = whole.slice(first, end - first)
        for name in ("label_name", "group", "split") if coded else ():
            codes = some[name].combine_chunks().dictionary_encode()
            some = some.set_column(some.column_names.index(name), name, codes)
        pq.write_table(some, path, row_group_size=group)
    random.shuffle(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "GROUP_ROWS", 50)
        patch.setattr(manifest, "GROUP_ROWS", 50)
        split_to(folder / "one" / "m.parquet", folder / "whole.parquet")
        patch.setattr(parts, "BATCH_ROWS", batch)
        patch.setattr(spill, "_PART_ROWS", part)
        split_to(folder / "other" / "m.parquet", names)
        assert sums(folder / "one" / "m.parquet") == sums(folder / "other" / "m.parquet")
        read = read_manifest(folder / "one" / "m.parquet")
        about = rows_of(folder / "one" / "m.parquet")
        assert about == {"rows": len(read), "digest": read.digest(), "metadata": read.digests.metadata}
        left = read_dropped(folder / "one" / "m.parquet", read)
        assert left is not None
        beside = rows_of(dropped_path(folder / "one" / "m.parquet"))
        digests = {"digest": digest_of(left), "metadata": read.digests.metadata}
        assert beside == {"rows": len(left), **digests, "dropped_from": read.digest()}
    groups = [pq.read_metadata(folder / "one" / "m.parquet").row_group(one).num_rows for one in range(len(read) // 50)]
    assert groups == [50] * (len(read) // 50)


def test_a_table_in_memory_gives_the_bytes_of_its_file(tmp_path: Path) -> None:
    balance = np.random.default_rng(1).uniform(-1, 1, 80).astype(np.float32)  # a ScoreTable has it of all or of none
    pq.write_table(table(80, balance=balance), tmp_path / "plain.parquet")
    scores = read_scores(tmp_path / "plain.parquet")
    write_scores(scores, tmp_path / "ours.parquet")
    split_to(tmp_path / "a" / "m.parquet", scores)
    split_to(tmp_path / "b" / "m.parquet", tmp_path / "ours.parquet")
    assert sums(tmp_path / "a" / "m.parquet") == sums(tmp_path / "b" / "m.parquet")


def test_without_a_path_the_numbers_are_what_would_be(tmp_path: Path) -> None:
    pq.write_table(table(80), tmp_path / "scores.parquet")
    told = split_to(None, tmp_path / "scores.parquet")
    assert told == split_to(tmp_path / "out" / "m.parquet", tmp_path / "scores.parquet")
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["m.dropped.parquet", "m.parquet"]


def test_every_row_is_there_once_with_the_values_of_the_scores(tmp_path: Path) -> None:
    whole = table(120)
    pq.write_table(whole, tmp_path / "scores.parquet")
    told = split_to(tmp_path / "m.parquet", tmp_path / "scores.parquet")
    read = read_manifest(tmp_path / "m.parquet")
    left = read_dropped(tmp_path / "m.parquet", read)
    assert left is not None
    assert {field.name: field.type for field in read.table.schema} == {**COLUMNS, "wav": pa.string()}
    assert {field.name: field.type for field in left.schema} == {**DROPPED_COLUMNS, "wav": pa.string()}
    rows = read.table.to_pylist() + left.to_pylist()
    assert (len(read), len(left)) == (told["kept"], told["dropped"])
    assert 0 < len(left) < 120
    scored = {row["sample_id"]: row for row in whole.to_pylist()}
    assert sorted(row["sample_id"] for row in rows) == sorted(scored)
    for row in rows:
        one = scored[row["sample_id"]]
        for name in ("label", "label_name", "split", "group", "balance", "p_balanced", "content", "wav"):
            assert row[name] == one[name]
        assert row["discrepancy"] == np.float32(one["confidence_audio"]) - np.float32(one["confidence_visual"])
        assert row["gap"] == abs(row["discrepancy"])
        assert row["subset"] == "even"
    assert all(row["threshold"] <= row["score"] and row["reason"] == "bin-full" for row in left.to_pylist())
    in_order = [one for one in scored if one in set(read.table["sample_id"].to_pylist())]
    assert read.table["sample_id"].to_pylist() == in_order


ODD: dict[str, dict[str, Any]] = {
    "plain": {},
    "nothing but what is needed": dict.fromkeys(
        ("label_name", "split", "group", "balance", "p_balanced", "content", "wav")
    ),
    "names alone": {"label": None},
    "words for labels": {"label": [f"w{one % 4}" for one in range(60)], "label_name": None},
    "numbers for texts": {
        "sample_id": pa.array(range(60)),
        "label": [one % 3 for one in range(60)],
        "label_name": [one % 3 for one in range(60)],
        "group": [one % 7 for one in range(60)],
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
        "label": [one % 2 for one in range(60)],
        "label_name": [None, "b"] * 30,
        "group": [None, "g"] * 30,
    },
    "views": {
        "sample_id": pa.array([f"v{one}" for one in range(60)]).cast(pa.string_view()),
        "group": pa.array([f"v{one % 3}" for one in range(60)]).cast(pa.string_view()),
        "content": pa.array([f"v{one}" for one in range(60)]).cast(pa.string_view()),
    },
    "codes": {"label": [one % 4 for one in range(60)]}
    | {
        name: pa.array([f"v{one % 4 if name != 'sample_id' else one}" for one in range(60)]).dictionary_encode()
        for name in ("sample_id", "label_name", "group", "content", "wav")
    }
    | {"split": pa.array(["train", "test"] * 30).dictionary_encode()},
    "large": {
        name: pa.array([f"v{one}" for one in range(60)], pa.large_string())
        for name in ("sample_id", "group", "content", "wav")
    }
    | {"split": pa.array(["train", "test"] * 30, pa.large_string())},
}


@pytest.mark.parametrize("dress", sorted(ODD))
def test_whatever_the_types_the_manifest_has_its_own(tmp_path: Path, dress: str) -> None:
    whole = table(60, **ODD[dress])
    pq.write_table(whole, tmp_path / "scores.parquet")
    split_to(tmp_path / "m.parquet", tmp_path / "scores.parquet")
    read = read_manifest(tmp_path / "m.parquet")
    left = read_dropped(tmp_path / "m.parquet", read)
    assert left is not None
    paths = {"wav": pa.string()} if "wav" in whole.column_names else {}
    assert {field.name: field.type for field in read.table.schema} == {**COLUMNS, **paths}
    assert len(read) + len(left) == 60
    scored = {str(row["sample_id"]): row for row in whole.to_pylist()}
    for row in read.table.to_pylist() + left.to_pylist():
        one = scored[row["sample_id"]]
        for name in ("split", "group", "content", "wav"):
            assert name not in row or row[name] == (None if one.get(name) is None else str(one[name]))
        if isinstance(one.get("label"), int):
            assert row["label"] == one["label"]
        if one.get("label_name") is not None:
            assert row["label_name"] == str(one["label_name"])
        elif "label_name" not in whole.column_names:
            assert row["label_name"] == str(one["label"])


def test_the_files_say_where_they_come_from(tmp_path: Path) -> None:
    pq.write_table(table(60), tmp_path / "scores.parquet")
    split_to(tmp_path / "m.parquet", tmp_path / "scores.parquet", seed=3)
    for path in (tmp_path / "m.parquet", tmp_path / "m.dropped.parquet"):
        about = json.loads(pq.read_schema(path).metadata[b"mmaudit"])
        assert about["schema"] == "mmaudit.manifest/3"
        assert (about["subset"], about["between"]) == ("even", "audio:visual")
        assert about["rule"] == {"seed": 3}
        assert about["scores"] == {"config": {"seed": 0}}  # no path: the bytes are those of any folder
        assert {name: (entry["range"], entry["meaning"]) for name, entry in about["ranges"].items()} == RANGES


@pytest.mark.parametrize("when", ["source", "writer", "interrupt"])
def test_what_is_interrupted_leaves_the_old_files_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    pq.write_table(table(60), tmp_path / "scores.parquet")
    out = tmp_path / "out"
    for old in (False, True):
        if old:
            split_to(out / "m.parquet", tmp_path / "scores.parquet")
        before = sums(out / "m.parquet") if old else []
        with monkeypatch.context() as patch:
            error = fail(patch, when)
            with pytest.raises(error, match="half-way"):
                split_to(out / "m.parquet", tmp_path / "scores.parquet", seed=1)
        there = sorted(each.name for each in out.iterdir())
        assert there == (["m.dropped.parquet", "m.parquet"] if old else [])
        assert not old or sums(out / "m.parquet") == before


def fail(patch: pytest.MonkeyPatch, when: str) -> type[BaseException]:
    """Make the second batch of rows, or of writing, fail."""
    patch.setattr(parts, "BATCH_ROWS", 20)
    patch.setattr(split, "GROUP_ROWS", 5)
    if when == "writer":
        write = pq.ParquetWriter.write_table
        times = []

        def stop(self: Any, *args: Any, **options: Any) -> None:
            times.append(1)
            if len(times) > 1:
                raise OSError("half-way: disk full")
            write(self, *args, **options)

        patch.setattr(pq.ParquetWriter, "write_table", stop)
        return OSError
    error = ScoreError if when == "source" else KeyboardInterrupt
    named = split._columns
    seen = []

    def columns(*args: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) > 1:
            raise error("half-way")
        return named(*args, **options)

    patch.setattr(split, "_columns", columns)
    return error


def test_a_relative_path_that_looks_like_an_address_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("hf:/owner/even.parquet")
    path.parent.mkdir(parents=True)
    pq.write_table(table(40), "scores.parquet")
    split_to(path, Path("scores.parquet"))
    assert read_manifest(path).table.num_rows > 0
