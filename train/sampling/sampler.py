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
from ..network import Outputs
from ..optimizer import DistributedContext
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
    """One sampling method. Its draws follow from pool, seed, epoch, step and its state, equal in all processes."""

    adaptive = False  # whether a step depends on the outputs of the last one, which rules out reading ahead

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
        self.initialize()

    def initialize(self) -> None:
        """Check that the pool has the columns it draws by (ManifestError), and set up the state."""

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Evaluate the model before epoch 1, 2, ..., if the method needs it."""

    @abstractmethod
    def steps(self, epoch: int, *, after: int = 0) -> Iterator[Step]:
        """Yield the steps of an epoch without the first `after`, which an interrupted run has done."""

    def observe(self, outputs: Outputs, batch: Batch) -> None:
        """Update the sampler with the outputs of a training step."""

    def epoch_metrics(self) -> dict[str, float]:
        """Return the sampler's columns of history.jsonl at the end of an epoch."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next steps depend on: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state."""


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
    """Build the sampler of a name in SAMPLERS. Raises ManifestError where the pool lacks a column it draws by."""
    module, _, class_name = SAMPLERS[name].partition(":")
    sampler_class = getattr(import_module(f".{module}", __package__), class_name)
    sampler: Sampler = sampler_class(pool, config, order, batch_size=batch_size, seed=seed, distributed=distributed)
    return sampler
