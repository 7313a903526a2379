"""Score tables, however large: which rows are there, checked, a batch at a time?

A table is a file, a folder or glob of shards, or a ScoreTable in memory. Shards are read in an order that depends on
what they hold, neither on their names nor on the order in which they were named.
"""

from __future__ import annotations

import glob
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
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
_MOST_LABELS = 1 << 16
NO_SPLIT = "all"  # what the only split is called where there are none
_RANGES = {"balance": -1.0, "p_balanced": 0.0}  # the least of each; the largest is 1
_ONLY_WRITTEN = ("label_name", "content")
_CODED = ("split", "label_name")  # what few values repeat in
_USED = ("sample_id", "label", "split", "group", *_ONLY_WRITTEN, *_RANGES)
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
    coded: tuple[str, ...]  # columns of which label and split, and the names here, say all
    paths: tuple[str, ...]
    provenance: dict[str, Any]
    seed: int
    members: tuple[Members, ...] = ()  # the manifests that rows must, or must not, be in
    assign: Callable[[Rows], NDArray[np.int16]] | None = None  # other splits than the table's, as places in `splits`

    def rows(self, *, whole: bool = False) -> Iterator[Rows]:
        """Read all rows once, in their order, while others are being worked on.

        Only columns that decide something are read; `whole`: all that a manifest has, of rows that were read before.
        Raises ScoreError for values that are null or out of range; the first of them is named.
        """
        return prefetched(self._rows(whole=whole))

    def _rows(self, *, whole: bool) -> Iterator[Rows]:
        needless = {"label_name"} & set(self.coded) if whole else {*self.paths, *_ONLY_WRITTEN}
        columns = [name for name in self.columns if name not in needless]
        if "label" not in columns:
            columns.append("label_name")
        for part in self.parts:
            for table in _batches(part, dict.fromkeys(columns), dictionary=_CODED):
                if not whole:
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
    for part, schema in zip(parts, schemas, strict=True):
        _check_schema(schema, part)
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


def keys_of(ids: pa.ChunkedArray, *, seed: int) -> NDArray[np.uint64]:
    """Give hash(seed, id) of each row, (n,): the chance by which rows are chosen."""
    try:
        return hash_ids(_plain(ids.combine_chunks()), seed=seed, purpose="split")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as cause:
        raise ScoreError(f"column sample_id does not hold text: {str(cause).splitlines()[0]}") from cause


def prefetched(items: Iterable[Item], *, depth: int = 1) -> Iterator[Item]:
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


def _check_schema(schema: pa.Schema, part: Part) -> None:
    where = part if isinstance(part, Path) else "the score table"
    for name in schema.names:
        if len(places := schema.get_all_field_indices(name)) > 1:
            raise ScoreError(f"{where} has {len(places)} columns {name}: name each once")
        type_ = schema.field(name).type
        if name in ("sample_id", "label", "label_name", "split") and pa.types.is_nested(type_):
            raise ScoreError(f"{where}: column {name} holds {type_}; it takes one text or number a row")


def _batches(part: Part, columns: Iterable[str], *, dictionary: Sequence[str] = ()) -> Iterator[pa.Table]:
    """Read a part in batches; of a file no more than that is held."""
    names = list(columns)
    if isinstance(part, pa.Table):
        for first in range(0, len(part), BATCH_ROWS):
            yield part.select(names).slice(first, BATCH_ROWS)
        return
    try:
        coded = [name for name in dictionary if name in names]
        with pq.ParquetFile(part, pre_buffer=False, read_dictionary=coded) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=names):
                yield pa.Table.from_batches([batch]).select(names)
    except (pa.ArrowInvalid, OSError) as cause:
        raise ScoreError(f"{part} cannot be read as Parquet: {str(cause).splitlines()[0]}") from cause


@dataclass(frozen=True, slots=True, kw_only=True)
class _Survey:
    num_rows: int
    classes: pa.Array
    class_names: tuple[str, ...]
    splits: tuple[str, ...]
    empty: frozenset[str]  # columns of numbers that are null throughout
    named: bool  # each class has one name
    all_split: bool  # each row has a split


def _survey(parts: Sequence[Part], columns: Sequence[str]) -> _Survey:
    """Count the rows, and find which labels and splits there are: two parts at a time."""
    names = [name for name in ("label", "label_name", "split") if name in columns]
    with ThreadPoolExecutor(2) as threads:
        looked = list(threads.map(partial(_look, names=names), parts))
    called: dict[Any, set[str]] = {}
    for label, name in sorted({pair for pairs, _, _ in looked for pair in pairs}, key=str):
        called.setdefault(label, set()).add(name)
    splits = {each for _, found, _ in looked for each in found}
    numbers = {name for name in _RANGES if name in columns}
    classes = _sorted(called)
    return _Survey(
        num_rows=sum(number for _, _, number in looked),
        classes=pa.array(classes),
        class_names=tuple(min(called[one]) for one in classes),
        splits=tuple(sorted({NO_SPLIT if one is None else str(one) for one in splits})) or (NO_SPLIT,),
        empty=frozenset(numbers - {name for part in parts for name in _not_empty(part, numbers)}),
        named=all(len(each) == 1 and "" not in each for each in called.values()),
        all_split=None not in splits,
    )


