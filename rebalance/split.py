"""Writing of the rows that a selection keeps and drops."""

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

from ..audit.parquet import KEY
from ..audit.storage import atomic_write
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

_NOT_REPEATED = ("ranges", "schema", "source")  # what a manifest does not repeat of its score table's metadata
_STATISTICS_COLUMNS = (
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
_WRITE_BATCH_ROWS = 16_384  # values that are encoded at once: a tenth quicker than 1,024
_MAX_QUEUED = 1  # batches that a thread may be behind


def write_split(
    selection: Selection, path: Path | None, *, name: str, recipe: dict[str, Any], num_bins: int = 20
) -> dict[str, Any]:
    """Make the second pass: write the manifest and its dropped rows, and give Tally.numbers.

    With no path nothing is written: the numbers are what would be. The same scores and recipe give the same bytes.
    """
    score_files = selection.score_files
    stats = SplitStats(score_files, between=selection.rule.between, num_bins=num_bins)
    provenance = _provenance(selection, name=name, recipe=recipe)
    with ExitStack() as stack:
        kept = dropped = None
        if path is not None:
            kept = stack.enter_context(_open_writer(path, _schema(score_files, COLUMNS), provenance))
            dropped = stack.enter_context(
                _open_writer(dropped_path(path), _schema(score_files, DROPPED_COLUMNS), provenance)
            )
        for batch in score_files.batches(all_columns=True):
            decision = selection.decide(batch)
            stats.add(batch, decision, selection.reasons)
            if kept is not None and dropped is not None:
                columns = _columns(batch, decision, score_files, selection, name=name)
                kept.add(columns, decision.keep)
                dropped.add(columns, ~decision.keep)
        if kept is not None and dropped is not None:
            dropped.about["dropped_from"] = kept.finish()
    return stats.numbers()


class _ManifestWriter:
    """A Parquet file in row groups of a fixed size, written by a thread, with a digest of its rows in its metadata."""

    def __init__(self, path: Path, schema: pa.Schema, provenance: dict[str, Any]) -> None:
        # Columns of few values are handed over as codes; that they are plain strings is what is stored.
        coded = {name: pa.dictionary(pa.int32(), pa.string()) for name in schema.names if name in REPEATING}
        fields = [pa.field(field.name, coded.get(field.name, field.type)) for field in schema]
        self._schema = pa.schema(fields)
        self._provenance = provenance
        self._writer = pq.ParquetWriter(
            path.absolute(),  # Arrow takes a relative one such as hf:/a for a remote file system's
            self._schema,
            compression="lz4" if "reason" in schema.names else "zstd",  # dropped rows: a third quicker, a fifth larger
            use_dictionary=[*coded, "label", "bin", "weight", "threshold"],
            write_statistics=[name for name in schema.names if name in _STATISTICS_COLUMNS],
            write_batch_size=_WRITE_BATCH_ROWS,
            store_schema=False,
        )
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()
        self.about: dict[str, Any] = {}
        self._digest = RowDigest()
        self._held: list[pa.Table] = []
        self._number = self._rows = 0

    def __enter__(self) -> _ManifestWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
                provenance = json.dumps(self._provenance, sort_keys=True)
                about = self.about | {"metadata": metadata_digest({KEY: provenance.encode()})}
                self._writer.add_key_value_metadata(
                    {KEY.decode(): provenance, ROWS_KEY: json.dumps(about, sort_keys=True)}
                )
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._writer.close()

    def add(self, columns: dict[str, Any], which: NDArray[np.bool_]) -> None:
        """Add the rows (n,) that `which` says of these columns; they are written later, but not much."""
        self._waiting.append(self._thread.submit(self._take, columns, which))
        while len(self._waiting) > _MAX_QUEUED:
            self._waiting.popleft().result()

    def finish(self) -> str:
        """Write all that was added, and give the digest of all rows."""
        while self._waiting:
            self._waiting.popleft().result()
        if self._number:
            self._write(pa.concat_tables(self._held))
        self._held, self._number = [], 0
        self.about |= {"rows": self._rows, "digest": self._digest.hexdigest()}
        return self._digest.hexdigest()

    def _take(self, columns: dict[str, Any], which: NDArray[np.bool_]) -> None:
        rows = pa.array(np.flatnonzero(which))
        some = [_take_rows(columns[field.name], field.type, rows) for field in self._schema]
        self._held.append(pa.table(some, schema=self._schema))
        self._number += len(rows)
        while self._number >= GROUP_ROWS:
            together = pa.concat_tables(self._held)
            self._write(together.slice(0, GROUP_ROWS))
            self._held = [together.slice(GROUP_ROWS)]
            self._number -= GROUP_ROWS

    def _write(self, table: pa.Table) -> None:
        table = table.unify_dictionaries().combine_chunks()
        for place, field in enumerate(self._schema):
            if pa.types.is_dictionary(field.type):
                table = table.set_column(place, field, _sort_dictionary(table.column(place).combine_chunks()))
        self._digest.add(table)
        self._writer.write_table(table, row_group_size=GROUP_ROWS)
        self._rows += len(table)


def _sort_dictionary(column: pa.DictionaryArray) -> pa.DictionaryArray:
    """Code the values that occur, sorted: the bytes then do not depend on the batches in which rows came."""
    if column.null_count == len(column):
        return pa.nulls(len(column), column.type)
    null = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
    codes = column.indices.fill_null(0).to_numpy()
    used = np.flatnonzero(np.bincount(codes if null is None else codes[~null], minlength=len(column.dictionary)))
    names = column.dictionary.take(pa.array(used))
    order = pc.sort_indices(names)
    if null is None and len(used) == len(column.dictionary) and (order.to_numpy() == np.arange(len(used))).all():
        return column
    place = np.zeros(len(column.dictionary), dtype=np.int32)
    place[used[order.to_numpy()]] = np.arange(len(used))
    return pa.DictionaryArray.from_arrays(pa.array(place[codes], mask=null), names.take(order))


def _take_rows(column: Any, type_: pa.DataType, rows: pa.Array) -> Any:
    """Take some rows of a column as what is stored: whatever came as text or number, of any width, becomes text."""
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.string())  # which cannot be taken from
    some = column.take(rows)
    if pa.types.is_dictionary(type_) and not pa.types.is_dictionary(some.type):
        some = some.cast(pa.string())  # numbers have no way to codes of texts but this
    return some.cast(type_)


