"""Tests of the estimated time of networks as probes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.probes.config import NetworkConfig
from mmaudit.audit.probes.crops import PictureView
from mmaudit.audit.probes.cross_fit import CrossFit
from mmaudit.audit.probes.network import describe_cost, row_passes, seconds_per_row


def cross_fits(num_rows: int, *, folds: int, repeats: int) -> list[CrossFit]:
    """Return cross-fits in which every row can be trained on."""
    fold = (np.arange(num_rows) % folds).astype(np.int16)
    key = np.arange(num_rows, dtype=np.uint64)
    return [CrossFit(fold=fold, inner=fold, fits=np.ones(num_rows, bool), key=key)] * repeats


def test_rows_are_counted_by_fold_epoch_and_repeat() -> None:
    config = NetworkConfig(epochs=7)
    fits = cross_fits(100, folds=5, repeats=3)
    assert row_passes(fits, config=config, control_rows=0) == 7 * 3 * 4 * 100
    assert row_passes(fits, config=config, control_rows=60) == 7 * (3 * 4 * 100 + 60)
    half = [replace(fits[0], fits=np.arange(100) < 50)]
    assert row_passes(half, config=config, control_rows=0) == 7 * 4 * 50


def test_long_training_comes_with_a_shorter_setting() -> None:
    fits = cross_fits(1_000, folds=5, repeats=3)
    seconds = 3 * 3600 / (120 * (3 * 4 + 1) * 1_000)
    text = describe_cost([seconds], [fits], config=NetworkConfig(), control_rows=[1_000], device="cpu")
    assert text.startswith("about 3 h on this CPU (3 repeats of 5 folds, 120 epochs); with --repeats 1 --set ")
    assert "--set network.epochs=20 about 12 min" in text  # 3 h * (20 / 120) * (5 / 13) = 11.5 min
    both = describe_cost([seconds] * 2, [fits] * 2, config=NetworkConfig(), control_rows=[1_000] * 2, device="cpu")
    assert both.startswith("about 6 h")


def test_short_training_needs_no_advice() -> None:
    fits = cross_fits(100, folds=5, repeats=1)
    text = describe_cost([1e-4], [fits], config=NetworkConfig(), control_rows=[0], device="cuda")
    assert text == "about 5 s on this GPU (1 repeat of 5 folds, 120 epochs)"


def test_long_training_that_cannot_be_shortened_has_no_advice() -> None:
    fits = cross_fits(100, folds=5, repeats=1)
    text = describe_cost([1.0], [fits], config=NetworkConfig(epochs=20), control_rows=[0], device="cpu")
    assert text == "about 2.2 h on this CPU (1 repeat of 5 folds, 20 epochs)"  # 400 rows of 20 epochs at 1 s


@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_timed_steps_leave_no_trace(num_rows: int) -> None:
    pytest.importorskip("transformers")
    inputs = MatrixInputs(matrix=np.zeros((num_rows, 16 * 16 * 3), np.uint8))
    target = Target(task="classification", label=np.zeros(num_rows, np.int32), num_outputs=2)
    state, config = torch.get_rng_state(), NetworkConfig(width=1 / 16)
    assert seconds_per_row(inputs, PictureView(shape=(16, 16, 3)), target, config=config, device="cpu") > 0
    assert torch.equal(torch.get_rng_state(), state)
