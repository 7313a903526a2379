"""Tests of the metrics: effects of swapping modalities, ranges, references, and formulas by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import factorial

import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import trapezoid
from scipy.stats import norm
from sklearn.metrics import log_loss
from sklearn.metrics.pairwise import cosine_similarity

from mmaudit.audit import metrics
from mmaudit.audit.metrics import (
    Floats,
    ece_floor,
    expected_calibration_error,
    group_codes,
    mean_interval,
    share_interval,
    wilson_interval,
)

# A saturated float32 softmax gives exactly 0 and 1.
SHARES = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1e-30]), st.floats(0, 1, width=32))


def confidences(num_modalities: int | None = None) -> st.SearchStrategy[Floats]:
    """Return a strategy for arrays (n, m) in [0, 1]."""
    widths = st.integers(2, 6) if num_modalities is None else st.just(num_modalities)
    return widths.flatmap(
        lambda m: st.lists(st.lists(SHARES, min_size=m, max_size=m), min_size=1, max_size=12).map(
            lambda rows: np.array(rows, dtype=np.float32)
        )
    )


@st.composite
def probabilities(draw: st.DrawFn) -> list[Floats]:
    """Draw m arrays (n, k) of float32 softmax outputs, one-hot rows among them."""
    m, n, k = draw(st.integers(2, 4)), draw(st.integers(1, 6)), draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = draw(st.sampled_from([0.1, 3.0, 1e3])) * rng.standard_normal((m, n, k))
    powers = np.exp(logits - logits.max(axis=2, keepdims=True))
    return list((powers / powers.sum(axis=2, keepdims=True)).astype(np.float32))


@given(confidences(2))
def test_swapping_two_modalities_negates_discrepancy_and_keeps_gap(confidence: Floats) -> None:
    swapped = confidence[:, ::-1]
    np.testing.assert_array_equal(metrics.discrepancy(swapped), -metrics.discrepancy(confidence))
    np.testing.assert_array_equal(metrics.gap(swapped), metrics.gap(confidence))
    np.testing.assert_array_equal(metrics.gap(confidence), np.abs(metrics.discrepancy(confidence)))


@given(probabilities())
def test_similarity_fusion_and_balance_ignore_modality_order(drawn: list[Floats]) -> None:
    reversed_order = drawn[::-1]
    np.testing.assert_allclose(metrics.similarity(reversed_order), metrics.similarity(drawn), atol=1e-6)
    np.testing.assert_allclose(metrics.fuse_probabilities(reversed_order), metrics.fuse_probabilities(drawn), atol=1e-5)
    np.testing.assert_allclose(balance_of(reversed_order), balance_of(drawn), atol=1e-4)


@given(confidences())
def test_discrepancy_and_gap_stay_in_range(confidence: Floats) -> None:
    discrepancy = metrics.discrepancy(confidence)
    assert np.abs(discrepancy).max() <= 1
    assert discrepancy.dtype == np.float32
    gap = metrics.gap(confidence)
    assert gap.min() >= 0
    assert gap.max() <= 1
    if confidence.shape[1] > 2:
        assert discrepancy.shape == confidence.shape
        np.testing.assert_allclose(discrepancy.sum(axis=1), 0, atol=1e-5)


def test_discrepancy_of_three_by_hand() -> None:
    confidence = np.array([[0.9, 0.3, 0.1], [0.0, 1.0, 1.0], [0.4, 0.4, 0.4]], dtype=np.float32)
    expected = np.array([[0.7, -0.2, -0.5], [-1.0, 0.5, 0.5], [0, 0, 0]])
    np.testing.assert_allclose(metrics.discrepancy(confidence), expected, atol=1e-6)
    np.testing.assert_allclose(metrics.gap(confidence), [0.8, 1.0, 0.0], atol=1e-6)


def test_dominant_is_argmax_or_minus_one_for_ties() -> None:
    confidence = np.array([[0.9, 0.3, 0.1], [0.2, 0.7, 0.7], [0.1, 0.1, 0.6], [0, 0, 0]], dtype=np.float32)
    assert metrics.dominant_modality(confidence).tolist() == [0, -1, 2, -1]


def test_confidence_is_the_probability_of_the_true_class() -> None:
    audio = np.array([[0.2, 0.8], [0.6, 0.4]], dtype=np.float32)
    visual = np.array([[0.5, 0.5], [0.1, 0.9]], dtype=np.float32)
    label = np.array([1, 0], dtype=np.int32)
    np.testing.assert_array_equal(
        metrics.confidence([audio, visual], label), np.array([[0.8, 0.5], [0.6, 0.1]], dtype=np.float32)
    )


@given(probabilities())
def test_similarity_equals_sklearn_cosine_mean_over_pairs(drawn: list[Floats]) -> None:
    pairs = [(a, b) for index, a in enumerate(drawn) for b in drawn[index + 1 :]]
    expected = np.mean([np.diag(cosine_similarity(a, b)) for a, b in pairs], axis=0)
    similarity = metrics.similarity(drawn)
    np.testing.assert_allclose(similarity, expected, atol=1e-5)
    assert similarity.min() >= 0
    assert similarity.max() <= 1


@given(probabilities())
def test_equal_predictions_have_similarity_one(drawn: list[Floats]) -> None:
    np.testing.assert_allclose(metrics.similarity([drawn[0]] * len(drawn)), 1, atol=1e-6)


def test_opposite_predictions_have_similarity_zero() -> None:
    sure = np.array([[1.0, 0.0]], dtype=np.float32)
    assert metrics.similarity([sure, sure[:, ::-1]]).tolist() == [0]


@given(probabilities())
def test_fusion_is_a_distribution_and_the_geometric_mean(drawn: list[Floats]) -> None:
    fused = metrics.fuse_probabilities(drawn)
    assert fused.dtype == np.float32
    assert fused.min() >= 0
    np.testing.assert_allclose(fused.sum(axis=1), 1, atol=1e-5)
    product = np.prod(np.maximum(np.stack(drawn).astype(np.float64), metrics.MIN_PROBABILITY), axis=0) ** (
        1 / len(drawn)
    )
    np.testing.assert_allclose(fused, product / product.sum(axis=1, keepdims=True), atol=1e-4)


@given(confidences())
def test_cross_entropy_is_finite_and_decreases_with_confidence(confidence: Floats) -> None:
    loss = metrics.cross_entropy(confidence)
    assert np.isfinite(loss).all()
    assert loss.min() >= 0
    assert loss.max() <= 27.7
    order = np.argsort(confidence.ravel())
    assert (np.diff(loss.ravel()[order]) <= 0).all()


def test_cross_entropy_equals_sklearn() -> None:
    shares = np.array([[0.2, 0.8], [0.6, 0.4], [1.0, 0.0]], dtype=np.float32)
    label = np.array([1, 0, 0], dtype=np.int32)
    losses = metrics.cross_entropy(metrics.confidence([shares, shares], label))
    assert losses[:, 0].mean() == pytest.approx(log_loss(label, shares), rel=1e-6)


@given(
    st.lists(st.tuples(st.floats(0, 1, width=32), st.floats(0, 50, width=32), st.booleans()), min_size=1, max_size=30)
)
def test_balance_is_in_range_and_scaled_by_training_samples(
    rows: list[tuple[float, float, bool]],
) -> None:
    columns = list(zip(*rows, strict=True))
    similarity, loss = np.array(columns[0], dtype=np.float32), np.array(columns[1], dtype=np.float32)
    fits = np.array(columns[2])
    fits[0] = True  # a dataset without training samples is refused earlier
    balance = metrics.balance(similarity, loss, fits=fits)
    assert np.isfinite(balance).all()
    assert np.abs(balance).max() <= 1
    similarity[~fits], loss[~fits] = 7.0, -7.0  # test samples do not change the scores of the others
    np.testing.assert_array_equal(metrics.balance(similarity, loss, fits=fits)[fits], balance[fits])


def test_balance_by_hand() -> None:
    similarity = np.array([0.2, 1.0, 0.6, 0.0], dtype=np.float32)
    loss = np.array([4.0, 0.0, 1.0, 9.0], dtype=np.float32)
    fits = np.array([True, True, True, False])
    np.testing.assert_allclose(metrics.balance(similarity, loss, fits=fits), [-1, 1, 0.25, -1], atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.3, 27.6])
def test_constant_values_are_scaled_to_zero(value: float) -> None:
    values = np.full(5, value, dtype=np.float32)
    fits = np.array([True, True, False, True, False])
    assert metrics.minmax(values, metrics.value_range(values, fits)).tolist() == [0] * 5
    assert metrics.balance(values, values, fits=fits).tolist() == [0] * 5


def balance_of(drawn: Sequence[Floats]) -> Floats:
    label = np.zeros(len(drawn[0]), dtype=np.int32)
    loss = metrics.cross_entropy(metrics.confidence(drawn, label)).sum(axis=1)
    loss = loss + metrics.cross_entropy(metrics.confidence([metrics.fuse_probabilities(drawn)], label))[:, 0]
    # A fixed range: if all rows are equal, rounding alone would decide between 0 and 1.
    similarity = np.r_[metrics.similarity(drawn), np.array([0, 1], dtype=np.float32)]
    fits = np.ones(len(similarity), dtype=bool)
    return metrics.balance(similarity, np.r_[loss, np.array([0, 200], dtype=np.float32)], fits=fits)


def one_missing(confidence: Floats, column: int) -> Floats:
    masked = confidence.copy()
    masked[:, column] = np.nan
    return masked


@given(confidences().filter(lambda confidence: confidence.shape[1] > 2), st.integers(0, 5))
def test_missing_modality_gives_metrics_of_the_others(confidence: Floats, position: int) -> None:
    column = position % confidence.shape[1]
    remaining = np.delete(np.arange(confidence.shape[1]), column)
    masked = one_missing(confidence, column)
    discrepancy = metrics.discrepancy(masked)
    assert np.isnan(discrepancy[:, column]).all()
    expected = metrics.discrepancy(confidence[:, remaining])
    if len(remaining) == 2:
        expected = np.stack([expected, -expected], axis=1)
    np.testing.assert_allclose(discrepancy[:, remaining], expected, atol=1e-6)
    np.testing.assert_array_equal(metrics.gap(masked), metrics.gap(confidence[:, remaining]))
    best = metrics.dominant_modality(confidence[:, remaining])
    np.testing.assert_array_equal(metrics.dominant_modality(masked), np.where(best < 0, -1, remaining[best]))
    loss = metrics.cross_entropy(masked)
    np.testing.assert_array_equal(loss[:, remaining], metrics.cross_entropy(confidence[:, remaining]))
    assert np.isnan(loss[:, column]).all()


@given(probabilities())
def test_missing_modality_does_not_change_similarity_and_fusion(drawn: list[Floats]) -> None:
    complete = [*drawn, drawn[0][::-1]]  # at least three
    missing = [*complete, np.full_like(drawn[0], np.nan)]
    np.testing.assert_allclose(metrics.similarity(missing), metrics.similarity(complete), atol=1e-6)
    np.testing.assert_allclose(metrics.fuse_probabilities(missing), metrics.fuse_probabilities(complete), atol=1e-6)


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(0.2, 3)), min_size=2, max_size=3))
def test_overlap_equals_integral_of_sqrt_of_both_densities(gaussians: list[tuple[float, float]]) -> None:
    grid = np.linspace(-30, 30, 20_001)
    pairs = [
        trapezoid(np.sqrt(norm.pdf(grid, *first) * norm.pdf(grid, *second)), grid)
        for first, second in combinations(gaussians, 2)
    ]
    means, deviations = ([np.array([row[i]], np.float32) for row in gaussians] for i in (0, 1))
    np.testing.assert_allclose(metrics.overlap(means, deviations), np.mean(pairs), atol=1e-4)
    missing = np.array([np.nan], np.float32)
    np.testing.assert_allclose(metrics.overlap([*means, missing], [*deviations, missing]), np.mean(pairs), atol=1e-4)


def random_game(m: int, seed: int, num_rows: int = 5) -> dict[frozenset[int], Floats]:
    """Return a random value (n,) for each set of modalities, 0 for the empty set."""
    rng = np.random.default_rng(seed)
    sets = [frozenset(subset) for size in range(m + 1) for subset in combinations(range(m), size)]
    return {subset: rng.integers(-9, 9, num_rows).astype(np.float32) * bool(subset) for subset in sets}


@pytest.mark.parametrize("m", [2, 3, 4, 6])
def test_shapley_equals_formula(m: int) -> None:
    value = random_game(m, seed=m)
    shapley = metrics.shapley(lambda subset: value[subset], m)
    for j in range(m):
        expected = sum(
            factorial(len(rest)) * factorial(m - len(rest) - 1) / factorial(m) * (value[rest | {j}] - value[rest])
            for rest in value
            if j not in rest
        )
        np.testing.assert_allclose(shapley[:, j], expected, atol=1e-4)


@pytest.mark.parametrize("m", [2, 3, 7, 9])
def test_shapley_values_sum_to_value_of_all(m: int) -> None:
    """Also with sampled orders, beyond six modalities; a modality without effect has the value 0."""
    value = random_game(m, seed=m)
    shapley = metrics.shapley(lambda subset: value[subset], m, seed=3)
    np.testing.assert_allclose(shapley.sum(axis=1), value[frozenset(range(m))], atol=1e-4)
    idle = metrics.shapley(lambda subset: value[subset - {0}], m, seed=3)
    np.testing.assert_array_equal(idle[:, 0], 0)
    assert np.abs(idle[:, 1:]).max() > 0


def test_sampled_shapley_is_near_exact_and_seeded() -> None:
    """The value is a worth per modality plus a bonus per pair: the exact result is worth + half the bonuses."""
    rng = np.random.default_rng(0)
    worth, bonus = rng.random(7), rng.random((7, 7))
    bonus = (bonus + bonus.T) * (1 - np.eye(7)) / 2

    def value(subset: frozenset[int]) -> Floats:
        members = sorted(subset)
        return np.array([worth[members].sum() + bonus[np.ix_(members, members)].sum() / 2], np.float32)

    first, second = (metrics.shapley(value, 7, seed=seed) for seed in (0, 1))
    np.testing.assert_allclose(first[0], worth + bonus.sum(axis=1) / 2, atol=0.3)
    np.testing.assert_array_equal(metrics.shapley(value, 7, seed=0), first)
    assert np.isfinite(second).all()


@pytest.mark.parametrize("m", [2, 3, 4])
def test_symmetric_modalities_have_equal_shapley_values(m: int) -> None:
    value = random_game(m, seed=m)
    swap = {0: 1, 1: 0}
    symmetric = {subset: value[subset] + value[frozenset(swap.get(j, j) for j in subset)] for subset in value}
    shapley = metrics.shapley(lambda members: symmetric[members], m)
    np.testing.assert_allclose(shapley[:, 0], shapley[:, 1], atol=1e-5)


SHAPLEY_OF_TWO = [
    # (first, second, both) are correct -> phi = (V1 + V12 - V2) / 2 with V = size of the set if correct, else 0
    ((1, 1, 1), (1.0, 1.0)),
    ((0, 0, 1), (1.0, 1.0)),
    ((1, 0, 1), (1.5, 0.5)),
    ((0, 1, 1), (0.5, 1.5)),
    ((1, 1, 0), (0.0, 0.0)),
    ((1, 0, 0), (0.5, -0.5)),
    ((0, 0, 0), (0.0, 0.0)),
]


@pytest.mark.parametrize(("is_correct", "expected"), SHAPLEY_OF_TWO)
def test_shapley_of_two_modalities_by_hand(is_correct: tuple[int, int, int], expected: tuple[float, float]) -> None:
    table = {frozenset({0}): is_correct[0], frozenset({1}): is_correct[1], frozenset({0, 1}): 2 * is_correct[2]}
    shapley = metrics.shapley(lambda subset: np.array([table[subset]], np.float32), 2)
    np.testing.assert_array_equal(shapley, [expected])


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


@pytest.mark.parametrize("probability", [0.5, 0.9])
def test_intervals_by_unequal_groups_have_nominal_coverage(probability: float) -> None:
    """Ten groups of sizes .6^g: the sums over groups with G - 1 degrees of freedom cover .80 to .86 instead."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(10), np.maximum(1, np.round(0.4 * 300 * 0.6 ** np.arange(10)).astype(int)))
    num_covered = {"mean": 0, "share": 0}
    for _ in range(400):
        rows = rng.random(len(groups)) < rng.beta(probability * 9, (1 - probability) * 9, 10)[groups]
        intervals = {"mean": mean_interval(rows.astype(float), groups), "share": share_interval(rows, groups)}
        for name, interval in intervals.items():
            num_covered[name] += interval["low"] <= probability <= interval["high"]
    assert 0.9 < num_covered["mean"] / 400 < 0.98
    assert 0.92 < num_covered["share"] / 400 < 0.99


