"""Laws of the scores: what swapping modalities does to each, and the formulas by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import factorial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import trapezoid
from scipy.stats import norm
from sklearn.metrics import log_loss
from sklearn.metrics.pairwise import cosine_similarity

from mmaudit.audit import metrics as measures
from mmaudit.audit.metrics import Floats

# Exactly 0 and 1 are what a saturated softmax gives in float32.
SHARES = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1e-30]), st.floats(0, 1, width=32))


def confidences(num_modalities: int | None = None) -> st.SearchStrategy[Floats]:
    """Arrays (n, m) of anything in [0, 1]."""
    widths = st.integers(2, 6) if num_modalities is None else st.just(num_modalities)
    return widths.flatmap(
        lambda m: st.lists(st.lists(SHARES, min_size=m, max_size=m), min_size=1, max_size=12).map(
            lambda rows: np.array(rows, dtype=np.float32)
        )
    )


@st.composite
def probabilities(draw: st.DrawFn) -> list[Floats]:
    """Draw m arrays (n, k), each row a distribution as float32 softmax makes them, one-hot rows among them."""
    m, n, k = draw(st.integers(2, 4)), draw(st.integers(1, 6)), draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = draw(st.sampled_from([0.1, 3.0, 1e3])) * rng.standard_normal((m, n, k))
    powers = np.exp(logits - logits.max(axis=2, keepdims=True))
    return list((powers / powers.sum(axis=2, keepdims=True)).astype(np.float32))


@given(confidences(2))
def test_swapping_two_modalities_negates_discrepancy_and_keeps_gap(confidence: Floats) -> None:
    swapped = confidence[:, ::-1]
    np.testing.assert_array_equal(measures.discrepancy(swapped), -measures.discrepancy(confidence))
    np.testing.assert_array_equal(measures.gap(swapped), measures.gap(confidence))
    np.testing.assert_array_equal(measures.gap(confidence), np.abs(measures.discrepancy(confidence)))


@given(probabilities())
def test_similarity_fusion_and_balance_ignore_modality_order(each: list[Floats]) -> None:
    back = each[::-1]
    np.testing.assert_allclose(measures.similarity(back), measures.similarity(each), atol=1e-6)
    np.testing.assert_allclose(measures.fuse_probabilities(back), measures.fuse_probabilities(each), atol=1e-5)
    np.testing.assert_allclose(balance_of(back), balance_of(each), atol=1e-4)


@given(confidences())
def test_discrepancy_and_gap_stay_in_range(confidence: Floats) -> None:
    found = measures.discrepancy(confidence)
    assert np.abs(found).max() <= 1
    assert found.dtype == np.float32
    gap = measures.gap(confidence)
    assert gap.min() >= 0
    assert gap.max() <= 1
    if confidence.shape[1] > 2:
        assert found.shape == confidence.shape
        np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-5)


def test_discrepancy_of_three_by_hand() -> None:
    confidence = np.array([[0.9, 0.3, 0.1], [0.0, 1.0, 1.0], [0.4, 0.4, 0.4]], dtype=np.float32)
    expected = np.array([[0.7, -0.2, -0.5], [-1.0, 0.5, 0.5], [0, 0, 0]])
    np.testing.assert_allclose(measures.discrepancy(confidence), expected, atol=1e-6)
    np.testing.assert_allclose(measures.gap(confidence), [0.8, 1.0, 0.0], atol=1e-6)


def test_dominant_is_argmax_or_minus_one_for_ties() -> None:
    confidence = np.array([[0.9, 0.3, 0.1], [0.2, 0.7, 0.7], [0.1, 0.1, 0.6], [0, 0, 0]], dtype=np.float32)
    assert measures.dominant(confidence).tolist() == [0, -1, 2, -1]


def test_confidence_is_the_probability_of_the_true_class() -> None:
    audio = np.array([[0.2, 0.8], [0.6, 0.4]], dtype=np.float32)
    visual = np.array([[0.5, 0.5], [0.1, 0.9]], dtype=np.float32)
    label = np.array([1, 0], dtype=np.int32)
    np.testing.assert_array_equal(
        measures.confidence([audio, visual], label), np.array([[0.8, 0.5], [0.6, 0.1]], dtype=np.float32)
    )


@given(probabilities())
def test_similarity_equals_sklearn_cosine_mean_over_pairs(each: list[Floats]) -> None:
    pairs = [(a, b) for index, a in enumerate(each) for b in each[index + 1 :]]
    expected = np.mean([np.diag(cosine_similarity(a, b)) for a, b in pairs], axis=0)
    found = measures.similarity(each)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.min() >= 0
    assert found.max() <= 1


@given(probabilities())
def test_equal_predictions_have_similarity_one(each: list[Floats]) -> None:
    np.testing.assert_allclose(measures.similarity([each[0]] * len(each)), 1, atol=1e-6)


def test_opposite_predictions_have_similarity_zero() -> None:
    sure = np.array([[1.0, 0.0]], dtype=np.float32)
    assert measures.similarity([sure, sure[:, ::-1]]).tolist() == [0]


@given(probabilities())
def test_fusion_is_a_distribution_and_the_geometric_mean(each: list[Floats]) -> None:
    fused = measures.fuse_probabilities(each)
    assert fused.dtype == np.float32
    assert fused.min() >= 0
    np.testing.assert_allclose(fused.sum(axis=1), 1, atol=1e-5)
    product = np.prod(np.maximum(np.stack(each).astype(np.float64), measures.LEAST), axis=0) ** (1 / len(each))
    np.testing.assert_allclose(fused, product / product.sum(axis=1, keepdims=True), atol=1e-4)


@given(confidences())
def test_cross_entropy_is_finite_and_decreases_with_confidence(confidence: Floats) -> None:
    loss = measures.cross_entropy(confidence)
    assert np.isfinite(loss).all()
    assert loss.min() >= 0
    assert loss.max() <= 27.7
    order = np.argsort(confidence.ravel())
    assert (np.diff(loss.ravel()[order]) <= 0).all()


def test_cross_entropy_equals_sklearn() -> None:
    shares = np.array([[0.2, 0.8], [0.6, 0.4], [1.0, 0.0]], dtype=np.float32)
    label = np.array([1, 0, 0], dtype=np.int32)
    ours = measures.cross_entropy(measures.confidence([shares, shares], label))
    assert ours[:, 0].mean() == pytest.approx(log_loss(label, shares), rel=1e-6)


@given(
    st.lists(st.tuples(st.floats(0, 1, width=32), st.floats(0, 50, width=32), st.booleans()), min_size=1, max_size=30)
)
def test_balance_is_in_range_and_scaled_by_training_samples(
    rows: list[tuple[float, float, bool]],
) -> None:
    columns = list(zip(*rows, strict=True))
    similarity, loss = np.array(columns[0], dtype=np.float32), np.array(columns[1], dtype=np.float32)
    fits = np.array(columns[2])
    fits[0] = True  # a set without a training sample is refused before
    balance = measures.balance(similarity, loss, fits=fits)
    assert np.isfinite(balance).all()
    assert np.abs(balance).max() <= 1
    similarity[~fits], loss[~fits] = 7.0, -7.0  # test samples do not move the others' scores
    np.testing.assert_array_equal(measures.balance(similarity, loss, fits=fits)[fits], balance[fits])


def test_balance_by_hand() -> None:
    similarity = np.array([0.2, 1.0, 0.6, 0.0], dtype=np.float32)
    loss = np.array([4.0, 0.0, 1.0, 9.0], dtype=np.float32)
    fits = np.array([True, True, True, False])
    np.testing.assert_allclose(measures.balance(similarity, loss, fits=fits), [-1, 1, 0.25, -1], atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.3, 27.6])
def test_constant_values_are_scaled_to_zero(value: float) -> None:
    values = np.full(5, value, dtype=np.float32)
    fits = np.array([True, True, False, True, False])
    assert measures.minmax(values, fits=fits).tolist() == [0] * 5
    assert measures.balance(values, values, fits=fits).tolist() == [0] * 5


def balance_of(each: Sequence[Floats]) -> Floats:
    label = np.zeros(len(each[0]), dtype=np.int32)
    loss = measures.cross_entropy(measures.confidence(each, label)).sum(axis=1)
    loss = loss + measures.cross_entropy(measures.confidence([measures.fuse_probabilities(each)], label))[:, 0]
    # A fixed range: where all rows are equal, rounding alone would decide about 0 or 1.
    similarity = np.r_[measures.similarity(each), np.array([0, 1], dtype=np.float32)]
    fits = np.ones(len(similarity), dtype=bool)
    return measures.balance(similarity, np.r_[loss, np.array([0, 200], dtype=np.float32)], fits=fits)


def one_missing(confidence: Floats, column: int) -> Floats:
    held = confidence.copy()
    held[:, column] = np.nan
    return held


@given(confidences().filter(lambda confidence: confidence.shape[1] > 2), st.integers(0, 5))
def test_missing_modality_gives_metrics_of_the_others(confidence: Floats, place: int) -> None:
    column = place % confidence.shape[1]
    others = np.delete(np.arange(confidence.shape[1]), column)
    held = one_missing(confidence, column)
    found = measures.discrepancy(held)
    assert np.isnan(found[:, column]).all()
    expected = measures.discrepancy(confidence[:, others])
    if len(others) == 2:
        expected = np.stack([expected, -expected], axis=1)
    np.testing.assert_allclose(found[:, others], expected, atol=1e-6)
    np.testing.assert_array_equal(measures.gap(held), measures.gap(confidence[:, others]))
    best = measures.dominant(confidence[:, others])
    np.testing.assert_array_equal(measures.dominant(held), np.where(best < 0, -1, others[best]))
    loss = measures.cross_entropy(held)
    np.testing.assert_array_equal(loss[:, others], measures.cross_entropy(confidence[:, others]))
    assert np.isnan(loss[:, column]).all()


@given(probabilities())
def test_missing_modality_does_not_change_similarity_and_fusion(each: list[Floats]) -> None:
    several = [*each, each[0][::-1]]  # three at least
    missing = [*several, np.full_like(each[0], np.nan)]
    np.testing.assert_allclose(measures.similarity(missing), measures.similarity(several), atol=1e-6)
    np.testing.assert_allclose(measures.fuse_probabilities(missing), measures.fuse_probabilities(several), atol=1e-6)


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(0.2, 3)), min_size=2, max_size=3))
def test_overlap_equals_integral_of_sqrt_of_both_densities(gaussians: list[tuple[float, float]]) -> None:
    grid = np.linspace(-30, 30, 20_001)
    pairs = [
        trapezoid(np.sqrt(norm.pdf(grid, *one) * norm.pdf(grid, *other)), grid)
        for one, other in combinations(gaussians, 2)
    ]
    means, deviations = ([np.array([row[i]], np.float32) for row in gaussians] for i in (0, 1))
    np.testing.assert_allclose(measures.overlap(means, deviations), np.mean(pairs), atol=1e-4)
    gone = np.array([np.nan], np.float32)
    np.testing.assert_allclose(measures.overlap([*means, gone], [*deviations, gone]), np.mean(pairs), atol=1e-4)


def games(m: int, seed: int, num_rows: int = 5) -> dict[frozenset[int], Floats]:
    """Give any value (n,) for each set of modalities; that of none is nought."""
    rng = np.random.default_rng(seed)
    sets = [frozenset(each) for size in range(m + 1) for each in combinations(range(m), size)]
    return {each: rng.integers(-9, 9, num_rows).astype(np.float32) * bool(each) for each in sets}


@pytest.mark.parametrize("m", [2, 3, 4, 6])
def test_shapley_equals_formula(m: int) -> None:
    value = games(m, seed=m)
    found = measures.shapley(lambda chosen: value[chosen], m)
    for j in range(m):
        expected = sum(
            factorial(len(each)) * factorial(m - len(each) - 1) / factorial(m) * (value[each | {j}] - value[each])
            for each in value
            if j not in each
        )
        np.testing.assert_allclose(found[:, j], expected, atol=1e-4)


@pytest.mark.parametrize("m", [2, 3, 7, 9])
def test_shapley_values_sum_to_value_of_all(m: int) -> None:
    """Sampled orders, beyond six modalities, keep that; so they do that a modality without any effect gets nothing."""
    value = games(m, seed=m)
    found = measures.shapley(lambda chosen: value[chosen], m, seed=3)
    np.testing.assert_allclose(found.sum(axis=1), value[frozenset(range(m))], atol=1e-4)
    idle = measures.shapley(lambda chosen: value[chosen - {0}], m, seed=3)
    np.testing.assert_array_equal(idle[:, 0], 0)
    assert np.abs(idle[:, 1:]).max() > 0


def test_sampled_shapley_is_near_exact_and_seeded() -> None:
    """A modality's worth here is its own and a bonus for each pair: all orders would give worth + half the bonuses."""
    rng = np.random.default_rng(0)
    worth, bonus = rng.random(7), rng.random((7, 7))
    bonus = (bonus + bonus.T) * (1 - np.eye(7)) / 2

    def value(chosen: frozenset[int]) -> Floats:
        some = sorted(chosen)
        return np.array([worth[some].sum() + bonus[np.ix_(some, some)].sum() / 2], np.float32)

    one, two = (measures.shapley(value, 7, seed=seed) for seed in (0, 1))
    np.testing.assert_allclose(one[0], worth + bonus.sum(axis=1) / 2, atol=0.3)
    np.testing.assert_array_equal(measures.shapley(value, 7, seed=0), one)
    assert np.isfinite(two).all()


