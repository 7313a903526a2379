"""The balanced split: how many samples can be kept so that the discrepancy is uniformly distributed?

The dataset of Xia et al., arXiv 2302.10912, was filtered to a uniform discrepancy; how was not published. The builder
is mmaudit's: bins over [-1, 1], one level L that every bin is cut to, and within a bin the classes share evenly. Each
split (train, validation, test) is balanced on its own: what test samples are like has no part in choosing the others.
Letters: b bins, k classes; `counts` (b, k) are samples by bin and class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ..audit.errors import ConfigError, ScoreError
from ..audit.hashing import hash_rank
from ..audit.score import ScoreTable
from .manifest import Selection

Counts = NDArray[np.int64]
CURVE = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)  # tolerances whose sizes are always told


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancedConfig:
    """How the balanced split is built. `size` overrides `tolerance`."""

    bins: int = 20
    tolerance: float = 0.05  # total-variation distance to uniform over the bins that hold samples
    size: int | None = None

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ConfigError(f"split.bins is {self.bins}; a distribution needs at least 2")
        if not 0 <= self.tolerance <= 1:
            raise ConfigError(f"split.tolerance is {self.tolerance}; a total-variation distance lies in [0, 1]")
        if self.size is not None and self.size < 1:
            raise ConfigError(f"split.size is {self.size}; it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One trade of size against uniformity: the largest set within a tolerance, and the distance it has."""

    tolerance: float
    size: int
    distance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniformity:
    """How uniform a discrepancy is, over the bins that hold samples in the scored set.

    distance: total variation to uniform, [0, 1], 0 = uniform. ks: largest difference between the distribution
    functions over [-1, 1]. positive: share of samples with D > 0.
    """

    distance: float
    ks: float
    positive: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancedSplit:
    """What was kept, what there was, and what other tolerances would keep."""

    selection: Selection
    before: Counts  # (b, k)
    after: Counts
    uniformity_before: Uniformity
    uniformity_after: Uniformity
    distances: dict[str, float]  # by split: to uniform over the bins that the split itself fills
    curve: tuple[Point, ...]

    @property
    def empty_bins(self) -> list[int]:
        """Bins that no scored sample falls into; uniformity is over the others."""
        return np.flatnonzero(self.before.sum(axis=1) == 0).tolist()


def balanced_split(
    scores: ScoreTable, config: BalancedConfig, *, seed: int, between: str | None = None
) -> BalancedSplit:
    """Choose the largest set whose discrepancy is uniform within the tolerance, or one of the size asked for.

    `between` is as in ScoreTable.discrepancy; None is the one pair of two modalities, and of more the pair of which
    most samples can be kept.
    """
    chosen = between or largest_pair(scores, config)
    values = scores.discrepancy(chosen)
    present = ~np.isnan(values)  # both modalities are there
    if not present.any():
        raise ScoreError(f"no sample has a discrepancy between {chosen}: a modality is missing in every one")
    bins = bin_of(np.where(present, values, 0), num_bins=config.bins)
    label = np.unique(scores.label, return_inverse=True)[1].astype(np.int32)  # anybody's numbers, -1 and 10^6 too
    shape = (config.bins, int(label.max()) + 1)
    parts = {name: part & present for name, part in splits_of(scores).items() if (part & present).any()}
    sizes = _sizes(parts, config.size)
    place, places = np.zeros(len(scores), dtype=np.int64), np.zeros(len(scores), dtype=np.int64)
    for name, part in parts.items():
        available = count(bins[part], label[part], shape=shape)
        taken = share_among_classes(available, _quota(available.sum(axis=1), config, size=sizes[name]))
        place[part] = _place_in_cell(scores.sample_id[part], bins[part], label[part], seed=seed)
        places[part] = taken[bins[part], label[part]]
    keep = place < places
    before = count(bins[present], label[present], shape=shape)
    after = count(bins[keep], label[keep], shape=shape)
    by_split = [np.bincount(bins[part], minlength=config.bins) for part in parts.values()]
    selection = Selection(
        name="balanced",
        between=chosen,
        keep=keep,
        reason="bin-full",
        score=np.where(present, place, np.nan),  # place of the sample in its (bin, class) cell by hash(seed, id)
        threshold=places.astype(np.float64),  # places that cell has
        bin=np.where(present, bins, -1).astype(np.int16),
        rule={"kind": "balanced", "seed": seed, **asdict(config)},
    )
    return BalancedSplit(
        selection=selection,
        before=before,
        after=after,
        uniformity_before=_uniformity(values[present], before, before),
        uniformity_after=_uniformity(values[keep], after, before),
        distances={
            name: distance_to_uniform(np.bincount(bins[part & keep], minlength=config.bins), available=available)
            for (name, part), available in zip(parts.items(), by_split, strict=True)
        },
        curve=size_curve(by_split, CURVE),
    )


