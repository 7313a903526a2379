"""Tests of the store: resident and streamed inputs are equal, and memory is bounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mmaudit.audit.features.matrix import MatrixInputs, RowIndex
from mmaudit.train.examples import Store

torch.set_num_threads(1)

RNG = np.random.default_rng(0)
WIDE = RNG.standard_normal((40, 100)).astype(np.float32)
BYTES = RNG.integers(0, 256, (40, 12), dtype=np.uint8)


class CountingInputs:
    """Inputs that record the largest number of rows read at once."""

    num_rows, num_features, max_rows = 40, 100, 0

    def read(self, rows: RowIndex) -> NDArray[Any]:
        self.max_rows = max(self.max_rows, len(rows))
        return MatrixInputs(matrix=WIDE).read(rows)


@pytest.mark.parametrize("max_bytes", [0, 1_000, 1 << 20])
def test_stream_is_the_same_on_device_and_from_disk(max_bytes: int) -> None:
    store = Store([MatrixInputs(matrix=WIDE), MatrixInputs(matrix=BYTES)], device="cpu", max_bytes=max_bytes)
    assert [matrix is not None for matrix in store.resident] == [max_bytes > 20_000, max_bytes >= 480]
    assert store.is_resident == (max_bytes > 20_000)
    cuts = [np.array(rows, dtype=np.int64) for rows in ([3, 1, 3], [39], [], [0, 5, 6, 7])]
    matrices: tuple[NDArray[Any], ...] = (WIDE, BYTES)
    for rows, (item, streamed) in zip(cuts, store.stream(cuts, lambda item: [item, item[1:]]), strict=True):
        assert item is rows
        for tensor, full, row_index in zip(streamed, matrices, (rows, rows[1:]), strict=True):
            np.testing.assert_array_equal(tensor, full[row_index])
            assert tensor.dtype == torch.from_numpy(full).dtype


def test_inputs_that_do_not_fit_are_never_read_completely() -> None:
    inputs = CountingInputs()
    store = Store([inputs], device="cpu", max_bytes=100)
    for _ in store.stream([np.arange(start, start + 4) for start in range(0, 40, 4)], lambda rows: [rows]):
        pass
    assert inputs.max_rows == 4


def test_no_read_ahead_with_0_threads() -> None:
    """The next step of an adaptive sampler must not be requested before the last one was observed."""
    store = Store([MatrixInputs(matrix=WIDE)], device="cpu", max_bytes=0)
    requested = []

    def steps() -> Any:
        for number in range(5):
            requested.append(number)
            yield np.array([number])

    stream = store.stream(steps(), lambda rows: [rows], num_threads=0)
    for number in range(5):
        next(stream)
        assert requested == list(range(number + 1))
