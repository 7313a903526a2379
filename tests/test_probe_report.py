"""The probe report: metrics equal scikit-learn's, leaks are detected, and gains have intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from probes import StoredProbe
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, r2_score

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.features.matrix import Inputs, MatrixInputs
from mmaudit.audit.hashing import hash_rank
from mmaudit.audit.metrics import group_codes
from mmaudit.audit.probes.config import NetworkConfig, ProbeConfig
from mmaudit.audit.probes.crops import PictureView
from mmaudit.audit.probes.cross_fit import CrossFit
from mmaudit.audit.probes.folds import assign_folds
from mmaudit.audit.probes.network_probe import fit_network
from mmaudit.audit.probes.network_weights import NetworkProbe
from mmaudit.audit.probes.probe_set import (
    CalibratedProbe,
    Calibration,
    Probe,
    ProbeSet,
    fit_calibrated_probe,
    fit_joint_probe,
    fit_probe,
)
from mmaudit.audit.scores.probe_report import (
    Control,
    ProbeReport,
    chance_levels,
    compute_probe_report,
    fit_controls,
    to_metric,
)
from mmaudit.audit.scores.sample_scores import SampleScores, compute_sample_scores, report_columns
from mmaudit.audit.workers import no_progress

Floats = NDArray[np.float32]
N, K = 900, 3
FREE = Calibration(num_rows=N, temperature=1.0, ece_before=None, ece_after=None, ece_floor=None)
IDS = np.array([f"s{row:04d}" for row in range(N)], dtype=object)
LABEL = (np.arange(N) % K).astype(np.int32)
CLASSES = Target(task="classification", label=LABEL, num_outputs=K)
HONEST = partial(fit_probe, config=ProbeConfig(l2_penalties=(1e-2,)))


def cross(target: Target) -> CrossFit:
    fits = np.ones(len(target), dtype=bool)
    ids = IDS[: len(target)]
    fold, inner = (
        assign_folds(ids, target.label, None, fits, num_folds=5, seed=0, purpose=purpose) for purpose in ("f", "i")
    )
    return CrossFit(fold=fold, inner=inner, fits=fits, key=hash_rank(ids, seed=0, purpose="key"))


def peek(inputs: Inputs, target: Target, cross_fits: Sequence[CrossFit]) -> Probe:
    """Return a probe that outputs the labels it is fitted to, as one trained on the scored rows would."""
    if target.values is not None:
        return StoredProbe(by_repeat=(target.values - 0.5 * (target.task == "multilabel"))[None])
    return StoredProbe(by_repeat=np.eye(target.num_outputs, dtype=np.float32)[target.label][None])


def probe_set_of(target: Target, *outputs: Floats, scale: float = 1.0) -> ProbeSet:
    """Build a probe set with these logits, (n, k) per modality."""
    probes = tuple(
        CalibratedProbe(
            name=f"m{index}",
            inputs=MatrixInputs(matrix=np.zeros((len(target), 2), np.float32)),
            present=np.ones(len(target), bool),
            probe=StoredProbe(by_repeat=logits[None]),
            fold_scale=np.full(1, scale, np.float32),
            fold=np.zeros(len(target), np.int8),
            calibration=FREE,
        )
        for index, logits in enumerate(outputs)
    )
    return ProbeSet(probes=probes, joint=None, target=target)


def planted(*l2_penalties: float, rows: int = N, seed: int = 0) -> tuple[ProbeSet, CrossFit]:
    """Fit a probe set, with a joint probe, to Gaussian features around class means at this distance."""
    rng = np.random.default_rng(seed)
    target = CLASSES.take(np.arange(rows))
    cross_fit = cross(target)
    means = np.eye(K)[target.label]
    probes = [
        fit_calibrated_probe(
            f"m{index}",
            MatrixInputs(matrix=(strength * means + rng.standard_normal((rows, K))).astype(np.float32)),
            target,
            [cross_fit],
            present=np.ones(rows, bool),
            fit=HONEST,
        )
        for index, strength in enumerate(l2_penalties)
    ]
    joint = fit_joint_probe(probes, target, [cross_fit], fit=HONEST)
    return ProbeSet(probes=tuple(probes), joint=joint, target=target), cross_fit


def report_of(
    probe_set: ProbeSet,
    cross_fit: CrossFit | None = None,
    *,
    sample_scores: SampleScores | None = None,
    controls: bool = False,
    group: NDArray[np.object_] | None = None,
    **changes: Any,
) -> ProbeReport:
    sample_scores = (
        compute_sample_scores(probe_set, seed=0, progress=no_progress) if sample_scores is None else sample_scores
    )
    calibrations = {calibrated.name: calibrated.calibration for calibrated in probe_set.probes}
    columns = report_columns(sample_scores, list(calibrations), joint=probe_set.joint is not None)
    if probe_set.joint is not None:
        calibrations["joint"] = probe_set.joint.calibration
    fitted: tuple[Control, ...] = ()
    if controls:
        options: dict[str, Any] = {"fit": HONEST, "ids_of": lambda rows: IDS[rows], "seed": 0, **changes}
        fitted = fit_controls(probe_set, cross(probe_set.target) if cross_fit is None else cross_fit, **options)
    groups = group_codes(group)
    return compute_probe_report(columns.__getitem__, probe_set.target, calibrations, groups=groups, controls=fitted)


def noisy_logits(share: float, *, seed: int) -> Floats:
    """Build logits (n, k) that predict the true class with this frequency, else the next class."""
    is_correct = np.random.default_rng(seed).random(N) < share
    return 2 * np.eye(K, dtype=np.float32)[np.where(is_correct, LABEL, (LABEL + 1) % K)]


def numbers(seed: int = 0) -> Target:
    values = np.random.default_rng(seed).normal(3, 2, (N, 1)).astype(np.float32)
    return Target(task="regression", label=np.zeros(N, np.int32), num_outputs=1, values=values)


def several(seed: int = 0) -> Target:
    values = (np.random.default_rng(seed).random((N, 3)) < [0.1, 0.5, 0.8]).astype(np.float32)
    return Target(task="multilabel", label=np.zeros(N, np.int32), num_outputs=3, values=values)


def test_classification_metrics_are_accuracies() -> None:
    probe_set = probe_set_of(CLASSES, noisy_logits(0.8, seed=0), noisy_logits(0.5, seed=1))
    report = report_of(probe_set)
    assert report.metric == "accuracy"
    assert [standing.name for standing in report.probe_metrics] == ["m0", "m1", "fused"]
    for calibrated, standing in zip(probe_set.probes, report.probe_metrics, strict=False):
        logits = calibrated.probe.logits(np.arange(N))[0]
        assert standing.value == pytest.approx(accuracy_score(LABEL, logits.argmax(axis=1)), abs=1e-6)
        assert standing.low < standing.value < standing.high
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        assert standing.loss == pytest.approx(-np.log(shares[np.arange(N), LABEL]).mean(), rel=1e-4)
    assert report.gain_over_best.name == "m0"


def test_multilabel_metrics_are_label_accuracies() -> None:
    target = several()
    assert target.values is not None
    logits = np.random.default_rng(1).normal(0, 1, (N, 3)).astype(np.float32) + target.values
    report = report_of(probe_set_of(target, logits, -logits))
    assert report.metric == "label accuracy"
    expected = accuracy_score(target.values.ravel(), (logits > 0).ravel())
    assert report.probe_metrics[0].value == pytest.approx(expected, abs=1e-6)
    assert report.probe_metrics[1].value == pytest.approx(1 - expected, abs=1e-6)


def test_regression_metrics_are_r2() -> None:
    target = numbers()
    assert target.values is not None
    rng = np.random.default_rng(1)
    predictions = [(target.values + rng.normal(0, sigma, (N, 1))).astype(np.float32) for sigma in (0.5, 4.0)]
    report = report_of(probe_set_of(target, *predictions))
    assert (report.metric, report.chance) == ("R^2", {"uniform": 0, "majority": 0})
    for prediction, metric in zip(predictions, report.probe_metrics, strict=False):
        assert metric.value == pytest.approx(r2_score(target.values, prediction), abs=1e-4)
    assert report.probe_metrics[0].value > 0.9
    assert report.probe_metrics[1].value < -1  # worse than the mean


def test_metric_is_over_samples_with_the_modality() -> None:
    probe_set = probe_set_of(CLASSES, noisy_logits(0.8, seed=0), noisy_logits(0.5, seed=1), noisy_logits(0.6, seed=2))
    present = LABEL != 0
    probe_set = replace(probe_set, probes=(replace(probe_set.probes[0], present=present), *probe_set.probes[1:]))
    metric = report_of(probe_set).probe_metrics[0]
    predicted = noisy_logits(0.8, seed=0).argmax(axis=1)
    assert metric.value == pytest.approx(accuracy_score(LABEL[present], predicted[present]), abs=1e-6)
    assert np.isfinite([metric.low, metric.high, metric.loss]).all()


def test_chance_is_the_rate_of_the_most_common_class_and_of_uniform_guesses() -> None:
    rng = np.random.default_rng(0)
    label = rng.choice(4, 200, p=[0.1, 0.2, 0.6, 0.1]).astype(np.int32)
    target = Target(task="classification", label=label, num_outputs=4)
    dummy = DummyClassifier(strategy="most_frequent").fit(label[:, None], label)
    assert chance_levels(target) == pytest.approx({"majority": dummy.score(label[:, None], label), "uniform": 0.25})
    labels = several()
    assert labels.values is not None
    often = labels.values.mean(axis=0) > 0.5
    expected = {"majority": (labels.values == often).mean(), "uniform": 0.5}
    assert chance_levels(labels) == pytest.approx(expected, abs=1e-6)
    ones = numbers()
    assert ones.values is not None
    squares = -np.square(ones.values - ones.values.mean())[:, 0]
    assert to_metric(squares, ones).mean() == pytest.approx(chance_levels(ones)["majority"], abs=1e-4)


@pytest.mark.parametrize("target", [CLASSES, several(), numbers()], ids=lambda target: target.task)
def test_leaked_labels_are_detected(target: Target) -> None:
    """A probe that predicts shuffled labels out of fold has access to them."""
    logits = np.zeros((N, target.num_outputs), np.float32)
    for control in report_of(probe_set_of(target, logits, logits), fit=peek, controls=True).controls:
        assert control.num_rows == N
        assert control.value == pytest.approx(1.0, abs=1e-5)
        assert control.leaks


@pytest.mark.parametrize("target", [CLASSES, several(), numbers()], ids=lambda target: target.task)
def test_shuffled_labels_of_clean_data_are_at_chance(target: Target) -> None:
    """The features predict the true labels well, and the shuffled ones not at all."""
    rng = np.random.default_rng(2)
    truth = np.eye(K)[LABEL] if target.values is None else target.values
    probe_set = probe_set_of(target, *(np.zeros((N, target.num_outputs), np.float32),) * 2)
    clear = MatrixInputs(matrix=(3 * truth + 0.3 * rng.standard_normal(truth.shape)).astype(np.float32))
    probe_set = replace(probe_set, probes=tuple(replace(calibrated, inputs=clear) for calibrated in probe_set.probes))
    report = report_of(probe_set, controls=True)
    assert [control.name for control in report.controls] == ["m0", "m1"]
    for control in report.controls:
        assert not control.leaks
        assert control.low <= control.majority
        assert abs(control.value - control.majority) < 0.06
    assert report_of(probe_set).controls == ()


def test_control_permutes_labels_without_fixed_points() -> None:
    values = np.arange(N, dtype=np.float32)[:, None]
    target = Target(task="regression", label=np.zeros(N, np.int32), num_outputs=1, values=values)
    rows = MatrixInputs(matrix=values)
    calls: list[tuple[Floats, Floats]] = []

    def note(inputs: Inputs, control_target: Target, cross_fits: Sequence[CrossFit]) -> Probe:
        assert control_target.values is not None
        calls.append((inputs.read(np.arange(inputs.num_rows))[:, 0], control_target.values[:, 0]))
        return peek(inputs, control_target, cross_fits)

    probe_set = probe_set_of(target, values, values)
    present = np.arange(N) % 3 != 0
    first, second = (replace(calibrated, inputs=rows) for calibrated in probe_set.probes)
    probe_set = replace(probe_set, probes=(replace(first, present=present), second))
    cross_fit = replace(cross(target), fits=np.arange(N) % 5 != 0)
    report_of(probe_set, cross_fit, fit=note, controls=True)
    own, control_target = calls[0]
    learned = np.flatnonzero(present & cross_fit.fits)
    np.testing.assert_array_equal(own, learned)
    assert sorted(control_target.tolist()) == learned.tolist()
    assert (own != control_target).all()
    assert abs(np.corrcoef(own, control_target)[0, 1]) < 0.15


def test_network_control_has_two_folds_of_half_the_rows() -> None:
    """The same rows and the same shuffled labels as of any other probe, whatever the repeats and folds."""
    logits, rows = noisy_logits(0.8, seed=0), MatrixInputs(matrix=np.arange(2 * N, dtype=np.float32).reshape(N, 2))
    calls: list[tuple[Floats, Target, Sequence[CrossFit]]] = []

    def note(inputs: Inputs, control_target: Target, cross_fits: Sequence[CrossFit]) -> Probe:
        calls.append((inputs.read(np.arange(inputs.num_rows)), control_target, cross_fits))
        return peek(inputs, control_target, cross_fits)

    probe_set = probe_set_of(CLASSES, logits, logits)
    first, second = (replace(calibrated, inputs=rows) for calibrated in probe_set.probes)
    network = replace(second, probe=NetworkProbe(by_repeat=logits[None], by_epoch=logits[None]))
    cross_fit = replace(cross(CLASSES), fits=np.arange(N) % 4 != 0)
    report = report_of(replace(probe_set, probes=(first, network)), cross_fit, fit=note, controls=True)
    assert [(control.name, control.leaks) for control in report.controls] == [("m0", True), ("m1", True)]
    (own, control_target, _), (same, likewise, (halves,)) = calls
    np.testing.assert_array_equal(own, same)
    np.testing.assert_array_equal(control_target.label, likewise.label)
    assert halves.fits.all()
    assert np.bincount(halves.fold).tolist() == [338, 337]
    expected_fold = cross(CLASSES).fold[np.arange(N) % 4 != 0]
    assert all(np.bincount(halves.fold[expected_fold == fold]).min() > 40 for fold in range(5))


@pytest.mark.parametrize("leaks", [False, True], ids=["apart", "together"])
def test_network_control_detects_training_on_scored_rows(leaks: bool) -> None:
    """24 pictures of random patches: memorisation helps only if the same rows are scored."""
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 255, (24, 2, 2, 3)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    rows = MatrixInputs(matrix=patches.reshape(24, 192))
    target = CLASSES.take(np.arange(24) % 2 * 2)
    config = NetworkConfig(epochs=25, batch_size=8, lr=0.02, lr_step=16, min_crop=1.0, flip=False, width=1 / 8)

    def train(inputs: Inputs, target: Target, cross_fits: Sequence[CrossFit]) -> Probe:
        if inputs.num_features == 2:
            return peek(inputs, target, cross_fits)
        (own,) = cross_fits
        if leaks:  # each row is held out, and its copy is not
            repeated_rows = np.tile(np.arange(inputs.num_rows), 2)
            fold = np.r_[own.fold, 1 - own.fold]
            key = np.arange(len(repeated_rows), dtype=np.uint64)
            own = CrossFit(fold=fold, inner=own.inner[repeated_rows], fits=own.fits[repeated_rows], key=key)
            inputs, target = MatrixInputs(matrix=inputs.read(repeated_rows)), target.take(repeated_rows)
        return fit_network(
            inputs,
            PictureView(shape=(8, 8, 3)),
            target,
            [own],
            config=config,
            seed=0,
            device="cpu",
            progress=no_progress,
        )

    logits = np.zeros((24, K), np.float32)
    probe_set = probe_set_of(target, logits, logits)
    network = replace(
        probe_set.probes[0], inputs=rows, probe=NetworkProbe(by_repeat=logits[None], by_epoch=logits[None])
    )
    report = report_of(replace(probe_set, probes=(network, probe_set.probes[1])), fit=train, controls=True)
    assert report.controls[0].leaks == leaks


def test_control_uses_the_rows_with_the_smallest_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmaudit.audit.scores.probe_report.CONTROL_ROWS", 100)
    logits, rows = noisy_logits(0.8, seed=0), MatrixInputs(matrix=np.arange(N, dtype=np.float32)[:, None])
    calls: list[list[float]] = []

    def note(inputs: Inputs, control_target: Target, cross_fits: Sequence[CrossFit]) -> Probe:
        calls.append(inputs.read(np.arange(inputs.num_rows))[:, 0].tolist())
        return peek(inputs, control_target, cross_fits)

    probe_set = probe_set_of(CLASSES, logits, logits)
    probe_set = replace(probe_set, probes=tuple(replace(calibrated, inputs=rows) for calibrated in probe_set.probes))
    cross_fit = replace(cross(CLASSES), fits=np.arange(N) % 3 != 0)
    report = report_of(probe_set, cross_fit, fit=note, controls=True)
    learned = [row for row in range(N) if cross_fit.fits[row]]
    assert calls[0] == sorted(sorted(learned, key=lambda row: cross_fit.key[row])[:100])
    assert [control.num_rows for control in report.controls] == [100, 100]


def test_needed_modality_gains_and_useless_one_does_not() -> None:
    probe_set, cross_fit = planted(1.5, 0.0)
    report = report_of(probe_set, cross_fit)
    needed, useless = report.gains
    assert (needed.name, useless.name) == ("m0", "m1")
    assert [standing.name for standing in report.probe_metrics] == ["m0", "m1", "fused", "joint"]
    assert report.probe_metrics[-1].value > 0.5
    assert needed.low > 0.2
    assert useless.low <= 0 <= useless.high
    assert report.gain_over_best.name == "m0"
    assert report.gain_over_best.low <= 0 <= report.gain_over_best.high
    assert (useless.gain, useless.low, useless.high) == (
        report.gain_over_best.gain,
        report.gain_over_best.low,
        report.gain_over_best.high,
    )


def test_gain_of_three_modalities_is_over_the_fusion_of_the_others() -> None:
    probe_set, cross_fit = planted(1.5, 0.0, 1.5)
    report = report_of(probe_set, cross_fit)
    assert [gain.name for gain in report.gains] == ["m0", "m1", "m2"]
    first, useless, third = report.gains
    assert first.low > 0.02
    assert third.low > 0.02
    assert useless.low <= 0 <= useless.high
    assert report.gain_over_best.low > 0
    assert report_of(replace(probe_set, joint=None), cross_fit).gains == report.gains  # they are of the fusion


def test_gain_interval_is_paired() -> None:
    """For two probes that are correct on nearly the same samples, the difference has a narrower interval."""
    probe_set = probe_set_of(CLASSES, noisy_logits(0.6, seed=0), noisy_logits(0.5, seed=1))
    sample_scores = compute_sample_scores(probe_set, seed=0, progress=no_progress)
    correct = sample_scores.correct[:, 0].copy()
    correct[np.flatnonzero(correct == 0)[:20]] = 1
    report = report_of(probe_set, sample_scores=replace(sample_scores, fused_correct=correct))
    assert report.gain_over_best.gain == pytest.approx(20 / N, abs=1e-6)
    best = report.probe_metrics[0]
    assert report.gain_over_best.high - report.gain_over_best.low < (best.high - best.low) / 3
    assert report.gain_over_best.low > 0


def test_groups_widen_the_intervals() -> None:
    group = np.array([f"g{row // 18}" for row in range(N)], dtype=object)
    correct = (np.random.default_rng(0).random(50) < 0.7)[np.arange(N) // 18]
    logits = 2 * np.eye(K, dtype=np.float32)[np.where(correct, LABEL, (LABEL + 1) % K)]
    probe_set = probe_set_of(CLASSES, logits, noisy_logits(0.5, seed=1))
    alone, together = report_of(probe_set), report_of(probe_set, group=group)
    for ungrouped, grouped in (
        (alone.probe_metrics[0], together.probe_metrics[0]),
        (alone.gains[1], together.gains[1]),
    ):
        assert grouped.high - grouped.low > 2 * (ungrouped.high - ungrouped.low)
    assert alone.probe_metrics[0].value == together.probe_metrics[0].value


def test_report_round_trips_through_json() -> None:
    probe_set = probe_set_of(CLASSES, noisy_logits(0.8, seed=0), noisy_logits(0.5, seed=1))
    report = report_of(probe_set, fit=peek, controls=True)
    decoded = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert [control["leaks"] for control in decoded["controls"]] == [True, True]
    assert decoded["probe_metrics"][0]["value"] == pytest.approx(report.probe_metrics[0].value)
    assert {"metric", "chance", "probe_metrics", "gain_over_best", "gains", "controls"} == set(decoded)
