"""Jobs of scoring, their stages as commands, and the publication of their results in a run folder."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..audit.dataset.dataset import Dataset
from ..audit.engine.executors import Executor, LocalExecutor, RayOptions, ShardExecutor
from ..audit.engine.fit_results import FitResults
from ..audit.engine.fitting import NetworkSettings
from ..audit.engine.known_rows import KnownRows, hashes_of_ids
from ..audit.engine.merging import Audit, Merged
from ..audit.engine.part_store import FolderStore, MemoryStore, Store
from ..audit.engine.plan import plan_parts, take_parts
from ..audit.engine.run_state import RunState
from ..audit.engine.scoring import Whole
from ..audit.engine.stages import (
    ScoringJob,
    check_media,
    encode,
    finished_parts,
    fit_and_save,
    merge_parts,
    read_rows,
    run_all,
    score_saved,
    timed,
)
from ..audit.errors import ConfigError, choices, quarantine_table
from ..audit.features.encoders import is_network
from ..audit.hashing import digest
from ..audit.locks import Lock, write_lock
from ..audit.probes.saved_probes import copy_probes, has_weights, num_bytes, num_stored_bytes, save_probes
from ..audit.storage import write_json, write_parquet
from ..audit.workers import Progress, default_workers
from .config import RunConfig
from .provenance import described_modalities, record_of, score_provenance, signed_record
from .remote_run import RemoteRun, fetch_parts
from .run import MADE_FROM_SCORES, REPORT_FILES, SCORE_FILES, Run
from .swap import replacing

log = logging.getLogger("mmaudit")

STAGES = ("encode", "fit", "score", "merge")
BY_PART = ("encode", "score")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """Result of one stage of `score`.

    Attributes:
        run: The run folder.
        stage: The stage.
        parts: Numbers of the parts that this process worked on; of `fit` all.
        num_parts: Parts of the data.
        append: Whether it is a stage of `--append`.
    """

    run: Path
    stage: str
    parts: tuple[int, ...]
    num_parts: int
    append: bool = False

    @property
    def next_stage(self) -> str:
        """The stage that follows when all parts are done."""
        return STAGES[STAGES.index(self.stage) + 1]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "run": str(self.run),
            "stage": self.stage,
            "parts": list(self.parts),
            "num_parts": self.num_parts,
            "next_stage": self.next_stage,
            **({"append": True} if self.append else {}),
        }


def check_stage(stage: str | None, shard: str | None, engine: str = "local") -> None:
    """Raise ConfigError for a stage that does not exist, a shard of a stage that one process runs, or one with Ray."""
    if engine != "local" and (stage is not None or shard is not None):
        raise ConfigError(f"--engine {engine} runs all stages: without --stage and --shard")
    if stage is not None and stage not in STAGES:
        raise ConfigError(f"--stage {stage}: {choices(stage, STAGES)}")
    if shard is not None and stage not in BY_PART:
        of = "without --stage" if stage is None else f"of --stage {stage}"
        raise ConfigError(f"--shard {shard} {of}: the stages {' and '.join(BY_PART)} run by shard, the others at once")
    if shard is not None:
        take_parts(shard, ())


def open_job(
    run_dir: Run,
    dataset: Dataset,
    config: RunConfig,
    *,
    device: str,
    num_workers: int | None,
    progress: Progress,
    store: Store | None = None,
    staged: bool = False,
) -> ScoringJob:
    """Return the job that scores a dataset in a run folder.

    Its results stay in memory if the data are one part, unless `staged`, or unless stages have been run before.
    """
    plan = plan_parts(
        dataset.shards, config=config.parts, depends_on=describe_rows(dataset, config), own=run_dir.folder
    )
    if store is None:
        in_memory = len(plan.parts) == 1 and not staged and not run_dir.stages.exists()
        store = MemoryStore() if in_memory else FolderStore(folder=run_dir.stages, config=plan.config)
    if isinstance(store, FolderStore):
        plan.write(store.folder / "shards.json", dataset.shards)
    return ScoringJob(
        dataset=dataset,
        plan=plan,
        store=store,
        features=run_dir.features,
        probes=run_dir.stages / "probes",
        probe=config.probe,
        networks=NetworkSettings(config=config.network, media=config.media, folder=run_dir.features / "networks"),
        mixture=config.mixture,
        seed=config.seed,
        test_fraction=config.data.test_fraction,
        keep_duplicates=config.data.keep_duplicates,
        device=device,
        num_workers=default_workers() if num_workers is None else num_workers,
        progress=progress,
    )


def describe_rows(dataset: Dataset, config: RunConfig) -> list[str]:
    """Return what scores of a dataset depend on besides its files: settings, modalities, and rows held in memory."""
    plain = (config.scoring_config(), described_modalities(dataset, config))
    return [*(json.dumps(value, sort_keys=True) for value in plain), _rows_digest(dataset)]


def _rows_digest(dataset: Dataset) -> str:
    """Return the digest of the rows that shards hold in memory, such as those of a csv file."""
    parts = []
    for shard in dataset.shards:
        if shard.location is None:
            rows = dataset.read(shard)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, rows.schema) as stream:
                stream.write_table(rows)
            parts.append(digest(sink.getvalue().to_pybytes()))
    return digest(*(part.encode() for part in parts))


def run_job(job: ScoringJob, stage: str | None, ray: RayOptions | None) -> tuple[FitResults, Merged, dict[str, float]]:
    """Run all stages up to `merge`, here or on Ray, or the stage `merge` alone."""
    if stage is not None:
        return run_merge(job)
    if ray is None:
        return run_all(job)
    from ..audit.engine.ray_executor import open_executor

    with open_executor(job, ray, run=RemoteRun.of(job.features.parent)) as executor:
        return executor.run_all(job)


def run_merge(job: ScoringJob) -> tuple[FitResults, Merged, dict[str, float]]:
    """Run the stage `merge` on the results of earlier ones."""
    seconds: dict[str, float] = {}
    fetch_parts(job.features.parent, [part.index for part in job.plan.parts], ())
    check_media(job, job.plan.parts)
    results = FitResults(job=job)
    with timed(seconds, "merge"):
        return results, merge_parts(job, results), seconds


def run_stage(run_dir: Run, job: ScoringJob, stage: str, *, shard: str | None) -> StageResult:
    """Run one stage before `merge` in this process."""
    executor: Executor = LocalExecutor() if shard is None else ShardExecutor(shard)
    parts = job.plan.parts if shard is None else take_parts(shard, job.plan.parts)
    tasks = job.tasks() if stage == "fit" else [task for part in parts for task in job.tasks(part)]
    files = [task.file(modality) for task in tasks for modality in job.dataset.modalities]
    fetch_parts(run_dir.folder, [part.index for part in (job.plan.parts if stage == "fit" else parts)], files)
    scope = f"stages/{stage}" + ("" if shard is None else f"-{shard.replace('/', '-of-')}")
    with write_lock(run_dir.folder, scope, command=f"mmaudit score --stage {stage}"):
        if stage == "encode":
            executor.run(read_rows, job, job.plan.parts)
            executor.run(encode, job, job.plan.parts)
        elif stage == "score":
            executor.run(check_media, job, job.plan.parts)
            executor.run(score_saved, job, job.plan.parts)
        else:
            check_media(job, job.plan.parts)
            fit_and_save(job)
    return StageResult(
        run=run_dir.folder,
        stage=stage,
        parts=tuple(part.index for part in parts),
        num_parts=len(job.plan.parts),
    )


def publish(
    run_dir: Run,
    job: ScoringJob,
    config: RunConfig,
    results: FitResults,
    merged: Merged,
    *,
    seconds: dict[str, float],
    about: dict[str, Any],
    overwrite: bool,
    lock: Lock,
) -> None:
    """Finish all parts and replace the files of the run at once; `about` are further keys of run.json.

    Without `overwrite`, manifests from other score tables are kept.
    """
    manifests, finetunes = run_dir.manifests(), run_dir.finetunes()
    if overwrite and (manifests or finetunes):
        log.info("removing %d manifests and %d fine-tunings of the old scores", len(manifests), len(finetunes))
    replaced = (*SCORE_FILES, *REPORT_FILES, *(MADE_FROM_SCORES if overwrite else ()))
    audit = Audit.of(results.selection, merged, halves=results.halves, bisections=results.bisections)
    provenance = score_provenance(record_of(job.dataset, audit, config, seconds=seconds))
    with replacing(run_dir.folder, replaced, lock=lock) as folder:
        staged = Run(folder)
        counts = []
        for part, table, count in finished_parts(job, merged.whole):
            file = staged.scores_file if len(job.plan.parts) == 1 else staged.score_part(part.index)
            write_parquet(table, file, provenance={**provenance, "paths": job.dataset.path_columns})
            counts.append(count)
        audit = audit.with_balanced(counts)
        record = record_of(job.dataset, audit, config, seconds=seconds) | about
        write_parquet(quarantine_table(audit.quarantined), staged.quarantine_file, provenance=provenance)
        write_json(dict(audit.mixture.to_json()), staged.mixture_file)
        write_json(job.plan.to_json(job.dataset.shards), staged.shards_file)
        _publish_probes(run_dir, results, merged.whole, staged.probes)
        staged.write_record(signed_record(record, folder=run_dir.folder, scores=staged.score_source))
    shutil.rmtree(run_dir.stages, ignore_errors=True)


# Ours: with 5,000 classes and 2,048 features probes and snapshots take 2 GB, eight times the features of 30,000 rows.
_MAX_PROBE_BYTES = 256 << 20


def _publish_probes(run_dir: Run, results: FitResults, whole: Whole, folder: Path) -> None:
    """Write the probes of a run into a folder, and what scoring other rows with them needs."""
    job, selection = results.job, results.selection
    networks = [modality.name for modality in job.dataset.modalities if is_network(modality)]
    probe_set = None if results.kept is None else results.kept[1].probe_set
    size = num_stored_bytes(job.probes, networks=networks) if probe_set is None else num_bytes(probe_set)
    if size > _MAX_PROBE_BYTES:
        log.info("probes of %.1f GB are not kept: no other rows can be scored with them", size / 1e9)
        return
    if probe_set is None:
        copy_probes(job.probes, folder, networks=networks)
    else:
        save_probes(probe_set, selection.cross_fits[0], folder, outputs=False)
    if not has_weights(folder, networks, num_folds=[fit.num_folds for fit in selection.cross_fits]):
        log.warning(
            "the networks of %s were trained by a version that kept no weights, so that no other rows can be scored: "
            "delete %s to train them again",
            ", ".join(networks),
            job.networks.folder,
        )
        return
    if selection.sums:
        ids = None if selection.group is None else hashes_of_ids(job.store, len(job.plan.parts))
        KnownRows.of(job.plan, job.dataset.shards, selection.sums, own=run_dir.folder, ids=ids).write(folder)
    state = RunState.of(
        selection,
        whole=whole,
        num_features=results.num_features,
        labels=job.store.counts("keys"),
        folds=(job.store.read("keys"), job.store.read("contents")),
    )
    state.write(folder)
