"""Generalised linear models, many fitted at once.

Legend: n rows, d features, k outputs, q models, each with its own strength and with the rows of one of p masks, which
many may share. Each task has its canonical link, so that the gradient of the loss by the logits is mean - y throughout:

    classification  softmax over k classes, y the label
    multilabel      k independent sigmoids, y 0 or 1; their losses are added
    regression      the logit itself, y a number; half the squared error

The loss is a mean over rows plus strength / 2 * |W|^2 for weights W of features that are standardised over the model's
own rows; the bias is free. In scikit-learn's terms C = 1 / (strength * rows), alpha = strength * rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
from torch import Tensor
from torch.nn import functional

from ..threads import parallel_map
from .cross_fit import FitRows
from .design import Design
from .lbfgs import Judge, Minimum, minimize
from .targets import TorchTarget

_LOGITS_AT_ONCE = 1 << 20  # 4 MiB of float32: in the cache still when the product reads them (1 MiB costs 15% more)
_LEAST_CHUNK = 512
_LEAST_ROWS = 128
_COLUMNS_AT_ONCE = 1_200  # of logits: their weights are to stay in the cache as well (3,600 cost 1.2 times as much)
_ROWS_FOR_VARIANCE = 8_000
_BFLOAT16_ROUNDING = 1e-4  # of a mean loss over a few thousand rows


def fit_glm(
    design: Design,
    torch_target: Tensor,
    *,
    task: str,
    train_mask: Tensor,
    l2: Tensor,
    start: Tensor,
    max_steps: int,
    tolerance: float,
    patience: int = 2,
    judge: Judge | None = None,
) -> Minimum:
    """Fit q models to `answer`, label (n,) or values (n, k), model i on the rows of column i % p of learn (n, p).

    `start` and what is found are theta (q, d + 1, k): weights of the design's rows, then the bias. The first metric of
    the steps is the Hessian where all logits are 0, diagonal on the design's axes.
    """
    problem = GlmProblem(design, torch_target, task=task, rows=train_mask, l2=l2)
    return minimize(problem, start, max_steps=max_steps, tolerance=tolerance, patience=patience, judge=judge)


def mean_loss(design: Design, torch_target: Tensor, *, task: str, rows: Tensor, whose: Tensor, theta: Tensor) -> Tensor:
    """Give the mean loss (q,) of models theta (q, d + 1, k), model i over the rows of column whose[i] of (n, p)."""
    share = rows.to(design.dtype) / rows.sum(dim=0)
    return _loss_and_gradient(
        design, torch_target, task=task, share=share, whose=whose, theta=theta, with_gradient=False
    )[0]


def evaluate_rows(
    design: Design, torch_target: Tensor, *, task: str, train_mask: Tensor, theta: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Compute the losses (p,) of models theta (p, d + 1, k) and their gradients, summed over the first rows alone."""
    share = (train_mask.to(design.dtype) / train_mask.sum(dim=0))[:num_rows]
    whose = torch.arange(len(theta), device=theta.device)
    loss, gradient = _loss_and_gradient(design, torch_target, task=task, share=share, whose=whose, theta=theta)
    return loss.cpu(), gradient  # the copy waits for a GPU


