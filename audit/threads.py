"""A fixed number of threads for computations whose results are stored, and a parallel map within it.

The rounding of a sum that a library splits among threads depends on their number. Within `fixed_threads` every library
therefore computes with a constant number of threads, whatever OMP_NUM_THREADS, the number of cores or the affinity of
the process are. `parallel_map` runs independent parts concurrently; their boundaries do not depend on the machine, so
that the number of parts that run at the same time changes no result.
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

NUM_THREADS = 1  # the environment cannot lower it; concurrent parts replace threads within a matrix product
NETWORK_THREADS = 2  # of a network on pictures or sound: its steps are sequential, and its matrix products are large
MAX_WORKERS = 8  # concurrent parts: each holds a part of the data in memory


@dataclass(slots=True)
class _Pool:
    """The threads that parts run in; `executor` is created with the first part."""

    num_workers: int
    executor: ThreadPoolExecutor | None = None


_LOCAL = threading.local()  # pool: that of the outermost block of this thread; is_worker: True in threads of a pool


@contextmanager
def fixed_threads(num_threads: int = NUM_THREADS) -> Iterator[None]:
    """Compute with `num_threads` threads within the block, and restore the caller's setting afterwards.

    Parts run concurrently in as many threads as torch is set to use, at most MAX_WORKERS. Blocks may be nested. The
    setting is that of the process: two Python threads should not open blocks at the same time.
    """
    import scipy.linalg  # noqa: F401  # only loaded libraries can be limited
    import torch

    caller_threads = torch.get_num_threads()
    if getattr(_LOCAL, "is_worker", False) or getattr(_LOCAL, "pool", None) is not None:
        torch.set_num_threads(_check_limits(num_threads))
        try:
            yield
        finally:
            torch.set_num_threads(caller_threads)
        return
    pool = _LOCAL.pool = _Pool(num_workers=min(caller_threads, MAX_WORKERS))
    try:
        with threadpool_limits(limits=NUM_THREADS):
            torch.set_num_threads(_check_limits(num_threads))
            yield
    finally:
        _LOCAL.pool = None
        if pool.executor is not None:
            pool.executor.shutdown(cancel_futures=True)
        torch.set_num_threads(caller_threads)


def parallel_map(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield work(item) for each item, in order; within `fixed_threads` several run at the same time.

    At most two items per thread are started before they are consumed. Nested calls within a part run sequentially.
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
    """Return the pool of this thread, started if necessary; None where parts run sequentially."""
    pool: _Pool | None = getattr(_LOCAL, "pool", None)
    if pool is None or pool.num_workers < 2:
        return None
    if pool.executor is None:
        pool.executor = ThreadPoolExecutor(pool.num_workers, initializer=_begin_worker)
    return pool.executor


def _begin_worker() -> None:
    import torch

    _LOCAL.is_worker = True
    torch.set_num_threads(NUM_THREADS)  # OpenMP has a setting per thread


def _check_limits(num_threads: int) -> int:
    """Warn if the environment lets OpenMP use fewer threads: results are then not guaranteed to be bit-identical."""
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    is_lowered = limit.isdecimal() and int(limit) < num_threads
    is_dynamic = num_threads > 1 and os.environ.get("OMP_DYNAMIC", "").strip().lower() in ("true", "1")
    if is_lowered or is_dynamic:
        name = "OMP_THREAD_LIMIT" if is_lowered else "OMP_DYNAMIC"
        log.warning(
            "%s=%s lowers the number of threads below the %d required: results may differ in the last digits; unset it",
            name,
            os.environ[name],
            num_threads,
        )
    return num_threads
