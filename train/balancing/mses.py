"""MSES: early stopping by modality.

Fujimori et al., "Modality-Specific Learning Rate Control for Multimodal Classification", ACPR 2019, in mmaudit's form:
each modality's own validation loss is the criterion, and all constants are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...audit.parsing import check_ranges
from ..batches import Batch
from ..network import Outputs, cross_entropies
from .balancer import Balancer, Validation


@dataclass(frozen=True, slots=True, kw_only=True)
class MsesConfig:
    """Modality-specific early stopping (2019), in mmaudit's form.

    Args:
        patience: Epochs without a lower unimodal validation loss after which a modality is frozen.
    """

    section: ClassVar[str] = "balancing.mses"
    patience: int = 5

    def __post_init__(self) -> None:
        check_ranges("balancing.mses", self, patience="[1, 1e9]")


class Mses(Balancer):
    """L = CE(fused) + sum of the CEs of the modalities that are not frozen.

    A modality whose unimodal validation loss has not fallen below its lowest for `patience` epochs is frozen: encoder
    and separate head stay as they are, from that epoch on and not from its best (ours), and its loss leaves the sum.
    The fusion still trains on its features, also when all are frozen.
    """

    config_type = MsesConfig
    paper = "Fujimori et al., ACPR 2019"
    has_unimodal_loss = True
    evaluates = ("validation",)
    state_fields = ("lowest_loss", "epochs_without_improvement")
    config: MsesConfig

    def initialize(self) -> None:
        """Set up the state."""
        self.lowest_loss = [math.inf] * self.net.num_modalities
        self.epochs_without_improvement = [0] * self.net.num_modalities
        self.loss_mask = torch.ones(self.net.num_modalities, device=self.device)  # 0: frozen

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of the losses that are still trained."""
        fused, unimodal = cross_entropies(outputs, batch.label)
        return batch.mean_fused(fused) + batch.mean_unimodal(unimodal) @ self.loss_mask

    def end_epoch(self, epoch: int, validation: Validation) -> None:
        """Freeze modalities that have not improved for `patience` epochs."""
        for j, loss in enumerate(validation.unimodal_loss):
            self.epochs_without_improvement[j] = (
                0 if loss < self.lowest_loss[j] else self.epochs_without_improvement[j] + 1
            )
            self.lowest_loss[j] = min(self.lowest_loss[j], loss)  # in this order: NaN is not lower
        self._freeze(
            [j for j, num_epochs in enumerate(self.epochs_without_improvement) if num_epochs >= self.config.patience]
        )

    def _freeze(self, modalities: list[int]) -> None:
        """Freeze modalities; their encoders are kept in eval mode, so that no running mean changes either."""
        for j in modalities:
            self.optimization.frozen[j] = True
        untrainable = [not any(p.requires_grad for p in encoder.parameters()) for encoder in self.net.encoders]
        self.net.freeze_encoders(
            [j for j, is_untrainable in enumerate(untrainable) if is_untrainable or self.optimization.frozen[j]]
        )
        learns = [not frozen for frozen in self.optimization.frozen]
        self.loss_mask.copy_(torch.tensor(learns, dtype=torch.float32))

    def epoch_metrics(self) -> dict[str, float]:
        """Return which modalities are frozen: 1, or 0."""
        return self.by_modality("frozen", self.optimization.frozen)

    def state_dict(self) -> dict[str, Any]:
        """Return the lowest losses, the epochs since, and which modalities are frozen."""
        return {**super().state_dict(), "frozen": list(self.optimization.frozen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state."""
        super().load_state_dict(state)
        self._freeze([j for j, frozen in enumerate(state["frozen"]) if frozen])
