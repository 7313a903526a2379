"""Tests of diff: symmetric, zero for a manifest and itself, and equal to set operations in Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr

from mmaudit.audit.errors import ManifestError
from mmaudit.audit.scores.table import ScoreTable
from mmaudit.audit.storage import PROVENANCE_KEY
from mmaudit.rebalance.balanced import BalancedConfig, plan_balanced
from mmaudit.rebalance.diff import (
    NAME_COLUMNS,
    NUMBER_COLUMNS,
    ChangedNames,
    ChangedNumbers,
    ManifestDiff,
    ManifestJoin,
    UniqueSamples,
    column_keys,
    column_numbers,
    diff_manifests,
)
from mmaudit.rebalance.manifest import COLUMNS
from mmaudit.rebalance.score_tables import open_scores
from mmaudit.rebalance.selection import select_rows
from mmaudit.rebalance.split import write_split

TEXTS = st.sampled_from(["a", "b", "", None])
NUMBERS = st.none() | st.floats(0, 1, width=32)
ROW = {
    "label": st.integers(0, 2),
    "label_name": TEXTS,
    "split": st.sampled_from(["train", "test", None]),
    "subset": st.just("balanced"),
    "bin": st.none() | st.integers(0, 3),
    "rank": st.integers(0, 9),
    "weight": st.sampled_from([0.5, 1.0, 2.0]),
    "discrepancy": NUMBERS,
    "gap": NUMBERS,
    "balance": NUMBERS,
    "p_balanced": NUMBERS,
    "group": TEXTS,
    "content": TEXTS,
}
MANIFEST = st.dictionaries(st.sampled_from("abcdefgh"), st.fixed_dictionaries(ROW), max_size=8)
Row = dict[str, Any]


def write(path: Path, rows: dict[str, Row], provenance: dict[str, Any] | None = None) -> Path:
    """Write a manifest of these rows, by id."""
    columns = {"sample_id": list(rows), **{name: [row[name] for row in rows.values()] for name in ROW}}
    table = pa.table({name: pa.array(columns[name], type_) for name, type_ in COLUMNS.items()})
    pq.write_table(table.replace_schema_metadata({PROVENANCE_KEY: json.dumps(provenance or {})}), path)
    return path


def read(path: Path) -> dict[str, Row]:
    return {row["sample_id"]: row for row in pq.read_table(path).to_pylist()}


def swapped(difference: ManifestDiff) -> dict[str, Any]:
    """Return to_dict with A and B swapped; means are rounded, since the order of summation differs."""
    content = difference.to_dict()
    for name in ("a", "rows_a", "only_a"):
        name_b = f"{name[:-1]}b"
        content[name], content[name_b] = content[name_b], content[name]
    content["provenance"] = {path: pair[::-1] for path, pair in content["provenance"].items()}
    for column in [*content["moved"].values(), *content["shifted"].values()]:
        column["first"] = [[name, value_b, value_a] for name, value_a, value_b in column["first"]]
    return rounded(content)


def rounded(content: dict[str, Any]) -> dict[str, Any]:
    for column in content["shifted"].values():
        for name in ("mean", "correlation"):
            column[name] = None if column[name] is None else round(column[name], 9)
    return content


def split_of(path: Path, *, seed: int, tolerance: float) -> Path:
    rng = np.random.default_rng(0)
    label = (np.arange(300) % 3).astype(np.int32)
    scores = ScoreTable(
        sample_id=np.array([f"s{number:04d}" for number in range(300)], dtype=object),
        label=label,
        label_name=np.array([f"class-{class_index}" for class_index in label], dtype=object),
        modalities=("audio", "image"),
        confidence=rng.uniform(size=(300, 2)).astype(np.float32),
        split=np.array(["test" if number % 5 == 0 else "train" for number in range(300)], dtype=object),
        balance=rng.uniform(-1, 1, 300).astype(np.float32),
        provenance={"fingerprint": "f0", "config": {"seed": 0}},
    )
    score_files = open_scores(scores, seed=seed)
    config = BalancedConfig(bins=8, tolerance=tolerance)
    selection = select_rows(score_files, plan_balanced(score_files, config), scratch=path.parent)
    write_split(selection, path, name="balanced", recipe={"seed": seed, "balanced": {"tolerance": tolerance}})
    return path


def test_manifest_equals_itself(tmp_path: Path) -> None:
    path = split_of(tmp_path / "m.parquet", seed=0, tolerance=0.0)
    difference = diff_manifests(path, path)
    assert difference.same
    assert difference.both == difference.rows_a == len(read(path))
    assert difference.same_dataset is True
    assert difference.lines() == [f"{path} and {path} are the same: {difference.both} samples"]


def test_diff_of_two_seeds_matches_python(tmp_path: Path) -> None:
    a = split_of(tmp_path / "a.parquet", seed=0, tolerance=0.0)
    b = split_of(tmp_path / "b.parquet", seed=1, tolerance=0.05)
    difference, rows_a, rows_b = diff_manifests(a, b), read(a), read(b)
    assert difference.both == len(rows_a.keys() & rows_b.keys())
    only_a = sorted(rows_a.keys() - rows_b.keys())
    assert difference.only_a.count == len(only_a)
    assert list(difference.only_a.first) == only_a[:20]
    assert difference.only_a.by_split["train"] == sum(rows_a[name]["split"] == "train" for name in only_a)
    assert difference.only_a.by_class["class-1"] == sum(rows_a[name]["label_name"] == "class-1" for name in only_a)
    assert {name: moved.count for name, moved in difference.moved.items()} == dict.fromkeys(NAME_COLUMNS, 0)
    assert [name for name, shift in difference.shifted.items() if shift.count] == ["rank"]
    assert difference.provenance == {"recipe.seed": (0, 1), "recipe.balanced.tolerance": (0.0, 0.05)}
    assert not difference.same


@given(rows_a=MANIFEST, rows_b=MANIFEST, limit=st.integers(0, 3))
@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_diff_matches_python_and_is_symmetric(
    tmp_path: Path, rows_a: dict[str, Row], rows_b: dict[str, Row], limit: int
) -> None:
    a, b = write(tmp_path / "a.parquet", rows_a), write(tmp_path / "b.parquet", rows_b)
    difference = diff_manifests(a, b, limit=limit)
    shared = sorted(rows_a.keys() & rows_b.keys())
    assert difference.both == len(shared)
    assert list(difference.only_a.first) == sorted(rows_a.keys() - rows_b.keys())[:limit]
    assert difference.only_b.count == len(rows_b.keys() - rows_a.keys())
    assert (
        sum(difference.only_b.by_class.values()) == sum(difference.only_b.by_split.values()) == difference.only_b.count
    )
    for name in NAME_COLUMNS:
        changed = [
            (sample_id, rows_a[sample_id][name], rows_b[sample_id][name])
            for sample_id in shared
            if rows_a[sample_id][name] != rows_b[sample_id][name]
        ]
        assert difference.moved[name] == ChangedNames(count=len(changed), first=tuple(changed[:limit]))
    for name in NUMBER_COLUMNS:
        values = [(rows_a[sample_id][name], rows_b[sample_id][name]) for sample_id in shared]
        changes = [abs(value_a - value_b) for value_a, value_b in values if value_a is not None and value_b is not None]
        num_changed = sum(change > 1e-6 for change in changes) + sum(
            (value_a is None) != (value_b is None) for value_a, value_b in values
        )
        shift = difference.shifted[name]
        assert (shift.count, len(shift.first)) == (num_changed, min(num_changed, limit))
        assert shift.largest == (max(changes) if changes else None)
        assert shift.mean == (pytest.approx(np.mean(changes)) if changes else None)
    assert difference.same == (rows_a == rows_b or all(_close(rows_a, rows_b)))
    assert swapped(diff_manifests(b, a, limit=limit)) == rounded(difference.to_dict())
    json.dumps(difference.to_dict(), allow_nan=False)


def _close(rows_a: dict[str, Row], rows_b: dict[str, Row]) -> list[bool]:
    """Return for each value whether it is equal, scores within the tolerance."""
    if rows_a.keys() != rows_b.keys():
        return [False]
    pairs = [(name, rows_a[sample_id][name], rows_b[sample_id][name]) for sample_id in rows_a for name in ROW]
    return [
        value_a == value_b
        or (name in NUMBER_COLUMNS and None not in (value_a, value_b) and abs(value_a - value_b) <= 1e-6)
        for name, value_a, value_b in pairs
    ]


def test_row_order_is_ignored(tmp_path: Path) -> None:
    a = split_of(tmp_path / "a.parquet", seed=0, tolerance=0.0)
    table = pq.read_table(a)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), tmp_path / "b.parquet")
    assert diff_manifests(a, tmp_path / "b.parquet").same


def test_largest_changes_come_first_after_missing_values(tmp_path: Path) -> None:
    row: Row = {name: None for name in ROW} | {"label": 0, "gap": 0.0, "rank": 0, "weight": 1.0, "subset": "x"}
    gaps = {"a": 0.25, "b": 0.5, "c": 0.5, "d": None, "e": 0.0}
    a = write(tmp_path / "a.parquet", dict.fromkeys("abcde", row))
    b = write(tmp_path / "b.parquet", {name: row | {"gap": gap} for name, gap in gaps.items()})
    first = (("d", 0.0, None), ("b", 0.0, 0.5), ("c", 0.0, 0.5))
    assert diff_manifests(a, b, limit=3).shifted["gap"] == ChangedNumbers(
        count=4, largest=0.5, mean=0.3125, correlation=None, first=first
    )
    assert diff_manifests(a, b, limit=2).shifted["gap"].first == first[:2]
    assert "gap: 4 differ, largest change: d, 0 in A and none in B" in diff_manifests(a, b).lines()
    assert diff_manifests(a, b, tolerance=0.3).shifted["gap"].count == 3


def test_correlation_matches_scipy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(size=(2, 50)).astype(np.float32)
    row: Row = {name: None for name in ROW} | {"label": 0, "rank": 0, "weight": 1.0, "subset": "x"}
    paths = [
        write(tmp_path / f"{number}.parquet", {f"s{n:02d}": row | {"gap": float(gap)} for n, gap in enumerate(gaps)})
        for number, gaps in enumerate(values)
    ]
    expected = pearsonr(values[0].astype(np.float64), values[1].astype(np.float64)).statistic
    assert diff_manifests(paths[0], paths[1]).shifted["gap"].correlation == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fingerprint_a", "fingerprint_b", "same"), [("f0", "f0", True), ("f0", "f1", False), ("f0", None, None)]
)
def test_different_datasets_are_reported(
    tmp_path: Path, fingerprint_a: str, fingerprint_b: str | None, same: bool | None
) -> None:
    a = write(tmp_path / "a.parquet", {}, {"scores": {"fingerprint": fingerprint_a}})
    b = write(tmp_path / "b.parquet", {}, {"scores": {"fingerprint": fingerprint_b}})
    difference = diff_manifests(a, b)
    assert difference.same_dataset is same
    assert any("different datasets" in line for line in difference.lines()) == (same is False)


def test_provenance_changes_are_listed_by_path(tmp_path: Path) -> None:
    a = write(tmp_path / "a.parquet", {}, {"recipe": {"x": [1, {"y": 2}], "z": {}}, "n": None})
    b = write(tmp_path / "b.parquet", {}, {"recipe": {"x": [1, {"y": 3}], "w": "new"}, "n": None})
    difference = diff_manifests(a, b)
    assert difference.provenance == {"recipe.w": (None, "new"), "recipe.x[1].y": (2, 3), "recipe.z": ({}, None)}
    assert "recipe.x[1].y: 2 in A, 3 in B" in difference.lines()
    assert diff_manifests(a, a).same
    assert difference.only_a == UniqueSamples(count=0, by_split={}, by_class={}, first=())


def test_file_that_is_no_manifest_raises(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.parquet", {}), tmp_path / "bad.parquet"
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ManifestError, match="no such file"):
            diff_manifests(*pair)
    bad.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ManifestError, match="cannot be read as Parquet"):
        diff_manifests(good, bad)
    pq.write_table(pa.table({"sample_id": ["a"]}), bad)
    with pytest.raises(ManifestError, match="not a manifest: it lacks label"):
        diff_manifests(good, bad)
    pq.write_table(pq.read_table(good).drop_columns("gap").append_column("gap", pa.array([], pa.string())), bad)
    with pytest.raises(ManifestError, match="its gap is string, not float"):
        diff_manifests(good, bad)


def test_repeated_or_null_ids_raise(tmp_path: Path) -> None:
    good = split_of(tmp_path / "good.parquet", seed=0, tolerance=0.0)
    table, bad = pq.read_table(good), tmp_path / "bad.parquet"
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), bad)
    with pytest.raises(ManifestError, match=r"1 ids occur more than once in .*bad\.parquet"):
        diff_manifests(good, bad)
    nulls = pa.array([None] * len(table), pa.string())
    pq.write_table(table.set_column(0, "sample_id", nulls), bad)
    with pytest.raises(ManifestError, match=r"null ids in .*bad\.parquet"):
        diff_manifests(good, bad)


def test_damaged_file_raises(tmp_path: Path) -> None:
    good, bad = (split_of(tmp_path / f"{name}.parquet", seed=0, tolerance=0.0) for name in ("good", "bad"))
    table = pq.read_table(bad)
    binary = pa.array([b"\xff"] * len(table))
    column = pa.Array.from_buffers(pa.string(), len(table), binary.buffers())
    pq.write_table(table.set_column(table.column_names.index("group"), "group", column), bad)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ManifestError, match=r"bad\.parquet cannot be read as Parquet: .*UTF8"):
            diff_manifests(*pair)


# The join of two manifests.

IDS = st.lists(st.sampled_from(["a", "b", "ä", "", "c d", "zz", "10", "9"]), unique=True)
relaxed = settings(max_examples=examples(50), suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_columns(path: Path, ids: list[Any], **columns: pa.Array) -> Path:
    pq.write_table(pa.table({"sample_id": pa.array(ids, pa.string()), **columns}), path, row_group_size=3)
    return path


@relaxed
@given(ids_a=IDS, ids_b=IDS, max_ids=st.integers(0, 4))
def test_join_matches_python(tmp_path: Path, ids_a: list[str], ids_b: list[str], max_ids: int) -> None:
    positions = [pa.array([f"{side}{row}" for row in range(len(ids))]) for side, ids in (("A", ids_a), ("B", ids_b))]
    a = write_columns(tmp_path / "a.parquet", ids_a, place=positions[0])
    join = ManifestJoin.of(a, write_columns(tmp_path / "b.parquet", ids_b, place=positions[1]))
    shared = [name for name in ids_a if name in ids_b]
    assert [ids_a[row] for row in join.in_a] == [ids_b[row] for row in join.in_b] == shared
    assert [ids_a[row] for row in join.only_a] == [name for name in ids_a if name not in ids_b]
    assert [ids_b[row] for row in join.only_b] == [name for name in ids_b if name not in ids_a]
    assert [join.sample_ids(codes) for codes in join.codes] == [ids_a, ids_b]
    smallest = join.smallest_codes(join.codes[0][join.in_a], max_ids=max_ids)
    assert join.sample_ids(smallest) == sorted(shared, key=str.encode)[:max_ids]
    expected = [(name, f"A{ids_a.index(name)}", f"B{ids_b.index(name)}") for name in join.sample_ids(smallest)]
    assert list(join.pairs("place", smallest)) == expected


@relaxed
@given(st.lists(st.tuples(st.none() | st.sampled_from(["x", "y", "xy"]), st.none() | st.floats(-1, 1, width=32))))
def test_column_keys_and_numbers_match_the_values(tmp_path: Path, rows: list[tuple[Any, Any]]) -> None:
    text, number = pa.array([row[0] for row in rows], pa.string()), pa.array([row[1] for row in rows], pa.float32())
    path = write_columns(tmp_path / "a.parquet", [str(row) for row in range(len(rows))], text=text, number=number)
    keys = column_keys(path, "text", len(rows))
    assert [[first == second for second in keys] for first in keys] == [
        [first[0] == second[0] for second in rows] for first in rows
    ]
    expected = [np.nan if row[1] is None else row[1] for row in rows]
    np.testing.assert_array_equal(column_numbers(path, "number", len(rows)), np.array(expected, np.float64))
    with pytest.raises(
        ManifestError, match=f"a column has {len(rows)} values, expected {len(rows) + 1} as there are ids"
    ):
        column_numbers(path, "number", len(rows) + 1)


def test_join_of_repeated_or_null_ids_raises(tmp_path: Path) -> None:
    good, bad = write_columns(tmp_path / "good.parquet", ["a", "b"]), tmp_path / "bad.parquet"
    write_columns(bad, ["a", "b", "a"])
    with pytest.raises(ManifestError, match=r"1 ids occur more than once in .*bad\.parquet \(for example a\)"):
        ManifestJoin.of(good, bad)
    write_columns(bad, ["a", None])
    with pytest.raises(ManifestError, match=r"1 null ids in .*bad\.parquet"):
        ManifestJoin.of(bad, good)
