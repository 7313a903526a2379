"""Predictions of probes, and their calibration.

Legend: r repeats, n and b rows, f folds, k outputs. `scale` (b,) is the calibration of each row: the temperature of a
classifier, the standard deviation of a regression's residuals, both of the mean over the repeats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, log_expit, logit, softmax
from torch import Tensor

from ..dataset.labels import Target
from ..features.matrix import RowIndex
from ..metrics import MIN_PROBABILITY, Floats, fuse_probabilities
from ..row_arrays import slices
from .cross_fit import CrossFit


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Predictions of the probes of one modality for b rows.

    confidence (b,) in [0, 1]: the likelihood of the target under the mean of the repeats' logits; by_repeat (r, b): in
    each repeat. probability (b, k): of classes or labels; of a regression the predictive mean (b, 1), with its
    `deviation` (b,). entropy (b,) in nats; margin (b,) in [0, 1], NaN where the task has none. predicted (b,): class or
    number, NaN for multilabel. correct (b,): its mean is accuracy or label accuracy; of a regression the negative
    squared error.
    """

    confidence: Floats
    by_repeat: Floats
    probability: Floats
    entropy: Floats
    margin: Floats
    predicted: Floats
    correct: Floats
    deviation: Floats | None = None


def predict(logits: Floats, scale: Floats, target: Target, *, min_scale: float = 1.0) -> Prediction:
    """Compute the prediction for b rows with their targets from outputs (r, b, k).

    classification: confidence is the probability of the true class. multilabel: the likelihood of all labels, present
    and absent, as the geometric mean over labels, so that it does not shrink with their number. regression: the density
    of the true value under a Gaussian around the prediction, relative to the highest density of the best modality,
    whose standard deviation is `min_scale`. The latter two forms are mmaudit's.
    """
    mean, missing = _mean_of(logits), np.full(len(target), np.nan, np.float32)
    by_repeat = likelihoods(logits, scale, target, min_scale=min_scale)
    confidence = by_repeat[0] if len(logits) == 1 else _likelihood(mean, scale, target, min_scale)
    if target.values is None:
        probability = softmax(mean / scale[:, None], axis=1)
        best, rows, rest = probability.argmax(axis=1), np.arange(len(probability)), probability.copy()
        rest[rows, best] = -1
        entropy, margin = _entropy(probability).sum(axis=1), probability[rows, best] - rest.max(axis=1)
        predicted, correct = best.astype(np.float32), (best == target.label).astype(np.float32)
    elif target.task == "multilabel":
        probability = expit(mean / scale[:, None])
        entropy = (_entropy(probability) + _entropy(1 - probability)).mean(axis=1)
        margin, predicted = np.abs(2 * probability - 1).mean(axis=1), missing
        correct = ((mean > 0) == (target.values > 0.5)).mean(axis=1, dtype=np.float32)
    else:
        probability, predicted, margin = mean, mean[:, 0], missing
        entropy = 0.5 * np.log(2 * np.pi * np.e * scale**2)
        correct = -((mean - target.values)[:, 0] ** 2)  # the probe report converts it to R^2 with the variance
    return Prediction(
        confidence=confidence,
        by_repeat=by_repeat,
        probability=probability,
        entropy=entropy,
        margin=margin,
        predicted=predicted,
        correct=correct,
        deviation=scale if target.task == "regression" else None,
    )


def likelihoods(logits: Floats, scale: Floats, target: Target, *, min_scale: float = 1.0) -> Floats:
    """Compute the likelihood (r, b) of the targets under each of r outputs (r, b, k)."""
    return np.stack([_likelihood(outputs, scale, target, min_scale) for outputs in logits])


def target_probability(logits: Floats, scale: Floats, target: Target) -> Floats:
    """Compute the probabilities (b, k) of classes or labels from outputs (r, b, k)."""
    scaled = _mean_of(logits) / scale[:, None]
    return np.asarray(softmax(scaled, axis=1) if target.values is None else expit(scaled))


def correctness(logits: Floats, scale: Floats, target: Target) -> Floats:
    """Compute the accuracy or label accuracy of each row, (b,) in [0, 1], from outputs (r, b, k)."""
    if target.values is None:
        predicted = target_probability(logits, scale, target).argmax(axis=1)
        return np.asarray(predicted == target.label, dtype=np.float32)
    return np.asarray(((_mean_of(logits) > 0) == (target.values > 0.5)).mean(axis=1, dtype=np.float32))


def _mean_of(logits: Floats) -> Floats:
    """Return the mean (b, k) of outputs (r, b, k); with one repeat, without a copy."""
    return logits[0] if len(logits) == 1 else np.asarray(logits.mean(axis=0))


def _likelihood(logits: Floats, scale: Floats, target: Target, min_scale: float) -> Floats:
    """Compute the likelihood (b,) of the targets under one set of outputs (b, k)."""
    scaled = logits / scale[:, None]
    if target.values is None:
        log_likelihood = _log_softmax_at(scaled, target.label)
    elif target.task == "multilabel":
        log_likelihood = log_expit(np.where(target.values > 0.5, scaled, -scaled)).mean(axis=1)
    else:
        log_likelihood = np.log(min_scale / scale) - ((logits - target.values)[:, 0] / scale) ** 2 / 2
    return np.asarray(np.exp(np.minimum(log_likelihood, 0)), dtype=np.float32)


