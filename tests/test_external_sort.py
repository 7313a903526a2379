"""Laws of the spill: on disk or in memory, its answers are those of one sort of everything, and it leaves nothing."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.rebalance import external_sort as spill
from mmaudit.rebalance.external_sort import RECORD, ExternalSort

Keys = NDArray[np.uint64]
TOP = np.iinfo(np.uint64).max
QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["memory", "disk", "disk of few parts"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the records are held; parts of 4 rows are many for any of these tests."""
    if request.param != "memory":
        monkeypatch.setattr(spill, "_PART_ROWS", 4)
    if request.param == "disk of few parts":
        monkeypatch.setattr(spill, "_MAX_PARTS", 2)
    return str(request.param)


def drawn(n: int, num_cells: int, seed: int) -> tuple[Keys, NDArray[np.int32], NDArray[np.uint32]]:
    """Give n records, of which some share a key and some are in no cell; the ends of the range are among the keys."""
    rng = np.random.default_rng(seed)
    key = rng.integers(0, TOP, n, dtype=np.uint64, endpoint=True)
    key[rng.random(n) < 0.1] = 0
    key[rng.random(n) < 0.1] = TOP
    cell = rng.integers(-1, num_cells, n).astype(np.int32)
    return key, cell, rng.integers(0, 1 << 20, n).astype(np.uint32)


def filled(records: tuple[NDArray[np.generic], ...], folder: Path, *, step: int = 7) -> ExternalSort:
    """Add the records in pieces; the caller closes it."""
    n = len(records[0])
    held = ExternalSort(n, folder)
    for first in range(0, n, step):
        held.add(*(each[first : first + step] for each in records))  # type: ignore[arg-type]
    return held


@QUICK
@given(st.integers(0, 90), st.integers(1, 5), st.integers(0, 10**6))
def test_all_records_come_back_in_parts_that_follow_each_other(
    tmp_path: Path, where: str, n: int, num_cells: int, seed: int
) -> None:
    key, cell, imbalance = drawn(n, num_cells, seed)
    with filled((key, cell, imbalance), tmp_path) as held:
        for _ in range(2):  # reading takes nothing away
            parts = list(held.parts())
            there = np.concatenate(parts)
            assert sorted(there.tolist()) == sorted(zip(key.tolist(), cell.tolist(), imbalance.tolist(), strict=True))
            ends = [(part["key"].min(), part["key"].max()) for part in parts if len(part)]
            assert all(one[1] < other[0] for one, other in pairwise(ends))
            held.add(key[:1], cell[:1], imbalance[:1])  # nor does it stand in the way of more
            key, cell, imbalance = (np.r_[each, each[:1]] for each in (key, cell, imbalance))
        if where == "disk" and n >= 16:
            assert len(parts) >= 4


@QUICK
@given(st.integers(0, 90), st.integers(1, 5), st.integers(0, 10**6))
def test_repeated_keys_are_those_of_numpy(tmp_path: Path, where: str, n: int, num_cells: int, seed: int) -> None:
    key, cell, imbalance = drawn(n, num_cells, seed)
    with filled((key, cell, imbalance), tmp_path) as held:
        names, times = np.unique(key, return_counts=True)
        assert held.repeated().tolist() == names[times > 1].tolist()


@QUICK
@given(st.integers(0, 90), st.integers(1, 5), st.integers(0, 10**6))
def test_the_last_key_of_a_cell_is_that_of_a_sort(
    tmp_path: Path, where: str, n: int, num_cells: int, seed: int
) -> None:
    key, cell, imbalance = drawn(n, num_cells, seed)
    rng = np.random.default_rng(seed)
    counts = np.bincount(cell[cell >= 0], minlength=num_cells)
    quota = rng.integers(0, counts + 2)
    steps = np.zeros(int(imbalance.max(initial=0)) + 1, dtype=np.int64)
    with filled((key, cell, imbalance), tmp_path) as held:
        found = held.last_keys(quota, kept_imbalance=steps)
        assert found.tolist() == held.last_keys(quota).tolist()
    kept = (cell >= 0) & (quota[cell] > 0) & (key <= found[cell])
    assert steps.tolist() == np.bincount(imbalance[kept], minlength=len(steps)).tolist()
    for one in range(num_cells):
        some = np.sort(key[cell == one])
        expected = 0 if quota[one] == 0 else TOP if quota[one] > len(some) else some[quota[one] - 1]
        assert found[one] == expected


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_the_scratch_folder_is_left_empty(tmp_path: Path, where: str, error: type[Exception] | None) -> None:
    folder = tmp_path / "deep" / "scratch"

    def use() -> None:
        with filled(drawn(90, 3, 0), folder) as held:
            held.repeated()
            assert where == "memory" or any(folder.iterdir())
            if error is not None:
                raise error("on the way")

    if error is None:
        use()
    else:
        with pytest.raises(error, match="on the way"):
            use()
    assert folder.exists() == (where != "memory")
    assert where == "memory" or not any(folder.iterdir())


def test_scratch_space_is_told_beforehand(tmp_path: Path, where: str) -> None:
    for n in (3, 4, 90):
        with filled(drawn(n, 3, 0), tmp_path) as held:
            for _ in held.parts():
                pass
            size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
        assert size == (n * RECORD.itemsize if where != "memory" and n >= 4 else 0)


def test_many_parts_take_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have 1,024 files open on most machines, 256 on some; at 10^9 rows there are 1,024 parts."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(spill, "_PART_ROWS", 4)
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, old[1]))
    try:
        with filled(drawn(5_000, 3, 0), tmp_path, step=1_000) as held:
            assert len(list(held.parts())) == 1_024
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
