"""The balanced split: as many samples as possible with a uniform discrepancy.

The dataset of Xia et al., arXiv 2302.10912, was filtered to a uniform discrepancy; the procedure was not published.
This one is mmaudit's: bins over [-1, 1], every bin cut to one level L (the fullest to L + 1), and each bin's quota
shared evenly among the classes. Each split (train, validation, test) is balanced separately, so test samples do not
influence the others.
Letters: s splits, b bins, k classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ..audit.errors import ConfigError, ScoreError
from ..audit.metrics import assign_bins
from ..audit.parsing import check_choices, check_ranges
from .score_tables import ScoreBatch, ScoreFiles
from .selection import Counts, RowOutcome, share_total
from .split_stats import distance_to_uniform, distances_by_split

AUTO = 0  # number of bins chosen from the data
TOLERANCE = 0.05  # mmaudit's default
METHODS = ("dropping", "weight")
CURVE_TOLERANCES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)  # tolerances whose sizes are always reported


_MAX_BINS = np.iinfo(np.int16).max
_FINE_BINS = 4_096  # bins of the histogram from which the number of bins is chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancedConfig:
    """Settings of the balanced split, section `split` of a config.

    Args:
        bins: Number of bins over [-1, 1]; with `grid`, of each confidence over [0, 1]. At least 2; 0 chooses it by the
            rule of Freedman & Diaconis.
        tolerance: Largest total-variation distance to uniform, in [0, 1], of each split over the bins in which it has
            samples; None is 0.05. With a size, or weights, a split that misses a tolerance given here is refused.
        size: Number of samples to keep, at least 1; None keeps as many as the tolerance allows.
        by: "dropping", or "weight": keep all samples, with weights that make the discrepancy uniform.
        max_weight: Largest weight of a sample, at least 1, where the mean is 1; the default is mmaudit's.
        grid: Uniform over both confidences instead of their difference.
        per_class: Every class uniform by itself.

    Raises:
        ConfigError: A value is out of range, or options exclude each other.

    Example:
        >>> mmaudit.split(balanced=True, config=mmaudit.RunConfig(split=BalancedConfig(bins=10, tolerance=0.1)))
    """

    bins: int = 20
    tolerance: float | None = None
    size: int | None = None
    by: str = "dropping"
    max_weight: float = 10.0
    grid: bool = False
    per_class: bool = False

    def __post_init__(self) -> None:
        if self.bins != AUTO and self.bins < 2:
            raise ConfigError(f"split.bins is {self.bins}; it must be at least 2, or 0 to choose it from the data")
        check_ranges("split", self, tolerance="[0, 1]", size="[1, inf)", max_weight="[1, inf]")
        check_choices("split", self, by=METHODS)
        if self.by == "weight" and (self.size is not None or self.per_class):
            raise ConfigError("split.by is 'weight', which keeps all samples: remove split.size and split.per_class")
        if self.per_class and self.size is not None:
            raise ConfigError("split.per_class cannot be combined with split.size; use split.tolerance")

    @property
    def allowed(self) -> float:
        """Largest total-variation distance to uniform at which samples are kept; 0.05 where none is set."""
        return TOLERANCE if self.tolerance is None else self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancedRule:
    """Selection rule of the balanced split: cells are split by bin by class, each cut to its share of the level."""

    config: BalancedConfig
    between: str
    num_bins: int  # along each axis
    splits: tuple[str, ...]
    num_classes: int
    class_names: tuple[str, ...]
    weight: NDArray[np.float32]  # (s, b); all 1 unless config.by is "weight"
    name: str = "balanced"
    by_score: bool = False

    @property
    def weighs(self) -> bool:
        """Whether rows have other weights than 1."""
        return self.config.by == "weight"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the cells, (s, b, k)."""
        return len(self.splits), self.num_bins ** (2 if self.config.grid else 1), self.num_classes

    @property
    def num_cells(self) -> int:
        """Number of cells."""
        return int(np.prod(self.shape))

    @property
    def reason(self) -> str:
        """Reason recorded for the rows that are not kept."""
        return "bin-full"

    def modalities(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return which of these modalities the discrepancy is computed from."""
        first, _, second = self.between.partition(":")
        return (first, second) if second else tuple(names)

    def bins(self, batch: ScoreBatch) -> NDArray[np.int32]:
        """Return the bin of each row, (n,); -1 where a modality is missing. Grid bins: first * num_bins + second."""
        values = batch.discrepancy(self.between)
        present = ~np.isnan(values) & (batch.excluded_by == 0)
        if self.config.grid:
            first, second = (batch.confidence[:, batch.modalities.index(name)] for name in self.between.split(":"))
            bins_of_axes = [
                assign_bins(2 * np.nan_to_num(values) - 1, num_bins=self.num_bins) for values in (first, second)
            ]
            bin_index = bins_of_axes[0].astype(np.int32) * self.num_bins + bins_of_axes[1]
        else:
            bin_index = assign_bins(np.where(present, values, 0), num_bins=self.num_bins).astype(np.int32)
        return np.where(present, bin_index, -1).astype(np.int32)

    def cells(self, batch: ScoreBatch) -> NDArray[np.int32]:
        """Return the cell of each row, (n,); -1 where a modality is missing."""
        bins = self.bins(batch)
        _, num_bins, num_classes = self.shape
        cell = (batch.split.astype(np.int64) * num_bins + bins) * num_classes + batch.label
        return np.where(bins < 0, -1, cell).astype(np.int32)

    def quotas(self, counts: Counts) -> Counts:
        """Compute how many rows of each cell to keep, each split balanced separately."""
        if not counts.any():
            raise ScoreError(f"no eligible sample has a discrepancy between {self.between}; use another pair")
        available = counts.reshape(self.shape)
        if self.config.by == "weight":
            return counts
        sizes = _sizes_by_split(available.sum(axis=(1, 2)), self.config.size, self.splits)
        quotas = [self._quotas_of(split_counts, size) for split_counts, size in zip(available, sizes, strict=True)]
        return np.stack(quotas).reshape(-1)

    def _quotas_of(self, available: Counts, size: int | None) -> Counts:
        """Compute how many rows of each bin and class of one split to keep, (b, k)."""
        if not available.any():
            return available
        if self.config.per_class:
            return np.stack([fill_bins(counts, tolerance=self.config.allowed) for counts in available.T], axis=1)
        by_bin = available.sum(axis=1)
        if size is None:
            quota = fill_bins(by_bin, tolerance=self.config.allowed)
        else:
            quota = water_fill(by_bin, size, np.argsort(-by_bin, kind="stable"))
        return share_among_classes(available, quota)

    def order(self, batch: ScoreBatch) -> NDArray[np.uint64]:
        """Return the hash of each row, (n,), by which rows are selected."""
        return batch.key

    def explain(self, batch: ScoreBatch, cell: NDArray[np.int32], hash_outcome: RowOutcome) -> RowOutcome:
        """Return each row's bin and weight; score is its hash, threshold the last hash that its cell keeps."""
        bins = np.where(cell < 0, -1, cell // self.num_classes % self.shape[1]).astype(np.int16)
        weight = np.where(bins < 0, 0, self.weight[batch.split, bins]).astype(np.float32)
        return RowOutcome(score=hash_outcome.score, threshold=hash_outcome.threshold, bin=bins, weight=weight)

    def curve(self, counts: Counts, tolerances: tuple[float, ...] = CURVE_TOLERANCES) -> tuple[CurvePoint, ...]:
        """Compute the largest set within each tolerance, and its distance to uniform."""
        return size_curve([bins.sum(axis=1) for bins in counts.reshape(self.shape) if bins.any()], tolerances)

    def distances(self, counts: Counts, quota: Counts) -> dict[str, float]:
        """Compute the distance to uniform of each split, over the bins, or grid cells, in which it has samples."""
        available, num_kept = (cell_counts.reshape(self.shape).sum(axis=2) for cell_counts in (counts, quota))  # (s, b)
        return distances_by_split(num_kept * self.weight, available=available, splits=self.splits)


def plan_balanced(scores: ScoreFiles, config: BalancedConfig, *, between: str | None = None) -> BalancedRule:
    """Build the rule of a balanced split of these scores.

    `between` is as in ScoreTable.discrepancy; None is the only pair of two modalities, or, of more modalities, the
    pair of which most samples can be kept. Raises ScoreError if no sample has such a discrepancy.
    """
    if between is None:
        between = ":".join(scores.modalities) if len(scores.modalities) == 2 else largest_pair(scores, config)
    if config.grid and ":" not in between:
        if len(scores.modalities) > 2:
            raise ConfigError(f"--between {between}: a grid needs two confidences; name two modalities as A:B")
        between = f"{between}:{next(name for name in scores.modalities if name != between)}"
    num_bins = config.bins if config.bins != AUTO else _choose_num_bins(scores, between)
    total = num_bins ** (2 if config.grid else 1)
    if total > _MAX_BINS:
        raise ConfigError(
            f"split.bins: {total} bins requested, a manifest can number at most {_MAX_BINS:,}; use fewer bins"
        )
    rule = BalancedRule(
        config=config,
        between=between,
        num_bins=num_bins,
        splits=scores.splits,
        num_classes=len(scores.classes),
        class_names=scores.class_names,
        weight=np.ones((len(scores.splits), total), dtype=np.float32),
    )
    if rule.num_cells > np.iinfo(np.int32).max // 8:
        raise ConfigError(f"{rule.num_cells} cells (split x bin x class) are too many; use fewer bins")
    if config.by != "weight":
        return rule
    return _with_weights(rule, scores)


def largest_pair(scores: ScoreFiles, config: BalancedConfig) -> str:
    """Return the modality pair `A:B` of which most samples can be kept, test samples not counted."""
    pairs = [f"{first}:{second}" for first, second in combinations(scores.modalities, 2)]
    num_bins = 20 if config.bins == AUTO else config.bins
    pair_histograms = _histograms(scores, pairs, num_bins=num_bins)
    sizes = {
        pair: size_curve([pair_counts], (config.allowed,))[0].size
        for pair, pair_counts in zip(pairs, pair_histograms, strict=True)
        if pair_counts.any()
    }
    if not sizes:
        raise ScoreError(
            "no sample has two modalities; a discrepancy needs confidences of two modalities in one sample"
        )
    return max(sizes, key=lambda pair: sizes[pair])


def _choose_num_bins(scores: ScoreFiles, between: str) -> int:
    counts = _histograms(scores, [between], num_bins=_FINE_BINS)[0]
    return choose_num_bins((np.arange(_FINE_BINS) + 0.5) * 2 / _FINE_BINS - 1, counts)


def _histograms(scores: ScoreFiles, pairs: Sequence[str], *, num_bins: int) -> list[Counts]:
    """Count the discrepancies outside the test split by bin, (b,), for each pair."""
    counts = [np.zeros(num_bins, dtype=np.int64) for _ in pairs]
    for batch in scores.batches():
        used = scores.non_test_mask(batch)
        for pair_index, pair in enumerate(pairs):
            values = batch.discrepancy(pair)[used]
            bins = assign_bins(values[~np.isnan(values)], num_bins=num_bins)
            counts[pair_index] += np.bincount(bins, minlength=num_bins)
    return counts


def _with_weights(rule: BalancedRule, scores: ScoreFiles) -> BalancedRule:
    """Return the rule with the weights (s, b) that make each split's discrepancy uniform."""
    num_splits, num_bins, _ = rule.shape
    counts = np.zeros((num_splits, num_bins), dtype=np.int64)
    for batch in scores.batches():
        bins = rule.bins(batch)
        has_bin = bins >= 0
        batch_counts = np.bincount(batch.split[has_bin] * num_bins + bins[has_bin], minlength=counts.size)
        counts += batch_counts.reshape(counts.shape)
    weight = [balancing_weights(split_counts, max_weight=rule.config.max_weight) for split_counts in counts]
    return replace(rule, weight=np.stack(weight).astype(np.float32))


def _sizes_by_split(counts: Counts, size: int | None, splits: Sequence[str]) -> list[int | None]:
    """Share a total size among the splits (s,) in proportion to their counts."""
    if size is None:
        return [None] * len(splits)
    total = int(counts.sum())
    if size > total:
        raise ConfigError(f"--size: requested {size} samples, available {total}")
    return [int(split_size) for split_size in share_total(size, counts)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One point of the size curve: the largest set within a tolerance, and its distance to uniform."""

    tolerance: float
    size: int
    distance: float


def size_curve(available: Sequence[Counts], tolerances: tuple[float, ...]) -> tuple[CurvePoint, ...]:
    """Compute the largest set within each tolerance from the samples available by bin (b,) in each split."""
    points = []
    for tolerance in tolerances:
        kept_by_split = [fill_bins(counts, tolerance=tolerance) for counts in available]
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


def fill_bins(available: Counts, *, tolerance: float) -> Counts:
    """Compute the largest counts (b,) within the tolerance: bins cut to a level L, some of them to L + 1.

    Without the remainder, up to 5% of the samples are lost where levels are small. The fullest bins get one more each;
    every one of them increases the distance, so that their number is found by bisection too.
    """
    if not available.any():
        return np.zeros_like(available)
    level = largest_level(available, tolerance=tolerance)
    filled = np.minimum(available, level)
    order = np.argsort(-available, kind="stable")
    order = order[available[order] > level]
    low, high = 0, len(order)
    while low < high:
        number = (low + high + 1) // 2
        raised = filled.copy()
        raised[order[:number]] += 1
        if distance_to_uniform(raised, available=available) <= tolerance + 1e-12:
            low = number
        else:
            high = number - 1
    filled[order[:low]] += 1
    return filled


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
