"""Figures equal scikit-learn's and scipy's, and subsets are those of the study."""

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

from mmaudit.audit.intervals import wilson
from mmaudit.train.evaluate import (
    compute_class_metrics,
    compute_metrics,
    evaluate,
    evaluate_branches,
    evaluate_classes,
    subsets,
)


def answers(n: int, k: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, k, n)
    logits = rng.standard_normal((n, k)) + 1.5 * np.eye(k)[label]
    return (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32), label


@pytest.mark.parametrize(("n", "k", "seed"), [(200, 2, 0), (300, 5, 1), (90, 7, 2)])
def test_figures_are_those_of_scikit_learn(n: int, k: int, seed: int) -> None:
    probability, label = answers(n, k, seed)
    found = compute_metrics(probability, label)
    predicted = probability.argmax(axis=1)
    assert set(label.tolist()) == set(range(k))
    assert found["accuracy"] == pytest.approx(accuracy_score(label, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(label, predicted, average="macro"))
    assert found["map"] == pytest.approx(average_precision_score(np.eye(k)[label], probability, average="macro"))
    interval = binomtest(int((predicted == label).sum()), n).proportion_ci(method="wilson")
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx(tuple(interval), abs=1e-6)


def test_map_and_f1_are_over_the_classes_that_occur() -> None:
    probability, label = answers(120, 4, 3)
    rows = label < 2
    found = compute_metrics(probability[rows], label[rows])
    predicted = probability[rows].argmax(axis=1)
    assert (predicted > 1).any()  # so that an average over all classes would differ
    precisions = [average_precision_score(label[rows] == one, probability[rows, one]) for one in (0, 1)]
    assert found["map"] == pytest.approx(np.mean(precisions))
    assert found["macro_f1"] == pytest.approx(np.mean(f1_score(label[rows], predicted, average=None, labels=[0, 1])))


def test_a_class_that_is_never_predicted_counts_as_zero() -> None:
    found = compute_metrics(np.array([[0.9, 0.1], [0.8, 0.2]], np.float32), np.array([0, 1]))
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(2, 5), st.integers(0, 999))
def test_row_order_does_not_matter(n: int, k: int, seed: int) -> None:
    probability, label = answers(n, k, seed)
    order = np.random.default_rng(seed).permutation(n)
    assert compute_metrics(probability[order], label[order]) == pytest.approx(compute_metrics(probability, label))


