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


def smooth_rate(given: float, *, epoch: int, epochs: int) -> float:
    """Give what a given factor is multiplied by in epoch 1, 2, ..., so that the product goes from it to 1.

    given ** -t, t from 0 in the first epoch to 1 in the last: the product is given ** (1 - t), even steps of its
    logarithm. A factor of 0 stays 0.
    """
    elapsed = (epoch - 1) / max(epochs - 1, 1)
    return float(given**-elapsed) if given > 0 else 1.0


def dynamic_rates(left: Sequence[float], *, strength: float, least: float, most: float) -> list[float]:
    """Give factors (m,) in [least, most]: (r_j / geometric mean of r) ** strength; above 1 for one that lags behind.

    left, r (m,) in (0, 1]: share of its own validation loss that each has left, see Mslr.
    """
    logs = [math.log(max(each, 1e-12)) for each in left]
    mean = sum(logs) / len(logs)
    bounds = (math.log(least), math.log(most))
    return [math.exp(min(max(strength * (each - mean), bounds[0]), bounds[1])) for each in logs]


def _own(outputs: Outputs, label: Tensor) -> Tensor:
    return cross_entropies(outputs, label)[1]


class Mslr(Balancer):
    """L = CE(fused) + sum_j CE(z^j); the rates of the encoders and of own heads differ.

    keep: the factors of optim.modality_lr throughout. smooth: from those to the common rate, see smooth_rate. dynamic:
    times dynamic_rates of r_j = lowest own validation loss so far / the one before training. The lowest and not the
    last, so that a modality that overfits is not driven on.
    """

    def __init__(self, net: FusionNet, optimization: Optimization, config: BalancingConfig, *, epochs: int) -> None:
        super().__init__(net, optimization, config, epochs=epochs)
        factors = optimization.config.factors()
        self.given = [factors.get(name, 1.0) for name in net.plan.modalities]
        self.first = [1.0] * net.num_modalities
        self.lowest = [1.0] * net.num_modalities

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Set the rates, which Update.begin_epoch reads."""
        super().begin_epoch(epoch, model_reader)
        config = self.config.mslr
        if config.mode == "smooth":
            self.optimization.rate = [smooth_rate(each, epoch=epoch, epochs=self.epochs) for each in self.given]
        elif config.mode == "dynamic":
            if epoch == 1:
                self.first = model_reader.read_validation(_own).double().mean(dim=1).tolist()
                self.lowest = list(self.first)
            left = [low / max(first, 1e-12) for low, first in zip(self.lowest, self.first, strict=True)]
            self.optimization.rate = dynamic_rates(left, strength=config.strength, least=config.least, most=config.most)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Add up."""
        return self.summed_losses(outputs, batch)

    def end_epoch(self, epoch: int, found: Validation) -> None:
        """Note how far each has come."""
        self.lowest = [min(low, loss) for low, loss in zip(self.lowest, found.own_loss, strict=True)]

    def numbers(self) -> dict[str, float]:
        """Each modality's factor on the common learning rate."""
        factors = zip(self.net.plan.modalities, self.given, self.optimization.rate, strict=True)
        return {f"rate_{name}": given * rate for name, given, rate in factors}

    def state_dict(self) -> dict[str, Any]:
        """How far each has come."""
        return {"first": list(self.first), "lowest": list(self.lowest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.first, self.lowest = list(state["first"]), list(state["lowest"])
