"""The mixture of the gap: which gaps are bimodal, and a posterior that does not increase."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.mixture import GaussianMixture

from mmaudit.audit.errors import ConfigError, MixtureError
from mmaudit.audit.scores import em
from mmaudit.audit.scores.dip import dip
from mmaudit.audit.scores.em import Component
from mmaudit.audit.scores.mixture import Mixture, MixtureConfig, fit_counts, fit_mixture, histogram

CONFIG = MixtureConfig()
NUM_SAMPLES = 20_000
GRID = np.linspace(0.0, 1.0, 2001)
NOT_BIMODAL = ("normal", "half-normal", "uniform", "two widths")
BIMODAL = ("saturated", "spike", "bimodal")
UNBOUNDED = ("half-normal", "two widths", "bimodal")  # the bounds on the sds do nothing to these
BOUNDED = ("uniform", "saturated", "spike")


def shape(name: str, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    first = rng.random(NUM_SAMPLES) < 0.5
    normal = rng.standard_normal(NUM_SAMPLES)
    drawn = {
        "normal": 0.5 + 0.15 * normal,
        "half-normal": np.abs(0.25 * normal),
        "uniform": rng.random(NUM_SAMPLES),
        "saturated": rng.beta(0.3, 0.3, NUM_SAMPLES),
        "spike": np.where(first, np.abs(0.02 * normal), rng.beta(2, 3, NUM_SAMPLES)),
        "bimodal": np.where(first, 0.2 + 0.06 * normal, 0.75 + 0.08 * normal),
        "two widths": np.where(first, 0.5 + 0.03 * normal, 0.5 + 0.2 * normal),
    }
    return drawn[name].clip(0.0, 1.0)


def pair(*numbers: tuple[float, float, float]) -> Mixture:
    low, high = (Component(weight=w, mean=m, sd=s) for w, m, s in numbers)
    return Mixture(num_samples=100, threshold=0.2, reasons=(), dip=0.1, dip_p=0.001, components=(low, high))


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    weight = draw(st.floats(0.01, 0.99))
    low, high = sorted([draw(st.floats(0, 1)), draw(st.floats(0, 1))])
    sds = st.floats(0.01, 0.6)
    return pair((weight, low, draw(sds)), (1 - weight, high, draw(sds)))


@pytest.mark.parametrize("name", NOT_BIMODAL)
def test_unimodal_gaps_are_not_bimodal(name: str) -> None:
    mixture = fit_mixture(shape(name), config=CONFIG, seed=0)
    assert not mixture.bimodal
    assert mixture.rule == "threshold"
    assert mixture.dip < 0.007
    assert mixture.dip_p > 0.1
    assert mixture.reasons[0].startswith("dip 0.00")
    assert np.array_equal(mixture.posterior(GRID), (GRID <= 0.2).astype(np.float32))


@pytest.mark.parametrize("name", BIMODAL)
def test_two_groups_are_bimodal(name: str) -> None:
    gap = shape(name)
    mixture = fit_mixture(gap, config=CONFIG, seed=0)
    assert mixture.bimodal
    assert mixture.rule == "posterior"
    assert mixture.reasons == ()
    assert mixture.dip_p == pytest.approx(0.001)
    balanced = mixture.posterior(gap) >= 0.5
    assert gap[balanced].max() < gap[~balanced].min()
    assert 0.2 < balanced.mean() < 0.7


def test_bic_and_ashman_d_alone_give_false_positives() -> None:
    """The reason for the dip: BIC and Ashman's D both call a uniform gap bimodal, and BIC a half-normal one."""
    uniform = fit_mixture(shape("uniform"), config=CONFIG, seed=0)
    half = fit_mixture(shape("half-normal"), config=CONFIG, seed=0)
    assert uniform.bic_one is not None
    assert uniform.bic_two is not None
    assert uniform.ashman_d is not None
    assert half.bic_one is not None
    assert half.bic_two is not None
    assert uniform.bic_two < uniform.bic_one
    assert uniform.ashman_d > 3.0
    assert half.bic_two < half.bic_one


def test_planted_groups_are_recovered() -> None:
    mixture = fit_mixture(shape("bimodal"), config=CONFIG, seed=0)
    assert mixture.components is not None
    components = [(c.weight, c.mean, c.sd) for c in mixture.components]
    assert np.allclose(components, [(0.5, 0.2, 0.06), (0.5, 0.75, 0.08)], atol=0.01)
    assert mixture.ashman_d == pytest.approx(np.sqrt(2) * 0.55 / np.hypot(0.06, 0.08), rel=0.02)


