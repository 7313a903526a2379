"""Laws of the columns of a score table: however labels, splits and numbers were written, they are the same arrays."""

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
def test_places_are_those_among_the_sorted_labels(labels: list[int]) -> None:
    among = sorted(set(labels))
    found = indices_among(pa.chunked_array([labels]), pa.array(among), np.int32)
    assert found.dtype == np.int32
    assert [among[place] for place in found] == labels
    names = [str(one) for one in labels]
    coded = pa.chunked_array([pa.array(names).dictionary_encode()])
    assert [sorted(set(names))[at] for at in indices_among(coded, pa.array(sorted(set(names))), np.int32)] == names


@given(WORDS, WORDS)
def test_codes_are_of_all_chunks(here: list[str | None], there: list[str | None]) -> None:
    words = pa.chunked_array([pa.array(some, pa.string()).dictionary_encode() for some in (here, there)])
    for column in (words, decode_dictionary(words)):
        coded = encode_dictionary(column)
        assert coded.to_pylist() == here + there
        assert len(set(coded.dictionary.to_pylist())) == len(coded.dictionary)


@given(WORDS)
def test_a_row_without_a_split_is_in_all(words: list[str | None]) -> None:
    names = sorted({word or "all" for word in words} | {"z"})
    found = split_indices(pa.table({"split": pa.array(words, pa.string())}), names)
    assert [names[place] for place in found] == [word or "all" for word in words]
    assert split_indices(pa.table({"x": words}), ("all",)).tolist() == [0] * len(words)


def test_labels_are_numbers_where_there_are_numbers() -> None:
    both = pa.table({"label": [1.0, 0.0], "label_name": ["b", "a"]})
    assert (label_column(both), name_column(both), class_values(both).to_pylist()) == ("label", "label_name", [1, 0])
    names = both.select(["label_name"])
    assert (label_column(names), name_column(names), class_values(names).to_pylist()) == (
        *["label_name"] * 2,
        ["b", "a"],
    )
    assert name_column(both.select(["label"])) == "label"
    with pytest.raises(ScoreError, match="column label does not hold classes"):
        class_values(pa.table({"label": [0.5]}))


def test_numbers_are_floats_and_a_null_is_nan() -> None:
    table = pa.table({"x": [1, None, 3], "word": ["a", "b", "c"]})
    np.testing.assert_array_equal(float_column(table, "x"), np.array([1, np.nan, 3], np.float32))
    with pytest.raises(ScoreError, match="column word does not hold numbers"):
        float_column(table, "word")
    check_no_nulls(table, ["word"], table)
    with pytest.raises(ScoreError, match="the score table: column x holds nulls"):
        check_no_nulls(table, ["word", "x"], table)
