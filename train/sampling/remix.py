"""Remix: each sample trains the modality that is least sure of it, in batches of one modality.

Letters: n samples, m modalities, k classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...audit.parsing import check_ranges
from ...rebalance.curriculum import OrderConfig, epoch_order
from ..batches import ModelReader, Step, split_order, start_warning
from ..config import TrainConfig
from ..network import Outputs
from .sampler import Sampler

Choice = NDArray[np.int16]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemixConfig:
    """Data Remixing (ICML 2025).

    Args:
        warmup_epochs: Epochs with all modalities of every sample before the first choice, as in its code.
        every_epochs: Epochs between two choices, as in its code.
    """

    section: ClassVar[str] = "sampling.remix"
    warmup_epochs: int = 10
    every_epochs: int = 1

    def __post_init__(self) -> None:
        check_ranges(self.section, self, warmup_epochs="[0, inf)", every_epochs="[1, inf)")


def choose_modality(information: NDArray[np.float32]) -> Choice:
    """Return the modality (n,) that each sample trains, from KL(p || uniform) (m, n): the smallest; the last if equal.

    Low = the modality's prediction is near uniform, the sample is hard for it.
    """
    choice: Choice = (len(information) - 1 - information[::-1].argmin(axis=0)).astype(np.int16)
    return choice


class Remix(Sampler):
    """Data Remixing (Ma et al., ICML 2025): single-modality passes over the samples that are hard for the modality.

    After the warm-up, the model is evaluated in eval mode before an epoch, and each sample is given to the modality j
    with the smallest KL(p_i^j || uniform) = log k - entropy of p_i^j, where p_i^j is its prediction by j alone. The
    epoch is then a shuffled pass over the samples of the last modality, after it one over those of the modality before
    it, and so on: batches have one modality each, and the others' features are 0, also in the fused loss. Of equal
    values, the last modality's is taken. This is the authors' code for two modalities; their loss is CE(fused) +
    CE(z^j), that of `sum`, with unimodal weights of 1/2 during the warm-up, which are 1 here.

    Ours: the order of passes for more than two modalities, and that a sample trains none that it does not have.
    """

    class_reason = "it compares class probabilities with uniform ones"
    config_type = RemixConfig
    paper = "Ma et al., ICML 2025"
    min_modalities = 2
    usual_balancing = "sum"
    balancing_reason = "its samples have one modality each, whose own loss they train too"
    state_fields = ("_choice", "_names")
    config: RemixConfig

    @classmethod
    def late_start(cls, config: RemixConfig, settings: TrainConfig) -> str | None:
        """Return a warning where the warm-up lasts to the last epoch."""
        return start_warning("sampling.remix.warmup_epochs", config.warmup_epochs + 1, settings, fallback="uniform")

    def initialize(self) -> None:
        """Start with all modalities of every sample."""
        self._choice: Choice | None = None
        self._names = [str(j) for j in range(self.pool.num_modalities)]

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Choose the modality of every sample, after the warm-up."""
        self._names = list(model_reader.net.config.modalities)
        since = epoch - 1 - self.config.warmup_epochs
        if since >= 0 and since % self.config.every_epochs == 0:
            self._choice = choose_modality(model_reader.read(_information).cpu().numpy())

    def steps(self, epoch: int, *, after: int = 0) -> Iterator[Step]:
        """Yield the steps of one pass per modality, the last modality first; in the warm-up of one pass."""
        pool, config = self.pool, OrderConfig(order="shuffled")
        order = epoch_order(rank=pool.rank, key=pool.key, config=config, seed=self.seed, epoch=epoch)
        if self._choice is None:
            yield from split_order(order, batch_size=self.batch_size, after=after)
            return
        steps = []
        for j in reversed(range(pool.num_modalities)):
            only = np.arange(pool.num_modalities) == j
            for step in split_order(order[self._choice[order] == j], batch_size=self.batch_size):
                steps.append(Step(rows=step.rows, present=np.tile(only, (len(step.rows), 1))))
        yield from steps[after:]

    def epoch_metrics(self) -> dict[str, float]:
        """Return the share of samples that train each modality; none in the warm-up."""
        if self._choice is None:
            return {}
        shares = np.bincount(self._choice, minlength=len(self._names)) / len(self._choice)
        return {f"remix_{name}": float(share) for name, share in zip(self._names, shares, strict=True)}


def _information(outputs: Outputs, label: Tensor) -> Tensor:
    """Compute KL(p^j || uniform) - log k (m, b); inf for a modality that a sample lacks, whose features are 0."""
    log_p = outputs.unimodal.float().log_softmax(dim=2)
    information = (log_p.exp() * log_p).sum(dim=2)
    is_absent = torch.stack([~f.any(dim=1) for f in outputs.features])
    return information.masked_fill(is_absent, torch.inf)
