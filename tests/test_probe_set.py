"""Probe sets are calibrated out of fold, without labels of the fold that is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from probes import StoredProbe
from scipy.special import softmax
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.errors import ConfigError
from mmaudit.audit.features.matrix import Inputs, JointInputs, MatrixInputs
from mmaudit.audit.hashing import hash_rank
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.probes.cross_fit import CrossFit
from mmaudit.audit.probes.folds import assign_folds
from mmaudit.audit.probes.prediction import class_prior
from mmaudit.audit.probes.probe_set import (
    CALIBRATION_ROWS,
    KINDS,
    CalibratedProbe,
    Fit,
    Probe,
    ProbeSet,
    fit_calibrated_probe,
    fit_joint_probe,
    fit_probe,
)

pytestmark = pytest.mark.usefixtures("quick_scores")

Floats = NDArray[np.float32]
N, FOLDS = 600, 5


def fit_stored(by_repeat: Floats) -> Fit:
    def fit(inputs: Inputs, target: Target, cross_fits: Sequence[CrossFit]) -> Probe:
        by_epoch = by_repeat[:1] * np.array([0.5, 1], np.float32)[:, None, None]
        return StoredProbe(by_repeat=by_repeat, by_epoch=by_epoch)

    return fit


def cross(n: int = N, *, fits: NDArray[np.bool_] | None = None, seed: int = 0) -> CrossFit:
    rng = np.random.default_rng(seed)
    return CrossFit(
        fold=rng.permutation(np.arange(n) % FOLDS).astype(np.int16),
        inner=rng.permutation(np.arange(n) % FOLDS).astype(np.int16),
        fits=np.ones(n, bool) if fits is None else fits,
        key=rng.permutation(n).astype(np.uint64),
    )


CROSS_FITS = (cross(seed=0), cross(seed=1))
NOTHING = MatrixInputs(matrix=np.zeros((N, 2), np.float32))


def drawn(task: str, *, seed: int = 0) -> tuple[Target, Floats]:
    """Draw calibrated outputs (2, n, k), and targets from them."""
    rng = np.random.default_rng(seed)
    k = {"classification": 3, "multilabel": 4, "regression": 1}[task]
    logits = rng.normal(0, 1.5, (N, k))
    repeated = np.stack([logits, logits]).astype(np.float32)
    if task == "classification":
        label = (logits + rng.gumbel(size=(N, k))).argmax(axis=1).astype(np.int32)
        return Target(task=task, label=label, num_outputs=k), repeated
    noise = rng.logistic(size=(N, k))
    values = (logits + noise > 0) if task == "multilabel" else logits + rng.normal(0, 2.0, (N, k))
    return Target(task=task, label=np.zeros(N, np.int32), num_outputs=k, values=values.astype(np.float32)), repeated


def calibrated_probe(target: Target, logits: Floats, **changes: Any) -> CalibratedProbe:
    options: dict[str, Any] = {
        "cross_fits": CROSS_FITS,
        "present": np.ones(N, bool),
        "fit": fit_stored(logits),
        **changes,
    }
    return fit_calibrated_probe("audio", NOTHING, target, **options)


@pytest.mark.parametrize("task", ["classification", "multilabel"])
@pytest.mark.parametrize("sharpness", [0.25, 1.0, 4.0])
def test_overconfident_and_underconfident_logits_are_calibrated(task: str, sharpness: float) -> None:
    target, logits = drawn(task)
    calibrated = calibrated_probe(target, sharpness * logits)
    calibration = calibrated.calibration
    assert calibration.num_rows == N
    assert calibration.temperature == pytest.approx(sharpness, rel=0.2)
    np.testing.assert_allclose(calibrated.scale, sharpness, rtol=0.25)
    assert calibration.ece_before is not None
    assert calibration.ece_after is not None
    assert calibration.ece_after <= calibration.ece_before + 0.01  # of 600 rows, which differ between folds
    if sharpness != 1:
        assert calibration.ece_after < calibration.ece_before / 2


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
@pytest.mark.parametrize("fold", range(FOLDS))
def test_scale_does_not_depend_on_labels_of_its_fold(task: str, fold: int) -> None:
    """Of logits so sharp that a temperature lowers the loss whatever the labels of the fold."""
    target, logits = drawn(task)
    logits = logits if task == "regression" else 6 * logits
    in_fold = CROSS_FITS[0].fold == fold
    if target.values is None:
        changed_target = replace(target, label=np.where(in_fold, (target.label + 1) % 3, target.label).astype(np.int32))
    else:
        moved = 1 - target.values if task == "multilabel" else target.values + 9
        changed_target = replace(target, values=np.where(in_fold[:, None], moved, target.values))
    before, after = (calibrated_probe(of_target, logits).scale for of_target in (target, changed_target))
    assert len(set(before[in_fold])) == 1
    np.testing.assert_array_equal(after[in_fold], before[in_fold])
    assert (np.abs(after - before)[~in_fold] > 0.01).all()


@pytest.mark.parametrize("task", ["classification", "multilabel"])
@pytest.mark.parametrize("seed", range(4))
def test_calibration_never_raises_the_loss(task: str, seed: int) -> None:
    """Folds of unequal sharpness: the temperature of the others fits none of them, and the logits stay as they are."""
    target, logits = drawn(task, seed=seed)
    sharpness = np.random.default_rng(seed).choice([0.4, 1.0, 2.5], FOLDS)
    for factor in (1.0, sharpness[CROSS_FITS[0].fold][:, None]):
        calibrated = calibrated_probe(target, (factor * logits).astype(np.float32))
        plain = replace(calibrated, fold_scale=np.ones(FOLDS, np.float32), anchor=None)
        rows = np.arange(N)
        before, after = (float(-np.log(probe.predict(rows, target).confidence).mean()) for probe in (plain, calibrated))
        assert after <= before
        if not isinstance(factor, float) and after == before:
            assert (calibrated.scale == 1).all()
            assert calibrated.calibration.temperature == 1


def test_temperature_of_one_hard_fold_is_left_out() -> None:
    target, logits = drawn("classification")
    factor = np.where(CROSS_FITS[0].fold == 0, 8.0, 0.7)[:, None]  # four folds agree on .7, the fifth needs 8
    calibrated = calibrated_probe(target, (factor * logits).astype(np.float32))
    assert (calibrated.scale == 1).all()


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_calibration_of_noise_gives_the_prior(task: str) -> None:
    """Logits that have nothing to do with skewed targets: their probabilities become those of the other folds."""
    rng = np.random.default_rng(0)
    values = (rng.random((N, 2)) < [0.9, 0.2]).astype(np.float32) if task == "multilabel" else None
    label = rng.choice(2, N, p=[0.9, 0.1]).astype(np.int32)
    target = Target(task=task, label=label, num_outputs=2, values=values)
    logits = rng.normal(0, 3, (2, N, 2)).astype(np.float32)
    calibrated = calibrated_probe(target, logits)
    probability = calibrated.predict(np.arange(N), target).probability
    for fold in range(FOLDS):
        in_fold = CROSS_FITS[0].fold == fold
        rate = np.bincount(label[~in_fold]) / (~in_fold).sum() if values is None else values[~in_fold].mean(axis=0)
        np.testing.assert_allclose(probability[in_fold].mean(axis=0), rate, atol=0.02)
        np.testing.assert_allclose(probability[in_fold], np.tile(rate, (in_fold.sum(), 1)), atol=0.15)


def test_regression_scale_is_that_of_residuals() -> None:
    target, logits = drawn("regression")
    calibrated = calibrated_probe(target, logits)
    assert target.values is not None
    error = (target.values - logits[0])[:, 0]
    for fold in range(FOLDS):
        in_fold = CROSS_FITS[0].fold == fold
        expected = np.sqrt(np.square(error[~in_fold].astype(np.float64)).mean())
        np.testing.assert_allclose(calibrated.scale[in_fold], expected, rtol=1e-5)
    assert calibrated.calibration.temperature == pytest.approx(2.0, abs=0.2)
    assert (calibrated.calibration.ece_before, calibrated.calibration.ece_after) == (None, None)


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_rows_without_the_modality_are_not_used(task: str) -> None:
    target, logits = drawn(task)
    present, fits = np.arange(N) % 4 != 0, np.arange(N) % 3 != 0
    taught = []

    def fit(inputs: Inputs, fit_target: Target, cross_fits: Sequence[CrossFit]) -> Probe:
        taught.extend([cross_fit.fits for cross_fit in cross_fits])
        return StoredProbe(by_repeat=logits)

    cross_fits = [replace(cross_fit, fits=fits) for cross_fit in CROSS_FITS]
    before = calibrated_probe(target, logits, cross_fits=cross_fits, present=present, fit=fit)
    assert len(taught) == 2
    for probe_fits in taught:
        np.testing.assert_array_equal(probe_fits, fits & present)
    assert before.calibration.num_rows == int((fits & present).sum())
    unseen = ~(fits & present)
    turned = np.where(unseen, (target.label + 1) % 3, target.label).astype(np.int32)
    values = None if target.values is None else np.where(unseen[:, None], 5 - target.values, target.values)
    wild = logits.copy()
    wild[:, unseen] = np.nan
    after = calibrated_probe(replace(target, label=turned, values=values), wild, cross_fits=cross_fits, present=present)
    np.testing.assert_array_equal(after.scale, before.scale)
    assert after.calibration == before.calibration
    assert np.isfinite(after.scale).all()
    assert after.scale.shape == (N,)


def test_linear_probe_does_not_use_rows_without_the_modality() -> None:
    """Changing their labels and features changes no other prediction, bitwise."""
    rng = np.random.default_rng(0)
    target, _ = drawn("classification")
    x = (np.eye(3)[target.label] + rng.standard_normal((N, 3))).astype(np.float32)
    present = np.arange(N) % 4 != 0
    turned = replace(target, label=np.where(present, target.label, (target.label + 1) % 3).astype(np.int32))
    fit: Fit = partial(fit_probe, config=ProbeConfig(l2_penalties=(1e-2,)))
    confidence = []
    for changed_target, gone in ((target, np.nan), (turned, 7.0)):
        inputs = MatrixInputs(matrix=np.where(present[:, None], x, np.float32(gone)))
        calibrated = fit_calibrated_probe("audio", inputs, changed_target, CROSS_FITS, present=present, fit=fit)
        rows = np.flatnonzero(present)
        confidence.append(calibrated.predict(rows, changed_target.take(rows)).confidence)
        all_present = fit_calibrated_probe(
            "audio", inputs, changed_target, CROSS_FITS, present=np.ones(N, bool), fit=fit
        )
        confidence.append(all_present.predict(rows, changed_target.take(rows)).confidence)
    np.testing.assert_array_equal(confidence[0], confidence[2])
    assert np.abs(confidence[1] - confidence[3]).max() > 0.01


def test_mean_of_the_repeats_is_calibrated() -> None:
    """One repeat is calibrated, the other outputs 0: their mean is half as sharp as it should be."""
    target, logits = drawn("classification")
    logits[1] = 0
    assert calibrated_probe(target, logits).calibration.temperature == pytest.approx(0.5, rel=0.2)


def test_fold_without_calibration_rows_gets_the_mean_scale() -> None:
    target, logits = drawn("classification")
    last = CROSS_FITS[0].fold == FOLDS - 1
    calibrated = calibrated_probe(target, logits, cross_fits=[replace(CROSS_FITS[0], fits=~last)])
    other_scales = [float(calibrated.scale[CROSS_FITS[0].fold == fold][0]) for fold in range(FOLDS - 1)]
    np.testing.assert_allclose(calibrated.scale[last], np.mean(other_scales), rtol=1e-5)


def test_calibration_uses_a_sample_of_many_rows() -> None:
    n = CALIBRATION_ROWS + 5_000
    cross_fit = cross(n)
    label = (np.arange(n) % 2).astype(np.int32)
    logits = np.random.default_rng(0).normal(0, 1, (1, n, 2)).astype(np.float32)
    target = Target(task="classification", label=label, num_outputs=2)
    options: dict[str, Any] = {"present": np.ones(n, bool), "fit": fit_stored(logits)}
    before = fit_calibrated_probe("audio", NOTHING, target, [cross_fit], **options)
    assert before.calibration.num_rows == CALIBRATION_ROWS
    late = np.argsort(cross_fit.key)[CALIBRATION_ROWS:]
    turned = label.copy()
    for fold in range(FOLDS):  # within each fold, so that the frequencies of the classes stay
        rows = late[cross_fit.fold[late] == fold]
        turned[rows] = np.roll(label[rows], 1)
    after = fit_calibrated_probe("audio", NOTHING, replace(target, label=turned), [cross_fit], **options)
    np.testing.assert_array_equal(after.scale, before.scale)


def test_predictions_use_the_scale_of_each_row() -> None:
    target, logits = drawn("classification")
    calibrated = calibrated_probe(target, 4 * logits)
    rows = np.array([599, 3, 3])
    prediction = calibrated.predict(rows, target.take(rows))
    assert calibrated.anchor is not None
    anchor = calibrated.anchor[CROSS_FITS[0].fold[rows]]
    scaled = anchor + (4 * logits[0, rows].astype(np.float64) - anchor) / calibrated.scale[rows][:, None]
    expected = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(prediction.probability, expected, atol=1e-5)
    by_epoch = calibrated.confidence_by_epoch(rows, target.take(rows))
    assert by_epoch.shape == (2, 3)
    np.testing.assert_allclose(by_epoch[1], prediction.by_repeat[0], atol=1e-6)
    assert not np.allclose(by_epoch[0], by_epoch[1])


def test_joint_probe_concatenates_features_of_samples_with_any_modality() -> None:
    target, logits = drawn("classification")
    rng = np.random.default_rng(0)
    parts = [MatrixInputs(matrix=rng.random((N, d)).astype(np.float32)) for d in (2, 3)]
    presence = [np.arange(N) % 3 != 0, np.arange(N) % 3 != 1]
    probes = [
        fit_calibrated_probe(name, part, target, CROSS_FITS, present=present, fit=fit_stored(logits))
        for name, part, present in zip(("a", "b"), parts, presence, strict=True)
    ]
    fitted_inputs: list[Inputs] = []

    def fit(inputs: Inputs, fit_target: Target, cross_fits: Sequence[CrossFit], *, parts: Sequence[Probe]) -> Probe:
        assert list(parts) == [calibrated.probe for calibrated in probes]
        fitted_inputs.append(inputs)
        return StoredProbe(by_repeat=logits)

    joint = fit_joint_probe(probes, target, CROSS_FITS, fit=fit)
    assert joint.present.all()
    rows = np.arange(N)
    np.testing.assert_array_equal(fitted_inputs[0].read(rows), np.hstack([part.matrix for part in parts]))
    probe_set = ProbeSet(probes=tuple(probes), joint=joint, target=target)
    np.testing.assert_array_equal(probe_set.joint_inputs.read(rows), fitted_inputs[0].read(rows))


def test_joint_probe_with_a_part_of_noise_is_near_the_other_part() -> None:
    """The loss of the informative part alone is 0.65, of both 0.68, and under one penalty for both 0.98."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, N).astype(np.int32)
    signal = rng.standard_normal((N, 40)).astype(np.float32)
    signal[:, :3] += 1.5 * np.eye(3, dtype=np.float32)[label]
    noise = rng.standard_normal((N, 400)).astype(np.float32)
    target, rows = Target(task="classification", label=label, num_outputs=3), np.arange(N)
    fit, present = partial(fit_probe, config=ProbeConfig(gaussian=False)), np.ones(N, bool)
    probes = [
        fit_calibrated_probe(name, MatrixInputs(matrix=x), target, [cross()], present=present, fit=fit)
        for name, x in (("signal", signal), ("noise", noise))
    ]
    joint = fit_joint_probe(probes, target, [cross()], fit=fit)
    alone, together = (log_loss(probe.predict(rows, target).probability, label) for probe in (probes[0], joint))
    assert together < alone + 0.06


