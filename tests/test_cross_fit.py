"""Cross-fitting: probes do not train on the rows that they score."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.dataset.samples import Samples
from mmaudit.audit.errors import Reason, ScoreError
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.probes.cross_fit import CrossFit, gather_fit_rows, in_single_fold, plan_cross_fits
from mmaudit.audit.probes.folds import assign_folds
from mmaudit.audit.probes.prediction import predict_out_of_fold
from mmaudit.audit.row_arrays import smallest_rows


def draw(num_rows: int, *, seed: int, num_folds: int = 4) -> CrossFit:
    rng = np.random.default_rng(seed)
    return CrossFit(
        fold=rng.integers(0, num_folds, num_rows).astype(np.int16),
        inner=rng.integers(0, num_folds, num_rows).astype(np.int16),
        fits=np.arange(num_rows) % 6 != 0,
        key=rng.permutation(num_rows).astype(np.uint64),
    )


CROSS_FITS = (draw(90, seed=0), draw(90, seed=1, num_folds=3))


def test_probes_do_not_train_on_their_fold_or_outside_fits() -> None:
    fit_rows = gather_fit_rows(CROSS_FITS, max_rows=1_000)
    assert sorted(fit_rows.rows) == [row for row in range(90) if row % 6]
    assert fit_rows.train_mask.shape == (75, 7)
    for probe, (cross_fit, fold) in enumerate((c, fold) for c in CROSS_FITS for fold in range(c.num_folds)):
        np.testing.assert_array_equal(fit_rows.train_mask[:, probe], cross_fit.fold[fit_rows.rows] != fold)
        expected = fit_rows.train_mask[:, probe] & (cross_fit.inner[fit_rows.rows] == 0)
        np.testing.assert_array_equal(fit_rows.holdout_mask[:, probe], expected)
    assert fit_rows.can_choose


def test_subsample_has_the_smallest_keys() -> None:
    fit_rows = gather_fit_rows(CROSS_FITS, max_rows=20)
    key = CROSS_FITS[0].key
    left_out = [row for row in range(90) if row % 6 and row not in fit_rows.rows]
    assert len(fit_rows.rows) == 20
    assert key[fit_rows.rows].max() < key[left_out].min()
    np.testing.assert_array_equal(np.sort(fit_rows.rows), smallest_rows(CROSS_FITS[0].fits, key, max_rows=20))


def test_can_choose_is_false_without_holdout_rows() -> None:
    fit_rows = gather_fit_rows(CROSS_FITS, max_rows=1_000)
    assert not fit_rows.take(np.flatnonzero(~fit_rows.holdout_mask.any(axis=1))).can_choose


@pytest.mark.parametrize("rows", [np.arange(90), np.array([7, 3, 3, 88]), np.array([], dtype=np.intp)])
def test_each_row_is_predicted_by_the_probe_of_its_fold(rows: np.ndarray[tuple[int], np.dtype[np.intp]]) -> None:
    predictions = predict_out_of_fold(
        CROSS_FITS, rows, lambda probe, positions: torch.stack([torch.full_like(positions, probe), positions], dim=1)
    )
    np.testing.assert_array_equal(predictions[0, :, 0], CROSS_FITS[0].fold[rows])
    np.testing.assert_array_equal(predictions[1, :, 0], CROSS_FITS[1].fold[rows] + 4)
    np.testing.assert_array_equal(predictions[:, :, 1], np.tile(np.arange(len(rows)), (2, 1)))


Strings = NDArray[np.object_]


def named(count: int, prefix: str = "s") -> Strings:
    return np.array([f"{prefix}{number}" for number in range(count)], dtype=object)


def everyone(count: int) -> NDArray[np.bool_]:
    return np.ones(count, dtype=bool)


LABELS = st.lists(st.integers(0, 4), min_size=2, max_size=60).map(lambda labels: np.array(labels, dtype=np.int32))


@settings(deadline=None)
@given(LABELS, st.data(), st.integers(2, 7), st.integers(0, 9))
def test_folds_do_not_depend_on_row_order(
    label: NDArray[np.int32], data: st.DataObject, num_folds: int, seed: int
) -> None:
    ids = named(len(label))
    fits = np.array(data.draw(st.lists(st.booleans(), min_size=len(label), max_size=len(label))))
    group = np.array([f"g{number % 5}" for number in range(len(label))], dtype=object)
    order = np.random.default_rng(seed).permutation(len(label))
    for groups in (None, group) if len(set(group[fits])) > 1 else (None,):
        fold = assign_folds(ids, label, groups, fits, num_folds=num_folds, seed=seed)
        moved = None if groups is None else groups[order]
        shuffled_fold = assign_folds(ids[order], label[order], moved, fits[order], num_folds=num_folds, seed=seed)
        np.testing.assert_array_equal(shuffled_fold, fold[order])


@settings(deadline=None)
@given(LABELS, st.data(), st.integers(2, 7))
def test_classes_and_training_samples_are_spread_evenly(
    label: NDArray[np.int32], data: st.DataObject, num_folds: int
) -> None:
    fits = np.array(data.draw(st.lists(st.booleans(), min_size=len(label), max_size=len(label))))
    fold = assign_folds(named(len(label)), label, None, fits, num_folds=num_folds, seed=0)
    assert fold.dtype == np.int16
    parts = [fits]
    parts += [
        (label == class_label) & mask
        for class_label in np.unique(label)
        for mask in (everyone(len(label)), fits, ~fits)
    ]
    for part in parts:
        counts = np.bincount(fold[part], minlength=num_folds)
        assert counts.max() - counts.min() <= 1


@settings(deadline=None)
@given(LABELS, st.data(), st.integers(2, 7))
def test_test_samples_do_not_change_the_other_folds(
    label: NDArray[np.int32], data: st.DataObject, num_folds: int
) -> None:
    fits = np.array(data.draw(st.lists(st.booleans(), min_size=len(label), max_size=len(label))))
    if fits.sum() < 2:
        return
    ids = named(len(label))
    group = np.array([f"g{number % 7}" for number in range(len(label))], dtype=object)
    learning = everyone(int(fits.sum()))
    for groups in (None, group) if len(set(group[fits])) > 1 else (None,):
        fold = assign_folds(ids, label, groups, fits, num_folds=num_folds, seed=0)
        moved = None if groups is None else groups[fits]
        alone = assign_folds(ids[fits], label[fits], moved, learning, num_folds=num_folds, seed=0)
        np.testing.assert_array_equal(fold[fits], alone)


def test_seeds_give_different_folds() -> None:
    label = np.zeros(100, dtype=np.int32)
    folds = [assign_folds(named(100), label, None, everyone(100), num_folds=5, seed=seed) for seed in range(5)]
    agreement = [float((folds[0] == other_fold).mean()) for other_fold in folds[1:]]
    assert max(agreement) < 0.5  # 0.2 is expected


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7)), min_size=2, max_size=60), st.integers(2, 6), st.integers()
)
def test_groups_are_never_split(rows: list[tuple[int, int]], num_folds: int, seed: int) -> None:
    label, number = np.array(rows, dtype=np.int32).T
    group = np.array([f"g{group_number}" for group_number in number], dtype=object)
    num_groups = len(set(number.tolist()))
    if num_groups < 2:
        with pytest.raises(ScoreError, match="one group"):
            assign_folds(named(len(label)), label, group, everyone(len(label)), num_folds=num_folds, seed=seed)
        return
    fold = assign_folds(named(len(label)), label, group, everyone(len(label)), num_folds=num_folds, seed=seed)
    assert all(len(set(fold[group == group_name])) == 1 for group_name in set(group))
    # As many folds as asked for, or as groups; none is empty.
    assert sorted(set(fold.tolist())) == list(range(min(num_folds, num_groups)))


def test_groups_are_assigned_so_that_classes_are_even() -> None:
    """40 speakers of unequal size, each with a preferred class: no fold's share of a class is off by half."""
    rng = np.random.default_rng(0)
    speaker = np.repeat(np.arange(40), rng.integers(5, 30, 40))
    label = np.where(rng.random(len(speaker)) < 0.6, speaker % 4, rng.integers(0, 4, len(speaker))).astype(np.int32)
    group = np.array([f"speaker {speaker_number}" for speaker_number in speaker], dtype=object)
    fold = assign_folds(named(len(label)), label, group, everyone(len(label)), num_folds=5, seed=0)
    for class_label in range(4):
        share = np.bincount(fold[label == class_label], minlength=5) / (label == class_label).sum()
        assert np.abs(share - 0.2).max() < 0.1


