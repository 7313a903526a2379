"""Finished runs and their data: whether these are unchanged, and scores of rows that were added to them."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..audit.dataset.dataset import Dataset
from ..audit.dataset.modalities import Modality
from ..audit.engine.executors import RayOptions
from ..audit.engine.known_rows import KnownPart, KnownRows, Tail
from ..audit.engine.new_rows import NewRows, OtherRowsNeeded, read_as_in_run, save_selection, select_new, selected
from ..audit.engine.part_store import FolderStore, MemoryStore
from ..audit.engine.plan import SINGLE, Part, take_parts
from ..audit.engine.row_data import ORDER_PURPOSE, EncodedData
from ..audit.engine.run_state import RunState, folds_of_contents, folds_of_keys
from ..audit.engine.selection import fingerprint, fingerprints_of, row_sums
from ..audit.engine.stages import (
    check_media,
    encode,
    encode_unchanged,
    fingerprint_of_data,
    read_rows,
    read_status,
    score_saved,
)
from ..audit.errors import RunError
from ..audit.features.encoded_samples import DIGEST_SUM, SORTED_ROWS, fingerprint_of_sums
from ..audit.features.encoders import is_network
from ..audit.hashing import digest
from ..audit.locks import WAIT_SECONDS, Lock, write_lock
from ..audit.probes.saved_probes import has_weights
from ..audit.row_arrays import contains
from ..audit.storage import read_json, scratch_folder, write_json
from .append_files import (
    Append,
    OldTable,
    find_hashes,
    grown_record,
    hash_ids_of,
    log_appended,
    publish_appended,
    score_files,
)
from .config import RunConfig
from .provenance import (
    check_config,
    own_record,
)
from .remote_run import RemoteRun, fetch_parts
from .run import Run
from .staging import StageResult, open_job

log = logging.getLogger("mmaudit")


def check_probes(run_dir: Run, record: dict[str, Any]) -> RunState:
    """Return what a run keeps beside its probes; raise RunError if its probes score no other rows."""
    keys = ("name", "column", "kind", "encoder")
    modalities = [Modality(**{key: entry[key] for key in keys}) for entry in record["modalities"]]
    networks = [modality.name for modality in modalities if is_network(modality)]
    state = RunState.read(run_dir.probes)
    if not has_weights(run_dir.probes, networks, num_folds=state.num_folds):
        raise RunError(
            f"{run_dir.probes} lacks weights of the networks of {', '.join(networks)}: score the data again with "
            "--overwrite"
        )
    return state


def open_append(
    run_dir: Run,
    dataset: Dataset,
    config: RunConfig,
    *,
    options: dict[str, Any],
    folder: Path,
    as_files: bool = False,
    begins: bool = True,
) -> Append:
    """Check that data that have grown are read as those of a run, and return the job that scores their new rows.

    Args:
        run_dir: The run.
        dataset: The data.
        config: Config, which must be that of the run.
        options: Device, number of workers and progress.
        folder: Of the tables of data in several parts; complete ones in it are not made again.
        as_files: Whether the tables of a single part are files too, for other processes.
        begins: Whether tables that were made of other data, or of an earlier state of the run, are removed.

    Raises:
        RunError: The run has another config, or without `begins` no tables were made of these data.
    """
    record = run_dir.record()
    check_config(run_dir, record, dataset, config)
    columns = {**asdict(dataset.columns), "id": list(dataset.columns.id)}
    if differing := [role for role, name in columns.items() if name != record["columns"].get(role)]:
        raise RunError(
            f"{run_dir.folder}: the {differing[0]} of the run is {record['columns'].get(differing[0])!r} and now "
            f"{columns[differing[0]]!r}; pass another folder with --run, or --overwrite"
        )
    job = open_job(run_dir, dataset, config, **options, store=MemoryStore())
    job = replace(job, probes=run_dir.probes, fold_hashes=False)
    if len(job.plan.parts) > 1 or as_files:
        depends_on = digest(job.plan.config.encode(), record["fingerprint"].encode())
        if not (begins or _is_store(folder, depends_on)):
            raise RunError(
                f"{folder} has nothing of these data and this run: they have changed since, or rows were appended "
                "meanwhile; begin with --append --stage encode"
            )
        job = replace(job, store=resumable_store(folder, depends_on))
    known = KnownRows.read(run_dir.probes) if job.plan.num_rows > SORTED_ROWS else None
    first_part = 0
    if known is not None:  # the last file is always written again: its metadata are those of the whole table
        unchanged = known.num_unchanged(job.plan, dataset.shards, own=run_dir.folder)
        first_part = min(unchanged, *(number for number, _ in score_files(run_dir)[-1:]))
    return Append(run_dir=run_dir, record=record, job=job, known=known, first_part=first_part)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrownRows:
    """The n rows of the parts that an append reads, of which those of the run are unchanged.

    old_row: Row of each in the run's score table, of the files of these parts, negative where it is not in it (n,).
    is_new (n,): Rows that the run neither scored nor quarantined. fingerprint: Of all data. sums: See row_sums, of all
    parts; empty of small data.
    """

    encoded: EncodedData
    old_row: NDArray[np.intp]
    is_new: NDArray[np.bool_]
    fingerprint: str
    sums: tuple[int, ...]


def read_grown(append: Append, state: RunState, *, first_part: int) -> GrownRows:
    """Read the rows of the parts from one on, and check that the run's are among them, unchanged.

    Raises:
        RunError: Rows of the run are not in the data, or have changed.
        OtherRowsNeeded: With a first part other than 0 the same, or an id occurs twice: all rows tell which.
    """
    run_dir, job, record = append.run_dir, append.job, append.record
    encoded = read_as_in_run(job, state, trust_unchanged=True, parts=Tail.of(job.plan, first_part).parts)
    hashes = encoded.samples.hash_ids(seed=0, purpose=ORDER_PURPOSE)
    quarantined = np.unique(hash_ids_of(run_dir.quarantine_file))
    old_row = find_hashes(OldTable.of(run_dir, first_part=first_part).hash_ids(), hashes)
    is_new = (old_row < 0) & ~contains(quarantined, hashes)
    before = () if append.known is None else append.known.parts[:first_part]
    num_old = record["counts"]["input"] - sum(part.num_rows for part in before)
    num_present = int((~is_new).sum())
    if append.known is not None and first_part:
        ids = append.known.ids if state.by_group else state.keys.hash
        if ids is None or num_present != num_old or contains(ids, hashes[is_new]).any():
            raise OtherRowsNeeded
    if num_present != num_old:
        raise RunError(
            f"{num_old - num_present} of the {num_old} samples of {run_dir.folder} are not in {job.dataset.source}: "
            "rows can be appended, not removed or renamed; pass another folder with --run, or --overwrite"
        )
    old, fingerprint, sums = _fingerprints(encoded, is_new, num_rows=job.plan.num_rows, before=before)
    if old != record["fingerprint"]:
        if first_part:
            raise OtherRowsNeeded
        raise RunError(
            f"a sample of {run_dir.folder} has another label, group, split or content in {job.dataset.source}: rows "
            "can be appended, not changed; pass another folder with --run, or --overwrite"
        )
    return GrownRows(encoded=encoded, old_row=old_row, is_new=is_new, fingerprint=fingerprint, sums=sums)


def _fingerprints(
    encoded: EncodedData, is_new: NDArray[np.bool_], *, num_rows: int, before: Sequence[KnownPart]
) -> tuple[str, str, tuple[int, ...]]:
    """Return the fingerprints of the run's rows and of all, and the sums of all parts; those of `before` are known."""
    if num_rows <= SORTED_ROWS:
        return *fingerprints_of(encoded, ~is_new), ()
    known = [part.sum for part in before]
    old, added = (row_sums(encoded, is_row=mask) for mask in (~is_new, is_new))
    sums = (*known, *((first + second) % DIGEST_SUM for first, second in zip(old, added, strict=True)))
    is_small = not before and int((~is_new).sum()) <= SORTED_ROWS
    of_run = fingerprint(encoded, is_row=~is_new) if is_small else fingerprint_of_sums([*known, *old])
    return of_run, fingerprint_of_sums(sums), sums


