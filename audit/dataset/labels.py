"""Labels: classes, label sets and numbers, read from the cells of a column."""

from __future__ import annotations

import logging
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import eq
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import DatasetError
from ..parsing import fold_text, parse_data_json
from ..row_arrays import gather, slices, true_rows

_KIND_OF_FEATURE = {"Audio": "audio", "Image": "image", "Video": "video"}


def declared_kind(schema: pa.Schema, column: str) -> str | None:
    """Return the kind of medium that the schema declares for a column: audio, image, video, or None."""
    return _KIND_OF_FEATURE.get(str(_declared_feature(schema, column).get("_type")))


def declared_classes(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Return the declared class names of a column of class numbers, or of lists of them; () if none are declared."""
    feature = _declared_feature(schema, column)
    while isinstance(feature.get("feature"), dict):  # a list or sequence of labels
        feature = feature["feature"]
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def _declared_feature(schema: pa.Schema, column: str) -> dict[str, Any]:
    """Return the `datasets` feature of a column; {} if the schema has none, or a malformed one."""
    try:
        metadata = parse_data_json((schema.metadata or {}).get(b"huggingface", b"{}"))
        entry = metadata["info"]["features"][column]
    except (KeyError, TypeError, ValueError):
        return {}
    if isinstance(entry, list):  # older versions write a list of one feature
        entry = {"feature": entry[0]} if entry else {}
    return entry if isinstance(entry, dict) else {}


log = logging.getLogger("mmaudit")

TASKS = ("classification", "multilabel", "regression")
NO_LABEL = -1  # null
UNKNOWN_LABEL = -2  # not among the classes
OTHER = "other"  # the stratum of rare label sets
NO_NAMES = "(none)"  # the stratum of samples with an empty label set
MIN_STRATUM = 10  # samples: fewer cannot be divided evenly into five folds with training rows in each
NUM_DECILES = 10
MAX_NUMBER = 1e15  # largest regression target: sums of squares still fit into float32, which ends at 3e38
_MAX_WARNINGS = 5
_SEPARATORS = re.compile(r"[|;,]")
_CLASS_HINT = "a class label is an integer or a string; choose the column with --label"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Prediction target of n samples.

    classification: label (n,) in [0, k), values None. multilabel: values (n, k) of 0 and 1, one column per label, which
    may be packed. regression: values (n, 1). For multilabel and regression, label (n,) is the stratum used to assign
    folds.
    """

    task: str
    label: NDArray[np.int32]
    num_outputs: int
    values: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: NDArray[np.integer[Any]]) -> Target:
        """Return the targets of these rows."""
        values = None if self.values is None else self.values[rows]
        return Target(task=self.task, label=self.label[rows], num_outputs=self.num_outputs, values=values)


