"""Tests of ordered samplers: training uses the order that `mmaudit order` prints; BSS-H is paced as in its paper."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.rebalance.curriculum import PACINGS, OrderConfig, epoch_order, id_keys, root_pacing
from mmaudit.train.optimizer import SINGLE_PROCESS
from mmaudit.train.sampling.config import SamplingConfig
from mmaudit.train.sampling.ordered import AntiCurriculum, BssH, Ordered, Uniform
from mmaudit.train.sampling.sampler import Pool

# Ranks of training rows: any distinct numbers, because other rows of the manifest have ranks too.
RANKS = st.lists(st.integers(0, 10**6), min_size=1, max_size=60, unique=True).map(np.array)
ORDERS = st.builds(
    OrderConfig,
    pacing=st.sampled_from(sorted(PACINGS)),
    start=st.floats(0.01, 1),
    grow_epochs=st.integers(1, 50),
    steps=st.integers(1, 9),
)
ORDER_OF_SAMPLER: dict[type[Ordered], str] = {
    Uniform: "shuffled",
    BssH: "curriculum",
    AntiCurriculum: "anti-curriculum",
}


def make_pool(rank: NDArray[np.int64]) -> Pool:
    """Build a pool of samples named by their ranks, without scores."""
    none = np.full(len(rank), np.nan)
    return Pool(
        key=id_keys(map(str, rank)),
        rank=rank,
        balance=none,
        p_balanced=none,
        label=np.zeros(len(rank), np.int64),
        num_classes=1,
        num_modalities=2,
    )


def rows_of_epoch(
    sampler_class: type[Ordered],
    rank: NDArray[np.int64],
    order: OrderConfig,
    epoch: int,
    *,
    seed: int = 0,
    batch_size: int = 8,
) -> NDArray[np.int64]:
    """Return the rows of an epoch in order."""
    pool = make_pool(rank)
    sampler = sampler_class(pool, SamplingConfig(), order, batch_size=batch_size, seed=seed, distributed=SINGLE_PROCESS)
    steps = list(sampler.steps(epoch))
    assert all(step.present is None and step.fused is None for step in steps)
    return np.concatenate([step.rows for step in steps])


@pytest.mark.parametrize("sampler_class", ORDER_OF_SAMPLER)
@given(RANKS, ORDERS, st.integers(0, 99), st.integers(1, 60))
def test_training_order_equals_order_of(
    sampler_class: type[Ordered], rank: NDArray[np.int64], order: OrderConfig, seed: int, epoch: int
) -> None:
    expected = epoch_order(
        rank=rank,
        key=id_keys(map(str, rank)),
        config=replace(order, order=ORDER_OF_SAMPLER[sampler_class]),
        seed=seed,
        epoch=epoch,
    )
    assert rows_of_epoch(sampler_class, rank, order, epoch, seed=seed).tolist() == expected.tolist()


@given(RANKS, st.integers(1, 80))
def test_uniform_uses_every_row_once(rank: NDArray[np.int64], epoch: int) -> None:
    rows = rows_of_epoch(Uniform, rank, OrderConfig(start=0.1), epoch)
    assert sorted(rows.tolist()) == list(range(len(rank)))


@pytest.mark.parametrize(("sampler_class", "sign"), [(BssH, 1), (AntiCurriculum, -1)])
@given(RANKS, st.floats(0.01, 1), st.integers(1, 50), st.integers(1, 80))
def test_epoch_is_exactly_one_end_of_the_ranks(
    sampler_class: type[Ordered], sign: int, rank: NDArray[np.int64], start: float, grow_epochs: int, epoch: int
) -> None:
    rows = rows_of_epoch(sampler_class, rank, OrderConfig(start=start, grow_epochs=grow_epochs), epoch)
    size = max(1, int(len(rank) * root_pacing(epoch, start=start, grow_epochs=grow_epochs)))
    assert sorted((sign * rank[rows]).tolist()) == sorted((sign * rank).tolist())[:size]


def test_bss_h_has_the_constants_of_the_paper() -> None:
    rank = np.random.default_rng(0).permutation(1_000)
    # 1000 sqrt(0.99 t / 40 + 0.01), by hand: lambda(1) = 0.186, lambda(40) = 1
    sizes = [len(rows_of_epoch(BssH, rank, OrderConfig(), epoch)) for epoch in (1, 10, 20, 39, 40, 60)]
    assert sizes == [186, 507, 710, 987, 1_000, 1_000]


@pytest.mark.parametrize("sampler_class", ORDER_OF_SAMPLER)
def test_name_of_the_configured_order_does_not_matter(sampler_class: type[Ordered]) -> None:
    """`--sampling` selects the order; the section `order` sets its pacing."""
    rank = np.random.default_rng(0).permutation(50)
    drawn = [
        rows_of_epoch(sampler_class, rank, OrderConfig(order=order), 3).tolist()
        for order in ("curriculum", "weighted", "shuffled")
    ]
    assert drawn[0] == drawn[1] == drawn[2]
