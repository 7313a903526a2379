"""Tests of the balanced split: uniform within the tolerance, as large as possible, and no row lost.

Quotas are checked against integer programming, bins against numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations
from math import floor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.stats import kstest

from mmaudit.audit.errors import ConfigError, ScoreError
from mmaudit.audit.scores.table import ScoreTable
from mmaudit.rebalance.balanced import (
    AUTO,
    CURVE_TOLERANCES,
    BalancedConfig,
    BalancedRule,
    CurvePoint,
    balancing_weights,
    choose_num_bins,
    fill_bins,
    largest_level,
    largest_pair,
    plan_balanced,
    share_among_classes,
    size_curve,
    water_fill,
)
from mmaudit.rebalance.manifest import read_dropped, read_manifest
from mmaudit.rebalance.score_tables import open_scores
from mmaudit.rebalance.selection import Selection, select_rows
from mmaudit.rebalance.split import write_split

Counts = NDArray[np.int64]

SHAPES: dict[str, Callable[[np.random.Generator, int], NDArray[np.float64]]] = {
    "flat": lambda rng, n: rng.uniform(-1, 1, n),
    "skewed": lambda rng, n: 2 * rng.beta(2, 8, n) - 1,
    "saturated": lambda rng, n: 2 * rng.beta(0.2, 0.2, n) - 1,
    "ends": lambda rng, n: rng.choice([-1.0, 0.0, 1.0], n),
    "constant": lambda rng, n: np.full(n, 0.25),
    "one bin": lambda rng, n: rng.uniform(0.001, 0.009, n),
}
AVAILABLE = st.lists(st.integers(0, 12), min_size=2, max_size=6).map(np.array)
# Discrepancies measured on RAVDESS, 1,440 samples in 20 bins (docs: 20 samples are exactly uniform).
RAVDESS = np.array([4, 7, 18, 33, 45, 62, 79, 98, 164, 206, 172, 140, 132, 91, 70, 53, 33, 23, 9, 1])


TOLERANCE = st.sampled_from([0.0, 0.01, 0.03, 0.05, 0.1, 0.2, 0.37, 0.5, 1.0])
BINS = st.sampled_from([2, 3, 7, 20])
KS_STEP = 0.001  # the reported one is taken at the edges of about a thousand fine bins


def table_of(values: NDArray[np.floating[Any]], label: NDArray[np.integer[Any]]) -> ScoreTable:
    """Return a score table with these discrepancies."""
    return ScoreTable(
        sample_id=np.array([f"s{number:05d}" for number in range(len(values))], dtype=object),
        label=label.astype(np.int32),
        label_name=np.array([f"class {class_index}" for class_index in label], dtype=object),
        modalities=("audio", "visual"),
        confidence=np.stack([np.maximum(values, 0), np.maximum(-values, 0)], axis=1).astype(np.float32),
    )


def drawn(n: int, *, seed: int, num_modalities: int = 2, splits: tuple[str, ...] = ()) -> ScoreTable:
    """Return n samples of random confidences and three classes."""
    rng = np.random.default_rng(seed)
    label, shape = rng.integers(0, 3, n), rng.uniform(0.3, 3, (2, num_modalities))
    return replace(
        table_of(np.zeros(n), label),
        modalities=("audio", "visual", "text", "depth")[:num_modalities],
        confidence=rng.beta(shape[0], shape[1], (n, num_modalities)).astype(np.float32),
        split=rng.choice(splits, n).astype(object) if splits else None,
    )


@st.composite
def tables(draw: st.DrawFn) -> ScoreTable:
    n, classes = draw(st.integers(1, 150)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    values = SHAPES[draw(st.sampled_from(sorted(SHAPES)))](rng, n)
    scores = table_of(
        values, rng.integers(0, classes, n) if draw(st.booleans()) else np.minimum(rng.poisson(0.4, n), 4)
    )
    names = draw(st.sampled_from([None, ("train",), ("train", "validation", "test")]))
    return scores if names is None else replace(scores, split=rng.choice(names, n).astype(object))


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A balanced split: before and after are (s, b, k); kept_rows and dropped only if files were written."""

    rule: BalancedRule
    selection: Selection
    numbers: dict[str, Any]
    kept_ids: set[str]
    kept_rows: pa.Table | None = None
    dropped: pa.Table | None = None

    @property
    def before(self) -> Counts:
        return self.selection.counts.reshape(self.rule.shape)

    @property
    def after(self) -> Counts:
        return self.selection.quota.reshape(self.rule.shape)

    @property
    def curve(self) -> tuple[CurvePoint, ...]:
        return self.rule.curve(self.selection.counts)


