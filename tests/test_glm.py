"""Batched linear models: equal to scikit-learn's, independent of the batch, and always finite."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.probes import design as designs
from mmaudit.audit.probes import glm
from mmaudit.audit.probes.design import Design, TorchTarget, read_design
from mmaudit.audit.probes.glm import GlmLoss, fit_glm, loss_and_residual

Floats = NDArray[np.float64]
STRENGTHS = (1e-3, 1e-2, 0.3)


def planted(num_rows: int, num_features: int, num_classes: int, *, seed: int = 0) -> tuple[Floats, NDArray[np.int64]]:
    """Draw correlated features of unequal scale and offset, with overlapping classes."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, num_classes, num_rows)
    means = 1.5 * rng.standard_normal((num_classes, num_features)) / np.sqrt(num_features / 4)
    mixing = np.eye(num_features) + 0.3 * rng.standard_normal((num_features, num_features)) / np.sqrt(num_features)
    x = (means[label] + rng.standard_normal((num_rows, num_features))) @ mixing
    return x * np.geomspace(0.01, 100, num_features) + np.linspace(-5, 5, num_features), label


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """p models: weights (p, d, k) of standardised features, and biases (p, k)."""

    design: Design
    weight: Tensor
    bias: Tensor


def fit(
    x: Floats,
    answer: NDArray[Any],
    *,
    mask: NDArray[np.bool_] | None = None,
    l2: tuple[float, ...] = (1e-2,),
    dtype: torch.dtype = torch.float64,
    products: torch.dtype | None = None,
    tolerance: float = 1e-15,
    task: str = "classification",
) -> Fitted:
    full_mask = np.ones((len(x), len(l2)), dtype=bool) if mask is None else mask
    design = read_design(MatrixInputs(matrix=x), np.arange(len(x)), products=products or dtype, dtype=dtype)
    k = int(answer.max()) + 1 if task == "classification" else answer.shape[1]
    values = torch.tensor(answer) if task == "classification" else torch.tensor(answer, dtype=dtype)
    torch_target = TorchTarget(values=values, task=task, num_outputs=k)
    loss = GlmLoss.of(design, torch_target, torch.tensor(full_mask))
    fitted = fit_glm(loss, torch.tensor(l2, dtype=dtype), max_steps=2_000, tolerance=tolerance)
    return Fitted(design=design, weight=fitted.theta[:, :-1], bias=fitted.theta[:, -1])


def outputs(fitted: Fitted, x: Floats, model: int = 0) -> Tensor:
    """Compute the logits (n, k) of one of the models."""
    rows = fitted.design.units.standardise(torch.tensor(x, dtype=fitted.weight.dtype))
    return rows @ fitted.weight[model] + fitted.bias[model]


def shares(fitted: Fitted, x: Floats, model: int = 0) -> Floats:
    """Compute the probabilities (n, k) of one of the models."""
    return np.asarray(outputs(fitted, x, model).softmax(dim=1).numpy(), dtype=np.float64)


def sklearns(x: Floats, label: NDArray[np.int64], *, rows: NDArray[np.bool_], l2: float) -> Floats:
    model: Any = make_pipeline(
        StandardScaler(), LogisticRegression(C=1 / (l2 * rows.sum()), tol=1e-10, max_iter=50_000)
    )
    return np.asarray(model.fit(x[rows], label[rows]).predict_proba(x))


@pytest.mark.parametrize(("num_rows", "num_features"), [(300, 6), (60, 90), (200, 1)])
def test_batched_masks_and_penalties_equal_sklearn(num_rows: int, num_features: int) -> None:
    """Also with more features than rows."""
    x, label = planted(num_rows, num_features, 4)
    part = np.arange(num_rows) % 3
    pairs = [(part != fold, l2) for fold in range(3) for l2 in STRENGTHS]
    fitted = fit(x, label, mask=np.stack([rows for rows, _ in pairs], axis=1), l2=tuple(l2 for _, l2 in pairs))
    for index, (rows, l2) in enumerate(pairs):
        expected = sklearns(x, label, rows=rows, l2=l2)
        np.testing.assert_allclose(shares(fitted, x, index), expected, atol=1e-4)


