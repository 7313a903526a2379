"""The names of splits: what do people call train, validation and test?"""

from __future__ import annotations

import re

import pyarrow as pa

SPLIT = "split"  # the column that names of files, folders and parts become
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