def split_of(
    source: ScoreTable | Path, config: BalancedConfig, *, seed: int = 0, between: str | None = None, files: bool = False
) -> Split:
    score_files = open_scores(source, seed=seed)
    rule = plan_balanced(score_files, config, between=between)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.parquet"
        selection = select_rows(score_files, rule, scratch=Path(folder))
        numbers = write_split(selection, path if files else None, name="balanced", recipe={}, num_bins=rule.num_bins)
        kept_manifest = read_manifest(path) if files else None
        dropped = read_dropped(path, kept_manifest) if kept_manifest else None
    ids: set[str] = set()
    for batch in score_files.batches():
        ids |= set(batch.table["sample_id"].filter(pa.array(selection.decide(batch).keep)).to_pylist())
    return Split(
        rule=rule,
        selection=selection,
        numbers=numbers,
        kept_ids=ids,
        kept_rows=kept_manifest.table if kept_manifest else None,
        dropped=dropped,
    )


def slow_distance(mass: Counts, available: Counts) -> Fraction:
    """Compute the total-variation distance to uniform exactly."""
    filled = [int(count) for count, total in zip(mass, available, strict=True) if total]
    return sum((abs(Fraction(count, sum(filled)) - Fraction(1, len(filled))) for count in filled), Fraction(0)) / 2


def bins_of(values: list[float], num_bins: int) -> list[int]:
    """Compute the bin of each discrepancy in rational numbers."""
    return [min(num_bins - 1, floor((Fraction(value) + 1) / 2 * num_bins)) for value in values]


@settings(max_examples=examples(60))
@given(tables(), TOLERANCE, BINS, st.booleans())
def test_files_hold_all_rows_and_are_uniform(
    scores: ScoreTable, tolerance: float, num_bins: int, per_class: bool
) -> None:
    config = BalancedConfig(bins=num_bins, tolerance=tolerance, per_class=per_class)
    split = split_of(scores, config, seed=1, files=True)
    kept_table, dropped, numbers = split.kept_rows, split.dropped, split.numbers
    assert kept_table is not None
    assert dropped is not None
    ids = kept_table["sample_id"].to_pylist() + dropped["sample_id"].to_pylist()
    assert sorted(ids) == sorted(scores.sample_id)
    assert set(kept_table["sample_id"].to_pylist()) == split.kept_ids
    assert (numbers["kept"], numbers["dropped"], numbers["scored"]) == (len(kept_table), len(dropped), len(scores))
    bins = bins_of(kept_table["discrepancy"].to_pylist(), num_bins)
    assert kept_table["bin"].to_pylist() == bins
    counts_kept = np.bincount(bins, minlength=num_bins)
    counts_dropped = np.bincount(bins_of(dropped["discrepancy"].to_pylist(), num_bins), minlength=num_bins)
    assert numbers["after"]["distance"] == pytest.approx(
        float(slow_distance(counts_kept, counts_kept + counts_dropped)), abs=1e-12
    )
    assert numbers["before"]["distance"] == pytest.approx(
        float(slow_distance(counts_kept + counts_dropped, counts_kept + counts_dropped)), abs=1e-12
    )
    assert (numbers["counts_after"], numbers["counts_before"]) == (
        counts_kept.tolist(),
        (counts_kept + counts_dropped).tolist(),
    )
    assert numbers["empty_bins"] == np.flatnonzero(counts_kept + counts_dropped == 0).tolist()
    assert numbers["reasons"] == ({"bin-full": len(dropped)} if len(dropped) else {})
    assert set(dropped["reason"].to_pylist()) <= {"bin-full"}
    assert all(0 <= row["threshold"] <= row["score"] <= 1 for row in dropped.to_pylist())
    assert set(kept_table["weight"].to_pylist()) == {1.0}


@settings(max_examples=examples(40))
@given(tables(), TOLERANCE, BINS)
def test_the_tolerance_holds_in_each_split(scores: ScoreTable, tolerance: float, num_bins: int) -> None:
    split = split_of(scores, BalancedConfig(bins=num_bins, tolerance=tolerance))
    assert set(split.numbers["distances"]) == set(split.rule.splits)
    for name, before, after in zip(split.rule.splits, split.before.sum(axis=2), split.after.sum(axis=2), strict=True):
        distance = float(slow_distance(after, before))
        assert split.numbers["distances"][name] == pytest.approx(distance, abs=1e-12)
        assert distance <= tolerance + 1e-9
    if len(split.rule.splits) == 1:
        assert split.numbers["after"]["distance"] <= tolerance + 1e-9


