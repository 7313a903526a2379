"""Steps, batches, and what samplers and balancers have in common."""

from __future__ import annotations

import copy
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..rebalance.curriculum import RowIndex
from .config import TrainConfig
from .network import FusionNet, Outputs
from .optimizer import DistributedContext

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Rows of one step over all processes.

    Attributes:
        rows: Rows (b,) of the training samples; a row may occur more than once.
        present: Whether a modality of a row is used, (b, m); None: all are. The unimodal losses of a row's used
            modalities train on it.
        fused: Whether the fused loss trains on a row, (b,); None: on all rows.
    """

    rows: RowIndex
    present: Mask | None = None
    fused: Mask | None = None

    def shard(self, distributed: DistributedContext) -> Step:
        """Return this process's part of the step."""
        if distributed.world_size == 1:
            return self
        local_slice = distributed.slice(len(self.rows))
        return Step(
            rows=self.rows[local_slice],
            present=None if self.present is None else self.present[local_slice],
            fused=None if self.fused is None else self.fused[local_slice],
        )

    def masked_by(self, available: Mask) -> Step:
        """Return the step restricted to the available modalities (n, m) of the training samples.

        A row without any available modality has no loss.
        """
        available_rows = available[self.rows]
        if available_rows.all():
            return self
        modality_mask = available_rows if self.present is None else available_rows & self.present
        any_modality: Mask = np.any(modality_mask, axis=1)
        return Step(
            rows=self.rows,
            present=modality_mask,
            fused=any_modality if self.fused is None else any_modality & self.fused,
        )

    def rows_of(self, modality: int) -> RowIndex:
        """Return the rows (b_j,) that use a modality."""
        return self.rows if self.present is None else self.rows[self.present[:, modality]]

    def loss_weights(self, weight: NDArray[np.float32], *, num_modalities: int) -> NDArray[np.float32]:
        """Return the weight (1 + m, b) of each row in the mean losses: the fused loss first, then one row per modality.

        `weight` is that of all training samples (n,). Weights of the whole step sum to 1, or are 0 where no row counts.
        """
        row_weight = weight[self.rows]
        if self.fused is None and self.present is None:
            weights = np.empty((1 + num_modalities, len(row_weight)), np.float32)
            weights[:] = row_weight / (row_weight.sum() or 1.0)
            return weights
        weights = np.repeat(row_weight[None], 1 + num_modalities, axis=0)
        if self.fused is not None:
            weights[0] *= self.fused
        if self.present is not None:
            weights[1:] *= self.present.T
        total = weights.sum(axis=1, keepdims=True, dtype=np.float64)
        return (weights / np.where(total > 0, total, 1.0)).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """This process's part of a step on the device: b rows, m modalities.

    rows (b,) among the training samples; label (b,), the class, or of label sets and numbers the values (b, k); present
    (b, m) or None: all modalities are used. inputs: m tensors (b_j, ...) of the rows that use the modality, b_j <= b.
    loss_weight (1 + m, b): see Step.loss_weights; over all processes each of its rows sums to 1. size: samples of the
    whole step.
    """

    rows: Tensor
    inputs: tuple[Tensor, ...]
    label: Tensor
    present: Tensor | None
    loss_weight: Tensor
    size: int

    def with_modality_mask(self, present: Tensor) -> Batch:
        """Return the same rows with the modalities (b, m) that are still used, a subset of those used so far."""
        previous = self.present
        row_masks = [present[:, j] if previous is None else present[previous[:, j], j] for j in range(len(self.inputs))]
        return replace(
            self, present=present, inputs=tuple(x[rows] for x, rows in zip(self.inputs, row_masks, strict=True))
        )

    def parts(self, size: int | None, *, world_size: int) -> list[Batch]:
        """Return parts of the batch, of at most about `size` samples over all processes, equally many in each process.

        Losses of parts add up to that of the batch: each sample keeps its weight. size: None: one part.
        """
        num_parts = 1 if size is None else min(-(-self.size // size), max(1, self.size // world_size))
        if num_parts == 1:
            return [self]
        ends = [len(self.rows) * part // num_parts for part in range(num_parts + 1)]
        if self.present is None:
            input_ends = [ends] * len(self.inputs)
        else:  # the inputs have the rows only that use the modality
            counts = torch.cat([self.present.new_zeros(1, len(self.inputs), dtype=torch.int64), self.present.cumsum(0)])
            input_ends = counts[ends].T.tolist()
        return [
            replace(
                self,
                rows=self.rows[ends[k] : ends[k + 1]],
                inputs=tuple(x[rows[k] : rows[k + 1]] for x, rows in zip(self.inputs, input_ends, strict=True)),
                label=self.label[ends[k] : ends[k + 1]],
                present=None if self.present is None else self.present[ends[k] : ends[k + 1]],
                loss_weight=self.loss_weight[:, ends[k] : ends[k + 1]],
            )
            for k in range(num_parts)
        ]

    def mean_fused(self, values: Tensor) -> Tensor:
        """Return this process's part of the step's mean of values (b,) over the rows of the fused loss."""
        return (values * self.loss_weight[0]).sum()

    def mean_unimodal(self, values: Tensor) -> Tensor:
        """Return this process's parts (m,) of the step's means of values (m, b), each over its modality's rows."""
        return (values * self.loss_weight[1:]).sum(dim=1)


def split_order(order: RowIndex, *, batch_size: int, after: int = 0) -> list[Step]:
    """Cut an epoch's order into steps, without the first `after`; the last may be smaller, and no row is left out."""
    starts = range(after * batch_size, len(order), batch_size)
    return [Step(rows=order[start : start + batch_size]) for start in starts]


def whole_batches(steps: Iterable[Step], *, batch_size: int, num_done: int = 0) -> Iterator[Step]:
    """Yield the steps of an epoch, without a last one of fewer than `batch_size` rows unless it is the only one.

    num_done: steps of the epoch that an interrupted run has done.
    """
    num_steps, last = num_done, None
    for step in steps:
        if last is not None:
            yield last
            num_steps += 1
        last = step
    if last is not None and (len(last.rows) >= batch_size or num_steps == 0):
        yield last


def to_batch(
    step: Step,
    inputs: tuple[Tensor, ...],
    *,
    label: Tensor,
    weight: NDArray[np.float32],
    distributed: DistributedContext,
) -> Batch:
    """Copy this process's part of a step to the device of `label` (n,); `inputs` are on it already."""
    device, local_step = label.device, step.shard(distributed)
    rows = torch.from_numpy(local_step.rows).to(device, non_blocking=True)
    loss_weight = step.loss_weights(weight, num_modalities=len(inputs))[:, distributed.slice(len(step.rows))]
    modality_mask = (
        None if local_step.present is None else torch.from_numpy(local_step.present).to(device, non_blocking=True)
    )
    return Batch(
        rows=rows,
        inputs=inputs,
        label=label.index_select(0, rows),
        present=modality_mask,
        loss_weight=torch.from_numpy(np.ascontiguousarray(loss_weight)).to(device, non_blocking=True),
        size=len(step.rows),
    )


OutputFunction = Callable[[Outputs, Tensor], Tensor]
Loss = Callable[[Outputs, Batch], Tensor]


class ModelReader(Protocol):
    """Evaluation of the model in eval mode and without augmentation on training or validation samples.

    Every process evaluates its part, and all get the whole result. net: the model in training.
    """

    net: FusionNet
    num_train: int

    def read(self, function: OutputFunction, *, rows: RowIndex | None = None, net: FusionNet | None = None) -> Tensor:
        """Return function(outputs, label), samples in its last dimension, on training samples: all, or `rows`.

        The value of a sample must depend on that sample alone. net: another network than the one in training.
        """

    def read_validation(self, function: OutputFunction, *, net: FusionNet | None = None) -> Tensor:
        """Return function(outputs, label) on all validation samples."""

    def train_copy(self, loss: Loss, *, epochs: int) -> FusionNet:
        """Return a copy of the model trained further with another loss on uniform batches; the model is not changed."""


class Method(ABC):
    """What samplers and balancers have in common.

    A method is a class in a file of its own, and one line in SAMPLERS or BALANCERS. A method of another package has an
    entry point in the group `mmaudit.samplers` or `mmaudit.balancers` in place of the line.

    Attributes:
        config_type: Frozen dataclass of the method's constants; None: it has none. Its class attribute `section` is the
            section of the config, such as "balancing.ogm": the axis, then a name that methods may share; for a method
            of another package, the name of its entry point. The section Args of its docstring states the meaning of
            every field, and `__post_init__` raises ConfigError for values out of range.
        paper: Reference; empty where the method is mmaudit's own or too common for one.
        min_modalities: Fewest modalities that it works with.
        class_reason: Why it works with classes only; empty where it also trains on label sets and numbers.
        state_fields: Attributes that the next steps depend on, saved in checkpoints: plain values, and tensors of a
            balancer or arrays of a sampler.
        config: The constants, an instance of `config_type`.

    Example:
        The entry point of a sampler `half` and a balancer `twice`, in the pyproject.toml of their package::

            [project.entry-points."mmaudit.samplers"]
            half = "my_package.half:Half"

            [project.entry-points."mmaudit.balancers"]
            twice = "my_package.twice:Twice"
    """

    config_type: ClassVar[type[Any] | None] = None
    paper: ClassVar[str] = ""
    min_modalities: ClassVar[int] = 1
    class_reason: ClassVar[str] = ""
    state_fields: ClassVar[tuple[str, ...]] = ()
    config: Any

    @classmethod
    def default_config(cls) -> Any:
        """Return the constants that hold where none are set; None where the method has none."""
        return None if cls.config_type is None else cls.config_type()

    @classmethod
    def needs(cls) -> tuple[str, ...]:
        """Return what the method needs of data and settings, in words."""
        modalities = (f"{cls.min_modalities} modalities",) if cls.min_modalities > 1 else ()
        return (*modalities, *(("classes",) if cls.needs_classes(cls.default_config()) else ()))

    @classmethod
    def needs_classes(cls, config: Any) -> str:
        """Return why the method works with classes only, with these constants; "" where it does not need them."""
        return cls.class_reason

    @classmethod
    def check(cls, config: Any, settings: TrainConfig) -> None:
        """Raise ConfigError where the constants contradict other settings of the training."""

    @classmethod
    def reads_scores(cls, config: Any) -> bool:
        """Return whether the method reads scores of the manifest, which data without scores do not have."""
        return False

    @classmethod
    def late_start(cls, config: Any, settings: TrainConfig) -> str | None:
        """Return a warning where the method starts after the last epoch of the settings."""

    @classmethod
    def unused(cls, config: Any) -> Mapping[str, str]:
        """Return the fields of the config that have no effect beside the others, each with the reason."""
        return {}

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Evaluate the model before epoch 1, 2, ..., if the method needs it."""

    def epoch_metrics(self) -> dict[str, float]:
        """Return the method's columns of history.jsonl at the end of an epoch."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next steps depend on: tensors and plain values."""
        values = {name.lstrip("_"): copy.deepcopy(getattr(self, name)) for name in self.state_fields}
        arrays = {name: torch.from_numpy(value) for name, value in values.items() if isinstance(value, np.ndarray)}
        return values | arrays

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state."""
        for name in self.state_fields:
            setattr(self, name, state[name.lstrip("_")])


def start_warning(key: str, first_epoch: int, settings: TrainConfig, *, fallback: str) -> str | None:
    """Return the warning of a method that is another one until its first epoch, set by a key, if there are fewer."""
    if settings.finetune.epochs >= first_epoch:
        return None
    name = settings.finetune.sampling if key.startswith("sampling.") else settings.finetune.balancing
    return f"{name} starts in epoch {first_epoch} ({key}); until then it is {fallback}"


def sample_rows(model_reader: ModelReader, num_rows: int) -> RowIndex:
    """Draw training rows to evaluate, ascending: all, or `num_rows`; the same on every call and in all processes."""
    num_rows = min(num_rows, model_reader.num_train)
    return np.sort(np.random.default_rng(0).choice(model_reader.num_train, num_rows, replace=False, shuffle=False))
