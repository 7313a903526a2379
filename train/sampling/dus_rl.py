"""DUS-RL: DUS by quantities that a policy learns.

Letters: m modalities, c choices for each, h steps of one update, i numbers of a state, u hidden units. The policy is
small and equal in all processes, because their states and rewards are. It is numpy on the CPU with gradients by hand:
with autograd, an action and an update took three times as long, 0.9 ms beside a step of 37.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...audit.hashing import hash_rank
from .dus import Dus, DusConfig, bounded_quantity

Floats = NDArray[np.float64]
_DECAYS, _EPSILON = (0.9, 0.999), 1e-8  # of Adam


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """State (i,), the choice for each modality (m,), and the log probability of all choices together."""

    state: list[float]
    chosen: list[int]
    log_chance: float


class Policy:
    """MLP with one hidden ReLU layer whose output is a categorical distribution over c choices for each modality.

    That there is such a network is the paper's (DUS, arXiv 2503.03792); its form, Adam and the constants are ours. At
    first all choices are equally likely: the last layer is 0. REINFORCE (Williams 1992) updates after each step, PPO
    (Schulman et al., arXiv 1707.06347) after `horizon` steps in `passes` passes. Both use the reward minus its running
    mean, which is 0 at first.
    """

    def __init__(self, config: DusConfig, *, num_inputs: int, num_modalities: int, seed: int) -> None:
        self.config, self.num_modalities = config, num_modalities
        self.generator = torch.Generator().manual_seed(seed)
        outputs = num_modalities * len(config.multipliers)
        shapes = [(num_inputs, config.hidden), (config.hidden,), (config.hidden, outputs), (outputs,)]
        sizes = [math.prod(shape) for shape in shapes]
        self.weights = np.zeros(sum(sizes))
        arrays = np.split(self.weights, np.cumsum(sizes)[:-1])
        self._layers = [array.reshape(shape) for array, shape in zip(arrays, shapes, strict=True)]  # views
        hidden_size = sizes[0] + sizes[1]
        self.weights[:hidden_size] = (2 * self._uniform(hidden_size) - 1) / math.sqrt(num_inputs)
        self._moments = np.zeros((2, len(self.weights)))  # running means of gradients and of their squares
        self._num_updates = 0
        self.baseline = 0.0
        self.last: Choice | None = None
        self.pending: list[tuple[Choice, float]] = []  # with their advantages

    def probabilities(self, state: Sequence[float]) -> Floats:
        """Return the probability (m, c) of each choice for each modality; rows sum to 1."""
        probabilities: Floats = np.exp(self._forward(np.array([state]))[1][0])
        return probabilities

    def act(self, state: Sequence[float]) -> list[int]:
        """Draw a choice for each modality, (m,) in [0, c)."""
        log_probabilities = self._forward(np.array([state]))[1][0]
        sums = np.exp(log_probabilities[:, :-1]).cumsum(axis=1)
        drawn = (sums <= self._uniform(self.num_modalities)[:, None]).sum(axis=1)
        actions: list[int] = drawn.tolist()
        log_probability = float(log_probabilities[np.arange(self.num_modalities), drawn].sum())
        self.last = Choice(state=list(state), chosen=actions, log_chance=log_probability)
        return actions

    def learn(self, reward: float) -> None:
        """Update the policy with the reward of the last action; high = good. No effect without an action."""
        if self.last is None:
            return
        self.pending.append((self.last, reward - self.baseline))
        self.baseline += (1 - self.config.baseline) * (reward - self.baseline)
        self.last = None
        ppo = self.config.policy == "ppo"
        if len(self.pending) >= (self.config.horizon if ppo else 1):
            for _ in range(self.config.passes if ppo else 1):
                self._ascend(ppo=ppo)
            self.pending.clear()

    def _ascend(self, *, ppo: bool) -> None:
        """Apply one Adam step up the mean gain of the pending actions: A log probability, or PPO's clipped gain."""
        choices = [choice for choice, _ in self.pending]
        advantage = np.array([value for _, value in self.pending])
        states = np.array([choice.state for choice in choices])
        hidden, log_probabilities = self._forward(states)
        is_chosen = np.array([choice.chosen for choice in choices])[:, :, None] == np.arange(log_probabilities.shape[2])
        slope = advantage
        if ppo:
            old_log_probability = np.array([choice.log_chance for choice in choices])
            log_probability = log_probabilities[is_chosen].reshape(len(choices), -1).sum(axis=1)
            slope = clipped_slope(np.exp(log_probability - old_log_probability), advantage, clip=self.config.clip)
        # The gradient of a log probability by its logits is 1[chosen] - p.
        by_logits = (slope[:, None, None] * (is_chosen - np.exp(log_probabilities))).reshape(len(choices), -1) / len(
            choices
        )
        by_hidden = by_logits @ self._layers[2].T * (hidden > 0)
        value = (states.T @ by_hidden, by_hidden.sum(axis=0), hidden.T @ by_logits, by_logits.sum(axis=0))
        self._step(np.concatenate([gradient.ravel() for gradient in value]))

    def _step(self, gradient: Floats) -> None:
        """Apply a step of Adam (Kingma and Ba, arXiv 1412.6980), upwards."""
        self._num_updates += 1
        means, squares = self._moments
        means += (1 - _DECAYS[0]) * (gradient - means)
        squares += (1 - _DECAYS[1]) * (gradient * gradient - squares)
        mean_correction, square_correction = (1 - decay**self._num_updates for decay in _DECAYS)
        self.weights += self.config.lr / mean_correction * means / (np.sqrt(squares / square_correction) + _EPSILON)

    def _forward(self, states: Floats) -> tuple[Floats, Floats]:
        """Compute hidden units (h, u) and log probabilities (h, m, c) for states (h, i)."""
        w, b, v, d = self._layers
        hidden = np.maximum(states @ w + b, 0)
        logits = (hidden @ v + d).reshape(len(states), self.num_modalities, -1)
        logits = logits - logits.max(axis=2, keepdims=True)
        return hidden, logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))

    def _uniform(self, num_values: int) -> Floats:
        """Draw numbers (num_values,) in [0, 1)."""
        values: Floats = torch.rand(num_values, dtype=torch.float64, generator=self.generator).numpy()
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next actions depend on."""
        return {
            "weights": torch.from_numpy(self.weights.copy()),
            "moments": torch.from_numpy(self._moments.copy()),
            "num_climbs": self._num_updates,
            "chance": self.generator.get_state(),
            "baseline": self.baseline,
            "last": None if self.last is None else asdict(self.last),
            "waiting": [(asdict(choice), advantage) for choice, advantage in self.pending],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state, which may have been loaded to another device."""
        self.weights[:] = state["weights"].cpu().numpy()
        self._moments[:] = state["moments"].cpu().numpy()
        self._num_updates = state["num_climbs"]
        self.generator.set_state(state["chance"].cpu())
        self.baseline = state["baseline"]
        self.last = None if state["last"] is None else Choice(**state["last"])
        self.pending = [(Choice(**choice), advantage) for choice, advantage in state["waiting"]]


