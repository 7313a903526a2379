"""Multinomial logistic regressions, many at once: how does one matrix product a step serve them all?

Legend: n rows, d features, k classes, p regressions on the same rows, each with its own mask and strength.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MEMORY = 10  # pairs of steps and gradient changes that L-BFGS remembers
_HALVINGS = 20
_STALLS = 2  # steps without gain after which a regression is done; a single one happens on the way
_LOGITS_AT_ONCE = 1 << 20  # 4 MiB of float32: the residuals are still in the cache when the product reads them
_FARTHEST = 1e2  # units from the centre; what lies beyond counts as there (at 1e3, wild rows stop fits 0.02 short)
_ROWS_FOR_UNITS = 2_000
_WHITEN_UP_TO = 2_048  # features; above, an eigendecomposition costs more than the steps it saves


@dataclass(frozen=True, slots=True, kw_only=True)
class Logistic:
    """p fitted regressions: the logits of j are `x @ weight[j] + bias[j]`; weight (p, d, k), bias (p, k)."""

    weight: Tensor
    bias: Tensor
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """Features made ready once for any number of fits: standardised as Z, and in the eigenbasis of Z'Z / n.

    rows (n, d). basis (d, d), None where there are too many features; curvature (d,) are its eigenvalues.
    centre, scale (d,): the units of Z.
    """

    rows: Tensor
    centre: Tensor
    scale: Tensor
    basis: Tensor | None
    curvature: Tensor

    def take(self, rows: Tensor) -> Design:
        """Give the same design of some of its rows."""
        return Design(
            rows=self.rows[rows], centre=self.centre, scale=self.scale, basis=self.basis, curvature=self.curvature
        )

    def turn(self, theta: Tensor) -> Tensor:
        """Turn weights (p, d, k) out of the eigenbasis, into those of the standardised features."""
        return theta if self.basis is None else self.basis @ theta

    def turn_back(self, weight: Tensor) -> Tensor:
        """Turn weights or gradients (p, d, k) into the eigenbasis."""
        return weight if self.basis is None else self.basis.T @ weight

    def logits(self, theta: Tensor, which: Tensor) -> Tensor:
        """Give the logits (n, k) of each row under its own regression `which` (n,) of theta (p, d + 1, k)."""
        out = self.rows.new_empty(len(self.rows), theta.shape[2])
        for index in range(len(theta)):
            mine = which == index
            out[mine] = self.rows[mine] @ theta[index, :-1] + theta[index, -1]
        return out

    def on_raw_features(self, theta: Tensor, *, num_steps: int) -> Logistic:
        """Give regressions that act on x itself, from theta (p, d + 1, k)."""
        weight = self.turn(theta[:, :-1]) / self.scale[:, None]
        bias = theta[:, -1] - (self.centre[:, None] * weight).sum(dim=1)
        return Logistic(weight=weight, bias=bias, num_steps=num_steps)


def make_design(x: Tensor) -> Design:
    """Make x (n, d) ready."""
    centre, scale = _robust_units(x)
    standard = ((x - centre) / scale).clamp(-_FARTHEST, _FARTHEST)
    if x.shape[1] > _WHITEN_UP_TO:
        return Design(rows=standard, centre=centre, scale=scale, basis=None, curvature=torch.ones_like(centre))
    # In float32 the decomposition fails to converge where hundreds of features are constant, as hashed words are.
    values, basis = (found.to(x.dtype) for found in torch.linalg.eigh((standard.T @ standard / len(x)).double()))
    return Design(rows=standard @ basis, centre=centre, scale=scale, basis=basis, curvature=values.clamp_min(0))


def _robust_units(x: Tensor) -> tuple[Tensor, Tensor]:
    """Give median and half the middle two thirds of each feature (d,): what one wild row does not move.

    Most rows alike: the standard deviation instead; a constant feature: 1. Only the way to the solution depends on
    these units, not the solution, so that some rows are enough.
    """
    some = x[:: max(1, len(x) // _ROWS_FOR_UNITS)]
    low, centre, high = torch.quantile(some, x.new_tensor([1 / 6, 1 / 2, 5 / 6]), dim=0)
    width = (high - low) / 2
    deviation = (x - centre).double().square().mean(dim=0).sqrt().to(x.dtype)
    scale = torch.where(width > 0, width, deviation)
    # Rounding spreads a feature that is 0.1 throughout, and weights in units of that swamp all the others.
    return centre, torch.where(scale > 8 * torch.finfo(x.dtype).eps * centre.abs(), scale, 1.0)


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
    feature has standard deviation 1 over the regression's own rows. The model is scikit-learn's
    `make_pipeline(StandardScaler(), LogisticRegression(C))`.
    """
    design = make_design(x)
    start = torch.zeros(mask.shape[1], x.shape[1] + 1, num_classes, dtype=x.dtype, device=x.device)
    theta, steps = fit_design(
        design, label, mask=mask, strength=strength, start=start, max_steps=max_steps, tolerance=tolerance
    )
    return design.on_raw_features(theta, num_steps=steps)