@pytest.mark.parametrize("name", NOT_BIMODAL + BIMODAL)
def test_posterior_crosses_one_half_once(name: str) -> None:
    """Plain Bayes crosses 1/2 twice with unequal widths, and calls both extremes balanced."""
    balanced = fit_mixture(shape(name), config=CONFIG, seed=0).posterior(GRID) >= 0.5
    assert balanced[0]
    assert not balanced[-1]
    assert np.count_nonzero(np.diff(balanced)) == 1


def of_values(mixture: Mixture, gap: NDArray[np.float64]) -> float:
    """Compute the mean log-likelihood of the values, not of their bins."""
    assert mixture.components is not None
    low, high = mixture.components
    return float(np.logaddexp(low.log_density(gap), high.log_density(gap)).mean())


def sklearn_from_two_means(gap: NDArray[np.float64]) -> GaussianMixture:
    """Fit sklearn without bounds, to convergence, from the two-means start."""
    rising = np.sort(gap)
    weight = np.arange(1, len(gap)) / len(gap)
    moment = np.cumsum(rising)[:-1] / len(gap)
    cut = 1 + int(((moment - weight * gap.mean()) ** 2 / (weight * (1 - weight))).argmax())
    halves = rising[:cut], rising[cut:]
    start = {
        "weights_init": [len(half) / len(gap) for half in halves],
        "means_init": [[half.mean()] for half in halves],
        "precisions_init": [[[1 / half.var()]] for half in halves],
    }
    return GaussianMixture(2, tol=1e-9, max_iter=5000, reg_covar=0.0, **start).fit(gap[:, None])


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        *((name, False) for name in UNBOUNDED),
        *(pytest.param(name, True, marks=pytest.mark.slow if name == "uniform" else []) for name in BOUNDED),
    ],
)
def test_likelihood_equals_sklearn(name: str, plain: bool) -> None:
    """On unbinned values, to 1e-6 per sample: as configured where the bounds do not bind, else without them.

    Without the normal shape, whose likelihood is so flat that EM takes 6,000 steps: see test_em.py.
    """
    gap = shape(name)
    free = replace(CONFIG, min_sd=1e-3, min_sd_ratio=0.0, max_sd_ratio=1e9, tolerance=1e-10, max_steps=5000)
    mixture = fit_mixture(gap, config=free if plain else CONFIG, seed=0)
    reference = sklearn_from_two_means(gap)
    assert of_values(mixture, gap) == pytest.approx(reference.score(gap[:, None]), abs=1e-6)
    assert mixture.log_likelihood == pytest.approx(of_values(mixture, gap), abs=1e-3)  # reported: of the bins


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["saturated", "spike", "two widths"])
def test_no_component_collapses_onto_an_end(name: str, seed: int) -> None:
    """The unbounded fit of the saturated shape calls gaps up to 0.96 or up to 0.05 balanced, by the seed."""
    mixture = fit_mixture(shape(name, seed), config=CONFIG, seed=0)
    assert mixture.components is not None
    low, high = mixture.components
    assert 0.1 - 1e-9 <= low.sd / high.sd <= 1.0 + 1e-9
    assert 0.05 < GRID[mixture.posterior(GRID) >= 0.5].max() < 0.6


def test_bic_equals_sklearn() -> None:
    gap = shape("bimodal")
    mixture = fit_mixture(gap, config=CONFIG, seed=0)
    bic_one, bic_two = (
        GaussianMixture(k, tol=1e-8, random_state=0).fit(gap[:, None]).bic(gap[:, None]) for k in (1, 2)
    )
    assert mixture.bic_one == pytest.approx(bic_one, rel=1e-3)
    assert mixture.bic_two == pytest.approx(bic_two, rel=1e-3)


@settings(deadline=None)
@given(mixtures(), st.lists(st.floats(0, 1), min_size=2, max_size=50))
def test_posterior_does_not_increase(mixture: Mixture, gaps: list[float]) -> None:
    p = mixture.posterior(np.sort(np.concatenate([gaps, GRID])))
    assert p.dtype == np.float32
    assert p.min() >= 0.0
    assert p.max() <= 1.0
    assert (np.diff(p) <= 0).all()


