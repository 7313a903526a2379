"""Laws of the resplit: shares hold in every class and bin, no group is in two splits, and no order matters."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.errors import ConfigError, ScoreError
from mmaudit.audit.scores.table import ScoreTable, read_scores
from mmaudit.rebalance.balanced import BalancedConfig, plan_balanced
from mmaudit.rebalance.binning import bin_of
from mmaudit.rebalance.resplit import NAMES, Cells, group_keys, parse_shares, resplit
from mmaudit.rebalance.score_tables import ManifestMembers, ScoreFiles, keys_of, open_scores
from mmaudit.rebalance.selection import SelectionRule, select_rows
from mmaudit.rebalance.subsets import parse_subset

AV = "audio:visual"
NOWHERE = Path("unused")  # nothing is spilled of so few rows
SHARES = st.sampled_from(["80/8/12", "80/20", "1/1/1", "50/49/1", "0.7/0.3", "98/1/1"])
SHAPES = st.sampled_from(["uniform", "peaked", "saturated"])


def table(n: int, *, seed: int = 0, classes: int = 5, shape: str = "uniform", **more: Any) -> ScoreTable:
    rng = np.random.default_rng(seed)
    draw = {"uniform": (1.0, 1.0), "peaked": (9.0, 9.0), "saturated": (0.2, 0.2)}[shape]
    label = np.minimum(rng.geometric(0.4, n) - 1, classes - 1).astype(np.int32)
    columns: dict[str, Any] = {
        "sample_id": np.array([f"s{number}" for number in range(n)], dtype=object),
        "label": label,
        "label_name": np.array([f"class {one}" for one in label], dtype=object),
        "modalities": ("audio", "visual"),
        "confidence": rng.beta(*draw, (n, 2)).astype(np.float32),
        "split": np.array(["test" if number % 3 else "train" for number in range(n)], dtype=object),
    }
    return ScoreTable(**{**columns, **more})


def splits(shards: ScoreFiles) -> NDArray[np.object_]:
    """Give the name of the split of each row (n,)."""
    return np.concatenate([np.array(shards.splits, dtype=object)[rows.split] for rows in shards.rows()])


def split_again(scores: ScoreTable, text: str, *, between: str = AV, seed: int = 0) -> NDArray[np.object_]:
    found = resplit(open_scores(scores, seed=seed), parse_shares(text), between=between, scratch=NOWHERE)
    return splits(found)


def cells_of(scores: ScoreTable, between: str = AV) -> NDArray[np.int64]:
    """Number class by bin of 20; a bin of their own for those without a discrepancy."""
    values = scores.discrepancy(between)
    bins = np.where(np.isnan(values), 20, bin_of(np.nan_to_num(values), num_bins=20))
    return np.asarray(scores.label * 21 + bins, dtype=np.int64)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 400), st.integers(0, 99), SHARES, SHAPES, st.sampled_from([1, 5, 40]))
def test_the_shares_hold_in_all_and_in_every_class_and_bin(
    n: int, seed: int, text: str, shape: str, classes: int
) -> None:
    """Also where every cell holds a sample or two, as with 40 classes: what one cell lacks the next one has."""
    scores = table(n, seed=seed, shape=shape, classes=classes)
    found, cell, shares = split_again(scores, text), cells_of(scores), parse_shares(text)
    for name, share in zip(NAMES[len(shares)], shares, strict=True):
        here = found == name
        assert abs(here.sum() - share * n) <= 1
        for one in np.unique(cell):
            assert abs(here[cell == one].sum() - share * (cell == one).sum()) < 2


def test_cells_of_one_sample_each_add_up_to_the_shares() -> None:
    """2,000 samples in 2,000 cells: each split's share is of all of them, since none is of one."""
    n = 2_000
    scores = table(n, label=np.arange(n, dtype=np.int32))
    found = split_again(scores, "80/8/12")
    assert [int((found == name).sum()) for name in NAMES[3]] == [1600, 160, 240]


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 300), st.integers(0, 99), SHARES, st.booleans())
def test_neither_row_order_nor_shards_matter(n: int, seed: int, text: str, grouped: bool) -> None:
    rng = np.random.default_rng(seed)
    group = np.array([f"g{one}" for one in np.r_[0, 1, 2, rng.integers(0, 30, n)][:n]], dtype=object)
    scores = table(n, seed=seed, group=group if grouped and n > 2 else None)
    found = dict(zip(scores.sample_id, split_again(scores, text), strict=True))
    whole = scores.to_arrow().take(pa.array(rng.permutation(n)))
    cuts = np.r_[0, np.sort(rng.integers(0, n + 1, 3)), n].tolist()
    parts = tuple(whole.slice(first, end - first) for first, end in pairwise(cuts))
    moved = replace(open_scores(scores, seed=0), parts=parts)
    again = splits(resplit(moved, parse_shares(text), between=AV, scratch=NOWHERE))
    assert dict(zip(whole["sample_id"].to_pylist(), again, strict=True)) == found


