"""Modality dropout: modalities of a sample left out at random.

ModDrop of Neverova et al. (arXiv 1501.00102), which drops whole inputs of a sample with a probability in training, so
that the fused answer cannot lean on one of them. Ours: that one modality is always left, the probability, and that
what is dropped has features of 0 rather than an input of 0, so that its encoder is spared the work.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..batches import Batch
from ..network import Outputs
from .balancer import Balancer


class ModalityDropout(Balancer):
    """Each modality of each sample is dropped with probability p; where all were, one of them at random is left.

    Heads beside the fusion, which only listen, hear what is left: their means are over the samples that still have the
    modality. The fused loss learns from every sample as before.
    """

    needs_unimodal_logits = False

    def prepare(self, batch: Batch) -> Batch:
        """Drop some of what is present. The chance is this process's own, like dropout's."""
        present = batch.present
        draw = torch.rand(len(batch.label), self.net.num_modalities, device=batch.label.device)
        if present is not None:
            draw = draw.masked_fill(~present, -1.0)
        # The largest draw of a sample always stays: where all fall below p, which that is is even chance.
        stays = (draw >= self.config.dropout.probability) | (draw == draw.amax(dim=1, keepdim=True))
        present = stays if present is None else stays & present
        own = batch.loss_weight[1:] * present.T
        total = own.sum(dim=1, keepdim=True)
        self.distributed.sum_([total])
        own = own / torch.where(total > 0, total, 1.0)
        return replace(batch.keep(present), loss_weight=torch.cat([batch.loss_weight[:1], own]))

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Give the mean cross entropy of the fused answer."""
        return self.fused_loss(outputs, batch)
