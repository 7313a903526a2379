"""Choice of the L2 penalty: near the best one, by each probe for itself, and the class frequencies for noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.probes.cross_fit import CrossFit, gather_fit_rows
from mmaudit.audit.probes.design import TorchTarget, choose_outputs, read_design
from mmaudit.audit.probes.glm import GlmLoss, fit_glm
from mmaudit.audit.probes.l2_choice import choose_l2

CHOICE_ROWS = 400
L2_CONFIG = ProbeConfig()
Label = NDArray[np.int32]


def four_folds() -> CrossFit:
    rng = np.random.default_rng(0)
    fold, inner = (rng.permutation(CHOICE_ROWS) % 4 for _ in range(2))
    key = rng.permutation(CHOICE_ROWS).astype(np.uint64)
    return CrossFit(fold=fold.astype(np.int16), inner=inner.astype(np.int16), fits=np.ones(CHOICE_ROWS, bool), key=key)


def chosen(x: NDArray[Any], label: Label, crossed: CrossFit, config: ProbeConfig = L2_CONFIG) -> NDArray[np.float32]:
    fit_rows = gather_fit_rows([crossed], max_rows=config.max_rows)
    design = read_design(MatrixInputs(matrix=x), fit_rows.rows, products=torch.float32)
    target = Target(task="classification", label=label, num_outputs=int(label.max()) + 1)
    torch_target = TorchTarget.of(target, fit_rows.rows, design.curvature)
    return np.asarray(choose_l2(design, torch_target, fit_rows, key=crossed.key, config=config))


def signal(num_features: int, *, clarity: float) -> tuple[NDArray[np.float32], Label]:
    rng = np.random.default_rng(1)
    label = rng.integers(0, 2, CHOICE_ROWS).astype(np.int32)
    x = rng.standard_normal((CHOICE_ROWS, num_features))
    x[:, 0] += clarity * label
    return x.astype(np.float32), label


def test_noise_gets_a_large_l2_and_a_clear_signal_a_small_one() -> None:
    noise, clear = (
        chosen(*signal(100, clarity=0.2), four_folds()),
        chosen(*signal(3, clarity=3.0), four_folds()),
    )
    assert noise.min() > 10 * clear.max()
    for l2 in (noise, clear):
        assert l2.min() >= 0.5 * min(L2_CONFIG.l2_penalties)
        assert l2.max() <= max(L2_CONFIG.l2_penalties)


@pytest.mark.parametrize("fold", range(4))
def test_l2_does_not_depend_on_labels_of_its_own_fold(fold: int) -> None:
    x, label = signal(20, clarity=2.5)
    crossed = four_folds()
    turned = np.where(crossed.fold == fold, 1 - label, label).astype(np.int32)
    before, after = (chosen(x, labels, crossed) for labels in (label, turned))
    assert after[fold] == pytest.approx(before[fold], rel=1e-2)
    assert np.abs(np.log(np.delete(after, fold) / np.delete(before, fold))).min() > 0.1


def test_l2_is_scaled_with_the_number_of_rows() -> None:
    """An l2 chosen on 200 rows, 3/4 of which each probe trains on, is halved for a mean over 400."""
    x, label = signal(30, clarity=1.0)
    crossed = four_folds()
    few = np.sort(np.argsort(crossed.key)[:200])
    part = CrossFit(fold=crossed.fold[few], inner=crossed.inner[few], fits=crossed.fits[few], key=crossed.key[few])
    config = ProbeConfig(choice_rows=200)
    alone, carried = chosen(x[few], label[few], part, config), chosen(x, label, crossed, config)
    np.testing.assert_allclose(carried / alone, 0.5, rtol=0.25)  # folds of 200 rows are only nearly even


def test_l2_without_holdout_rows_is_the_middle_candidate() -> None:
    x, label = signal(3, clarity=1.0)
    crossed = four_folds()
    no_holdout = CrossFit(fold=crossed.fold, inner=np.ones_like(crossed.inner), fits=crossed.fits, key=crossed.key)
    middle = sorted(L2_CONFIG.l2_penalties, reverse=True)[len(L2_CONFIG.l2_penalties) // 2]
    np.testing.assert_allclose(chosen(x, label, no_holdout), middle)


def alone(x: NDArray[Any], label: Label, crossed: CrossFit, path: list[float]) -> NDArray[np.float64]:
    """Compute holdout losses (s, p) of separate, converged fits."""
    fit_rows = gather_fit_rows([crossed], max_rows=len(x))
    design = read_design(MatrixInputs(matrix=x), fit_rows.rows, products=torch.float32)
    values = torch.tensor(label[fit_rows.rows], dtype=torch.long)
    torch_target = TorchTarget(values=values, task="classification", num_outputs=2)
    losses = np.empty((len(path), fit_rows.train_mask.shape[1]))
    for l2_index, probe in np.ndindex(losses.shape):
        train_mask, holdout_mask = (
            torch.tensor(mask[:, [probe]])
            for mask in (fit_rows.train_mask & ~fit_rows.holdout_mask, fit_rows.holdout_mask)
        )
        train_loss, holdout_loss = (GlmLoss.of(design, torch_target, mask) for mask in (train_mask, holdout_mask))
        theta = fit_glm(train_loss, torch.tensor(path[l2_index : l2_index + 1]), max_steps=200, tolerance=1e-6).theta
        losses[l2_index, probe] = holdout_loss.compute(theta, torch.zeros(1, dtype=torch.long))[0]
    return losses


@pytest.mark.parametrize(("num_features", "clarity"), [(3, 3.0), (20, 2.5), (40, 1.0), (100, 0.2)])
def test_chosen_l2_is_close_to_the_best_of_separate_fits(num_features: int, clarity: float) -> None:
    x, label = signal(num_features, clarity=clarity)
    crossed, path = four_folds(), sorted(L2_CONFIG.l2_penalties, reverse=True)
    losses = alone(x, label, crossed, path)
    fit_rows = gather_fit_rows([crossed], max_rows=len(x))
    train_share = (fit_rows.train_mask & ~fit_rows.holdout_mask).sum(axis=0) / fit_rows.train_mask.sum(axis=0)
    l2 = chosen(x, label, crossed) / train_share
    for probe in range(4):
        # The path goes from the largest to the smallest l2, so that -log(path) ascends.
        loss = np.interp(-np.log(l2[probe]), -np.log(path), losses[:, probe])
        assert loss <= losses[:, probe].min() + 0.02


def test_l2_does_not_depend_on_other_probes() -> None:
    x, label = signal(20, clarity=2.5)
    crossed = four_folds()
    few = ProbeConfig(l2_penalties=L2_CONFIG.l2_penalties[2:])
    np.testing.assert_allclose(chosen(x, label, crossed, few), chosen(x, label, crossed), rtol=0.05)


def test_l2_of_many_classes_is_chosen_on_a_subset_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 150 classes of 6 samples, 15,000 logits are those of 50 classes; for three times the rows l2 is a third."""
    rng = np.random.default_rng(2)
    label = np.repeat(np.arange(150), 6).astype(np.int32)
    x = (0.5 * rng.standard_normal((150, 16))[label] + rng.standard_normal((900, 16))).astype(np.float32)
    fold, inner = (np.arange(900) // step % 2 for step in (1, 3))
    key, fits = rng.permutation(900).astype(np.uint64), np.ones(900, bool)
    crossed = CrossFit(fold=fold.astype(np.int16), inner=inner.astype(np.int16), fits=fits, key=key)
    monkeypatch.setattr("mmaudit.audit.probes.design.MAX_LOGITS", 15_000)
    rows, classes = choose_outputs(label, key, task="classification", num_outputs=150, max_rows=300)
    assert (len(rows), len(classes)) == (300, 50)
    carried = chosen(x, label, crossed, ProbeConfig(choice_rows=300))
    part = CrossFit(fold=crossed.fold[rows], inner=crossed.inner[rows], fits=fits[rows], key=key[rows])
    alone = chosen(x[rows], np.searchsorted(classes, label[rows]).astype(np.int32), part)
    np.testing.assert_allclose(carried / alone, 1 / 3, rtol=0.1)
