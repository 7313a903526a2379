"""Score tables, however large: which rows are there, checked, a batch at a time?

A table is a file, a folder or glob of shards, or a ScoreTable in memory. Shards are read in an order that depends on
what they hold, neither on their names nor on the order in which they were named.
"""

from __future__ import annotations

import glob
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..audit.errors import ManifestError, ScoreError
from ..audit.hashing import hash_ids
from ..audit.measures import Floats, gap
from ..audit.parquet import parse_provenance
from ..audit.score import ScoreTable, discrepancy_between, score_modalities

BATCH_ROWS = 131_072
NO_SPLIT = "all"  # what the only split is called where there are none
_RANGES = {"similarity": -1.0, "balance": -1.0, "p_balanced": 0.0}  # the least of each; the largest is 1
_SLACK = 1e-6

Part: TypeAlias = "Path | pa.Table"
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
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
class Rows:
    """Some rows (n,) of a score table. label and split are places in ScoreShards' classes and splits.

    key (n,) is hash(seed, id): the chance by which rows are chosen. confidence (n, m) is NaN where a modality is
    missing. barred (n,) is 0, or the number, from 1, of the first of ScoreShards' members that rules the row out.
    """

    table: pa.Table
    key: NDArray[np.uint64]
    label: NDArray[np.int32]
    split: NDArray[np.int16]
    confidence: Floats
    barred: NDArray[np.int8]
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
        return _floats(self.table, name) if name in self.table.column_names else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreShards:
    """A score table that is read in passes. classes and class_names are in the order of Rows.label.

    `paths` are the columns of file names of the source, `provenance` is what stands in the metadata of the table.
    """

    parts: tuple[Part, ...]
    modalities: tuple[str, ...]
    columns: tuple[str, ...]
    num_rows: int
    classes: pa.Array
    class_names: tuple[str, ...]
    splits: tuple[str, ...]
    paths: tuple[str, ...]
    provenance: dict[str, Any]
    seed: int
    members: tuple[Members, ...] = ()  # the manifests that rows must, or must not, be in
    assign: Callable[[Rows], NDArray[np.int16]] | None = None  # other splits than the table's, as places in `splits`

    def rows(self) -> Iterator[Rows]:
        """Read all rows once, in their order, while others are being worked on.

        Raises ScoreError for values that are null or out of range; the first of them is named.
        """
        return prefetched(self._rows())

    def _rows(self) -> Iterator[Rows]:
        for part in self.parts:
            for table in _batches(part, self.columns):
                _check(table, self.modalities, part)
                key = keys_of(table["sample_id"], seed=self.seed)
                rows = Rows(
                    table=table,
                    key=key,
                    label=_places(_label(table), self.classes, np.int32),
                    split=_splits(table, self.splits),
                    confidence=np.stack([_floats(table, f"confidence_{name}") for name in self.modalities], axis=1),
                    barred=self._barred(key),
                    modalities=self.modalities,
                )
                yield rows if self.assign is None else replace(rows, split=self.assign(rows))

    def _barred(self, key: NDArray[np.uint64]) -> NDArray[np.int8]:
        found = np.zeros(len(key), dtype=np.int8)
        for number, members in enumerate(self.members, start=1):
            found[(found == 0) & ~members.admits(key)] = number
        return found

    def chooses(self, rows: Rows) -> NDArray[np.bool_]:
        """Tell which rows (n,) may choose: those not barred, and of the test split only if there is no other."""
        test = self.splits.index("test") if "test" in self.splits and len(self.splits) > 1 else -1
        return np.asarray((rows.split != test) & (rows.barred == 0))

    def default_between(self) -> str:
        """Give `A:B` for two modalities; of more the most confident one outside the test split, against the rest."""
        if len(self.modalities) == 2:
            return ":".join(self.modalities)
        total, number = np.zeros(len(self.modalities)), np.zeros(len(self.modalities))
        for rows in self.rows():
            some = rows.confidence[self.chooses(rows)]
            total += np.where(np.isnan(some), 0, some).sum(axis=0, dtype=np.float64)
            number += (~np.isnan(some)).sum(axis=0)
        return self.modalities[int(np.argmax(total / np.maximum(number, 1)))]


