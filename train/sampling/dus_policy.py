"""The policy of DUS-RL.

Letters: m modalities, c choices for each, h steps that are learned from together, i numbers that a state has, u hidden
units. All of it is small and alike in all processes, because their states and rewards are. It is numpy on the CPU with
gradients by hand: with autograd, to learn and to choose took three times as long, 0.9 ms beside a step of 37.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .config import DusConfig

Floats = NDArray[np.float64]
_DECAYS, _LEAST = (0.9, 0.999), 1e-8  # of Adam


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was seen (i,), what was chosen for each modality (m,), and the log of how likely all that was."""

    state: list[float]
    chosen: list[int]
    log_chance: float


class Policy:
    """MLP, one hidden layer with ReLU, whose output is a categorical distribution over c choices for each modality.

    That there is such a network is the paper's (DUS, arXiv 2503.03792); its form, Adam and the constants are ours. At
    first every choice is as likely as any other: the last layer is 0. REINFORCE (Williams 1992) learns from each step
    alone, PPO (Schulman et al., arXiv 1707.06347) from `horizon` steps at a time in `passes` passes. Both take the
    reward less its running mean, which is 0 at first.
    """

    def __init__(self, config: DusConfig, *, num_inputs: int, num_modalities: int, seed: int) -> None:
        self.config, self.num_modalities = config, num_modalities
        self.generator = torch.Generator().manual_seed(seed)
        outputs = num_modalities * len(config.multipliers)
        shapes = [(num_inputs, config.hidden), (config.hidden,), (config.hidden, outputs), (outputs,)]
        sizes = [math.prod(shape) for shape in shapes]
        self.weights = np.zeros(sum(sizes))
        parts = np.split(self.weights, np.cumsum(sizes)[:-1])
        self._layers = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]  # views
        first = sizes[0] + sizes[1]
        self.weights[:first] = (2 * self._uniform(first) - 1) / math.sqrt(num_inputs)
        self._moments = np.zeros((2, len(self.weights)))  # running means of gradients and of their squares
        self._num_climbs = 0
        self.baseline = 0.0
        self.last: Choice | None = None
        self.waiting: list[tuple[Choice, float]] = []  # with their advantages

    def chances(self, state: Sequence[float]) -> Floats:
        """Give the chance (m, c) of each choice for each modality; rows sum to 1."""
        chances: Floats = np.exp(self._forward(np.array([state]))[1][0])
        return chances

    def act(self, state: Sequence[float]) -> list[int]:
        """Choose for each modality, (m,) in [0, c), by chance."""
        log_chances = self._forward(np.array([state]))[1][0]
        sums = np.exp(log_chances[:, :-1]).cumsum(axis=1)
        found = (sums <= self._uniform(self.num_modalities)[:, None]).sum(axis=1)
        chosen: list[int] = found.tolist()
        log_chance = float(log_chances[np.arange(self.num_modalities), found].sum())
        self.last = Choice(state=list(state), chosen=chosen, log_chance=log_chance)
        return chosen

    def learn(self, reward: float) -> None:
        """Learn from what came of the last choice; high = good. Nothing where none was made."""
        if self.last is None:
            return
        self.waiting.append((self.last, reward - self.baseline))
        self.baseline += (1 - self.config.baseline) * (reward - self.baseline)
        self.last = None
        ppo = self.config.policy == "ppo"
        if len(self.waiting) >= (self.config.horizon if ppo else 1):
            for _ in range(self.config.passes if ppo else 1):
                self._climb(ppo=ppo)
            self.waiting.clear()

    def _climb(self, *, ppo: bool) -> None:
        """One step of Adam up the mean gain of what waits: of A log chance, or of PPO's clipped one."""
        choices = [choice for choice, _ in self.waiting]
        advantage = np.array([found for _, found in self.waiting])
        states = np.array([choice.state for choice in choices])
        hidden, log_chances = self._forward(states)
        chosen = np.array([choice.chosen for choice in choices])[:, :, None] == np.arange(log_chances.shape[2])
        slope = advantage
        if ppo:
            before = np.array([choice.log_chance for choice in choices])
            now = log_chances[chosen].reshape(len(choices), -1).sum(axis=1)
            slope = clipped_slope(np.exp(now - before), advantage, clip=self.config.clip)
        # The gradient of a log chance by its logits is 1[chosen] - p.
        by_logits = (slope[:, None, None] * (chosen - np.exp(log_chances))).reshape(len(choices), -1) / len(choices)
        by_hidden = by_logits @ self._layers[2].T * (hidden > 0)
        found = (states.T @ by_hidden, by_hidden.sum(axis=0), hidden.T @ by_logits, by_logits.sum(axis=0))
        self._step(np.concatenate([each.ravel() for each in found]))

    def _step(self, gradient: Floats) -> None:
        """Adam (Kingma and Ba, arXiv 1412.6980), upwards."""
        self._num_climbs += 1
        means, squares = self._moments
        means += (1 - _DECAYS[0]) * (gradient - means)
        squares += (1 - _DECAYS[1]) * (gradient * gradient - squares)
        whole, whole_squares = (1 - decay**self._num_climbs for decay in _DECAYS)
        self.weights += self.config.lr / whole * means / (np.sqrt(squares / whole_squares) + _LEAST)

    def _forward(self, states: Floats) -> tuple[Floats, Floats]:
        """Give hidden units (h, u) and logs of the chances (h, m, c) for states (h, i)."""
        w, b, v, d = self._layers
        hidden = np.maximum(states @ w + b, 0)
        logits = (hidden @ v + d).reshape(len(states), self.num_modalities, -1)
        logits = logits - logits.max(axis=2, keepdims=True)
        return hidden, logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))

    def _uniform(self, number: int) -> Floats:
        """Draw numbers (number,) in [0, 1)."""
        drawn: Floats = torch.rand(number, dtype=torch.float64, generator=self.generator).numpy()
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """Give all that the next choices depend on."""
        return {
            "weights": torch.from_numpy(self.weights.copy()),
            "moments": torch.from_numpy(self._moments.copy()),
            "num_climbs": self._num_climbs,
            "chance": self.generator.get_state(),
            "baseline": self.baseline,
            "last": None if self.last is None else asdict(self.last),
            "waiting": [(asdict(choice), advantage) for choice, advantage in self.waiting],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, which may have been loaded to another device."""
        self.weights[:] = state["weights"].cpu().numpy()
        self._moments[:] = state["moments"].cpu().numpy()
        self._num_climbs = state["num_climbs"]
        self.generator.set_state(state["chance"].cpu())
        self.baseline = state["baseline"]
        self.last = None if state["last"] is None else Choice(**state["last"])
        self.waiting = [(Choice(**choice), advantage) for choice, advantage in state["waiting"]]


def clipped_slope(ratio: Floats, advantage: Floats, *, clip: float) -> Floats:
    """Give the slope by log r of PPO's gain min(r A, clip(r, 1 - clip, 1 + clip) A), of any shape (its eq. 7).

    `ratio` r is the chance of a choice now over that when it was made. r A, and 0 beyond the clip where the advantage A
    would push r further.
    """
    stopped = np.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
    return np.where(stopped, 0.0, ratio * advantage)
