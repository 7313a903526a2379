"""Tests of binning: quotas are the largest and most uniform ones, checked against integer programming and numpy."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from mmaudit.rebalance.binning import (
    CURVE_TOLERANCES,
    assign_bins,
    balancing_weights,
    choose_num_bins,
    distance_to_uniform,
    largest_level,
    share_among_classes,
    share_total,
    size_curve,
    water_fill,
)

Counts = NDArray[np.int64]

# Discrepancies measured on RAVDESS, 1,440 samples in 20 bins (docs: 20 samples are exactly uniform).
RAVDESS = np.array([4, 7, 18, 33, 45, 62, 79, 98, 164, 206, 172, 140, 132, 91, 70, 53, 33, 23, 9, 1])

AVAILABLE = st.lists(st.integers(0, 12), min_size=2, max_size=6).map(np.array)
TOLERANCE = st.sampled_from([0.0, 0.01, 0.03, 0.05, 0.1, 0.2, 0.37, 1.0])


def cut_to(available: Counts, level: int) -> Counts:
    return np.minimum(available, level)


def slow_distance(mass: Counts, available: Counts) -> Fraction:
    """Compute the total-variation distance to uniform exactly."""
    filled = [int(count) for count, total in zip(mass, available, strict=True) if total]
    return sum((abs(Fraction(count, sum(filled)) - Fraction(1, len(filled))) for count in filled), Fraction(0)) / 2


@settings(deadline=None)
@given(AVAILABLE.filter(np.any), TOLERANCE)
def test_level_is_the_largest_within_tolerance(available: Counts, tolerance: float) -> None:
    fitting = [
        level
        for level in range(1, int(available.max()) + 1)
        if slow_distance(cut_to(available, level), available) <= Fraction(str(tolerance))
    ]
    assert largest_level(available, tolerance=tolerance) == max(fitting)


@settings(deadline=None, max_examples=60)
@given(AVAILABLE, TOLERANCE.filter(lambda value: value < 1))
def test_no_set_within_tolerance_reaches_the_next_level(available: Counts, tolerance: float) -> None:
    """An exact search over all counts, not only levels, stays below the next level: at most a remainder is lost."""
    filled = available[available > 0]
    assume(len(filled))
    level = largest_level(available, tolerance=tolerance)
    best = best_size(filled, tolerance)
    assert cut_to(available, level).sum() <= best
    if level < available.max():
        assert best < cut_to(available, level + 1).sum()


def best_size(available: Counts, tolerance: float) -> int:
    """Compute the size of the largest set within the tolerance by integer programming.

    Unknowns are b counts x and b bounds d >= |b x - N|, with N the sum of x and the sum of d at most 2 b tolerance N.
    """
    bins = len(available)
    over = bins * np.eye(bins) - np.ones((bins, bins))
    signs = [np.c_[over, -np.eye(bins)], np.c_[-over, -np.eye(bins)]]
    total = np.r_[np.full(bins, -2 * bins * tolerance), np.ones(bins)]
    solution = milp(
        c=np.r_[-np.ones(bins), np.zeros(bins)],
        constraints=LinearConstraint(np.vstack([*signs, total]), ub=0.0),
        bounds=Bounds(0, np.r_[available, np.full(bins, np.inf)]),
        integrality=np.r_[np.ones(bins), np.zeros(bins)],
    )
    assert solution.success
    return round(-float(solution.fun))


@settings(deadline=None, max_examples=60)
@given(AVAILABLE.filter(np.any), st.data())
def test_water_fill_is_the_most_uniform_set_of_its_size(available: Counts, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, int(available.sum())))
    filled = available[available > 0]
    bins = len(filled)
    eye, uniform = np.eye(bins), np.full(bins, size / bins)
    solution = milp(  # unknowns: b counts x, and b bounds d >= |x - N / b| with minimal sum
        c=np.r_[np.zeros(bins), np.ones(bins)],
        constraints=[
            LinearConstraint(np.c_[eye, -eye], ub=uniform),
            LinearConstraint(np.c_[-eye, -eye], ub=-uniform),
            LinearConstraint(np.r_[np.ones(bins), np.zeros(bins)][None], lb=size, ub=size),
        ],
        bounds=Bounds(0, np.r_[filled, np.full(bins, np.inf)]),
        integrality=np.r_[np.ones(bins), np.zeros(bins)],
    )
    assert solution.success
    quota = water_fill(available, size, np.argsort(-available, kind="stable"))
    assert quota.sum() == size
    assert float(slow_distance(quota, available)) == pytest.approx(float(solution.fun) / 2 / size, abs=1e-9)


@settings(deadline=None)
@given(AVAILABLE.filter(np.any))
def test_size_grows_with_tolerance(available: Counts) -> None:
    points = size_curve([available], CURVE_TOLERANCES)
    assert [point.tolerance for point in points] == sorted(CURVE_TOLERANCES)
    assert [point.size for point in points] == sorted(point.size for point in points)
    assert [point.distance for point in points] == sorted(point.distance for point in points)
    assert all(point.distance <= point.tolerance + 1e-9 for point in points)
    assert size_curve([available], (1.0,))[0].size == available.sum()


def test_size_curve_of_ravdess() -> None:
    exact, five, ten = size_curve([RAVDESS], (0.0, 0.05, 0.1))
    assert RAVDESS.sum() == 1_440
    assert exact.size == 20
    assert five.size == pytest.approx(95, abs=10)
    assert ten.size == pytest.approx(200, abs=20)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 80), st.randoms(use_true_random=False))
def test_water_fill_equals_one_unit_at_a_time(sizes: list[int], total: int, random: Any) -> None:
    order = random.sample(range(len(sizes)), len(sizes))
    expected, remaining = [0] * len(sizes), min(total, sum(sizes))
    while remaining:
        for index in order:
            if remaining and expected[index] < sizes[index]:
                expected[index] += 1
                remaining -= 1
    filled = water_fill(np.array(sizes), total, np.array(order))
    # Units are given round by round, in the last round too to those of `order` that are not full.
    assert filled.tolist() == expected


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6), st.floats(0, 1))
def test_bins_are_shared_evenly_among_classes(b: int, k: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 10, (b, k))
    quota = np.floor(counts.sum(axis=1) * share).astype(np.int64)
    quotas = share_among_classes(counts, quota)
    assert quotas.sum(axis=1).tolist() == quota.tolist()
    assert (quotas <= counts).all()
    for kept, available in zip(quotas, counts, strict=True):
        assert (kept[kept < available] >= kept.max() - 1).all()


def test_remainders_are_spread_over_classes() -> None:
    quotas = share_among_classes(np.full((9, 3), 5), np.full(9, 4))
    assert quotas.sum(axis=0).tolist() == [12, 12, 12]


@pytest.mark.parametrize("num_bins", [2, 5, 20])
def test_bins_of_ends_and_middle(num_bins: int) -> None:
    bins = assign_bins(np.array([-1, 0, 1], np.float32), num_bins=num_bins)
    assert bins.tolist() == [0, num_bins // 2, num_bins - 1]


@given(st.floats(-1, 1, width=32), st.integers(2, 50))
def test_bins_have_equal_width(value: float, num_bins: int) -> None:
    assume(value == 0 or abs(value) > 1e-6)  # 1 + value is then exact
    expected = min(num_bins - 1, floor((Fraction(value) + 1) / 2 * num_bins))
    assert assign_bins(np.array([value], np.float32), num_bins=num_bins).tolist() == [expected]


def test_distance_ignores_empty_bins() -> None:
    available = np.array([0, 5, 5, 0])
    assert distance_to_uniform(np.array([0, 2, 2, 0]), available=available) == 0
    assert distance_to_uniform(np.array([0, 3, 1, 0]), available=available) == 0.25
    assert distance_to_uniform(np.array([0, 4, 0, 0]), available=available) == 0.5
    assert distance_to_uniform(np.zeros(4), available=np.zeros(4)) == 0


@given(AVAILABLE.filter(np.any), st.sampled_from([1.0, 1.5, 3.0, 100.0]))
def test_weights_equalise_bins_up_to_the_cap(available: Counts, max_weight: float) -> None:
    weight, filled = balancing_weights(available, max_weight=max_weight), available > 0
    assert weight.max() <= max_weight
    assert (weight[~filled] == 0).all()
    uncapped = filled & (weight < max_weight)
    mass, uniform = weight * available, available.sum() / filled.sum()
    assert mass[uncapped] == pytest.approx(np.full(uncapped.sum(), uniform))
    assert (mass <= uniform + 1e-9).all()
    if max_weight == 100:  # above any count: no weight is capped
        assert mass.sum() == pytest.approx(available.sum())


@settings(deadline=None)
@given(AVAILABLE.filter(np.any), st.data())
def test_share_total_is_proportional(counts: Counts, data: st.DataObject) -> None:
    total = data.draw(st.integers(0, int(counts.sum())))
    shares = share_total(total, counts)
    assert shares.sum() == total
    assert (shares <= counts).all()
    assert (np.abs(shares - total * counts / counts.sum()) < 1).all()


@pytest.mark.parametrize("shape", [(5.0, 5.0), (0.4, 0.4), (2.0, 9.0), (1.0, 1.0)])
def test_num_bins_matches_numpy(shape: tuple[float, float]) -> None:
    values = 2 * np.random.default_rng(0).beta(*shape, 3_000) - 1
    counts, edges = np.histogram(values, bins=4_096, range=(-1, 1))
    expected = len(np.histogram_bin_edges(values, "fd", range=(-1, 1))) - 1
    assert 4 < expected < 100
    assert choose_num_bins((edges[1:] + edges[:-1]) / 2, counts) == pytest.approx(expected, abs=1)


def test_num_bins_is_between_4_and_100() -> None:
    middles = (np.arange(4_096) + 0.5) / 2_048 - 1
    counts = np.zeros(4_096, dtype=np.int64)
    assert choose_num_bins(middles, counts) == 4
    counts[[0, -1]] = 1
    assert choose_num_bins(middles, counts) == 4
    counts[7] = 10**9  # no spread: the width would be 0
    assert choose_num_bins(middles, counts) == 100