def test_the_splits_that_were_have_no_say() -> None:
    scores = table(300)
    other = replace(scores, split=None)
    assert split_again(scores, "80/8/12").tolist() == split_again(other, "80/8/12").tolist()
    assert split_again(scores, "80/8/12").tolist() != split_again(scores, "80/8/12", seed=1).tolist()


def test_who_has_no_discrepancy_is_split_as_well() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random((600, 3)).astype(np.float32)
    lacks = np.arange(600) % 3 == 0
    confidence[lacks, 2] = np.nan
    scores = table(600, modalities=("audio", "visual", "text"), confidence=confidence)
    found, cell = split_again(scores, "80/8/12", between="audio:text"), cells_of(scores, "audio:text")
    for name, share in zip(NAMES[3], parse_shares("80/8/12"), strict=True):
        assert abs((found[lacks] == name).sum() - share * 200) <= 10  # one or two for each of the five classes
        for one in np.unique(cell[lacks]):
            assert abs((found[cell == one] == name).sum() - share * (cell == one).sum()) < 2


@settings(deadline=None, max_examples=40)
@given(st.integers(3, 60), st.integers(0, 99), SHARES, st.sampled_from([0.0, 0.3]), st.booleans())
def test_no_group_is_in_two_splits_and_no_split_is_empty(
    num_groups: int, seed: int, text: str, alone: float, skewed: bool
) -> None:
    """A sample without a group is one by itself; a group may be as large as half of all."""
    rng = np.random.default_rng(seed)
    drawn = np.minimum(rng.geometric(0.5, 300) - 1, num_groups - 1) if skewed else rng.integers(0, num_groups, 300)
    drawn[:num_groups] = np.arange(num_groups)
    group = np.array([f"g{one}" for one in drawn], dtype=object)
    group[num_groups:][rng.random(300 - num_groups) < alone] = None
    found = split_again(table(300, seed=seed, group=group), text)
    for one in set(group) - {None}:
        assert len(set(found[group == one])) == 1
    assert set(found) == set(NAMES[len(parse_shares(text))])


@pytest.mark.parametrize("text", ["80/8/12", "80/20", "1/1/1"])
def test_many_groups_hold_the_shares_nearly(text: str) -> None:
    """200 groups of 1 to 29 samples: within 2 % of all, and 5 % of the larger classes and of the signs of D."""
    rng = np.random.default_rng(1)
    scores = table(3_000, group=np.array([f"g{one}" for one in rng.integers(0, 200, 3_000)], dtype=object))
    found = split_again(scores, text)
    positive = scores.discrepancy() > 0
    for name, share in zip(NAMES[len(parse_shares(text))], parse_shares(text), strict=True):
        assert abs(np.mean(found == name) - share) < 0.02
        for part in (positive, ~positive, *(scores.label == one for one in range(3))):
            assert abs(np.mean(found[part] == name) - share) < 0.05


def test_groups_of_one_sample_each_are_no_groups() -> None:
    scores = table(400)
    grouped = replace(scores, group=scores.sample_id)
    found = split_again(grouped, "80/8/12")
    for name, share in zip(NAMES[3], parse_shares("80/8/12"), strict=True):
        assert abs((found == name).sum() - share * 400) <= 1


def test_all_without_a_group_is_as_without_groups() -> None:
    scores = table(200)
    nulls = replace(scores, group=np.array([None] * 200, dtype=object))
    assert split_again(scores, "80/8/12").tolist() == split_again(nulls, "80/8/12").tolist()


def test_keys_tell_groups_apart_and_nobody_shares_none() -> None:
    group = np.array(["a", "b", None, "a", None, ""], dtype=object)
    (rows,) = open_scores(table(6, group=group), seed=0).rows()
    keys = group_keys(rows, seed=0)
    assert keys[0] == keys[3]
    assert len(np.unique(keys)) == 5


def test_too_few_groups_are_refused() -> None:
    scores = table(50, group=np.array(["a", "b"] * 25, dtype=object))
    with pytest.raises(ScoreError, match="2 groups cannot be in 3 splits: no group may be in two"):
        split_again(scores, "80/8/12")
    assert set(split_again(scores, "80/20")) == {"train", "test"}


@pytest.mark.parametrize("num_groups", [None, 150])
def test_the_shares_are_those_of_who_is_not_ruled_out(num_groups: int | None) -> None:
    """Ruled out is whoever has D > 0 of class 0: a share of all would leave the others uneven."""
    rng = np.random.default_rng(2)
    scores = table(2_000)
    if num_groups is not None:
        group = [f"g{one}" for one in rng.integers(0, num_groups, 2_000)]
        scores = replace(scores, group=np.array(group, dtype=object))
    out = (scores.label == 0) & (scores.discrepancy() > 0)
    whole = open_scores(scores, seed=0)
    keys = np.sort(keys_of(pa.chunked_array([pa.array(scores.sample_id[out], pa.string())]), seed=0))
    shards = replace(whole, members=(ManifestMembers(name="out", keys=keys, inside=False),))
    found = splits(resplit(shards, parse_shares("80/8/12"), between=AV, scratch=NOWHERE))
    fewer = splits(resplit(only(scores, ~out), parse_shares("80/8/12"), between=AV, scratch=NOWHERE))
    assert found[~out].tolist() == fewer.tolist()


