"""Tests of weighted draws: probabilities by class and by posterior."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chisquare

from mmaudit.audit.errors import ConfigError, ManifestError
from mmaudit.rebalance.curriculum import OrderConfig, draw_rows, epoch_order, id_keys
from mmaudit.train.optimizer import SINGLE_PROCESS
from mmaudit.train.sampling.config import SamplingConfig
from mmaudit.train.sampling.sampler import Pool, Sampler, build_sampler


def sampler_of(name: str, *, order: OrderConfig | None = None, **columns: NDArray[Any]) -> Sampler:
    n = len(next(iter(columns.values())))
    filled: dict[str, NDArray[Any]] = {
        "balance": np.full(n, np.nan),
        "p_balanced": np.full(n, np.nan),
        "label": np.zeros(n, np.int64),
        **columns,
    }
    key = id_keys(f"s{row}" for row in range(n))
    pool = Pool(key=key, rank=np.zeros(n, np.int64), **filled, num_classes=4, num_modalities=2)
    return build_sampler(
        name, pool, SamplingConfig(), order or OrderConfig(), batch_size=32, seed=1, distributed=SINGLE_PROCESS
    )


def rows_of_epoch(sampler: Sampler, epoch: int = 1) -> NDArray[np.int64]:
    return np.concatenate([step.rows for step in sampler.steps(epoch)])


def test_classes_and_samples_within_them_are_equally_likely() -> None:
    label = np.repeat([0, 1, 3], [2_000, 300, 100])  # no sample of class 2
    sampler = sampler_of("class-balanced", label=label)
    drawn = np.concatenate([rows_of_epoch(sampler, epoch) for epoch in range(1, 11)])
    assert len(drawn) == 10 * len(label)
    assert chisquare(np.bincount(label[drawn])[[0, 1, 3]]).pvalue > 1e-3
    assert chisquare(np.bincount(drawn, minlength=len(label))[-100:]).pvalue > 1e-3


def test_balanced_set_is_drawn_uniformly() -> None:
    drawn = rows_of_epoch(sampler_of("class-balanced", label=np.arange(4_000) % 4))
    left_out = 4_000 - len(set(drawn.tolist()))
    assert left_out == pytest.approx(4_000 / math.e, abs=4 * math.sqrt(4_000 / math.e))


def test_posteriors_are_probabilities_of_draws_with_replacement() -> None:
    p = np.repeat([0.0, 0.005, 0.25, 1.0], 500)
    drawn = rows_of_epoch(sampler_of("posterior", order=OrderConfig(draw="replacement"), p_balanced=p))
    assert len(drawn) == len(p)
    probability = np.array([0.01, 0.01, 0.25, 1.0])
    assert chisquare(np.bincount(drawn // 500, minlength=4), len(p) * probability / probability.sum()).pvalue > 1e-3


def test_order_has_every_sample_and_likely_balanced_ones_early() -> None:
    p = np.repeat([0.0, 1.0], 500)
    drawn = rows_of_epoch(sampler_of("posterior", p_balanced=p))
    assert sorted(drawn.tolist()) == list(range(1_000))
    # Efraimidis-Spirakis: P(the first is likely) = 1 / 1.01; in the first half few of the unlikely occur.
    assert p[drawn[:250]].mean() > 0.95
    assert p[drawn[-250:]].mean() == 0


def test_posterior_of_0_everywhere_draws_uniformly() -> None:
    uniform = sampler_of("posterior", p_balanced=np.full(20, 0.5))
    assert rows_of_epoch(sampler_of("posterior", p_balanced=np.zeros(20))).tolist() == rows_of_epoch(uniform).tolist()


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
