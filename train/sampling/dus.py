"""DUS: unimodal samples in quantities that follow the cumulative discrepancy.

Letters: b batch size, m modalities, t steps since the start; s_hat^j cumulative confidence of modality j.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ...audit.errors import ConfigError
from ...audit.hashing import hash_rank
from ...rebalance.curriculum import OrderConfig, order_of
from ..batches import Batch, ModelReader, Rows, Step
from ..fusion import Mmtm
from ..network import FusionNet, Outputs
from .config import DusConfig
from .dus_policy import Policy
from .sampler import Sampler

log = logging.getLogger("mmaudit")


def cumulative_discrepancy(confidence: Sequence[float]) -> list[float]:
    """D^j = s_hat^j - mean of the others' s_hat, (m,) in [-1, 1]: above 0, modality j is ahead. The form is ours."""
    total, others = sum(confidence), len(confidence) - 1
    return [each - (total - each) / others for each in confidence]


def lagging_quantities(confidence: Sequence[float], *, batch_size: int, config: DusConfig) -> list[int]:
    """Give the samples of each modality (m,): more for the one that lags in cumulative confidence. The form is ours.

    n^j = clip(round(b (1 + kappa (mean - s_hat^j) / mean)), least b, most b), mean over the modalities; b for all where
    the confidences differ by no more than the dead zone.
    """
    mean = sum(confidence) / len(confidence)
    if mean <= 0 or max(confidence) - min(confidence) <= config.dead_zone:
        return [batch_size] * len(confidence)
    shares = [1 + config.kappa * (mean - each) / mean for each in confidence]
    return [_quantity(share, batch_size=batch_size, config=config) for share in shares]


def _quantity(share: float, *, batch_size: int, config: DusConfig) -> int:
    """Give a share of the batch size in whole samples, one at least."""
    least, most = max(1, round(config.least * batch_size)), round(config.most * batch_size)
    return min(max(round(share * batch_size), least), most)


