"""Design matrices: robust units, and a basis that decorrelates features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.features.matrix import JointInputs, MatrixInputs
from mmaudit.audit.probes.design import MAX_LOGITS, choose_outputs, read_design, robust_units, take_outputs


def test_missing_values_are_the_centre() -> None:
    x = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32) * 4 + 9
    x[::5] = np.nan
    units = robust_units(torch.from_numpy(x))
    z = units.standardise(torch.from_numpy(x))
    assert z[::5].eq(0).all()
    torch.testing.assert_close(z[1], (torch.from_numpy(x[1]) - units.centre) / units.scale)
    present = robust_units(torch.from_numpy(x[np.arange(50) % 5 != 0]))
    torch.testing.assert_close(present.centre, units.centre)
    torch.testing.assert_close(present.scale, units.scale)


def test_feature_missing_in_every_row_is_zero() -> None:
    inputs = MatrixInputs(matrix=np.ones((20, 2), np.float32))
    design = read_design(
        JointInputs(parts=(inputs, inputs), masked=frozenset({1})), np.arange(20), products=torch.float32
    )
    assert design.rows.eq(0).all()
    assert design.units.scale.eq(1).all()


def test_outlier_row_does_not_change_units() -> None:
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    wild = x.clone()
    wild[7] = 1e20
    before, after = robust_units(x), robust_units(wild)
    torch.testing.assert_close(after.centre, before.centre, atol=0.05, rtol=0)
    torch.testing.assert_close(after.scale, before.scale, atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64])
def test_rows_are_in_requested_order(kind: type[np.generic]) -> None:
    x = np.random.default_rng(1).integers(0, 250, (5_000, 300)).astype(kind)
    rows = np.random.default_rng(2).permutation(5_000)[:4_000]
    design = read_design(MatrixInputs(matrix=x), rows, products=torch.float32)
    torch.testing.assert_close(design.rows, design.units.standardise(torch.from_numpy(x[rows].astype(np.float32))))


def test_basis_makes_the_covariance_diagonal() -> None:
    x = np.random.default_rng(3).standard_normal((400, 6)) @ np.random.default_rng(4).standard_normal((6, 6))
    design = read_design(MatrixInputs(matrix=x), np.arange(400), products=torch.float64, dtype=torch.float64)
    assert design.basis is not None
    torch.testing.assert_close(design.rows.std(dim=0, correction=0), torch.ones(6, dtype=torch.float64))
    turned = design.rows @ design.basis
    torch.testing.assert_close(turned.T @ turned / 400, torch.diag(design.curvature))
    weight = torch.randn(2, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(design.from_axes(design.to_axes(weight)), weight)


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
