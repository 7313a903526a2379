"""Targets of probes, for all of their outputs or some.

A strength carries over from some classes to all, since it is a prior of each class's weights. It does not from too few
rows of each class: of 5,000 classes of 6 samples, 8,000 rows hold 1.6 of each, most of the rows that a probe is tried
on are of classes that it has not seen, and it chooses a strength under which it hardly differs from chance (a loss of
8.4 out of fold where ln 5,000 is 8.5; with a strength chosen on all rows of 836 classes the loss is 3.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..dataset.labels import Target
from ..features.matrix import Rows
from .cross_fit import first_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchTarget:
    """The target of some rows as the models see it: label (n,) or values (n, k), these in units of their own."""

    found: Tensor
    task: str
    num_outputs: int
    centre: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, target: Target, rows: Rows, like: Tensor) -> TorchTarget:
        """Take the target of rows. A number is standardised; a fit of other units is the same but for them."""
        if target.values is None:
            found = torch.from_numpy(target.label[rows].astype(np.int64)).to(like.device)
            return cls(found=found, task=target.task, num_outputs=target.num_outputs)
        found = torch.from_numpy(np.array(target.values[rows])).to(like)
        if target.task != "regression":
            return cls(found=found, task=target.task, num_outputs=target.num_outputs)
        centre, scale = float(found.mean()), float(found.std(correction=0)) or 1.0
        found = (found - centre) / scale
        return cls(found=found, task=target.task, num_outputs=target.num_outputs, centre=centre, scale=scale)


MAX_LOGITS = 1 << 22  # rows times outputs: up to 524 outputs of 8,000 rows nothing is left out


def choose_outputs(
    label: NDArray[Any], key: NDArray[np.uint64], *, task: str, num_outputs: int, max_rows: int
) -> tuple[Rows, NDArray[np.intp]]:
    """Return rows (c,) of n and outputs, both rising, of which there are about MAX_LOGITS pairs at most.

    Where `max_rows` rows of all outputs are no more, these are the first rows by key (n,), and all outputs. Otherwise
    outputs are taken evenly: of labels each row is about all of them, of classes, label (n,), the rows of others are
    left out, and more rows of each are taken instead. No label decides which classes or how many.
    """
    n, few = len(label), MAX_LOGITS // max(1, min(len(label), max_rows))
    if task == "classification":  # as many as have so few rows
        few = max(few, isqrt(MAX_LOGITS * num_outputs // max(1, n)))
    few = min(num_outputs, max(2, few))
    outputs = np.round(np.linspace(0, num_outputs - 1, few)).astype(np.intp)
    if task != "classification" or few == num_outputs:
        return first_rows(np.arange(n), key, most=max_rows), outputs
    rows = first_rows(np.arange(n), key, most=max_rows * num_outputs // few)
    return rows[np.isin(label[rows], outputs)], outputs


def take_outputs(target: Target, outputs: NDArray[np.intp]) -> Target:
    """Return the target with these outputs alone, rising; classes must be among them."""
    if len(outputs) == target.num_outputs:
        return target
    values = None if target.values is None else target.values[:, outputs]
    label = np.searchsorted(outputs, target.label).astype(np.int32) if values is None else target.label
    return Target(task=target.task, label=label, num_outputs=len(outputs), values=values)
