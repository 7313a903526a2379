"""Files of a score table: their columns, reading them in batches, and a survey of their content."""

from __future__ import annotations

import glob
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..audit.errors import ScoreError
from ..audit.metrics import Floats
from ..audit.scores.table import check_splits
from ..audit.storage import check_regular, read_batches, read_footer, read_schema

BATCH_ROWS = 16_384  # ours: eight times as many take 50 MB more of a split, and as long; half as many 15% more CPU time
BUFFER_BYTES = 1 << 16  # of a column read at a time

ScoreFile: TypeAlias = "Path | pa.Table"
Item = TypeVar("Item")


def find_score_files(source: str | Path | Sequence[str | Path]) -> list[ScoreFile]:
    """Return the distinct files of paths, folders or globs; raises ScoreError if one matches no file."""
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    files: list[ScoreFile] = []
    for name in sources:
        path = Path(name)
        if path.is_dir():
            matches = sorted(file for file in path.glob("*.parquet") if file.name[0] != ".")
        else:
            matches = [path] if path.exists() else sorted(Path(file) for file in glob.glob(str(name), recursive=True))
        if not matches:
            raise ScoreError(f"score table {name} not found: pass a Parquet file, a folder of them or a glob")
        for path in matches:
            _check_regular(path)
        files += matches
    return list(dict.fromkeys(files))


def _check_regular(path: Path) -> None:
    try:
        check_regular(path)
    except OSError as error:
        raise ScoreError(f"the score table {path} cannot be read: {error.strerror}") from error


def read_score_schema(file: ScoreFile) -> pa.Schema:
    """Read the schema of a file; raises ScoreError if it is not Parquet, or repeats a column."""
    schema = file.schema if isinstance(file, pa.Table) else read_schema(file, error=ScoreError)
    for name in schema.names:
        if (count := len(schema.get_all_field_indices(name))) > 1:
            raise ScoreError(f"{display_name(file)} has {count} columns named {name}: column names must be unique")
    return schema


def display_name(file: ScoreFile) -> str:
    """Return the name of a file in error messages."""
    return str(file) if isinstance(file, Path) else "the score table"


def read_tables(
    file: ScoreFile, columns: Iterable[str], *, dictionary: Sequence[str] = (), rows: int | None = None
) -> Iterator[pa.Table]:
    """Read a file in batches of `rows`, by default BATCH_ROWS, with one batch in memory at a time."""
    names, rows = list(columns), BATCH_ROWS if rows is None else rows
    if isinstance(file, pa.Table):
        for start in range(0, len(file), rows):
            yield file.select(names).slice(start, rows)
        return
    dictionary_columns = [name for name in dictionary if name in names]
    for table in read_batches(
        file,
        error=ScoreError,
        rows=rows,
        columns=names,
        dictionary=dictionary_columns,
        buffer_bytes=BUFFER_BYTES,
    ):
        yield table.select(names)


def sort_by_first_id(files: Sequence[ScoreFile]) -> tuple[ScoreFile, ...]:
    """Sort the files by the first id of each, without empty ones."""
    first_ids = {}
    for index, file in enumerate(files):
        if isinstance(file, pa.Table):
            return tuple(files)
        with closing(read_batches(file, error=ScoreError, rows=1, columns=["sample_id"])) as batches:
            batch = next(batches, None)
        if batch is not None and len(batch):
            first_ids[index] = str(batch["sample_id"][0].as_py())
    return tuple(files[index] for index in sorted(first_ids, key=lambda index: (first_ids[index], str(files[index]))))


def prefetch(*sources: Iterable[Item], depth: int = 1) -> Iterator[Item]:
    """Iterate over sources with read-ahead, one thread per source, `depth` items of each ahead of the one in use.

    Items of one source are in its order; those of several come as they are ready.
    """
    ready: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    # An item is read only when it may be kept: a third batch of a split took 25 MB.
    free = threading.Semaphore(depth * len(sources))
    stopped = threading.Event()

    def work(source: Iterable[Item]) -> None:
        try:
            items = iter(source)
            while not stopped.is_set():
                if free.acquire(timeout=0.1):
                    ready.put((True, next(items)))
        except StopIteration:
            free.release()
            ready.put((False, None))
        except BaseException as error:
            ready.put((False, error))

    for source in sources:
        threading.Thread(target=work, args=(source,), daemon=True).start()
    num_running = len(sources)
    try:
        while num_running:
            has_item, item = ready.get()
            if has_item:
                free.release()
                yield item
            elif item is None:
                num_running -= 1
            else:
                raise item
    finally:
        stopped.set()


