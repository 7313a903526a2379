"""Samplers: which samples and which of their modalities each step uses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...rebalance.curriculum import OrderConfig
from ..batches import Batch, Method, Step
from ..network import Outputs
from ..optimizer import DistributedContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The n training samples that a sampler draws from: columns (n,) of the manifest, and k classes.

    Attributes:
        key: Hash of the ids, see `id_key`.
        rank: Rank by balance, 0 = most balanced.
        discrepancy: Modality discrepancy in [-1, 1]; NaN where the manifest has none.
        balance: Balance score in [-1, 1], high = balanced; NaN where the manifest has none.
        p_balanced: P(balanced) in [0, 1]; NaN where the manifest has none.
        label: Class, in [0, num_classes).
        num_classes: Number of classes.
        num_modalities: Number of modalities.
    """

    key: NDArray[np.uint64]
    rank: NDArray[np.int64]
    discrepancy: NDArray[np.float64]
    balance: NDArray[np.float64]
    p_balanced: NDArray[np.float64]
    label: NDArray[np.int64]
    num_classes: int
    num_modalities: int

    def __len__(self) -> int:
        return len(self.key)


class Sampler(Method):
    """One sampling method. Its draws follow from pool, seed, epoch, step and its state, equal in all processes.

    A method must define `steps`; `initialize` checks the pool and sets up the state, `begin_epoch` may evaluate the
    model, `observe` follows the training steps.

    Attributes:
        selects_per_modality: It selects samples of each modality, which only losses of single modalities train on.
        usual_balancing: Balancer of `--balancing auto`.
        order_fields: Fields of the section `order` that it uses.
        adaptive: A step depends on the outputs of the last one, which rules out reading ahead.

    Example:
        >>> class Half(Sampler):
        ...     def steps(self, epoch, *, after=0):
        ...         rows = np.random.default_rng([self.seed, epoch]).permutation(len(self.pool) // 2)
        ...         yield from split_order(rows, batch_size=self.batch_size, after=after)
    """

    selects_per_modality: ClassVar[bool] = False
    usual_balancing: ClassVar[str] = "joint"
    order_fields: ClassVar[tuple[str, ...]] = ()
    adaptive: ClassVar[bool] = False

    def __init__(
        self,
        pool: Pool,
        order: OrderConfig,
        config: Any = None,
        *,
        batch_size: int,
        seed: int,
        distributed: DistributedContext,
    ) -> None:
        self.pool, self.order = pool, order
        self.config = self.default_config() if config is None else config
        self.batch_size, self.seed, self.distributed = batch_size, seed, distributed
        self.initialize()

    @classmethod
    def needs(cls) -> tuple[str, ...]:
        """Return what the method needs of data and settings, in words."""
        unimodal_loss = (f"unimodal losses, such as --balancing {cls.usual_balancing}",)
        return (*super().needs(), *(unimodal_loss if cls.selects_per_modality else ()))

    def initialize(self) -> None:
        """Check that the pool has the columns it draws by (ManifestError), and set up the state."""

    @abstractmethod
    def steps(self, epoch: int, *, after: int = 0) -> Iterator[Step]:
        """Yield the steps of an epoch without the first `after`, which an interrupted run has done."""

    def observe(self, outputs: Outputs, batch: Batch) -> None:
        """Update the sampler with the outputs of a training step."""
