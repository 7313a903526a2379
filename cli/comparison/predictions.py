"""Predictions of the trainings of a comparison, as files of cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...audit.errors import RunError
from ...audit.storage import read_table, write_parquet
from ...train.difference import Condition
from ...train.evaluate import evaluate
from ...train.examples import Examples
from ...train.finetune import Finetuned


def write_predictions(result: Finetuned, examples: Examples, folder: Path) -> dict[str, Any]:
    """Write the predictions of the test samples, and return what cell.json states of the training."""
    test = examples.rows("test")
    label, predicted = examples.label[test], result.predictions.argmax(axis=1)
    table = pa.table(
        {
            "sample_id": pa.array(examples.ids(test), pa.string()),
            "label": label,
            "predicted": predicted,
            "correct": predicted == label,
            **_correct_without(result, predicted == label, examples.modalities),
            **_branches(result, label),
            "probabilities": pa.FixedSizeListArray.from_arrays(
                pa.array(result.predictions.ravel(), pa.float32()), result.predictions.shape[1]
            ),
        }
    )
    write_parquet(table, folder / "predictions.parquet", provenance={})
    tested = evaluate({"fused": result.predictions}, label, {"all": np.ones(len(test), dtype=bool)})["all"]
    measures = ("accuracy", "macro_f1", "map", "ece")
    metrics = {"n": tested["n"], **{key: tested["branches"]["fused"][key] for key in measures}}
    return {"test": metrics, "samples_seen": result.metrics["samples_seen"], "epochs": len(result.history)}


def _correct_without(
    result: Finetuned, correct: NDArray[np.bool_], modalities: Sequence[str]
) -> dict[str, NDArray[np.bool_]]:
    """Return the columns of correctness with a modality absent; one that the network does not read changes nothing."""
    return {
        f"correct_without_{name}": result.without[name] > 0.5 if name in result.without else correct
        for name in modalities
    }


def _branches(result: Finetuned, label: NDArray[np.integer[Any]]) -> dict[str, NDArray[np.float32]]:
    """Return the columns of the probability of the true class by each modality alone."""
    rows = np.arange(len(label))
    return {f"branch_{name}": probability[rows, label] for name, probability in result.branches.items()}


def read_predictions(folder: Path, test_ids: NDArray[np.object_], *, columns: Sequence[str]) -> pa.Table:
    """Read columns of the predictions of a cell; RunError where the samples are others or a column is missing."""
    table = read_table(folder / "predictions.parquet", error=RunError)
    if {"sample_id", *columns} - set(table.column_names) or table["sample_id"].to_pylist() != test_ids.tolist():
        raise RunError(f"{folder} is damaged, its test samples or columns are others: remove it")
    return table.select(list(columns))


@dataclass(frozen=True, slots=True)
class CellProbabilities(Mapping[Condition, NDArray[np.float32]]):
    """Probabilities (S, n, k) of the finished cells of each condition, read from their files when they are used."""

    folders: Mapping[Condition, Sequence[Path]]
    test_ids: NDArray[np.object_]

    def __getitem__(self, condition: Condition) -> NDArray[np.float32]:
        """Read the cells of a condition."""
        columns = [
            read_predictions(folder, self.test_ids, columns=["probabilities"])["probabilities"].combine_chunks()
            for folder in self.folders[condition]
        ]
        return np.stack([column.flatten().to_numpy().reshape(len(column), -1) for column in columns])

    def __iter__(self) -> Iterator[Condition]:
        """Iterate over the conditions."""
        return iter(self.folders)

    def __len__(self) -> int:
        """Return the number of conditions."""
        return len(self.folders)
