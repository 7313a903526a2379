"""Predictions: likelihoods in [0, 1] that equal references, for every task."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, softmax
from scipy.stats import entropy, norm
from sklearn.metrics import r2_score
from torch.nn import functional

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.probes.prediction import (
    correctness,
    fit_temperature,
    fuse_predictions,
    likelihoods,
    predict,
    target_probability,
)

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


Floats = NDArray[np.float64]
NUM_ROWS = 8_000
FOLD = np.random.default_rng(5).integers(0, 4, (2, NUM_ROWS)).astype(np.int16)
EVERYONE = np.ones(NUM_ROWS, dtype=bool)


def drawn(task: str, *, seed: int = 0) -> tuple[Floats, Target]:
    """Draw true logits (n, k) and a target from them."""
    rng = np.random.default_rng(seed)
    raw = 2 * rng.standard_normal((NUM_ROWS, 4))
    if task == "multilabel":
        values = (rng.random(raw.shape) < expit(raw)).astype(np.float32)
        return raw, Target(task=task, label=np.zeros(NUM_ROWS, np.int32), num_outputs=4, values=values)
    label = (rng.random((NUM_ROWS, 1)) > softmax(raw, axis=1).cumsum(axis=1)).sum(axis=1).clip(0, 3).astype(np.int32)
    return raw, Target(task=task, label=label, num_outputs=4)


def mean_loss(logits: Floats, target: Target) -> float:
    """Compute the mean loss by torch: cross entropy, or its sum over labels."""
    scores = torch.from_numpy(logits)
    if target.values is None:
        return float(functional.cross_entropy(scores, torch.from_numpy(target.label.astype(np.int64))))
    values = torch.from_numpy(target.values.astype(np.float64))
    return float(functional.binary_cross_entropy_with_logits(scores, values, reduction="sum") / len(logits))


@pytest.mark.parametrize("task", ["classification", "multilabel"])
@pytest.mark.parametrize("planted", [0.3, 1.0, 5.0])
def test_a_planted_temperature_is_recovered(task: str, planted: float) -> None:
    """Scales of 8,000 drawn rows vary by 1%: the mean over four seeds lies within 2%."""
    temperatures = []
    for seed in range(4):
        raw, target = drawn(task, seed=seed)
        temperatures.append(fit_temperature(np.stack([raw, raw]) * planted, target, FOLD, EVERYONE))
        assert temperatures[-1].shape == (2, 4)
    assert np.mean(temperatures) == pytest.approx(planted, rel=0.02)


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_calibration_does_not_raise_the_loss_or_change_predictions(task: str) -> None:
    raw, target = drawn(task)
    for scale in (0.2, 1.0, 6.0):
        temperature = fit_temperature(raw[None] * scale, target, FOLD[:1], EVERYONE)
        calibrated = raw * scale / temperature[0, FOLD[0]][:, None]
        before, after = (mean_loss(logits, target) for logits in (raw * scale, calibrated))
        assert after <= before + 1e-3  # at scale 1 the fitted temperature is off by chance
        np.testing.assert_array_equal(calibrated.argmax(axis=1), raw.argmax(axis=1))


def test_temperature_minimises_the_loss() -> None:
    raw, target = drawn("classification")
    fold = np.repeat(np.array([[0, 1]], np.int16), NUM_ROWS // 2, axis=1)
    temperature = fit_temperature(raw[None] * 3, target, fold, EVERYONE)[0]
    for own in (0, 1):
        other_rows = np.flatnonzero(fold[0] != own)
        losses = [
            mean_loss(raw[other_rows] * 3 / (temperature[own] * factor), target.take(other_rows))
            for factor in (0.99, 1.0, 1.01)
        ]
        assert losses[1] == min(losses)


def test_temperature_does_not_depend_on_its_own_fold() -> None:
    raw, target = drawn("classification")
    before = fit_temperature(raw[None], target, FOLD[:1], EVERYONE)[0]
    turned = replace(target, label=np.where(FOLD[0] == 2, (target.label + 1) % 4, target.label).astype(np.int32))
    after = fit_temperature(raw[None], turned, FOLD[:1], EVERYONE)[0]
    assert after[2] == before[2]
    assert (np.delete(after, 2) > np.delete(before, 2) * 1.1).all()


def test_temperature_does_not_depend_on_rows_outside_fits() -> None:
    raw, target = drawn("classification")
    fits = np.arange(NUM_ROWS) % 3 != 0
    turned = replace(target, label=np.where(fits, target.label, (target.label + 1) % 4).astype(np.int32))
    temperatures = [fit_temperature(raw[None], changed_target, FOLD[:1], fits) for changed_target in (target, turned)]
    np.testing.assert_array_equal(temperatures[0], temperatures[1])


def test_regression_scale_is_the_standard_deviation_of_residuals() -> None:
    rng = np.random.default_rng(1)
    truth = 50 * rng.standard_normal((NUM_ROWS, 1))
    values = (truth + np.array([2.0, 2.0, 2.0, 8.0])[FOLD[0], None] * rng.standard_normal((NUM_ROWS, 1))).astype("f4")
    target = Target(task="regression", label=np.zeros(NUM_ROWS, np.int32), num_outputs=1, values=values)
    scale = fit_temperature(truth[None], target, FOLD[:1], EVERYONE)[0]
    assert scale[3] == pytest.approx(2.0, rel=0.03)
    assert scale[0] == pytest.approx(np.sqrt((4 + 4 + 64) / 3), rel=0.05)


def test_single_fold_has_temperature_one() -> None:
    raw, target = drawn("classification")
    temperature = fit_temperature(raw[None] * 9, target, np.zeros((1, NUM_ROWS), np.int16), EVERYONE)
    assert temperature.tolist() == [[1.0]]


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_chunk_size_does_not_change_the_temperature(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = drawn(task)
    fold = np.arange(len(target))[None] % 3
    unchunked = fit_temperature(logits[None], target, fold, np.ones(len(target), bool))
    monkeypatch.setattr("mmaudit.audit.probes.prediction._CHUNK_LOGITS", 100)
    chunked = fit_temperature(logits[None], target, fold, np.ones(len(target), bool))
    np.testing.assert_allclose(chunked, unchunked, rtol=1e-6)
