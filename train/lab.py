"""The laboratory: what may a method find out about the model between two epochs?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .batches import Batch
from .network import FusionNet, Outputs

Rows = NDArray[np.int64]
Reading = Callable[[Outputs, Tensor], Tensor]
Loss = Callable[[Outputs, Batch], Tensor]


class Lab(Protocol):
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


def some_rows(lab: Lab, number: int) -> Rows:
    """Choose training rows to read, ascending: all, or `number`; the same at every reading and in all processes."""
    number = min(number, lab.num_train)
    return np.sort(np.random.default_rng(0).choice(lab.num_train, number, replace=False, shuffle=False))
