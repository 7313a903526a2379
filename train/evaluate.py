"""Evaluation: how good is each branch, overall and on the samples that one modality carries?"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, f1_score

from ..audit.intervals import wilson

Scores = NDArray[np.float32]
DOMINATED = (0.2, 0.4)  # thresholds of Xia et al., arXiv 2302.10912, besides 0


def subsets(discrepancy: NDArray[np.floating[Any]], *, first: str, second: str) -> dict[str, NDArray[np.bool_]]:
    """Give the rows of each subset of the study in arXiv 2302.10912, from signed discrepancies (n,).

    `first` is the side where D > 0. `balanced` is |D| <= 0.2, mmaudit's own.
    """
    found = {"all": np.ones(len(discrepancy), dtype=bool)}
    for name, signed in ((first, discrepancy), (second, -discrepancy)):
        found[f"{name}-preferred"] = signed > 0
        found |= {f"{name}-dominated-{threshold:g}": signed > threshold for threshold in DOMINATED}
    found["balanced-within-0.2"] = np.abs(discrepancy) <= DOMINATED[0]
    return found


def evaluate(
    probabilities: Mapping[str, Scores], label: NDArray[np.integer[Any]], members: Mapping[str, NDArray[np.bool_]]
) -> dict[str, Any]:
    """Measure each branch's class probabilities (n, k) against label (n,) on each subset: {subset: {n, branches}}.

    A subset without samples has n = 0 and no measurements.
    """
    report: dict[str, Any] = {}
    for name, rows in members.items():
        report[name] = {"n": int(rows.sum())}
        if rows.any():
            report[name]["branches"] = {
                branch: measure(scores[rows], label[rows]) for branch, scores in probabilities.items()
            }
    return report


def measure(probability: Scores, label: NDArray[np.integer[Any]]) -> dict[str, float]:
    """ACC with its 95% Wilson interval, MAP (mean over classes of average precision) and macro-F1, all in [0, 1].

    MAP and macro-F1 are over the classes that occur in `label`.
    """
    predicted = probability.argmax(axis=1)
    classes = np.unique(label)
    precisions = [average_precision_score(label == index, probability[:, index]) for index in classes]
    low, high = wilson(int((predicted == label).sum()), len(label))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class that is never predicted has F1 = 0, and that is meant
        f1 = f1_score(label, predicted, labels=classes, average="macro", zero_division=0)
    return {
        "accuracy": float((predicted == label).mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "map": float(np.mean(precisions)),
        "macro_f1": float(f1),
    }
