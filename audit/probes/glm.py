"""Generalised linear models, many fitted at once.

Legend: n rows, d features, k outputs, q models, each with its own l2 and with the rows of one of p masks, which several
models may share. Each task has its canonical link, so that the gradient of the loss by the logits is always mean - y:

    classification  softmax over k classes, y the label
    multilabel      k independent sigmoids, y 0 or 1; their losses are added
    regression      the logit itself, y a number; half the squared error

The loss is a mean over rows plus l2 / 2 * |W|^2 for weights W of features that are standardised over the model's own
rows; the bias is not penalised. In scikit-learn's terms C = 1 / (l2 * rows), alpha = l2 * rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
from torch import Tensor
from torch.nn import functional

from ..workers import parallel_map
from .cross_fit import FitRows
from .design import Design, TorchTarget
from .lbfgs import Minimum, SelectActive, minimize

_CHUNK_LOGITS = 1 << 20  # 4 MiB of float32, still in the cache when the product reads them (1 MiB costs 15% more)
_MIN_CHUNK = 512
_MIN_ROWS = 128
_CHUNK_COLUMNS = 1_200  # of logits: their weights have to fit in the cache too (3,600 columns take 1.2 times as long)
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
    select_active: SelectActive | None = None,
) -> Minimum:
    """Fit q models to label (n,) or values (n, k), model i on the rows of column i % p of train_mask (n, p).

    `start` and the fitted theta are (q, d + 1, k): weights of the design's features, then the bias. The initial Hessian
    estimate is the Hessian at logits of 0, diagonal on the design's axes.
    """
    problem = GlmProblem(design, torch_target, task=task, rows=train_mask, l2=l2)
    return minimize(
        problem, start, max_steps=max_steps, tolerance=tolerance, patience=patience, select_active=select_active
    )


def mean_loss(
    design: Design, torch_target: Tensor, *, task: str, rows: Tensor, column: Tensor, theta: Tensor
) -> Tensor:
    """Compute the mean loss (q,) of models theta (q, d + 1, k), model i over the rows of column[i] of rows (n, p)."""
    weights = rows.to(design.dtype) / rows.sum(dim=0)
    return _loss_and_gradient(
        design, torch_target, task=task, weights=weights, column=column, theta=theta, with_gradient=False
    )[0]


def evaluate_rows(
    design: Design, torch_target: Tensor, *, task: str, train_mask: Tensor, theta: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Compute losses (p,) and gradients of models theta (p, d + 1, k), summed over the first num_rows rows only."""
    weights = (train_mask.to(design.dtype) / train_mask.sum(dim=0))[:num_rows]
    column = torch.arange(len(theta), device=theta.device)
    loss, gradient = _loss_and_gradient(design, torch_target, task=task, weights=weights, column=column, theta=theta)
    return loss.cpu(), gradient  # the copy synchronises with a GPU


