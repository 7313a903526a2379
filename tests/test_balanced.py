"""Laws of the balanced split: what it keeps is uniform within the tolerance, nothing larger is, and no row is lost."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.stats import kstest

from mmaudit.audit.errors import ConfigError, ScoreError
from mmaudit.audit.scores.table import ScoreTable
from mmaudit.rebalance.balanced import AUTO, BalancedConfig, BalancedRule, largest_pair, plan_balanced
from mmaudit.rebalance.binning import CurvePoint, choose_num_bins
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
TOLERANCE = st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0])
BINS = st.sampled_from([2, 3, 7, 20])
KS_STEP = 0.001  # the reported one is taken at the edges of about a thousand fine bins


def table_of(values: NDArray[np.floating[Any]], label: NDArray[np.integer[Any]]) -> ScoreTable:
    """Give a score table in which D is as told."""
    return ScoreTable(
        sample_id=np.array([f"s{number:05d}" for number in range(len(values))], dtype=object),
        label=label.astype(np.int32),
        label_name=np.array([f"class {one}" for one in label], dtype=object),
        modalities=("audio", "visual"),
        confidence=np.stack([np.maximum(values, 0), np.maximum(-values, 0)], axis=1).astype(np.float32),
    )


def drawn(n: int, *, seed: int, num_modalities: int = 2, splits: tuple[str, ...] = ()) -> ScoreTable:
    """Give n samples of any confidence, of three classes."""
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
    found = table_of(values, rng.integers(0, classes, n) if draw(st.booleans()) else np.minimum(rng.poisson(0.4, n), 4))
    names = draw(st.sampled_from([None, ("train",), ("train", "validation", "test")]))
    return found if names is None else replace(found, split=rng.choice(names, n).astype(object))


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A balanced split as it is told: before and after are (s, b, k); files only where they were asked for."""

    rule: BalancedRule
    selection: Selection
    numbers: dict[str, Any]
    kept_ids: set[str]
    kept: pa.Table | None = None
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
        kept = read_manifest(path) if files else None
        dropped = read_dropped(path, kept) if kept else None
    ids: set[str] = set()
    for rows in score_files.batches():
        ids |= set(rows.table["sample_id"].filter(pa.array(selection.decide(rows).keep)).to_pylist())
    return Split(
        rule=rule,
        selection=selection,
        numbers=numbers,
        kept_ids=ids,
        kept=kept.table if kept else None,
        dropped=dropped,
    )


def slow_distance(kept: Counts, available: Counts) -> Fraction:
    """Give the total variation to uniform, exactly."""
    filled = [int(one) for one, there in zip(kept, available, strict=True) if there]
    return sum((abs(Fraction(one, sum(filled)) - Fraction(1, len(filled))) for one in filled), Fraction(0)) / 2


def bins_of(values: list[float], num_bins: int) -> list[int]:
    """Give the bin of each discrepancy, in rational numbers."""
    return [min(num_bins - 1, floor((Fraction(value) + 1) / 2 * num_bins)) for value in values]


