"""Batched L-BFGS: the minima of several losses, each as if it were alone."""

from __future__ import annotations

import torch
from torch import Tensor

from mmaudit.audit.probes.lbfgs import Minimum, Problem, merge_minima, minimize


class Bowls:
    """Quadratic losses with different centres and curvatures: (x - c)' D (x - c) / 2 + 1."""

    rounding = 1e-15

    def __init__(self, centre: Tensor, curvature: Tensor) -> None:
        self.centre, self.curvature = centre, curvature
        self.asked = 0

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        self.asked += 1
        gradient = self.curvature * (theta - self.centre)
        return ((theta - self.centre) * gradient).sum(dim=(1, 2)) / 2 + 1, gradient

    def precondition(self, gradient: Tensor) -> Tensor:
        return gradient / 30

    def take(self, which: Tensor) -> Problem:
        return Bowls(self.centre[which], self.curvature[which])


def bowls() -> Bowls:
    draw = torch.Generator().manual_seed(0)
    centre = torch.randn(3, 8, 2, generator=draw, dtype=torch.float64)
    return Bowls(centre, 1 + 99 * torch.rand(3, 8, 2, generator=draw, dtype=torch.float64))


def test_minimize_finds_the_minima() -> None:
    problem = bowls()
    minimum = minimize(problem, torch.zeros_like(problem.centre), max_steps=300, tolerance=1e-14, patience=2)
    torch.testing.assert_close(minimum.theta, problem.centre, atol=1e-5, rtol=0)
    assert minimum.num_steps < 100


def test_converged_problems_leave_the_batch() -> None:
    problem = bowls()
    start = torch.zeros_like(problem.centre)
    start[1] = problem.centre[1]
    minimum = minimize(problem, start, max_steps=300, tolerance=1e-14, patience=2)
    torch.testing.assert_close(minimum.theta, problem.centre, atol=1e-5, rtol=0)
    assert torch.equal(minimum.theta[1], problem.centre[1])


def test_snapshots_are_at_powers_of_two_and_the_last_step() -> None:
    problem = bowls()
    start = torch.zeros_like(problem.centre)
    minimum = minimize(problem, start, max_steps=11, tolerance=0.0, patience=100)
    assert minimum.num_steps == 11
    assert len(minimum.snapshots) == 5  # 1, 2, 4, 8, 11
    assert torch.equal(minimum.snapshots[-1], minimum.theta)
    losses = [float(problem.loss_and_gradient(theta)[0].sum()) for theta in (start, *minimum.snapshots)]
    assert losses == sorted(losses, reverse=True)
    for steps, snapshot in zip((1, 2, 4, 8), minimum.snapshots, strict=False):
        alone = minimize(problem, start, max_steps=steps, tolerance=0.0, patience=100)
        assert torch.equal(alone.theta, snapshot)


def test_step_is_halved_until_the_loss_decreases() -> None:
    """With an initial Hessian 100 times too small, the full step would raise the loss."""
    problem = bowls()
    problem.precondition = lambda gradient: gradient  # type: ignore[method-assign]
    before = problem.loss_and_gradient(torch.zeros_like(problem.centre))[0]
    minimum = minimize(problem, torch.zeros_like(problem.centre), max_steps=1, tolerance=0.0, patience=1)
    assert (problem.loss_and_gradient(minimum.theta)[0] < before).all()
    assert problem.asked > 4


def test_deselected_problems_stop_and_the_others_continue() -> None:
    problem = bowls()
    start = torch.zeros_like(problem.centre)
    active_losses: list[list[int]] = []

    def select_active(alive: Tensor, theta: Tensor) -> Tensor:
        assert len(theta) == len(alive)
        active_losses.append(alive.tolist())
        return alive != 1

    minimum = minimize(problem, start, max_steps=300, tolerance=1e-14, patience=2, select_active=select_active)
    single_step = minimize(problem, start, max_steps=1, tolerance=0.0, patience=2)
    assert active_losses[:2] == [[0, 1, 2], [0, 2]]
    assert torch.equal(minimum.theta[1], single_step.theta[1])
    torch.testing.assert_close(minimum.theta[[0, 2]], problem.centre[[0, 2]], atol=1e-5, rtol=0)


def test_small_gain_of_the_first_step_does_not_stop_a_fit() -> None:
    """With curvatures of 57 the first step, a thirtieth of the gradient, overshoots by almost as much."""
    centre = torch.full((1, 4, 1), 5.0, dtype=torch.float64)
    problem = Bowls(centre, torch.full_like(centre, 57.0))
    minimum = minimize(problem, torch.zeros_like(centre), max_steps=300, tolerance=0.3, patience=1)
    torch.testing.assert_close(minimum.theta, centre)


def test_merged_minima_repeat_the_last_snapshot_of_shorter_fits() -> None:
    states = [torch.full((1, 2, 1), float(step)) for step in range(3)]
    long = Minimum(theta=states[2], num_steps=4, snapshots=tuple(states))
    short = Minimum(theta=10 * states[1], num_steps=2, snapshots=(5 * states[1], 10 * states[1]))
    merged = merge_minima([long, short])
    assert (merged.num_steps, merged.theta[:, 0, 0].tolist()) == (4, [2, 10])
    assert [snapshot[:, 0, 0].tolist() for snapshot in merged.snapshots] == [[0, 5], [1, 10], [2, 10]]