def test_min_scale_is_that_of_the_best_probe() -> None:
    target, logits = drawn("regression")
    good, bad = calibrated_probe(target, logits), calibrated_probe(target, logits + 3)
    probe_set = ProbeSet(probes=(bad, good), joint=None, target=target)
    assert probe_set.min_scale == pytest.approx(float(good.scale.mean()))
    assert probe_set.min_scale < bad.mean_scale


CONFIG = ProbeConfig()


def cross_by_group(label: NDArray[np.int32], *, fits: NDArray[np.bool_] | None = None, seed: int = 0) -> CrossFit:
    ids = np.array([f"s{number}" for number in range(len(label))], dtype=object)
    fits = np.ones(len(label), dtype=bool) if fits is None else fits
    fold, inner = (assign_folds(ids, label, None, fits, num_folds=5, seed=fold_seed) for fold_seed in (seed, seed + 99))
    return CrossFit(fold=fold, inner=inner, fits=fits, key=hash_rank(ids, seed=seed, purpose="rows"))


def gaussians(num_rows: int, num_classes: int, num_features: int, *, seed: int) -> tuple[Floats, NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    label = (np.arange(num_rows) % num_classes).astype(np.int32)
    means = 3.0 * rng.standard_normal((num_classes, num_features)) / np.sqrt(num_features)
    return (means[label] + rng.standard_normal((num_rows, num_features))).astype(np.float32), label


def classes(label: NDArray[np.int32]) -> Target:
    return Target(task="classification", label=label, num_outputs=int(label.max()) + 1)


def score_rounds(
    x: Floats, label: NDArray[np.int32], cross_fits: list[CrossFit], config: ProbeConfig = CONFIG
) -> Floats:
    probe = fit_probe(MatrixInputs(matrix=x), classes(label), cross_fits, config=config)
    return np.asarray(softmax(probe.logits(np.arange(len(x))), axis=2))


def score(x: Floats, label: NDArray[np.int32], cross_fit: CrossFit, config: ProbeConfig = CONFIG) -> Floats:
    return np.asarray(score_rounds(x, label, [cross_fit], config)[0])


@pytest.fixture(scope="module")
def drawn_rows() -> tuple[Floats, NDArray[np.int32], CrossFit, Floats]:
    x, label = gaussians(150, 3, 8, seed=0)
    cross_fit = cross_by_group(label)
    return x, label, cross_fit, score(x, label, cross_fit)


Drawn = tuple[Floats, NDArray[np.int32], CrossFit, Floats]


def test_probabilities_are_distributions(drawn_rows: Drawn) -> None:
    probabilities = drawn_rows[3]
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (150, 3)
    assert probabilities.min() >= 0
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("fold", range(5))
def test_scores_do_not_depend_on_labels_of_their_fold(drawn_rows: Drawn, fold: int) -> None:
    """All labels of a fold are changed: its own rows get the same scores, all others do not.

    Up to rounding: probes are fitted together, and the number of active ones changes the last bit of products.
    """
    x, label, cross_fit, _ = drawn_rows
    exact = replace(CONFIG, l2_penalties=(1e-3, 1e-2, 1e-1), tolerance=1e-6)  # weaker, the last bits grow step by step
    turned = np.where(cross_fit.fold == fold, (label + 1) % 3, label).astype(np.int32)
    before, after = (score(x, labels, cross_fit, exact) for labels in (label, turned))
    in_fold = cross_fit.fold == fold
    np.testing.assert_allclose(after[in_fold], before[in_fold], atol=2e-4)
    assert np.abs(after - before)[~in_fold].max(axis=1).mean() > 0.01
    assert np.abs(after - before)[~in_fold].max() > 0.1


@pytest.mark.parametrize("wild", [1.0, 1e3, 1e6])
def test_scores_do_not_depend_on_other_rows_of_their_fold(drawn_rows: Drawn, wild: float) -> None:
    """Nor do they depend on the features of the fold's other rows, even if these are outliers."""
    x, label, cross_fit, _ = drawn_rows
    exact = replace(CONFIG, l2_penalties=(1e-2,), tolerance=1e-9)  # where a fit stops does depend on the others
    row, *other_rows = np.flatnonzero(cross_fit.fold == 2)
    moved = x.copy()
    moved[other_rows[:5]] += wild * np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    np.testing.assert_allclose(
        score(moved, label, cross_fit, exact)[row], score(x, label, cross_fit, exact)[row], atol=5e-3
    )


def test_test_rows_do_not_change_the_probes() -> None:
    x, label = gaussians(150, 3, 6, seed=2)
    fits = np.arange(150) % 7 != 0
    cross_fit = cross_by_group(label, fits=fits)
    turned = np.where(fits, label, (label + 1) % 3).astype(np.int32)
    np.testing.assert_array_equal(score(x, turned, cross_fit), score(x, label, cross_fit))
    assert not np.array_equal(score(x, turned, cross_by_group(label)), score(x, label, cross_by_group(label)))


@pytest.mark.parametrize("num_features", [5, 200])
@pytest.mark.parametrize("rates", [(0.85, 0.1, 0.05), (0.5, 0.5)])
def test_noise_is_no_worse_than_the_prior(num_features: int, rates: tuple[float, ...]) -> None:
    """Out of fold, probes of noise lose to the class frequencies of the other folds by chance only: .001 on average."""
    excess = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        label = rng.choice(len(rates), 300, p=rates).astype(np.int32)
        x = rng.standard_normal((300, num_features)).astype(np.float32)
        cross_fits = [cross(300, seed=number) for number in (0, 1)]
        target = Target(task="classification", label=label, num_outputs=len(rates))
        calibrated = fit_calibrated_probe(
            "noise",
            MatrixInputs(matrix=x),
            target,
            cross_fits,
            present=np.ones(300, bool),
            fit=lambda *of_probe: fit_probe(*of_probe, config=CONFIG),
        )
        prior = class_prior(target, cross_fits[0].fold, np.ones(300, bool))
        assert prior is not None
        losses = -np.log(calibrated.predict(np.arange(300), target).confidence)
        excess.append(losses.mean() + prior[cross_fits[0].fold, label].mean())
    assert np.mean(excess) < 0.005
    assert max(excess) < 0.01


def test_noise_is_overfitted_in_sample_only() -> None:
    rng = np.random.default_rng(3)
    x, label = rng.standard_normal((120, 60)).astype(np.float32), (np.arange(120) % 2).astype(np.int32)
    cross_fit = cross_by_group(label)
    weak = ProbeConfig(l2_penalties=(1e-5,))
    model: Any = make_pipeline(StandardScaler(), LogisticRegression(C=1e5 / 120, max_iter=5_000))
    in_sample = float(model.fit(x, label).score(x, label))
    out_of_fold = float((score(x, label, cross_fit, weak).argmax(axis=1) == label).mean())
    assert in_sample > 0.95
    assert abs(out_of_fold - 0.5) < 0.15  # three standard deviations of a coin thrown 120 times


@pytest.mark.parametrize("l2", [1e-4, 1e-2])
def test_fixed_l2_equals_sklearn_cross_validation(l2: float) -> None:
    x, label = gaussians(600, 5, 12, seed=4)
    cross_fit = cross_by_group(label)
    # 480 rows in each training part
    model: Any = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (l2 * 480), tol=1e-8, max_iter=10_000))
    reference = cross_val_predict(model, x, label, cv=PredefinedSplit(cross_fit.fold), method="predict_proba")
    probabilities = score(x, label, cross_fit, ProbeConfig(l2_penalties=(l2,), tolerance=1e-9))
    np.testing.assert_allclose(probabilities, reference, atol=2e-3)
    assert (probabilities.argmax(axis=1) == reference.argmax(axis=1)).mean() > 0.995


