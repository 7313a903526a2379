"""The policy of DUS-RL: how often should each choice be made, given what came of it?

Letters: m modalities, c choices for each, h steps that are learned from together. All of it is small, stands on the
CPU, and is alike in all processes, because their states and rewards are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import DusConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was seen, what was chosen for each modality (m,), and how likely that was: the log of the joint chance."""

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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            last = nn.Linear(config.hidden, num_modalities * len(config.multipliers))
            self.net = nn.Sequential(nn.Linear(num_inputs, config.hidden), nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=config.lr)
        self.baseline = 0.0
        self.last: Choice | None = None
        self.waiting: list[tuple[Choice, float]] = []  # with their advantages

    @torch.no_grad()
    def chances(self, state: Sequence[float]) -> Tensor:
        """Give the chance (m, c) of each choice for each modality; rows sum to 1."""
        return self._log_chances(torch.tensor(state)).exp()

    @torch.no_grad()
    def act(self, state: Sequence[float]) -> list[int]:
        """Choose for each modality, (m,) in [0, c), by chance."""
        log_chances = self._log_chances(torch.tensor(state))
        chosen = torch.multinomial(log_chances.exp(), 1, generator=self.generator)
        log_chance = float(log_chances.gather(1, chosen).sum())
        self.last = Choice(state=list(state), chosen=chosen.squeeze(1).tolist(), log_chance=log_chance)
        return self.last.chosen

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

    @torch.enable_grad()
    def _climb(self, *, ppo: bool) -> None:
        """One step of Adam up the gain of what waits."""
        choices = [choice for choice, _ in self.waiting]
        advantage = torch.tensor([found for _, found in self.waiting])
        log_chances = self._log_chances(torch.tensor([choice.state for choice in choices]))
        chosen = torch.tensor([choice.chosen for choice in choices])[:, :, None]
        log_chance = log_chances.gather(2, chosen).sum(dim=(1, 2))
        if ppo:
            before = torch.tensor([choice.log_chance for choice in choices])
            gain = clipped_gain((log_chance - before).exp(), advantage, clip=self.config.clip)
        else:
            gain = advantage * log_chance
        self.optimizer.zero_grad()
        torch.autograd.backward(-gain.mean())
        self.optimizer.step()

    def _log_chances(self, states: Tensor) -> Tensor:
        """Give the logs (..., m, c) for states (..., num_inputs)."""
        logits: Tensor = self.net(states)
        return logits.view(*states.shape[:-1], self.num_modalities, -1).log_softmax(dim=-1)

    def state_dict(self) -> dict[str, Any]:
        """Give all that the next choices depend on."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "chance": self.generator.get_state(),
            "baseline": self.baseline,
            "last": None if self.last is None else asdict(self.last),
            "waiting": [(asdict(choice), advantage) for choice, advantage in self.waiting],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, which may have been loaded to another device."""
        self.net.load_state_dict(state["net"])
        adam = state["optimizer"]
        moments = {number: {name: held.cpu() for name, held in each.items()} for number, each in adam["state"].items()}
        self.optimizer.load_state_dict({**adam, "state": moments})
        self.generator.set_state(state["chance"].cpu())
        self.baseline = state["baseline"]
        self.last = None if state["last"] is None else Choice(**state["last"])
        self.waiting = [(Choice(**choice), advantage) for choice, advantage in state["waiting"]]


def clipped_gain(ratio: Tensor, advantage: Tensor, *, clip: float) -> Tensor:
    """min(r A, clip(r, 1 - clip, 1 + clip) A), of any shape: the clipped surrogate objective of PPO, eq. 7.

    `ratio` r is the chance of a choice now over that when it was made. Beyond the clip there is no gradient where the
    advantage A would push r further.
    """
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
