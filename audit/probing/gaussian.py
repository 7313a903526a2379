"""Gaussian classes: what does a linear classifier gain from where each class lies, while rows are few?

Linear discriminant analysis: one Gaussian a class, all of one covariance. It is linear in the features, as logistic
regression is, and wants fewer rows but truer assumptions (Ng & Jordan 2001). Where each errs elsewhere, the mean of
both is better than either: on 1,440 clips by actor, accuracy .56 and .57 alone, .57 together, loss 1.21, 1.21 and 1.19.

Legend: n rows, d features, k classes, p probes, f folds, c cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .crossing import Crossing, Lesson
from .design import Design
from .glm import fit_glm

MOST_ROWS = 20_000  # above, the logistic model alone is as good, and the sums below cost more than its steps
MOST_FEATURES = 2_048
_SHARPNESS = tuple(np.logspace(-2, 0, 17).tolist())  # 1 / T that are tried: a Gaussian of many features is too sure
_TRIAL_TOLERANCE = 1e-3  # settles which part is best
_PARTS = (0.0, 0.25, 0.5, 0.75)  # of the Gaussian in the mean; 0 leaves it out


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What a Gaussian model is made of, for sets of rows: count (c, k), total (c, k, d), square (c, d, d)."""

    count: Tensor
    total: Tensor
    square: Tensor

    def of(self, cells: Tensor) -> Sums:
        """Add up the cells (p, c) of bools for each probe: count (p, k), total (p, k, d), square (p, d, d)."""
        part = cells.to(self.total.dtype)
        return Sums(
            count=part @ self.count,
            total=torch.einsum("pc,ckd->pkd", part, self.total),
            square=torch.einsum("pc,cde->pde", part, self.square),
        )


def mix_in_gaussian(
    design: Design,
    label: Tensor,
    lesson: Lesson,
    crossings: Sequence[Crossing],
    *,
    theta: Tensor,
    strength: Tensor,
    max_steps: int,
) -> Tensor:
    """Give theta (p, d + 1, k) of logistic models mixed with Gaussian ones of the same rows.

    How sure the Gaussian is taken to be, and its part, are chosen by each probe on the rows it sets aside, by models of
    the rest of its rows.
    """
    z, k = design.rows.to(design.dtype), theta.shape[2]
    seen = torch.from_numpy(lesson.learn & ~lesson.aside).to(z.device)
    trial = fit_glm(
        design,
        label,
        task="classification",
        learn=seen,
        strength=strength * torch.from_numpy(lesson.learn.sum(axis=0)).to(strength) / seen.sum(dim=0),
        start=torch.zeros_like(theta),
        max_steps=max_steps,
        tolerance=_TRIAL_TOLERANCE,
    ).theta
    mixed = theta.clone()
    first = 0
    for crossing in crossings:
        probes = range(first, first + crossing.num_folds)
        cells, sums = _sum_up(z, label, lesson, crossing, num_classes=k)
        for whole, part, probe in zip(
            _fit(z, label, sums.of(cells[0]), torch.from_numpy(lesson.learn[:, list(probes)])),
            _fit(z, label, sums.of(cells[1]), seen[:, list(probes)]),
            probes,
            strict=True,
        ):
            rows = torch.from_numpy(np.flatnonzero(lesson.aside[:, probe])).to(z.device)
            sharpness, share = _choose(_ask(z[rows], part), _ask(z[rows], trial[probe]), label[rows])
            mixed[probe] = (1 - share) * theta[probe] + share * sharpness * whole
        first += crossing.num_folds
    return mixed


def _sum_up(
    z: Tensor, label: Tensor, lesson: Lesson, crossing: Crossing, *, num_classes: int
) -> tuple[tuple[Tensor, Tensor], Sums]:
    """Sum over cells of one fold that are alike to all probes; tell which each probe (f, c) learns from, and tries on.

    The cells are each fold's rows, those of inner fold 0 apart, so that a product of all rows serves every probe.
    """
    f = crossing.num_folds
    cell = crossing.fold[lesson.rows].astype(np.intp) * 2 + (crossing.inner[lesson.rows] == 0)
    fits = crossing.fits[lesson.rows]
    parts = []
    for number in range(2 * f):
        rows = torch.from_numpy(np.flatnonzero((cell == number) & fits)).to(z.device)
        x, one_hot = z[rows], functional.one_hot(label[rows], num_classes).to(z.dtype)
        parts.append((one_hot.sum(dim=0), one_hot.T @ x, x.T @ x))
    sums = Sums(
        **{
            name: torch.stack(each)
            for name, each in zip(("count", "total", "square"), zip(*parts, strict=True), strict=True)
        }
    )
    numbers = np.arange(2 * f)
    learns = numbers[None] // 2 != np.arange(f)[:, None]
    tries = learns & (numbers % 2 == 0)
    return (torch.from_numpy(learns).to(z.device), torch.from_numpy(tries).to(z.device)), sums


def _fit(z: Tensor, label: Tensor, sums: Sums, learn: Tensor) -> list[Tensor]:
    """Give each probe's theta (d + 1, k)."""
    return [
        fit_gaussian(z, label, learn=rows, count=count, total=total, square=square)
        for count, total, square, rows in zip(sums.count, sums.total, sums.square, learn.T, strict=True)
    ]


def fit_gaussian(z: Tensor, label: Tensor, *, learn: Tensor, count: Tensor, total: Tensor, square: Tensor) -> Tensor:
    """Give theta (d + 1, k) of one Gaussian a class, from the rows `learn` (n,) and their sums, as Sums has them.

    Their common covariance is shrunk towards a multiple of the identity as far as Ledoit & Wolf (2004) find best.
    """
    n, d = float(count.sum()), len(square)
    means = total / count.clamp_min(1)[:, None]
    covariance = (square - total.T @ means) / n
    rows = learn.nonzero().squeeze(1)
    norms = (z[rows] - means[label[rows]]).square().sum(dim=1)
    level = covariance.diagonal().mean()
    spread = covariance.square().sum() - d * level**2  # |S - m I|^2
    noise = (norms.square().sum() / n - covariance.square().sum()) / n
    shrink = float((noise / spread.clamp_min(1e-12)).clamp(0, 1)) if spread > 0 else 1.0
    shrunk = (1 - shrink) * covariance
    shrunk.diagonal().add_(shrink * level + 1e-4 * level.clamp_min(1e-6))
    weight = torch.cholesky_solve(means.T, torch.linalg.cholesky(shrunk.double()).to(z.dtype))
    prior = (count / n).clamp_min(1e-6).log()  # a class that a probe has not seen is unlikely to it
    return torch.cat([weight, (prior - (means.T * weight).sum(dim=0) / 2)[None]])


def _ask(z: Tensor, theta: Tensor) -> Tensor:
    return torch.addmm(theta[-1], z, theta[:-1])


def _choose(gaussian: Tensor, logistic: Tensor, label: Tensor) -> tuple[float, float]:
    """Give the sharpness of a Gaussian's logits (b, k), and its part beside the logistic ones, of the least loss."""
    alone = [float(functional.cross_entropy(sharp * gaussian, label)) for sharp in _SHARPNESS]
    sharpness = _SHARPNESS[int(np.argmin(alone))]
    mixed = [
        float(functional.cross_entropy((1 - part) * logistic + part * sharpness * gaussian, label)) for part in _PARTS
    ]
    return sharpness, _PARTS[int(np.argmin(mixed))]
