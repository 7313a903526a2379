"""Gaussian class models: equal to scikit-learn's shrunk covariance, better with few rows, and out of fold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from scipy.stats import multivariate_t, spearmanr
from sklearn.covariance import ledoit_wolf
from torch.nn import functional

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.probes.cross_fit import CrossFit, gather_fit_rows
from mmaudit.audit.probes.design import read_design
from mmaudit.audit.probes.gaussian import (
    MARGIN,
    MAX_ROWS,
    ClassSums,
    CovarianceShape,
    Curve,
    Gaussian,
    cholesky,
    covariance_shapes,
    first_minimum,
    fit_curve,
    fit_gaussian,
    sum_moments,
    widest_axes,
)
from mmaudit.audit.probes.linear import LinearProbe, fit_linear
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


CLASSES = 3
Floats = NDArray[np.floating[Any]]
Label = NDArray[np.int32]


def unlike(n: int, d: int, *, seed: int = 0) -> tuple[NDArray[np.float32], Label, Floats]:
    """Draw classes of equal means and different covariances; also return their log densities (n, CLASSES)."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, n).astype(np.int32)
    width = np.ones((CLASSES, d))
    for k in range(CLASSES):
        width[k, k::CLASSES] = 3.0
    x = rng.standard_normal((n, d)) * width[label]
    density = -np.square(x[:, None] / width).sum(axis=2) / 2 - np.log(width).sum(axis=1)
    rotation, _ = np.linalg.qr(rng.standard_normal((d, d)))
    return (x @ rotation).astype(np.float32), label, density


