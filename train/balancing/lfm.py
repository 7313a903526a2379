"""LFM: the fused loss, and the divergence of the modalities' predictions, weighted by a polynomial in the epoch.

LFM, Yang et al., "Facilitating Multimodal Classification via Dynamically Learning Modality Gap" (NeurIPS 2024). With
p^j = softmax(z^j), M = (p^a + p^v) / 2 and epoch t = 0, 1, ...:

    z_i^fused = (z_i^a + z_i^v) / 2
    L = 2 (a1 mean_i CE(z_i^fused, y_i) + (1 - a1) mean_i D(p_i^a, p_i^v))        a1 = sum_n c_n t^n
    D = KL(M || p^a) / 2 + KL(M || p^v) / 2        in their code; KL(p || M) would be the Jensen-Shannon divergence

The coefficients c_n are those of their code, a fit to the weights that were learned on CREMA-D: a1 is 0.205 at first,
0.54 at t = 100, 1.01 at t = 180 and 0.92 at t = 199. The learning of the weights itself, by gradients on a batch, is
left out. Their code was read in a public copy of it; the paper itself was not read.

Ours: a1 is kept within [0, 1], and after t = 199 it stays as it is then, since the polynomial falls below 0 at t = 227;
for more than two modalities the fused logits are the mean of all, and D is the mean over pairs, as in BalanceBenchmark,
each over the samples that have both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from ...audit.parsing import check_choices, check_ranges
from ..batches import Batch
from ..fusion import Late
from ..network import Outputs
from .balancer import Balancer

DIVERGENCES = ("reverse", "js")
_LAST_TERM = 199  # largest t: see the module


def fused_weight(epoch: int, coefficients: Sequence[float]) -> float:
    """Compute a1 in [0, 1], the weight of the fused loss in epoch 1, 2, ..., from the coefficients of 1, t, t^2, ..."""
    t = min(epoch - 1, _LAST_TERM)
    return min(max(math.fsum(c * t**n for n, c in enumerate(coefficients)), 0.0), 1.0)


def divergence(first: Tensor, second: Tensor, *, kind: str) -> Tensor:
    """Compute the divergence D (b,) of logits (b, k) and (b, k), symmetric, 0 = equal predictions.

    kind: "reverse", KL(M || p), which has no upper bound, or "js", KL(p || M), at most log 2; M is their mean.
    """
    log_p, log_q = first.float().log_softmax(dim=1), second.float().log_softmax(dim=1)
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    if kind == "reverse":
        return (log_mean.exp() * (2 * log_mean - log_p - log_q)).sum(dim=1) / 2
    return (log_p.exp() * (log_p - log_mean) + log_q.exp() * (log_q - log_mean)).sum(dim=1) / 2


class MeanLate(Late):
    """A classifier on each modality; the fused logits are their mean."""

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the mean of the unimodal logits."""
        return super().forward(features) / len(self.num_features)

    def fused_and_unimodal_logits(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the mean of the unimodal logits, and these."""
        logits = self.unimodal_logits(features)
        return logits.mean(dim=0), logits


@dataclass(frozen=True, slots=True, kw_only=True)
class LfmConfig:
    """LFM (NeurIPS 2024).

    Args:
        coefficients: Coefficients of 1, t, t^2, ... in the weight of the fused loss, t the epoch from 0; the default is
            that of its code.
        divergence: Divergence of two modalities' predictions, one of DIVERGENCES: that of its code, or Jensen-Shannon.
    """

    section: ClassVar[str] = "balancing.lfm"
    coefficients: tuple[float, ...] = (
        *(2.04623704e-01, 3.35472727e-03, 1.22989557e-04),
        *(-2.92947416e-06, 2.23835486e-08, -5.39717505e-11),
    )
    divergence: str = "reverse"

    def __post_init__(self) -> None:
        check_choices(self.section, self, divergence=DIVERGENCES)
        check_ranges(self.section, self, coefficients="[-1e9, 1e9]")


class Lfm(Balancer):
    """L = 2 (a1 CE(fused) + (1 - a1) D), D the mean divergence over pairs of modalities. State: the epoch."""

    class_reason = "its divergence is one of class probabilities"
    config_type = LfmConfig
    paper = "Yang et al., NeurIPS 2024"
    accumulation_reason = "its divergence is a mean over the pairs of a step"
    own_fusion = MeanLate
    state_fields = ("epoch",)
    config: LfmConfig

    def initialize(self) -> None:
        """Set up the state."""
        self.epoch = 1

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the weighted sum of the fused loss and the mean divergence."""
        weight = fused_weight(self.epoch, self.config.coefficients)
        return 2 * (weight * self.fused_loss(outputs, batch) + (1 - weight) * self._mean_divergence(outputs, batch))

    def _mean_divergence(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute this process's part of the mean over pairs, each over the rows of the fused loss that have both."""
        pairs = list(combinations(range(self.net.num_modalities), 2))
        logits, weight = outputs.unimodal, batch.loss_weight[0]
        values = torch.stack([divergence(logits[i], logits[j], kind=self.config.divergence) for i, j in pairs])
        weights = weight.expand(len(pairs), -1)
        if batch.present is not None:
            weights = torch.stack([weight * (batch.present[:, i] & batch.present[:, j]) for i, j in pairs])
        total = weights.sum(dim=1)
        self.distributed.sum_([total])
        return ((values * weights).sum(dim=1) / total.clamp(min=1e-12)).mean()

    def epoch_metrics(self) -> dict[str, float]:
        """Return the weight of the fused loss."""
        return {"lfm_fused_weight": fused_weight(self.epoch, self.config.coefficients)}
