"""L-BFGS for many problems at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_MEMORY = 10  # pairs of steps and gradient changes that are remembered
_HALVINGS = 20
_NEXT_TO_NOTHING = 1e-2  # a loss below which gains are no longer measured against it
_MOST_SNAPSHOTS = 8


# Told which losses are in the batch and their theta after a step, it tells which may go on.
Judge = Callable[[Tensor, Tensor], Tensor]


class Problem(Protocol):
    """p losses of parameters theta (p, a, b), each of its own slice."""

    rounding: float  # by how much a loss may rise, relatively, without meaning it

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Give the losses (p,) and their gradients (p, a, b)."""

    def precondition(self, gradient: Tensor) -> Tensor:
        """Apply the inverse of a first guess of the Hessians to p gradients."""

    def take(self, which: Tensor) -> Problem:
        """Give the problem of some of the losses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Minimum:
    """Where p losses were lowered to: theta (p, a, b); and theta after steps 1, 2, 4, ... and the last."""

    theta: Tensor
    num_steps: int
    snapshots: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Pair:
    """A step, the change of the gradient over it, raw and preconditioned, and the curvature: their product."""

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
    judge: Judge | None = None,
) -> Minimum:
    """Lower p losses from `start` (p, a, b) by batched L-BFGS.

    A loss leaves the batch when `patience` steps running, the first one apart, lower it by less than `tolerance`,
    relatively, or when the judge, given the places (c,) of those in the batch and their theta (c, a, b), tells it to.
    """
    found, theta = start.clone(), start
    alive = torch.arange(len(start), device=start.device)
    loss, gradient = problem.loss_and_gradient(theta)
    conditioned = problem.precondition(gradient)
    stalls = torch.full_like(alive, -1)  # the first step, of a rough length, may gain little and is forgiven
    history: list[_Pair] = []
    snapshots: list[Tensor] = []
    for step in range(1, max_steps + 1):
        direction = -_two_loops(gradient, conditioned, history)
        theta_next, loss_next, gradient_next = _search(problem, theta, loss, gradient, direction)
        conditioned_next = problem.precondition(gradient_next)
        moved, change = theta_next - theta, gradient_next - gradient
        pair = _Pair(moved, change, conditioned_next - conditioned, _inner(moved, change))
        history = [*history[1 - _MEMORY :], pair]
        stalls = torch.where(loss - loss_next > tolerance * loss.abs().clamp_min(_NEXT_TO_NOTHING), 0, stalls + 1)
        theta, loss, gradient, conditioned = theta_next, loss_next, gradient_next, conditioned_next
        found[alive] = theta
        going = stalls < patience
        if judge is not None:
            going &= judge(alive, theta)
        last = step == max_steps or not bool(going.any())
        if last or step & (step - 1) == 0:
            snapshots = [*snapshots[: _MOST_SNAPSHOTS - 1], found.clone()]
        if last:
            break
        if not bool(going.all()):
            problem, alive, history = problem.take(going), alive[going], [pair.take(going) for pair in history]
            theta, loss, stalls = theta[going], loss[going], stalls[going]
            gradient, conditioned = gradient[going], conditioned[going]
    return Minimum(theta=found, num_steps=step, snapshots=tuple(snapshots))


def _search(
    problem: Problem, theta: Tensor, loss: Tensor, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Go along each direction, halving the step until the loss falls enough (Armijo); stand still if it never does.

    Rounding may hide a gain: by so much the loss may rise.
    """
    slope = (gradient * direction).sum(dim=(1, 2))
    length = torch.ones_like(loss)
    for _ in range(_HALVINGS):
        theta_next = theta + length[:, None, None] * direction
        loss_next, gradient_next = problem.loss_and_gradient(theta_next)
        enough = loss_next <= loss + 1e-4 * length * slope + problem.rounding * loss.abs()  # False for NaN
        if bool(enough.all()):
            return theta_next, loss_next, gradient_next
        length = torch.where(enough, length, length / 2)
    theta_next = theta + torch.where(enough, length, 0.0)[:, None, None] * direction
    return theta_next, *problem.loss_and_gradient(theta_next)


def _two_loops(gradient: Tensor, conditioned: Tensor, history: list[_Pair]) -> Tensor:
    """Apply the inverse Hessian that the history tells of to p gradients at once (Nocedal & Wright, algorithm 7.4).

    The first guess of it is linear and not cheap, so it is applied to each gradient once, not within the loops.
    """
    direction = gradient
    alphas = []
    for pair in reversed(history):
        alpha = _ratio(_inner(pair.step, direction), pair.curvature)
        direction = direction - alpha * pair.change
        conditioned = conditioned - alpha * pair.conditioned
        alphas.append(alpha)
    if history:  # the first guess is loose where a fit is sure of its rows; the last pair tells by how much
        last = history[-1]
        looseness = last.curvature / _inner(last.change, last.conditioned)
        conditioned = conditioned * torch.where(last.curvature > 0, looseness, 1.0)
    for pair, alpha in zip(history, reversed(alphas), strict=True):
        conditioned = conditioned + (alpha - _ratio(_inner(pair.change, conditioned), pair.curvature)) * pair.step
    return conditioned


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(1, 2), keepdim=True)


def _ratio(numerator: Tensor, curvature: Tensor) -> Tensor:
    """Divide, giving 0 for a pair without positive curvature: a fit that stood still."""
    return torch.where(curvature > 0, numerator / torch.where(curvature > 0, curvature, 1.0), 0.0)
