"""Intervals of test metrics over several trainings: accuracy, macro-F1, MAP and ECE, by the jackknife.

n test samples, S trainings, k classes, G groups. A metric without one sample, or without one group, is computed for all
of them at once: from counts, sums by bin and sums over ranks, exactly, without evaluating the metric n times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, stdtrit

from ..audit.metrics import Groups, jackknife, wilson_interval
from .difference import LEVEL, residual_square

METRICS = ("accuracy", "macro_f1", "map", "ece")
NUM_BINS = 15  # of the ECE, as in audit.metrics
_MAX_CELLS = 1 << 21  # of a table of positives by groups, 16 MiB a float64

Array = NDArray[np.float64]
Labels = NDArray[np.integer]
Probabilities = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MetricValue:
    """A metric of one training on n samples.

    Attributes:
        value: In [0, 1].
        without_sample: The metric without each sample (n,).
        without_group: The metric without each group (G,); None where samples are independent.
    """

    value: float
    without_sample: Array
    without_group: Array | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricInterval:
    """Mean of a metric over S trainings with its 95% interval in [0, 1], NaN where it cannot be known."""

    value: float
    low: float
    high: float


def metric_interval(values: list[MetricValue], groups: Groups) -> MetricInterval:
    """Compute the mean of a metric over S trainings and its interval over test samples and trainings.

    With the pseudo-values P[s, i] = n theta_s - (n - 1) theta_s(without i) of the jackknife, s^2 the variance over
    trainings of theta_s, and MS the mean square of the sample x training residuals of P,

        v = v1 + max(0, s^2 / S - MS / (n S)),

    where v1 is the variance of the jackknife of the mean of theta over trainings: without one sample, or without one
    group. Of accuracy P is the correctness, and v the part of one method in `compare_correctness`. Student's t has
    Satterthwaite's degrees of freedom; the interval is symmetric on the logit scale, so that it stays in [0, 1] and
    covers near its ends (benchmarks/verdict.py). Without variation, as where all samples are right, it is Wilson's. One
    training has no variance of training, one group none of groups: no interval.
    """
    theta = np.array([value.value for value in values])
    n, num_seeds, mean = len(values[0].without_sample), len(values), float(theta.mean())
    num_groups = n if values[0].without_group is None else len(values[0].without_group)
    if num_seeds < 2 or num_groups < 2:
        return MetricInterval(value=mean, low=float("nan"), high=float("nan"))
    pseudo = n * theta[:, None] - (n - 1) * np.stack([value.without_sample for value in values])
    sample_variance, sample_df = _sample_variance(values, mean, pseudo, groups)
    seed_variance = float(theta.var(ddof=1)) / num_seeds
    variance = sample_variance + max(0.0, seed_variance - residual_square(pseudo) / (n * num_seeds))
    if variance < 1e-24 or not 0 < mean < 1:
        trials = min(n, sample_df + 1)
        low, high = wilson_interval(min(1.0, max(0.0, mean)) * trials, trials)
        return MetricInterval(value=mean, low=low, high=high)
    df = max(1.0, variance**2 / (sample_variance**2 / sample_df + seed_variance**2 / (num_seeds - 1)))
    half_width = float(stdtrit(df, 1 - LEVEL / 2)) * float(np.sqrt(variance)) / (mean * (1 - mean))
    centre = float(logit(mean))
    return MetricInterval(value=mean, low=float(expit(centre - half_width)), high=float(expit(centre + half_width)))


def _sample_variance(values: list[MetricValue], mean: float, pseudo: Array, groups: Groups) -> tuple[float, float]:
    """Compute the variance of the mean over trainings by the samples or groups, and its degrees of freedom."""
    if groups is None:
        standard_error, df = jackknife(pseudo.mean(axis=0), None)
        return standard_error**2, float(df)
    without = np.mean([value.without_group for value in values if value.without_group is not None], axis=0)
    sizes = np.bincount(groups)
    sizes = sizes[sizes > 0].astype(np.float64)
    num_groups = len(sizes)
    variance = (num_groups - 1) / num_groups * float(((without - mean) ** 2).sum())
    return variance, max(1.0, float(sizes.sum() ** 2 / (sizes**2).sum() - 1))


def dense_groups(groups: Groups) -> Groups:
    """Return group indices without gaps, as the functions of this module need them."""
    return None if groups is None else np.unique(groups, return_inverse=True)[1].astype(np.int64)


def accuracy(correct: Array, groups: Groups) -> MetricValue:
    """Compute the accuracy of correctness (n,), or the mean of other values in [0, 1]."""
    return _ratio(correct.astype(np.float64), groups)


def _ratio(values: Array, groups: Groups) -> MetricValue:
    n, total = len(values), float(values.sum())
    without_group = None
    if groups is not None:
        sizes = np.bincount(groups)
        without_group = (total - np.bincount(groups, weights=values)) / np.maximum(n - sizes, 1)
    return MetricValue(value=total / n, without_sample=(total - values) / max(n - 1, 1), without_group=without_group)


def macro_f1(probability: Probabilities, label: Labels, groups: Groups) -> MetricValue:
    """Compute the mean F1 of the classes that occur in label (n,), of probabilities (n, k).

    Without its last sample a class does not occur any more, and the mean is over the others.
    """
    num_classes, predicted = probability.shape[1], probability.argmax(axis=1)
    is_right = predicted == label
    num_true, num_predicted = (np.bincount(labels, minlength=num_classes) for labels in (label, predicted))
    num_right = np.bincount(label[is_right], minlength=num_classes)
    f1 = _f1(num_right, num_true, num_predicted)
    total, num_occurring = float(f1.sum()), int((num_true > 0).sum())
    # Without a sample, F1 changes for its own class and for the predicted one.
    of_label = _f1(num_right[label] - is_right, num_true[label] - 1, num_predicted[label] - is_right)
    of_predicted = np.where(
        is_right, f1[predicted], _f1(num_right[predicted], num_true[predicted], num_predicted[predicted] - 1)
    )
    changed = (of_label - f1[label]) + np.where(is_right, 0.0, of_predicted - f1[predicted])
    num_left = num_occurring - (num_true[label] == 1)
    without_group = None
    if groups is not None:
        shape = (int(groups.max()) + 1, num_classes)
        true, guessed, right = (
            np.bincount(groups[rows] * num_classes + labels[rows], minlength=shape[0] * shape[1]).reshape(shape)
            for labels, rows in ((label, slice(None)), (predicted, slice(None)), (label, is_right))
        )
        left = num_true - true
        by_group = _f1(num_right - right, left, num_predicted - guessed)
        without_group = by_group.sum(axis=1) / np.maximum((left > 0).sum(axis=1), 1)
    return MetricValue(
        value=total / num_occurring,
        without_sample=(total + changed) / np.maximum(num_left, 1),
        without_group=without_group,
    )


def _f1(num_right: NDArray[np.int64], num_true: NDArray[np.int64], num_predicted: NDArray[np.int64]) -> Array:
    """Compute F1; 0 of a class that does not occur."""
    return np.where(num_true > 0, 2 * num_right / np.maximum(num_true + num_predicted, 1), 0.0)


def calibration_error(probability: Probabilities, label: Labels, groups: Groups) -> MetricValue:
    """Compute the expected calibration error of the most probable class, see `expected_calibration_error`."""
    predicted = probability.argmax(axis=1)
    confidence = probability[np.arange(len(label)), predicted].astype(np.float64)
    excess = confidence - (predicted == label)
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(np.intp) - 1, 0, NUM_BINS - 1)
    gap, n = np.bincount(bins, weights=excess, minlength=NUM_BINS), len(label)
    total = float(np.abs(gap).sum())
    without = total - np.abs(gap[bins]) + np.abs(gap[bins] - excess)
    without_group = None
    if groups is not None:
        num_groups = int(groups.max()) + 1
        of_group = np.bincount(groups * NUM_BINS + bins, weights=excess, minlength=num_groups * NUM_BINS)
        left = np.maximum(n - np.bincount(groups), 1)
        without_group = np.abs(gap - of_group.reshape(num_groups, NUM_BINS)).sum(axis=1) / left
    return MetricValue(value=total / n, without_sample=without / max(n - 1, 1), without_group=without_group)


def mean_average_precision(probability: Probabilities, label: Labels, groups: Groups) -> MetricValue:
    """Compute the mean over classes that occur in label (n,) of the average precision, of probabilities (n, k).

    With q_r = b_r / a_r for positive r, a_r samples and b_r positives having scores at least as high, the average
    precision is the mean of q_r over positives. Without another sample of a score that is at least as high, a_r is one
    less, and so is b_r if that is a positive: sums over the positives below each score give all n values.
    """
    n, num_groups = len(label), 0 if groups is None else int(groups.max()) + 1
    total, without, without_group = 0.0, np.zeros(n), np.zeros(num_groups)
    occurring = np.unique(label)
    num_left = np.full(n, float(len(occurring)))
    groups_left = np.full(num_groups, float(len(occurring)))
    for index in occurring.tolist():
        scores, is_positive = np.ascontiguousarray(probability[:, index]), label == index
        ranked = _Ranked.of(scores, is_positive)
        total += float(ranked.precision.mean())
        without += ranked.without_each(is_positive)
        num_left[is_positive] -= len(ranked.precision) == 1
        if groups is not None:
            by_group = ranked.without_groups(is_positive, groups, num_groups=num_groups)
            groups_left -= np.isnan(by_group)
            without_group += np.nan_to_num(by_group)
    return MetricValue(
        value=total / len(occurring),
        without_sample=without / np.maximum(num_left, 1),
        without_group=None if groups is None else without_group / np.maximum(groups_left, 1),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ranked:
    """Samples (n,) among the m positives of a class, in ascending order of their scores.

    num_below (n,): positives with a score of at most that of the sample. above, positives_above, precision (m,): of
    each positive, samples and positives with scores at least as high, and their ratio. order (m,): the positives.
    """

    num_below: NDArray[np.intp]
    above: Array
    positives_above: Array
    precision: Array
    order: NDArray[np.intp]

    @classmethod
    def of(cls, scores: Probabilities, is_positive: NDArray[np.bool_]) -> _Ranked:
        positives = np.flatnonzero(is_positive)
        order = positives[np.argsort(scores[positives], kind="stable")]
        num_below = np.searchsorted(scores[order], scores, side="right")
        above, positives_above = (_at_least(rows, len(order)) for rows in (num_below, num_below[order]))
        precision = positives_above / above
        return cls(num_below=num_below, above=above, positives_above=positives_above, precision=precision, order=order)

    def without_each(self, is_positive: NDArray[np.bool_]) -> Array:
        """Compute the average precision without each sample, (n,); 0 without the only positive."""
        m = len(self.precision)
        rest = np.append(np.cumsum(self.precision[::-1])[::-1], 0.0)  # of positives with higher scores
        fewer = np.maximum(self.above - 1, 1)
        without_negative = np.insert(np.cumsum(self.positives_above / fewer), 0, 0.0) + rest
        reduced = (self.positives_above - 1) / fewer
        without_positive = np.insert(np.cumsum(reduced) - reduced, 0, 0.0) + rest
        result = (without_negative / m)[self.num_below]
        result[is_positive] = (without_positive / max(m - 1, 1))[self.num_below[is_positive]]
        return np.asarray(result)

    def without_groups(self, is_positive: NDArray[np.bool_], groups: NDArray[np.int64], *, num_groups: int) -> Array:
        """Compute the average precision without each group, (G,); NaN where no positive is left."""
        m, result = len(self.precision), np.empty(num_groups)
        group_of_positive = groups[self.order]
        width = max(1, _MAX_CELLS // (m + 1))
        for first in range(0, num_groups, width):
            size = min(width, num_groups - first)
            is_inside = (groups >= first) & (groups < first + size)
            above, positives_above = (
                self._by_group(rows, groups[rows] - first, size) for rows in (is_inside, is_inside & is_positive)
            )
            is_left = group_of_positive[:, None] != np.arange(first, first + size)
            ratio = (self.positives_above[:, None] - positives_above) / np.maximum(self.above[:, None] - above, 1)
            num_left = is_left.sum(axis=0)
            total = np.where(is_left, ratio, 0.0).sum(axis=0)
            result[first : first + size] = np.where(num_left > 0, total / np.maximum(num_left, 1), np.nan)
        return result

    def _by_group(self, rows: NDArray[np.bool_], groups: NDArray[np.int64], num_groups: int) -> Array:
        """Count the samples of each group with scores at least as high as each positive's, (m, groups)."""
        m = len(self.precision)
        counts = np.bincount(self.num_below[rows] * num_groups + groups, minlength=(m + 1) * num_groups)
        by_rank = counts.reshape(m + 1, num_groups)[1:]
        return np.asarray(np.cumsum(by_rank[::-1], axis=0)[::-1], dtype=np.float64)


def _at_least(num_below: NDArray[np.intp], m: int) -> Array:
    """Count the samples with scores at least as high as each of m positives."""
    return np.asarray(np.cumsum(np.bincount(num_below, minlength=m + 1)[:0:-1])[::-1], dtype=np.float64)


PROBABILITY_METRICS: dict[str, Callable[[Probabilities, Labels, Groups], MetricValue]] = {
    "macro_f1": macro_f1,
    "map": mean_average_precision,
    "ece": calibration_error,
}
