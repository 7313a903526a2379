"""Batches of a step, and reading of the model by a method between epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .distributed import DistributedContext
from .network import FusionNet, Outputs

Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step sees, over all processes: rows (b,) of the training samples; a row may stand more than once.

    present (b, m): whether a modality of a row is heard; None: all are. A row is learned from by the own losses of
    those that are. fused (b,): whether the fused loss learns from a row; None: it does from all.
    """

    rows: Rows
    present: Mask | None = None
    fused: Mask | None = None

    def share(self, distributed: DistributedContext) -> Step:
        """Give what this process has of it."""
        if distributed.world_size == 1:
            return self
        mine = distributed.slice(len(self.rows))
        return Step(
            rows=self.rows[mine],
            present=None if self.present is None else self.present[mine],
            fused=None if self.fused is None else self.fused[mine],
        )

    def there(self, present: Mask) -> Step:
        """Give the same step where training samples have some modalities alone, (n, m); none: not learned from."""
        mine = present[self.rows]
        if mine.all():
            return self
        both = mine if self.present is None else mine & self.present
        some: Mask = np.any(both, axis=1)
        return Step(rows=self.rows, present=both, fused=some if self.fused is None else some & self.fused)

    def rows_of(self, modality: int) -> Rows:
        """Give the rows (b_j,) that are heard in a modality."""
        return self.rows if self.present is None else self.rows[self.present[:, modality]]

    def parts(self, weight: NDArray[np.float32], *, num_modalities: int) -> NDArray[np.float32]:
        """Give the part (1 + m, b) that each row has in the mean loss: the fused one first, then each modality's own.

        `weight` is that of all training samples (n,). Parts of the whole step sum to 1, or are 0 where nothing counts.
        """
        whole = weight[self.rows]
        if self.fused is None and self.present is None:
            parts = np.empty((1 + num_modalities, len(whole)), np.float32)
            parts[:] = whole / (whole.sum() or 1.0)
            return parts
        parts = np.repeat(whole[None], 1 + num_modalities, axis=0)
        if self.fused is not None:
            parts[0] *= self.fused
        if self.present is not None:
            parts[1:] *= self.present.T
        total = parts.sum(axis=1, keepdims=True, dtype=np.float64)
        return (parts / np.where(total > 0, total, 1.0)).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """This process's share of a step on the device: b rows, m modalities.

    rows (b,) among the training samples; label (b,); present (b, m) or None: all are. inputs: m tensors (b_j, ...) of
    the rows that are present, b_j <= b.
    part (1 + m, b): see Step.parts; over all processes each of its rows sums to 1. size: samples of the whole step.
    """

    rows: Tensor
    inputs: tuple[Tensor, ...]
    label: Tensor
    present: Tensor | None
    loss_weight: Tensor
    size: int

    def keep(self, present: Tensor) -> Batch:
        """Give the same rows, present in some modalities (b, m) alone of those that they are present in."""
        had = self.present
        stays = [present[:, j] if had is None else present[had[:, j], j] for j in range(len(self.inputs))]
        return replace(self, present=present, inputs=tuple(x[rows] for x, rows in zip(self.inputs, stays, strict=True)))

    def mean_fused(self, values: Tensor) -> Tensor:
        """Give this process's share of the step's mean of values (b,) over what the fused loss learns from."""
        return (values * self.loss_weight[0]).sum()

    def mean_own(self, values: Tensor) -> Tensor:
        """Give this process's shares (m,) of the step's means of values (m, b), each over what its modality hears."""
        return (values * self.loss_weight[1:]).sum(dim=1)


def split_order(order: Rows, *, batch_size: int, after: int = 0) -> list[Step]:
    """Cut an epoch's order into steps, but for the first `after`; the last may be smaller, and no row is left out."""
    starts = range(after * batch_size, len(order), batch_size)
    return [Step(rows=order[start : start + batch_size]) for start in starts]


def to_batch(
    step: Step,
    inputs: tuple[Tensor, ...],
    *,
    label: Tensor,
    weight: NDArray[np.float32],
    distributed: DistributedContext,
) -> Batch:
    """Bring this process's share of a step to the device of `label` (n,); `inputs` are there already."""
    device, mine = label.device, step.share(distributed)
    rows = torch.from_numpy(mine.rows).to(device, non_blocking=True)
    part = step.parts(weight, num_modalities=len(inputs))[:, distributed.slice(len(step.rows))]
    present = None if mine.present is None else torch.from_numpy(mine.present).to(device, non_blocking=True)
    return Batch(
        rows=rows,
        inputs=inputs,
        label=label.index_select(0, rows),
        present=present,
        loss_weight=torch.from_numpy(np.ascontiguousarray(part)).to(device, non_blocking=True),
        size=len(step.rows),
    )


Reading = Callable[[Outputs, Tensor], Tensor]
Loss = Callable[[Outputs, Batch], Tensor]


class ModelReader(Protocol):
    """Readings of the model, in eval mode and without augmentation, on training or validation samples.

    Every process reads a share, and all get the whole. net: the model in training.
    """

    net: FusionNet
    num_train: int

    def read(self, what: Reading, *, rows: Rows | None = None, net: FusionNet | None = None) -> Tensor:
        """Give what(outputs, label), whose last dimension is the samples', of training samples: all, or `rows`.

        It must depend on each sample alone. net: another than the one in training.
        """

    def read_validation(self, what: Reading, *, net: FusionNet | None = None) -> Tensor:
        """Give the same of all validation samples."""

    def train_copy(self, loss: Loss, *, epochs: int) -> FusionNet:
        """Give a copy of the model, trained on by another loss over uniform batches; the model stays as it is."""


def some_rows(model_reader: ModelReader, number: int) -> Rows:
    """Choose training rows to read, ascending: all, or `number`; the same at every reading and in all processes."""
    number = min(number, model_reader.num_train)
    return np.sort(np.random.default_rng(0).choice(model_reader.num_train, number, replace=False, shuffle=False))
