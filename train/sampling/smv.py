"""SMV: resampling of modalities by their Shapley values.

Letters: n samples, m modalities.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...audit.hashing import hash_rank
from ...audit.metrics import Floats, shapley
from ...rebalance.curriculum import OrderConfig, order_of
from ..batches import ModelReader, Rows, Step, split_order
from ..contribution import right_of_sets, sets_to_ask
from .sampler import Sampler

Copies = NDArray[np.int16]


class Smv(Sampler):
    """Sample-level resampling of SMV (Wei et al., CVPR 2024), by each modality's Shapley value for each sample.

    Before some epochs the model is read: phi_i^j is the Shapley value of modality j for sample i, where a set of
    modalities is worth their number if the fused answer is right when only they are there, else 0. A modality with
    phi < 1 adds less than its share; the sample is then seen some more times in that modality alone (see `num_copies`),
    shuffled among the others, and the fused loss learns from these copies too. Until the first reading an epoch is a
    shuffled pass. When the model is read, and how many copies there are between 1 and 3, are ours.
    """

    def begin(self) -> None:
        """Begin without copies."""
        self.copies: Copies = np.zeros((self.pool.num_modalities, len(self.pool)), dtype=np.int16)
        self._values: list[float] = []  # mean phi by modality, none as yet
        self._names = [str(j) for j in range(self.pool.num_modalities)]

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Read the model, if it is time."""
        self._names = list(model_reader.net.plan.modalities)
        smv = self.config.smv
        since = epoch - 1 - smv.warmup_epochs
        if since < 0 or since % smv.every_epochs:
            return
        sets = [chosen for chosen in sets_to_ask(self.pool.num_modalities) if chosen]
        right = dict(zip(sets, model_reader.read(right_of_sets(model_reader.net, sets)).cpu().numpy(), strict=True))
        phi = shapley(lambda chosen: len(chosen) * right[chosen], self.pool.num_modalities)
        self.copies = num_copies(phi, most=smv.most_copies).T.copy()
        self._values = phi.mean(axis=0).tolist()

    def steps(self, epoch: int, *, after: int = 0) -> Iterator[Step]:
        """Give a shuffled pass over all samples and their copies."""
        rows, alone, key = self._everything()
        rank, config = np.zeros(len(rows), dtype=np.int64), OrderConfig(order="shuffled")
        order = order_of(rank=rank, key=key, config=config, seed=self.seed, epoch=epoch)
        everyone = np.arange(self.pool.num_modalities)
        for step in split_order(order, batch_size=self.batch_size, after=after):
            only = alone[step.rows][:, None]
            present = (only < 0) | (only == everyone)
            yield Step(rows=rows[step.rows], present=None if present.all() else present)

    def _everything(self) -> tuple[Rows, NDArray[np.int8], NDArray[np.uint64]]:
        """Give samples and copies (n',): rows, the modality that is there alone or -1, and keys, each one's own."""
        every = np.arange(len(self.pool))
        rows, alone, key = [every], [np.full(len(every), -1, dtype=np.int8)], [self.pool.key]
        for j, copies in enumerate(self.copies):
            for number in range(int(copies.max())):
                some = np.flatnonzero(copies > number)
                word = hash_rank([f"{j} {number}"], seed=0, purpose="smv")
                rows.append(some)
                alone.append(np.full(len(some), j, dtype=np.int8))
                key.append(self.pool.key[some] ^ word)
        return np.concatenate(rows), np.concatenate(alone), np.concatenate(key)

    def numbers(self) -> dict[str, float]:
        """Give the mean Shapley value of each modality at the last reading, and its mean number of copies a sample."""
        copies = self.copies.mean(axis=1).tolist()
        values = {f"shapley_{name}": value for name, value in zip(self._names, self._values, strict=False)}
        return {**values, **{f"copies_{name}": mean for name, mean in zip(self._names, copies, strict=True)}}

    def state_dict(self) -> dict[str, Any]:
        """Give what the last reading found."""
        return {"copies": torch.from_numpy(self.copies), "values": list(self._values), "names": list(self._names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.copies = state["copies"].cpu().numpy()
        self._values, self._names = list(state["values"]), list(state["names"])


def num_copies(value: Floats, *, most: int) -> Copies:
    """Give the extra copies of each modality of each sample, (n, m) in [0, most], from Shapley values (n, m).

    None from 1 on, then evenly more, rounded up, to `most` at the least value that there can be, -(m - 1) / 2: of two
    modalities 1 copy at 1/2, 2 at 0, 3 at -1/2. The lower the value the more often is SMV's; the steps are ours.
    """
    lacks = (1 - value.astype(np.float64)) / (1 + (value.shape[1] - 1) / 2)
    copies: Copies = np.clip(np.ceil(most * lacks - 1e-6), 0, most).astype(np.int16)
    return copies
