"""Laws of the names of splits: a folder's whole name, or the first word of a file's, in any case."""

from __future__ import annotations

import pyarrow as pa
import pytest

from mmaudit.audit.dataset.columns import SPLIT_NAMES, split_of_file, split_of_folder, with_split


@pytest.mark.parametrize("name", SPLIT_NAMES)
def test_every_name_is_known_as_folder_and_file(name: str) -> None:
    assert split_of_folder(name.upper()) == SPLIT_NAMES[name]
    for file in (f"{name}-00001-of-00002.parquet", f"{name}_1.tar", f"{name}.tar", f"{name}000.tar"):
        assert split_of_file(file) == SPLIT_NAMES[name]


@pytest.mark.parametrize("name", ["trainer", "my-train", "", "-train", "tests", "0-train"])
def test_other_words_are_none(name: str) -> None:
    assert split_of_folder(name) is None
    assert split_of_file(f"{name}.tar") is None


def test_a_split_is_the_same_in_every_row_and_what_was_said_of_the_others_stays() -> None:
    rows = pa.table({"a": [1, 2]}).replace_schema_metadata({"k": "v"})
    assert with_split(rows, None) is rows
    found = with_split(rows, "dev")
    assert found["split"].to_pylist() == ["dev", "dev"]
    assert found.schema.metadata == {b"k": b"v"}
