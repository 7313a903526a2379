"""Score tables of any size, checked and read in batches.

A table is a file, a folder or glob of shards, or a ScoreTable in memory. Shards are read in an order that depends on
their content only, not on their names or the order of the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..audit.errors import ManifestError, ScoreError
from ..audit.hashing import hash_ids
from ..audit.metrics import Floats, discrepancy_between, gap
from ..audit.scores.table import COLUMNS, HALVES, PROVENANCE, Column, ScoreTable, check_score_schema, score_modalities
from ..audit.storage import parse_provenance
from .score_files import (
    MEASURES,
    ScoreFile,
    check_no_nulls,
    class_values,
    decode_dictionary,
    display_name,
    find_score_files,
    float_column,
    indices_among,
    label_column,
    prefetch,
    read_score_schema,
    read_tables,
    sort_by_first_id,
    split_indices,
    survey_table,
)

_ONLY_WRITTEN = ("label_name", "content")
_CODED = ("split", "label_name")  # columns of few distinct values
_USED = ("sample_id", "label", "split", "group", *_ONLY_WRITTEN, *MEASURES)
_SLACK = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestMembers:
    """Ids of a manifest as sorted hash keys; `include`: rows must be among them, otherwise they must not."""

    name: str
    keys: NDArray[np.uint64]
    include: bool

    @property
    def reason(self) -> str:
        """Reason recorded for the rows that this manifest excludes."""
        return f"not-in-{self.name}" if self.include else f"in-{self.name}"

    def admitted_mask(self, key: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return which rows of these keys (n,) may be kept."""
        position = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        return np.asarray((self.keys[position] == key) == self.include)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreBatch:
    """A batch of n rows of a score table. label and split are indices into the classes and splits of ScoreFiles.

    key (n,) is hash(seed, id), by which rows are selected. confidence (n, m) is NaN where a modality is missing.
    excluded_by (n,) is 0, or the number, from 1, of the first of ScoreFiles.members that excludes the row.
    """

    table: pa.Table
    key: NDArray[np.uint64]
    label: NDArray[np.int32]
    split: NDArray[np.int16]
    confidence: Floats
    excluded_by: NDArray[np.int8]
    modalities: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.key)

    def discrepancy(self, between: str) -> Floats:
        """Compute the discrepancy (n,) in [-1, 1], as ScoreTable.discrepancy does; NaN where a modality is missing."""
        return discrepancy_between(self.confidence, self.modalities, between)

    @property
    def gap(self) -> Floats:
        """Modality gap (n,) in [0, 1]."""
        return gap(self.confidence)

    def numbers(self, name: str) -> Floats | None:
        """Return a column of numbers (n,), null as NaN; None if the table has no such column."""
        return float_column(self.table, name) if name in self.table.column_names else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreFiles:
    """Files of a score table, read in several passes. ScoreBatch.label indexes classes and class_names.

    `paths` are the source's columns of file names, `provenance` is the metadata of the table.
    """

    files: tuple[ScoreFile, ...]
    modalities: tuple[str, ...]
    columns: tuple[str, ...]
    num_rows: int
    classes: pa.Array
    class_names: tuple[str, ...]
    splits: tuple[str, ...]
    coded: tuple[str, ...]  # columns that follow from label or split and the names here
    paths: tuple[str, ...]
    provenance: dict[str, Any]
    seed: int
    members: tuple[ManifestMembers, ...] = ()  # manifests that must, or must not, contain a row
    # New splits instead of the table's, as indices into `splits`.
    assign: Callable[[ScoreBatch], NDArray[np.int16]] | None = None

    def batches(
        self, *, all_columns: bool = False, ordered: bool = True, halves: bool = False, rows: int | None = None
    ) -> Iterator[ScoreBatch]:
        """Yield all rows once, with read-ahead; unless `ordered`, two files at a time, batches as they come.

        Only columns needed for selection are read and checked; `all_columns` reads those of a manifest, unchecked,
        after a first pass, and `halves` also the scores by halves of the features. Raises ScoreError for values that
        are null or out of range, naming the first.
        """
        read = partial(self._read_batches, all_columns=all_columns, halves=halves, batch_rows=rows)
        if ordered or len(self.files) == 1:
            return prefetch(read(self.files))
        return prefetch(read(self.files[::2]), read(self.files[1::2]))

    def _read_batches(
        self, files: Sequence[ScoreFile], *, all_columns: bool, halves: bool, batch_rows: int | None
    ) -> Iterator[ScoreBatch]:
        unused = {"label_name"} & set(self.coded) if all_columns else {*self.paths, *_ONLY_WRITTEN}
        columns = [name for name in self.columns if name not in unused and (halves or not _is_half(name))]
        if "label" not in columns:
            columns.append("label_name")
        for file in files:
            for table in read_tables(file, dict.fromkeys(columns), dictionary=_CODED, rows=batch_rows):
                if not all_columns:
                    _check_rows(table, self.modalities, file)
                key = hash_keys(table["sample_id"], seed=self.seed)
                rows = ScoreBatch(
                    table=table,
                    key=key,
                    label=indices_among(class_values(table), self.classes, np.int32),
                    split=split_indices(table, self.splits if self.assign is None else None),
                    confidence=np.stack(
                        [float_column(table, f"confidence_{name}") for name in self.modalities], axis=1
                    ),
                    excluded_by=self._excluded_by(key),
                    modalities=self.modalities,
                )
                yield rows if self.assign is None else replace(rows, split=self.assign(rows))

    def _excluded_by(self, key: NDArray[np.uint64]) -> NDArray[np.int8]:
        excluded_by = np.zeros(len(key), dtype=np.int8)
        for index, members in enumerate(self.members, start=1):
            excluded_by[(excluded_by == 0) & ~members.admitted_mask(key)] = index
        return excluded_by

    def non_test_mask(self, batch: ScoreBatch) -> NDArray[np.bool_]:
        """Return which rows (n,) are not excluded and not in the test split, unless that is the only split."""
        test = self.splits.index("test") if "test" in self.splits and len(self.splits) > 1 else -1
        return np.asarray((batch.split != test) & (batch.excluded_by == 0))

    def default_between(self) -> str:
        """Return `A:B` for two modalities; of more, the one with the highest mean confidence outside the test split."""
        if len(self.modalities) == 2:
            return ":".join(self.modalities)
        total, counts = np.zeros(len(self.modalities)), np.zeros(len(self.modalities))
        for batch in self.batches():
            confidence = batch.confidence[self.non_test_mask(batch)]
            total += np.where(np.isnan(confidence), 0, confidence).sum(axis=0, dtype=np.float64)
            counts += (~np.isnan(confidence)).sum(axis=0)
        return self.modalities[int(np.argmax(total / np.maximum(counts, 1)))]


