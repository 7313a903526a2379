"""Cross-fitting: probes do not train on the rows that they score."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmaudit.audit.probes.cross_fit import CrossFit, first_rows, gather_fit_rows, predict_out_of_fold


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
    np.testing.assert_array_equal(
        np.sort(fit_rows.rows), first_rows(np.arange(90)[CROSS_FITS[0].fits], key, max_rows=20)
    )


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
