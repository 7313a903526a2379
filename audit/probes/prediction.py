"""Predictions of probes, and their calibration.

Letters: r rounds, b rows, k outputs. `scale` (b,) is what calibration found for each row: the temperature of a
classifier, the standard deviation of a regression's residuals, both of the mean over the rounds.

Legend: r rounds, n rows, f folds, k outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, log_expit, log_softmax, softmax
from torch import Tensor

from ..dataset.labels import Target
from ..metrics import LEAST, Floats, fuse_probabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the probes of one modality say of b rows.

    confidence (b,) in [0, 1]: the likelihood of the target by the mean of the rounds' logits; by_round (r, b): in each.
    probability (b, k): of classes or labels; of a regression the predictive mean, (b, 1), with its `deviation` (b,).
    entropy (b,) in nats, margin (b,) in [0, 1], NaN where the task has none. predicted (b,): class or number, NaN of
    several labels. right (b,): what accuracy or label accuracy is the mean of; of a regression minus the squared error.
    """

    confidence: Floats
    by_round: Floats
    probability: Floats
    entropy: Floats
    margin: Floats
    predicted: Floats
    right: Floats
    deviation: Floats | None = None


def predict(logits: Floats, scale: Floats, target: Target, *, least_scale: float = 1.0) -> Prediction:
    """Read the outputs (r, b, k) of b rows with their targets.

    classification: confidence is the probability of the true class. multilabel: the likelihood of all labels, present
    and absent, as the geometric mean over labels, so that it does not shrink with their number. regression: the density
    of the true value under a Gaussian around the prediction, in units of the highest density that the best modality
    reaches; `least_scale` is that modality's standard deviation. The latter two forms are mmaudit's.
    """
    mean = _mean_of(logits)
    by_round = likelihoods(logits, scale, target, least_scale=least_scale)
    confidence = by_round[0] if len(logits) == 1 else _likelihood(mean, scale, target, least_scale)
    reads = {"classification": _read_classes, "multilabel": _read_labels, "regression": _read_values}
    return reads[target.task](mean, scale, target, confidence, by_round)


def likelihoods(logits: Floats, scale: Floats, target: Target, *, least_scale: float = 1.0) -> Floats:
    """Return the likelihood of each target under each of several outputs (r, b, k): (r, b)."""
    return np.stack([_likelihood(outputs, scale, target, least_scale) for outputs in logits])


def target_probability(logits: Floats, scale: Floats, target: Target) -> Floats:
    """Return the probabilities (b, k) of classes or labels under outputs (r, b, k)."""
    scaled = _mean_of(logits) / scale[:, None]
    return np.asarray(softmax(scaled, axis=1) if target.values is None else expit(scaled))


def correctness(logits: Floats, scale: Floats, target: Target) -> Floats:
    """Return what the metric of classes or labels is the mean of, (b,) in [0, 1], of outputs (r, b, k)."""
    if target.values is None:
        predicted = target_probability(logits, scale, target).argmax(axis=1)
        return np.asarray(predicted == target.label, dtype=np.float32)
    return np.asarray(((_mean_of(logits) > 0) == (target.values > 0.5)).mean(axis=1, dtype=np.float32))


def _mean_of(logits: Floats) -> Floats:
    """Return the mean (b, k) of outputs (r, b, k), of one round without a copy."""
    return logits[0] if len(logits) == 1 else np.asarray(logits.mean(axis=0))


def _likelihood(logits: Floats, scale: Floats, target: Target, least_scale: float) -> Floats:
    """Give the likelihood (b,) of the targets under one set of outputs (b, k)."""
    scaled = logits / scale[:, None]
    if target.values is None:
        log_likelihood = _log_softmax_at(scaled, target.label)
    elif target.task == "multilabel":
        log_likelihood = log_expit(np.where(target.values > 0.5, scaled, -scaled)).mean(axis=1)
    else:
        log_likelihood = np.log(least_scale / scale) - ((logits - target.values)[:, 0] / scale) ** 2 / 2
    return np.asarray(np.exp(np.minimum(log_likelihood, 0)), dtype=np.float32)


def _log_softmax_at(logits: Floats, label: NDArray[np.int32]) -> Floats:
    """Return the log softmax (b,) of logits (b, k), which are overwritten, at the labels: in half the passes of all."""
    logits -= logits.max(axis=1, keepdims=True)
    at_label = logits[np.arange(len(label)), label]
    return np.asarray(at_label - np.log(np.exp(logits, out=logits).sum(axis=1)))


def _read_classes(logits: Floats, scale: Floats, target: Target, confidence: Floats, by_round: Floats) -> Prediction:
    probability = softmax(logits / scale[:, None], axis=1)
    predicted = probability.argmax(axis=1)
    rows = np.arange(len(probability))
    highest, others = probability[rows, predicted], probability.copy()
    others[rows, predicted] = -1
    return Prediction(
        confidence=confidence,
        by_round=by_round,
        probability=probability,
        entropy=_entropy(probability).sum(axis=1),
        margin=highest - others.max(axis=1),
        predicted=predicted.astype(np.float32),
        right=(predicted == target.label).astype(np.float32),
    )


