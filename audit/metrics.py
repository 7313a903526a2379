"""Per-sample measures of modality balance, and 95% confidence intervals of their means.

n samples, m modalities, k classes. `confidence` c (n, m) is each modality's probability of the true class.

Without groups every sample counts as independent, and a share has Wilson's interval; with groups, intervals are those
of the jackknife that leaves out one group at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import expit, logit, stdtrit

from .errors import ConfigError, choices

Floats = NDArray[np.float32]
_SUMMED_ROWS = 1 << 18  # at a time: a row takes 40 bytes
MIN_PROBABILITY = 1e-12  # lower bound of probabilities, which keeps every loss finite (27.6 at most)

BALANCED_WITHIN = 0.2  # largest |D| of a balanced sample: mmaudit's default
DOMINATED_THRESHOLDS = (0.2, 0.4)  # of Xia et al., arXiv 2302.10912, besides 0


def confidence(probabilities: Sequence[Floats], label: NDArray[np.int32]) -> Floats:
    """Return each modality's probability of the true class, (n, m) in [0, 1], from m arrays (n, k)."""
    rows = np.arange(len(label))
    return np.stack([modality_probabilities[rows, label] for modality_probabilities in probabilities], axis=1)


def discrepancy(confidence: Floats) -> Floats:
    """Compute the modality discrepancy in [-1, 1]: +1 this modality alone predicts the class, -1 only the others do.

    0: all do, or none. m = 2: D = c^1 - c^2, shape (n,) (Xia et al., arXiv 2302.10912). m > 2: D^j = c^j - mean of the
    other modalities that the sample has, shape (n, m); this form is mmaudit's. NaN where a modality is missing.
    """
    if confidence.shape[1] == 2:
        return np.asarray(confidence[:, 0] - confidence[:, 1])
    present = ~np.isnan(confidence)
    total = np.where(present, confidence, 0).sum(axis=1, keepdims=True)
    num_others = present.sum(axis=1, keepdims=True) - 1
    return np.asarray(confidence - (total - confidence) / np.maximum(num_others, 1), dtype=confidence.dtype)


def discrepancy_between(confidence: Floats, modalities: Sequence[str], between: str) -> Floats:
    """Compute the signed discrepancy (n,) in [-1, 1] of confidence (n, m): `A:B` is c^A - c^B, `A` is A minus the mean.

    The mean is that of the other modalities. Raises ConfigError for an unknown modality.
    """
    first, _, second = between.partition(":")
    for name in [first, second] if second else [first]:
        if name not in modalities:
            raise ConfigError(f"--between {between}: no modality {name!r}; {choices(name, modalities)}")
    if first == second:
        raise ConfigError(f"--between {between}: the two modalities must differ; pass two names, or one")
    if not second and len(modalities) == 2:
        second = next(name for name in modalities if name != first)
    if second:
        return discrepancy(confidence[:, [modalities.index(first), modalities.index(second)]])
    return np.asarray(discrepancy(confidence)[:, modalities.index(first)])


def gap(confidence: Floats) -> Floats:
    """Compute the modality gap max_j c^j - min_j c^j over the present modalities, (n,) in [0, 1], 0 = balanced.

    |D| where m = 2. From Liu et al., arXiv 2510.21797; the absolute value is mmaudit's interpretation.
    """
    columns = list(confidence.T)  # by columns: numpy is twenty times slower along rows of two values
    return np.asarray(reduce(np.fmax, columns) - reduce(np.fmin, columns))


def dominant_modality(confidence: Floats) -> NDArray[np.int8]:
    """Return the index of the modality with the highest confidence, (n,); -1 where two are exactly equal."""
    filled = np.where(np.isnan(confidence), -1, confidence)
    best = filled.argmax(axis=1)
    is_tied = (filled == filled.max(axis=1, keepdims=True)).sum(axis=1) > 1
    return np.where(is_tied, -1, best).astype(np.int8)


def similarity(probabilities: Sequence[Floats]) -> Floats:
    """Compute the cosine of the modalities' class probabilities, mean over the present pairs, (n,) in [0, 1].

    1 = equal predictions. The correlation criterion of BSS (Guan et al., arXiv 2501.01470). The probabilities of a
    missing modality are NaN.
    """
    return _mean_over_pairs([_cosine(a, b) for a, b in combinations(probabilities, 2)])


