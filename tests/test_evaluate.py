"""Tests of test metrics: equal to scikit-learn and scipy, on the subsets of the study."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, recall_score

from mmaudit.audit.metrics import wilson_interval
from mmaudit.train.evaluate import (
    compute_class_metrics,
    compute_metrics,
    evaluate,
    evaluate_branches,
    evaluate_classes,
    subsets,
)


def random_predictions(n: int, k: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, k, n)
    logits = rng.standard_normal((n, k)) + 1.5 * np.eye(k)[label]
    return (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32), label


@pytest.mark.parametrize(("n", "k", "seed"), [(200, 2, 0), (300, 5, 1), (90, 7, 2)])
def test_metrics_equal_scikit_learn(n: int, k: int, seed: int) -> None:
    probability, label = random_predictions(n, k, seed)
    metrics = compute_metrics(probability, label)
    predicted = probability.argmax(axis=1)
    assert set(label.tolist()) == set(range(k))
    assert metrics["accuracy"] == pytest.approx(accuracy_score(label, predicted))
    assert metrics["macro_f1"] == pytest.approx(f1_score(label, predicted, average="macro"))
    assert metrics["map"] == pytest.approx(average_precision_score(np.eye(k)[label], probability, average="macro"))
    interval = binomtest(int((predicted == label).sum()), n).proportion_ci(method="wilson")
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == pytest.approx(tuple(interval), abs=1e-6)


def test_map_and_f1_are_over_occurring_classes() -> None:
    probability, label = random_predictions(120, 4, 3)
    rows = label < 2
    metrics = compute_metrics(probability[rows], label[rows])
    predicted = probability[rows].argmax(axis=1)
    assert (predicted > 1).any()  # so that an average over all classes would differ
    precisions = [average_precision_score(label[rows] == index, probability[rows, index]) for index in (0, 1)]
    assert metrics["map"] == pytest.approx(np.mean(precisions))
    assert metrics["macro_f1"] == pytest.approx(np.mean(f1_score(label[rows], predicted, average=None, labels=[0, 1])))


def test_class_never_predicted_has_f1_of_0() -> None:
    metrics = compute_metrics(np.array([[0.9, 0.1], [0.8, 0.2]], np.float32), np.array([0, 1]))
    assert metrics["accuracy"] == 0.5
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(2, 5), st.integers(0, 999))
def test_row_order_does_not_change_metrics(n: int, k: int, seed: int) -> None:
    probability, label = random_predictions(n, k, seed)
    order = np.random.default_rng(seed).permutation(n)
    assert compute_metrics(probability[order], label[order]) == pytest.approx(compute_metrics(probability, label))


@given(st.integers(1, 500), st.data())
def test_wilson_interval_equals_scipy(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    expected = binomtest(successes, trials).proportion_ci(confidence_level=0.95, method="wilson")
    low, high = wilson_interval(successes, trials)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert 0 <= low <= successes / trials <= high <= 1


def test_subsets_by_hand() -> None:
    masks = subsets(np.array([-1, -0.4, -0.3, -0.2, 0, 0.2, 0.3, 0.5]), first="audio", second="visual")
    assert {name: np.flatnonzero(rows).tolist() for name, rows in masks.items()} == {
        "all": [0, 1, 2, 3, 4, 5, 6, 7],
        "audio-preferred": [5, 6, 7],
        "audio-dominated-0.2": [6, 7],
        "audio-dominated-0.4": [7],
        "visual-preferred": [0, 1, 2, 3],
        "visual-dominated-0.2": [0, 1, 2],
        "visual-dominated-0.4": [0],
        "balanced-within-0.2": [3, 4, 5],
    }


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_swapping_modalities_swaps_the_subsets(values: list[float]) -> None:
    original = subsets(np.array(values), first="a", second="b")
    swapped = subsets(-np.array(values), first="b", second="a")
    assert {name: rows.tolist() for name, rows in original.items()} == {
        name: rows.tolist() for name, rows in swapped.items()
    }


def test_every_branch_has_metrics_on_every_subset() -> None:
    fused, label = random_predictions(60, 3, 0)
    audio, _ = random_predictions(60, 3, 1)
    masks = {"all": np.ones(60, bool), "few": np.arange(60) < 12, "none": np.zeros(60, bool)}
    report: dict[str, Any] = evaluate({"fused": fused, "audio": audio}, label, masks)
    assert report["none"] == {"n": 0}
    assert report["all"] == {
        "n": 60,
        "branches": {"fused": compute_metrics(fused, label), "audio": compute_metrics(audio, label)},
    }
    assert report["few"]["n"] == 12
    assert report["few"]["branches"]["audio"] == compute_metrics(audio[:12], label[:12])


def test_calibration_error_by_hand() -> None:
    """Bins (12/15, 13/15] and (14/15, 1], two samples each, one of them wrong."""
    confidence = np.array([0.85, 0.86, 0.95, 1.0])
    metrics = compute_metrics(np.stack([confidence, 1 - confidence], axis=1).astype(np.float32), np.array([0, 1, 0, 1]))
    assert metrics["ece"] == pytest.approx((abs(0.85 + 0.86 - 1) + abs(0.95 + 1.0 - 1)) / 4, abs=1e-6)
    perfect = compute_metrics(np.eye(3, dtype=np.float32)[[0, 1, 2, 1]], np.array([0, 1, 2, 1]))
    assert perfect["ece"] == 0
    assert perfect["map"] == perfect["macro_f1"] == perfect["accuracy"] == 1


def test_true_probabilities_are_calibrated_and_overconfident_ones_are_not() -> None:
    """The ECE of overconfident probabilities is the amount by which they are too high."""
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.55, 0.95, 20_000)
    label = (rng.random(20_000) > probability).astype(np.int64)
    calibrated = compute_metrics(np.stack([probability, 1 - probability], axis=1).astype(np.float32), label)
    raised = np.minimum(probability + 0.04, 1)
    overconfident = compute_metrics(np.stack([raised, 1 - raised], axis=1).astype(np.float32), label)
    assert calibrated["ece"] < 0.02
    assert overconfident["ece"] == pytest.approx(0.04, abs=0.01)
    assert overconfident["accuracy"] == calibrated["accuracy"]


@pytest.mark.parametrize(("n", "k", "seed"), [(200, 2, 0), (300, 5, 1), (90, 7, 2)])
def test_class_metrics_equal_scikit_learn(n: int, k: int, seed: int) -> None:
    probability, label = random_predictions(n, k, seed)
    classes = compute_class_metrics(probability, label)
    predicted = probability.argmax(axis=1)
    assert list(classes) == list(range(k))
    for name, expected in (
        ("recall", recall_score(label, predicted, average=None)),
        ("f1", f1_score(label, predicted, average=None)),
        ("average_precision", average_precision_score(np.eye(k)[label], probability, average=None)),
    ):
        assert [metrics[name] for metrics in classes.values()] == pytest.approx(expected.tolist())
    for index, metrics in classes.items():
        rows = label == index
        interval = binomtest(int((predicted[rows] == index).sum()), int(rows.sum())).proportion_ci(method="wilson")
        assert (metrics["recall_low"], metrics["recall_high"]) == pytest.approx(tuple(interval), abs=1e-6)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(2, 6), st.integers(0, 999))
def test_overall_metrics_follow_from_class_metrics(n: int, k: int, seed: int) -> None:
    probability, label = random_predictions(n, k, seed)
    overall, classes = compute_metrics(probability, label), compute_class_metrics(probability, label)
    assert sorted(classes) == np.unique(label).tolist()
    counts = np.bincount(label)
    assert overall["accuracy"] == pytest.approx(
        sum(counts[index] * metrics["recall"] for index, metrics in classes.items()) / n
    )
    assert overall["macro_f1"] == pytest.approx(np.mean([metrics["f1"] for metrics in classes.values()]))
    assert overall["map"] == pytest.approx(np.mean([metrics["average_precision"] for metrics in classes.values()]))


def test_every_branch_has_metrics_on_every_class() -> None:
    fused, label = random_predictions(60, 3, 0)
    audio, _ = random_predictions(60, 4, 1)
    fused = np.pad(fused, ((0, 0), (0, 1)))  # class 3 is never true, and audio predicts it sometimes
    assert (audio.argmax(axis=1) == 3).any()
    report = evaluate_classes({"fused": fused, "audio": audio}, label, ["a", "b", "c", "d"])
    assert [(name, entry["n"]) for name, entry in report.items()] == [
        *zip("abc", np.bincount(label).tolist(), strict=True),
        ("d", 0),
    ]
    assert report["d"] == {"n": 0}
    assert report["b"]["branches"] == {
        "fused": compute_class_metrics(fused, label)[1],
        "audio": compute_class_metrics(audio, label)[1],
    }


def test_evaluate_branches_has_subsets_and_classes() -> None:
    fused, label = random_predictions(60, 3, 0)
    label[label == 2] = 0  # a class that does not occur, and an empty subset
    masks = {"all": np.ones(60, bool), "none": np.zeros(60, bool)}
    names = ["a", "b", "c"]
    report = evaluate_branches({"fused": fused}, label, subset_masks=masks, class_names=names)
    assert report == {
        "test": evaluate({"fused": fused}, label, masks),
        "test_by_class": evaluate_classes({"fused": fused}, label, names),
    }
    assert json.loads(json.dumps(report, allow_nan=False)) == report
