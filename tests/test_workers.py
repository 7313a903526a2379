"""Tests of worker processes: results in order, errors in place, and no process left running."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from mmaudit.audit.errors import RunError
from mmaudit.audit.workers import (
    NETWORK_THREADS,
    NUM_THREADS,
    default_workers,
    fixed_threads,
    no_progress,
    parallel_map,
    prefetch_map,
    run_tasks,
)

pytestmark = pytest.mark.usefixtures("usual_threads")

# Workers import the functions they run, which are therefore from the standard library.


def remaining_processes(patience_seconds: float = 5.0) -> list[str]:
    """Return the names of child processes that are still running after a while."""
    end = time.monotonic() + patience_seconds
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.02)
    return [process.name for process in multiprocessing.active_children()]


@pytest.mark.parametrize("num_workers", [0, 1, 2, 9])
def test_run_tasks_keeps_order(num_workers: int) -> None:
    tasks = [2.0, 9.0, 4.0, 1.0, 0.0]
    assert list(run_tasks(math.sqrt, tasks, num_workers=num_workers)) == [math.sqrt(task) for task in tasks]
    assert remaining_processes() == []


def test_slow_first_task_keeps_order() -> None:
    work: Callable[[float], None] = time.sleep
    assert list(run_tasks(work, [0.3, 0.0, 0.0], num_workers=2)) == [None] * 3


@pytest.mark.parametrize("tasks", [[], [4.0]])
def test_single_task_runs_in_this_process(tasks: list[float]) -> None:
    assert list(run_tasks(lambda task: (os.getpid(), task), tasks, num_workers=4)) == [
        (os.getpid(), task) for task in tasks
    ]


def test_without_workers_tasks_run_lazily() -> None:
    done: list[int] = []
    results = run_tasks(done.append, [1, 2, 3], num_workers=0)
    assert done == []
    next(results)
    assert done == [1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_error_is_raised_in_place_of_its_result(num_workers: int) -> None:
    results = run_tasks(math.sqrt, [4.0, -1.0, 9.0, 16.0], num_workers=num_workers)
    assert next(results) == 2.0
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        next(results)
    assert remaining_processes() == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, GeneratorExit])
def test_interrupt_ends_workers_at_once(stop: type[BaseException]) -> None:
    """Five minutes of sleep are queued after a first result."""
    work: Callable[[float], None] = time.sleep
    results = run_tasks(work, [0.0] + [60.0] * 5, num_workers=2)
    next(results)
    start = time.monotonic()
    if stop is GeneratorExit:
        results.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(KeyboardInterrupt):
            results.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
    assert remaining_processes() == []
    assert time.monotonic() - start < 5


def test_interrupted_consumer_ends_workers() -> None:
    def consume() -> None:
        work: Callable[[float], None] = time.sleep
        for _ in run_tasks(work, [0.0] + [60.0] * 5, num_workers=2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert remaining_processes() == []


def test_other_child_processes_are_not_ended() -> None:
    other_process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    other_process.start()
    try:
        work: Callable[[float], None] = time.sleep
        results = run_tasks(work, [0.0, 60.0], num_workers=2)
        next(results)
        results.close()  # type: ignore[attr-defined]
        time.sleep(0.2)
        assert other_process.is_alive()
    finally:
        other_process.terminate()
        other_process.join()
        other_process.close()


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_prefetch_map_keeps_order(num_threads: int) -> None:
    tasks = [2.0, 9.0, 4.0] * 9
    assert list(prefetch_map(math.sqrt, tasks, num_threads=num_threads)) == [math.sqrt(task) for task in tasks]
    results = prefetch_map(math.sqrt, [4.0, -1.0, 9.0], num_threads=num_threads)
    assert next(results) == 2.0
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        next(results)


def test_prefetch_map_reads_ahead_within_limit() -> None:
    drawn_tasks: list[int] = []
    barrier = threading.Barrier(2, timeout=20)

    def tasks() -> Iterator[int]:
        for task in range(100):
            drawn_tasks.append(task)
            yield task

    def work(task: int) -> int:
        if task < 2:
            barrier.wait()  # passes only if two threads run at the same time
        return task

    results = prefetch_map(work, tasks(), num_threads=2)
    assert next(results) == 0
    assert len(drawn_tasks) == 8
    assert next(results) == 1
    assert len(drawn_tasks) == 9
    results.close()  # type: ignore[attr-defined]
    assert len(drawn_tasks) == 9


def test_default_workers_is_at_least_one() -> None:
    assert 1 <= default_workers() <= (os.cpu_count() or 1)


def test_no_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    no_progress("encode", 1, 2)
    assert capsys.readouterr() == ("", "")


def running_in_session(leader: int) -> list[str]:
    lines = subprocess.run(["ps", "-eo", "sess=,stat=,pid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=3) for line in lines.splitlines()]
    return [row[2] for row in rows if row[0] == str(leader) and not row[1].startswith("Z")]


@pytest.mark.parametrize("seconds", [None, 0.3])
def test_workers_end_when_their_parent_is_killed(tmp_path: Path, seconds: float | None) -> None:
    """With SIGKILL, which the parent cannot handle: while workers run, and while they start."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import time; from mmaudit.audit.workers import run_tasks\n"
        "if __name__ == '__main__':\n"
        "    for _ in run_tasks(time.sleep, [0.0] + [60.0] * 4, num_workers=2): print('ready', flush=True)\n"
    )
    command = [sys.executable, str(script)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        assert parent.stdout is not None
        if seconds is None:
            assert parent.stdout.readline() == b"ready\n"
            assert len(running_in_session(parent.pid)) > 3  # the fork server, its resource tracker, the workers
        else:
            time.sleep(seconds)
        parent.kill()
        parent.wait()
        end = time.monotonic() + 5
        while running_in_session(parent.pid) and time.monotonic() < end:
            time.sleep(0.05)
        assert running_in_session(parent.pid) == []
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()


def test_killed_worker_raises_one_line_error() -> None:
    work: Callable[[int], None] = signal.raise_signal
    with pytest.raises(RunError, match=r"a worker process ended before its work .*lower --num-workers") as caught:
        list(run_tasks(work, [signal.SIGKILL] * 4, num_workers=2))
    assert "\n" not in str(caught.value)
    assert remaining_processes() == []


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
