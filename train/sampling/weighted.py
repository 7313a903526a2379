"""Samplers that draw by weight: class-balanced, posterior-weighted."""

from __future__ import annotations

import numpy as np

from ...audit.errors import ManifestError
from ...rebalance.curriculum import draw_rows
from ..batches import RowIndex
from .ordered import Ordered

_MIN_POSTERIOR = 0.01  # ours: the weight that BSS-L's 1.01 + s gives the least balanced sample


class ClassBalanced(Ordered):
    """As many draws with replacement as there are samples, every class equally likely.

    The usual method for rare classes, in addition to the published methods: a sample's probability is 1 / (k' n_c),
    where n_c samples have its class and k' classes have any.
    """

    def rows(self, epoch: int) -> RowIndex:
        """Draw an epoch."""
        count = np.bincount(self.pool.label, minlength=self.pool.num_classes)
        weight = 1.0 / count[self.pool.label]
        return draw_rows(weight, key=self.pool.key, draw="replacement", seed=self.seed, epoch=epoch)


class PosteriorWeighted(Ordered):
    """Draws by P(balanced), the mixture's posterior in the manifest, at least 0.01.

    Ours, as a soft form of training on the balanced subset alone (arXiv 2510.21797). `order.draw` selects how: "order",
    the default, passes over all samples with likely balanced ones early, so that an error of the mixture costs no
    sample; "replacement" draws those often, nearly as if the others were left out.
    """

    def initialize(self) -> None:
        """Check that every sample has a posterior."""
        num_missing, num_samples = int(np.isnan(self.pool.p_balanced).sum()), len(self.pool)
        if num_missing:
            raise ManifestError(
                f"--sampling posterior draws by P(balanced), and {num_missing} of {num_samples} training samples have "
                "none in the manifest: rescore with mmaudit score and split again"
            )

    def rows(self, epoch: int) -> RowIndex:
        """Draw an epoch."""
        weight = np.maximum(self.pool.p_balanced, _MIN_POSTERIOR)
        return draw_rows(weight, key=self.pool.key, draw=self.order.draw, seed=self.seed, epoch=epoch)
