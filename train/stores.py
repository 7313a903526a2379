"""The store: where do a step's inputs come from, from the device itself or read ahead from the feature cache?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..audit.encoding.matrix import Inputs, chunks
from ..audit.workers import ahead

Rows = NDArray[np.int64]
Item = TypeVar("Item")

READERS = 2  # threads that read ahead


class Store:
    """The inputs of n samples, m modalities. What fits in `most_bytes` stays on the device; the rest is read in time.

    Everything was decoded and encoded once, by worker processes, into the feature cache: what is read here are rows of
    matrices, by threads, into pinned memory where the device is CUDA.
    """

    def __init__(self, inputs: Sequence[Inputs], *, device: str, most_bytes: int) -> None:
        self.inputs = tuple(inputs)
        self.device = torch.device(device)
        self.held: list[Tensor | None] = [None] * len(inputs)
        left = most_bytes
        for place in sorted(range(len(inputs)), key=lambda index: _bytes_of(inputs[index])):
            size = _bytes_of(inputs[place])
            if size <= left:
                self.held[place] = self._whole(inputs[place])
                left -= size

    @property
    def is_resident(self) -> bool:
        """Tell whether all inputs are on the device."""
        return all(each is not None for each in self.held)

    def stream(
        self, items: Iterable[Item], rows_of: Callable[[Item], Sequence[Rows]], *, num_threads: int = READERS
    ) -> Iterator[tuple[Item, tuple[Tensor, ...]]]:
        """Give each item with its inputs on the device, m tensors (b_j, d_j): of the rows (b_j,) of each modality.

        Threads read what follows, unless all is on the device.
        """

        def read(item: Item) -> tuple[Item, Sequence[Rows], list[Tensor | None]]:
            rows = rows_of(item)
            return item, rows, self._read(rows)

        for item, rows, found in ahead(read, items, num_threads=0 if self.is_resident else num_threads):
            yield item, self._to_device(rows, found)

    def _whole(self, inputs: Inputs) -> Tensor:
        parts = [_tensor(inputs.read(rows)) for rows in chunks(inputs)]
        return torch.cat(parts).to(self.device)

    def _read(self, rows: Sequence[Rows]) -> list[Tensor | None]:
        """Read what is not on the device yet."""
        found = [
            _tensor(each.read(some)) if held is None else None
            for each, some, held in zip(self.inputs, rows, self.held, strict=True)
        ]
        if self.device.type == "cuda":
            return [None if each is None else each.pin_memory() for each in found]
        return found

    def _to_device(self, rows: Sequence[Rows], found: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        return tuple(
            _there(each).to(self.device, non_blocking=True)
            if held is None
            else held.index_select(0, torch.from_numpy(some).to(self.device, non_blocking=True))
            for held, some, each in zip(self.held, rows, found, strict=True)
        )


def _there(each: Tensor | None) -> Tensor:
    assert each is not None
    return each


def _tensor(read: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.require(read, requirements=("C", "W")))


def _bytes_of(inputs: Inputs) -> int:
    """Give the size of the whole matrix, by what its first row is made of."""
    if inputs.num_rows == 0:
        return 0
    return int(inputs.num_rows * inputs.num_features * inputs.read(np.arange(1)).dtype.itemsize)
