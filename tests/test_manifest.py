"""Laws of a manifest: kept + dropped = scored, write then read is equality, and anybody's reader opens it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.errors import ManifestError
from mmaudit.audit.score import ScoreTable
from mmaudit.rebalance.manifest import (
    RANGES,
    Manifest,
    Selection,
    dropped_path,
    make_manifest,
    read_dropped,
    read_manifest,
    write_manifest,
)

COLUMNS = {
    "sample_id": "string",
    "label": "int32",
    "label_name": "string",
    "split": "string",
    "subset": "string",
    "bin": "int16",
    "rank": "int32",
    "weight": "float",
    "discrepancy": "float",
    "gap": "float",
    "p_balanced": "float",
    "group": "string",
    "content": "string",
    "wav": "string",
}
PROVENANCE = {"source": "data", "config": {"seed": 0}, "ranges": {}, "schema": "mmaudit.scores/1"}


def scores_of(n: int = 40, *, seed: int = 0, **more: Any) -> ScoreTable:
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        "sample_id": np.array([f"s{number}" for number in rng.permutation(n)], dtype=object),
        "label": np.arange(n, dtype=np.int32) % 3,
        "label_name": np.array([f"class {number % 3}" for number in range(n)], dtype=object),
        "modalities": ("audio", "visual"),
        "confidence": rng.random((n, 2)).astype(np.float32),
        "split": np.array(["test" if number % 5 == 0 else "train" for number in range(n)], dtype=object),
        "group": np.array([f"g{number % 4}" for number in range(n)], dtype=object),
        "balance": rng.uniform(-1, 1, n).astype(np.float32),
        "p_balanced": rng.random(n).astype(np.float32),
        "content": np.array([f"{number:032x}" for number in range(n)], dtype=object),
        "paths": pa.table({"wav": [f"{number}.wav" for number in range(n)], "label": ["a path of that name"] * n}),
        "provenance": PROVENANCE,
    }
    return ScoreTable(**{**columns, **more})


def select(keep: NDArray[np.bool_], **more: Any) -> Selection:
    n = len(keep)
    options: dict[str, Any] = {
        "name": "some",
        "between": "audio:visual",
        "keep": keep,
        "reason": "out",
        "score": np.arange(n) / n,
        "threshold": np.full(n, 0.5),
        "bin": (np.arange(n) % 7).astype(np.int16),
        "rule": {"kind": "some", "seed": 3},
    }
    return Selection(**{**options, **more})


def made(n: int = 40, **more: Any) -> tuple[Manifest, pa.Table]:
    return make_manifest(scores_of(n, **more), select(np.arange(n) % 3 > 0))


def test_columns_and_types() -> None:
    manifest, dropped = made()
    assert {field.name: str(field.type) for field in manifest.table.schema} == COLUMNS
    left = {name: type_ for name, type_ in COLUMNS.items() if name not in ("rank", "weight")}
    left |= {"reason": "string", "score": "double", "threshold": "double"}
    assert {field.name: str(field.type) for field in dropped.schema} == left


def test_values_are_those_of_the_scores() -> None:
    scores = scores_of()
    manifest, dropped = make_manifest(scores, select(np.arange(40) % 3 > 0))
    row = {name: number for number, name in enumerate(scores.sample_id)}
    discrepancy = scores.discrepancy()
    assert scores.split is not None
    assert scores.p_balanced is not None
    for entry in manifest.table.to_pylist() + dropped.to_pylist():
        number = row[entry["sample_id"]]
        assert entry["label"] == scores.label[number]
        assert entry["label_name"] == f"class {number % 3}"
        assert entry["split"] == scores.split[number]
        assert entry["discrepancy"] == discrepancy[number]
        assert entry["gap"] == abs(discrepancy[number])
        assert entry["p_balanced"] == scores.p_balanced[number]
        assert (entry["bin"], entry["group"]) == (number % 7, f"g{number % 4}")
        assert (entry["wav"], entry["content"]) == (f"{number}.wav", f"{number:032x}")
        assert entry.get("weight", 1.0) == 1.0
        if "reason" in entry:
            assert (entry["reason"], entry["score"], entry["threshold"]) == ("out", number / 40, 0.5)


def test_a_missing_modality_is_a_reason_of_its_own(tmp_path: Path) -> None:
    confidence = np.random.default_rng(0).random((40, 3)).astype(np.float32)
    lacks = np.arange(40) % 6 == 0  # a part of those that are dropped
    confidence[lacks, 1] = np.nan
    scores = scores_of(modalities=("audio", "visual", "text"), confidence=confidence)
    score = np.where(lacks, np.nan, 0.25)
    bins = np.where(lacks, -1, 3).astype(np.int16)
    manifest, dropped = make_manifest(scores, select(np.arange(40) % 3 > 0, score=score, bin=bins))
    write_manifest(manifest, dropped, tmp_path / "m.parquet")
    read = read_dropped(tmp_path / "m.parquet", read_manifest(tmp_path / "m.parquet"))
    assert read is not None
    rows = read.to_pylist()
    assert len(rows) == 14
    for row in rows:
        gone = row["sample_id"] in scores.sample_id[lacks]
        assert row["reason"] == ("missing-modality" if gone else "out")
        assert (row["score"], row["bin"]) == ((None, None) if gone else (0.25, 3))
        assert (row["discrepancy"] is None) == gone
        assert row["gap"] is not None


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60).filter(any), st.integers(0, 99))
def test_kept_and_dropped_are_the_scored(keep: list[bool], seed: int) -> None:
    scores = scores_of(len(keep), seed=seed)
    manifest, dropped = make_manifest(scores, select(np.array(keep)))
    ids = [table["sample_id"].to_pylist() for table in (manifest.table, dropped)]
    assert ids == [scores.sample_id[np.array(keep)].tolist(), scores.sample_id[~np.array(keep)].tolist()]
    assert len(manifest) == sum(keep)


@settings(deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 1.0]), min_size=1, max_size=40), st.integers(0, 99))
def test_rank_zero_is_the_most_balanced(balance: list[float], seed: int) -> None:
    scores = scores_of(len(balance), seed=seed, balance=np.array(balance, np.float32))
    manifest, _ = make_manifest(scores, select(np.ones(len(balance), bool)))
    rank = manifest.numbers("rank").astype(int)
    assert sorted(rank) == list(range(len(balance)))
    ordered = [(-balance[row], scores.sample_id[row]) for row in np.argsort(rank)]
    assert ordered == sorted(ordered)


def test_without_a_balance_score_the_least_gap_is_the_most_balanced() -> None:
    scores = scores_of(balance=None)
    manifest, _ = make_manifest(scores, select(np.ones(40, bool)))
    assert np.argsort(manifest.numbers("rank")).tolist() == np.argsort(scores.gap).tolist()


def test_row_order_changes_no_row() -> None:
    scores = scores_of()
    order = np.random.default_rng(1).permutation(40)
    fields = ("sample_id", "label", "label_name", "confidence", "split", "group", "balance", "p_balanced", "content")
    moved: dict[str, Any] = {name: getattr(scores, name)[order] for name in fields}
    assert scores.paths is not None
    again = replace(scores, **moved, paths=scores.paths.take(pa.array(order)))
    keep = scores.gap < 0.5
    one, other = (
        make_manifest(table, select(chosen, bin=None))[0].table.sort_by("sample_id")
        for table, chosen in ((scores, keep), (again, keep[order]))
    )
    assert one.equals(other)


def test_write_then_read_is_equality(tmp_path: Path) -> None:
    manifest, dropped = made()
    write_manifest(manifest, dropped, tmp_path / "deep" / "m.parquet")
    again = read_manifest(tmp_path / "deep" / "m.parquet")
    left = read_dropped(tmp_path / "deep" / "m.parquet", again)
    assert again.table.equals(manifest.table)
    assert again.provenance == manifest.provenance
    assert again.digest() == manifest.digest()
    assert left is not None
    assert left.equals(dropped)
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["m.dropped.parquet", "m.parquet"]


def test_the_same_scores_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_manifest(*made(), tmp_path / f"{name}.parquet")
    for file in ("{}.parquet", "{}.dropped.parquet"):
        assert (tmp_path / file.format("a")).read_bytes() == (tmp_path / file.format("b")).read_bytes()


def test_what_is_not_known_is_null_and_stays_so(tmp_path: Path) -> None:
    unknown: dict[str, Any] = dict.fromkeys(("split", "group", "balance", "p_balanced", "content", "paths"))
    manifest, dropped = make_manifest(scores_of(**unknown), select(np.arange(40) > 3, bin=None))
    write_manifest(manifest, dropped, tmp_path / "m.parquet")
    table = read_manifest(tmp_path / "m.parquet").table
    assert {name: str(table[name].type) for name in table.column_names} == {
        name: type_ for name, type_ in COLUMNS.items() if name != "wav"
    }
    nulls = [name for name in table.column_names if table[name].null_count]
    assert nulls == ["split", "bin", "p_balanced", "group", "content"]
    assert np.isnan(manifest.numbers("p_balanced")).all()
    assert manifest.strings("split").tolist() == [None] * 36


def test_pandas_and_datasets_read_it_as_it_is(tmp_path: Path) -> None:
    import datasets

    manifest, dropped = made()
    write_manifest(manifest, dropped, tmp_path / "m.parquet")
    rows = manifest.table.to_pylist()
    assert pd.read_parquet(tmp_path / "m.parquet").to_dict("records") == rows
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "m.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert list(loaded) == rows


def test_the_file_says_where_it_comes_from(tmp_path: Path) -> None:
    write_manifest(*made(), tmp_path / "m.parquet")
    for path in (tmp_path / "m.parquet", tmp_path / "m.dropped.parquet"):
        about = json.loads(pq.read_schema(path).metadata[b"mmaudit"])
        assert about["schema"] == "mmaudit.manifest/1"
        assert (about["subset"], about["between"]) == ("some", "audio:visual")
        assert about["rule"] == {"kind": "some", "seed": 3}
        assert about["scores"] == {"source": "data", "config": {"seed": 0}}
        assert {name: (entry["range"], entry["meaning"]) for name, entry in about["ranges"].items()} == RANGES
        assert set(RANGES) <= set(COLUMNS)


@pytest.mark.parametrize("column", ["sample_id", "label", "split", "rank", "weight", "content", "group", "p_balanced"])
def test_the_digest_tells_all_that_training_depends_on(column: str) -> None:
    manifest, _ = made()
    values = manifest.table[column].to_pylist()
    other: Any = "other" if isinstance(values[0], str) else values[0] + 1
    index = manifest.table.column_names.index(column)
    changed = manifest.table.set_column(
        index, column, pa.array([other, *values[1:]], manifest.table.schema.field(column).type)
    )
    assert replace(manifest, table=changed).digest() != manifest.digest()


def test_nothing_kept_is_refused() -> None:
    with pytest.raises(ManifestError, match="some: none of the 40 scored samples qualifies; widen the rule"):
        make_manifest(scores_of(), select(np.zeros(40, bool)))


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    table = made()[0].table
    spoiled = {
        "not a manifest: it lacks rank, content; make one with: mmaudit split": table.drop_columns(["rank", "content"]),
        "column label of the manifest holds nulls": table.set_column(1, "label", pa.nulls(len(table), pa.int32())),
        "2 ids stand more than once in the manifest": pa.concat_tables([table, table.slice(0, 2)]),
    }
    for words, content in spoiled.items():
        pq.write_table(content, tmp_path / "bad.parquet")
        with pytest.raises(ManifestError, match=words):
            read_manifest(tmp_path / "bad.parquet")
    (tmp_path / "text.parquet").write_text("sample_id,label\n")
    with pytest.raises(ManifestError, match=r"text\.parquet cannot be read as Parquet"):
        read_manifest(tmp_path / "text.parquet")
    with pytest.raises(ManifestError, match=r"no such file: .*none\.parquet"):
        read_manifest(tmp_path / "none.parquet")


def test_the_dropped_rows_may_not_be_there(tmp_path: Path) -> None:
    write_manifest(*made(), tmp_path / "m.parquet")
    dropped_path(tmp_path / "m.parquet").unlink()
    assert read_dropped(tmp_path / "m.parquet", made()[0]) is None


def test_dropped_rows_of_another_manifest_are_refused(tmp_path: Path) -> None:
    manifest, dropped = made()
    write_manifest(manifest, dropped, tmp_path / "m.parquet")
    other = replace(manifest, table=manifest.table.slice(1))
    with pytest.raises(ManifestError, match=r"m\.dropped\.parquet holds the rows dropped from another manifest"):
        read_dropped(tmp_path / "m.parquet", other)


def test_a_failed_write_leaves_the_old_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(*made(), tmp_path / "m.parquet")
    before = (tmp_path / "m.parquet").read_bytes()

    def fail(table: pa.Table, where: Path, **options: Any) -> None:
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        write_manifest(*made(10), tmp_path / "m.parquet")
    assert (tmp_path / "m.parquet").read_bytes() == before