@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 5)), min_size=2, max_size=30))
def test_jackknife_equals_a_plain_loop_over_groups(rows: list[tuple[float, int]]) -> None:
    values = np.array([row[0] for row in rows])
    groups = np.array([row[1] for row in rows])
    names = np.unique(groups)
    if len(names) < 2:
        return
    without = np.array([values[groups != name].mean() for name in names])
    variance = (len(names) - 1) / len(names) * ((without - values.mean()) ** 2).sum()
    sizes = np.array([(groups == name).sum() for name in names])
    standard_error, df = metrics.jackknife(values, groups)
    assert standard_error == pytest.approx(np.sqrt(variance), abs=1e-9)
    assert df == pytest.approx(max(1, len(values) ** 2 / (sizes**2).sum() - 1))


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


@settings(max_examples=examples(30))
@given(seed=st.integers(0, 10_000), k=st.integers(2, 5), num_bins=st.integers(1, 20))
def test_calibration_error_equals_a_plain_loop(seed: int, k: int, num_bins: int) -> None:
    rng = np.random.default_rng(seed)
    probability, label = rng.dirichlet(np.ones(k), 60), rng.integers(0, k, 60)
    expected = 0.0
    for index in range(num_bins):
        low, high = index / num_bins, (index + 1) / num_bins
        rows = [row for row in range(60) if low < probability[row].max() <= high]
        if rows:
            accuracy = np.mean([probability[row].argmax() == label[row] for row in rows])
            expected += len(rows) / 60 * abs(np.mean([probability[row].max() for row in rows]) - accuracy)
    assert expected_calibration_error(probability, label, num_bins=num_bins) == pytest.approx(expected)