NO_SPLIT = "all"  # name of the only split of a table without splits
MEASURES = ("balance", "p_balanced")  # that rules use if a table has them
_MAX_LOOKUP_SIZE = 1 << 16


def label_column(table: pa.Table) -> str:
    """Return the name of the column that identifies classes."""
    return "label" if "label" in table.column_names else "label_name"


def name_column(table: pa.Table) -> str:
    """Return the name of the column of class names."""
    return "label_name" if "label_name" in table.column_names else "label"


def class_values(table: pa.Table) -> Any:
    """Return the column that identifies classes: label, or label_name if there is no label."""
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
    """Return a column as plain values, not as a dictionary."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def encode_dictionary(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """Return a column as dictionary codes."""
    coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    return coded.unify_dictionaries().combine_chunks()


def indices_among(column: pa.ChunkedArray, sorted_values: pa.Array, dtype: type[np.signedinteger[Any]]) -> NDArray[Any]:
    """Return the index of each row's value, (n,), in sorted values that contain all of them."""
    if (
        pa.types.is_integer(sorted_values.type)
        and len(sorted_values)
        and (smallest := sorted_values[0].as_py()) >= 0
        and ((size := sorted_values[-1].as_py() - smallest + 1) <= _MAX_LOOKUP_SIZE)
    ):
        lookup = np.zeros(size, dtype=dtype)  # a lookup table for small integers is ten times as fast
        lookup[sorted_values.to_numpy() - smallest] = np.arange(len(sorted_values))
        return np.asarray(lookup[column.to_numpy() - smallest])
    column = decode_dictionary(column)
    indices = pc.index_in(column, value_set=sorted_values.cast(column.type))
    return np.asarray(indices.to_numpy().astype(dtype))


def split_indices(table: pa.Table, splits: Sequence[str] | None) -> NDArray[np.int16]:
    """Return the index of each row's split, (n,); a null is NO_SPLIT. With splits None, all are 0."""
    if splits is None or "split" not in table.column_names:
        return np.zeros(len(table), dtype=np.int16)
    codes = encode_dictionary(table["split"])
    index_of_split = {name: index for index, name in enumerate(splits)}
    names = [NO_SPLIT if value is None else str(value) for value in codes.dictionary.to_pylist()]
    index_of_code = np.array([*(index_of_split[name] for name in names), index_of_split.get(NO_SPLIT, 0)], np.int16)
    return np.asarray(index_of_code[codes.indices.fill_null(len(index_of_code) - 1).to_numpy()])


def float_column(table: pa.Table, name: str) -> Floats:
    """Return a column of numbers (n,), null as NaN; raises ScoreError if it is not numeric."""
    try:
        column = table[name].cast(pa.float32(), safe=False)
    except pa.ArrowException as cause:
        raise ScoreError(f"column {name} does not hold numbers: {str(cause).splitlines()[0]}") from cause
    return np.asarray(column.to_numpy(), dtype=np.float32)


def check_no_nulls(table: pa.Table, names: Sequence[str], file: ScoreFile) -> None:
    """Raise ScoreError if one of these columns holds nulls."""
    where = display_name(file)
    for name in names:
        if table[name].null_count:
            raise ScoreError(f"{where}: column {name} holds nulls; every sample needs an id and a label")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSurvey:
    """Result of a pass over labels and splits; classes are sorted, class_names in the same order."""

    num_rows: int
    classes: pa.Array
    class_names: tuple[str, ...]
    splits: tuple[str, ...]
    empty_columns: frozenset[str]  # score columns without any value
    one_name_per_class: bool
    every_row_has_split: bool