def test_chosen_l2_is_close_to_the_best() -> None:
    """Noise needs a large l2, a clear signal a small one: the choice is close to the best in hindsight."""
    for x, label in (gaussians(200, 2, 150, seed=5), gaussians(400, 3, 4, seed=6)):
        cross_fit = cross_by_group(label)
        losses = {
            l2: log_loss(score(x, label, cross_fit, replace(CONFIG, l2_penalties=(l2,))), label)
            for l2 in CONFIG.l2_penalties
        }
        chosen_loss = log_loss(score(x, label, cross_fit), label)
        assert chosen_loss < min(losses.values()) + 0.2 * (max(losses.values()) - min(losses.values()))


def planted_discrepancy(rows: int) -> tuple[list[Floats], NDArray[np.int32], Floats]:
    """Draw two modalities of unit Gaussians around known means: features, label, and the true discrepancy."""
    rng = np.random.default_rng(7)
    label = (np.arange(rows) % 3).astype(np.int32)
    features, truth = [], []
    for spread in (1.5, 2.0):
        means = spread * np.eye(3, 40)
        x = means[label] + rng.standard_normal((rows, 40))
        posterior = softmax(x @ means.T - (means**2).sum(axis=1) / 2, axis=1)
        truth.append(posterior[np.arange(rows), label])
        features.append(x.astype(np.float32))
    return features, label, np.asarray(truth[0] - truth[1])