def test_calibration_error_is_0_if_certain_and_correct_and_1_if_certain_and_wrong() -> None:
    sure = np.eye(3)[[0, 1, 2, 2]]
    assert expected_calibration_error(sure, np.array([0, 1, 2, 2])) == 0
    assert expected_calibration_error(sure, np.array([1, 2, 0, 0])) == 1


def test_multilabel_calibration_error_counts_every_label() -> None:
    probability = np.array([[0.9, 0.2], [0.6, 0.4]])
    label = np.array([[1, 0], [1, 0]])
    assert expected_calibration_error(probability, label) == pytest.approx((0.1 + 0.2 + 2 * 0.4) / 4)


@pytest.mark.parametrize(("n", "sharpness"), [(60, 1.0), (700, 0.5), (700, 3.0), (5_000, 1.0)])
@pytest.mark.parametrize("is_multilabel", [False, True])
def test_ece_floor_is_the_mean_error_of_calibrated_probabilities(n: int, sharpness: float, is_multilabel: bool) -> None:
    rng = np.random.default_rng(0)
    logits = sharpness * rng.standard_normal((n, 4))
    errors = []
    if is_multilabel:
        probability = 1 / (1 + np.exp(-logits))
        for _ in range(200):
            errors.append(expected_calibration_error(probability, (rng.random((n, 4)) < probability).astype(np.int32)))
    else:
        probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        for _ in range(200):
            label = (logits + rng.gumbel(size=(n, 4))).argmax(axis=1)
            errors.append(expected_calibration_error(probability, label))
    assert ece_floor(probability, is_multilabel=is_multilabel) == pytest.approx(np.mean(errors), rel=0.08)


def test_ece_floor_of_certain_predictions_is_zero() -> None:
    assert ece_floor(np.eye(3, dtype=np.float32)) == 0
