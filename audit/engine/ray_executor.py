"""The Ray executor: parts of a job in a pool of workers that hold it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from ..dataset.formats import Shard
from ..features.matrix import CHUNK_BYTES
from ..workers import no_progress
from .executors import RayOptions, RunFolder, Stage
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
# Measured, see docs/log.md: bytes of a worker with its libraries, and what it takes besides, of at most 30 classes.
_BASE_BYTES = 600_000_000
_OF_SHARD, _OF_CHUNK = 6, 10  # copies of the features of a shard while encoded, and of those read at once while scored
_OF_FIT, _OF_SMALL_FITS = 2, 6  # copies of the features of one fit, and of those that are fitted at the same time
_SMALL_FITS_BYTES = 128 << 20  # of the latter
_FIT_ROW_BYTES, _PART_ROW_BYTES, _ROW_BYTES = 1_000, 1_300, 80  # of a row: fitted, scored with its part, selected
_MEDIA_BYTES = 2_000_000_000  # of a worker that decodes media or runs networks: not known beforehand
_UNKNOWN_FEATURES = 1_024  # of an encoder, whose outputs are not known beforehand
_LABELS = {"read_rows": "rows", "encode_shards": "encode", "read_status": "status", "score_saved": "score"}


@dataclass(kw_only=True)
class SharedJob:
    """The job that workers hold. run: None where all machines see its run folder at the same path."""

    job: ScoringJob
    run: RunFolder | None = None

    @cached_property
    def local(self) -> ScoringJob:
        """The job with the files of this machine."""
        return self.job if self.run is None else self.job.in_folder(self.run.open())


@dataclass(frozen=True, slots=True, kw_only=True)
class RayExecutor:
    """Parts in the workers of a pool that hold the job; run: see SharedJob."""

    pool: RayPool
    run_folder: RunFolder | None = None

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
            if self.run_folder is not None:
                self.run_folder.fetch(job.features.parent, [part.index for part in parts], ())
            return (results := FitResults(job=job)), merge_parts(job, results), seconds


def worker_bytes(job: ScoringJob) -> dict[str, int]:
    """Return the resident memory that a worker takes at most in each of the stages encode, fit and score, in bytes.

    It follows from the rows of a part, of a shard and of all data, and the number of features. Up to about 30 classes;
    each further one takes 15 bytes for each row of a part. Of media it is what was seen, not a bound.
    """
    parts, modalities = job.plan.parts, job.dataset.modalities
    row_bytes = 4 * sum(modality.length or _UNKNOWN_FEATURES for modality in modalities)
    has_media = any(modality.length is None for modality in modalities)
    fit_rows = min(job.plan.num_rows, job.probe.max_rows)
    shard_rows = max((shard.num_rows for shard in job.dataset.shards), default=0)
    part_rows = max((part.num_rows for part in parts), default=0)
    chunk_bytes, fit_bytes = min(CHUNK_BYTES, part_rows * row_bytes), fit_rows * row_bytes
    copies = max(_OF_FIT * fit_bytes, _OF_SMALL_FITS * min(_SMALL_FITS_BYTES, fit_bytes))
    return {
        "encode": max(_BASE_BYTES + _OF_SHARD * row_bytes * shard_rows, has_media * _MEDIA_BYTES),
        "fit": _BASE_BYTES + copies + _FIT_ROW_BYTES * fit_rows + _ROW_BYTES * job.plan.num_rows,
        "score": _BASE_BYTES + _OF_CHUNK * chunk_bytes + _PART_ROW_BYTES * part_rows,
    }


def _with_memory(options: RayOptions, job: ScoringJob) -> RayOptions:
    """Return options that reserve what a worker takes in any stage, where the user has not said what it reserves."""
    if options.config.memory_gb is not None:
        return options
    memory_gb = math.ceil(max(worker_bytes(job).values()) / 1e8) / 10
    return replace(options, config=replace(options.config, memory_gb=memory_gb))


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


def _run_stage(shared: SharedJob, unit: tuple[Stage, tuple[Part, ...]]) -> None:
    """Run a stage on each part of a unit by itself, so that it starts no processes of its own."""
    stage, parts = unit
    job, run = shared.local, shared.run
    if run is not None:
        read = job.plan.parts if stage is fit_and_save else parts
        tasks = [task for part in read for task in job.tasks(part)] if stage is not read_rows else []
        files = [task.file(modality) for task in tasks for modality in job.dataset.modalities]
        run.fetch(job.features.parent, [part.index for part in read], files)
    for part in parts:
        stage(job, [part])
    if run is not None:
        run.publish(job.features.parent)


def _name(unit: Sequence[Part]) -> str:
    """Return the name of a unit in messages."""
    first, last = unit[0], unit[-1]
    shards = f"shards {first.first_shard} to {last.end_shard - 1}"
    return f"part {first.index} ({shards})" if first.index == last.index else f"parts {first.index} to {last.index}"


@contextmanager
def open_executor(job: ScoringJob, options: RayOptions, *, run: RunFolder | None = None) -> Iterator[RayExecutor]:
    """Open the executor of a job whose results are files; see open_pool. run: see SharedJob."""
    if run is not None:
        run.publish(job.features.parent)  # the plan; what `overwrite` has removed goes
    worker_job = replace(job, num_workers=0, device=options.config.device, progress=no_progress)
    names = {shard.location[0] for shard in job.dataset.shards if shard.location is not None}
    with open_pool(
        _with_memory(options, job),
        max_workers=max(1, len(job.dataset.shards)),
        folder=None if run is not None else job.features.parent,
        shared=SharedJob(job=worker_job, run=run),
        files=[job.dataset.source, *sorted(names)],
        progress=job.progress,
    ) as pool:
        yield RayExecutor(pool=pool, run_folder=run)