class GlmProblem:
    """The losses of q models as functions of theta (q, d + 1, k); any number of them may learn from the same rows."""

    def __init__(self, design: Design, torch_target: Tensor, *, task: str, rows: Tensor, l2: Tensor) -> None:
        self.design, self.torch_target, self.task, self.l2 = design, torch_target, task, l2
        self.share = rows.to(design.dtype) / rows.sum(dim=0)  # (n, p): a row's part in each mean
        self.whose = torch.arange(len(l2), device=rows.device) % rows.shape[1]  # (q,): the column of each model
        self.penalty = l2[:, None] * _own_variance(design, self.share)[self.whose]  # (q, d)
        eps = 4 * torch.finfo(design.dtype).eps
        self.rounding = _BFLOAT16_ROUNDING if design.rows.dtype == torch.bfloat16 else eps

    def take(self, which: Tensor) -> GlmProblem:
        """Give the problem of some of the models."""
        part = object.__new__(GlmProblem)
        part.design, part.torch_target, part.task, part.rounding = (
            self.design,
            self.torch_target,
            self.task,
            self.rounding,
        )
        used, part.whose = torch.unique(self.whose[which], return_inverse=True)
        part.share, part.l2, part.penalty = self.share[:, used], self.l2[which], self.penalty[which]
        return part

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Give the losses (q,) and their gradients (q, d + 1, k)."""
        loss, gradient = _loss_and_gradient(
            self.design, self.torch_target, task=self.task, share=self.share, whose=self.whose, theta=theta
        )
        pull = self.penalty[:, :, None] * theta[:, :-1]
        gradient[:, :-1] += pull
        return loss + (pull * theta[:, :-1]).sum(dim=(1, 2)) / 2, gradient

    def precondition(self, gradient: Tensor) -> Tensor:
        """Apply the inverse of the Hessian at logits of 0, as if all models had the same rows."""
        # At 0 the covariance of the one-hot answer is 1/k of the identity, but for a shift of all logits alike.
        bend = {"classification": 1 / gradient.shape[2], "multilabel": 1 / 4, "regression": 1.0}[self.task]
        metric = bend * self.design.curvature + self.l2[:, None]
        weight = self.design.turn_back(self.design.turn(gradient[:, :-1]) / metric[:, :, None])
        return torch.cat([weight, gradient[:, -1:] / bend], dim=1)


def _loss_and_gradient(
    design: Design,
    torch_target: Tensor,
    *,
    task: str,
    share: Tensor,
    whose: Tensor,
    theta: Tensor,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Give the losses (q,) without penalty, and their gradients (q, d + 1, k)."""
    q, k, p = len(theta), theta.shape[2], share.shape[1]
    if q > p and not bool(theta.any()):  # at 0 all that learn from the same rows are the same
        first = theta.new_zeros(p, *theta.shape[1:])
        each = torch.arange(p, device=whose.device)
        loss, gradient = _loss_and_gradient(
            design, torch_target, task=task, share=share, whose=each, theta=first, with_gradient=with_gradient
        )
        return loss[whose], gradient[whose]
    loss, gradient = theta.new_zeros(q), torch.zeros_like(theta)
    most = max(_LEAST_ROWS, _LOGITS_AT_ONCE // min(q * k, max(k, _COLUMNS_AT_ONCE)))
    for columns, run in _runs(share, most=most):
        for some in torch.split(torch.isin(whose, columns).nonzero().squeeze(1), max(1, _COLUMNS_AT_ONCE // k)):
            more, pull = _sum_run(
                design,
                torch_target,
                task=task,
                share=share[:, whose[some]],
                theta=theta[some],
                run=run,
                with_gradient=with_gradient,
            )
            loss[some] += more
            gradient.index_add_(0, some, pull)
    return loss, gradient


Run = list[tuple[int, int]]


def _sum_run(
    design: Design, torch_target: Tensor, *, task: str, share: Tensor, theta: Tensor, run: Run, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Sum losses (c,) and gradients (c, d + 1, k) of models theta over chunks of rows; share (n, c) is each model's."""
    c, d, k = len(theta), theta.shape[1] - 1, theta.shape[2]
    weight = theta[:, :-1].to(design.rows.dtype).transpose(0, 1).flatten(1)
    still = not bool(theta.any())  # the product is 0, and it is half of what the first step costs
    loss, by_weight, by_bias = theta.new_zeros(c), theta.new_zeros(d, c * k), theta.new_zeros(c, k)

    def sum_chunk(chunk: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        x, own = design.rows[slice(*chunk)], share[slice(*chunk)]
        logits = theta.new_zeros(len(x), c, k) if still else (x @ weight).to(theta.dtype).view(len(x), c, k)
        losses, residual = loss_and_residual(logits.add_(theta[:, -1]), torch_target[slice(*chunk)], task=task)
        total = (losses * own).sum(dim=0)
        if not with_gradient:
            return total, by_weight, by_bias
        residual *= own[:, :, None]
        return total, x.T @ residual.flatten(1).to(x.dtype), residual.sum(dim=0)

    # They are added in their order: the sum is the same in any number of threads.
    for more, pull, push in parallel_map(sum_chunk, run):
        loss += more
        if with_gradient:
            by_weight += pull
            by_bias += push
    return loss, torch.cat([by_weight.view(d, c, k).transpose(0, 1), by_bias[:, None]], dim=1)


def _runs(share: Tensor, *, most: int) -> Iterator[tuple[Tensor, Run]]:
    """Give runs of rows that concern the same columns of share (n, p): the columns, and the rows in even chunks.

    A fold's rows are nothing to its own probe. They come fold by fold, and where that makes few, long pieces, chunks
    end where folds do: of a probe's rows none is then multiplied in vain.
    """
    used = share > 0
    changes = used[1:] != used[:-1]
    seldom = changes.sum(dim=0) * _LEAST_CHUNK <= len(share)
    cuts = (changes[:, seldom].any(dim=1).nonzero().squeeze(1) + 1).tolist()
    ends = [*(cuts if (len(cuts) + 1) * _LEAST_CHUNK <= len(share) else []), len(share)]
    chunks: list[tuple[int, int]] = []
    for start, end in pairwise([0, *ends]):
        size = -(-(end - start) // -(-(end - start) // most))
        chunks += [(first, min(end, first + size)) for first in range(start, end, size)]
    concerned = [tuple(used[start:end].any(dim=0).nonzero().squeeze(1).tolist()) for start, end in chunks]
    for columns, run in groupby(zip(chunks, concerned, strict=True), key=lambda pair: pair[1]):
        if columns:
            yield torch.tensor(columns, device=share.device), [chunk for chunk, _ in run]


def loss_and_residual(logits: Tensor, torch_target: Tensor, *, task: str) -> tuple[Tensor, Tensor]:
    """Give the loss (n, p) of logits (n, p, k), which are overwritten, and the residual mean - y, (n, p, k)."""
    if task == "classification":
        at_label = torch_target[:, None, None].expand(-1, logits.shape[1], 1)
        share = logits.softmax(dim=2)  # its logarithm alone where it is wanted: one exponential instead of two
        at = share.gather(2, at_label)
        loss = -at.clamp_min(torch.finfo(at.dtype).tiny).log().squeeze(2)
        return loss, share.scatter_(2, at_label, at.sub_(1))
    values = torch_target[:, None, :]
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


log = logging.getLogger("mmaudit")

_TYPICAL_STEPS = 10  # of the fits measured; a hard one takes some hundreds
_MAX_SECONDS = 60.0  # a fit whose typical number of steps takes longer is announced
_MIN_LOGITS = 1 << 26  # rows x probes x outputs; below, ten steps take a few seconds, and nothing is measured
_TIMED_LOGITS = 1 << 23  # some hundredths of a second, unless a few rows have more
_MIN_TIMED_ROWS = 128


def log_estimate(design: Design, torch_target: TorchTarget, fit_rows: FitRows, *, max_steps: int) -> None:
    """Log how long a step takes and how many there may be, with the settings that bound it, if it may be long."""
    num_rows, num_probes = len(fit_rows.rows), int(fit_rows.train_mask.shape[1])
    if num_rows * num_probes * torch_target.num_outputs < _MIN_LOGITS:
        return
    seconds = step_seconds(design, torch_target, fit_rows)
    steps = min(_TYPICAL_STEPS, max_steps)
    if seconds * steps > _MAX_SECONDS:
        log.info(
            "a fit of %d probes to %d rows, %d outputs and %d features: %.1f s a step, %d steps %s, at most %d steps "
            "%s; bounded by --set probe.max_steps=N, less with --repeats 1, --set probe.folds=2, "
            "--set probe.most_rows=N, --set probe.joint=false or --set probe.control=false",
            num_probes,
            num_rows,
            torch_target.num_outputs,
            design.rows.shape[1],
            seconds,
            steps,
            _duration(steps * seconds),
            max_steps,
            _duration(max_steps * seconds),
        )


def step_seconds(design: Design, torch_target: TorchTarget, fit_rows: FitRows) -> float:
    """Return the seconds that loss and gradient of all probes take, from the faster of two runs over a few rows."""
    num_rows, num_probes = len(fit_rows.rows), int(fit_rows.train_mask.shape[1])
    few = min(num_rows, max(_MIN_TIMED_ROWS, _TIMED_LOGITS // (num_probes * torch_target.num_outputs)))
    train_mask = torch.from_numpy(fit_rows.train_mask).to(design.rows.device)
    theta = design.curvature.new_full((num_probes, design.rows.shape[1] + 1, torch_target.num_outputs), 1e-3)
    seconds = list[float]()
    for _ in range(2):
        start = time.perf_counter()
        evaluate_rows(
            design, torch_target.found, task=torch_target.task, train_mask=train_mask, theta=theta, num_rows=few
        )
        seconds.append(time.perf_counter() - start)
    return min(seconds) * (num_rows / few)


def _duration(seconds: float) -> str:
    """Return a duration in words: `40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3_600:.1f} h"