@pytest.mark.parametrize("m", [2, 3, 4])
def test_symmetric_modalities_have_equal_shapley_values(m: int) -> None:
    value = games(m, seed=m)
    swap = {0: 1, 1: 0}
    even = {each: value[each] + value[frozenset(swap.get(j, j) for j in each)] for each in value}
    found = measures.shapley(lambda chosen: even[chosen], m)
    np.testing.assert_allclose(found[:, 0], found[:, 1], atol=1e-5)


RIGHT = [
    # alone, the first; alone, the second; together -> phi = (V1 + V12 - V2) / 2 with V = how many where they are right
    ((1, 1, 1), (1.0, 1.0)),
    ((0, 0, 1), (1.0, 1.0)),
    ((1, 0, 1), (1.5, 0.5)),
    ((0, 1, 1), (0.5, 1.5)),
    ((1, 1, 0), (0.0, 0.0)),
    ((1, 0, 0), (0.5, -0.5)),
    ((0, 0, 0), (0.0, 0.0)),
]


@pytest.mark.parametrize(("right", "expected"), RIGHT)
def test_shapley_of_two_modalities_by_hand(right: tuple[int, int, int], expected: tuple[float, float]) -> None:
    table = {frozenset({0}): right[0], frozenset({1}): right[1], frozenset({0, 1}): 2 * right[2]}
    found = measures.shapley(lambda chosen: np.array([table[chosen]], np.float32), 2)
    np.testing.assert_array_equal(found, [expected])