@settings(deadline=None, max_examples=60)
@given(tables(), TOLERANCE, BINS, st.booleans())
def test_what_the_files_hold_is_uniform_and_whole(
    scores: ScoreTable, tolerance: float, num_bins: int, per_class: bool
) -> None:
    config = BalancedConfig(bins=num_bins, tolerance=tolerance, per_class=per_class)
    split = split_of(scores, config, seed=1, files=True)
    kept, dropped, numbers = split.kept, split.dropped, split.numbers
    assert kept is not None
    assert dropped is not None
    ids = kept["sample_id"].to_pylist() + dropped["sample_id"].to_pylist()
    assert sorted(ids) == sorted(scores.sample_id)
    assert set(kept["sample_id"].to_pylist()) == split.kept_ids
    assert (numbers["kept"], numbers["dropped"], numbers["scored"]) == (len(kept), len(dropped), len(scores))
    places = bins_of(kept["discrepancy"].to_pylist(), num_bins)
    assert kept["bin"].to_pylist() == places
    held = np.bincount(places, minlength=num_bins)
    left = np.bincount(bins_of(dropped["discrepancy"].to_pylist(), num_bins), minlength=num_bins)
    assert numbers["after"]["distance"] == pytest.approx(float(slow_distance(held, held + left)), abs=1e-12)
    assert numbers["before"]["distance"] == pytest.approx(float(slow_distance(held + left, held + left)), abs=1e-12)
    assert (numbers["counts_after"], numbers["counts_before"]) == (held.tolist(), (held + left).tolist())
    assert numbers["empty_bins"] == np.flatnonzero(held + left == 0).tolist()
    assert numbers["reasons"] == ({"bin-full": len(dropped)} if len(dropped) else {})
    assert set(dropped["reason"].to_pylist()) <= {"bin-full"}
    assert all(0 <= row["threshold"] <= row["score"] <= 1 for row in dropped.to_pylist())
    assert set(kept["weight"].to_pylist()) == {1.0}


@settings(deadline=None, max_examples=40)
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


def largest_cut(available: Counts, tolerance: float) -> Counts:
    """Give the largest set of bins cut to one level within the tolerance, by trying all levels."""
    cuts = [np.minimum(available, level) for level in range(1, int(available.max()) + 1)]
    return max((cut for cut in cuts if slow_distance(cut, available) <= Fraction(str(tolerance))), key=np.sum)


