"""Tests of score files: files are found once and sorted by content; prefetch is complete and in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import ScoreError
from mmaudit.rebalance import score_files
from mmaudit.rebalance.score_files import (
    check_no_nulls,
    class_values,
    decode_dictionary,
    display_name,
    encode_dictionary,
    find_score_files,
    float_column,
    indices_among,
    label_column,
    name_column,
    prefetch,
    read_score_schema,
    read_tables,
    sort_by_first_id,
    split_indices,
    survey_table,
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
@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_are_sorted_by_first_id_without_empty_ones(tmp_path: Path, first_ids: list[str], full: set[str]) -> None:
    paths = [
        write(tmp_path / f"{n}.parquet", [first_id, "0"] if first_id in full else [])
        for n, first_id in enumerate(first_ids)
    ]
    assert [first_ids[paths.index(path)] for path in sort_by_first_id(paths)] == sorted(full)


@given(st.integers(0, 20), st.integers(1, 7))
@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    pq.write_table(pa.table({"sample_id": ["a"], "extra": [[1]]}), tmp_path / "good.parquet")
    assert read_score_schema(tmp_path / "good.parquet").names == ["sample_id", "extra"]
    with pytest.raises(ScoreError, match="has 2 columns named label: column names must be unique"):
        read_score_schema(pa.table([[1], [2]], names=["label", "label"]))
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


# The columns of a score table.

WORDS = st.lists(st.none() | st.sampled_from(["train", "test", "b"]), max_size=9)


@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 9), min_size=1, max_size=9))
def test_indices_among_sorted_labels(labels: list[int]) -> None:
    sorted_labels = sorted(set(labels))
    indices = indices_among(pa.chunked_array([labels]), pa.array(sorted_labels), np.int32)
    assert indices.dtype == np.int32
    assert [sorted_labels[index] for index in indices] == labels
    names = [str(label) for label in labels]
    coded = pa.chunked_array([pa.array(names).dictionary_encode()])
    assert [
        sorted(set(names))[index] for index in indices_among(coded, pa.array(sorted(set(names))), np.int32)
    ] == names


@given(WORDS, WORDS)
def test_dictionary_covers_all_chunks(first: list[str | None], second: list[str | None]) -> None:
    words = pa.chunked_array([pa.array(chunk, pa.string()).dictionary_encode() for chunk in (first, second)])
    for column in (words, decode_dictionary(words)):
        coded = encode_dictionary(column)
        assert coded.to_pylist() == first + second
        assert len(set(coded.dictionary.to_pylist())) == len(coded.dictionary)


@given(WORDS)
def test_row_without_split_is_in_all(words: list[str | None]) -> None:
    names = sorted({word or "all" for word in words} | {"z"})
    indices = split_indices(pa.table({"split": pa.array(words, pa.string())}), names)
    assert [names[index] for index in indices] == [word or "all" for word in words]
    assert split_indices(pa.table({"x": words}), ("all",)).tolist() == [0] * len(words)


def test_class_column_is_label_if_present() -> None:
    table = pa.table({"label": [1.0, 0.0], "label_name": ["b", "a"]})
    assert (label_column(table), name_column(table), class_values(table).to_pylist()) == ("label", "label_name", [1, 0])
    names = table.select(["label_name"])
    assert (label_column(names), name_column(names), class_values(names).to_pylist()) == (
        *["label_name"] * 2,
        ["b", "a"],
    )
    assert name_column(table.select(["label"])) == "label"
    with pytest.raises(ScoreError, match="column label does not hold classes"):
        class_values(pa.table({"label": [0.5]}))


def test_float_column_reads_null_as_nan() -> None:
    table = pa.table({"x": [1, None, 3], "word": ["a", "b", "c"]})
    np.testing.assert_array_equal(float_column(table, "x"), np.array([1, np.nan, 3], np.float32))
    with pytest.raises(ScoreError, match="column word does not hold numbers"):
        float_column(table, "word")
    check_no_nulls(table, ["word"], table)
    with pytest.raises(ScoreError, match="the score table: column x holds nulls"):
        check_no_nulls(table, ["word", "x"], table)


# The survey of a score table.

ROW = st.tuples(
    st.integers(-2, 3),
    st.sampled_from(["a", "b", None]),
    st.sampled_from(["train", "test", None]),
    st.none() | st.just(0.5),
)
TYPES = {"label": pa.int32(), "label_name": pa.string(), "split": pa.string(), "balance": pa.float32()}


def table(rows: list[tuple[Any, ...]]) -> pa.Table:
    return pa.table(
        {name: pa.array([row[index] for row in rows], type_) for index, (name, type_) in enumerate(TYPES.items())}
    )


@given(st.lists(ROW, min_size=1, max_size=12), st.integers(0, 12), st.booleans())
@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_survey_matches_python(tmp_path: Path, rows: list[tuple[Any, ...]], cut: int, statistics: bool) -> None:
    paths = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    for path, part in zip(paths, (rows[:cut], rows[cut:]), strict=True):
        pq.write_table(table(part), path, write_statistics=statistics)
    names_of_label: dict[int, set[str]] = {}
    for label, name, _, _ in rows:
        names_of_label.setdefault(label, set()).add(name or "")
    for files in (paths, [table(rows)]):
        if any(len(names) > 1 for names in names_of_label.values()):
            with pytest.raises(ScoreError, match="more than one label_name"):
                survey_table(files, list(TYPES))
            continue
        survey = survey_table(files, list(TYPES))
        assert survey.num_rows == len(rows)
        assert survey.classes.to_pylist() == sorted(names_of_label)
        assert list(survey.class_names) == [min(names_of_label[label]) for label in sorted(names_of_label)]
        assert list(survey.splits) == sorted({split or "all" for _, _, split, _ in rows})
        assert survey.every_row_has_split == all(split for _, _, split, _ in rows)
        assert survey.one_name_per_class == all(
            len(names) == 1 and "" not in names for names in names_of_label.values()
        )
        assert survey.empty_columns == ({"balance"} if all(value is None for *_, value in rows) else set())


def test_labels_are_names_if_there_are_no_names() -> None:
    survey = survey_table([pa.table({"label": [2, 1, 1]})], ["label"])
    assert (survey.classes.to_pylist(), survey.class_names, survey.splits) == ([1, 2], ("1", "2"), ("all",))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[1], ["one"]], "column label is int in one shard and str in another"),
        ([[1, 2**31]], "label 2147483648 has more than 32 bits"),
        ([[1, None]], "column label holds nulls"),
        ([[0.5]], "column label does not hold classes"),
    ],
)
def test_invalid_labels_raise(labels: list[list[Any]], words: str) -> None:
    with pytest.raises(ScoreError, match=words):
        survey_table([pa.table({"label": pa.array(values)}) for values in labels], ["label"])
