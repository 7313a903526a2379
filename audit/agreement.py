"""Rank agreement of two measures of the same samples, and the ceiling that their reliabilities set to it.

n samples. Ranks are those within classes, since some classes lean to one modality in any measure: agreement on single
samples is what is left. Intervals are those of the jackknife over groups, or over blocks of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit
from scipy.stats import rankdata

from .hashing import hash_rank
from .metrics import is_dominated

MAX_BLOCKS = 50  # of the jackknife; ours; 400 draws of 100 and 400 samples, rho 0 to .9: intervals cover .957 to .965
MIN_SAMPLES = 20  # of fewer no agreement is stated; ours

Array = NDArray[np.float64]
Codes = NDArray[np.int64]
Names = Sequence[object] | NDArray[Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Agreement of two measures in [-1, 1], 1: the same order, or the same sides; 0: that of chance.

    low and high are its 95% interval; [-1, 1] with a single group. All are None where a measure does not vary.
    """

    value: float | None
    low: float | None
    high: float | None
    num_samples: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def rank_agreement(
    a: ArrayLike,
    b: ArrayLike,
    *,
    label: ArrayLike | None = None,
    sample_id: Names = None,
    group: Names = None,
) -> Agreement:
    """Compute Spearman's rank correlation of two measures within classes.

    Each measure is ranked within each class (ties have their mean rank), and ranks are divided by the class's size plus
    one and centred; their correlation over all classes is the value. With one class it is Spearman's.

    Args:
        a, b: Measures (n,); samples with a NaN in either are left out.
        label: Class of each sample (n,); None: one class.
        sample_id: Ids (n,), by which samples without groups are assigned to blocks; None: their positions.
        group: Group of each sample (n,), such as its speaker; None where samples are independent.

    Returns:
        The agreement with its 95% interval, by Fisher's z and the jackknife over at most 50 blocks of groups.

    Example:
        >>> round(rank_agreement([0.1, 0.4, 0.2] * 9, [1, 3, 2] * 9).value, 6)
        1.0
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    classes = np.zeros(len(first), dtype=np.int64) if label is None else _codes(np.asarray(label))
    blocks = _blocks(len(first), sample_id=sample_id, group=group)

    def correlation(rows: Codes) -> float:
        return _correlation(*(_ranks_within(values[rows], classes[rows]) for values in (first, second)))

    valid = np.flatnonzero(~(np.isnan(first) | np.isnan(second)))
    return _jackknifed(correlation, valid, blocks, on_z_scale=True)


def rank_correlation(a: ArrayLike, b: ArrayLike, *, label: ArrayLike | None = None) -> float | None:
    """Compute the value of `rank_agreement` alone, which takes a fiftieth of its time; None where it is undefined.

    Example:
        >>> round(rank_correlation([0.1, 0.4, 0.2] * 9, [1, 3, 2] * 9), 6)
        1.0
    """
    return rank_agreement(a, b, label=label, group=[""] * np.size(a)).value


def side_agreement(
    a: ArrayLike,
    b: ArrayLike,
    *,
    threshold: float,
    sample_id: Names = None,
    group: Names = None,
) -> Agreement:
    """Compute Cohen's kappa of the sides of two signed measures: above the threshold, below minus it, and between.

    Args:
        a, b: Signed measures (n,), such as discrepancies; samples with a NaN in either are left out.
        threshold: 0: preferred by either side; 0.2 and 0.4: dominated.
        sample_id: Ids (n,), by which samples without groups are assigned to blocks; None: their positions.
        group: Group of each sample (n,); None where samples are independent.

    Returns:
        Kappa with its 95% interval by the jackknife, as of `rank_agreement`.

    Example:
        >>> side_agreement([0.5, -0.5] * 10, [0.1, -0.9] * 10, threshold=0).value
        1.0
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    above, below = (
        [is_dominated(sign * values, threshold).astype(np.int64) for values in (first, second)] for sign in (1, -1)
    )
    sides = [above[index] - below[index] for index in (0, 1)]
    blocks = _blocks(len(first), sample_id=sample_id, group=group)

    def kappa(rows: Codes) -> float:
        table = np.zeros((3, 3))
        np.add.at(table, (sides[0][rows] + 1, sides[1][rows] + 1), 1 / len(rows))
        expected = float(table.sum(axis=1) @ table.sum(axis=0))
        return float((np.trace(table) - expected) / (1 - expected)) if expected < 1 - 1e-12 else float("nan")

    valid = np.flatnonzero(~(np.isnan(first) | np.isnan(second)))
    return _jackknifed(kappa, valid, blocks, on_z_scale=False)


