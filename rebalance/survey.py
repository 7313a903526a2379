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
    """What a pass over labels and splits finds. classes are sorted; class_names are in their order."""

    num_rows: int
    classes: pa.Array
    class_names: tuple[str, ...]
    splits: tuple[str, ...]
    empty: frozenset[str]  # columns of numbers that are null throughout
    named: bool  # each class has one name
    all_split: bool  # each row has a split


def survey_table(parts: Sequence[ScoreFile], columns: Sequence[str]) -> TableSurvey:
    """Count the rows, and find which labels and splits there are: two parts at a time."""
    names = [name for name in ("label", "label_name", "split") if name in columns]
    with ThreadPoolExecutor(2) as threads:
        looked = list(threads.map(partial(_survey_file, names=names), parts))
    called: dict[Any, set[str]] = {}
    for label, name in sorted({pair for pairs, _, _ in looked for pair in pairs}, key=str):
        called.setdefault(label, set()).add(name)
    splits = {each for _, found, _ in looked for each in found}
    check_splits(splits)
    numbers = {name for name in LOWER_BOUNDS if name in columns}
    classes = _sort_labels(called)
    _check_names(called)
    return TableSurvey(
        num_rows=sum(number for _, _, number in looked),
        classes=pa.array(classes),
        class_names=tuple(min(called[one]) for one in classes),
        splits=tuple(sorted({NO_SPLIT if one is None else str(one) for one in splits})) or (NO_SPLIT,),
        empty=frozenset(numbers - {name for part in parts for name in _non_empty_columns(part, numbers)}),
        named=all(len(each) == 1 and "" not in each for each in called.values()),
        all_split=None not in splits,
    )


def _survey_file(part: ScoreFile, *, names: Sequence[str]) -> tuple[set[tuple[Any, str]], set[str | None], int]:
    """Give the labels of a part with their names, its splits, and its number of rows."""
    pairs: set[tuple[Any, str]] = set()
    splits: set[str | None] = set()
    number = 0
    for table in read_tables(part, names, dictionary=names):
        number += len(table)
        check_no_nulls(table, [label_column(table)], part)
        if "split" in names:
            splits |= set(pc.unique(table["split"]).to_pylist())
        pairs |= set(_label_name_pairs(table))
    return pairs, splits, number


def _check_names(called: Mapping[Any, set[str]]) -> None:
    """Raise ScoreError for a class of two names: no manifest of it would hold what `verify` expects."""
    twice = [(label, names) for label, names in called.items() if len(names) > 1]
    if twice:
        label, names = twice[0]
        shown = ", ".join(repr(name) if name else "none" for name in sorted(names)[:3])
        raise ScoreError(
            f"{len(twice):,} labels have more than one label_name (the first: {label} is {shown}): "
            "give each class one name, or leave label_name out"
        )


def _sort_labels(labels: Iterable[Any]) -> list[Any]:
    """Sort labels; ScoreError for those of two kinds, and for numbers that a manifest has no room for."""
    kinds = sorted({type(one).__name__ for one in labels})
    if len(kinds) > 1:
        raise ScoreError(f"column label is {' in one shard and '.join(kinds)} in another: write all labels alike")
    found = sorted(labels)
    if kinds == ["int"] and (wrong := [one for one in (found[0], found[-1]) if not -(2**31) <= one < 2**31]):
        raise ScoreError(f"label {wrong[0]} has more than 32 bits: number the classes anew, or give label_name alone")
    return found


def _label_name_pairs(table: pa.Table) -> list[tuple[Any, str]]:
    """Give each label of a table with each name it has."""
    label, name = (encode_dictionary(column) for column in (class_values(table), table[name_column(table)]))
    codes = label.indices.to_numpy().astype(np.int64) * (len(name.dictionary) + 1)
    codes += name.indices.fill_null(len(name.dictionary)).to_numpy()
    labels, names = label.dictionary.to_pylist(), [*map(str, name.dictionary.to_pylist()), ""]
    return [
        (labels[code // len(names)], names[code % len(names)]) for code in np.flatnonzero(np.bincount(codes)).tolist()
    ]


def _non_empty_columns(part: ScoreFile, names: set[str]) -> set[str]:
    """Tell which of these columns hold anything; by the statistics of a file, and if it has none by what they hold."""
    if isinstance(part, pa.Table):
        return {name for name in names if part[name].null_count < len(part)}
    about = read_footer(part, error=ScoreError)
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
    for table in read_tables(part, unknown - found) if unknown - found else ():
        found |= {name for name in table.column_names if table[name].null_count < len(table)}
    return found
