"""Tests of ordered samplers: training uses the order that `mmaudit order` prints; BSS-H is paced as in its paper; draws
follow their weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from mmaudit.audit.errors import ConfigError, ManifestError
from mmaudit.rebalance.curriculum import PACINGS, OrderConfig, draw_rows, epoch_order, id_keys, root_pacing
from mmaudit.train.optimizer import SINGLE_PROCESS
from mmaudit.train.sampling import SAMPLERS
from mmaudit.train.sampling.ordered import AntiCurriculum, BssH, Ordered, Uniform
from mmaudit.train.sampling.sampler import Pool, Sampler

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
        discrepancy=none,
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
    sampler = sampler_class(pool, order, batch_size=batch_size, seed=seed, distributed=SINGLE_PROCESS)
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


def sampler_of(name: str, *, order: OrderConfig | None = None, **columns: NDArray[Any]) -> Sampler:
    n = len(next(iter(columns.values())))
    filled: dict[str, NDArray[Any]] = {
        "discrepancy": np.full(n, np.nan),
        "balance": np.full(n, np.nan),
        "p_balanced": np.full(n, np.nan),
        "label": np.zeros(n, np.int64),
        **columns,
    }
    key = id_keys(f"s{row}" for row in range(n))
    pool = Pool(key=key, rank=np.zeros(n, np.int64), **filled, num_classes=4, num_modalities=2)
    sampler: Sampler = SAMPLERS.load(name)(
        pool, order or OrderConfig(), batch_size=32, seed=1, distributed=SINGLE_PROCESS
    )
    return sampler


def drawn_rows(sampler: Sampler, epoch: int = 1) -> NDArray[np.int64]:
    return np.concatenate([step.rows for step in sampler.steps(epoch)])


def test_classes_and_samples_within_them_are_equally_likely() -> None:
    label = np.repeat([0, 1, 3], [2_000, 300, 100])  # no sample of class 2
    sampler = sampler_of("class-balanced", label=label)
    drawn = np.concatenate([drawn_rows(sampler, epoch) for epoch in range(1, 11)])
    assert len(drawn) == 10 * len(label)
    assert chisquare(np.bincount(label[drawn])[[0, 1, 3]]).pvalue > 1e-3
    assert chisquare(np.bincount(drawn, minlength=len(label))[-100:]).pvalue > 1e-3


def test_balanced_set_is_drawn_uniformly() -> None:
    drawn = drawn_rows(sampler_of("class-balanced", label=np.arange(4_000) % 4))
    left_out = 4_000 - len(set(drawn.tolist()))
    assert left_out == pytest.approx(4_000 / math.e, abs=4 * math.sqrt(4_000 / math.e))


def test_posteriors_are_probabilities_of_draws_with_replacement() -> None:
    p = np.repeat([0.0, 0.005, 0.25, 1.0], 500)
    drawn = drawn_rows(sampler_of("posterior", order=OrderConfig(draw="replacement"), p_balanced=p))
    assert len(drawn) == len(p)
    probability = np.array([0.01, 0.01, 0.25, 1.0])
    assert chisquare(np.bincount(drawn // 500, minlength=4), len(p) * probability / probability.sum()).pvalue > 1e-3


def test_order_has_every_sample_and_likely_balanced_ones_early() -> None:
    p = np.repeat([0.0, 1.0], 500)
    drawn = drawn_rows(sampler_of("posterior", p_balanced=p))
    assert sorted(drawn.tolist()) == list(range(1_000))
    # Efraimidis-Spirakis: P(the first is likely) = 1 / 1.01; in the first half few of the unlikely occur.
    assert p[drawn[:250]].mean() > 0.95
    assert p[drawn[-250:]].mean() == 0


def test_posterior_of_0_everywhere_draws_uniformly() -> None:
    uniform = sampler_of("posterior", p_balanced=np.full(20, 0.5))
    assert drawn_rows(sampler_of("posterior", p_balanced=np.zeros(20))).tolist() == drawn_rows(uniform).tolist()


def test_manifest_without_posteriors_raises() -> None:
    with pytest.raises(ManifestError, match=r"1 of 3 training samples have none .*rescore with mmaudit score"):
        sampler_of("posterior", p_balanced=np.array([0.2, np.nan, 0.3]))


@pytest.mark.parametrize("draw", ["order", "replacement"])
@pytest.mark.parametrize("weight", ["linear", "softmax"])
def test_draws_by_balance_equal_the_weighted_order(draw: str, weight: str) -> None:
    balance, key = np.linspace(-1, 1, 100), id_keys(map(str, range(100)))
    weights = 1.01 + balance if weight == "linear" else np.exp(balance)
    config = OrderConfig(order="weighted", draw=draw, weight=weight)
    order = epoch_order(rank=np.zeros(100, np.int64), balance=balance, key=key, config=config, seed=5, epoch=2)
    assert draw_rows(weights, key=key, draw=draw, seed=5, epoch=2).tolist() == order.tolist()


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weights_must_be_numbers_above_0(weight: float) -> None:
    with pytest.raises(ManifestError, match=r"1 weights are not above 0 \(row 1 has"):
        draw_rows(np.array([1.0, weight, 2.0]), key=id_keys("abc"), draw="order", seed=0, epoch=1)


def test_draw_rows_checks_its_arguments() -> None:
    weight, key = np.ones(3), id_keys("abc")
    with pytest.raises(ConfigError, match="did you mean replacement"):
        draw_rows(weight, key=key, draw="replace", seed=0, epoch=1)
    with pytest.raises(ConfigError, match="epoch 0: it must be at least 1"):
        draw_rows(weight, key=key, draw="order", seed=0, epoch=0)
    with pytest.raises(ManifestError, match="use one manifest's"):
        draw_rows(weight, key=key[:2], draw="order", seed=0, epoch=1)
