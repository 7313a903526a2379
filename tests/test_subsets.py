"""Tests of subsets: partitions, nested thresholds, exact amounts, and independent random draws."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.errors import ConfigError, ManifestError
from mmaudit.audit.scores.table import ScoreTable
from mmaudit.rebalance.balanced import BalancedConfig, plan_balanced
from mmaudit.rebalance.score_tables import ScoreFiles, open_scores
from mmaudit.rebalance.selection import SelectionRule, select_rows
from mmaudit.rebalance.subsets import (
    ThresholdRule,
    all_samples,
    at_random,
    by_balance,
    by_mixture,
    parse_amount,
    parse_dominated,
    parse_subset,
    positive_sides,
    prefer_modality,
    within_threshold,
)
from mmaudit.train.evaluate import subsets

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
NAMES = ("audio", "visual", "text")
AV = "audio:visual"

# Ties and thresholds, also rounded to float32, and any other confidence.
CONFIDENCE = st.one_of(st.sampled_from([0.0, 0.2, 0.4, 0.5, 1.0]), st.floats(0, 1, width=32))


def confidences(m: int) -> st.SearchStrategy[Floats]:
    row = st.lists(CONFIDENCE, min_size=m, max_size=m)
    return st.lists(row, min_size=1, max_size=30).map(lambda rows: np.array(rows, dtype=np.float32))


def table(confidence: Any, **columns: Any) -> ScoreTable:
    values = np.array(confidence, dtype=np.float32)
    n = len(values)
    label = columns.pop("label", np.zeros(n, np.int32))
    return ScoreTable(
        sample_id=np.array([f"s{number}" for number in range(n)], dtype=object),
        label=label,
        label_name=np.array([f"class {class_index}" for class_index in label], dtype=object),
        modalities=NAMES[: values.shape[1]],
        confidence=values,
        **columns,
    )


@dataclass(frozen=True)
class Outcome:
    """Outcome of each row."""

    keep: Mask
    reason: list[str]
    score: NDArray[np.float64]
    threshold: NDArray[np.float64]


def decide(scores: ScoreTable, rule: SelectionRule, *, seed: int = 0) -> Outcome:
    """Apply a rule; raises ManifestError if no row qualifies."""
    selection = select_rows(open_scores(scores, seed=seed), rule, scratch=Path("unused"))
    (batch,) = selection.scores.batches()
    decision = selection.decide(batch)
    reasons = [selection.reasons[reason] for reason in decision.reason]
    return Outcome(decision.keep, reasons, decision.outcome.score, decision.outcome.threshold)


def keep(scores: ScoreTable, rule: SelectionRule, *, seed: int = 0) -> Mask:
    """Return which rows are kept; for thresholds, the rows of cell 0, which a test below compares with `decide`."""
    if isinstance(rule, ThresholdRule):
        (batch,) = open_scores(scores, seed=seed).batches()
        return np.asarray(rule.cells(batch) == 0)
    return decide(scores, rule, seed=seed).keep


def side(scores: ScoreTable, name: str, *, threshold: float = 0.0, between: str | None = None) -> Mask:
    return keep(scores, prefer_modality(scores.modalities, name, threshold=threshold, between=between))


def score_files(scores: ScoreTable, *, seed: int = 0) -> ScoreFiles:
    return open_scores(scores, seed=seed)


def parsed(scores: ScoreTable, text: str) -> Mask:
    return keep(scores, parse_subset(score_files(scores), text, between=None))


ONE = table([[0.9, 0.1]])
THREE = table([[0.9, 0.1, 0.5]])


@settings(max_examples=examples(30))
@given(confidences(2))
def test_preferred_subsets_are_disjoint_without_ties(confidence: Floats) -> None:
    scores = table(confidence)
    audio, visual = (side(scores, name) for name in ("audio", "visual"))
    assert audio.tolist() == (confidence[:, 0] > confidence[:, 1]).tolist()
    assert visual.tolist() == (confidence[:, 1] > confidence[:, 0]).tolist()
    assert (~audio & ~visual).tolist() == (confidence[:, 0] == confidence[:, 1]).tolist()


@settings(max_examples=examples(30))
@given(confidences(3))
def test_with_three_modalities_one_is_compared_with_the_mean_of_others(confidence: Floats) -> None:
    scores = table(confidence)
    for index, name in enumerate(NAMES):
        mean_of_rest = np.delete(confidence.astype(np.float64), index, axis=1).mean(axis=1)
        clear = np.abs(confidence[:, index] - mean_of_rest) > 1e-6
        expected = confidence[:, index] > mean_of_rest
        assert side(scores, name)[clear].tolist() == expected[clear].tolist()


@settings(max_examples=examples(30))
@given(confidences(3))
def test_between_defines_both_sides(confidence: Floats) -> None:
    scores = table(confidence)
    first, second = (side(scores, name, between="visual:text") for name in ("visual", "text"))
    assert first.tolist() == (confidence[:, 1] > confidence[:, 2]).tolist()
    assert second.tolist() == (confidence[:, 2] > confidence[:, 1]).tolist()
    with pytest.raises(ConfigError, match=r"modality 'audio' not found; .*visual, text"):
        prefer_modality(NAMES, "audio", between="visual:text")


@settings(max_examples=examples(30))
@given(confidences(3), st.lists(st.sampled_from([None, 0, 1, 2]), min_size=30, max_size=30))
def test_rows_without_the_modality_are_never_kept(confidence: Floats, missing: list[int | None]) -> None:
    """With three modalities, a missing one is ignored unless the subset needs it."""
    confidence_with_nan = confidence.copy()
    for row, missing_index in enumerate(missing[: len(confidence_with_nan)]):
        if missing_index is not None:
            confidence_with_nan[row, missing_index] = np.nan
    scores = table(confidence_with_nan)
    for index, name in enumerate(NAMES):
        expected = []
        for row in confidence_with_nan.astype(np.float64):
            rest = np.delete(row, index)
            expected.append(bool(row[index] > np.mean(rest[~np.isnan(rest)])))
        preferred = side(scores, name)
        rest = np.delete(confidence_with_nan.astype(np.float64), index, axis=1)
        clear = ~(np.abs(confidence_with_nan[:, index] - np.nanmean(rest, axis=1)) < 1e-6)
        assert preferred[clear].tolist() == np.array(expected)[clear].tolist()
    for rule, pair in (
        (prefer_modality(NAMES, "audio"), [0]),
        (prefer_modality(NAMES, "text", threshold=0.2, between="text:audio"), [2, 0]),
        (within_threshold("audio:visual", threshold=0.9), [0, 1]),
        (all_samples("text:visual", name="all"), [1, 2]),
    ):
        lacks_modality = np.isnan(confidence_with_nan[:, pair]).any(axis=1)
        assert not (keep(scores, rule) & lacks_modality).any()
        if keep(scores, rule).any():
            decided = decide(scores, rule)
            is_missing = [reason == "missing-modality" for reason in decided.reason]
            assert is_missing == lacks_modality.tolist() == np.isnan(decided.score).tolist()


@settings(max_examples=examples(30))
@given(confidences(2), st.lists(st.floats(0, 0.99), min_size=2, max_size=5))
def test_dominated_subsets_nest_by_threshold(confidence: Floats, thresholds: list[float]) -> None:
    scores = table(confidence)
    for name in ("audio", "visual"):
        masks = [side(scores, name, threshold=threshold) for threshold in [0.0, *sorted(thresholds)]]
        assert all((small <= large).all() for large, small in pairwise(masks))
    inner = [keep(scores, within_threshold(AV, threshold=threshold)) for threshold in sorted(thresholds)]
    assert all((small <= large).all() for small, large in pairwise(inner))


@settings(max_examples=examples(30))
@given(confidences(2), st.sampled_from([0.2, 0.4, 0.3]))
def test_balanced_and_dominated_subsets_are_a_partition(confidence: Floats, threshold: float) -> None:
    scores = table(confidence)
    parts = [keep(scores, within_threshold(AV, threshold=threshold))]
    parts += [side(scores, name, threshold=threshold) for name in ("audio", "visual")]
    assert np.sum(parts, axis=0).tolist() == [1] * len(scores)


@settings(max_examples=examples(30))
@given(confidences(2))
def test_swapping_two_modalities_swaps_their_subsets(confidence: Floats) -> None:
    scores = table(confidence)
    swapped = replace(scores, confidence=confidence[:, ::-1])
    for threshold in (0.0, 0.2):
        audio, visual = (side(scores, name, threshold=threshold) for name in ("audio", "visual"))
        assert side(swapped, "visual", threshold=threshold).tolist() == audio.tolist()
        assert side(swapped, "audio", threshold=threshold).tolist() == visual.tolist()
    assert keep(swapped, within_threshold(AV)).tolist() == keep(scores, within_threshold(AV)).tolist()


@settings(max_examples=examples(30))
@given(confidences(2))
def test_subsets_match_those_of_evaluation(confidence: Floats) -> None:
    scores = table(confidence)
    masks = subsets(scores.discrepancy().astype(np.float64), first="audio", second="visual")
    for name in ("audio", "visual"):
        for threshold, suffix in ((0.0, "preferred"), (0.2, "dominated-0.2"), (0.4, "dominated-0.4")):
            rule = prefer_modality(scores.modalities, name, threshold=threshold)
            assert rule.name == f"{name}-{suffix}"
            assert masks[rule.name].tolist() == keep(scores, rule).tolist()
    assert masks[within_threshold(AV).name].tolist() == keep(scores, within_threshold(AV)).tolist()


# By reason: the rule, and what holds for score and threshold of the rows it drops.
RULES: dict[str, tuple[Callable[[ScoreFiles], ThresholdRule], Callable[[float, float], bool]]] = {
    "discrepancy-too-low": (lambda scores: prefer_modality(scores.modalities, "visual", threshold=0.2), operator.le),
    "discrepancy-too-large": (lambda scores: within_threshold(AV, threshold=0.2), operator.gt),
    "posterior-too-low": (lambda scores: by_mixture(scores, "balanced", between=AV), operator.lt),
    "posterior-too-high": (lambda scores: by_mixture(scores, "imbalanced", between=AV), operator.ge),
}


@pytest.mark.parametrize("reason", RULES)
@settings(max_examples=examples(20))
@given(confidences(2), st.data())
def test_dropped_rows_are_on_the_wrong_side_of_the_threshold(
    reason: str, confidence: Floats, data: st.DataObject
) -> None:
    posterior = data.draw(st.lists(CONFIDENCE, min_size=len(confidence), max_size=len(confidence)))
    scores = table(confidence, p_balanced=np.array(posterior, np.float32))
    make, is_failing = RULES[reason]
    rule = make(score_files(scores))
    if not keep(scores, rule).any():
        with pytest.raises(ManifestError, match=f"{rule.name}: none of the {len(scores)} scored samples"):
            decide(scores, rule)
        return
    decided = decide(scores, rule)
    fails = [is_failing(score, limit) for score, limit in zip(decided.score, decided.threshold, strict=True)]
    assert fails == (~decided.keep).tolist()
    assert {decided.reason[row] for row in np.flatnonzero(~decided.keep)} <= {reason}


def test_threshold_is_inclusive_for_balanced() -> None:
    scores = table([[0.5, 0.25], [0.25, 0.5], [0.5, 0.2]])
    assert keep(scores, within_threshold(AV, threshold=0.25)).tolist() == [True, True, False]
    assert side(scores, "audio", threshold=0.25).tolist() == [False, False, True]


def mixed(scores: ScoreTable, component: str, *, posterior: float = 0.5) -> Mask:
    return keep(scores, by_mixture(score_files(scores), component, between=AV, posterior=posterior))


def test_mixture_subsets_split_at_the_posterior() -> None:
    posterior = np.array([0, 0.49, 0.5, 0.51, 1], np.float32)
    scores = table([[0.5, 0.5]] * 5, p_balanced=posterior)
    assert mixed(scores, "balanced").tolist() == [False, False, True, True, True]
    assert mixed(scores, "imbalanced").tolist() == [True, True, False, False, False]
    assert mixed(scores, "balanced", posterior=0.75).tolist() == [False] * 4 + [True]


@settings(max_examples=examples(30))
@given(st.lists(st.none() | CONFIDENCE, min_size=1, max_size=30), st.floats(0.01, 1))
def test_mixture_subsets_partition_rows_with_a_posterior(posterior: list[float | None], threshold: float) -> None:
    values = np.array([np.nan if value is None else value for value in posterior], np.float32)
    has_posterior = ~np.isnan(values)
    if not has_posterior.any():
        return
    scores = table([[0.5, 0.5]] * len(values), p_balanced=np.where(has_posterior, values, 0))
    opened = open_scores(scores, seed=0)
    full_table = opened.files[0]
    assert not isinstance(full_table, Path)
    index = full_table.column_names.index("p_balanced")
    column = pa.array(values, pa.float32(), from_pandas=True)
    opened_with_nulls = replace(opened, files=(full_table.set_column(index, "p_balanced", column),))
    cells = []
    for component in ("balanced", "imbalanced"):
        rule = by_mixture(opened_with_nulls, component, between=AV, posterior=threshold)
        (batch,) = opened_with_nulls.batches()
        cells.append(rule.cells(batch))
    masks = np.stack(cells) == 0
    assert masks.sum(axis=0).tolist() == has_posterior.astype(int).tolist()
    assert masks[0].tolist() == (values.astype(np.float64) >= threshold).tolist()
    assert (np.stack(cells) == -1).all(axis=0).tolist() == (~has_posterior).tolist()


def test_invalid_mixture_subset_raises() -> None:
    opened = score_files(replace(ONE, p_balanced=np.ones(1, np.float32)))
    with pytest.raises(ConfigError, match=r"--gmm balancd: .* did you mean balanced\? .*imbalanced"):
        by_mixture(opened, "balancd", between=AV)
    for posterior in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"the posterior of a mixture's subset is .*; it lies in \(0, 1\]"):
            by_mixture(opened, "balanced", between=AV, posterior=posterior)
    with pytest.raises(ManifestError, match="no column p_balanced: rescore with mmaudit score"):
        by_mixture(score_files(ONE), "balanced", between=AV)


def test_subset_texts_are_parsed() -> None:
    scores = table([[0.9, 0.1], [0.6, 0.5], [0.1, 0.9], [0.1, 0.2]])
    assert parsed(scores, "audio-preferred").tolist() == [True, True, False, False]
    assert parsed(scores, "visual-preferred").tolist() == [False, False, True, True]
    assert parsed(scores, "balanced").tolist() == [False, True, False, True]
    assert parsed(scores, "balanced:0.9").all()
    assert keep(scores, parse_dominated(scores.modalities, "visual:0.2")).tolist() == [False, False, True, False]
    assert parse_dominated(scores.modalities, "visual:0").name == "visual-preferred"


def test_subset_names() -> None:
    opened = score_files(large(20))
    texts = {
        "audio-preferred": "audio-preferred",
        "balanced": "balanced-within-0.2",
        "balanced:0.35": "balanced-within-0.35",
        "most-balanced:5": "most-balanced-5",
        "least-balanced:20%": "least-balanced-20pc",
        "random:12.5%": "random-12.5pc",
    }
    for text, name in texts.items():
        assert parse_subset(opened, text, between=None).name == name
    like = (opened.splits[0], np.ones(len(opened.splits) * len(opened.classes), np.int64))
    assert parse_subset(opened, "random", between=None, like=like).name == f"random-like-{like[0]}"


def large(n: int, *, seed: int = 0, classes: int = 4) -> ScoreTable:
    """Return n samples in uneven splits and classes, with many equal balance scores."""
    rng = np.random.default_rng(seed)
    return table(
        rng.random((n, 2)),
        label=rng.binomial(classes - 1, 0.3, n).astype(np.int32),
        split=rng.choice(np.array(["train", "validation", "test"], dtype=object), n, p=[0.7, 0.1, 0.2]),
        balance=(rng.integers(-20, 21, n) / 20).astype(np.float32),
    )


@settings(max_examples=examples(30))
@given(st.integers(1, 200), st.integers(0, 99), st.booleans(), st.data())
def test_extremes_match_a_sort(n: int, seed: int, keep_most: bool, data: st.DataObject) -> None:
    """In proportion per split, up to one sample; ties are decided by hash, so scores are compared."""
    scores = large(n, seed=seed)
    amount = data.draw(st.integers(1, n))
    subset = "most-balanced" if keep_most else "least-balanced"
    is_kept = parsed(scores, f"{subset}:{amount}")
    assert is_kept.sum() == amount
    assert scores.balance is not None
    for name in set(scores.split if scores.split is not None else ()):
        in_split = scores.split == name
        number = int((is_kept & in_split).sum())
        assert abs(number - amount * in_split.sum() / n) < 1
        in_order = np.sort(scores.balance[in_split])
        expected = in_order[len(in_order) - number :] if keep_most else in_order[:number]
        assert np.sort(scores.balance[is_kept & in_split]).tolist() == expected.tolist()


@settings(max_examples=examples(30))
@given(st.integers(1, 200), st.integers(0, 99), st.floats(0.5, 100))
def test_share_is_relative_to_all_rows(n: int, seed: int, percent: float) -> None:
    scores = large(n, seed=seed)
    amount = round(percent / 100 * n)
    if amount == 0:
        with pytest.raises(ManifestError, match="relax the rule"):
            decide(scores, parse_subset(score_files(scores), f"random:{percent}%", between=None))
        return
    for subset in ("most-balanced", "least-balanced", "random"):
        assert parsed(scores, f"{subset}:{percent}%").sum() == amount


def test_rows_without_balance_score_are_never_extreme() -> None:
    scores = large(60)
    opened = score_files(scores)
    full_table = opened.files[0]
    assert not isinstance(full_table, Path)
    has_no_score = np.arange(60) % 4 == 0
    column = pa.array(scores.balance, mask=has_no_score)
    opened_with_nulls = replace(
        opened, files=(full_table.set_column(full_table.column_names.index("balance"), "balance", column),)
    )
    for subset in ("most-balanced", "least-balanced"):
        selection = select_rows(
            opened_with_nulls, by_balance(opened_with_nulls, subset, "100%", between=AV), scratch=Path("unused")
        )
        (batch,) = opened_with_nulls.batches()
        assert selection.decide(batch).keep.tolist() == (~has_no_score).tolist()


def test_rows_dropped_by_an_extreme_have_reason_and_score() -> None:
    scores = large(100)
    assert scores.balance is not None
    for subset, reason, compare in (
        ("most-balanced", "balance-too-low", np.less_equal),
        ("least-balanced", "balance-too-high", np.greater_equal),
    ):
        decided = decide(scores, by_balance(score_files(scores), subset, "20%", between=AV))
        out = ~decided.keep
        assert {decided.reason[row] for row in np.flatnonzero(out)} == {reason}
        np.testing.assert_allclose(decided.score, scores.balance)
        assert compare(decided.score[out], decided.threshold[out] + (1e-6 if reason.endswith("low") else -1e-6)).all()


def cells_of(scores: ScoreTable, mask: Mask) -> Counter[tuple[Any, int]]:
    assert scores.split is not None
    return Counter(zip(scores.split[mask].tolist(), scores.label[mask].tolist(), strict=True))


@settings(max_examples=examples(30))
@given(st.integers(1, 200), st.integers(0, 99), st.data())
def test_random_subset_is_proportional_per_split_and_class(n: int, seed: int, data: st.DataObject) -> None:
    scores = large(n, seed=seed)
    amount = data.draw(st.integers(1, n))
    is_kept = parsed(scores, f"random:{amount}")
    assert is_kept.sum() == amount
    available = cells_of(scores, np.ones(n, dtype=bool))
    drawn = cells_of(scores, is_kept)
    assert all(abs(drawn[cell] - amount * available[cell] / n) < 1 for cell in available)


def like(scores: ScoreTable, mask: Mask) -> tuple[str, NDArray[np.int64]]:
    opened = score_files(scores)
    counts = np.zeros(len(opened.splits) * len(opened.classes), dtype=np.int64)
    for (split, label), number in cells_of(scores, mask).items():
        counts[opened.splits.index(split) * len(opened.classes) + opened.classes.to_pylist().index(label)] = number
    return "other", counts


@settings(max_examples=examples(30))
@given(st.integers(1, 200), st.integers(0, 99), st.data())
def test_like_copies_counts_per_split_and_class(n: int, seed: int, data: st.DataObject) -> None:
    scores = large(n, seed=seed)
    reference = np.random.default_rng(seed).random(n) < data.draw(st.floats(0.05, 1))
    reference[0] = True
    is_kept = keep(scores, at_random(score_files(scores), between=AV, like=like(scores, reference)))
    assert cells_of(scores, is_kept) == cells_of(scores, reference)


def test_random_control_is_independent_of_the_balanced_split() -> None:
    """With the hash of the balanced split, the control would share most of its samples with it."""
    scores = large(4_000, classes=2)
    assert scores.split is not None
    for seed in range(3):
        opened = score_files(scores, seed=seed)
        balanced = keep(scores, plan_balanced(opened, BalancedConfig(tolerance=0.1)), seed=seed)
        drawn = keep(scores, at_random(opened, between=AV, like=like(scores, balanced)), seed=seed)
        available = cells_of(scores, np.ones(len(scores), dtype=bool))
        num_balanced = cells_of(scores, balanced)
        share = {cell: num_balanced[cell] / available[cell] for cell in available}
        expected = sum(available[cell] * share[cell] ** 2 for cell in available)
        # Of a cell of n, k drawn twice share k k / n on average, with this variance (hypergeometric).
        spread = sum(available[cell] * share[cell] ** 2 * (1 - share[cell]) ** 2 for cell in available) ** 0.5
        assert 0.1 < expected / balanced.sum() < 0.9
        assert abs((balanced & drawn).sum() - expected) < 4 * spread


def test_draws_depend_on_the_seed_only() -> None:
    scores = large(400)
    rule = parse_subset(score_files(scores), "random:100", between=None)
    first, repeated, second = (keep(scores, rule, seed=seed) for seed in (0, 0, 1))
    assert first.tolist() == repeated.tolist()
    assert 5 < (first & second).sum() < 50  # 25 expected


def test_amount_larger_than_available_raises() -> None:
    scores = large(20)
    with pytest.raises(ConfigError, match="requested 21 samples, available 20"):
        parsed(scores, "random:21")
    with pytest.raises(ConfigError, match="requested 21 samples, available 20"):
        parsed(scores, "least-balanced:21")
    name, counts = like(scores, np.ones(20, dtype=bool))
    with pytest.raises(ManifestError, match="random-like-other: too few samples available"):
        decide(scores, at_random(score_files(scores), between=AV, like=(name, counts + 1)))
    with pytest.raises(ManifestError, match="--subset most-balanced: the score table has no column balance: rescore"):
        parse_subset(score_files(ONE), "most-balanced:1", between=None)


def test_positive_sides() -> None:
    assert positive_sides(("audio", "visual"), None) == {"audio": "audio:visual", "visual": "visual:audio"}
    assert positive_sides(("audio", "visual"), "visual") == positive_sides(("audio", "visual"), None)
    assert positive_sides(NAMES, None) == {name: name for name in NAMES}
    assert positive_sides(NAMES, "text:audio") == {"text": "text:audio", "audio": "audio:text"}
    assert positive_sides(NAMES, "text") == {"text": "text"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("random:", "random: pass either an amount, as random:500 or random:20%, or --like MANIFEST"),
        ("random", "random: pass either an amount"),
        (
            "random:few",
            "--subset random:few: 'few' is neither a number of samples, such as 500, nor a share, such as 20%",
        ),
        ("random:0", "--subset random:0: 0 is out of range"),
        ("random:-3", "-3 is out of range"),
        ("random:0%", "0% is out of range; use a number of at least 1, or a share above 0% up to 100%"),
        ("random:101%", "101% is out of range"),
        ("random:nan%", "nan% is out of range"),
        ("random:1.5", "'1.5' is neither a number of samples"),
        ("most-balanced:", "--subset most-balanced:: '' is neither a number of samples"),
        ("least-balanced:x%", "--subset least-balanced:x%: 'x%' is neither a number of samples"),
        ("most-balance:3", r"did you mean most-balanced\?"),
    ],
)
def test_invalid_amount_raises(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_subset(score_files(large(20)), text, between=None)


@given(st.text(max_size=6))
def test_parsed_amount_is_positive(text: str) -> None:
    try:
        amount = parse_amount("--subset", text)
    except ConfigError:
        return
    assert (amount.number is None) != (amount.share is None)
    assert (amount.number or 0) >= 1 or 0 < (amount.share or 0) <= 1


@pytest.mark.parametrize(
    ("scores", "text", "words"),
    [
        (ONE, "visul-preferred", r"did you mean visual-preferred\? .*audio-preferred, visual-preferred, balanced"),
        (THREE, "txt-preferred", r"did you mean text-preferred\?"),
        (ONE, "text-preferred", "unknown subset; .*audio-preferred, visual-preferred, balanced"),
        (ONE, "", "available: audio-preferred"),
        (ONE, "balanced:x", "--subset balanced:x: 'x' is not a number"),
        (ONE, "balanced:1.5", r"threshold of the balanced subset is 1.5; it lies in \[0, 1\]"),
        (ONE, "balanced:-1", r"threshold of the balanced subset is -1.0"),
        (ONE, "balanced:nan", r"threshold of the balanced subset is nan"),
        (ONE, "audio-preferred:0.3", "has no threshold; use --dominated audio:0.3"),
    ],
)
def test_invalid_subset_raises(scores: ScoreTable, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_subset(score_files(scores), text, between=None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("visual", "--dominated visual: not of the form MODALITY:T, such as audio:0.2"),
        ("visul:0.2", r"modality 'visul' not found; did you mean visual\?"),
        ("visual:much", "--dominated visual:much: 'much' is not a number"),
        ("visual:", "'' is not a number"),
        ("visual:1", r"threshold of a dominated subset is 1.0; it lies in \[0, 1\)"),
        ("visual:-0.1", "threshold of a dominated subset is -0.1"),
        ("visual:nan", "threshold of a dominated subset is nan"),
    ],
)
def test_invalid_dominated_raises(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_dominated(ONE.modalities, text)


def test_invalid_between_raises() -> None:
    with pytest.raises(ConfigError, match=r"--between audio:visul: no modality 'visul'; did you mean visual\?"):
        keep(ONE, prefer_modality(ONE.modalities, "audio", between="audio:visul"))
