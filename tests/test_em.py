"""EM of two Gaussians: equal to scikit-learn step by step, with a monotone posterior in float32."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from mmaudit.audit.errors import MixtureError
from mmaudit.audit.scores import em
from mmaudit.audit.scores.em import Bounds, Component, MonotoneLogit, Pair, fit_pair, posterior

Floats = NDArray[np.float64]

NUM_STEPS = 20
# Never stops early.
PLAIN = Bounds(tolerance=-1.0, max_steps=NUM_STEPS, min_sd=1e-6, min_sd_ratio=0.0, max_sd_ratio=1e9)
BOUNDED = Bounds(tolerance=1e-8, max_steps=1000, min_sd=0.01, min_sd_ratio=0.1, max_sd_ratio=1.0)
NUMBERS = {
    "clear": ((0.5, 0.2, 0.06), (0.5, 0.75, 0.08)),
    "steep": ((0.5, 0.0, 0.01), (0.5, 1.0, 0.01)),  # p falls from 1 to 0 within 0.003
    "needle": ((0.3, 0.01, 0.001), (0.7, 0.02, 0.003)),  # within 3e-5
    "wide": ((0.5, 0.3, 0.3), (0.5, 0.5, 0.05)),
    "flat": ((0.4, 0.5, 0.2), (0.6, 0.5, 0.2)),
    "low": ((0.9, 0.05, 0.02), (0.1, 0.4, 0.25)),
}


def pair(numbers: tuple[tuple[float, float, float], ...]) -> Pair:
    low, high = (Component(weight=w, mean=m, sd=s) for w, m, s in numbers)
    return low, high


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    weight = draw(st.floats(0.01, 0.99))
    low, high = sorted([draw(st.floats(0, 1)), draw(st.floats(0, 1))])
    sds = st.floats(0.001, 0.6)
    return pair(((weight, low, draw(sds)), (1 - weight, high, draw(sds))))


def drawn(name: str) -> Floats:
    rng = np.random.default_rng(0)
    first, normal = rng.random(5_000) < 0.5, rng.standard_normal(5_000)
    shapes = {
        "normal": 0.5 + 0.15 * normal,
        "half-normal": np.abs(0.25 * normal),
        "uniform": rng.random(5_000),
        "saturated": rng.beta(0.3, 0.3, 5_000),
        "spike": np.where(first, np.abs(0.02 * normal), rng.beta(2, 3, 5_000)),
        "bimodal": np.where(first, 0.2 + 0.06 * normal, 0.75 + 0.08 * normal),
        "two widths": np.where(first, 0.5 + 0.03 * normal, 0.5 + 0.2 * normal),
    }
    return np.sort(shapes[name].clip(0.0, 1.0))


def closed_form(gap: NDArray[np.floating], two: Pair) -> Floats:
    logit = MonotoneLogit.of(two).at(gap.astype(np.float64))
    return np.asarray(1.0 / (1.0 + np.exp(-logit.clip(-80, 80))))


def neighbours(first: float, num: int) -> NDArray[np.float32]:
    """Return the num float32 numbers from first on."""
    start = int(np.float32(first).view(np.int32))
    return np.arange(start, start + num, dtype=np.int32).view(np.float32)


@pytest.mark.parametrize("name", ["normal", "half-normal", "uniform", "saturated", "spike", "bimodal", "two widths"])
def test_em_steps_equal_sklearn(name: str) -> None:
    """Without bounds, on unbinned values, from the same start: equal components after 20 steps."""
    values = drawn(name)
    fitted_pair, _ = fit_pair(values, np.full(len(values), 1 / len(values)), bounds=PLAIN)
    cut = 1 + np.argmin([values[:k].var() * k + values[k:].var() * (len(values) - k) for k in range(1, len(values))])
    halves = values[:cut], values[cut:]
    reference = GaussianMixture(
        2,
        tol=0.0,
        max_iter=NUM_STEPS,
        reg_covar=0.0,
        weights_init=[len(half) / len(values) for half in halves],
        means_init=[[half.mean()] for half in halves],
        precisions_init=[[[1 / half.var()]] for half in halves],
    )
    with pytest.warns(ConvergenceWarning):
        reference.fit(values[:, None])
    fitted = sorted((c.mean, c.sd, c.weight) for c in fitted_pair)
    expected = zip(reference.means_.ravel(), np.sqrt(reference.covariances_.ravel()), reference.weights_, strict=True)
    assert np.allclose(fitted, sorted(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["normal", "half-normal", "saturated", "spike", "bimodal"])
def test_shares_equal_repeated_values(name: str) -> None:
    values = drawn(name).round(2)
    points, counts = np.unique(values, return_counts=True)
    weighted_pair, weighted_likelihood = fit_pair(points, counts / len(values), bounds=BOUNDED)
    pair_of_values, likelihood = fit_pair(values, np.full(len(values), 1 / len(values)), bounds=BOUNDED)
    assert weighted_likelihood == pytest.approx(likelihood, abs=1e-9)
    assert [c.mean for c in weighted_pair] == pytest.approx([c.mean for c in pair_of_values], abs=1e-6)
    assert weighted_pair[0].mean <= weighted_pair[1].mean
    assert weighted_pair[0].weight + weighted_pair[1].weight == pytest.approx(1.0)
    assert 0.1 - 1e-9 <= weighted_pair[0].sd / weighted_pair[1].sd <= 1.0 + 1e-9


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(deadline=None)
@given(two=pairs(), gaps=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50))
def test_posterior_equals_the_closed_form(dtype: type[np.floating], two: Pair, gaps: list[float]) -> None:
    """Also where it is steepest, where the errors of the table and of float32 are largest."""
    logit = MonotoneLogit.of(two)
    ends = np.linspace(logit.gap_at(17.0), logit.gap_at(-17.0), 501)
    gap = np.sort(np.concatenate([gaps, ends])).astype(dtype)
    p = posterior(gap, two)
    assert p.dtype == np.float32
    assert np.abs(p - closed_form(gap, two)).max() < 1e-5
    assert p.min() >= 0.0
    assert p.max() <= 1.0
    assert (np.diff(p) <= 0).all()


@settings(deadline=None)
@given(pairs())
def test_logit_equals_bayes_where_it_decreases(two: Pair) -> None:
    grid = np.linspace(0.0, 1.0, 1001)
    low, high = two
    bayes = low.log_density(grid) - high.log_density(grid)
    logit = MonotoneLogit.of(two).at(grid)
    monotone = np.maximum.accumulate(bayes[::-1])[::-1] if low.sd <= high.sd else np.minimum.accumulate(bayes)
    falls = monotone == bayes
    falls[1:-1] &= falls[:-2] & falls[2:]  # not a point that lies past the turn by less than a step
    falls[[0, -1]] = False
    assert np.allclose(logit[falls], bayes[falls], rtol=1e-6, atol=1e-6 * np.abs(bayes).max() + 1e-9)
    assert (np.diff(logit) <= 0).all()


@settings(deadline=None)
@given(pairs(), st.floats(-30, 30))
def test_gap_at_inverts_the_logit(two: Pair, value: float) -> None:
    logit = MonotoneLogit.of(two)
    gap = logit.gap_at(value)
    assert 0.0 <= gap <= 1.0
    logit_at_gap = float(logit.at(np.array(gap)))
    low, high = float(logit.at(np.array(1.0))), float(logit.at(np.array(0.0)))
    if low <= value <= high:
        assert logit_at_gap == pytest.approx(value, rel=1e-6, abs=1e-6 * max(abs(low), abs(high), 1.0))


@pytest.mark.parametrize("name", NUMBERS)
def test_posterior_does_not_increase_between_neighbouring_float32(name: str) -> None:
    """All 33 million numbers from 1/16 to 1, and a million from each of twenty smaller starts."""
    two = pair(NUMBERS[name])
    before = np.float32(1.0)
    places = [0.0, *(2.0**-k for k in range(30, 4, -2)), 0.01, 0.011, 0.0115, 0.012, 0.02, 0.05]
    for first, num in [*((start, 1 << 20) for start in sorted(places)), *((2.0**-k, 1 << 23) for k in (4, 3, 2, 1))]:
        p = posterior(neighbours(first, num), two)
        assert p[0] <= before
        assert (p[1:] <= p[:-1]).all()
        before = p[0]
    assert posterior(np.array([1.0], dtype=np.float32), two)[0] <= p[-1]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_number_of_threads_does_not_change_the_posterior(
    dtype: type[np.floating], num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gap = np.random.default_rng(0).random(300_001).astype(dtype)
    two = pair(NUMBERS["clear"])
    alone = posterior(gap, two)
    monkeypatch.setattr(em, "default_workers", lambda: num_threads)
    monkeypatch.setattr(em, "ROWS_PER_THREAD", 10_000)
    assert em.in_threads(lambda rows: rows.stop - rows.start, len(gap)) != [len(gap)]
    assert posterior(gap, two).tobytes() == alone.tobytes()
    assert posterior(gap[::-1], two).tobytes() == alone[::-1].tobytes()
    assert np.array_equal(alone, np.concatenate([posterior(part, two) for part in np.array_split(gap, 7)]))


@pytest.mark.parametrize("row", [0, 70_000, 299_999])
@pytest.mark.parametrize("invalid", [np.nan, -0.01, 1.01])
def test_invalid_gap_is_found_in_any_thread(row: int, invalid: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(em, "default_workers", lambda: 3)
    monkeypatch.setattr(em, "ROWS_PER_THREAD", 10_000)
    gap = np.full(300_000, 0.5)
    gap[row] = invalid
    for use in (em.check_gap, lambda g: posterior(g, pair(NUMBERS["clear"])), lambda g: em.threshold_rule(g, 0.2)):
        with pytest.raises(MixtureError, match=rf"1 of 300000 values do not, the first is {invalid} at row {row}"):
            use(gap)


@given(st.integers(0, 10**7), st.integers(1, 16))
def test_threads_process_every_row_once(num_rows: int, num_threads: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(em, "default_workers", lambda: num_threads)
        ranges = em.in_threads(lambda rows: (rows.start, rows.stop), num_rows)
    assert len(ranges) <= min(num_threads, em.MAX_THREADS)
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == num_rows


def test_ashman_d_and_bic_by_hand() -> None:
    low, high = pair(((0.5, 0.2, 0.3), (0.5, 0.7, 0.4)))
    assert em.ashman_d((low, high)) == pytest.approx(math.sqrt(2) * 0.5 / 0.5)
    assert em.bic(-0.5, num_parameters=2, num_samples=100) == pytest.approx(2 * math.log(100) + 100)