def _log_softmax_at(logits: Floats, label: NDArray[np.int32]) -> Floats:
    """Compute the log softmax (b,) at the labels of logits (b, k), which are overwritten: faster than all of it."""
    logits -= logits.max(axis=1, keepdims=True)
    at_label = logits[np.arange(len(label)), label]
    return np.asarray(at_label - np.log(np.exp(logits, out=logits).sum(axis=1)))


def _log(probability: Floats) -> Floats:
    return np.asarray(np.log(np.maximum(probability, MIN_PROBABILITY)))


def _entropy(probability: Floats) -> Floats:
    return -probability * _log(probability)


def class_prior(target: Target, fold: NDArray[np.integer[Any]], fits: NDArray[np.bool_]) -> Floats | None:
    """Compute the prior (f, k) of each fold: log frequencies of classes, or log odds of labels, in the other folds.

    fold (n,), fits (n,): the rows that count. A class without rows, or a label of none or all, counts as half a row.
    None of a regression.
    """
    num_folds = int(fold.max()) + 1
    if target.task == "regression":
        return None
    counts, num_rows = np.zeros((num_folds, target.num_outputs)), np.zeros(num_folds, np.int64)
    for part in slices(len(fold)):
        own = fold[part][fits[part]]
        num_rows += np.bincount(own, minlength=num_folds)
        if target.values is None:
            np.add.at(counts, (own, target.label[part][fits[part]]), 1)
        else:
            np.add.at(counts, own, target.values[part][fits[part]])
    others = np.maximum(num_rows.sum() - num_rows, 1)[:, None]
    rate = np.maximum(counts.sum(axis=0) - counts, 0.5) / others
    prior = np.log(rate) if target.values is None else logit(np.minimum(rate, 1 - 0.5 / others))
    return np.asarray(prior, dtype=np.float32)


def scale_logits(logits: Floats, scale: Floats, anchor: Floats) -> Floats:
    """Divide logits (r, b, k) by a temperature (b,), relative to the logits of an anchor (b, k)."""
    return np.asarray(anchor + (logits - anchor) / scale[:, None])


def fuse_predictions(predictions: list[Prediction], target: Target, *, min_scale: float = 1.0) -> Prediction:
    """Fuse the predictions of m modalities, NaN where missing, into one without a fused probe.

    Classes and labels: the mean of the log probabilities, renormalised. Regression: the mean of the predictions,
    weighted by precision. This is mmaudit's substitute for a fused model.
    """
    if target.task == "regression":
        deviations = [prediction.deviation for prediction in predictions if prediction.deviation is not None]
        precision = np.stack([1 / deviation**2 for deviation in deviations])
        means = np.stack([prediction.probability[:, 0] for prediction in predictions])
        present = ~np.isnan(means)
        total = np.where(present, precision, 0).sum(axis=0)
        mean = np.where(present, precision * means, 0).sum(axis=0) / total
        return predict(mean[None, :, None], 1 / np.sqrt(total), target, min_scale=min_scale)
    probabilities = [prediction.probability for prediction in predictions]
    if target.task == "multilabel":
        flat = [np.stack([probability.ravel(), 1 - probability.ravel()], axis=1) for probability in probabilities]
        label_probability = fuse_probabilities(flat)[:, 0].reshape(probabilities[0].shape)
        logits = _log(label_probability) - _log(1 - label_probability)
    else:
        logits = _log(fuse_probabilities(probabilities))
    return predict(logits[None], np.ones(len(target), np.float32), target)


AnyFloats = NDArray[np.floating[Any]]
_MAX_ROWS = 20_000  # one number is fitted: more rows change its third digit
_SHARPNESS = (1e-3, 1e2)  # bounds of 1/T; a probe at either bound is useless
_MAX_STEPS = 60
_CHUNK_LOGITS = 1 << 20  # 4 MiB of float32
_TOLERANCE = 1e-5
_MIN_SPREAD = 1e-6


