"""Metrics of label sets and numbers, by hand and against scikit-learn and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import average_precision_score, f1_score

from mmaudit.train.task_metrics import (
    by_label,
    chance_levels,
    compute_label_metrics,
    compute_multilabel_metrics,
    compute_regression_metrics,
    is_signed,
    mean_average_precision,
)

TARGET = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], dtype=np.float32)
PROBABILITY = np.array([[0.9, 0.2, 0.1], [0.3, 0.8, 0.6], [0.6, 0.4, 0.2], [0.2, 0.1, 0.1]], dtype=np.float32)


def test_metrics_of_label_sets_by_hand() -> None:
    metrics = compute_multilabel_metrics(PROBABILITY, TARGET)
    # Label 0: ranks of the positives 1 and 3, precisions 1 and 2/3. Label 1: 1 and 1. Label 2 does not occur.
    assert metrics["map"] == pytest.approx((5 / 6 + 1) / 2)
    # Predicted: label 0 of rows 0 and 2, 1 of row 1, 2 of row 1; 2 of 4 are right, of 4 true ones.
    assert metrics["micro_f1"] == pytest.approx(2 * 2 / (4 + 4))
    assert metrics["macro_f1"] == pytest.approx((2 * 1 / (2 + 2) + 2 * 1 / (2 + 1)) / 2)
    assert metrics["label_accuracy"] == pytest.approx((3 + 1 + 1 + 3) / 12)


def test_metrics_of_label_sets_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    target = (rng.random((200, 5)) < [0.1, 0.3, 0.5, 0.7, 0.9]).astype(np.float32)
    probability = np.clip(0.5 * target + 0.7 * rng.random((200, 5)), 0, 1).astype(np.float32)
    metrics, predicted = compute_multilabel_metrics(probability, target), probability > 0.5
    assert metrics["map"] == pytest.approx(average_precision_score(target, probability, average="macro"))
    assert metrics["map"] == pytest.approx(mean_average_precision(probability, target))
    assert metrics["micro_f1"] == pytest.approx(f1_score(target, predicted, average="micro"))
    assert metrics["macro_f1"] == pytest.approx(f1_score(target, predicted, average="macro"))
    assert metrics["label_accuracy"] == pytest.approx(float((predicted == target).mean()))
    right = (predicted == target).mean(axis=1)
    half_width = 1.972 * right.std(ddof=1) / np.sqrt(200)  # Student's t, 199 degrees of freedom
    assert metrics["label_accuracy_high"] == pytest.approx(right.mean() + half_width, abs=1e-4)


def test_label_without_positives_has_no_metrics() -> None:
    assert [metrics is None for metrics in compute_label_metrics(PROBABILITY, TARGET)] == [False, False, True]
    rows = by_label({"fused": PROBABILITY}, TARGET, ("x", "y", "z"))
    assert rows["z"] == {"n": 0}
    assert rows["x"]["n"] == 2
    assert rows["x"]["branches"]["fused"]["recall"] == 0.5
    assert rows["y"]["branches"]["fused"]["precision"] == 1.0
    empty = compute_multilabel_metrics(PROBABILITY[3:], TARGET[3:])
    assert (empty["map"], empty["micro_f1"], empty["macro_f1"], empty["label_accuracy"]) == (None, None, None, 1.0)


def test_metrics_of_numbers_by_hand() -> None:
    target = np.array([[-2.0], [-1.0], [0.0], [1.0], [3.0]], dtype=np.float32)
    prediction = np.array([[-1.0], [0.5], [1.0], [2.0], [3.0]], dtype=np.float32)
    metrics = compute_regression_metrics(prediction, target, signed=True)
    assert metrics["mae"] == pytest.approx((1 + 1.5 + 1 + 1 + 0) / 5)
    r = pearsonr(prediction[:, 0].astype(float), target[:, 0].astype(float))
    assert metrics["pearson"] == pytest.approx(r.statistic)
    interval = r.confidence_interval(0.95)
    assert (metrics["pearson_low"], metrics["pearson_high"]) == pytest.approx((interval.low, interval.high))
    assert metrics["sign_accuracy"] == 3 / 4  # the target of 0 does not count, and 0.5 is on the wrong side of -1
    unsigned = compute_regression_metrics(prediction, target, signed=False)
    assert unsigned["sign_accuracy"] is None


def test_interval_of_samples_that_are_all_right_has_a_width() -> None:
    metrics = compute_multilabel_metrics(TARGET, TARGET)
    assert metrics["label_accuracy"] == metrics["label_accuracy_high"] == 1.0
    assert metrics["label_accuracy_low"] == pytest.approx(1 / (1 + 1.959964**2 / 4))


def test_interval_of_the_error_is_students_t() -> None:
    rng = np.random.default_rng(1)
    target, error = rng.standard_normal((300, 1)), rng.standard_normal((300, 1))
    metrics = compute_regression_metrics((target + error).astype(np.float32), target.astype(np.float32), signed=True)
    size = np.abs(error)
    assert metrics["mae_high"] == pytest.approx(size.mean() + 1.968 * size.std(ddof=1) / np.sqrt(300), abs=1e-3)


@pytest.mark.parametrize("n", [1, 3, 10])
def test_correlation_of_few_or_constant_values_is_undefined(n: int) -> None:
    target = np.arange(n, dtype=np.float32)[:, None]
    metrics = compute_regression_metrics(np.ones_like(target), target, signed=True)
    assert metrics["pearson"] is None
    assert metrics["mae"] == pytest.approx(np.abs(target - 1).mean())
    assert (metrics["mae_low"] is None, metrics["mae_high"] is None) == (n == 1, n == 1)


def test_perfect_predictions_have_a_correlation_of_1() -> None:
    target = np.linspace(-1, 1, 9, dtype=np.float32)[:, None]
    metrics = compute_regression_metrics(2 * target, target, signed=is_signed(target))
    assert metrics["pearson"] == pytest.approx(1.0)
    assert metrics["sign_accuracy"] == 1.0


def test_levels_of_chance() -> None:
    classes = chance_levels("classification", train=np.array([0, 1, 1]), test=np.array([1, 0, 2, 1]), num_classes=3)
    assert classes == {"uniform": pytest.approx(1 / 3), "majority": 0.5}
    labels = chance_levels("multilabel", train=TARGET, test=TARGET, num_classes=9)
    constant = np.full_like(PROBABILITY, 0.5)
    assert labels == {"constant": 0.5}
    assert compute_multilabel_metrics(constant, TARGET)["map"] == labels["constant"]
    train, test = np.array([[0.0], [0.0], [6.0]]), np.array([[1.0], [4.0]])
    assert chance_levels("regression", train=train, test=test, num_classes=9) == {"median": 2.5, "mean": 1.5}
    assert chance_levels("multilabel", train=TARGET, test=TARGET[3:], num_classes=9) == {"constant": 0.0}
