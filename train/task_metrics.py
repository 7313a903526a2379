"""Test metrics of label sets and of numbers, and the metric that each task is selected and compared by.

Letters: n samples, k labels. Those of classes are in `evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from ..audit.metrics import mean_interval, wilson_interval

Values = NDArray[np.float32]
Metrics = dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskMetrics:
    """Metrics of one task.

    Attributes:
        main: Key of the metric by which epochs are selected, and subsets are printed and drawn.
        name: Its name in text.
        sign: 1 where high values of it are better, -1 where low ones are.
        keys: Keys of the printed metrics, the main one first.
        chance: What is guessed at each level of chance, by its key.
        sample_value: Key of the mean of values of samples whose Shapley values are the contributions.
    """

    main: str
    name: str
    sign: int
    keys: tuple[str, ...]
    chance: dict[str, str]
    sample_value: str


TASK_METRICS = {
    "classification": TaskMetrics(
        main="accuracy", name="accuracy", sign=1, keys=("accuracy", "map", "macro_f1", "ece"), sample_value="accuracy",
        chance={
            "uniform": "guessing every class equally often",
            "majority": "always guessing the most common class of the training samples",
        },
    ),
    "multilabel": TaskMetrics(
        main="map", name="MAP", sign=1, keys=("map", "micro_f1", "macro_f1", "label_accuracy"),
        sample_value="label_accuracy",
        chance={"constant": "the same probabilities for all samples"},
    ),
    "regression": TaskMetrics(
        main="mae", name="MAE", sign=-1, keys=("mae", "pearson", "sign_accuracy"), sample_value="mae",
        chance={
            "median": "always the median of the training samples", "mean": "always the mean of the training samples",
        },
    ),
}  # fmt: skip


def metrics_of(results: Mapping[str, Any]) -> TaskMetrics:
    """Return the metrics of the task of a fine-tuning's or an evaluation's results."""
    return TASK_METRICS[results.get("task", "classification")]


def compute_multilabel_metrics(probability: Values, target: Values) -> Metrics:
    """Compute the metrics of label probabilities (n, k) against a target (n, k) of 0 and 1, all in [0, 1].

    A label is predicted where its probability is above 1/2. map: mean average precision over the labels that occur in
    the target; micro_f1: F1 of all decisions together; macro_f1: mean F1 of the labels that occur; label_accuracy:
    share of decisions that are right, with a 95% interval over samples. map and both F1 are None where no label occurs.
    """
    truth, predicted = target > 0.5, probability > 0.5
    right = (predicted == truth).mean(axis=1, dtype=np.float64)
    interval = mean_interval(right, None, low=0.0, high=1.0)
    if np.ptp(right) == 0:  # the interval would have no width
        interval["low"], interval["high"] = wilson_interval(float(right.sum()), len(right))
    labels = [metrics for metrics in compute_label_metrics(probability, target) if metrics is not None]
    total = int(truth.sum() + predicted.sum())
    return {
        "map": float(np.mean([metrics["average_precision"] for metrics in labels])) if labels else None,
        "micro_f1": 2 * int((truth & predicted).sum()) / total if labels else None,
        "macro_f1": float(np.mean([metrics["f1"] for metrics in labels])) if labels else None,
        "label_accuracy": interval["mean"],
        "label_accuracy_low": interval["low"],
        "label_accuracy_high": interval["high"],
    }


def compute_label_metrics(probability: Values, target: Values) -> list[dict[str, float] | None]:
    """Compute recall with its 95% Wilson interval, precision, F1 and average precision of each label.

    None of a label without a positive. Precision is 0 where the label is never predicted.
    """
    metrics: list[dict[str, float] | None] = []
    for scores, truth in zip(probability.T, target.T > 0.5, strict=True):
        num_true, num_predicted = int(truth.sum()), int((scores > 0.5).sum())
        num_right = int((truth & (scores > 0.5)).sum())
        if not num_true:
            metrics.append(None)
            continue
        low, high = wilson_interval(num_right, num_true)
        metrics.append(
            {
                "recall": num_right / num_true,
                "recall_low": low,
                "recall_high": high,
                "precision": num_right / num_predicted if num_predicted else 0.0,
                "f1": 2 * num_right / (num_true + num_predicted),
                "average_precision": average_precision(scores, truth),
            }
        )
    return metrics


def average_precision(scores: Values, positive: NDArray[np.bool_]) -> float:
    """Compute the average precision in [0, 1] of scores (n,), at least one of which is positive.

    Equal to scikit-learn's, as the mean over positives of the precision at each one's score, in a tenth of the time:
    with 5,000 classes, three branches and ten subsets it is computed 165,000 times.
    """
    positive_scores = np.sort(scores[positive])
    num_above = len(scores) - np.searchsorted(np.sort(scores), positive_scores, side="left")
    num_positive_above = len(positive_scores) - np.searchsorted(positive_scores, positive_scores, side="left")
    return float((num_positive_above / num_above).mean())


def mean_average_precision(probability: Values, target: Values) -> float:
    """Compute the mean average precision in [0, 1] over the labels that occur in a target (n, k); 0 where none does."""
    truth = target > 0.5
    occurring = np.flatnonzero(truth.any(axis=0))
    if not len(occurring):
        return 0.0
    return float(np.mean([average_precision(probability[:, j], truth[:, j]) for j in occurring]))


def compute_regression_metrics(prediction: Values, target: Values, *, signed: bool) -> Metrics:
    """Compute the metrics of predictions (n, 1) against a target (n, 1), as results on MOSI and MOSEI are reported.

    mae: mean absolute error in the units of the data, with a 95% interval over samples; low is best. pearson: Pearson
    correlation in [-1, 1] with its 95% interval by Fisher's z; None where prediction or target is constant, or n < 4.
    sign_accuracy: share of samples with a target other than 0 whose prediction is on the same side of 0, with its 95%
    Wilson interval; None where `signed` is False, as for a target of one sign, or no sample counts.
    """
    predicted, truth = prediction[:, 0].astype(np.float64), target[:, 0].astype(np.float64)
    error = mean_interval(np.abs(predicted - truth), None, low=0.0, high=np.inf)
    low, high = (error["low"], error["high"]) if len(truth) > 1 else (None, None)
    metrics: Metrics = {"mae": error["mean"], "mae_low": low, "mae_high": high, **_pearson(predicted, truth)}
    counted = truth != 0
    n = int(counted.sum()) if signed else 0
    if not n:
        return metrics | dict.fromkeys(("sign_accuracy", "sign_accuracy_low", "sign_accuracy_high"))
    num_right = int(((predicted > 0) == (truth > 0))[counted].sum())
    interval = wilson_interval(num_right, n)
    return metrics | {
        "sign_accuracy": num_right / n,
        "sign_accuracy_low": interval[0],
        "sign_accuracy_high": interval[1],
    }


def _pearson(first: NDArray[np.float64], second: NDArray[np.float64]) -> Metrics:
    """Compute r and its interval tanh(artanh r -+ 1.96 / sqrt(n - 3))."""
    n = len(first)
    if n < 4 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return dict.fromkeys(("pearson", "pearson_low", "pearson_high"))
    r = float(np.clip(np.corrcoef(first, second)[0, 1], -1.0, 1.0))
    centre, half_width = np.arctanh(np.clip(r, -1 + 1e-15, 1 - 1e-15)), ndtri(0.975) / np.sqrt(n - 3)
    low, high = float(np.tanh(centre - half_width)), float(np.tanh(centre + half_width))
    return {"pearson": r, "pearson_low": low, "pearson_high": high}


def chance_levels(task: str, *, train: NDArray[Any], test: NDArray[Any], num_classes: int) -> dict[str, float]:
    """Compute the main metric of guesses on the test samples, from the targets (n, ...) of training and test samples.

    classification: {uniform, majority}, a uniform guess, and the most common class of train. multilabel: {constant},
    equal probabilities for all samples: the mean share of positives over the labels that occur. regression: {median,
    mean}, those of the training targets.
    """
    if task == "classification":
        majority = np.bincount(train).argmax()
        return {"uniform": 1 / num_classes, "majority": float((test == majority).mean())}
    if task == "multilabel":
        shares = (test > 0.5).mean(axis=0)
        return {"constant": float(shares[shares > 0].mean()) if (shares > 0).any() else 0.0}
    guesses = {"median": np.median(train, axis=0), "mean": train.mean(axis=0, dtype=np.float64)}
    return {name: float(np.abs(test.astype(np.float64) - guess).mean()) for name, guess in guesses.items()}


def is_signed(target: Values) -> bool:
    """Return whether numbers (n, 1) lie on both sides of 0."""
    return bool((target > 0).any() and (target < 0).any())


def by_label(predictions: Mapping[str, Values], target: Values, names: Sequence[str]) -> dict[str, Any]:
    """Compute each branch's metrics of each label: {label: {n, branches}}; n counts its positives, 0 has no metrics."""
    metrics = {branch: compute_label_metrics(scores, target) for branch, scores in predictions.items()}
    counts = (target > 0.5).sum(axis=0).tolist()
    return {
        name: {"n": counts[index]}
        | ({"branches": {branch: rows[index] for branch, rows in metrics.items()}} if counts[index] else {})
        for index, name in enumerate(names)
    }
