"""Laws of a cache file: what was gathered is found again by its content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import DatasetError
from mmaudit.audit.features.cache import (
    CachedVectors,
    EncodeResult,
    combine_results,
    content_of,
    encoded_table,
    lengths_of,
    problems_of,
    read_arrow,
    write_arrow,
)
from mmaudit.audit.hashing import digest
from mmaudit.audit.quarantine import Reason, UnusableError


def contents(count: int) -> list[bytes]:
    return [digest(str(row).encode()).encode() for row in range(count)]


def rows(usable: list[bool], dtype: type) -> list[EncodeResult]:
    return [
        np.arange(row, row + 3, dtype=dtype) if good else UnusableError(Reason.EMPTY, f"row {row}")
        for row, good in enumerate(usable)
    ]


@settings(max_examples=30, deadline=None)
@given(usable=st.lists(st.booleans(), max_size=9), dtype=st.sampled_from([np.float32, np.uint8]))
def test_written_results_are_read_back(
    usable: list[bool], dtype: type, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cache") / "0.arrow"
    found, content = rows(usable, dtype), contents(len(usable))
    ids = [f"s{row}" for row in range(len(usable))]
    encoded = combine_results(content, found, encoder="e")
    write_arrow(encoded_table(ids, encoded), path)
    table = read_arrow(path)
    assert content_of(table).tolist() == content
    assert table["vector"].type == pa.large_list(pa.from_numpy_dtype(encoded.vector.dtype))
    assert [row for row, _, _ in problems_of(table)] == [row for row, good in enumerate(usable) if not good]
    assert lengths_of(table) == ({3} if any(usable) else set())
    known = CachedVectors.of(path)
    for key, expected in zip(content, found, strict=True):
        there = known.find(key)
        if isinstance(expected, UnusableError):
            assert isinstance(there, UnusableError)
            assert (there.reason, there.detail) == (expected.reason, expected.detail)
        else:
            assert isinstance(there, np.ndarray)
            assert there.dtype == dtype
            np.testing.assert_array_equal(there, expected)
    assert known.find(b"0" * 32) is None
    assert known.is_current(ids, encoded.content)
    if ids:
        assert not known.is_current([*ids[1:], "other"], encoded.content)
        assert not known.is_current(ids, np.array([*content[1:], b"0" * 32], dtype="S32"))
        assert not known.is_current(ids[1:], encoded.content[1:])


def test_missing_or_damaged_file_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "0.arrow"
    assert CachedVectors.of(path).find(contents(1)[0]) is None
    path.write_bytes(b"ARROW1 damaged")
    assert not CachedVectors.of(path).is_current([], np.zeros(0, "S32"))


def test_vectors_of_different_lengths_are_rejected() -> None:
    with pytest.raises(DatasetError, match="e returns vectors of 2 and of 3 numbers; vectors of a modality must have"):
        combine_results(contents(2), [np.zeros(3, np.float32), np.zeros(2, np.float32)], encoder="e")
