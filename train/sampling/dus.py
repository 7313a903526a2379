"""DUS: unimodal samples in quantities that follow the cumulative discrepancy.

Letters: b batch size, m modalities, t steps since the start; s_hat^j cumulative confidence of modality j.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from ...audit.errors import ConfigError
from ...audit.hashing import hash_rank
from ...audit.parsing import check_choices, check_ranges
from ...rebalance.curriculum import OrderConfig, RowIndex, epoch_order
from ..batches import Batch, ModelReader, Step
from ..network import FusionNet, Outputs
from .sampler import Sampler

log = logging.getLogger("mmaudit")

POLICIES = ("reinforce", "ppo")


@dataclass(frozen=True, slots=True, kw_only=True)
class DusConfig:
    """Quantities of DUS (arXiv 2503.03792). What is sampled is the paper's; all constants are ours.

    Args:
        kappa: How strongly a weaker modality gets more samples.
        dead_zone: Spread of the cumulative confidences up to which every modality gets the batch size.
        min_share: Fewest samples of a modality per step, as a share of the batch size.
        max_share: Most samples of a modality per step, as a multiple of the batch size.
        paired: Modalities share their samples as far as their quantities allow; otherwise each draws independently.
        policy: Learning rule of dus-rl, one of POLICIES; the fields below are of dus-rl too.
        every_steps: Steps between two actions, and the span of each reward.
        hidden: Hidden units of the policy network.
        lr: Learning rate of the policy.
        eta: Weight of the change of the fused confidence in the reward.
        baseline: Decay of the running mean of rewards.
        clip: Clipping range of ppo.
        horizon: Actions between two updates of ppo.
        passes: Passes over them in each update of ppo.
        multipliers: Multiples of the batch size that the policy chooses from.
    """

    section: ClassVar[str] = "sampling.dus"
    kappa: float = 1.0
    dead_zone: float = 0.02
    min_share: float = 0.25
    max_share: float = 2.0
    paired: bool = True
    policy: str = "reinforce"
    every_steps: int = 4
    hidden: int = 64
    lr: float = 1e-3
    eta: float = 1.0
    baseline: float = 0.9
    clip: float = 0.2
    horizon: int = 16
    passes: int = 4
    multipliers: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)

    def __post_init__(self) -> None:
        check_choices(self.section, self, policy=POLICIES)
        counts = ("hidden", "every_steps", "horizon", "passes")
        check_ranges(self.section, self, min_share="(0, 1]", max_share="[1, inf)", baseline="[0, 1)")
        check_ranges(self.section, self, **dict.fromkeys(counts, "[1, inf)"))
        check_ranges(self.section, self, **dict.fromkeys(("kappa", "dead_zone", "eta"), "[0, inf)"))
        check_ranges(self.section, self, **dict.fromkeys(("lr", "clip", "multipliers"), "(0, inf)"))


def cumulative_discrepancy(confidence: Sequence[float]) -> list[float]:
    """Compute D^j = s_hat^j - mean of the others' s_hat, (m,) in [-1, 1]: above 0, j is ahead. The form is ours."""
    total, num_others = sum(confidence), len(confidence) - 1
    return [value - (total - value) / num_others for value in confidence]


def lagging_quantities(confidence: Sequence[float], *, batch_size: int, config: DusConfig) -> list[int]:
    """Compute the samples of each modality (m,): more for a lower cumulative confidence. The form is ours.

    n^j = clip(round(b (1 + kappa (mean - s_hat^j) / mean)), min_share b, max_share b), mean over the modalities; b for
    all where the confidences differ by no more than the dead zone.
    """
    mean = sum(confidence) / len(confidence)
    if mean <= 0 or max(confidence) - min(confidence) <= config.dead_zone:
        return [batch_size] * len(confidence)
    shares = [1 + config.kappa * (mean - value) / mean for value in confidence]
    return [bounded_quantity(share, batch_size=batch_size, config=config) for share in shares]


