"""Laws of a join: rows of one id stand together, the others alone, and the least ids come first, as Python says."""

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
from mmaudit.rebalance.join import ManifestJoin, column_keys, column_numbers

IDS = st.lists(st.sampled_from(["a", "b", "ä", "", "c d", "zz", "10", "9"]), unique=True)
relaxed = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, ids: list[Any], **columns: pa.Array) -> Path:
    pq.write_table(pa.table({"sample_id": pa.array(ids, pa.string()), **columns}), path, row_group_size=3)
    return path


@relaxed
@given(here=IDS, there=IDS, max_ids=st.integers(0, 4))
def test_it_joins_as_python_does(tmp_path: Path, here: list[str], there: list[str], max_ids: int) -> None:
    places = [pa.array([f"{side}{row}" for row in range(len(ids))]) for side, ids in (("A", here), ("B", there))]
    a = write(tmp_path / "a.parquet", here, place=places[0])
    join = ManifestJoin.of(a, write(tmp_path / "b.parquet", there, place=places[1]))
    both = [name for name in here if name in there]
    assert [here[row] for row in join.in_a] == [there[row] for row in join.in_b] == both
    assert [here[row] for row in join.only_a] == [name for name in here if name not in there]
    assert [there[row] for row in join.only_b] == [name for name in there if name not in here]
    assert [join.sample_ids(codes) for codes in join.codes] == [here, there]
    least = join.smallest_codes(join.codes[0][join.in_a], max_ids=max_ids)
    assert join.sample_ids(least) == sorted(both, key=str.encode)[:max_ids]
    expected = [(name, f"A{here.index(name)}", f"B{there.index(name)}") for name in join.sample_ids(least)]
    assert list(join.pairs("place", least)) == expected


@relaxed
@given(st.lists(st.tuples(st.none() | st.sampled_from(["x", "y", "xy"]), st.none() | st.floats(-1, 1, width=32))))
def test_columns_are_keys_that_tell_values_apart_and_numbers(tmp_path: Path, rows: list[tuple[Any, Any]]) -> None:
    text, number = pa.array([row[0] for row in rows], pa.string()), pa.array([row[1] for row in rows], pa.float32())
    path = write(tmp_path / "a.parquet", [str(row) for row in range(len(rows))], text=text, number=number)
    keys = column_keys(path, "text", len(rows))
    assert [[one == other for other in keys] for one in keys] == [
        [one[0] == other[0] for other in rows] for one in rows
    ]
    expected = [np.nan if row[1] is None else row[1] for row in rows]
    np.testing.assert_array_equal(column_numbers(path, "number", len(rows)), np.array(expected, np.float64))
    with pytest.raises(
        ManifestError, match=f"a column has {len(rows)} values, expected {len(rows) + 1} as there are ids"
    ):
        column_numbers(path, "number", len(rows) + 1)


def test_ids_that_stand_twice_or_are_null_are_refused(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.parquet", ["a", "b"]), tmp_path / "bad.parquet"
    write(bad, ["a", "b", "a"])
    with pytest.raises(ManifestError, match=r"1 ids occur more than once in .*bad\.parquet \(for example a\)"):
        ManifestJoin.of(good, bad)
    write(bad, ["a", None])
    with pytest.raises(ManifestError, match=r"1 null ids in .*bad\.parquet"):
        ManifestJoin.of(bad, good)