def best_size(available: Counts, tolerance: float) -> int:
    """Compute the size of the largest set within the tolerance by integer programming.

    Unknowns are b counts x and b bounds d >= |b x - N|, with N the sum of x and the sum of d at most 2 b tolerance N.
    """
    bins = len(available)
    over = bins * np.eye(bins) - np.ones((bins, bins))
    signs = [np.c_[over, -np.eye(bins)], np.c_[-over, -np.eye(bins)]]
    total = np.r_[np.full(bins, -2 * bins * tolerance), np.ones(bins)]
    solution = milp(
        c=np.r_[-np.ones(bins), np.zeros(bins)],
        constraints=LinearConstraint(np.vstack([*signs, total]), ub=0.0),
        bounds=Bounds(0, np.r_[available, np.full(bins, np.inf)]),
        integrality=np.r_[np.ones(bins), np.zeros(bins)],
    )
    assert solution.success
    return round(-float(solution.fun))


@settings(max_examples=examples(40))
@given(
    st.integers(1, 40),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.37]),
    st.sampled_from(["plain", "per class", "grid"]),
)
def test_no_larger_set_is_within_the_tolerance(n: int, seed: int, tolerance: float, kind: str) -> None:
    scores = drawn(n, seed=seed, splits=("train", "test"))
    config = BalancedConfig(
        bins=2 if kind == "grid" else 4, tolerance=tolerance, per_class=kind == "per class", grid=kind == "grid"
    )
    split = split_of(scores, config)
    for before, after in zip(split.before, split.after, strict=True):
        sets = (before.T, after.T) if kind == "per class" else (before.sum(axis=1)[None], after.sum(axis=1)[None])
        for available, quota in zip(*sets, strict=True):
            if not available.any():
                assert not quota.any()
                continue
            assert quota.tolist() == fill_bins(available, tolerance=tolerance).tolist()
            assert slow_distance(quota, available) <= Fraction(str(tolerance))
            assert quota.sum() == best_size(available[available > 0], tolerance)


@settings(max_examples=examples(40))
@given(tables())
def test_tolerance_zero_is_exactly_uniform_over_the_filled_bins(scores: ScoreTable) -> None:
    split = split_of(scores, BalancedConfig(tolerance=0))
    for before, after in zip(split.before.sum(axis=2), split.after.sum(axis=2), strict=True):
        assert set(after[before > 0].tolist()) == {before[before > 0].min()}
    assert set(split.numbers["distances"].values()) == {0.0}


@settings(max_examples=examples(40))
@given(tables(), st.data())
def test_requested_size_is_exact(scores: ScoreTable, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(scores)))
    split = split_of(scores, BalancedConfig(size=size))
    assert split.numbers["kept"] == len(split.kept_ids) == size
    for before, after in zip(split.before.sum(axis=2), split.after.sum(axis=2), strict=True):
        assert (after[after < before] >= after.max() - 1).all()
        assert abs(after.sum() - size * before.sum() / len(scores)) < 1


@pytest.mark.parametrize("size", [11, 1_000])
def test_size_larger_than_the_table_raises(size: int) -> None:
    scores = table_of(np.linspace(-1, 1, 10), np.zeros(10, int))
    with pytest.raises(ConfigError, match=f"--size: requested {size} samples, available 10"):
        split_of(scores, BalancedConfig(size=size))


