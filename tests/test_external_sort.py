"""Tests of ExternalSort: on disk or in memory it equals one sort of all records, and leaves no files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.rebalance import selection as external_sort_module
from mmaudit.rebalance.selection import RECORD, ExternalSort

Keys = NDArray[np.uint64]
TOP = np.iinfo(np.uint64).max
QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["memory", "disk", "disk of few parts"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Storage of the records; parts of 4 rows make many parts in each of these tests."""
    if request.param != "memory":
        monkeypatch.setattr(external_sort_module, "_PART_ROWS", 4)
    if request.param == "disk of few parts":
        monkeypatch.setattr(external_sort_module, "_MAX_PARTS", 2)
    return str(request.param)


def draw_records(n: int, num_cells: int, seed: int) -> tuple[Keys, NDArray[np.int32], NDArray[np.uint32]]:
    """Draw n records, some with equal keys, some in no cell, some with the smallest or largest key."""
    rng = np.random.default_rng(seed)
    key = rng.integers(0, TOP, n, dtype=np.uint64, endpoint=True)
    key[rng.random(n) < 0.1] = 0
    key[rng.random(n) < 0.1] = TOP
    cell = rng.integers(-1, num_cells, n).astype(np.int32)
    return key, cell, rng.integers(0, 1 << 20, n).astype(np.uint32)


def filled_sort(records: tuple[NDArray[np.generic], ...], folder: Path, *, step: int = 7) -> ExternalSort:
    """Return an ExternalSort with the records added in pieces; the caller closes it."""
    n = len(records[0])
    external_sort = ExternalSort(n, folder)
    for first in range(0, n, step):
        external_sort.add(*(array[first : first + step] for array in records))  # type: ignore[arg-type]
    return external_sort


@QUICK
@given(st.integers(0, 90), st.integers(1, 5), st.integers(0, 10**6))
def test_parts_hold_all_records_in_key_order(tmp_path: Path, storage: str, n: int, num_cells: int, seed: int) -> None:
    key, cell, imbalance = draw_records(n, num_cells, seed)
    with filled_sort((key, cell, imbalance), tmp_path) as external_sort:
        for _ in range(2):  # parts can be read repeatedly
            parts = list(external_sort.parts())
            records = np.concatenate(parts)
            assert sorted(records.tolist()) == sorted(zip(key.tolist(), cell.tolist(), imbalance.tolist(), strict=True))
            ends = [(part["key"].min(), part["key"].max()) for part in parts if len(part)]
            assert all(previous[1] < following[0] for previous, following in pairwise(ends))
            external_sort.add(key[:1], cell[:1], imbalance[:1])  # and records added afterwards
            key, cell, imbalance = (np.r_[array, array[:1]] for array in (key, cell, imbalance))
        if storage == "disk" and n >= 16:
            assert len(parts) >= 4


@QUICK
@given(st.integers(0, 90), st.integers(1, 5), st.integers(0, 10**6))
def test_repeated_keys_match_numpy(tmp_path: Path, storage: str, n: int, num_cells: int, seed: int) -> None:
    key, cell, imbalance = draw_records(n, num_cells, seed)
    with filled_sort((key, cell, imbalance), tmp_path) as external_sort:
        keys, counts = np.unique(key, return_counts=True)
        assert external_sort.repeated().tolist() == keys[counts > 1].tolist()


@QUICK
@given(st.integers(0, 90), st.integers(1, 5), st.integers(0, 10**6))
def test_last_keys_match_a_full_sort(tmp_path: Path, storage: str, n: int, num_cells: int, seed: int) -> None:
    key, cell, imbalance = draw_records(n, num_cells, seed)
    rng = np.random.default_rng(seed)
    counts = np.bincount(cell[cell >= 0], minlength=num_cells)
    quota = rng.integers(0, counts + 2)
    counts_by_imbalance = np.zeros(int(imbalance.max(initial=0)) + 1, dtype=np.int64)
    with filled_sort((key, cell, imbalance), tmp_path) as external_sort:
        last_keys = external_sort.last_keys(quota, kept_imbalance=counts_by_imbalance)
        assert last_keys.tolist() == external_sort.last_keys(quota).tolist()
    is_kept = (cell >= 0) & (quota[cell] > 0) & (key <= last_keys[cell])
    assert counts_by_imbalance.tolist() == np.bincount(imbalance[is_kept], minlength=len(counts_by_imbalance)).tolist()
    for cell_index in range(num_cells):
        cell_keys = np.sort(key[cell == cell_index])
        expected = (
            0
            if quota[cell_index] == 0
            else TOP
            if quota[cell_index] > len(cell_keys)
            else cell_keys[quota[cell_index] - 1]
        )
        assert last_keys[cell_index] == expected


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_scratch_folder_is_emptied(tmp_path: Path, storage: str, error: type[Exception] | None) -> None:
    folder = tmp_path / "deep" / "scratch"

    def use() -> None:
        with filled_sort(draw_records(90, 3, 0), folder) as external_sort:
            external_sort.repeated()
            assert storage == "memory" or any(folder.iterdir())
            if error is not None:
                raise error("interrupted")

    if error is None:
        use()
    else:
        with pytest.raises(error, match="interrupted"):
            use()
    assert folder.exists() == (storage != "memory")
    assert storage == "memory" or not any(folder.iterdir())


def test_scratch_size_is_16_bytes_per_record(tmp_path: Path, storage: str) -> None:
    for n in (3, 4, 90):
        with filled_sort(draw_records(n, 3, 0), tmp_path) as external_sort:
            for _ in external_sort.parts():
                pass
            size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
        assert size == (n * RECORD.itemsize if storage != "memory" and n >= 4 else 0)


def test_many_parts_need_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of open files is 1,024 on most machines, 256 on some; 10^9 rows have 1,024 parts."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(external_sort_module, "_PART_ROWS", 4)
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, old[1]))
    try:
        with filled_sort(draw_records(5_000, 3, 0), tmp_path, step=1_000) as external_sort:
            assert len(list(external_sort.parts())) == 1_024
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
