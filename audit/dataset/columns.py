"""Columns by role (id, label, group, split), and names of splits."""

from __future__ import annotations

import re
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
    """The column for each role; `label` is always there, the others may be None."""

    id: str | None
    label: str
    label_name: str | None
    group: str | None
    split: str | None

    @property
    def taken(self) -> list[str]:
        """The columns that have a role, and are therefore no modality."""
        return [name for name in (self.id, self.label, self.label_name, self.group, self.split) if name]


def find_columns(names: Sequence[str], named: Mapping[str, str | None]) -> Columns:
    """Find the column of each role: the one that `named` says, else by name; "none" leaves group or split alone."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DatasetError(f"more than one column is called {repeated[0]!r}: rename all but one")
    found = {role: _find_column(names, role, named.get(role)) for role in _ROLE_NAMES}
    label = found["label"]
    if label is None:
        raise DatasetError(f"no label column among {', '.join(names)}: name it with --label COLUMN, or call it label")
    if label == "label_name" or named.get("label") not in (None, "label"):
        found["label_name"] = None  # names of some other label
    return Columns(
        id=found["id"], label=label, label_name=found["label_name"], group=found["group"], split=found["split"]
    )


def _find_column(names: Sequence[str], role: str, named: str | None) -> str | None:
    if named == "none" and role in ("group", "split"):
        return None
    if named is not None and named not in names:
        raise ConfigError(f"--{role} {named}: no such column; {choices(named, names)}")
    return named or next((name for name in _ROLE_NAMES[role] if name in names), None)


SPLIT = "split"  # the column that names of files, folders and parts become
SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation"), "test"),
}
_WORD = re.compile(r"[a-z]+")


def split_of_folder(name: str) -> str | None:
    """Give the split that a folder's whole name stands for, or None."""
    return SPLIT_NAMES.get(name.lower())


def split_of_file(name: str) -> str | None:
    """Give the split that a file's name begins with, as `train-000.tar` does, or None."""
    word = _WORD.match(name.lower())
    return SPLIT_NAMES.get(word.group()) if word else None


def with_split(rows: pa.Table, split: str | None) -> pa.Table:
    """Add the column `split`, the same in every row; None adds nothing."""
    if split is None:
        return rows
    return rows.append_column(SPLIT, pa.repeat(pa.scalar(split, pa.string()), rows.num_rows))
