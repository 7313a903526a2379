"""Roles of columns, names of splits, and cells of frames; other cells are tested in test_dataset.py."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmaudit.audit.dataset.columns import (
    Columns,
    compose_ids,
    find_columns,
    holds_pictures,
    load_cell,
    with_split,
)
from mmaudit.audit.dataset.modalities import Modality
from mmaudit.audit.errors import ConfigError, DatasetError, Reason, UnusableError


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


FLOW = Modality(name="flow", column="flow_frames", kind="frames")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for path in (
        "data/u/a/9.jpg",
        "data/u/a/10.jpg",
        "data/u/a/._9.jpg",
        "data/u/a/note.txt",
        "data/v/a/0.PNG",
        "out/0.png",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.removeprefix("data/").encode())
    (tmp_path / "data" / "empty").mkdir()
    (tmp_path / "data" / "out").symlink_to(tmp_path / "out")
    (tmp_path / "data" / "mixed").mkdir()
    (tmp_path / "data" / "mixed" / "0.png").symlink_to(tmp_path / "out" / "0.png")
    return tmp_path / "data"


def load(cell: object, root: Path, *, allow_outside: bool = False) -> object:
    return load_cell(cell, FLOW, root=root, allow_outside=allow_outside)


def test_frames_of_a_folder_are_sorted_naturally(root: Path) -> None:
    assert load("u/a", root) == ((b"u/a/9.jpg", b"u/a/10.jpg"),)
    assert load(["u/a", "v/a/"], root) == ((b"u/a/9.jpg", b"u/a/10.jpg"), (b"v/a/0.PNG",))


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (None, Reason.MISSING),
        ([], Reason.MISSING),
        (["u/a", None], Reason.MISSING),
        ("none", Reason.MISSING),
        (["u/a", "v/none"], Reason.MISSING),
        ("u/a/9.jpg", Reason.MISSING),
        ("empty", Reason.EMPTY),
        (["u/a", "empty"], Reason.EMPTY),
        ("nul\0", Reason.MISSING),
    ],
)
def test_missing_folders_are_unusable_with_reason(root: Path, cell: object, reason: Reason) -> None:
    with pytest.raises(UnusableError) as caught:
        load(cell, root)
    assert caught.value.reason is reason


@pytest.mark.parametrize("cell", ["../out", "out", "mixed", ["u/a", "../out"]])
def test_folders_and_images_outside_the_root_are_rejected(root: Path, cell: object) -> None:
    with pytest.raises(DatasetError, match="leads outside"):
        load(cell, root)
    allowed = load(cell, root, allow_outside=True)
    assert isinstance(allowed, tuple)
    assert allowed[-1] == (b"out/0.png",)


def test_struct_without_bytes_and_path_is_missing(root: Path) -> None:
    sound = Modality(name="a", column="a", kind="audio")
    with pytest.raises(UnusableError, match="neither bytes nor a path"):
        load_cell({"bytes": None, "path": None}, sound, root=root, allow_outside=False)


def test_folders_of_images_are_recognised(root: Path) -> None:
    folders = ["u/a", "v/a", "empty", "none", "u/a/9.jpg", "out", "..", "nul\0"]
    assert [folder for folder in folders if holds_pictures(folder, root=root)] == ["u/a", "v/a"]