@settings(max_examples=examples(40))
@given(tables(), BINS, st.sampled_from([1.0, 1.5, 4.0, 1000.0]), st.booleans())
def test_weights_keep_all_rows_and_make_the_mass_uniform(
    scores: ScoreTable, num_bins: int, max_weight: float, grid: bool
) -> None:
    split = split_of(scores, BalancedConfig(bins=num_bins, by="weight", max_weight=max_weight, grid=grid), files=True)
    kept_table = split.kept_rows
    assert kept_table is not None
    assert len(kept_table) == len(scores)
    weight = np.array(kept_table["weight"].to_pylist())
    assert weight.max() <= max_weight
    assert weight.min() > 0
    assert split.numbers["effective_size"] == pytest.approx(weight.sum() ** 2 / (weight**2).sum())
    names = np.array(["all" if name is None else name for name in kept_table["split"].to_pylist()])
    for name in np.unique(names):
        in_split, bins = names == name, np.array(kept_table["bin"].to_pylist())
        mass = np.array([weight[in_split & (bins == bin_index)].sum() for bin_index in np.unique(bins[in_split])])
        cap = np.isclose(
            [weight[in_split & (bins == bin_index)].max() for bin_index in np.unique(bins[in_split])], max_weight
        )
        uniform = in_split.sum() / len(mass)
        assert mass[~cap] == pytest.approx(np.full((~cap).sum(), uniform), rel=1e-5)
        assert (mass <= uniform * (1 + 1e-5)).all()
        if max_weight == 1000:
            assert weight[in_split].mean() == pytest.approx(1, rel=1e-5)
            assert grid or split.numbers["distances"][name] == pytest.approx(0, abs=1e-6)
    if not grid:
        assert split.numbers["counts_after"] == pytest.approx(
            [weight[np.array(kept_table["bin"].to_pylist()) == bin_index].sum() for bin_index in range(num_bins)],
            rel=1e-5,
        )


@settings(max_examples=examples(30))
@given(st.integers(1, 120), st.integers(0, 10**6), TOLERANCE)
def test_a_grid_is_uniform_over_both_confidences(n: int, seed: int, tolerance: float) -> None:
    scores = drawn(n, seed=seed)
    split = split_of(scores, BalancedConfig(bins=3, tolerance=tolerance, grid=True), files=True)
    kept_table = split.kept_rows
    assert kept_table is not None
    cell = np.minimum((scores.confidence.astype(np.float64) * 3).astype(int), 2) @ [3, 1]
    cell_of_id = dict(zip(scores.sample_id, cell.tolist(), strict=True))
    assert kept_table["bin"].to_pylist() == [cell_of_id[name] for name in kept_table["sample_id"].to_pylist()]
    quota, before = (np.bincount(cells, minlength=9) for cells in (kept_table["bin"].to_pylist(), cell))
    assert quota.tolist() == fill_bins(before, tolerance=tolerance).tolist()


def test_grid_needs_two_modalities() -> None:
    assert split_of(drawn(20, seed=0), BalancedConfig(grid=True), between="visual").rule.between == "visual:audio"
    with pytest.raises(ConfigError, match="--between text: a grid needs two confidences; name two modalities as A:B"):
        split_of(drawn(20, seed=0, num_modalities=3), BalancedConfig(grid=True), between="text")


@pytest.mark.parametrize("spread", [0.02, 0.3, 1.0])
def test_auto_num_bins_ignores_the_test_split(spread: float) -> None:
    rng = np.random.default_rng(0)
    values = np.clip(rng.normal(0.1, spread, 600), -1, 1)
    test = np.arange(600) % 3 == 0
    values[test] = rng.uniform(-1, 1, test.sum())
    scores = replace(table_of(values, np.zeros(600, int)), split=np.where(test, "test", "train").astype(object))
    counts, edges = np.histogram(values[~test], bins=4_096, range=(-1, 1))
    split = split_of(scores, BalancedConfig(bins=AUTO))
    assert split.rule.num_bins == pytest.approx(choose_num_bins((edges[1:] + edges[:-1]) / 2, counts), abs=1)
    assert split.numbers["bins"] == split.rule.num_bins


def test_curve_matches_splits_at_its_tolerances() -> None:
    scores = table_of(2 * np.random.default_rng(0).beta(2, 5, 400) - 1, np.zeros(400, int))
    for point in split_of(scores, BalancedConfig()).curve:
        split = split_of(scores, BalancedConfig(tolerance=point.tolerance))
        assert split.numbers["kept"] == point.size
        assert split.numbers["after"]["distance"] == pytest.approx(point.distance, abs=1e-12)


@pytest.mark.parametrize("num_modalities", [2, 3])
def test_test_samples_do_not_influence_other_splits(num_modalities: int) -> None:
    rng = np.random.default_rng(0)
    n = 400
    test = np.arange(n) % 4 == 0
    scores = replace(
        drawn(n, seed=1, num_modalities=num_modalities), split=np.where(test, "test", "train").astype(object)
    )
    changed = np.where(test[:, None], scores.confidence[:, ::-1] ** 2, scores.confidence)
    label = np.where(test, 0, rng.integers(0, 3, n)).astype(np.int32)
    scores = replace(
        scores, label=label, label_name=np.array([str(class_index) for class_index in label], dtype=object)
    )
    splits = [split_of(table, BalancedConfig()) for table in (scores, replace(scores, confidence=changed))]
    non_test_ids = set(scores.sample_id[~test])
    assert splits[0].rule.between == splits[1].rule.between
    assert splits[0].kept_ids & non_test_ids == splits[1].kept_ids & non_test_ids
    assert splits[0].kept_ids != splits[1].kept_ids


