"""Files of a score table: their columns, and reading in batches."""

from __future__ import annotations

import glob
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..audit.errors import ScoreError
from ..audit.metrics import Floats
from ..audit.parquet import read_batches, read_schema
from ..audit.storage import check_regular

BATCH_ROWS = 131_072

ScoreFile: TypeAlias = "Path | pa.Table"
Item = TypeVar("Item")


def find_score_files(source: str | Path | Sequence[str | Path]) -> list[ScoreFile]:
    """Give the files that are named, each once; ScoreError where a name leads to none."""
    named = [source] if isinstance(source, (str, Path)) else list(source)
    found: list[ScoreFile] = []
    for each in named:
        path = Path(each)
        if path.is_dir():
            some = sorted(one for one in path.glob("*.parquet") if one.name[0] != ".")
        else:
            some = [path] if path.exists() else sorted(Path(one) for one in glob.glob(str(each), recursive=True))
        if not some:
            raise ScoreError(f"no score table {each}: name a Parquet file, a folder of them or a glob")
        for path in some:
            _check_regular(path)
        found += some
    return list(dict.fromkeys(found))


def _check_regular(path: Path) -> None:
    try:
        check_regular(path)
    except OSError as error:
        raise ScoreError(f"the score table {path} cannot be read: {error.strerror}") from error


def read_score_schema(part: ScoreFile) -> pa.Schema:
    """Read the schema of a part; ScoreError where it is no Parquet."""
    return part.schema if isinstance(part, pa.Table) else read_schema(part, error=ScoreError)


def display_name(part: ScoreFile) -> str:
    """Say what an error calls a part."""
    return str(part) if isinstance(part, Path) else "the score table"


def check_schema(schema: pa.Schema, part: ScoreFile) -> None:
    """Raise ScoreError for columns that stand twice."""
    where = display_name(part)
    for name in schema.names:
        if len(places := schema.get_all_field_indices(name)) > 1:
            raise ScoreError(f"{where} has {len(places)} columns {name}: name each once")


def read_tables(part: ScoreFile, columns: Iterable[str], *, dictionary: Sequence[str] = ()) -> Iterator[pa.Table]:
    """Read a part in batches; of a file no more than that is held."""
    names = list(columns)
    if isinstance(part, pa.Table):
        for first in range(0, len(part), BATCH_ROWS):
            yield part.select(names).slice(first, BATCH_ROWS)
        return
    coded = [name for name in dictionary if name in names]
    for table in read_batches(part, error=ScoreError, rows=BATCH_ROWS, columns=names, dictionary=coded):
        yield table.select(names)


def sort_by_first_id(parts: Sequence[ScoreFile]) -> tuple[ScoreFile, ...]:
    """Order the parts by the first id of each, and leave out those without rows."""
    first = {}
    for place, part in enumerate(parts):
        if isinstance(part, pa.Table):
            return tuple(parts)
        with closing(read_batches(part, error=ScoreError, rows=1, columns=["sample_id"])) as batches:
            batch = next(batches, None)
        if batch is not None and len(batch):
            first[place] = str(batch["sample_id"][0].as_py())
    return tuple(parts[place] for place in sorted(first, key=lambda place: (first[place], str(parts[place]))))


def prefetch(*sources: Iterable[Item], depth: int = 1) -> Iterator[Item]:
    """Let a thread for each source work ahead: reading then goes on while what was read is worked on.

    The items of one source come in its order; those of several as they are ready.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth * len(sources))
    stopped = threading.Event()

    def offer(entry: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return

    def work(items: Iterable[Item]) -> None:
        try:
            for item in items:
                offer((True, item))
                if stopped.is_set():
                    return
            offer((False, None))
        except BaseException as error:
            offer((False, error))

    for source in sources:
        threading.Thread(target=work, args=(source,), daemon=True).start()
    going = len(sources)
    try:
        while going:
            more, item = ready.get()
            if more:
                yield item
            elif item is None:
                going -= 1
            else:
                raise item
    finally:
        stopped.set()


NO_SPLIT = "all"  # what the only split is called where there are none
LOWER_BOUNDS = {"balance": -1.0, "p_balanced": 0.0}  # the least of each; the largest is 1
_MAX_LOOKUP_SIZE = 1 << 16


def label_column(table: pa.Table) -> str:
    """Name the column that tells classes apart."""
    return "label" if "label" in table.column_names else "label_name"


def name_column(table: pa.Table) -> str:
    """Name the column that classes are called by."""
    return "label_name" if "label_name" in table.column_names else "label"


def class_values(table: pa.Table) -> Any:
    """Give what tells classes apart: the numbers, or the names where the table has no numbers."""
    if "label" not in table.column_names:
        return decode_dictionary(table["label_name"])
    label = decode_dictionary(table["label"])
    if pa.types.is_floating(label.type):
        try:
            return label.cast(pa.int64())
        except pa.ArrowException as cause:
            raise ScoreError(f"column label does not hold classes: {str(cause).splitlines()[0]}") from cause
    return label


def decode_dictionary(column: Any) -> Any:
    """Give a column as strings or numbers, not as a dictionary of them."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def encode_dictionary(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """Give a column as codes of the values it has."""
    coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    return coded.unify_dictionaries().combine_chunks()


def indices_among(column: pa.ChunkedArray, among: pa.Array, dtype: type[np.signedinteger[Any]]) -> NDArray[Any]:
    """Give the place among sorted values of each row's, (n,); each is there."""
    if (
        pa.types.is_integer(among.type)
        and len(among)
        and (least := among[0].as_py()) >= 0
        and ((size := among[-1].as_py() - least + 1) <= _MAX_LOOKUP_SIZE)
    ):
        table = np.zeros(size, dtype=dtype)  # a table of small numbers is ten times as quick
        table[among.to_numpy() - least] = np.arange(len(among))
        return np.asarray(table[column.to_numpy() - least])
    column = decode_dictionary(column)
    found = pc.index_in(column, value_set=among.cast(column.type))
    return np.asarray(found.to_numpy().astype(dtype))


def split_indices(table: pa.Table, splits: Sequence[str] | None) -> NDArray[np.int16]:
    """Return the place among `splits` of each row's, (n,); a row of none is in NO_SPLIT. None: they are made anew."""
    if splits is None or "split" not in table.column_names:
        return np.zeros(len(table), dtype=np.int16)
    coded = encode_dictionary(table["split"])
    among = {name: place for place, name in enumerate(splits)}
    names = [NO_SPLIT if each is None else str(each) for each in coded.dictionary.to_pylist()]
    place = np.array([*(among[name] for name in names), among.get(NO_SPLIT, 0)], np.int16)
    return np.asarray(place[coded.indices.fill_null(len(place) - 1).to_numpy()])


def float_column(table: pa.Table, name: str) -> Floats:
    """Give a column of numbers (n,), null as NaN; ScoreError where it holds none."""
    try:
        column = table[name].cast(pa.float32(), safe=False)
    except pa.ArrowException as cause:
        raise ScoreError(f"column {name} does not hold numbers: {str(cause).splitlines()[0]}") from cause
    return np.asarray(column.to_numpy(), dtype=np.float32)


def check_no_nulls(table: pa.Table, names: Sequence[str], part: ScoreFile) -> None:
    """Raise ScoreError where one of these columns holds nulls."""
    where = display_name(part)
    for name in names:
        if table[name].null_count:
            raise ScoreError(f"{where}: column {name} holds nulls; every scored sample has an id and a label")