def best_size(available: Counts, tolerance: float) -> int:
    """Give the size of the largest set at all within the tolerance, by integer programming.

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


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 40),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.37]),
    st.sampled_from(["plain", "per class", "grid"]),
)
def test_no_larger_set_is_within_the_tolerance(n: int, seed: int, tolerance: float, kind: str) -> None:
    """None cut to a level is as large; of any shape at all none is as large as the next level would be."""
    scores = drawn(n, seed=seed, splits=("train", "test"))
    config = BalancedConfig(
        bins=2 if kind == "grid" else 4, tolerance=tolerance, per_class=kind == "per class", grid=kind == "grid"
    )
    split = split_of(scores, config)
    for before, after in zip(split.before, split.after, strict=True):
        apart = (before.T, after.T) if kind == "per class" else (before.sum(axis=1)[None], after.sum(axis=1)[None])
        for available, kept in zip(*apart, strict=True):
            if not available.any():
                assert not kept.any()
                continue
            assert kept.tolist() == largest_cut(available, tolerance).tolist()
            best = best_size(available[available > 0], tolerance)
            assert kept.sum() <= best
            assert (kept == available).all() or best < np.minimum(available, kept.max() + 1).sum()


@settings(deadline=None, max_examples=40)
@given(tables())
def test_tolerance_zero_is_exactly_uniform_over_the_filled_bins(scores: ScoreTable) -> None:
    split = split_of(scores, BalancedConfig(tolerance=0))
    for before, after in zip(split.before.sum(axis=2), split.after.sum(axis=2), strict=True):
        assert set(after[before > 0].tolist()) == {before[before > 0].min()}
    assert set(split.numbers["distances"].values()) == {0.0}


@settings(deadline=None, max_examples=40)
@given(tables(), st.data())
def test_the_size_asked_for_is_exact(scores: ScoreTable, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(scores)))
    split = split_of(scores, BalancedConfig(size=size))
    assert split.numbers["kept"] == len(split.kept_ids) == size
    for before, after in zip(split.before.sum(axis=2), split.after.sum(axis=2), strict=True):
        assert (after[after < before] >= after.max() - 1).all()
        assert abs(after.sum() - size * before.sum() / len(scores)) < 1


@pytest.mark.parametrize("size", [11, 1_000])
def test_a_size_beyond_the_table_is_refused(size: int) -> None:
    scores = table_of(np.linspace(-1, 1, 10), np.zeros(10, int))
    with pytest.raises(ConfigError, match=f"--size: requested {size} samples, available 10"):
        split_of(scores, BalancedConfig(size=size))


@settings(deadline=None, max_examples=40)
@given(tables(), BINS, st.sampled_from([1.0, 1.5, 4.0, 1000.0]), st.booleans())
def test_weights_keep_all_and_make_the_mass_uniform(scores: ScoreTable, num_bins: int, most: float, grid: bool) -> None:
    split = split_of(scores, BalancedConfig(bins=num_bins, by="weight", max_weight=most, grid=grid), files=True)
    kept = split.kept
    assert kept is not None
    assert len(kept) == len(scores)
    weight = np.array(kept["weight"].to_pylist())
    assert weight.max() <= most
    assert weight.min() > 0
    assert split.numbers["effective_size"] == pytest.approx(weight.sum() ** 2 / (weight**2).sum())
    names = np.array(["all" if one is None else one for one in kept["split"].to_pylist()])
    for name in np.unique(names):
        here, bins = names == name, np.array(kept["bin"].to_pylist())
        mass = np.array([weight[here & (bins == one)].sum() for one in np.unique(bins[here])])
        cap = np.isclose([weight[here & (bins == one)].max() for one in np.unique(bins[here])], most)
        even = here.sum() / len(mass)
        assert mass[~cap] == pytest.approx(np.full((~cap).sum(), even), rel=1e-5)
        assert (mass <= even * (1 + 1e-5)).all()
        if most == 1000:
            assert weight[here].mean() == pytest.approx(1, rel=1e-5)
            assert grid or split.numbers["distances"][name] == pytest.approx(0, abs=1e-6)
    if not grid:
        assert split.numbers["counts_after"] == pytest.approx(
            [weight[np.array(kept["bin"].to_pylist()) == one].sum() for one in range(num_bins)], rel=1e-5
        )


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 120), st.integers(0, 10**6), TOLERANCE)
def test_a_grid_is_uniform_over_both_confidences(n: int, seed: int, tolerance: float) -> None:
    scores = drawn(n, seed=seed)
    split = split_of(scores, BalancedConfig(bins=3, tolerance=tolerance, grid=True), files=True)
    kept = split.kept
    assert kept is not None
    cell = np.minimum((scores.confidence.astype(np.float64) * 3).astype(int), 2) @ [3, 1]
    known = dict(zip(scores.sample_id, cell.tolist(), strict=True))
    assert kept["bin"].to_pylist() == [known[one] for one in kept["sample_id"].to_pylist()]
    held, before = (np.bincount(each, minlength=9) for each in (kept["bin"].to_pylist(), cell))
    assert held.tolist() == largest_cut(before, tolerance).tolist()


def test_a_grid_needs_two_confidences_and_takes_the_other_of_two() -> None:
    assert split_of(drawn(20, seed=0), BalancedConfig(grid=True), between="visual").rule.between == "visual:audio"
    with pytest.raises(ConfigError, match="--between text: a grid needs two confidences; name two modalities as A:B"):
        split_of(drawn(20, seed=0, num_modalities=3), BalancedConfig(grid=True), between="text")


@pytest.mark.parametrize("spread", [0.02, 0.3, 1.0])
def test_as_many_bins_as_the_samples_outside_test_bear(spread: float) -> None:
    rng = np.random.default_rng(0)
    values = np.clip(rng.normal(0.1, spread, 600), -1, 1)
    test = np.arange(600) % 3 == 0
    values[test] = rng.uniform(-1, 1, test.sum())
    scores = replace(table_of(values, np.zeros(600, int)), split=np.where(test, "test", "train").astype(object))
    counts, edges = np.histogram(values[~test], bins=4_096, range=(-1, 1))
    split = split_of(scores, BalancedConfig(bins=AUTO))
    assert split.rule.num_bins == pytest.approx(choose_num_bins((edges[1:] + edges[:-1]) / 2, counts), abs=1)
    assert split.numbers["bins"] == split.rule.num_bins


def test_the_curve_names_the_split_that_is_made() -> None:
    scores = table_of(2 * np.random.default_rng(0).beta(2, 5, 400) - 1, np.zeros(400, int))
    for point in split_of(scores, BalancedConfig()).curve:
        split = split_of(scores, BalancedConfig(tolerance=point.tolerance))
        assert split.numbers["kept"] == point.size
        assert split.numbers["after"]["distance"] == pytest.approx(point.distance, abs=1e-12)


@pytest.mark.parametrize("num_modalities", [2, 3])
def test_test_samples_have_no_part_in_choosing_the_others(num_modalities: int) -> None:
    rng = np.random.default_rng(0)
    n = 400
    test = np.arange(n) % 4 == 0
    scores = replace(
        drawn(n, seed=1, num_modalities=num_modalities), split=np.where(test, "test", "train").astype(object)
    )
    spoiled = np.where(test[:, None], scores.confidence[:, ::-1] ** 2, scores.confidence)
    label = np.where(test, 0, rng.integers(0, 3, n)).astype(np.int32)
    scores = replace(scores, label=label, label_name=np.array([str(one) for one in label], dtype=object))
    found = [split_of(each, BalancedConfig()) for each in (scores, replace(scores, confidence=spoiled))]
    others = set(scores.sample_id[~test])
    assert found[0].rule.between == found[1].rule.between
    assert found[0].kept_ids & others == found[1].kept_ids & others
    assert found[0].kept_ids != found[1].kept_ids


@settings(deadline=None, max_examples=40)
@given(tables(), st.integers(0, 99))
def test_row_order_does_not_matter(scores: ScoreTable, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(scores))
    columns = ("sample_id", "label", "label_name", "confidence")
    moved = replace(
        scores,
        **{name: getattr(scores, name)[order] for name in columns},
        split=None if scores.split is None else scores.split[order],
    )
    one, other = (split_of(each, BalancedConfig(), seed=seed) for each in (scores, moved))
    assert one.kept_ids == other.kept_ids
    assert one.numbers == other.numbers


def test_another_seed_keeps_others_and_as_many() -> None:
    scores = table_of(np.repeat([-0.5, 0.5], [200, 20]), np.arange(220) % 2)
    splits = [split_of(scores, BalancedConfig(tolerance=0), seed=seed) for seed in range(2)]
    assert splits[0].after.tolist() == splits[1].after.tolist()
    first, second = (split.kept_ids for split in splits)
    full, scarce = set(scores.sample_id[:200]), set(scores.sample_id[200:])
    assert first & scarce == second & scarce == scarce
    assert len(first & second & full) < 10  # 20 of 200 each: 2 in common are expected


def test_every_sample_of_a_cell_is_as_likely() -> None:
    scores = table_of(np.repeat([-0.5, 0.5], [12, 3]), np.zeros(15, int))
    place = {name: number for number, name in enumerate(scores.sample_id)}
    times = np.zeros(15)
    for seed in range(200):
        times[[place[name] for name in split_of(scores, BalancedConfig(tolerance=0), seed=seed).kept_ids]] += 1
    assert times[12:].tolist() == [200] * 3
    assert times[:12].sum() == 600
    assert (((times[:12] - 50) ** 2) / 37.5).sum() < 40  # about chi squared, 11 degrees of freedom: p = 4e-5


@settings(deadline=None, max_examples=30)
@given(tables())
def test_classes_may_have_any_numbers(scores: ScoreTable) -> None:
    renumbered = replace(scores, label=(scores.label * 500_000_000 - 7).astype(np.int32))
    one, other = (split_of(each, BalancedConfig(), files=True) for each in (scores, renumbered))
    assert one.kept_ids == other.kept_ids
    assert one.numbers == other.numbers
    assert other.kept is not None
    names = {f"class {label}": label * 500_000_000 - 7 for label in range(5)}
    assert other.kept["label"].to_pylist() == [names[name] for name in other.kept["label_name"].to_pylist()]


@settings(deadline=None, max_examples=40)
@given(tables(), BINS)
def test_uniformity_is_that_of_scipy_overall_and_in_each_class(scores: ScoreTable, num_bins: int) -> None:
    split = split_of(scores, BalancedConfig(bins=num_bins, tolerance=0.1))
    values = scores.discrepancy().astype(np.float64)
    keep = np.array([name in split.kept_ids for name in scores.sample_id])
    for found, rows in ((split.numbers["before"], np.ones(len(values), bool)), (split.numbers["after"], keep)):
        assert found["ks"] == pytest.approx(ks_of(values[rows]), abs=KS_STEP)
        assert found["positive"] == pytest.approx(np.mean(values[rows] > 0))
    places = np.array(bins_of(values.tolist(), num_bins))
    assert [one["name"] for one in split.numbers["classes"]] == sorted(set(scores.label_name))
    for one in split.numbers["classes"]:
        here = scores.label_name == one["name"]
        assert (one["before"], one["after"]) == (here.sum(), (here & keep).sum())
        assert one["ks_before"] == pytest.approx(ks_of(values[here]), abs=KS_STEP)
        assert one["ks_after"] == pytest.approx(ks_of(values[here & keep]), abs=KS_STEP)
        before, after = (np.bincount(places[rows], minlength=num_bins) for rows in (here, here & keep))
        assert one["distance_before"] == pytest.approx(float(slow_distance(before, before)), abs=1e-12)
        if after.any():
            assert one["distance_after"] == pytest.approx(float(slow_distance(after, before)), abs=1e-12)
        assert one["empty_bins"] == (before == 0).sum()


def ks_of(values: NDArray[np.float64]) -> float:
    return float(kstest(values, "uniform", args=(-1, 2)).statistic) if len(values) else 0.0


def test_a_class_of_one_sample_and_an_empty_bin_are_told() -> None:
    values = np.array([-0.9, -0.8, -0.1, -0.2, 0.9, 0.8])
    split = split_of(table_of(values, np.array([0, 0, 0, 0, 0, 7])), BalancedConfig(bins=4, tolerance=0))
    assert split.numbers["empty_bins"] == [2]
    assert split.numbers["kept"] == 6
    alone = split.numbers["classes"][1]
    assert (alone["name"], alone["before"], alone["after"], alone["empty_bins"]) == ("class 7", 1, 1.0, 3)
    short = {(one["class"], one["bin"]): (one["has"], one["even"]) for one in split.numbers["shortages"]}
    assert short == {("class 7", 0): (0, 1.0), ("class 7", 1): (0, 1.0)}


@settings(deadline=None, max_examples=20)
@given(st.integers(3, 4), st.integers(0, 10**6), TOLERANCE)
def test_of_more_modalities_the_pair_with_the_largest_split_is_taken(m: int, seed: int, tolerance: float) -> None:
    scores = drawn(60, seed=seed, num_modalities=m)
    config = BalancedConfig(bins=6, tolerance=tolerance)
    sizes = {
        f"{first}:{second}": split_of(scores, config, between=f"{first}:{second}").numbers["kept"]
        for first, second in combinations(scores.modalities, 2)
    }
    chosen = largest_pair(open_scores(scores, seed=0), config)
    assert chosen == next(pair for pair in sizes if sizes[pair] == max(sizes.values()))
    assert split_of(scores, config).rule.between == chosen


def some_of(scores: ScoreTable, here: NDArray[np.bool_]) -> ScoreTable:
    names = ("sample_id", "label", "label_name", "confidence")
    return replace(scores, **{name: getattr(scores, name)[here] for name in names})


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), TOLERANCE, st.sampled_from([None, 5]))
def test_who_lacks_one_of_the_pair_is_left_out_and_changes_nothing_else(
    seed: int, tolerance: float, size: int | None
) -> None:
    scores = drawn(60, seed=seed, num_modalities=3)
    missing = np.random.default_rng(seed).integers(0, 6, 60)  # 0, 1, 2: that one
    holed = scores.confidence.copy()
    holed[np.arange(60)[missing < 3], missing[missing < 3]] = np.nan
    scores, here = replace(scores, confidence=holed), missing > 1
    config = BalancedConfig(bins=6, tolerance=tolerance, size=size)
    split = split_of(scores, config, between="audio:visual", files=True)
    alone = split_of(some_of(scores, here), config, between="audio:visual")
    assert split.kept_ids == alone.kept_ids
    for name in ("before", "after", "distances", "shortages", "counts_before", "counts_after"):
        assert split.numbers[name] == alone.numbers[name]
    assert split.curve == alone.curve
    assert split.numbers["reasons"].get("missing-modality", 0) == (~here).sum()
    assert split.kept is not None
    assert split.dropped is not None
    assert split.kept["discrepancy"].null_count == 0
    rows = {row["sample_id"]: row for row in split.dropped.to_pylist()}
    for name in scores.sample_id[~here]:
        assert rows[name]["reason"] == "missing-modality"
        assert [rows[name][column] for column in ("score", "threshold", "bin", "discrepancy")] == [None] * 4
    there = set(scores.sample_id[here])
    assert {row["reason"] for name, row in rows.items() if name in there} <= {"bin-full"}


def test_a_pair_that_nobody_has_is_refused() -> None:
    confidence = np.array([[0.1, np.nan, 0.5], [np.nan, 0.5, 0.1]], np.float32)
    scores = replace(
        table_of(np.zeros(2), np.zeros(2, int)), modalities=("audio", "visual", "text"), confidence=confidence
    )
    for config in (BalancedConfig(), BalancedConfig(size=1), BalancedConfig(by="weight"), BalancedConfig(bins=AUTO)):
        with pytest.raises(ScoreError, match="no eligible sample has a discrepancy between audio:visual"):
            split_of(scores, config, between="audio:visual")
    assert split_of(scores, BalancedConfig()).rule.between == "audio:text"


def test_one_modality_is_set_against_the_mean_of_the_others() -> None:
    scores = drawn(80, seed=3, num_modalities=3)
    split = split_of(scores, BalancedConfig(bins=5, tolerance=0.1), between="text", files=True)
    assert split.kept is not None
    value = dict(zip(scores.sample_id, scores.discrepancy("text").tolist(), strict=True))
    assert split.kept["discrepancy"].to_pylist() == [value[name] for name in split.kept["sample_id"].to_pylist()]
    with pytest.raises(ConfigError, match="--between smell: no modality 'smell'"):
        split_of(scores, BalancedConfig(), between="smell")


@pytest.mark.parametrize(("bins", "grid"), [(40_000, False), (182, True), (10**6, True)])
def test_more_bins_than_a_manifest_can_number_are_refused(bins: int, grid: bool) -> None:
    with pytest.raises(ConfigError, match=rf"split.bins: {bins**2 if grid else bins} bins .* 32,767 at most"):
        split_of(drawn(9, seed=0), BalancedConfig(bins=bins, grid=grid))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bins": 1}, "split.bins is 1; a distribution needs at least 2"),
        ({"bins": -1}, "split.bins is -1; a distribution needs at least 2"),
        ({"tolerance": -0.1}, "split.tolerance is -0.1; .* lies in"),
        ({"tolerance": 1.1}, "split.tolerance is 1.1; .* lies in"),
        ({"tolerance": float("nan")}, "split.tolerance is nan"),
        ({"size": 0}, "split.size is 0; it must be at least 1"),
        ({"by": "weigth"}, "split.by is 'weigth'; did you mean weight"),
        ({"max_weight": 0.5}, "split.max_weight is 0.5; it must be at least 1"),
        ({"by": "weight", "size": 3}, "keeps all samples: remove split.size"),
        ({"by": "weight", "per_class": True}, "keeps all samples: remove split.size and split.per_class"),
        ({"per_class": True, "size": 3}, "split.per_class cannot be combined with split.size"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BalancedConfig(**options)
