"""Columns by role (id, label, group, split), and names of splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from ..errors import ConfigError, DatasetError, choices

_ROLE_NAMES = {
    "id": ("sample_id", "id", "uid", "key", "clip_id", "video_id", "__key__"),
    "label": ("label", "class", "category", "target", "y", "label_name", "labels", "cls"),
    "label_name": ("label_name", "class_name"),
    "group": ("group",),
    "split": ("split",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Column name of each role; `label` is required, the others may be None. `id`: columns that form the id, or ()."""

    id: tuple[str, ...]
    label: str
    label_name: str | None
    group: str | None
    split: str | None

    @property
    def names(self) -> list[str]:
        """Names of the columns that have a role; they are not modalities."""
        return [name for name in (*self.id, self.label, self.label_name, self.group, self.split) if name]


def find_columns(names: Sequence[str], requested: Mapping[str, str | None]) -> Columns:
    """Return the column of each role: the requested one, else the first usual name; "none" disables all but the label.

    The id may be composed of several columns, as `video_id,clip_id`.

    Raises DatasetError for repeated columns or a missing label, ConfigError for a requested column that does not exist.
    """
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DatasetError(f"more than one column is called {repeated[0]!r}: rename all but one")
    by_role = {role: _find_column(names, role, requested.get(role)) for role in _ROLE_NAMES if role != "id"}
    label = by_role["label"]
    if label is None:
        raise DatasetError(f"no label column among {', '.join(names)}: name it with --label COLUMN, or call it label")
    if label == "label_name" or requested.get("label") not in (None, "label"):
        by_role["label_name"] = None  # it names the classes of another label column
    return Columns(
        id=_find_id_columns(names, requested.get("id")),
        label=label,
        label_name=by_role["label_name"],
        group=by_role["group"],
        split=by_role["split"],
    )


def _find_id_columns(names: Sequence[str], requested: str | None) -> tuple[str, ...]:
    """Return the columns that form the id, () if there are none."""
    parts = [requested] if requested is None or requested in names else requested.split(",")
    columns = [_find_column(names, "id", part) for part in parts]
    return tuple(column for column in columns if column)


def compose_ids(rows: pa.Table, columns: Sequence[str]) -> list[str]:
    """Return the id of each row: the value of the column, or the values of several, joined by commas.

    In composed ids, commas and backslashes of the values are escaped, so that different values give different ids.
    """
    cells = [[str(value) for value in rows[column].to_pylist()] for column in columns]
    if len(cells) == 1:
        return cells[0]
    escaped = [[text.replace("\\", "\\\\").replace(",", "\\,") for text in texts] for texts in cells]
    return [",".join(values) for values in zip(*escaped, strict=True)]


def _find_column(names: Sequence[str], role: str, requested: str | None) -> str | None:
    if requested == "none" and role in ("id", "group", "split"):
        return None
    if requested is not None and requested not in names:
        raise ConfigError(f"--{role} {requested}: no such column; {choices(requested, names)}")
    return requested or next((name for name in _ROLE_NAMES[role] if name in names), None)


def usual_column(names: Sequence[str], role: str, requested: str | None = None) -> str | None:
    """Return the requested column if there is one, else the first of a usual name for the role, else None."""
    return requested if requested in names else _find_column(names, role, None)


SPLIT = "split"  # the column that holds splits inferred from names of files, folders and dataset parts
SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation"), "test"),
}


def with_split(rows: pa.Table, split: str | None) -> pa.Table:
    """Return the rows with a constant column `split`; unchanged if `split` is None."""
    if split is None:
        return rows
    return rows.append_column(SPLIT, pa.repeat(pa.scalar(split, pa.string()), rows.num_rows))


def text_roles(rows: pa.Table, columns: Columns) -> pa.Table:
    """Return the rows with ids, labels, groups and splits that are bytes as text, or in hexadecimal if not UTF-8."""
    for name in columns.names:
        index = rows.schema.get_field_index(name)
        type_ = rows.schema.types[index] if index >= 0 else pa.null()
        if pa.types.is_binary(type_) or pa.types.is_large_binary(type_):
            texts = [None if cell is None else _decode(cell) for cell in rows[name].to_pylist()]
            rows = rows.set_column(index, name, pa.array(texts, pa.string()))
    return rows


def _decode(cell: bytes) -> str:
    try:
        text = cell.rstrip(b"\0").decode()  # NumPy pads strings of fixed size with NUL
    except UnicodeDecodeError:
        return cell.hex()
    return text if text.isprintable() else cell.hex()
