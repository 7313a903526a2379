"""MMCosine: cosine logits by modality.

MMCosine, Xu et al., "MMCosine: Multi-Modal Cosine Loss Towards Balanced Audio-Visual Fine-Grained Learning" (ICASSP
2023). Features f_j and class weights W_j of every modality are normalised, so that no modality leads by their length:

    z_i^j[k] = s cos(f_i^j, W_k^j)        z_i^fused = sum_j z_i^j        L = mean_i CE(z_i^fused, y_i)

Prediction is by the same logits. Ours: any number of modalities, and 0 for one that is absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...audit.parsing import check_ranges
from ..fusion import Summed
from .balancer import Balancer


class CosineFusion(Summed):
    """Unimodal logits s cos(f_j, W_j), without bias; the fused logits are their sum. The balancer sets s."""

    scale: Tensor

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        self.heads = nn.ModuleList(nn.Linear(d, num_classes, bias=False) for d in num_features)
        self.register_buffer("scale", torch.ones(()))

    def unimodal_logits(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the scaled cosines."""
        cosines = [
            functional.linear(functional.normalize(f), functional.normalize(head.weight))
            for head, f in zip(cast("Iterable[nn.Linear]", self.heads), features, strict=True)
        ]
        return self.scale * torch.stack(cosines)


@dataclass(frozen=True, slots=True, kw_only=True)
class MmCosineConfig:
    """MMCosine (ICASSP 2023).

    Args:
        scale: Factor s on the cosines, as in its code.
    """

    section: ClassVar[str] = "balancing.mmcosine"
    scale: float = 10.0

    def __post_init__(self) -> None:
        check_ranges("balancing.mmcosine", self, scale="[0.001, 1000]")


class MmCosine(Balancer):
    """The fused loss on the sum of scaled cosines."""

    class_reason = "its logits are cosines with one weight vector per class"
    config_type = MmCosineConfig
    paper = "Xu et al., ICASSP 2023"
    fusions = ()
    own_fusion = CosineFusion
    fusion_reason = "its logits are scaled cosines"
    needs_unimodal_logits = False
    config: MmCosineConfig

    def initialize(self) -> None:
        """Set the scale of the fusion, which is saved with its weights."""
        assert isinstance(self.net.fusion, CosineFusion)  # checked by methods.resolve
        self.net.fusion.scale.fill_(self.config.scale)
