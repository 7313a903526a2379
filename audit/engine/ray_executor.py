"""The Ray executor: parts of a job in a pool of workers that hold it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ..dataset.formats import Shard
from ..workers import no_progress
from .executors import RayOptions, Stage
from .fit_results import FitResults
from .merging import Merged
from .plan import Part
from .ray_pool import RayPool, open_pool
from .stages import (
    ScoringJob,
    encode_shards,
    fit_and_save,
    merge_parts,
    read_rows,
    read_status,
    score_saved,
    timed,
)

_UNITS_PER_WORKER = 16  # ours: about 2 ms of the driver for each, and at most 1/16 of the time lost by an uneven end
_LABELS = {"read_rows": "rows", "encode_shards": "encode", "read_status": "status", "score_saved": "score"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RayExecutor:
    """Parts in the workers of a pool that hold the job; `folder` of its store is on a file system that all see."""

    pool: RayPool

    def run(self, stage: Stage, job: ScoringJob, parts: Sequence[Part]) -> None:
        """Run a stage on all parts, in units of so many that a worker has about sixteen."""
        size = max(1, len(parts) // (_UNITS_PER_WORKER * self.pool.size))
        units = [tuple(parts[start : start + size]) for start in range(0, len(parts), size)]
        label = _LABELS.get(name := getattr(stage, "__name__", ""), name)
        self.pool.run(_run_stage, [(stage, unit) for unit in units], names=[_name(unit) for unit in units], stage=label)

    def run_all(self, job: ScoringJob) -> tuple[FitResults, Merged, dict[str, float]]:
        """Run all stages up to `merge`, which this process does; return their results and the seconds that they took.

        Media are encoded shard by shard, so that all workers encode a single part as well.
        """
        seconds: dict[str, float] = {}
        parts = job.plan.parts
        with timed(seconds, "encode"):
            self.run(read_rows, job, parts)
            self.run(encode_shards, job, shards_of(job.dataset.shards, parts))
            self.run(read_status, job, parts)
        with timed(seconds, "probe"):
            self.pool.run(_run_stage, [(fit_and_save, parts[:1])], names=["the stage fit"], stage="probe")
            self.run(score_saved, job, parts)
            return (results := FitResults(job=job)), merge_parts(job, results), seconds


def shards_of(shards: Sequence[Shard], parts: Sequence[Part]) -> list[Part]:
    """Divide parts into their shards, each a piece with the number of its part."""
    pieces = []
    for part in parts:
        first = part.first
        for number in range(part.first_shard, part.end_shard):
            num_rows = shards[number].num_rows
            pieces.append(replace(part, first_shard=number, end_shard=number + 1, first=first, num_rows=num_rows))
            first += num_rows
    return pieces


def _run_stage(job: ScoringJob, unit: tuple[Stage, tuple[Part, ...]]) -> None:
    """Run a stage on each part of a unit by itself, so that it starts no processes of its own."""
    stage, parts = unit
    for part in parts:
        stage(job, [part])


def _name(unit: Sequence[Part]) -> str:
    """Return the name of a unit in messages."""
    first, last = unit[0], unit[-1]
    shards = f"shards {first.first_shard} to {last.end_shard - 1}"
    return f"part {first.index} ({shards})" if first.index == last.index else f"parts {first.index} to {last.index}"


@contextmanager
def open_executor(job: ScoringJob, options: RayOptions) -> Iterator[RayExecutor]:
    """Open the executor of a job whose results are files; see open_pool."""
    worker_job = replace(job, num_workers=0, device=options.config.device, progress=no_progress)
    names = {shard.location[0] for shard in job.dataset.shards if shard.location is not None}
    with open_pool(
        options,
        max_workers=max(1, len(job.dataset.shards)),
        folder=job.features.parent,
        shared=worker_job,
        files=[job.dataset.source, *sorted(names)],
        progress=job.progress,
    ) as pool:
        yield RayExecutor(pool=pool)
