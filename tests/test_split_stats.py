"""Laws of the tally: what it tells of a split is what one look at all rows together would, however they pass by."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import kstest

from mmaudit.audit.scores.table import ScoreTable
from mmaudit.rebalance.binning import distance_to_uniform
from mmaudit.rebalance.score_tables import ScoreBatch, ScoreFiles, open_scores
from mmaudit.rebalance.selection import Decision, RowOutcome
from mmaudit.rebalance.split_stats import MAX_SHORTAGES, SplitStats

Array = NDArray[Any]
REASONS = ("out", "missing-modality", "in-other")


def shards_of(n: int, *, num_classes: int, seed: int, missing: bool = False) -> ScoreFiles:
    rng = np.random.default_rng(seed)
    confidence = rng.beta(0.7, 0.7, (n, 3)).astype(np.float32)
    if missing:
        confidence[rng.random(n) < 0.3, 0] = np.nan
    label = rng.integers(0, num_classes, n)
    scores = ScoreTable(
        sample_id=np.array([f"s{one}" for one in range(n)], dtype=object),
        label=label.astype(np.int32),
        label_name=np.array([f"class {one:05d}" for one in label], dtype=object),
        modalities=("audio", "visual", "text"),
        confidence=confidence,
        split=rng.choice(["train", "test"], n).astype(object),
    )
    return open_scores(scores, seed=0)


def decision_of(rows: ScoreBatch, *, seed: int, weighted: bool) -> Decision:
    """Keep rows by chance, never one that has no discrepancy."""
    rng = np.random.default_rng(seed)
    n, values = len(rows), rows.discrepancy("audio:visual")
    lacks = np.isnan(values)
    keep = (rng.random(n) < 0.5) & ~lacks
    nothing = np.zeros(n)
    return Decision(
        keep=keep,
        discrepancy=values,
        rank=np.zeros(n, dtype=np.int32),
        reason=np.where(lacks, 1, np.where(rng.random(n) < 0.2, 2, 0)).astype(np.int8),
        outcome=RowOutcome(
            score=nothing, threshold=nothing, weight=rng.uniform(0.1, 3, n).astype(np.float32) if weighted else None
        ),
    )


def part_of(rows: ScoreBatch, found: Decision, some: slice) -> tuple[ScoreBatch, Decision]:
    length = len(range(*some.indices(len(rows))))
    weight = found.outcome.weight
    return (
        ScoreBatch(
            table=rows.table.slice(some.start, length),
            key=rows.key[some],
            label=rows.label[some],
            split=rows.split[some],
            confidence=rows.confidence[some],
            excluded_by=rows.excluded_by[some],
            modalities=rows.modalities,
        ),
        Decision(
            keep=found.keep[some],
            discrepancy=found.discrepancy[some],
            rank=found.rank[some],
            reason=found.reason[some],
            outcome=RowOutcome(
                score=found.outcome.score[some],
                threshold=found.outcome.threshold[some],
                weight=None if weight is None else weight[some],
            ),
        ),
    )


def ks_of(values: Array, weight: Array) -> float:
    """Largest difference to the uniform distribution function, of weighted values, at each of them."""
    order = np.argsort(values)
    share = np.r_[0.0, np.cumsum(weight[order])] / weight.sum()
    even = (values[order] + 1) / 2
    return float(max(np.abs(share[1:] - even).max(), np.abs(share[:-1] - even).max()))


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 200),
    st.integers(1, 6),
    st.sampled_from([2, 5, 20]),
    st.integers(0, 10**6),
    st.booleans(),
    st.booleans(),
)
def test_the_numbers_are_those_of_all_rows_together(
    n: int, num_classes: int, num_bins: int, seed: int, weighted: bool, missing: bool
) -> None:
    score_files = shards_of(n, num_classes=num_classes, seed=seed, missing=missing)
    (rows,) = score_files.batches()
    found = decision_of(rows, seed=seed, weighted=weighted)
    stats = SplitStats(score_files, between="audio:visual", num_bins=num_bins)
    cut = n // 3
    for some in (slice(0, cut), slice(cut, n)):  # n // 3 may be 0: a batch without rows
        stats.add(*part_of(rows, found, some), REASONS)
    told = stats.numbers()
    assert json.loads(json.dumps(told)) == told  # plain values
    assert not any(isinstance(one, np.generic) for one in flat(told))

    keep, values = found.keep, found.discrepancy.astype(np.float64)
    weight = np.ones(n) if found.outcome.weight is None else found.outcome.weight.astype(np.float64)
    there = ~np.isnan(values)
    assert (told["kept"], told["dropped"], told["scored"]) == (keep.sum(), (~keep).sum(), n)
    left = [REASONS[one] for one in found.reason[~keep]]
    assert told["reasons"] == {name: left.count(name) for name in sorted(set(left))}
    total = weight[keep].sum()
    assert told["effective_size"] == pytest.approx(total**2 / (weight[keep] ** 2).sum() if keep.any() else 0)

    place = np.zeros(n, dtype=int)
    place[there] = np.minimum((values[there] + 1) / 2 * num_bins, num_bins - 1).astype(int)
    for name, mass, here in (("before", np.ones(n), there), ("after", weight, keep)):
        counts = np.bincount(place[here], weights=mass[here], minlength=num_bins)
        assert told[f"counts_{name}"] == pytest.approx(counts.tolist())
        before = np.bincount(place[there], minlength=num_bins)
        assert told[name]["distance"] == pytest.approx(distance_to_uniform(counts, available=before))
        if here.any():
            assert told[name]["ks"] == pytest.approx(ks_of(values[here], mass[here]), abs=0.001)
            assert told[name]["positive"] == pytest.approx(mass[here & (values > 0)].sum() / mass[here].sum())
    if there.any() and not weighted:
        assert told["before"]["ks"] == pytest.approx(
            kstest(values[there], "uniform", args=(-1, 2)).statistic, abs=0.001
        )
    for split in score_files.splits:
        here = there & (rows.split == score_files.splits.index(split))
        if here.any():
            before = np.bincount(place[here], minlength=num_bins)
            after = np.bincount(place[here & keep], weights=weight[here & keep], minlength=num_bins)
            assert told["distances"][split] == pytest.approx(distance_to_uniform(after, available=before))
        else:
            assert split not in told["distances"]
    for number, one in enumerate(told["classes"]):
        here = there & (rows.label == number)
        assert one["name"] == score_files.class_names[number]
        assert (one["before"], one["after"]) == (here.sum(), pytest.approx(weight[here & keep].sum()))
        assert one["ks_before"] == pytest.approx(ks_of(values[here], np.ones(n)[here]) if here.any() else 0, abs=0.001)
        before = np.bincount(place[here], minlength=num_bins)
        after = np.bincount(place[here & keep], weights=weight[here & keep], minlength=num_bins)
        assert one["distance_after"] == pytest.approx(distance_to_uniform(after, available=before))
        assert one["empty_bins"] == (before == 0).sum()
    check_shortages(told, rows, place, there=there, kept=keep, weight=weight)


def check_shortages(
    told: dict[str, Any], rows: ScoreBatch, place: Array, *, there: Array, kept: Array, weight: Array
) -> None:
    """Each bin with samples wants its kept mass shared evenly among the classes that have any."""
    present = sorted(set(rows.label[there].tolist()))
    expected = {}
    for one in set(place[there].tolist()):
        even = weight[kept & there & (place == one)].sum() / len(present)
        for label in present:
            has = int((there & (place == one) & (rows.label == label)).sum())
            if even - has > 1e-9:
                expected[(one, label)] = even - has
    found = [(entry["bin"], entry["class"], entry["even"] - entry["has"]) for entry in told["shortages"]]
    assert len(found) == min(len(expected), MAX_SHORTAGES)
    lacking = [each for _, _, each in found]
    assert lacking == sorted(lacking, reverse=True)
    assert lacking == pytest.approx(sorted(expected.values(), reverse=True)[:MAX_SHORTAGES])
    for entry in told["shortages"]:
        assert entry["low"] == pytest.approx(-1 + 2 / told["bins"] * entry["bin"])
        assert entry["high"] - entry["low"] == pytest.approx(2 / told["bins"])


def flat(told: Any) -> list[Any]:
    if isinstance(told, dict):
        return [each for one in told.values() for each in flat(one)]
    return [each for one in told for each in flat(one)] if isinstance(told, list) else [told]


def test_memory_does_not_grow_with_rows_and_many_classes_cost_accuracy_only() -> None:
    score_files = shards_of(4_000, num_classes=3_000, seed=0)
    (rows,) = score_files.batches()
    found = decision_of(rows, seed=0, weighted=False)
    stats = SplitStats(score_files, between="audio:visual", num_bins=20)
    stats.add(rows, found, REASONS)
    told = stats.numbers()
    assert len(told["classes"]) == len(score_files.classes) > 2_000
    assert sum(one["after"] for one in told["classes"]) == told["kept"]
    expected = kstest(found.discrepancy.astype(np.float64), "uniform", args=(-1, 2)).statistic
    assert told["before"]["ks"] == pytest.approx(expected, abs=0.05)
    assert len(told["shortages"]) == MAX_SHORTAGES


def test_nothing_at_all_is_told_as_nothing() -> None:
    score_files = shards_of(5, num_classes=1, seed=0)
    told = SplitStats(score_files, between="audio:visual", num_bins=4).numbers()
    assert (told["scored"], told["effective_size"], told["reasons"], told["distances"]) == (0, 0.0, {}, {})
    assert told["before"] == {"distance": 0.0, "ks": 0.0, "positive": 0.0}
    assert told["empty_bins"] == [0, 1, 2, 3]
    assert told["counts_after"] == [0.0] * 4
