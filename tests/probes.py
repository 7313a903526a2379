"""Probes with stored outputs, for tests of what is computed from the outputs of probes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmaudit.audit.features.matrix import Inputs, RowIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredProbe:
    """Outputs by_repeat (r, n, k) and by_epoch (e, n, k), which are those by repeat if there are none."""

    by_repeat: NDArray[np.float32]
    by_epoch: NDArray[np.float32] | None = None

    def logits(self, rows: RowIndex, *, inputs: Inputs | None = None) -> NDArray[np.float32]:
        return self.by_repeat[:, rows]

    def logits_by_epoch(self, rows: RowIndex) -> NDArray[np.float32]:
        return (self.by_repeat if self.by_epoch is None else self.by_epoch)[:, rows]

    def take(self, samples: RowIndex, inputs: Inputs) -> StoredProbe:
        epochs = None if self.by_epoch is None else self.by_epoch[:, samples]
        return StoredProbe(by_repeat=self.by_repeat[:, samples], by_epoch=epochs)
