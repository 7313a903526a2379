"""Roles of columns, and names of splits."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmaudit.audit.dataset.columns import Columns, compose_ids, find_columns, with_split
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
    assert columns == Columns(id=("id",), label="other", label_name=None, group="id", split=None)


def test_id_may_be_composed_or_left_out() -> None:
    names = ["video", "clip", "a,b", "id", "label"]
    assert find_columns(names, {}).id == ("id",)
    assert find_columns(names, {"id": "none"}).id == ()
    assert find_columns(names, {"id": "a,b"}).id == ("a,b",)
    assert find_columns(names, {"id": "video,clip"}).names == ["video", "clip", "label"]
    with pytest.raises(ConfigError, match=r"--id clib: no such column; did you mean clip\?"):
        find_columns(names, {"id": "video,clib"})


CELLS = st.text("a,\\", max_size=3)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1))
def test_different_cells_give_different_composed_ids(cells: list[tuple[str, str]]) -> None:
    rows = pa.table({"video": [first for first, _ in cells], "clip": [second for _, second in cells]})
    assert len(set(compose_ids(rows, ["video", "clip"]))) == len(set(cells))
    assert compose_ids(rows, ["clip"]) == rows["clip"].to_pylist()


def test_missing_and_repeated_columns_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"--group speker: no such column; did you mean speaker\?"):
        find_columns(["label", "speaker"], {"group": "speker"})
    with pytest.raises(DatasetError, match="no label column among a, b: name it with --label"):
        find_columns(["a", "b"], {})
    with pytest.raises(DatasetError, match="more than one column is called 'a'"):
        find_columns(["a", "label", "a"], {})


def test_split_column_is_constant_and_keeps_metadata() -> None:
    rows = pa.table({"a": [1, 2]}).replace_schema_metadata({"k": "v"})
    assert with_split(rows, None) is rows
    with_column = with_split(rows, "dev")
    assert with_column["split"].to_pylist() == ["dev", "dev"]
    assert with_column.schema.metadata == {b"k": b"v"}
