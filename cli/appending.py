"""Finished runs and their data: whether these are unchanged, and scores of rows that were added to them."""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..audit.dataset.dataset import Dataset
from ..audit.dataset.modalities import Modality
from ..audit.engine.new_rows import NewRows, read_as_in_run, save_selection, select_new
from ..audit.engine.part_store import FolderStore, MemoryStore
from ..audit.engine.plan import SINGLE, Part
from ..audit.engine.row_data import ORDER_PURPOSE, EncodedData
from ..audit.engine.run_state import RunState, folds_of_contents, folds_of_keys
from ..audit.engine.scoring import finish_part
from ..audit.engine.selection import fingerprint
from ..audit.engine.stages import ScoringJob, fingerprint_of_data, score
from ..audit.errors import RunError, quarantine_table
from ..audit.features.encoders import is_network
from ..audit.hashing import digest, hash_rank
from ..audit.locks import Lock, write_lock
from ..audit.probes.saved_probes import copy_probes, has_weights
from ..audit.storage import read_batches, read_json, read_table, scratch_folder, write_json, write_parquet
from .config import RunConfig
from .provenance import (
    absolute_source,
    check_config,
    earlier_records,
    own_record,
    score_provenance,
    signed_record,
)
from .run import REPORT_FILES, SCORE_FILES, Run, replacing
from .staging import open_job

log = logging.getLogger("mmaudit")

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class OldTable:
    """The score table of a run: its files, the hashes of its ids (n,), and the first row of each file and the end."""

    files: tuple[Path, ...]
    starts: NDArray[np.intp]
    hashes: Hashes

    @classmethod
    def of(cls, run_dir: Run) -> OldTable:
        """Read the ids of the score table of a run."""
        source = run_dir.score_source
        files = tuple(sorted(source.glob("*.parquet"))) if source.is_dir() else (source,)
        hashes = [_hash_ids(file) for file in files]
        starts = np.cumsum([0, *map(len, hashes)])
        return cls(files=files, starts=starts, hashes=np.concatenate(hashes))

    def read(self, rows: NDArray[np.intp]) -> pa.Table:
        """Read these rows, in this order, one file at a time."""
        order = np.argsort(rows, kind="stable")
        file_of_row = np.searchsorted(self.starts, rows[order], side="right") - 1
        parts = [read_table(self.files[0], error=RunError).slice(0, 0)]
        for number in np.unique(file_of_row).tolist():
            positions = rows[order][file_of_row == number] - self.starts[number]
            parts.append(read_table(self.files[number], error=RunError).take(pa.array(positions)))
        return pa.concat_tables(parts).take(pa.array(np.argsort(order)))


def _hash_ids(file: Path) -> Hashes:
    with closing(read_batches(file, error=RunError, rows=1 << 17, columns=["sample_id"])) as batches:
        hashes = [hash_rank(batch["sample_id"].to_pylist(), seed=0, purpose=ORDER_PURPOSE) for batch in batches]
    return np.concatenate([np.zeros(0, np.uint64), *hashes])