@settings(max_examples=examples(40))
@given(tables(), st.integers(0, 99))
def test_row_order_does_not_matter(scores: ScoreTable, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(scores))
    columns = ("sample_id", "label", "label_name", "confidence")
    reordered = replace(
        scores,
        **{name: getattr(scores, name)[order] for name in columns},
        split=None if scores.split is None else scores.split[order],
    )
    first, second = (split_of(table, BalancedConfig(), seed=seed) for table in (scores, reordered))
    assert first.kept_ids == second.kept_ids
    assert first.numbers == second.numbers


def test_seeds_keep_different_rows_of_equal_number() -> None:
    scores = table_of(np.repeat([-0.5, 0.5], [200, 20]), np.arange(220) % 2)
    splits = [split_of(scores, BalancedConfig(tolerance=0), seed=seed) for seed in range(2)]
    assert splits[0].after.tolist() == splits[1].after.tolist()
    first, second = (split.kept_ids for split in splits)
    full, scarce = set(scores.sample_id[:200]), set(scores.sample_id[200:])
    assert first & scarce == second & scarce == scarce
    assert len(first & second & full) < 10  # 20 of 200 each: 2 in common are expected


def test_samples_of_a_cell_are_equally_likely() -> None:
    scores = table_of(np.repeat([-0.5, 0.5], [12, 3]), np.zeros(15, int))
    row_of_id = {name: row for row, name in enumerate(scores.sample_id)}
    num_kept = np.zeros(15)
    for seed in range(100):
        num_kept[[row_of_id[name] for name in split_of(scores, BalancedConfig(tolerance=0), seed=seed).kept_ids]] += 1
    assert num_kept[12:].tolist() == [100] * 3
    assert num_kept[:12].sum() == 300
    assert (((num_kept[:12] - 25) ** 2) / 18.75).sum() < 40  # about chi squared, 11 degrees of freedom: p = 4e-5


@settings(max_examples=examples(30))
@given(tables())
def test_labels_may_be_any_integers(scores: ScoreTable) -> None:
    renumbered = replace(scores, label=(scores.label * 500_000_000 - 7).astype(np.int32))
    first, second = (split_of(table, BalancedConfig(), files=True) for table in (scores, renumbered))
    assert first.kept_ids == second.kept_ids
    assert first.numbers == second.numbers
    assert second.kept_rows is not None
    names = {f"class {label}": label * 500_000_000 - 7 for label in range(5)}
    assert second.kept_rows["label"].to_pylist() == [names[name] for name in second.kept_rows["label_name"].to_pylist()]


@settings(max_examples=examples(40))
@given(tables(), BINS)
def test_uniformity_matches_scipy_overall_and_per_class(scores: ScoreTable, num_bins: int) -> None:
    split = split_of(scores, BalancedConfig(bins=num_bins, tolerance=0.1))
    values = scores.discrepancy().astype(np.float64)
    keep = np.array([name in split.kept_ids for name in scores.sample_id])
    for numbers, rows in ((split.numbers["before"], np.ones(len(values), bool)), (split.numbers["after"], keep)):
        assert numbers["ks"] == pytest.approx(ks_of(values[rows]), abs=KS_STEP)
        assert numbers["positive"] == pytest.approx(np.mean(values[rows] > 0))
    bins = np.array(bins_of(values.tolist(), num_bins))
    assert [entry["name"] for entry in split.numbers["classes"]] == sorted(set(scores.label_name))
    for entry in split.numbers["classes"]:
        in_class = scores.label_name == entry["name"]
        assert (entry["before"], entry["after"]) == (in_class.sum(), (in_class & keep).sum())
        assert entry["ks_before"] == pytest.approx(ks_of(values[in_class]), abs=KS_STEP)
        assert entry["ks_after"] == pytest.approx(ks_of(values[in_class & keep]), abs=KS_STEP)
        before, after = (np.bincount(bins[rows], minlength=num_bins) for rows in (in_class, in_class & keep))
        assert entry["distance_before"] == pytest.approx(float(slow_distance(before, before)), abs=1e-12)
        if after.any():
            assert entry["distance_after"] == pytest.approx(float(slow_distance(after, before)), abs=1e-12)
        assert entry["empty_bins"] == (before == 0).sum()


