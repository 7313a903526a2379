"""Samplers that draw by weight: class-balanced, posterior-weighted."""

from __future__ import annotations

import numpy as np

from ...audit.errors import ManifestError
from ...rebalance.curriculum import draw_rows
from ..batches import Rows
from .ordered import Ordered

_LEAST_POSTERIOR = 0.01  # ours: what BSS-L's 1.01 + s leaves to the least balanced sample


class ClassBalanced(Ordered):
    """As many draws with replacement as there are samples, each class as likely as any other.

    The usual answer to rare classes, beside the published methods: a sample's chance is 1 / (k' n_c), where n_c samples
    have its class and k' classes have any.
    """

    def rows(self, epoch: int) -> Rows:
        """Draw an epoch."""
        count = np.bincount(self.pool.label, minlength=self.pool.num_classes)
        weight = 1.0 / count[self.pool.label]
        return draw_rows(weight, key=self.pool.key, draw="replacement", seed=self.seed, epoch=epoch)


class PosteriorWeighted(Ordered):
    """Chances by P(balanced), the mixture's posterior in the manifest, of 0.01 at least.

    Ours, as a soft form of training on the balanced subset alone (arXiv 2510.21797). `order.draw` says how: "order",
    the default, passes over all samples and has the likely balanced ones early, so that a mixture that errs costs no
    sample; "replacement" has them often, nearly as if the others were left out.
    """

    def begin(self) -> None:
        """Want a posterior of every sample."""
        lacking, num = int(np.isnan(self.pool.p_balanced).sum()), len(self.pool)
        if lacking:
            raise ManifestError(
                f"--sampling posterior draws by P(balanced), and {lacking} of {num} training samples have none in "
                "the manifest: rescore with mmaudit score and split again"
            )

    def rows(self, epoch: int) -> Rows:
        """Draw an epoch."""
        weight = np.maximum(self.pool.p_balanced, _LEAST_POSTERIOR)
        return draw_rows(weight, key=self.pool.key, draw=self.order.draw, seed=self.seed, epoch=epoch)