class Dus(Sampler):
    """DUS (arXiv 2503.03792): each step has n^j samples of modality j, by the cumulative confidences.

    s_hat_t^j = (t - 1) / t s_hat_{t-1}^j + s_t^j / t, where s_t^j is the step's mean confidence of modality j in the
    true class over the samples that it hears, by their weights.
    Paired (ours): a step has the next max_j n^j rows of a shuffled pass. Modality j hears the first n^j of them, the
    fused loss learns from the first min_j n^j. The epoch ends when the pass does; its last step may have fewer rows.
    Not paired: each modality has a pass of its own, no row is heard in two modalities at once, and the epoch ends when
    the first pass does. There is nothing then that a fused loss could learn from: it is refused where the fused answer
    is more than what the modalities say alone.
    Within a step rows are dealt out evenly by the modalities that hear them, so that every process has some of all.
    """

    adaptive = True

    def begin(self) -> None:
        """Begin with the batch size for all."""
        m = self.pool.num_modalities
        self.heard = 0  # steps, t
        self.confidence = [0.0] * m  # s_hat
        self.fused = 0.0  # the same of the fused answer
        self.quantities = [self.batch_size] * m
        self._names = [str(j) for j in range(m)]
        self._epoch, self._taken, self._at = 0, 0, [0] * m
        self._sampled = [0] * m  # in this epoch

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Refuse samples without pairs where only pairs would teach the fused answer."""
        self._names = list(model_reader.net.plan.modalities)
        if not self.config.dus.paired and _wants_pairs(model_reader.net):
            beside = " beside each modality's own head" if model_reader.net.plan.own_heads else ""
            raise ConfigError(
                f"sampling.dus.paired = false leaves no pairs, and nothing else teaches the classifier of "
                f"--fusion {model_reader.net.plan.fusion}{beside}; "
                "take --fusion concat or late, without heads of their own, or pairs"
            )

    def steps(self, epoch: int, *, after: int = 0) -> Iterator[Step]:
        """Give steps by what has been observed until each is asked for; `after` > 0 goes on from a state."""
        passes = self._passes(epoch)
        if after == 0:
            self._epoch, self._taken, self._at = epoch, 0, [0] * len(passes)
            self._sampled = [0] * self.pool.num_modalities
        assert (self._epoch, self._taken) == (epoch, after), "a run goes on from the state after its last step"
        while max(self._at) < len(self.pool):
            step = self._paired(passes[0]) if self.config.dus.paired else self._single(passes)
            self._taken += 1
            yield step

    def _passes(self, epoch: int) -> list[Rows]:
        """Give the shuffled pass of all modalities, or that of each."""
        pool, config = self.pool, OrderConfig(order="shuffled")
        seeds = [self.seed]
        if not self.config.dus.paired:
            seeds = hash_rank(map(str, range(pool.num_modalities)), seed=self.seed, purpose="dus").tolist()
        return [order_of(rank=pool.rank, key=pool.key, config=config, seed=seed, epoch=epoch) for seed in seeds]

    def _paired(self, order: Rows) -> Step:
        rows = order[self._at[0] : self._at[0] + max(self.quantities)]
        self._at[0] += len(rows)
        found = [min(number, len(rows)) for number in self.quantities]
        self._count(found)
        if min(found) == len(rows):
            return Step(rows=rows)
        ends = sorted({0, *found})
        turn = _deal([last - first for first, last in pairwise(ends)])
        present = turn[:, None] < np.array(found)
        return Step(rows=rows[turn], present=present, fused=turn < min(found))

    def _single(self, orders: Sequence[Rows]) -> Step:
        each = [order[at : at + n] for order, at, n in zip(orders, self._at, self.quantities, strict=True)]
        found = [len(rows) for rows in each]
        self._at = [at + n for at, n in zip(self._at, found, strict=True)]
        self._count(found)
        turn = _deal(found)
        modality = np.repeat(np.arange(len(each)), found)[turn]
        present = modality[:, None] == np.arange(len(each))
        return Step(rows=np.concatenate(each)[turn], present=present, fused=np.zeros(len(turn), dtype=np.bool_))

    def _count(self, found: Sequence[int]) -> None:
        self._sampled = [before + n for before, n in zip(self._sampled, found, strict=True)]

    def observe(self, outputs: Outputs, batch: Batch) -> None:
        """Take the step's confidences into the running means, and choose the next quantities by them."""
        means = (outputs.confidence(batch.label) * batch.loss_weight).sum(dim=1)
        self.distributed.sum_([means])
        fused, *own = means.tolist()
        if not all(map(math.isfinite, (fused, *own))):
            return  # a step that overflowed in float16 says nothing, and its gradients are not taken either
        self.heard += 1
        self.fused += (fused - self.fused) / self.heard
        self.confidence = [mean + (new - mean) / self.heard for mean, new in zip(self.confidence, own, strict=True)]
        discrepancy = cumulative_discrepancy(self.confidence)
        self.quantities = self.choose(discrepancy)
        log.debug("step %d: cumulative discrepancy %s, next samples %s", self.heard, discrepancy, self.quantities)

    @abstractmethod
    def choose(self, discrepancy: list[float]) -> list[int]:
        """Give the next quantities (m,), which follow from the cumulative confidences and their discrepancy (m,)."""

    def numbers(self) -> dict[str, float]:
        """Give the last cumulative confidences and discrepancies, and the mean number of samples a step."""
        named = list(enumerate(self._names))
        discrepancy = cumulative_discrepancy(self.confidence)
        return {
            **{f"cumulative_confidence_{name}": self.confidence[j] for j, name in named},
            **{f"cumulative_discrepancy_{name}": discrepancy[j] for j, name in named},
            **{f"samples_{name}": self._sampled[j] / max(1, self._taken) for j, name in named},
        }

    def state_dict(self) -> dict[str, Any]:
        """Give the running means, what was chosen for the next step, and where the epoch stands."""
        return {
            "heard": self.heard,
            "confidence": list(self.confidence),
            "fused": self.fused,
            "quantities": list(self.quantities),
            "names": list(self._names),
            "epoch": self._epoch,
            "taken": self._taken,
            "at": list(self._at),
            "sampled": list(self._sampled),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.heard, self.confidence, self.fused = state["heard"], list(state["confidence"]), state["fused"]
        self.quantities, self._names = list(state["quantities"]), list(state["names"])
        self._epoch, self._taken = state["epoch"], state["taken"]
        self._at, self._sampled = list(state["at"]), list(state["sampled"])


class DusH(Dus):
    """DUS-H, the heuristic: the quantities follow from how far each modality lags."""

    def choose(self, discrepancy: list[float]) -> list[int]:
        """See lagging_quantities."""
        return lagging_quantities(self.confidence, batch_size=self.batch_size, config=self.config.dus)


class DusRl(Dus):
    """DUS-RL, learned: a policy sees (s_hat^1..m, D^1..m) and chooses a multiple of the batch size for each modality.

    reward = max_j |D_t^j| - max_j |D_{t+1}^j| + eta (change of the fused answer's cumulative confidence). The paper has
    such a policy, state and action; the multiples, the reward and the policy's constants are ours, and so is that the
    fused confidence is cumulative, as D is: a step's own would be all noise beside it. No pairs, no such change. It
    chooses once in `every_steps` steps (ours), where the paper chooses in each: beside a step of 14 ms a choice takes
    half a millisecond, since all that it needs has left the processor's cache.
    """

    def begin(self) -> None:
        """Draw the policy from the seed, the same one in all processes."""
        super().begin()
        m = self.pool.num_modalities
        seed = int(hash_rank(["policy"], seed=self.seed, purpose="dus")[0] >> np.uint64(1))
        self.policy = Policy(self.config.dus, num_inputs=2 * m, num_modalities=m, seed=seed)
        self._before: tuple[float, float] | None = None  # largest |D| and fused confidence at the last choice

    def choose(self, discrepancy: list[float]) -> list[int]:
        """Learn from what came of the last choice, and make the next, if it is time."""
        if (self.heard - 1) % self.config.dus.every_steps:
            return self.quantities
        dus, largest = self.config.dus, max(map(abs, discrepancy))
        if self._before is not None:
            reward = self._before[0] - largest + dus.eta * (self.fused - self._before[1])
            self.policy.learn(reward)
        self._before = (largest, self.fused)
        chosen = self.policy.act([*self.confidence, *discrepancy])
        return [_quantity(dus.multipliers[c], batch_size=self.batch_size, config=dus) for c in chosen]

    def numbers(self) -> dict[str, float]:
        """Add the running mean of rewards."""
        return {**super().numbers(), "policy_reward": self.policy.baseline}

    def state_dict(self) -> dict[str, Any]:
        """Add the policy."""
        before = None if self._before is None else list(self._before)
        return {**super().state_dict(), "policy": self.policy.state_dict(), "before": before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        super().load_state_dict(state)
        self.policy.load_state_dict(state["policy"])
        self._before = None if state["before"] is None else (state["before"][0], state["before"][1])


def _deal(sizes: Sequence[int]) -> Rows:
    """Give an order of blocks that follow each other, of these sizes, in which each is evenly spread over the whole."""
    place = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    return np.argsort(place, kind="stable")


def _wants_pairs(net: FusionNet) -> bool:
    """Tell whether the fused answer has weights that what each modality says alone has no part in."""
    return net.has_own_heads or isinstance(net.fusion, Mmtm)
