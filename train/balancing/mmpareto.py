"""MMPareto: Pareto combination of unimodal and multimodal gradients.

Wei and Hu, "MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance", ICML 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...audit.parsing import check_ranges
from ..batches import Batch
from ..network import Outputs, cross_entropies
from .balancer import Balancer

# Ours: of the angle; closer to opposite directions, the vanishing min-norm vector is not scaled up.
MIN_SQUARED_SINE = 1e-6


def combine_gradients(fused: Tensor, unimodal: Tensor, *, gamma: float) -> Tensor:
    """Combine the gradients (p,) of an encoder from the fused loss, f, and from its unimodal loss, u.

    cos(f, u) > 0: their sum. Otherwise the shortest vector a f + (1 - a) u, 0 <= a <= 1, scaled to the length of the
    sum: a = (u.u - f.u) / |f - u|^2, and |f| |u| sin(f, u) / |f - u| is its length. All times gamma. Where one of the
    two is 0 the sum is used (ours).
    """
    ff, fu, uu = fused @ fused, fused @ unimodal, unimodal @ unimodal
    tiny = torch.finfo(ff.dtype).tiny
    squared_difference = (ff + uu - 2 * fu).clamp_min(tiny)
    share = (uu - fu) / squared_difference
    product = (ff.sqrt() * uu.sqrt()).clamp_min(tiny)
    sine = (1 - (fu / product).square()).clamp_min(MIN_SQUARED_SINE).sqrt()
    shortest = product * sine / squared_difference.sqrt()
    scale = (ff + uu + 2 * fu).clamp_min(0).sqrt() / shortest
    use_sum = (fu > 0) | (ff == 0) | (uu == 0)
    on_fused = torch.where(use_sum, 1.0, scale * share)
    on_own = torch.where(use_sum, 1.0, scale * (1 - share))
    return gamma * (on_fused * fused + on_own * unimodal)


@dataclass(frozen=True, slots=True, kw_only=True)
class MmParetoConfig:
    """MMPareto (ICML 2024).

    Args:
        gamma: Factor on the combined gradient, as in its code.
    """

    section: ClassVar[str] = "balancing.mmpareto"
    gamma: float = 1.5

    def __post_init__(self) -> None:
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

    def step(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Train on one batch."""
        with self.optimization.autocast():
            outputs: Outputs = self.net(batch.inputs, batch.present)
        fused, unimodal = cross_entropies(outputs, batch.label)
        unimodal_loss = batch.mean_unimodal(unimodal).sum()
        loss = batch.mean_fused(fused) + unimodal_loss
        parameters = [p for group in self.encoders for p in group]
        gradients = iter(self.optimization.gradients(unimodal_loss, parameters) if parameters else [])
        self.optimization.backward(loss)
        for group in self.encoders:
            self._replace(group, [next(gradients) for _ in group])
        self.optimization.apply()
        return outputs, loss.detach()

    def _replace(self, parameters: list[nn.Parameter], unimodal_gradients: list[Tensor]) -> None:
        """Replace an encoder's gradients by the combination; a parameter without gradient stays without."""
        pairs = [(p, p.grad, u) for p, u in zip(parameters, unimodal_gradients, strict=True) if p.grad is not None]
        if not pairs:
            return
        total = torch.cat([grad.reshape(-1) for _, grad, _ in pairs])
        unimodal = torch.cat([u.reshape(-1) for *_, u in pairs])
        if self.optimization.dtype == torch.float16:  # may overflow where the sum, by which a step is skipped, does not
            unimodal = unimodal.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        combined = combine_gradients(total - unimodal, unimodal, gamma=self.config.gamma)
        end = 0
        for parameter, grad, _ in pairs:
            start, end = end, end + grad.numel()
            parameter.grad = combined[start:end].view_as(grad)
