"""Balanced first: a curriculum by the modality discrepancy."""

from __future__ import annotations

import numpy as np

from ...audit.errors import ManifestError
from ...rebalance.curriculum import RowIndex
from .sampler import Paced


class BalancedFirst(Paced):
    """A pass over the samples of small |D|, D the manifest's modality discrepancy; the share grows as that of BSS-H.

    Ours: BSS-H ranks by balance scores, in which similarity and loss count too.
    """

    def initialize(self) -> None:
        """Rank by |D|; equal values share a rank."""
        size = np.abs(self.pool.discrepancy)
        if num_missing := int(np.isnan(size).sum()):
            raise ManifestError(
                f"--sampling balanced-first ranks by the modality discrepancy, and {num_missing} of {len(size)} "
                "training samples have none in the manifest: rescore with mmaudit score and split again"
            )
        self.rank = np.searchsorted(np.sort(size), size)

    def rows(self, epoch: int) -> RowIndex:
        """Shuffle the floor(n lambda(epoch)) rows of smallest |D|."""
        return self.in_order("curriculum", epoch, rank=self.rank)
