"""SMV: resampling of modalities by their Shapley values.

Letters: n samples, m modalities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ...audit.hashing import hash_rank
from ...audit.metrics import Floats, shapley
from ...audit.parsing import check_ranges
from ...rebalance.curriculum import OrderConfig, RowIndex, epoch_order
from ..batches import ModelReader, Step, split_order, start_warning
from ..config import TrainConfig
from ..network import correct_by_set, shapley_sets
from .sampler import Sampler

Copies = NDArray[np.int16]


@dataclass(frozen=True, slots=True, kw_only=True)
class SmvConfig:
    """Resampling of SMV (CVPR 2024). The authors' code has every_epochs = 1, with Adam.

    Args:
        every_epochs: Epochs between two evaluations of the model. 5 is ours, so that they take a fifth of the time.
        warmup_epochs: Epochs before the first evaluation, as in the authors' code.
        max_copies: Most extra copies of a sample in a modality, as in the authors' code.
    """

    section: ClassVar[str] = "sampling.smv"
    every_epochs: int = 5
    warmup_epochs: int = 5
    max_copies: int = 3

    def __post_init__(self) -> None:
        check_ranges(self.section, self, every_epochs="[1, inf)", warmup_epochs="[0, inf)", max_copies="[1, inf)")


class Smv(Sampler):
    """Sample-level resampling of SMV (Wei et al., CVPR 2024), by each modality's Shapley value for each sample.

    Before some epochs the model is evaluated: phi_i^j is the Shapley value of modality j for sample i, where the value
    of a set of modalities is its size if the fused prediction is correct with only the set present, else 0. A modality
    with phi < 1 contributes less than its share; the sample is then repeated in that modality alone (see `num_copies`),
    shuffled among the others, and the fused loss trains on these copies too. Until the first evaluation an epoch is a
    shuffled pass. Values and copies are those of the authors' code for two modalities; more modalities are ours.
    """

    class_reason = "its values count samples whose class is predicted correctly"
    config_type = SmvConfig
    paper = "Wei et al., CVPR 2024"
    min_modalities = 2
    state_fields = ("_values", "_names", "copies")
    config: SmvConfig

    @classmethod
    def late_start(cls, config: SmvConfig, settings: TrainConfig) -> str | None:
        """Return a warning where the warm-up lasts to the last epoch."""
        return start_warning("sampling.smv.warmup_epochs", config.warmup_epochs + 1, settings, fallback="uniform")

    def initialize(self) -> None:
        """Start without copies."""
        self.copies: Copies = np.zeros((self.pool.num_modalities, len(self.pool)), dtype=np.int16)
        self._values: list[float] = []  # mean phi by modality, empty before the first evaluation
        self._names = [str(j) for j in range(self.pool.num_modalities)]

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Evaluate the model every `every_epochs` epochs after the warm-up."""
        self._names = list(model_reader.net.config.modalities)
        smv = self.config
        since = epoch - 1 - smv.warmup_epochs
        if since < 0 or since % smv.every_epochs:
            return
        sets = [modality_set for modality_set in shapley_sets(self.pool.num_modalities) if modality_set]
        correct = dict(zip(sets, model_reader.read(correct_by_set(model_reader.net, sets)).cpu().numpy(), strict=True))
        phi = shapley(lambda modality_set: len(modality_set) * correct[modality_set], self.pool.num_modalities)
        self.copies = num_copies(phi, max_copies=smv.max_copies).T.copy()
        self._values = phi.mean(axis=0).tolist()

    def steps(self, epoch: int, *, after: int = 0) -> Iterator[Step]:
        """Yield a shuffled pass over all samples and their copies."""
        rows, alone, key = self._samples_and_copies()
        rank, config = np.zeros(len(rows), dtype=np.int64), OrderConfig(order="shuffled")
        order = epoch_order(rank=rank, key=key, config=config, seed=self.seed, epoch=epoch)
        modalities = np.arange(self.pool.num_modalities)
        for step in split_order(order, batch_size=self.batch_size, after=after):
            single_modality = alone[step.rows][:, None]
            modality_mask = (single_modality < 0) | (single_modality == modalities)
            yield Step(rows=rows[step.rows], present=None if modality_mask.all() else modality_mask)

    def _samples_and_copies(self) -> tuple[RowIndex, NDArray[np.int8], NDArray[np.uint64]]:
        """Return rows of samples and copies (n',), the only modality of a copy or -1, and a unique key of each."""
        all_rows = np.arange(len(self.pool))
        rows, alone, key = [all_rows], [np.full(len(all_rows), -1, dtype=np.int8)], [self.pool.key]
        for j, copies in enumerate(self.copies):
            for copy_number in range(int(copies.max())):
                copied_rows = np.flatnonzero(copies > copy_number)
                salt = hash_rank([f"{j} {copy_number}"], seed=0, purpose="smv")
                rows.append(copied_rows)
                alone.append(np.full(len(copied_rows), j, dtype=np.int8))
                key.append(self.pool.key[copied_rows] ^ salt)
        return np.concatenate(rows), np.concatenate(alone), np.concatenate(key)

    def epoch_metrics(self) -> dict[str, float]:
        """Return each modality's mean Shapley value at the last evaluation and mean copies per sample."""
        copies = self.copies.mean(axis=1).tolist()
        values = {f"shapley_{name}": value for name, value in zip(self._names, self._values, strict=False)}
        return {**values, **{f"copies_{name}": mean for name, mean in zip(self._names, copies, strict=True)}}


def num_copies(value: Floats, *, max_copies: int) -> Copies:
    """Compute the extra copies of each modality of each sample, (n, m) in [0, max_copies], from Shapley values (n, m).

    None from 1 on, then evenly more, rounded up, to `max_copies` at the smallest possible value, -(m - 1) / 2: of two
    modalities 1 copy at 1/2, 2 at 0, 3 at -1/2, as in the authors' code; the steps of more modalities are ours.
    """
    deficit = (1 - value.astype(np.float64)) / (1 + (value.shape[1] - 1) / 2)
    copies: Copies = np.clip(np.ceil(max_copies * deficit - 1e-6), 0, max_copies).astype(np.int16)
    return copies