def open_scores(source: str | Path | Sequence[str | Path] | ScoreTable, *, seed: int) -> ScoreShards:
    """Open a score table: a file, a folder of Parquet shards, a glob, several files, or a ScoreTable.

    Raises ScoreError where a file is no score table, or the shards have different columns.
    """
    parts: list[Part] = [source.to_arrow()] if isinstance(source, ScoreTable) else _files(source)
    schemas = [_schema(part) for part in parts]
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
        provenance = parse_provenance(schemas[0].metadata or {}, error=ScoreError, where=str(parts[0]))
        paths = tuple(name for name in provenance.pop("paths", []) if name in columns)
    found = _survey(parts, columns)
    if found.num_rows == 0:
        raise ScoreError("the score table holds no rows")
    return ScoreShards(
        parts=_in_order(parts),
        modalities=modalities,
        columns=tuple(name for name in columns if name not in found.empty),
        num_rows=found.num_rows,
        classes=found.classes,
        class_names=found.class_names,
        splits=found.splits,
        paths=paths,
        provenance=provenance,
        seed=seed,
    )


def keys_of(ids: pa.ChunkedArray, *, seed: int) -> NDArray[np.uint64]:
    """Give hash(seed, id) of each row, (n,): the chance by which rows are chosen."""
    return hash_ids(_plain(ids.combine_chunks()), seed=seed, purpose="split")


def prefetched(items: Iterable[Item], *, depth: int = 2) -> Iterator[Item]:
    """Let a thread work ahead by a few items: reading then goes on while what was read is worked on."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def offer(entry: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for item in items:
                offer((True, item))
                if stopped.is_set():
                    return
            offer((False, None))
        except BaseException as error:
            offer((False, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            more, item = ready.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stopped.set()


def _files(source: str | Path | Sequence[str | Path]) -> list[Part]:
    named = [source] if isinstance(source, (str, Path)) else list(source)
    found: list[Part] = []
    for each in named:
        path = Path(each)
        if path.is_dir():
            some = sorted(one for one in path.glob("*.parquet") if one.name[0] != ".")
        else:
            some = [path] if path.exists() else sorted(Path(one) for one in glob.glob(str(each), recursive=True))
        if not some:
            raise ScoreError(f"no score table {each}: name a Parquet file, a folder of them or a glob")
        found += some
    return list(dict.fromkeys(found))


def _schema(part: Part) -> pa.Schema:
    if isinstance(part, pa.Table):
        return part.schema
    try:
        return pq.read_schema(part)
    except (pa.ArrowInvalid, OSError) as cause:
        raise ScoreError(f"{part} cannot be read as Parquet: {str(cause).splitlines()[0]}") from cause


def _batches(part: Part, columns: Sequence[str], *, dictionary: Sequence[str] = ()) -> Iterator[pa.Table]:
    """Read a part in batches; of a file no more than that is held."""
    if isinstance(part, pa.Table):
        for first in range(0, len(part), BATCH_ROWS):
            yield part.select(list(columns)).slice(first, BATCH_ROWS)
        return
    try:
        with pq.ParquetFile(part, pre_buffer=False, read_dictionary=list(dictionary)) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
                yield pa.Table.from_batches([batch]).select(list(columns))
    except (pa.ArrowInvalid, OSError) as cause:
        raise ScoreError(f"{part} cannot be read as Parquet: {str(cause).splitlines()[0]}") from cause


@dataclass(frozen=True, slots=True, kw_only=True)
class _Survey:
    num_rows: int
    classes: pa.Array
    class_names: tuple[str, ...]
    splits: tuple[str, ...]
    empty: frozenset[str]  # columns of numbers that are null throughout


def _survey(parts: Sequence[Part], columns: Sequence[str]) -> _Survey:
    """Count the rows, and find which labels and splits there are."""
    names = [name for name in ("label", "label_name", "split") if name in columns]
    empty = {name for name in _RANGES if name in columns}
    number = 0
    called: dict[Any, str] = {}
    splits: set[str | None] = set()
    for part in parts:
        empty -= _not_empty(part, empty)
        for table in _batches(part, names, dictionary=names):
            number += len(table)
            if "split" in names:
                splits |= set(pc.unique(_plain(table["split"])).to_pylist())
            for label, name in _pairs(table):
                called[label] = min(called.get(label, name), name)
    classes = sorted(called)
    return _Survey(
        num_rows=number,
        classes=pa.array(classes),
        class_names=tuple(called[one] for one in classes),
        splits=tuple(sorted(NO_SPLIT if one is None else str(one) for one in splits)) or (NO_SPLIT,),
        empty=frozenset(empty),
    )


def _pairs(table: pa.Table) -> list[tuple[Any, str]]:
    """Give each label of a table with each name it has."""
    pairs = pa.table({"label": _label(table), "name": _label_name(table)})
    found = pairs.group_by(["label", "name"], use_threads=False).aggregate([])
    return list(zip(found["label"].to_pylist(), found["name"].to_pylist(), strict=True))


def _not_empty(part: Part, names: set[str]) -> set[str]:
    """Tell which of these columns hold anything; by the statistics of a file, and if it has none they do."""
    if isinstance(part, pa.Table):
        return {name for name in names if part[name].null_count < len(part)}
    about = pq.read_metadata(part)
    found = set()
    for group in range(about.num_row_groups):
        rows = about.row_group(group)
        for column in range(rows.num_columns):
            chunk = rows.column(column)
            if chunk.path_in_schema in names:
                known = chunk.statistics is not None and chunk.statistics.has_null_count
                if not known or chunk.statistics.null_count < rows.num_rows:
                    found.add(chunk.path_in_schema)
    return found


def _in_order(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Order the parts by the first id of each, and leave out those without rows."""
    first = {}
    for place, part in enumerate(parts):
        if isinstance(part, pa.Table):
            return tuple(parts)
        with pq.ParquetFile(part, pre_buffer=False) as file:
            batch = next(file.iter_batches(1, columns=["sample_id"]), None)
        if batch is not None and len(batch):
            first[place] = str(batch.column(0)[0].as_py())
    return tuple(parts[place] for place in sorted(first, key=lambda place: (first[place], str(parts[place]))))


