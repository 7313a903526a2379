"""Laws of intervals: those of scipy where samples stand alone, and no narrower where they stand together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mmaudit.audit.intervals import group_codes, mean, share, wilson


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy(counts: tuple[int, int]) -> None:
    low, high = wilson(*counts)
    expected = stats.binomtest(*counts).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=40).filter(lambda values: float(np.std(values)) > 1e-6))
def test_mean_interval_without_groups_equals_students_t(values: list[float]) -> None:
    found = mean(np.array(values), None, low=-99, high=99)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((np.mean(values), low, high), abs=1e-6)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=20), st.integers(1, 6))
def test_copies_within_a_group_do_not_narrow_the_interval(values: list[float], times: int) -> None:
    """So it is not without groups: there, copies make the interval narrower."""
    once = mean(np.array(values), None)
    repeated, groups = np.repeat(values, times), np.repeat(np.arange(len(values)), times)
    many = mean(repeated, groups)
    assert list(many.values()) == pytest.approx(list(once.values()), abs=1e-6)
    if times > 1 and np.std(values) > 0.1:
        alone = mean(repeated, None)
        assert alone["high"] - alone["low"] < many["high"] - many["low"] or many["low"] == -1 or many["high"] == 1


def test_mean_interval_by_groups_has_nominal_coverage() -> None:
    """20 groups share an offset each: 95% of intervals by groups hold the truth, far fewer of those without."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 10)
    covered = {"by groups": 0, "alone": 0}
    for _ in range(400):
        values = rng.normal(0, 0.3, 20)[groups] + rng.normal(0, 0.3, 200)
        for name, each in (("by groups", groups), ("alone", None)):
            found = mean(values, each, low=-9, high=9)
            covered[name] += found["low"] <= 0 <= found["high"]
    assert 0.92 < covered["by groups"] / 400 < 0.98
    assert covered["alone"] / 400 < 0.75


def test_single_group_gives_full_range() -> None:
    assert mean(np.array([0.2, 0.4]), np.zeros(2, np.int64)) == {"mean": pytest.approx(0.3), "low": -1, "high": 1}
    found = share(np.array([True, False, True, True]), np.zeros(4, np.int64))
    assert found == {"n": 3, "share": 0.75, "low": 0, "high": 1}


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=40))
def test_groups_never_narrow_the_interval_of_a_share(rows: list[tuple[bool, int]]) -> None:
    hit, groups = np.array([row[0] for row in rows]), np.unique([row[1] for row in rows], return_inverse=True)[1]
    alone, grouped = share(hit, None), share(hit, groups.astype(np.int64))
    assert (alone["low"], alone["high"]) == wilson(int(hit.sum()), len(hit))
    assert grouped["low"] <= alone["low"] <= alone["share"] <= alone["high"] <= grouped["high"]
    assert (grouped["n"], grouped["share"]) == (alone["n"], alone["share"])


def test_group_codes_are_equal_within_a_group() -> None:
    assert group_codes(None) is None
    found = group_codes(np.array(["b", "a", "b", None, None], dtype=object))
    assert found is not None
    assert found[0] == found[2] != found[1]
    assert found[3] == found[4]
    assert len(set(found.tolist())) == 3
