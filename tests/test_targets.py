"""Tests of subsets of outputs: bounded in size, independent of other folds' labels, complete for small targets."""

from __future__ import annotations

import numpy as np
import pytest

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.probes.design import MAX_LOGITS, choose_outputs, take_outputs

RNG = np.random.default_rng(0)


def keys(num_rows: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return RNG.permutation(num_rows).astype(np.uint64)


@pytest.mark.parametrize(("num_classes", "num_rows"), [(2, 9_000), (300, 9_000), (1_000, 3_000)])
def test_few_outputs_use_all_outputs_and_first_rows_by_key(num_classes: int, num_rows: int) -> None:
    label, key = RNG.integers(0, num_classes, num_rows).astype(np.int32), keys(num_rows)
    rows, outputs = choose_outputs(label, key, task="classification", num_outputs=num_classes, max_rows=8_000)
    np.testing.assert_array_equal(outputs, np.arange(num_classes))
    np.testing.assert_array_equal(rows, np.flatnonzero(key < 8_000))


@pytest.mark.parametrize(("num_classes", "size"), [(5_000, 6), (20_000, 3), (1_000, 100)])
def test_many_classes_are_subsampled_with_their_rows(num_classes: int, size: int) -> None:
    label = RNG.permutation(np.repeat(np.arange(num_classes), size)).astype(np.int32)
    rows, outputs = choose_outputs(
        label, keys(len(label)), task="classification", num_outputs=num_classes, max_rows=8_000
    )
    assert 0.8 * MAX_LOGITS <= len(rows) * len(outputs) <= 1.1 * MAX_LOGITS
    assert set(label[rows]) == set(outputs.tolist())
    mean_size = len(rows) / len(outputs)
    assert mean_size == pytest.approx(min(size, 8_000 / len(outputs)), rel=0.1)


def test_labels_of_one_fold_do_not_affect_rows_of_another() -> None:
    label, key = RNG.integers(0, 3_000, 20_000).astype(np.int32), keys(20_000)
    fold = RNG.integers(0, 2, 20_000)
    permuted = np.where(fold == 0, RNG.permutation(label), label).astype(np.int32)
    selections = [
        choose_outputs(y, key, task="classification", num_outputs=3_000, max_rows=8_000) for y in (label, permuted)
    ]
    np.testing.assert_array_equal(selections[0][1], selections[1][1])
    np.testing.assert_array_equal(*(rows[fold[rows] == 1] for rows, _ in selections))


def test_many_labels_are_subsampled_by_column() -> None:
    values, key = (RNG.random((9_000, 2_000)) < 0.01).astype(np.float32), keys(9_000)
    rows, outputs = choose_outputs(values, key, task="multilabel", num_outputs=2_000, max_rows=8_000)
    np.testing.assert_array_equal(rows, np.flatnonzero(key < 8_000))
    assert len(outputs) == MAX_LOGITS // 8_000
    target = Target(task="multilabel", label=np.zeros(9_000, np.int32), num_outputs=2_000, values=values)
    selected = take_outputs(target.take(rows), outputs)
    np.testing.assert_array_equal(selected.values, values[np.ix_(rows, outputs)])
    assert selected.num_outputs == len(outputs)


def test_selected_classes_are_renumbered() -> None:
    target = Target(task="classification", label=np.array([7, 3, 7], np.int32), num_outputs=9)
    selected = take_outputs(target, np.array([3, 7]))
    assert selected.label.tolist() == [1, 0, 1]
    assert selected.num_outputs == 2
    assert take_outputs(target, np.arange(9)) is target
