"""MMPareto: Pareto combination of unimodal and multimodal gradients.

Wei and Hu, "MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance", ICML 2024.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batches import Batch
from ..network import FusionNet, Outputs, cross_entropies
from ..optimizer import Optimization
from .balancer import Balancer
from .config import BalancingConfig

LEAST_SQUARED_SINE = 1e-6  # ours: of the angle; nearer to opposite, the vanishing min-norm vector is not blown up


def combine(fused: Tensor, own: Tensor, *, gamma: float) -> Tensor:
    """Give the gradient (p,) that an encoder follows, from those of the fused loss and of its own (p,).

    cos(f, u) > 0: their sum. Otherwise the shortest vector a f + (1 - a) u, 0 <= a <= 1, brought to the length of the
    sum: a = (u.u - f.u) / |f - u|^2, and |f| |u| sin(f, u) / |f - u| is its length. All times gamma. Where one of the
    two is 0 the sum is taken (ours).
    """
    ff, fu, uu = fused @ fused, fused @ own, own @ own
    least = torch.finfo(ff.dtype).tiny
    apart = (ff + uu - 2 * fu).clamp_min(least)
    share = (uu - fu) / apart
    product = (ff.sqrt() * uu.sqrt()).clamp_min(least)
    sine = (1 - (fu / product).square()).clamp_min(LEAST_SQUARED_SINE).sqrt()
    shortest = product * sine / apart.sqrt()
    scale = (ff + uu + 2 * fu).clamp_min(0).sqrt() / shortest
    together = (fu > 0) | (ff == 0) | (uu == 0)
    on_fused = torch.where(together, 1.0, scale * share)
    on_own = torch.where(together, 1.0, scale * (1 - share))
    return gamma * (on_fused * fused + on_own * own)


class MmPareto(Balancer):
    """L = CE(fused) + sum_j CE(z^j), z^j by a head of its own; the encoders' two gradients are combined, see combine.

    Heads and fusion follow the sum as it is. Two passes back: all own losses at once, because each reaches its own
    encoder alone; and the whole, less which is the fused loss's.
    """

    def __init__(self, net: FusionNet, optimization: Optimization, config: BalancingConfig, *, epochs: int) -> None:
        super().__init__(net, optimization, config, epochs=epochs)
        every = [[p for p in encoder.parameters() if p.requires_grad] for encoder in net.encoders]
        self.encoders: list[list[nn.Parameter]] = [mine for mine in every if mine]

    def step(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Learn from one batch."""
        with self.optimization.autocast():
            outputs: Outputs = self.net(batch.inputs, batch.present)
        fused, own = cross_entropies(outputs, batch.label)
        alone = batch.mean_own(own).sum()
        loss = batch.mean_fused(fused) + alone
        parameters = [p for mine in self.encoders for p in mine]
        gradients = iter(self.optimization.gradients(alone, parameters) if parameters else [])
        self.optimization.backward(loss)
        for mine in self.encoders:
            self._replace(mine, [next(gradients) for _ in mine])
        self.optimization.apply()
        return outputs, loss.detach()

    def _replace(self, parameters: list[nn.Parameter], own: list[Tensor]) -> None:
        """Put the combination in the place of an encoder's gradients; what has none is left without."""
        pairs = [(p, p.grad, u) for p, u in zip(parameters, own, strict=True) if p.grad is not None]
        if not pairs:
            return
        whole = torch.cat([grad.reshape(-1) for _, grad, _ in pairs])
        alone = torch.cat([u.reshape(-1) for *_, u in pairs])
        if self.optimization.dtype == torch.float16:  # may overflow where the sum, by which a step is dropped, does not
            alone = alone.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        combined = combine(whole - alone, alone, gamma=self.config.mmpareto.gamma)
        end = 0
        for parameter, grad, _ in pairs:
            start, end = end, end + grad.numel()
            parameter.grad = combined[start:end].view_as(grad)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Add up."""
        return self.summed_losses(outputs, batch)
