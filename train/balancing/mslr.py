"""MSLR: learning rates by modality.

Yao and Mihalcea, "Modality-specific Learning Rates for Effective Multimodal Additive Late-fusion", Findings of ACL
2022: keep, smooth or dynamic. The rates of the last two are ours, since theirs could not be read. A fourth mode,
accuracy, is that of a published reimplementation, in the code of AGM (Li et al., ICCV 2023), see accuracy_factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...audit.errors import ConfigError
from ...audit.parsing import check_choices, check_ranges
from ..batches import ModelReader
from ..config import TrainConfig
from ..network import Outputs, separate_losses
from .balancer import Sum, Validation, check_loss_weights

MSLR_MODES = ("keep", "smooth", "dynamic", "accuracy")
_NUM_ACCURACIES = 5  # epochs in the mean of the mode accuracy, as in AGM's code


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


def accuracy_factor(accuracies: Sequence[float]) -> float:
    """Compute the factor of the next epoch from a modality's accuracies in all epochs so far, or the last six.

    The last one over the mean of the five before it; 1 up to the fifth epoch, and where all five are 0 (ours).
    """
    earlier = accuracies[-1 - _NUM_ACCURACIES : -1]
    if len(earlier) < _NUM_ACCURACIES or not any(earlier):
        return 1.0
    return accuracies[-1] / (sum(earlier) / len(earlier))


def _unimodal_losses(outputs: Outputs, label: Tensor) -> Tensor:
    return separate_losses(outputs, label)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class MslrConfig:
    """Modality-specific learning rates (ACL Findings 2022). The defaults are mmaudit's own.

    AGM's code has mode = "accuracy", unimodal_weight = 0, and on CREMA-D optim.modality_lr = ["audio=0.9",
    "visual=1.1"]; the accuracies are of the test set there, and of validation here.

    Args:
        mode: One of MSLR_MODES.
        strength: Exponent of the mode "dynamic".
        min_factor: Smallest factor of a modality, of the mode "dynamic".
        max_factor: Largest factor of a modality, of the mode "dynamic".
        fused_weight: Weight of the cross entropy of the fused logits.
        unimodal_weight: Weight of the cross entropy of each modality.
    """

    section: ClassVar[str] = "balancing.mslr"
    mode: str = "dynamic"
    strength: float = 1.0
    min_factor: float = 0.1
    max_factor: float = 10.0
    fused_weight: float = 1.0
    unimodal_weight: float = 1.0

    def __post_init__(self) -> None:
        check_choices("balancing.mslr", self, mode=MSLR_MODES)
        check_ranges("balancing.mslr", self, strength="[0, 1000]", min_factor="[1e-9, 1]", max_factor="[1, 1e9]")
        check_loss_weights("balancing.mslr", fused=self.fused_weight, unimodal=self.unimodal_weight)


class Mslr(Sum):
    """L = w_f CE(fused) + w_u sum_j CE(z^j); the rates of the encoders and of separate heads differ.

    keep: the factors of optim.modality_lr throughout. smooth: from those to the common rate, see smooth_factor.
    dynamic: times dynamic_factors of r_j = lowest unimodal validation loss so far / the one before training. The lowest
    and not the last, so that the rate of a modality that overfits does not rise. accuracy: the factors of
    optim.modality_lr times accuracy_factor of the validation accuracies of each modality alone. AGM's code multiplies
    gradients, which equals a learning rate for SGD without weight decay while the factors stay the same.
    """

    config_type = MslrConfig
    paper = "Yao and Mihalcea, Findings of ACL 2022"
    min_modalities = 2
    sets_rates = True
    evaluates = ("validation",)
    state_fields = ("initial_loss", "lowest_loss", "accuracies")
    config: MslrConfig

    @classmethod
    def check(cls, config: MslrConfig, settings: TrainConfig) -> None:
        """Raise ConfigError for a mode that starts from configured rates where there are none."""
        if config.mode in ("keep", "smooth") and not settings.optim.modality_lr:
            raise ConfigError(
                f"balancing.mslr.mode = {config.mode} starts from the rates of optim.modality_lr, which is empty; set "
                "it, as with --set 'optim.modality_lr=[\"audio=0.1\"]', or use the mode dynamic"
            )

    @classmethod
    def reads_validation(cls, config: MslrConfig) -> bool:
        """Return True: validation losses decide."""
        return True

    @classmethod
    def unused(cls, config: MslrConfig) -> dict[str, str]:
        """Return the constants of the mode dynamic in other modes."""
        reason = f"it belongs to the mode dynamic, and balancing.mslr.mode is {config.mode}"
        return {} if config.mode == "dynamic" else dict.fromkeys(("strength", "min_factor", "max_factor"), reason)

    @classmethod
    def needs_classes(cls, config: MslrConfig) -> str:
        """Return the reason of the mode accuracy."""
        return "its mode accuracy follows the accuracy of classes" if config.mode == "accuracy" else ""

    def initialize(self) -> None:
        """Set up the state."""
        factors = self.optimization.config.modality_lr_factors()
        self.initial_factors = [factors.get(name, 1.0) for name in self.net.config.modalities]
        self.initial_loss = [1.0] * self.net.num_modalities
        self.lowest_loss = [1.0] * self.net.num_modalities
        self.accuracies: list[list[float]] = [[] for _ in self.initial_factors]  # of the last six epochs, by modality

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Set the factors that Optimization.begin_epoch uses."""
        super().begin_epoch(epoch, model_reader)
        config = self.config
        if config.mode == "smooth":
            self.optimization.lr_factors = [
                smooth_factor(factor, epoch=epoch, epochs=self.epochs) for factor in self.initial_factors
            ]
        elif config.mode == "accuracy":
            self.optimization.lr_factors = [accuracy_factor(accuracies) for accuracies in self.accuracies]
        elif config.mode == "dynamic":
            if epoch == 1:
                self.initial_loss = model_reader.read_validation(_unimodal_losses).double().mean(dim=1).tolist()
                self.lowest_loss = list(self.initial_loss)
            remaining = [
                low / max(first, 1e-12) for low, first in zip(self.lowest_loss, self.initial_loss, strict=True)
            ]
            self.optimization.lr_factors = dynamic_factors(
                remaining, strength=config.strength, min_factor=config.min_factor, max_factor=config.max_factor
            )

    def end_epoch(self, epoch: int, validation: Validation) -> None:
        """Update the lowest losses and the last accuracies."""
        self.lowest_loss = [
            min(low, loss) for low, loss in zip(self.lowest_loss, validation.unimodal_loss, strict=True)
        ]

        self.accuracies = [
            [*earlier, accuracy][-1 - _NUM_ACCURACIES :]
            for earlier, accuracy in zip(self.accuracies, validation.unimodal_metric, strict=True)
        ]

    def epoch_metrics(self) -> dict[str, float]:
        """Return each modality's factor on the common learning rate."""
        factors = zip(self.initial_factors, self.optimization.lr_factors, strict=True)
        return self.by_modality("rate", [initial * rate for initial, rate in factors])