def bounded_quantity(share: float, *, batch_size: int, config: DusConfig) -> int:
    """Return a share of the batch size in whole samples, at least one, within the configured bounds."""
    minimum, maximum = max(1, round(config.min_share * batch_size)), round(config.max_share * batch_size)
    return min(max(round(share * batch_size), minimum), maximum)


class Dus(Sampler):
    """DUS (arXiv 2503.03792): each step has n^j samples of modality j, by the cumulative confidences.

    s_hat_t^j = (t - 1) / t s_hat_{t-1}^j + s_t^j / t, where s_t^j is the step's weighted mean confidence of modality j
    in the true class over the samples that use it.

    Paired (ours): a step has the next max_j n^j rows of a shuffled pass. Modality j uses the first n^j of them, the
    fused loss the first min_j n^j. The epoch ends when the pass does; its last step may have fewer rows. Not paired:
    each modality has its own pass, no row is used in two modalities at once, and the epoch ends when the first pass
    does. There are then no samples for a fused loss: unpaired sampling is an error where the fusion has weights that
    the unimodal logits do not use.

    Within a step rows are interleaved evenly by the modalities that use them, so that every process gets some of each.
    """

    config_type = DusConfig
    paper = "Jiang et al., arXiv 2503.03792"
    min_modalities = 2
    selects_per_modality = True
    usual_balancing = "sum"
    state_fields: ClassVar[tuple[str, ...]] = (
        *("num_observed", "confidence", "fused", "quantities"),
        *("_names", "_epoch", "_num_steps", "_positions", "_sampled"),
    )
    config: DusConfig

    adaptive = True

    def initialize(self) -> None:
        """Start with the batch size for all modalities."""
        m = self.pool.num_modalities
        self.num_observed = 0  # steps, t
        self.confidence = [0.0] * m  # s_hat
        self.fused = 0.0  # s_hat of the fused logits
        self.quantities = [self.batch_size] * m
        self._names = [str(j) for j in range(m)]
        self._epoch, self._num_steps, self._positions = 0, 0, [0] * m
        self._sampled = [0] * m  # in this epoch

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Raise ConfigError for unpaired samples where only pairs train the fusion."""
        self._names = list(model_reader.net.config.modalities)
        if not self.config.paired and _needs_pairs(model_reader.net):
            own_heads_text = " beside each modality's own head" if model_reader.net.config.own_heads else ""
            raise ConfigError(
                f"sampling.dus.paired = false leaves no pairs, and nothing else trains the classifier of "
                f"--fusion {model_reader.net.config.fusion}{own_heads_text}; "
                "use --fusion concat or late without own_heads, or paired samples"
            )

    def steps(self, epoch: int, *, after: int = 0) -> Iterator[Step]:
        """Yield steps by the quantities at the time each is requested; `after` > 0 continues from a state."""
        passes = self._passes(epoch)
        if after == 0:
            self._epoch, self._num_steps, self._positions = epoch, 0, [0] * len(passes)
            self._sampled = [0] * self.pool.num_modalities
        assert (self._epoch, self._num_steps) == (epoch, after), "a run resumes from the state after its last step"
        while max(self._positions) < len(self.pool):
            step = self._paired_step(passes[0]) if self.config.paired else self._unpaired_step(passes)
            self._num_steps += 1
            yield step

    def _passes(self, epoch: int) -> list[RowIndex]:
        """Return one shuffled pass for all modalities, or one for each."""
        pool, config = self.pool, OrderConfig(order="shuffled")
        seeds = [self.seed]
        if not self.config.paired:
            seeds = hash_rank(map(str, range(pool.num_modalities)), seed=self.seed, purpose="dus").tolist()
        return [epoch_order(rank=pool.rank, key=pool.key, config=config, seed=seed, epoch=epoch) for seed in seeds]

    def _paired_step(self, order: RowIndex) -> Step:
        rows = order[self._positions[0] : self._positions[0] + max(self.quantities)]
        self._positions[0] += len(rows)
        counts = [min(number, len(rows)) for number in self.quantities]
        self._count(counts)
        if min(counts) == len(rows):
            return Step(rows=rows)
        ends = sorted({0, *counts})
        order_of_rows = _interleave([last - first for first, last in pairwise(ends)])
        modality_mask = order_of_rows[:, None] < np.array(counts)
        return Step(rows=rows[order_of_rows], present=modality_mask, fused=order_of_rows < min(counts))

    def _unpaired_step(self, orders: Sequence[RowIndex]) -> Step:
        rows_by_modality = [
            order[start : start + n] for order, start, n in zip(orders, self._positions, self.quantities, strict=True)
        ]
        counts = [len(rows) for rows in rows_by_modality]
        self._positions = [start + n for start, n in zip(self._positions, counts, strict=True)]
        self._count(counts)
        order_of_rows = _interleave(counts)
        modality = np.repeat(np.arange(len(rows_by_modality)), counts)[order_of_rows]
        modality_mask = modality[:, None] == np.arange(len(rows_by_modality))
        return Step(
            rows=np.concatenate(rows_by_modality)[order_of_rows],
            present=modality_mask,
            fused=np.zeros(len(order_of_rows), dtype=np.bool_),
        )

    def _count(self, counts: Sequence[int]) -> None:
        self._sampled = [before + n for before, n in zip(self._sampled, counts, strict=True)]

    def observe(self, outputs: Outputs, batch: Batch) -> None:
        """Update the running means with the step's confidences, and the next quantities by them."""
        means = (outputs.confidence(batch.label) * batch.loss_weight).sum(dim=1)
        self.distributed.sum_([means])
        fused, *unimodal = means.tolist()
        if not all(map(math.isfinite, (fused, *unimodal))):
            return  # a step that overflowed in float16 is ignored; its gradients are not applied either
        self.num_observed += 1
        self.fused += (fused - self.fused) / self.num_observed
        self.confidence = [
            mean + (new - mean) / self.num_observed for mean, new in zip(self.confidence, unimodal, strict=True)
        ]
        discrepancy = cumulative_discrepancy(self.confidence)
        self.quantities = self.choose_quantities(discrepancy)
        log.debug(
            "step %d: cumulative discrepancy %s, next samples %s", self.num_observed, discrepancy, self.quantities
        )

    @abstractmethod
    def choose_quantities(self, discrepancy: list[float]) -> list[int]:
        """Return the next quantities (m,), from the cumulative confidences and their discrepancy (m,)."""

    def epoch_metrics(self) -> dict[str, float]:
        """Return the last cumulative confidences and discrepancies, and the mean number of samples per step."""
        names = list(enumerate(self._names))
        discrepancy = cumulative_discrepancy(self.confidence)
        return {
            **{f"cumulative_confidence_{name}": self.confidence[j] for j, name in names},
            **{f"cumulative_discrepancy_{name}": discrepancy[j] for j, name in names},
            **{f"samples_{name}": self._sampled[j] / max(1, self._num_steps) for j, name in names},
        }


class DusH(Dus):
    """DUS-H, the heuristic: the quantities follow from how far each modality is behind."""

    def choose_quantities(self, discrepancy: list[float]) -> list[int]:
        """See lagging_quantities."""
        return lagging_quantities(self.confidence, batch_size=self.batch_size, config=self.config)


def _interleave(sizes: Sequence[int]) -> RowIndex:
    """Return an order of consecutive blocks of these sizes that spreads each block evenly over the whole."""
    positions = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    return np.argsort(positions, kind="stable")


def _needs_pairs(net: FusionNet) -> bool:
    """Whether the fused logits have weights that the unimodal logits do not use."""
    return net.has_own_heads or net.fusion.needs_pairs