def test_discrepancy_is_recovered_where_the_posterior_is_known() -> None:
    """The true posterior is p(label | x) of the mixture."""
    features, label, truth = planted_discrepancy(20_000)
    cross_fit = cross_by_group(label)
    confidence = [score(x, label, cross_fit)[np.arange(20_000), label] for x in features]
    assert spearmanr(truth, confidence[0] - confidence[1]).statistic > 0.98
    assert np.abs(truth - (confidence[0] - confidence[1])).mean() < 0.03


def test_in_sample_probes_recover_the_discrepancy_worse() -> None:
    """They memorise the labels of 240 samples with 40 features, so that their discrepancy is spurious."""
    features, label, truth = planted_discrepancy(240)
    cross_fit, weak = cross_by_group(label), replace(CONFIG, l2_penalties=(1e-5,))
    model: Any = make_pipeline(StandardScaler(), LogisticRegression(C=1e5 / 240, max_iter=5_000))
    in_sample = [model.fit(x, label).predict_proba(x)[np.arange(240), label] for x in features]
    with_chosen_l2, same = (
        [score(x, label, cross_fit, config)[np.arange(240), label] for x in features] for config in (CONFIG, weak)
    )
    recovered = [spearmanr(truth, scores[0] - scores[1]).statistic for scores in (in_sample, same, with_chosen_l2)]
    assert recovered[0] < recovered[2] - 0.1
    assert recovered[1] < recovered[2]
    assert recovered[2] > 0.7


