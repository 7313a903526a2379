"""Pacing: which share of the samples does each epoch of a curriculum see?"""

from __future__ import annotations

import math
from typing import Protocol


class Pacing(Protocol):
    """Share of the samples that epoch t = 1, 2, ... sees: in (0, 1], never falling, and exactly 1 from T on.

    `start` is the share lambda0 in (0, 1] of an epoch 0, which nobody sees; `grow_epochs` is T, at least 1.
    """

    def __call__(self, epoch: int, *, start: float, grow_epochs: int) -> float:
        """Give lambda(t)."""


def root_pacing(epoch: int, *, start: float, grow_epochs: int) -> float:
    """Share of the samples that epoch t = 1, 2, ... sees, in (0, 1], most balanced first.

    lambda(t) = min(1, sqrt(t (1 - lambda0^2) / T_grow + lambda0^2)): BSS-H, arXiv 2501.01470, with lambda0 = 0.1 and
    T_grow = 40 there.
    """
    if epoch >= grow_epochs:
        return 1.0  # the root may round to just below, and the floor would then leave a sample out
    return min(1.0, math.sqrt(epoch * (1 - start**2) / grow_epochs + start**2))


def linear_pacing(epoch: int, *, start: float, grow_epochs: int) -> float:
    """lambda(t) = lambda0 + (1 - lambda0) t / T: Penha and Hauff, arXiv 1912.08555."""
    return 1.0 if epoch >= grow_epochs else _risen(epoch / grow_epochs, start)


def step_pacing(epoch: int, *, start: float, grow_epochs: int, steps: int = 5) -> float:
    """A staircase of equal rises, every T / steps epochs: lambda0 + (1 - lambda0) floor(steps t / T) / steps.

    The form with any number of rises, and five of them, are ours. One rise, at T, is the step of Wu et al. (arXiv
    2012.03107); Penha and Hauff (arXiv 1912.08555) see one third, two thirds and all, each for a third of T.
    """
    return 1.0 if epoch >= grow_epochs else _risen(steps * epoch // grow_epochs / steps, start)


def geometric_pacing(epoch: int, *, start: float, grow_epochs: int) -> float:
    """lambda(t) = lambda0^(1 - t / T), the same factor every epoch: Penha and Hauff, arXiv 1912.08555."""
    return 1.0 if epoch >= grow_epochs else min(1.0, start ** (1 - epoch / grow_epochs))


def exponential_pacing(epoch: int, *, start: float, grow_epochs: int) -> float:
    """lambda(t) = lambda0 + (1 - lambda0) (e^(10 t / T) - 1) / (e^10 - 1): Wu, Dyer and Neyshabur, arXiv 2012.03107.

    The latest of all: at T / 2 it has risen by 0.7% of the way.
    """
    return 1.0 if epoch >= grow_epochs else _risen(math.expm1(10 * epoch / grow_epochs) / math.expm1(10), start)


def _risen(progress: float, start: float) -> float:
    return min(1.0, start + (1 - start) * progress)


PACINGS: dict[str, Pacing] = {
    "root": root_pacing,
    "linear": linear_pacing,
    "step": step_pacing,
    "geometric": geometric_pacing,
    "exponential": exponential_pacing,
}
