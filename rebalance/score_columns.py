"""The columns of a score table: what are labels, splits and numbers as arrays, however they were written?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..audit.errors import ScoreError
from ..audit.measures import Floats
from .parts import Part, name_of

NO_SPLIT = "all"  # what the only split is called where there are none
LEAST = {"balance": -1.0, "p_balanced": 0.0}  # the least of each; the largest is 1
_MOST_LABELS = 1 << 16


def label_column(table: pa.Table) -> str:
    """Name the column that tells classes apart."""
    return "label" if "label" in table.column_names else "label_name"


def name_column(table: pa.Table) -> str:
    """Name the column that classes are called by."""
    return "label_name" if "label_name" in table.column_names else "label"


def labels_of(table: pa.Table) -> Any:
    """Give what tells classes apart: the numbers, or the names where the table has no numbers."""
    if "label" not in table.column_names:
        return plain(table["label_name"])
    label = plain(table["label"])
    if pa.types.is_floating(label.type):
        try:
            return label.cast(pa.int64())
        except pa.ArrowException as cause:
            raise ScoreError(f"column label does not hold classes: {str(cause).splitlines()[0]}") from cause
    return label


def plain(column: Any) -> Any:
    """Give a column as strings or numbers, not as a dictionary of them."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def coded_of(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """Give a column as codes of the values it has."""
    coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    return coded.unify_dictionaries().combine_chunks()


def places_of(column: pa.ChunkedArray, among: pa.Array, dtype: type[np.signedinteger[Any]]) -> NDArray[Any]:
    """Give the place among sorted values of each row's, (n,); each is there."""
    if (
        pa.types.is_integer(among.type)
        and len(among)
        and (least := among[0].as_py()) >= 0
        and ((size := among[-1].as_py() - least + 1) <= _MOST_LABELS)
    ):
        table = np.zeros(size, dtype=dtype)  # a table of small numbers is ten times as quick
        table[among.to_numpy() - least] = np.arange(len(among))
        return np.asarray(table[column.to_numpy() - least])
    column = plain(column)
    found = pc.index_in(column, value_set=among.cast(column.type))
    return np.asarray(found.to_numpy().astype(dtype))


def splits_of(table: pa.Table, splits: Sequence[str] | None) -> NDArray[np.int16]:
    """Return the place among `splits` of each row's, (n,); a row of none is in NO_SPLIT. None: they are made anew."""
    if splits is None or "split" not in table.column_names:
        return np.zeros(len(table), dtype=np.int16)
    coded = coded_of(table["split"])
    among = {name: place for place, name in enumerate(splits)}
    names = [NO_SPLIT if each is None else str(each) for each in coded.dictionary.to_pylist()]
    place = np.array([*(among[name] for name in names), among.get(NO_SPLIT, 0)], np.int16)
    return np.asarray(place[coded.indices.fill_null(len(place) - 1).to_numpy()])


def floats_of(table: pa.Table, name: str) -> Floats:
    """Give a column of numbers (n,), null as NaN; ScoreError where it holds none."""
    try:
        column = table[name].cast(pa.float32(), safe=False)
    except pa.ArrowException as cause:
        raise ScoreError(f"column {name} does not hold numbers: {str(cause).splitlines()[0]}") from cause
    return np.asarray(column.to_numpy(), dtype=np.float32)


def check_no_nulls(table: pa.Table, names: Sequence[str], part: Part) -> None:
    """Raise ScoreError where one of these columns holds nulls."""
    where = name_of(part)
    for name in names:
        if table[name].null_count:
            raise ScoreError(f"{where}: column {name} holds nulls; every scored sample has an id and a label")
