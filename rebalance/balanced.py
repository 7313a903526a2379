"""The balanced split: as many samples as possible with a uniform discrepancy.

The dataset of Xia et al., arXiv 2302.10912, was filtered to a uniform discrepancy; how was not published. The builder
is mmaudit's: bins over [-1, 1], one level L that every bin is cut to, and within a bin the classes share evenly. Each
split (train, validation, test) is balanced on its own: what test samples are like has no part in choosing the others.
Letters: s splits, b bins, k classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ..audit.errors import ConfigError, ScoreError, choices
from .binning import (
    CURVE,
    Counts,
    CurvePoint,
    balancing_weights,
    bin_of,
    choose_num_bins,
    distance_to_uniform,
    largest_level,
    share_among_classes,
    share_total,
    size_curve,
    water_fill,
)
from .score_tables import ScoreBatch, ScoreFiles
from .selection import RowOutcome

AUTO = 0  # bins: as many as the data bear
TOLERANCE = 0.05  # mmaudit's default
METHODS = ("dropping", "weight")
_MAX_BINS = np.iinfo(np.int16).max
_FINE_BINS = 4_096  # bins of the histogram that the number of bins is chosen by


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancedConfig:
    """How the balanced split is built. With a size, or weights, a tolerance is a gate: see `allowed`."""

    bins: int = 20  # over [-1, 1]; of each confidence over [0, 1], with `grid`; 0: by the rule of Freedman & Diaconis
    tolerance: float | None = None  # total-variation distance to uniform over the bins that hold samples: 0.05
    size: int | None = None
    by: str = "dropping"  # or "weight": keep all samples, with weights that make the discrepancy uniform
    max_weight: float = 10.0  # that a sample may have, where the mean is 1: mmaudit's default
    grid: bool = False  # uniform over both confidences, in place of their difference
    per_class: bool = False  # every class uniform by itself

    def __post_init__(self) -> None:
        if self.bins != AUTO and self.bins < 2:
            raise ConfigError(f"split.bins is {self.bins}; a distribution needs at least 2, and 0 lets the data choose")
        if self.tolerance is not None and not 0 <= self.tolerance <= 1:
            raise ConfigError(f"split.tolerance is {self.tolerance}; a total-variation distance lies in [0, 1]")
        if self.size is not None and self.size < 1:
            raise ConfigError(f"split.size is {self.size}; it must be at least 1")
        if self.by not in METHODS:
            raise ConfigError(f"split.by is {self.by!r}; {choices(self.by, METHODS)}")
        if self.max_weight < 1:
            raise ConfigError(f"split.max_weight is {self.max_weight}; it must be at least 1, the mean")
        if self.by == "weight" and (self.size is not None or self.per_class):
            raise ConfigError("split.by is 'weight', which keeps all samples: leave out the size and per_class")
        if self.per_class and self.size is not None:
            raise ConfigError("split.per_class takes a tolerance, not a size")

    @property
    def allowed(self) -> float:
        """The distance up to which samples are kept."""
        return TOLERANCE if self.tolerance is None else self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancedRule:
    """The rule: cells are split by bin by class, each cut to its share of the level."""

    config: BalancedConfig
    between: str
    num_bins: int  # along each axis
    splits: tuple[str, ...]
    num_classes: int
    class_names: tuple[str, ...]
    weight: NDArray[np.float32]  # (s, b), by weight; all 1 otherwise
    name: str = "balanced"
    by_score: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(s, b, k)."""
        return len(self.splits), self.num_bins ** (2 if self.config.grid else 1), self.num_classes

    @property
    def num_cells(self) -> int:
        """Cells there are."""
        return int(np.prod(self.shape))

    @property
    def reason(self) -> str:
        """Why others are dropped."""
        return "bin-full"

    def bins(self, batch: ScoreBatch) -> NDArray[np.int32]:
        """Give the bin of each row, (n,); -1 where a modality is missing. Of a grid: row by row of the first's bins."""
        values = batch.discrepancy(self.between)
        present = ~np.isnan(values) & (batch.excluded_by == 0)
        if self.config.grid:
            first, second = (batch.confidence[:, batch.modalities.index(name)] for name in self.between.split(":"))
            places = [bin_of(2 * np.nan_to_num(each) - 1, num_bins=self.num_bins) for each in (first, second)]
            found = places[0].astype(np.int32) * self.num_bins + places[1]
        else:
            found = bin_of(np.where(present, values, 0), num_bins=self.num_bins).astype(np.int32)
        return np.where(present, found, -1).astype(np.int32)

    def cells(self, batch: ScoreBatch) -> NDArray[np.int32]:
        """Give the cell of each row, (n,); -1 where a modality is missing."""
        bins = self.bins(batch)
        _, num_bins, num_classes = self.shape
        found = (batch.split.astype(np.int64) * num_bins + bins) * num_classes + batch.label
        return np.where(bins < 0, -1, found).astype(np.int32)

    def quotas(self, counts: Counts) -> Counts:
        """Give how many of each cell to keep: the balanced split of each split on its own."""
        if not counts.any():
            raise ScoreError(f"no sample that may be kept has a discrepancy between {self.between}: name another pair")
        available = counts.reshape(self.shape)
        if self.config.by == "weight":
            return counts
        sizes = _sizes_by_split(available.sum(axis=(1, 2)), self.config.size, self.splits)
        found = [self._quotas_of(part, size) for part, size in zip(available, sizes, strict=True)]
        return np.stack(found).reshape(-1)

    def _quotas_of(self, available: Counts, size: int | None) -> Counts:
        """Give how many to keep of each bin and class, (b, k), of one split."""
        if not available.any():
            return available
        if self.config.per_class:
            levels = [largest_level(column, tolerance=self.config.allowed) for column in available.T if column.any()]
            taken = np.zeros_like(available)
            taken[:, available.any(axis=0)] = np.minimum(available[:, available.any(axis=0)], levels)
            return taken
        by_bin = available.sum(axis=1)
        if size is None:
            quota = np.minimum(by_bin, largest_level(by_bin, tolerance=self.config.allowed))
        else:
            quota = water_fill(by_bin, size, np.argsort(-by_bin, kind="stable"))
        return share_among_classes(available, quota)

    def order(self, batch: ScoreBatch) -> NDArray[np.uint64]:
        """Choose by hash."""
        return batch.key

    def explain(self, batch: ScoreBatch, cell: NDArray[np.int32], chance: RowOutcome) -> RowOutcome:
        """Give the bin and the weight; score is the hash of a row, threshold the last hash that its cell keeps."""
        bins = np.where(cell < 0, -1, cell // self.num_classes % self.shape[1]).astype(np.int16)
        weight = np.where(bins < 0, 0, self.weight[batch.split, bins]).astype(np.float32)
        return RowOutcome(score=chance.score, threshold=chance.threshold, bin=bins, weight=weight)

    def curve(self, counts: Counts, tolerances: tuple[float, ...] = CURVE) -> tuple[CurvePoint, ...]:
        """Give what these tolerances would keep: the largest set within each, and the distance it has."""
        return size_curve([part.sum(axis=1) for part in counts.reshape(self.shape) if part.any()], tolerances)

    def distances(self, counts: Counts, quota: Counts) -> dict[str, float]:
        """Give the distance to uniform of each split, over the bins, or the cells of the grid, that it fills."""
        there, kept = (each.reshape(self.shape).sum(axis=2) for each in (counts, quota))  # (s, b)
        return {
            name: distance_to_uniform(kept[place] * self.weight[place], available=there[place])
            for place, name in enumerate(self.splits)
            if there[place].any()
        }


def plan_balanced(score_files: ScoreFiles, config: BalancedConfig, *, between: str | None = None) -> BalancedRule:
    """Make the rule of a balanced split of these scores.

    `between` is as in ScoreTable.discrepancy; None is the one pair of two modalities, and of more the pair of which
    most samples can be kept. Raises ScoreError where no sample has such a discrepancy.
    """
    if between is None:
        between = (
            ":".join(score_files.modalities) if len(score_files.modalities) == 2 else largest_pair(score_files, config)
        )
    if config.grid and ":" not in between:
        if len(score_files.modalities) > 2:
            raise ConfigError(f"--between {between}: a grid has two confidences; name two modalities, A:B")
        between = f"{between}:{next(name for name in score_files.modalities if name != between)}"
    num_bins = config.bins if config.bins != AUTO else _choose_num_bins(score_files, between)
    total = num_bins ** (2 if config.grid else 1)
    if total > _MAX_BINS:
        raise ConfigError(
            f"split.bins: {total} bins are too many, a manifest numbers {_MAX_BINS:,} at most; take fewer"
        )
    rule = BalancedRule(
        config=config,
        between=between,
        num_bins=num_bins,
        splits=score_files.splits,
        num_classes=len(score_files.classes),
        class_names=score_files.class_names,
        weight=np.ones((len(score_files.splits), total), dtype=np.float32),
    )
    if rule.num_cells > np.iinfo(np.int32).max // 8:
        raise ConfigError(f"{rule.num_cells} cells of split, bin and class are too many; take fewer bins")
    if config.by != "weight":
        return rule
    return _with_weights(rule, score_files)


def largest_pair(score_files: ScoreFiles, config: BalancedConfig) -> str:
    """Give the pair `A:B` of modalities of which most samples can be kept, test samples not counted."""
    pairs = [f"{first}:{second}" for first, second in combinations(score_files.modalities, 2)]
    num_bins = 20 if config.bins == AUTO else config.bins
    counts = _histograms(score_files, pairs, num_bins=num_bins)
    sizes = {
        pair: size_curve([each], (config.allowed,))[0].size
        for pair, each in zip(pairs, counts, strict=True)
        if each.any()
    }
    if not sizes:
        raise ScoreError("no sample has two modalities to tell apart: a discrepancy needs both in one sample")
    return max(sizes, key=lambda pair: sizes[pair])


def _choose_num_bins(score_files: ScoreFiles, between: str) -> int:
    counts = _histograms(score_files, [between], num_bins=_FINE_BINS)[0]
    return choose_num_bins((np.arange(_FINE_BINS) + 0.5) * 2 / _FINE_BINS - 1, counts)


def _histograms(score_files: ScoreFiles, between: Sequence[str], *, num_bins: int) -> list[Counts]:
    """Count the discrepancies outside the test split by bin, (b,), for each of these."""
    counts = [np.zeros(num_bins, dtype=np.int64) for _ in between]
    for batch in score_files.batches():
        chooses = score_files.chooses(batch)
        for place, each in enumerate(between):
            values = batch.discrepancy(each)[chooses]
            bins = bin_of(values[~np.isnan(values)], num_bins=num_bins)
            counts[place] += np.bincount(bins, minlength=num_bins)
    return counts


def _with_weights(rule: BalancedRule, score_files: ScoreFiles) -> BalancedRule:
    num_splits, num_bins, _ = rule.shape
    counts = np.zeros((num_splits, num_bins), dtype=np.int64)
    for batch in score_files.batches():
        bins = rule.bins(batch)
        there = bins >= 0
        found = np.bincount(batch.split[there] * num_bins + bins[there], minlength=counts.size)
        counts += found.reshape(counts.shape)
    weight = [balancing_weights(part, most=rule.config.max_weight) for part in counts]
    return replace(rule, weight=np.stack(weight).astype(np.float32))


def _sizes_by_split(counts: Counts, size: int | None, splits: Sequence[str]) -> list[int | None]:
    """Share a size among the splits (s,) in proportion to theirs."""
    if size is None:
        return [None] * len(splits)
    total = int(counts.sum())
    if size > total:
        raise ConfigError(f"--size {size} cannot be had: the largest is {total}, all samples that may be kept")
    return [int(each) for each in share_total(size, counts)]
