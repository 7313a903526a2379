"""Cache files: written results are found by their content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import DatasetError, Reason, UnusableError
from mmaudit.audit.features.encode import (
    CachedVectors,
    EncodeResult,
    combine_results,
    content_of,
    encoded_table,
    read_arrow,
    write_arrow,
)
from mmaudit.audit.features.encoded_samples import lengths_of, problems_of
from mmaudit.audit.hashing import digest


def digests(count: int) -> list[bytes]:
    return [digest(str(row).encode()).encode() for row in range(count)]


def results_of(usable: list[bool], dtype: type) -> list[EncodeResult]:
    return [
        np.arange(row, row + 3, dtype=dtype) if is_usable else UnusableError(Reason.EMPTY, f"row {row}")
        for row, is_usable in enumerate(usable)
    ]


@settings(max_examples=30, deadline=None)
@given(usable=st.lists(st.booleans(), max_size=9), dtype=st.sampled_from([np.float32, np.uint8]))
def test_written_results_are_read_back(
    usable: list[bool], dtype: type, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cache") / "0.arrow"
    results, content = results_of(usable, dtype), digests(len(usable))
    ids = [f"s{row}" for row in range(len(usable))]
    encoded = combine_results(content, results, encoder="e")
    stamps = [None if row % 3 == 2 else f"stamp {row}" for row in range(len(usable))]
    write_arrow(encoded_table(ids, stamps, encoded), path)
    table = read_arrow(path)
    assert content_of(table).tolist() == content
    assert table["vector"].type == pa.large_list(pa.from_numpy_dtype(encoded.vector.dtype))
    assert [row for row, _, _ in problems_of(table)] == [row for row, is_usable in enumerate(usable) if not is_usable]
    assert lengths_of(table) == ({3} if any(usable) else set())
    cached = CachedVectors.of(path)
    for key, expected in zip(content, results, strict=True):
        cached_result = cached.result(key)
        if isinstance(expected, UnusableError):
            assert isinstance(cached_result, UnusableError)
            assert (cached_result.reason, cached_result.detail) == (expected.reason, expected.detail)
        else:
            assert isinstance(cached_result, np.ndarray)
            assert cached_result.dtype == dtype
            np.testing.assert_array_equal(cached_result, expected)
    assert b"0" * 32 not in cached.row
    assert cached.content_of_stamp == {stamp: key for stamp, key in zip(stamps, content, strict=True) if stamp}
    assert cached.is_current(ids, stamps, encoded.content)
    if ids:
        assert not cached.is_current([*ids[1:], "other"], stamps, encoded.content)
        assert not cached.is_current(ids, [*stamps[1:], "other"], encoded.content)
        assert not cached.is_current(ids, stamps, np.array([*content[1:], b"0" * 32], dtype="S32"))
        assert not cached.is_current(ids[1:], stamps[1:], encoded.content[1:])


def test_missing_or_damaged_file_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "0.arrow"
    assert CachedVectors.of(path).row == {}
    path.write_bytes(b"ARROW1 damaged")
    assert not CachedVectors.of(path).is_current([], [], np.zeros(0, "S32"))


def test_vectors_of_different_lengths_are_rejected() -> None:
    with pytest.raises(DatasetError, match="e returns vectors of 2 and of 3 numbers; vectors of a modality must have"):
        combine_results(digests(2), [np.zeros(3, np.float32), np.zeros(2, np.float32)], encoder="e")