class PackedSets:
    """Label sets of n rows in k / 8 bytes each, which read as a matrix (n, k) of 0 and 1, NaN in rows without a label.

    bits (n, ceil(k / 8)): one bit per label, the first in the highest bit. label (n,): negative in rows without one;
    None: all have one.
    """

    __slots__ = ("bits", "label", "num_labels")
    dtype, ndim = np.dtype(np.float32), 2

    def __init__(self, bits: NDArray[np.uint8], num_labels: int, label: NDArray[np.int32] | None = None) -> None:
        self.bits, self.num_labels, self.label = bits, num_labels, label

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and labels."""
        return len(self.bits), self.num_labels

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        if isinstance(key, tuple):
            return np.asarray(self[key[0]])[(..., *key[1:])]
        values = np.unpackbits(self.bits[key], axis=-1, count=self.num_labels).astype(np.float32)
        if self.label is not None:
            values[self.label[key] < 0] = np.nan
        return values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(np.float32 if dtype is None else dtype, copy=False)

    def take(self, rows: NDArray[np.integer[Any]]) -> PackedSets:
        """Return the sets of these rows, packed; each must have a label."""
        return PackedSets(gather(self.bits, rows), self.num_labels)

    def counts(self) -> NDArray[np.int64]:
        """Count the rows that have each label (k,)."""
        total = np.zeros(self.num_labels, np.int64)
        for part in slices(len(self)):
            total += np.unpackbits(self.bits[part], axis=1, count=self.num_labels).sum(axis=0, dtype=np.int64)
        return total


class UnknownLabels(Sequence[tuple[int, str]]):
    """Rows whose label is not among the classes, ascending, and these labels, without an object per row.

    rows (u,); code (u,): the label of each, an index in `texts`.
    """

    __slots__ = ("code", "rows", "texts")

    def __init__(self, rows: NDArray[np.integer[Any]], code: NDArray[np.integer[Any]], texts: Sequence[str]) -> None:
        self.rows, self.code, self.texts = rows, code, tuple(texts)

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, str]]) -> UnknownLabels:
        """Return pairs of row and label."""
        rows, texts = array("q"), []
        number: dict[str, int] = {}
        code = array("l")
        for row, text in pairs:
            rows.append(row)
            code.append(number.setdefault(text, len(number)))
        texts = list(number)
        return cls(np.array(rows, np.int64), np.array(code, np.int32), texts)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, key: int) -> tuple[int, str]: ...

    @overload
    def __getitem__(self, key: slice) -> UnknownLabels: ...

    def __getitem__(self, key: int | slice) -> tuple[int, str] | UnknownLabels:
        if isinstance(key, slice):
            return UnknownLabels(self.rows[key], self.code[key], self.texts)
        return int(self.rows[key]), self.texts[int(self.code[key])]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for row, code in zip(self.rows, self.code, strict=True):
            yield int(row), self.texts[code]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __repr__(self) -> str:
        return f"UnknownLabels({[*self[:3]]}{', ...' if len(self) > 3 else ''})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadAs:
    """How labels are read where that is known, since other rows of the source were read before.

    edges: bounds of the strata of a regression. width: of label sets, the length of 0/1 vectors, 0 for names of labels.
    """

    edges: tuple[float, ...] = ()
    width: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Labels of n rows.

    label: int32 (n,), the class, or the stratum if there are no classes; NO_LABEL if the row has none, UNKNOWN_LABEL
    if it is not among the classes, or infinite: `unknown` holds (row, original label) of these. names: of the classes
    or strata. values: float32 (n, k) or None, NaN in rows without a label. outputs: names of the k values, or of the
    classes. texts: each class as it stands in the data, which a column of names may replace in `names`. read_as: what
    other rows are read by, as these were.
    """

    label: NDArray[np.int32]
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    values: NDArray[np.float32] | None = None
    unknown: Sequence[tuple[int, str]] = ()
    texts: tuple[str, ...] = ()
    read_as: ReadAs = ReadAs()


def read_classes(
    cells: Sequence[object], names: Sequence[object] | None, *, declared: Sequence[str], classes: Sequence[str]
) -> Labels:
    """Read class labels: the classes are `classes`, else `declared`, else the distinct labels in sorted order.

    `declared` are the source's names of 0 .. k-1; `classes` lists the allowed classes by number or name. Raises
    DatasetError for lists, structs and fractions.
    """
    check_class_cells(cells)
    reader = ClassReader()
    code = reader.add_values(cells, np.arange(len(cells)))
    if names is not None and not declared:
        for row, name in enumerate(names):
            if name is not None:
                reader.names[int(code[row])] = (row, str(name))
    return reader.labels(code, declared=declared, classes=classes)


