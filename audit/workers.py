"""Many tasks, all cores: how is one function run over them, and stopped at Ctrl-C?"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Protocol, TypeVar

from threadpoolctl import threadpool_limits

from .errors import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")

_AHEAD = 4  # tasks for each thread: decoded films take megabytes


class Progress(Protocol):
    """Who is told how far a stage has come."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note that `done` of `total` steps of a stage are done."""


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""


def default_workers() -> int:
    """Give the number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(work: Callable[[Task], Result], tasks: Sequence[Task], *, num_workers: int) -> Iterator[Result]:
    """Yield work(task) for each task, in order, from `num_workers` processes; 0, or a single task: in this process.

    Ctrl-C drops the tasks that have not begun and leaves at once. A script that calls this with workers needs
    the usual `if __name__ == "__main__":`.
    """
    if num_workers < 1 or len(tasks) < 2:
        yield from map(work, tasks)
        return
    # A forked copy of a process with running threads (torch has some) may hang; a fork server has none.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        # Imported once, not by each worker: torch, and pandas, which pyarrow looks for at its first array (0.3 s).
        context.set_forkserver_preload([work.__module__, "pandas"])
    strangers = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(num_workers, len(tasks)), mp_context=context, initializer=_prepare_worker)
    try:
        futures = deque(pool.submit(work, task) for task in tasks)
        while futures:
            yield futures.popleft().result()
        pool.shutdown()
    except BaseException as error:
        # Nothing is cancelled (as pool.map would): the pool's thread fails on cancelled tasks of workers that died.
        for worker in set(multiprocessing.active_children()) - strangers:
            worker.terminate()
        pool.shutdown(wait=False)
        if isinstance(error, BrokenProcessPool):
            raise RunError(
                "a worker process was killed from outside, mostly because memory ran out: lower --num-workers, and run "
                "the same command again"
            ) from error
        raise


def ahead(work: Callable[[Task], Result], tasks: Iterable[Task], *, num_threads: int) -> Iterator[Result]:
    """Yield work(task) for each task, in order; threads do the next ones meanwhile. 0: nothing is done ahead.

    Tasks are taken one by one, never more than four to a thread before they are wanted.
    """
    if num_threads < 1:
        yield from map(work, tasks)
        return
    pool = ThreadPoolExecutor(num_threads)
    window: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            window.append(pool.submit(work, task))
            if len(window) >= _AHEAD * num_threads:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """End this process when its parent has ended, also by SIGKILL: a worker would wait for its next task for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True, name="parent").start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _prepare_worker() -> None:
    end_with_parent()
    # Ctrl-C reaches every process of the terminal; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The workers are the parallelism: with two threads for products in each of two, a film took 38 ms instead of 17.
    for library in ("OMP", "OPENBLAS", "MKL"):  # those that are not loaded yet
        os.environ[f"{library}_NUM_THREADS"] = "1"
    threadpool_limits(limits=1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