def _find(hashes: Hashes, wanted: Hashes) -> NDArray[np.intp]:
    """Return the position of each wanted hash (b,) among hashes (n,), negative where there is none."""
    if not len(hashes):
        return np.full(len(wanted), -1, dtype=np.intp)
    order = np.argsort(hashes, kind="stable")
    position = order[np.minimum(np.searchsorted(hashes, wanted, sorter=order), len(hashes) - 1)]
    return np.where(hashes[position] == wanted, position, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrownData:
    """Data that hold the unchanged rows of a run, N rows in all.

    old_row: Row of the run's score table of each row (N,), negative where it is not in the table. is_new (N,): Rows
    that the run neither scored nor quarantined.
    """

    job: ScoringJob
    state: RunState
    table: OldTable
    encoded: EncodedData
    old_row: NDArray[np.intp]
    is_new: NDArray[np.bool_]


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


def read_grown(
    run_dir: Run, dataset: Dataset, config: RunConfig, *, options: dict[str, Any], folder: Path
) -> GrownData:
    """Read data that have grown, and check that all rows of the run are in them, unchanged.

    folder: Of the tables of data in several parts; complete ones in it are not made again.

    Raises:
        RunError: The run has no probes, another config, or rows that are not in the data or have changed.
    """
    record = run_dir.record()
    check_config(run_dir, record, dataset, config)
    columns = {**asdict(dataset.columns), "id": list(dataset.columns.id)}
    if differing := [role for role, name in columns.items() if name != record["columns"].get(role)]:
        raise RunError(
            f"{run_dir.folder}: the {differing[0]} of the run is {record['columns'].get(differing[0])!r} and now "
            f"{columns[differing[0]]!r}; pass another folder with --run, or --overwrite"
        )
    state = check_probes(run_dir, record)
    job = replace(open_job(run_dir, dataset, config, **options, store=MemoryStore()), probes=run_dir.probes)
    if len(job.plan.parts) > 1:
        depends_on = digest(job.plan.config.encode(), record["fingerprint"].encode())
        job = replace(job, store=resumable_store(folder, depends_on))
    encoded = read_as_in_run(job, state, trust_unchanged=True)
    hashes, table = encoded.samples.hash_ids(seed=0, purpose=ORDER_PURPOSE), OldTable.of(run_dir)
    quarantined = np.unique(_hash_ids(run_dir.quarantine_file))
    old_row, is_quarantined = _find(table.hashes, hashes), _find(quarantined, hashes) >= 0
    num_old, num_present = record["counts"]["input"], int(((old_row >= 0) | is_quarantined).sum())
    if num_present != num_old:
        raise RunError(
            f"{num_old - num_present} of the {num_old} samples of {run_dir.folder} are not in {dataset.source}: rows "
            "can be appended, not removed or renamed; pass another folder with --run, or --overwrite"
        )
    is_new = (old_row < 0) & ~is_quarantined
    if fingerprint(encoded, is_row=~is_new) != record["fingerprint"]:
        raise RunError(
            f"a sample of {run_dir.folder} has another label, group, split or content in {dataset.source}: rows can be "
            "appended, not changed; pass another folder with --run, or --overwrite"
        )
    return GrownData(job=job, state=state, table=table, encoded=encoded, old_row=old_row, is_new=is_new)


def resumable_store(folder: Path, config: str) -> FolderStore:
    """Return the store of a folder, whose tables are removed if they depend on something else."""
    file = folder / "config.json"
    stated = None
    with suppress(RunError):  # without the file, or with a damaged one
        stated = read_json(file, error=RunError).get("config")
    if stated != config:
        shutil.rmtree(folder, ignore_errors=True)
    write_json({"config": config}, file)
    return FolderStore(folder=folder, config=config)


def check_unchanged(run_dir: Run, dataset: Dataset, config: RunConfig, options: dict[str, Any]) -> None:
    """Raise RunError if a finished run was made from other data or another config."""
    record = run_dir.record()
    if "appended" in record:
        with scratch_folder(run_dir.folder) as folder:
            grown = read_grown(run_dir, dataset, config, options=options, folder=folder)
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
) -> bool:
    """Score the rows that were added to the data of a run, and add them to its files; return whether there were any."""
    start = time.monotonic()
    folder = run_dir.stages / "append"
    grown = read_grown(run_dir, dataset, config, options=options, folder=folder)
    if not grown.is_new.any():
        log.info("%s has no rows that %s lacks: nothing to append", dataset.source, run_dir.folder)
        _remove_stages(folder)
        return False
    job, encoded = grown.job, grown.encoded
    new = select_new(
        encoded,
        grown.state,
        is_new=grown.is_new,
        seed=job.seed,
        copies="none" if job.keep_duplicates else "known",
        fingerprint=fingerprint(encoded),
    )
    state = replace(
        grown.state,
        class_names=encoded.samples.class_names,
        keys=grown.state.keys.merge(folds_of_keys(encoded.samples, new.selection)),
        contents=grown.state.contents.merge(folds_of_contents(encoded, new.selection)),
    )
    score(job, save_selection(job, new.selection, grown.state), job.plan.parts)
    record = _grown_record(run_dir, grown, new, state) | about
    record["seconds"] = {**record["seconds"], "append": round(time.monotonic() - start, 3)}
    _publish(run_dir, grown, new, state, record=record, lock=lock)
    _remove_stages(folder)
    _log_appended(run_dir, new, record)
    return True


