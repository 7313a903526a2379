"""Files of a source: each way to name it gives the same rows and splits, and hidden files belong to none."""

from __future__ import annotations

import io
import logging
import os
import tarfile
from pathlib import Path, PurePath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmaudit.audit.dataset.columns import SPLIT_NAMES
from mmaudit.audit.dataset.formats import plan_source, sources
from mmaudit.audit.dataset.formats.sources import (
    divide,
    expand_braces,
    find_files,
    split_of_name,
    split_of_path,
    splits_of,
    strip_wildcard,
)
from mmaudit.audit.errors import DatasetError


@pytest.mark.parametrize("name", SPLIT_NAMES)
def test_words_between_other_characters_are_splits(name: str) -> None:
    for file in ("{}-00001-of-00002.parquet", "{}_1.tar", "{}000.tar", "imagenet1k-{}-0000.tar", "my.{}", "0-{}"):
        assert split_of_name(file.format(name)) == SPLIT_NAMES[name]
        assert split_of_name(file.format(name.upper())) == SPLIT_NAMES[name]


@pytest.mark.parametrize("name", ["trainer", "", "tests.tar", "contest", "train-test.csv", "\u00e4test.csv"])
def test_other_names_are_no_splits(name: str) -> None:
    assert split_of_name(name) is None


def test_innermost_folder_states_the_split() -> None:
    assert split_of_path(PurePath("default/train/0000.parquet")) == "train"
    assert split_of_path(PurePath("test_data/dev/train-0.tar")) == "validation"
    assert split_of_path(PurePath("clips/train-0.tar")) == "train"
    assert split_of_path(PurePath("clips/0.tar")) is None


def test_names_that_divide_nothing_are_no_splits(caplog: pytest.LogCaptureFixture) -> None:
    assert divide(["train", "test", "train"], source="x") == ["train", "test", "train"]
    assert divide(["train", "train"], source="x") == [None, None]
    assert divide(["train", "test", None], source="x") == [None, None, None]
    paths = [Path("d/train.csv"), Path("d/test.csv"), Path("d/extra.csv")]
    assert splits_of(paths, root=Path("d")) == [None, None, None]
    assert "d: 1 of 3 files, such as extra.csv, state no split in their names" in caplog.text


def test_braces_stand_for_lists_and_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    assert expand_braces("a/{train,dev}-{08..10}.tar") == [
        f"a/{split}-{number}.tar" for split in ("dev", "train") for number in ("08", "09", "10")
    ]
    assert expand_braces("a/{x}.csv") == ["a/{x}.csv"]
    assert expand_braces("{a,b{1,2}}") == ["a", "b1", "b2"]
    monkeypatch.setattr(sources, "_MAX_PATTERNS", 99)
    with pytest.raises(DatasetError, match="stands for more than 99 files"):
        expand_braces("{0..9}{0..9}")


def write_tar(path: Path, key: str) -> None:
    with tarfile.open(path, "w") as archive:
        for name in (f"{key}.cls", f"._{key}.cls", f"__MACOSX/{key}.cls"):
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b"1"))


def write_part(path: Path, key: str) -> None:
    """Write a file of one row, and the file that macOS leaves beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    (path.parent / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    if path.suffix == ".tar":
        write_tar(path, key)
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"__key__": [key], "x": [[0.5, 1.0]]}), path)
    else:
        path.write_text("__key__,label\n" + f"{key},x\n")


LAYOUTS = {
    "csv": (("train.csv", "test.csv"), ("", "*", "**", "*.csv", "t*.csv", "{train,test}.csv")),
    "jsonl folder of data": (("data/train.tsv", "data/test.tsv"), ("", "*/*.tsv", "data", "data/*")),
    "metadata": (
        ("train/metadata.csv", "test/metadata.csv"),
        ("", "*", "*/metadata.csv", "**/*.csv", "{train,test}", "{train,test}/metadata.csv", "t*"),
    ),
    "hub": (
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("", "default", "default/*", "*/*/*.parquet", "default/{train,test}", "default/{train,test}/0000.parquet"),
    ),
    "hub data": (
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("", "data", "data/*.parquet", "**/*.parquet", "data/{train,test}-*.parquet"),
    ),
    "parquet": (("train.parquet", "test.parquet"), ("", "*.parquet", "{train,test}.parquet")),
    "tars": (
        ("cc-train-0000.tar", "cc-eval-0000.tar"),
        ("", "*", "*.tar", "cc-{train,eval}-{0000..0000}.tar"),
    ),
    "tars of folders": (("train/0.tar", "test/0.tar"), ("", "*", "*/*.tar", "{train,test}", "{train,test}/0.tar")),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_name_of_a_source_gives_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    files, names = LAYOUTS[layout]
    for file, key in zip(files, ("a", "b"), strict=True):
        write_part(tmp_path / "source" / file, key)
    expected = {("a", "train"), ("b", "test")}
    read = []
    for name in [f"{tmp_path}/source/{name}" for name in names]:
        plan = plan_source(name, reader="auto", shard_rows=8, allow_outside=False)
        rows = [row for shard in plan.shards for row in shard.read(["__key__", "split"]).to_pylist()]
        assert {(row["__key__"], row["split"]) for row in rows} == expected, name
        read.append((rows, plan.head.schema))
    assert all(other == read[0] for other in read)
    monkeypatch.chdir(tmp_path / "source")
    plan = plan_source(".", shard_rows=8, allow_outside=False)
    assert [row for shard in plan.shards for row in shard.read(["__key__", "split"]).to_pylist()] == read[0][0]


def test_missing_part_of_a_brace_pattern_is_named(tmp_path: Path) -> None:
    write_part(tmp_path / "train-0.tar", "a")
    with pytest.raises(DatasetError, match=r"^no such folder or file: \S*train-1\.tar, of "):
        plan_source(f"{tmp_path}/train-{{0..2}}.tar", shard_rows=8, allow_outside=False)


def test_skipped_matches_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mmaudit")
    write_part(tmp_path / "part-0.csv", "a")
    (tmp_path / "part-0.md").write_text("x")
    plan = plan_source(f"{tmp_path}/part-*", shard_rows=8, allow_outside=False)
    assert [shard.num_rows for shard in plan.shards] == [1]
    assert f"skipped 1 matches of other kinds, such as {tmp_path}/part-0.md" in caplog.text


def test_several_sets_in_one_folder_are_rejected(tmp_path: Path) -> None:
    for configuration in ("en", "fr"):
        for split in ("train", "test"):
            write_part(tmp_path / configuration / split / "0.parquet", "a")
    with pytest.raises(DatasetError, match=r"holds 2 sets of files \(en, fr\): pass the folder of one"):
        find_files(tmp_path, [".parquet"])


def test_git_lfs_pointers_are_named_in_every_format(tmp_path: Path) -> None:
    for name in ("m.csv", "m.tsv", "m.jsonl", "m.parquet", "m.tar"):
        path = tmp_path / name
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 72862\n")
        for data in (path, f"{tmp_path}/*{path.suffix}"):
            with pytest.raises(DatasetError, match=rf"{name} cannot be read: it is a Git LFS pointer.*git lfs pull"):
                plan_source(str(data), shard_rows=8, allow_outside=False)


def test_pattern_of_a_whole_folder_is_the_folder(tmp_path: Path) -> None:
    for suffix in ("/*", "/**", "/**/*"):
        assert strip_wildcard(f"{tmp_path}{suffix}") == str(tmp_path)
    for data in (f"{tmp_path}/*.csv", "none/*", f"{tmp_path}", os.fspath(tmp_path / "x" / "*")):
        assert strip_wildcard(data) == data
