"""Laws of the parts of a table: files are found once and ordered by what they hold; what is read ahead is all there."""

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
from mmaudit.rebalance import score_files as parts
from mmaudit.rebalance.score_files import (
    check_schema,
    display_name,
    find_score_files,
    prefetch,
    read_score_schema,
    read_tables,
    sort_by_first_id,
)


def write(path: Path, ids: list[str], **more: pa.Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"sample_id": pa.array(ids, pa.string()), **more}), path)
    return path


def test_a_folder_a_glob_and_a_list_are_the_same_files(tmp_path: Path) -> None:
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
def test_parts_come_by_their_first_id_and_empty_ones_not_at_all(
    tmp_path: Path, firsts: list[str], full: set[str]
) -> None:
    paths = [write(tmp_path / f"{n}.parquet", [one, "0"] if one in full else []) for n, one in enumerate(firsts)]
    assert [firsts[paths.index(path)] for path in sort_by_first_id(paths)] == sorted(full)


@given(st.integers(0, 20), st.integers(1, 7))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_are_the_rows_of_a_file_or_a_table(tmp_path: Path, num_rows: int, batch: int) -> None:
    ids = [f"s{row}" for row in range(num_rows)]
    path = write(tmp_path / "x.parquet", ids, split=pa.array(ids), other=pa.array(range(num_rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "BATCH_ROWS", batch)
        for part in (path, pq.read_table(path)):
            tables = list(read_tables(part, ["split", "sample_id"], dictionary=["split"]))
            assert all(table.column_names == ["split", "sample_id"] for table in tables)
            assert [len(table) for table in tables if len(table) not in (0, batch)] == [num_rows % batch] * (
                num_rows % batch > 0
            )
            assert [each for table in tables for each in table["split"].to_pylist()] == ids


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.parquet"
    path.write_text("sample_id,label\n")
    for read in (lambda: read_score_schema(path), lambda: list(read_tables(path, ["sample_id"]))):
        with pytest.raises(ScoreError, match=r"text\.parquet cannot be read as Parquet"):
            read()


def test_a_schema_names_each_column_once(tmp_path: Path) -> None:
    check_schema(pa.schema([("sample_id", pa.string()), ("extra", pa.list_(pa.int8()))]), tmp_path)
    with pytest.raises(ScoreError, match="has 2 columns named label: column names must be unique"):
        check_schema(pa.schema([("label", pa.int32()), ("label", pa.int32())]), tmp_path)
    assert display_name(tmp_path) == str(tmp_path)


@given(st.lists(st.integers()), st.integers(1, 5))
def test_what_is_read_ahead_keeps_its_order(items: list[int], depth: int) -> None:
    assert list(prefetch(items, depth=depth)) == items


def test_no_more_is_read_ahead_than_asked() -> None:
    read: list[int] = []

    def source() -> Iterator[int]:
        for one in range(100):
            read.append(one)
            yield one

    items = prefetch(source(), depth=2)
    assert next(items) == 0
    time.sleep(0.1)
    assert len(read) <= 4  # the one given, two that wait, and one in hand
    items.close()  # type: ignore[attr-defined]


class Spoiled(Exception):
    """What a source may raise."""


def test_an_error_of_the_source_comes_after_what_was_read() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise Spoiled("here")

    items = prefetch(source())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(Spoiled, match="here"):
        next(items)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_the_thread_ends_when_nobody_reads_on(taken: int) -> None:
    before = set(threading.enumerate())
    items = prefetch(iter(range(10**9)))
    for number in range(taken):
        assert next(items) == number
    items.close()  # type: ignore[attr-defined]
    late = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < late:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
