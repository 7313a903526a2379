"""The class check separates groups within classes from class structure."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.errors import MixtureError
from mmaudit.audit.scores.mixture import MixtureConfig, fit_mixture
from mmaudit.audit.scores.probe_report import ClassCheck, fit_by_class

CONFIG = MixtureConfig()
NUM_SAMPLES = 20_000


def planted(kind: str, *, num_classes: int, size: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
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
    gap, label = planted("within", num_classes=8, size=200)
    check = fit_by_class(gap, label, config=CONFIG, seed=0)
    assert check.bimodal == check.tested == tuple(range(8))
    assert check.share_tested == check.share_bimodal == 1.0
    assert check.eta_squared is not None
    assert check.eta_squared < 0.02
    assert check.verdict.startswith("holds within classes: the gap is bimodal in 8 of 8 classes tested, and classes ")


def test_one_group_per_class_is_class_structure() -> None:
    gap, label = planted("classes", num_classes=8, size=200)
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
    gap, label = planted("lopsided", num_classes=12, size=60)
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
    gap, label = planted("within", num_classes=num_classes, size=size)
    check = fit_by_class(gap, label, config=CONFIG, seed=0)
    assert check.verdict == f"not tested: {reason}"
    assert check.tested == check.bimodal == ()
    assert check.eta_squared is None
    assert check.share_bimodal is None


def test_two_large_classes_among_many_small_ones_are_not_tested() -> None:
    gap, label = planted("within", num_classes=100, size=20)
    label = np.where(label < 10, label % 2, label)
    check = fit_by_class(gap, label, config=CONFIG, seed=0)
    assert check.verdict == "not tested: 2 of 92 classes have 50 or more samples, 10% of all samples"


def test_unimodal_gap_is_not_tested() -> None:
    gap = np.random.default_rng(0).random(NUM_SAMPLES)
    check = fit_by_class(gap, np.arange(NUM_SAMPLES) % 3, config=CONFIG, seed=0)
    assert check.verdict.startswith("not tested: the gap of all samples is not bimodal (dip 0.00")


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["within", "classes", "lopsided"]), st.integers(0, 5), st.integers(-3, 3))
def test_check_does_not_depend_on_row_order_or_label_values(kind: str, seed: int, shift: int) -> None:
    gap, label = planted(kind, num_classes=4, size=60)
    order = np.random.default_rng(seed).permutation(len(gap))
    check = fit_by_class(gap, label, config=CONFIG, seed=0)
    shuffled = fit_by_class(gap[order], label[order] + shift, config=CONFIG, seed=0)
    assert shuffled == replace(
        check, tested=tuple(k + shift for k in check.tested), bimodal=tuple(k + shift for k in check.bimodal)
    )


@pytest.mark.parametrize(("kind", "size"), [("within", 60), ("classes", 60), ("within", 20)])
def test_class_check_round_trip_is_equality(kind: str, size: int) -> None:
    gap, label = planted(kind, num_classes=4, size=size)
    check = fit_by_class(gap, label, config=CONFIG, seed=0)
    assert ClassCheck.from_json(json.loads(json.dumps(check.to_json(), allow_nan=False))) == check


@pytest.mark.parametrize("values", [{}, {"verdict": "holds"}])
def test_malformed_class_check_raises(values: dict[str, object]) -> None:
    with pytest.raises(MixtureError, match=r"not a class check.*rescore"):
        ClassCheck.from_json(values)


def test_labels_of_another_length_raise() -> None:
    with pytest.raises(
        MixtureError, match=r"labels and gaps must have the same shape: found \(3,\) labels and \(20000,\) gaps"
    ):
        fit_by_class(np.random.default_rng(0).random(NUM_SAMPLES), np.arange(3), config=CONFIG, seed=0)