@settings(deadline=None)
@given(mixtures())
def test_posterior_is_monotone_bayes(mixture: Mixture) -> None:
    """Bayes up to the vertex of its logit, a parabola; constant beyond."""
    assert mixture.components is not None
    low, high = mixture.components
    logit = np.clip(low.log_density(GRID) - high.log_density(GRID), -50, 50)
    bayes = 1.0 / (1.0 + np.exp(-logit))
    level = np.maximum.accumulate(bayes[::-1])[::-1] if low.sd <= high.sd else np.minimum.accumulate(bayes)
    posterior = mixture.posterior(GRID)
    assert np.allclose(posterior, level, atol=2e-3)  # the turn lies between two points of the grid
    assert np.allclose(posterior[bayes == level], bayes[bayes == level], atol=1e-4)


def test_wide_balanced_component_has_no_second_crossing() -> None:
    mixture = pair((0.5, 0.3, 0.3), (0.5, 0.5, 0.05))
    balanced, imbalanced = mixture.density(GRID)
    assert balanced[-1] > imbalanced[-1]  # plain Bayes calls the largest gaps balanced
    assert mixture.posterior(GRID)[-1] < 0.5


def test_narrow_balanced_component_is_balanced_down_to_zero() -> None:
    mixture = pair((0.5, 0.2, 0.02), (0.5, 0.5, 0.3))
    balanced, imbalanced = mixture.density(GRID)
    assert balanced[0] < imbalanced[0]  # plain Bayes calls the smallest gaps imbalanced
    assert mixture.posterior(GRID)[0] > 0.5


@settings(max_examples=examples(25))
@given(st.lists(st.floats(0, 1), min_size=1, max_size=200), st.integers(0, 5))
def test_mixture_does_not_depend_on_row_order(gaps: list[float], seed: int) -> None:
    gap = np.array(gaps)
    shuffled = np.random.default_rng(seed).permutation(gap)
    assert fit_mixture(gap, config=CONFIG, seed=1) == fit_mixture(shuffled, config=CONFIG, seed=1)


@given(st.lists(st.floats(0, 1), max_size=50), st.lists(st.floats(0, 1), max_size=50))
def test_histograms_of_shards_add_up(first: list[float], second: list[float]) -> None:
    combined = histogram(np.array(first + second), num_bins=64)
    assert np.array_equal(histogram(np.array(first), num_bins=64) + histogram(np.array(second), num_bins=64), combined)
    assert combined.sum() == len(first) + len(second)


def test_number_of_threads_does_not_change_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    gap = shape("saturated")
    alone = histogram(gap, num_bins=4096)
    assert np.array_equal(alone, np.bincount(np.rint(gap * 4095).astype(int), minlength=4096))
    monkeypatch.setattr(em, "default_workers", lambda: 3)
    monkeypatch.setattr(em, "ROWS_PER_THREAD", 1000)
    assert np.array_equal(histogram(gap, num_bins=4096), alone)


def test_merged_shards_give_the_same_mixture() -> None:
    gap = shape("spike").astype(np.float32)
    merged = sum((histogram(part, num_bins=4096) for part in np.array_split(gap, 7)), np.zeros(4096, dtype=np.int64))
    assert fit_counts(merged, config=CONFIG, seed=3) == fit_mixture(gap, config=CONFIG, seed=3)


@settings(max_examples=examples(25))
@given(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=1, max_size=60))
def test_json_round_trip_is_equality(gaps: list[float]) -> None:
    mixture = fit_mixture(np.array(gaps), config=CONFIG, seed=0)
    decoded = json.loads(json.dumps(mixture.to_json(), allow_nan=False))
    assert Mixture.from_json(decoded) == mixture
    assert decoded["bimodal"] == mixture.bimodal
    assert decoded["rule"] == mixture.rule


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dip": "0.1"}, "dip is"),
        ({"reasons": "none"}, "reasons is"),
        ({"components": {"mean": 0.1}}, "components is"),
        ({"components": [{"weight": "x", "mean": 0.1, "sd": 0.1}] * 2}, "weight is"),
        ({"components": [{"weight": 0.5, "mean": 0.1, "sd": 0.0}] * 2}, "not above 0"),
        ({"components": [{"weight": 0.5, "mean": 0.1}] * 2}, "lacks sd"),
        ({"bic_one": None}, "bic_one of a mixture with components"),
    ],
)
def test_malformed_json_raises(change: dict[str, object], reason: str) -> None:
    content = fit_mixture(np.repeat([0.0, 1.0], [60, 40]), config=CONFIG, seed=0).to_json()
    with pytest.raises(MixtureError, match=reason):
        Mixture.from_json({**content, **change})


