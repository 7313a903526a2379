"""The aim: what a model is fitted to, in units of its own"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..encoding.matrix import Rows
from .target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """The target of some rows as the models see it: label (n,) or values (n, k), these in units of their own."""

    found: Tensor
    task: str
    num_outputs: int
    centre: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, target: Target, rows: Rows, like: Tensor) -> Aim:
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
