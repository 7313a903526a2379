"""The time estimate of a fit is logged for long fits only."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest
import torch

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.probes import linear as estimate
from mmaudit.audit.probes.cross_fit import CrossFit, FitRows, gather_fit_rows
from mmaudit.audit.probes.design import Design, TorchTarget, read_design
from mmaudit.audit.probes.glm import GlmLoss

NUM_ROWS, NUM_CLASSES = 4_000, 1_500


def problem() -> tuple[Design, TorchTarget, FitRows]:
    rng = np.random.default_rng(0)
    fold, inner = (rng.permutation(NUM_ROWS).astype(np.int16) % 2 for _ in range(2))
    key, fits = rng.permutation(NUM_ROWS).astype(np.uint64), np.ones(NUM_ROWS, bool)
    fit_rows = gather_fit_rows([CrossFit(fold=fold, inner=inner, fits=fits, key=key)], max_rows=NUM_ROWS)
    x = rng.standard_normal((NUM_ROWS, 8)).astype(np.float32)
    design = read_design(MatrixInputs(matrix=x), fit_rows.rows, products=torch.float32)
    label = rng.integers(0, NUM_CLASSES, NUM_ROWS).astype(np.int32)
    target = Target(task="classification", label=label, num_outputs=NUM_CLASSES)
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
    theta, column = torch.full((2, 9, NUM_CLASSES), 1e-3), torch.arange(2)
    loss_function = GlmLoss.of(design, torch_target, torch.from_numpy(fit_rows.train_mask))
    full_seconds = []
    for _ in range(3):
        start = time.perf_counter()
        loss_function.compute(theta, column)
        full_seconds.append(time.perf_counter() - start)
    assert 0.02 * min(full_seconds) <= estimate.step_seconds(design, torch_target, fit_rows) <= 50 * max(full_seconds)


def test_timed_loss_and_gradient_are_those_of_the_fit() -> None:
    design, torch_target, fit_rows = problem()
    theta, column = torch.full((2, 9, NUM_CLASSES), 1e-3), torch.arange(2)
    loss_function = GlmLoss.of(design, torch_target, torch.from_numpy(fit_rows.train_mask))
    loss, gradient = loss_function.compute(theta, column)
    np.testing.assert_allclose(loss, np.log(NUM_CLASSES), rtol=1e-3)  # all logits are alike
    assert gradient.shape == theta.shape