def fit_design(
    design: Design,
    label: Tensor,
    *,
    mask: Tensor,
    strength: Tensor,
    start: Tensor,
    max_steps: int,
    tolerance: float,
) -> tuple[Tensor, int]:
    """Fit as fit_logistic does, from `start` (p, d + 1, k) in the design's eigenbasis; give theta there, and the steps.

    Batched L-BFGS. Its first metric is Böhning's bound of the Hessian, 1/2 X'X + strength (Böhning 1992), which is
    diagonal in the eigenbasis. A regression leaves the batch when a step lowers its loss by less than `tolerance`,
    relatively, twice running; the others go on.
    """
    problem = _Problem(design, label, mask=mask, strength=strength)
    found = start.clone()
    alive = torch.arange(len(start), device=start.device)
    theta = start
    loss, gradient = problem.loss_and_gradient(theta)
    stalls = torch.zeros_like(alive)
    history: list[tuple[Tensor, Tensor]] = []
    for step in range(1, max_steps + 1):
        direction = -_two_loops(gradient, history, problem.metric)
        theta_next, loss_next, gradient_next = problem.search(theta, loss, gradient, direction)
        history = [*history[1 - _MEMORY :], (theta_next - theta, gradient_next - gradient)]
        stalls = torch.where(loss - loss_next > tolerance * (1 + loss.abs()), 0, stalls + 1)
        going = stalls < _STALLS
        theta, loss, gradient = theta_next, loss_next, gradient_next
        found[alive] = theta
        if not bool(going.any()):
            return found, step
        if not bool(going.all()):
            problem, alive = problem.take(going), alive[going]
            theta, loss, gradient, stalls = theta[going], loss[going], gradient[going], stalls[going]
            history = [(moved[going], change[going]) for moved, change in history]
    return found, max_steps


def mean_loss(design: Design, label: Tensor, *, mask: Tensor, theta: Tensor) -> Tensor:
    """Give the mean cross entropy (p,) of regressions theta (p, d + 1, k), each over its own rows, mask (n, p)."""
    nothing = torch.zeros_like(theta[:, 0, 0])
    return _Problem(design, label, mask=mask, strength=nothing).loss_and_gradient(theta)[0]


