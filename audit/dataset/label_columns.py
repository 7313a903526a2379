"""Labels of columns that are read part by part, with at most eight bytes a row besides the result."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import DatasetError
from ..hashing import splitmix64
from ..row_arrays import contains, gather, slices
from .labels import (
    MAX_NUMBER,
    MIN_STRATUM,
    NO_LABEL,
    NO_NAMES,
    NUM_DECILES,
    OTHER,
    UNKNOWN_LABEL,
    ClassReader,
    Labels,
    PackedSets,
    ReadAs,
    UnknownLabels,
    check_class_cells,
    coded_part,
    label_set_error,
    number_classes,
    parse_label_set,
    parse_number,
    read_classes,
    warn_of_counts,
)

log = logging.getLogger("mmaudit")


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnParts:
    """A column of n rows in parts of one type, each read when it is needed."""

    num_rows: int
    num_parts: int
    read: Callable[[int], pa.ChunkedArray]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> ColumnParts:
        """Return a column in memory as one part."""
        return cls(num_rows=len(column), num_parts=1, read=lambda _: column)

    @classmethod
    def of_cells(cls, cells: Sequence[object]) -> ColumnParts:
        """Return cells of any types as one part."""
        return cls(num_rows=len(cells), num_parts=1, read=lambda _: cast("pa.ChunkedArray", _Cells(cells)))

    def __iter__(self) -> Iterator[pa.ChunkedArray]:
        return map(self.read, range(self.num_parts))

    def located(self) -> Iterator[tuple[slice, pa.ChunkedArray]]:
        """Yield each part with its rows."""
        start = 0
        for column in self:
            yield slice(start, start + len(column)), column
            start += len(column)

    @property
    def type(self) -> pa.DataType:
        """The type of all parts."""
        return self.read(0).type


@dataclass(frozen=True, slots=True)
class _Cells:
    """Cells of any types, in place of a column."""

    cells: Sequence[object]
    type: pa.DataType = field(default_factory=pa.null)

    def __len__(self) -> int:
        return len(self.cells)

    def to_pylist(self) -> list[object]:
        return list(self.cells)


def read_class_column(
    column: ColumnParts, names: ColumnParts | None, *, declared: Sequence[str], classes: Sequence[str]
) -> Labels:
    """Read class labels as `read_classes` does, from a column of strings or numbers, without an object per row."""
    if pa.types.is_nested(column.type):
        for part in column:
            check_class_cells(part.to_pylist())  # refused, unless all are null
        return read_classes([None] * column.num_rows, None, declared=declared, classes=classes)
    reader, code = ClassReader(), np.empty(column.num_rows, np.int32)
    named = None if declared or names is None else names
    for index, (rows, part) in enumerate(column.located()):
        code[rows] = reader.add(part, None if named is None else named.read(index))
    return reader.labels(code, declared=declared, classes=classes)


def coded_parts(column: ColumnParts) -> tuple[list[Any], NDArray[np.int32]]:
    """Return the distinct values of a column of scalars, in order of occurrence, and the index of each row's (n,).

    Null is the last of the values.
    """
    codes = np.empty(column.num_rows, np.int32)
    dictionaries = []
    for rows, part in column.located():
        dictionary, codes[rows] = coded_part(part)
        dictionaries.append(dictionary)
    if not dictionaries:
        return [], codes
    values = dictionaries[0]
    if len(dictionaries) > 1 and not pa.types.is_null(values.type):
        numbered = [pa.DictionaryArray.from_arrays(np.arange(len(own), dtype=np.int32), own) for own in dictionaries]
        unified = pa.chunked_array(numbered).unify_dictionaries()
        values = unified.chunk(0).dictionary
        for (rows, _), chunk in zip(column.located(), unified.chunks, strict=True):
            number = np.append(chunk.indices.to_numpy(zero_copy_only=False), len(values)).astype(np.int32)
            gather(number, codes[rows], out=codes[rows])
    has_null = any((codes[part] == len(values)).any() for part in slices(len(codes)))
    return [*values.to_pylist(), *([None] if has_null else [])], codes


def read_regression_targets(cells: Sequence[object], *, name: str, edges: Sequence[float] = ()) -> Labels:
    """Read regression targets (n, 1); infinite ones and ones above MAX_NUMBER are `unknown`, NaN is a missing label.

    The strata are deciles, fewer if values repeat, or have these `edges`. Raises DatasetError for a cell that is not a
    number.
    """
    return read_number_column(ColumnParts.of_cells(cells), name=name, edges=edges)


def read_number_column(column: ColumnParts, *, name: str, edges: Sequence[float] = ()) -> Labels:
    """Read regression targets as `read_regression_targets` does, of numbers without an object per row."""
    quantiles = _quantiles(column, name=name, edges=edges)
    edges = tuple(edges) or tuple(quantiles)
    label = np.full(column.num_rows, NO_LABEL, dtype=np.int32)
    values = np.full((column.num_rows, 1), np.nan, dtype=np.float32)
    unknown: list[UnknownLabels] = []
    for rows, part in column.located():
        numbers = _numbers(part, name=name)
        valid = np.abs(numbers) <= MAX_NUMBER
        label[rows][valid] = np.searchsorted(edges[1:-1], numbers[valid], side="right")
        values[rows, 0][valid] = numbers[valid]
        strange = np.flatnonzero(~valid & ~np.isnan(numbers))
        label[rows][strange] = UNKNOWN_LABEL
        texts = (str(_cell(part, row)) for row in strange.tolist())
        unknown.append(UnknownLabels.of(zip((strange + rows.start).tolist(), texts, strict=True)))
    bounds = list(pairwise(edges)) or [(edges[0], edges[0])]
    strata = [f"[{low:g}, {high:g})" for low, high in bounds[:-1]] + [f"[{bounds[-1][0]:g}, {bounds[-1][1]:g}]"]
    return Labels(
        label=label,
        names=tuple(strata),
        outputs=(name,),
        values=values,
        unknown=UnknownLabels.of(pair for part in unknown for pair in part),
        read_as=ReadAs(edges=edges),
    )


def _quantiles(column: ColumnParts, *, name: str, edges: Sequence[float]) -> list[float]:
    """Return the deciles of the numbers that are valid, or `edges`; raise DatasetError if there is none."""
    numbers = np.empty(0 if edges else column.num_rows, np.float64)
    num_valid = 0
    for part in column:
        own = _numbers(part, name=name)
        own = own[np.abs(own) <= MAX_NUMBER]
        if not edges:
            numbers[num_valid : num_valid + len(own)] = own
        num_valid += len(own)
    if not num_valid:
        raise DatasetError(f"no sample has a number in column {name!r}: choose another column with --label")
    if edges:
        return list(edges)
    shares = np.linspace(0, 1, NUM_DECILES + 1)
    return np.unique(np.quantile(numbers[:num_valid], shares, overwrite_input=True)).tolist()  # type: ignore[no-any-return]


def _numbers(part: pa.ChunkedArray, *, name: str) -> NDArray[np.float64]:
    """Return the numbers of a part as float64, null as NaN."""
    if pa.types.is_integer(part.type) or pa.types.is_floating(part.type):
        return np.asarray(part.cast(pa.float64(), safe=False).to_numpy())
    return np.array([parse_number(cell, name=name) for cell in part.to_pylist()], dtype=np.float64)


def _cell(part: pa.ChunkedArray, row: int) -> object:
    return part.cells[row] if isinstance(part, _Cells) else part[row].as_py()


def read_label_sets(cells: Sequence[object], *, declared: Sequence[str], classes: Sequence[str]) -> Labels:
    """Read label sets: lists, or strings split at | ; or , (an empty list is an empty set, null is a missing label).

    The strata are the distinct sets; all sets of fewer than 10 samples form one stratum.
    """
    return read_set_column(ColumnParts.of_cells(cells), declared=declared, classes=classes)


def read_set_column(
    column: ColumnParts, *, declared: Sequence[str], classes: Sequence[str], width: int | None = None
) -> Labels:
    """Read label sets as `read_label_sets` does, of which a part at a time are objects; width: see ReadAs."""
    parse, counts, width = _survey(column, declared or classes, width)
    if not declared and not classes:
        warn_of_counts(counts)
    present = list(counts)
    label_names, column_of_text = number_classes(present, present, declared=declared, classes=classes)
    if not label_names:
        raise DatasetError("no sample has any label: a label set is a list, or a string such as dog|cat")
    label = np.zeros(column.num_rows, np.int32)
    bits = np.zeros((column.num_rows, -(-len(label_names) // 8)), np.uint8)
    unknown: list[tuple[NDArray[np.int64], str]] = []
    for rows, part in column.located():
        cells, code = _distinct(part.to_pylist())
        own_label, own_bits = np.zeros(len(cells), np.int32), np.zeros((len(cells), len(label_names)), np.uint8)
        for number, labels in enumerate(map(parse, cells)):
            strange = [text for text in labels or [] if text not in column_of_text]
            if strange:
                own_label[number] = UNKNOWN_LABEL
                unknown.append((np.flatnonzero(code == number) + rows.start, strange[0]))
            elif labels is None:
                own_label[number] = NO_LABEL
            else:
                own_bits[number, [column_of_text[text] for text in labels]] = 1
        label[rows], bits[rows] = own_label[code], np.packbits(own_bits, axis=1)[code]
    names = _number_strata(bits, label, label_names)
    values = cast("NDArray[np.float32]", PackedSets(bits, len(label_names), label))
    return Labels(
        label=label,
        names=names,
        outputs=tuple(label_names),
        values=values,
        unknown=_sorted_unknown(unknown),
        read_as=ReadAs(width=width),
    )


Parse = Callable[[object], list[str] | None]


def _survey(column: ColumnParts, names: Sequence[str], known_width: int | None) -> tuple[Parse, Counter[str], int]:
    """Return how the label sets of a column are parsed, how often each label occurs, and the length of vectors.

    Lists are 0/1 vectors, one entry per label, if one of them repeats an element, or if that is known; otherwise they
    list labels, and the length is 0.
    """
    set_counts, vector_counts = Counter[str](), Counter[int]()
    error: DatasetError | None = None
    width, repeats, is_vector = -1, False, True
    for part in column:
        cells, code = _distinct(part.to_pylist())
        for cell, count in zip(cells, np.bincount(code, minlength=len(cells)).tolist(), strict=True):
            if isinstance(cell, list):
                width = len(cell) if width < 0 else width
                repeats |= len(set(cell)) < len(cell)
                is_vector &= len(cell) == width and all(value in (0, 1) for value in cell)
                if is_vector:
                    vector_counts.update({position: count for position, value in enumerate(cell) if value == 1})
            try:
                for text in parse_label_set(cell) or []:
                    set_counts[text] += count
            except DatasetError as cause:
                error = error or cause
    if known_width == 0 or (known_width is None and not repeats):
        if error is not None:
            raise error
        return parse_label_set, set_counts, 0
    if known_width is not None and not (is_vector and width in (-1, known_width)):
        raise DatasetError(f"the labels of the run are 0/1 vectors of length {known_width}, and those of the data not")
    width = width if known_width is None else known_width
    if not is_vector:
        raise DatasetError("a list of labels repeats a label: list each once, or use 0/1 vectors of equal length")
    if names and len(names) != width:
        raise DatasetError(f"the labels are vectors of length {width}, but there are {len(names)} classes")
    log.info("labels: read as 0/1 vectors of length %d", width)
    texts = list(names) or [str(position) for position in range(width)]

    def parse(cell: object) -> list[str] | None:
        return [text for text, value in zip(texts, cell, strict=True) if value == 1] if isinstance(cell, list) else None

    return parse, Counter({texts[position]: count for position, count in vector_counts.items()}), width


def _distinct(cells: Iterable[object]) -> tuple[list[object], NDArray[np.intp]]:
    """Return the distinct cells in order of occurrence, and the index of each one's (n,); refuse nested cells."""
    number: dict[object, int] = {}  # 1, 1.0 and True are equal, but different labels
    distinct: list[object] = []
    code: list[int] = []
    for cell in cells:
        if isinstance(cell, dict) or (isinstance(cell, list) and any(isinstance(part, (dict, list)) for part in cell)):
            raise label_set_error(cell)
        key = (tuple(map(type, cell)), tuple(cell)) if isinstance(cell, list) else (type(cell), cell)
        if (index := number.get(key)) is None:
            index = number[key] = len(distinct)
            distinct.append(cell)
        code.append(index)
    return distinct, np.array(code, dtype=np.intp)


