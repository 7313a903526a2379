"""Generalised linear models, many fitted at once by L-BFGS.

Legend: n rows, d features, k outputs, q models, each with its own l2 and with the rows of one of p masks, which several
models may share. Each task has its canonical link, so that the gradient of the loss by the logits is always mean - y:

    classification  softmax over k classes, y the label
    multilabel      k independent sigmoids, y 0 or 1; their losses are added
    regression      the logit itself, y a number; half the squared error

The loss is a mean over rows plus l2 / 2 * |W|^2 for weights W of features that are standardised over the model's own
rows; the bias is not penalised. In scikit-learn's terms C = 1 / (l2 * rows), alpha = l2 * rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import torch
from torch import Tensor
from torch.nn import functional

from ..workers import parallel_map
from .design import Design, TorchTarget
from .lbfgs import Minimum, SelectActive, minimize

_MAX_STACKED = 1 << 23  # numbers of all models fitted at once: 32 MiB, of which L-BFGS keeps about thirty
_CHUNK_LOGITS = 1 << 20  # 4 MiB of float32, still in the cache when the product reads them (1 MiB costs 15% more)
_MIN_CHUNK = 512
_MIN_ROWS = 128
_CHUNK_COLUMNS = 1_200  # of logits: their weights have to fit in the cache too (3,600 columns take 1.2 times as long)
_ROWS_FOR_VARIANCE = 8_000
_BFLOAT16_ROUNDING = 1e-4  # of a mean loss over a few thousand rows

Run = list[tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GlmLoss:
    """Mean losses, without penalty, over the rows of p masks; weights (n, p): the weight of each row in each mean.

    relative_l2 (p, d): factors of the penalty of each weight, those of the design; None where they are all 1.
    """

    design: Design
    torch_target: TorchTarget
    weights: Tensor
    relative_l2: Tensor | None

    @classmethod
    def of(cls, design: Design, torch_target: TorchTarget, masks: Tensor) -> GlmLoss:
        """Build the losses over the rows of masks (n, p)."""
        weights = masks.to(design.dtype) / masks.sum(dim=0)
        return cls(design=design, torch_target=torch_target, weights=weights, relative_l2=design.relative_l2)

    def take_masks(self, masks: Tensor) -> GlmLoss:
        """Return the losses over a subset of the masks."""
        relative_l2 = None if self.relative_l2 is None else self.relative_l2[masks]
        return replace(self, weights=self.weights[:, masks], relative_l2=relative_l2)

    def compute(self, theta: Tensor, column: Tensor, *, with_gradient: bool = True) -> tuple[Tensor, Tensor]:
        """Compute losses (q,) and gradients of models theta (q, d + 1, k), model i over the rows of mask column[i]."""
        q, k, p = len(theta), theta.shape[2], self.weights.shape[1]
        if q > p and not bool(theta[:, :-1].any()) and torch.equal(theta, theta[column]):
            # At the start, models with the same rows have the same loss.
            columns_at_zero = torch.arange(p, device=column.device)
            loss, gradient = self.compute(theta[:p], columns_at_zero, with_gradient=with_gradient)
            return loss[column], gradient[column]
        loss, gradient = theta.new_zeros(q), torch.zeros_like(theta)
        max_size = max(_MIN_ROWS, _CHUNK_LOGITS // min(q * k, max(k, _CHUNK_COLUMNS)))
        for run_columns, run in _runs(self.weights, max_size=max_size):
            in_run = torch.isin(column, run_columns).nonzero().squeeze(1)
            for models in torch.split(in_run, max(1, _CHUNK_COLUMNS // k)):
                weights = self.weights[:, column[models]]
                run_loss, run_gradient = self._sum_run(theta[models], weights, run, with_gradient=with_gradient)
                loss[models] += run_loss
                gradient.index_add_(0, models, run_gradient)
        return loss, gradient

    def _sum_run(self, theta: Tensor, weights: Tensor, run: Run, *, with_gradient: bool) -> tuple[Tensor, Tensor]:
        """Sum losses (c,) and gradients (c, d + 1, k) of c models over chunks of rows; weights (n, c) of each model."""
        design, values, task = self.design, self.torch_target.values, self.torch_target.task
        c, d, k = len(theta), theta.shape[1] - 1, theta.shape[2]
        model_weights = design.weights_for_products(theta[:, :-1].transpose(0, 1).flatten(1))
        is_zero = not bool(theta[:, :-1].any())  # skips a product of zeros, half of the cost of the first step
        loss, by_weight, by_bias = theta.new_zeros(c), theta.new_zeros(d, c * k), theta.new_zeros(c, k)

        def sum_chunk(chunk: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
            rows, num_rows = slice(*chunk), chunk[1] - chunk[0]
            product = theta.new_zeros(num_rows, c * k) if is_zero else design.multiply(rows, model_weights)
            logits = product.view(num_rows, c, k).add_(theta[:, -1])
            losses, residual = loss_and_residual(logits, values[rows], task=task)
            total = (losses * weights[rows]).sum(dim=0)
            if not with_gradient:
                return total, by_weight, by_bias
            residual *= weights[rows][:, :, None]
            return total, design.multiply_transposed(rows, residual.flatten(1)), residual.sum(dim=0)

        # Chunks are added in order, so that the sum does not depend on the number of threads.
        for chunk_loss, chunk_by_weight, chunk_by_bias in parallel_map(sum_chunk, run):
            loss += chunk_loss
            if with_gradient:
                by_weight += chunk_by_weight
                by_bias += chunk_by_bias
        return loss, torch.cat([by_weight.view(d, c, k).transpose(0, 1), by_bias[:, None]], dim=1)


def fit_glm(
    loss: GlmLoss,
    l2: Tensor,
    *,
    max_steps: int,
    tolerance: float,
    patience: int = 2,
    select_active: SelectActive | None = None,
) -> Minimum:
    """Fit q models from zero weights, model i with penalty l2[i] on the rows of mask i % p.

    The fitted theta is (q, d + 1, k): weights of the design's features, then the bias, which starts at that of a model
    without features: a very large penalty then gives the class frequencies, however few steps are taken.
    """
    start = l2.new_zeros(len(l2), loss.design.num_features + 1, loss.torch_target.num_outputs)
    start[:, -1] = prior_bias(loss).repeat(len(l2) // loss.weights.shape[1], 1)
    return minimize(
        GlmProblem.of(loss, l2),
        start,
        max_steps=max_steps,
        tolerance=tolerance,
        patience=patience,
        select_active=select_active,
    )


def probe_batches(loss: GlmLoss, *, models_per_probe: int = 1) -> Sequence[Tensor]:
    """Split p probes into batches that are fitted at once, of at most _MAX_STACKED numbers, but at least one probe."""
    size = models_per_probe * (loss.design.num_features + 1) * loss.torch_target.num_outputs
    probes = torch.arange(loss.weights.shape[1], device=loss.weights.device)
    return torch.split(probes, max(1, _MAX_STACKED // size))


def prior_bias(loss: GlmLoss) -> Tensor:
    """Compute the bias (p, k) of models without features: the log frequencies or odds, or the mean, of their targets.

    A class or label without rows, or one that all rows have, counts as half a row.
    """
    weights, torch_target = loss.weights.double().cpu(), loss.torch_target
    values = torch_target.values.cpu()
    half_row = 0.5 / (weights > 0).sum(dim=0).clamp_min(1)[:, None]
    if torch_target.task == "classification":
        frequency = weights.new_zeros(torch_target.num_outputs, weights.shape[1]).index_add_(0, values, weights)
        bias = torch.maximum(frequency.T, half_row).log()
    elif torch_target.task == "multilabel":
        rate = weights.T @ values.double()
        bias = torch.minimum(torch.maximum(rate, half_row), 1 - half_row).logit()
    else:
        bias = weights.T @ values.double()
    return bias.to(loss.weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class GlmProblem:
    """The penalised losses of q models; column (q,) is the mask of each, penalty (q, d) that of each weight.

    axis_penalty (q, d) is the penalty along the design's axes, for the preconditioner.
    """

    loss: GlmLoss
    column: Tensor
    penalty: Tensor
    axis_penalty: Tensor

    @classmethod
    def of(cls, loss: GlmLoss, l2: Tensor) -> GlmProblem:
        """Build the problem in which model i has penalty l2[i] and the rows of mask i % p."""
        column = torch.arange(len(l2), device=loss.weights.device) % loss.weights.shape[1]
        terms = _term_penalty(loss)
        units, axis_units = _own_units(loss, terms), _axis_units(loss, terms)
        return cls(
            loss=loss, column=column, penalty=l2[:, None] * units[column], axis_penalty=l2[:, None] * axis_units[column]
        )

    @property
    def rounding(self) -> float:
        """Relative increase of a loss that rounding alone may cause."""
        design = self.loss.design
        return _BFLOAT16_ROUNDING if design.rows.dtype == torch.bfloat16 else 4 * torch.finfo(design.dtype).eps

    def take(self, models: Tensor) -> GlmProblem:
        """Return the problem of a subset of the models."""
        columns, column = torch.unique(self.column[models], return_inverse=True)
        penalty, axis_penalty = self.penalty[models], self.axis_penalty[models]
        return replace(
            self, loss=self.loss.take_masks(columns), column=column, penalty=penalty, axis_penalty=axis_penalty
        )

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the losses (q,) and their gradients (q, d + 1, k)."""
        loss, gradient = self.loss.compute(theta, self.column)
        penalty_gradient = self.penalty[:, :, None] * theta[:, :-1]
        gradient[:, :-1] += penalty_gradient
        return loss + (penalty_gradient * theta[:, :-1]).sum(dim=(1, 2)) / 2, gradient

    def precondition(self, gradient: Tensor) -> Tensor:
        """Apply the inverse of the Hessian at logits of 0, diagonal on the axes, as if all models had the same rows."""
        # At 0 the covariance of the one-hot target is 1/k of the identity, up to a common shift of all logits.
        by_task = {"classification": 1 / gradient.shape[2], "multilabel": 1 / 4, "regression": 1.0}
        curvature, design = by_task[self.loss.torch_target.task], self.loss.design
        metric = curvature * design.curvature + self.axis_penalty
        weight = design.from_axes(design.to_axes(gradient[:, :-1]) / metric[:, :, None])
        return torch.cat([weight, gradient[:, -1:] / curvature], dim=1)


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


