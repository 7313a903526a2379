"""Schedule of a comparison's trainings: shards, devices, processes, and an estimate of time."""

from __future__ import annotations

import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from ...audit.engine.executors import RayOptions
from ...audit.errors import ConfigError, TrainError
from ...audit.hashing import digest
from ...audit.workers import Progress, default_workers, format_duration, no_progress, run_tasks
from .cells import Cell, CellResult, Loading, load_manifests, quiet, read_cell, train, train_cell

log = logging.getLogger("mmaudit")

Item = TypeVar("Item")

_TRIAL_STEPS = 20  # of the training by which the time is estimated; ours
_MAX_JOBS = 8  # by default: each process holds the data
_MIN_PARALLEL_SECONDS = 30.0  # of one process, below which others do not pay: each takes 1 to 3 s to start; ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Part `number` of `count` of the trainings, counted from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse i/n; raise ConfigError unless 1 <= i <= n."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(f"--shard {text}: not of the form i/n with i from 1 to n, such as 1/4")
        return cls(number=int(match[1]), count=int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def scope(self) -> str:
        """Name of its lock."""
        return f"shard-{self.number}-of-{self.count}"

    def select(self, items: Sequence[Item], *, key: Callable[[Item], str]) -> list[Item]:
        """Return the items of this shard: every n-th by the digest of a unique key, whatever their order."""
        ranked = sorted(items, key=lambda item: digest(key(item).encode()))
        own = {key(item) for item in ranked[self.number - 1 :: self.count]}
        return [item for item in items if key(item) in own]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Where and how cells are trained. jobs: processes; None: as many as pay. ray: in workers of Ray instead."""

    folder: Path
    loading: Loading
    device: str
    jobs: int | None
    progress: Progress
    ray: RayOptions | None = None

    def read(self, cells: Sequence[Cell]) -> list[CellResult | None]:
        """Read the results of cells; None where one is not finished."""
        loaded = load_manifests(self.loading)
        return [read_cell(cell.folder(self.folder), cell, loaded) for cell in cells]

    def train_missing(self, cells: Sequence[Cell], *, stage: str) -> None:
        """Train the cells that are not finished; each is written whole."""
        results = self.read(cells)
        missing = [cell for cell, result in zip(cells, results, strict=True) if result is None]
        total, done = len(cells), len(cells) - len(missing)
        if not missing:
            log.info("%s: all %d trainings are finished", stage, total)
            return
        if self.ray is not None:
            self._train_on_ray(missing, self.ray, stage=stage, done=done)
            return
        finished: dict[str, list[float]] = defaultdict(list)
        for cell, result in zip(cells, results, strict=True):
            if result is not None:
                finished[cell.method.name].append(float(result.about["seconds"]))
        seconds = estimate_seconds(missing, finished, loading=self.loading, device=self.device)
        jobs = min(len(missing), self.jobs or default_jobs(self.device, self.loading, seconds=seconds))
        log.info(
            "%s: %d of %d trainings to do, about %s in %s",
            stage,
            len(missing),
            total,
            format_duration(seconds / jobs),
            "one process" if jobs == 1 else f"{jobs} processes",
        )
        self.progress(stage, done, total)
        if jobs > 1:
            self._train_in_processes(missing, jobs=jobs, stage=stage, done=done)
            return
        for number, cell in enumerate(missing, start=done):
            report = epochs_reported(self.progress, stage, number, total, cell.label)
            train_cell(cell, loading=self.loading, comparison=self.folder, device=self.device, progress=report)
            self.progress(stage, number + 1, total)

    def _train_in_processes(self, missing: Sequence[Cell], *, jobs: int, stage: str, done: int) -> None:
        num_cards = torch.cuda.device_count() if self.device == "cuda" else 0
        tasks = assign_devices(missing, self.device, num_cards=num_cards)
        work = partial(train_task, loading=self.loading, comparison=self.folder)
        total = done + len(missing)
        for number, _ in enumerate(run_tasks(work, tasks, num_workers=jobs), start=done + 1):
            self.progress(stage, number, total, detail="" if number == total else missing[number - done].label)

    def _train_on_ray(self, missing: Sequence[Cell], options: RayOptions, *, stage: str, done: int) -> None:
        """Train cells on workers that each load the manifests once, and write the cells themselves."""
        from ...audit.engine.ray_pool import open_pool

        log.info("%s: %d of %d trainings to do", stage, len(missing), done + len(missing))
        train_in_worker = partial(
            train_cell, loading=self.loading, comparison=self.folder, device=options.config.device
        )
        with open_pool(
            options,
            max_workers=len(missing),
            folder=self.loading.run,
            shared=train_in_worker,
            files=self.loading.manifests,
            progress=self.progress,
        ) as pool:
            pool.run(_call, missing, names=[cell.label for cell in missing], stage=stage, done=done)


def _call(work: Callable[[Cell], float], cell: Cell) -> float:
    """Train a cell in a worker of Ray."""
    return work(cell)


def assign_devices(cells: Sequence[Cell], device: str, *, num_cards: int) -> list[tuple[Cell, str]]:
    """Return each cell with its device: of several cards one after the other in turn."""
    if device != "cuda" or num_cards < 2:
        return [(cell, device) for cell in cells]
    return [(cell, f"cuda:{position % num_cards}") for position, cell in enumerate(cells)]


def train_task(task: tuple[Cell, str], *, loading: Loading, comparison: Path) -> float:
    """Train a cell on a device in a worker process."""
    cell, device = task
    return train_cell(cell, loading=loading, comparison=comparison, device=device)


def default_jobs(device: str, loading: Loading, *, seconds: float) -> int:
    """Return the number of processes for `seconds` of training: one per card, or as many as the processors serve."""
    if seconds < _MIN_PARALLEL_SECONDS:
        return 1
    if device != "cpu":
        return max(1, torch.cuda.device_count()) if device == "cuda" else 1
    examples = next(iter(load_manifests(loading).examples.values()))
    return min(_MAX_JOBS, max(1, default_workers() // examples.num_threads))


def estimate_seconds(
    missing: Sequence[Cell], finished: Mapping[str, Sequence[float]], *, loading: Loading, device: str
) -> float:
    """Estimate the seconds of the missing cells in one process.

    By the finished ones of the same method, else of any; without any, by some steps of each method.
    """
    overall = [value for values in finished.values() for value in values]
    seconds: dict[str, float] = {}
    for cell in missing:
        name = cell.method.name
        if name in seconds:
            continue
        if overall:
            seconds[name] = float(np.mean(finished.get(name) or overall))
            continue
        if not seconds:
            _time_training(cell, 1, loading=loading, device=device)  # the first one also loads libraries
        max_samples = min(cell.budget, _TRIAL_STEPS * cell.config.finetune.step_size)
        fixed, total = (_time_training(cell, number, loading=loading, device=device) for number in (1, max_samples))
        seconds[name] = fixed + max(0.0, total - fixed) * cell.budget / max_samples
    return sum(seconds[cell.method.name] for cell in missing)


def _time_training(cell: Cell, max_samples: int, *, loading: Loading, device: str) -> float:
    """Train on some samples, test, and return the seconds that it took."""
    started, loaded = time.monotonic(), load_manifests(loading)
    with quiet(True):
        try:
            train(cell, loaded, device=device, progress=no_progress, max_samples=max_samples)
        except TrainError:
            log.debug("%s diverged while the time was estimated", cell.method.name)
    return time.monotonic() - started


def epochs_reported(progress: Progress, stage: str, cells: int, total: int, detail: str) -> Callable[..., None]:
    """Return a progress callback for the epochs of a cell, which raises interrupts and shows the cell's name."""

    def report(_: str, done: int, num_epochs: int, *, detail: str = detail) -> None:
        progress(stage, cells, total, detail=f"{detail}, epoch {done} of {num_epochs}")

    return report
