"""Joint and summed losses, without any balancing.

The two losses that every other method is measured by. Joint is the papers' baseline: cross entropy of the fused
answer alone, with whichever fusion; their "Sum" baseline, late fusion by adding logits, is joint with `--fusion late`.
Sum here is ours by name: the fused cross entropy plus each modality's own, the loss that the adaptive loss (arXiv
2510.21797) warms up with and that MMPareto and G-Blending weigh anew.
"""

from __future__ import annotations

from torch import Tensor

from ..batches import Batch
from ..network import Outputs
from .balancer import Balancer


class Joint(Balancer):
    """L = mean_i CE(z_i^fused, y_i). Heads beside the fusion only listen: no encoder moves for their sake."""

    needs_unimodal_logits = False

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Give the mean cross entropy of the fused answer."""
        return self.fused_loss(outputs, batch)


class Sum(Balancer):
    """L = mean_i CE(z_i^fused, y_i) + sum_j mean_i CE(z_i^j, y_i), each mean over the samples that it learns from."""

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Give the sum of the mean cross entropies, weighed alike."""
        return self.summed_losses(outputs, batch)
