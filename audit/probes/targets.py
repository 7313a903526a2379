"""Targets of probes as tensors, with all or a subset of their outputs.

An l2 chosen on a subset of the classes holds for all of them, since it is a prior of each class's weights. An l2 chosen
on too few rows per class does not: with 5,000 classes of 6 samples, 8,000 rows hold 1.6 rows per class, most held-out
rows are of classes without training rows, and the l2 chosen gives a loss close to chance (8.4 out of fold where
ln 5,000 is 8.5; with an l2 chosen on all rows of 836 classes the loss is 3.0).
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
from ..features.matrix import RowIndex
from .cross_fit import first_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchTarget:
    """The target of some rows as a tensor: label (n,) or values (n, k); those of a regression are standardised."""

    values: Tensor
    task: str
    num_outputs: int
    centre: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, target: Target, rows: RowIndex, like: Tensor) -> TorchTarget:
        """Build the target of rows, standardised for a regression, so that a fit does not depend on its units."""
        if target.values is None:
            values = torch.from_numpy(target.label[rows].astype(np.int64)).to(like.device)
            return cls(values=values, task=target.task, num_outputs=target.num_outputs)
        values = torch.from_numpy(np.array(target.values[rows])).to(like)
        if target.task != "regression":
            return cls(values=values, task=target.task, num_outputs=target.num_outputs)
        centre, scale = float(values.mean()), float(values.std(correction=0)) or 1.0
        values = (values - centre) / scale
        return cls(values=values, task=target.task, num_outputs=target.num_outputs, centre=centre, scale=scale)


MAX_LOGITS = 1 << 22  # rows times outputs: 8,000 rows of up to 524 outputs are used in full


def choose_outputs(
    label: NDArray[Any], key: NDArray[np.uint64], *, task: str, num_outputs: int, max_rows: int
) -> tuple[RowIndex, NDArray[np.intp]]:
    """Choose rows (c,) of n and outputs, both ascending, of at most about MAX_LOGITS pairs.

    Where `max_rows` rows of all outputs stay within that, these are the first rows by key (n,), and all outputs.
    Otherwise evenly spaced outputs are chosen. Of a multilabel target every row counts for them; of classes, label
    (n,), rows of other classes are dropped and more rows per class are used. The labels do not influence which classes
    are chosen or how many.
    """
    n, num_chosen = len(label), MAX_LOGITS // max(1, min(len(label), max_rows))
    if task == "classification":  # more classes where there are few rows per class
        num_chosen = max(num_chosen, isqrt(MAX_LOGITS * num_outputs // max(1, n)))
    num_chosen = min(num_outputs, max(2, num_chosen))
    outputs = np.round(np.linspace(0, num_outputs - 1, num_chosen)).astype(np.intp)
    if task != "classification" or num_chosen == num_outputs:
        return first_rows(np.arange(n), key, max_rows=max_rows), outputs
    rows = first_rows(np.arange(n), key, max_rows=max_rows * num_outputs // num_chosen)
    return rows[np.isin(label[rows], outputs)], outputs


def take_outputs(target: Target, outputs: NDArray[np.intp]) -> Target:
    """Return the target with a subset of the outputs, ascending; all its classes must be in the subset."""
    if len(outputs) == target.num_outputs:
        return target
    values = None if target.values is None else target.values[:, outputs]
    label = np.searchsorted(outputs, target.label).astype(np.int32) if values is None else target.label
    return Target(task=target.task, label=label, num_outputs=len(outputs), values=values)
