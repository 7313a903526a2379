"""ReconBoost: modalities trained in turns on what the others miss, then rectification of all.

ReconBoost, Hua et al., "ReconBoost: Boosting Can Achieve Modality Reconcilement" (ICML 2024, arXiv 2405.09321). All
modalities share one classifier h of two layers; z^j = h(f^j), and the prediction is beta sum_j z^j. Stage s = 0, 1, ...
has two phases, each with a new state of the optimiser:

    boosting, `stage_epochs`: modality j = s mod m and h learn from the residual of the others, which are frozen
        L = mean_i CE(z_i^j, y_i) (label_weight - residual_weight q_i[y_i]) / k
        q_i = softmax(beta sum_{l != j} z_i^l)
    rectification, `rectify_epochs`: all encoders, h and beta learn
        L = mean_i CE(beta sum_j z_i^j, y_i)

k classes. q has no gradient: the surer the others are of a sample, the less it counts. Weights, epochs and the order of
modalities are those of the authors' code for CREMA-D, with SGD, a rate of 0.01, momentum 0.9 and weight decay 5e-4. Its
commands start from unimodal models, so that all modalities are in the ensemble from the first stage on; here too, and
`--init` starts from trained encoders. Its memory consolidation, the squared difference of two modalities' predictions,
is computed from detached predictions and has no gradient: it is left out.

Ours: features of different widths are first mapped to one width by a layer each; h has half as many hidden units as
inputs, which is theirs for 512 features. The sum over more than two modalities is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...audit.parsing import check_ranges
from ..batches import Batch, ModelReader
from ..config import TrainConfig
from ..fusion import Fusion
from ..network import Outputs, cross_entropy
from .balancer import Balancer


class Ensemble(Fusion):
    """One classifier of two layers for all modalities; the fused logits are `rate` times the sum of its logits."""

    decomposes = True

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        same_width = len(set(num_features)) == 1
        width = num_features[0] if same_width else hidden
        self.bring = nn.ModuleList(nn.Identity() if same_width else nn.Linear(d, width) for d in num_features)
        num_hidden = max(1, width // 2)
        self.classifier = nn.Sequential(nn.Linear(width, num_hidden), nn.ReLU(), nn.Linear(num_hidden, num_classes))
        self.rate = nn.Parameter(torch.ones(()))

    def logits_of(self, modality: int, features: Tensor) -> Tensor:
        """Compute the logits (b, k) of one modality's features (b, d_j)."""
        logits: Tensor = self.classifier(self.bring[modality](features))
        return logits

    def unimodal_logits(self, features: Sequence[Tensor]) -> Tensor:
        """Compute each modality's logits."""
        return torch.stack([self.logits_of(j, f) for j, f in enumerate(features)])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Sum the unimodal logits, times the rate."""
        return self.rate * self.unimodal_logits(features).sum(dim=0)

    def fused_and_unimodal_logits(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the unimodal logits once."""
        logits = self.unimodal_logits(features)
        return self.rate * logits.sum(dim=0), logits


def stage_of(epoch: int, *, stage_epochs: int, rectify_epochs: int) -> tuple[int, bool, bool]:
    """Return the stage s of epoch 1, 2, ..., whether it boosts (else rectifies), and whether its phase begins."""
    stage, position = divmod(epoch - 1, stage_epochs + rectify_epochs)
    return stage, position < stage_epochs, position in (0, stage_epochs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconBoostConfig:
    """ReconBoost (ICML 2024).

    Args:
        stage_epochs: Epochs in which one modality learns, as in its code.
        rectify_epochs: Epochs in which all learn together after that, as in its code; 0 never does.
        label_weight: Weight of the cross entropy; 5 in its command for CREMA-D, 4 in those for AVE and ModelNet40.
        residual_weight: How much less a sample counts that the others predict, as in its code.
    """

    section: ClassVar[str] = "balancing.reconboost"
    stage_epochs: int = 4
    rectify_epochs: int = 4
    label_weight: float = 5.0
    residual_weight: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(self.section, self, stage_epochs="[1, 1e9]", rectify_epochs="[0, 1e9]")
        check_ranges(self.section, self, label_weight="(0, 1000]", residual_weight="[0, 1000]")


class ReconBoost(Balancer):
    """Boosting of one modality, then rectification of all, in stages of epochs. State: the epoch."""

    class_reason = "it weights samples by the probability of the true class"
    config_type = ReconBoostConfig
    paper = "Hua et al., ICML 2024"
    fusions = ()
    own_fusion = Ensemble
    fusion_reason = "its modalities share one classifier, whose logits are summed"
    state_fields = ("epoch",)
    config: ReconBoostConfig

    @classmethod
    def late_start(cls, config: ReconBoostConfig, settings: TrainConfig) -> str | None:
        """Return a warning where no second modality has a stage of its own."""
        length = config.stage_epochs + config.rectify_epochs
        if settings.finetune.epochs > length:
            return None
        return f"reconboost boosts the second modality only from epoch {length + 1} on (balancing.reconboost.*_epochs)"

    def initialize(self) -> None:
        """Set up the state."""
        assert isinstance(self.net.fusion, Ensemble)  # checked by methods.resolve
        self.fusion = self.net.fusion
        self.epoch = 1

    def _stage(self) -> tuple[int, bool, bool]:
        """See stage_of."""
        config = self.config
        return stage_of(self.epoch, stage_epochs=config.stage_epochs, rectify_epochs=config.rectify_epochs)

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Clear the state of the optimiser where a phase begins."""
        super().begin_epoch(epoch, model_reader)
        if self._stage()[2]:
            self.optimization.optimizer.state.clear()

    def forward(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Return outputs and loss, which trains one modality and the classifier, or everything."""
        stage, boosts, _ = self._stage()
        return self._boost(batch, stage % self.net.num_modalities) if boosts else super().forward(batch)

    def _boost(self, batch: Batch, modality: int) -> tuple[Outputs, Tensor]:
        with self.optimization.autocast():
            features = self.net.encode(batch.inputs, batch.present)
        with torch.no_grad():
            outputs = self.net.classify([f.detach() for f in features])
        with torch.autocast(features[0].device.type, enabled=False):
            logits = self.fusion.logits_of(modality, features[modality].float())
        residual_logits = (outputs.fused - self.fusion.rate * logits).detach()  # of the other modalities
        confidence = (-cross_entropy(residual_logits, batch.label)).exp()
        config, num_classes = self.config, logits.shape[1]
        weight = (config.label_weight - config.residual_weight * confidence) / num_classes
        loss = (cross_entropy(logits, batch.label) * weight * batch.loss_weight[1 + modality]).sum()
        return outputs, loss + self.head_loss(outputs, batch)

    def epoch_metrics(self) -> dict[str, float]:
        """Return the stage, whether it boosts, and the rate of the ensemble."""
        stage, boosts, _ = self._stage()
        return {"stage": float(stage), "boosting": float(boosts), "ensemble_rate": float(self.fusion.rate.detach())}
