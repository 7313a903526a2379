"""Laws of the policy: REINFORCE and PPO by hand, and all of it in its state."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmaudit.train.sampling.config import DusConfig
from mmaudit.train.sampling.dus_policy import Policy, clipped_slope

torch.set_num_threads(1)

STATE = [0.6, 0.2, 0.4, -0.4]


def policy_of(seed: int = 0, **changes: Any) -> Policy:
    return Policy(DusConfig(**changes), num_inputs=4, num_modalities=2, seed=seed)


def rewarded(policy: Policy, wanted: Sequence[int], num_steps: int) -> None:
    """Reward each modality's wanted choice with a half."""
    for _ in range(num_steps):
        chosen = policy.act(STATE)
        policy.learn(sum(0.5 * (got == want) for got, want in zip(chosen, wanted, strict=True)))


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Write a state and load it back as a checkpoint does."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


def test_at_first_every_choice_is_as_likely_as_any_other() -> None:
    policy = policy_of()
    assert policy.probabilities(STATE).tolist() == [[pytest.approx(0.2)] * 5] * 2
    chosen = torch.tensor([policy.act(STATE) for _ in range(500)])
    for modality in range(2):
        counts = torch.bincount(chosen[:, modality], minlength=5)
        assert (counts - 100).abs().max() < 4 * math.sqrt(500 * 0.2 * 0.8)


class Reference:
    """The same policy in torch, whose gradients and Adam are its own."""

    def __init__(self, policy: Policy, *, clip: float | None, lr: float) -> None:
        first, last = torch.nn.Linear(4, 64), torch.nn.Linear(64, 10)
        self.net = torch.nn.Sequential(first, torch.nn.ReLU(), last).double()
        first.weight.data = torch.tensor(policy.weights[:256].reshape(4, 64).T.copy())
        first.bias.data = torch.tensor(policy.weights[256:320])
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
        self.clip, self.optimizer = clip, torch.optim.Adam(self.net.parameters(), lr=lr)

    def log_chance(self, chosen: Tensor) -> Tensor:
        log_chances = self.net(torch.tensor(STATE).double()).view(2, 5).log_softmax(dim=1)
        total: Tensor = log_chances.gather(1, chosen.T).sum(dim=0)
        return total

    def learn(self, chosen: Sequence[Sequence[int]], advantage: Sequence[float], *, passes: int = 1) -> None:
        picked, a = torch.tensor(chosen), torch.tensor(advantage).double()
        before = self.log_chance(picked).detach()
        for _ in range(passes):
            ratio = (self.log_chance(picked) - before).exp()
            gain = a * self.log_chance(picked)
            if self.clip is not None:
                gain = torch.minimum(a * ratio, a * ratio.clamp(1 - self.clip, 1 + self.clip))
            self.optimizer.zero_grad()
            torch.autograd.backward(-gain.mean())
            self.optimizer.step()

    def probabilities(self) -> list[list[float]]:
        found: list[list[float]] = self.net(torch.tensor(STATE).double()).view(2, 5).softmax(dim=1).tolist()
        return found


REWARDS = [0.5, -0.2, 0.1, 0.3, 0.0, -1.0, 0.7, 0.2, -0.1, 0.4, 0.6, -0.3]


def test_reinforce_is_that_of_torch() -> None:
    """Gradients of A log chance, and Adam's steps along them."""
    policy = policy_of(lr=0.02)
    reference = Reference(policy, clip=None, lr=0.02)
    for reward in REWARDS:
        advantage = reward - policy.baseline
        reference.learn([policy.act(STATE)], [advantage])
        policy.learn(reward)
    assert policy.probabilities(STATE).ravel() == pytest.approx(np.ravel(reference.probabilities()), rel=1e-5)


def test_ppo_is_that_of_torch() -> None:
    policy = policy_of(policy="ppo", lr=0.02, horizon=4, passes=6)
    reference = Reference(policy, clip=0.2, lr=0.02)
    for start in range(0, len(REWARDS), 4):
        chosen, advantage = [], []
        for reward in REWARDS[start : start + 4]:
            advantage.append(reward - policy.baseline)
            chosen.append(policy.act(STATE))
            policy.learn(reward)
        reference.learn(chosen, advantage, passes=6)
    assert policy.probabilities(STATE).ravel() == pytest.approx(np.ravel(reference.probabilities()), rel=1e-5)


@pytest.mark.parametrize("reward", [0.3, -0.3])
def test_the_first_step_of_reinforce_by_hand(reward: float) -> None:
    """It goes along A (1[chosen] - p): the chosen one more likely where it was good, all others alike less."""
    policy = policy_of()
    chosen = policy.act(STATE)
    policy.learn(reward)
    for chances, choice in zip(policy.probabilities(STATE).tolist(), chosen, strict=True):
        others = chances[:choice] + chances[choice + 1 :]
        assert others == pytest.approx([others[0]] * 4)
        assert (chances[choice] > 0.2) == (reward > 0)
        assert (others[0] < 0.2) == (reward > 0)