def _check(table: pa.Table, modalities: Sequence[str], part: Part) -> None:
    where = part if isinstance(part, Path) else "the score table"
    for name in ("sample_id", "label" if "label" in table.column_names else "label_name"):
        if table[name].null_count:
            raise ScoreError(f"{where}: column {name} holds nulls; every scored sample has an id and a label")
    there = np.zeros(len(table), dtype=np.int16)
    for name in modalities:
        there += _check_range(table, f"confidence_{name}", 0.0, where)
    if (there < 2).any():
        raise ScoreError(
            f"{where}: sample {_id(table, there < 2)} has fewer than two values of confidence, and so no discrepancy"
        )
    for name, low in _RANGES.items():
        if name in table.column_names:
            _check_range(table, name, low, where)


def _check_range(table: pa.Table, name: str, low: float, where: object) -> NDArray[np.bool_]:
    """Tell which rows (n,) have a value; a NaN is out of range as any wrong number is, only a null is missing."""
    values = _floats(table, name)
    there = pc.is_valid(table[name].combine_chunks()).to_numpy(zero_copy_only=False)
    wrong = there & ~((values >= low - _SLACK) & (values <= 1 + _SLACK))
    if wrong.any():
        raise ScoreError(
            f"{where}: {name} of sample {_id(table, wrong)} is {values[wrong][0]:g}, outside [{low:g}, 1]: "
            "rescore, or mend the table"
        )
    return np.asarray(there)


def _id(table: pa.Table, which: NDArray[np.bool_]) -> str:
    return str(table["sample_id"][int(np.argmax(which))].as_py())


def _plain(column: Any) -> Any:
    """Give a column as strings or numbers, not as a dictionary of them."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _label(table: pa.Table) -> Any:
    """Give what tells classes apart: the numbers, or the names where the table has no numbers."""
    if "label" not in table.column_names:
        return _plain(table["label_name"])
    label = _plain(table["label"])
    if pa.types.is_floating(label.type):
        try:
            return label.cast(pa.int64())
        except pa.ArrowInvalid as cause:
            raise ScoreError(f"column label does not hold classes: {str(cause).splitlines()[0]}") from cause
    return label


def _label_name(table: pa.Table) -> Any:
    name = "label_name" if "label_name" in table.column_names else "label"
    return pc.fill_null(_plain(table[name]).cast(pa.string()), "")


def _places(column: pa.ChunkedArray, among: pa.Array, dtype: type[np.signedinteger[Any]]) -> NDArray[Any]:
    found = pc.index_in(column, value_set=among.cast(column.type))
    return np.asarray(found.to_numpy().astype(dtype))


def _splits(table: pa.Table, splits: Sequence[str]) -> NDArray[np.int16]:
    if "split" not in table.column_names:
        return np.zeros(len(table), dtype=np.int16)
    named = pc.fill_null(_plain(table["split"]).cast(pa.string()), NO_SPLIT)
    return _places(named, pa.array(list(splits), pa.string()), np.int16)


def _floats(table: pa.Table, name: str) -> Floats:
    try:
        column = table[name].cast(pa.float32(), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as cause:
        raise ScoreError(f"column {name} does not hold numbers: {str(cause).splitlines()[0]}") from cause
    return np.asarray(column.to_numpy(), dtype=np.float32)


def same_dataset(mine: dict[str, Any], other: dict[str, Any], *, name: str) -> None:
    """Raise ManifestError where two provenances tell of different datasets."""
    here, there = mine.get("fingerprint"), other.get("fingerprint")
    if here is not None and there is not None and here != there:
        raise ManifestError(f"{name} was made from another dataset than these scores: make it from the same")
