"""Tests of the curriculum by |D|: an epoch is the share of smallest |D|, paced as BSS-H."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from training import make_pool

from mmaudit.audit.errors import ManifestError
from mmaudit.rebalance.curriculum import OrderConfig
from mmaudit.train.optimizer import SINGLE_PROCESS
from mmaudit.train.sampling.balanced_first import BalancedFirst

DISCREPANCIES = st.lists(st.floats(-1, 1), min_size=1, max_size=60).map(np.array)


def sampler_of(discrepancy: NDArray[np.float64], *, order: OrderConfig | None = None) -> BalancedFirst:
    """Build the sampler on a pool whose other columns would give other orders."""
    n = len(discrepancy)
    pool = make_pool(n, rank=np.arange(n)[::-1].copy(), discrepancy=discrepancy, num_classes=1)
    return BalancedFirst(pool, order or OrderConfig(), batch_size=8, seed=0, distributed=SINGLE_PROCESS)


@given(DISCREPANCIES, st.floats(0.01, 1), st.integers(1, 50), st.integers(1, 60))
def test_epoch_is_the_share_of_smallest_absolute_discrepancy(
    discrepancy: NDArray[np.float64], start: float, grow_epochs: int, epoch: int
) -> None:
    order = OrderConfig(start=start, grow_epochs=grow_epochs)
    rows = np.concatenate([step.rows for step in sampler_of(discrepancy, order=order).steps(epoch)])
    share = 1.0 if epoch >= grow_epochs else math.sqrt(epoch * (1 - start**2) / grow_epochs + start**2)
    size = max(1, math.floor(len(discrepancy) * min(1.0, share)))
    assert len(set(rows.tolist())) == len(rows) == size
    assert sorted(np.abs(discrepancy[rows])) == sorted(np.abs(discrepancy))[:size]


def test_sign_does_not_matter() -> None:
    discrepancy = np.linspace(-1, 1, 41)
    sampler, mirrored = sampler_of(discrepancy), sampler_of(-discrepancy)
    assert sampler.rows(3).tolist() == mirrored.rows(3).tolist()


def test_manifest_without_discrepancies_raises() -> None:
    with pytest.raises(ManifestError, match=r"1 of 3 training samples have none .*rescore with mmaudit score"):
        sampler_of(np.array([0.1, np.nan, 0.3]))