def alike(n: int, d: int, *, seed: int = 0) -> tuple[NDArray[np.float32], Label]:
    """Draw classes with different means and one anisotropic covariance."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, n).astype(np.int32)
    rotation, _ = np.linalg.qr(rng.standard_normal((d, d)))
    noise = rng.standard_normal((n, d)) * np.linspace(0.5, 2, d) @ rotation
    return (rng.standard_normal((CLASSES, d))[label] * 0.4 + noise).astype(np.float32), label


def curved_cross_fit(n: int) -> CrossFit:
    rng = np.random.default_rng(0)
    fold, inner = (rng.permutation(n) % 3 for _ in range(2))
    key = rng.permutation(n).astype(np.uint64)
    return CrossFit(fold=fold.astype(np.int16), inner=inner.astype(np.int16), fits=np.ones(n, bool), key=key)


def fit(x: Floats, label: Label, *, kind: str = "auto", num_classes: int = CLASSES, **options: Any) -> LinearProbe:
    config = ProbeConfig(kind=kind, precision="float32", **options)
    cross_fits = [curved_cross_fit(len(x))]
    target = Target(task="classification", label=label, num_outputs=num_classes)
    fit_rows = gather_fit_rows(cross_fits, max_rows=config.max_rows)
    return fit_linear(MatrixInputs(matrix=x), target, cross_fits, fit_rows, config=config, device="cpu")


def ask(x: Floats, label: Label, *, kind: str = "auto", **options: Any) -> NDArray[np.float32]:
    return np.asarray(fit(x, label, kind=kind, **options).logits(np.arange(len(x)))[0])


def confidence(raw: Floats, label: Label) -> Floats:
    return np.asarray(log_softmax(raw.astype(np.float64), axis=1)[np.arange(len(label)), label])


def drawn_gaussian(d: int, *, dtype: torch.dtype = torch.float64) -> tuple[Floats, Label, Gaussian, torch.Tensor]:
    """Draw rows (n, d), their labels, a Gaussian with an unrelated covariance, and their moments."""
    x, label, _ = unlike(200, d)
    label[label == 2] = 1  # a class without a row
    z, y = torch.from_numpy(x).to(dtype), torch.from_numpy(label.astype(np.int64))
    shared = torch.diag(torch.linspace(1, 2, d, dtype=dtype))
    prior = torch.tensor([0.5, 0.5, 1e-6], dtype=dtype).log()
    gaussian = Gaussian(means=torch.zeros(CLASSES, d, dtype=dtype), covariance=shared, prior=prior)
    return x.astype(np.float64), label, gaussian, sum_moments(z, y, num_classes=CLASSES)


@pytest.mark.parametrize(("d", "width", "shrinkage"), [(12, 12, 0.2), (12, 9, 0.8), (3, 3, 0.5)])
def test_curve_logits_are_t_densities(d: int, width: int, shrinkage: float) -> None:
    """Axes are the features, the last ones with the largest variance; shrinkage is converted to rows."""
    x, label, gaussian, moments = drawn_gaussian(d)
    curve = fit_curve(gaussian, moments, torch.eye(d).double(), shape=CovarianceShape(width=width, shrinkage=shrinkage))
    projected, shared = x[:, -width:], np.diag(np.linspace(1, 2, d)[-width:])
    lent, degrees = shrinkage / (1 - shrinkage) * len(x) / CLASSES, max(8, width)
    expected = np.empty((len(x), CLASSES))
    for k in range(CLASSES):
        own = projected[label == k]
        mean = own.mean(axis=0) if len(own) else np.zeros(width)
        covariance = ((own - mean).T @ (own - mean) + lent * shared) / (len(own) + lent)
        expected[:, k] = multivariate_t(mean, covariance, df=degrees).logpdf(projected) + gaussian.prior[k].item()
    logits = curve.logits(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(logits - logits[:, :1], expected - expected[:, :1], atol=1e-8)
    np.testing.assert_allclose(curve.times(0.3).times(0.5).logits(torch.from_numpy(x)), 0.15 * logits, atol=1e-8)


def test_float32_curve_equals_float64_up_to_rounding() -> None:
    shape = CovarianceShape(width=12, shrinkage=0.2)
    logits = []
    for dtype in (torch.float32, torch.float64):
        x, _, gaussian, moments = drawn_gaussian(12, dtype=dtype)
        curve = fit_curve(gaussian, moments, torch.eye(12).to(dtype), shape=shape)
        logits.append(curve.logits(torch.from_numpy(x).to(dtype)))
        assert logits[-1].dtype == dtype
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def test_outlier_logits_are_bounded() -> None:
    """Along a ray the logits stay bounded, where those of a Gaussian grow quadratically."""
    _, _, gaussian, moments = drawn_gaussian(6)
    curve = fit_curve(gaussian, moments, torch.eye(6).double(), shape=CovarianceShape(width=6, shrinkage=0.2))
    ray = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).double()
    far, farther = (curve.logits(ray * way) for way in (1e3, 1e6))
    spread = (farther.max(dim=1).values - farther.min(dim=1).values).max()
    np.testing.assert_allclose(far - far[:, :1], farther - farther[:, :1], atol=1e-1)
    assert spread < 40


def test_classes_of_equal_means_are_separated_by_covariance() -> None:
    x, label, density = unlike(1_500, 9)
    straight, curved = (ask(x, label, kind=kind) for kind in ("linear", "auto"))
    truth = confidence(density, label)
    assert -confidence(straight, label).mean() > 1.0
    assert -confidence(curved, label).mean() < 1.15 * -truth.mean() < 0.7
    assert spearmanr(confidence(curved, label), truth).statistic > 0.95
    assert abs(spearmanr(confidence(straight, label), truth).statistic) < 0.3


@pytest.mark.parametrize(("n", "d"), [(150, 30), (600, 12), (6_000, 6)])
def test_common_covariance_is_no_worse_than_linear(n: int, d: int) -> None:
    losses = {"linear": 0.0, "auto": 0.0}
    for seed in range(3):
        x, label = alike(n, d, seed=seed)
        for kind in losses:
            losses[kind] -= confidence(ask(x, label, kind=kind), label).mean() / 3
    assert losses["auto"] < 1.01 * losses["linear"]


def test_linear_kind_many_rows_and_config_use_no_curves() -> None:
    x, label, _ = unlike(600, 6)
    assert all(isinstance(curve, Curve) for curve in fit(x, label).curves)
    assert fit(x, label, kind="linear").curves == (None,) * 3
    assert fit(x, label, gaussian=False).curves == (None,) * 3
    many, many_labels, _ = unlike(MAX_ROWS + 10, 3)
    assert fit(many, many_labels).curves == (None,) * 3


@pytest.mark.parametrize("fold", range(3))
def test_logits_do_not_depend_on_labels_of_their_fold(fold: int) -> None:
    x, label, _ = unlike(600, 6)
    own = curved_cross_fit(600).fold == fold
    turned = np.where(own, (label + 1) % CLASSES, label).astype(np.int32)
    before, after = ask(x, label), ask(x, turned)
    np.testing.assert_allclose(before[own], after[own], atol=5e-3)
    assert np.abs(before - after)[~own].max() > 0.5


def test_logits_do_not_depend_on_other_rows() -> None:
    x, label, _ = unlike(900, 6)
    probe = fit(x, label)
    rows = np.array([7, 880, 7, 31])
    all_logits = probe.logits(np.arange(900))
    np.testing.assert_allclose(probe.logits(rows), all_logits[:, rows], atol=1e-4)
    np.testing.assert_array_equal(probe.logits_by_epoch(rows)[-1], probe.logits(rows)[0])
    np.testing.assert_array_equal(fit(x, label).logits(np.arange(900)), all_logits)


def poor(name: str) -> tuple[NDArray[np.float32], Label]:
    x, label, _ = unlike(60, 12)
    if name == "constant":
        x[:, 3:] = 0.1
    elif name == "missing":
        x[::2, 3:] = np.nan
        x[:, 5] = np.nan
    elif name == "wide":
        x = np.concatenate([x] * 20, axis=1)
    elif name == "wild":
        x[::7] *= 1e30
    elif name == "rare":  # in one fold only: its own probe has never seen the class
        label[label == 2] = 0
        label[np.flatnonzero(curved_cross_fit(60).fold == 1)[:4]] = 2
    return x, label


@pytest.mark.parametrize("name", ["few", "constant", "missing", "wide", "wild", "rare"])
@pytest.mark.parametrize("errors", [2.0, -np.inf])
def test_degenerate_data_give_finite_logits(name: str, errors: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `errors` of -inf, curves are always chosen."""
    monkeypatch.setattr("mmaudit.audit.probes.gaussian._ERRORS", errors)
    x, label = poor(name)
    probe = fit(x, label)
    assert np.isfinite(probe.logits(np.arange(60))).all()
    assert errors > 0 or None not in probe.curves


