"""Predictions of a network; those of many classes and samples by columns, in a temporary file where they are large."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..audit.storage import rename_in_errors
from ..audit.workers import release_memory
from ..rebalance.curriculum import RowIndex
from .network import ModalitySet, Outputs, correct_by_set
from .training_data import NetworkReader

MAX_BYTES = 32 << 20  # ours: larger ones are in a file


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Class probabilities of n samples by one branch.

    predicted: the most probable class (n,). confidence: its probability (n,) float32. num_classes: k. column: function
    of a class that returns its probabilities (n,) float32.

    Example:
        >>> Predictions.of(np.float32([[0.2, 0.8]])).predicted
        array([1])
    """

    predicted: NDArray[np.integer]
    confidence: NDArray[np.float32]
    num_classes: int
    column: Callable[[int], NDArray[np.float32]]

    @classmethod
    def of(cls, probability: NDArray[np.float32]) -> Predictions:
        """Return the predictions of probabilities (n, k) in memory."""
        predicted = probability.argmax(axis=1)
        return cls(
            predicted=predicted,
            confidence=probability[np.arange(len(predicted)), predicted],
            num_classes=probability.shape[1],
            column=lambda index: probability[:, index],
        )

    def select(self, rows: NDArray[np.bool_]) -> Predictions:
        """Return the predictions of the samples in a mask (n,)."""
        if rows.all():
            return self
        return Predictions(
            predicted=self.predicted[rows],
            confidence=self.confidence[rows],
            num_classes=self.num_classes,
            column=lambda index: self.column(index)[rows],
        )


def predict(reader: NetworkReader, rows: RowIndex, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Compute predictions (n, k) of all modalities, "fused", and of each modality alone, see `FusionNet.predict`."""
    stacked = reader.read_samples(partial(_predict_branches, reader), rows).cpu().numpy()
    return {name: np.ascontiguousarray(branch.T) for name, branch in zip(("fused", *names), stacked, strict=True)}


@contextmanager
def class_predictions(
    reader: NetworkReader,
    rows: RowIndex,
    names: Sequence[str],
    *,
    sets: Sequence[ModalitySet] = (),
    folder: Path,
    max_bytes: int = MAX_BYTES,
) -> Iterator[tuple[dict[str, Predictions], dict[ModalitySet, NDArray[np.bool_]]]]:
    """Compute what `predict` does, of classes, and where the tested prediction is correct with only a set present.

    Yields the predictions by branch, and a mask (n,) by each of `sets` of modalities, for use in the context. Beyond
    `max_bytes` the probabilities are in a file of `folder`, which has no name, and takes 4 bytes a sample, class and
    branch. In one process only. Raises OSError with the name of the folder where its disk is full.
    """
    num_classes, branches = len(reader.net.config.classes), ("fused", *names)
    num_columns = len(branches) * num_classes
    predicted = np.empty((len(branches), len(rows)), dtype=np.min_scalar_type(-num_classes))
    confidence = np.empty((len(branches), len(rows)), dtype=np.float32)
    correct = np.empty((len(sets), len(rows)), dtype=bool)
    read_correct, start = correct_by_set(reader.net, sets), 0

    def read(outputs: Outputs, target: Tensor) -> Tensor:
        columns = _predict_branches(reader, outputs, target).flatten(0, 1)
        return torch.cat([columns, read_correct(outputs, target).float()]) if sets else columns

    with rename_in_errors(folder), tempfile.SpooledTemporaryFile(dir=str(folder)) as file:
        if 4 * len(rows) * num_columns > max_bytes:
            file.rollover()
        for batch in reader.iterate(read, rows):
            values = np.ascontiguousarray(batch.cpu().numpy())
            part = slice(start, start + values.shape[1])
            branch_values = values[:num_columns].reshape(len(branches), num_classes, -1)
            predicted[:, part] = branch_values.argmax(axis=1)
            confidence[:, part] = branch_values.max(axis=1)
            correct[:, part] = values[num_columns:]
            for number, column in enumerate(values[:num_columns]):
                file.seek(4 * (number * len(rows) + start))
                file.write(column.tobytes())
            start = part.stop
        release_memory()  # what reading and the network took
        predictions = {
            name: Predictions(
                predicted=predicted[index],
                confidence=confidence[index],
                num_classes=num_classes,
                column=partial(_read_column, file, len(rows), index * num_classes),
            )
            for index, name in enumerate(branches)
        }
        yield predictions, dict(zip(sets, correct, strict=True))


def _predict_branches(reader: NetworkReader, outputs: Outputs, target: Tensor) -> Tensor:
    logits = torch.cat([reader.net.tested_logits(outputs)[None], outputs.unimodal])
    return reader.net.predict(logits).movedim(1, 2)


def _read_column(file: IO[bytes], num_rows: int, first: int, index: int) -> NDArray[np.float32]:
    file.seek(4 * num_rows * (first + index))
    return np.frombuffer(file.read(4 * num_rows), dtype=np.float32)