def _read_labels(logits: Floats, scale: Floats, target: Target, confidence: Floats, by_round: Floats) -> Prediction:
    assert target.values is not None
    probability = expit(logits / scale[:, None])
    return Prediction(
        confidence=confidence,
        by_round=by_round,
        probability=probability,
        entropy=(_entropy(probability) + _entropy(1 - probability)).mean(axis=1),
        margin=np.abs(2 * probability - 1).mean(axis=1),
        predicted=np.full(len(target), np.nan, np.float32),
        right=((logits > 0) == (target.values > 0.5)).mean(axis=1, dtype=np.float32),
    )


def _read_values(logits: Floats, scale: Floats, target: Target, confidence: Floats, by_round: Floats) -> Prediction:
    assert target.values is not None
    return Prediction(
        confidence=confidence,
        by_round=by_round,
        probability=logits,
        entropy=0.5 * np.log(2 * np.pi * np.e * scale**2),
        margin=np.full(len(target), np.nan, np.float32),
        predicted=logits[:, 0],
        right=-((logits - target.values)[:, 0] ** 2),  # the probe_report, which knows the variance, makes R^2 of it
        deviation=scale,
    )


def _entropy(probability: Floats) -> Floats:
    return -probability * np.log(np.maximum(probability, LEAST))


def fuse_predictions(predictions: list[Prediction], target: Target, *, least_scale: float = 1.0) -> Prediction:
    """Fuse the readings of m modalities without a fused probe, those of missing ones full of NaN: one round.

    Classes and labels by the mean of the log probabilities, renormalised; numbers by the mean of the predictions,
    each in proportion to its precision. Mmaudit's stand-in for a fused model.
    """
    if target.task == "regression":
        precision = np.stack([1 / _required(prediction.deviation) ** 2 for prediction in predictions])
        means = np.stack([prediction.probability[:, 0] for prediction in predictions])
        there = ~np.isnan(means)
        total = np.where(there, precision, 0).sum(axis=0)
        mean = np.where(there, precision * means, 0).sum(axis=0) / total
        return predict(mean[None, :, None], 1 / np.sqrt(total), target, least_scale=least_scale)
    each = [prediction.probability for prediction in predictions]
    if target.task == "multilabel":
        flat = [np.stack([part.ravel(), 1 - part.ravel()], axis=1) for part in each]
        present = fuse_probabilities(flat)[:, 0].reshape(each[0].shape)
        logits = np.log(np.maximum(present, LEAST)) - np.log(np.maximum(1 - present, LEAST))
    else:
        logits = np.log(np.maximum(fuse_probabilities(each), LEAST))
    return predict(logits[None], np.ones(len(target), np.float32), target)


def _required(deviation: Floats | None) -> Floats:
    assert deviation is not None
    return deviation


AnyFloats = NDArray[np.floating[Any]]
_MOST_ROWS = 20_000  # one number is fitted: more rows change its third digit
_SHARPNESS = (1e-3, 1e2)  # bounds of 1/T; at either a probe is no use
_MOST_STEPS = 60
_LOGITS_AT_ONCE = 1 << 20  # 4 MiB of float32
_CLOSE = 1e-5
_LEAST_SPREAD = 1e-6


def fit_temperature(
    logits: AnyFloats, target: Target, fold: NDArray[np.integer[Any]], fits: NDArray[np.bool_]
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


def _spread(raw: AnyFloats, target: Target, weight: AnyFloats) -> AnyFloats:
    values = _values(target)
    error = np.square(raw - values).sum(axis=1) / raw.shape[1]
    return np.asarray(np.maximum(np.sqrt(error @ weight / weight.sum(axis=0)), _LEAST_SPREAD))


def _temperature(raw: AnyFloats, target: Target, weight: AnyFloats) -> AnyFloats:
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


def negative_log_likelihood(logits: AnyFloats, target: Target) -> NDArray[np.float64]:
    """Give the loss of each row (n,) under logits (n, k): cross entropy, added over labels; half the squared error."""
    raw = logits.astype(np.float64)
    if target.values is None:
        return np.asarray(-log_softmax(raw, axis=1)[np.arange(len(raw)), target.label])
    if target.task == "multilabel":
        return np.asarray((np.logaddexp(0, raw) - target.values * raw).sum(axis=1))
    return np.asarray(np.square(raw - target.values).sum(axis=1) / 2)


def expected_calibration_error(probability: AnyFloats, label: NDArray[np.integer[Any]], *, num_bins: int = 15) -> float:
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


def _values(target: Target) -> AnyFloats:
    assert target.values is not None
    return target.values
