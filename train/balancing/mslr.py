"""MSLR: learning rates by modality.

Yao and Mihalcea, "Modality-specific Learning Rates for Effective Multimodal Additive Late-fusion", Findings of ACL
2022: keep, smooth or dynamic. The rates of the last two are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..batches import Batch, ModelReader
from ..network import FusionNet, Outputs, cross_entropies
from ..optimizer import Optimization
from .balancer import Balancer, Validation
from .config import BalancingConfig


def smooth_factor(initial: float, *, epoch: int, epochs: int) -> float:
    """Return the multiplier of an initial factor in epoch 1, 2, ..., such that the product moves from the factor to 1.

    initial ** -t, t from 0 in the first epoch to 1 in the last: the product is initial ** (1 - t), even steps of its
    logarithm. A factor of 0 stays 0.
    """
    elapsed = (epoch - 1) / max(epochs - 1, 1)
    return float(initial**-elapsed) if initial > 0 else 1.0


def dynamic_factors(
    remaining: Sequence[float], *, strength: float, min_factor: float, max_factor: float
) -> list[float]:
    """Compute factors (m,) in [min_factor, max_factor]: (r_j / geometric mean of r) ** strength; above 1 = behind.

    remaining, r (m,) in (0, 1]: lowest unimodal validation loss so far, as a share of the initial one, see Mslr.
    """
    logs = [math.log(max(ratio, 1e-12)) for ratio in remaining]
    mean = sum(logs) / len(logs)
    bounds = (math.log(min_factor), math.log(max_factor))
    return [math.exp(min(max(strength * (ratio - mean), bounds[0]), bounds[1])) for ratio in logs]


def _unimodal_cross_entropy(outputs: Outputs, label: Tensor) -> Tensor:
    return cross_entropies(outputs, label)[1]


class Mslr(Balancer):
    """L = CE(fused) + sum_j CE(z^j); the rates of the encoders and of separate heads differ.

    keep: the factors of optim.modality_lr throughout. smooth: from those to the common rate, see smooth_factor.
    dynamic: times dynamic_factors of r_j = lowest unimodal validation loss so far / the one before training. The lowest
    and not the last, so that the rate of a modality that overfits does not rise.
    """

    def __init__(self, net: FusionNet, optimization: Optimization, config: BalancingConfig, *, epochs: int) -> None:
        super().__init__(net, optimization, config, epochs=epochs)
        factors = optimization.config.modality_lr_factors()
        self.initial_factors = [factors.get(name, 1.0) for name in net.config.modalities]
        self.initial_loss = [1.0] * net.num_modalities
        self.lowest_loss = [1.0] * net.num_modalities

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Set the factors that Optimization.begin_epoch uses."""
        super().begin_epoch(epoch, model_reader)
        config = self.config.mslr
        if config.mode == "smooth":
            self.optimization.lr_factors = [
                smooth_factor(factor, epoch=epoch, epochs=self.epochs) for factor in self.initial_factors
            ]
        elif config.mode == "dynamic":
            if epoch == 1:
                self.initial_loss = model_reader.read_validation(_unimodal_cross_entropy).double().mean(dim=1).tolist()
                self.lowest_loss = list(self.initial_loss)
            remaining = [
                low / max(first, 1e-12) for low, first in zip(self.lowest_loss, self.initial_loss, strict=True)
            ]
            self.optimization.lr_factors = dynamic_factors(
                remaining, strength=config.strength, min_factor=config.min_factor, max_factor=config.max_factor
            )

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of the losses."""
        return self.summed_losses(outputs, batch)

    def end_epoch(self, epoch: int, validation: Validation) -> None:
        """Update the lowest losses."""
        self.lowest_loss = [
            min(low, loss) for low, loss in zip(self.lowest_loss, validation.unimodal_loss, strict=True)
        ]

    def epoch_metrics(self) -> dict[str, float]:
        """Return each modality's factor on the common learning rate."""
        factors = zip(self.net.config.modalities, self.initial_factors, self.optimization.lr_factors, strict=True)
        return {f"rate_{name}": initial * rate for name, initial, rate in factors}

    def state_dict(self) -> dict[str, Any]:
        """Return the initial and the lowest losses."""
        return {"first": list(self.initial_loss), "lowest": list(self.lowest_loss)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state."""
        self.initial_loss, self.lowest_loss = list(state["first"]), list(state["lowest"])
