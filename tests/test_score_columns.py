"""Tests of score-table columns: labels, splits and numbers of any Arrow type give the same arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmaudit.audit.errors import ScoreError
from mmaudit.rebalance.score_files import (
    check_no_nulls,
    class_values,
    decode_dictionary,
    encode_dictionary,
    float_column,
    indices_among,
    label_column,
    name_column,
    split_indices,
)

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
