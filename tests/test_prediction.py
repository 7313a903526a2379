"""Predictions: likelihoods in [0, 1] that equal references, for every task."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, softmax
from scipy.stats import entropy, norm
from sklearn.metrics import r2_score

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.probes.prediction import correctness, fuse_predictions, likelihoods, predict, target_probability

LOGITS = arrays(np.float32, (2, 6, 3), elements=st.floats(-20, 20, width=32))


def classes() -> Target:
    return Target(task="classification", label=np.array([0, 1, 2, 0, 1, 2], np.int32), num_outputs=3)


def labels() -> Target:
    values = np.array([[0, 0, 1], [1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 1]], np.float32)
    return Target(task="multilabel", label=np.zeros(6, np.int32), num_outputs=3, values=values)


def numbers() -> Target:
    values = np.array([[0.0], [1.0], [2.0], [-1.0], [5.0], [0.5]], np.float32)
    return Target(task="regression", label=np.zeros(6, np.int32), num_outputs=1, values=values)


@given(LOGITS, st.floats(0.2, 5))
def test_class_confidence_is_the_softmax_at_its_temperature(logits: np.ndarray, temperature: float) -> None:
    prediction = predict(logits, np.full(6, temperature, np.float32), classes())
    log_probability = log_softmax(logits.astype(np.float64), axis=2)
    rows = np.arange(6)
    by_repeat = softmax(log_probability / temperature, axis=2)
    np.testing.assert_allclose(prediction.by_repeat, by_repeat[:, rows, classes().label], atol=1e-4)
    mean = softmax(log_probability.mean(axis=0) / temperature, axis=1)
    np.testing.assert_allclose(prediction.probability, mean, atol=1e-4)
    np.testing.assert_allclose(prediction.confidence, mean[rows, classes().label], atol=1e-4)
    np.testing.assert_allclose(prediction.entropy, entropy(mean, axis=1), atol=1e-3)
    ordered = np.sort(mean, axis=1)
    np.testing.assert_allclose(prediction.margin, ordered[:, -1] - ordered[:, -2], atol=1e-4)
    np.testing.assert_array_equal(prediction.correct, prediction.predicted == classes().label)


@given(LOGITS)
def test_multilabel_confidence_is_the_geometric_mean(logits: np.ndarray) -> None:
    target = labels()
    assert target.values is not None
    prediction = predict(logits, np.ones(6, np.float32), target)
    mean = logits.astype(np.float64).mean(axis=0)
    probability = 1 / (1 + np.exp(-mean))
    likelihood = np.where(target.values > 0, probability, 1 - probability)
    np.testing.assert_allclose(prediction.confidence, likelihood.prod(axis=1) ** (1 / 3), atol=1e-5)
    assert ((prediction.confidence >= 0) & (prediction.confidence <= 1)).all()
    assume(np.abs(mean).min() > 1e-5)  # rounding decides what stands on the edge
    np.testing.assert_allclose(prediction.correct, ((mean > 0) == (target.values > 0.5)).mean(axis=1), atol=1e-6)
    assert np.isnan(prediction.predicted).all()


def test_multilabel_confidence_does_not_depend_on_the_number_of_labels() -> None:
    """With probability 0.9 for every label the confidence is 0.9, for three labels and for thirty."""
    sure = np.log(9).astype(np.float32)
    for k in (3, 30):
        values = np.zeros((1, k), np.float32)
        target = Target(task="multilabel", label=np.zeros(1, np.int32), num_outputs=k, values=values)
        prediction = predict(np.full((1, 1, k), -sure, np.float32), np.ones(1, np.float32), target)
        assert prediction.confidence[0] == pytest.approx(0.9, abs=1e-5)


def test_regression_confidence_is_the_density_relative_to_min_scale() -> None:
    target = numbers()
    assert target.values is not None
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (2, 6, 1)).astype(np.float32)
    for deviation in (0.5, 1.0, 3.0):
        prediction = predict(logits, np.full(6, deviation, np.float32), target, min_scale=0.5)
        density = norm.pdf(target.values[:, 0], loc=logits.mean(axis=0)[:, 0], scale=deviation)
        np.testing.assert_allclose(prediction.confidence, density / norm.pdf(0, scale=0.5), atol=1e-5)
        np.testing.assert_allclose(prediction.entropy, norm.entropy(scale=deviation), atol=1e-5)
        r2_values = 1 + prediction.correct / target.values.var()
        assert r2_values.mean() == pytest.approx(r2_score(target.values[:, 0], logits[:, :, 0].mean(axis=0)), abs=1e-5)


@pytest.mark.parametrize("target", [classes(), labels(), numbers()], ids=lambda target: target.task)
def test_fusing_equal_predictions_changes_only_precision(target: Target) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1, (1, 6, target.num_outputs)).astype(np.float32)
    single = predict(logits, np.ones(6, np.float32), target)
    fused = fuse_predictions([single, single], target)
    np.testing.assert_allclose(fused.probability, single.probability, atol=1e-5)
    if fused.deviation is not None:
        np.testing.assert_allclose(fused.deviation, np.sqrt(0.5), atol=1e-6)


@pytest.mark.parametrize("target", [classes(), labels(), numbers()], ids=lambda target: target.task)
def test_missing_modality_does_not_change_the_fusion(target: Target) -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 1, (2, 1, 6, target.num_outputs)).astype(np.float32)
    ones = np.ones(6, np.float32)
    present, missing = (
        predict(modality_logits, ones, target) for modality_logits in (logits[0], np.full_like(logits[1], np.nan))
    )
    np.testing.assert_allclose(fuse_predictions([present, missing], target).probability, present.probability, atol=1e-5)


@pytest.mark.parametrize("target", [classes(), labels()])
@pytest.mark.parametrize("num_rounds", [1, 3])
def test_helpers_equal_the_fields_of_predict(target: Target, num_rounds: int) -> None:
    rng = np.random.default_rng(num_rounds)
    logits = 3 * rng.standard_normal((num_rounds, len(target), target.num_outputs)).astype(np.float32)
    scale = rng.uniform(0.5, 2, len(target)).astype(np.float32)
    prediction = predict(logits, scale, target)
    np.testing.assert_array_equal(likelihoods(logits, scale, target), prediction.by_repeat)
    np.testing.assert_array_equal(target_probability(logits, scale, target), prediction.probability)
    np.testing.assert_array_equal(correctness(logits, scale, target), prediction.correct)


def test_margin_is_between_the_two_most_probable_classes() -> None:
    logits = np.random.default_rng(0).standard_normal((1, 4, 3)).astype(np.float32)
    logits[0, 0] = 0  # three alike: no margin
    target = Target(task="classification", label=np.zeros(4, np.int32), num_outputs=3)
    ordered = np.sort(softmax(logits[0], axis=1), axis=1)
    margin = predict(logits, np.ones(4, np.float32), target).margin
    np.testing.assert_array_equal(margin, ordered[:, -1] - ordered[:, -2])
    assert margin[0] == 0