def _sorted_unknown(unknown: Sequence[tuple[NDArray[np.int64], str]]) -> UnknownLabels:
    texts = list(dict.fromkeys(text for _, text in unknown))
    number = {text: index for index, text in enumerate(texts)}
    rows = np.concatenate([np.zeros(0, np.int64), *(own for own, _ in unknown)])
    code = np.repeat([number[text] for _, text in unknown], [len(own) for own, _ in unknown]).astype(np.int32)
    order = np.argsort(rows)
    return UnknownLabels(rows[order], code[order], texts)


def _number_strata(bits: NDArray[np.uint8], label: NDArray[np.int32], label_names: Sequence[str]) -> tuple[str, ...]:
    """Put the stratum of each row (n,) that has a label into `label`, and return the names of the strata.

    Sets of more than 64 labels are told apart by a hash of 64 bits.
    """
    words = _words(bits)
    ordered = words[label >= 0]
    ordered.sort()
    # Names with a separator may make one name of different sets, which are one stratum then.
    min_rows = 1 if any("|" in name or name == NO_NAMES for name in label_names) else MIN_STRATUM
    named = _runs_of(ordered, min_rows)
    counts = np.searchsorted(ordered, named, side="right") - np.searchsorted(ordered, named)
    has_other = int(counts.sum()) < len(ordered)
    del ordered
    names = _set_names(named, words, bits, label, label_names)
    num_rows = Counter[str]()
    for name, count in zip(names, counts.tolist(), strict=True):
        num_rows[name] += count
    common = sorted(name for name, count in num_rows.items() if count >= MIN_STRATUM)
    has_other |= len(common) < len(num_rows)
    strata = [*common, *([OTHER] if has_other else [])]
    number_of = {name: number for number, name in enumerate(strata)}
    number = np.array([number_of.get(name, len(strata) - 1) for name in names], np.int32)
    for part in slices(len(label)):
        own = np.full(part.stop - part.start, len(strata) - 1, np.int32)
        inside = contains(named, words[part])
        own[inside] = number[np.searchsorted(named, words[part][inside])]
        label[part] = np.where(label[part] < 0, label[part], own)
    return tuple(strata)


