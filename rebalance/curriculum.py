"""Curriculum order: which samples does an epoch see? Pure functions of (rank, seed, epoch)"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def root_pacing(epoch: int, *, start: float, grow_epochs: int) -> float:
    """Share of the samples that epoch t = 1, 2, ... sees, in (0, 1], most balanced first.

    lambda(t) = min(1, sqrt(t (1 - lambda0^2) / T_grow + lambda0^2)): BSS-H, arXiv 2501.01470, with lambda0 = 0.1 and
    T_grow = 40 there.
    """
    if epoch >= grow_epochs:
        return 1.0  # the root may round to just below, and the floor would then leave a sample out
    return min(1.0, math.sqrt(epoch * (1 - start**2) / grow_epochs + start**2))


def shuffled(rows: NDArray[np.intp], *, seed: int, epoch: int) -> NDArray[np.intp]:
    """Give the rows in the order of one epoch: the same for the same seed and epoch, and for nothing else."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def most_balanced(rank: NDArray[np.integer], share: float) -> NDArray[np.intp]:
    """Give the floor(n share) rows of least rank, at least one, from ranks (n,)."""
    size = max(1, math.floor(len(rank) * share))
    return np.argsort(rank, kind="stable")[:size]