def test_no_surprise_no_step() -> None:
    policy = policy_of()
    policy.act(STATE)
    policy.learn(0.0)  # what the baseline expects
    assert policy.probabilities(STATE).tolist() == [[pytest.approx(0.2)] * 5] * 2


def test_the_baseline_is_the_running_mean_of_rewards() -> None:
    policy = policy_of(baseline=0.9)
    for reward in (1.0, -2.0):
        policy.act(STATE)
        policy.learn(reward)
    assert policy.baseline == pytest.approx(0.9 * 0.1 * 1.0 + 0.1 * -2.0)


@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
def test_what_is_rewarded_becomes_likely(kind: str) -> None:
    policy = policy_of(policy=kind, lr=1e-2)
    rewarded(policy, [4, 1], 400)
    chances = policy.probabilities(STATE)
    assert float(chances[0, 4]) > 0.8
    assert float(chances[1, 1]) > 0.8


def test_the_choice_may_depend_on_the_state() -> None:
    policy = policy_of(lr=1e-2)
    ahead, behind = [0.8, 0.1, 0.7, -0.7], [0.1, 0.8, -0.7, 0.7]
    for step in range(800):
        state, want = (ahead, 0) if step % 2 else (behind, 4)
        policy.learn(float(policy.act(state)[0] == want))
    assert float(policy.probabilities(ahead)[0, 0]) > 0.7
    assert float(policy.probabilities(behind)[0, 4]) > 0.7


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.0, 2.0, 2.0),
        (1.1, 2.0, 2.2),  # within the clip: r A
        (1.3, 2.0, 0.0),  # more likely than 1.2 times before, and good: no further
        (1.3, -2.0, -2.6),  # but back, where it was bad
        (0.7, -2.0, 0.0),  # less likely than 0.8 times before, and bad: no further
        (0.7, 2.0, 1.4),  # but back, where it was good
        (0.9, -2.0, -1.8),
    ],
)
def test_the_clip_of_ppo_by_hand(ratio: float, advantage: float, slope: float) -> None:
    found = clipped_slope(np.array([ratio]), np.array([advantage]), clip=0.2)
    assert found.tolist() == pytest.approx([slope])


def test_ppo_learns_from_as_many_steps_as_its_horizon() -> None:
    policy = policy_of(policy="ppo", horizon=3)
    before = policy.probabilities(STATE).tolist()
    rewarded(policy, [4, 1], 2)
    policy.act(STATE)
    assert policy.probabilities(STATE).tolist() == before
    policy.learn(1.0)
    assert policy.probabilities(STATE).tolist() != before
    assert policy.pending == []


def test_the_clip_stops_ppo_where_reinforce_would_go_on() -> None:
    """Of 200 passes over one choice, those after its joint chance has risen by a fifth carry on Adam's momentum."""
    risen = {}
    for clip in (0.2, 100.0):
        policy = policy_of(policy="ppo", horizon=1, passes=200, lr=1e-3, clip=clip)
        chosen = policy.act(STATE)
        policy.learn(1.0)
        chances = policy.probabilities(STATE)
        risen[clip] = float(chances[0, chosen[0]] * chances[1, chosen[1]]) / 0.04
    assert 1.2 < risen[0.2] < 2.5
    assert risen[100.0] > 10


def test_without_a_choice_there_is_nothing_to_learn() -> None:
    policy = policy_of()
    policy.learn(5.0)
    assert policy.baseline == 0
    assert policy.probabilities(STATE).tolist() == [[pytest.approx(0.2)] * 5] * 2


@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
def test_a_policy_goes_on_from_its_state_as_if_nothing_had_been(kind: str) -> None:
    policy, other = policy_of(policy=kind, horizon=4), policy_of(seed=1, policy=kind, horizon=4)
    rewarded(policy, [4, 1], 6)
    policy.act(STATE)  # saved between a choice and its reward
    other.load_state_dict(saved(policy.state_dict()))
    drawn = []
    for each in (policy, other):
        each.learn(0.7)
        rewarded(each, [4, 1], 10)
        drawn.append(([each.act(STATE) for _ in range(30)], each.probabilities(STATE).tolist(), each.baseline))
    assert drawn[0] == drawn[1]


def test_a_policy_has_chance_of_its_own() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = policy_of()
    rewarded(first, [4, 1], 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    second = policy_of()
    rewarded(second, [4, 1], 5)
    assert [first.act(STATE) for _ in range(20)] == [second.act(STATE) for _ in range(20)]
    third = policy_of(seed=1)
    assert [third.act(STATE) for _ in range(20)] != [policy_of().act(STATE) for _ in range(20)]
