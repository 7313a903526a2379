"""OGM and OGM-GE: on-the-fly gradient modulation.

OGM-GE, Peng et al., "Balanced Multimodal Learning via On-the-fly Gradient Modulation" (CVPR 2022):

    S^j = sum_i c_i^j         rho^j = S^j / mean_{l != j} S^l
    k^j = 1 - tanh(alpha relu(rho^j)) where rho^j > 1, else 1

over the samples i of a step, c_i^j the probability of the true class by modality j alone. The gradients of encoder j's
convolutions are multiplied by k^j, as in their code. GE, generalisation enhancement, adds Gaussian noise to them, in
place of the noise of gradients that modulation removed. Only in epochs `first_epoch` to `last_epoch`.

Ours: the mean of the others for more than two modalities; weights of samples count in S; in an encoder without
convolutions all parameters are modulated and all weights get noise; a tie modulates neither (their code: the first);
and the source of the noise. Note that Adam and AdamW divide out a coefficient that stays the same; the paper's
optimiser is SGD with momentum 0.9, learning rate 1e-3 and weight decay 1e-4.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...audit.parsing import check_ranges
from ..backbones import PretrainedEncoder
from ..batches import Batch, ModelReader, start_warning
from ..config import TrainConfig
from ..network import Outputs
from .balancer import Balancer, check_window

_NUM_OFFSETS = 1 << 20  # offsets of a window of noise: two windows are the same with a probability of one in a million
_RATIO_TOLERANCE = 1e-6  # a lead that rounding can cause among equal modalities, where k would jump


def mean_of_others(values: Tensor, valid: Tensor) -> Tensor:
    """Compute for each modality the mean (m,) of the other modalities' valid values (m,); 0 if none is valid."""
    off_diagonal = 1.0 - torch.eye(len(values), dtype=values.dtype, device=values.device)
    count = off_diagonal @ valid.to(values.dtype)
    return off_diagonal @ torch.where(valid, values, 0.0) / count.clamp(min=1.0)


def ogm_coefficients(score: Tensor, *, alpha: float) -> Tensor:
    """Compute OGM's coefficients k (m,) in [0, 1] from scores S (m,), any multiple of them; low = far ahead.

    A modality that no sample of the step uses has a score of 0: it is compared with none, and none with it.
    """
    other_scores = mean_of_others(score, score > 0)
    ratio = score / torch.where(other_scores > 0, other_scores, torch.inf)
    return torch.where(ratio > 1 + _RATIO_TOLERANCE, 1.0 - (alpha * ratio).tanh(), 1.0)


def modulated_parameters(encoder: nn.Module) -> list[nn.Parameter]:
    """Return the kernels of an encoder's convolutions, or all of its parameters where it has none.

    Of a pretrained encoder also where its convolutions have less than half of the trained weights, as the one layer of
    a vision transformer that cuts patches (ours).
    """
    parameters = [p for p in encoder.parameters() if p.requires_grad] or list(encoder.parameters())
    kernels = [p for p in parameters if p.ndim == 4]
    if isinstance(encoder, PretrainedEncoder) and 2 * _count(kernels) < _count(parameters):
        return parameters
    return kernels or parameters


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class OgmConfig:
    """OGM-GE (CVPR 2022).

    Args:
        alpha: Strength of the modulation, at least 0; the authors use 0.8 on CREMA-D and 0.1 on VGGSound, the default
            is ours.
        first_epoch: First epoch with modulation, from 1.
        last_epoch: Last epoch with modulation; 51 is the authors' default, whose epochs 0 to 50 are 1 to 51 here.
    """

    section: ClassVar[str] = "balancing.ogm"
    alpha: float = 0.3
    first_epoch: int = 1
    last_epoch: int = 51

    def __post_init__(self) -> None:
        check_ranges("balancing.ogm", self, alpha="[0, 1000]")
        check_window("balancing.ogm", self)


class Ogm(Balancer):
    """Modulation without noise. The loss is the fused one; state: the epoch, and the last coefficients."""

    class_reason = "it compares the probabilities of the true class"
    config_type = OgmConfig
    paper = "Peng et al., CVPR 2022"
    state_fields = ("epoch", "_coefficient")
    config: OgmConfig

    @classmethod
    def late_start(cls, config: OgmConfig, settings: TrainConfig) -> str | None:
        """Return a warning where the method starts after the last epoch."""
        return start_warning("balancing.ogm.first_epoch", config.first_epoch, settings, fallback="joint")

    def initialize(self) -> None:
        """Set up the state."""
        self.epoch = 0
        self._coefficient = torch.ones(self.net.num_modalities, device=self.device)
        self.modulated = [modulated_parameters(encoder) for encoder in self.net.encoders]

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Reset the coefficients."""
        super().begin_epoch(epoch, model_reader)
        self._coefficient = torch.ones_like(self._coefficient)

    def modulate(self, outputs: Outputs, batch: Batch) -> None:
        """Scale down the gradients of the encoder that is ahead."""
        if not self.config.first_epoch <= self.epoch <= self.config.last_epoch:
            return
        self._coefficient = ogm_coefficients(self.mean_confidence(outputs, batch)[1:], alpha=self.config.alpha)
        self.scale_gradients(self._coefficient, self.modulated)

    def epoch_metrics(self) -> dict[str, float]:
        """Return the coefficients of the last step by modality."""
        return self.by_modality("coefficient", self._coefficient)


class OgmGe(Ogm):
    """Modulation with noise: every modulated weight gets noise with its gradient's standard deviation.

    As in their code the deviation, + 1e-8, is that before the modulation, and encoders that are not ahead get noise
    too. Vectors, such as biases of encoders without convolutions, get none (ours). The source of the noise is ours:
    windows, at a random offset and with a random sign, of one long row of draws. Within a weight and a step they are
    independent; new draws took 13% of a step of two encoders of 1024 x 512 on a CPU.
    """

    def initialize(self) -> None:
        """Set up the state."""
        super().initialize()
        device = self.device
        largest = max(weight.numel() for group in self.modulated for weight in group)
        self._row = torch.empty(largest + _NUM_OFFSETS, device=device)
        self._row.normal_(generator=torch.Generator(device).manual_seed(0))

    def modulate(self, outputs: Outputs, batch: Batch) -> None:
        """Scale down the gradients of the encoder that is ahead, and add noise to all."""
        if not self.config.first_epoch <= self.epoch <= self.config.last_epoch:
            return
        gradients = [p.grad for group in self.modulated for p in group if p.grad is not None and p.ndim >= 2]
        deviations = [_standard_deviation(gradient) + 1e-8 for gradient in gradients]
        super().modulate(outputs, batch)
        # The seed of the step, equal in all processes; available without synchronising the device.
        rng = Random(self.optimization.generator.initial_seed())
        for gradient, deviation in zip(gradients, deviations, strict=True):
            start, sign = rng.randrange(_NUM_OFFSETS), rng.choice((-1.0, 1.0))
            noise = self._row[start : start + gradient.numel()].view_as(gradient)
            gradient.addcmul_(noise, deviation, value=sign)


def _standard_deviation(gradient: Tensor) -> Tensor:
    """Compute the standard deviation from the mean square: on a CPU torch's function takes five times as long."""
    square = torch.linalg.vector_norm(gradient).square() / gradient.numel()
    deviation: Tensor = (square - gradient.mean().square()).clamp(min=0).sqrt()
    return deviation
