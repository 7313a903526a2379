"""Laws of the balanced split: what it keeps is uniform within the tolerance, nothing larger is, and no row is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.stats import kstest

from mmaudit.audit.errors import ConfigError, ScoreError
from mmaudit.audit.score import ScoreTable
from mmaudit.rebalance.balanced import (
    CURVE,
    BalancedConfig,
    BalancedSplit,
    balanced_split,
    bin_of,
    distance_to_uniform,
    largest_level,
    largest_pair,
    share_among_classes,
    size_curve,
    water_fill,
)
from mmaudit.rebalance.manifest import make_manifest, read_dropped, read_manifest, write_manifest

Counts = NDArray[np.int64]

# Discrepancies measured on RAVDESS, 1,440 samples in 20 bins (docs: 20 samples are exactly uniform).
RAVDESS = np.array([4, 7, 18, 33, 45, 62, 79, 98, 164, 206, 172, 140, 132, 91, 70, 53, 33, 23, 9, 1])

SHAPES: dict[str, Callable[[np.random.Generator, int], NDArray[np.float64]]] = {
    "flat": lambda rng, n: rng.uniform(-1, 1, n),
    "skewed": lambda rng, n: 2 * rng.beta(2, 8, n) - 1,
    "saturated": lambda rng, n: 2 * rng.beta(0.2, 0.2, n) - 1,
    "ends": lambda rng, n: rng.choice([-1.0, 0.0, 1.0], n),
    "constant": lambda rng, n: np.full(n, 0.25),
    "one bin": lambda rng, n: rng.uniform(0.001, 0.009, n),
}


def table_of(values: NDArray[np.floating[Any]], label: NDArray[np.integer[Any]]) -> ScoreTable:
    """Give a score table in which D is as told."""
    return ScoreTable(
        sample_id=np.array([f"s{number:05d}" for number in range(len(values))], dtype=object),
        label=label.astype(np.int32),
        label_name=np.array([f"class {one}" for one in label], dtype=object),
        modalities=("audio", "visual"),
        confidence=np.stack([np.maximum(values, 0), np.maximum(-values, 0)], axis=1).astype(np.float32),
    )


@st.composite
def tables(draw: st.DrawFn) -> ScoreTable:
    n, classes = draw(st.integers(1, 150)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    values = SHAPES[draw(st.sampled_from(sorted(SHAPES)))](rng, n)
    return table_of(values, rng.integers(0, classes, n) if draw(st.booleans()) else np.minimum(rng.poisson(0.4, n), 4))


TOLERANCE = st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0])
BINS = st.sampled_from([2, 3, 7, 20])
AVAILABLE = st.lists(st.integers(0, 12), min_size=2, max_size=6).map(np.array)


def cut_to(available: Counts, level: int) -> Counts:
    return np.minimum(available, level)


def slow_distance(kept: Counts, available: Counts) -> Fraction:
    """Give the total variation to uniform, exactly."""
    filled = [int(one) for one, there in zip(kept, available, strict=True) if there]
    return sum((abs(Fraction(one, sum(filled)) - Fraction(1, len(filled))) for one in filled), Fraction(0)) / 2


def bins_of(table: Any, num_bins: int) -> Counts:
    """Count the discrepancies of an Arrow table by bin, in rational numbers."""
    values = [Fraction(value) for value in table["discrepancy"].to_pylist()]
    numbers = [min(num_bins - 1, floor((value + 1) / 2 * num_bins)) for value in values]
    return np.bincount(numbers, minlength=num_bins)


def kept_ids(scores: ScoreTable, split: BalancedSplit) -> set[str]:
    return set(scores.sample_id[split.selection.keep])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables(), TOLERANCE, BINS)
def test_what_the_files_hold_is_uniform_and_whole(
    tmp_path: Path, scores: ScoreTable, tolerance: float, num_bins: int
) -> None:
    split = balanced_split(scores, BalancedConfig(bins=num_bins, tolerance=tolerance), seed=1)
    write_manifest(*make_manifest(scores, split.selection), tmp_path / "m.parquet")
    manifest = read_manifest(tmp_path / "m.parquet")
    kept, dropped = manifest.table, read_dropped(tmp_path / "m.parquet", manifest)
    assert dropped is not None
    ids = kept["sample_id"].to_pylist() + dropped["sample_id"].to_pylist()
    assert sorted(ids) == sorted(scores.sample_id)
    held, left = bins_of(kept, num_bins), bins_of(dropped, num_bins)
    assert np.bincount(kept["bin"].to_pylist(), minlength=num_bins).tolist() == held.tolist()
    distance = slow_distance(held, held + left)
    assert split.uniformity_after.distance == pytest.approx(float(distance), abs=1e-12)
    assert float(distance) <= tolerance + 1e-9
    assert split.after.sum(axis=1).tolist() == held.tolist()
    assert split.before.sum(axis=1).tolist() == (held + left).tolist()
    assert split.empty_bins == [index for index, here in enumerate(held + left) if here == 0]
    assert set(dropped["reason"].to_pylist()) <= {"bin-full"}
    assert all(row["score"] >= row["threshold"] for row in dropped.to_pylist())


@settings(deadline=None)
@given(AVAILABLE, st.sampled_from([0.0, 0.01, 0.03, 0.05, 0.1, 0.2, 0.37, 1.0]))
def test_the_level_is_the_largest_there_is(available: Counts, tolerance: float) -> None:
    assume(available.any())
    fitting = [
        level
        for level in range(1, int(available.max()) + 1)
        if slow_distance(cut_to(available, level), available) <= Fraction(str(tolerance))
    ]
    assert largest_level(available, tolerance=tolerance) == max(fitting)


@settings(deadline=None, max_examples=60)
@given(AVAILABLE, st.sampled_from([0.0, 0.01, 0.03, 0.05, 0.1, 0.2, 0.37]))
def test_no_other_choice_keeps_as_many_as_the_next_level_would(available: Counts, tolerance: float) -> None:
    """An exact search over all counts, not levels alone, ends below the next level: only a remainder is lost."""
    filled = available[available > 0]
    assume(len(filled))
    level = largest_level(available, tolerance=tolerance)
    best = best_size(filled, tolerance)
    assert cut_to(available, level).sum() <= best
    if level < available.max():
        assert best < cut_to(available, level + 1).sum()


def best_size(available: Counts, tolerance: float) -> int:
    """Give the size of the largest set within the tolerance, by integer programming.

    Unknowns are b counts x and b bounds d >= |b x - N|, with N the sum of x and the sum of d at most 2 b tolerance N.
    """
    bins = len(available)
    over = bins * np.eye(bins) - np.ones((bins, bins))
    signs = [np.c_[over, -np.eye(bins)], np.c_[-over, -np.eye(bins)]]
    total = np.r_[np.full(bins, -2 * bins * tolerance), np.ones(bins)]
    found = milp(
        c=np.r_[-np.ones(bins), np.zeros(bins)],
        constraints=LinearConstraint(np.vstack([*signs, total]), ub=0.0),
        bounds=Bounds(0, np.r_[available, np.full(bins, np.inf)]),
        integrality=np.r_[np.ones(bins), np.zeros(bins)],
    )
    assert found.success
    return round(-float(found.fun))


@settings(deadline=None)
@given(tables())
def test_tolerance_zero_is_exactly_uniform_over_the_filled_bins(scores: ScoreTable) -> None:
    split = balanced_split(scores, BalancedConfig(tolerance=0), seed=0)
    before, after = split.before.sum(axis=1), split.after.sum(axis=1)
    assert set(after[before > 0].tolist()) == {before[before > 0].min()}
    assert split.uniformity_after.distance == pytest.approx(0, abs=1e-12)


@settings(deadline=None)
@given(tables(), st.data())
def test_the_size_asked_for_is_exact(scores: ScoreTable, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(scores)))
    split = balanced_split(scores, BalancedConfig(size=size), seed=0)
    before, after = split.before.sum(axis=1), split.after.sum(axis=1)
    assert split.selection.keep.sum() == size
    assert (after[after < before] >= after.max() - 1).all()


@pytest.mark.parametrize("size", [11, 1_000])
def test_a_size_beyond_the_table_is_refused(size: int) -> None:
    scores = table_of(np.linspace(-1, 1, 10), np.zeros(10, int))
    with pytest.raises(ConfigError, match=f"--size {size}: there are 10 scored samples"):
        balanced_split(scores, BalancedConfig(size=size), seed=0)


@settings(deadline=None)
@given(AVAILABLE.filter(np.any))
def test_more_tolerance_never_keeps_fewer(available: Counts) -> None:
    points = size_curve([available], CURVE)
    assert [point.tolerance for point in points] == sorted(CURVE)
    assert [point.size for point in points] == sorted(point.size for point in points)
    assert [point.distance for point in points] == sorted(point.distance for point in points)
    assert all(point.distance <= point.tolerance + 1e-9 for point in points)
    assert size_curve([available], (1.0,))[0].size == available.sum()


def test_the_curve_names_the_split_that_is_made() -> None:
    scores = table_of(2 * np.random.default_rng(0).beta(2, 5, 400) - 1, np.zeros(400, int))
    for point in balanced_split(scores, BalancedConfig(), seed=0).curve:
        split = balanced_split(scores, BalancedConfig(tolerance=point.tolerance), seed=0)
        assert split.selection.keep.sum() == point.size
        assert split.uniformity_after.distance == point.distance


@pytest.mark.parametrize("num_modalities", [2, 3])
def test_test_samples_have_no_part_in_choosing_the_others(num_modalities: int) -> None:
    rng = np.random.default_rng(0)
    n = 400
    split = np.where(np.arange(n) % 4 == 0, "test", "train").astype(object)
    confidence = rng.beta(0.6, 0.6, (n, num_modalities)).astype(np.float32)
    label = rng.integers(0, 5, n).astype(np.int32)
    kept = []
    for changed in (False, True):
        test = (split == "test") & changed
        scores = ScoreTable(
            sample_id=np.array([f"s{row}" for row in range(n)], dtype=object),
            label=np.where(test, 0, label).astype(np.int32),
            label_name=np.array([str(row) for row in np.where(test, 0, label)], dtype=object),
            modalities=tuple("abc"[:num_modalities]),
            confidence=np.where(test[:, None], 1 - confidence[:, ::-1], confidence),
            split=split,
        )
        found = balanced_split(scores, BalancedConfig(), seed=0).selection
        kept.append((found.between, found.keep[split == "train"].tolist()))
    assert kept[0] == kept[1]


def test_each_split_is_uniform_on_its_own() -> None:
    rng = np.random.default_rng(0)
    scores = table_of(2 * rng.beta(2, 5, 900) - 1, rng.integers(0, 3, 900))
    scores = replace(scores, split=rng.choice(["train", "validation", "test"], 900).astype(object))
    found = balanced_split(scores, BalancedConfig(bins=10), seed=0)
    assert set(found.distances) == {"train", "validation", "test"}
    assert max(found.distances.values()) <= 0.05


def test_ravdess_is_traded_as_measured() -> None:
    exact, five, ten = size_curve([RAVDESS], (0.0, 0.05, 0.1))
    assert RAVDESS.sum() == 1_440
    assert exact.size == 20
    assert five.size == pytest.approx(95, abs=10)
    assert ten.size == pytest.approx(200, abs=20)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 80), st.randoms(use_true_random=False))
def test_water_is_filled_as_by_single_drops(sizes: list[int], total: int, random: Any) -> None:
    order = random.sample(range(len(sizes)), len(sizes))
    drops, left = [0] * len(sizes), min(total, sum(sizes))
    while left:
        for vessel in order:
            if left and drops[vessel] < sizes[vessel]:
                drops[vessel] += 1
                left -= 1
    filled = water_fill(np.array(sizes), total, np.array(order))
    # Drops go round by round: in the last round too they go to those of `order` that are still open.
    assert filled.tolist() == drops


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6), st.floats(0, 1))
def test_a_bin_is_shared_by_its_classes_as_evenly_as_they_allow(b: int, k: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    before = rng.integers(0, 10, (b, k))
    quota = np.floor(before.sum(axis=1) * share).astype(np.int64)
    taken = share_among_classes(before, quota)
    assert taken.sum(axis=1).tolist() == quota.tolist()
    assert (taken <= before).all()
    for here, there in zip(taken, before, strict=True):
        assert (here[here < there] >= here.max() - 1).all()


def test_single_leftovers_do_not_all_go_to_one_class() -> None:
    taken = share_among_classes(np.full((9, 3), 5), np.full(9, 4))
    assert taken.sum(axis=0).tolist() == [12, 12, 12]


@settings(deadline=None)
@given(tables(), st.integers(0, 99))
def test_row_order_does_not_matter(scores: ScoreTable, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(scores))
    columns = ("sample_id", "label", "label_name", "confidence")
    moved = replace(scores, **{name: getattr(scores, name)[order] for name in columns})
    split, again = (balanced_split(each, BalancedConfig(), seed=seed) for each in (scores, moved))
    assert kept_ids(moved, again) == kept_ids(scores, split)


def test_another_seed_keeps_others_and_as_many() -> None:
    scores = table_of(np.repeat([-0.5, 0.5], [200, 20]), np.arange(220) % 2)
    splits = [balanced_split(scores, BalancedConfig(tolerance=0), seed=seed) for seed in range(2)]
    assert splits[0].after.tolist() == splits[1].after.tolist()
    first, second = (kept_ids(scores, split) for split in splits)
    full, scarce = set(scores.sample_id[:200]), set(scores.sample_id[200:])
    assert first & scarce == second & scarce == scarce
    assert len(first & second & full) < 10  # 20 of 200 each: 2 in common are expected


def test_every_sample_of_a_cell_is_as_likely() -> None:
    scores = table_of(np.repeat([-0.5, 0.5], [12, 3]), np.zeros(15, int))
    drawn = np.zeros(12)
    for seed in range(400):
        drawn += balanced_split(scores, BalancedConfig(tolerance=0), seed=seed).selection.keep[:12]
    assert drawn.sum() == 1_200
    assert (((drawn - 100) ** 2) / 75).sum() < 40  # about chi squared, 11 degrees of freedom: p = 4e-5


@settings(deadline=None)
@given(tables())
def test_classes_may_have_any_numbers(scores: ScoreTable) -> None:
    renumbered = replace(scores, label=(scores.label * 500_000_000 - 7).astype(np.int32))
    split, again = (balanced_split(each, BalancedConfig(), seed=0) for each in (scores, renumbered))
    assert kept_ids(renumbered, again) == kept_ids(scores, split)


@pytest.mark.parametrize("num_bins", [2, 5, 20])
def test_the_ends_and_the_middle_have_their_bins(num_bins: int) -> None:
    found = bin_of(np.array([-1, 0, 1], np.float32), num_bins=num_bins)
    assert found.tolist() == [0, num_bins // 2, num_bins - 1]


@given(st.floats(-1, 1, width=32), st.integers(2, 50))
def test_bins_are_equal(value: float, num_bins: int) -> None:
    assume(value == 0 or abs(value) > 1e-6)  # 1 + value is then exact
    expected = min(num_bins - 1, floor((Fraction(value) + 1) / 2 * num_bins))
    assert bin_of(np.array([value], np.float32), num_bins=num_bins).tolist() == [expected]


@settings(deadline=None)
@given(tables())
def test_uniformity_is_that_of_scipy(scores: ScoreTable) -> None:
    split = balanced_split(scores, BalancedConfig(), seed=0)
    values = scores.discrepancy()
    for found, rows in (
        (split.uniformity_before, np.ones(len(values), bool)),
        (split.uniformity_after, split.selection.keep),
    ):
        expected = kstest(values[rows].astype(np.float64), "uniform", args=(-1, 2)).statistic
        assert found.ks == pytest.approx(expected, abs=1e-9)
        assert found.positive == pytest.approx(np.mean(values[rows] > 0))


def test_distance_is_over_the_filled_bins_alone() -> None:
    available = np.array([0, 5, 5, 0])
    assert distance_to_uniform(np.array([0, 2, 2, 0]), available=available) == 0
    assert distance_to_uniform(np.array([0, 3, 1, 0]), available=available) == 0.25
    assert distance_to_uniform(np.array([0, 4, 0, 0]), available=available) == 0.5


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 4), st.integers(0, 10**6), TOLERANCE)
def test_of_more_modalities_the_pair_with_the_largest_split_is_taken(m: int, seed: int, tolerance: float) -> None:
    rng = np.random.default_rng(seed)
    names = ("audio", "visual", "text", "depth")[:m]
    confidence = rng.beta(rng.uniform(0.3, 5, m), rng.uniform(0.3, 5, m), (60, m)).astype(np.float32)
    scores = replace(table_of(np.zeros(60), np.zeros(60, int)), modalities=names, confidence=confidence)
    config = BalancedConfig(bins=6, tolerance=tolerance)
    sizes = {
        f"{first}:{second}": balanced_split(scores, config, seed=0, between=f"{first}:{second}").selection.keep.sum()
        for first, second in combinations(names, 2)
    }
    chosen = largest_pair(scores, config)
    assert chosen == next(pair for pair in sizes if sizes[pair] == max(sizes.values()))
    assert balanced_split(scores, config, seed=0).selection.between == chosen


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), TOLERANCE, st.sampled_from([None, 5]))
def test_who_lacks_one_of_the_pair_is_left_out_and_changes_nothing_else(
    seed: int, tolerance: float, size: int | None
) -> None:
    rng = np.random.default_rng(seed)
    confidence = rng.random((60, 3)).astype(np.float32)
    missing = rng.integers(0, 6, 60)  # 0, 1, 2: that one
    confidence[np.arange(60)[missing < 3], missing[missing < 3]] = np.nan
    scores = replace(
        table_of(np.zeros(60), rng.integers(0, 3, 60)), modalities=("audio", "visual", "text"), confidence=confidence
    )
    config, here = BalancedConfig(bins=6, tolerance=tolerance, size=size), missing > 1
    split = balanced_split(scores, config, seed=0, between="audio:visual")
    fewer = replace(
        scores,
        sample_id=scores.sample_id[here],
        label=scores.label[here],
        label_name=scores.label_name[here],
        confidence=confidence[here],
    )
    alone = balanced_split(fewer, config, seed=0, between="audio:visual")
    assert kept_ids(scores, split) == kept_ids(fewer, alone)
    assert (split.uniformity_before, split.uniformity_after) == (alone.uniformity_before, alone.uniformity_after)
    assert split.curve == alone.curve
    manifest, dropped = make_manifest(scores, split.selection)
    assert manifest.table["discrepancy"].null_count == 0
    rows = {row["sample_id"]: row for row in dropped.to_pylist()}
    for name in scores.sample_id[~here]:
        row = rows[name]
        assert row["reason"] == "missing-modality"
        assert [row[column] for column in ("score", "bin", "discrepancy")] == [None] * 3
    assert {row["reason"] for name, row in rows.items() if name in fewer.sample_id} <= {"bin-full"}


def test_a_pair_that_nobody_has_is_refused() -> None:
    confidence = np.array([[0.1, np.nan, 0.5], [np.nan, 0.5, 0.1]], np.float32)
    scores = replace(
        table_of(np.zeros(2), np.zeros(2, int)), modalities=("audio", "visual", "text"), confidence=confidence
    )
    with pytest.raises(ScoreError, match="no sample has a discrepancy between audio:visual"):
        balanced_split(scores, BalancedConfig(), seed=0, between="audio:visual")
    assert balanced_split(scores, BalancedConfig(), seed=0).selection.between == "audio:text"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bins": 1}, "split.bins is 1; a distribution needs at least 2"),
        ({"tolerance": -0.1}, "split.tolerance is -0.1; .* lies in"),
        ({"tolerance": 1.1}, "split.tolerance is 1.1; .* lies in"),
        ({"tolerance": float("nan")}, "split.tolerance is nan"),
        ({"size": 0}, "split.size is 0; it must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BalancedConfig(**options)
