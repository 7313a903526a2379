"""Laws of diff: a manifest does not differ from itself, A from B as B from A, and sets are counted as Python does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr

from mmaudit.audit.errors import ManifestError
from mmaudit.audit.parquet import KEY
from mmaudit.audit.scores.table import ScoreTable
from mmaudit.rebalance.balanced import BalancedConfig, plan_balanced
from mmaudit.rebalance.diff import (
    NAME_COLUMNS,
    NUMBER_COLUMNS,
    ChangedNames,
    ChangedNumbers,
    ManifestDiff,
    UniqueSamples,
    diff,
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
    pq.write_table(table.replace_schema_metadata({KEY: json.dumps(provenance or {})}), path)
    return path


def read(path: Path) -> dict[str, Row]:
    return {row["sample_id"]: row for row in pq.read_table(path).to_pylist()}


def swapped(found: ManifestDiff) -> dict[str, Any]:
    """Give to_dict as it would be with A and B the other way round; means are rounded, being sums in another order."""
    content = found.to_dict()
    for name in ("a", "rows_a", "only_a"):
        other = f"{name[:-1]}b"
        content[name], content[other] = content[other], content[name]
    content["provenance"] = {path: pair[::-1] for path, pair in content["provenance"].items()}
    for column in [*content["moved"].values(), *content["shifted"].values()]:
        column["first"] = [[name, there, here] for name, here, there in column["first"]]
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
        label_name=np.array([f"class-{one}" for one in label], dtype=object),
        modalities=("audio", "image"),
        confidence=rng.uniform(size=(300, 2)).astype(np.float32),
        split=np.array(["test" if number % 5 == 0 else "train" for number in range(300)], dtype=object),
        balance=rng.uniform(-1, 1, 300).astype(np.float32),
        provenance={"fingerprint": "f0", "config": {"seed": 0}},
    )
    shards = open_scores(scores, seed=seed)
    config = BalancedConfig(bins=8, tolerance=tolerance)
    chosen = select_rows(shards, plan_balanced(shards, config), scratch=path.parent)
    write_split(chosen, path, name="balanced", recipe={"seed": seed, "balanced": {"tolerance": tolerance}})
    return path


def test_a_manifest_does_not_differ_from_itself(tmp_path: Path) -> None:
    path = split_of(tmp_path / "m.parquet", seed=0, tolerance=0.0)
    found = diff(path, path)
    assert found.same
    assert found.both == found.rows_a == len(read(path))
    assert found.same_dataset is True
    assert found.lines() == [f"{path} and {path} are the same: {found.both} samples"]


def test_two_seeds_share_what_python_says_they_share(tmp_path: Path) -> None:
    a = split_of(tmp_path / "a.parquet", seed=0, tolerance=0.0)
    b = split_of(tmp_path / "b.parquet", seed=1, tolerance=0.05)
    found, here, there = diff(a, b), read(a), read(b)
    assert found.both == len(here.keys() & there.keys())
    only = sorted(here.keys() - there.keys())
    assert found.only_a.count == len(only)
    assert list(found.only_a.first) == only[:20]
    assert found.only_a.by_split["train"] == sum(here[name]["split"] == "train" for name in only)
    assert found.only_a.by_class["class-1"] == sum(here[name]["label_name"] == "class-1" for name in only)
    assert {name: moved.count for name, moved in found.moved.items()} == dict.fromkeys(NAME_COLUMNS, 0)
    assert [name for name, shift in found.shifted.items() if shift.count] == ["rank"]
    assert found.provenance == {"rule.seed": (0, 1), "rule.balanced.tolerance": (0.0, 0.05)}
    assert not found.same


@given(here=MANIFEST, there=MANIFEST, most=st.integers(0, 3))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_counts_as_python_does_and_mirrors(
    tmp_path: Path, here: dict[str, Row], there: dict[str, Row], most: int
) -> None:
    a, b = write(tmp_path / "a.parquet", here), write(tmp_path / "b.parquet", there)
    found = diff(a, b, limit=most)
    both = sorted(here.keys() & there.keys())
    assert found.both == len(both)
    assert list(found.only_a.first) == sorted(here.keys() - there.keys())[:most]
    assert found.only_b.count == len(there.keys() - here.keys())
    assert sum(found.only_b.by_class.values()) == sum(found.only_b.by_split.values()) == found.only_b.count
    for name in NAME_COLUMNS:
        changed = [
            (each, here[each][name], there[each][name]) for each in both if here[each][name] != there[each][name]
        ]
        assert found.moved[name] == ChangedNames(count=len(changed), first=tuple(changed[:most]))
    for name in NUMBER_COLUMNS:
        values = [(here[each][name], there[each][name]) for each in both]
        told = [abs(one - other) for one, other in values if one is not None and other is not None]
        beyond = sum(change > 1e-6 for change in told) + sum((one is None) != (other is None) for one, other in values)
        shift = found.shifted[name]
        assert (shift.count, len(shift.first)) == (beyond, min(beyond, most))
        assert shift.largest == (max(told) if told else None)
        assert shift.mean == (pytest.approx(np.mean(told)) if told else None)
    assert found.same == (here == there or all(_close(here, there)))
    assert swapped(diff(b, a, limit=most)) == rounded(found.to_dict())
    json.dumps(found.to_dict(), allow_nan=False)


def _close(here: dict[str, Row], there: dict[str, Row]) -> list[bool]:
    """Tell of each value whether it is the same, within the tolerance where it is a score."""
    if here.keys() != there.keys():
        return [False]
    pairs = [(name, here[each][name], there[each][name]) for each in here for name in ROW]
    return [
        one == other or (name in NUMBER_COLUMNS and None not in (one, other) and abs(one - other) <= 1e-6)
        for name, one, other in pairs
    ]


def test_the_order_of_rows_does_not_count(tmp_path: Path) -> None:
    a = split_of(tmp_path / "a.parquet", seed=0, tolerance=0.0)
    table = pq.read_table(a)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), tmp_path / "b.parquet")
    assert diff(a, tmp_path / "b.parquet").same


def test_the_largest_changes_come_first_and_a_missing_value_before_them(tmp_path: Path) -> None:
    row: Row = {name: None for name in ROW} | {"label": 0, "gap": 0.0, "rank": 0, "weight": 1.0, "subset": "x"}
    gaps = {"a": 0.25, "b": 0.5, "c": 0.5, "d": None, "e": 0.0}
    a = write(tmp_path / "a.parquet", dict.fromkeys("abcde", row))
    b = write(tmp_path / "b.parquet", {name: row | {"gap": gap} for name, gap in gaps.items()})
    first = (("d", 0.0, None), ("b", 0.0, 0.5), ("c", 0.0, 0.5))
    assert diff(a, b, limit=3).shifted["gap"] == ChangedNumbers(
        count=4, largest=0.5, mean=0.3125, correlation=None, first=first
    )
    assert diff(a, b, limit=2).shifted["gap"].first == first[:2]
    assert diff(a, b, tolerance=0.3).shifted["gap"].count == 3


def test_the_correlation_is_pearsons(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(size=(2, 50)).astype(np.float32)
    row: Row = {name: None for name in ROW} | {"label": 0, "rank": 0, "weight": 1.0, "subset": "x"}
    paths = [
        write(tmp_path / f"{number}.parquet", {f"s{n:02d}": row | {"gap": float(gap)} for n, gap in enumerate(gaps)})
        for number, gaps in enumerate(values)
    ]
    expected = pearsonr(values[0].astype(np.float64), values[1].astype(np.float64)).statistic
    assert diff(paths[0], paths[1]).shifted["gap"].correlation == pytest.approx(expected)


@pytest.mark.parametrize(("one", "other", "same"), [("f0", "f0", True), ("f0", "f1", False), ("f0", None, None)])
def test_other_datasets_are_a_fact(tmp_path: Path, one: str, other: str | None, same: bool | None) -> None:
    a = write(tmp_path / "a.parquet", {}, {"scores": {"fingerprint": one}})
    b = write(tmp_path / "b.parquet", {}, {"scores": {"fingerprint": other}})
    found = diff(a, b)
    assert found.same_dataset is same
    assert any("different datasets" in line for line in found.lines()) == (same is False)


def test_provenance_differs_by_path(tmp_path: Path) -> None:
    a = write(tmp_path / "a.parquet", {}, {"rule": {"x": [1, {"y": 2}], "z": {}}, "n": None})
    b = write(tmp_path / "b.parquet", {}, {"rule": {"x": [1, {"y": 3}], "w": "new"}, "n": None})
    found = diff(a, b)
    assert found.provenance == {"rule.w": (None, "new"), "rule.x[1].y": (2, 3), "rule.z": ({}, None)}
    assert "rule.x[1].y: 2 in A, 3 in B" in found.lines()
    assert diff(a, a).same
    assert found.only_a == UniqueSamples(count=0, by_split={}, by_class={}, first=())


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.parquet", {}), tmp_path / "bad.parquet"
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ManifestError, match="no such file"):
            diff(*pair)
    bad.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ManifestError, match="cannot be read as Parquet"):
        diff(good, bad)
    pq.write_table(pa.table({"sample_id": ["a"]}), bad)
    with pytest.raises(ManifestError, match="not a manifest: it lacks label"):
        diff(good, bad)
    pq.write_table(pq.read_table(good).drop_columns("gap").append_column("gap", pa.array([], pa.string())), bad)
    with pytest.raises(ManifestError, match="its gap is string, not float"):
        diff(good, bad)


def test_ids_that_stand_twice_or_are_null_are_refused(tmp_path: Path) -> None:
    good = split_of(tmp_path / "good.parquet", seed=0, tolerance=0.0)
    table, bad = pq.read_table(good), tmp_path / "bad.parquet"
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), bad)
    with pytest.raises(ManifestError, match=r"1 ids occur more than once in .*bad\.parquet"):
        diff(good, bad)
    nulls = pa.array([None] * len(table), pa.string())
    pq.write_table(table.set_column(0, "sample_id", nulls), bad)
    with pytest.raises(ManifestError, match=r"null ids in .*bad\.parquet"):
        diff(good, bad)


def test_what_is_damaged_is_told(tmp_path: Path) -> None:
    good, bad = (split_of(tmp_path / f"{name}.parquet", seed=0, tolerance=0.0) for name in ("good", "bad"))
    table = pq.read_table(bad)
    binary = pa.array([b"\xff"] * len(table))
    column = pa.Array.from_buffers(pa.string(), len(table), binary.buffers())
    pq.write_table(table.set_column(table.column_names.index("group"), "group", column), bad)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ManifestError, match=r"bad\.parquet cannot be read as Parquet: .*UTF8"):
            diff(*pair)
