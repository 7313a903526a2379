"""A fixed number of threads for every computation whose result is stored.

A sum that a library splits among its threads is rounded differently with each number of them. Within `fixed_threads`
every library therefore computes with a number of threads that is a constant, whatever OMP_NUM_THREADS, the number of
cores or the affinity of the process are. `parallel_map` runs independent parts, cut without regard to the machine, side
by side: how many run at the same time changes no result.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from threadpoolctl import threadpool_limits

log = logging.getLogger("mmaudit")

Item = TypeVar("Item")
Result = TypeVar("Result")

NUM_THREADS = 1  # nothing outside can lower it; parts side by side take the place of threads within a product
NETWORK_THREADS = 2  # of a network of pictures or sound: its steps depend on each other, and its products are large
MAX_WORKERS = 8  # parts that run side by side: each holds a part of the data in memory


@dataclass(slots=True)
class _Pool:
    """The threads that parts run in; `executor` is made when the first part comes."""

    num_workers: int
    executor: ThreadPoolExecutor | None = None


_LOCAL = threading.local()  # pool: of the outermost block of this thread; is_worker: True in the threads of a pool


@contextmanager
def fixed_threads(num_threads: int = NUM_THREADS) -> Iterator[None]:
    """Compute with `num_threads` threads within the block, and restore the caller's setting afterwards.

    Parts run side by side in as many threads as the caller's torch computes with, no more than MAX_WORKERS. Blocks may
    be nested. The setting is that of the process: two Python threads should not open blocks at the same time.
    """
    import scipy.linalg  # noqa: F401  # only a library that is loaded can be limited
    import torch

    before = torch.get_num_threads()
    if getattr(_LOCAL, "is_worker", False) or getattr(_LOCAL, "pool", None) is not None:
        torch.set_num_threads(_check_limits(num_threads))
        try:
            yield
        finally:
            torch.set_num_threads(before)
        return
    pool = _LOCAL.pool = _Pool(num_workers=min(before, MAX_WORKERS))
    try:
        with threadpool_limits(limits=NUM_THREADS):
            torch.set_num_threads(_check_limits(num_threads))
            yield
    finally:
        _LOCAL.pool = None
        if pool.executor is not None:
            pool.executor.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def parallel_map(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield work(item) for each item, in order; within `fixed_threads` several run at the same time.

    No more than two items to a thread are begun before they are wanted. Within a part, parts run one after another.
    """
    executor = None if isinstance(items, Sized) and len(items) < 2 else _open_executor()
    if executor is None:
        yield from map(work, items)
        return
    window: deque[Future[Result]] = deque()
    try:
        for item in items:
            window.append(executor.submit(work, item))
            if len(window) >= 2 * _LOCAL.pool.num_workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        for future in window:
            future.cancel()


def _open_executor() -> ThreadPoolExecutor | None:
    """Return this thread's pool, started where it is not yet; None where parts run one after another."""
    pool: _Pool | None = getattr(_LOCAL, "pool", None)
    if pool is None or pool.num_workers < 2:
        return None
    if pool.executor is None:
        pool.executor = ThreadPoolExecutor(pool.num_workers, initializer=_begin_worker)
    return pool.executor


def _begin_worker() -> None:
    import torch

    _LOCAL.is_worker = True
    torch.set_num_threads(NUM_THREADS)  # OpenMP counts for each thread by itself


def _check_limits(num_threads: int) -> int:
    """Warn where OpenMP was told to use fewer threads than this: the same bytes are then promised no more."""
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    lowered = limit.isdecimal() and int(limit) < num_threads
    dynamic = num_threads > 1 and os.environ.get("OMP_DYNAMIC", "").strip().lower() in ("true", "1")
    if lowered or dynamic:
        name = "OMP_THREAD_LIMIT" if lowered else "OMP_DYNAMIC"
        log.warning(
            "%s=%s lowers the number of threads, which is to be %d: results may differ in their last digits; unset it",
            name,
            os.environ[name],
            num_threads,
        )
    return num_threads