def test_axes_have_the_largest_variance_within_the_memory_limit() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((400, 200)) * np.linspace(1, 5, 200)).astype(np.float32)
    x[:, 7] += 40 * rng.integers(0, 2, 400)  # far wider than its middle two thirds
    design = read_design(MatrixInputs(matrix=x), np.arange(400), products=torch.float32)
    axes = widest_axes(design, num_classes=10, num_sets=30)
    assert axes.shape == (200, 128)
    np.testing.assert_allclose(axes.T @ axes, np.eye(128), atol=1e-4)
    spread = (design.rows @ axes).var(dim=0)
    assert spread[-1] == spread.max()
    many = widest_axes(design, num_classes=1_000, num_sets=30)
    np.testing.assert_array_equal(many, axes[:, -many.shape[1] :])
    assert many.shape[1] ** 2 * 1_000 * 30 <= 1 << 24
    assert widest_axes(design, num_classes=10**6, num_sets=1_000).shape == (200, 1)


def test_shapes_grow_with_the_axes() -> None:
    widths = [sorted({shape.width for shape in covariance_shapes(torch.zeros(200, q))}) for q in (0, 5, 40, 128)]
    assert widths == [[], [5], [32, 40], [32, 64, 128]]


def test_indefinite_covariance_has_a_cholesky_factor() -> None:
    """As from classes of one row each, which leave rounding errors of either sign."""
    covariances = torch.tensor(
        [[[1e-9, 2e-9], [2e-9, 1e-9]], [[2.0, 0.5], [0.5, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]
    ).double()
    lower = cholesky(covariances)
    assert torch.isfinite(lower).all()
    torch.testing.assert_close(lower[1] @ lower[1].T, covariances[1])  # what was definite stays as it was
    torch.testing.assert_close(lower[1], torch.linalg.cholesky(covariances[1]))