def ks_of(values: NDArray[np.float64]) -> float:
    return float(kstest(values, "uniform", args=(-1, 2)).statistic) if len(values) else 0.0


def test_small_class_and_empty_bin_are_reported() -> None:
    values = np.array([-0.9, -0.8, -0.1, -0.2, 0.9, 0.8])
    split = split_of(table_of(values, np.array([0, 0, 0, 0, 0, 7])), BalancedConfig(bins=4, tolerance=0))
    assert split.numbers["empty_bins"] == [2]
    assert split.numbers["kept"] == 6
    entry = split.numbers["classes"][1]
    assert (entry["name"], entry["before"], entry["after"], entry["empty_bins"]) == ("class 7", 1, 1.0, 3)
    short = {
        (shortage["class"], shortage["bin"]): (shortage["has"], shortage["even_share"])
        for shortage in split.numbers["shortages"]
    }
    assert short == {("class 7", 0): (0, 1.0), ("class 7", 1): (0, 1.0)}


@settings(max_examples=examples(20))
@given(st.integers(3, 4), st.integers(0, 10**6), TOLERANCE)
def test_default_pair_gives_the_largest_split(m: int, seed: int, tolerance: float) -> None:
    scores = drawn(60, seed=seed, num_modalities=m)
    config = BalancedConfig(bins=6, tolerance=tolerance)
    sizes = {
        f"{first}:{second}": split_of(scores, config, between=f"{first}:{second}").numbers["kept"]
        for first, second in combinations(scores.modalities, 2)
    }
    pair_chosen = largest_pair(open_scores(scores, seed=0), config)
    assert pair_chosen == next(pair for pair in sizes if sizes[pair] == max(sizes.values()))
    assert split_of(scores, config).rule.between == pair_chosen


def some_of(scores: ScoreTable, mask: NDArray[np.bool_]) -> ScoreTable:
    names = ("sample_id", "label", "label_name", "confidence")
    return replace(scores, **{name: getattr(scores, name)[mask] for name in names})


@settings(max_examples=examples(30))
@given(st.integers(0, 10**6), TOLERANCE, st.sampled_from([None, 5]))
def test_rows_without_the_pair_are_dropped_without_side_effects(seed: int, tolerance: float, size: int | None) -> None:
    scores = drawn(60, seed=seed, num_modalities=3)
    missing = np.random.default_rng(seed).integers(0, 6, 60)  # 0, 1, 2: that one
    confidence = scores.confidence.copy()
    confidence[np.arange(60)[missing < 3], missing[missing < 3]] = np.nan
    scores, has_pair = replace(scores, confidence=confidence), missing > 1
    config = BalancedConfig(bins=6, tolerance=tolerance, size=size)
    split = split_of(scores, config, between="audio:visual", files=True)
    reference = split_of(some_of(scores, has_pair), config, between="audio:visual")
    assert split.kept_ids == reference.kept_ids
    for name in ("before", "after", "distances", "shortages", "counts_before", "counts_after"):
        assert split.numbers[name] == reference.numbers[name]
    assert split.curve == reference.curve
    assert split.numbers["reasons"].get("missing-modality", 0) == (~has_pair).sum()
    assert split.kept_rows is not None
    assert split.dropped is not None
    assert split.kept_rows["discrepancy"].null_count == 0
    rows = {row["sample_id"]: row for row in split.dropped.to_pylist()}
    for name in scores.sample_id[~has_pair]:
        assert rows[name]["reason"] == "missing-modality"
        assert [rows[name][column] for column in ("score", "threshold", "bin", "discrepancy")] == [None] * 4
    ids_with_pair = set(scores.sample_id[has_pair])
    assert {row["reason"] for name, row in rows.items() if name in ids_with_pair} <= {"bin-full"}


