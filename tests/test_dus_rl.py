"""Tests of the policy of DUS-RL: REINFORCE and PPO by hand and against torch, and its state."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmaudit.train.sampling.dus import DusConfig
from mmaudit.train.sampling.dus_rl import Policy, clipped_slope

torch.set_num_threads(1)

STATE = [0.6, 0.2, 0.4, -0.4]


def build_policy(seed: int = 0, **changes: Any) -> Policy:
    return Policy(DusConfig(**changes), num_inputs=4, num_modalities=2, seed=seed)


def reward_actions(policy: Policy, target_actions: Sequence[int], num_steps: int) -> None:
    """Reward each modality's target action with a half."""
    for _ in range(num_steps):
        actions = policy.act(STATE)
        policy.learn(sum(0.5 * (action == target) for action, target in zip(actions, target_actions, strict=True)))


def round_trip(state: dict[str, Any]) -> dict[str, Any]:
    """Write a state and load it as a checkpoint does."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


def test_initial_choices_are_equally_likely() -> None:
    policy = build_policy()
    assert policy.probabilities(STATE).tolist() == [[pytest.approx(0.2)] * 5] * 2
    actions = torch.tensor([policy.act(STATE) for _ in range(500)])
    for modality in range(2):
        counts = torch.bincount(actions[:, modality], minlength=5)
        assert (counts - 100).abs().max() < 4 * math.sqrt(500 * 0.2 * 0.8)


class Reference:
    """The same policy in torch, with torch's gradients and Adam."""

    def __init__(self, policy: Policy, *, clip: float | None, lr: float) -> None:
        first, last = torch.nn.Linear(4, 64), torch.nn.Linear(64, 10)
        self.net = torch.nn.Sequential(first, torch.nn.ReLU(), last).double()
        first.weight.data = torch.tensor(policy.weights[:256].reshape(4, 64).T.copy())
        first.bias.data = torch.tensor(policy.weights[256:320])
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
        self.clip, self.optimizer = clip, torch.optim.Adam(self.net.parameters(), lr=lr)

    def log_probability(self, actions: Tensor) -> Tensor:
        log_probabilities = self.net(torch.tensor(STATE).double()).view(2, 5).log_softmax(dim=1)
        total: Tensor = log_probabilities.gather(1, actions.T).sum(dim=0)
        return total

    def learn(self, actions: Sequence[Sequence[int]], advantage: Sequence[float], *, passes: int = 1) -> None:
        action_tensor, advantages = torch.tensor(actions), torch.tensor(advantage).double()
        old_log_probability = self.log_probability(action_tensor).detach()
        for _ in range(passes):
            ratio = (self.log_probability(action_tensor) - old_log_probability).exp()
            gain = advantages * self.log_probability(action_tensor)
            if self.clip is not None:
                gain = torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - self.clip, 1 + self.clip))
            self.optimizer.zero_grad()
            torch.autograd.backward(-gain.mean())
            self.optimizer.step()

    def probabilities(self) -> list[list[float]]:
        probabilities: list[list[float]] = self.net(torch.tensor(STATE).double()).view(2, 5).softmax(dim=1).tolist()
        return probabilities


REWARDS = [0.5, -0.2, 0.1, 0.3, 0.0, -1.0, 0.7, 0.2, -0.1, 0.4, 0.6, -0.3]


def test_reinforce_equals_torch() -> None:
    """Gradients of A log p, and steps of Adam along them."""
    policy = build_policy(lr=0.02)
    reference = Reference(policy, clip=None, lr=0.02)
    for reward in REWARDS:
        advantage = reward - policy.baseline
        reference.learn([policy.act(STATE)], [advantage])
        policy.learn(reward)
    assert policy.probabilities(STATE).ravel() == pytest.approx(np.ravel(reference.probabilities()), rel=1e-5)


def test_ppo_equals_torch() -> None:
    policy = build_policy(policy="ppo", lr=0.02, horizon=4, passes=6)
    reference = Reference(policy, clip=0.2, lr=0.02)
    for start in range(0, len(REWARDS), 4):
        actions, advantages = [], []
        for reward in REWARDS[start : start + 4]:
            advantages.append(reward - policy.baseline)
            actions.append(policy.act(STATE))
            policy.learn(reward)
        reference.learn(actions, advantages, passes=6)
    assert policy.probabilities(STATE).ravel() == pytest.approx(np.ravel(reference.probabilities()), rel=1e-5)


@pytest.mark.parametrize("reward", [0.3, -0.3])
def test_first_step_of_reinforce_by_hand(reward: float) -> None:
    """The step is along A (1[chosen] - p): the chosen action gains probability if A > 0, all others lose equally."""
    policy = build_policy()
    actions = policy.act(STATE)
    policy.learn(reward)
    for probabilities, choice in zip(policy.probabilities(STATE).tolist(), actions, strict=True):
        other_probabilities = probabilities[:choice] + probabilities[choice + 1 :]
        assert other_probabilities == pytest.approx([other_probabilities[0]] * 4)
        assert (probabilities[choice] > 0.2) == (reward > 0)
        assert (other_probabilities[0] < 0.2) == (reward > 0)


