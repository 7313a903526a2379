"""G-Blending: loss weights by overfitting-to-generalisation ratios.

Wang, Tran and Feiszli, "What Makes Training Multi-modal Classification Networks Hard?", CVPR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batches import Batch, ModelReader, Rows, some_rows
from ..network import FusionNet, Outputs
from ..optimizer import Optimization
from .balancer import Balancer
from .config import BalancingConfig

# All three are ours.
READ_ROWS = 2_048  # training samples that the training losses are read from, the same ones every time
LEAST_OVERFIT = 0.1  # of the largest gain: an overfitting that is smaller, or negative, counts as this
LEAST_WEIGHT = 0.01  # so that nothing stands still until the next measurement


def blend_weights(gain: Sequence[float], overfit: Sequence[float]) -> NDArray[np.float64]:
    """Give the weights (1 + m,), which sum to 1: w_k ~ G_k / O_k^2, the paper's optimal blend.

    gain, G (1 + m,): fall of the validation loss. overfit, O (1 + m,): growth of validation loss minus training loss.
    Ours: a gain that is not positive (1e-9), or no number, counts as 0, and where none is left all weights are equal;
    O_k is at least LEAST_OVERFIT times the largest gain; and no weight is much below LEAST_WEIGHT.
    """
    found, excess = np.array(gain, dtype=np.float64), np.array(overfit, dtype=np.float64)
    known = np.isfinite(found) & np.isfinite(excess)
    found = np.where(known & (found > 1e-9), found, 0.0)
    if not found.any():
        return np.full(len(found), 1 / len(found))
    weights = found / np.where(known, excess, 0.0).clip(min=LEAST_OVERFIT * found.max()) ** 2
    weights = (weights / weights.sum()).clip(min=LEAST_WEIGHT)
    return np.asarray(weights / weights.sum())


def _shares(outputs: Outputs, batch: Batch) -> Tensor:
    """This process's shares (1 + m,) of the step's mean cross entropies."""
    return (outputs.cross_entropy(batch.label) * batch.loss_weight).sum(dim=1)


def _share(outputs: Outputs, batch: Batch, *, place: int) -> Tensor:
    return _shares(outputs, batch)[place]


class Gblend(Balancer):
    """L = sum_k w_k CE(z^k), k the fused answer and each modality.

    Before epochs 1, 1 + super_epoch, ... a copy of the model is trained for each k by its loss alone, and gain and
    overfitting on the way decide about w_k.
    """

    def __init__(self, net: FusionNet, optimization: Optimization, config: BalancingConfig, *, epochs: int) -> None:
        super().__init__(net, optimization, config, epochs=epochs)
        num = 1 + net.num_modalities
        self.weights = torch.full((num,), 1 / num, device=next(net.parameters()).device)

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Measure anew, once in a super-epoch."""
        super().begin_epoch(epoch, model_reader)
        if (epoch - 1) % self.config.gblend.super_epoch == 0:
            self.weights = torch.as_tensor(self._measure(model_reader)).to(self.weights)

    def _measure(self, model_reader: ModelReader) -> NDArray[np.float64]:
        rows = some_rows(model_reader, READ_ROWS)
        before = self._losses(model_reader, rows, None)
        gain, overfit = [], []
        for place, (train, validation) in enumerate(zip(*before, strict=True)):
            copy = model_reader.train_copy(partial(_share, place=place), epochs=self.config.gblend.trial_epochs)
            after = self._losses(model_reader, rows, copy)
            gain.append(validation - after[1][place])
            overfit.append((after[1][place] - after[0][place]) - (validation - train))
        return blend_weights(gain, overfit)

    def _losses(self, model_reader: ModelReader, rows: Rows, net: FusionNet | None) -> tuple[list[float], list[float]]:
        """Mean losses (1 + m,) on training rows and on validation."""
        what = Outputs.cross_entropy
        found = (model_reader.read(what, rows=rows, net=net), model_reader.read_validation(what, net=net))
        train, validation = (each.double().mean(dim=1).tolist() for each in found)
        return train, validation

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Blend."""
        return _shares(outputs, batch) @ self.weights

    def numbers(self) -> dict[str, float]:
        """The weights."""
        names = ("fused", *self.net.plan.modalities)
        return {f"weight_{name}": value for name, value in zip(names, self.weights.tolist(), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The weights."""
        return {"weights": self.weights.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.weights = state["weights"].to(self.weights)
