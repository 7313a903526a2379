"""Tests of split statistics: batch by batch they equal direct computations on all rows."""

from __future__ import annotations

import json
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import pytest
from conftest import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import kstest

from mmaudit.audit.metrics import assign_bins
from mmaudit.audit.scores.table import ScoreTable
from mmaudit.rebalance.score_tables import ScoreBatch, ScoreFiles, open_scores
from mmaudit.rebalance.selection import Decision, RowOutcome
from mmaudit.rebalance.split_stats import MAX_SHORTAGES, SplitStats, distance_to_uniform

Array = NDArray[Any]
REASONS = ("out", "missing-modality", "in-other")


def open_drawn_scores(n: int, *, num_classes: int, seed: int, missing: bool = False) -> ScoreFiles:
    rng = np.random.default_rng(seed)
    confidence = rng.beta(0.7, 0.7, (n, 3)).astype(np.float32)
    if missing:
        confidence[rng.random(n) < 0.3, 0] = np.nan
    label = rng.integers(0, num_classes, n)
    scores = ScoreTable(
        sample_id=np.array([f"s{number}" for number in range(n)], dtype=object),
        label=label.astype(np.int32),
        label_name=np.array([f"class {number:05d}" for number in label], dtype=object),
        modalities=("audio", "visual", "text"),
        confidence=confidence,
        split=rng.choice(["train", "test"], n).astype(object),
    )
    return open_scores(scores, seed=0)


def decision_of(batch: ScoreBatch, *, seed: int, weighted: bool) -> Decision:
    """Return a random decision that never keeps a row without discrepancy."""
    rng = np.random.default_rng(seed)
    n, discrepancy = len(batch), batch.discrepancy("audio:visual")
    missing = np.isnan(discrepancy)
    keep = (rng.random(n) < 0.5) & ~missing
    zeros = np.zeros(n)
    return Decision(
        keep=keep,
        discrepancy=discrepancy,
        rank=np.zeros(n, dtype=np.int32),
        reason=np.where(missing, 1, np.where(rng.random(n) < 0.2, 2, 0)).astype(np.int8),
        outcome=RowOutcome(
            score=zeros, threshold=zeros, weight=rng.uniform(0.1, 3, n).astype(np.float32) if weighted else None
        ),
    )


def slice_rows(batch: ScoreBatch, decision: Decision, rows: slice) -> tuple[ScoreBatch, Decision]:
    length = len(range(*rows.indices(len(batch))))
    weight = decision.outcome.weight
    return (
        ScoreBatch(
            table=batch.table.slice(rows.start, length),
            key=batch.key[rows],
            label=batch.label[rows],
            split=batch.split[rows],
            confidence=batch.confidence[rows],
            excluded_by=batch.excluded_by[rows],
            modalities=batch.modalities,
        ),
        Decision(
            keep=decision.keep[rows],
            discrepancy=decision.discrepancy[rows],
            rank=decision.rank[rows],
            reason=decision.reason[rows],
            outcome=RowOutcome(
                score=decision.outcome.score[rows],
                threshold=decision.outcome.threshold[rows],
                weight=None if weight is None else weight[rows],
            ),
        ),
    )


def ks_of(values: Array, weight: Array) -> float:
    """Compute the Kolmogorov-Smirnov distance of weighted values to uniform over [-1, 1]."""
    order = np.argsort(values)
    share = np.r_[0.0, np.cumsum(weight[order])] / weight.sum()
    uniform = (values[order] + 1) / 2
    return float(max(np.abs(share[1:] - uniform).max(), np.abs(share[:-1] - uniform).max()))