def resumable_store(folder: Path, config: str) -> FolderStore:
    """Return the store of a folder, whose tables are removed if they depend on something else."""
    if not _is_store(folder, config):
        shutil.rmtree(folder, ignore_errors=True)
        write_json({"config": config}, folder / "config.json")
    return FolderStore(folder=folder, config=config)


def _is_store(folder: Path, config: str) -> bool:
    """Return whether the tables of a folder depend on this config."""
    with suppress(RunError):  # without the file, or with a damaged one
        return bool(read_json(folder / "config.json", error=RunError).get("config") == config)
    return False


def check_unchanged(run_dir: Run, dataset: Dataset, config: RunConfig, options: dict[str, Any]) -> None:
    """Raise RunError if a finished run was made from other data or another config."""
    record = run_dir.record()
    if "appended" in record:
        state = check_probes(run_dir, record)
        with scratch_folder(run_dir.folder) as folder:
            append = open_append(run_dir, dataset, config, options=options, folder=folder)
            try:
                grown = read_grown(append, state, first_part=append.first_part)
            except OtherRowsNeeded:
                grown = read_grown(append, state, first_part=0)
        if grown.is_new.any():
            raise RunError(f"{dataset.source} has rows that {run_dir.folder} lacks: pass --append, or --overwrite")
        _remove_finished_stages(run_dir)
        log.info("%s is already scored with these data and this config: nothing to do", run_dir.folder)
        return
    check_config(run_dir, record, dataset, config)
    with scratch_folder(run_dir.folder) as folder:
        in_memory = dataset.num_rows <= SINGLE * config.parts.rows
        store = MemoryStore() if in_memory else FolderStore(folder=folder, config="")
        found = fingerprint_of_data(open_job(run_dir, dataset, config, **options, store=store))
    if record["fingerprint"] != found:
        raise RunError(
            f"{run_dir.folder} was made from other data (fingerprint {record['fingerprint'][:8]}, now "
            f"{found[:8]}); pass another folder with --run, --append if rows were only added, or --overwrite"
        )
    _remove_finished_stages(run_dir)
    log.info("%s is already scored with these data and this config: nothing to do", run_dir.folder)
    if doubt := own_record(run_dir.folder)[1]:
        log.info("its manifests are not trusted to name data or code, since %s; --overwrite scores it again", doubt)


