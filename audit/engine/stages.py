"""The stages of scoring: what each reads of earlier ones, and what it leaves to later ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import pyarrow as pa

from ..dataset.columns import SPLITS
from ..dataset.dataset import Dataset
from ..dataset.labels import ReadAs
from ..errors import RunError
from ..features.cached_matrix import FeatureMatrix, UsableRows
from ..features.encode import EncodeTask, encode_dataset
from ..probes.config import ProbeConfig
from ..scores.mixture import MixtureConfig
from ..workers import PROCESS_ROWS, Progress, fixed_threads, no_progress, run_tasks
from .fit_results import FitResults, is_fitted, save_fit
from .fitting import Fitted, NetworkSettings, fit_probes
from .merging import Merged, PartColumns, merge
from .part_store import FolderStore, MemoryStore, Store
from .plan import Part, ShardPlan
from .row_data import EncodedData, RowData, read_row_table, read_status_table
from .run_state import describe_labels, tables_of_contents, tables_of_keys
from .scoring import PartRows, Whole, finish_part, score_part
from .selection import Selection, choose_rows, describe_chosen, fingerprint
from .stored_rows import StoredRows

log = logging.getLogger("mmaudit")


@dataclass(frozen=True, kw_only=True)
class ScoringJob:
    """What the scoring of a dataset depends on, and where stages leave their results.

    Attributes:
        dataset: The dataset.
        plan: Its parts.
        store: Tables that pass between stages.
        features: Folder of the feature cache.
        probes: Folder of the probes, unless they stay in memory with the tables.
        probe: How probes are fitted.
        networks: Settings of network probes, and of media.
        mixture: How the mixture is fitted.
        seed: Seed of every random choice.
        test_fraction: Share of the test split that is cut if the data have none.
        keep_duplicates: Whether copies are scored.
        device: Device of the fits.
        num_workers: Processes that decode media.
        progress: Callback for progress.
        fold_hashes: Whether row tables have the hashes that place samples into folds; where the folds of a run are
            known, only samples that are scored need them.
    """

    dataset: Dataset
    plan: ShardPlan
    store: Store
    features: Path
    probes: Path
    probe: ProbeConfig
    networks: NetworkSettings
    mixture: MixtureConfig
    seed: int
    test_fraction: float
    keep_duplicates: bool
    device: str
    num_workers: int
    progress: Progress
    fold_hashes: bool = True

    @property
    def in_memory(self) -> bool:
        """Whether one process runs all stages on one part and keeps their results in memory."""
        return isinstance(self.store, MemoryStore)

    @property
    def names(self) -> list[str]:
        """Names of the modalities."""
        return [modality.name for modality in self.dataset.modalities]

    def tasks(self, part: Part | None = None) -> tuple[EncodeTask, ...]:
        """Return the encoding tasks of a part, or of all."""
        first, end = (0, len(self.dataset.shards)) if part is None else (part.first_shard, part.end_shard)
        without_shards = replace(self.dataset, shards=())
        return tuple(
            EncodeTask(dataset=without_shards, shard=shard, media=self.networks.media, folder=self.features)
            for shard in self.dataset.shards[first:end]
        )

    def row_data(self, *, read_as: ReadAs | None = None, parts: Sequence[Part] | None = None) -> RowData:
        """Read the columns of all rows from the row tables of all parts, or of some consecutive ones.

        read_as: How labels are read, if that is known.
        """
        parts = self.plan.parts if parts is None else parts
        return RowData.of(
            self.dataset,
            lambda number: self.store.read("rows", parts[number].index),
            num_parts=len(parts),
            seed=self.seed,
            test_fraction=self.test_fraction,
            read_as=read_as,
        )

    @property
    def stored_rows(self) -> StoredRows:
        """The row tables of all parts."""
        return StoredRows(read_rows=lambda part: self.store.read("rows", part), num_parts=len(self.plan.parts))

    @cached_property
    def saved_results(self) -> FitResults:
        """Results of the stage `fit`, read from its files when they are needed."""
        return FitResults(job=self)

    def in_folder(self, folder: Path) -> ScoringJob:
        """Return the job with its files in another run folder."""
        assert isinstance(self.store, FolderStore)
        own = self.features.parent
        return replace(
            self,
            store=replace(self.store, folder=folder / self.store.folder.relative_to(own), verified={}),
            features=folder / self.features.name,
            probes=folder / self.probes.relative_to(own),
            networks=replace(self.networks, folder=folder / self.networks.folder.relative_to(own)),
        )

    def encoded(
        self, data: RowData, *, parts: Sequence[Part] | None = None, num_features: Sequence[int] = ()
    ) -> EncodedData:
        """Return the rows with their encoding status, read from the status tables of the parts of row_data.

        num_features: See EncodedData.check.
        """
        parts = self.plan.parts if parts is None else parts
        encoded = EncodedData(
            samples=data,
            tasks=tuple(task for part in parts for task in self.tasks(part)),
            read_status=lambda number: self.store.read("status", parts[number].index),
        )
        encoded.check(num_features)
        return encoded


def read_rows(job: ScoringJob, parts: Sequence[Part]) -> None:
    """Stage `rows`: read ids, labels, groups and splits of parts, in processes; no medium is opened."""
    _run_by_part(_write_rows, job, [part for part in parts if not job.store.has("rows", part.index)])


def _run_by_part(work: Callable[[ScoringJob, Part], None], job: ScoringJob, parts: Sequence[Part]) -> None:
    """Do for each part what is written in Python row by row, such as digests: in processes where that takes long."""
    many = len(parts) > 1 and not job.in_memory and sum(part.num_rows for part in parts) >= PROCESS_ROWS
    for _ in run_tasks(
        partial(work, replace(job, progress=no_progress)), parts, num_workers=job.num_workers if many else 0
    ):
        pass


def _write_rows(job: ScoringJob, part: Part) -> None:
    shards = job.dataset.shards[part.first_shard : part.end_shard]
    repeats = job.probe.repeats if job.fold_hashes else 0
    table = read_row_table(job.dataset, shards, seed=job.seed, repeats=repeats)
    job.store.write("rows", table, part=part.index)


def _write_status(job: ScoringJob, part: Part) -> None:
    tasks = job.tasks(part)
    table = read_status_table(job.dataset, tasks, job.store.read("rows", part.index))
    media = {} if job.in_memory else {str(task.shard.index): task.media_digest(with_cache=True) for task in tasks}
    counts = {"media": {number: value for number, value in media.items() if value}}
    job.store.write("status", table, part=part.index, counts=counts)


def _is_encoded(job: ScoringJob, part: Part) -> bool:
    """Return whether a part has a status, or the part of a piece, and its media are those that it was made of.

    Raises:
        RunError: They are not, and later stages have used them.
    """
    if job.in_memory or not job.store.has("status", part.index):
        return job.store.has("status", part.index)
    known = job.store.counts("status", part.index).get("media", {})
    with_media = [task for task in job.tasks(part) if str(task.shard.index) in known]
    tasks = [task for task in with_media if task.media_digest() != known[str(task.shard.index)]]
    if tasks and job.store.has("selection"):
        raise RunError(f"{_changed(tasks[0])}, and later stages were made of it: restore it, or pass --overwrite")
    return not tasks


def _changed(task: EncodeTask) -> str:
    shard = task.shard
    rows = f"rows {shard.first} to {shard.first + shard.num_rows - 1}"
    return f"{task.dataset.source}: a file that {rows} name has changed since it was encoded"


def check_media(job: ScoringJob, parts: Sequence[Part]) -> None:
    """Raise RunError if local media of encoded parts have changed since: a stat for each file, none is opened."""
    for part in parts:
        if job.store.has("status", part.index) and not _is_encoded(job, part):
            raise RunError(
                f"{job.dataset.source}: media of part {part.index} have changed since they were encoded: run --stage "
                "encode again"
            )


def encode(job: ScoringJob, parts: Sequence[Part], *, trust_unchanged: bool = False) -> None:
    """Stage `encode`: encode what the feature cache lacks of parts, and read the status of their rows.

    Parts that have a status are left as they are, unless media of theirs have changed.

    trust_unchanged: see encode_dataset.
    """
    parts = [part for part in parts if not _is_encoded(job, part)]
    _encode_shards(job, parts, trust_unchanged=trust_unchanged)
    _run_by_part(_write_status, job, parts)


def encode_unchanged(job: ScoringJob, parts: Sequence[Part]) -> None:
    """Do encode_shards, and open no media whose size and times are those of the cache."""
    _encode_shards(job, [part for part in parts if not _is_encoded(job, part)], trust_unchanged=True)


def encode_shards(job: ScoringJob, parts: Sequence[Part]) -> None:
    """First half of the stage `encode`: encode what the feature cache lacks of parts, or of pieces of parts."""
    _encode_shards(job, [part for part in parts if not _is_encoded(job, part)])


@fixed_threads()
def _encode_shards(job: ScoringJob, parts: Sequence[Part], *, trust_unchanged: bool = False) -> None:
    shards = tuple(shard for part in parts for shard in job.dataset.shards[part.first_shard : part.end_shard])
    encode_dataset(
        replace(job.dataset, shards=shards),
        job.features,
        media=job.networks.media,
        num_workers=job.num_workers,
        progress=job.progress,
        device=job.device,
        trust_unchanged=trust_unchanged,
    )


def read_status(job: ScoringJob, parts: Sequence[Part]) -> None:
    """Second half of the stage `encode`: read the status of the rows of whole parts from the feature cache."""
    _run_by_part(_write_status, job, [part for part in parts if not _is_encoded(job, part)])


def fingerprint_of_data(job: ScoringJob) -> str:
    """Return the fingerprint of the data of a job, whose features are encoded if the cache lacks them."""
    read_rows(job, job.plan.parts)
    data = job.row_data()
    encode(job, job.plan.parts)
    return fingerprint(job.encoded(data))


def log_cut(job: ScoringJob, data: RowData) -> None:
    """Log how many samples a cut test split has."""
    if job.dataset.columns.split is None:
        num_test = int((data.split == SPLITS.index("test")).sum())
        log.info("no split column: %d of %d samples are held out as test", num_test, len(data))


def select(job: ScoringJob, data: RowData) -> Selection:
    """Stage `select`: choose what is scored, and write the folds of all ids or groups, and contents.

    With the columns of `data` it holds at most 40 bytes a row, of two modalities and three repeats.
    """
    encoded = job.encoded(data)
    chosen = choose_rows(encoded, probe=job.probe, seed=job.seed, keep_duplicates=job.keep_duplicates)
    job.store.write_pieces("contents", tables_of_contents(encoded, chosen))
    job.store.write_pieces("keys", tables_of_keys(data, chosen), counts=describe_labels(data.labels))
    return describe_chosen(encoded, chosen)


@fixed_threads()
def fit(job: ScoringJob, selection: Selection) -> Fitted:
    """Stage `fit`: fit the probes. The columns of all rows but those of the selection should be freed before."""
    statuses = [
        UsableRows(modality=modality, usable=selection.has_modality(index))
        for index, modality in enumerate(job.dataset.modalities)
    ]
    return fit_probes(
        selection,
        [FeatureMatrix.of(job.tasks(), status, selection.row) for status in statuses],
        job.stored_rows,
        probe=job.probe,
        networks=job.networks,
        seed=job.seed,
        device=job.device,
        progress=job.progress,
    )


def fit_and_save(job: ScoringJob, parts: Sequence[Part] = ()) -> None:
    """Stages `select` and `fit` on all parts, whichever are passed, with their results as files."""
    if not is_fitted(job):
        data = job.row_data()
        log_cut(job, data)
        selection = select(job, data)
        del data  # its columns are those of all rows
        save_fit(job, selection, fit(job, selection))


@fixed_threads()
def score(job: ScoringJob, results: FitResults, parts: Sequence[Part]) -> None:
    """Stage `score`: score the samples of parts that are not scored yet."""
    for part in parts:
        if job.store.has("measured", part.index) and job.store.has("scores", part.index):
            continue
        tables = {name: job.store.read(name, part.index) for name in ("rows", "status")}
        rows = PartRows.of(results.selection, part, **tables)
        scores, measured = _score(job, results, part, rows)
        counts = {"rows": part.num_rows, "scored": len(rows.row), "quarantined": part.num_rows - len(rows.row)}
        job.store.write("scores", scores, part=part.index, counts=counts)
        job.store.write("measured", measured, part=part.index, counts=counts)


def score_saved(job: ScoringJob, parts: Sequence[Part]) -> None:
    """Stage `score` by the files of the stage `fit`, which a process reads once."""
    score(job, job.saved_results, parts)


def _score(job: ScoringJob, results: FitResults, part: Part, rows: PartRows) -> tuple[pa.Table, pa.Table]:
    if not len(rows.row):
        return pa.table({}), pa.table({})
    first = part.first if len(job.plan.parts) > 1 else 0

    def progress(stage: str, done: int, total: int, *, detail: str = "") -> None:
        num_rows = job.plan.num_rows if len(job.plan.parts) > 1 else total
        job.progress(stage, min(first + done, num_rows), num_rows, detail=detail)

    return score_part(
        results.probe_set(part, rows),
        results.selection,
        rows,
        path_columns=job.dataset.path_columns,
        halves=results.halves,
        seed=job.seed,
        progress=progress,
    )


def merge_parts(job: ScoringJob, results: FitResults) -> Merged:
    """Stage `merge`: compute what holds for all samples from the parts."""
    columns = PartColumns(
        num_parts=len(job.plan.parts),
        tables=lambda part: (job.store.read("scores", part), job.store.read("measured", part)),
        order=results.selection.dataset_order,
    )
    return merge(
        results.selection,
        columns,
        modalities=job.dataset.modalities,
        calibrations=results.calibrations(),
        controls=results.controls,
        mixture=job.mixture,
        seed=job.seed,
    )


def finished_parts(job: ScoringJob, whole: Whole) -> Iterator[tuple[Part, pa.Table, dict[str, int] | None]]:
    """Stage `finish`: yield each part with samples, its whole score table, and the counts of balanced_side."""
    for part in job.plan.parts:
        scores = job.store.read("scores", part.index)
        if scores.num_columns:
            measured = job.store.read("measured", part.index)
            yield part, *finish_part(scores, measured, whole, names=job.names)


def run_all(job: ScoringJob) -> tuple[FitResults, Merged, dict[str, float]]:
    """Run the stages up to `merge` in this process; return their results and the seconds that they took."""
    seconds: dict[str, float] = {}
    parts = job.plan.parts
    read_rows(job, parts)
    data = job.row_data()
    log_cut(job, data)
    with timed(seconds, "encode"):
        encode(job, parts)
    with timed(seconds, "probe"):
        results = FitResults(job=job)
        if job.in_memory or not is_fitted(job):
            selection = select(job, data)
            del data  # its columns are those of all rows
            fitted = fit(job, selection)
            if job.in_memory:
                results = FitResults(job=job, kept=(selection, fitted))
            else:
                save_fit(job, selection, fitted)
            del selection, fitted
        score(job, results, parts)
        return results, merge_parts(job, results), seconds


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds of a block."""
    start = time.monotonic()
    yield
    seconds[stage] = round(time.monotonic() - start, 3)
    log.debug("%s took %.1f s", stage, seconds[stage])
