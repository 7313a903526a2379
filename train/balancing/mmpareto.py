"""MMPareto: Pareto combination of unimodal and multimodal gradients.

Wei and Hu, "MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance", ICML 2024. The combination is
that of their code, whose optimiser is SGD with momentum 0.9, learning rate 2e-3 and weight decay 1e-4; a bound on the
rescaling of opposite gradients, MIN_SINE, is ours, and so is rescaling by encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...audit.parsing import check_choices, check_ranges
from ..batches import Batch
from ..network import Outputs, separate_losses
from .balancer import Balancer

RESCALE = ("tensor", "encoder")
# Ours: of the angle. Closer to opposite directions the shortest vector is rounding noise, and is not scaled up.
MIN_SINE = 1e-3


def pareto_weights(ff: Tensor, fu: Tensor, uu: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the weights a, b of the gradients f, of the fused loss, and u, of the unimodal one, from their products.

    f.u > 0: 1 and 1. Otherwise twice those of the shortest vector a' f + (1 - a') u, 0 <= a' <= 1, so that they sum to
    2 again: a' = (u.u - f.u) / |f - u|^2. Where f or u is 0: 1 and 1 (ours).
    """
    share = (uu - fu) / (ff + uu - 2 * fu).clamp_min(torch.finfo(ff.dtype).tiny)
    use_sum = (fu > 0) | (ff == 0) | (uu == 0)
    return torch.where(use_sum, 1.0, 2 * share), torch.where(use_sum, 1.0, 2 * (1 - share))


def combine_gradients(total: list[Tensor], unimodal: list[Tensor], *, gamma: float, rescale: str) -> None:
    """Replace an encoder's gradients `total`, f + u of each parameter, by their combination, a f + b u.

    The weights are those of the whole encoder, see pareto_weights. Its length becomes that of f + u, of every tensor or
    of the encoder, see MmParetoConfig; all times gamma.
    """
    fused = torch._foreach_sub(total, unimodal)
    norms = torch.stack(torch._foreach_norm([*fused, *unimodal, *total]))
    ff, uu, tt = norms.double().square().view(3, -1)  # of each parameter
    fu = torch.cat([f.reshape(-1) for f in fused]) @ torch.cat([u.reshape(-1) for u in unimodal])
    a, b = pareto_weights(ff.sum(), fu.double(), uu.sum())
    if rescale == "encoder":
        ff, uu, tt = (squares.sum().expand_as(squares) for squares in (ff, uu, tt))
    length = (a * a * ff + b * b * uu + a * b * (tt - ff - uu)).clamp_min(0).sqrt()
    factor = tt.sqrt() / torch.maximum(length, MIN_SINE * a * ff.sqrt()).clamp_min(torch.finfo(ff.dtype).tiny)
    factor = gamma * (factor.clamp_min(1.0) if rescale == "tensor" else factor)
    on_fused, on_unimodal = ((factor * weight).to(norms.dtype).unbind() for weight in (a, b))
    torch._foreach_mul_(fused, on_fused)
    for gradient, f, u, weight in zip(total, fused, unimodal, on_unimodal, strict=True):
        torch.addcmul(f, u, weight, out=gradient)


@dataclass(frozen=True, slots=True, kw_only=True)
class MmParetoConfig:
    """MMPareto (ICML 2024). The defaults are those of its code.

    Args:
        gamma: Factor on the combined gradient, 1.5 in its code.
        rescale: What is brought to the length of the sum of both gradients: "tensor", each parameter by itself, and
            only where it is shorter, or "encoder", the gradient of the whole encoder in either direction (ours).
    """

    section: ClassVar[str] = "balancing.mmpareto"
    gamma: float = 1.5
    rescale: str = "tensor"

    def __post_init__(self) -> None:
        check_choices("balancing.mmpareto", self, rescale=RESCALE)
        check_ranges("balancing.mmpareto", self, gamma="[0, 1000]")


class MmPareto(Balancer):
    """L = CE(fused) + sum_j CE(z^j), z^j by separate heads; see combine_gradients for the encoders' gradients."""

    config_type = MmParetoConfig
    paper = "Wei and Hu, ICML 2024"
    has_unimodal_loss = True
    own_heads = True
    config: MmParetoConfig

    def initialize(self) -> None:
        """Set up the state."""
        trainable = [[p for p in encoder.parameters() if p.requires_grad] for encoder in self.net.encoders]
        self.encoders: list[list[nn.Parameter]] = [group for group in trainable if group]
        self._unimodal_gradients: list[Tensor] = []  # of the parts of the step so far

    def step(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Train on one batch."""
        self._unimodal_gradients = []
        return super().step(batch)

    def forward(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Return outputs and loss, and add up the encoders' gradients of the unimodal losses."""
        with self.optimization.autocast():
            outputs: Outputs = self.net(batch.inputs, batch.present)
        fused, unimodal = separate_losses(outputs, batch.label)
        unimodal_loss = batch.mean_unimodal(unimodal).sum()
        loss = batch.mean_fused(fused) + unimodal_loss
        parameters = [p for group in self.encoders for p in group]
        gradients = self.optimization.gradients(unimodal_loss, parameters) if parameters else []
        if self._unimodal_gradients:
            gradients = [a + b for a, b in zip(self._unimodal_gradients, gradients, strict=True)]
        self._unimodal_gradients = gradients
        return outputs, loss

    def modulate(self, outputs: Outputs, batch: Batch) -> None:
        """Combine the gradients of each encoder."""
        gradients = iter(self._unimodal_gradients)
        for group in self.encoders:
            self._combine(group, [next(gradients) for _ in group])

    def _combine(self, parameters: list[nn.Parameter], unimodal_gradients: list[Tensor]) -> None:
        """Combine an encoder's gradients; a parameter without gradient stays without."""
        pairs = [(p, p.grad, u) for p, u in zip(parameters, unimodal_gradients, strict=True) if p.grad is not None]
        if not pairs:
            return
        unimodal = [u for *_, u in pairs]
        if self.optimization.dtype == torch.float16:  # may overflow where the sum, by which a step is skipped, does not
            unimodal = [u.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for u in unimodal]
        total = [grad for _, grad, _ in pairs]
        combine_gradients(total, unimodal, gamma=self.config.gamma, rescale=self.config.rescale)
