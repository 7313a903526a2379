"""Folds depend on ids and seed only, are stratified by class, and do not split groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.errors import ScoreError
from mmaudit.audit.probes.cross_fit import assign_folds, in_single_fold

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