def test_expected_reward_changes_nothing() -> None:
    policy = build_policy()
    policy.act(STATE)
    policy.learn(0.0)  # equal to the baseline
    assert policy.probabilities(STATE).tolist() == [[pytest.approx(0.2)] * 5] * 2


def test_baseline_is_the_running_mean_of_rewards() -> None:
    policy = build_policy(baseline=0.9)
    for reward in (1.0, -2.0):
        policy.act(STATE)
        policy.learn(reward)
    assert policy.baseline == pytest.approx(0.9 * 0.1 * 1.0 + 0.1 * -2.0)


@pytest.mark.parametrize("rule", ["reinforce", "ppo"])
def test_rewarded_choices_become_likely(rule: str) -> None:
    policy = build_policy(policy=rule, lr=1e-2)
    reward_actions(policy, [4, 1], 400)
    probabilities = policy.probabilities(STATE)
    assert float(probabilities[0, 4]) > 0.8
    assert float(probabilities[1, 1]) > 0.8


def test_choice_depends_on_the_state() -> None:
    policy = build_policy(lr=1e-2)
    first_ahead, first_behind = [0.8, 0.1, 0.7, -0.7], [0.1, 0.8, -0.7, 0.7]
    for step in range(800):
        state, target = (first_ahead, 0) if step % 2 else (first_behind, 4)
        policy.learn(float(policy.act(state)[0] == target))
    assert float(policy.probabilities(first_ahead)[0, 0]) > 0.7
    assert float(policy.probabilities(first_behind)[0, 4]) > 0.7


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.0, 2.0, 2.0),
        (1.1, 2.0, 2.2),  # within the clip: r A
        (1.3, 2.0, 0.0),  # ratio above 1.2, positive advantage: clipped
        (1.3, -2.0, -2.6),  # not clipped for a negative advantage
        (0.7, -2.0, 0.0),  # ratio below 0.8, negative advantage: clipped
        (0.7, 2.0, 1.4),  # not clipped for a positive advantage
        (0.9, -2.0, -1.8),
    ],
)
def test_clip_of_ppo_by_hand(ratio: float, advantage: float, slope: float) -> None:
    slopes = clipped_slope(np.array([ratio]), np.array([advantage]), clip=0.2)
    assert slopes.tolist() == pytest.approx([slope])


def test_ppo_updates_after_horizon_steps() -> None:
    policy = build_policy(policy="ppo", horizon=3)
    before = policy.probabilities(STATE).tolist()
    reward_actions(policy, [4, 1], 2)
    policy.act(STATE)
    assert policy.probabilities(STATE).tolist() == before
    policy.learn(1.0)
    assert policy.probabilities(STATE).tolist() != before
    assert policy.pending == []


def test_clip_stops_ppo() -> None:
    """Of 200 passes over one action, those after its probability has risen by a fifth only continue Adam's momentum."""
    increase = {}
    for clip in (0.2, 100.0):
        policy = build_policy(policy="ppo", horizon=1, passes=200, lr=1e-3, clip=clip)
        actions = policy.act(STATE)
        policy.learn(1.0)
        probabilities = policy.probabilities(STATE)
        increase[clip] = float(probabilities[0, actions[0]] * probabilities[1, actions[1]]) / 0.04
    assert 1.2 < increase[0.2] < 2.5
    assert increase[100.0] > 10


def test_reward_without_an_action_has_no_effect() -> None:
    policy = build_policy()
    policy.learn(5.0)
    assert policy.baseline == 0
    assert policy.probabilities(STATE).tolist() == [[pytest.approx(0.2)] * 5] * 2


@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
def test_resumed_policy_continues_exactly(kind: str) -> None:
    policy, resumed = build_policy(policy=kind, horizon=4), build_policy(seed=1, policy=kind, horizon=4)
    reward_actions(policy, [4, 1], 6)
    policy.act(STATE)  # saved between an action and its reward
    resumed.load_state_dict(round_trip(policy.state_dict()))
    drawn = []
    for current in (policy, resumed):
        current.learn(0.7)
        reward_actions(current, [4, 1], 10)
        drawn.append(([current.act(STATE) for _ in range(30)], current.probabilities(STATE).tolist(), current.baseline))
    assert drawn[0] == drawn[1]


def test_policy_has_its_own_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = build_policy()
    reward_actions(first, [4, 1], 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    second = build_policy()
    reward_actions(second, [4, 1], 5)
    assert [first.act(STATE) for _ in range(20)] == [second.act(STATE) for _ in range(20)]
    third = build_policy(seed=1)
    assert [third.act(STATE) for _ in range(20)] != [build_policy().act(STATE) for _ in range(20)]