@settings(max_examples=examples(50))
@given(
    st.integers(1, 200),
    st.integers(1, 6),
    st.sampled_from([2, 5, 20]),
    st.integers(0, 10**6),
    st.booleans(),
    st.booleans(),
)
def test_numbers_of_batches_equal_those_of_all_rows(
    n: int, num_classes: int, num_bins: int, seed: int, weighted: bool, missing: bool
) -> None:
    score_files = open_drawn_scores(n, num_classes=num_classes, seed=seed, missing=missing)
    (batch,) = score_files.batches()
    decision = decision_of(batch, seed=seed, weighted=weighted)
    stats = SplitStats(score_files, between="audio:visual", num_bins=num_bins)
    cut = n // 3
    for rows in (slice(0, cut), slice(cut, n)):  # n // 3 may be 0: a batch without rows
        stats.add(*slice_rows(batch, decision, rows), REASONS)
    numbers = stats.numbers()
    assert json.loads(json.dumps(numbers)) == numbers  # JSON values
    assert not any(isinstance(leaf, np.generic) for leaf in leaves(numbers))

    keep, values = decision.keep, decision.discrepancy.astype(np.float64)
    weight = np.ones(n) if decision.outcome.weight is None else decision.outcome.weight.astype(np.float64)
    valid = ~np.isnan(values)
    assert (numbers["kept"], numbers["dropped"], numbers["scored"]) == (keep.sum(), (~keep).sum(), n)
    dropped_reasons = [REASONS[value] for value in decision.reason[~keep]]
    assert numbers["reasons"] == {name: dropped_reasons.count(name) for name in sorted(set(dropped_reasons))}
    total = weight[keep].sum()
    assert numbers["effective_size"] == pytest.approx(total**2 / (weight[keep] ** 2).sum() if keep.any() else 0)

    bin_index = np.zeros(n, dtype=int)
    bin_index[valid] = np.minimum((values[valid] + 1) / 2 * num_bins, num_bins - 1).astype(int)
    for name, mass, selected in (("before", np.ones(n), valid), ("after", weight, keep)):
        counts = np.bincount(bin_index[selected], weights=mass[selected], minlength=num_bins)
        assert numbers[f"counts_{name}"] == pytest.approx(counts.tolist())
        before = np.bincount(bin_index[valid], minlength=num_bins)
        assert numbers[name]["distance"] == pytest.approx(distance_to_uniform(counts, available=before))
        if selected.any():
            assert numbers[name]["ks"] == pytest.approx(ks_of(values[selected], mass[selected]), abs=0.001)
            assert numbers[name]["positive"] == pytest.approx(
                mass[selected & (values > 0)].sum() / mass[selected].sum()
            )
    if valid.any() and not weighted:
        assert numbers["before"]["ks"] == pytest.approx(
            kstest(values[valid], "uniform", args=(-1, 2)).statistic, abs=0.001
        )
    for split in score_files.splits:
        selected = valid & (batch.split == score_files.splits.index(split))
        if selected.any():
            before = np.bincount(bin_index[selected], minlength=num_bins)
            after = np.bincount(bin_index[selected & keep], weights=weight[selected & keep], minlength=num_bins)
            assert numbers["distances"][split] == pytest.approx(distance_to_uniform(after, available=before))
        else:
            assert split not in numbers["distances"]
    for class_index, entry in enumerate(numbers["classes"]):
        selected = valid & (batch.label == class_index)
        assert entry["name"] == score_files.class_names[class_index]
        assert (entry["before"], entry["after"]) == (selected.sum(), pytest.approx(weight[selected & keep].sum()))
        assert entry["ks_before"] == pytest.approx(
            ks_of(values[selected], np.ones(n)[selected]) if selected.any() else 0, abs=0.001
        )
        before = np.bincount(bin_index[selected], minlength=num_bins)
        after = np.bincount(bin_index[selected & keep], weights=weight[selected & keep], minlength=num_bins)
        assert entry["distance_after"] == pytest.approx(distance_to_uniform(after, available=before))
        assert entry["empty_bins"] == (before == 0).sum()
    check_shortages(numbers, batch, bin_index, valid=valid, keep=keep, weight=weight)


def check_shortages(
    numbers: dict[str, Any], batch: ScoreBatch, bin_index: Array, *, valid: Array, keep: Array, weight: Array
) -> None:
    """Check the shortages: the uniform share of a bin is its kept mass divided by the number of non-empty classes."""
    present = sorted(set(batch.label[valid].tolist()))
    expected = {}
    for bin_number in set(bin_index[valid].tolist()):
        share = weight[keep & valid & (bin_index == bin_number)].sum() / len(present)
        for label in present:
            has = int((valid & (bin_index == bin_number) & (batch.label == label)).sum())
            if share - has > 1e-9:
                expected[(bin_number, label)] = share - has
    shortages = [(entry["bin"], entry["class"], entry["even_share"] - entry["has"]) for entry in numbers["shortages"]]
    assert len(shortages) == min(len(expected), MAX_SHORTAGES)
    amounts = [amount for _, _, amount in shortages]
    assert amounts == sorted(amounts, reverse=True)
    assert amounts == pytest.approx(sorted(expected.values(), reverse=True)[:MAX_SHORTAGES])
    for entry in numbers["shortages"]:
        assert entry["low"] == pytest.approx(-1 + 2 / numbers["bins"] * entry["bin"])
        assert entry["high"] - entry["low"] == pytest.approx(2 / numbers["bins"])


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for child in value.values() for leaf in leaves(child)]
    return [leaf for child in value for leaf in leaves(child)] if isinstance(value, list) else [value]


def test_many_classes_reduce_only_the_accuracy_of_ks() -> None:
    score_files = open_drawn_scores(4_000, num_classes=3_000, seed=0)
    (batch,) = score_files.batches()
    decision = decision_of(batch, seed=0, weighted=False)
    stats = SplitStats(score_files, between="audio:visual", num_bins=20)
    stats.add(batch, decision, REASONS)
    numbers = stats.numbers()
    assert len(numbers["classes"]) == len(score_files.classes) > 2_000
    assert sum(entry["after"] for entry in numbers["classes"]) == numbers["kept"]
    expected = kstest(decision.discrepancy.astype(np.float64), "uniform", args=(-1, 2)).statistic
    assert numbers["before"]["ks"] == pytest.approx(expected, abs=0.05)
    assert len(numbers["shortages"]) == MAX_SHORTAGES


def test_numbers_without_rows_are_zero() -> None:
    score_files = open_drawn_scores(5, num_classes=1, seed=0)
    numbers = SplitStats(score_files, between="audio:visual", num_bins=4).numbers()
    assert (numbers["scored"], numbers["effective_size"], numbers["reasons"], numbers["distances"]) == (0, 0.0, {}, {})
    assert numbers["before"] == {"distance": 0.0, "ks": 0.0, "positive": 0.0}
    assert numbers["empty_bins"] == [0, 1, 2, 3]
    assert numbers["counts_after"] == [0.0] * 4


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
