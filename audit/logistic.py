"""Multinomial logistic regressions, many at once: how does one matrix product a step serve them all?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_MEMORY = 10  # pairs of steps and gradient changes that L-BFGS remembers
_HALVINGS = 20
_LOGITS_AT_ONCE = 1 << 20  # 4 MiB of float32: the residuals are still in the cache when the product reads them
_WHITEN_UP_TO = 1_024  # features; above, an eigendecomposition costs more than the steps it saves


@dataclass(frozen=True, slots=True, kw_only=True)
class Logistic:
    """p fitted regressions: logits of regression j are `x @ weight[j] + bias[j]`; weight (p, d, k), bias (p, k)."""

    weight: Tensor
    bias: Tensor
    num_steps: int

    def logits(self, x: Tensor, which: Tensor) -> Tensor:
        """Give the logits (n, k) of each row of x (n, d) under its own regression `which` (n,) in [0, p)."""
        out = torch.empty(len(x), self.bias.shape[1], dtype=x.dtype, device=x.device)
        for index in range(len(self.bias)):
            rows = which == index
            out[rows] = x[rows] @ self.weight[index] + self.bias[index]
        return out


def fit_logistic(
    x: Tensor,
    label: Tensor,
    *,
    mask: Tensor,
    strength: Tensor,
    num_classes: int,
    max_steps: int,
    tolerance: float,
) -> Logistic:
    """Fit p regressions on the same x (n, d) and label (n,), each on its own rows and with its own strength.

    mask (n, p) bool: the rows regression j learns from. strength (p,): the factor of ||W||^2 / 2 beside the MEAN cross
    entropy, so that strength = 1 / (C n) in scikit-learn's terms; the bias is free, and W counts in units where each
    feature has mean 0 and standard deviation 1 over the regression's own rows. The model is
    scikit-learn's `make_pipeline(StandardScaler(), LogisticRegression(C))`.

    Batched L-BFGS. Its first metric is Böhning's bound of the Hessian, 1/2 X'X + strength (Böhning 1992), inverted in
    the eigenbasis of X'X. A regression stops when a step lowers its loss by less than `tolerance`, relatively.
    """
    problem = _Problem(x, label, mask=mask, strength=strength, num_classes=num_classes)
    theta = torch.zeros(mask.shape[1], x.shape[1] + 1, num_classes, dtype=x.dtype, device=x.device)
    loss, gradient = problem.loss_and_gradient(theta)
    history: list[tuple[Tensor, Tensor]] = []
    active = torch.ones_like(loss, dtype=torch.bool)
    steps = 0
    while steps < max_steps and bool(active.any()):
        steps += 1
        direction = -_two_loops(gradient, history, problem.metric) * active[:, None, None]
        theta_next, loss_next, gradient_next = problem.search(theta, loss, gradient, direction)
        active = active & (loss - loss_next > tolerance * (1 + loss.abs()))
        history = [*history[1 - _MEMORY :], (theta_next - theta, gradient_next - gradient)]
        theta, loss, gradient = theta_next, loss_next, gradient_next
    weight, bias = problem.on_raw_features(theta)
    return Logistic(weight=weight, bias=bias, num_steps=steps)


class _Problem:
    """p losses over theta (p, d + 1, k): weights of the standardised features in an eigenbasis, then the bias."""

    def __init__(self, x: Tensor, label: Tensor, *, mask: Tensor, strength: Tensor, num_classes: int) -> None:
        self.x, self.label, self.strength, self.num_classes = x, label, strength, num_classes
        self.share = mask.to(x.dtype) / mask.sum(dim=0)  # (n, p): a row's part in each mean
        self.mean, self.scale, self.basis, curvature = _standardise(x, self.share)
        bias_curvature = torch.full_like(curvature[:, :1], 0.5)
        # (p, d + 1, 1): Böhning's bound, diagonal in the eigenbasis
        self.metric = torch.cat([curvature / 2 + strength[:, None], bias_curvature], dim=1)[:, :, None]

    def on_raw_features(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Give weight (p, d, k) and bias (p, k) that act on x itself."""
        weight = (self.basis @ theta[:, :-1] if self.basis is not None else theta[:, :-1]) / self.scale[:, :, None]
        return weight, theta[:, -1] - (self.mean[:, :, None] * weight).sum(dim=1)

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Give the losses (p,) and their gradients (p, d + 1, k)."""
        weight, bias = self.on_raw_features(theta)
        p, d, k = weight.shape
        flat_weight = weight.permute(1, 0, 2).reshape(d, p * k)
        entropy = torch.zeros(p, dtype=theta.dtype, device=theta.device)
        raw = torch.zeros(d, p * k, dtype=theta.dtype, device=theta.device)
        total = torch.zeros(p, k, dtype=theta.dtype, device=theta.device)
        chunk = max(256, _LOGITS_AT_ONCE // (p * k))
        for start in range(0, len(self.x), chunk):
            x, label, share = (whole[start : start + chunk] for whole in (self.x, self.label, self.share))
            logits = torch.addmm(bias.reshape(-1), x, flat_weight).view(len(x), p, k).log_softmax(dim=2)
            at_label = label[:, None, None].expand(-1, p, 1)
            entropy -= (logits.gather(2, at_label).squeeze(2) * share).sum(dim=0)
            residual = logits.exp_().scatter_add_(2, at_label, torch.full_like(logits[:, :, :1], -1.0))
            residual *= share[:, :, None]
            total += residual.sum(dim=0)
            raw.addmm_(x.T, residual.view(len(x), p * k))
        by_feature = raw.view(d, p, k).permute(1, 0, 2) - self.mean[:, :, None] * total[:, None, :]
        by_feature = by_feature / self.scale[:, :, None]
        gradient = self.basis.transpose(1, 2) @ by_feature if self.basis is not None else by_feature
        ridge = self.strength[:, None, None] * theta[:, :-1]
        loss = entropy + (ridge * theta[:, :-1]).sum(dim=(1, 2)) / 2
        return loss, torch.cat([gradient + ridge, total[:, None, :]], dim=1)

    def search(self, theta: Tensor, loss: Tensor, gradient: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Go along each direction, halving the step until the loss falls enough (Armijo); stand still if it never does.

        Rounding may hide a gain of 1e-7 of the loss: so much it may rise.
        """
        slope = (gradient * direction).sum(dim=(1, 2))
        length = torch.ones_like(loss)
        for _ in range(_HALVINGS):
            theta_next = theta + length[:, None, None] * direction
            loss_next, gradient_next = self.loss_and_gradient(theta_next)
            short = loss_next > loss + 1e-4 * length * slope + 1e-7 * loss.abs()
            if not short.any():
                return theta_next, loss_next, gradient_next
            length = torch.where(short, length / 2, length)
        length = torch.where(short, 0.0, length)
        theta_next = theta + length[:, None, None] * direction
        return theta_next, *self.loss_and_gradient(theta_next)


