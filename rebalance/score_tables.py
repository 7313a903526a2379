"""Score tables of any size, checked and read in batches.

A table is a file, a folder or glob of shards, or a ScoreTable in memory. Shards are read in an order that depends on
what they hold, neither on their names nor on the order in which they were named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..audit.errors import ManifestError, ScoreError
from ..audit.hashing import hash_ids
from ..audit.metrics import Floats, gap
from ..audit.parquet import parse_provenance
from ..audit.scores.table import PROVENANCE, ScoreTable, check_score_schema, discrepancy_between, score_modalities
from .score_files import (
    LOWER_BOUNDS,
    ScoreFile,
    check_no_nulls,
    check_schema,
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
)
from .survey import survey_table

_ONLY_WRITTEN = ("label_name", "content")
_CODED = ("split", "label_name")  # what few values repeat in
_USED = ("sample_id", "label", "split", "group", *_ONLY_WRITTEN, *LOWER_BOUNDS)
_SLACK = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestMembers:
    """The ids of a manifest, as their sorted keys, to keep to or to keep out of."""

    name: str
    keys: NDArray[np.uint64]
    inside: bool

    @property
    def reason(self) -> str:
        """Why a row is dropped."""
        return f"not-in-{self.name}" if self.inside else f"in-{self.name}"

    def admits(self, key: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Tell which rows of these keys (n,) may be kept."""
        place = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        return np.asarray((self.keys[place] == key) == self.inside)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreBatch:
    """Some rows (n,) of a score table. label and split are places in ScoreShards' classes and splits.

    key (n,) is hash(seed, id): the chance by which rows are chosen. confidence (n, m) is NaN where a modality is
    missing. barred (n,) is 0, or the number, from 1, of the first of ScoreShards' members that rules the row out.
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
        """Signed discrepancy (n,) in [-1, 1], as ScoreTable gives it; NaN where a modality is missing."""
        return discrepancy_between(self.confidence, self.modalities, between)

    @property
    def gap(self) -> Floats:
        """Modality gap (n,) in [0, 1]."""
        return gap(self.confidence)

    def numbers(self, name: str) -> Floats | None:
        """Give a column of numbers (n,), null as NaN; None where the table has no such column."""
        return float_column(self.table, name) if name in self.table.column_names else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreFiles:
    """A score table that is read in passes. classes and class_names are in the order of Rows.label.

    `paths` are the columns of file names of the source, `provenance` is what stands in the metadata of the table.
    """

    parts: tuple[ScoreFile, ...]
    modalities: tuple[str, ...]
    columns: tuple[str, ...]
    num_rows: int
    classes: pa.Array
    class_names: tuple[str, ...]
    splits: tuple[str, ...]
    coded: tuple[str, ...]  # columns of which label and split, and the names here, say all
    paths: tuple[str, ...]
    provenance: dict[str, Any]
    seed: int
    members: tuple[ManifestMembers, ...] = ()  # the manifests that rows must, or must not, be in
    assign: Callable[[ScoreBatch], NDArray[np.int16]] | None = (
        None  # other splits than the table's, as places in `splits`
    )

    def batches(self, *, all_columns: bool = False, ordered: bool = True) -> Iterator[ScoreBatch]:
        """Read all rows once, while others are being worked on; unless `ordered`, two parts at a time as they come.

        Only columns that decide something are read; `all_columns`: all that a manifest has, of rows that were read before.
        Raises ScoreError for values that are null or out of range; the first of them is named.
        """
        if ordered or len(self.parts) == 1:
            return prefetch(self._read_batches(self.parts, all_columns=all_columns))
        return prefetch(
            self._read_batches(self.parts[::2], all_columns=all_columns),
            self._read_batches(self.parts[1::2], all_columns=all_columns),
        )

    def _read_batches(self, parts: Sequence[ScoreFile], *, all_columns: bool) -> Iterator[ScoreBatch]:
        needless = {"label_name"} & set(self.coded) if all_columns else {*self.paths, *_ONLY_WRITTEN}
        columns = [name for name in self.columns if name not in needless]
        if "label" not in columns:
            columns.append("label_name")
        for part in parts:
            for table in read_tables(part, dict.fromkeys(columns), dictionary=_CODED):
                if not all_columns:
                    _check_rows(table, self.modalities, part)
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
        found = np.zeros(len(key), dtype=np.int8)
        for number, members in enumerate(self.members, start=1):
            found[(found == 0) & ~members.admits(key)] = number
        return found

    def non_test_mask(self, batch: ScoreBatch) -> NDArray[np.bool_]:
        """Tell which rows (n,) may choose: those not barred, and of the test split only if there is no other."""
        test = self.splits.index("test") if "test" in self.splits and len(self.splits) > 1 else -1
        return np.asarray((batch.split != test) & (batch.excluded_by == 0))

    def default_between(self) -> str:
        """Give `A:B` for two modalities; of more the most confident one outside the test split, against the rest."""
        if len(self.modalities) == 2:
            return ":".join(self.modalities)
        total, number = np.zeros(len(self.modalities)), np.zeros(len(self.modalities))
        for batch in self.batches():
            some = batch.confidence[self.non_test_mask(batch)]
            total += np.where(np.isnan(some), 0, some).sum(axis=0, dtype=np.float64)
            number += (~np.isnan(some)).sum(axis=0)
        return self.modalities[int(np.argmax(total / np.maximum(number, 1)))]


def open_scores(source: str | Path | Sequence[str | Path] | ScoreTable, *, seed: int) -> ScoreFiles:
    """Open a score table: a file, a folder of Parquet shards, a glob, several files, or a ScoreTable.

    Raises ScoreError where a file is no score table, or the shards have different columns.
    """
    parts: list[ScoreFile] = [source.to_arrow()] if isinstance(source, ScoreTable) else find_score_files(source)
    schemas = [read_score_schema(part) for part in parts]
    for part, schema in zip(parts, schemas, strict=True):
        check_schema(schema, part)
    columns = tuple(schemas[0].names)
    for part, schema in zip(parts, schemas, strict=True):
        if set(schema.names) != set(columns):
            odd = sorted(set(schema.names) ^ set(columns))[0]
            raise ScoreError(f"{part} and {parts[0]} are no shards of one table: only one of them has {odd}")
    modalities = score_modalities(columns, where=str(parts[0]) if isinstance(parts[0], Path) else "the table")
    if isinstance(source, ScoreTable):
        provenance: dict[str, Any] = {**source.provenance}
        paths = () if source.paths is None else tuple(source.paths.column_names)
    else:
        provenance = parse_provenance(
            schemas[0].metadata or {}, error=ScoreError, where=str(parts[0]), shape=PROVENANCE
        )
        paths = tuple(name for name in provenance.pop("paths", []) if name in columns)
    for part, schema in zip(parts, schemas, strict=True):
        check_score_schema(schema, where=display_name(part), paths=paths)
    found = survey_table(parts, columns)
    if found.num_rows == 0:
        raise ScoreError("the score table holds no rows")
    return ScoreFiles(
        parts=sort_by_first_id(parts),
        modalities=modalities,
        columns=tuple(
            name
            for name in columns
            if name not in found.empty and (name in _USED or name in paths or name.startswith("confidence_"))
        ),
        coded=tuple(each for each, known in (("label_name", found.named), ("split", found.all_split)) if known),
        num_rows=found.num_rows,
        classes=found.classes,
        class_names=found.class_names,
        splits=found.splits,
        paths=paths,
        provenance=provenance,
        seed=seed,
    )


def hash_keys(ids: pa.ChunkedArray, *, seed: int) -> NDArray[np.uint64]:
    """Give hash(seed, id) of each row, (n,): the chance by which rows are chosen."""
    try:
        return hash_ids(decode_dictionary(ids.combine_chunks()), seed=seed, purpose="split")
    except pa.ArrowException as cause:
        raise ScoreError(f"column sample_id does not hold text: {str(cause).splitlines()[0]}") from cause


def _check_rows(table: pa.Table, modalities: Sequence[str], part: ScoreFile) -> None:
    where = display_name(part)
    check_no_nulls(table, ["sample_id", label_column(table)], part)
    there = np.zeros(len(table), dtype=np.int16)
    for name in modalities:
        there += _check_range(table, f"confidence_{name}", 0.0, where)
    if (there < 2).any():
        raise ScoreError(
            f"{where}: sample {_first_id(table, there < 2)} has fewer than two values of confidence, and so no discrepancy"
        )
    for name, low in LOWER_BOUNDS.items():
        if name in table.column_names:
            _check_range(table, name, low, where)


def _check_range(table: pa.Table, name: str, low: float, where: object) -> NDArray[np.bool_]:
    """Tell which rows (n,) have a value; a NaN is out of range as any wrong number is, only a null is missing."""
    values = float_column(table, name)
    there = pc.is_valid(table[name].combine_chunks()).to_numpy(zero_copy_only=False)
    wrong = there & ~((values >= low - _SLACK) & (values <= 1 + _SLACK))
    if wrong.any():
        raise ScoreError(
            f"{where}: {name} of sample {_first_id(table, wrong)} is {values[wrong][0]:g}, outside [{low:g}, 1]: "
            "rescore, or mend the table"
        )
    return np.asarray(there)


def _first_id(table: pa.Table, which: NDArray[np.bool_]) -> str:
    return str(table["sample_id"][int(np.argmax(which))].as_py())


def check_same_dataset(mine: dict[str, Any], other: dict[str, Any], *, name: str) -> None:
    """Raise ManifestError where two provenances tell of different datasets."""
    here, there = mine.get("fingerprint"), other.get("fingerprint")
    if here is not None and there is not None and here != there:
        raise ManifestError(f"{name} was made from another dataset than these scores: make it from the same")
