"""The contract of every sampler, and what each promises besides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.errors import ConfigError
from mmaudit.rebalance.curriculum import OrderConfig, id_key, order_of
from mmaudit.rebalance.pacing import root_pacing
from mmaudit.train.sampling import SAMPLERS, SamplingConfig

# Ranks of training rows: any, because the manifest's other rows have some of them.
RANKS = st.lists(st.integers(0, 10**6), min_size=1, max_size=60, unique=True).map(np.array)
CONFIGS = st.builds(SamplingConfig, pacing_start=st.floats(0.01, 1), pacing_epochs=st.integers(1, 50))


def key_of(rank: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Give the keys of samples that are called by their ranks."""
    return id_key([str(each) for each in rank])


@pytest.mark.parametrize("name", SAMPLERS)
@given(RANKS, CONFIGS, st.integers(0, 99), st.integers(1, 80))
def test_every_epoch_sees_some_rows_once(
    name: str, rank: NDArray[np.integer], config: SamplingConfig, seed: int, epoch: int
) -> None:
    before = rank.tolist()
    rows = SAMPLERS[name](rank, seed, config, key=key_of(rank)).rows(epoch)
    assert len(rows) > 0
    assert np.issubdtype(rows.dtype, np.integer)
    assert set(rows.tolist()) <= set(range(len(rank)))
    assert len(set(rows.tolist())) == len(rows)
    assert rank.tolist() == before


@pytest.mark.parametrize("name", SAMPLERS)
@given(RANKS, CONFIGS, st.integers(0, 99), st.lists(st.integers(1, 80), min_size=1, max_size=5))
def test_an_epoch_is_a_pure_function_of_seed_and_number(
    name: str, rank: NDArray[np.integer], config: SamplingConfig, seed: int, epochs: list[int]
) -> None:
    sampler = SAMPLERS[name](rank, seed, config, key=key_of(rank))
    seen = {epoch: sampler.rows(epoch).tolist() for epoch in epochs}
    for epoch in reversed(epochs):  # as a resumed run does: other epochs before it, or none
        assert SAMPLERS[name](rank, seed, config, key=key_of(rank)).rows(epoch).tolist() == seen[epoch]


@pytest.mark.parametrize("name", SAMPLERS)
def test_orders_differ_by_seed_and_by_epoch(name: str) -> None:
    rank = np.random.default_rng(0).permutation(60)
    config = SamplingConfig(pacing_epochs=1)
    samplers = [SAMPLERS[name](rank, seed, config, key=key_of(rank)) for seed in range(5)]
    orders = {tuple(sampler.rows(epoch)) for sampler in samplers for epoch in range(1, 6)}
    assert len(orders) == 25


@pytest.mark.parametrize("name", SAMPLERS)
@given(RANKS, CONFIGS)
def test_in_the_end_every_row_is_seen(name: str, rank: NDArray[np.integer], config: SamplingConfig) -> None:
    rows = SAMPLERS[name](rank, 0, config, key=key_of(rank)).rows(config.pacing_epochs)
    assert sorted(rows.tolist()) == list(range(len(rank)))


@given(RANKS, st.integers(1, 80))
def test_uniform_sees_every_row_from_the_start(rank: NDArray[np.integer], epoch: int) -> None:
    rows = SAMPLERS["uniform"](rank, 0, SamplingConfig(), key=key_of(rank)).rows(epoch)
    assert sorted(rows.tolist()) == list(range(len(rank)))


@given(RANKS, CONFIGS, st.integers(1, 80))
def test_bss_h_sees_exactly_the_most_balanced_share(
    rank: NDArray[np.integer], config: SamplingConfig, epoch: int
) -> None:
    rows = SAMPLERS["bss-h"](rank, 0, config, key=key_of(rank)).rows(epoch)
    share = root_pacing(epoch, start=config.pacing_start, grow_epochs=config.pacing_epochs)
    expected = np.sort(rank)[: max(1, int(len(rank) * share))]
    assert sorted(rank[rows].tolist()) == expected.tolist()


def test_the_constants_of_bss_h_are_the_paper_s() -> None:
    rank = np.random.default_rng(0).permutation(1_000)
    sampler = SAMPLERS["bss-h"](rank, 0, SamplingConfig(), key=key_of(rank))
    # 1000 sqrt(0.99 t / 40 + 0.01), by hand
    assert [len(sampler.rows(epoch)) for epoch in (1, 10, 20, 39, 40, 60)] == [186, 507, 710, 987, 1_000, 1_000]


@pytest.mark.parametrize("name", SAMPLERS)
@given(RANKS, CONFIGS, st.integers(1, 80))
def test_the_order_does_not_depend_on_how_rows_stand(
    name: str, rank: NDArray[np.integer], config: SamplingConfig, epoch: int
) -> None:
    key = key_of(rank)
    rows = SAMPLERS[name](rank, 0, config, key=key).rows(epoch)
    turned = SAMPLERS[name](rank[::-1], 0, config, key=key[::-1]).rows(epoch)
    assert rank[::-1][turned].tolist() == rank[rows].tolist()


@pytest.mark.parametrize(
    ("name", "order"),
    [("uniform", OrderConfig(order="shuffled")), ("bss-h", OrderConfig(start=0.2, grow_epochs=7))],
)
@given(RANKS, st.integers(0, 99), st.integers(1, 10))
def test_a_sampler_sees_the_order_of_its_name(
    name: str, order: OrderConfig, rank: NDArray[np.integer], seed: int, epoch: int
) -> None:
    key = key_of(rank)
    rows = SAMPLERS[name](rank, seed, SamplingConfig(pacing_start=0.2, pacing_epochs=7), key=key).rows(epoch)
    assert rows.tolist() == order_of(rank=rank, key=key, config=order, seed=seed, epoch=epoch).tolist()


@pytest.mark.parametrize("start", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_lies_in_its_range(start: float) -> None:
    with pytest.raises(ConfigError, match=r"sampling.pacing_start is .*; a share lies in \(0, 1\]"):
        SamplingConfig(pacing_start=start)


def test_pacing_takes_an_epoch() -> None:
    with pytest.raises(ConfigError, match=r"sampling\.pacing_epochs is 0; it must be at least 1"):
        SamplingConfig(pacing_epochs=0)
