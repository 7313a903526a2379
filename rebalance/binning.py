"""Bins of the discrepancy, and quotas that make them even.

Arithmetic on counts alone. Letters: b bins, k classes; `available` (b,) or (b, k) are samples by bin, or bin and class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
CURVE = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)  # tolerances whose sizes are always told


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One trade of size against uniformity: the largest set within a tolerance, and the distance it has."""

    tolerance: float
    size: int
    distance: float


def bin_of(discrepancy: NDArray[np.float32], *, num_bins: int) -> NDArray[np.int16]:
    """Give the bin (n,) of each discrepancy among `num_bins` equal ones over [-1, 1]; +1 is in the last."""
    return np.clip((discrepancy.astype(np.float64) + 1) / 2 * num_bins, 0, num_bins - 1).astype(np.int16)


def distance_to_uniform(kept: NDArray[Any], *, available: NDArray[Any]) -> float:
    """Total-variation distance of the mass by bin (b,) to uniform over the bins in which anything is available."""
    filled = available > 0
    if not filled.any():
        return 0.0
    share = kept[filled] / (kept.sum() or 1)
    return float(np.abs(share - 1 / filled.sum()).sum() / 2)


def size_curve(available: Sequence[Counts], tolerances: tuple[float, ...]) -> tuple[CurvePoint, ...]:
    """Give the largest set within each tolerance, from the samples available in each bin (b,) of each split."""
    points = []
    for tolerance in tolerances:
        each = [np.minimum(counts, largest_level(counts, tolerance=tolerance)) for counts in available]
        kept = np.sum(each, axis=0)
        distance = distance_to_uniform(kept, available=np.sum(available, axis=0))
        points.append(CurvePoint(tolerance=tolerance, size=int(kept.sum()), distance=distance))
    return tuple(points)


def largest_level(available: Counts, *, tolerance: float) -> int:
    """Give the largest level L at which cutting every bin (b,) to L stays within the tolerance of uniform.

    The distance never falls as L grows: the bins still growing hold more than their share each, and gain on the
    others. So the level is found by halving.
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
    """Share `total` among vessels (v,) as evenly as their capacity allows; what is left over goes one each in `order`.

    Where total exceeds all capacity, everything is full.
    """
    total = min(total, int(capacity.sum()))
    levels = np.sort(capacity)
    # With the i smallest vessels full, the others stand level at (total - sum of the full) / (v - i).
    full = np.concatenate([[0], np.cumsum(levels)[:-1]])
    level = (total - full) // np.arange(len(levels), 0, -1)
    first = int(np.argmax(level < levels)) if (level < levels).any() else len(levels)
    height = int(level[first]) if first < len(levels) else int(levels[-1])
    filled = np.minimum(capacity, height)
    open_ = order[capacity[order] > height][: total - int(filled.sum())]
    filled[open_] += 1
    return filled


def share_among_classes(before: Counts, quota: Counts) -> Counts:
    """Share each bin's quota (b,) among its classes, (b, k); single leftovers go to the classes kept least so far."""
    taken = np.zeros_like(before)
    for row in np.argsort(before.sum(axis=1), kind="stable"):  # scarce bins first: they leave least choice
        taken[row] = water_fill(before[row], int(quota[row]), np.argsort(taken.sum(axis=0), kind="stable"))
    return taken


def balancing_weights(available: Counts, *, most: float) -> NDArray[np.float64]:
    """Give the weight (b,) of a sample of each bin so that bins weigh the same, `most` at most; 0 of an empty one.

    They are scaled so that the mean weight of the samples is 1 before they are capped.
    """
    filled = available > 0
    if not filled.any():
        return np.zeros(len(available))
    share = available.sum() / filled.sum()
    return np.where(filled, np.minimum(share / np.maximum(available, 1), most), 0.0)


def effective_size(weight: NDArray[np.float64], available: Counts) -> float:
    """Effective size (sum w)^2 / sum w^2 (Kish 1965) of samples that weigh by bin (b,): [1, n], n = all alike."""
    square = float((available * weight**2).sum())
    return float((available * weight).sum()) ** 2 / square if square else 0.0


def choose_num_bins(values: NDArray[np.float64], counts: Counts) -> int:
    """Give the number of equal bins over [-1, 1] by the rule of Freedman & Diaconis (1981), from 4 to 100.

    Width 2 IQR n^(-1/3); values (f,) are the middles of a fine histogram with these counts.
    """
    n = int(counts.sum())
    if n == 0:
        return 4
    low, high = (values[np.searchsorted(np.cumsum(counts), part * n)] for part in (0.25, 0.75))
    width = 2 * (high - low) * n ** (-1 / 3)
    return int(np.clip(np.ceil(2 / max(width, 1e-9)), 4, 100))


def share_total(total: int, counts: Counts) -> Counts:
    """Share a total among cells (c,) in proportion to their counts, which none exceeds; by the largest remainders."""
    exact = total * counts / max(int(counts.sum()), 1)
    found: Counts = np.minimum(np.floor(exact).astype(np.int64), counts)
    left = np.argsort(np.where(found < counts, found - exact, np.inf), kind="stable")[: total - int(found.sum())]
    found[left] += 1
    return found