def overlap(means: Sequence[Floats], deviations: Sequence[Floats]) -> Floats:
    """Compute the Bhattacharyya coefficient of two modalities' predictive Gaussians, mean over pairs, (n,) in [0, 1].

    Replaces the similarity for regression; this choice is mmaudit's. means, deviations: m arrays (n,), NaN if missing.
    """
    coefficients = []
    for first, second in combinations(range(len(means)), 2):
        total = deviations[first] ** 2 + deviations[second] ** 2
        width = np.sqrt(2 * deviations[first] * deviations[second] / total)
        coefficients.append(width * np.exp(-((means[first] - means[second]) ** 2) / (4 * total)))
    return _mean_over_pairs(coefficients)


def fuse_probabilities(probabilities: Sequence[Floats]) -> Floats:
    """Compute the normalised mean of the log probabilities, (n, k): mmaudit's approximation of a fused model."""
    logs = np.stack(
        [np.log(np.maximum(modality_probabilities, MIN_PROBABILITY)) for modality_probabilities in probabilities]
    )
    is_present = ~np.isnan(logs[:, :, :1])  # a missing modality is NaN for every class
    mean = np.where(is_present, logs, 0).sum(axis=0) / np.maximum(is_present.sum(axis=0), 1)
    mean -= mean.max(axis=1, keepdims=True)
    fused = np.exp(mean)
    return np.asarray(fused / fused.sum(axis=1, keepdims=True), dtype=np.float32)


def cross_entropy(confidence: Floats) -> Floats:
    """Compute the loss -log c, of the same shape, in [0, 27.7]."""
    return np.asarray(-np.log(np.maximum(confidence, MIN_PROBABILITY)), dtype=np.float32)


def balance(similarity: Floats, loss: Floats, *, fits: NDArray[np.bool_]) -> Floats:
    """Compute the balance score minmax(similarity) - minmax(loss), (n,) in [-1, 1]; high = balanced.

    From BSS, arXiv 2501.01470. `loss` (n,) is the fused cross entropy plus the sum of the unimodal cross entropies.
    Minimum and maximum are those of the training samples, `fits` (n,); samples outside that range are clipped.
    """
    return minmax(similarity, value_range(similarity, fits)) - minmax(loss, value_range(loss, fits))


