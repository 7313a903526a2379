"""Per-sample measures of modality balance, from class probabilities.

Letters: n samples, m modalities, k classes. `confidence` c (n, m) is each modality's probability of the true class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import combinations, permutations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
LEAST = 1e-12  # probabilities are not let below, so that every loss is finite (27.6 at most)


def confidence(probabilities: Sequence[Floats], label: NDArray[np.int32]) -> Floats:
    """Give each modality's probability of the true class, (n, m) in [0, 1], from m arrays (n, k)."""
    rows = np.arange(len(label))
    return np.stack([each[rows, label] for each in probabilities], axis=1)


def discrepancy(confidence: Floats) -> Floats:
    """Modality discrepancy: +1 one modality alone carries the sample, -1 the others do, 0 both or neither.

    m = 2: D = c^1 - c^2, shape (n,) (Xia et al., arXiv 2302.10912). m > 2: D^j = c^j - mean of the others that the
    sample has, shape (n, m); that form is mmaudit's. NaN where a modality is missing.
    """
    if confidence.shape[1] == 2:
        return np.asarray(confidence[:, 0] - confidence[:, 1])
    present = ~np.isnan(confidence)
    total = np.where(present, confidence, 0).sum(axis=1, keepdims=True)
    others = present.sum(axis=1, keepdims=True) - 1
    return np.asarray(confidence - (total - confidence) / np.maximum(others, 1), dtype=confidence.dtype)


def gap(confidence: Floats) -> Floats:
    """Modality gap max_j c^j - min_j c^j over the modalities there are, (n,) in [0, 1], 0 = balanced; |D| where m = 2.

    The gap is that of Liu et al., arXiv 2510.21797; that it is absolute is mmaudit's reading.
    """
    columns = list(confidence.T)  # by columns: along rows of two, numpy is twenty times as slow
    return np.asarray(reduce(np.fmax, columns) - reduce(np.fmin, columns))


def dominant(confidence: Floats) -> NDArray[np.int8]:
    """Give the modality with the highest confidence, (n,); -1 where two are exactly level."""
    held = np.where(np.isnan(confidence), -1, confidence)
    best = held.argmax(axis=1)
    level = (held == held.max(axis=1, keepdims=True)).sum(axis=1) > 1
    return np.where(level, -1, best).astype(np.int8)


def similarity(probabilities: Sequence[Floats]) -> Floats:
    """Cosine of the modalities' class probabilities, mean over the pairs that a sample has, (n,) in [0, 1].

    1 = they say the same. The correlation criterion of BSS (Guan et al., arXiv 2501.01470). A missing modality's
    probabilities are NaN.
    """
    return _mean_over_pairs([_cosine(a, b) for a, b in combinations(probabilities, 2)])


def overlap(means: Sequence[Floats], deviations: Sequence[Floats]) -> Floats:
    """Bhattacharyya coefficient of two modalities' predictive Gaussians, mean over pairs, (n,) in [0, 1].

    What stands for similarity in a regression: mmaudit's. means and deviations: m arrays (n,), NaN where missing.
    """
    found = []
    for a, b in combinations(range(len(means)), 2):
        total = deviations[a] ** 2 + deviations[b] ** 2
        width = np.sqrt(2 * deviations[a] * deviations[b] / total)
        found.append(width * np.exp(-((means[a] - means[b]) ** 2) / (4 * total)))
    return _mean_over_pairs(found)


def fuse_probabilities(probabilities: Sequence[Floats]) -> Floats:
    """Fuse by the mean of the log probabilities, renormalised, (n, k): mmaudit's stand-in for a fused model."""
    logs = np.stack([np.log(np.maximum(each, LEAST)) for each in probabilities])
    there = ~np.isnan(logs[:, :, :1])  # a missing modality says nothing, of any class
    mean = np.where(there, logs, 0).sum(axis=0) / np.maximum(there.sum(axis=0), 1)
    mean -= mean.max(axis=1, keepdims=True)
    fused = np.exp(mean)
    return np.asarray(fused / fused.sum(axis=1, keepdims=True), dtype=np.float32)


def cross_entropy(confidence: Floats) -> Floats:
    """Loss -log c, of the same shape, in [0, 27.7]."""
    return np.asarray(-np.log(np.maximum(confidence, LEAST)), dtype=np.float32)


def balance(similarity: Floats, loss: Floats, *, fits: NDArray[np.bool_]) -> Floats:
    """Balance score minmax(similarity) - minmax(loss), (n,) in [-1, 1]; high = balanced (BSS, arXiv 2501.01470).

    `loss` (n,) is the fused cross entropy plus the sum of the unimodal ones. Minimum and maximum are those of the
    training samples, `fits` (n,); samples beyond them are clipped.
    """
    return minmax(similarity, fits=fits) - minmax(loss, fits=fits)


def minmax(values: Floats, *, fits: NDArray[np.bool_]) -> Floats:
    """Scale values (n,) into [0, 1] by the range over `fits`; equal values become 0."""
    low, high = values[fits].min(), values[fits].max()
    if high <= low:
        return np.zeros_like(values)
    return np.asarray((np.clip(values, low, high) - low) / (high - low))


def shapley(value: Callable[[frozenset[int]], Floats], num_modalities: int, *, seed: int = 0) -> Floats:
    """Shapley value phi^j of each modality for each sample, (n, m), from the value (n,) of any set of modalities.

    With the value of SMV (Wei et al., CVPR 2024), the number of modalities where they name the true class and 0 where
    not, it is above 1 for a modality that the others need, 1 where each suffices, 0 or less for one that misleads; the
    sum over modalities is m where all together are right, else 0. Exact up to six modalities, beyond that the mean over
    32 orders drawn with the seed (ours).
    """
    everyone = range(num_modalities)
    known: dict[frozenset[int], Floats] = {}
    orders = list(permutations(everyone)) if num_modalities <= 6 else _some_orders(num_modalities, seed)
    total: Floats | None = None
    for order in orders:
        for place, modality in enumerate(order):
            before, after = frozenset(order[:place]), frozenset(order[: place + 1])
            for chosen in (before, after):
                if chosen and chosen not in known:
                    known[chosen] = value(chosen)
            if total is None:
                total = np.zeros((len(known[after]), num_modalities), np.float32)
            total[:, modality] += known[after] - (known[before] if before else 0)
    assert total is not None
    return total / np.float32(len(orders))


def _some_orders(num_modalities: int, seed: int) -> list[tuple[int, ...]]:
    """Sixteen orders and the same backwards, which halves their spread."""
    rng = np.random.default_rng(seed)
    drawn = [tuple(rng.permutation(num_modalities).tolist()) for _ in range(16)]
    return drawn + [order[::-1] for order in drawn]


def _mean_over_pairs(each: Sequence[Floats]) -> Floats:
    values = np.stack(each)
    there = ~np.isnan(values)
    mean = np.where(there, values, 0).sum(axis=0) / np.maximum(there.sum(axis=0), 1)
    return np.asarray(np.clip(mean, 0, 1), dtype=np.float32)


def _cosine(a: Floats, b: Floats) -> Floats:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.maximum(norms, LEAST))
