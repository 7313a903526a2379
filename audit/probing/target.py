"""The target: what shall a probe name, one class, several labels, or a number?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TASKS = ("classification", "multilabel", "regression")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What n samples are to be recognised as.

    classification: label (n,) in [0, k), values None. multilabel: values (n, k) of 0 and 1, one column a label.
    regression: values (n, 1). Of the latter two, label (n,) is the stratum a sample is dealt into folds by.
    """

    task: str
    label: NDArray[np.int32]
    num_outputs: int
    values: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: NDArray[np.intp]) -> Target:
        """Give the targets of some rows."""
        values = None if self.values is None else self.values[rows]
        return Target(task=self.task, label=self.label[rows], num_outputs=self.num_outputs, values=values)
