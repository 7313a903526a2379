"""Inputs of a training: the same on the device and read ahead, within a bound of memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import picture
from numpy.typing import NDArray

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.errors import DatasetError
from mmaudit.audit.features.cached_matrix import FeatureMatrix
from mmaudit.audit.features.encode import encode_dataset
from mmaudit.audit.features.encoded_samples import read_status
from mmaudit.audit.features.matrix import MatrixInputs, RowIndex
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress
from mmaudit.train.store import Store, fit_on_device

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


@pytest.mark.parametrize("read_ahead_bytes", [1, 8_000, 1 << 20])
def test_windows_are_bounded_and_change_no_batch(read_ahead_bytes: int) -> None:
    inputs, batches = CountingInputs(), [RNG.integers(0, 40, 4) for _ in range(10)]
    store = Store([inputs], device="cpu", max_bytes=100, read_ahead_bytes=read_ahead_bytes)
    for rows, (tensor,) in store.stream(batches, lambda rows: [rows]):
        np.testing.assert_array_equal(tensor, WIDE[rows])
    num_batches = max(1, read_ahead_bytes // 4 // (4 * (4 * 100 + 32)))  # of a window; at least one batch
    assert inputs.max_rows <= 4 * num_batches
    assert (inputs.max_rows > 4) == (num_batches > 1)


def test_next_window_is_read_before_the_last_batch_of_a_window_is_used() -> None:
    """At most two windows are read when the first batch is used, and two more than the one in use at any time."""
    inputs, window = CountingInputs(), 16 * 4 * 4 * (4 * 100 + 32)  # the first window has one batch
    store = Store([inputs], device="cpu", max_bytes=100, read_ahead_bytes=window)
    requested = []

    def batches() -> Iterator[NDArray[np.int64]]:
        for number in range(100):
            requested.append(number)
            yield np.arange(4)

    ahead = [len(requested) - used for used, _ in enumerate(store.stream(batches(), lambda rows: [rows]), start=1)]
    assert ahead[0] >= 1
    assert max(ahead) <= 2 * 16


def test_an_error_of_a_window_read_ahead_is_raised_where_its_first_batch_is_used() -> None:
    class Damaged(CountingInputs):
        def read(self, rows: RowIndex) -> NDArray[Any]:
            if (rows == 39).any():
                raise DatasetError("000003.arrow was cut off")
            return super().read(rows)

    store = Store([Damaged()], device="cpu", max_bytes=100, read_ahead_bytes=1)
    stream = store.stream([np.array([number]) for number in (0, 5, 39, 7)], lambda rows: [rows])
    assert [int(next(stream)[0][0]) for _ in range(2)] == [0, 5]
    with pytest.raises(DatasetError, match="cut off"):
        next(stream)


def test_one_modality_of_several_is_streamed() -> None:
    inputs = [MatrixInputs(matrix=WIDE), MatrixInputs(matrix=BYTES)]
    rows = [np.array([4, 2]), np.array([], np.int64), np.array([7])]
    for max_bytes in (0, 600, 1 << 20):
        store = Store(inputs, device="cpu", max_bytes=max_bytes)
        for tensor, batch in zip(store.stream_modality(0, rows), rows, strict=True):
            np.testing.assert_array_equal(tensor, WIDE[batch])


def test_pictures_of_which_one_is_missing_are_counted_as_float32(tmp_path: Path) -> None:
    cells = [picture(row % 3, RNG) for row in range(30)]
    columns = {"id": [str(row) for row in range(30)], "label": [0, 1] * 15, "sound": [[1.0, 2.0]] * 30}
    for name, pictures in (("whole", cells), ("lacking", [*cells[:-1], None])):
        pq.write_table(pa.table({**columns, "picture": pa.array(pictures, pa.binary())}), tmp_path / f"{name}.parquet")
        config = DataConfig(modality=("picture=picture", "sound=sound"), encoder=("picture=resnet18",))
        dataset, media = open_dataset(tmp_path / f"{name}.parquet", config), MediaConfig(network_size=16)
        tasks = encode_dataset(dataset, tmp_path / name, media=media, num_workers=0, progress=no_progress)
        matrix = FeatureMatrix.of(tasks, read_status(tasks, dataset.modalities[0], None), np.arange(30))
        num_bytes = 30 * matrix.num_features * (1 if name == "whole" else 4)
        assert fit_on_device([matrix], max_bytes=num_bytes) == [True]
        assert fit_on_device([matrix], max_bytes=num_bytes - 1) == [False]
        store = Store([matrix], device="cpu", max_bytes=num_bytes)
        assert store.resident[0] is not None
        assert store.resident[0].nbytes == num_bytes
        np.testing.assert_array_equal(store.resident[0], matrix.read(np.arange(30)))


def test_smallest_inputs_are_on_the_device_first() -> None:
    inputs = [MatrixInputs(matrix=WIDE), MatrixInputs(matrix=BYTES)]
    assert fit_on_device(inputs, max_bytes=480) == [False, True]
    assert fit_on_device(inputs, max_bytes=479) == [False, False]
    assert fit_on_device(inputs, max_bytes=16_480) == [True, True]


def test_no_read_ahead_of_adaptive_steps() -> None:
    """The next step of an adaptive sampler must not be requested before the last one was observed."""
    store = Store([MatrixInputs(matrix=WIDE)], device="cpu", max_bytes=0)
    requested = []

    def steps() -> Any:
        for number in range(5):
            requested.append(number)
            yield np.array([number])

    stream = store.stream(steps(), lambda rows: [rows], prefetch=False)
    for number in range(5):
        next(stream)
        assert requested == list(range(number + 1))


# Prints by how many MB the largest resident set grows while an epoch of random batches is read from a file of 256 MB.
MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from mmaudit.audit.features.vector_files import FileInputs, VectorFile
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress
from mmaudit.train.store import Store

class Matrix:
    def __init__(self, path, n, d):
        self.n, self.d = n, d
        self.file = VectorFile(path=path, size=path.stat().st_size, start=0, num_features=d, dtype=np.dtype("f4"))
    num_rows = property(lambda self: self.n)
    num_features = property(lambda self: self.d)
    def read(self, rows):
        order = np.argsort(rows, kind="stable")
        features = np.empty((len(rows), self.d), np.float32)
        self.file.read_into(features, order, rows[order])
        return features

n, d = 1_000_000, 64
store = Store([Matrix(Path(sys.argv[1]), n, d)], device="cpu", max_bytes=0, read_ahead_bytes=int(sys.argv[2]) << 20)
order = np.random.default_rng(0).permutation(n)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for _ in store.stream([order[:64]], lambda rows: [rows]):
    pass
before, total = peak(), 0.0
for _, (rows,) in store.stream(np.split(order, 1000), lambda rows: [rows]):
    total += float(rows[:, 0].double().sum())
print(peak() - before, total)
"""


@pytest.mark.slow
@pytest.mark.parametrize("read_ahead_mib", [8, 64])
def test_memory_of_streaming_is_that_of_the_setting(tmp_path: Path, read_ahead_mib: int) -> None:
    """Its quick twin is test_windows_are_bounded_and_change_no_batch."""
    matrix = np.memmap(tmp_path / "vectors", np.float32, "w+", shape=(1_000_000, 64))
    for start in range(0, 1_000_000, 100_000):
        matrix[start : start + 100_000] = RNG.standard_normal((100_000, 64), np.float32)
    matrix.flush()
    words = [sys.executable, "-c", MEMORY, str(tmp_path / "vectors"), str(read_ahead_mib)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    more, total = map(float, done.stdout.split())
    assert total == pytest.approx(float(matrix[:, 0].astype(np.float64).sum()), abs=1e-3)
    assert more < read_ahead_mib + 16  # blocks, and the interpreter's own
