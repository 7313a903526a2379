"""Samplers: which samples and which of their modalities each step uses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...rebalance.curriculum import OrderConfig
from ..batches import Batch, ModelReader, Step
from ..distributed import DistributedContext
from ..network import Outputs
from .config import SAMPLERS, SamplingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The n training samples that a sampler draws from: columns (n,) of the manifest, and k classes.

    key: hash of the ids, see `id_key`. rank: 0 = most balanced. balance in [-1, 1], high = balanced, and p_balanced in
    [0, 1]: NaN where the manifest has none.
    """

    key: NDArray[np.uint64]
    rank: NDArray[np.int64]
    balance: NDArray[np.float64]
    p_balanced: NDArray[np.float64]
    label: NDArray[np.int64]
    num_classes: int
    num_modalities: int

    def __len__(self) -> int:
        return len(self.key)


class Sampler(ABC):
    """One way to sample. What it draws follows from pool, seed, epoch, step and its state, in all processes alike."""

    adaptive = False  # whether a step depends on what the network said at the last one: then nothing is read ahead

    def __init__(
        self,
        pool: Pool,
        config: SamplingConfig,
        order: OrderConfig,
        *,
        batch_size: int,
        seed: int,
        distributed: DistributedContext,
    ) -> None:
        self.pool, self.config, self.order = pool, config, order
        self.batch_size, self.seed, self.distributed = batch_size, seed, distributed
        self.begin()

    def begin(self) -> None:
        """Check that the pool has what is drawn by (ManifestError), and make what is carried from step to step."""

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Look at the model before epoch 1, 2, ..., if need be."""

    @abstractmethod
    def steps(self, epoch: int, *, after: int = 0) -> Iterator[Step]:
        """Give the steps of an epoch, but for the first `after`, which a run that was interrupted has taken."""

    def observe(self, outputs: Outputs, batch: Batch) -> None:
        """Take note of what the network said of a step, in training."""

    def numbers(self) -> dict[str, float]:
        """Give what is worth a column of history.jsonl, as it stands after an epoch."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Give what the next steps depend on: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""


def build_sampler(
    name: str,
    pool: Pool,
    config: SamplingConfig,
    order: OrderConfig,
    *,
    batch_size: int,
    seed: int,
    distributed: DistributedContext,
) -> Sampler:
    """Make the sampler of that name, one of SAMPLERS. Raises ManifestError where the pool lacks what it draws by."""
    module, _, found = SAMPLERS[name].partition(":")
    type_ = getattr(import_module(f".{module}", __package__), found)
    made: Sampler = type_(pool, config, order, batch_size=batch_size, seed=seed, distributed=distributed)
    return made