def open_scores(source: str | Path | Sequence[str | Path] | ScoreTable, *, seed: int) -> ScoreFiles:
    """Open a score table: a file, a folder of Parquet shards, a glob, several files, or a ScoreTable.

    `seed` is that of the hash keys. Raises ScoreError if a file is not a score table, or the shards have different
    columns.
    """
    files: list[ScoreFile] = [source.to_arrow()] if isinstance(source, ScoreTable) else find_score_files(source)
    schemas = [read_score_schema(file) for file in files]
    columns = tuple(schemas[0].names)
    for file, schema in zip(files, schemas, strict=True):
        if set(schema.names) != set(columns):
            differing = sorted(set(schema.names) ^ set(columns))[0]
            raise ScoreError(f"{file} and {files[0]} are not shards of one table: only one of them has {differing}")
    modalities = score_modalities(columns, where=str(files[0]) if isinstance(files[0], Path) else "the table")
    if isinstance(source, ScoreTable):
        provenance: dict[str, Any] = {**source.provenance}
        paths = () if source.paths is None else tuple(source.paths.column_names)
    else:
        # The last part of a run is written again by every append; earlier ones may have the fingerprint of before.
        provenance = parse_provenance(
            schemas[-1].metadata or {}, error=ScoreError, where=str(files[-1]), shape=PROVENANCE
        )
        paths = tuple(name for name in provenance.pop("paths", []) if name in columns)
    for file, schema in zip(files, schemas, strict=True):
        check_score_schema(schema, where=display_name(file), paths=paths)
    survey = survey_table(files, columns)
    if survey.num_rows == 0:
        raise ScoreError("the score table has no rows")
    return ScoreFiles(
        files=sort_by_first_id(files),
        modalities=modalities,
        columns=tuple(
            name
            for name in columns
            if name not in survey.empty_columns
            and (name in _USED or name in paths or name.startswith("confidence_") or _is_half(name))
        ),
        coded=("label_name",) * survey.one_name_per_class + ("split",) * survey.every_row_has_split,
        num_rows=survey.num_rows,
        classes=survey.classes,
        class_names=survey.class_names,
        splits=survey.splits,
        paths=paths,
        provenance=provenance,
        seed=seed,
    )