def value_range(values: Floats, fits: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the smallest and largest of values (n,) in a mask (n,)."""
    return float(values[fits].min()), float(values[fits].max())


def minmax(values: Floats, bounds: tuple[float, float]) -> Floats:
    """Scale float32 values (n,) into [0, 1] by a range of float32 values; values of an empty range become 0."""
    low, high = (np.float32(bound) for bound in bounds)
    if high <= low:
        return np.zeros_like(values)
    return np.asarray((np.clip(values, low, high) - low) / (high - low))


def expected_calibration_error(
    probability: NDArray[np.floating[Any]], label: NDArray[np.integer[Any]], *, num_bins: int = 15
) -> float:
    """Compute the expected calibration error in [0, 1], 0 is best (Guo et al. 2017).

    probability (n, k) with label (n,): the confidence of the most probable class, in bins (0, 1/15], ... of equal
    width. With labels (n, k) of 0 and 1: every label is a binary decision with the confidence of its outcome.
    """
    if label.ndim == 2:
        confidence, decision = _confidence_in_decision(probability, is_multilabel=True)
        return calibration_error(confidence, (decision == (label > 0.5)).ravel(), num_bins=num_bins)
    confidence, decision = _confidence_in_decision(probability, is_multilabel=False)
    return calibration_error(confidence, decision == label, num_bins=num_bins)


def calibration_error(
    confidence: NDArray[np.floating[Any]], correct: NDArray[np.bool_], *, num_bins: int = 15
) -> float:
    """Compute the `expected_calibration_error` of decisions (n,), of which `correct` says whether they are right."""
    stated = confidence.astype(np.float64)
    gap = _sum_by_bin(stated, stated - correct, num_bins=num_bins)
    return float(np.abs(gap).sum() / len(confidence))


def ece_floor(probability: NDArray[np.floating[Any]], *, is_multilabel: bool = False, num_bins: int = 15) -> float:
    """Compute the expected calibration error in [0, 1] that probabilities (n, k) have when they are exactly right.

    Chance alone gives it: in a bin the number of correct decisions differs from its mean by sqrt(2 v / pi) on average,
    v the sum of c (1 - c) over its confidences (normal approximation), and by 2 v where v is small (Poisson). Of 700
    rows it is about .03: an error near it is no sign of bad calibration.
    """
    confidence, _ = _confidence_in_decision(probability, is_multilabel=is_multilabel)
    variance = _sum_by_bin(confidence, confidence * (1 - confidence), num_bins=num_bins)
    return float(np.minimum(np.sqrt(2 * variance / np.pi), 2 * variance).sum() / len(confidence))


def _confidence_in_decision(
    probability: NDArray[np.floating[Any]], *, is_multilabel: bool
) -> tuple[NDArray[np.float64], NDArray[np.integer[Any] | np.bool_]]:
    """Return the confidence in the most probable class and that class (n,), or in each label's decision (n k,)."""
    if is_multilabel:
        decision = probability >= 0.5
        return np.where(decision, probability, 1 - probability).ravel().astype(np.float64), decision
    predicted = probability.argmax(axis=1)
    return probability[np.arange(len(predicted)), predicted].astype(np.float64), predicted


def _sum_by_bin(confidence: NDArray[np.float64], values: NDArray[np.float64], *, num_bins: int) -> NDArray[np.float64]:
    """Sum values by bins of confidence of equal width, (0, 1 / num_bins], ..."""
    total = np.zeros(num_bins)
    for start in range(0, len(values), _SUMMED_ROWS):
        rows = slice(start, start + _SUMMED_ROWS)
        bins = np.clip(np.ceil(confidence[rows] * num_bins).astype(np.intp) - 1, 0, num_bins - 1)
        total += np.bincount(bins, weights=values[rows], minlength=num_bins)
    return total


def shapley(value: Callable[[frozenset[int]], Floats], num_modalities: int, *, seed: int = 0) -> Floats:
    """Compute the Shapley value phi^j of each modality for each sample, (n, m).

    `value` maps a set of modalities to (n,). In SMV (Wei et al., CVPR 2024) it is the size of the set where the set
    predicts the true class, else 0. Then phi^j is above 1 for a modality that the others need, 1 where each suffices,
    0 or less for one that misleads; the sum over modalities is m where all of them together are correct, else 0.
    Exact up to six modalities; beyond that the mean over 32 random orders by the seed (mmaudit's choice).
    """
    modalities = range(num_modalities)
    values: dict[frozenset[int], Floats] = {}
    orders = list(permutations(modalities)) if num_modalities <= 6 else _draw_orders(num_modalities, seed)
    total: Floats | None = None
    for order in orders:
        for position, modality in enumerate(order):
            before, after = frozenset(order[:position]), frozenset(order[: position + 1])
            for subset in (before, after):
                if subset and subset not in values:
                    values[subset] = value(subset)
            if total is None:
                total = np.zeros((len(values[after]), num_modalities), np.float32)
            total[:, modality] += values[after] - (values[before] if before else 0)
    assert total is not None
    return total / np.float32(len(orders))


def _draw_orders(num_modalities: int, seed: int) -> list[tuple[int, ...]]:
    """Draw sixteen orders and add their reverses, which halves the spread."""
    rng = np.random.default_rng(seed)
    orders = [tuple(rng.permutation(num_modalities).tolist()) for _ in range(16)]
    return orders + [order[::-1] for order in orders]


def _mean_over_pairs(pair_values: Sequence[Floats]) -> Floats:
    values = np.stack(pair_values)
    is_present = ~np.isnan(values)
    mean = np.where(is_present, values, 0).sum(axis=0) / np.maximum(is_present.sum(axis=0), 1)
    return np.asarray(np.clip(mean, 0, 1), dtype=np.float32)


def _cosine(a: Floats, b: Floats) -> Floats:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.maximum(norms, MIN_PROBABILITY))


Array = NDArray[Any]
Groups = NDArray[np.int64] | None  # index of each sample's group, (n,); None where every sample is its own group


def group_codes(group: NDArray[np.object_] | None) -> Groups:
    """Return the group index of each sample (n,); None where the data have no groups."""
    if group is None:
        return None
    codes = pa.array(group, pa.string()).dictionary_encode(null_encoding="encode").indices
    return np.asarray(codes, dtype=np.int64)


def mean_interval(
    values: Array, groups: Groups, *, low: float = -1, high: float = 1, tail: float = 0.025
) -> dict[str, float]:
    """Compute the mean of values (n,) in [low, high] and its interval by Student's t.

    The standard error is that of `jackknife`; `tail` is the probability on each side, .025 of a 95% interval. A
    single group carries no information on other groups: its interval is all of [low, high].
    """
    centre = float(values.mean())
    if (len(values) if groups is None else int(np.count_nonzero(np.bincount(groups)))) < 2:
        return {"mean": centre, "low": low, "high": high}
    standard_error, df = jackknife(values, groups)
    half_width = float(stdtrit(df, 1 - tail) * standard_error)
    return {"mean": centre, "low": max(low, centre - half_width), "high": min(high, centre + half_width)}