class _Problem:
    """p losses over theta (p, d + 1, k): weights in the design's eigenbasis, then the bias."""

    def __init__(self, design: Design, label: Tensor, *, mask: Tensor, strength: Tensor) -> None:
        self.design, self.label, self.strength = design, label, strength
        self.share = mask.to(design.rows.dtype) / mask.sum(dim=0)  # (n, p): a row's part in each mean
        self.units = _own_units(design, self.share)
        bias_curvature = torch.full_like(strength[:, None], 0.5)
        bound = torch.cat([design.curvature / 2 + strength[:, None], bias_curvature], dim=1)
        self.metric = bound[:, :, None]  # (p, d + 1, 1)

    def take(self, which: Tensor) -> _Problem:
        """Give the problem of some of the regressions."""
        part = object.__new__(_Problem)
        part.design, part.label = self.design, self.label
        part.share, part.strength = self.share[:, which], self.strength[which]
        part.units, part.metric = self.units[which], self.metric[which]
        return part

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Give the losses (p,) and their gradients (p, d + 1, k)."""
        p, d, k = theta.shape[0], theta.shape[1] - 1, theta.shape[2]
        weight = theta[:, :-1].permute(1, 0, 2).reshape(d, p * k)
        entropy = torch.zeros(p, dtype=theta.dtype, device=theta.device)
        by_weight = torch.zeros(d, p * k, dtype=theta.dtype, device=theta.device)
        by_bias = torch.zeros(p, k, dtype=theta.dtype, device=theta.device)
        chunk = max(256, _LOGITS_AT_ONCE // (p * k))
        for start in range(0, len(self.label), chunk):
            x, label, share = (w[start : start + chunk] for w in (self.design.rows, self.label, self.share))
            logits = torch.addmm(theta[:, -1].reshape(-1), x, weight).view(len(x), p, k).log_softmax(dim=2)
            at_label = label[:, None, None].expand(-1, p, 1)
            entropy -= (logits.gather(2, at_label).squeeze(2) * share).sum(dim=0)
            residual = logits.exp_().scatter_add_(2, at_label, torch.full_like(logits[:, :, :1], -1.0))
            residual *= share[:, :, None]
            by_bias += residual.sum(dim=0)
            by_weight.addmm_(x.T, residual.view(len(x), p * k))
        own = self.design.turn(theta[:, :-1]) * self.units[:, :, None]
        ridge = self.strength[:, None, None] * self.design.turn_back(own * self.units[:, :, None])
        gradient = by_weight.view(d, p, k).permute(1, 0, 2) + ridge
        loss = entropy + self.strength * own.square().sum(dim=(1, 2)) / 2
        return loss, torch.cat([gradient, by_bias[:, None, :]], dim=1)

    def search(self, theta: Tensor, loss: Tensor, gradient: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Go along each direction, halving the step until the loss falls enough (Armijo); stand still if it never does.

        Rounding may hide a gain: by so much the loss may rise.
        """
        rounding = 4 * torch.finfo(loss.dtype).eps * loss.abs()
        slope = (gradient * direction).sum(dim=(1, 2))
        length = torch.ones_like(loss)
        for _ in range(_HALVINGS):
            theta_next = theta + length[:, None, None] * direction
            loss_next, gradient_next = self.loss_and_gradient(theta_next)
            enough = loss_next <= loss + 1e-4 * length * slope + rounding  # False for NaN
            if bool(enough.all()):
                return theta_next, loss_next, gradient_next
            length = torch.where(enough, length, length / 2)
        theta_next = theta + torch.where(enough, length, 0.0)[:, None, None] * direction
        return theta_next, *self.loss_and_gradient(theta_next)


def _own_units(design: Design, share: Tensor) -> Tensor:
    """Standard deviation of each standardised feature over each regression's own rows, (p, d); 1 where it is constant.

    Rounding leaves 3e-4 of the overall spread in float32; below 1e-3 a feature is constant on those rows.
    """
    standard = design.rows if design.basis is None else design.rows @ design.basis.T
    variance = share.T @ standard.square() - (share.T @ standard).square()
    spread = variance.clamp_min(0).sqrt()
    return torch.where(spread > 1e-3, spread, 1.0)


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
        looseness = curvature / _inner(change, change / metric)
        direction = direction * torch.where(curvature > 0, looseness, 1.0)
    for (step, change, curvature), alpha in zip(pairs, reversed(alphas), strict=True):
        direction = direction + (alpha - _ratio(_inner(change, direction), curvature)) * step
    return direction


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(1, 2), keepdim=True)


def _ratio(numerator: Tensor, curvature: Tensor) -> Tensor:
    """Divide, giving 0 for a pair without positive curvature: a regression that stood still."""
    return torch.where(curvature > 0, numerator / torch.where(curvature > 0, curvature, 1.0), 0.0)
