"""Tests of resplits: shares hold per class and bin, groups stay together, and row order does not matter."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.errors import ConfigError, ScoreError
from mmaudit.audit.metrics import assign_bins
from mmaudit.audit.scores.table import ScoreTable, read_scores
from mmaudit.rebalance.balanced import BalancedConfig, plan_balanced
from mmaudit.rebalance.resplit import SPLITS_BY_COUNT, ClassBins, group_keys, parse_shares, resplit
from mmaudit.rebalance.score_tables import ManifestMembers, ScoreFiles, hash_keys, open_scores
from mmaudit.rebalance.selection import SelectionRule, select_rows
from mmaudit.rebalance.subsets import parse_subset

AV = "audio:visual"
NOWHERE = Path("unused")  # unused for so few rows
SHARES = st.sampled_from(["80/8/12", "80/20", "1/1/1", "50/49/1", "0.7/0.3", "98/1/1"])
SHAPES = st.sampled_from(["uniform", "peaked", "saturated"])


def table(n: int, *, seed: int = 0, classes: int = 5, shape: str = "uniform", **changes: Any) -> ScoreTable:
    rng = np.random.default_rng(seed)
    draw = {"uniform": (1.0, 1.0), "peaked": (9.0, 9.0), "saturated": (0.2, 0.2)}[shape]
    label = np.minimum(rng.geometric(0.4, n) - 1, classes - 1).astype(np.int32)
    columns: dict[str, Any] = {
        "sample_id": np.array([f"s{number}" for number in range(n)], dtype=object),
        "label": label,
        "label_name": np.array([f"class {class_index}" for class_index in label], dtype=object),
        "modalities": ("audio", "visual"),
        "confidence": rng.beta(*draw, (n, 2)).astype(np.float32),
        "split": np.array(["test" if number % 3 else "train" for number in range(n)], dtype=object),
    }
    return ScoreTable(**{**columns, **changes})


def splits(score_files: ScoreFiles) -> NDArray[np.object_]:
    """Return the split name of each row (n,)."""
    return np.concatenate([np.array(score_files.splits, dtype=object)[batch.split] for batch in score_files.batches()])


def resplit_names(scores: ScoreTable, text: str, *, between: str = AV, seed: int = 0) -> NDArray[np.object_]:
    new_scores = resplit(open_scores(scores, seed=seed), parse_shares(text), between=between, scratch=NOWHERE)
    return splits(new_scores)


def cells_of(scores: ScoreTable, between: str = AV) -> NDArray[np.int64]:
    """Return the cell of each row: class by 20 bins, plus a bin for rows without discrepancy."""
    values = scores.discrepancy(between)
    bins = np.where(np.isnan(values), 20, assign_bins(np.nan_to_num(values), num_bins=20))
    return np.asarray(scores.label * 21 + bins, dtype=np.int64)


@settings(max_examples=examples(40))
@given(st.integers(1, 400), st.integers(0, 99), SHARES, SHAPES, st.sampled_from([1, 5, 40]))
def test_shares_hold_overall_and_per_class_and_bin(n: int, seed: int, text: str, shape: str, classes: int) -> None:
    """Also if cells have one or two samples, as with 40 classes: rounding errors carry over to the next cell."""
    scores = table(n, seed=seed, shape=shape, classes=classes)
    split, cell, shares = resplit_names(scores, text), cells_of(scores), parse_shares(text)
    for name, share in zip(SPLITS_BY_COUNT[len(shares)], shares, strict=True):
        in_split = split == name
        assert abs(in_split.sum() - share * n) <= 1
        for cell_index in np.unique(cell):
            assert abs(in_split[cell == cell_index].sum() - share * (cell == cell_index).sum()) < 2


def test_cells_of_single_samples_add_up_to_the_shares() -> None:
    """2,000 samples in 2,000 cells: shares hold over all of them, since a single sample cannot be divided."""
    n = 2_000
    scores = table(n, label=np.arange(n, dtype=np.int32))
    split = resplit_names(scores, "80/8/12")
    assert [int((split == name).sum()) for name in SPLITS_BY_COUNT[3]] == [1600, 160, 240]


@settings(max_examples=examples(20))
@given(st.integers(2, 300), st.integers(0, 99), SHARES, st.booleans())
def test_row_order_and_shards_do_not_matter(n: int, seed: int, text: str, grouped: bool) -> None:
    rng = np.random.default_rng(seed)
    group = np.array([f"g{number}" for number in np.r_[0, 1, 2, rng.integers(0, 30, n)][:n]], dtype=object)
    scores = table(n, seed=seed, group=group if grouped and n > 2 else None)
    split_of_id = dict(zip(scores.sample_id, resplit_names(scores, text), strict=True))
    shuffled = scores.to_arrow().take(pa.array(rng.permutation(n)))
    cuts = np.r_[0, np.sort(rng.integers(0, n + 1, 3)), n].tolist()
    shards = tuple(shuffled.slice(first, end - first) for first, end in pairwise(cuts))
    reordered = replace(open_scores(scores, seed=0), files=shards)
    reordered_split = splits(resplit(reordered, parse_shares(text), between=AV, scratch=NOWHERE))
    assert dict(zip(shuffled["sample_id"].to_pylist(), reordered_split, strict=True)) == split_of_id


def test_existing_splits_are_ignored() -> None:
    scores = table(300)
    without_splits = replace(scores, split=None)
    assert resplit_names(scores, "80/8/12").tolist() == resplit_names(without_splits, "80/8/12").tolist()
    assert resplit_names(scores, "80/8/12").tolist() != resplit_names(scores, "80/8/12", seed=1).tolist()


def test_rows_without_discrepancy_are_split() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random((600, 3)).astype(np.float32)
    has_none = np.arange(600) % 3 == 0
    confidence[has_none, 2] = np.nan
    scores = table(600, modalities=("audio", "visual", "text"), confidence=confidence)
    split, cell = resplit_names(scores, "80/8/12", between="audio:text"), cells_of(scores, "audio:text")
    for name, share in zip(SPLITS_BY_COUNT[3], parse_shares("80/8/12"), strict=True):
        assert abs((split[has_none] == name).sum() - share * 200) <= 10  # one or two for each of the five classes
        for cell_index in np.unique(cell[has_none]):
            assert abs((split[cell == cell_index] == name).sum() - share * (cell == cell_index).sum()) < 2


@settings(max_examples=examples(40))
@given(st.integers(3, 60), st.integers(0, 99), SHARES, st.sampled_from([0.0, 0.3]), st.booleans())
def test_groups_stay_together_and_no_split_is_empty(
    num_groups: int, seed: int, text: str, share_without_group: float, skewed: bool
) -> None:
    """A sample without a group is a group of its own; a group may have half of all samples."""
    rng = np.random.default_rng(seed)
    drawn = np.minimum(rng.geometric(0.5, 300) - 1, num_groups - 1) if skewed else rng.integers(0, num_groups, 300)
    drawn[:num_groups] = np.arange(num_groups)
    group = np.array([f"g{name}" for name in drawn], dtype=object)
    group[num_groups:][rng.random(300 - num_groups) < share_without_group] = None
    split = resplit_names(table(300, seed=seed, group=group), text)
    for name in set(group) - {None}:
        assert len(set(split[group == name])) == 1
    assert set(split) == set(SPLITS_BY_COUNT[len(parse_shares(text))])


@pytest.mark.parametrize("text", ["80/8/12", "80/20", "1/1/1"])
def test_many_groups_meet_the_shares_approximately(text: str) -> None:
    """200 groups of 1 to 29 samples: within 2 % of all, and 5 % of the larger classes and of the signs of D."""
    rng = np.random.default_rng(1)
    scores = table(3_000, group=np.array([f"g{number}" for number in rng.integers(0, 200, 3_000)], dtype=object))
    split = resplit_names(scores, text)
    positive = scores.discrepancy() > 0
    for name, share in zip(SPLITS_BY_COUNT[len(parse_shares(text))], parse_shares(text), strict=True):
        assert abs(np.mean(split == name) - share) < 0.02
        for part in (positive, ~positive, *(scores.label == number for number in range(3))):
            assert abs(np.mean(split[part] == name) - share) < 0.05


def test_groups_of_single_samples_meet_the_shares() -> None:
    scores = table(400)
    grouped = replace(scores, group=scores.sample_id)
    split = resplit_names(grouped, "80/8/12")
    for name, share in zip(SPLITS_BY_COUNT[3], parse_shares("80/8/12"), strict=True):
        assert abs((split == name).sum() - share * 400) <= 1


def test_null_groups_equal_no_groups() -> None:
    scores = table(200)
    nulls = replace(scores, group=np.array([None] * 200, dtype=object))
    assert resplit_names(scores, "80/8/12").tolist() == resplit_names(nulls, "80/8/12").tolist()


def test_group_keys_are_equal_only_within_a_group() -> None:
    group = np.array(["a", "b", None, "a", None, ""], dtype=object)
    (batch,) = open_scores(table(6, group=group), seed=0).batches()
    keys = group_keys(batch, seed=0)
    assert keys[0] == keys[3]
    assert len(np.unique(keys)) == 5


def test_too_few_groups_raise() -> None:
    scores = table(50, group=np.array(["a", "b"] * 25, dtype=object))
    with pytest.raises(ScoreError, match="2 groups cannot fill 3 splits: a group is never in two splits"):
        resplit_names(scores, "80/8/12")
    assert set(resplit_names(scores, "80/20")) == {"train", "test"}


@pytest.mark.parametrize("num_groups", [None, 150])
def test_shares_refer_to_rows_that_are_not_excluded(num_groups: int | None) -> None:
    """Rows with D > 0 of class 0 are excluded: shares of all rows would leave the others uneven."""
    rng = np.random.default_rng(2)
    scores = table(2_000)
    if num_groups is not None:
        group = [f"g{number}" for number in rng.integers(0, num_groups, 2_000)]
        scores = replace(scores, group=np.array(group, dtype=object))
    excluded = (scores.label == 0) & (scores.discrepancy() > 0)
    opened = open_scores(scores, seed=0)
    keys = np.sort(hash_keys(pa.chunked_array([pa.array(scores.sample_id[excluded], pa.string())]), seed=0))
    score_files = replace(opened, members=(ManifestMembers(name="out", keys=keys, include=False),))
    split = splits(resplit(score_files, parse_shares("80/8/12"), between=AV, scratch=NOWHERE))
    expected = splits(resplit(only(scores, ~excluded), parse_shares("80/8/12"), between=AV, scratch=NOWHERE))
    assert split[~excluded].tolist() == expected.tolist()


def only(scores: ScoreTable, mask: NDArray[np.bool_]) -> ScoreFiles:
    opened = open_scores(scores, seed=0)
    return replace(opened, files=(scores.to_arrow().filter(pa.array(mask)),), num_rows=int(mask.sum()))


def test_excluded_groups_do_not_count() -> None:
    scores = table(60, group=np.array(["a", "b", "c"] * 20, dtype=object))
    excluded = scores.group == "c"
    keys = np.sort(hash_keys(pa.chunked_array([pa.array(scores.sample_id[excluded], pa.string())]), seed=0))
    score_files = replace(open_scores(scores, seed=0), members=(ManifestMembers(name="c", keys=keys, include=False),))
    with pytest.raises(ScoreError, match="2 groups cannot fill 3 splits"):
        resplit(score_files, parse_shares("80/8/12"), between=AV, scratch=NOWHERE)
    split = splits(resplit(score_files, parse_shares("80/20"), between=AV, scratch=NOWHERE))
    assert set(split[~excluded]) == {"train", "test"}


def test_balanced_after_resplit_balances_each_split() -> None:
    scores = table(4_000, classes=2, shape="peaked")
    score_files = resplit(open_scores(scores, seed=0), parse_shares("80/8/12"), between=AV, scratch=NOWHERE)
    selection = select_rows(
        score_files, plan_balanced(score_files, BalancedConfig(bins=10, tolerance=0.0)), scratch=NOWHERE
    )
    (batch,) = score_files.batches()
    keep = selection.decide(batch).keep
    bins = assign_bins(scores.discrepancy(), num_bins=10)
    for split_index in range(3):
        in_split = batch.split == split_index
        num_kept = np.bincount(bins[in_split & keep], minlength=10)
        available = np.bincount(bins[in_split], minlength=10)
        assert set(num_kept[available > 0]) == {available[available > 0].min()}


def kept_by(score_files: ScoreFiles, rule: SelectionRule) -> NDArray[np.bool_]:
    selection = select_rows(score_files, rule, scratch=NOWHERE)
    return np.concatenate([selection.decide(batch).keep for batch in score_files.batches()])


@pytest.mark.parametrize("seed", range(3))
def test_selection_is_independent_of_the_new_split(seed: int) -> None:
    """With the same hash for both, all kept rows would be in the training split."""
    scores = table(4_000, classes=2, split=None)
    score_files = open_scores(scores, seed=seed)
    train = resplit_names(scores, "60/40", seed=seed) == "train"
    for rule in (
        plan_balanced(score_files, BalancedConfig(tolerance=0.15)),
        parse_subset(score_files, "random:1000", between=AV),
    ):
        keep = kept_by(score_files, rule)
        assert 500 < keep.sum() < 3_000
        assert abs(train[keep].mean() - 0.6) < 4 * (0.24 / keep.sum()) ** 0.5


def test_cells_are_class_by_bin() -> None:
    scores = table(500)
    (batch,) = open_scores(scores, seed=0).batches()
    cells = ClassBins(between=AV, num_bins=20, num_classes=5)
    assert cells.num_cells == 105
    assert cells.of(batch).tolist() == cells_of(scores).tolist()


@given(st.lists(st.floats(0.01, 1e6), min_size=2, max_size=3))
def test_shares_are_normalised(parts: list[float]) -> None:
    shares = parse_shares("/".join(map(str, parts)))
    assert sum(shares) == pytest.approx(1)
    np.testing.assert_allclose(np.array(shares) * sum(parts), parts)


@pytest.mark.parametrize(
    "text", ["", "80", "80/", "80/x", "80/0/20", "80/-20", "1/1/1/1", "nan/1", "inf/1", "80:20", "80/8/12/"]
)
def test_invalid_shares_raise(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--resplit {text}: not of the form 80/8/12 \(train, validation, test\)"):
        parse_shares(text)


def test_rows_without_a_split_are_assigned_like_others() -> None:
    partly_split = table(60, split=np.array(["train" if number % 3 else None for number in range(60)], dtype=object))
    assert (resplit_names(partly_split, "80/8/12") == resplit_names(table(60), "80/8/12")).all()


@pytest.mark.parametrize("names", [["holdout"] * 60, ["train", "holdout"] * 30, [1, 2] * 30])
def test_unknown_split_name_raises_in_every_reader(tmp_path: Path, names: list[Any]) -> None:
    shown = ", ".join(repr(str(name)) for name in dict.fromkeys(names) if name != "train")
    message = f"column split holds {shown}: must be one of train, validation, test"
    path = tmp_path / "scores.parquet"
    full_table = table(60).to_arrow()
    index = full_table.column_names.index("split")
    pq.write_table(full_table.set_column(index, "split", pa.array(names)), path)
    for read in (read_scores, partial(open_scores, seed=0)):
        with pytest.raises(ScoreError, match=message):
            read(path)
    with pytest.raises(ScoreError, match=message):
        open_scores(table(60, split=np.array([str(name) for name in names], dtype=object)), seed=0)
