"""A fixed pool of Ray actors, which read and write files themselves and return completion records.

Ray's defaults change between its versions; what behaviour depends on is passed: one call at a time in an actor, no
restart and no retry by Ray, CPUs, GPUs and memory, spread over machines. Retries are made here, where they are counted.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import MmauditError, RemoteError, RunError
from ..storage import temporary_path
from ..workers import Progress, no_progress
from .executors import RayConfig, RayOptions
from .ray_cluster import Site, num_slots, open_ray

log = logging.getLogger("mmaudit")

Work = Callable[[Any, Any], Any]

_MORE = 1.25  # times the memory that was warned of, after which is warned again
_POLL_SECONDS = 1.0  # after which an interrupt is noticed, and a wait for workers ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """Record of a unit of work.

    Attributes:
        unit: Its number.
        result: What the work returned, a few bytes.
        host: Machine of the worker.
        pid: Process of the worker.
        max_rss: Largest resident memory of the worker so far, in bytes; Ray does not count it.
        messages: Level and text of what was logged.
    """

    unit: int
    result: Any
    host: str
    pid: int
    max_rss: int
    messages: tuple[tuple[int, str], ...]


class Worker:
    """An actor of the pool; `begin` is its first call, whose errors keep their type, as those of __init__ do not."""

    def begin(self, site: Site, shared: Any) -> str:
        """Check the machine and keep what all units need; return the id of the node."""
        import ray

        site.enter()
        self.shared = shared
        logging.getLogger("mmaudit").setLevel(logging.INFO)
        return str(ray.get_runtime_context().get_node_id())

    def run(self, work: Work, number: int, unit: Any, threads: int) -> Completed:
        """Do one unit of work with at most so many threads at the same time."""
        torch.set_num_threads(threads)
        messages = Messages()
        log.addHandler(messages)
        try:
            result = work(self.shared, unit)
        finally:
            log.removeHandler(messages)
        return Completed(
            unit=number,
            result=result,
            host=socket.gethostname(),
            pid=os.getpid(),
            max_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            messages=tuple(messages.texts),
        )


class Messages(logging.Handler):
    """Collects what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the level and the text of a record."""
        self.texts.append((record.levelno, record.getMessage()))


@dataclass(slots=True, kw_only=True)
class RayPool:
    """A fixed number of workers, which are replaced when they end; see `open_pool`."""

    ray: Any
    config: RayConfig
    size: int
    site: Site
    shared: Any  # a reference to what all units need
    progress: Progress = no_progress
    starting: dict[Any, Any] = field(default_factory=dict)  # the actor of each call of `begin`
    node_of: dict[Any, str] = field(default_factory=dict)  # the node of each actor that has begun
    records: list[Completed] = field(default_factory=list)  # of the last call of `run`
    logged: set[tuple[int, str]] = field(default_factory=set)
    stated: dict[str, int] = field(default_factory=dict)  # memory of a worker that was warned of, by machine
    num_lost: int = 0  # workers that ended before they had begun

    def run(
        self, work: Work, units: Sequence[Any], *, names: Sequence[str], stage: str, done: int = 0
    ) -> list[Completed]:
        """Do all units of work and return their records in order.

        Args:
            work: A function of a module, of what all units need and of one unit; doing a unit twice is harmless.
            units: Small objects.
            names: Their names in messages.
            stage: The stage of progress.
            done: Units of this stage that were done before.

        Raises:
            MmauditError: As the work raised it, or RunError for a unit that failed on every retry.
        """
        if not units:
            return []
        pending, failures, running = deque(range(len(units))), Counter[int](), dict[Any, tuple[Any, int]]()
        records: dict[int, Completed] = {}
        total, deadline = done + len(units), time.monotonic() + self.config.start_seconds
        while len(records) < len(units):
            self.progress(stage, done + len(records), total)
            self._fill()
            busy = {actor for actor, _ in running.values()}
            for actor in [actor for actor in self.node_of if actor not in busy][: len(pending)]:
                number = pending.popleft()
                threads = self._threads(actor, num_units=len(units))
                running[actor.run.remote(work, number, units[number], threads)] = actor, number
            if running:
                deadline = time.monotonic() + self.config.start_seconds
            elif time.monotonic() > deadline:
                raise RunError(self._describe_wait())
            for reference in self.ray.wait([*running, *self.starting], timeout=_POLL_SECONDS)[0]:
                if reference in self.starting:
                    self._finish_start(reference)
                    continue
                actor, number = running.pop(reference)
                record = self._result(reference, actor, number, failures, name=names[number])
                if record is None:
                    pending.append(number)
                else:
                    records[number] = record
                    self._log(record)
        self.progress(stage, total, total)
        self.records = [records[number] for number in range(len(units))]
        return self.records

    def _fill(self) -> None:
        """Start workers in place of those that have ended; drop those of machines that are gone."""
        alive = {node["NodeID"] for node in self.ray.nodes() if node["Alive"]} if self.num_lost else None
        if alive is not None:
            self.node_of = {actor: node for actor, node in self.node_of.items() if node in alive}
        for _ in range(self.size - len(self.node_of) - len(self.starting)):
            actor = (
                self.ray.remote(Worker)
                .options(
                    num_cpus=self.config.cpus,
                    num_gpus=self.config.gpus,
                    memory=int(self.config.reserved_gb * 1e9),
                    max_restarts=0,
                    max_task_retries=0,
                    max_concurrency=1,
                    scheduling_strategy="SPREAD",
                )
                .remote()
            )
            self.starting[actor.begin.remote(self.site, self.shared)] = actor

    def _finish_start(self, reference: Any) -> None:
        """Record a worker that has begun; raise the error of one that found its machine unfit."""
        from ray.exceptions import RayError, RayTaskError

        actor = self.starting.pop(reference)
        try:
            self.node_of[actor] = self.ray.get(reference)
        except RayTaskError as error:
            raise _cause_of(error) from error
        except RayError as error:
            self.num_lost += 1
            if self.num_lost > self.config.retries * self.size:
                raise RunError(f"workers end before they begin ({_first_line(error)}): see Ray's own logs") from error

    def _result(
        self, reference: Any, actor: Any, number: int, failures: Counter[int], *, name: str
    ) -> Completed | None:
        """Return the record of a unit, None where it is to be done again."""
        from ray.exceptions import RayError, RayTaskError

        try:
            return self.ray.get(reference)  # type: ignore[no-any-return]
        except RayTaskError as error:
            cause = _cause_of(error)
            # Of file systems, servers and memory, which may pass.
            if not isinstance(cause, (RunError, RemoteError, OSError, MemoryError)):
                if isinstance(cause, MmauditError):
                    raise cause from error
                raise RuntimeError(f"{name}: {type(cause).__name__}: {_first_line(cause)}") from error
            reason: BaseException = cause
        except RayError as error:
            reason = error
            self.num_lost += 1
            self.node_of.pop(actor, None)
        failures[number] += 1
        what = f"{type(reason).__name__}: " * (not isinstance(reason, MmauditError)) + _first_line(reason)
        if failures[number] > self.config.retries:
            advice = "" if isinstance(reason, (MmauditError, OSError)) else _MEMORY_ADVICE
            raise RunError(f"{name} failed {failures[number]} times, the last time by {what}{advice}") from reason
        log.info("%s is done again on another worker: %s", name, what)
        return None

    def _threads(self, actor: Any, *, num_units: int) -> int:
        """Return the threads of a worker: its CPUs, and those of workers on its machine that have no unit."""
        on_node = Counter(self.node_of.values())[self.node_of[actor]]
        return self.config.cpus * max(1, min(on_node, self.size // num_units))

    def _log(self, record: Completed) -> None:
        """Log what a worker has logged, each line once, and its memory if that is more than it reserved."""
        for level, text in record.messages:
            if (level, text) not in self.logged:
                self.logged.add((level, text))
                log.log(level, "%s", text)
        if record.max_rss > max(self.config.reserved_gb * 1e9, _MORE * self.stated.get(record.host, 0)):
            self.stated[record.host] = record.max_rss
            log.warning(
                "a worker on %s took %.2f GB, and ray.memory_gb, which Ray reserves for it, is %g: pass --set "
                "ray.memory_gb=%.1f, or lower parts.rows",
                *(record.host, record.max_rss / 1e9, self.config.reserved_gb, record.max_rss / 1e9 + 0.1),
            )

    def _describe_wait(self) -> str:
        amounts, config = self.ray.cluster_resources(), self.config
        return (
            f"no worker of {config.cpus} CPU, {config.gpus:g} GPU and {config.reserved_gb:g} GB has begun within "
            f"{config.start_seconds:g} s; the cluster has {amounts.get('CPU', 0):g} CPU, {amounts.get('GPU', 0):g} GPU "
            f"and {amounts.get('memory', 0) / 1e9:.1f} GB: lower ray.cpus, ray.gpus or ray.memory_gb, or raise "
            "ray.start_seconds"
        )


_MEMORY_ADVICE = "; if memory ran out, lower parts.rows, or raise ray.memory_gb so that fewer workers share a machine"


def _cause_of(error: Any) -> BaseException:
    cause = error.cause
    return cause if isinstance(cause, BaseException) else error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def open_pool(
    options: RayOptions,
    *,
    max_workers: int,
    folder: Path | None,
    shared: Any,
    files: Sequence[str | Path] = (),
    progress: Progress = no_progress,
) -> Iterator[RayPool]:
    """Open a pool of workers on a cluster.

    Args:
        options: Resources of a worker and retries, cluster, and number of workers; None: as many as there is room for.
        max_workers: Units of work, more than which no workers are of use.
        folder: Run folder, which exists, and which workers must see; None: each has a working copy of its own.
        shared: What all units need, without media and features.
        files: Files of the data, which workers must see.
        progress: Callback for progress.

    Raises:
        RunError: Ray is not installed, the cluster cannot be reached, or has no room for a worker.
    """
    config = options.config
    with ExitStack() as stack:
        mark = None
        if folder is not None:
            marker = stack.enter_context(temporary_path(folder))
            marker.write_text(marker.name, encoding="utf-8")
            mark = (str(marker), marker.name)
        ray = stack.enter_context(open_ray(options))
        size = min(max_workers, options.num_workers or max(1, num_slots(ray, config)))
        site = Site.of(marker=mark, files=files)
        log.info("%d workers of %d CPU, %g GPU and %g GB on Ray", size, config.cpus, config.gpus, config.reserved_gb)
        pool = RayPool(ray=ray, config=config, size=size, site=site, shared=ray.put(shared), progress=progress)
        try:
            yield pool
        finally:
            for actor in (*pool.starting.values(), *pool.node_of):
                ray.kill(actor)