def _remove_finished_stages(run_dir: Run) -> None:
    """Remove what is left of the stages of a run that was killed while it was published; others are kept."""
    plan = run_dir.stages / "shards.json"
    if plan.exists() and run_dir.shards_file.exists() and plan.read_bytes() == run_dir.shards_file.read_bytes():
        with suppress(RunError), write_lock(run_dir.folder, "stages", command="mmaudit score"):
            shutil.rmtree(run_dir.stages, ignore_errors=True)


def append_rows(
    run_dir: Run,
    dataset: Dataset,
    config: RunConfig,
    *,
    options: dict[str, Any],
    about: dict[str, Any],
    lock: Lock,
    stage: str | None = None,
    ray: RayOptions | None = None,
) -> bool:
    """Score the rows that were added to the data of a run, and add them to its files; return whether there were any.

    All stages run here or on Ray, or the stage `merge` alone. `about` are further keys of run.json.
    """
    start = time.monotonic()
    folder = run_dir.stages / "append"
    as_files = stage is not None or ray is not None
    append = open_append(
        run_dir, dataset, config, options=options, folder=folder, as_files=as_files, begins=stage is None
    )
    if stage is not None:
        fetch_parts(run_dir.folder, [part.index for part in append.tail.parts], ())
        check_media(append.job, append.tail.parts)
    elif ray is not None:
        _run_on_ray(append, ray)
    else:
        select_rows(append)
        score_saved(append.job, append.tail.parts)
    stated = selected(append.job)
    if not stated["num_new"]:
        log.info("%s has no rows that %s lacks: nothing to append", dataset.source, run_dir.folder)
        _remove_stages(folder)
        return False
    record = grown_record(append) | about
    record["seconds"] = {**record["seconds"], "append": round(time.monotonic() - start, 3)}
    publish_appended(append, stated, record=record, lock=lock)
    log_appended(append, stated, record)
    _remove_stages(folder)
    return True


