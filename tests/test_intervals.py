"""Tests of intervals: equal to scipy's for independent samples, and not narrower for grouped ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mmaudit.audit.metrics import group_codes, mean_interval, share_interval, wilson_interval


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy(counts: tuple[int, int]) -> None:
    low, high = wilson_interval(*counts)
    expected = stats.binomtest(*counts).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=40).filter(lambda values: float(np.std(values)) > 1e-6))
def test_mean_interval_without_groups_equals_students_t(values: list[float]) -> None:
    interval = mean_interval(np.array(values), None, low=-99, high=99)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert interval == pytest.approx({"mean": np.mean(values), "low": low, "high": high}, abs=1e-6)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=20), st.integers(1, 6))
def test_copies_within_a_group_do_not_narrow_the_interval(values: list[float], times: int) -> None:
    """Without groups, copies make the interval narrower."""
    single = mean_interval(np.array(values), None)
    repeated, groups = np.repeat(values, times), np.repeat(np.arange(len(values)), times)
    grouped = mean_interval(repeated, groups)
    assert list(grouped.values()) == pytest.approx(list(single.values()), abs=1e-6)
    if times > 1 and np.std(values) > 0.1:
        ungrouped = mean_interval(repeated, None)
        is_cut = grouped["low"] == -1 or grouped["high"] == 1
        assert is_cut or ungrouped["high"] - ungrouped["low"] < grouped["high"] - grouped["low"]


def test_mean_interval_by_groups_has_nominal_coverage() -> None:
    """20 groups have an offset each: 95% of intervals by groups contain the true mean, far fewer of those without."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 10)
    num_covered = {"by groups": 0, "ungrouped": 0}
    for _ in range(400):
        values = rng.normal(0, 0.3, 20)[groups] + rng.normal(0, 0.3, 200)
        for name, used_groups in (("by groups", groups), ("ungrouped", None)):
            interval = mean_interval(values, used_groups, low=-9, high=9)
            num_covered[name] += interval["low"] <= 0 <= interval["high"]
    assert 0.92 < num_covered["by groups"] / 400 < 0.98
    assert num_covered["ungrouped"] / 400 < 0.75


def test_single_group_gives_full_range() -> None:
    assert mean_interval(np.array([0.2, 0.4]), np.zeros(2, np.int64)) == {
        "mean": pytest.approx(0.3),
        "low": -1,
        "high": 1,
    }
    interval = share_interval(np.array([True, False, True, True]), np.zeros(4, np.int64))
    assert interval == {"n": 3, "share": 0.75, "low": 0, "high": 1}


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=40))
def test_groups_never_narrow_the_interval_of_a_share(rows: list[tuple[bool, int]]) -> None:
    is_hit, groups = np.array([row[0] for row in rows]), np.unique([row[1] for row in rows], return_inverse=True)[1]
    ungrouped, grouped = share_interval(is_hit, None), share_interval(is_hit, groups.astype(np.int64))
    assert (ungrouped["low"], ungrouped["high"]) == wilson_interval(int(is_hit.sum()), len(is_hit))
    assert grouped["low"] <= ungrouped["low"] <= ungrouped["share"] <= ungrouped["high"] <= grouped["high"]
    assert (grouped["n"], grouped["share"]) == (ungrouped["n"], ungrouped["share"])


def test_group_codes_are_equal_within_a_group() -> None:
    assert group_codes(None) is None
    codes = group_codes(np.array(["b", "a", "b", None, None], dtype=object))
    assert codes is not None
    assert codes[0] == codes[2] != codes[1]
    assert codes[3] == codes[4]
    assert len(set(codes.tolist())) == 3