def survey_table(files: Sequence[ScoreFile], columns: Sequence[str]) -> TableSurvey:
    """Count rows and collect labels and splits, two files at a time."""
    names = [name for name in ("label", "label_name", "split") if name in columns]
    with ThreadPoolExecutor(2) as threads:
        surveys = list(threads.map(partial(_survey_file, names=names), files))
    names_of_label: dict[Any, set[str]] = {}
    for label, name in sorted({pair for pairs, _, _ in surveys for pair in pairs}, key=str):
        names_of_label.setdefault(label, set()).add(name)
    splits = {split for _, file_splits, _ in surveys for split in file_splits}
    check_splits(splits)
    number_columns = {name for name in MEASURES if name in columns}
    classes = _sort_labels(names_of_label)
    _check_names(names_of_label)
    return TableSurvey(
        num_rows=sum(num_rows for _, _, num_rows in surveys),
        classes=pa.array(classes),
        class_names=tuple(min(names_of_label[label]) for label in classes),
        splits=tuple(sorted({NO_SPLIT if split is None else str(split) for split in splits})) or (NO_SPLIT,),
        empty_columns=frozenset(
            number_columns - {name for file in files for name in _non_empty_columns(file, number_columns)}
        ),
        one_name_per_class=all(
            len(class_names) == 1 and "" not in class_names for class_names in names_of_label.values()
        ),
        every_row_has_split=None not in splits,
    )


def _survey_file(file: ScoreFile, *, names: Sequence[str]) -> tuple[set[tuple[Any, str]], set[str | None], int]:
    """Return the (label, name) pairs of a file, its splits, and its number of rows."""
    pairs: set[tuple[Any, str]] = set()
    splits: set[str | None] = set()
    num_rows = 0
    for table in read_tables(file, names, dictionary=names):
        num_rows += len(table)
        check_no_nulls(table, [label_column(table)], file)
        if "split" in names:
            splits |= set(pc.unique(table["split"]).to_pylist())
        pairs |= set(_label_name_pairs(table))
    return pairs, splits, num_rows


def _check_names(names_of_label: Mapping[Any, set[str]]) -> None:
    """Raise ScoreError for a class with several names: `verify` expects one name per class in a manifest."""
    ambiguous = [(label, names) for label, names in names_of_label.items() if len(names) > 1]
    if ambiguous:
        label, names = ambiguous[0]
        shown = ", ".join(repr(name) if name else "none" for name in sorted(names)[:3])
        raise ScoreError(
            f"{len(ambiguous):,} labels have more than one label_name (the first: {label} is {shown}): "
            "give each class one name, or leave label_name out"
        )


def _sort_labels(labels: Iterable[Any]) -> list[Any]:
    """Sort labels; raises ScoreError for mixed types, or integers beyond the 32 bits of a manifest."""
    kinds = sorted({type(label).__name__ for label in labels})
    if len(kinds) > 1:
        raise ScoreError(f"column label is {' in one shard and '.join(kinds)} in another: use one type for all labels")
    ordered = sorted(labels)
    if kinds == ["int"] and (beyond := [label for label in (ordered[0], ordered[-1]) if not -(2**31) <= label < 2**31]):
        raise ScoreError(f"label {beyond[0]} has more than 32 bits: renumber the classes, or use label_name only")
    return ordered


def _label_name_pairs(table: pa.Table) -> list[tuple[Any, str]]:
    """Return the distinct (label, name) pairs of a table."""
    label, name = (encode_dictionary(column) for column in (class_values(table), table[name_column(table)]))
    codes = label.indices.to_numpy().astype(np.int64) * (len(name.dictionary) + 1)
    codes += name.indices.fill_null(len(name.dictionary)).to_numpy()
    labels, names = label.dictionary.to_pylist(), [*map(str, name.dictionary.to_pylist()), ""]
    return [
        (labels[code // len(names)], names[code % len(names)]) for code in np.flatnonzero(np.bincount(codes)).tolist()
    ]


def _non_empty_columns(file: ScoreFile, names: set[str]) -> set[str]:
    """Return which of these columns have any value: from the statistics of a file, or, without, from the data."""
    if isinstance(file, pa.Table):
        return {name for name in names if file[name].null_count < len(file)}
    footer = read_footer(file, error=ScoreError)
    non_empty: set[str] = set()
    unknown: set[str] = set()
    for group in range(footer.num_row_groups):
        row_group = footer.row_group(group)
        for column in range(row_group.num_columns):
            chunk = row_group.column(column)
            if chunk.path_in_schema in names:
                has_count = chunk.statistics is not None and chunk.statistics.has_null_count
                if not has_count:
                    unknown.add(chunk.path_in_schema)
                elif chunk.statistics.null_count < row_group.num_rows:
                    non_empty.add(chunk.path_in_schema)
    for table in read_tables(file, unknown - non_empty) if unknown - non_empty else ():
        non_empty |= {name for name in table.column_names if table[name].null_count < len(table)}
    return non_empty