def _standardise(x: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Give mean (p, d), scale (p, d), the eigenbasis (p, d, d) of the standardised X'X / n, and its values (p, d).

    Regressions on the same rows share one decomposition. Too many features: no basis, and curvature 1 throughout.
    """
    mean = share.T @ x
    centre = x.mean(dim=0)
    scale = (share.T @ (x - centre).square() - (mean - centre).square()).clamp_min(0).sqrt()
    # Rounding leaves 3e-4 of the overall spread in float32; below that a feature is constant on these rows.
    spread = (x - centre).square().mean(dim=0).sqrt()
    scale = torch.where(scale > 1e-3 * spread, scale, torch.where(spread > 0, spread, 1.0))
    if x.shape[1] > _WHITEN_UP_TO:
        return mean, scale, None, torch.ones_like(mean)
    _, first, same = np.unique(share.T.cpu().numpy() > 0, axis=0, return_index=True, return_inverse=True)
    bases, curvatures = [], []
    for index in first:
        rows = share[:, index] > 0
        standard = (x[rows] - mean[index]) / scale[index]
        values, vectors = torch.linalg.eigh(standard.T @ standard / rows.sum())
        bases.append(vectors)
        curvatures.append(values.clamp_min(0))
    picks = torch.as_tensor(same.reshape(-1), device=x.device)
    return mean, scale, torch.stack(bases)[picks], torch.stack(curvatures)[picks]


def _two_loops(gradient: Tensor, history: list[tuple[Tensor, Tensor]], metric: Tensor) -> Tensor:
    """Apply L-BFGS's inverse Hessian to p gradients at once (Nocedal & Wright, algorithm 7.4)."""
    direction = gradient
    pairs = [(step, change, _inner(step, change)) for step, change in history]
    alphas = []
    for step, change, curvature in reversed(pairs):
        alpha = _ratio(_inner(step, direction), curvature)
        direction = direction - alpha * change
        alphas.append(alpha)
    direction = direction / metric
    if pairs:
        # The bound is loose where a regression is sure of its rows; the last pair tells by how much.
        _, change, curvature = pairs[-1]
        direction = direction * torch.where(curvature > 0, curvature / _inner(change, change / metric), 1.0)
    for (step, change, curvature), alpha in zip(pairs, reversed(alphas), strict=True):
        direction = direction + (alpha - _ratio(_inner(change, direction), curvature)) * step
    return direction


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(1, 2), keepdim=True)


def _ratio(numerator: Tensor, curvature: Tensor) -> Tensor:
    """Divide, giving 0 for a pair without positive curvature: a regression that stood still."""
    return torch.where(curvature > 0, numerator / torch.where(curvature > 0, curvature, 1.0), 0.0)