def jackknife(values: Array, groups: Groups) -> tuple[float, float]:
    """Compute the standard error of the mean of values (n,), leaving out one of G >= 2 groups at a time, and its df.

    se^2 = (G - 1) / G sum (mean without g - mean)^2, df = max(1, n^2 / sum n_g^2 - 1): of equal groups G - 1, of
    unequal ones fewer. Of ten groups of sizes .6^g the 95% interval covers .95 to .97 (benchmarks/coverage.py);
    with the sums over groups and G - 1 it covered .79 to .86.
    """
    n, centre = len(values), values.mean()
    if groups is None:
        deviation = values - centre
        return float(np.sqrt(np.square(deviation, out=deviation).sum() / (n * (n - 1)))), n - 1
    sizes = np.bincount(groups)
    deviation = np.bincount(groups, weights=values - centre)[sizes > 0] / (n - sizes[sizes > 0])
    num_groups = len(deviation)
    standard_error = np.sqrt((num_groups - 1) / num_groups * (deviation @ deviation))
    return float(standard_error), max(1.0, float(n**2 / (sizes.astype(np.float64) ** 2).sum() - 1))


def share_interval(rows: NDArray[np.bool_], groups: Groups) -> dict[str, float]:
    """Compute the count and the share of true rows (n,) with Wilson's interval, or that by groups if wider.

    By groups it is on the logit scale, with the standard error of `jackknife` over p (1 - p): at p = .95 an interval of
    p itself covered .81 to .92, this one .90 to .99. A share that does not vary between groups has Wilson's interval
    with as many trials as there are groups of equal size to the same effect.
    """
    n, count = len(rows), int(rows.sum())
    share = count / n
    low, high = wilson_interval(count, n)
    if groups is not None:
        low_by_group, high_by_group = _logit_interval(rows.astype(np.float64), groups)
        low, high = min(low, low_by_group), max(high, high_by_group)
    return {"n": count, "share": share, "low": low, "high": high}


def _logit_interval(rows: Array, groups: NDArray[np.int64]) -> tuple[float, float]:
    n, share = len(rows), float(rows.mean())
    if int(np.count_nonzero(np.bincount(groups))) < 2:
        return 0.0, 1.0
    standard_error, df = jackknife(rows, groups)
    if standard_error < 1e-12:  # equal in every group, but for rounding
        return wilson_interval(share * min(n, df + 1), min(n, df + 1))
    half_width = float(stdtrit(df, 0.975)) * standard_error / (share * (1 - share))
    return float(expit(logit(share) - half_width)), float(expit(logit(share) + half_width))


def wilson_interval(successes: float, trials: float, *, z: float = 1.959964) -> tuple[float, float]:
    """Compute Wilson's score interval of a share, 95% by default (Wilson 1927)."""
    observed_share = successes / trials
    centre = observed_share + z * z / (2 * trials)
    half_width = z * np.sqrt(observed_share * (1 - observed_share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low, high = float((centre - half_width) / scale), float((centre + half_width) / scale)
    # Rounding may exclude a share of exactly 0 or 1.
    return max(0.0, min(low, observed_share)), min(1.0, max(high, observed_share))


def is_dominated(discrepancy: NDArray[np.floating[Any]], threshold: float) -> NDArray[np.bool_]:
    """Return which samples (n,) the first side of the discrepancy dominates: D > T; T = 0 is "preferred"."""
    return np.asarray(discrepancy > threshold)


def is_balanced(discrepancy: NDArray[np.floating[Any]], threshold: float = BALANCED_WITHIN) -> NDArray[np.bool_]:
    """Return which samples (n,) have nearly equal confidence on both sides of the discrepancy: |D| <= T."""
    return np.asarray(np.abs(discrepancy) <= threshold)


def dominated_name(side: str, threshold: float) -> str:
    """Return the name of the subset that one side of the discrepancy dominates."""
    return f"{side}-preferred" if threshold == 0 else f"{side}-dominated-{threshold:g}"


def balanced_name(threshold: float = BALANCED_WITHIN) -> str:
    """Return the name of the subset of nearly equal confidence on both sides."""
    return f"balanced-within-{threshold:g}"


def assign_bins(discrepancy: NDArray[np.float32], *, num_bins: int) -> NDArray[np.int16]:
    """Return the bin (n,) of each discrepancy among `num_bins` equal bins over [-1, 1]; +1 is in the last bin."""
    return np.clip((discrepancy.astype(np.float64) + 1) / 2 * num_bins, 0, num_bins - 1).astype(np.int16)
