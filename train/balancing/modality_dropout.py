"""Modality dropout: modalities of a sample left out at random.

ModDrop of Neverova et al. (arXiv 1501.00102) drops whole inputs of a sample with a probability in training, so that the
fused prediction cannot rely on one of them. Ours: one modality always remains, the probability, and a dropped modality
has features of 0 rather than an input of 0, which saves its encoder the work.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...audit.parsing import check_ranges
from ..batches import Batch
from .balancer import Balancer


@dataclass(frozen=True, slots=True, kw_only=True)
class DropoutConfig:
    """Modality dropout (Neverova et al., ModDrop, arXiv 1501.00102).

    Args:
        probability: Probability that a modality of a sample is dropped; one always remains (ours).
    """

    section: ClassVar[str] = "balancing.dropout"
    probability: float = 0.2

    def __post_init__(self) -> None:
        check_ranges("balancing.dropout", self, probability="[0, 1]")


class ModalityDropout(Balancer):
    """Each modality of each sample is dropped with probability p; where all were, a random one remains.

    Separate heads, which train on detached features, use the remaining rows: their means are over the samples that
    still have the modality. The fused loss uses every sample as before.
    """

    config_type = DropoutConfig
    paper = "Neverova et al., ModDrop, arXiv 1501.00102"
    config: DropoutConfig
    needs_unimodal_logits = False

    def prepare(self, batch: Batch) -> Batch:
        """Drop modalities of the batch. The random numbers are this process's own, like dropout's."""
        modality_mask = batch.present
        draw = torch.rand(len(batch.label), self.net.num_modalities, device=batch.label.device)
        if modality_mask is not None:
            draw = draw.masked_fill(~modality_mask, -1.0)
        # The largest draw of a sample always remains: where all are below p, each modality is equally likely.
        keep_mask = (draw >= self.config.probability) | (draw == draw.amax(dim=1, keepdim=True))
        modality_mask = keep_mask if modality_mask is None else keep_mask & modality_mask
        unimodal_weight = batch.loss_weight[1:] * modality_mask.T
        total = unimodal_weight.sum(dim=1, keepdim=True)
        self.distributed.sum_([total])
        unimodal_weight = unimodal_weight / torch.where(total > 0, total, 1.0)
        return replace(
            batch.with_modality_mask(modality_mask), loss_weight=torch.cat([batch.loss_weight[:1], unimodal_weight])
        )
