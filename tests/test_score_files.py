"""Tests of score files: files are found once and sorted by content; prefetch is complete and in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import ScoreError
from mmaudit.rebalance import score_files
from mmaudit.rebalance.score_files import (
    check_schema,
    display_name,
    find_score_files,
    prefetch,
    read_score_schema,
    read_tables,
    sort_by_first_id,
)


def write(path: Path, ids: list[str], **columns: pa.Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"sample_id": pa.array(ids, pa.string()), **columns}), path)
    return path


def test_folder_glob_and_list_find_the_same_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.parquet", [name]) for name in "ab"]
    write(tmp_path / ".hidden.parquet", ["c"])
    (tmp_path / "notes.txt").write_text("d")
    for source in (tmp_path, str(tmp_path), str(tmp_path / "[ab].parquet"), paths, [paths[0], tmp_path, *paths]):
        assert find_score_files(source) == paths
    for nothing in (tmp_path / "none", str(tmp_path / "*.csv"), [paths[0], tmp_path / "none"]):
        with pytest.raises(
            ScoreError, match=r"score table .* not found: pass a Parquet file, a folder of them or a glob"
        ):
            find_score_files(nothing)


@given(st.permutations("abcd"), st.sets(st.sampled_from("abcd"), min_size=1))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_are_sorted_by_first_id_without_empty_ones(tmp_path: Path, first_ids: list[str], full: set[str]) -> None:
    paths = [
        write(tmp_path / f"{n}.parquet", [first_id, "0"] if first_id in full else [])
        for n, first_id in enumerate(first_ids)
    ]
    assert [first_ids[paths.index(path)] for path in sort_by_first_id(paths)] == sorted(full)


@given(st.integers(0, 20), st.integers(1, 7))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_hold_the_rows_of_a_file_or_table(tmp_path: Path, num_rows: int, batch: int) -> None:
    ids = [f"s{row}" for row in range(num_rows)]
    path = write(tmp_path / "x.parquet", ids, split=pa.array(ids), other=pa.array(range(num_rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_files, "BATCH_ROWS", batch)
        for file in (path, pq.read_table(path)):
            tables = list(read_tables(file, ["split", "sample_id"], dictionary=["split"]))
            assert all(table.column_names == ["split", "sample_id"] for table in tables)
            assert [len(table) for table in tables if len(table) not in (0, batch)] == [num_rows % batch] * (
                num_rows % batch > 0
            )
            assert [split for table in tables for split in table["split"].to_pylist()] == ids


def test_file_that_is_not_parquet_raises(tmp_path: Path) -> None:
    path = tmp_path / "text.parquet"
    path.write_text("sample_id,label\n")
    for read in (lambda: read_score_schema(path), lambda: list(read_tables(path, ["sample_id"]))):
        with pytest.raises(ScoreError, match=r"text\.parquet cannot be read as Parquet"):
            read()


def test_repeated_columns_raise(tmp_path: Path) -> None:
    check_schema(pa.schema([("sample_id", pa.string()), ("extra", pa.list_(pa.int8()))]), tmp_path)
    with pytest.raises(ScoreError, match="has 2 columns named label: column names must be unique"):
        check_schema(pa.schema([("label", pa.int32()), ("label", pa.int32())]), tmp_path)
    assert display_name(tmp_path) == str(tmp_path)


@given(st.lists(st.integers()), st.integers(1, 5))
def test_prefetch_keeps_the_order(items: list[int], depth: int) -> None:
    assert list(prefetch(items, depth=depth)) == items


def test_prefetch_reads_at_most_depth_ahead() -> None:
    read: list[int] = []

    def source() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    items = prefetch(source(), depth=2)
    assert next(items) == 0
    time.sleep(0.1)
    assert len(read) <= 4  # one yielded, two queued, one being queued
    items.close()  # type: ignore[attr-defined]


class SourceError(Exception):
    """Error raised by a source."""


def test_source_error_is_raised_after_its_items() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise SourceError("here")

    items = prefetch(source())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(SourceError, match="here"):
        next(items)


@pytest.mark.parametrize("num_read", [0, 1, 5])
def test_thread_ends_when_the_iterator_is_closed(num_read: int) -> None:
    before = set(threading.enumerate())
    items = prefetch(iter(range(10**9)))
    for number in range(num_read):
        assert next(items) == number
    items.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
