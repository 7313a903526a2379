"""The dip test: the definition by linear programming, the published table, and histograms."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from mmaudit.audit.errors import MixtureError
from mmaudit.audit.scores.dip import LEVELS, QUANTILES, SIZES, dip, dip_of_histogram, dip_p_of_counts, dip_p_value

tied = st.lists(st.integers(0, 12).map(lambda k: k / 12), min_size=1, max_size=14)
distinct = st.lists(st.integers(0, 10_000).map(lambda k: k / 10_000), min_size=1, max_size=14, unique=True)


def curved(knots: np.ndarray, size: int, offset: int, sign: int) -> list[np.ndarray]:
    """Build rows of A u <= 0 that make u, from offset on, convex (sign 1) or concave (-1) on the knots."""
    rows = []
    for j in range(len(knots) - 2):
        before, after = knots[j + 1] - knots[j], knots[j + 2] - knots[j + 1]
        row = np.zeros(size)
        row[offset + j : offset + j + 3] = sign * np.array([-after, before + after, -before])
        rows.append(row)
    return rows


def distance_with_mode(knots: np.ndarray, below: np.ndarray, above: np.ndarray, mode: int) -> float:
    """Compute the distance to the nearest function convex before knots[mode], concave after it, with a jump there."""
    num_before, num_after = mode + 1, len(knots) - mode
    size = num_before + num_after + 1  # u before the mode, u after it, the distance
    rows = curved(knots[:num_before], size, 0, 1) + curved(knots[mode:], size, num_before, -1)
    bounds = [0.0] * len(rows)
    targets = [(j, below[j]) for j in range(num_before)] + [(j, above[j]) for j in range(num_before - 1)]
    targets += [(num_before + j, above[mode + j]) for j in range(num_after)]
    targets += [(num_before + j, below[mode + j]) for j in range(1, num_after)]
    for j, target in targets:
        for sign in (1, -1):
            row = np.zeros(size)
            row[j], row[-1] = sign, -1
            rows.append(row)
            bounds.append(sign * target)
    rising = np.eye(num_before + num_after - 1, size) - np.eye(num_before + num_after - 1, size, k=1)
    cost = np.eye(size)[-1]
    solved = linprog(cost, np.vstack([*rows, rising]), [*bounds, *[0.0] * len(rising)], bounds=(None, None))
    return float(solved.fun)


def dip_by_definition(values: list[float]) -> float:
    knots, counts = np.unique(values, return_counts=True)
    above = np.cumsum(counts) / len(values)
    below = above - counts / len(values)
    distance = min(distance_with_mode(knots, below, above, mode) for mode in range(len(knots)))
    return max(distance, 0.5 / len(values))


@settings(max_examples=examples(60), derandomize=True)
@given(st.one_of(tied, distinct))
def test_dip_equals_its_definition(values: list[float]) -> None:
    assert dip(np.array(values)) == pytest.approx(dip_by_definition(values), abs=1e-9)


@settings(deadline=None)
@given(tied, st.sampled_from([0.5, 2.0, -1.0]), st.integers(-3, 3))
def test_dip_is_invariant_to_shift_scale_and_reflection(values: list[float], scale: float, shift: int) -> None:
    points = np.array(values)
    assert dip(scale * points + shift) == pytest.approx(dip(points), abs=1e-9)
    assert dip(points[::-1]) == dip(points)
    assert 0.5 / len(points) <= dip(points) <= 0.25 + 0.5 / len(points)


@pytest.mark.parametrize("num_values", [1, 2, 7, 1000])
def test_evenly_spaced_values_have_the_smallest_dip(num_values: int) -> None:
    assert dip(np.linspace(0, 1, num_values)) == pytest.approx(0.5 / num_values)


@pytest.mark.parametrize("smaller", [0.01, 0.1, 0.5])
def test_two_points_have_half_the_smaller_weight(smaller: float) -> None:
    ones = round(1000 * smaller)
    assert dip(np.repeat([0.0, 1.0], [1000 - ones, ones])) == pytest.approx(smaller / 2)


def test_single_point_and_shoulder_are_unimodal() -> None:
    spread = np.linspace(0, 1, 1001)
    assert dip(np.full(500, 0.3)) == pytest.approx(0.5 / 500)
    assert dip(np.concatenate([spread, np.full(500, 0.5)])) == pytest.approx(0.5 / 1501)


@pytest.mark.parametrize("values", [[], [0.1, np.nan], [0.1, np.inf]])
def test_non_finite_values_raise(values: list[float]) -> None:
    with pytest.raises(MixtureError, match="finite"):
        dip(np.array(values))


def test_p_value_is_uniform_for_uniform_values() -> None:
    rng = np.random.default_rng(0)
    p = np.array([dip_p_value(dip(rng.random(300)), num_values=300) for _ in range(1000)])
    for level in (0.05, 0.25, 0.5, 0.75):  # the row for 300 is read between 200 and 500; 4 sd of a share are 0.06
        assert np.mean(p <= level) == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 1000))


def test_quantiles_agree_with_the_published_table() -> None:
    """Hartigan & Hartigan 1985: at n = 100, 90% of uniform samples have a dip below 0.0471."""
    assert QUANTILES[SIZES.index(100), LEVELS.index(0.9)] == pytest.approx(0.471, abs=0.005)
    assert dip_p_value(0.0471, num_values=100) == pytest.approx(0.1, abs=0.01)


@given(st.floats(0, 0.25), st.floats(0, 0.25), st.integers(1, 10**9))
def test_p_value_does_not_increase_with_the_dip(first: float, second: float, num_values: int) -> None:
    small, large = sorted([first, second])
    assert 1.0 >= dip_p_value(small, num_values=num_values) >= dip_p_value(large, num_values=num_values) >= 0.000999


def test_dip_of_histogram_equals_dip_of_values() -> None:
    rng = np.random.default_rng(0)
    lumps = np.where(rng.random(50_000) < 0.3, rng.normal(0.2, 0.05, 50_000), rng.normal(0.7, 0.05, 50_000))
    narrow = rng.normal(0.5, 0.001, 50_000)  # eight bins hold most of it: the bins themselves must not count as modes
    for values, expected in ((lumps, dip(lumps)), (narrow, 0.0)):
        counts = np.bincount(np.rint(values * 4095).astype(int))
        assert dip_of_histogram(counts) == pytest.approx(expected, abs=0.002)
        assert (dip_p_of_counts(counts, num_values=10_000, seed=1) < 0.01) == (expected > 0.05)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(any))
def test_dip_of_histogram_is_that_of_values_spread_within_its_bins(heights: list[int]) -> None:
    per_count = 100
    spread = [bin + (np.arange(c * per_count) + 0.5) / (c * per_count) for bin, c in enumerate(heights) if c]
    values = np.concatenate(spread)
    assert dip_of_histogram(np.array(heights)) == pytest.approx(dip(values), abs=1 / len(values))