def test_pair_without_samples_raises() -> None:
    confidence = np.array([[0.1, np.nan, 0.5], [np.nan, 0.5, 0.1]], np.float32)
    scores = replace(
        table_of(np.zeros(2), np.zeros(2, int)), modalities=("audio", "visual", "text"), confidence=confidence
    )
    for config in (BalancedConfig(), BalancedConfig(size=1), BalancedConfig(by="weight"), BalancedConfig(bins=AUTO)):
        with pytest.raises(ScoreError, match="no eligible sample has a discrepancy between audio:visual"):
            split_of(scores, config, between="audio:visual")
    assert split_of(scores, BalancedConfig()).rule.between == "audio:text"


def test_single_modality_is_compared_with_the_mean_of_others() -> None:
    scores = drawn(80, seed=3, num_modalities=3)
    split = split_of(scores, BalancedConfig(bins=5, tolerance=0.1), between="text", files=True)
    assert split.kept_rows is not None
    value = dict(zip(scores.sample_id, scores.discrepancy("text").tolist(), strict=True))
    assert split.kept_rows["discrepancy"].to_pylist() == [
        value[name] for name in split.kept_rows["sample_id"].to_pylist()
    ]
    with pytest.raises(ConfigError, match="--between smell: no modality 'smell'"):
        split_of(scores, BalancedConfig(), between="smell")


@pytest.mark.parametrize(("bins", "grid"), [(40_000, False), (182, True), (10**6, True)])
def test_too_many_bins_raise(bins: int, grid: bool) -> None:
    with pytest.raises(ConfigError, match=rf"split.bins: {bins**2 if grid else bins} bins .* at most 32,767"):
        split_of(drawn(9, seed=0), BalancedConfig(bins=bins, grid=grid))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bins": 1}, "split.bins is 1; it must be at least 2"),
        ({"bins": -1}, "split.bins is -1; it must be at least 2"),
        ({"tolerance": -0.1}, "split.tolerance is -0.1; it must lie in"),
        ({"tolerance": 1.1}, "split.tolerance is 1.1; it must lie in"),
        ({"tolerance": float("nan")}, "split.tolerance is nan"),
        ({"size": 0}, "split.size is 0; it must be at least 1"),
        ({"by": "weigth"}, "split.by is 'weigth'; did you mean weight"),
        ({"max_weight": 0.5}, "split.max_weight is 0.5; it must be at least 1"),
        ({"by": "weight", "size": 3}, "keeps all samples: remove split.size"),
        ({"by": "weight", "per_class": True}, "keeps all samples: remove split.size and split.per_class"),
        ({"per_class": True, "size": 3}, "split.per_class cannot be combined with split.size"),
    ],
)
def test_invalid_settings_raise(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BalancedConfig(**options)


@settings(deadline=None)
@given(AVAILABLE.filter(np.any), TOLERANCE)
def test_level_is_the_largest_within_tolerance(available: Counts, tolerance: float) -> None:
    fitting = [
        level
        for level in range(1, int(available.max()) + 1)
        if slow_distance(np.minimum(available, level), available) <= Fraction(str(tolerance))
    ]
    assert largest_level(available, tolerance=tolerance) == max(fitting)


@settings(max_examples=examples(60))
@given(AVAILABLE, TOLERANCE.filter(lambda value: value < 1))
def test_no_larger_counts_are_within_the_tolerance(available: Counts, tolerance: float) -> None:
    """Whatever the shape: the remainder of the level, up to a seventh of a small set, is not lost."""
    assume(available.any())
    filled = fill_bins(available, tolerance=tolerance)
    assert slow_distance(filled, available) <= Fraction(str(tolerance))
    assert filled.sum() == best_size(available[available > 0], tolerance)
    level = largest_level(available, tolerance=tolerance)
    assert set(np.unique(filled - np.minimum(available, level))) <= {0, 1}


@settings(max_examples=examples(60))
@given(AVAILABLE.filter(np.any), st.data())
def test_water_fill_is_the_most_uniform_set_of_its_size(available: Counts, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, int(available.sum())))
    filled = available[available > 0]
    bins = len(filled)
    eye, uniform = np.eye(bins), np.full(bins, size / bins)
    solution = milp(  # unknowns: b counts x, and b bounds d >= |x - N / b| with minimal sum
        c=np.r_[np.zeros(bins), np.ones(bins)],
        constraints=[
            LinearConstraint(np.c_[eye, -eye], ub=uniform),
            LinearConstraint(np.c_[-eye, -eye], ub=-uniform),
            LinearConstraint(np.r_[np.ones(bins), np.zeros(bins)][None], lb=size, ub=size),
        ],
        bounds=Bounds(0, np.r_[filled, np.full(bins, np.inf)]),
        integrality=np.r_[np.ones(bins), np.zeros(bins)],
    )
    assert solution.success
    quota = water_fill(available, size, np.argsort(-available, kind="stable"))
    assert quota.sum() == size
    assert float(slow_distance(quota, available)) == pytest.approx(float(solution.fun) / 2 / size, abs=1e-6)