def fit_temperature(
    logits: AnyFloats,
    target: Target,
    fold: NDArray[np.integer[Any]],
    fits: NDArray[np.bool_],
    *,
    anchor: Floats | None = None,
) -> NDArray[np.float64]:
    """Fit the temperature of each repeat and fold, by which its logits are divided: (r, f), above 1 if overconfident.

    logits (r, n, k) are out of fold, fold (r, n). T of fold j minimises the cross entropy of the rows with `fits` (n,)
    of other folds (Guo et al. 2017), so that it does not depend on labels of fold j. Logits are divided relative to the
    `anchor` (f, k) of fold j, see scale_logits; by default 0, the logits of uniform probabilities. Of more than 20,000
    rows an evenly spaced sample is used. Of a regression: the standard deviation of the residuals instead, in units of
    the target. A fold without rows in other folds has 1.
    """
    sample = np.flatnonzero(fits)
    sample = sample[np.linspace(0, len(sample) - 1, min(len(sample), _MAX_ROWS)).astype(np.intp)]
    target, num_folds = target.take(sample), int(fold.max()) + 1
    scale = np.ones((len(logits), num_folds))
    for index, (repeat_logits, fold_of_row) in enumerate(zip(logits[:, sample], fold[:, sample], strict=True)):
        weight = (fold_of_row[:, None] != np.arange(num_folds)).astype(np.float64)  # (s, f)
        usable = weight.sum(axis=0) > 0
        if target.task == "regression" and target.values is not None:
            scale[index, usable] = _spread(repeat_logits.astype(np.float64), target.values, weight[:, usable])
        else:
            anchors = np.zeros((num_folds, logits.shape[2]), np.float32) if anchor is None else anchor[:num_folds]
            scale[index, usable] = _temperature(repeat_logits, anchors[usable], target, weight[:, usable])
    return scale


def _spread(logits: AnyFloats, values: AnyFloats, weight: AnyFloats) -> AnyFloats:
    error = np.square(logits - values).sum(axis=1) / logits.shape[1]
    return np.asarray(np.maximum(np.sqrt(error @ weight / weight.sum(axis=0)), _MIN_SPREAD))


def _temperature(outputs: AnyFloats, anchors: Floats, target: Target, weight: AnyFloats) -> AnyFloats:
    """Find the zero of the derivative of the cross entropy by 1/T with bracketed Newton steps: (f,).

    The cross entropy is convex in 1/T. Each fold starts at 1, so that folds do not influence each other.
    """
    logits = torch.from_numpy(outputs.astype(np.float32, copy=False))
    torch_target = torch.from_numpy(target.label.astype(np.int64) if target.values is None else np.array(target.values))
    weights = [torch.from_numpy(fold_weight.astype(np.float32)) for fold_weight in weight.T]
    return 1 / np.array(
        [
            _fit_sharpness(logits - offset, offset, torch_target, fold_weight)
            for fold_weight, offset in zip(weights, torch.from_numpy(anchors), strict=True)
        ]
    )


def _fit_sharpness(logits: Tensor, offset: Tensor, torch_target: Tensor, weight: Tensor) -> float:
    low, high = _SHARPNESS
    sharpness = 1.0
    for _ in range(_MAX_STEPS):
        derivatives = _chunked_derivatives(sharpness, logits, offset, torch_target)
        slope, curvature = (float(values @ weight) for values in derivatives)
        low, high = (sharpness, high) if slope < 0 else (low, sharpness)
        newton = sharpness - slope / curvature if curvature > 0 else low
        previous, sharpness = sharpness, newton if low < newton < high else math.sqrt(low * high)
        if abs(sharpness - previous) < _TOLERANCE * sharpness:
            break
    return sharpness


def _chunked_derivatives(sharpness: float, logits: Tensor, offset: Tensor, torch_target: Tensor) -> list[Tensor]:
    """Compute `_derivatives` at 1/T = sharpness, with the offset (k,) added, in chunks of rows that fit the cache."""
    num_rows = max(1, _CHUNK_LOGITS // logits.shape[1])
    slices = (slice(start, start + num_rows) for start in range(0, len(logits), num_rows))
    chunks = (
        _derivatives(torch.add(offset, logits[rows], alpha=sharpness), logits[rows], torch_target[rows])
        for rows in slices
    )
    return [torch.cat(columns) for columns in zip(*chunks, strict=True)]


def _derivatives(scaled: Tensor, logits: Tensor, torch_target: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the first and second derivative of each row's cross entropy by 1/T, (n,) each: of (mean - y) * logit."""
    if torch_target.ndim == 1:
        probability = scaled.softmax(dim=1)
        mean = (probability * logits).sum(dim=1)
        at_label = logits.gather(1, torch_target[:, None]).squeeze(1)
        return mean - at_label, (probability * logits.square()).sum(dim=1) - mean.square()
    probability = scaled.sigmoid()
    curvature = (probability * (1 - probability) * logits.square()).sum(dim=1)
    return ((probability - torch_target) * logits).sum(dim=1), curvature


def predict_out_of_fold(
    cross_fits: Sequence[CrossFit], rows: RowIndex, predict: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Predict each row, in each repeat, with the probe that did not train on it: (r, b, k).

    `predict` returns the logits (c, k) of a probe, by number, for the rows at the given positions (c,).
    """
    out: Tensor | None = None
    first = 0
    for index, cross_fit in enumerate(cross_fits):
        fold = cross_fit.fold[rows]
        order = torch.from_numpy(np.argsort(fold, kind="stable"))
        ends = np.cumsum(np.bincount(fold, minlength=cross_fit.num_folds))
        for probe, positions in enumerate(torch.tensor_split(order, torch.from_numpy(ends[:-1])), start=first):
            logits = predict(probe, positions)
            if out is None:
                out = logits.new_empty(len(cross_fits), len(rows), logits.shape[1])
            out[index, positions.to(out.device)] = logits
        first += cross_fit.num_folds
    assert out is not None
    return out
