"""A reading: what do a probe's outputs say of some rows, in the terms of its task?

Letters: r rounds, b rows, k outputs. `scale` (b,) is what calibration found for each row: the temperature of a
classifier, the standard deviation of a regression's residuals, both of the mean over the rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, softmax

from .measures import LEAST, Floats, fuse
from .probing.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
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


def read_logits(logits: Floats, scale: Floats, target: Target, *, least_scale: float = 1.0) -> Reading:
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


def probability_of(logits: Floats, scale: Floats, target: Target) -> Floats:
    """Return the probabilities (b, k) of classes or labels under outputs (r, b, k)."""
    scaled = _mean_of(logits) / scale[:, None]
    return np.asarray(softmax(scaled, axis=1) if target.values is None else expit(scaled))


def right_of(logits: Floats, scale: Floats, target: Target) -> Floats:
    """Return what the metric of classes or labels is the mean of, (b,) in [0, 1], of outputs (r, b, k)."""
    if target.values is None:
        predicted = probability_of(logits, scale, target).argmax(axis=1)
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


def _read_classes(logits: Floats, scale: Floats, target: Target, confidence: Floats, by_round: Floats) -> Reading:
    probability = softmax(logits / scale[:, None], axis=1)
    predicted = probability.argmax(axis=1)
    rows = np.arange(len(probability))
    highest, others = probability[rows, predicted], probability.copy()
    others[rows, predicted] = -1
    return Reading(
        confidence=confidence,
        by_round=by_round,
        probability=probability,
        entropy=_entropy(probability).sum(axis=1),
        margin=highest - others.max(axis=1),
        predicted=predicted.astype(np.float32),
        right=(predicted == target.label).astype(np.float32),
    )


def _read_labels(logits: Floats, scale: Floats, target: Target, confidence: Floats, by_round: Floats) -> Reading:
    assert target.values is not None
    probability = expit(logits / scale[:, None])
    return Reading(
        confidence=confidence,
        by_round=by_round,
        probability=probability,
        entropy=(_entropy(probability) + _entropy(1 - probability)).mean(axis=1),
        margin=np.abs(2 * probability - 1).mean(axis=1),
        predicted=np.full(len(target), np.nan, np.float32),
        right=((logits > 0) == (target.values > 0.5)).mean(axis=1, dtype=np.float32),
    )


def _read_values(logits: Floats, scale: Floats, target: Target, confidence: Floats, by_round: Floats) -> Reading:
    assert target.values is not None
    return Reading(
        confidence=confidence,
        by_round=by_round,
        probability=logits,
        entropy=0.5 * np.log(2 * np.pi * np.e * scale**2),
        margin=np.full(len(target), np.nan, np.float32),
        predicted=logits[:, 0],
        right=-((logits - target.values)[:, 0] ** 2),  # the ledger, which knows the variance, makes R^2 of it
        deviation=scale,
    )


def _entropy(probability: Floats) -> Floats:
    return -probability * np.log(np.maximum(probability, LEAST))


def fuse_readings(readings: list[Reading], target: Target, *, least_scale: float = 1.0) -> Reading:
    """Fuse the readings of m modalities without a fused probe, those of missing ones full of NaN: one round.

    Classes and labels by the mean of the log probabilities, renormalised; numbers by the mean of the predictions,
    each in proportion to its precision. Mmaudit's stand-in for a fused model.
    """
    if target.task == "regression":
        precision = np.stack([1 / _required(reading.deviation) ** 2 for reading in readings])
        means = np.stack([reading.probability[:, 0] for reading in readings])
        there = ~np.isnan(means)
        total = np.where(there, precision, 0).sum(axis=0)
        mean = np.where(there, precision * means, 0).sum(axis=0) / total
        return read_logits(mean[None, :, None], 1 / np.sqrt(total), target, least_scale=least_scale)
    each = [reading.probability for reading in readings]
    if target.task == "multilabel":
        flat = [np.stack([part.ravel(), 1 - part.ravel()], axis=1) for part in each]
        present = fuse(flat)[:, 0].reshape(each[0].shape)
        logits = np.log(np.maximum(present, LEAST)) - np.log(np.maximum(1 - present, LEAST))
    else:
        logits = np.log(np.maximum(fuse(each), LEAST))
    return read_logits(logits[None], np.ones(len(target), np.float32), target)


def _required(deviation: Floats | None) -> Floats:
    assert deviation is not None
    return deviation
