"""Labels: classes, label sets and numbers, read from the cells of a column."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import DatasetError
from ..parsing import parse_data_json

_KINDS = {"Audio": "audio", "Image": "image", "Video": "video"}


def declared_kind(schema: pa.Schema, column: str) -> str | None:
    """Give the kind of medium that a column is declared to hold: audio, image, video, or None."""
    return _KINDS.get(str(_feature(schema, column).get("_type")))


def declared_classes(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Give the names of the classes that a column numbers from 0, or that its lists do; () where it has none."""
    feature = _feature(schema, column)
    while isinstance(feature.get("feature"), dict):  # a list or sequence of labels
        feature = feature["feature"]
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def _feature(schema: pa.Schema, column: str) -> dict[str, Any]:
    """Give the entry of a column; {} where the schema has none, or one that cannot be read."""
    try:
        about = parse_data_json((schema.metadata or {}).get(b"huggingface", b"{}"))
        found = about["info"]["features"][column]
    except (KeyError, TypeError, ValueError):
        return {}
    if isinstance(found, list):  # as older versions write a list of one feature
        found = {"feature": found[0]} if found else {}
    return found if isinstance(found, dict) else {}


log = logging.getLogger("mmaudit")

TASKS = ("classification", "multilabel", "regression")
NO_LABEL = -1  # null
UNKNOWN_LABEL = -2  # not among the classes
OTHER = "other"  # the stratum of label sets that are rare
NO_NAMES = "(none)"  # the stratum of samples without any of the labels
_RARE_SET = 10  # samples: fewer cannot be dealt evenly into five folds, each with one to learn from
_DECILES = 10
MAX_NUMBER = 1e15  # of a regression: sums of its squares fit into float32, which ends at 3e38
_SEPARATORS = re.compile(r"[|;,]")
_MEND = "a class label is an integer or a string; name it with --label"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What n samples are to be recognised as.

    classification: label (n,) in [0, k), values None. multilabel: values (n, k) of 0 and 1, one column a label.
    regression: values (n, 1). Of the latter two, label (n,) is the stratum a sample is dealt into folds by.
    """

    task: str
    label: NDArray[np.int32]
    num_outputs: int
    values: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: NDArray[np.intp]) -> Target:
        """Give the targets of some rows."""
        values = None if self.values is None else self.values[rows]
        return Target(task=self.task, label=self.label[rows], num_outputs=self.num_outputs, values=values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What n rows are to be recognised as.

    label: int32 (n,), the class, or the stratum where there are no classes; NO_LABEL where there is none, and
    UNKNOWN_LABEL where it is not among the classes, or infinite: then `unknown` has (row, label as it stands).
    names: of the classes or strata. values: float32 (n, k) or None, NaN in rows without a label. outputs: names of the
    k values, or of the classes.
    """

    label: NDArray[np.int32]
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    values: NDArray[np.float32] | None = None
    unknown: tuple[tuple[int, str], ...] = ()


def read_classes(
    cells: Sequence[object], names: Sequence[object] | None, *, declared: Sequence[str], classes: Sequence[str]
) -> Labels:
    """Number the classes: those of `classes`, else of `declared`, else those found, in the order of their labels.

    `declared` are the source's own names for 0 .. k-1; `classes` says by number or name which there are.
    """
    if any(isinstance(cell, (list, dict)) for cell in cells):
        raise DatasetError(f"the labels are lists: {_MEND}, or pass --task multilabel")
    cells = [None if cell != cell else cell for cell in cells]  # NaN is what pandas writes for none
    if any(isinstance(cell, float) and not cell.is_integer() for cell in cells):
        raise DatasetError(f"the labels are fractions: {_MEND}, or pass --task regression")
    texts = [None if cell is None else _text(cell) for cell in cells]
    listed, number = _listed(texts, cells, declared=declared, classes=classes)
    found = [None if text is None else number.get(text) for text in texts]
    label = np.array([NO_LABEL if index is None else index for index in found], dtype=np.int32)
    unknown = tuple((row, text) for row, text in enumerate(texts) if text is not None and found[row] is None)
    label[[row for row, _ in unknown]] = UNKNOWN_LABEL
    if names is not None and not declared:
        named = {index: str(name) for index, name in zip(label.tolist(), names, strict=True) if name is not None}
        listed = [named.get(index, name) for index, name in enumerate(listed)]
    return Labels(label=label, names=tuple(listed), outputs=tuple(listed), unknown=unknown)


def read_label_sets(cells: Sequence[object], *, declared: Sequence[str], classes: Sequence[str]) -> Labels:
    """Read sets of labels: lists, or strings split at | ; or , where an empty list is a set and null is none.

    The strata are the sets; those of fewer than 10 samples are one.
    """
    for cell in cells:
        if isinstance(cell, dict) or (isinstance(cell, list) and any(isinstance(x, (dict, list)) for x in cell)):
            raise _not_labels(cell)
    sets = _from_vectors(cells, declared or classes) or [_label_set(cell) for cell in cells]
    known = [text for labels in sets if labels is not None for text in labels]
    listed, number = _listed(known, known, declared=declared, classes=classes)
    unknown: list[tuple[int, str]] = []
    values = np.full((len(sets), len(listed)), np.nan, dtype=np.float32)
    keys: list[str | None] = [None] * len(sets)
    for row, labels in enumerate(sets):
        odd = [text for text in labels or [] if text not in number]
        if odd:
            unknown.append((row, odd[0]))
        elif labels is not None:
            columns = sorted({number[text] for text in labels})
            values[row] = 0
            values[row, columns] = 1
            keys[row] = "|".join(listed[column] for column in columns) or NO_NAMES
    if not listed:
        raise DatasetError("no sample has any label: a label set is a list, or a string such as dog|cat")
    label, strata = _strata(keys)
    label[[row for row, _ in unknown]] = UNKNOWN_LABEL
    return Labels(label=label, names=strata, outputs=tuple(listed), values=values, unknown=tuple(unknown))


