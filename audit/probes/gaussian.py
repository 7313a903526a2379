"""Gaussian class models that a linear probe is combined with.

Linear discriminant analysis: one Gaussian a class, all of one covariance. It is linear in the features, as logistic
regression is, and wants fewer rows but truer assumptions (Ng & Jordan 2001). Where each errs elsewhere, the mean of
both is better than either: on 1,440 clips by actor, accuracy .56 and .57 alone, .57 together, loss 1.21, 1.21 and 1.19.
With a covariance of each class's own, boundaries are curved: see quadratic.py.

Legend: n rows, d features, q axes, k classes, p probes, f folds, c cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .cross_fit import CrossFit, FitRows
from .design import Design
from .glm import fit_glm
from .quadratic import Curve, Shape, cholesky, fit_curve, shapes_of, sum_moments, widest_axes

MOST_ROWS = 20_000  # above, the logistic model alone is as good, and the sums below cost more than its steps
MOST_FEATURES = 2_048
_SHARPNESS = tuple(np.logspace(-2, 0, 17).tolist())  # 1 / T that are tried: a Gaussian of many features is too sure
_TRIAL_TOLERANCE = 1e-3  # settles which part is best
_PARTS = (0.0, 0.25, 0.5, 0.75)  # of the Gaussian in the mean; 0 leaves it out
_CURVED_PARTS = (*_PARTS, 1.0)  # where means are equal, straight boundaries have nothing to add
# An option must be better by so much than one that is simpler: ten times what rounding does to a mean loss in float32.
MARGIN = 1e-5
_ERRORS = 2.0  # standard errors by which curves must be better; by none, clips of actors lose .01 of accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What a Gaussian model is made of, for each of c sets of rows.

    count (c, k), total (c, k, d), square (c, d, d); moments (c, k, q + 1, q + 1) along q axes, q = 0 where all classes
    are to have one covariance.
    """

    count: Tensor
    total: Tensor
    square: Tensor
    moments: Tensor

    def of(self, cells: Tensor) -> Sums:
        """Add up some of the sets, cells (c,) of bools, as one set."""
        one = cells[None]
        return Sums(
            count=_add(one, self.count),
            total=_add(one, self.total),
            square=_add(one, self.square),
            moments=_add(one, self.moments),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaussian:
    """One Gaussian a class, all of one covariance (d, d): means (k, d), and prior (k,), the log of their shares."""

    means: Tensor
    covariance: Tensor
    prior: Tensor

    def theta(self) -> Tensor:
        """Give the linear model (d + 1, k) that it is."""
        lower = cholesky(self.covariance.double())
        weight = torch.cholesky_solve(self.means.T, lower.to(self.means.dtype))
        return torch.cat([weight, (self.prior - (self.means.T * weight).sum(dim=0) / 2)[None]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """p probes, each the mean of a logistic and a Gaussian model: theta (p, d + 1, k), to which a curve is added.

    A probe's curve is None where straight boundaries are as good.
    """

    theta: Tensor
    curves: tuple[Curve | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """How sure a Gaussian is taken to be, and its part beside a logistic model: those of the least mean loss, (b,)."""

    losses: Tensor
    sharpness: float
    part: float
    shape: Shape | None  # of covariances of each class's own; None: one for all


def mix_in_gaussian(
    design: Design,
    label: Tensor,
    fit_rows: FitRows,
    cross_fits: Sequence[CrossFit],
    *,
    theta: Tensor,
    l2: Tensor,
    max_steps: int,
    curved: bool,
) -> Mixed:
    """Mix logistic models theta (p, d + 1, k) with Gaussian ones of the same rows.

    Which Gaussian, how sure it is taken to be, and its part are chosen by each probe on the rows it sets aside, by
    models of the rest of its rows. `curved`: covariances of each class's own are tried as well.
    """
    z, k = design.rows.to(design.dtype), theta.shape[2]
    trial = _fit_trial(design, label, fit_rows, l2, like=theta, max_steps=max_steps)
    axes = widest_axes(design, num_classes=k, num_sets=2 * len(theta)) if curved else z.new_empty(z.shape[1], 0)
    straight, curves = theta.clone(), list[Curve | None]()
    for cross_fit in cross_fits:
        sums = _sum_up(z, label, fit_rows, cross_fit, axes=axes, num_classes=k)
        for fold in range(cross_fit.num_folds):
            probe = len(curves)
            train_mask, holdout_mask = (
                torch.from_numpy(rows[:, probe]).to(z.device) for rows in (fit_rows.train_mask, fit_rows.holdout_mask)
            )
            whole, some = (sums.of(cells.to(z.device)) for cells in _cells_of(cross_fit, fold))
            choice = _choose(
                fit_gaussian(z, label, train_mask=train_mask & ~holdout_mask, sums=some),
                some.moments,
                axes,
                z=z[holdout_mask],
                logistic=_predict(z[holdout_mask], trial[probe]),
                label=label[holdout_mask],
            )
            gaussian, factor = fit_gaussian(z, label, train_mask=train_mask, sums=whole), choice.part * choice.sharpness
            straight[probe] *= 1 - choice.part
            if choice.shape is None:
                straight[probe] += factor * gaussian.theta()
                curves.append(None)
            else:
                curves.append(fit_curve(gaussian, whole.moments, axes, shape=choice.shape).times(factor))
    return Mixed(theta=straight, curves=tuple(curves))


def _fit_trial(design: Design, label: Tensor, fit_rows: FitRows, l2: Tensor, *, like: Tensor, max_steps: int) -> Tensor:
    """Fit the logistic models (p, d + 1, k) of the rows that are not set aside, by which the part is chosen."""
    seen = torch.from_numpy(fit_rows.train_mask & ~fit_rows.holdout_mask).to(like.device)
    return fit_glm(
        design,
        label,
        task="classification",
        train_mask=seen,
        l2=l2 * torch.from_numpy(fit_rows.train_mask.sum(axis=0)).to(l2) / seen.sum(dim=0),
        start=torch.zeros_like(like),
        max_steps=max_steps,
        tolerance=_TRIAL_TOLERANCE,
    ).theta


def _sum_up(
    z: Tensor, label: Tensor, fit_rows: FitRows, cross_fit: CrossFit, *, axes: Tensor, num_classes: int
) -> Sums:
    """Sum over cells of one fold that are alike to all probes, so that a product of all rows serves every probe.

    The cells are each fold's rows, those of inner fold 0 apart.
    """
    cell = cross_fit.fold[fit_rows.rows].astype(np.intp) * 2 + (cross_fit.inner[fit_rows.rows] == 0)
    fits = cross_fit.fits[fit_rows.rows]
    count, total, square, moments = [], [], [], []
    for number in range(2 * cross_fit.num_folds):
        rows = torch.from_numpy(np.flatnonzero((cell == number) & fits)).to(z.device)
        x, one_hot = z[rows], functional.one_hot(label[rows], num_classes).to(z.dtype)
        count.append(one_hot.sum(dim=0))
        total.append(one_hot.T @ x)
        square.append(x.T @ x)
        moments.append(sum_moments(x @ axes, label[rows], num_classes=num_classes))
    return Sums(
        count=torch.stack(count), total=torch.stack(total), square=torch.stack(square), moments=torch.stack(moments)
    )


def _cells_of(cross_fit: CrossFit, fold: int) -> tuple[Tensor, Tensor]:
    """Tell which cells (c,) the probe of a fold learns from, and which when it sets some of them aside."""
    numbers = torch.arange(2 * cross_fit.num_folds)
    learns = numbers // 2 != fold
    return learns, learns & (numbers % 2 == 0)


def _add(one: Tensor, each: Tensor) -> Tensor:
    return (one.to(each.dtype) @ each.flatten(1)).view(each.shape[1:])


def fit_gaussian(z: Tensor, label: Tensor, *, train_mask: Tensor, sums: Sums) -> Gaussian:
    """Give one Gaussian a class, from the rows `learn` (n,) and the sums of this one set of rows.

    Their common covariance is shrunk towards a multiple of the identity as far as Ledoit & Wolf (2004) find best.
    """
    n, d = float(sums.count.sum()), len(sums.square)
    means = sums.total / sums.count.clamp_min(1)[:, None]
    covariance = (sums.square - sums.total.T @ means) / n
    rows = train_mask.nonzero().squeeze(1)
    norms = (z[rows] - means[label[rows]]).square().sum(dim=1)
    level = covariance.diagonal().mean()
    spread = covariance.square().sum() - d * level**2  # |S - m I|^2
    noise = (norms.square().sum() / n - covariance.square().sum()) / n
    shrink = float((noise / spread.clamp_min(1e-12)).clamp(0, 1)) if spread > 0 else 1.0
    shrunk = (1 - shrink) * covariance
    shrunk.diagonal().add_(shrink * level + 1e-4 * level.clamp_min(1e-6))
    prior = (sums.count / n).clamp_min(1e-6).log()  # a class that a probe has not seen is unlikely to it
    return Gaussian(means=means, covariance=shrunk, prior=prior)


def _predict(z: Tensor, theta: Tensor) -> Tensor:
    return torch.addmm(theta[-1], z, theta[:-1])


def _choose(
    gaussian: Gaussian, moments: Tensor, axes: Tensor, *, z: Tensor, logistic: Tensor, label: Tensor
) -> _Choice:
    """Choose between one covariance and the shapes of own ones by rows z (b, d), of logits (b, k) of a logistic model.

    Boundaries stay straight unless the best curve has the less loss by more than chance makes of so many rows.
    """
    straight = _weigh(_predict(z, gaussian.theta()), logistic, label, shape=None)
    curves = [
        _weigh(fit_curve(gaussian, moments, axes, shape=shape).logits(z), logistic, label, shape=shape)
        for shape in shapes_of(axes)
    ]
    if not curves:
        return straight
    curve = curves[first_least([float(choice.losses.mean()) for choice in curves])]
    gain = straight.losses - curve.losses
    by_chance = float(gain.std(correction=0)) / len(gain) ** 0.5
    return curve if float(gain.mean()) > _ERRORS * by_chance else straight


def _weigh(gaussian: Tensor, logistic: Tensor, label: Tensor, *, shape: Shape | None) -> _Choice:
    """Give the sharpness of a Gaussian's logits (b, k), and its part beside the logistic ones, of the least loss."""
    parts = _PARTS if shape is None else _CURVED_PARTS
    alone = [float(functional.cross_entropy(sharp * gaussian, label)) for sharp in _SHARPNESS]
    sharpness = _SHARPNESS[first_least(alone)]
    mixed = [
        functional.cross_entropy((1 - part) * logistic + part * sharpness * gaussian, label, reduction="none")
        for part in parts
    ]
    best = first_least([float(losses.mean()) for losses in mixed])
    return _Choice(losses=mixed[best], sharpness=sharpness, part=parts[best], shape=shape)


def first_least(losses: Sequence[float]) -> int:
    """Return the place of the first loss that is no more than MARGIN above the least; the simplest option is first."""
    return int(np.argmax(np.array(losses) <= min(losses) + MARGIN))
