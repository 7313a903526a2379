"""Tests of fixed threads: constant within the block, restored afterwards, and parts in order."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from mmaudit.audit.workers import NETWORK_THREADS, NUM_THREADS, fixed_threads, parallel_map


@pytest.fixture
def three_threads() -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(previous)


def blas_threads() -> dict[str, int]:
    libraries = [library for library in threadpool_info() if library["user_api"] == "blas"]
    return {library["filepath"]: library["num_threads"] for library in libraries}


@pytest.mark.usefixtures("three_threads")
def test_thread_count_is_fixed_within_and_restored_afterwards() -> None:
    before = blas_threads()
    assert before
    with fixed_threads():
        assert torch.get_num_threads() == NUM_THREADS
        assert set(blas_threads().values()) == {NUM_THREADS}
        with fixed_threads(NETWORK_THREADS):
            assert torch.get_num_threads() == NETWORK_THREADS
        assert torch.get_num_threads() == NUM_THREADS
    assert torch.get_num_threads() == 3
    after = blas_threads()
    assert {path: after[path] for path in before} == before


@pytest.mark.usefixtures("three_threads")
def test_parallel_map_keeps_order_and_thread_count() -> None:
    def part(number: int) -> tuple[int, int, list[int]]:
        time.sleep(0.02 if number == 0 else 0)
        return number, torch.get_num_threads(), list(parallel_map(abs, [-number, number]))

    expected = [(number, NUM_THREADS, [number, number]) for number in range(20)]
    with fixed_threads():
        assert list(parallel_map(part, range(20))) == expected
    assert [number for number, _, _ in parallel_map(part, range(3))] == [0, 1, 2]


@pytest.mark.usefixtures("three_threads")
def test_error_of_a_part_is_raised_and_pool_is_closed() -> None:
    def part(number: int) -> float:
        return 1 / (3 - number)

    with pytest.raises(ZeroDivisionError), fixed_threads():
        list(parallel_map(part, range(100)))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("name", "value", "warns"),
    [("OMP_THREAD_LIMIT", "1", True), ("OMP_THREAD_LIMIT", "64", False), ("OMP_DYNAMIC", "true", True)],
)
def test_lower_openmp_limit_is_warned_about(
    name: str, value: str, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING, "mmaudit"), fixed_threads(NETWORK_THREADS):
        pass
    assert (name in caplog.text) == warns


@pytest.mark.usefixtures("three_threads")
def test_sums_do_not_depend_on_number_of_threads() -> None:
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((200_000, 16)).astype(np.float32))
    sums = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        with fixed_threads():
            sums.append(sum(parallel_map(lambda part: part.T @ part, torch.split(rows, 1_000)), torch.zeros(16, 16)))
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])
