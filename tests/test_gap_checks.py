"""Checks of a gap with two or more modes: within classes, and with the modalities paired at random."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.errors import MixtureError
from mmaudit.audit.metrics import gap
from mmaudit.audit.scores.gap_checks import (
    ClassCheck,
    balanced_side,
    count_balanced,
    fit_by_class,
    permute_within_classes,
)
from mmaudit.audit.scores.mixture import MixtureConfig, fit_mixture

CONFIG = MixtureConfig()
NUM_SAMPLES = 20_000


def planted_gaps(kind: str, *, num_classes: int, size: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Draw gaps and labels: two groups in every class, one group per class, or a small second group."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(num_classes), size)
    share = {"within": 0.5, "classes": 0.0, "lopsided": 0.8}[kind]
    first = label % 2 == 0 if kind == "classes" else rng.random(len(label)) < share
    normal = rng.standard_normal(len(label))
    gap = np.where(first, 0.2 + 0.06 * normal, 0.75 + 0.08 * normal).clip(0.0, 1.0)
    order = rng.permutation(len(label))
    return gap[order], label[order]


def test_two_groups_in_every_class_hold_within_classes() -> None:
    gap, label = planted_gaps("within", num_classes=8, size=200)
    check = fit_by_class(gap, label, config=CONFIG, seed=0)
    assert check.bimodal == check.tested == tuple(range(8))
    assert check.share_tested == check.share_bimodal == 1.0
    assert check.eta_squared is not None
    assert check.eta_squared < 0.02
    assert check.verdict.startswith("holds within classes: the gap is bimodal in 8 of 8 classes tested, and classes ")


def test_one_group_per_class_is_class_structure() -> None:
    gap, label = planted_gaps("classes", num_classes=8, size=200)
    assert fit_mixture(gap, config=CONFIG, seed=0).bimodal
    check = fit_by_class(gap, label, config=CONFIG, seed=0)
    assert check.bimodal == ()
    assert check.share_bimodal == 0.0
    assert check.eta_squared is not None
    assert check.eta_squared > 0.95
    assert check.verdict == (
        "is class structure: the gap is bimodal in 0 of 8 classes tested, and classes explain "
        f"{check.eta_squared:.0%} of the variance of p_balanced"
    )


def test_small_second_groups_are_undecided() -> None:
    """Too few samples per class to detect a group of a fifth, but the classes do not explain p_balanced."""
    gap, label = planted_gaps("lopsided", num_classes=12, size=60)
    check = fit_by_class(gap, label, config=CONFIG, seed=0)
    assert check.verdict.startswith("undecided: ")
    assert check.share_bimodal is not None
    assert check.share_bimodal < 0.5


@pytest.mark.parametrize(
    ("num_classes", "size", "reason"),
    [
        (40, 49, "0 of 40 classes have 50 or more samples, two are needed; the largest has 49"),
        (1, 500, "there is only one class"),
    ],
)
def test_too_few_samples_or_classes_are_not_tested(num_classes: int, size: int, reason: str) -> None:
    gap, label = planted_gaps("within", num_classes=num_classes, size=size)
    check = fit_by_class(gap, label, config=CONFIG, seed=0)
    assert check.verdict == f"not tested: {reason}"
    assert check.tested == check.bimodal == ()
    assert check.eta_squared is None
    assert check.share_bimodal is None


def test_two_large_classes_among_many_small_ones_are_not_tested() -> None:
    gap, label = planted_gaps("within", num_classes=100, size=20)
    label = np.where(label < 10, label % 2, label)
    check = fit_by_class(gap, label, config=CONFIG, seed=0)
    assert check.verdict == "not tested: 2 of 92 classes have 50 or more samples, 10% of all samples"


def test_unimodal_gap_is_not_tested() -> None:
    gap = np.random.default_rng(0).random(NUM_SAMPLES)
    check = fit_by_class(gap, np.arange(NUM_SAMPLES) % 3, config=CONFIG, seed=0)
    assert check.verdict.startswith("not tested: the gap of all samples is not bimodal (dip 0.00")


@settings(max_examples=examples(10))
@given(st.sampled_from(["within", "classes", "lopsided"]), st.integers(0, 5), st.integers(-3, 3))
def test_check_does_not_depend_on_row_order_or_label_values(kind: str, seed: int, shift: int) -> None:
    gap, label = planted_gaps(kind, num_classes=4, size=60)
    order = np.random.default_rng(seed).permutation(len(gap))
    check = fit_by_class(gap, label, config=CONFIG, seed=0)
    shuffled = fit_by_class(gap[order], label[order] + shift, config=CONFIG, seed=0)
    assert shuffled == replace(
        check, tested=tuple(k + shift for k in check.tested), bimodal=tuple(k + shift for k in check.bimodal)
    )


@pytest.mark.parametrize(("kind", "size"), [("within", 60), ("classes", 60), ("within", 20)])
def test_class_check_is_plain_json(kind: str, size: int) -> None:
    gap, label = planted_gaps(kind, num_classes=4, size=size)
    check = fit_by_class(gap, label, config=CONFIG, seed=0)
    values = json.loads(json.dumps(check.to_json(), allow_nan=False))
    assert ClassCheck(**{**values, "tested": tuple(values["tested"]), "bimodal": tuple(values["bimodal"])}) == check


def test_labels_of_another_length_raise() -> None:
    with pytest.raises(
        MixtureError, match=r"labels and gaps must have the same shape: found \(3,\) labels and \(20000,\) gaps"
    ):
        fit_by_class(np.random.default_rng(0).random(NUM_SAMPLES), np.arange(3), config=CONFIG, seed=0)


def right_or_wrong(rng: np.random.Generator, rows: int, *, shared: bool) -> NDArray[np.float32]:
    """Draw confidences (n, 2) near 0.1 and 0.9, right on 60% of samples: each by itself, or never both or neither."""
    first = rng.random(rows) < 0.6
    second = ~first if shared else rng.random(rows) < 0.6
    centre = np.where(np.stack([first, second], axis=1), 0.85, 0.15)
    return np.clip(centre + rng.normal(0, 0.06, (rows, 2)), 0, 1).astype(np.float32)


def test_modes_of_independent_modalities_survive_random_pairing() -> None:
    confidence, label = right_or_wrong(np.random.default_rng(0), 2_000, shared=False), np.arange(2_000) % 4
    assert fit_mixture(gap(confidence), config=CONFIG).bimodal
    check = permute_within_classes(confidence, label, config=CONFIG, seed=0, bimodal=True)
    assert (check.num_bimodal, check.survives) == (check.num_permutations, True)


def test_modes_that_come_from_the_pairing_do_not_survive() -> None:
    """Confidences are spread evenly; the pairing makes half of the samples equal and half differ by a half."""
    rng = np.random.default_rng(0)
    first = rng.random(2_000)
    second = np.where(rng.random(2_000) < 0.5, first, (first + 0.5) % 1) + rng.normal(0, 0.01, 2_000)
    confidence = np.clip(np.stack([first, second], axis=1), 0, 1).astype(np.float32)
    assert fit_mixture(gap(confidence), config=CONFIG).bimodal
    check = permute_within_classes(confidence, np.zeros(2_000, int), config=CONFIG, seed=0, bimodal=True)
    assert (check.num_bimodal, check.survives) == (0, False)


def test_pairing_is_permuted_within_classes_and_only_where_present(monkeypatch: pytest.MonkeyPatch) -> None:
    label = np.arange(90) % 3
    confidence = (label[:, None] / 4 + np.random.default_rng(0).random((90, 3)) / 5).astype(np.float32)
    confidence[:30, 2] = np.nan
    seen: list[NDArray[np.float32]] = []

    def record(permuted: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(permuted)
        return gap(permuted)

    monkeypatch.setattr("mmaudit.audit.scores.gap_checks.gap", record)
    permute_within_classes(confidence, label, config=CONFIG, seed=0, bimodal=True)
    for permuted in seen:
        np.testing.assert_array_equal(permuted[:, 0], confidence[:, 0])
        np.testing.assert_array_equal(np.isnan(permuted), np.isnan(confidence))
        for number in range(3):
            rows = label == number
            np.testing.assert_array_equal(np.sort(permuted[rows], axis=0), np.sort(confidence[rows], axis=0))
    assert (seen[0][:, 1] != confidence[:, 1]).mean() > 0.8


def test_a_gap_of_one_mode_is_not_permuted() -> None:
    confidence = np.random.default_rng(0).random((50, 2)).astype(np.float32)
    check = permute_within_classes(confidence, np.zeros(50, int), config=CONFIG, seed=0, bimodal=False)
    assert check.to_json() == {"num_permutations": 20, "num_bimodal": None, "num_rows": 50, "survives": False}


def test_balanced_side_counts_samples_that_all_modalities_get_right_or_wrong() -> None:
    label = np.array([0, 0, 1, 1, 0], np.int32)
    prediction = np.array([[0, 0, -1], [1, 1, 1], [0, 0, -1], [1, 1, 0], [0, 1, 1]], np.int32)
    right, balanced = prediction == label[:, None], np.array([1, 1, 1, 0.5, 0.2]) >= 0.5
    counts = [count_balanced(balanced[rows], right[rows], prediction[rows] >= 0) for rows in (slice(2), slice(2, 5))]
    assert balanced_side(counts) == {"n": 4, "all_correct": 0.25, "all_wrong": 0.5}
    assert balanced_side([*counts, None]) is None
    assert balanced_side([{"n": 0, "all_correct": 0, "all_wrong": 0}]) is None
