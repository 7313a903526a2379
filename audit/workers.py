"""Processes and threads: identity, pools of workers, fixed numbers of threads.

The rounding of a sum that a library splits among threads depends on their number. Within `fixed_threads` every library
therefore computes with a constant number of threads, whatever OMP_NUM_THREADS, the number of cores or the affinity of
the process are. `parallel_map` runs independent parts concurrently; their boundaries do not depend on the machine, so
that the number of parts that run at the same time changes no result.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Protocol, TypeVar

from threadpoolctl import ThreadpoolController, threadpool_limits

from .errors import RunError

_PROC = Path("/proc")
_NO_START = "0"  # where the system does not provide the start time of a process


def release_memory() -> None:
    """Return freed memory to the system: that of Arrow's pool, and of the heap what lies below memory in use.

    glibc keeps the latter, so that what is allocated in a later phase adds to it. Elsewhere only the pool's is
    returned.
    """
    import pyarrow as pa  # not for the help of commands

    pa.default_memory_pool().release_unused()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessId:
    """One process of one machine; `start` distinguishes it from a later process with the same pid.

    `machine` is a digest of the boot and of the pid namespace: two containers may both have pid 1 and the same host
    name.
    """

    machine: str
    pid: int
    start: str

    def __str__(self) -> str:
        return f"{self.machine}-{self.pid}-{self.start}"

    @classmethod
    def parse(cls, text: str) -> ProcessId | None:
        """Parse the result of `str`; return None for any other text."""
        match = re.fullmatch(r"([0-9a-f]{8})-(\d{1,10})-([0-9a-f]{1,20})", text)
        return None if match is None else cls(machine=match[1], pid=int(match[2]), start=match[3])

    def is_local(self) -> bool:
        """Return whether the process belongs to this machine, so that its pid can be looked up."""
        return self.machine == _machine()

    def is_running(self) -> bool:
        """Return whether a local process still runs."""
        return self.start == _start_of(self.pid)


def this_process() -> ProcessId:
    """Return the identity of this process."""
    return _identity(os.getpid())


@cache
def _identity(pid: int) -> ProcessId:
    return ProcessId(machine=_machine(), pid=pid, start=_start_of(pid) or _NO_START)


@cache
def _machine() -> str:
    """Return a digest of the boot and the pid namespace, or of host name and address, 8 hexadecimal digits."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii")
        text = boot + os.readlink(_PROC / "self/ns/pid")
    except OSError:
        text = f"{socket.gethostname()} {uuid.getnode()}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _start_of(pid: int) -> str | None:
    """Return the start time of a process as opaque hexadecimal digits; None if it has ended."""
    if not (_PROC / "self/stat").exists():
        return _start_by_ps(pid)
    try:
        fields = (_PROC / f"{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{int(fields[19]):x}"  # a zombie has ended


def _start_by_ps(pid: int) -> str | None:
    """Return a digest of the start time printed by ps, on systems without /proc; None if the process has ended."""
    try:
        output = subprocess.run(
            ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=10, check=False
        ).stdout.split(maxsplit=1)
    except (OSError, subprocess.SubprocessError):
        return _NO_START
    if len(output) < 2 or output[0].startswith("Z"):
        return None
    return hashlib.sha256(output[1].strip().encode()).hexdigest()[:16]


Task = TypeVar("Task")
Result = TypeVar("Result")

_TASKS_PER_THREAD = 4  # prefetched at most: decoded videos take megabytes


class Progress(Protocol):
    """Callback for the progress of a stage."""

    def __call__(self, stage: str, done: int, total: int, *, detail: str = "") -> None:
        """Report that `done` of `total` steps of a stage are done, and in `detail` what runs now."""


def no_progress(stage: str, done: int, total: int, *, detail: str = "") -> None:
    """Ignore progress."""


def format_duration(seconds: float) -> str:
    """Return a duration in its largest unit, such as 40 s, 12 min, 2.5 h or 3 days."""
    for limit, unit_seconds, unit in ((90, 1, "s"), (90 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            number = seconds / unit_seconds
            is_short = unit == "h" and number < 9.95
            return f"{number:.1f} {unit}".replace(".0 ", " ") if is_short else f"{number:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def default_workers() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(work: Callable[[Task], Result], tasks: Sequence[Task], *, num_workers: int) -> Iterator[Result]:
    """Yield work(task) for each task, in order, from `num_workers` processes; with 0, or one task, in this process.

    Ctrl-C drops the tasks that have not begun and returns at once. A script that calls this with workers needs
    the usual `if __name__ == "__main__":`.
    """
    if num_workers < 1 or len(tasks) < 2:
        yield from map(work, tasks)
        return
    # A fork of a process with running threads (torch has some) may hang; a fork server has none.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        # Imported once, not by each worker: torch, and pandas, which pyarrow imports with its first array (0.3 s). A
        # partial function is of the module `functools`: that of its function counts.
        context.set_forkserver_preload([getattr(work, "func", work).__module__, "pandas"])
    other_children = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(num_workers, len(tasks)), mp_context=context, initializer=_prepare_worker, initargs=(dict(os.environ),)
    )
    try:
        futures = deque(pool.submit(work, task) for task in tasks)
        while futures:
            yield futures.popleft().result()
        pool.shutdown()
    except BaseException as error:
        # No task is cancelled (as pool.map would): the pool's thread fails on cancelled tasks of workers that died.
        for worker in set(multiprocessing.active_children()) - other_children:
            worker.terminate()
        pool.shutdown(wait=False)
        if isinstance(error, BrokenProcessPool):
            raise RunError(
                "a worker process ended before its work was done: memory ran out (lower --num-workers and run the same "
                'command again), or a script calls mmaudit without `if __name__ == "__main__":`'
            ) from error
        raise


def prefetch_map(work: Callable[[Task], Result], tasks: Iterable[Task], *, num_threads: int) -> Iterator[Result]:
    """Yield work(task) for each task, in order, while threads process the next tasks; with 0 threads, no prefetching.

    Tasks are drawn one by one, at most four per thread before they are consumed.
    """
    if num_threads < 1:
        yield from map(work, tasks)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        yield from _map_window(pool, work, tasks, size=_TASKS_PER_THREAD * num_threads)


def _map_window(
    pool: ThreadPoolExecutor, work: Callable[[Task], Result], tasks: Iterable[Task], *, size: int
) -> Iterator[Result]:
    """Yield work(task) for each task, in order, with at most `size` tasks submitted; cancel them at the end."""
    window: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            window.append(pool.submit(work, task))
            if len(window) >= size:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        for future in window:
            future.cancel()


def end_with_parent() -> None:
    """End this process when its parent has ended, also by SIGKILL; a worker would wait for its next task forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True, name="parent").start()


def _exit_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _prepare_worker(environment: dict[str, str]) -> None:
    end_with_parent()
    os.environ.update(environment)  # the fork server has that of its start: credentials may have been set since
    # Ctrl-C reaches every process of the terminal; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The workers are the parallelism: with two BLAS threads in each of two workers, a video took 38 ms instead of 17.
    for library in ("OMP", "OPENBLAS", "MKL"):  # libraries that are not loaded yet
        os.environ[f"{library}_NUM_THREADS"] = "1"
    threadpool_limits(limits=1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


log = logging.getLogger("mmaudit")

NUM_THREADS = 1  # the environment cannot lower it; concurrent parts replace threads within a matrix product
NETWORK_THREADS = 2  # of a network on pictures or sound: its steps are sequential, and its matrix products are large
PROCESS_ROWS = 1 << 20  # ours: in the 3 s of CPU in which processes start, one hashes the ids of so many rows
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
        with _thread_libraries(len(sys.modules)).limit(limits=NUM_THREADS):
            torch.set_num_threads(_check_limits(num_threads))
            yield
    finally:
        _LOCAL.pool = None
        if pool.executor is not None:
            pool.executor.shutdown(cancel_futures=True)
        torch.set_num_threads(caller_threads)


@lru_cache(maxsize=1)
def _thread_libraries(num_modules: int) -> ThreadpoolController:
    """Find the loaded libraries that compute with threads, 6 ms, again once more modules have been imported."""
    return ThreadpoolController()


def parallel_map(work: Callable[[Task], Result], items: Iterable[Task]) -> Iterator[Result]:
    """Yield work(item) for each item, in order; within `fixed_threads` several run at the same time.

    At most two items per thread are started before they are consumed. Nested calls within a part run sequentially.
    """
    executor = None if isinstance(items, Sized) and len(items) < 2 else _open_executor()
    if executor is None:
        yield from map(work, items)
        return
    yield from _map_window(executor, work, items, size=2 * _LOCAL.pool.num_workers)


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
