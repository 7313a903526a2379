"""Csv, jsonl and Parquet files: equal rows in every format, and errors for damaged files."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaudit.audit.dataset.dataset import open_dataset
from mmaudit.audit.dataset.formats import Plan
from mmaudit.audit.dataset.formats.tables import (
    METADATA_NAMES,
    OTHER_FORMS,
    concat_rows,
    find_tables,
    memory_shards,
    plan_files,
    plan_parquet_folder,
    plan_tables,
    read_rows,
    read_tables,
    source_error,
)
from mmaudit.audit.errors import DatasetError

ROWS = [
    {"id": "007", "label": "1", "text": 'She said "no",\nand left'},
    {"id": "08", "label": "2", "text": "ünïcode 狗"},
    {"id": "2020-01-01", "label": "2", "text": "12:30:00"},
]
CSV = '\ufeffid,label,text\n007,1,"She said ""no"",\nand left"\n08,2,ünïcode 狗\n2020-01-01,2,12:30:00\n'
JSONL = (
    '{"id": "007", "label": "1", "text": "She said \\"no\\",\\nand left"}\n'
    '{"id": "08", "label": "2", "text": "ünïcode 狗"}\n'
    '{"id": "2020-01-01", "label": "2", "text": "12:30:00"}\n'
)


def rows_of(plan: Plan) -> list[dict[str, object]]:
    return [row for shard in plan.shards for row in shard.read(plan.sample.column_names).to_pylist()]


def write_file(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_strings_and_lists_of_other_offsets_are_the_same_columns(tmp_path: Path) -> None:
    kinds = [(pa.string(), pa.binary(), pa.list_), (pa.large_string(), pa.large_binary(), pa.large_list)]
    for number, (text, media, listed) in enumerate(kinds):
        columns = {
            "label": pa.array(["a", "b"], text),
            "image": pa.array([b"\x89PNG\r\n\x1a\n", None], media),
            "vector": pa.array([[1.0, 2.0], [3.0, float(number)]], listed(pa.float32())),
            "words": pa.array([["x"], []], listed(text)),
        }
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    plan = plan_parquet_folder(str(tmp_path), shard_rows=8, allow_outside=False)
    assert plan is not None
    assert plan.sample.num_rows == 4
    rows = [row for shard in plan.shards for row in shard.read(["label", "vector"]).to_pylist()]
    assert [row["label"] for row in rows] == ["a", "b", "a", "b"]
    assert rows[-1]["vector"] == [3.0, 1.0]


def test_formats_give_equal_rows(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "m.parquet")
    for path in (write_file(tmp_path / "m.csv", CSV), write_file(tmp_path / "m.jsonl", JSONL), tmp_path / "m.parquet"):
        assert read_rows(path).to_pylist() == ROWS


def test_date_like_strings_of_jsonl_stay_strings(tmp_path: Path) -> None:
    path = write_file(tmp_path / "m.jsonl", '{"n": 1, "id": "2020-01-01", "at": "2020-01-01 10:00:00"}\n')
    rows = read_rows(path)
    assert rows.column_names == ["n", "id", "at"]
    assert rows.to_pylist() == [{"n": 1, "id": "2020-01-01", "at": "2020-01-01 10:00:00"}]


def test_only_empty_csv_cells_are_null(tmp_path: Path) -> None:
    rows = read_rows(write_file(tmp_path / "m.csv", 'id,label,text\na,NA,""\nb,null,\nc,nan,x\n'))
    assert rows["label"].to_pylist() == ["NA", "null", "nan"]
    assert rows["text"].to_pylist() == [None, None, "x"]


def test_line_break_in_a_cell_of_a_long_csv_is_kept(tmp_path: Path) -> None:
    """The file is longer than the megabyte that is parsed at once."""
    text = "\n".join(["a line of thirty characters..."] * 20)
    rows = "".join(f'{number},"{text}"\n' for number in range(4_000))
    read_back = read_rows(write_file(tmp_path / "m.csv", f"id,text\n{rows}"))
    assert read_back["id"].to_pylist() == [str(number) for number in range(4_000)]
    assert set(read_back["text"].to_pylist()) == {text}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", b""),
        ("m.csv", b"id,label\n1\n"),
        ("m.csv", "id,label\n1,é\n".encode("latin1")),
        ("m.csv", "idé,label\n1,2\n".encode("latin1")),
        ("m.jsonl", b""),
        ("m.jsonl", b'[{"id": 1}]\n'),
        ("m.jsonl", b'{"id": 1}\n{"id": "a"}\n'),
        ("m.jsonl", b'{"id": 1'),
        ("m.parquet", b"PAR1 and no more"),
        ("m.parquet", b""),
    ],
)
def test_damaged_file_is_reported(tmp_path: Path, name: str, content: bytes) -> None:
    path = write_file(tmp_path / name, content)
    with pytest.raises(DatasetError) as caught:
        read_rows(path)
    assert str(caught.value).startswith((f"{path} cannot be read: ", f"{path} cannot be read as Parquet: "))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", METADATA_NAMES)
def test_metadata_file_of_a_folder_is_found(tmp_path: Path, name: str) -> None:
    path = write_file(tmp_path / name, "x")
    write_file(tmp_path / f"._{name}", "x")
    assert find_tables(str(tmp_path)) == [path]
    assert find_tables(str(path)) == [path]


def test_files_of_a_glob_are_sorted(tmp_path: Path) -> None:
    paths = [write_file(tmp_path / f"part-{number}.parquet", "x") for number in (2, 0, 1)]
    assert find_tables(f"{tmp_path}/part-*.parquet") == sorted(paths)


def test_sources_without_table_are_rejected(tmp_path: Path) -> None:
    write_file(tmp_path / "m.xlsx", "x")
    for data, reason in {
        "none": "^no such folder or file: ",
        "*.parquet": "^no such folder or file: ",
        "": r"has none of metadata\.csv, .*: write one with a column file_name",
        ".": OTHER_FORMS,
        "m.xlsx": r"neither a folder nor a \.parquet, \.csv, \.tsv, \.jsonl or \.tar file",
        "*.xlsx": r"matches m\.xlsx; a glob must match files of one format: .*; " + OTHER_FORMS,
    }.items():
        assert find_tables(f"{tmp_path}/{data}") == []
        assert re.search(reason, str(source_error(f"{tmp_path}/{data}")))
    write_file(tmp_path / "metadata.csv", "x")
    write_file(tmp_path / "metadata.jsonl", "x")
    with pytest.raises(DatasetError, match=r"matches metadata\.csv and metadata\.jsonl: pass a glob of files of one"):
        find_tables(f"{tmp_path}/meta*")
    with pytest.raises(DatasetError, match=r"both metadata\.csv and metadata\.jsonl: pass the path of one of them"):
        find_tables(str(tmp_path))


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(1, 12))
def test_memory_shards_partition_the_rows(num_rows: int, shard_rows: int) -> None:
    rows = pa.table({"id": list(range(num_rows)), "other": [None] * num_rows})
    shards = memory_shards(rows, shard_rows=shard_rows)
    assert [value for shard in shards for value in shard.read(["id"])["id"].to_pylist()] == list(range(num_rows))
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert [shard.first for shard in shards] == list(range(0, num_rows, shard_rows))
    assert all(0 < shard.num_rows <= shard_rows for shard in shards)
    assert all(shard.read(["other"]).column_names == ["other"] for shard in shards)


def test_files_of_one_format_are_concatenated(tmp_path: Path) -> None:
    first, second = '{"id": "a", "n": 1, "x": null}\n', '{"id": "b", "n": 2, "x": "word"}\n'
    paths = [write_file(tmp_path / "1.jsonl", first), write_file(tmp_path / "2.jsonl", second)]
    assert find_tables(f"{tmp_path}/*.jsonl") == paths
    assert read_tables(paths, root=tmp_path).to_pylist() == [
        {"id": "a", "n": 1, "x": None},
        {"id": "b", "n": 2, "x": "word"},
    ]
    halves = [write_file(tmp_path / "1.csv", "id,n\na,1\n"), write_file(tmp_path / "2.csv", "id,n\nb,2\n")]
    plan = plan_files(tmp_path, halves, shard_rows=1)
    assert [shard.read(["id"])["id"].to_pylist() for shard in plan.shards] == [["a"], ["b"]]
    assert plan.root == tmp_path


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("n.csv", "id,n\na,1\n", "id,m\nb,2\n"), ("n.jsonl", '{"id": "a"}\n', '{"id": "a", "m": 2}\n')],
)
def test_files_with_different_columns_are_rejected(tmp_path: Path, name: str, first: str, second: str) -> None:
    paths = [write_file(tmp_path / f"1{name}", first), write_file(tmp_path / f"2{name}", second)]
    with pytest.raises(DatasetError, match=f"2{name} has different columns from .*1{name}"):
        plan_files(tmp_path, paths, shard_rows=9)


def test_tables_are_concatenated_by_column_name() -> None:
    parts = [pa.table({"a": [1], "b": ["x"]}), pa.table({"c": [0.5], "a": [2.5]})]
    assert concat_rows(parts, source="here").to_pylist() == [
        {"a": 1.0, "b": "x", "c": None}, {"a": 2.5, "b": None, "c": 0.5}
    ]  # fmt: skip
    with pytest.raises(DatasetError, match=r"^here: the parts have columns of different types: "):
        concat_rows([parts[0], pa.table({"a": ["word"]})], source="here")


def test_splits_are_inferred_from_parquet_file_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mmaudit")
    light, heavy = pa.table({"id": ["a"]}), pa.table({"id": ["a"], "x": [[0.5]]})
    for rows in (light, heavy):
        for name in ("train-0", "test-0"):
            pq.write_table(rows, tmp_path / f"{name}.parquet")
        plan = plan_parquet_folder(str(tmp_path), shard_rows=1, allow_outside=False)
        assert plan is not None
        assert plan.sample.column_names == [*rows.column_names, "split"]
        assert [shard.read(["split", "id"]).to_pylist() for shard in plan.shards] == [
            [{"split": "test", "id": "a"}], [{"split": "train", "id": "a"}]
        ]  # fmt: skip
    assert f"split, {tmp_path}, by the names of the files: 1 test, 1 train" in caplog.text


def test_split_column_overrides_file_name(tmp_path: Path) -> None:
    for rows in (pa.table({"split": ["dev"]}), pa.table({"split": ["dev"], "x": [[0.5]]})):
        pq.write_table(rows, tmp_path / "train.parquet")
        plan = plan_files(tmp_path, [tmp_path / "train.parquet"], shard_rows=1, splits=["train"])
        assert plan.shards[0].read(["split"])["split"].to_pylist() == ["dev"]


def table_rows(root: Path) -> list[dict[str, object]]:
    plan = plan_tables(str(root), shard_rows=9, allow_outside=False)
    assert plan is not None
    return rows_of(plan)


def metadata(root: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (root / name).mkdir(parents=True)
        suffix = "jsonl" if text.startswith("{") else "csv"
        (root / name / f"metadata.{suffix}").write_text(text)
    return root


def test_tables_of_split_folders_are_concatenated(tmp_path: Path) -> None:
    root = metadata(
        tmp_path,
        test="file_name,sound_path,label,note\na.png,/abs/a.wav,x,a.b\n",
        train='{"file_name": "a.png", "sound_path": "w/a.wav", "label": "y", "age": 3, "f_frames": ["u/a", "v/a"]}\n',
    )
    assert table_rows(root) == [
        {"file_name": "test/a.png", "sound_path": "/abs/a.wav", "label": "x", "note": "a.b", "split": "test",
         "age": None, "f_frames": None},
        {"file_name": "train/a.png", "sound_path": "train/w/a.wav", "label": "y", "note": None, "split": "train",
         "age": 3, "f_frames": ["train/u/a", "train/v/a"]},
    ]  # fmt: skip


def test_other_folders_add_no_split_and_existing_split_is_kept(tmp_path: Path) -> None:
    root = metadata(tmp_path / "a", train="file_name,label\na.png,x\n", speaker="file_name,label\nb.png,y\n")
    assert table_rows(root) == [
        {"file_name": "speaker/b.png", "label": "y"}, {"file_name": "train/a.png", "label": "x"}
    ]  # fmt: skip
    root = metadata(tmp_path / "b", train="file_name,label,split\na.png,x,dev\n", test="file_name,label\nb.png,y\n")
    assert [row["split"] for row in table_rows(root)] == ["test", "dev"]


def test_tables_with_different_types_are_rejected(tmp_path: Path) -> None:
    root = metadata(tmp_path, test="label\nx\n", train='{"label": 3}\n')
    with pytest.raises(DatasetError, match="the parts have columns of different types"):
        open_dataset(root)