def _runs_of(ordered: NDArray[np.uint64], min_rows: int) -> NDArray[np.uint64]:
    """Return the distinct values that ascending ones have at least `min_rows` times."""
    last = len(ordered) - min_rows + 1  # a run may start before it
    found = [ordered[:0]]
    for part in slices(max(0, last)):
        own = ordered[part]
        is_run = own == ordered[part.start + min_rows - 1 : part.stop + min_rows - 1]
        before = ordered[max(0, part.start - 1) : part.stop - 1]
        is_first = own[len(own) - len(before) :] != before
        is_run[len(own) - len(before) :] &= is_first
        found.append(own[is_run])
    return np.concatenate(found)


def _words(bits: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return a word for each row (n,) of bits: up to 64 of them, or their hash."""
    words = np.zeros(len(bits), np.uint64)
    for part in slices(len(bits)):
        own = np.zeros((part.stop - part.start, -(-bits.shape[1] // 8) * 8), np.uint8)
        own[:, : bits.shape[1]] = bits[part]
        columns = own.view("<u8").astype(np.uint64).T
        words[part] = columns[0]
        for column in columns[1:]:
            words[part] = splitmix64(words[part]) ^ column
    return words


def _set_names(
    named: NDArray[np.uint64],
    words: NDArray[np.uint64],
    bits: NDArray[np.uint8],
    label: NDArray[np.int32],
    label_names: Sequence[str],
) -> list[str]:
    """Return the names of sets by their words, ascending, each read from a row that has it."""
    row = np.zeros(len(named), np.int64)
    for part in slices(len(words)):
        own = np.flatnonzero(contains(named, words[part]) & (label[part] >= 0))
        row[np.searchsorted(named, words[part][own])] = own + part.start
    values = np.unpackbits(bits[row], axis=1, count=len(label_names)).astype(bool)
    return ["|".join(label_names[column] for column in np.flatnonzero(own).tolist()) or NO_NAMES for own in values]