@given(st.integers(1, 500), st.data())
def test_wilson_is_scipy_s(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    expected = binomtest(successes, trials).proportion_ci(confidence_level=0.95, method="wilson")
    low, high = wilson(successes, trials)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert 0 <= low <= successes / trials <= high <= 1


def test_subsets_by_hand() -> None:
    found = subsets(np.array([-1, -0.4, -0.3, -0.2, 0, 0.2, 0.3, 0.5]), first="audio", second="visual")
    assert {name: np.flatnonzero(rows).tolist() for name, rows in found.items()} == {
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
def test_swapping_the_sides_swaps_the_subsets(values: list[float]) -> None:
    one = subsets(np.array(values), first="a", second="b")
    other = subsets(-np.array(values), first="b", second="a")
    assert {name: rows.tolist() for name, rows in one.items()} == {name: rows.tolist() for name, rows in other.items()}


def test_every_branch_is_measured_on_every_subset() -> None:
    fused, label = answers(60, 3, 0)
    audio, _ = answers(60, 3, 1)
    members = {"all": np.ones(60, bool), "few": np.arange(60) < 12, "none": np.zeros(60, bool)}
    report: dict[str, Any] = evaluate({"fused": fused, "audio": audio}, label, members)
    assert report["none"] == {"n": 0}
    assert report["all"] == {
        "n": 60,
        "branches": {"fused": compute_metrics(fused, label), "audio": compute_metrics(audio, label)},
    }
    assert report["few"]["n"] == 12
    assert report["few"]["branches"]["audio"] == compute_metrics(audio[:12], label[:12])


def test_calibration_by_hand() -> None:
    """Bins (12/15, 13/15] and (14/15, 1], two samples each, one of them wrong."""
    sure = np.array([0.85, 0.86, 0.95, 1.0])
    found = compute_metrics(np.stack([sure, 1 - sure], axis=1).astype(np.float32), np.array([0, 1, 0, 1]))
    assert found["ece"] == pytest.approx((abs(0.85 + 0.86 - 1) + abs(0.95 + 1.0 - 1)) / 4, abs=1e-6)
    perfect = compute_metrics(np.eye(3, dtype=np.float32)[[0, 1, 2, 1]], np.array([0, 1, 2, 1]))
    assert perfect["ece"] == 0
    assert perfect["map"] == perfect["macro_f1"] == perfect["accuracy"] == 1


def test_a_branch_that_says_its_true_chances_is_calibrated() -> None:
    """And one that is surer than it should be is not: ECE is then what it is too sure by."""
    rng = np.random.default_rng(0)
    chance = rng.uniform(0.55, 0.95, 20_000)
    label = (rng.random(20_000) > chance).astype(np.int64)
    honest = compute_metrics(np.stack([chance, 1 - chance], axis=1).astype(np.float32), label)
    boast = np.minimum(chance + 0.04, 1)
    boasted = compute_metrics(np.stack([boast, 1 - boast], axis=1).astype(np.float32), label)
    assert honest["ece"] < 0.02
    assert boasted["ece"] == pytest.approx(0.04, abs=0.01)
    assert boasted["accuracy"] == honest["accuracy"]


@pytest.mark.parametrize(("n", "k", "seed"), [(200, 2, 0), (300, 5, 1), (90, 7, 2)])
def test_figures_by_class_are_those_of_scikit_learn(n: int, k: int, seed: int) -> None:
    probability, label = answers(n, k, seed)
    found = compute_class_metrics(probability, label)
    predicted = probability.argmax(axis=1)
    assert list(found) == list(range(k))
    for name, expected in (
        ("recall", recall_score(label, predicted, average=None)),
        ("f1", f1_score(label, predicted, average=None)),
        ("average_precision", average_precision_score(np.eye(k)[label], probability, average=None)),
    ):
        assert [each[name] for each in found.values()] == pytest.approx(expected.tolist())
    for index, each in found.items():
        rows = label == index
        interval = binomtest(int((predicted[rows] == index).sum()), int(rows.sum())).proportion_ci(method="wilson")
        assert (each["recall_low"], each["recall_high"]) == pytest.approx(tuple(interval), abs=1e-6)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(2, 6), st.integers(0, 999))
def test_the_whole_is_made_of_its_classes(n: int, k: int, seed: int) -> None:
    probability, label = answers(n, k, seed)
    whole, classes = compute_metrics(probability, label), compute_class_metrics(probability, label)
    assert sorted(classes) == np.unique(label).tolist()
    number = np.bincount(label)
    assert whole["accuracy"] == pytest.approx(
        sum(number[index] * each["recall"] for index, each in classes.items()) / n
    )
    assert whole["macro_f1"] == pytest.approx(np.mean([each["f1"] for each in classes.values()]))
    assert whole["map"] == pytest.approx(np.mean([each["average_precision"] for each in classes.values()]))


def test_every_branch_is_measured_on_every_class() -> None:
    fused, label = answers(60, 3, 0)
    audio, _ = answers(60, 4, 1)
    fused = np.pad(fused, ((0, 0), (0, 1)))  # class 3 is never true, and audio names it now and then
    assert (audio.argmax(axis=1) == 3).any()
    report = evaluate_classes({"fused": fused, "audio": audio}, label, ["a", "b", "c", "d"])
    assert [(name, found["n"]) for name, found in report.items()] == [
        *zip("abc", np.bincount(label).tolist(), strict=True),
        ("d", 0),
    ]
    assert report["d"] == {"n": 0}
    assert report["b"]["branches"] == {
        "fused": compute_class_metrics(fused, label)[1],
        "audio": compute_class_metrics(audio, label)[1],
    }


def test_one_report_holds_subsets_and_classes() -> None:
    fused, label = answers(60, 3, 0)
    label[label == 2] = 0  # a class that does not occur, and a subset of nobody
    members = {"all": np.ones(60, bool), "none": np.zeros(60, bool)}
    names = ["a", "b", "c"]
    report = evaluate_branches({"fused": fused}, label, subset_masks=members, class_names=names)
    assert report == {
        "test": evaluate({"fused": fused}, label, members),
        "test_by_class": evaluate_classes({"fused": fused}, label, names),
    }
    assert json.loads(json.dumps(report, allow_nan=False)) == report
