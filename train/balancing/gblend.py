"""G-Blending: loss weights by overfitting-to-generalisation ratios.

Wang, Tran and Feiszli, "What Makes Training Multi-modal Classification Networks Hard?", CVPR 2020:

    L = sum_k w_k CE(z^k),    k over the fused logits and each modality,    w_k = G_k / O_k^2 / sum_l G_l / O_l^2

G_k is the fall of loss k on validation, O_k the growth of its validation minus its training loss, both of a copy that
is trained with loss k alone. z^j comes from an additional classifier of each modality beside the fused one, as in the
authors' code (VMZ), which has no measurement: its weights are fixed, `weights` here. Its fused classifier has two more
layers; here it is that of `--fusion`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...audit.errors import ConfigError
from ...audit.parsing import check_ranges
from ...rebalance.curriculum import RowIndex
from ..batches import Batch, ModelReader, sample_rows
from ..config import parse_factors
from ..network import FusionNet, Outputs
from .balancer import Balancer

# All three are ours.
NUM_TRAIN_ROWS = 2_048  # training samples that the training losses are computed on, the same ones every time
MIN_OVERFIT = 0.1  # share of the largest gain: smaller or negative overfitting counts as this
MIN_WEIGHT = 0.01  # so that every loss trains until the next measurement


def blend_weights(gain: Sequence[float], overfit: Sequence[float]) -> NDArray[np.float64]:
    """Compute the weights (1 + m,), which sum to 1: w_k ~ G_k / O_k^2, the paper's optimal blend.

    gain, G (1 + m,): fall of the validation loss. overfit, O (1 + m,): growth of validation loss minus training loss.
    Ours: a gain that is not above 1e-9, or not finite, counts as 0, and where all are 0 the weights are equal; O_k is
    at least MIN_OVERFIT times the largest gain; and no weight is much below MIN_WEIGHT.
    """
    gains, overfits = np.array(gain, dtype=np.float64), np.array(overfit, dtype=np.float64)
    finite = np.isfinite(gains) & np.isfinite(overfits)
    gains = np.where(finite & (gains > 1e-9), gains, 0.0)
    if not gains.any():
        return np.full(len(gains), 1 / len(gains))
    weights = gains / np.where(finite, overfits, 0.0).clip(min=MIN_OVERFIT * gains.max()) ** 2
    weights = (weights / weights.sum()).clip(min=MIN_WEIGHT)
    return np.asarray(weights / weights.sum())


def _branch_losses(outputs: Outputs, batch: Batch) -> Tensor:
    """Compute this process's parts (1 + m,) of the step's mean cross entropies."""
    return (outputs.losses(batch.label) * batch.loss_weight).sum(dim=1)


def _branch_loss(outputs: Outputs, batch: Batch, *, branch: int) -> Tensor:
    return _branch_losses(outputs, batch)[branch]


@dataclass(frozen=True, slots=True, kw_only=True)
class GblendConfig:
    """G-Blending (CVPR 2020).

    Args:
        own_heads: Give each modality an additional classifier, as in the authors' code; otherwise its loss is that of
            its part of the fused classifier where the fusion can be split.
        weights: Fixed loss weights in place of measured ones, as in the authors' code: NAME=WEIGHT entries for "fused"
            and every modality, such as ["fused=0.5", "audio=0.2", "visual=0.3"]; used as they are, whatever their sum.
        super_epoch: Epochs between two measurements of the loss weights.
        trial_epochs: Epochs for which the copies are trained (ours; the paper trains them for a super-epoch).
    """

    section: ClassVar[str] = "balancing.gblend"
    own_heads: bool = True
    weights: tuple[str, ...] = ()
    super_epoch: int = 10
    trial_epochs: int = 1

    def __post_init__(self) -> None:
        check_ranges("balancing.gblend", self, super_epoch="[1, 1e9]", trial_epochs="[1, 1e9]")
        parse_factors("balancing.gblend.weights", self.weights, example="fused=0.5")

    def fixed_weights(self, modalities: Sequence[str]) -> list[float]:
        """Return `weights` (1 + m,), fused first. Raises ConfigError where they are of other names than these."""
        factors = parse_factors("balancing.gblend.weights", self.weights, example="fused=0.5")
        names = ("fused", *modalities)
        if set(factors) != set(names) or not any(factors.values()):
            raise ConfigError(
                f"balancing.gblend.weights has weights of {', '.join(factors)}; it needs one of each of "
                f"{', '.join(names)}, not all of them 0"
            )
        return [factors[name] for name in names]


class Gblend(Balancer):
    """L = sum_k w_k CE(z^k), k over the fused logits and each modality.

    Before epochs 1, 1 + super_epoch, ... a copy of the model is trained for each k with its loss alone; its gain and
    overfitting determine w_k. Nothing is measured where the weights are fixed.
    """

    config_type = GblendConfig
    paper = "Wang et al., CVPR 2020"
    has_unimodal_loss = True
    own_heads = True
    evaluates = ("train", "validation", "copies")
    state_fields = ("weights",)
    config: GblendConfig

    @classmethod
    def reads_validation(cls, config: GblendConfig) -> bool:
        """Return whether weights are measured, on validation losses."""
        return not config.weights

    @classmethod
    def needs_own_heads(cls, config: GblendConfig) -> bool:
        """Whether each modality gets a classifier of its own."""
        return config.own_heads

    @classmethod
    def unused(cls, config: GblendConfig) -> dict[str, str]:
        """Return the constants of measurements where there are none."""
        reason = "with fixed weights (balancing.gblend.weights) nothing is measured"
        return dict.fromkeys(("super_epoch", "trial_epochs"), reason) if config.weights else {}

    def initialize(self) -> None:
        """Set up the state."""
        num = 1 + self.net.num_modalities
        fixed = self.config.fixed_weights(self.net.config.modalities) if self.config.weights else [1 / num] * num
        self.weights = torch.tensor(fixed, device=self.device)

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Measure the weights once per super-epoch."""
        super().begin_epoch(epoch, model_reader)
        if not self.config.weights and (epoch - 1) % self.config.super_epoch == 0:
            self.weights = torch.as_tensor(self._measure(model_reader)).to(self.weights)

    def _measure(self, model_reader: ModelReader) -> NDArray[np.float64]:
        rows = sample_rows(model_reader, NUM_TRAIN_ROWS)
        before = self._losses(model_reader, rows, None)
        gain, overfit = [], []
        for branch, (train, validation) in enumerate(zip(*before, strict=True)):
            copy = model_reader.train_copy(partial(_branch_loss, branch=branch), epochs=self.config.trial_epochs)
            after = self._losses(model_reader, rows, copy)
            gain.append(validation - after[1][branch])
            overfit.append((after[1][branch] - after[0][branch]) - (validation - train))
        return blend_weights(gain, overfit)

    def _losses(
        self, model_reader: ModelReader, rows: RowIndex, net: FusionNet | None
    ) -> tuple[list[float], list[float]]:
        """Compute mean losses (1 + m,) on training rows and on validation."""
        train = model_reader.read(Outputs.losses, rows=rows, net=net)
        validation = model_reader.read_validation(Outputs.losses, net=net)
        return train.double().mean(dim=1).tolist(), validation.double().mean(dim=1).tolist()

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the weighted sum of losses."""
        return _branch_losses(outputs, batch) @ self.weights

    def epoch_metrics(self) -> dict[str, float]:
        """Return the weights."""
        names = ("fused", *self.net.config.modalities)
        return {f"weight_{name}": value for name, value in zip(names, self.weights.tolist(), strict=True)}