def _own_units(loss: GlmLoss, terms: Tensor) -> Tensor:
    """Compute the factors (p, d) of l2 that give each weight the units of the rows of each mask, and its share."""
    units = torch.cat([_own_variance(loss), terms], dim=1)
    return units if loss.relative_l2 is None else units * loss.relative_l2


def _axis_units(loss: GlmLoss, terms: Tensor) -> Tensor:
    """Compute the factors (p, d) of l2 along the axes: the variance of standardised numbers in a mask is near 1."""
    d = loss.design.rows.shape[1]
    numbers = loss.weights.new_ones(loss.weights.shape[1], d)
    if loss.relative_l2 is not None:
        numbers, terms = loss.relative_l2[:, :d], terms * loss.relative_l2[:, d:]
        if loss.design.basis is not None:
            numbers = numbers @ loss.design.basis.square()
    return torch.cat([numbers, terms], dim=1)


def _term_penalty(loss: GlmLoss) -> Tensor:
    """Compute the factors (p, t) of l2 that give the weights of terms the units of the rows of each mask."""
    design = loss.design
    if design.terms is None or design.term_units is None:
        return loss.weights.new_empty(loss.weights.shape[1], 0)
    return torch.from_numpy(design.term_units.penalty(design.terms, (loss.weights > 0).numpy())).to(loss.weights)


def _own_variance(loss: GlmLoss) -> Tensor:
    """Compute the variance (p, d) of each standardised feature over the rows of each mask; 1 where it is constant.

    Of more than twice _ROWS_FOR_VARIANCE rows an evenly spaced sample is used, which gives it to 2%. Rounding leaves
    3e-4 of the overall spread in float32; below 1e-3 a feature counts as constant on those rows.
    """
    stride = max(1, len(loss.weights) // _ROWS_FOR_VARIANCE)
    rows, weights = loss.design.rows[::stride], loss.weights[::stride]
    if stride > 1:
        weights = weights / weights.sum(dim=0)
    mean = weights.new_zeros(weights.shape[1], rows.shape[1])
    square = torch.zeros_like(mean)
    size = 4 * _MIN_CHUNK
    for x, chunk_weights in zip(torch.split(rows, size), torch.split(weights, size), strict=True):
        values = x.to(weights.dtype)
        mean.addmm_(chunk_weights.T, values)
        square.addmm_(chunk_weights.T, values.square())
    variance = square - mean.square()
    return torch.where(variance > 1e-6, variance, 1.0)
