"""Inputs of a training: on the device, or read ahead from the feature cache within a bound of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..audit.features.cached_matrix import FeatureMatrix
from ..audit.features.matrix import Inputs, chunks, reading_order
from ..audit.features.vector_files import FileInputs, from_files
from ..audit.workers import prefetch_map
from ..rebalance.curriculum import RowIndex
from .config import FinetuneConfig

Item = TypeVar("Item")
RowsOf = Callable[[Item], Sequence[RowIndex]]

_NUM_WINDOWS = 4  # one is used, the next one read, a batch may refer to the one before; the rest is for their overhead
_ROW_OVERHEAD = 32  # ours, bytes: indices of a row while it is read
_FIRST_WINDOW = 1 / 16  # ours: share of the first window, so that an epoch begins soon; each next one is twice as large
_NUM_PINNING = 1  # threads that copy batches to pinned memory


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window(Generic[Item]):
    """Consecutive items whose rows are read together, by modality in the order of the files."""

    items: list[Item]
    rows: list[Sequence[RowIndex]]


class Store:
    """Inputs of n samples in m modalities: matrices that fit into `max_bytes` are on the device, others read ahead.

    All samples were decoded and encoded once, by worker processes, into the feature cache, whose files are read here.
    The samples of an epoch lie there in another order than they are trained on. So the batches to come are read in
    windows: a thread reads the rows of all batches of a window in the order of the files, while those of the window
    before are used. The rows of a batch, and their order, are the same with any window.

    Args:
        inputs: The m inputs.
        device: Device of the batches.
        max_bytes: Largest size of all matrices on the device together.
        read_ahead_bytes: Largest size of all windows in memory together; a window has one batch at least.
    """

    def __init__(
        self, inputs: Sequence[Inputs], *, device: str, max_bytes: int, read_ahead_bytes: int = 512 << 20
    ) -> None:
        self.inputs = tuple(map(from_files, inputs))
        self.device = torch.device(device)
        self.window_bytes = read_ahead_bytes // _NUM_WINDOWS
        self.resident: list[Tensor | None] = [None] * len(inputs)
        for modality, fits in enumerate(fit_on_device(self.inputs, max_bytes=max_bytes)):
            if fits:
                self.resident[modality] = _load(self.inputs[modality], self.device)
        self._window_row_bytes = [
            _ROW_OVERHEAD + (_bytes_of_row(matrix) if resident is None else 0)
            for matrix, resident in zip(self.inputs, self.resident, strict=True)
        ]

    @property
    def is_resident(self) -> bool:
        """Whether all inputs are on the device."""
        return all(matrix is not None for matrix in self.resident)

    def stream(
        self, items: Iterable[Item], rows_of: RowsOf[Item], *, prefetch: bool = True
    ) -> Iterator[tuple[Item, tuple[Tensor, ...]]]:
        """Yield each item with its inputs on the device, m tensors (b_j, d_j), for the rows (b_j,) of each modality.

        A thread reads ahead, unless all inputs are on the device. prefetch: False: an item is requested, and read, when
        the one before has been used.
        """
        if self.is_resident or not prefetch:
            for item in items:
                yield item, self._to_device(self._read(rows_of(item)))
            return
        tensors = self._read_windows(items, rows_of)
        if self.device.type == "cuda":
            tensors = prefetch_map(_pin, tensors, num_threads=_NUM_PINNING)
        for item, batch in tensors:
            yield item, self._to_device(batch)

    def stream_modality(self, modality: int, batches: Iterable[RowIndex]) -> Iterator[Tensor]:
        """Yield the inputs (b, d) of one modality for each of some batches of rows."""

        def rows_of(rows: RowIndex) -> list[RowIndex]:
            return [rows if index == modality else rows[:0] for index in range(len(self.inputs))]

        for _, tensors in self.stream(batches, rows_of):
            yield tensors[modality]

    def reading_order(self, rows: RowIndex) -> RowIndex:
        """Return the order (b,) in which rows are read one file after the other; as they are if one window has all.

        In another order, each window of many rows would read all files.
        """
        streamed = [matrix for matrix, resident in zip(self.inputs, self.resident, strict=True) if resident is None]
        if not streamed or len(rows) * sum(self._window_row_bytes) <= self.window_bytes:
            return np.arange(len(rows))
        matrix = streamed[0]
        order = matrix.reading_order(rows) if isinstance(matrix, FileInputs) else reading_order(matrix, rows)
        return np.asarray(order, dtype=np.int64)

    def _read_windows(self, items: Iterable[Item], rows_of: RowsOf[Item]) -> Iterator[tuple[Item, list[Tensor]]]:
        """Yield each item with what is read of its rows, while a thread reads the next window."""
        windows = self._windows(items, rows_of)
        with ThreadPoolExecutor(1) as thread:
            current = self._submit(thread, next(windows, None))
            while current is not None:
                window, future = current
                tensors = future.result()
                current = self._submit(thread, next(windows, None))
                del future
                yield from zip(window.items, _split(tensors, window.rows), strict=True)
                del window, tensors

    def _submit(
        self, thread: ThreadPoolExecutor, window: _Window[Item] | None
    ) -> tuple[_Window[Item], Future[list[Tensor]]] | None:
        if window is None:
            return None
        rows = [np.concatenate(parts) for parts in zip(*window.rows, strict=True)]
        return window, thread.submit(self._read, rows)

    def _windows(self, items: Iterable[Item], rows_of: RowsOf[Item]) -> Iterator[_Window[Item]]:
        """Divide the items into windows of at most `window_bytes` of what is read, but of one item at least."""
        limit, size = self.window_bytes * _FIRST_WINDOW, 0
        window: _Window[Item] = _Window(items=[], rows=[])
        for item in items:
            rows = rows_of(item)
            item_bytes = sum(len(part) * row for part, row in zip(rows, self._window_row_bytes, strict=True))
            if window.items and size + item_bytes > limit:
                yield window
                limit, size = min(2 * limit, self.window_bytes), 0
                window = _Window(items=[], rows=[])
            window.items.append(item)
            window.rows.append(rows)
            size += item_bytes
        if window.items:
            yield window

    def _read(self, rows: Sequence[RowIndex]) -> list[Tensor]:
        """Read the rows of matrices that are not on the device; of the others return the row indices."""
        return [
            _tensor(matrix.read(row_index)) if resident is None else torch.from_numpy(row_index)
            for matrix, row_index, resident in zip(self.inputs, rows, self.resident, strict=True)
        ]

    def _to_device(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        moved = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        return tuple(
            tensor if resident is None else resident.index_select(0, tensor)
            for resident, tensor in zip(self.resident, moved, strict=True)
        )


def fit_on_device(inputs: Sequence[Inputs], *, max_bytes: int) -> list[bool]:
    """Return which of the m inputs are on the device, the smallest first, within `max_bytes` of all together."""
    sizes, fits = [matrix.num_rows * _bytes_of_row(matrix) for matrix in inputs], [False] * len(inputs)
    for modality in sorted(range(len(inputs)), key=sizes.__getitem__):
        if sizes[modality] <= max_bytes:
            max_bytes -= sizes[modality]
            fits[modality] = True
    return fits


def open_store(inputs: Sequence[Inputs], settings: FinetuneConfig, *, device: str) -> Store:
    """Open the inputs of a training or an evaluation within the memory of its settings."""
    return Store(
        inputs,
        device=device,
        max_bytes=settings.resident_mib << 20,
        read_ahead_bytes=settings.read_ahead_mib << 20,
    )


def _split(tensors: Sequence[Tensor], rows: Sequence[Sequence[RowIndex]]) -> Iterator[list[Tensor]]:
    """Yield the part of each item of a window, views of its tensors."""
    lengths = [[len(part) for part in parts] for parts in zip(*rows, strict=True)]
    parts = [tensor.split(sizes) for tensor, sizes in zip(tensors, lengths, strict=True)]  # type: ignore[no-untyped-call]
    for item_parts in zip(*parts, strict=True):
        yield list(item_parts)


def _pin(batch: tuple[Item, list[Tensor]]) -> tuple[Item, list[Tensor]]:
    return batch[0], [tensor.pin_memory() for tensor in batch[1]]


def _load(inputs: Inputs, device: torch.device) -> Tensor:
    """Read a whole matrix to the device, chunk by chunk."""
    dtype = torch.uint8 if _type_of(inputs) == np.uint8 else torch.float32
    matrix = torch.empty((inputs.num_rows, inputs.num_features), dtype=dtype, device=device)
    for rows in chunks(inputs):
        matrix[int(rows[0]) : int(rows[-1]) + 1] = _tensor(inputs.read(rows)).to(device)
    return matrix


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=("C", "W")))


def _bytes_of_row(inputs: Inputs) -> int:
    """Return the size of a row in memory."""
    return inputs.num_features * _type_of(inputs).itemsize


def _type_of(inputs: Inputs) -> np.dtype[Any]:
    """Return the type of a whole matrix: float32, or uint8 where no row is missing, which is NaN."""
    matrix = inputs.matrix if isinstance(inputs, FileInputs) else inputs
    if not inputs.num_rows or (isinstance(matrix, FeatureMatrix) and not matrix.present.all()):
        return np.dtype(np.float32)
    return inputs.read(np.arange(1)).dtype
