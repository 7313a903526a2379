"""Joint and summed losses, without any balancing.

The two losses that every other method is compared with. Joint is the papers' baseline: cross entropy of the fused
logits alone, with any fusion; their "Sum" baseline, late fusion by adding logits, is joint with `--fusion late`. The
name Sum is used here for another loss (ours): the fused cross entropy plus each modality's own, the loss that the
adaptive loss (arXiv 2510.21797) warms up with and that MMPareto and G-Blending weight differently.
"""

from __future__ import annotations

from torch import Tensor

from ..batches import Batch
from ..network import Outputs
from .balancer import Balancer


class Joint(Balancer):
    """L = mean_i CE(z_i^fused, y_i). Separate heads train on detached features: they do not train the encoders."""

    needs_unimodal_logits = False

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the mean cross entropy of the fused logits."""
        return self.fused_loss(outputs, batch)


class Sum(Balancer):
    """L = mean_i CE(z_i^fused, y_i) + sum_j mean_i CE(z_i^j, y_i), each mean over the samples of its loss."""

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of the mean cross entropies, with equal weights."""
        return self.summed_losses(outputs, batch)