def read_numbers(cells: Sequence[object], *, name: str) -> Labels:
    """Read numbers, (n, 1) as they are; what is infinite, or above MAX_NUMBER, is `unknown`, and NaN is none.

    The strata are their tenths by rank, fewer where values repeat. Raises DatasetError for a word.
    """
    numbers = np.array([_number(cell, name=name) for cell in cells], dtype=np.float64)
    has = np.abs(numbers) <= MAX_NUMBER
    if not has.any():
        raise DatasetError(f"no sample has a number in column {name!r}: name another with --label")
    unknown = tuple((row, str(cells[row])) for row in np.flatnonzero(~has & ~np.isnan(numbers)).tolist())
    edges = np.unique(np.quantile(numbers[has], np.linspace(0, 1, _DECILES + 1)))
    label = np.full(len(numbers), NO_LABEL, dtype=np.int32)
    label[has] = np.searchsorted(edges[1:-1], numbers[has], side="right")
    label[[row for row, _ in unknown]] = UNKNOWN_LABEL
    bounds = list(pairwise(edges)) or [(edges[0], edges[0])]
    strata = [f"[{low:g}, {high:g})" for low, high in bounds[:-1]] + [f"[{bounds[-1][0]:g}, {bounds[-1][1]:g}]"]
    values = np.where(has, numbers, np.nan).astype(np.float32)[:, None]
    return Labels(label=label, names=tuple(strata), outputs=(name,), values=values, unknown=unknown)


def _listed(
    texts: Sequence[str | None], cells: Sequence[object], *, declared: Sequence[str], classes: Sequence[str]
) -> tuple[list[str], dict[str, int]]:
    """Give the names of the classes in order, and the number of each label, written as text, that is one of them."""
    if declared:
        names = {str(index): name for index, name in enumerate(declared)}
        allowed = [name for index, name in names.items() if not classes or name in classes or index in classes]
        if lost := [name for name in classes if name not in names and name not in declared]:
            raise DatasetError(f"data.classes names {lost[0]!r}; the source has the classes {', '.join(declared)}")
        number = {name: index for index, name in enumerate(allowed)}
        by_name = {name: number[name] for name in allowed} if _are_words(cells) else {}
        return allowed, by_name | {index: number[name] for index, name in names.items() if name in number}
    listed = list(classes) or _in_order({text for text in texts if text is not None})
    return listed, {text: index for index, text in enumerate(listed)}


def _are_words(cells: Sequence[object]) -> bool:
    return any(isinstance(cell, str) for cell in cells)


def _in_order(texts: set[str]) -> list[str]:
    """Sort labels in their own order: numbers as numbers (01 and 1 are two), all else as strings."""
    try:
        return sorted(texts, key=lambda text: (int(text), text))
    except ValueError:
        return sorted(texts)


def _text(cell: object) -> str:
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def _label_set(cell: object) -> list[str] | None:
    if cell is None or cell != cell:
        return None
    if isinstance(cell, str):
        return [part.strip() for part in _SEPARATORS.split(cell) if part.strip()]
    if isinstance(cell, list):
        return None if any(each is None for each in cell) else [_text(each) for each in cell]
    if isinstance(cell, (int, float)):
        return [_text(cell)]
    raise _not_labels(cell)


def _not_labels(cell: object) -> DatasetError:
    shown = repr(cell)[:60]
    return DatasetError(f"the label {shown} is no list of labels, and no string such as dog|cat: name it with --label")


def _from_vectors(cells: Sequence[object], names: Sequence[str]) -> list[list[str] | None] | None:
    """Read vectors of 0 and 1, one place a label. A list that names a label twice shows that they are such."""
    lists = [cell for cell in cells if isinstance(cell, list)]
    width = len(lists[0]) if lists else 0
    if not any(len(set(each)) < len(each) for each in lists):
        return None
    if any(len(each) != width or any(value not in (0, 1) for value in each) for each in lists):
        raise DatasetError("a list of labels names one twice: give each once, or vectors of 0 and 1, all of one length")
    if names and len(names) != width:
        raise DatasetError(f"the labels are vectors of {width} places, and there are {len(names)} classes")
    log.info("labels: read as vectors of 0 and 1, %d places", width)
    return [
        [names[place] if names else str(place) for place, value in enumerate(cell) if value == 1]
        if isinstance(cell, list)
        else None
        for cell in cells
    ]


def _number(cell: object, *, name: str) -> float:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return math.nan
    if isinstance(cell, (int, float, str)):
        with suppress(ValueError):
            return float(cell)
    raise DatasetError(f"column {name!r} holds {cell!r}, which is no number: pass --task classification, or --label")


def _strata(keys: Sequence[str | None]) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    counts = Counter(key for key in keys if key is not None)
    common = [key for key, count in counts.items() if count >= _RARE_SET]
    names = sorted(common) + ([OTHER] if len(common) < len(counts) else [])
    number = {name: index for index, name in enumerate(names)}
    places = [NO_LABEL if key is None else number.get(key, len(names) - 1) for key in keys]
    return np.array(places, dtype=np.int32), tuple(names)
