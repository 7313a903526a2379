"""Many losses minimised at once by batched L-BFGS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_MEMORY = 10  # pairs of steps and gradient changes that are remembered
_HALVINGS = 20
_MIN_LOSS_SCALE = 1e-2  # gains are relative to the loss, or to this where the loss is smaller
_MAX_SNAPSHOTS = 8


# Called after each step with the indices (c,) of the active losses and their theta; returns the mask (c,) to continue.
SelectActive = Callable[[Tensor, Tensor], Tensor]


class Problem(Protocol):
    """p losses of parameters theta (p, a, b), each of its own slice."""

    @property
    def rounding(self) -> float:
        """Relative increase of a loss that rounding alone may cause."""

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the losses (p,) and their gradients (p, a, b)."""

    def precondition(self, gradient: Tensor) -> Tensor:
        """Apply the inverse of an initial estimate of the Hessians to p gradients."""

    def take(self, which: Tensor) -> Problem:
        """Return the problem of a subset of the losses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Minimum:
    """Final theta (p, a, b) of p losses, and snapshots of theta after steps 1, 2, 4, ... and the last."""

    theta: Tensor
    num_steps: int
    snapshots: tuple[Tensor, ...]


def merge_minima(minima: Sequence[Minimum]) -> Minimum:
    """Return the minima of several batches of losses as one; a batch that took fewer steps repeats its last theta."""
    snapshots = [
        torch.cat([minimum.snapshots[min(index, len(minimum.snapshots) - 1)] for minimum in minima])
        for index in range(max(len(minimum.snapshots) for minimum in minima))
    ]
    theta = torch.cat([minimum.theta for minimum in minima])
    return Minimum(theta=theta, num_steps=max(minimum.num_steps for minimum in minima), snapshots=tuple(snapshots))


@dataclass(frozen=True, slots=True)
class _Pair:
    """A step, the change of the gradient over it, raw and preconditioned, and the curvature: step times change."""

    step: Tensor
    change: Tensor
    conditioned: Tensor
    curvature: Tensor

    def take(self, which: Tensor) -> _Pair:
        return _Pair(self.step[which], self.change[which], self.conditioned[which], self.curvature[which])


def minimize(
    problem: Problem,
    start: Tensor,
    *,
    max_steps: int,
    tolerance: float,
    patience: int,
    select_active: SelectActive | None = None,
) -> Minimum:
    """Minimise p losses from `start` (p, a, b) by batched L-BFGS.

    A loss leaves the batch when `patience` consecutive steps, not counting the first, lower it by less than
    `tolerance`, relatively, or when `select_active`, called with the indices (c,) of the active losses and their theta
    (c, a, b), returns False for it.
    """
    final_theta, theta = start.clone(), start
    active = torch.arange(len(start), device=start.device)
    loss, gradient = problem.loss_and_gradient(theta)
    conditioned = problem.precondition(gradient)
    stalls = torch.full_like(active, -1)  # -1: the first step, whose length is a rough guess, does not count
    history: list[_Pair] = []
    snapshots: list[Tensor] = []
    for step in range(1, max_steps + 1):
        direction = -_two_loops(gradient, conditioned, history)
        theta_next, loss_next, gradient_next = _search(problem, theta, loss, gradient, direction)
        conditioned_next = problem.precondition(gradient_next)
        step_taken, change = theta_next - theta, gradient_next - gradient
        pair = _Pair(step_taken, change, conditioned_next - conditioned, _inner(step_taken, change))
        history = [*history[1 - _MEMORY :], pair]
        stalls = torch.where(loss - loss_next > tolerance * loss.abs().clamp_min(_MIN_LOSS_SCALE), 0, stalls + 1)
        theta, loss, gradient, conditioned = theta_next, loss_next, gradient_next, conditioned_next
        final_theta[active] = theta
        running = stalls < patience
        if select_active is not None:
            running &= select_active(active, theta)
        last = step == max_steps or not bool(running.any())
        if last or step & (step - 1) == 0:
            snapshots = [*snapshots[: _MAX_SNAPSHOTS - 1], final_theta.clone()]
        if last:
            break
        if not bool(running.all()):
            problem, active, history = problem.take(running), active[running], [pair.take(running) for pair in history]
            theta, loss, stalls = theta[running], loss[running], stalls[running]
            gradient, conditioned = gradient[running], conditioned[running]
    return Minimum(theta=final_theta, num_steps=step, snapshots=tuple(snapshots))


def _search(
    problem: Problem, theta: Tensor, loss: Tensor, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Step along each direction, halving the step until the Armijo condition holds; a step of 0 if it never does.

    The loss may rise by `problem.rounding`, since rounding can hide a decrease.
    """
    slope = (gradient * direction).sum(dim=(1, 2))
    length = torch.ones_like(loss)
    for _ in range(_HALVINGS):
        theta_next = theta + length[:, None, None] * direction
        loss_next, gradient_next = problem.loss_and_gradient(theta_next)
        sufficient = loss_next <= loss + 1e-4 * length * slope + problem.rounding * loss.abs()  # False for NaN
        if bool(sufficient.all()):
            return theta_next, loss_next, gradient_next
        length = torch.where(sufficient, length, length / 2)
    theta_next = theta + torch.where(sufficient, length, 0.0)[:, None, None] * direction
    return theta_next, *problem.loss_and_gradient(theta_next)


def _two_loops(gradient: Tensor, conditioned: Tensor, history: list[_Pair]) -> Tensor:
    """Apply the L-BFGS inverse Hessian of the history to p gradients at once (Nocedal & Wright, algorithm 7.4).

    The initial inverse Hessian is linear and costly, so that it is applied to each gradient once, outside the loops.
    """
    direction = gradient
    alphas = []
    for pair in reversed(history):
        alpha = _ratio(_inner(pair.step, direction), pair.curvature)
        direction = direction - alpha * pair.change
        conditioned = conditioned - alpha * pair.conditioned
        alphas.append(alpha)
    if history:  # the initial estimate is too large where predictions are confident; rescale it by the last pair
        last = history[-1]
        rescale = last.curvature / _inner(last.change, last.conditioned)
        conditioned = conditioned * torch.where(last.curvature > 0, rescale, 1.0)
    for pair, alpha in zip(history, reversed(alphas), strict=True):
        conditioned = conditioned + (alpha - _ratio(_inner(pair.change, conditioned), pair.curvature)) * pair.step
    return conditioned


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(1, 2), keepdim=True)


def _ratio(numerator: Tensor, curvature: Tensor) -> Tensor:
    """Divide by the curvature; 0 where it is not positive, as after a step of 0."""
    return torch.where(curvature > 0, numerator / torch.where(curvature > 0, curvature, 1.0), 0.0)