def test_too_few_samples_raise() -> None:
    with pytest.raises(ScoreError, match="needs at least 2 usable samples, found 1"):
        assign_folds(named(1), np.zeros(1, dtype=np.int32), None, everyone(1), num_folds=5, seed=0)


def test_fewer_samples_than_folds_are_leave_one_out() -> None:
    fold = assign_folds(named(3), np.zeros(3, dtype=np.int32), None, everyone(3), num_folds=5, seed=0)
    assert sorted(fold.tolist()) == [0, 1, 2]


def test_class_in_single_fold_is_detected() -> None:
    label = np.array([0, 0, 1, 1, 2, 2, 3], dtype=np.int32)
    fold = np.array([0, 1, 1, 1, 0, 1, 0], dtype=np.int16)
    assert in_single_fold(label, fold, everyone(7)).tolist() == [False, False, True, True, False, False, True]
    # Test samples do not count: no probe learns class 2 but from its row in fold 0.
    fits = np.array([True, True, True, True, True, False, True])
    assert in_single_fold(label, fold, fits).tolist() == [False, False, True, True, True, True, True]
    assert in_single_fold(label, fold, ~fits).all()


@settings(deadline=None)
@given(LABELS, st.integers(2, 6))
def test_without_groups_only_classes_of_one_sample_are_in_a_single_fold(
    label: NDArray[np.int32], num_folds: int
) -> None:
    fits = everyone(len(label))
    fold = assign_folds(named(len(label)), label, None, fits, num_folds=num_folds, seed=0)
    np.testing.assert_array_equal(in_single_fold(label, fold, fits), np.bincount(label)[label] == 1)


