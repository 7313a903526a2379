"""MSES: early stopping by modality.

Fujimori et al., "Modality-Specific Learning Rate Control for Multimodal Classification", ACPR 2019, in mmaudit's form:
its own validation loss decides, and all constants are ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..batches import Batch
from ..network import FusionNet, Outputs, cross_entropies
from ..optimizer import Optimization
from .balancer import Balancer, Validation
from .config import BalancingConfig


class Mses(Balancer):
    """L = CE(fused) + sum of the CEs of the modalities that are not frozen.

    A modality whose own validation loss has not fallen below its lowest for `patience` epochs is frozen: encoder and
    own head stay as they are, from that epoch on and not from its best (ours), and its loss leaves the sum. What the
    fused answer does with its features is still learned, also when all are frozen.
    """

    def __init__(self, net: FusionNet, optimization: Optimization, config: BalancingConfig, *, epochs: int) -> None:
        super().__init__(net, optimization, config, epochs=epochs)
        self.lowest = [math.inf] * net.num_modalities
        self.waited = [0] * net.num_modalities  # epochs since then
        self.learns = torch.ones(net.num_modalities, device=next(net.parameters()).device)  # 0: frozen

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Add up what is learned still."""
        fused, own = cross_entropies(outputs, batch.label)
        return batch.mean_fused(fused) + batch.mean_own(own) @ self.learns

    def end_epoch(self, epoch: int, found: Validation) -> None:
        """Freeze what has waited long enough."""
        for j, loss in enumerate(found.own_loss):
            self.waited[j] = 0 if loss < self.lowest[j] else self.waited[j] + 1
            self.lowest[j] = min(self.lowest[j], loss)  # in this order: NaN is not lower
        self._freeze([j for j, waited in enumerate(self.waited) if waited >= self.config.mses.patience])

    def _freeze(self, modalities: list[int]) -> None:
        """Freeze some more; an encoder is kept in eval mode then, so that no running mean of it moves either."""
        for j in modalities:
            self.optimization.frozen[j] = True
        still = [not any(p.requires_grad for p in encoder.parameters()) for encoder in self.net.encoders]
        self.net.fix_encoders([j for j, fixed in enumerate(still) if fixed or self.optimization.frozen[j]])
        learns = [not frozen for frozen in self.optimization.frozen]
        self.learns.copy_(torch.tensor(learns, dtype=torch.float32))

    def numbers(self) -> dict[str, float]:
        """Which are frozen: 1, or 0."""
        names = self.net.plan.modalities
        return {f"frozen_{name}": float(frozen) for name, frozen in zip(names, self.optimization.frozen, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """What has been seen of each, and which are frozen."""
        return {"lowest": list(self.lowest), "waited": list(self.waited), "frozen": list(self.optimization.frozen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.lowest, self.waited = list(state["lowest"]), list(state["waited"])
        self._freeze([j for j, frozen in enumerate(state["frozen"]) if frozen])
