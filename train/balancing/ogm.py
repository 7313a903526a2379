"""OGM and OGM-GE: on-the-fly gradient modulation.

OGM-GE, Peng et al., "Balanced Multimodal Learning via On-the-fly Gradient Modulation" (CVPR 2022):

    S^j = sum_i c_i^j         rho^j = S^j / mean_{l != j} S^l
    k^j = 1 - tanh(alpha relu(rho^j)) where rho^j > 1, else 1

over the samples i of a step, c_i^j the probability of the true class by modality j alone. All gradients of encoder j
are multiplied by k^j. GE, generalisation enhancement, adds Gaussian noise to them, in place of the noise of gradients
that modulation took away. Only in epochs `first_epoch` to `last_epoch`.

Ours: the mean of the others for more than two modalities; weights of samples count in S; all parameters of an encoder
are modulated and all its weights get noise (their code: those of convolutions alone); and where the noise comes from.
Note that AdamW divides out a coefficient that stays the same; the paper's optimiser is SGD.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from ..batches import Batch, ModelReader
from ..network import FusionNet, Outputs
from ..optimizer import Optimization
from .balancer import Balancer
from .config import BalancingConfig

_SHIFTS = 1 << 20  # places of a window of noise: two windows are the same with a chance of one in a million
_TIE = 1e-6  # a lead that rounding can give to one of several equals, where k would leap


def mean_of_others(values: Tensor, known: Tensor) -> Tensor:
    """Give for each modality the mean (m,) of the values (m,) of the others that are known (m,); 0 if none is."""
    others = 1.0 - torch.eye(len(values), dtype=values.dtype, device=values.device)
    count = others @ known.to(values.dtype)
    return others @ torch.where(known, values, 0.0) / count.clamp(min=1.0)


def damping(score: Tensor, *, alpha: float) -> Tensor:
    """Give OGM's coefficients k (m,) in [0, 1] from scores S (m,), any multiple of them; low = far ahead.

    A modality that no sample of the step had has a score of 0: it is compared with none, and none with it.
    """
    others = mean_of_others(score, score > 0)
    ratio = score / torch.where(others > 0, others, torch.inf)
    return torch.where(ratio > 1 + _TIE, 1.0 - (alpha * ratio).tanh(), 1.0)


class Ogm(Balancer):
    """The modulation without the noise. The loss is the fused answer's; state: the epoch, and the last coefficients."""

    def __init__(self, net: FusionNet, optimization: Optimization, config: BalancingConfig, *, epochs: int) -> None:
        super().__init__(net, optimization, config, epochs=epochs)
        self.epoch = 0
        self._coefficient = torch.ones(net.num_modalities, device=optimization.generator.device)

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Forget the last epoch's coefficients."""
        super().begin_epoch(epoch, model_reader)
        self._coefficient = torch.ones_like(self._coefficient)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Give the mean cross entropy of the fused answer."""
        return self.fused_loss(outputs, batch)

    def modulate(self, outputs: Outputs, batch: Batch) -> None:
        """Slow the encoder of the modality that is ahead."""
        if not self.config.ogm.first_epoch <= self.epoch <= self.config.ogm.last_epoch:
            return
        self._coefficient = damping(self.mean_confidence(outputs, batch)[1:], alpha=self.config.ogm.alpha)
        self.scale_gradients(self._coefficient)

    def numbers(self) -> dict[str, float]:
        """Give the coefficients of the last step, by modality."""
        named = zip(self.net.plan.modalities, self._coefficient.tolist(), strict=True)
        return {f"coefficient_{name}": value for name, value in named}

    def state_dict(self) -> dict[str, Any]:
        """Give what the next step depends on."""
        return {"epoch": self.epoch, "coefficient": self._coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.epoch, self._coefficient = state["epoch"], state["coefficient"]


class OgmGe(Ogm):
    """The modulation with the noise: every weight of every encoder gets noise of its gradient's own deviation.

    As in their code the deviation, + 1e-8, is that before the modulation, and the encoders that are not ahead get noise
    too. What the noise is drawn from is ours: windows, at a chance place and with a chance sign, of one long row of
    draws. Within a weight and a step they are independent; drawn anew, on a CPU they took 13% of a step of two encoders
    of 1024 x 512.
    """

    def __init__(self, net: FusionNet, optimization: Optimization, config: BalancingConfig, *, epochs: int) -> None:
        super().__init__(net, optimization, config, epochs=epochs)
        device = optimization.generator.device
        largest = max(weight.numel() for weight in net.encoders.parameters())
        self._row = torch.empty(largest + _SHIFTS, device=device)
        self._row.normal_(generator=torch.Generator(device).manual_seed(0))

    def modulate(self, outputs: Outputs, batch: Batch) -> None:
        """Slow the encoder of the modality that is ahead, and shake all."""
        if not self.config.ogm.first_epoch <= self.epoch <= self.config.ogm.last_epoch:
            return
        gradients = [p.grad for p in self.net.encoders.parameters() if p.grad is not None and p.ndim >= 2]
        deviations = [_deviation(gradient) + 1e-8 for gradient in gradients]
        super().modulate(outputs, batch)
        # The seed of the step, alike in all processes; known without asking the device.
        chance = Random(self.optimization.generator.initial_seed())
        for gradient, deviation in zip(gradients, deviations, strict=True):
            start, sign = chance.randrange(_SHIFTS), chance.choice((-1.0, 1.0))
            noise = self._row[start : start + gradient.numel()].view_as(gradient)
            gradient.addcmul_(noise, deviation, value=sign)


def _deviation(gradient: Tensor) -> Tensor:
    """Give the standard deviation, by the mean square: on a CPU torch's own takes five times as long."""
    square = torch.linalg.vector_norm(gradient).square() / gradient.numel()
    found: Tensor = (square - gradient.mean().square()).clamp(min=0).sqrt()
    return found
