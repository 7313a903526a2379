"""PMR: prototypical modal rebalance.

PMR, Fan et al. (CVPR 2023). A class has a prototype in each modality, the mean of its features there; a modality's
class probabilities are a softmax over classes of minus the Euclidean distance to the prototypes. With S^j the mean
probability of the true class by modality j over the samples of a step, and PCE^j the mean cross entropy:

    L = mean_i CE(z_i^fused, y_i) + alpha sum_j w^j PCE^j
    w^j = 1 where S^j < mean_{l != j} S^l, else 0                       weight = "hard", the authors' code
    w^j = clip(mean_{l != j} S^l / S^j - 1, 0, 1)                       weight = "ratio"

so that the features of the weaker modality move to its class prototypes. S = (0.30, 0.27) gives w = (0, 1) by "hard"
and (0, 0.11) by "ratio", which is ours, and so is the mean of the others for more than two modalities. Prototypes are
computed before every epoch in eval mode, P <- momentum P + (1 - momentum) mean, in the authors' code and here from the
third epoch on: those before the second replace those of the untrained network.

Ours: they are the means of up to 2,048 training samples, or 16 a class, the same ones always (the authors' code: a
tenth of the training set, drawn again each time); a class with none among them has no prototype, and its samples no
PCE. The paper's second regulariser, PER, the entropy of the stronger modality in the first epochs, is left out: its
weight and its span could not be read, and the authors' code has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ...audit.parsing import check_choices, check_ranges
from ..batches import Batch, ModelReader, sample_rows
from ..network import Outputs, cross_entropy
from .balancer import Balancer
from .ogm import mean_of_others

_MIN_ROWS, _ROWS_PER_CLASS = 2_048, 16
_MIN_SQUARED_DISTANCE = 1e-6  # the square root has no gradient at 0
_RATIO_TOLERANCE = 1e-6  # a lag that rounding can cause among equal modalities, where the hard weight would jump
LAG_WEIGHTS = ("hard", "ratio")


def distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """Compute Euclidean distances (b, k) of features (b, d) to prototypes (k, d)."""
    square = torch.addmm(prototypes.square().sum(dim=1), features, prototypes.T, alpha=-2.0)
    return (square + features.square().sum(dim=1, keepdim=True)).clamp(min=_MIN_SQUARED_DISTANCE).sqrt()


def lag_weights(score: Tensor, *, weight: str) -> Tensor:
    """Compute the weights w (m,) in [0, 1] from scores S (m,), any multiple of them; high = behind.

    weight: one of LAG_WEIGHTS, see above. A modality that no sample of the step uses has a score of 0 and weight 0.
    """
    other_scores = mean_of_others(score, score > 0)
    lag = other_scores / torch.where(score > 0, score, torch.inf) - 1.0
    return (lag > _RATIO_TOLERANCE).to(score.dtype) if weight == "hard" else lag.clamp(0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PmrConfig:
    """PMR (CVPR 2023). The defaults are those of the authors' code.

    Args:
        alpha: Weight of the prototype loss; the authors' scripts have 2 to 5 on CREMA-D.
        weight: Weight of each modality's prototype loss: "hard", 1 for a modality that is behind, or "ratio", in
            proportion to its lag (ours).
        momentum: Momentum of the prototypes; mostly 0 in the authors' scripts, 0.5 in BalanceBenchmark.
        last_epoch: Last epoch with the prototype loss: epochs 0 to 100 in the authors' code, to 70 in its scripts.
    """

    section: ClassVar[str] = "balancing.pmr"
    alpha: float = 1.0
    weight: str = "hard"
    momentum: float = 0.2
    last_epoch: int = 101

    def __post_init__(self) -> None:
        check_choices("balancing.pmr", self, weight=LAG_WEIGHTS)
        check_ranges("balancing.pmr", self, alpha="[0, 1000]", momentum="[0, 1]", last_epoch="[0, 1e9]")


class Pmr(Balancer):
    """Fused loss plus prototype loss of weaker modalities. State: epoch, weights (m,), prototypes (k, d_j)."""

    class_reason = "it has one prototype per class"
    config_type = PmrConfig
    paper = "Fan et al., CVPR 2023"
    accumulation_reason = "its weights compare the modalities over all samples of a step"
    has_unimodal_loss = True
    evaluates = ("train",)
    state_fields = ("epoch", "_weight", "_prototypes", "_seen")
    config: PmrConfig

    def initialize(self) -> None:
        """Set up the state."""
        device, k = self.device, len(self.net.config.classes)
        self.epoch = 0
        self._sizes = [int(encoder.num_features) for encoder in self.net.encoders]  # type: ignore[arg-type]
        self._prototypes = [torch.zeros(k, size, device=device) for size in self._sizes]
        self._seen = torch.zeros(k, dtype=torch.bool, device=device)  # classes that have prototypes
        self._weight = torch.zeros(self.net.num_modalities, device=device)

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Update the prototypes from the current features."""
        super().begin_epoch(epoch, model_reader)
        self._weight = torch.zeros_like(self._weight)
        if epoch > self.config.last_epoch:
            return
        readings = model_reader.read(
            _features_and_label, rows=sample_rows(model_reader, max(_MIN_ROWS, _ROWS_PER_CLASS * len(self._seen)))
        )
        # (k, r); a matrix product sums in a fixed order.
        membership = functional.one_hot(readings[-1].long(), len(self._seen)).float().T
        count = membership.sum(dim=1, keepdim=True)
        # Prototypes of the untrained network, before the first epoch, have no part in later ones.
        had_prototype, has_samples = self._seen[:, None] & (epoch > 2), count > 0
        for j, end in enumerate(accumulate(self._sizes)):
            mean = membership @ readings[end - self._sizes[j] : end].T / count.clamp(min=1.0)
            moved = torch.where(had_prototype, mean.lerp(self._prototypes[j], self.config.momentum), mean)
            self._prototypes[j] = torch.where(has_samples, moved, self._prototypes[j])
        self._seen = self._seen | has_samples.squeeze(1)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the mean cross entropy of the fused logits plus that of the prototypes of weaker modalities."""
        loss = self.fused_loss(outputs, batch)
        if self.epoch > self.config.last_epoch:
            return loss
        losses = torch.stack(
            [self._cross_entropy(f, p, batch.label) for f, p in zip(outputs.features, self._prototypes, strict=True)]
        )
        has_prototype = self._seen[batch.label]
        score = batch.mean_unimodal((-losses.detach()).exp())  # 0 where a class has no prototype
        self.distributed.sum_([score])
        self._weight = lag_weights(score, weight=self.config.weight)
        return loss + self.config.alpha * (self._weight @ batch.mean_unimodal(losses.masked_fill(~has_prototype, 0.0)))

    def _cross_entropy(self, features: Tensor, prototypes: Tensor, label: Tensor) -> Tensor:
        """Compute each sample's cross entropy (b,) by the prototypes of one modality."""
        logits = -distances(features.float(), prototypes)
        return cross_entropy(logits.masked_fill(~self._seen, -torch.inf), label)

    def epoch_metrics(self) -> dict[str, float]:
        """Return the weights of the last step by modality."""
        return self.by_modality("lag", self._weight)


def _features_and_label(outputs: Outputs, label: Tensor) -> Tensor:
    """Stack the features of all modalities and the label (sum of d_j + 1, b)."""
    return torch.cat([*(f.float() for f in outputs.features), label[:, None].float()], dim=1).T
