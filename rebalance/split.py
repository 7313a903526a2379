"""Second pass of a split: writing the kept and dropped rows of a selection."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..audit.storage import PROVENANCE_KEY, atomic_write
from .manifest import (
    COLUMNS,
    DROPPED_COLUMNS,
    GROUP_ROWS,
    RANGES,
    REPEATING,
    ROWS_KEY,
    SCHEMA_VERSION,
    RowDigest,
    dropped_path,
    metadata_digest,
)
from .score_tables import ScoreBatch, ScoreFiles
from .selection import Decision, Selection
from .split_stats import SplitStats

_NOT_REPEATED = ("ranges", "schema", "source")  # metadata of the score table that a manifest does not copy
_STATISTICS = (
    "label",
    "label_name",
    "split",
    "bin",
    "rank",
    "discrepancy",
    "gap",
    "balance",
    "p_balanced",
    "reason",
)
_WRITE_BATCH_ROWS = 16_384  # values encoded at a time: 10% faster than 1,024
_MAX_QUEUED = 1  # batches that may wait for the writing thread


def write_split(
    selection: Selection, path: Path | None, *, name: str, recipe: dict[str, Any], num_bins: int = 20
) -> dict[str, Any]:
    """Run the second pass: write the manifest and its dropped rows, and return SplitStats.numbers.

    With path None nothing is written and the numbers are the same. The same scores and recipe give the same bytes.
    """
    scores = selection.scores
    stats = SplitStats(scores, between=selection.rule.between, num_bins=num_bins)
    provenance = _provenance(selection, name=name, recipe=recipe)
    with ExitStack() as stack:
        kept_rows = dropped_rows = None
        if path is not None:
            kept_rows = stack.enter_context(_open_writer(path, _schema(scores, COLUMNS), provenance))
            dropped_rows = stack.enter_context(
                _open_writer(dropped_path(path), _schema(scores, DROPPED_COLUMNS), provenance)
            )
        for batch in scores.batches(all_columns=True, rows=GROUP_ROWS if selection.rule.weighs else None):
            decision = selection.decide(batch)
            stats.add(batch, decision, selection.reasons)
            if kept_rows is not None and dropped_rows is not None:
                columns = _columns(batch, decision, scores, selection, name=name)
                kept_rows.add(columns, decision.keep)
                dropped_rows.add(columns, ~decision.keep)
        if kept_rows is not None and dropped_rows is not None:
            dropped_rows.file_record["dropped_from"] = kept_rows.finish()
    return stats.numbers()


class _ManifestWriter:
    """A Parquet file in row groups of a fixed size, written by a thread, with a digest of its rows in its metadata."""

    def __init__(self, path: Path, schema: pa.Schema, provenance: dict[str, Any]) -> None:
        # Columns of few distinct values are passed as dictionary codes, and stored as plain strings.
        coded = {name: pa.dictionary(pa.int32(), pa.string()) for name in schema.names if name in REPEATING}
        fields = [pa.field(field.name, coded.get(field.name, field.type)) for field in schema]
        self._schema = pa.schema(fields)
        self._provenance = provenance
        self._writer = pq.ParquetWriter(
            path.absolute(),  # Arrow reads a relative path such as hf:/a as a remote file system
            self._schema,
            compression="lz4"
            if "reason" in schema.names
            else "zstd",  # dropped rows: lz4 is a third faster, a fifth larger
            use_dictionary=[*coded, "label", "bin", "weight", "threshold"],
            write_statistics=[name for name in schema.names if name in _STATISTICS],
            write_batch_size=_WRITE_BATCH_ROWS,
            store_schema=False,
        )
        self._thread = ThreadPoolExecutor(1)
        self._queue: deque[Future[None]] = deque()
        self.file_record: dict[str, Any] = {}
        self._digest = RowDigest()
        self._pending: list[pa.Table] = []
        self._num_pending = self._num_written = 0

    def __enter__(self) -> _ManifestWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
                provenance = json.dumps(self._provenance, sort_keys=True)
                about = self.file_record | {"metadata": metadata_digest({PROVENANCE_KEY: provenance.encode()})}
                self._writer.add_key_value_metadata(
                    {PROVENANCE_KEY.decode(): provenance, ROWS_KEY: json.dumps(about, sort_keys=True)}
                )
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._writer.close()

    def add(self, columns: dict[str, Any], mask: NDArray[np.bool_]) -> None:
        """Queue the rows of these columns that `mask` (n,) selects; blocks while the queue is full."""
        self._queue.append(self._thread.submit(self._append, columns, mask))
        while len(self._queue) > _MAX_QUEUED:
            self._queue.popleft().result()

    def finish(self) -> str:
        """Write all queued rows, and return the digest of all rows."""
        while self._queue:
            self._queue.popleft().result()
        if self._num_pending:
            self._write(self._take_pending())
        self.file_record |= {"rows": self._num_written, "digest": self._digest.hexdigest()}
        return self._digest.hexdigest()

    def _append(self, columns: dict[str, Any], mask: NDArray[np.bool_]) -> None:
        rows = pa.array(np.flatnonzero(mask))
        arrays = [_take_rows(columns[field.name], field.type, rows) for field in self._schema]
        self._pending.append(pa.table(arrays, schema=self._schema))
        self._num_pending += len(rows)
        while self._num_pending >= GROUP_ROWS:
            num_left = self._num_pending - GROUP_ROWS  # at most the rows of the last batch
            last = self._pending.pop()
            self._pending.append(last.slice(0, len(last) - num_left))
            group = self._take_pending()
            self._pending, self._num_pending = [last.slice(len(last) - num_left)], num_left
            self._write(group)

    def _take_pending(self) -> pa.Table:
        """Return the queued rows, copied to one chunk, and release those that they are copied from."""
        group = pa.concat_tables(self._pending).unify_dictionaries().combine_chunks()
        self._pending, self._num_pending = [], 0
        return group

    def _write(self, table: pa.Table) -> None:
        for index, field in enumerate(self._schema):
            if pa.types.is_dictionary(field.type):
                table = table.set_column(index, field, _sort_dictionary(table.column(index).combine_chunks()))
        self._digest.add(table)
        self._writer.write_table(table, row_group_size=GROUP_ROWS)
        self._num_written += len(table)
        pa.default_memory_pool().release_unused()  # what this thread has freed the others do not use


def _sort_dictionary(column: pa.DictionaryArray) -> pa.DictionaryArray:
    """Recode to the sorted occurring values, so that the bytes do not depend on the batches."""
    if column.null_count == len(column):
        return pa.nulls(len(column), column.type)
    is_null = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
    codes = column.indices.fill_null(0).to_numpy()
    used = np.flatnonzero(np.bincount(codes if is_null is None else codes[~is_null], minlength=len(column.dictionary)))
    names = column.dictionary.take(pa.array(used))
    order = pc.sort_indices(names)
    if is_null is None and len(used) == len(column.dictionary) and (order.to_numpy() == np.arange(len(used))).all():
        return column
    rank_of_code = np.zeros(len(column.dictionary), dtype=np.int32)
    rank_of_code[used[order.to_numpy()]] = np.arange(len(used))
    return pa.DictionaryArray.from_arrays(pa.array(rank_of_code[codes], mask=is_null), names.take(order))


def _take_rows(column: Any, type_: pa.DataType, rows: pa.Array) -> Any:
    """Return some rows of a column in the stored type: dictionary columns from text or numbers of any width."""
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.string())  # string views do not support take
    values = column.take(rows)
    if pa.types.is_dictionary(type_) and not pa.types.is_dictionary(values.type):
        values = values.cast(pa.string())  # numbers can be cast to string codes only via strings
    return values.cast(type_)


@contextmanager
def _open_writer(path: Path, schema: pa.Schema, provenance: dict[str, Any]) -> Iterator[_ManifestWriter]:
    """Open a writer whose file appears only if the block succeeds."""
    with atomic_write(path) as temporary, _ManifestWriter(temporary, schema, provenance) as sink:
        yield sink


def _schema(scores: ScoreFiles, columns: dict[str, pa.DataType]) -> pa.Schema:
    own = [pa.field(name, type_) for name, type_ in columns.items()]
    return pa.schema(own + [pa.field(name, pa.string()) for name in scores.paths if name not in columns])


def _columns(
    batch: ScoreBatch, decision: Decision, scores: ScoreFiles, selection: Selection, *, name: str
) -> dict[str, pa.Array | pa.ChunkedArray]:
    """Return every column of a manifest and of dropped rows; columns missing in the scores are null."""
    outcome, table, n = decision.outcome, batch.table, len(batch)
    codes = pa.array(batch.label)
    numeric = pa.types.is_integer(scores.classes.type)
    arrays: dict[str, pa.Array | pa.ChunkedArray] = {
        "label": scores.classes.cast(pa.int32()).take(codes) if numeric else codes,
        "subset": _dictionary_column(pa.array(np.zeros(n, dtype=np.int8)), (name,)),
        "bin": None if outcome.bin is None else pa.array(outcome.bin, mask=outcome.bin < 0),
        "rank": pa.array(decision.rank),
        "weight": pa.array(np.ones(n, dtype=np.float32) if outcome.weight is None else outcome.weight),
        "discrepancy": pa.array(decision.discrepancy, from_pandas=True),
        "gap": pa.array(batch.gap),
        "reason": _dictionary_column(pa.array(decision.reason), selection.reasons),
        "score": pa.array(outcome.score, from_pandas=True),
        "threshold": pa.array(outcome.threshold, from_pandas=True),
    }
    if "label_name" in scores.coded or "label_name" not in table.column_names:
        arrays["label_name"] = _dictionary_column(codes, scores.class_names)
    if scores.assign is not None or ("split" in scores.coded and "split" in table.column_names):
        arrays["split"] = _dictionary_column(pa.array(batch.split), scores.splits)
    for column in (*COLUMNS, *scores.paths):
        if arrays.get(column) is None:
            arrays[column] = table[column] if column in table.column_names else pa.nulls(n)
    return arrays


def _dictionary_column(codes: pa.Array, names: tuple[str, ...]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(codes, pa.array(list(names), pa.string()))


def _provenance(selection: Selection, *, name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    scores = selection.scores.provenance
    return {
        "schema": f"mmaudit.manifest/{SCHEMA_VERSION}",
        "subset": name,
        "between": selection.rule.between,
        "recipe": recipe,
        "ranges": {name: {"range": entry.text, "meaning": entry.meaning} for name, entry in RANGES.items()},
        "scores": {key: value for key, value in scores.items() if key not in _NOT_REPEATED},
    }
