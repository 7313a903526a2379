"""Probe sets are calibrated out of fold, without labels of the fold that is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.features.matrix import Inputs, MatrixInputs, RowIndex
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.probes.cross_fit import CrossFit
from mmaudit.audit.probes.probe_set import (
    CALIBRATION_ROWS,
    CalibratedProbe,
    Fit,
    Probe,
    ProbeSet,
    fit_calibrated_probe,
    fit_joint_probe,
    fit_probe,
)

Floats = NDArray[np.float32]
N, FOLDS = 600, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredProbe:
    """A probe with stored outputs: by_repeat (r, n, k)."""

    by_repeat: Floats

    def logits(self, rows: RowIndex, *, inputs: Inputs | None = None) -> Floats:
        return self.by_repeat[:, rows]

    def logits_by_epoch(self, rows: RowIndex) -> Floats:
        return self.by_repeat[:1, rows] * np.array([0.5, 1], np.float32)[:, None, None]


def fit_stored(by_repeat: Floats) -> Fit:
    def fit(inputs: Inputs, target: Target, cross_fits: Sequence[CrossFit]) -> Probe:
        return StoredProbe(by_repeat=by_repeat)

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
    target, logits = drawn(task)
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
    turned[late] = 1 - label[late]
    after = fit_calibrated_probe("audio", NOTHING, replace(target, label=turned), [cross_fit], **options)
    np.testing.assert_array_equal(after.scale, before.scale)


def test_predictions_use_the_scale_of_each_row() -> None:
    target, logits = drawn("classification")
    calibrated = calibrated_probe(target, 4 * logits)
    rows = np.array([599, 3, 3])
    prediction = calibrated.predict(rows, target.take(rows))
    scaled = 4 * logits[0, rows].astype(np.float64) / calibrated.scale[rows][:, None]
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

    def fit(inputs: Inputs, fit_target: Target, cross_fits: Sequence[CrossFit]) -> Probe:
        fitted_inputs.append(inputs)
        return StoredProbe(by_repeat=logits)

    joint = fit_joint_probe(probes, target, CROSS_FITS, fit=fit)
    assert joint.present.all()
    rows = np.arange(N)
    np.testing.assert_array_equal(fitted_inputs[0].read(rows), np.hstack([part.matrix for part in parts]))
    probe_set = ProbeSet(probes=tuple(probes), joint=joint, target=target)
    np.testing.assert_array_equal(probe_set.joint_inputs.read(rows), fitted_inputs[0].read(rows))


def test_min_scale_is_that_of_the_best_probe() -> None:
    target, logits = drawn("regression")
    good, bad = calibrated_probe(target, logits), calibrated_probe(target, logits + 3)
    probe_set = ProbeSet(probes=(bad, good), joint=None, target=target)
    assert probe_set.min_scale == pytest.approx(float(good.scale.mean()))
    assert probe_set.min_scale < bad.mean_scale
