"""Generalised linear models, many at once: how does one matrix product a step serve them all?

Legend: n rows, d features, k outputs, p models on the same rows, each with its own rows and strength. Each task has
its canonical link, so that the gradient of the loss by the logits is mean - y throughout:

    classification  softmax over k classes, y the label
    multilabel      k independent sigmoids, y 0 or 1; their losses are added
    regression      the logit itself, y a number; half the squared error

The loss is a mean over rows plus strength / 2 * |W|^2 for weights W of features that are standardised over the model's
own rows; the bias is free. In scikit-learn's terms C = 1 / (strength * rows), alpha = strength * rows.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from .design import Design
from .lbfgs import Minimum, minimise

_LOGITS_AT_ONCE = 1 << 20  # 4 MiB of float32: in the cache still when the product reads them (1 MiB costs 15% more)
_LEAST_CHUNK = 512
_ROWS_FOR_VARIANCE = 8_000
_BFLOAT16_ROUNDING = 1e-4  # of a mean loss over a few thousand rows


def fit_glm(
    design: Design,
    answer: Tensor,
    *,
    task: str,
    learn: Tensor,
    strength: Tensor,
    start: Tensor,
    max_steps: int,
    tolerance: float,
    patience: int = 2,
) -> Minimum:
    """Fit p models to `answer`, label (n,) or values (n, k), each on its own rows: learn (n, p) of bools.

    `start` and what is found are theta (p, d + 1, k): weights of the design's rows, then the bias. The first metric of
    the steps is the Hessian where all logits are 0, diagonal on the design's axes.
    """
    problem = GlmProblem(design, answer, task=task, rows=learn, strength=strength)
    return minimise(problem, start, max_steps=max_steps, tolerance=tolerance, patience=patience)


def mean_loss(design: Design, answer: Tensor, *, task: str, rows: Tensor, theta: Tensor) -> Tensor:
    """Give the mean loss (p,) of models theta (p, d + 1, k), each over its own rows (n, p)."""
    share = rows.to(design.dtype) / rows.sum(dim=0)
    return _loss_and_gradient(design, answer, task=task, share=share, theta=theta, with_gradient=False)[0]


class GlmProblem:
    """The losses of p models as functions of theta (p, d + 1, k)."""

    def __init__(self, design: Design, answer: Tensor, *, task: str, rows: Tensor, strength: Tensor) -> None:
        self.design, self.answer, self.task, self.strength = design, answer, task, strength
        self.share = rows.to(design.dtype) / rows.sum(dim=0)  # (n, p): a row's part in each mean
        self.penalty = strength[:, None] * _own_variance(design, self.share)  # (p, d)
        eps = 4 * torch.finfo(design.dtype).eps
        self.rounding = _BFLOAT16_ROUNDING if design.rows.dtype == torch.bfloat16 else eps

    def take(self, which: Tensor) -> GlmProblem:
        """Give the problem of some of the models."""
        part = object.__new__(GlmProblem)
        part.design, part.answer, part.task, part.rounding = self.design, self.answer, self.task, self.rounding
        part.share, part.strength, part.penalty = self.share[:, which], self.strength[which], self.penalty[which]
        return part

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Give the losses (p,) and their gradients (p, d + 1, k)."""
        loss, gradient = _loss_and_gradient(self.design, self.answer, task=self.task, share=self.share, theta=theta)
        pull = self.penalty[:, :, None] * theta[:, :-1]
        gradient[:, :-1] += pull
        return loss + (pull * theta[:, :-1]).sum(dim=(1, 2)) / 2, gradient

    def precondition(self, gradient: Tensor) -> Tensor:
        """Apply the inverse of the Hessian at logits of 0, as if all models had the same rows."""
        # At 0 the covariance of the one-hot answer is 1/k of the identity, but for a shift of all logits alike.
        bend = {"classification": 1 / gradient.shape[2], "multilabel": 1 / 4, "regression": 1.0}[self.task]
        metric = bend * self.design.curvature + self.strength[:, None]
        weight = self.design.turn_back(self.design.turn(gradient[:, :-1]) / metric[:, :, None])
        return torch.cat([weight, gradient[:, -1:] / bend], dim=1)