def _look(part: Part, *, names: Sequence[str]) -> tuple[set[tuple[Any, str]], set[str | None], int]:
    """Give the labels of a part with their names, its splits, and its number of rows."""
    pairs: set[tuple[Any, str]] = set()
    splits: set[str | None] = set()
    number = 0
    for table in _batches(part, names, dictionary=names):
        number += len(table)
        _no_nulls(table, [_label_column(table)], part)
        if "split" in names:
            splits |= set(pc.unique(table["split"]).to_pylist())
        pairs |= set(_pairs(table))
    return pairs, splits, number


def _sorted(labels: Iterable[Any]) -> list[Any]:
    """Sort labels; ScoreError for those of two kinds, and for numbers that a manifest has no room for."""
    kinds = sorted({type(one).__name__ for one in labels})
    if len(kinds) > 1:
        raise ScoreError(f"column label is {' in one shard and '.join(kinds)} in another: write all labels alike")
    found = sorted(labels)
    if kinds == ["int"] and (wrong := [one for one in (found[0], found[-1]) if not -(2**31) <= one < 2**31]):
        raise ScoreError(f"label {wrong[0]} has more than 32 bits: number the classes anew, or give label_name alone")
    return found


def _pairs(table: pa.Table) -> list[tuple[Any, str]]:
    """Give each label of a table with each name it has."""
    label, name = (_coded(column) for column in (_label(table), table[_name_column(table)]))
    codes = label.indices.to_numpy().astype(np.int64) * (len(name.dictionary) + 1)
    codes += name.indices.fill_null(len(name.dictionary)).to_numpy()
    labels, names = label.dictionary.to_pylist(), [*map(str, name.dictionary.to_pylist()), ""]
    return [
        (labels[code // len(names)], names[code % len(names)]) for code in np.flatnonzero(np.bincount(codes)).tolist()
    ]


def _coded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """Give a column as codes of the values it has."""
    coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    return coded.unify_dictionaries().combine_chunks()


def _not_empty(part: Part, names: set[str]) -> set[str]:
    """Tell which of these columns hold anything; by the statistics of a file, and if it has none by what they hold."""
    if isinstance(part, pa.Table):
        return {name for name in names if part[name].null_count < len(part)}
    about = pq.read_metadata(part)
    found: set[str] = set()
    unknown: set[str] = set()
    for group in range(about.num_row_groups):
        rows = about.row_group(group)
        for column in range(rows.num_columns):
            chunk = rows.column(column)
            if chunk.path_in_schema in names:
                known = chunk.statistics is not None and chunk.statistics.has_null_count
                if not known:
                    unknown.add(chunk.path_in_schema)
                elif chunk.statistics.null_count < rows.num_rows:
                    found.add(chunk.path_in_schema)
    for table in _batches(part, unknown - found) if unknown - found else ():
        found |= {name for name in table.column_names if table[name].null_count < len(table)}
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
    _no_nulls(table, ["sample_id", _label_column(table)], part)
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


def _no_nulls(table: pa.Table, names: Sequence[str], part: Part) -> None:
    where = part if isinstance(part, Path) else "the score table"
    for name in names:
        if table[name].null_count:
            raise ScoreError(f"{where}: column {name} holds nulls; every scored sample has an id and a label")


def _label_column(table: pa.Table) -> str:
    return "label" if "label" in table.column_names else "label_name"


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


def _name_column(table: pa.Table) -> str:
    return "label_name" if "label_name" in table.column_names else "label"


def _places(column: pa.ChunkedArray, among: pa.Array, dtype: type[np.signedinteger[Any]]) -> NDArray[Any]:
    if (
        pa.types.is_integer(among.type)
        and len(among)
        and (least := among[0].as_py()) >= 0
        and ((size := among[-1].as_py() - least + 1) <= _MOST_LABELS)
    ):
        table = np.zeros(size, dtype=dtype)  # a table of small numbers is ten times as quick
        table[among.to_numpy() - least] = np.arange(len(among))
        return np.asarray(table[column.to_numpy() - least])
    column = _plain(column)
    found = pc.index_in(column, value_set=among.cast(column.type))
    return np.asarray(found.to_numpy().astype(dtype))


def _splits(table: pa.Table, splits: Sequence[str]) -> NDArray[np.int16]:
    if "split" not in table.column_names:
        return np.zeros(len(table), dtype=np.int16)
    coded = _coded(table["split"])
    among = {name: place for place, name in enumerate(splits)}
    names = [NO_SPLIT if each is None else str(each) for each in coded.dictionary.to_pylist()]
    place = np.array([*(among[name] for name in names), among.get(NO_SPLIT, 0)], np.int16)
    return np.asarray(place[coded.indices.fill_null(len(place) - 1).to_numpy()])


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
