"""Samplers that pass once over an order: uniform, BSS-H, anti-curriculum."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...rebalance.curriculum import epoch_order
from ..batches import RowIndex, Step, split_order
from .sampler import Sampler


class Ordered(Sampler):
    """An epoch is an order of rows, cut into batches."""

    @abstractmethod
    def rows(self, epoch: int) -> RowIndex:
        """Return the rows (n',) of epoch 1, 2, ..., in order."""

    def steps(self, epoch: int, *, after: int = 0) -> Iterator[Step]:
        """Cut the order into steps of the batch size; the last may be smaller."""
        return iter(split_order(self.rows(epoch), batch_size=self.batch_size, after=after))

    def in_order(self, name: str, epoch: int, *, balance: NDArray[np.float64] | None = None) -> RowIndex:
        """Return the rows in an order of ORDERS, as `mmaudit order` prints it. balance: see order_of."""
        pool, config = self.pool, replace(self.order, order=name)
        return epoch_order(rank=pool.rank, key=pool.key, balance=balance, config=config, seed=self.seed, epoch=epoch)


class Uniform(Ordered):
    """Every sample once an epoch, shuffled."""

    def rows(self, epoch: int) -> RowIndex:
        """Shuffle all rows."""
        return self.in_order("shuffled", epoch)


class BssH(Ordered):
    """BSS-H (arXiv 2501.01470): a pass over the most balanced share of the samples, which grows.

    The share of epoch t is lambda(t) by `order.pacing`, `order.start` and `order.grow_epochs`, by default the paper's:
    0.186 at t = 1, and all from t = 40 on.
    """

    def rows(self, epoch: int) -> RowIndex:
        """Shuffle the most balanced floor(n lambda(epoch)) rows."""
        return self.in_order("curriculum", epoch)


class AntiCurriculum(Ordered):
    """The control of BSS-H: the least balanced share comes first. It should reduce the accuracy."""

    def rows(self, epoch: int) -> RowIndex:
        """Shuffle the least balanced floor(n lambda(epoch)) rows."""
        return self.in_order("anti-curriculum", epoch)