def _remove_stages(folder: Path) -> None:
    """Remove the tables of an append, and the folder of stages if nothing else is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def _grown_record(run_dir: Run, grown: GrownData, new: NewRows, state: RunState) -> dict[str, Any]:
    """Return run.json with the counts of all rows; probe report, mixture and checks are those of the fitted rows."""
    record, num_rows = run_dir.record(), len(grown.encoded.samples)
    num_scored = record["counts"]["scored"] + len(new.selection)
    fitted = record.get("appended", {}).get("fitted") or {**record["counts"], "fingerprint": record["fingerprint"]}
    reasons = Counter(record["quarantine"])
    reasons.update(row.reason.value for row in new.selection.quarantined)
    return {
        **record,
        "source": absolute_source(grown.job.dataset.source),
        "fingerprint": new.selection.fingerprint,
        "counts": {"input": num_rows, "scored": num_scored, "quarantined": num_rows - num_scored},
        "quarantine": dict(reasons),
        "num_groups": state.num_groups,
        "appended": {
            "rows": num_rows - fitted["input"],
            "scored": num_scored - fitted["scored"],
            "fitted": fitted,
        },
    }


def _publish(
    run_dir: Run, grown: GrownData, new: NewRows, state: RunState, *, record: dict[str, Any], lock: Lock
) -> None:
    """Write the files of the run with the appended rows, and replace the old ones at once."""
    job, provenance = grown.job, score_provenance(record)
    with replacing(run_dir.folder, (*SCORE_FILES, *REPORT_FILES), lock=lock) as folder:
        staged = Run(folder)
        for part in job.plan.parts:
            table = _part_table(grown, part)
            if table.num_rows:
                file = staged.scores_file if len(job.plan.parts) == 1 else staged.score_part(part.index)
                write_parquet(table, file, provenance={**provenance, "paths": job.dataset.path_columns})
        quarantined = _quarantined(run_dir, grown, new)
        write_parquet(quarantined, staged.quarantine_file, provenance=provenance)
        shutil.copy(run_dir.mixture_file, staged.mixture_file)
        write_json(job.plan.to_json(job.dataset.shards), staged.shards_file)
        staged.probes.mkdir()
        copy_probes(run_dir.probes, staged.probes, networks=())
        state.write(staged.probes)
        own, _ = own_record(run_dir.folder)
        earlier = [] if own is None else earlier_records(own)
        signed = signed_record(record, folder=run_dir.folder, scores=staged.score_source, earlier=earlier)
        staged.write_record(signed)


def _part_table(grown: GrownData, part: Part) -> pa.Table:
    """Return the score table of a part in the order of the data: the rows of the run, unchanged, and the new ones."""
    old_row = grown.old_row[part.first : part.first + part.num_rows]
    is_old = old_row >= 0
    table = grown.table.read(old_row[is_old])
    scores, store = grown.job.store.read("scores", part.index), grown.job.store
    if not scores.num_columns:
        return table.combine_chunks()
    new, _ = finish_part(scores, store.read("measured", part.index), grown.state.whole, names=grown.job.names)
    names = [
        new[name].cast(type_) if name in new.column_names else pa.nulls(len(new), type_)
        for name, type_ in zip(table.schema.names, table.schema.types, strict=True)
    ]
    rows = np.concatenate([np.flatnonzero(is_old), _rows_of(grown, part, new)])
    merged = pa.concat_tables([table, pa.table(names, names=table.schema.names)])
    return merged.take(pa.array(np.argsort(rows))).combine_chunks()


def _rows_of(grown: GrownData, part: Part, table: pa.Table) -> NDArray[np.intp]:
    """Return the row within the part of each row of a table of new samples."""
    hashes = grown.encoded.samples.read_rows(part.index)[f"hash {ORDER_PURPOSE}"].to_numpy()
    return _find(hashes, hash_rank(table["sample_id"].to_pylist(), seed=0, purpose=ORDER_PURPOSE))


def _quarantined(run_dir: Run, grown: GrownData, new: NewRows) -> pa.Table:
    """Return the quarantine table of all rows in the order of the data."""
    old = read_table(run_dir.quarantine_file, error=RunError)
    table = pa.concat_tables([old, quarantine_table(new.selection.quarantined).cast(old.schema)])
    hashes = grown.encoded.samples.hash_ids(seed=0, purpose=ORDER_PURPOSE)
    rows = _find(hashes, hash_rank(table["sample_id"].to_pylist(), seed=0, purpose=ORDER_PURPOSE))
    return table.take(pa.array(np.argsort(rows, kind="stable"))).combine_chunks()


def _log_appended(run_dir: Run, new: NewRows, record: dict[str, Any]) -> None:
    num_quarantined = len({entry.sample_id for entry in new.selection.quarantined})
    log.info(
        "appended %d samples by the probes of the run, %d of known groups, ids or contents; %d quarantined. No column "
        "of earlier rows changes; probe report, mixture and checks stay those of the first %d samples",
        len(new.selection),
        new.num_known,
        num_quarantined,
        record["appended"]["fitted"]["scored"],
    )
    if manifests := run_dir.manifests():
        log.info(
            "%d manifests were made from the earlier scores: they keep their rows and recipe, and lack the new samples",
            len(manifests),
        )
