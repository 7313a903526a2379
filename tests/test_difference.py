"""Differences of two methods: variances by hand, the level under equal methods, and what one seed may say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mmaudit.audit.errors import ConfigError
from mmaudit.train.difference import LEVEL, MIN_TEST_SAMPLES, compare_correctness, holm, smallest_effect_of


def test_variance_and_degrees_of_freedom_by_hand() -> None:
    """Two seeds, three samples: every number below was worked out on paper."""
    a = np.array([[1, 1, 0], [1, 0, 0]])
    b = np.array([[0, 1, 0], [0, 0, 0]])
    # d = (1, 0, 0): mean 1/3, var 1/3, v1 = 1/9. Accuracies a 2/3, 1/3: s2 = 1/18; b 1/3, 0: s2 = 1/18.
    # Residuals of a: sample means (1, .5, 0), seed means (2/3, 1/3), grand 1/2: seed 1 (-1/6, 1/3, -1/6), seed 2 the
    # negative: sum of squares 1/3, over 2 x 1: 1/6; of b the same. v = 1/9 + max(0, 1/18 - 2 (1/6) / 6) = 1/9.
    difference = compare_correctness(a, b)
    assert difference.mean == pytest.approx(1 / 3)
    assert difference.standard_error == pytest.approx(1 / 3)
    df = (1 / 9) ** 2 / ((1 / 9) ** 2 / 2 + 2 * (1 / 36) ** 2)
    assert difference.df == pytest.approx(df)
    assert difference.p == pytest.approx(2 * stats.t.sf(1, df))
    half_width = stats.t.ppf(0.975, df) / 3
    assert (difference.low, difference.high) == pytest.approx((max(-1, 1 / 3 - half_width), min(1, 1 / 3 + half_width)))
    assert difference.smallest_effect == 1  # (t_.975 + t_.8) / 3 is 2.2: no difference of accuracy is shown


def test_smallest_effect_by_hand() -> None:
    """As the only comparison at the level .05, and as the first of five at .01."""
    assert smallest_effect_of(0.01, 20) == pytest.approx(0.01 * (2.0860 + 0.8600), abs=1e-6)
    assert smallest_effect_of(0.01, 20, num_comparisons=5) == pytest.approx(0.01 * (2.8453 + 0.8600), abs=1e-6)


@pytest.mark.parametrize("num_comparisons", [1, 5, 29])
def test_smallest_effect_is_shown_after_the_correction_in_four_of_five_draws(num_comparisons: int) -> None:
    """Of several comparisons, one has this effect and the others none; 4,000 draws of estimates and their errors."""
    rng, df, draws = np.random.default_rng(0), 40, 4_000
    effect = smallest_effect_of(0.1, df, num_comparisons=num_comparisons)
    true = np.array([effect] + [0.0] * (num_comparisons - 1))
    errors = 0.1 * np.sqrt(rng.chisquare(df, (draws, num_comparisons)) / df)
    p = 2 * stats.t.sf(np.abs(true + rng.normal(0, 0.1, errors.shape)) / errors, df)
    shown = np.mean([holm(row.tolist())[0] < 0.05 for row in p])
    assert 0.77 < shown < 0.83


def test_smallest_effect_is_at_most_one() -> None:
    assert smallest_effect_of(0.003, 1.0, num_comparisons=29) == 1
    assert np.isnan(smallest_effect_of(np.nan, np.nan))


def test_equal_seeds_give_the_paired_test_over_samples() -> None:
    rng = np.random.default_rng(0)
    a, b = (np.tile(rng.random(200) < chance, (4, 1)) for chance in (0.7, 0.6))
    difference = compare_correctness(a, b)
    expected = stats.ttest_rel(a[0].astype(float), b[0].astype(float))
    assert difference.p == pytest.approx(float(expected.pvalue))


def test_groups_widen_the_interval_where_samples_of_a_group_agree() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(10), 40)
    chance = 0.5 + rng.normal(0, 0.3, 10)[group]
    a, b = rng.random((3, 400)) < chance, rng.random((3, 400)) < 0.6
    alone, grouped = compare_correctness(a, b), compare_correctness(a, b, group=[f"g{g}" for g in group])
    assert grouped.standard_error > 2 * alone.standard_error
    assert grouped.df < 12


def test_noise_of_training_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    shift = np.array([[0.1], [-0.1], [0.05], [-0.05]])
    a, b = rng.random((4, 2_000)) < 0.7 + shift, rng.random((4, 2_000)) < 0.7
    difference = compare_correctness(a, b)
    assert difference.standard_error > 0.03
    assert difference.df < 6


def test_equal_methods_are_told_apart_as_often_as_the_level_states() -> None:
    """1,000 comparisons: .05 has a standard error of .007; benchmarks/verdict.py draws more designs."""
    rng = np.random.default_rng(1)
    claims = 0
    for _ in range(1_000):
        own = rng.normal(0.65, 0.3, 300)
        a, b = (rng.random((3, 300)) < own + rng.normal(0, 0.15, 300) + rng.normal(0, 0.01, (3, 1)) for _ in range(2))
        claims += compare_correctness(a, b).evidence() != "no evidence"
    assert 0.005 <= claims / 1_000 <= 0.07


def test_one_seed_or_few_samples_show_nothing() -> None:
    a, b = np.ones((1, 500)), np.zeros((1, 500))
    difference = compare_correctness(a, b)
    assert (difference.mean, difference.low, difference.high) == (1.0, -1.0, 1.0)
    assert math.isnan(difference.p)
    assert difference.evidence() == "no evidence"
    few = MIN_TEST_SAMPLES - 1
    assert compare_correctness(np.ones((3, few)), np.zeros((3, few))).evidence() == "no evidence"
    assert compare_correctness(np.ones((3, few + 1)), np.zeros((3, few + 1))).evidence() == "helps"
    assert compare_correctness(np.zeros((3, 100)), np.ones((3, 100))).evidence() == "hurts"
    one_group = compare_correctness(np.ones((3, 100)), np.zeros((3, 100)), group=["a"] * 100)
    assert one_group.evidence() == "no evidence"


def test_corrected_p_decides() -> None:
    rng = np.random.default_rng(0)
    difference = compare_correctness(rng.random((5, 500)) < 0.8, rng.random((5, 500)) < 0.7)
    assert difference.evidence() == "helps"
    assert difference.evidence(LEVEL) == "no evidence"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p: list[float]) -> None:
    rejected = set[int]()
    for step, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[index] * (len(p) - step) >= LEVEL:
            break
        rejected.add(index)
    corrected = holm(p)
    assert {index for index, value in enumerate(corrected) if value < LEVEL} == rejected
    assert all(low <= high <= 1 for low, high in zip(p, corrected, strict=True))


def test_holm_counts_comparisons_without_a_p() -> None:
    corrected = holm([0.02, math.nan, 0.5])
    assert corrected[0] == pytest.approx(0.06)
    assert math.isnan(corrected[1])


@pytest.mark.parametrize(
    ("a", "b", "group", "words"),
    [
        (np.ones(5), np.ones((2, 5)), None, r"a has the shape \(5,\)"),
        (np.ones((2, 5)), np.ones((2, 6)), None, "a has 5 test samples and b 6"),
        (np.ones((2, 5)), 2 * np.ones((2, 5)), None, "b has values outside"),
        (np.full((2, 5), np.nan), np.ones((2, 5)), None, "a has values outside"),
        (np.ones((2, 5)), np.ones((2, 5)), ["x"] * 4, "group has 4 values for 5"),
    ],
)
def test_invalid_arrays_raise(a: object, b: object, group: list[object] | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compare_correctness(a, b, group=group)  # type: ignore[arg-type]
