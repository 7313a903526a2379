"""Figures equal scikit-learn's and scipy's, and subsets are those of the study."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from mmaudit.audit.intervals import wilson
from mmaudit.train.evaluate import evaluate, measure, subsets


def answers(n: int, k: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, k, n)
    logits = rng.standard_normal((n, k)) + 1.5 * np.eye(k)[label]
    return (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32), label


@pytest.mark.parametrize(("n", "k", "seed"), [(200, 2, 0), (300, 5, 1), (90, 7, 2)])
def test_figures_are_those_of_scikit_learn(n: int, k: int, seed: int) -> None:
    probability, label = answers(n, k, seed)
    found = measure(probability, label)
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
    found = measure(probability[rows], label[rows])
    predicted = probability[rows].argmax(axis=1)
    assert (predicted > 1).any()  # so that an average over all classes would differ
    precisions = [average_precision_score(label[rows] == one, probability[rows, one]) for one in (0, 1)]
    assert found["map"] == pytest.approx(np.mean(precisions))
    assert found["macro_f1"] == pytest.approx(np.mean(f1_score(label[rows], predicted, average=None, labels=[0, 1])))


def test_a_class_that_is_never_predicted_counts_as_zero() -> None:
    found = measure(np.array([[0.9, 0.1], [0.8, 0.2]], np.float32), np.array([0, 1]))
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(2, 5), st.integers(0, 999))
def test_row_order_does_not_matter(n: int, k: int, seed: int) -> None:
    probability, label = answers(n, k, seed)
    order = np.random.default_rng(seed).permutation(n)
    assert measure(probability[order], label[order]) == pytest.approx(measure(probability, label))


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
    assert report["all"] == {"n": 60, "branches": {"fused": measure(fused, label), "audio": measure(audio, label)}}
    assert report["few"]["n"] == 12
    assert report["few"]["branches"]["audio"] == measure(audio[:12], label[:12])
