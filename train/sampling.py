"""The sampling axis: which samples, in which order, does an epoch see?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..audit.errors import ConfigError
from ..rebalance.curriculum import most_balanced, root_pacing, shuffled


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

    def rows(self, epoch: int) -> NDArray[np.intp]:
        """Give the rows that epoch 1, 2, ... sees, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """Every sample once an epoch, shuffled."""

    num_rows: int
    seed: int

    def rows(self, epoch: int) -> NDArray[np.intp]:
        """Give all rows in this epoch's order."""
        return shuffled(np.arange(self.num_rows), seed=self.seed, epoch=epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceCurriculum:
    """BSS-H (arXiv 2501.01470): one pass, shuffled, over the most balanced share of the samples, which grows."""

    rank: NDArray[np.integer]
    seed: int
    config: SamplingConfig

    def rows(self, epoch: int) -> NDArray[np.intp]:
        """Give the most balanced rows that this epoch's pacing lets in, shuffled."""
        share = root_pacing(epoch, start=self.config.pacing_start, grow_epochs=self.config.pacing_epochs)
        return shuffled(most_balanced(self.rank, share), seed=self.seed, epoch=epoch)


SamplerMaker = Callable[[NDArray[np.integer], int, SamplingConfig], Sampler]

# By name: from the ranks of the training rows (n,), 0 = most balanced, a seed and the constants.
SAMPLERS: dict[str, SamplerMaker] = {
    "uniform": lambda rank, seed, config: Uniform(num_rows=len(rank), seed=seed),
    "bss-h": lambda rank, seed, config: BalanceCurriculum(rank=rank, seed=seed, config=config),
}
