"""Saved datasets and hub names: shards of any record batches give all rows, and damage is reported."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from conftest import examples
from datasets.table import InMemoryTable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.dataset.formats.saved import SplitFiles, looks_like_hub_name, plan_parts, plan_saved
from mmaudit.audit.errors import DatasetError


def write_arrow(
    path: Path, batches: list[int], *, footer: bool = False, media: bool = True, first: int = 0
) -> pa.Table:
    """Write record batches with these numbers of rows."""
    cells = [b"%d" % row if media else [float(row)] for row in range(first, first + sum(batches))]
    numbers = pa.array(range(first, first + sum(batches)), pa.int64())
    rows = pa.table({"id": numbers, "x": pa.array(cells, pa.binary() if media else pa.list_(pa.float64()))})
    writer = pa.ipc.new_file if footer else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, writer(sink, rows.schema) as file:
        start = 0
        for size in batches:
            columns = [column.combine_chunks() for column in rows.slice(start, size).columns]
            file.write_batch(pa.record_batch(columns, rows.schema.names))
            start += size
    return rows


@pytest.mark.parametrize("footer", [False, True])
@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 12))
def test_shards_of_any_batches_give_all_rows(tmp_path: Path, footer: bool, batches: list[int], shard_rows: int) -> None:
    first = write_arrow(tmp_path / "1.arrow", [1, *batches], footer=footer)
    second = write_arrow(tmp_path / "2.arrow", batches, footer=footer, first=first.num_rows)
    plan = plan_parts(
        tmp_path, [SplitFiles(split=None, paths=(tmp_path / "1.arrow", tmp_path / "2.arrow"))], shard_rows=shard_rows
    )
    shards = [pickle.loads(pickle.dumps(shard)) for shard in plan.shards]
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert all(0 < shard.num_rows <= shard_rows for shard in shards)
    parts = [shard.read(["x", "id"]) for shard in reversed(shards)][::-1]
    assert [part["id"][0].as_py() for part in parts] == [shard.first for shard in shards]
    assert pa.concat_tables(parts).equals(pa.concat_tables([first, second]).select(["x", "id"]))
    assert plan.sample.column_names == ["id", "x"]


def test_files_may_differ_in_the_width_of_offsets(tmp_path: Path) -> None:
    paths = (tmp_path / "1.arrow", tmp_path / "2.arrow")
    for path, type_ in zip(paths, (pa.string(), pa.large_string()), strict=True):
        rows = pa.table({"label": pa.array([path.stem], type_), "x": pa.array([[1.0]])})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as file:
            file.write_table(rows)
    plan = plan_parts(tmp_path, [SplitFiles(split=None, paths=paths)], shard_rows=8)
    assert plan.sample["label"].to_pylist() == ["1", "2"]
    assert [shard.read(["label"])["label"].to_pylist() for shard in plan.shards] == [["1"], ["2"]]


def test_rows_without_media_form_large_shards(tmp_path: Path) -> None:
    write_arrow(tmp_path / "1.arrow", [5_000] * 2, media=False)
    plan = plan_parts(tmp_path, [SplitFiles(split=None, paths=(tmp_path / "1.arrow",))], shard_rows=256)
    assert [shard.num_rows for shard in plan.shards] == [8_192, 1_808]


def test_file_with_fewer_rows_than_planned_is_reported(tmp_path: Path) -> None:
    write_arrow(tmp_path / "1.arrow", [3, 3])
    plan = plan_parts(tmp_path, [SplitFiles(split=None, paths=(tmp_path / "1.arrow",))], shard_rows=4)
    write_arrow(tmp_path / "1.arrow", [5])
    assert plan.shards[0].read(["id"]).num_rows == 4
    with pytest.raises(DatasetError, match=r"1\.arrow cannot be read: it has fewer rows than when it was opened"):
        plan.shards[1].read(["id"])


def save_splits(folder: Path, **splits: dict[str, list[Any]]) -> Path:
    parts = {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


def read_all(folder: Path) -> list[dict[str, Any]]:
    plan = plan_saved(str(folder), shard_rows=2, allow_outside=False)
    assert plan is not None
    return [row for shard in plan.shards for row in shard.read(plan.sample.column_names).to_pylist()]


def test_names_of_saved_splits_become_the_split_column(tmp_path: Path) -> None:
    folder = save_splits(tmp_path / "d", train={"label": [1, 2]}, test={"label": [3]})
    assert read_all(folder) == [{"label": n, "split": s} for n, s in ((1, "train"), (2, "train"), (3, "test"))]
    assert read_all(folder / "test") == [{"label": 3}]
    assert plan_saved(str(tmp_path), shard_rows=2, allow_outside=False) is None


def test_existing_split_column_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mmaudit")
    folder = save_splits(tmp_path / "d", all={"label": [1, 2], "split": ["train", "test"]})
    assert [row["split"] for row in read_all(folder)] == ["train", "test"]
    assert "splits are read from the column split, not from the names of the parts" in caplog.text


def test_saved_selection_is_read_as_its_rows(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"label": list(range(9))})
    rows.shuffle(seed=3).select([5, 1, 7]).save_to_disk(tmp_path / "d")
    assert [row["label"] for row in read_all(tmp_path / "d")] == rows.shuffle(seed=3).select([5, 1, 7])["label"][:]


def test_damaged_files_are_reported(tmp_path: Path) -> None:
    folder = save_splits(tmp_path / "d", train={"label": [1, 2]}, test={"label": [3]})
    data = folder / "test" / "data-00000-of-00001.arrow"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match=r"arrow cannot be read: .*save the dataset again with save_to_disk"):
        read_all(folder)
    data.unlink()
    with pytest.raises(DatasetError, match=r"data-00000-of-00001\.arrow is missing: save the dataset again"):
        read_all(folder)
    (folder / "test" / "state.json").unlink()
    with pytest.raises(DatasetError, match=r"test/state\.json cannot be read"):
        read_all(folder)
    (folder / "dataset_dict.json").write_text('{"splits": []}')
    with pytest.raises(DatasetError, match="names no Arrow file"):
        read_all(folder)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "names no data files"),
        ({"_data_files": [{"filename": "../x.arrow"}]}, "which leads outside"),
        ({"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}, "stores a selection separately"),
        ([1], "cannot be read"),
        ({"_data_files": [5]}, r"_data_files\[0\] is 5; it must be an object"),
    ],
)
def test_invalid_state_is_rejected(tmp_path: Path, state: object, words: str) -> None:
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DatasetError, match=words):
        plan_saved(str(tmp_path), shard_rows=2, allow_outside=False)


def test_splits_with_different_columns_or_classes_are_rejected(tmp_path: Path) -> None:
    folder = save_splits(tmp_path / "d", train={"label": [1, 2]}, test={"label": ["x"]})
    with pytest.raises(DatasetError, match=r"test/data.* has different columns from .*train/data"):
        read_all(folder)
    for name, classes in (("train", ["a", "b"]), ("test", ["b", "a"])):
        schema = datasets.Features({"label": datasets.ClassLabel(names=classes)}).arrow_schema
        datasets.Dataset(InMemoryTable(pa.table({"label": [0, 1]}, schema=schema))).save_to_disk(folder / name)
    with pytest.raises(DatasetError, match=r"has different classes in 'label' from"):
        read_all(folder)


@pytest.mark.parametrize("name", ["user/name", "name", "user/name:config", "name:en-US", "A-b_c.d/x.y", "_u/n"])
def test_hub_names_are_recognised(name: str) -> None:
    assert looks_like_hub_name(name)


@pytest.mark.parametrize(
    "path",
    ["", "/a", "./a", "../a", "a/b/c", "a/", "~/a", "a.csv", "u/a.parquet", "a.tar", "a.jsonl", "a b", "a:", "a\\b"],
)
def test_paths_are_not_hub_names(path: str) -> None:
    assert not looks_like_hub_name(path)