def test_two_classes_equal_sklearn() -> None:
    """Each of two weight columns is half of sklearn's one, with half the penalty: l2 doubles."""
    x, label = planted(200, 5, 2)
    full_mask = np.ones(200, dtype=bool)
    expected = sklearns(x, label, rows=full_mask, l2=1e-2)
    np.testing.assert_allclose(shares(fit(x, label, l2=(2e-2,)), x), expected, atol=1e-4)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-4), (torch.float32, 5e-3)])
def test_models_do_not_depend_on_the_batch(dtype: torch.dtype, close: float) -> None:
    x, label = planted(240, 8, 3)
    mask = np.stack([np.arange(240) % 4 != fold for fold in range(4)], axis=1)
    l2 = (1e-4, 1e-2, 1e-1, 1.0)
    together = fit(x, label, mask=mask, l2=l2, dtype=dtype, tolerance=1e-9)
    for index in range(4):
        alone = fit(x, label, mask=mask[:, [index]], l2=l2[index : index + 1], dtype=dtype, tolerance=1e-9)
        np.testing.assert_allclose(shares(together, x, index), shares(alone, x), atol=close)


def test_rows_outside_the_mask_do_not_change_the_fit() -> None:
    x, label = planted(120, 5, 3)
    mask = (np.arange(120) % 4 != 0)[:, None]
    rng = np.random.default_rng(1)
    changed_label = np.where(mask[:, 0], label, rng.integers(0, 3, 120))
    before, after = fit(x, label, mask=mask), fit(x, changed_label, mask=mask)
    assert torch.equal(before.weight, after.weight)
    assert torch.equal(before.bias, after.bias)
    moved = np.where(mask, x, x + x.std(axis=0) * rng.standard_normal(x.shape))
    np.testing.assert_allclose(shares(fit(moved, label, mask=mask), x), shares(before, x), atol=1e-4)


def test_fit_without_axes_has_the_same_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    x, label = planted(150, 12, 3)
    mask = np.stack([np.arange(150) % 2 == fold for fold in range(2)], axis=1)
    whitened = fit(x, label, mask=mask, l2=(1e-3, 1e-1))
    monkeypatch.setattr(designs, "_MAX_FEATURES_FOR_AXES", 11)
    plain = fit(x, label, mask=mask, l2=(1e-3, 1e-1))
    for index in range(2):
        np.testing.assert_allclose(shares(plain, x, index), shares(whitened, x, index), atol=1e-4)


def test_chunk_size_changes_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x, label = planted(1_000, 4, 3)
    unchunked = fit(x, label)
    monkeypatch.setattr(glm, "_CHUNK_LOGITS", 1)  # the smallest chunk has 512 rows
    np.testing.assert_allclose(shares(fit(x, label), x), shares(unchunked, x), atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_is_close_to_float64(offset: float) -> None:
    x, label = planted(400, 10, 3)
    x = x / x.std(axis=0) + offset
    probabilities = [shares(fit(x, label, dtype=dtype, tolerance=1e-8), x) for dtype in (torch.float32, torch.float64)]
    np.testing.assert_allclose(probabilities[0], probabilities[1], atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e6])