@settings(deadline=None)
@given(AVAILABLE.filter(np.any))
def test_size_grows_with_tolerance(available: Counts) -> None:
    points = size_curve([available], CURVE_TOLERANCES)
    assert [point.tolerance for point in points] == sorted(CURVE_TOLERANCES)
    assert [point.size for point in points] == sorted(point.size for point in points)
    assert [point.distance for point in points] == sorted(point.distance for point in points)
    assert all(point.distance <= point.tolerance + 1e-9 for point in points)
    assert size_curve([available], (1.0,))[0].size == available.sum()


def test_size_curve_of_ravdess() -> None:
    exact, five, ten = size_curve([RAVDESS], (0.0, 0.05, 0.1))
    assert RAVDESS.sum() == 1_440
    assert exact.size == 20
    assert five.size == pytest.approx(95, abs=10)
    assert ten.size == pytest.approx(200, abs=20)


@settings(max_examples=examples(300))
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 80), st.randoms(use_true_random=False))
def test_water_fill_equals_one_unit_at_a_time(sizes: list[int], total: int, random: Any) -> None:
    order = random.sample(range(len(sizes)), len(sizes))
    expected, remaining = [0] * len(sizes), min(total, sum(sizes))
    while remaining:
        for index in order:
            if remaining and expected[index] < sizes[index]:
                expected[index] += 1
                remaining -= 1
    filled = water_fill(np.array(sizes), total, np.array(order))
    # Units are given round by round, in the last round too to those of `order` that are not full.
    assert filled.tolist() == expected


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6), st.floats(0, 1))
def test_bins_are_shared_evenly_among_classes(b: int, k: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 10, (b, k))
    quota = np.floor(counts.sum(axis=1) * share).astype(np.int64)
    quotas = share_among_classes(counts, quota)
    assert quotas.sum(axis=1).tolist() == quota.tolist()
    assert (quotas <= counts).all()
    for kept, available in zip(quotas, counts, strict=True):
        assert (kept[kept < available] >= kept.max() - 1).all()


def test_remainders_are_spread_over_classes() -> None:
    quotas = share_among_classes(np.full((9, 3), 5), np.full(9, 4))
    assert quotas.sum(axis=0).tolist() == [12, 12, 12]


@given(AVAILABLE.filter(np.any), st.sampled_from([1.0, 1.5, 3.0, 100.0]))
def test_weights_equalise_bins_up_to_the_cap(available: Counts, max_weight: float) -> None:
    weight, filled = balancing_weights(available, max_weight=max_weight), available > 0
    assert weight.max() <= max_weight
    assert (weight[~filled] == 0).all()
    uncapped = filled & (weight < max_weight)
    mass, uniform = weight * available, available.sum() / filled.sum()
    assert mass[uncapped] == pytest.approx(np.full(uncapped.sum(), uniform))
    assert (mass <= uniform + 1e-9).all()
    if max_weight == 100:  # above any count: no weight is capped
        assert mass.sum() == pytest.approx(available.sum())


@pytest.mark.parametrize("shape", [(5.0, 5.0), (0.4, 0.4), (2.0, 9.0), (1.0, 1.0)])
def test_num_bins_matches_numpy(shape: tuple[float, float]) -> None:
    values = 2 * np.random.default_rng(0).beta(*shape, 3_000) - 1
    counts, edges = np.histogram(values, bins=4_096, range=(-1, 1))
    expected = len(np.histogram_bin_edges(values, "fd", range=(-1, 1))) - 1
    assert 4 < expected < 100
    assert choose_num_bins((edges[1:] + edges[:-1]) / 2, counts) == pytest.approx(expected, abs=1)


def test_num_bins_is_between_4_and_100() -> None:
    middles = (np.arange(4_096) + 0.5) / 2_048 - 1
    counts = np.zeros(4_096, dtype=np.int64)
    assert choose_num_bins(middles, counts) == 4
    counts[[0, -1]] = 1
    assert choose_num_bins(middles, counts) == 4
    counts[7] = 10**9  # no spread: the width would be 0
    assert choose_num_bins(middles, counts) == 100