def test_few_distinct_gaps_are_refused() -> None:
    """Every atom is a mode to the dip: gaps of two or four values were called bimodal always."""
    for atoms in ([0.0, 1.0], [0.0, 0.3, 0.6, 0.9]):
        mixture = fit_mixture(np.repeat(atoms, 2_000 // len(atoms)), config=CONFIG, seed=0)
        assert f"{len(atoms)} distinct values of the gap, at least 50 required" in mixture.reasons
    rng = np.random.default_rng(0)
    rounded = np.concatenate([rng.normal(0.2, 0.05, 500), rng.normal(0.8, 0.05, 500)]).clip(0, 1)
    assert fit_mixture(rounded.round(2), config=CONFIG, seed=0).bimodal  # 62 distinct values
    few = np.concatenate([rng.normal(0.2, 0.05, 15), rng.normal(0.8, 0.05, 15)]).clip(0, 1)
    assert "distinct" not in str(fit_mixture(few, config=CONFIG, seed=0).reasons)  # 30 samples: 15 are enough


def test_verdict_does_not_depend_on_the_seed_of_the_subsample() -> None:
    """At a dip near the bound that of 10,000 rows varies by .003, and the verdict did with it."""
    rng = np.random.default_rng(0)
    gap = np.concatenate([rng.normal(0.3, 0.1, 215_000), rng.normal(0.62, 0.08, 85_000)]).clip(0, 1)
    mixtures = [fit_mixture(gap, config=replace(CONFIG, min_dip=0.0135), seed=seed) for seed in range(8)]
    assert len({mixture.dip for mixture in mixtures}) == 1
    assert len({mixture.bimodal for mixture in mixtures}) == 1
    subsamples = [dip(rng.choice(gap, 10_000, replace=False)) for _ in range(8)]
    assert np.ptp(subsamples) > 0.001


@pytest.mark.parametrize(
    ("gaps", "reason"), [([0.3] * 50, "constant: 0.300"), ([0.1, 0.9], "available 2"), ([1], "available 1")]
)
def test_unfittable_gaps_give_a_mixture_without_components(gaps: list[float], reason: str) -> None:
    mixture = fit_mixture(np.array(gaps), config=CONFIG, seed=0)
    assert mixture.components is None
    assert reason in mixture.reasons[0]
    assert mixture.posterior(np.array([0.2, 0.21])).tolist() == [1.0, 0.0]
    assert not mixture.density(GRID).any()


@pytest.mark.parametrize("gap", [[0.1, np.nan], [np.inf, 0.1], [0.1, -0.01], [0.1, 1.01], [[0.1]], 0.1])
def test_invalid_gaps_raise(gap: float | list[float]) -> None:
    mixture = pair((0.5, 0.2, 0.1), (0.5, 0.8, 0.1))
    for use in (lambda g: fit_mixture(g, config=CONFIG, seed=0), mixture.posterior):
        with pytest.raises(MixtureError, match="the gap must"):
            use(np.array(gap))


def test_empty_gap_raises() -> None:
    with pytest.raises(MixtureError, match="no sample was scored"):
        fit_mixture(np.array([]), config=CONFIG, seed=0)


@pytest.mark.parametrize("broken", [{}, {"components": [{"weight": 1.0}]}])
def test_incomplete_json_raises(broken: dict[str, object]) -> None:
    values = {**fit_mixture(shape("spike"), config=CONFIG, seed=0).to_json(), **broken} if broken else {}
    with pytest.raises(MixtureError, match="rescore"):
        Mixture.from_json(values)


@pytest.mark.parametrize(
    "field", ["num_bins", "max_steps", "min_samples", "dip_rows", "tolerance", "min_sd", "dip_level"]
)
def test_config_out_of_range_raises(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(CONFIG, **{field: 0})


def test_small_component_is_not_a_group() -> None:
    rng = np.random.default_rng(0)
    gap = np.concatenate([np.abs(rng.normal(0.1, 0.05, 9_700)), rng.normal(0.8, 0.02, 300)])
    mixture = fit_mixture(gap, config=CONFIG, seed=0)
    assert mixture.reasons == ("smaller weight 0.030, at least 0.05 required",)