CONFIG = ProbeConfig(folds=5, repeats=3)


def samples_of(label: Any, *, group: Any = None, split: Any = None, ids: Any = None, **rest: Any) -> Samples:
    label = np.asarray(label, dtype=np.int32)
    n = len(label)
    return Samples(
        sample_id=np.array([f"s{row}" for row in range(n)] if ids is None else ids, dtype=object),
        label=label,
        class_names=tuple(f"class {number}" for number in range(int(label.max()) + 1)),
        split=np.array(["train"] * n if split is None else split, dtype=object),
        group=None if group is None else np.array(group, dtype=object),
        paths=pa.table({}),
        **rest,
    )


def every(samples: Samples) -> Any:
    return np.arange(len(samples))


@st.composite
def crowds(draw: st.DrawFn) -> Samples:
    """Draw samples of large and small classes, with or without groups, partly in the test split."""
    n = draw(st.integers(8, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    label = np.minimum(rng.poisson(1.0, n), 5)
    group = [f"g{number}" for number in rng.integers(0, draw(st.integers(4, 12)), n)] if draw(st.booleans()) else None
    split = np.where(rng.random(n) < draw(st.sampled_from([0.0, 0.3])), "test", "train")
    split[:4] = "train"
    return samples_of(label, group=group, split=split)


@settings(deadline=None)
@given(crowds(), st.sampled_from(["all", "train"]), st.integers(0, 99))
def test_remaining_classes_are_cross_fitted_in_every_repeat(samples: Samples, learn_from: str, seed: int) -> None:
    config = replace(CONFIG, learn_from=learn_from)
    try:
        rows, cross_fits, left_out = plan_cross_fits(samples, every(samples), config, seed=seed)
    except ScoreError:
        return  # too few groups, or no class large enough: said elsewhere
    names = {record.sample_id for record in left_out}
    assert names | set(samples.sample_id[rows]) == set(samples.sample_id)
    assert len(names) + len(rows) == len(samples)
    assert {record.reason for record in left_out} <= {Reason.RARE_CLASS}
    assert {samples.label[samples.sample_id == name][0] for name in names}.isdisjoint(samples.label[rows])
    for cross_fit in cross_fits:
        assert len(cross_fit.fold) == len(rows)
        np.testing.assert_array_equal(cross_fit.fits, (samples.split[rows] != "test") | (learn_from == "all"))
        for class_label in set(samples.label[rows].tolist()):
            of_class = (samples.label[rows] == class_label) & cross_fit.fits
            assert len(set(cross_fit.fold[of_class].tolist())) > 1
        if samples.group is not None:
            for deal in (cross_fit.fold, cross_fit.inner):
                pairs = set(zip(samples.group[rows], deal.tolist(), strict=True))
                assert len(pairs) == len({name for name, _ in pairs})


def test_repeats_and_seeds_differ() -> None:
    """Random assignments to five folds agree on a fifth of the rows."""
    samples = samples_of(np.arange(400) % 2)
    _, cross_fits, _ = plan_cross_fits(samples, every(samples), CONFIG, seed=5)
    _, other_seed, _ = plan_cross_fits(samples, every(samples), CONFIG, seed=6)
    assignments = [
        assignment for cross_fit in [*cross_fits, *other_seed] for assignment in (cross_fit.fold, cross_fit.inner)
    ]
    for index, first in enumerate(assignments):
        for second in assignments[:index]:
            assert (first == second).mean() < 0.4
    _, single_repeat, _ = plan_cross_fits(samples, every(samples), replace(CONFIG, repeats=1), seed=5)
    # A repeat more does not change those before.
    np.testing.assert_array_equal(single_repeat[0].fold, cross_fits[0].fold)


def test_folds_follow_the_ids() -> None:
    samples = samples_of(np.arange(80) % 3)
    order = np.random.default_rng(0).permutation(80)
    moved = samples_of(samples.label[order], ids=samples.sample_id[order])
    _, (first, *_), _ = plan_cross_fits(samples, every(samples), CONFIG, seed=0)
    _, (second, *_), _ = plan_cross_fits(moved, every(moved), CONFIG, seed=0)
    for name in ("fold", "inner", "key"):
        np.testing.assert_array_equal(getattr(second, name), getattr(first, name)[order])


def test_labels_do_not_change_training_folds() -> None:
    split = np.where(np.arange(80) % 4 == 0, "test", "train")
    label = np.arange(80) % 3
    config = replace(CONFIG, learn_from="train")
    assignments = []
    for labels in (label, np.where(split == "test", 0, label)):
        samples = samples_of(labels, split=split)
        _, cross_fits, _ = plan_cross_fits(samples, every(samples), config, seed=0)
        assignments.append(
            [
                (cross_fit.fold[split == "train"].tolist(), cross_fit.inner[split == "train"].tolist())
                for cross_fit in cross_fits
            ]
        )
    assert assignments[0] == assignments[1]


def test_rare_class_is_reported_with_its_size() -> None:
    samples = samples_of([0, 1] * 10 + [2])
    rows, _, left_out = plan_cross_fits(samples, every(samples), CONFIG, seed=0)
    assert rows.tolist() == list(range(20))
    assert [(record.sample_id, record.modality, record.reason, record.detail) for record in left_out] == [
        ("s20", None, Reason.RARE_CLASS, "class 'class 2' has 1 usable samples, all in one fold")
    ]
    grouped = samples_of([0, 1] * 10 + [2, 2, 2], group=[f"g{row // 2 % 5}" for row in range(20)] + ["g0"] * 3)
    _, _, left_out = plan_cross_fits(grouped, every(grouped), CONFIG, seed=0)
    assert {record.detail for record in left_out} == {
        "class 'class 2' has 3 usable samples, of 1 groups, all in one fold"
    }
    assert len(left_out) == 3


def test_only_selected_rows_count() -> None:
    samples = samples_of([0, 1] * 10 + [2, 2])
    rows, _, left_out = plan_cross_fits(samples, np.arange(21), CONFIG, seed=0)
    assert rows.tolist() == list(range(20))
    assert [record.sample_id for record in left_out] == ["s20"]


def test_strata_of_a_regression_are_never_too_rare() -> None:
    label = np.array([0, 1] * 10 + [2])
    samples = samples_of(label, task="regression", values=label[:, None].astype(np.float32), outputs=("y",))
    rows, _, left_out = plan_cross_fits(samples, every(samples), CONFIG, seed=0)
    assert (len(rows), len(left_out)) == (21, 0)


def test_data_that_cannot_be_cross_fitted_raises() -> None:
    tests = samples_of([0, 1] * 5, split=["test"] * 10)
    for learn_from in ("all", "train"):
        with pytest.raises(ScoreError, match=r"every usable sample is in the test split: .* pass --split none"):
            plan_cross_fits(tests, every(tests), replace(CONFIG, learn_from=learn_from), seed=0)
    alone = samples_of([0, 1, 2, 3])
    with pytest.raises(ScoreError, match="no class can be cross-fitted; the first of them: class 'class 0' has 1"):
        plan_cross_fits(alone, every(alone), CONFIG, seed=0)
    together = samples_of([0, 1] * 5, group=["g"] * 10)
    with pytest.raises(ScoreError, match="all usable samples are of one group"):
        plan_cross_fits(together, every(together), CONFIG, seed=0)
