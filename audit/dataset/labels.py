"""Labels: classes, label sets and numbers, read from the cells of a column."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import DatasetError
from ..parsing import fold_text, parse_data_json

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
_MIN_STRATUM = 10  # samples: fewer cannot be divided evenly into five folds with training rows in each
_NUM_DECILES = 10
MAX_NUMBER = 1e15  # largest regression target: sums of squares still fit into float32, which ends at 3e38
_MAX_WARNINGS = 5
_SEPARATORS = re.compile(r"[|;,]")
_CLASS_HINT = "a class label is an integer or a string; choose the column with --label"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Prediction target of n samples.

    classification: label (n,) in [0, k), values None. multilabel: values (n, k) of 0 and 1, one column per label.
    regression: values (n, 1). For multilabel and regression, label (n,) is the stratum used to assign folds.
    """

    task: str
    label: NDArray[np.int32]
    num_outputs: int
    values: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: NDArray[np.intp]) -> Target:
        """Return the targets of these rows."""
        values = None if self.values is None else self.values[rows]
        return Target(task=self.task, label=self.label[rows], num_outputs=self.num_outputs, values=values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Labels of n rows.

    label: int32 (n,), the class, or the stratum if there are no classes; NO_LABEL if the row has none, UNKNOWN_LABEL
    if it is not among the classes, or infinite: `unknown` holds (row, original label) of these. names: of the classes
    or strata. values: float32 (n, k) or None, NaN in rows without a label. outputs: names of the k values, or of the
    classes. texts: each class as it stands in the data, which a column of names may replace in `names`. edges: bounds
    of the strata of a regression.
    """

    label: NDArray[np.int32]
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    values: NDArray[np.float32] | None = None
    unknown: tuple[tuple[int, str], ...] = ()
    texts: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()


def read_classes(
    cells: Sequence[object], names: Sequence[object] | None, *, declared: Sequence[str], classes: Sequence[str]
) -> Labels:
    """Read class labels: the classes are `classes`, else `declared`, else the distinct labels in sorted order.

    `declared` are the source's names of 0 .. k-1; `classes` lists the allowed classes by number or name. Raises
    DatasetError for lists, structs and fractions.
    """
    _check_class_cells(cells)
    reader = ClassReader()
    code = reader.add_values(cells, np.arange(len(cells)))
    if names is not None and not declared:
        for row, name in enumerate(names):
            if name is not None:
                reader.names[int(code[row])] = (row, str(name))
    return reader.labels(code, declared=declared, classes=classes)


def read_class_column(
    column: pa.ChunkedArray, names: pa.ChunkedArray | None, *, declared: Sequence[str], classes: Sequence[str]
) -> Labels:
    """Read class labels as `read_classes` does, from a column of strings or numbers, without an object per row."""
    reader = ClassReader()
    code = reader.add(column, None if declared else names)
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
        _check_class_cells(values)
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
            _warn_of_similar(counter)
        class_names, class_of_text = _number_classes(texts, cells, declared=declared, classes=classes)
        class_of_value = [None if text is None else class_of_text.get(text) for text in texts]
        numbers = [
            NO_LABEL if text is None else UNKNOWN_LABEL if number is None else number
            for text, number in zip(texts, class_of_value, strict=True)
        ]
        label = np.array(numbers, dtype=np.int32)[code]
        unknown = tuple((row, str(texts[code[row]])) for row in np.flatnonzero(label == UNKNOWN_LABEL).tolist())
        named = sorted((row, numbers[index], name) for index, (row, name) in self.names.items())
        name_of_class = {number: name for _, number, name in named}
        names = tuple(name_of_class.get(number, name) for number, name in enumerate(class_names))
        return Labels(label=label, names=names, outputs=names, unknown=unknown, texts=tuple(class_names))


def coded_column(column: pa.ChunkedArray) -> tuple[list[Any], NDArray[np.int32]]:
    """Return the distinct values of a column of scalars, in order of occurrence, and the index of each row's (n,)."""
    if pa.types.is_null(column.type):
        return [None], np.zeros(len(column), dtype=np.int32)
    coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    coded = coded.unify_dictionaries()
    values = coded.chunk(0).dictionary.to_pylist() if coded.num_chunks else []
    indices = [chunk.indices.fill_null(len(values)).to_numpy().astype(np.int32, copy=False) for chunk in coded.chunks]
    codes = np.concatenate([np.zeros(0, np.int32), *indices])
    return ([*values, None] if len(codes) and codes.max() == len(values) else values), codes


def _check_class_cells(cells: Sequence[object]) -> None:
    if any(isinstance(cell, dict) for cell in cells):
        raise DatasetError(f"the labels are structs of several fields: {_CLASS_HINT}")
    if any(isinstance(cell, list) for cell in cells):
        raise DatasetError(f"the labels are lists: {_CLASS_HINT}, or pass --task multilabel")
    if any(isinstance(cell, float) and cell == cell and not cell.is_integer() for cell in cells):
        raise DatasetError(f"the labels are fractions: {_CLASS_HINT}, or pass --task regression")


def read_label_sets(cells: Sequence[object], *, declared: Sequence[str], classes: Sequence[str]) -> Labels:
    """Read label sets: lists, or strings split at | ; or , (an empty list is an empty set, null is a missing label).

    The strata are the distinct sets; all sets of fewer than 10 samples form one stratum.
    """
    for cell in cells:
        if isinstance(cell, dict) or (isinstance(cell, list) and any(isinstance(part, (dict, list)) for part in cell)):
            raise _label_set_error(cell)
    sets = _parse_indicator_vectors(cells, declared or classes) or [_parse_label_set(cell) for cell in cells]
    present = [text for labels in sets if labels is not None for text in labels]
    if not declared and not classes:
        warn_of_similar(present)
    label_names, column_of_text = _number_classes(present, present, declared=declared, classes=classes)
    unknown: list[tuple[int, str]] = []
    values = np.full((len(sets), len(label_names)), np.nan, dtype=np.float32)
    keys: list[str | None] = [None] * len(sets)
    for row, labels in enumerate(sets):
        unknown_labels = [text for text in labels or [] if text not in column_of_text]
        if unknown_labels:
            unknown.append((row, unknown_labels[0]))
        elif labels is not None:
            columns = sorted({column_of_text[text] for text in labels})
            values[row] = 0
            values[row, columns] = 1
            keys[row] = "|".join(label_names[column] for column in columns) or NO_NAMES
    if not label_names:
        raise DatasetError("no sample has any label: a label set is a list, or a string such as dog|cat")
    label, strata = _number_strata(keys)
    label[[row for row, _ in unknown]] = UNKNOWN_LABEL
    return Labels(label=label, names=strata, outputs=tuple(label_names), values=values, unknown=tuple(unknown))


def read_regression_targets(cells: Sequence[object], *, name: str, edges: Sequence[float] = ()) -> Labels:
    """Read regression targets (n, 1); infinite ones and ones above MAX_NUMBER are `unknown`, NaN is a missing label.

    The strata are deciles, fewer if values repeat, or have these `edges`. Raises DatasetError for a cell that is not a
    number.
    """
    numbers = np.array([_parse_number(cell, name=name) for cell in cells], dtype=np.float64)
    return _read_numbers(numbers, cells.__getitem__, name=name, edges=edges)


def read_number_column(column: pa.ChunkedArray, *, name: str, edges: Sequence[float] = ()) -> Labels:
    """Read regression targets as `read_regression_targets` does, of numbers without an object per row."""
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return read_regression_targets(column.to_pylist(), name=name, edges=edges)
    numbers = column.cast(pa.float64(), safe=False).to_numpy()  # null is NaN
    return _read_numbers(numbers, lambda row: column[row].as_py(), name=name, edges=edges)


def _read_numbers(
    numbers: NDArray[np.float64], cell_of_row: Callable[[int], object], *, name: str, edges: Sequence[float]
) -> Labels:
    valid = np.abs(numbers) <= MAX_NUMBER
    if not valid.any():
        raise DatasetError(f"no sample has a number in column {name!r}: choose another column with --label")
    unknown = tuple((row, str(cell_of_row(row))) for row in np.flatnonzero(~valid & ~np.isnan(numbers)).tolist())
    quantiles = np.unique(np.quantile(numbers[valid], np.linspace(0, 1, _NUM_DECILES + 1)))
    edges = tuple(edges) or tuple(quantiles.tolist())
    label = np.full(len(numbers), NO_LABEL, dtype=np.int32)
    label[valid] = np.searchsorted(edges[1:-1], numbers[valid], side="right")
    label[[row for row, _ in unknown]] = UNKNOWN_LABEL
    bounds = list(pairwise(edges)) or [(edges[0], edges[0])]
    strata = [f"[{low:g}, {high:g})" for low, high in bounds[:-1]] + [f"[{bounds[-1][0]:g}, {bounds[-1][1]:g}]"]
    values = np.where(valid, numbers, np.nan).astype(np.float32)[:, None]
    return Labels(label=label, names=tuple(strata), outputs=(name,), values=values, unknown=unknown, edges=edges)


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
    _warn_of_similar(Counter(text for text in texts if text is not None))


def _warn_of_similar(counts: Mapping[str, int]) -> None:
    spellings: dict[str, list[str]] = {}
    for text in sorted(counts):
        spellings.setdefault(fold_text(text), []).append(text)
    similar = [names for names in spellings.values() if len(names) > 1]
    for names in similar[:_MAX_WARNINGS]:
        shown = ", ".join(f"{name!r} ({counts[name]})" for name in names)
        log.warning("labels that differ only by case, blanks or Unicode form are different classes: %s", shown)
    if len(similar) > _MAX_WARNINGS:
        log.warning("%d more labels have several spellings", len(similar) - _MAX_WARNINGS)


def _number_classes(
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


def _parse_label_set(cell: object) -> list[str] | None:
    if cell is None or cell != cell:
        return None
    if isinstance(cell, str):
        return [part.strip() for part in _SEPARATORS.split(cell) if part.strip()]
    if isinstance(cell, list):
        return None if any(element is None for element in cell) else [_label_text(element) for element in cell]
    if isinstance(cell, (int, float)):
        return [_label_text(cell)]
    raise _label_set_error(cell)


def _label_set_error(cell: object) -> DatasetError:
    form = "neither a list of labels nor a string such as dog|cat"
    return DatasetError(f"the label {repr(cell)[:60]} is {form}: choose the column with --label")


def _parse_indicator_vectors(cells: Sequence[object], names: Sequence[str]) -> list[list[str] | None] | None:
    """Read 0/1 vectors, one entry per label; None if no list repeats an element, that is if they are label lists."""
    lists = [cell for cell in cells if isinstance(cell, list)]
    width = len(lists[0]) if lists else 0
    if not any(len(set(values)) < len(values) for values in lists):
        return None
    if any(len(values) != width or any(value not in (0, 1) for value in values) for values in lists):
        raise DatasetError("a list of labels repeats a label: list each once, or use 0/1 vectors of equal length")
    if names and len(names) != width:
        raise DatasetError(f"the labels are vectors of length {width}, but there are {len(names)} classes")
    log.info("labels: read as 0/1 vectors of length %d", width)
    return [
        [names[position] if names else str(position) for position, value in enumerate(cell) if value == 1]
        if isinstance(cell, list)
        else None
        for cell in cells
    ]


def _parse_number(cell: object, *, name: str) -> float:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return math.nan
    if isinstance(cell, (int, float, str)):
        with suppress(ValueError):
            return float(cell)
    raise DatasetError(f"column {name!r} holds {cell!r}, which is not a number: pass --task classification, or --label")


def _number_strata(keys: Sequence[str | None]) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    counts = Counter(key for key in keys if key is not None)
    common = [key for key, count in counts.items() if count >= _MIN_STRATUM]
    names = sorted(common) + ([OTHER] if len(common) < len(counts) else [])
    index_of_name = {name: index for index, name in enumerate(names)}
    strata = [NO_LABEL if key is None else index_of_name.get(key, len(names) - 1) for key in keys]
    return np.array(strata, dtype=np.int32), tuple(names)
