"""Laws of the policy: REINFORCE and PPO by hand, and all of it in its state."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mmaudit.train.sampling.config import DusConfig
from mmaudit.train.sampling.policy import Policy, clipped_gain

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
    assert policy.chances(STATE).tolist() == [[pytest.approx(0.2)] * 5] * 2
    chosen = torch.tensor([policy.act(STATE) for _ in range(500)])
    for modality in range(2):
        counts = torch.bincount(chosen[:, modality], minlength=5)
        assert (counts - 100).abs().max() < 4 * math.sqrt(500 * 0.2 * 0.8)


@pytest.mark.parametrize("reward", [0.3, -0.3])
def test_the_first_step_of_reinforce_by_hand(reward: float) -> None:
    """Adam's first step is lr in the direction of the gradient A (1[chosen] - p), whatever its size."""
    policy = policy_of(lr=1e-2)
    hidden = policy.net[:2](torch.tensor(STATE)).detach()
    chosen = policy.act(STATE)
    policy.learn(reward)
    up = math.copysign(1e-2 * (1 + float(hidden.sum())), reward)  # the change of the chosen logit; the others fall
    expected = math.exp(up) / (math.exp(up) + 4 * math.exp(-up))
    chances = policy.chances(STATE)
    assert float(hidden.sum()) > 0
    for modality, choice in enumerate(chosen):
        assert float(chances[modality, choice]) == pytest.approx(expected, rel=1e-4)


def test_no_surprise_no_step() -> None:
    policy = policy_of()
    policy.act(STATE)
    policy.learn(0.0)  # what the baseline expects
    assert policy.chances(STATE).tolist() == [[pytest.approx(0.2)] * 5] * 2


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
    chances = policy.chances(STATE)
    assert float(chances[0, 4]) > 0.8
    assert float(chances[1, 1]) > 0.8


def test_the_choice_may_depend_on_the_state() -> None:
    policy = policy_of(lr=1e-2)
    ahead, behind = [0.8, 0.1, 0.7, -0.7], [0.1, 0.8, -0.7, 0.7]
    for step in range(800):
        state, want = (ahead, 0) if step % 2 else (behind, 4)
        policy.learn(float(policy.act(state)[0] == want))
    assert float(policy.chances(ahead)[0, 0]) > 0.7
    assert float(policy.chances(behind)[0, 4]) > 0.7


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.1, 2.0, 2.2, 2.0),  # within the clip
        (1.3, 2.0, 2.4, 0.0),  # more likely than 1.2 times before, and good: no further
        (1.3, -2.0, -2.6, -2.0),  # but back, where it was bad
        (0.7, -2.0, -1.6, 0.0),  # less likely than 0.8 times before, and bad: no further
        (0.7, 2.0, 1.4, 2.0),  # but back, where it was good
        (0.9, -2.0, -1.8, -2.0),
    ],
)
def test_the_clip_of_ppo_by_hand(ratio: float, advantage: float, gain: float, slope: float) -> None:
    r = torch.tensor(ratio, requires_grad=True)
    found = clipped_gain(r, torch.tensor(advantage), clip=0.2)
    assert float(found.detach()) == pytest.approx(gain)
    (gradient,) = torch.autograd.grad(found, r)
    assert float(gradient) == pytest.approx(slope)


def test_ppo_learns_from_as_many_steps_as_its_horizon() -> None:
    policy = policy_of(policy="ppo", horizon=3)
    before = policy.chances(STATE).tolist()
    rewarded(policy, [4, 1], 2)
    policy.act(STATE)
    assert policy.chances(STATE).tolist() == before
    policy.learn(1.0)
    assert policy.chances(STATE).tolist() != before
    assert policy.waiting == []


def test_the_clip_stops_ppo_where_reinforce_would_go_on() -> None:
    """Of 200 passes over one choice, those after its joint chance has risen by a fifth carry on Adam's momentum."""
    risen = {}
    for clip in (0.2, 100.0):
        policy = policy_of(policy="ppo", horizon=1, passes=200, lr=1e-3, clip=clip)
        chosen = policy.act(STATE)
        policy.learn(1.0)
        chances = policy.chances(STATE)
        risen[clip] = float(chances[0, chosen[0]] * chances[1, chosen[1]]) / 0.04
    assert 1.2 < risen[0.2] < 2.5
    assert risen[100.0] > 10


def test_without_a_choice_there_is_nothing_to_learn() -> None:
    policy = policy_of()
    policy.learn(5.0)
    assert policy.baseline == 0
    assert policy.chances(STATE).tolist() == [[pytest.approx(0.2)] * 5] * 2


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
        drawn.append(([each.act(STATE) for _ in range(30)], each.chances(STATE).tolist(), each.baseline))
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
