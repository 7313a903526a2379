"""Tests of joins by sample id against Python sets and sorting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import ManifestError
from mmaudit.rebalance.diff import ManifestJoin, column_keys, column_numbers

IDS = st.lists(st.sampled_from(["a", "b", "ä", "", "c d", "zz", "10", "9"]), unique=True)
relaxed = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, ids: list[Any], **columns: pa.Array) -> Path:
    pq.write_table(pa.table({"sample_id": pa.array(ids, pa.string()), **columns}), path, row_group_size=3)
    return path


@relaxed
@given(ids_a=IDS, ids_b=IDS, max_ids=st.integers(0, 4))
def test_join_matches_python(tmp_path: Path, ids_a: list[str], ids_b: list[str], max_ids: int) -> None:
    positions = [pa.array([f"{side}{row}" for row in range(len(ids))]) for side, ids in (("A", ids_a), ("B", ids_b))]
    a = write(tmp_path / "a.parquet", ids_a, place=positions[0])
    join = ManifestJoin.of(a, write(tmp_path / "b.parquet", ids_b, place=positions[1]))
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
    path = write(tmp_path / "a.parquet", [str(row) for row in range(len(rows))], text=text, number=number)
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


def test_repeated_or_null_ids_raise(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.parquet", ["a", "b"]), tmp_path / "bad.parquet"
    write(bad, ["a", "b", "a"])
    with pytest.raises(ManifestError, match=r"1 ids occur more than once in .*bad\.parquet \(for example a\)"):
        ManifestJoin.of(good, bad)
    write(bad, ["a", None])
    with pytest.raises(ManifestError, match=r"1 null ids in .*bad\.parquet"):
        ManifestJoin.of(bad, good)
