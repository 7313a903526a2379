"""Laws of encoding: every kind has an encoder, a vector is taken as it is, and what is wrong comes back as a reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmaudit.audit import encode
from mmaudit.audit.encode import ENCODERS, encode_cell, encode_vectors, preprocessing
from mmaudit.audit.hashing import digest
from mmaudit.audit.media import MediaConfig
from mmaudit.audit.modality import KINDS, Modality
from mmaudit.audit.quality import Reason, UnusableError

MEDIA = MediaConfig()
TYPES = [pa.list_(pa.float32()), pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.int64())]
ROWS = [[1.0, 2.0, 3.0], None, [1.0, 2.0], [], [4.0, None, 6.0], [7.0, 8.0, 9.0]]


def vectors(length: int) -> Modality:
    return Modality(name="v", column="col", kind="features", length=length)


def test_every_kind_has_an_encoder() -> None:
    assert {*ENCODERS, "features"} == set(KINDS)


@pytest.mark.parametrize("type_", TYPES)
def test_vectors_are_taken_as_they_are_and_checked_one_by_one(type_: pa.DataType) -> None:
    whole = pa.array(ROWS, type_)
    for column in (pa.chunked_array([whole]), pa.chunked_array([whole.slice(0, 2), whole.slice(2)])):
        found = encode_vectors(column, vectors(3))
        assert [None if row is None else row.tolist() for row in found.vector] == [[1, 2, 3]] + [None] * 4 + [[7, 8, 9]]
        assert {row.dtype for row in found.vector if row is not None} == {np.dtype(np.float32)}
        reasons = [problem and problem.reason for problem in found.problem]
        wrong = Reason.WRONG_LENGTH
        assert reasons == [None, Reason.MISSING, wrong, wrong, Reason.NOT_FINITE, None]
        assert str(found.problem[2]) == "wrong-length: 2 numbers; most rows have 3"
        assert str(found.problem[4]) == "not-finite: 1 of 3 numbers are not finite"


def test_vectors_of_fixed_length_may_be_null() -> None:
    found = encode_vectors(pa.chunked_array([pa.array([[1, 2], None, [3, 4]], pa.list_(pa.float32(), 2))]), vectors(2))
    assert [None if row is None else row.tolist() for row in found.vector] == [[1, 2], None, [3, 4]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_what_float32_cannot_hold_is_not_finite(value: float) -> None:
    found = encode_vectors(pa.chunked_array([pa.array([[value, 1.0]], pa.list_(pa.float64()))]), vectors(2))
    assert [problem and problem.reason for problem in found.problem] == [Reason.NOT_FINITE]


def test_whole_numbers_past_float32_are_rounded() -> None:
    column = pa.chunked_array([pa.array([[2**24 + 1, 2**53 + 1]], pa.list_(pa.int64()))])
    (row,) = encode_vectors(column, vectors(2)).vector
    assert row is not None
    assert row.tolist() == [2.0**24, 2.0**53]


@given(st.lists(st.lists(st.floats(width=32), min_size=1, max_size=3), min_size=1, max_size=8))
def test_content_is_the_vectors_own(rows: list[list[float]]) -> None:
    found = encode_vectors(pa.chunked_array([pa.array(rows, pa.list_(pa.float32()))]), vectors(2))
    assert found.content == [digest(np.array(row, dtype=np.float32).tobytes()) for row in rows]
    assert [vector is None for vector in found.vector] == [problem is not None for problem in found.problem]


def test_a_cell_is_encoded_or_says_why_not() -> None:
    text = Modality(name="t", column="t", kind="text")
    vector = encode_cell("one two one", text, MEDIA)
    assert isinstance(vector, np.ndarray)
    assert vector.shape == (MEDIA.text_buckets,)
    empty = encode_cell("...", text, MEDIA)
    assert isinstance(empty, UnusableError)
    assert empty.reason is Reason.EMPTY
    missing = UnusableError(Reason.MISSING, "null")
    assert encode_cell(missing, text, MEDIA) is missing
    broken = encode_cell(b"no sound", Modality(name="a", column="a", kind="audio"), MEDIA)
    assert isinstance(broken, UnusableError)
    assert broken.reason is Reason.CORRUPT


@pytest.mark.parametrize("kind", ["audio", "image", "video", "text"])
def test_all_that_decides_about_a_vector_is_in_its_fingerprint(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modality = Modality(name="m", column="c", kind=kind)
    found = {preprocessing(modality, MEDIA)}
    assert preprocessing(replace(modality, name="n", column="d"), MEDIA) in found
    other: dict[str, Any]
    for other in ({"max_seconds": 2.0}, {"image_size": 32}, {"text_buckets": 64}):
        found.add(preprocessing(modality, MediaConfig(**other)))
    monkeypatch.setitem(encode.ENCODERS, kind, replace(ENCODERS[kind], version=99))
    found.add(preprocessing(modality, MEDIA))
    assert len(found) == 5


def test_kinds_and_lengths_are_told_apart() -> None:
    kinds = [Modality(name="m", column="c", kind=kind) for kind in ENCODERS] + [vectors(2), vectors(3)]
    assert len({preprocessing(modality, MEDIA) for modality in kinds}) == len(kinds)
    assert preprocessing(vectors(2), MEDIA) == preprocessing(vectors(2), MediaConfig(image_size=8))
