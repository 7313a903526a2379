"""Linear probes: equal to scikit-learn's out of fold, for every task and precision."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, softmax
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.probes import linear as estimate
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.probes.cross_fit import CrossFit, FitRows, gather_fit_rows
from mmaudit.audit.probes.design import Design, TorchTarget, read_design
from mmaudit.audit.probes.glm import GlmLoss
from mmaudit.audit.probes.linear import LinearProbe, fit_linear

Floats = NDArray[np.floating[Any]]
NUM_ROWS, NUM_CLASSES = 900, 4
ROWS = np.arange(NUM_ROWS)
CONFIG = ProbeConfig(l2_penalties=(1e-2,), tolerance=1e-9, precision="float32")


def planted() -> tuple[Floats, NDArray[np.int32]]:
    rng = np.random.default_rng(0)
    label = rng.integers(0, NUM_CLASSES, NUM_ROWS).astype(np.int32)
    x = rng.standard_normal((NUM_CLASSES, 10))[label] + rng.standard_normal((NUM_ROWS, 10))
    return (x * np.geomspace(0.1, 10, 10) + 5).astype(np.float32), label


def cross_fit(seed: int = 0) -> CrossFit:
    rng = np.random.default_rng(seed)
    fold, inner = (rng.permutation(NUM_ROWS) % 3 for _ in range(2))
    key = np.random.default_rng(9).permutation(NUM_ROWS).astype(np.uint64)
    return CrossFit(fold=fold.astype(np.int16), inner=inner.astype(np.int16), fits=np.ones(NUM_ROWS, bool), key=key)


def target(label: NDArray[np.int32], task: str) -> Target:
    values = {
        "classification": None,
        "multilabel": np.stack([label == 0, label % 2 == 0], axis=1).astype(np.float32),
        "regression": (1_000 + 50.0 * label[:, None]).astype(np.float32),
    }[task]
    num_outputs = NUM_CLASSES if values is None else values.shape[1]
    return Target(task=task, label=label, num_outputs=num_outputs, values=values)


def fit(x: NDArray[Any], of_target: Target, config: ProbeConfig = CONFIG, *, rounds: int = 1) -> LinearProbe:
    cross_fits = [cross_fit(seed) for seed in range(rounds)]
    fit_rows = gather_fit_rows(cross_fits, max_rows=config.max_rows)
    return fit_linear(MatrixInputs(matrix=x), of_target, cross_fits, fit_rows, config=config, device="cpu")


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_out_of_fold_logits_equal_sklearn(task: str) -> None:
    x, label = planted()
    of_target = target(label, task)
    probe = fit(x, of_target, rounds=2)
    logits = probe.logits(ROWS)
    for seed in range(2):
        for fold in range(3):
            own = cross_fit(seed).fold == fold
            train_mask, size = ~own, int((~own).sum())
            if of_target.values is None:
                model: Any = make_pipeline(StandardScaler(), LogisticRegression(C=100 / size, tol=1e-8, max_iter=5_000))
                expected = model.fit(x[train_mask], label[train_mask]).predict_proba(x[own])
                np.testing.assert_allclose(softmax(logits[seed, own], axis=1), expected, atol=2e-3)
            elif task == "multilabel":
                for column, values in enumerate(of_target.values.T):
                    model = make_pipeline(StandardScaler(), LogisticRegression(C=100 / size, tol=1e-8, max_iter=5_000))
                    expected = model.fit(x[train_mask], values[train_mask]).predict_proba(x[own])[:, 1]
                    np.testing.assert_allclose(expit(logits[seed, own, column]), expected, atol=2e-3)
            else:
                model = make_pipeline(StandardScaler(), Ridge(alpha=1e-2 * size))
                expected = model.fit(x[train_mask], of_target.values[train_mask, 0]).predict(x[own])
                np.testing.assert_allclose(logits[seed, own, 0], expected, atol=0.05)


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_bfloat16_equals_float32_up_to_rounding(task: str) -> None:
    """Mean losses within 1e-3 (of the variance, for a number), although they may stop at different steps."""
    x, label = planted()
    of_target = target(label, task)
    losses = []
    for precision in ("float32", "bfloat16"):
        raw = fit(x, of_target, replace(CONFIG, precision=precision)).logits(ROWS)[0].astype(np.float64)
        if of_target.values is None:
            losses.append(-log_softmax(raw, axis=1)[ROWS, label].mean())
        elif task == "multilabel":
            losses.append((np.logaddexp(0, raw) - of_target.values * raw).mean())
        else:
            losses.append(np.square(raw - of_target.values).mean() / of_target.values.var())
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_snapshots_start_near_zero_and_end_at_the_probe() -> None:
    x, label = planted()
    probe = fit(x, target(label, "classification"), rounds=2)
    by_epoch = probe.logits_by_epoch(ROWS)
    np.testing.assert_array_equal(by_epoch[-1], probe.logits(ROWS)[0])
    losses = [-log_softmax(raw.astype(np.float64), axis=1)[ROWS, label].mean() for raw in by_epoch]
    assert 3 <= len(losses) <= 8
    assert np.log(NUM_CLASSES) > losses[0] > losses[-1]


def test_byte_inputs_equal_float_inputs() -> None:
    x, label = planted()
    pixels = np.clip(x * 8 + 60, 0, 255).astype(np.uint8)
    of_target = target(label, "classification")
    logits = fit(pixels, of_target).logits(ROWS)
    np.testing.assert_allclose(logits, fit(pixels.astype(np.float32), of_target).logits(ROWS), atol=1e-5)


def test_missing_features_equal_their_centre() -> None:
    x, label = planted()
    holes, filled = x.copy(), x.copy()
    gone = np.random.default_rng(5).random(NUM_ROWS) < 0.3
    holes[gone, 3:] = np.nan
    probe = fit(holes, target(label, "classification"))
    filled[gone, 3:] = probe.units.centre[3:].numpy()
    logits = probe.logits(ROWS)
    assert np.isfinite(logits).all()
    filled_too = probe.logits(ROWS, inputs=MatrixInputs(matrix=filled))
    np.testing.assert_allclose(logits, filled_too, atol=1e-5)
    assert (logits[0, ~gone].argmax(axis=1) == label[~gone]).mean() > (
        logits[0, gone].argmax(axis=1) == label[gone]
    ).mean()


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_two_runs_are_bit_equal(task: str) -> None:
    x, label = planted()
    config = replace(CONFIG, l2_penalties=ProbeConfig().l2_penalties, precision="bfloat16")
    logits = [fit(x, target(label, task), config).logits(ROWS) for _ in range(2)]
    np.testing.assert_array_equal(logits[0], logits[1])


TIMED_ROWS, TIMED_CLASSES = 4_000, 1_500


def problem() -> tuple[Design, TorchTarget, FitRows]:
    rng = np.random.default_rng(0)
    fold, inner = (rng.permutation(TIMED_ROWS).astype(np.int16) % 2 for _ in range(2))
    key, fits = rng.permutation(TIMED_ROWS).astype(np.uint64), np.ones(TIMED_ROWS, bool)
    fit_rows = gather_fit_rows([CrossFit(fold=fold, inner=inner, fits=fits, key=key)], max_rows=TIMED_ROWS)
    x = rng.standard_normal((TIMED_ROWS, 8)).astype(np.float32)
    design = read_design(MatrixInputs(matrix=x), fit_rows.rows, products=torch.float32)
    label = rng.integers(0, TIMED_CLASSES, TIMED_ROWS).astype(np.int32)
    target = Target(task="classification", label=label, num_outputs=TIMED_CLASSES)
    return design, TorchTarget.of(target, fit_rows.rows, design.curvature), fit_rows


def test_short_fit_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mmaudit"):
        estimate.log_estimate(*problem(), max_steps=300)
    assert not caplog.messages


def test_long_fit_logs_one_line_with_settings(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_MIN_LOGITS", 0)
    monkeypatch.setattr(estimate, "step_seconds", lambda *problem: 6.1)
    with caplog.at_level(logging.INFO, logger="mmaudit"):
        estimate.log_estimate(*problem(), max_steps=300)
        estimate.log_estimate(*problem(), max_steps=9)
    (line,) = caplog.messages
    for part in ("6.1 s per step", "10 steps 61 s", "300 steps 30 min", "probe.max_steps=N", "--repeats 1"):
        assert part in line


def test_step_time_is_measured_on_a_sample_of_rows() -> None:
    design, torch_target, fit_rows = problem()
    theta, column = torch.full((2, 9, TIMED_CLASSES), 1e-3), torch.arange(2)
    loss_function = GlmLoss.of(design, torch_target, torch.from_numpy(fit_rows.train_mask))
    full_seconds = []
    for _ in range(3):
        start = time.perf_counter()
        loss_function.compute(theta, column)
        full_seconds.append(time.perf_counter() - start)
    assert 0.02 * min(full_seconds) <= estimate.step_seconds(design, torch_target, fit_rows) <= 50 * max(full_seconds)


def test_timed_loss_and_gradient_are_those_of_the_fit() -> None:
    design, torch_target, fit_rows = problem()
    theta, column = torch.full((2, 9, TIMED_CLASSES), 1e-3), torch.arange(2)
    loss_function = GlmLoss.of(design, torch_target, torch.from_numpy(fit_rows.train_mask))
    loss, gradient = loss_function.compute(theta, column)
    np.testing.assert_allclose(loss, np.log(TIMED_CLASSES), rtol=1e-3)  # all logits are alike
    assert gradient.shape == theta.shape
