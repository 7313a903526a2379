"""Gaussian class models, linear and quadratic, that are averaged with logistic probes.

Regularised (Friedman 1989): the covariance of each class is shrunk towards the pooled one, along the principal axes of
largest variance only. Tails are those of a t distribution, so that an outlier does not get an extreme logit (with
Gaussian tails the loss is .70 instead of .65). On 3,000 noisy spoken digits of ten classes the accuracy is .78, with
linear boundaries .73; on clips by actor it is worse than linear.

Linear discriminant analysis: one Gaussian per class with a common covariance. It is linear in the features, as logistic
regression is, and needs fewer rows but stronger assumptions (Ng & Jordan 2001). Their errors differ, so that the mean
of both is better than either: on 1,440 clips by actor, accuracy .56 and .57 alone, .57 together, loss 1.21, 1.21 and
1.19. With one covariance per class, boundaries are quadratic.

Legend: n and b rows, d features, q axes, k classes, p probes, f folds, c cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import isqrt

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .cross_fit import CrossFit, FitRows
from .design import Design, TorchTarget
from .glm import GlmLoss, fit_glm

_WIDTHS = (32, 64, 128)  # candidate numbers of principal axes
_SHRINKAGES = (0.8, 0.5, 0.2)  # candidate weights of the pooled covariance; at 1 boundaries are linear
_MAX_ENTRIES = 1 << 24  # of two sets per probe: 128 MiB of moments, with one repeat, and 32 MiB of roots
_MIN_DEGREES = 8  # of freedom; else one per axis: at D^2 = q, its mean, the density is then as steep as a Gaussian's
_CHUNK_DISTANCES = 1 << 21  # 8 MiB of float32


@dataclass(frozen=True, slots=True, kw_only=True)
class CovarianceShape:
    """Settings of the class covariances: the number of axes, and the weight of the pooled covariance in [0, 1]."""

    width: int
    shrinkage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Quadratic class scores of one probe.

    axes (d, q); roots (q, k q) of the precisions along them, offset (k, q) the means times these, constant (k,). A
    logit is a factor times the log density of a t distribution with v degrees of freedom, up to terms common to all
    classes: constant - (v + q) / 2 log(1 + D^2 / v), D the Mahalanobis distance from the class.
    """

    axes: Tensor
    roots: Tensor
    offset: Tensor
    constant: Tensor
    factor: float = 1.0

    def logits(self, z: Tensor) -> Tensor:
        """Compute the logits (b, k) of standardised rows (b, d)."""
        x, (k, q) = z @ self.axes, self.offset.shape
        distances = x.new_empty(len(x), k)
        chunk_rows = max(1, _CHUNK_DISTANCES // (k * q))
        for start in range(0, len(x), chunk_rows):
            offsets = (x[start : start + chunk_rows] @ self.roots).view(-1, k, q).sub_(self.offset)
            distances[start : start + chunk_rows] = offsets.square_().sum(dim=2)
        degrees = max(q, _MIN_DEGREES)
        return self.factor * (self.constant - (degrees + q) / 2 * torch.log1p(distances / degrees))

    def times(self, factor: float) -> Curve:
        """Return the curve whose logits are multiplied by a factor above 0."""
        return replace(self, factor=self.factor * factor)


def cholesky(covariance: Tensor) -> Tensor:
    """Compute the Cholesky factors of covariances (..., d, d).

    A covariance that is not positive definite, such as the rounding errors that classes of one row each leave, gets
    the smallest increase of its diagonal, by powers of ten, that makes it so.
    """
    lower, failed = torch.linalg.cholesky_ex(covariance)
    scale = covariance.diagonal(dim1=-2, dim2=-1).abs().amax(dim=-1).clamp_min(1e-12)
    for power in range(-7, 2):
        if not failed.any():
            break
        increase = torch.where(failed > 0, scale * 10.0**power, 0.0)
        lower, failed = torch.linalg.cholesky_ex(
            covariance + torch.diag_embed(increase[..., None].expand(covariance.shape[:-1]))
        )
    lower_factor: Tensor = lower
    return lower_factor


def widest_axes(design: Design, *, num_classes: int, num_sets: int) -> Tensor:
    """Return the principal axes of a design with the largest variance, (d, q), limited by the memory of the moments."""
    width = min(_WIDTHS[-1], design.rows.shape[1], isqrt(_MAX_ENTRIES // (num_classes * num_sets)))
    basis = torch.eye(design.rows.shape[1]).to(design.curvature) if design.basis is None else design.basis
    return basis[:, -max(1, width) :]


def sum_moments(x: Tensor, label: Tensor, *, num_classes: int) -> Tensor:
    """Sum (x, 1) (x, 1)^T over the rows (n, q) of each class, in float64: (k, q + 1, q + 1).

    The last row is the sum of x and the number of rows. Float32 loses the small variances next to large ones.
    """
    order = label.argsort(stable=True)
    padded = functional.pad(x[order].double(), (0, 1), value=1.0)
    ends = torch.bincount(label, minlength=num_classes).cumsum(dim=0)[:-1].cpu()
    return torch.stack([class_rows.T @ class_rows for class_rows in torch.tensor_split(padded, ends)])


def covariance_shapes(axes: Tensor) -> list[CovarianceShape]:
    """Return the candidate shapes along the axes (d, q); none where q is 0."""
    widths = sorted({min(width, axes.shape[1]) for width in _WIDTHS} - {0})
    return [CovarianceShape(width=width, shrinkage=shrinkage) for width in widths for shrinkage in _SHRINKAGES]


def fit_curve(gaussian: Gaussian, moments: Tensor, axes: Tensor, *, shape: CovarianceShape) -> Curve:
    """Fit one covariance per class from the class moments (k, q + 1, q + 1) along the axes (d, q).

    The pooled covariance counts as a number of extra rows, the same for all classes, such that its weight is
    `shape.shrinkage` in a class of average size: it is larger in a class of fewer rows, and 1 in a class of none.
    """
    width, shrinkage = shape.width, shape.shrinkage
    selected_axes = axes[:, -width:]
    class_moments = moments[:, -width - 1 :, -width - 1 :]
    count, total = class_moments[:, -1, -1], class_moments[:, -1, :-1]
    means = total / count.clamp_min(1)[:, None]
    scatter = class_moments[:, :-1, :-1] - total[:, :, None] * means[:, None]
    pooled = (selected_axes.T @ gaussian.covariance @ selected_axes).double()
    pooled_rows = shrinkage / (1 - shrinkage) * count.mean()
    lower = cholesky((scatter + pooled_rows * pooled) / (count + pooled_rows)[:, None, None])
    roots = torch.linalg.solve_triangular(lower, torch.eye(width).to(lower).expand_as(lower), upper=False)
    constant = gaussian.prior - lower.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    return Curve(
        axes=selected_axes,
        roots=roots.permute(2, 0, 1).flatten(1).to(axes.dtype),
        offset=(roots @ means[:, :, None]).squeeze(2).to(axes.dtype),
        constant=constant.to(axes.dtype),
    )


MAX_ROWS = 20_000  # above, the logistic model alone is as good, and the sums take longer than its steps
MAX_FEATURES = 2_048
_SHARPNESS = tuple(np.logspace(-2, 0, 17).tolist())  # candidates of 1 / T: a Gaussian of many features is overconfident
_TRIAL_TOLERANCE = 1e-3  # enough to choose the Gaussian's weight
_PARTS = (0.0, 0.25, 0.5, 0.75)  # candidate weights of the Gaussian in the mean; 0 leaves it out
_CURVED_PARTS = (*_PARTS, 1.0)  # where class means are equal, a linear model adds nothing
# A simpler option is preferred unless another is better by this, ten times the float32 rounding error of a mean loss.
MARGIN = 1e-5
_ERRORS = 2.0  # standard errors by which curves must be better; with 0, clips by actor lose .01 of accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSums:
    """Sufficient statistics of a Gaussian model, for each of c sets of rows.

    count (c, k), total (c, k, d), square (c, d, d); moments (c, k, q + 1, q + 1) along q axes, with q = 0 if all
    classes share one covariance.
    """

    count: Tensor
    total: Tensor
    square: Tensor
    moments: Tensor

    def select(self, cells: Tensor) -> ClassSums:
        """Return the sums over the selected sets, cells (c,) of bools, without the axis c."""
        sums = {field.name: getattr(self, field.name) for field in fields(self)}
        return ClassSums(
            **{name: (cells[None].to(x.dtype) @ x.flatten(1)).view(x.shape[1:]) for name, x in sums.items()}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaussian:
    """One Gaussian per class: means (k, d), common covariance (d, d), and prior (k,), the log class frequencies."""

    means: Tensor
    covariance: Tensor
    prior: Tensor

    def theta(self) -> Tensor:
        """Return the equivalent linear model (d + 1, k)."""
        lower = cholesky(self.covariance.double())
        weight = torch.cholesky_solve(self.means.T, lower.to(self.means.dtype))
        return torch.cat([weight, (self.prior - (self.means.T * weight).sum(dim=0) / 2)[None]])


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedModels:
    """p probes, each the weighted mean of a logistic and a Gaussian model: theta (p, d + 1, k), plus a curve.

    The curve is None where linear boundaries are as good.
    """

    theta: Tensor
    curves: tuple[Curve | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """Sharpness of a Gaussian and its weight against the logistic model with the lowest mean loss; losses (b,)."""

    losses: Tensor
    sharpness: float
    part: float
    shape: CovarianceShape | None  # of the class covariances; None: one common covariance


def mix_in_gaussian(
    design: Design,
    torch_target: TorchTarget,
    fit_rows: FitRows,
    cross_fits: Sequence[CrossFit],
    *,
    theta: Tensor,
    l2: Tensor,
    max_steps: int,
    curved: bool,
) -> MixedModels:
    """Average logistic models theta (p, d + 1, k) with Gaussian ones of the same rows.

    Each probe chooses the kind of Gaussian, its sharpness and its weight on the rows that it holds out, by models of
    the rest of its rows. `curved` adds models with one covariance per class to the candidates.
    """
    z, label, k = design.rows.to(design.dtype), torch_target.values, theta.shape[2]
    trial = _fit_trial(design, torch_target, fit_rows, l2, max_steps=max_steps)
    axes = widest_axes(design, num_classes=k, num_sets=2 * len(theta)) if curved else z.new_empty(z.shape[1], 0)
    straight, curves = theta.clone(), list[Curve | None]()
    for cross_fit in cross_fits:
        sums = _class_sums(z, label, fit_rows, cross_fit, axes=axes, num_classes=k)
        for fold in range(cross_fit.num_folds):
            probe = len(curves)
            train_mask, holdout_mask = (
                torch.from_numpy(rows[:, probe]).to(z.device) for rows in (fit_rows.train_mask, fit_rows.holdout_mask)
            )
            all_sums, train_sums = (sums.select(cells.to(z.device)) for cells in _training_cells(cross_fit, fold))
            choice = _choose(
                fit_gaussian(z, label, train_mask=train_mask & ~holdout_mask, sums=train_sums),
                train_sums.moments,
                axes,
                z=z[holdout_mask],
                logistic=_predict(z[holdout_mask], trial[probe]),
                label=label[holdout_mask],
            )
            gaussian = fit_gaussian(z, label, train_mask=train_mask, sums=all_sums)
            factor = choice.part * choice.sharpness
            straight[probe] *= 1 - choice.part
            if choice.shape is None:
                straight[probe] += factor * gaussian.theta()
                curves.append(None)
            else:
                curves.append(fit_curve(gaussian, all_sums.moments, axes, shape=choice.shape).times(factor))
    return MixedModels(theta=straight, curves=tuple(curves))


def _fit_trial(design: Design, torch_target: TorchTarget, fit_rows: FitRows, l2: Tensor, *, max_steps: int) -> Tensor:
    """Fit logistic models (p, d + 1, k) to the rows that are not held out, to choose the Gaussian's weight."""
    train_only = torch.from_numpy(fit_rows.train_mask & ~fit_rows.holdout_mask).to(l2.device)
    num_rows = torch.from_numpy(fit_rows.train_mask.sum(axis=0)).to(l2)
    loss = GlmLoss.of(design, torch_target, train_only)
    l2 = l2 * num_rows / train_only.sum(dim=0)
    return fit_glm(loss, l2, max_steps=max_steps, tolerance=_TRIAL_TOLERANCE).theta


def _class_sums(
    z: Tensor, label: Tensor, fit_rows: FitRows, cross_fit: CrossFit, *, axes: Tensor, num_classes: int
) -> ClassSums:
    """Sum over cells of rows that all probes treat alike, so that each row is multiplied once for all probes.

    There are two cells per fold: its rows of inner fold 0 (odd numbers) and the others (even numbers).
    """
    cell_of_row = cross_fit.fold[fit_rows.rows].astype(np.intp) * 2 + (cross_fit.inner[fit_rows.rows] == 0)
    fits = cross_fit.fits[fit_rows.rows]
    sums: dict[str, list[Tensor]] = {field.name: [] for field in fields(ClassSums)}
    for cell in range(2 * cross_fit.num_folds):
        rows = torch.from_numpy(np.flatnonzero((cell_of_row == cell) & fits)).to(z.device)
        x, one_hot = z[rows], functional.one_hot(label[rows], num_classes).to(z.dtype)
        sums["count"].append(one_hot.sum(dim=0))
        sums["total"].append(one_hot.T @ x)
        sums["square"].append(x.T @ x)
        sums["moments"].append(sum_moments(x @ axes, label[rows], num_classes=num_classes))
    return ClassSums(**{name: torch.stack(cells) for name, cells in sums.items()})


def _training_cells(cross_fit: CrossFit, fold: int) -> tuple[Tensor, Tensor]:
    """Return masks (c,) of the cells that the probe of a fold trains on, in full and without its held-out rows."""
    numbers = torch.arange(2 * cross_fit.num_folds)
    trains = numbers // 2 != fold
    return trains, trains & (numbers % 2 == 0)


def fit_gaussian(z: Tensor, label: Tensor, *, train_mask: Tensor, sums: ClassSums) -> Gaussian:
    """Fit one Gaussian per class to the rows of train_mask (n,), whose sums are given.

    The common covariance is shrunk towards a multiple of the identity by the factor of Ledoit & Wolf (2004).
    """
    n, d = float(sums.count.sum()), len(sums.square)
    means = sums.total / sums.count.clamp_min(1)[:, None]
    covariance = (sums.square - sums.total.T @ means) / n
    rows = train_mask.nonzero().squeeze(1)
    norms = (z[rows] - means[label[rows]]).square().sum(dim=1)
    mean_variance = covariance.diagonal().mean()
    spread = covariance.square().sum() - d * mean_variance**2  # |S - m I|^2
    noise = (norms.square().sum() / n - covariance.square().sum()) / n
    shrink = float((noise / spread.clamp_min(1e-12)).clamp(0, 1)) if spread > 0 else 1.0
    shrunk = (1 - shrink) * covariance
    shrunk.diagonal().add_(shrink * mean_variance + 1e-4 * mean_variance.clamp_min(1e-6))
    prior = (sums.count / n).clamp_min(1e-6).log()  # a class without training rows gets a small prior
    return Gaussian(means=means, covariance=shrunk, prior=prior)


def _predict(z: Tensor, theta: Tensor) -> Tensor:
    return torch.addmm(theta[-1], z, theta[:-1])


def _choose(
    gaussian: Gaussian, moments: Tensor, axes: Tensor, *, z: Tensor, logistic: Tensor, label: Tensor
) -> _Choice:
    """Choose between a common covariance and class covariances on rows z (b, d), with logistic logits (b, k).

    Boundaries stay linear unless the best curve lowers the loss by more than _ERRORS standard errors over these rows.
    """
    straight = _fit_weights(_predict(z, gaussian.theta()), logistic, label, shape=None)
    curves = [
        _fit_weights(fit_curve(gaussian, moments, axes, shape=shape).logits(z), logistic, label, shape=shape)
        for shape in covariance_shapes(axes)
    ]
    if not curves:
        return straight
    curve = curves[first_minimum([float(choice.losses.mean()) for choice in curves])]
    gain = straight.losses - curve.losses
    standard_error = float(gain.std(correction=0)) / len(gain) ** 0.5
    return curve if float(gain.mean()) > _ERRORS * standard_error else straight


def _fit_weights(gaussian: Tensor, logistic: Tensor, label: Tensor, *, shape: CovarianceShape | None) -> _Choice:
    """Choose the sharpness of a Gaussian's logits (b, k) and its weight against the logistic ones by lowest loss."""
    parts = _PARTS if shape is None else _CURVED_PARTS
    gaussian_losses = [float(functional.cross_entropy(candidate * gaussian, label)) for candidate in _SHARPNESS]
    sharpness = _SHARPNESS[first_minimum(gaussian_losses)]
    mixed_losses = [
        functional.cross_entropy((1 - part) * logistic + part * sharpness * gaussian, label, reduction="none")
        for part in parts
    ]
    best = first_minimum([float(losses.mean()) for losses in mixed_losses])
    return _Choice(losses=mixed_losses[best], sharpness=sharpness, part=parts[best], shape=shape)


def first_minimum(losses: Sequence[float]) -> int:
    """Return the index of the first loss within MARGIN of the lowest; options are sorted by simplicity."""
    return int(np.argmax(np.array(losses) <= min(losses) + MARGIN))
