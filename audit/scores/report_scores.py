"""The columns of a score table that a report is made of, of all rows or of a sample, read in batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import ScoreError
from ..hashing import hash_ids
from ..storage import parse_provenance, read_batches, read_schema
from .table import PROVENANCE, ScoreTable, check_score_schema, discrepancy_suffixes, scores_of_table

_BATCH_ROWS, _BUFFER_BYTES = 1 << 15, 1 << 16
_COLUMNS = ("sample_id", "label", "label_name", "split", "group", "balance", "p_balanced")
_BY_MODALITY = ("confidence", "prediction", "training_confidence", "training_variability", "shapley")


def read_report_scores(source: Path, *, max_rows: int) -> ScoreTable:
    """Read what a report is made of: a file, or of a folder of parts the rows with the smallest hashes of their ids.

    Of a folder these are at most `max_rows`, as many as the table has. In memory are the rows that are returned and a
    batch: parts are read twice, and no column of all rows is kept. Columns that no report needs are None.
    """
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not files:
        raise ScoreError(f"{source} has no Parquet files")
    schema = read_schema(files[-1], error=ScoreError)  # of parts the last one, which appends always write
    provenance = parse_provenance(schema.metadata or {}, error=ScoreError, where=str(files[-1]), shape=PROVENANCE)
    paths = [name for name in provenance.get("paths", []) if name in schema.names]
    modalities = check_score_schema(schema, where=str(source), paths=paths)
    names = {*_COLUMNS, *paths, *(f"{kind}_{name}" for kind in _BY_MODALITY for name in modalities)}
    names |= {f"discrepancy_sd{suffix}" for suffix in discrepancy_suffixes(modalities)}
    columns = [name for name in schema.names if name in names]
    last = _last_hash(files, max_rows) if source.is_dir() else None
    batches = chain.from_iterable(_batches(file, columns) for file in files)
    tables = (table if last is None else table.filter(pa.array(_hash_ids(table) <= last)) for table in batches)
    try:
        rows = pa.concat_tables([schema.empty_table().select(columns), *tables])
    except pa.ArrowException as cause:
        raise ScoreError(f"the files of {source} have different columns: {str(cause).splitlines()[0]}") from cause
    return scores_of_table(rows, provenance, where=str(source))


def _last_hash(files: list[Path], max_rows: int) -> np.uint64 | None:
    """Return the largest of the `max_rows` smallest hashes of ids; None if there are no more ids."""
    smallest, num_rows = np.empty(0, np.uint64), 0
    for key in chain.from_iterable(map(_hash_ids, _batches(file, ["sample_id"])) for file in files):
        num_rows += len(key)
        smallest = np.concatenate([smallest, key if len(smallest) < max_rows else key[key < smallest.max()]])
        smallest = np.partition(smallest, max_rows - 1)[:max_rows] if len(smallest) > max_rows else smallest
    return None if num_rows <= max_rows else smallest.max()


def _batches(file: Path, columns: list[str]) -> Iterator[pa.Table]:
    rows = read_batches(file, error=ScoreError, rows=_BATCH_ROWS, columns=columns, buffer_bytes=_BUFFER_BYTES)
    with closing(rows) as batches:
        yield from batches


def _hash_ids(table: pa.Table) -> NDArray[np.uint64]:
    return hash_ids(table["sample_id"].combine_chunks(), seed=0, purpose="report")
