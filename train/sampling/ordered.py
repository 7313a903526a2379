"""The sampling axis: which samples, in which order, does an epoch see?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..audit.errors import ConfigError
from ..rebalance.curriculum import OrderConfig, order_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Constants of the samplers. Those of BSS-H are the paper's."""

    pacing_start: float = 0.1  # BSS-H: share of the samples at epoch 0
    pacing_epochs: int = 40  # BSS-H: epoch from which every sample is seen

    def __post_init__(self) -> None:
        if not 0 < self.pacing_start <= 1:
            raise ConfigError(f"sampling.pacing_start is {self.pacing_start}; a share lies in (0, 1]")
        if self.pacing_epochs < 1:
            raise ConfigError(f"sampling.pacing_epochs is {self.pacing_epochs}; it must be at least 1")


class Sampler(Protocol):
    """An order of training rows for each epoch: a pure function, so that a resumed run sees the same."""

    def rows(self, epoch: int) -> NDArray[np.int64]:
        """Give the rows that epoch 1, 2, ... sees, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ordered:
    """The samples in the order of a config: what `order_of` gives, epoch by epoch."""

    rank: NDArray[np.integer]
    key: NDArray[np.uint64]
    seed: int
    config: OrderConfig

    def rows(self, epoch: int) -> NDArray[np.int64]:
        """Give the rows that this epoch's order holds."""
        return order_of(rank=self.rank, key=self.key, config=self.config, seed=self.seed, epoch=epoch)


class SamplerMaker(Protocol):
    """A sampler from the ranks of the training rows (n,), 0 = most balanced, a seed and the constants."""

    def __call__(
        self,
        rank: NDArray[np.integer],
        seed: int,
        config: SamplingConfig,
        /,
        *,
        key: NDArray[np.uint64],
    ) -> Sampler:
        """Make it. key (n,): hash of the ids, as `id_key` gives it."""


def _uniform(rank: NDArray[np.integer], seed: int, config: SamplingConfig, /, *, key: NDArray[np.uint64]) -> Sampler:
    """Every sample once an epoch, shuffled."""
    return Ordered(rank=rank, key=key, seed=seed, config=OrderConfig(order="shuffled"))


def _bss_h(rank: NDArray[np.integer], seed: int, config: SamplingConfig, /, *, key: NDArray[np.uint64]) -> Sampler:
    """BSS-H (arXiv 2501.01470): one pass, shuffled, over the most balanced share of the samples, which grows."""
    order = OrderConfig(start=config.pacing_start, grow_epochs=config.pacing_epochs)
    return Ordered(rank=rank, key=key, seed=seed, config=order)


SAMPLERS: dict[str, SamplerMaker] = {"uniform": _uniform, "bss-h": _bss_h}