def only(scores: ScoreTable, which: NDArray[np.bool_]) -> ScoreFiles:
    whole = open_scores(scores, seed=0)
    return replace(whole, parts=(scores.to_arrow().filter(pa.array(which)),), num_rows=int(which.sum()))


def test_groups_that_are_ruled_out_are_none() -> None:
    scores = table(60, group=np.array(["a", "b", "c"] * 20, dtype=object))
    out = scores.group == "c"
    keys = np.sort(keys_of(pa.chunked_array([pa.array(scores.sample_id[out], pa.string())]), seed=0))
    shards = replace(open_scores(scores, seed=0), members=(ManifestMembers(name="c", keys=keys, inside=False),))
    with pytest.raises(ScoreError, match="2 groups cannot be in 3 splits"):
        resplit(shards, parse_shares("80/8/12"), between=AV, scratch=NOWHERE)
    found = splits(resplit(shards, parse_shares("80/20"), between=AV, scratch=NOWHERE))
    assert set(found[~out]) == {"train", "test"}


def test_balanced_afterwards_balances_each_new_split_by_itself() -> None:
    scores = table(4_000, classes=2, shape="peaked")
    shards = resplit(open_scores(scores, seed=0), parse_shares("80/8/12"), between=AV, scratch=NOWHERE)
    choice = select_rows(shards, plan_balanced(shards, BalancedConfig(bins=10, tolerance=0.0)), scratch=NOWHERE)
    (rows,) = shards.rows()
    keep = choice.decide(rows).keep
    bins = bin_of(scores.discrepancy(), num_bins=10)
    for place in range(3):
        here = rows.split == place
        kept = np.bincount(bins[here & keep], minlength=10)
        there = np.bincount(bins[here], minlength=10)
        assert set(kept[there > 0]) == {there[there > 0].min()}


def kept_by(shards: ScoreFiles, rule: SelectionRule) -> NDArray[np.bool_]:
    choice = select_rows(shards, rule, scratch=NOWHERE)
    return np.concatenate([choice.decide(rows).keep for rows in shards.rows()])


@pytest.mark.parametrize("seed", range(3))
def test_who_is_kept_is_independent_of_the_split_one_is_put_into(seed: int) -> None:
    """With one hash for both, whoever is kept would be of the training split."""
    scores = table(4_000, classes=2, split=None)
    shards = open_scores(scores, seed=seed)
    train = split_again(scores, "60/40", seed=seed) == "train"
    for rule in (
        plan_balanced(shards, BalancedConfig(tolerance=0.15)),
        parse_subset(shards, "random:1000", between=AV),
    ):
        keep = kept_by(shards, rule)
        assert 500 < keep.sum() < 3_000
        assert abs(train[keep].mean() - 0.6) < 4 * (0.24 / keep.sum()) ** 0.5


def test_cells_are_of_class_and_bin() -> None:
    scores = table(500)
    (rows,) = open_scores(scores, seed=0).rows()
    cells = Cells(between=AV, num_bins=20, num_classes=5)
    assert cells.number == 105
    assert cells.of(rows).tolist() == cells_of(scores).tolist()


@given(st.lists(st.floats(0.01, 1e6), min_size=2, max_size=3))
def test_shares_add_up_to_one_in_their_proportion(parts: list[float]) -> None:
    shares = parse_shares("/".join(map(str, parts)))
    assert sum(shares) == pytest.approx(1)
    np.testing.assert_allclose(np.array(shares) * sum(parts), parts)


@pytest.mark.parametrize(
    "text", ["", "80", "80/", "80/x", "80/0/20", "80/-20", "1/1/1/1", "nan/1", "inf/1", "80:20", "80/8/12/"]
)
def test_wrong_shares_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--resplit {text}: not of the form 80/8/12 \(train, validation, test\)"):
        parse_shares(text)


def test_rows_without_a_split_are_dealt_out_as_others_are() -> None:
    some = table(60, split=np.array(["train" if number % 3 else None for number in range(60)], dtype=object))
    assert (split_again(some, "80/8/12") == split_again(table(60), "80/8/12")).all()


@pytest.mark.parametrize("names", [["holdout"] * 60, ["train", "holdout"] * 30, [1, 2] * 30])
def test_a_split_by_another_name_is_refused_at_every_door(tmp_path: Path, names: list[Any]) -> None:
    shown = ", ".join(repr(str(one)) for one in dict.fromkeys(names) if one != "train")
    line = f"column split holds {shown}: must be one of train, validation, test"
    path = tmp_path / "scores.parquet"
    whole = table(60).to_arrow()
    place = whole.column_names.index("split")
    pq.write_table(whole.set_column(place, "split", pa.array(names)), path)
    for read in (read_scores, partial(open_scores, seed=0)):
        with pytest.raises(ScoreError, match=line):
            read(path)
    with pytest.raises(ScoreError, match=line):
        open_scores(table(60, split=np.array([str(name) for name in names], dtype=object)), seed=0)
