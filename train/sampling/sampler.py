"""Samplers: which samples and which of their modalities each step uses; those that pass over an order of rows."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...audit.errors import ManifestError
from ...rebalance.curriculum import OrderConfig, RowIndex, draw_rows, epoch_order
from ..batches import Batch, Method, Step, split_order
from ..config import TrainConfig
from ..network import Outputs
from ..optimizer import DistributedContext

_MIN_POSTERIOR = 0.01  # ours: the weight that BSS-L's 1.01 + s gives the least balanced sample


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
        balancing_reason: Why it is another one than joint, for the log.
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
    balancing_reason: ClassVar[str] = "it selects samples per modality, which only unimodal losses train on"
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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state; tensors become arrays on the CPU."""
        arrays = {name: value.cpu().numpy() for name, value in state.items() if isinstance(value, Tensor)}
        super().load_state_dict(state | arrays)

    @abstractmethod
    def steps(self, epoch: int, *, after: int = 0) -> Iterator[Step]:
        """Yield the steps of an epoch without the first `after`, which an interrupted run has done."""

    def observe(self, outputs: Outputs, batch: Batch) -> None:
        """Update the sampler with the outputs of a training step."""


class Ordered(Sampler):
    """An epoch is an order of rows, cut into batches."""

    @abstractmethod
    def rows(self, epoch: int) -> RowIndex:
        """Return the rows (n',) of epoch 1, 2, ..., in order."""

    def steps(self, epoch: int, *, after: int = 0) -> Iterator[Step]:
        """Cut the order into steps of the batch size; the last may be smaller."""
        return iter(split_order(self.rows(epoch), batch_size=self.batch_size, after=after))

    def in_order(
        self,
        name: str,
        epoch: int,
        *,
        rank: NDArray[np.int64] | None = None,
        balance: NDArray[np.float64] | None = None,
    ) -> RowIndex:
        """Return the rows in an order of ORDERS, as `mmaudit order` prints it.

        rank: by default the manifest's. balance: see epoch_order.
        """
        rank, config = self.pool.rank if rank is None else rank, replace(self.order, order=name)
        return epoch_order(rank=rank, key=self.pool.key, balance=balance, config=config, seed=self.seed, epoch=epoch)


class Uniform(Ordered):
    """Every sample once an epoch, shuffled."""

    def rows(self, epoch: int) -> RowIndex:
        """Shuffle all rows."""
        return self.in_order("shuffled", epoch)


class Paced(Ordered):
    """An epoch is a share of the samples, which grows by `order.pacing`, `order.start` and `order.grow_epochs`."""

    order_fields = ("pacing", "start", "grow_epochs", "steps")

    @classmethod
    def reads_scores(cls, config: Any) -> bool:
        """Return whether the samples are ranked by the manifest's scores, not by those of the model in training."""
        return getattr(config, "score_source", "manifest") != "model"

    @classmethod
    def late_start(cls, config: Any, settings: TrainConfig) -> str | None:
        """Return a warning where the share does not reach 1."""
        finetune, order = settings.finetune, settings.order
        if (share := order.share(finetune.epochs)) >= 1:
            return None
        return (
            f"--sampling {finetune.sampling} uses {math.floor(1000 * share) / 10:g}% of the training samples in the "
            f"last one and never the rest; it uses all of them from epoch {order.grow_epochs} on (order.grow_epochs)"
        )


class ClassBalanced(Ordered):
    """As many draws with replacement as there are samples, every class equally likely.

    The usual method for rare classes, in addition to the published methods: a sample's probability is 1 / (k' n_c),
    where n_c samples have its class and k' classes have any.
    """

    class_reason = "it draws by class"

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

    order_fields = ("draw",)

    @classmethod
    def reads_scores(cls, config: None) -> bool:
        """Return True: it draws by P(balanced)."""
        return True

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