@contextmanager
def _open_writer(path: Path, schema: pa.Schema, provenance: dict[str, Any]) -> Iterator[_ManifestWriter]:
    """Write a file whole or not at all."""
    with atomic_write(path) as temporary, _ManifestWriter(temporary, schema, provenance) as sink:
        yield sink


def _schema(score_files: ScoreFiles, columns: dict[str, pa.DataType]) -> pa.Schema:
    own = [pa.field(name, type_) for name, type_ in columns.items()]
    return pa.schema(own + [pa.field(name, pa.string()) for name in score_files.paths if name not in columns])


def _columns(
    batch: ScoreBatch, decision: Decision, score_files: ScoreFiles, selection: Selection, *, name: str
) -> dict[str, pa.Array | pa.ChunkedArray]:
    """Give every column of a manifest and of dropped rows; what the scores do not have is null."""
    told, table, n = decision.outcome, batch.table, len(batch)
    codes = pa.array(batch.label)
    numeric = pa.types.is_integer(score_files.classes.type)
    found: dict[str, pa.Array | pa.ChunkedArray] = {
        "label": score_files.classes.cast(pa.int32()).take(codes) if numeric else codes,
        "subset": _dictionary_column(pa.array(np.zeros(n, dtype=np.int8)), (name,)),
        "bin": None if told.bin is None else pa.array(told.bin, mask=told.bin < 0),
        "rank": pa.array(decision.rank),
        "weight": pa.array(np.ones(n, dtype=np.float32) if told.weight is None else told.weight),
        "discrepancy": pa.array(decision.discrepancy, from_pandas=True),
        "gap": pa.array(batch.gap),
        "reason": _dictionary_column(pa.array(decision.reason), selection.reasons),
        "score": pa.array(told.score, from_pandas=True),
        "threshold": pa.array(told.threshold, from_pandas=True),
    }
    if "label_name" in score_files.coded or "label_name" not in table.column_names:
        found["label_name"] = _dictionary_column(codes, score_files.class_names)
    if score_files.assign is not None or ("split" in score_files.coded and "split" in table.column_names):
        found["split"] = _dictionary_column(pa.array(batch.split), score_files.splits)
    for column in (*COLUMNS, *score_files.paths):
        if found.get(column) is None:
            found[column] = table[column] if column in table.column_names else pa.nulls(n)
    return found


def _dictionary_column(codes: pa.Array, names: tuple[str, ...]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(codes, pa.array(list(names), pa.string()))


def _provenance(selection: Selection, *, name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    scores = selection.score_files.provenance
    return {
        "schema": f"mmaudit.manifest/{SCHEMA_VERSION}",
        "subset": name,
        "between": selection.rule.between,
        "rule": recipe,
        "ranges": {name: {"range": span, "meaning": meaning} for name, (span, meaning) in RANGES.items()},
        "scores": {key: value for key, value in scores.items() if key not in _NOT_REPEATED},
    }
