"""The scores themselves: what do the probes' probabilities say about each sample?

Letters: n samples, m modalities, k classes. `confidence` c (n, m) is each modality's probability of the true class.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

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

    m = 2: D = c^1 - c^2, shape (n,) (Xia et al., arXiv 2302.10912). m > 2: D^j = c^j - mean of the others, shape
    (n, m); that form is mmaudit's.
    """
    if confidence.shape[1] == 2:
        return np.asarray(confidence[:, 0] - confidence[:, 1])
    total = confidence.sum(axis=1, keepdims=True)
    return np.asarray(confidence - (total - confidence) / (confidence.shape[1] - 1))


def gap(confidence: Floats) -> Floats:
    """Modality gap max_j c^j - min_j c^j, shape (n,) in [0, 1], 0 = balanced; |D| where m = 2.

    The gap is that of Liu et al., arXiv 2510.21797; that it is absolute is mmaudit's reading.
    """
    return np.asarray(confidence.max(axis=1) - confidence.min(axis=1))


def dominant(confidence: Floats) -> NDArray[np.int8]:
    """Give the modality with the highest confidence, (n,); -1 where two are exactly level."""
    best = confidence.argmax(axis=1)
    level = (confidence == confidence.max(axis=1, keepdims=True)).sum(axis=1) > 1
    return np.where(level, -1, best).astype(np.int8)


def similarity(probabilities: Sequence[Floats]) -> Floats:
    """Cosine of the modalities' class probabilities, mean over pairs, (n,) in [0, 1]; 1 = they say the same.

    The correlation criterion of BSS (Guan et al., arXiv 2501.01470).
    """
    pairs = list(combinations(probabilities, 2))
    total = sum((_cosine(a, b) for a, b in pairs), start=np.zeros(len(probabilities[0]), np.float32))
    return np.asarray(np.clip(total / len(pairs), 0, 1), dtype=np.float32)


def fuse(probabilities: Sequence[Floats]) -> Floats:
    """Fuse by the mean of the log probabilities, renormalised, (n, k): mmaudit's stand-in for a fused model."""
    mean = np.mean([np.log(np.maximum(each, LEAST)) for each in probabilities], axis=0)
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


def _cosine(a: Floats, b: Floats) -> Floats:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.maximum(norms, LEAST))
