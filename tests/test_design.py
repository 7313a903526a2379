"""Design matrices: robust units, and a basis that decorrelates features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmaudit.audit.features.matrix import JointInputs, MatrixInputs
from mmaudit.audit.probes.design import read_design, robust_units


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