class GlmProblem:
    """The losses of q models as functions of theta (q, d + 1, k); several models may train on the same rows."""

    def __init__(self, design: Design, torch_target: Tensor, *, task: str, rows: Tensor, l2: Tensor) -> None:
        self.design, self.torch_target, self.task, self.l2 = design, torch_target, task, l2
        self.weights = rows.to(design.dtype) / rows.sum(dim=0)  # (n, p): weight of a row in each mean
        self.column = torch.arange(len(l2), device=rows.device) % rows.shape[1]  # (q,): the column of each model
        self.penalty = l2[:, None] * _own_variance(design, self.weights)[self.column]  # (q, d)
        eps = 4 * torch.finfo(design.dtype).eps
        self.rounding = _BFLOAT16_ROUNDING if design.rows.dtype == torch.bfloat16 else eps

    def take(self, models: Tensor) -> GlmProblem:
        """Return the problem of a subset of the models."""
        subset = object.__new__(GlmProblem)
        subset.design, subset.torch_target, subset.task, subset.rounding = (
            self.design,
            self.torch_target,
            self.task,
            self.rounding,
        )
        columns, subset.column = torch.unique(self.column[models], return_inverse=True)
        subset.weights, subset.l2, subset.penalty = (self.weights[:, columns], self.l2[models], self.penalty[models])
        return subset

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the losses (q,) and their gradients (q, d + 1, k)."""
        loss, gradient = _loss_and_gradient(
            self.design, self.torch_target, task=self.task, weights=self.weights, column=self.column, theta=theta
        )
        penalty_gradient = self.penalty[:, :, None] * theta[:, :-1]
        gradient[:, :-1] += penalty_gradient
        return loss + (penalty_gradient * theta[:, :-1]).sum(dim=(1, 2)) / 2, gradient

    def precondition(self, gradient: Tensor) -> Tensor:
        """Apply the inverse of the Hessian at logits of 0, as if all models had the same rows."""
        # At 0 the covariance of the one-hot target is 1/k of the identity, up to a common shift of all logits.
        curvature = {"classification": 1 / gradient.shape[2], "multilabel": 1 / 4, "regression": 1.0}[self.task]
        metric = curvature * self.design.curvature + self.l2[:, None]
        weight = self.design.from_axes(self.design.to_axes(gradient[:, :-1]) / metric[:, :, None])
        return torch.cat([weight, gradient[:, -1:] / curvature], dim=1)


def _loss_and_gradient(
    design: Design,
    torch_target: Tensor,
    *,
    task: str,
    weights: Tensor,
    column: Tensor,
    theta: Tensor,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute the losses (q,) without penalty, and their gradients (q, d + 1, k)."""
    q, k, p = len(theta), theta.shape[2], weights.shape[1]
    if q > p and not bool(theta.any()):  # at 0, models with the same rows have the same loss
        zero_theta = theta.new_zeros(p, *theta.shape[1:])
        columns_at_zero = torch.arange(p, device=column.device)
        loss, gradient = _loss_and_gradient(
            design,
            torch_target,
            task=task,
            weights=weights,
            column=columns_at_zero,
            theta=zero_theta,
            with_gradient=with_gradient,
        )
        return loss[column], gradient[column]
    loss, gradient = theta.new_zeros(q), torch.zeros_like(theta)
    max_size = max(_MIN_ROWS, _CHUNK_LOGITS // min(q * k, max(k, _CHUNK_COLUMNS)))
    for run_columns, run in _runs(weights, max_size=max_size):
        for models in torch.split(torch.isin(column, run_columns).nonzero().squeeze(1), max(1, _CHUNK_COLUMNS // k)):
            run_loss, run_gradient = _sum_run(
                design,
                torch_target,
                task=task,
                weights=weights[:, column[models]],
                theta=theta[models],
                run=run,
                with_gradient=with_gradient,
            )
            loss[models] += run_loss
            gradient.index_add_(0, models, run_gradient)
    return loss, gradient


Run = list[tuple[int, int]]


def _sum_run(
    design: Design, torch_target: Tensor, *, task: str, weights: Tensor, theta: Tensor, run: Run, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Sum losses (c,) and gradients (c, d + 1, k) of c models over chunks of rows; weights (n, c) of each model."""
    c, d, k = len(theta), theta.shape[1] - 1, theta.shape[2]
    weight = theta[:, :-1].to(design.rows.dtype).transpose(0, 1).flatten(1)
    is_zero = not bool(theta.any())  # skips a product of zeros, half of the cost of the first step
    loss, by_weight, by_bias = theta.new_zeros(c), theta.new_zeros(d, c * k), theta.new_zeros(c, k)

    def sum_chunk(chunk: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        x, chunk_weights = design.rows[slice(*chunk)], weights[slice(*chunk)]
        logits = theta.new_zeros(len(x), c, k) if is_zero else (x @ weight).to(theta.dtype).view(len(x), c, k)
        losses, residual = loss_and_residual(logits.add_(theta[:, -1]), torch_target[slice(*chunk)], task=task)
        total = (losses * chunk_weights).sum(dim=0)
        if not with_gradient:
            return total, by_weight, by_bias
        residual *= chunk_weights[:, :, None]
        return total, x.T @ residual.flatten(1).to(x.dtype), residual.sum(dim=0)

    # Chunks are added in order, so that the sum does not depend on the number of threads.
    for chunk_loss, chunk_by_weight, chunk_by_bias in parallel_map(sum_chunk, run):
        loss += chunk_loss
        if with_gradient:
            by_weight += chunk_by_weight
            by_bias += chunk_by_bias
    return loss, torch.cat([by_weight.view(d, c, k).transpose(0, 1), by_bias[:, None]], dim=1)


def _runs(weights: Tensor, *, max_size: int) -> Iterator[tuple[Tensor, Run]]:
    """Yield runs of rows used by the same columns of weights (n, p): the columns, and the rows in even chunks.

    The rows of a fold are not used by its own probe. Rows are sorted by fold; where that gives few, long pieces, chunks
    end where folds end, so that no probe multiplies rows that it does not use.
    """
    used = weights > 0
    changes = used[1:] != used[:-1]
    few_changes = changes.sum(dim=0) * _MIN_CHUNK <= len(weights)
    boundaries = (changes[:, few_changes].any(dim=1).nonzero().squeeze(1) + 1).tolist()
    ends = [*(boundaries if (len(boundaries) + 1) * _MIN_CHUNK <= len(weights) else []), len(weights)]
    chunks: list[tuple[int, int]] = []
    for start, end in pairwise([0, *ends]):
        size = -(-(end - start) // -(-(end - start) // max_size))
        chunks += [(first, min(end, first + size)) for first in range(start, end, size)]
    columns_of_chunk = [tuple(used[start:end].any(dim=0).nonzero().squeeze(1).tolist()) for start, end in chunks]
    for columns, run in groupby(zip(chunks, columns_of_chunk, strict=True), key=lambda pair: pair[1]):
        if columns:
            yield torch.tensor(columns, device=weights.device), [chunk for chunk, _ in run]


def loss_and_residual(logits: Tensor, torch_target: Tensor, *, task: str) -> tuple[Tensor, Tensor]:
    """Compute the loss (n, p) of logits (n, p, k), which are overwritten, and the residual mean - y, (n, p, k)."""
    if task == "classification":
        label_index = torch_target[:, None, None].expand(-1, logits.shape[1], 1)
        probability = logits.softmax(dim=2)  # the logarithm is taken at the label only: one exponential, not two
        label_probability = probability.gather(2, label_index)
        loss = -label_probability.clamp_min(torch.finfo(label_probability.dtype).tiny).log().squeeze(2)
        return loss, probability.scatter_(2, label_index, label_probability.sub_(1))
    values = torch_target[:, None, :]
    if task == "multilabel":
        return (functional.softplus(logits) - values * logits).sum(dim=2), logits.sigmoid_().sub_(values)
    residual = logits.sub_(values)
    return residual.square().sum(dim=2) / 2, residual


def _own_variance(design: Design, weights: Tensor) -> Tensor:
    """Compute the variance (p, d) of each standardised feature over the rows of each mask; 1 where it is constant.

    Of more than twice _ROWS_FOR_VARIANCE rows an evenly spaced sample is used, which gives it to 2%. Rounding leaves
    3e-4 of the overall spread in float32; below 1e-3 a feature counts as constant on those rows.
    """
    stride = max(1, len(weights) // _ROWS_FOR_VARIANCE)
    rows, weights = design.rows[::stride], weights[::stride]
    if stride > 1:
        weights = weights / weights.sum(dim=0)
    mean = weights.new_zeros(weights.shape[1], rows.shape[1])
    square = torch.zeros_like(mean)
    for start in range(0, len(weights), 4 * _MIN_CHUNK):
        x, chunk_weights = (
            rows[start : start + 4 * _MIN_CHUNK].to(weights.dtype),
            weights[start : start + 4 * _MIN_CHUNK],
        )
        mean.addmm_(chunk_weights.T, x)
        square.addmm_(chunk_weights.T, x.square())
    variance = square - mean.square()
    return torch.where(variance > 1e-6, variance, 1.0)


log = logging.getLogger("mmaudit")

_TYPICAL_STEPS = 10  # of the fits measured; a hard one takes a few hundred
_MAX_SECONDS = 60.0  # a fit whose typical number of steps takes longer is logged
_MIN_LOGITS = 1 << 26  # rows x probes x outputs; below, ten steps take a few seconds, and nothing is measured
_TIMED_LOGITS = 1 << 23  # a few hundredths of a second, unless _MIN_TIMED_ROWS rows have more
_MIN_TIMED_ROWS = 128


def log_estimate(design: Design, torch_target: TorchTarget, fit_rows: FitRows, *, max_steps: int) -> None:
    """Log the seconds per step, the number of steps and the settings that reduce them, if a fit may take long."""
    num_rows, num_probes = len(fit_rows.rows), int(fit_rows.train_mask.shape[1])
    if num_rows * num_probes * torch_target.num_outputs < _MIN_LOGITS:
        return
    seconds = step_seconds(design, torch_target, fit_rows)
    steps = min(_TYPICAL_STEPS, max_steps)
    if seconds * steps > _MAX_SECONDS:
        log.info(
            "fitting %d probes to %d rows, %d outputs and %d features: %.1f s per step, %d steps %s, at most %d steps "
            "%s; limit it with --set probe.max_steps=N, or shorten it with --repeats 1, --set probe.folds=2, "
            "--set probe.max_rows=N, --set probe.joint=false or --set probe.control=false",
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
    """Measure the seconds of one loss and gradient of all probes: the faster of two runs over a few rows, scaled up."""
    num_rows, num_probes = len(fit_rows.rows), int(fit_rows.train_mask.shape[1])
    num_timed = min(num_rows, max(_MIN_TIMED_ROWS, _TIMED_LOGITS // (num_probes * torch_target.num_outputs)))
    train_mask = torch.from_numpy(fit_rows.train_mask).to(design.rows.device)
    theta = design.curvature.new_full((num_probes, design.rows.shape[1] + 1, torch_target.num_outputs), 1e-3)
    seconds = list[float]()
    for _ in range(2):
        start = time.perf_counter()
        evaluate_rows(
            design, torch_target.values, task=torch_target.task, train_mask=train_mask, theta=theta, num_rows=num_timed
        )
        seconds.append(time.perf_counter() - start)
    return min(seconds) * (num_rows / num_timed)


def _duration(seconds: float) -> str:
    """Format a duration: `40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3_600:.1f} h"