@dataclass(frozen=True, slots=True)
class ClassReader:
    """Class labels of a column that is read in parts: its distinct values, with the count and the name of each.

    index_of: index of each value. counts: rows with each value. names: row and name of the last row of a value that
    has a name.

    Example:
        >>> reader = ClassReader()
        >>> codes = [reader.add(table["label"], None) for table in tables]
        >>> reader.labels(codes[0], declared=(), classes=()).names
        ('cat', 'dog')
    """

    index_of: dict[tuple[type, object], int] = field(default_factory=dict)  # 1, 1.0 and True are equal, but different
    counts: list[int] = field(default_factory=list)
    names: dict[int, tuple[int, str]] = field(default_factory=dict)

    def add(self, column: pa.ChunkedArray, names: pa.ChunkedArray | None) -> NDArray[np.int32]:
        """Add the next rows, and the column of their names if there is one; return the index of each one's value."""
        values, code = coded_column(column)
        check_class_cells(values)
        first = sum(self.counts)
        indices = self.add_values(values, code)
        if names is not None:
            name_values, name_code = coded_column(names)
            is_named = np.array([value is not None for value in name_values], dtype=bool)[name_code]
            last_row = np.full(len(self.counts), -1, dtype=np.intp)
            np.maximum.at(last_row, indices[is_named], np.flatnonzero(is_named))
            for index in np.flatnonzero(last_row >= 0).tolist():
                row = int(last_row[index])
                self.names[index] = (first + row, str(name_values[name_code[row]]))
        return indices

    def add_values(self, values: Sequence[object], code: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        """Add rows by their distinct values and the position (n,) of each one's; return the index of its value."""
        cells = [None if value != value else value for value in values]  # pandas writes NaN for a missing label
        indices = [self.index_of.setdefault((type(cell), cell), len(self.index_of)) for cell in cells]
        self.counts.extend([0] * (len(self.index_of) - len(self.counts)))
        for index, count in zip(indices, np.bincount(code, minlength=len(cells)).tolist(), strict=True):
            self.counts[index] += count
        return np.asarray(np.array(indices, dtype=np.int32)[code])

    def labels(self, code: NDArray[np.integer[Any]], *, declared: Sequence[str], classes: Sequence[str]) -> Labels:
        """Return the labels of some rows (n,) by the indices of their values; the classes are those of all rows."""
        cells = [cell for _, cell in self.index_of]
        texts = [None if cell is None else _label_text(cell) for cell in cells]
        if not declared and not classes:
            _check_not_numbers(texts)
            counter: Counter[str] = Counter()  # two values may have one text
            for text, count in zip(texts, self.counts, strict=True):
                if text is not None:
                    counter[text] += count
            warn_of_counts(counter)
        class_names, class_of_text = number_classes(texts, cells, declared=declared, classes=classes)
        class_of_value = [None if text is None else class_of_text.get(text) for text in texts]
        numbers = [
            NO_LABEL if text is None else UNKNOWN_LABEL if number is None else number
            for text, number in zip(texts, class_of_value, strict=True)
        ]
        number_of = np.array(numbers, dtype=np.int32)
        unknown = _unknown_rows(code, number_of == UNKNOWN_LABEL, [str(text) for text in texts])
        label = gather(number_of, code)
        named = sorted((row, numbers[index], name) for index, (row, name) in self.names.items())
        name_of_class = {number: name for _, number, name in named}
        names = tuple(name_of_class.get(number, name) for number, name in enumerate(class_names))
        return Labels(label=label, names=names, outputs=names, unknown=unknown, texts=tuple(class_names))


def coded_column(column: pa.ChunkedArray) -> tuple[list[Any], NDArray[np.int32]]:
    """Return the distinct values of a column of scalars, in order of occurrence, and the index of each row's (n,)."""
    values, code = coded_part(column)
    return [*values.to_pylist(), *([None] if (code == len(values)).any() else [])], code


def coded_part(column: pa.ChunkedArray) -> tuple[pa.Array, NDArray[np.int32]]:
    """Return the distinct values of a column, and the index of each row's (n,): of null, their number."""
    if pa.types.is_null(column.type):
        return pa.nulls(0), np.zeros(len(column), dtype=np.int32)
    coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    coded = coded.unify_dictionaries()
    if not coded.num_chunks:
        type_ = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        return pa.nulls(0, type_), np.zeros(0, np.int32)
    values = coded.chunk(0).dictionary
    indices = [chunk.indices.fill_null(len(values)).to_numpy().astype(np.int32, copy=False) for chunk in coded.chunks]
    return values, np.concatenate(indices)


def check_class_cells(cells: Sequence[object]) -> None:
    """Raise DatasetError for cells that are no class labels: structs, lists and fractions."""
    if any(isinstance(cell, dict) for cell in cells):
        raise DatasetError(f"the labels are structs of several fields: {_CLASS_HINT}")
    if any(isinstance(cell, list) for cell in cells):
        raise DatasetError(f"the labels are lists: {_CLASS_HINT}, or pass --task multilabel")
    if any(isinstance(cell, float) and cell == cell and not cell.is_integer() for cell in cells):
        raise DatasetError(f"the labels are fractions: {_CLASS_HINT}, or pass --task regression")


def _unknown_rows(code: NDArray[np.integer[Any]], is_unknown: NDArray[np.bool_], texts: Sequence[str]) -> UnknownLabels:
    """Return the rows whose code (n,) is one of an unknown label."""
    if not is_unknown.any():
        return UnknownLabels(code[:0], code[:0], ())
    rows = true_rows(gather(is_unknown, code))
    return UnknownLabels(rows, gather(code, rows), texts)


_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _check_not_numbers(texts: Sequence[str | None]) -> None:
    """Raise DatasetError if all labels are decimal numbers and some are fractions, such as a sentiment of -2.75."""
    present = {text.strip() for text in texts if text is not None}
    if not present or not all(map(_DECIMAL.fullmatch, present)):
        return
    if fractions := sorted(text for text in present if not float(text).is_integer()):
        raise DatasetError(
            f"the labels are {len(present)} numbers, such as {fractions[0]}: pass --task regression, choose a column "
            "of classes with --label, or list the classes with data.classes"
        )


def warn_of_similar(texts: Sequence[str | None]) -> None:
    """Log a warning of labels that differ only by case, blanks or Unicode form, with each spelling and its count."""
    warn_of_counts(Counter(text for text in texts if text is not None))


def warn_of_counts(counts: Mapping[str, int]) -> None:
    """Log the warning of `warn_of_similar` of labels and their counts."""
    spellings: dict[str, list[str]] = {}
    for text in sorted(counts):
        spellings.setdefault(fold_text(text), []).append(text)
    similar = [names for names in spellings.values() if len(names) > 1]
    for names in similar[:_MAX_WARNINGS]:
        shown = ", ".join(f"{name!r} ({counts[name]})" for name in names)
        log.warning("labels that differ only by case, blanks or Unicode form are different classes: %s", shown)
    if len(similar) > _MAX_WARNINGS:
        log.warning("%d more labels have several spellings", len(similar) - _MAX_WARNINGS)


def number_classes(
    texts: Sequence[str | None], cells: Sequence[object], *, declared: Sequence[str], classes: Sequence[str]
) -> tuple[list[str], dict[str, int]]:
    """Return the class names in order, and the class number of each label text."""
    if declared:
        names = {str(index): name for index, name in enumerate(declared)}
        allowed = [name for index, name in names.items() if not classes or name in classes or index in classes]
        if missing := [name for name in classes if name not in names and name not in declared]:
            raise DatasetError(f"data.classes names {missing[0]!r}; the source has the classes {', '.join(declared)}")
        index_of = {name: index for index, name in enumerate(allowed)}
        by_word = {name: index_of[name] for name in allowed} if any(isinstance(cell, str) for cell in cells) else {}
        return allowed, by_word | {index: index_of[name] for index, name in names.items() if name in index_of}
    ordered = list(classes) or _sort_labels({text for text in texts if text is not None})
    return ordered, {text: index for index, text in enumerate(ordered)}


def _sort_labels(texts: set[str]) -> list[str]:
    """Sort integers as integers (01 and 1 are distinct labels), everything else as strings."""
    try:
        return sorted(texts, key=lambda text: (int(text), text))
    except ValueError:
        return sorted(texts)


def _label_text(cell: object) -> str:
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def parse_label_set(cell: object) -> list[str] | None:
    """Return the labels of a cell, None if it has none; raise DatasetError for what is no label set."""
    if cell is None or cell != cell:
        return None
    if isinstance(cell, str):
        return [part.strip() for part in _SEPARATORS.split(cell) if part.strip()]
    if isinstance(cell, list):
        return None if any(element is None for element in cell) else [_label_text(element) for element in cell]
    if isinstance(cell, (int, float)):
        return [_label_text(cell)]
    raise label_set_error(cell)


def label_set_error(cell: object) -> DatasetError:
    """Return the error of a cell that is no label set."""
    form = "neither a list of labels nor a string such as dog|cat"
    return DatasetError(f"the label {repr(cell)[:60]} is {form}: choose the column with --label")


def parse_number(cell: object, *, name: str) -> float:
    """Return the number of a cell, NaN if it has none; raise DatasetError for what is no number."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return math.nan
    if isinstance(cell, (int, float, str)):
        with suppress(ValueError):
            return float(cell)
    raise DatasetError(f"column {name!r} holds {cell!r}, which is not a number: pass --task classification, or --label")