def test_constant_features_do_not_change_the_fit(value: float, dtype: torch.dtype) -> None:
    """0.1 is the hard case: it varies by rounding of 1e-8, in units of which its weights would dominate."""
    x, label = planted(301, 4, 3)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    mask = (np.arange(301) % 5 != 0)[:, None]
    without = fit(x, label, mask=mask, dtype=dtype, tolerance=1e-8)
    fitted = fit(np.c_[x, np.full(301, value)], label, mask=mask, dtype=dtype, tolerance=1e-8)
    assert fitted.weight[0, -1].tolist() == [0, 0, 0]
    np.testing.assert_allclose(shares(fitted, np.c_[x, np.full(301, value)]), shares(without, x), atol=3e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_feature_constant_within_a_mask_is_ignored(dtype: torch.dtype) -> None:
    """Whatever its values on other rows: its weight is not trained."""
    x, label = planted(200, 4, 3)
    mask = (np.arange(200) % 4 != 0)[:, None]
    rare = np.where(mask[:, 0], 7.3, 1e4 * np.arange(200))
    without = shares(fit(x, label, mask=mask, dtype=dtype, tolerance=1e-8), x)
    probabilities = shares(fit(np.c_[x, rare], label, mask=mask, dtype=dtype, tolerance=1e-8), np.c_[x, rare])
    np.testing.assert_allclose(probabilities, without, atol=3e-3)


@pytest.mark.parametrize("outlier", [1e3, 1e5, 1e10, 1e20])
@pytest.mark.parametrize(("dtype", "tolerance", "close"), [(torch.float64, 1e-15, 1e-4), (torch.float32, 1e-9, 1e-2)])
def test_outlier_outside_the_mask_does_not_change_the_fit(
    outlier: float, dtype: torch.dtype, tolerance: float, close: float
) -> None:
    """One outlier in another fold must not change the features of probes that do not train on it."""
    x, label = planted(200, 4, 3)
    mask = (np.arange(200) != 17)[:, None]
    before = shares(fit(x, label, mask=mask, dtype=dtype, tolerance=tolerance), x)
    wild = x.copy()
    wild[17] = outlier
    after = shares(fit(wild, label, mask=mask, dtype=dtype, tolerance=tolerance), x)
    np.testing.assert_allclose(after, before, atol=close)


def test_class_without_training_rows_gets_small_probability() -> None:
    x, label = planted(200, 4, 4)
    mask = np.stack([label != 2, np.ones(200, dtype=bool)], axis=1)
    fitted = fit(x, label, mask=mask, l2=(1e-2, 1e-2), tolerance=1e-9)
    first = shares(fitted, x)
    assert np.isfinite(first).all()
    assert first[:, 2].max() < 1e-4
    other_classes = np.delete(first, 2, axis=1)
    np.testing.assert_allclose(other_classes, sklearns(x, label, rows=label != 2, l2=1e-2), atol=1e-3)
    np.testing.assert_allclose(shares(fitted, x, 1).sum(axis=1), 1)


def test_perfectly_separable_classes_stay_finite() -> None:
    label = np.arange(40) % 2
    x = np.c_[label * 2.0 - 1, np.zeros(40)]
    probabilities = shares(fit(x, label, l2=(1e-12,), dtype=torch.float32), x)
    assert np.isfinite(probabilities).all()
    assert probabilities[np.arange(40), label].min() > 0.999


def test_fit_does_not_depend_on_feature_units() -> None:
    x, label = planted(200, 6, 3)
    moved = x * np.geomspace(1e-3, 1e3, 6) - 17
    np.testing.assert_allclose(shares(fit(moved, label), moved), shares(fit(x, label), x), atol=1e-6)


def test_multilabel_equals_sklearn_per_label() -> None:
    x, label = planted(200, 5, 3)
    values = np.stack([label == 0, label == 1, (label == 1) | (x[:, 0] > 0)], axis=1).astype(np.float64)
    probabilities = outputs(fit(x, values, task="multilabel"), x).sigmoid().numpy()
    full_mask = np.ones(200, dtype=bool)
    for index in range(3):
        expected = sklearns(x, values[:, index].astype(np.int64), rows=full_mask, l2=1e-2)[:, 1]
        np.testing.assert_allclose(probabilities[:, index], expected, atol=1e-4)


def test_regression_equals_sklearn_ridge() -> None:
    x, label = planted(150, 6, 4)
    values = (label + 0.1 * np.random.default_rng(2).standard_normal(150))[:, None] * 40 + 1_000
    mask = np.stack([np.arange(150) % 3 != fold for fold in range(3)], axis=1)
    fitted = fit(x, values, mask=mask, l2=(1e-3, 1e-2, 0.3), task="regression")
    for index, l2 in enumerate((1e-3, 1e-2, 0.3)):
        rows = mask[:, index]
        model: Any = make_pipeline(StandardScaler(), Ridge(alpha=l2 * rows.sum()))
        expected = model.fit(x[rows], values[rows, 0]).predict(x)
        np.testing.assert_allclose(outputs(fitted, x, index)[:, 0].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_residual_is_the_gradient_of_the_loss(task: str) -> None:
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.standard_normal((7, 2, 3)), requires_grad=True)
    answer = torch.tensor(rng.integers(0, 3, 7) if task == "classification" else rng.integers(0, 2, (7, 3)) * 1.0)
    loss, residual = loss_and_residual(logits.detach().clone(), answer, task=task)
    wide = answer[:, None].expand(-1, 2) if task == "classification" else answer[:, None].expand(-1, 2, -1)
    if task == "classification":
        reference = functional.cross_entropy(logits.transpose(1, 2), wide, reduction="sum")
    elif task == "multilabel":
        reference = functional.binary_cross_entropy_with_logits(logits, wide, reduction="sum")
    else:
        reference = (logits - wide).square().sum() / 2
    torch.autograd.backward(reference)
    assert logits.grad is not None
    torch.testing.assert_close(loss.sum(), reference.detach())
    torch.testing.assert_close(residual, logits.grad)


def test_bfloat16_products_are_close_to_float64() -> None:
    """Within 0.1 of the log-probability and 1e-3 of the mean loss, with features far from 0."""
    x, label = planted(4_000, 24, 5)
    mask = np.stack([np.arange(4_000) % 2 == fold for fold in range(2)], axis=1)
    exact = fit(x, label, mask=mask, l2=(1e-3, 1e-2))
    coarse = fit(x, label, mask=mask, l2=(1e-3, 1e-2), dtype=torch.float32, products=torch.bfloat16, tolerance=1e-4)
    for index in range(2):
        exact_log, coarse_log = (
            np.log(shares(fitted, x, index))[np.arange(4_000), label] for fitted in (exact, coarse)
        )
        assert abs(exact_log.mean() - coarse_log.mean()) < 1e-3
        assert np.abs(exact_log - coarse_log).mean() < 0.02
        assert np.quantile(np.abs(exact_log - coarse_log), 0.99) < 0.1


@pytest.mark.parametrize("columns", [1, 6, 1_200])
def test_penalties_sharing_a_mask_equal_separate_masks(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are sorted by fold, so that chunks end where folds end; a product covers a subset of the models or all."""
    monkeypatch.setattr(glm, "_MIN_CHUNK", 64)
    monkeypatch.setattr(glm, "_CHUNK_COLUMNS", columns)
    x, label = planted(300, 6, 3)
    mask = np.stack([np.arange(300) // 100 != fold for fold in range(3)], axis=1)
    l2 = tuple(np.repeat(STRENGTHS, 3))
    stacked, wide = (fit(x, label, mask=train_mask, l2=l2) for train_mask in (mask, np.tile(mask, (1, 3))))
    for index in range(9):
        np.testing.assert_allclose(shares(stacked, x, index), shares(wide, x, index), atol=1e-6)
        expected = sklearns(x, label, rows=mask[:, index % 3], l2=l2[index])
        np.testing.assert_allclose(shares(stacked, x, index), expected, atol=1e-4)


def test_relative_penalties_equal_scaled_features() -> None:
    """With the penalty c l2, a weight is that of the feature divided by sqrt(c) under l2; each mask has its own c."""
    x, label = planted(200, 6, 3)
    factors = np.array([[1e-2, 1, 50, 1, 9, 4], [1, 1, 1, 1e2, 1, 0.1]])
    design = read_design(MatrixInputs(matrix=x), np.arange(200), products=torch.float64, dtype=torch.float64)
    design = replace(design, relative_l2=torch.from_numpy(factors))
    torch_target = TorchTarget(values=torch.from_numpy(label), task="classification", num_outputs=3)
    loss = GlmLoss.of(design, torch_target, torch.ones(200, 2, dtype=torch.bool))
    l2 = torch.tensor([0.1, 0.02, 0.03, 0.4], dtype=torch.float64)  # masks 0, 1, 0, 1
    theta = fit_glm(loss, l2, max_steps=500, tolerance=1e-15).theta
    z = design.rows.numpy()
    for model in range(4):
        scale = np.sqrt(factors[model % 2])
        expected = LogisticRegression(C=1 / (200 * float(l2[model])), tol=1e-10, max_iter=5_000).fit(z / scale, label)
        np.testing.assert_allclose(theta[model, :-1].numpy().T, expected.coef_ / scale, atol=1e-4)


def test_sparse_features_need_few_steps() -> None:
    """Axes of the covariance alone, without the units of the penalty, took 161 steps, to another point."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, 120)
    x = rng.standard_normal((120, 200)) + 0.6 * rng.standard_normal((5, 200))[label]
    x = (np.maximum(x - 1.2, 0) * np.exp(rng.normal(0, 1, 200))).astype(np.float32)
    design = read_design(MatrixInputs(matrix=x), np.arange(120), products=torch.float32)
    torch_target = TorchTarget(values=torch.from_numpy(label), task="classification", num_outputs=5)
    loss = GlmLoss.of(design, torch_target, torch.ones(120, 1, dtype=torch.bool))
    minimum = fit_glm(loss, torch.tensor([1e-2]), max_steps=300, tolerance=1e-7)
    assert minimum.num_steps < 80
