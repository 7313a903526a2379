"""Survey of a score table: number of rows, labels, names and splits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..audit.errors import ScoreError
from ..audit.parquet import read_footer
from ..audit.scores.table import check_splits
from .score_files import (
    LOWER_BOUNDS,
    NO_SPLIT,
    ScoreFile,
    check_no_nulls,
    class_values,
    encode_dictionary,
    label_column,
    name_column,
    read_tables,
)


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
    number_columns = {name for name in LOWER_BOUNDS if name in columns}
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
