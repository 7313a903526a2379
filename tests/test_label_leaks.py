"""Features that know the labels: fitted on the training labels, or holding the label."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from mmaudit.audit.label_leaks import LabelLeak, LeakColumns, find_label_leaks, standard_error_of_difference
from mmaudit.audit.scores.table import ScoreTable

KINDS = {"audio": "audio", "text": "text", "numbers": "features"}


def table(
    accuracy: dict[str, tuple[float, float]], *, n: int = 1200, groups: int = 0, seed: int = 0, k: int = 4
) -> ScoreTable:
    """Return a table whose modalities are right on these shares of train and test rows, by group if there are any."""
    rng = np.random.default_rng(seed)
    label, is_test = rng.integers(0, k, n).astype(np.int32), rng.random(n) < 0.25
    group = rng.integers(0, groups, n) if groups else np.arange(n)
    effect = 0.3 * rng.standard_normal(group.max() + 1)[group] if groups else np.zeros(n)
    prediction = np.empty((n, len(accuracy)), np.int32)
    for index, (on_train, on_test) in enumerate(accuracy.values()):
        is_right = rng.random(n) < np.where(is_test, on_test, on_train) + effect
        prediction[:, index] = np.where(is_right, label, (label + 1) % k)
    confidence = np.where(prediction == label[:, None], 0.9, 0.05).astype(np.float32)
    return ScoreTable(
        sample_id=np.array([f"s{row}" for row in range(n)], dtype=object),
        label=label,
        label_name=np.array([f"c{value}" for value in label], dtype=object),
        modalities=tuple(accuracy),
        confidence=confidence,
        split=np.where(is_test, "test", "train").astype(object),
        group=np.array([f"g{value}" for value in group], dtype=object) if groups else None,
        prediction=prediction,
    )


def summary(leaks: list[LabelLeak]) -> list[tuple[str, str]]:
    return [(leak.what, leak.modality) for leak in leaks]


def test_features_fitted_on_training_labels_are_found() -> None:
    leaks = find_label_leaks(LeakColumns.of(table({"text": (0.983, 0.765), "audio": (0.7, 0.7)})), kinds=KINDS)
    assert summary(leaks) == [("fitted on labels", "text")]
    assert leaks[0].z is not None
    assert leaks[0].z > 8
    assert "on train rows" in leaks[0].message
    assert "text: the out-of-fold accuracy is 0.98" in leaks[0].message


@pytest.mark.parametrize("groups", [0, 30])
def test_honest_features_are_not(groups: int) -> None:
    for seed in range(20):
        assert (
            find_label_leaks(
                LeakColumns.of(table({"text": (0.7, 0.7), "audio": (0.5, 0.5)}, groups=groups, seed=seed)), kinds=KINDS
            )
            == []
        )


def test_difference_between_few_groups_is_not_evidence() -> None:
    """Test speakers of whom one is hard: ungrouped z is above 4, grouped below."""
    scores = table({"text": (0.8, 0.8), "audio": (0.5, 0.5)}, n=1000)
    group = np.arange(1000) % 10
    is_test = group < 2
    is_right = np.where(group == 0, np.arange(1000) % 100 < 30, np.arange(1000) % 100 < 80)
    prediction = np.where(is_right, scores.label, (scores.label + 1) % 4).astype(np.int32)
    values: NDArray[np.float64] = (prediction == scores.label).astype(np.float64)
    ungrouped = standard_error_of_difference(values, ~is_test, is_test, None)
    grouped = standard_error_of_difference(values, ~is_test, is_test, group.astype(np.int64))
    difference = values[~is_test].mean() - values[is_test].mean()
    assert difference / ungrouped > 4
    assert difference / grouped < 4


@pytest.mark.parametrize(("kind", "expected"), [("text", 1), ("numbers", 1), ("audio", 0)])
def test_only_columns_of_numbers_or_text_may_hold_the_label(kind: str, expected: int) -> None:
    leaks = find_label_leaks(LeakColumns.of(table({kind: (0.999, 0.999), "other": (0.5, 0.5)})), kinds=KINDS)
    assert summary(leaks) == [("holds labels", kind)] * expected


def test_high_accuracy_of_the_most_common_class_says_nothing() -> None:
    scores = table({"text": (0.997, 0.997), "audio": (0.5, 0.5)})
    rare = np.where(np.arange(1200) % 250 == 0, 1, 0).astype(np.int32)
    prediction = np.zeros_like(scores.prediction)
    common = ScoreTable(
        sample_id=scores.sample_id,
        label=rare,
        label_name=scores.label_name,
        modalities=scores.modalities,
        confidence=scores.confidence,
        split=scores.split,
        prediction=prediction,
    )
    assert find_label_leaks(LeakColumns.of(common), kinds=KINDS) == []


def test_without_classes_confidence_is_compared() -> None:
    scores = table({"text": (0.98, 0.7), "audio": (0.5, 0.5)})
    regression = ScoreTable(
        sample_id=scores.sample_id,
        label=scores.label,
        label_name=scores.label_name,
        modalities=scores.modalities,
        confidence=scores.confidence,
        split=scores.split,
    )
    leaks = find_label_leaks(LeakColumns.of(regression), kinds=KINDS)
    assert summary(leaks) == [("fitted on labels", "text")]
    assert "confidence" in leaks[0].message