def run_append_stage(
    run_dir: Run, dataset: Dataset, config: RunConfig, stage: str, *, shard: str | None, options: dict[str, Any]
) -> StageResult:
    """Run one stage of an append before `merge` in this process."""
    name, folder = f"mmaudit score --append --stage {stage}", run_dir.stages / "append"
    with write_lock(run_dir.folder, "stages/append", command=name, wait_seconds=WAIT_SECONDS):
        append = open_append(
            run_dir, dataset, config, options=options, folder=folder, as_files=True, begins=stage == "encode"
        )
    job, tail = append.job, append.tail.parts
    parts = tail if shard is None else tuple(take_parts(shard, tail))
    _fetch(append, parts)
    scope = f"stages/append-{stage}" + ("" if shard is None else f"-{shard.replace('/', '-of-')}")
    with write_lock(run_dir.folder, scope, command=name):
        if stage == "encode":
            read_rows(job, parts)
            encode(job, parts, trust_unchanged=True)
        elif stage == "score":
            check_media(job, parts)
            score_saved(job, parts)
        else:
            check_media(job, tail)
            select_rows(append)
    return StageResult(
        run=run_dir.folder,
        stage=stage,
        parts=tuple(part.index for part in parts),
        num_parts=len(job.plan.parts),
        append=True,
    )


def _fetch(append: Append, parts: Sequence[Part]) -> None:
    """Fetch the tables and the cache files of parts, which a stage reads, of a run at a URL."""
    job = append.job
    caches = [task.file(modality) for part in parts for task in job.tasks(part) for modality in job.dataset.modalities]
    fetch_parts(append.run_dir.folder, [part.index for part in parts], caches)


def _run_on_ray(append: Append, ray: RayOptions) -> None:
    """Run all stages but `merge` in the workers of Ray; the rows are selected by this process."""
    from ..audit.engine.ray_executor import open_executor, shards_of

    job, parts = append.job, append.tail.parts
    run = RemoteRun.of(append.run_dir.folder, folders=("probes",))
    with open_executor(job, ray, run=run) as executor:
        executor.run(read_rows, job, parts)
        executor.run(encode_unchanged, job, shards_of(job.dataset.shards, parts))
        executor.run(read_status, job, parts)
        _fetch(append, parts)
        select_rows(append)
        if run is not None:
            run.publish(append.run_dir.folder)
        executor.run(score_saved, job, append.tail.parts)
    fetch_parts(append.run_dir.folder, [part.index for part in append.tail.parts], ())


def select_rows(append: Append) -> None:
    """Stage `fit` of an append: choose the new rows that are scored, and the folds of the probes that score them."""
    job = append.job
    if all(job.store.has(name) for name in ("keys", "contents", "halves", "usable", "old rows", "selection")):
        return
    state = check_probes(append.run_dir, append.record)
    try:
        grown, new = _select(append, state, first_part=append.first_part)
        first_part = append.first_part
    except OtherRowsNeeded:
        log.info("rows of the first %d parts are read too: new ones have ids or contents of theirs", append.first_part)
        _fetch(append, job.plan.parts)
        first_part, (grown, new) = 0, _select(append, state, first_part=0)
    job.store.write("keys", folds_of_keys(grown.encoded.samples, new.selection).to_table())
    job.store.write("contents", folds_of_contents(grown.encoded, new.selection).to_table())
    job.store.write("old rows", pa.table({"row": grown.old_row}))
    about = {
        "first_part": first_part,
        "num_new": int(grown.is_new.sum()),
        "num_known": new.num_known,
        "sums": [f"{value:x}" for value in grown.sums],
    }
    save_selection(job, new.selection, state, about=about)


def _select(append: Append, state: RunState, *, first_part: int) -> tuple[GrownRows, NewRows]:
    grown = read_grown(append, state, first_part=first_part)
    new = select_new(
        grown.encoded,
        state,
        is_new=grown.is_new,
        seed=append.job.seed,
        copies="none" if append.job.keep_duplicates else "known",
        fingerprint=grown.fingerprint,
        is_whole=first_part == 0,
    )
    return grown, new


def _remove_stages(folder: Path) -> None:
    """Remove the tables of an append, and the folder of stages if nothing else is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()
