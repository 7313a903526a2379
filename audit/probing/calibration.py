"""Calibration: how much less sure than it says should a probe be?

Legend: r rounds, n rows, f folds, k outputs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import Tensor

from .target import Target

Floats = NDArray[np.floating[Any]]
_MOST_ROWS = 20_000  # one number is fitted: more rows change its third digit
_SHARPNESS = (1e-3, 1e2)  # bounds of 1/T; at either a probe is no use
_MOST_STEPS = 60
_LOGITS_AT_ONCE = 1 << 20  # 4 MiB of float32
_CLOSE = 1e-5
_LEAST_SPREAD = 1e-6


def fit_temperature(
    logits: Floats, target: Target, fold: NDArray[np.integer[Any]], fits: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Fit for each round and fold the temperature that its logits are to be divided by: (r, f), above 1 if too sure.

    logits (r, n, k) are out of fold, fold (r, n); T of fold j minimises the cross entropy of the other folds' rows that
    `fits` (n,) (Guo et al. 2017), so that no label of a fold has a part in its own. Of more than 20,000 rows an even
    sample is taken. Of a regression: the standard deviation of the residuals instead, in units of the target.
    A fold without other rows has 1.
    """
    some = np.flatnonzero(fits)
    some = some[np.linspace(0, len(some) - 1, min(len(some), _MOST_ROWS)).astype(np.intp)]
    target, num_folds = target.take(some), int(fold.max()) + 1
    found = np.ones((len(logits), num_folds))
    for index, (raw, own) in enumerate(zip(logits[:, some], fold[:, some], strict=True)):
        weight = (own[:, None] != np.arange(num_folds)).astype(np.float64)  # (s, f)
        usable = weight.sum(axis=0) > 0
        if target.task == "regression":
            found[index, usable] = _spread(raw.astype(np.float64), target, weight[:, usable])
        else:
            found[index, usable] = _temperature(raw, target, weight[:, usable])
    return found


def _spread(raw: Floats, target: Target, weight: Floats) -> Floats:
    values = _values(target)
    error = np.square(raw - values).sum(axis=1) / raw.shape[1]
    return np.asarray(np.maximum(np.sqrt(error @ weight / weight.sum(axis=0)), _LEAST_SPREAD))


def _temperature(raw: Floats, target: Target, weight: Floats) -> Floats:
    """Find where the slope of the cross entropy by 1/T is 0, by Newton within a closing bracket: (f,).

    It is convex in 1/T. Each fold starts at 1, not where others ended: so none knows of another, to the last digit.
    """
    logits = torch.from_numpy(raw.astype(np.float32, copy=False))
    answer = torch.from_numpy(target.label.astype(np.int64) if target.values is None else np.array(target.values))
    each = [_sharpness(logits, answer, torch.from_numpy(of_fold.astype(np.float32))) for of_fold in weight.T]
    return 1 / np.array(each)


def _sharpness(logits: Tensor, answer: Tensor, weight: Tensor) -> float:
    low, high = _SHARPNESS
    at = 1.0
    for _ in range(_MOST_STEPS):
        slope, bend = (float(values @ weight) for values in _slopes_and_bends(at, logits, answer))
        low, high = (at, high) if slope < 0 else (low, at)
        newton = at - slope / bend if bend > 0 else low
        last, at = at, newton if low < newton < high else math.sqrt(low * high)
        if abs(at - last) < _CLOSE * at:
            break
    return at


def _slopes_and_bends(at: float, logits: Tensor, answer: Tensor) -> list[Tensor]:
    """Compute `_slope_and_bend` at 1/T for some rows at a time, so that what lies between stays in the cache."""
    num_rows = max(1, _LOGITS_AT_ONCE // logits.shape[1])
    pieces = (slice(start, start + num_rows) for start in range(0, len(logits), num_rows))
    parts = ((logits[piece], answer[piece]) for piece in pieces)
    return [torch.cat(columns) for columns in zip(*(_slope_and_bend(x * at, x, y) for x, y in parts), strict=True)]


def _slope_and_bend(scaled: Tensor, logits: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of each row's cross entropy by 1/T, (n,) each: of (mean - y) * logit."""
    if answer.ndim == 1:
        share = scaled.softmax(dim=1)
        mean = (share * logits).sum(dim=1)
        at_label = logits.gather(1, answer[:, None]).squeeze(1)
        return mean - at_label, (share * logits.square()).sum(dim=1) - mean.square()
    share = scaled.sigmoid()
    return ((share - answer) * logits).sum(dim=1), (share * (1 - share) * logits.square()).sum(dim=1)


def negative_log_likelihood(logits: Floats, target: Target) -> NDArray[np.float64]:
    """Give the loss of each row (n,) under logits (n, k): cross entropy, added over labels; half the squared error."""
    raw = logits.astype(np.float64)
    if target.values is None:
        return np.asarray(-log_softmax(raw, axis=1)[np.arange(len(raw)), target.label])
    if target.task == "multilabel":
        return np.asarray((np.logaddexp(0, raw) - target.values * raw).sum(axis=1))
    return np.asarray(np.square(raw - target.values).sum(axis=1) / 2)


def expected_calibration_error(probability: Floats, label: NDArray[np.integer[Any]], *, num_bins: int = 15) -> float:
    """Give the expected calibration error in [0, 1], 0 is best (Guo et al. 2017).

    probability (n, k) with label (n,): confidence of the class that is named first, in bins (0, 1/15], ... of equal
    width. With labels (n, k) of 0 and 1: every decision counts, its confidence that of the side it takes.
    """
    if label.ndim == 2:
        said = probability >= 0.5
        confidence, right = np.where(said, probability, 1 - probability).ravel(), (said == (label > 0.5)).ravel()
    else:
        named = probability.argmax(axis=1)
        confidence, right = probability[np.arange(len(named)), named], named == label
    place = np.clip(np.ceil(confidence.astype(np.float64) * num_bins).astype(np.intp) - 1, 0, num_bins - 1)
    gap = np.bincount(place, weights=confidence - right.astype(np.float64), minlength=num_bins)
    return float(np.abs(gap).sum() / len(confidence))


def _values(target: Target) -> Floats:
    assert target.values is not None
    return target.values