def test_two_runs_are_bit_equal(drawn_rows: Drawn) -> None:
    x, label, cross_fit, before = drawn_rows
    np.testing.assert_array_equal(score(x, label, cross_fit), before)


def test_repeats_fitted_together_equal_separate_fits(drawn_rows: Drawn) -> None:
    x, label, first, _ = drawn_rows
    second = cross_by_group(label, seed=1)
    together = score_rounds(x, label, [first, second])
    assert together.shape == (2, 150, 3)
    for cross_fit, logits in zip((first, second), together, strict=True):
        np.testing.assert_allclose(logits, score(x, label, cross_fit), atol=5e-3)


def test_arguments_are_not_modified(drawn_rows: Drawn) -> None:
    x, label, cross_fit, _ = drawn_rows
    copies = x.copy(), label.copy(), cross_fit.fold.copy()
    x.setflags(write=False)  # as a memory map is
    score(x, label, cross_fit)
    for argument, copy in zip((x, label, cross_fit.fold), copies, strict=True):
        np.testing.assert_array_equal(argument, copy)


def test_l2_is_chosen_on_choice_rows(drawn_rows: Drawn) -> None:
    x, label, cross_fit, before = drawn_rows
    few = score(x, label, cross_fit, replace(CONFIG, choice_rows=40))
    np.testing.assert_array_equal(score(x, label, cross_fit, replace(CONFIG, choice_rows=150)), before)
    assert (few.argmax(axis=1) == before.argmax(axis=1)).mean() > 0.9


