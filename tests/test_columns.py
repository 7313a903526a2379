"""Roles of columns, and names of splits."""

from __future__ import annotations

import pyarrow as pa
import pytest

from mmaudit.audit.dataset.columns import (
    SPLIT_NAMES,
    Columns,
    find_columns,
    split_of_file,
    split_of_folder,
    with_split,
)
from mmaudit.audit.errors import ConfigError, DatasetError


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x", "label", "id"], ["id", "label"]),
        (["__key__", "cls", "wav"], ["__key__", "cls"]),
        (["__key__", "id", "label", "cls"], ["id", "label"]),
        (["labels", "text"], ["labels"]),
        (["y", "label_name", "group", "split"], ["y", "label_name", "group", "split"]),
    ],
)
def test_usual_names_are_assigned_their_role(names: list[str], expected: list[str]) -> None:
    assert find_columns(names, {}).names == expected


def test_requested_columns_override_usual_names() -> None:
    names = ["id", "label", "label_name", "split", "group", "other"]
    columns = find_columns(names, {"label": "other", "split": "none", "group": "id"})
    assert columns == Columns(id="id", label="other", label_name=None, group="id", split=None)


def test_missing_and_repeated_columns_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"--group speker: no such column; did you mean speaker\?"):
        find_columns(["label", "speaker"], {"group": "speker"})
    with pytest.raises(DatasetError, match="no label column among a, b: name it with --label"):
        find_columns(["a", "b"], {})
    with pytest.raises(DatasetError, match="more than one column is called 'a'"):
        find_columns(["a", "label", "a"], {})


@pytest.mark.parametrize("name", SPLIT_NAMES)
def test_split_names_are_recognised_in_folders_and_files(name: str) -> None:
    assert split_of_folder(name.upper()) == SPLIT_NAMES[name]
    for file in (f"{name}-00001-of-00002.parquet", f"{name}_1.tar", f"{name}.tar", f"{name}000.tar"):
        assert split_of_file(file) == SPLIT_NAMES[name]


@pytest.mark.parametrize("name", ["trainer", "my-train", "", "-train", "tests", "0-train"])
def test_other_words_are_not_splits(name: str) -> None:
    assert split_of_folder(name) is None
    assert split_of_file(f"{name}.tar") is None


def test_split_column_is_constant_and_keeps_metadata() -> None:
    rows = pa.table({"a": [1, 2]}).replace_schema_metadata({"k": "v"})
    assert with_split(rows, None) is rows
    with_column = with_split(rows, "dev")
    assert with_column["split"].to_pylist() == ["dev", "dev"]
    assert with_column.schema.metadata == {b"k": b"v"}
