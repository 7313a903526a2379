"""Gaussian class models: equal to scikit-learn's shrunk covariance, better with few rows, and out of fold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from sklearn.covariance import ledoit_wolf
from torch.nn import functional

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.probes.cross_fit import CrossFit
from mmaudit.audit.probes.gaussian import MARGIN, MAX_ROWS, ClassSums, first_minimum, fit_gaussian
from mmaudit.audit.probes.probe_set import fit_probe

K = 4


def planted(n: int, d: int, *, seed: int = 0, heavy: bool = False) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Draw classes with different means and one anisotropic covariance; `heavy`: with heavy tails."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, K, n).astype(np.int32)
    rotation, _ = np.linalg.qr(rng.standard_normal((d, d)))
    noise = rng.standard_t(1.5, (n, d)).clip(-50, 50) if heavy else rng.standard_normal((n, d))
    x = rng.standard_normal((K, d))[label] * 0.4 + noise * np.linspace(0.5, 2, d) @ rotation
    return x.astype(np.float32), label


def cross_fit(n: int, *, seed: int = 0) -> CrossFit:
    rng = np.random.default_rng(seed)
    return CrossFit(
        fold=rng.integers(0, 3, n).astype(np.int16),
        inner=rng.integers(0, 3, n).astype(np.int16),
        fits=np.ones(n, dtype=bool),
        key=rng.permutation(n).astype(np.uint64),
    )


def logits(x: NDArray[np.float32], label: NDArray[np.int32], **options: object) -> NDArray[np.float32]:
    config = ProbeConfig(**{"kind": "linear", "precision": "float32", **options})  # type: ignore[arg-type]
    target = Target(task="classification", label=label, num_outputs=K)
    probe = fit_probe(MatrixInputs(matrix=x), target, [cross_fit(len(x))], config=config)
    return np.asarray(probe.logits(np.arange(len(x)))[0])


def loss(raw: NDArray[np.float32], label: NDArray[np.int32]) -> float:
    return float(-log_softmax(raw, axis=1)[np.arange(len(label)), label].mean())


@pytest.mark.parametrize(("n", "d"), [(60, 30), (400, 20), (30, 50)])
def test_covariance_shrinkage_equals_sklearn(n: int, d: int) -> None:
    x, label = planted(n, d)
    z, y = torch.from_numpy(x).double(), torch.from_numpy(label.astype(np.int64))
    train_mask = torch.arange(n) % 5 != 0
    train_rows, one_hot = z[train_mask], functional.one_hot(y[train_mask], K).double()
    none = torch.zeros(K, 1, 1, dtype=torch.float64)
    sums = ClassSums(
        count=one_hot.sum(dim=0), total=one_hot.T @ train_rows, square=train_rows.T @ train_rows, moments=none
    )
    theta = fit_gaussian(z, y, train_mask=train_mask, sums=sums).theta().numpy()
    rows = train_mask.numpy()
    means = np.stack([x[rows & (label == k)].mean(axis=0) for k in range(K)]).astype(np.float64)
    covariance, _ = ledoit_wolf(x[rows].astype(np.float64) - means[label[rows]], assume_centered=True)
    weight = np.linalg.solve(covariance, means.T)
    share = np.bincount(label[rows], minlength=K) / rows.sum()
    bias = np.log(share) - (means.T * weight).sum(axis=0) / 2
    np.testing.assert_allclose(theta[:-1], weight, rtol=2e-3, atol=2e-3 * np.abs(weight).max())
    np.testing.assert_allclose(theta[-1], bias, rtol=2e-3, atol=1e-3 * np.abs(bias).max())


def test_gaussian_lowers_the_loss_with_few_rows() -> None:
    gains = []
    for seed in range(4):
        x, label = planted(240, 40, seed=seed)
        gains.append(loss(logits(x, label, gaussian=False), label) - loss(logits(x, label), label))
    assert np.mean(gains) > 0.01


def test_gaussian_does_little_harm_to_non_gaussian_classes() -> None:
    worse = []
    for seed in range(4):
        x, label = planted(240, 20, seed=seed, heavy=True)
        worse.append(loss(logits(x, label), label) - loss(logits(x, label, gaussian=False), label))
    assert np.mean(worse) < 0.02


def test_predictions_do_not_depend_on_labels_of_their_fold() -> None:
    x, label = planted(240, 10)
    in_fold = cross_fit(240).fold == 1
    changed_label = label.copy()
    changed_label[in_fold] = (changed_label[in_fold] + 1) % K
    before, after = logits(x, label), logits(x, changed_label)
    np.testing.assert_allclose(before[in_fold], after[in_fold], atol=2e-3)
    assert np.abs(before[~in_fold] - after[~in_fold]).max() > 0.1


@pytest.mark.parametrize("options", [{"l2_penalties": (1e-2,)}, {"gaussian": False}])
def test_fixed_l2_or_config_turns_the_gaussian_off(options: dict[str, object]) -> None:
    x, label = planted(240, 10)
    np.testing.assert_array_equal(logits(x, label, **options), logits(x, label, **{**options, "gaussian": False}))
    assert np.abs(logits(x, label) - logits(x, label, **{**options, "gaussian": False})).max() > 1e-3


def test_many_rows_use_no_gaussian() -> None:
    x, label = planted(MAX_ROWS + 10, 3)
    np.testing.assert_array_equal(logits(x, label), logits(x, label, gaussian=False))


def test_simplest_of_equal_options_is_chosen() -> None:
    assert first_minimum([0.5 + MARGIN / 2, 0.7, 0.5, 0.5 - MARGIN / 4]) == 0
    assert first_minimum([0.5 + 2 * MARGIN, 0.7, 0.5, 0.5]) == 2
    assert first_minimum([0.5]) == 0