def clipped_slope(ratio: Floats, advantage: Floats, *, clip: float) -> Floats:
    """Compute the derivative by log r of PPO's gain min(r A, clip(r, 1 - clip, 1 + clip) A), of any shape (its eq. 7).

    `ratio` r is the probability of a choice now over that when it was made. r A, and 0 beyond the clip where the
    advantage A would move r further.
    """
    stopped = np.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
    return np.where(stopped, 0.0, ratio * advantage)


class DusRl(Dus):
    """DUS-RL, learned: a policy maps (s_hat^1..m, D^1..m) to a multiple of the batch size for each modality.

    reward = max_j |D_t^j| - max_j |D_{t+1}^j| + eta (change of the fused prediction's cumulative confidence). The paper
    has such a policy, state and action; the multiples, the reward and the policy's constants are ours, and so is that
    the fused confidence is cumulative, as D is: a single step's would be mostly noise. Without pairs that change is 0.
    It acts once in `every_steps` steps (ours), where the paper acts in each: an action takes half a millisecond beside
    a step of 14 ms, since all its data has left the processor's cache.
    """

    state_fields = (*Dus.state_fields, "_last_values")

    def initialize(self) -> None:
        """Draw the policy from the seed, the same one in all processes."""
        super().initialize()
        m = self.pool.num_modalities
        seed = int(hash_rank(["policy"], seed=self.seed, purpose="dus")[0] >> np.uint64(1))
        self.policy = Policy(self.config, num_inputs=2 * m, num_modalities=m, seed=seed)
        self._last_values: tuple[float, float] | None = None  # largest |D| and fused confidence at the last action

    def choose_quantities(self, discrepancy: list[float]) -> list[int]:
        """Update the policy with the reward of the last action and choose the next, every `every_steps` steps."""
        if (self.num_observed - 1) % self.config.every_steps:
            return self.quantities
        dus, largest = self.config, max(map(abs, discrepancy))
        if self._last_values is not None:
            reward = self._last_values[0] - largest + dus.eta * (self.fused - self._last_values[1])
            self.policy.learn(reward)
        self._last_values = (largest, self.fused)
        actions = self.policy.act([*self.confidence, *discrepancy])
        return [bounded_quantity(dus.multipliers[c], batch_size=self.batch_size, config=dus) for c in actions]

    def epoch_metrics(self) -> dict[str, float]:
        """Add the running mean of rewards."""
        return {**super().epoch_metrics(), "policy_reward": self.policy.baseline}

    def state_dict(self) -> dict[str, Any]:
        """Add the policy."""
        return {**super().state_dict(), "policy": self.policy.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state."""
        super().load_state_dict(state)
        self.policy.load_state_dict(state["policy"])
