"""MLA: alternating unimodal training of a shared classifier.

Zhang et al., "Multimodal Representation Learning by Alternating Unimodal Adaptation", CVPR 2024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batches import Batch
from ..fusion import Shared
from ..network import FusionNet, Outputs, cross_entropies, cross_entropy
from ..optimizer import Optimization
from .balancer import Balancer
from .config import BalancingConfig


def absorb(projection: Tensor, direction: Tensor, *, ridge: float) -> Tensor:
    """Take a direction h (d,) out of a projection P (d, d): P - (P h)(P h)^T / (ridge + h^T P h).

    A step of recursive least squares, `ridge` above 0. Of P h ridge / (ridge + h^T P h) is left; P stays symmetric,
    and as it is on every v with v^T P h = 0.
    """
    along = projection @ direction
    scaled = along / (ridge + (direction @ along).clamp_min(0)).sqrt()
    return torch.addr(projection, scaled, scaled, alpha=-1)


def forget(projection: Tensor) -> Tensor:
    """Move P (d, d) by 1 / d of the way back to the identity, as before every turn: ours.

    Else it fades, since the means of batches differ in every direction, and the classifier stands still: with 512
    features and batches of 256 the mean of P's diagonal was 0.22 after 200 steps and 0.002 after 400, and with this it
    is 0.64 and 0.57. So what is not met again is forgotten over some d turns.
    """
    share = 1 / len(projection)
    moved = projection * (1 - share)
    moved.diagonal().add_(share)
    return moved


class Mla(Balancer):
    """By turns, for each modality j: L_j = CE(z^j) moves encoder j and the shared classifier, and nothing else.

    In a turn the gradient of the classifier's weight is projected off the mean features of earlier turns, the last
    turn's above all, which may be the last modality's in the step before. What is returned are the answers as they
    were before the turns, and the mean of the turns' losses. The paper's optimiser is SGD: what AdamW makes
    of a projected gradient is not quite off what was seen.
    """

    def __init__(self, net: FusionNet, optimization: Optimization, config: BalancingConfig, *, epochs: int) -> None:
        super().__init__(net, optimization, config, epochs=epochs)
        assert isinstance(net.fusion, Shared)  # the config has seen to it
        self.fusion = net.fusion
        weight = self.fusion.head.weight
        self.projection = torch.eye(weight.shape[1], device=weight.device)
        self.last = torch.zeros(weight.shape[1], device=weight.device)  # mean feature of the last turn

    def step(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Take the turns. No turn moves what another's features come from, so all are encoded at once."""
        with self.optimization.autocast():
            features = self.net.encode(batch.inputs, batch.present)
            with torch.no_grad():
                outputs = self.net.answer([f.detach() for f in features])
        losses = [self._turn(j, feature, batch) for j, feature in enumerate(features)]
        return outputs, torch.stack(losses).mean()

    def _turn(self, modality: int, feature: Tensor, batch: Batch) -> Tensor:
        with self.optimization.autocast():
            brought = self.fusion.bring[modality](feature)
            logits = self.fusion.head(brought)
            listened = self.net.heads[modality](feature.detach()) if self.net.has_own_heads else None
        part = batch.loss_weight[1 + modality]
        loss = (cross_entropy(logits, batch.label) * part).sum()
        learned = loss
        if listened is not None:
            learned = loss + (cross_entropy(listened, batch.label) * part).sum()
        self.optimization.backward(learned)
        self._project(brought.detach().float(), part)
        self.optimization.apply()
        return loss.detach()

    @torch.no_grad()
    def _project(self, brought: Tensor, part: Tensor) -> None:
        """Project the classifier's gradient off what was seen, and note what is seen now, in all processes."""
        self.projection = absorb(forget(self.projection), self.last, ridge=self.config.mla.ridge)
        gradient = self.fusion.head.weight.grad
        assert gradient is not None
        self.fusion.head.weight.grad = gradient @ self.projection
        self.last = (part @ brought).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # of a step that overflowed
        self.distributed.sum_([self.last])

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Mean of the modalities' losses, which a step takes one by one."""
        return batch.mean_own(cross_entropies(outputs, batch.label)[1]).mean()

    def state_dict(self) -> dict[str, Any]:
        """What has been seen."""
        return {"projection": self.projection.clone(), "last": self.last.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.projection = state["projection"].to(self.projection)
        self.last = state["last"].to(self.last)