def test_l2_without_holdout_rows_is_the_middle(drawn_rows: Drawn) -> None:
    x, label, cross_fit, _ = drawn_rows
    no_choice = replace(cross_fit, inner=np.ones_like(cross_fit.inner))
    penalties = sorted(CONFIG.l2_penalties, reverse=True)
    middle = replace(CONFIG, l2_penalties=(penalties[len(penalties) // 2],))
    np.testing.assert_array_equal(score(x, label, no_choice), score(x, label, cross_fit, middle))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"folds": 1}, r"probe\.folds is 1; it must be at least 2"),
        ({"repeats": 0}, r"probe\.repeats is 0; it must be at least 1"),
        ({"max_steps": 0}, r"probe\.max_steps"),
        ({"choice_rows": 0}, r"probe\.choice_rows"),
        ({"max_rows": 0}, r"probe\.max_rows"),
        ({"tolerance": 0.0}, r"probe\.tolerance is 0.0; it must be above 0"),
        ({"dropout": 1.0}, r"probe\.dropout is 1.0; it must lie in \[0, 1\)"),
        ({"precision": "bfloat"}, "did you mean bfloat16"),
        ({"l2_penalties": ()}, r"probe\.l2_penalties is \[\]"),
        ({"l2_penalties": (0.1, 0.0)}, r"probe\.l2_penalties"),
        ({"learn_from": "tain"}, "did you mean train"),
    ],
)
def test_invalid_config_raises(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ProbeConfig(**settings)


def test_unknown_kind_raises(drawn_rows: Drawn) -> None:
    with pytest.raises(ConfigError, match=r"probe\.kind is 'linaer'; did you mean linear\?"):
        score(drawn_rows[0], drawn_rows[1], drawn_rows[2], replace(CONFIG, kind="linaer"))


@pytest.mark.parametrize("kind", KINDS)
def test_single_rows_get_the_same_logits_as_all_rows(drawn_rows: Drawn, kind: str) -> None:
    x, label, cross_fit, _ = drawn_rows
    config = replace(CONFIG, kind=kind, epochs=2, hidden=8)
    probe = fit_probe(MatrixInputs(matrix=x), classes(label), [cross_fit, cross_by_group(label, seed=1)], config=config)
    rows = np.array([140, 3, 3, 77])
    np.testing.assert_allclose(probe.logits(rows), probe.logits(np.arange(150))[:, rows], atol=1e-5)
    by_epoch = probe.logits_by_epoch(rows)
    assert by_epoch.shape[1:] == (4, 3)
    assert 2 <= len(by_epoch) <= 8
    if kind != "mlp":
        np.testing.assert_array_equal(by_epoch[-1], probe.logits(rows)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_replaced_inputs_are_scored_by_the_same_probes(drawn_rows: Drawn, kind: str) -> None:
    """A masked modality is set to the centre of its features: logits then depend on the other one only."""
    x, label, cross_fit, _ = drawn_rows
    parts = (MatrixInputs(matrix=x[:, :5]), MatrixInputs(matrix=x[:, 5:]))
    joint = JointInputs(parts=parts)
    probe = fit_probe(joint, classes(label), [cross_fit], config=replace(CONFIG, kind=kind, epochs=3, hidden=8))
    rows = np.arange(150)
    masked = probe.logits(rows, inputs=joint.mask(frozenset({1})))
    other_inputs = JointInputs(parts=(parts[0], MatrixInputs(matrix=x[::-1, 5:])))
    assert not np.allclose(masked, probe.logits(rows))
    np.testing.assert_array_equal(probe.logits(rows, inputs=other_inputs.mask(frozenset({1}))), masked)
    np.testing.assert_array_equal(probe.logits(rows, inputs=joint), probe.logits(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_outside_fits_are_scored_and_change_nothing(drawn_rows: Drawn, kind: str) -> None:
    x, label, cross_fit, _ = drawn_rows
    config = replace(CONFIG, kind=kind, max_rows=80, epochs=3, hidden=8)
    out = np.argsort(cross_fit.key)[80:]
    turned = label.copy()
    turned[out] = (label[out] + 1) % 3
    probabilities = score(x, label, cross_fit, config)
    np.testing.assert_array_equal(score(x, turned, cross_fit, config), probabilities)
    assert (probabilities.argmax(axis=1) == label)[out].mean() > 0.4


def log_loss(shares: Floats, label: NDArray[np.int32]) -> float:
    return float(-np.log(shares[np.arange(len(label)), label]).mean())
