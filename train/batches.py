"""Batches: which rows does each step see?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def batches(order: NDArray[np.intp], *, batch_size: int) -> Iterator[NDArray[np.intp]]:
    """Cut an epoch's order into steps; the last one may be smaller, and no row is left out."""
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
