"""Files of a run with appended rows: the old rows as they are, those of unchanged parts in the same files."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..audit.engine.fit_results import FitResults
from ..audit.engine.known_rows import KnownRows, Tail, merge_hashes
from ..audit.engine.new_rows import selected
from ..audit.engine.plan import Part
from ..audit.engine.row_data import ORDER_PURPOSE
from ..audit.engine.run_state import Folds, RunState
from ..audit.engine.scoring import finish_part
from ..audit.engine.stages import (
    ScoringJob,
)
from ..audit.errors import RunError, quarantine_table
from ..audit.hashing import hash_rank
from ..audit.locks import Lock
from ..audit.probes.saved_probes import copy_probes
from ..audit.storage import link_or_copy, read_batches, read_footer, read_table, write_json, write_parquet
from .provenance import (
    absolute_source,
    earlier_records,
    own_record,
    score_provenance,
    signed_record,
)
from .run import REPORT_FILES, SCORE_FILES, Run
from .swap import replacing

log = logging.getLogger("mmaudit")

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class OldTable:
    """Files of the score table of a run, of the parts from one on, and the first row of each file and the end."""

    files: tuple[Path, ...]
    starts: NDArray[np.intp]

    @classmethod
    def of(cls, run_dir: Run, *, first_part: int) -> OldTable:
        """Read how many rows the files have."""
        files = tuple(file for number, file in score_files(run_dir) if number >= first_part)
        starts = np.cumsum([0, *(read_footer(file, error=RunError).num_rows for file in files)])
        return cls(files=files, starts=starts)

    def hash_ids(self) -> Hashes:
        """Return the hashes of the ids of all rows (n,)."""
        return np.concatenate([hash_ids_of(file) for file in self.files])

    def read(self, rows: NDArray[np.intp]) -> pa.Table:
        """Read these rows, in this order, one file at a time."""
        order = np.argsort(rows, kind="stable")
        file_of_row = np.searchsorted(self.starts, rows[order], side="right") - 1
        parts = [read_table(self.files[0], error=RunError).slice(0, 0)]
        for number in np.unique(file_of_row).tolist():
            positions = rows[order][file_of_row == number] - self.starts[number]
            parts.append(_take(read_table(self.files[number], error=RunError), positions))
        return _take(pa.concat_tables(parts), np.argsort(order))


def score_files(run_dir: Run) -> list[tuple[int, Path]]:
    """Return the files of the score table of a run with the numbers of their parts."""
    source = run_dir.score_source
    files = sorted(source.glob("part-*.parquet")) if source.is_dir() else [source]
    return [(int(file.stem.removeprefix("part-")) if source.is_dir() else 0, file) for file in files]


def _take(table: pa.Table, rows: NDArray[np.intp]) -> pa.Table:
    """Return these rows of a table; of all rows in order the table itself, without a copy."""
    in_order = len(rows) == len(table) and np.array_equal(rows, np.arange(len(rows)))
    return table if in_order else table.take(pa.array(rows))


def hash_ids_of(file: Path) -> Hashes:
    """Return the hashes of the ids of a table."""
    with closing(read_batches(file, error=RunError, rows=1 << 17, columns=["sample_id"])) as batches:
        hashes = [hash_rank(batch["sample_id"].to_pylist(), seed=0, purpose=ORDER_PURPOSE) for batch in batches]
    return np.concatenate([np.zeros(0, np.uint64), *hashes])


def find_hashes(hashes: Hashes, wanted: Hashes) -> NDArray[np.intp]:
    """Return the position of each wanted hash (b,) among hashes (n,), negative where there is none."""
    if not len(hashes):
        return np.full(len(wanted), -1, dtype=np.intp)
    order = np.argsort(hashes, kind="stable")
    position = order[np.minimum(np.searchsorted(hashes, wanted, sorter=order), len(hashes) - 1)]
    return np.where(hashes[position] == wanted, position, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    """A finished run, the job that scores the new rows of its data, and what it knows of its parts.

    first_part: The first part of the data that is not one of the run, of the same files with the same times. Rows of
    the parts before it are not read.
    """

    run_dir: Run
    record: dict[str, Any]
    job: ScoringJob
    known: KnownRows | None
    first_part: int

    @property
    def tail(self) -> Tail:
        """The parts from the first that has changed on, or from that which the stage `fit` had to begin with."""
        first_part = selected(self.job)["first_part"] if self.job.store.has("selection") else self.first_part
        return Tail.of(self.job.plan, first_part)


def grown_record(append: Append) -> dict[str, Any]:
    """Return run.json with the counts of all rows; probe report, mixture and checks are those of the fitted rows."""
    record, job, selection = append.record, append.job, FitResults(job=append.job).selection
    num_rows, num_scored = job.plan.num_rows, record["counts"]["scored"] + len(selection)
    fitted = record.get("appended", {}).get("fitted") or {**record["counts"], "fingerprint": record["fingerprint"]}
    reasons = Counter(record["quarantine"])
    reasons.update(row.reason.value for row in selection.quarantined)
    return {
        **record,
        "source": absolute_source(job.dataset.source),
        "fingerprint": selection.fingerprint,
        "counts": {"input": num_rows, "scored": num_scored, "quarantined": num_rows - num_scored},
        "quarantine": dict(reasons),
        "appended": {
            "rows": num_rows - fitted["input"],
            "scored": num_scored - fitted["scored"],
            "fitted": fitted,
        },
    }


def publish_appended(append: Append, stated: dict[str, Any], *, record: dict[str, Any], lock: Lock) -> None:
    """Write the files of the run with the appended rows, and replace the old ones at once.

    Files of the score table whose parts have no new rows are linked, as the probes are.
    """
    run_dir, job, tail = append.run_dir, append.job, append.tail
    state = _grown_state(append)
    record["num_groups"] = state.num_groups
    provenance = score_provenance(record)
    with replacing(run_dir.folder, (*SCORE_FILES, *REPORT_FILES), lock=lock) as folder:
        staged = Run(folder)
        staged.probes.mkdir()
        for number, file in score_files(run_dir):
            if number < tail.first_part:
                staged.score_part(number).parent.mkdir(exist_ok=True)
                link_or_copy(file, staged.score_part(number))
        old_rows = job.store.read("old rows")["row"].to_numpy()
        table = OldTable.of(run_dir, first_part=tail.first_part)
        for part in tail.parts:
            rows = _part_table(append, table, part, old_rows[part.first : part.first + part.num_rows], state)
            if rows.num_rows:
                file = staged.scores_file if len(job.plan.parts) == 1 else staged.score_part(part.index)
                write_parquet(rows, file, provenance={**provenance, "paths": job.dataset.path_columns})
        write_parquet(_quarantined(append), staged.quarantine_file, provenance=provenance)
        link_or_copy(run_dir.mixture_file, staged.mixture_file)
        write_json(job.plan.to_json(job.dataset.shards), staged.shards_file)
        copy_probes(run_dir.probes, staged.probes, networks=())
        state.write(staged.probes)
        _write_known(append, stated, staged.probes)
        own, _ = own_record(run_dir.folder)
        earlier = [] if own is None else earlier_records(own)
        signed = signed_record(record, folder=run_dir.folder, scores=staged.score_source, earlier=earlier)
        staged.write_record(signed)


def _grown_state(append: Append) -> RunState:
    """Return what the run keeps beside its probes with the folds of the new rows."""
    store, state = append.job.store, RunState.read(append.run_dir.probes)
    return replace(
        state,
        class_names=FitResults(job=append.job).selection.class_names,
        keys=state.keys.merge(Folds.from_table(store.read("keys"))),
        contents=state.contents.merge(Folds.from_table(store.read("contents"))),
    )


def _write_known(append: Append, stated: dict[str, Any], folder: Path) -> None:
    """Write what is known of the parts of the grown data, if their fingerprint is a sum."""
    job, tail, state_ids = append.job, append.tail, None
    if not (sums := [int(text, 16) for text in stated["sums"]]):
        return
    if job.dataset.columns.group is not None:
        old = np.zeros(0, np.uint64) if append.known is None or append.known.ids is None else append.known.ids
        name = f"hash {ORDER_PURPOSE}"
        state_ids = merge_hashes(
            old, np.concatenate([job.store.read("rows", part.index)[name].to_numpy() for part in tail.parts])
        )
    KnownRows.of(job.plan, job.dataset.shards, sums, own=append.run_dir.folder, ids=state_ids).write(folder)


def _part_table(append: Append, old: OldTable, part: Part, old_row: NDArray[np.intp], state: RunState) -> pa.Table:
    """Return the score table of a part in the order of the data: the rows of the run, unchanged, and the new ones."""
    job, is_old = append.job, old_row >= 0
    table = old.read(old_row[is_old])
    scores = job.store.read("scores", part.index)
    if not scores.num_columns:
        return table.combine_chunks()
    new, _ = finish_part(scores, job.store.read("measured", part.index), state.whole, names=job.names)
    columns = [
        new[name].cast(type_) if name in new.column_names else pa.nulls(len(new), type_)
        for name, type_ in zip(table.schema.names, table.schema.types, strict=True)
    ]
    rows = np.concatenate([np.flatnonzero(is_old), _rows_of(append, part, new)])
    merged = pa.concat_tables([table, pa.table(columns, names=table.schema.names)])
    return _take(merged, np.argsort(rows)).combine_chunks()


def _rows_of(append: Append, part: Part, table: pa.Table) -> NDArray[np.intp]:
    """Return the row within the part of each row of a table of new samples."""
    hashes = append.job.store.read("rows", part.index)[f"hash {ORDER_PURPOSE}"].to_numpy()
    return find_hashes(hashes, hash_rank(table["sample_id"].to_pylist(), seed=0, purpose=ORDER_PURPOSE))


def _quarantined(append: Append) -> pa.Table:
    """Return the quarantine table of all rows in the order of the data; rows of parts that are not read come first."""
    job = append.job
    old = read_table(append.run_dir.quarantine_file, error=RunError)
    new = FitResults(job=job).selection.quarantined
    table = pa.concat_tables([old, quarantine_table(new).cast(old.schema)])
    name = f"hash {ORDER_PURPOSE}"
    hashes = np.concatenate([job.store.read("rows", part.index)[name].to_numpy() for part in append.tail.parts])
    rows = find_hashes(hashes, hash_rank(table["sample_id"].to_pylist(), seed=0, purpose=ORDER_PURPOSE))
    return table.take(pa.array(np.argsort(rows, kind="stable"))).combine_chunks()


def log_appended(append: Append, stated: dict[str, Any], record: dict[str, Any]) -> None:
    """Log what was appended, and what stays as it was."""
    selection, parts = FitResults(job=append.job).selection, append.tail.first_part
    log.info(
        "appended %d samples by the probes of the run, %d of known groups, ids or contents; %d quarantined. No column "
        "of earlier rows changes%s; probe report, mixture and checks stay those of the first %d samples",
        len(selection),
        stated["num_known"],
        len({entry.sample_id for entry in selection.quarantined}),
        f", and {parts} files of theirs stay as they are" if parts else "",
        record["appended"]["fitted"]["scored"],
    )
    if manifests := append.run_dir.manifests():
        log.info(
            "%d manifests were made from the earlier scores: they keep their rows and recipe, and lack the new samples",
            len(manifests),
        )
