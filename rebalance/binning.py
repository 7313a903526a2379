"""Bins of the discrepancy, and quotas that make them uniform.

All functions work on counts. Letters: b bins, k classes; `available` (b,) or (b, k): samples by bin, or bin and class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
CURVE_TOLERANCES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)  # tolerances whose sizes are always reported


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One point of the size curve: the largest set within a tolerance, and its distance to uniform."""

    tolerance: float
    size: int
    distance: float


def assign_bins(discrepancy: NDArray[np.float32], *, num_bins: int) -> NDArray[np.int16]:
    """Return the bin (n,) of each discrepancy among `num_bins` equal bins over [-1, 1]; +1 is in the last bin."""
    return np.clip((discrepancy.astype(np.float64) + 1) / 2 * num_bins, 0, num_bins - 1).astype(np.int16)


def distance_to_uniform(mass: NDArray[Any], *, available: NDArray[Any]) -> float:
    """Compute the total-variation distance, in [0, 1], of a mass by bin (b,) to uniform over the non-empty bins."""
    filled = available > 0
    if not filled.any():
        return 0.0
    share = mass[filled] / (mass.sum() or 1)
    return float(np.abs(share - 1 / filled.sum()).sum() / 2)


def size_curve(available: Sequence[Counts], tolerances: tuple[float, ...]) -> tuple[CurvePoint, ...]:
    """Compute the largest set within each tolerance from the samples available by bin (b,) in each split."""
    points = []
    for tolerance in tolerances:
        kept_by_split = [np.minimum(counts, largest_level(counts, tolerance=tolerance)) for counts in available]
        kept = np.sum(kept_by_split, axis=0)
        distance = distance_to_uniform(kept, available=np.sum(available, axis=0))
        points.append(CurvePoint(tolerance=tolerance, size=int(kept.sum()), distance=distance))
    return tuple(points)


def largest_level(available: Counts, *, tolerance: float) -> int:
    """Compute the largest level L at which cutting every bin (b,) to L stays within the tolerance of uniform.

    The distance never decreases as L grows: only bins above L still grow, and each of them already holds more than
    its share. So the level is found by bisection.
    """
    low, high = 1, int(available.max())
    while low < high:
        level = (low + high + 1) // 2
        if distance_to_uniform(np.minimum(available, level), available=available) <= tolerance + 1e-12:
            low = level
        else:
            high = level - 1
    return low


def water_fill(capacity: Counts, total: int, order: NDArray[np.intp]) -> Counts:
    """Share `total` as evenly as the capacities (v,) allow; the remainder is given one each in `order`.

    If the total exceeds the sum of capacities, every one is filled.
    """
    total = min(total, int(capacity.sum()))
    sorted_capacity = np.sort(capacity)
    # With the i smallest capacities filled, the others are at level (total - sum of the filled) / (v - i).
    full_total = np.concatenate([[0], np.cumsum(sorted_capacity)[:-1]])
    level = (total - full_total) // np.arange(len(sorted_capacity), 0, -1)
    first = int(np.argmax(level < sorted_capacity)) if (level < sorted_capacity).any() else len(sorted_capacity)
    height = int(level[first]) if first < len(sorted_capacity) else int(sorted_capacity[-1])
    filled = np.minimum(capacity, height)
    incremented = order[capacity[order] > height][: total - int(filled.sum())]
    filled[incremented] += 1
    return filled


def share_among_classes(available: Counts, quota: Counts) -> Counts:
    """Share each bin's quota (b,) among its classes, (b, k); remainders go to the classes with the fewest so far."""
    quotas = np.zeros_like(available)
    # Smallest bins first: they leave the fewest alternatives.
    for row in np.argsort(available.sum(axis=1), kind="stable"):
        quotas[row] = water_fill(available[row], int(quota[row]), np.argsort(quotas.sum(axis=0), kind="stable"))
    return quotas


def balancing_weights(available: Counts, *, max_weight: float) -> NDArray[np.float64]:
    """Compute the weight (b,) of a sample of each bin so that all bins weigh the same; 0 for an empty bin.

    Weights are scaled to a mean of 1 over the samples, then capped at `max_weight`.
    """
    filled = available > 0
    if not filled.any():
        return np.zeros(len(available))
    share = available.sum() / filled.sum()
    return np.where(filled, np.minimum(share / np.maximum(available, 1), max_weight), 0.0)


def choose_num_bins(values: NDArray[np.float64], counts: Counts) -> int:
    """Compute the number of equal bins over [-1, 1] by the rule of Freedman & Diaconis (1981), from 4 to 100.

    The bin width is 2 IQR n^(-1/3); `values` (f,) are the centres of a fine histogram with these counts.
    """
    n = int(counts.sum())
    if n == 0:
        return 4
    low, high = (values[np.searchsorted(np.cumsum(counts), fraction * n)] for fraction in (0.25, 0.75))
    width = 2 * (high - low) * n ** (-1 / 3)
    return int(np.clip(np.ceil(2 / max(width, 1e-9)), 4, 100))


def share_total(total: int, counts: Counts) -> Counts:
    """Share a total among cells (c,) in proportion to counts, by largest remainders; no cell exceeds its count."""
    exact = total * counts / max(int(counts.sum()), 1)
    shares: Counts = np.minimum(np.floor(exact).astype(np.int64), counts)
    extra = np.argsort(np.where(shares < counts, shares - exact, np.inf), kind="stable")[: total - int(shares.sum())]
    shares[extra] += 1
    return shares