def splits_of(scores: ScoreTable) -> dict[str, NDArray[np.bool_]]:
    """Give the rows (n,) of each split there is; all rows as one where the table has no splits."""
    if scores.split is None:
        return {"all": np.ones(len(scores), dtype=bool)}
    return {str(name): scores.split == name for name in sorted(set(scores.split), key=str)}


def largest_pair(scores: ScoreTable, config: BalancedConfig) -> str:
    """Give the pair `A:B` of modalities of which most samples can be kept, test samples not counted."""
    counted = scores.not_test
    sizes = {}
    for first, second in combinations(scores.modalities, 2):
        values = scores.discrepancy(f"{first}:{second}")[counted]
        bins = bin_of(values[~np.isnan(values)], num_bins=config.bins)
        if len(bins) == 0:
            continue
        sizes[f"{first}:{second}"] = size_curve([np.bincount(bins, minlength=config.bins)], (config.tolerance,))[0].size
    return max(sizes, key=lambda pair: sizes[pair])


def bin_of(discrepancy: NDArray[np.float32], *, num_bins: int) -> NDArray[np.int16]:
    """Give the bin (n,) of each discrepancy among `num_bins` equal ones over [-1, 1]; +1 is in the last."""
    return np.clip((discrepancy.astype(np.float64) + 1) / 2 * num_bins, 0, num_bins - 1).astype(np.int16)


def count(bins: NDArray[np.int16], label: NDArray[np.int32], *, shape: tuple[int, int]) -> Counts:
    """Count samples by bin and class, of shape (b, k)."""
    cells = np.bincount(bins.astype(np.int64) * shape[1] + label, minlength=shape[0] * shape[1])
    return cells.reshape(shape)


def distance_to_uniform(kept: Counts, *, available: Counts) -> float:
    """Total-variation distance of bin counts (b,) to uniform over the bins in which anything is available."""
    filled = available > 0
    share = kept[filled] / max(int(kept.sum()), 1)
    return float(np.abs(share - 1 / filled.sum()).sum() / 2)


def size_curve(available: Sequence[Counts], tolerances: tuple[float, ...]) -> tuple[Point, ...]:
    """Give the largest set within each tolerance, from the samples available in each bin (b,) of each split."""
    points = []
    for tolerance in tolerances:
        each = [np.minimum(counts, largest_level(counts, tolerance=tolerance)) for counts in available]
        kept = np.sum(each, axis=0)
        distance = distance_to_uniform(kept, available=np.sum(available, axis=0))
        points.append(Point(tolerance=tolerance, size=int(kept.sum()), distance=distance))
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


def _sizes(parts: Mapping[str, NDArray[np.bool_]], size: int | None) -> dict[str, int | None]:
    """Share a size among the splits in proportion to theirs; what rounding leaves goes to the largest."""
    if size is None:
        return dict.fromkeys(parts)
    counts = {name: int(part.sum()) for name, part in parts.items()}
    total = sum(counts.values())
    if size > total:
        raise ConfigError(f"--size {size}: there are {total} scored samples")
    sizes: dict[str, int | None] = {name: size * number // total for name, number in counts.items()}
    largest = max(counts, key=lambda name: counts[name])
    return {**sizes, largest: size - sum(size * number // total for name, number in counts.items() if name != largest)}


def _quota(available: Counts, config: BalancedConfig, *, size: int | None) -> Counts:
    """Give what each bin (b,) of a split may keep."""
    if size is None:
        return np.minimum(available, largest_level(available, tolerance=config.tolerance))
    return water_fill(available, size, np.argsort(-available, kind="stable"))


def _place_in_cell(
    sample_id: NDArray[np.object_], bins: NDArray[np.int16], label: NDArray[np.int32], *, seed: int
) -> NDArray[np.int64]:
    """Number the samples of each (bin, class) cell from 0 by hash(seed, id), (n,): row order plays no part."""
    order = np.lexsort((hash_rank(sample_id, seed=seed, purpose="balanced split"), label, bins))
    cell = bins[order].astype(np.int64) * (int(label.max()) + 1) + label[order]
    starts = np.flatnonzero(np.r_[True, cell[1:] != cell[:-1]])
    sizes = np.diff(np.r_[starts, len(cell)])
    place = np.empty(len(cell), dtype=np.int64)
    place[order] = np.arange(len(cell)) - np.repeat(starts, sizes)
    return place


def _uniformity(values: NDArray[np.float32], kept: Counts, before: Counts) -> Uniformity:
    ordered = np.sort(values.astype(np.float64))
    expected = (ordered + 1) / 2
    n = len(ordered)
    ks = max(float((np.arange(1, n + 1) / n - expected).max()), float((expected - np.arange(n) / n).max()))
    return Uniformity(
        distance=distance_to_uniform(kept.sum(axis=1), available=before.sum(axis=1)),
        ks=ks,
        positive=float((values > 0).mean()),
    )