def reliability_of_mean(r: float, number: float) -> float:
    """Return the reliability of the mean of some measures whose agreement in pairs is r (Spearman-Brown), at least 0.

    Example:
        >>> reliability_of_mean(0.5, 2)
        0.6666666666666666
    """
    return number * r / (1 + (number - 1) * r) if r > 0 else 0.0


def ceiling(first: float | None, second: float | None) -> float | None:
    """Return the largest correlation of measures of these reliabilities (Spearman, 1904); None where one is unknown.

    Example:
        >>> ceiling(0.64, 1.0)
        0.8
    """
    return None if first is None or second is None else float(np.sqrt(max(0.0, first) * max(0.0, second)))


def _codes(values: NDArray[Any]) -> Codes:
    return np.unique(values.astype(str), return_inverse=True)[1].astype(np.int64)


def _ranks_within(values: Array, classes: Codes) -> Array:
    """Compute the centred ranks within classes, as shares of the class's size plus one."""
    ranks = np.zeros(len(values))
    order = np.argsort(classes, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(classes[order])) + 1):
        ranks[rows] = rankdata(values[rows]) / (len(rows) + 1) - 0.5
    return ranks


def _correlation(first: Array, second: Array) -> float:
    size = np.sqrt((first @ first) * (second @ second))
    return float(np.clip(first @ second / size, -1, 1)) if size > 1e-12 else float("nan")


def _blocks(n: int, *, sample_id: Names, group: Names) -> Codes:
    """Assign groups, or samples, to at most 50 blocks of nearly as many groups by the order of their hashes."""
    unit_of = group if group is not None else range(n) if sample_id is None else sample_id
    units, codes = np.unique(np.array([str(unit) for unit in unit_of], dtype=str), return_inverse=True)
    rank = np.empty(len(units), dtype=np.int64)
    rank[np.argsort(hash_rank(units.tolist(), seed=0, purpose="blocks"), kind="stable")] = np.arange(len(units))
    return (rank % MAX_BLOCKS)[codes]


def _jackknifed(statistic: Callable[[Codes], float], rows: Codes, blocks: Codes, *, on_z_scale: bool) -> Agreement:
    """Compute a statistic of rows (b,), and its interval by leaving out one block of rows at a time."""
    value = statistic(rows) if len(rows) >= MIN_SAMPLES else float("nan")
    if not np.isfinite(value):
        return Agreement(value=None, low=None, high=None, num_samples=len(rows))
    sizes = np.bincount(blocks[rows])
    present = np.flatnonzero(sizes)
    if len(present) < 2:
        return Agreement(value=value, low=-1.0, high=1.0, num_samples=len(rows))

    def scaled(number: float) -> float:
        return float(np.arctanh(np.clip(number, -1 + 1e-9, 1 - 1e-9))) if on_z_scale else number

    left_out = np.array([scaled(statistic(rows[blocks[rows] != block])) for block in present])
    left_out = left_out[np.isfinite(left_out)]
    standard_error = np.sqrt((len(left_out) - 1) / len(left_out) * ((left_out - left_out.mean()) ** 2).sum())
    df = max(1.0, len(rows) ** 2 / float((sizes[present].astype(np.float64) ** 2).sum()) - 1)
    half_width = float(stdtrit(df, 0.975)) * standard_error
    low, high = scaled(value) - half_width, scaled(value) + half_width
    if on_z_scale:
        low, high = np.tanh(low), np.tanh(high)
    return Agreement(value=value, low=max(-1.0, float(low)), high=min(1.0, float(high)), num_samples=len(rows))