def _is_half(name: str) -> bool:
    return name.startswith(tuple(f"{half}_" for half in HALVES))


def hash_keys(ids: pa.ChunkedArray, *, seed: int) -> NDArray[np.uint64]:
    """Compute hash(seed, id) of each row, (n,), by which rows are selected."""
    try:
        return hash_ids(decode_dictionary(ids.combine_chunks()), seed=seed, purpose="split")
    except pa.ArrowException as cause:
        raise ScoreError(f"column sample_id does not hold text: {str(cause).splitlines()[0]}") from cause


def _check_rows(table: pa.Table, modalities: Sequence[str], file: ScoreFile) -> None:
    where = display_name(file)
    check_no_nulls(table, ["sample_id", label_column(table)], file)
    num_confidences = np.zeros(len(table), dtype=np.int16)
    for name in modalities:
        num_confidences += _check_range(table, f"confidence_{name}", COLUMNS["confidence_M"], where)
    if (num_confidences < 2).any():
        raise ScoreError(
            f"{where}: sample {_first_id(table, num_confidences < 2)} has fewer than two values of confidence; "
            "a discrepancy needs two"
        )
    for name in MEASURES:
        if name in table.column_names:
            _check_range(table, name, COLUMNS[name], where)


def _check_range(table: pa.Table, name: str, column: Column, where: object) -> NDArray[np.bool_]:
    """Return which rows (n,) have a value; only null is missing, NaN is out of range."""
    assert column.bounds is not None
    low, high = column.bounds
    values = float_column(table, name)
    valid = pc.is_valid(table[name].combine_chunks()).to_numpy(zero_copy_only=False)
    out_of_range = valid & ~((values >= low - _SLACK) & (values <= high + _SLACK))
    if out_of_range.any():
        raise ScoreError(
            f"{where}: {name} of sample {_first_id(table, out_of_range)} is {values[out_of_range][0]:g}, "
            f"outside [{low:g}, {high:g}]: rescore, or correct the table"
        )
    return np.asarray(valid)


def _first_id(table: pa.Table, mask: NDArray[np.bool_]) -> str:
    return str(table["sample_id"][int(np.argmax(mask))].as_py())


def check_same_dataset(provenance: dict[str, Any], other_provenance: dict[str, Any], *, name: str) -> None:
    """Raise ManifestError if two provenances have different dataset fingerprints."""
    fingerprint, other_fingerprint = provenance.get("fingerprint"), other_provenance.get("fingerprint")
    if fingerprint is not None and other_fingerprint is not None and fingerprint != other_fingerprint:
        raise ManifestError(f"{name} was made from another dataset than these scores: recreate it from the same one")
