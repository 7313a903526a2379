"""Rank agreement: equal to scipy's Spearman, of known correlations, and with a ceiling that simulation reaches."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import cohen_kappa_score

from mmaudit.audit.agreement import MIN_SAMPLES, ceiling, rank_agreement, reliability_of_mean, side_agreement

RNG = np.random.default_rng(0)


def test_one_class_gives_spearman_of_scipy_with_ties_too() -> None:
    a = np.round(RNG.normal(size=300), 1)
    b = np.round(a + RNG.normal(size=300), 1)
    assert rank_agreement(a, b).value == pytest.approx(spearmanr(a, b).statistic)


def test_several_classes_of_one_size_give_the_mean_spearman_within_classes() -> None:
    label = np.repeat([0, 1, 2], 100)
    a = RNG.normal(size=300) + 5 * label
    b = a - 5 * label + RNG.normal(size=300) - 5 * label  # the classes lean the other way: pooled, about -1
    within = [spearmanr(a[label == name], b[label == name]).statistic for name in range(3)]
    assert rank_agreement(a, b, label=label).value == pytest.approx(np.mean(within))
    pooled = rank_agreement(a, b).value
    assert pooled is not None
    assert pooled < -0.5 < 0.5 < np.mean(within)


def test_agreement_is_symmetric_odd_and_independent_of_the_order_of_rows() -> None:
    label, a = np.arange(200) % 4, RNG.normal(size=200)
    b = a + RNG.normal(size=200)
    ids = [f"s{row}" for row in range(200)]
    straight = rank_agreement(a, b, label=label, sample_id=ids)
    assert rank_agreement(b, a, label=label, sample_id=ids) == straight
    opposite = rank_agreement(a, -b, label=label, sample_id=ids)
    assert straight.value is not None
    assert opposite.value == pytest.approx(-straight.value)
    order = RNG.permutation(200)
    again = rank_agreement(a[order], b[order], label=label[order], sample_id=[ids[row] for row in order])
    assert [again.value, again.low, again.high] == pytest.approx([straight.value, straight.low, straight.high])


@pytest.mark.parametrize("groups", [None, 20])
def test_intervals_cover_a_known_correlation(groups: int | None) -> None:
    """95% of 60 intervals is 57; with a true coverage of .95 fewer than 51 occur once in 300 times."""
    rng = np.random.default_rng(1)
    rho, n, covered = 0.5, 300, 0
    for _ in range(60):
        group = None if groups is None else np.arange(n) % groups
        noise = rng.normal(size=(2, n)) if group is None else 0.8 * rng.normal(size=(2, n))
        if group is not None:
            noise += 0.6 * rng.normal(size=(2, groups or 1))[:, group]
        a, b = noise[0], rho * noise[0] + np.sqrt(1 - rho**2) * noise[1]
        agreement = rank_agreement(a, b, group=group)
        assert agreement.low is not None
        assert agreement.high is not None
        covered += agreement.low <= 6 / np.pi * np.arcsin(rho / 2) <= agreement.high
    assert covered >= 51


def test_groups_widen_the_interval_where_their_samples_are_alike() -> None:
    group = np.repeat(np.arange(20), 20)
    shared = RNG.normal(size=(2, 20))[:, group] + 0.2 * RNG.normal(size=(2, 400))
    grouped, single = rank_agreement(*shared, group=group), rank_agreement(*shared)
    assert grouped.low is not None
    assert grouped.high is not None
    assert single.low is not None
    assert single.high is not None
    assert grouped.high - grouped.low > 2 * (single.high - single.low)


def test_missing_values_constants_and_few_samples_have_no_agreement() -> None:
    a = RNG.normal(size=100)
    b = np.where(np.arange(100) < 40, np.nan, a)
    assert rank_agreement(a, b).num_samples == 60
    assert rank_agreement(a, b).value == pytest.approx(1)
    assert rank_agreement(a, np.ones(100)).value is None
    assert rank_agreement(a[: MIN_SAMPLES - 1], a[: MIN_SAMPLES - 1]).value is None
    one_group = rank_agreement(a, a, group=["same"] * 100)
    assert (one_group.low, one_group.high) == (-1.0, 1.0)


@pytest.mark.parametrize("threshold", [0, 0.2])
def test_kappa_equals_that_of_scikit_learn(threshold: float) -> None:
    a = RNG.uniform(-1, 1, size=200)
    b = np.clip(a + 0.4 * RNG.normal(size=200), -1, 1)
    sides = [np.sign(values) * (np.abs(values) > threshold) for values in (a, b)]
    agreement = side_agreement(a, b, threshold=threshold)
    assert agreement.value == pytest.approx(cohen_kappa_score(*sides))
    assert agreement.value is not None
    assert agreement.low is not None
    assert agreement.high is not None
    assert agreement.low < agreement.value < agreement.high


def test_kappa_of_one_side_only_is_undefined() -> None:
    assert side_agreement([0.5] * 30, [0.7] * 30, threshold=0).value is None


def test_two_noisy_measures_reach_their_ceiling_and_no_more() -> None:
    truth = RNG.normal(size=20_000)
    measures = [truth + scale * RNG.normal(size=20_000) for scale in (0.5, 1.0)]
    reliabilities = [1 / (1 + scale**2) for scale in (0.5, 1.0)]
    largest = ceiling(*reliabilities)
    assert pearsonr(*measures).statistic == pytest.approx(largest, abs=0.02)
    assert ceiling(None, 0.5) is None


def test_reliability_of_a_mean_is_that_of_simulated_means() -> None:
    truth = RNG.normal(size=20_000)
    single = truth + RNG.normal(size=(2, 5, 20_000))
    r = pearsonr(single[0, 0], single[1, 0]).statistic
    means = single.mean(axis=1)
    assert reliability_of_mean(float(r), 5) == pytest.approx(pearsonr(*means).statistic, abs=0.02)
    assert reliability_of_mean(-0.1, 5) == 0