def _loss_and_gradient(
    design: Design, answer: Tensor, *, task: str, share: Tensor, theta: Tensor, with_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """Give the losses (p,) without penalty, and their gradients (p, d + 1, k)."""
    p, d, k = theta.shape[0], theta.shape[1] - 1, theta.shape[2]
    weight = theta[:, :-1].transpose(0, 1).to(design.rows.dtype)
    still = not bool(theta.any())  # the product is 0, and it is half of what the first step costs
    total, by_weight, by_bias = theta.new_zeros(p), theta.new_zeros(d, p, k), theta.new_zeros(p, k)
    chunk = max(_LEAST_CHUNK, _LOGITS_AT_ONCE // (p * k))
    starts = range(0, len(answer), chunk)
    # A fold's rows are nothing to its own probe; rows come fold by fold, so that many chunks concern the same probes.
    concerned = [tuple(share[start : start + chunk].any(dim=0).nonzero().squeeze(1).tolist()) for start in starts]
    for who, run in groupby(zip(starts, concerned, strict=True), key=lambda pair: pair[1]):
        if not who:
            continue
        some = torch.tensor(who, device=theta.device)
        w, bias = weight[:, some].flatten(1), theta[some, -1]
        pull = theta.new_zeros(d, len(who) * k)
        for start, _ in run:
            x, y, part = (whole[start : start + chunk] for whole in (design.rows, answer, share))
            own, shape = part[:, some], (len(x), len(who), k)
            logits = theta.new_zeros(shape) if still else (x @ w).to(theta.dtype).view(shape)
            loss, residual = loss_and_residual(logits.add_(bias), y, task=task)
            total[some] += (loss * own).sum(dim=0)
            if with_gradient:
                residual *= own[:, :, None]
                by_bias[some] += residual.sum(dim=0)
                pull += x.T @ residual.flatten(1).to(x.dtype)
        by_weight[:, some] += pull.view(d, len(who), k)
    return total, torch.cat([by_weight.transpose(0, 1), by_bias[:, None]], dim=1)


def loss_and_residual(logits: Tensor, answer: Tensor, *, task: str) -> tuple[Tensor, Tensor]:
    """Give the loss (n, p) of logits (n, p, k), which are overwritten, and the residual mean - y, (n, p, k)."""
    if task == "classification":
        at_label = answer[:, None, None].expand(-1, logits.shape[1], 1)
        share = logits.softmax(dim=2)  # its logarithm alone where it is wanted: one exponential instead of two
        at = share.gather(2, at_label)
        loss = -at.clamp_min(torch.finfo(at.dtype).tiny).log().squeeze(2)
        return loss, share.scatter_(2, at_label, at.sub_(1))
    values = answer[:, None, :]
    if task == "multilabel":
        return (functional.softplus(logits) - values * logits).sum(dim=2), logits.sigmoid_().sub_(values)
    residual = logits.sub_(values)
    return residual.square().sum(dim=2) / 2, residual


def _own_variance(design: Design, share: Tensor) -> Tensor:
    """Variance of each standardised feature over each model's own rows, (p, d); 1 where it is constant.

    Of more than twice _ROWS_FOR_VARIANCE rows an even part is enough: it is then known to 2%.
    Rounding leaves 3e-4 of the overall spread in float32; below 1e-3 a feature is constant on those rows.
    """
    every = max(1, len(share) // _ROWS_FOR_VARIANCE)
    rows, share = design.rows[::every], share[::every]
    if every > 1:
        share = share / share.sum(dim=0)
    mean = share.new_zeros(share.shape[1], rows.shape[1])
    square = torch.zeros_like(mean)
    for start in range(0, len(share), 4 * _LEAST_CHUNK):
        x, part = rows[start : start + 4 * _LEAST_CHUNK].to(share.dtype), share[start : start + 4 * _LEAST_CHUNK]
        mean.addmm_(part.T, x)
        square.addmm_(part.T, x.square())
    variance = square - mean.square()
    return torch.where(variance > 1e-6, variance, 1.0)
