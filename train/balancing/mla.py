"""MLA: alternating unimodal training of a shared classifier.

Zhang et al., "Multimodal Representation Learning by Alternating Unimodal Adaptation", CVPR 2024. The defaults follow
the paper: the classifier's gradient is projected off the features of earlier turns, and the fused logits are weighted
by entropy. In the released code the projection never runs, since it looks for a parameter by a name that none has, and
the default fusion has fixed weights, 0.55 of audio and 0.45 of vision: `projection = "none"` with `weights = [0.55,
0.45]` is what the code does. Its optimiser is SGD with momentum 0.9, learning rate 1e-3, weight decay 1e-4, a tenth of
the rate after 70 of 100 epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...audit.errors import ConfigError
from ...audit.parsing import check_choices, check_ranges
from ..batches import Batch
from ..fusion import Shared
from ..network import Outputs, separate_losses
from .balancer import Balancer

PROJECTIONS = ("features", "none")
RIDGE = 1e-3  # ours


def project_out(projection: Tensor, direction: Tensor, *, ridge: float) -> Tensor:
    """Remove a direction h (d,) from a projection P (d, d): P - (P h)(P h)^T / (ridge + h^T P h).

    A step of recursive least squares, `ridge` above 0. Of P h the share ridge / (ridge + h^T P h) remains; P stays
    symmetric, and unchanged on every v with v^T P h = 0.
    """
    along = projection @ direction
    scaled = along / (ridge + (direction @ along).clamp_min(0)).sqrt()
    return torch.addr(projection, scaled, scaled, alpha=-1)


def relax_to_identity(projection: Tensor) -> Tensor:
    """Move P (d, d) by 1 / d of the way back to the identity, before every modality's turn: ours.

    Otherwise P fades, since the means of batches differ in every direction, and the classifier stops learning: with 512
    features and batches of 256 the mean of P's diagonal was 0.22 after 200 steps and 0.002 after 400, and with this it
    is 0.64 and 0.57. A direction that does not occur again is thus restored over about d turns.
    """
    share = 1 / len(projection)
    relaxed = projection * (1 - share)
    relaxed.diagonal().add_(share)
    return relaxed


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaConfig:
    """MLA (CVPR 2024).

    Args:
        projection: "features", off which the classifier's gradient is projected, as in the paper, or "none", as the
            released code runs.
        ridge: Ridge of the projection: how much of an earlier direction remains (ours).
        weights: Fixed fusion weights of the modalities, in their order, at least 0; 0.55 and 0.45 in the released code.
            None: by entropy, as in the paper.
    """

    section: ClassVar[str] = "balancing.mla"
    projection: str = "features"
    ridge: float = RIDGE
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_choices("balancing.mla", self, projection=PROJECTIONS)
        check_ranges("balancing.mla", self, ridge="[1e-12, 1000]", weights="[0, inf)")
        if self.projection == "none" and self.ridge != MlaConfig.__dataclass_fields__["ridge"].default:
            raise ConfigError(
                "balancing.mla.ridge has no effect with balancing.mla.projection none: remove one of them"
            )
        if self.weights is not None and not any(self.weights):
            raise ConfigError("balancing.mla.weights are all 0: no modality would be used")


class Mla(Balancer):
    """Alternating updates: for each modality j, L_j = CE(z^j) trains encoder j and the shared classifier only."""

    class_reason = "its modalities are weighted by the entropy of class probabilities"
    config_type = MlaConfig
    paper = "Zhang et al., CVPR 2024"
    accumulation_reason = "a batch is one step for each modality"
    fusions = ("shared",)
    fusion_reason = "it trains one classifier that all modalities share, one modality after another"
    has_unimodal_loss = True
    state_fields = ("projection", "last_feature")
    config: MlaConfig

    def initialize(self) -> None:
        """Set up the state."""
        assert isinstance(self.net.fusion, Shared)  # checked by methods.resolve
        self.fusion = self.net.fusion
        weights, names = self.config.weights, self.net.config.modalities
        if weights is not None:
            if len(weights) != len(names):
                raise ConfigError(
                    f"balancing.mla.weights has {len(weights)} entries for {len(names)} modalities: {', '.join(names)}"
                )
            self.fusion.weights.copy_(torch.tensor(weights))  # saved with the model
        weight = self.fusion.head.weight
        self.projection = torch.eye(weight.shape[1], device=weight.device)
        self.last_feature = torch.zeros(weight.shape[1], device=weight.device)  # mean feature of the last turn

    def step(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Train each modality in turn. No turn changes another's features, so all are encoded at once."""
        with self.optimization.autocast():
            features = self.net.encode(batch.inputs, batch.present)
            with torch.no_grad():
                outputs = self.net.classify([f.detach() for f in features])
        losses = [self._turn(j, feature, batch) for j, feature in enumerate(features)]
        return outputs, torch.stack(losses).mean()

    def _turn(self, modality: int, feature: Tensor, batch: Batch) -> Tensor:
        with self.optimization.autocast():
            projected = self.fusion.bring[modality](feature)
            logits = self.fusion.head(projected)
            head_logits = self.net.heads[modality](feature.detach()) if self.net.has_own_heads else None
        weight = batch.loss_weight[1 + modality]
        loss = (self.net.loss_of(logits, batch.label) * weight).sum()
        total_loss = loss
        if head_logits is not None:
            total_loss = loss + (self.net.loss_of(head_logits, batch.label) * weight).sum()
        self.optimization.backward(total_loss)
        if self.config.projection == "features":
            self._project(projected.detach().float(), weight)
        self.optimization.apply()
        return loss.detach()

    @torch.no_grad()
    def _project(self, features: Tensor, weight: Tensor) -> None:
        """Project the classifier's gradient off earlier features and record the current ones, in all processes."""
        self.projection = project_out(relax_to_identity(self.projection), self.last_feature, ridge=self.config.ridge)
        gradient = self.fusion.head.weight.grad
        assert gradient is not None
        self.fusion.head.weight.grad = gradient @ self.projection
        self.last_feature = (weight @ features).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # of a step that overflowed
        self.distributed.sum_([self.last_feature])

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the mean of the modalities' losses, which a step minimises one by one."""
        return batch.mean_unimodal(separate_losses(outputs, batch.label)[1]).mean()
