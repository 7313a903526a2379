"""Contract of every sampler: its draws follow from pool, seed, epoch and state only.

Ordered samplers: training uses the order that `mmaudit order` prints, BSS-H is paced as in its paper, and draws follow
their weights.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare
from torch import Tensor
from training import select_rows

from mmaudit.audit.errors import ConfigError, ManifestError
from mmaudit.rebalance.curriculum import PACINGS, OrderConfig, draw_rows, epoch_order, id_keys, root_pacing
from mmaudit.train.batches import Loss, OutputFunction, Step, to_batch
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import SINGLE_PROCESS
from mmaudit.train.sampling import SAMPLERS
from mmaudit.train.sampling.bss import AntiCurriculum, BssConfig, BssH
from mmaudit.train.sampling.dus import DusConfig
from mmaudit.train.sampling.sampler import Ordered, Pool, Sampler, Uniform
from mmaudit.train.sampling.smv import SmvConfig

torch.set_num_threads(1)

N, B, K = 60, 8, 3
PAIRS: dict[str, Any] = {
    "bss-l": BssConfig(every_epochs=2),
    "dus-h": DusConfig(dead_zone=0.0, kappa=3.0),
    "dus-rl": DusConfig(dead_zone=0.0, kappa=3.0),
    "smv": SmvConfig(warmup_epochs=1, every_epochs=2),
}
PACED = OrderConfig(start=0.3, grow_epochs=4)
# Every sampler, and its settings that draw differently.
KINDS: dict[str, tuple[str, Any, OrderConfig]] = {
    **{name: (name, PAIRS.get(name), PACED) for name in SAMPLERS},
    "bss-h-model": ("bss-h", BssConfig(score_source="model"), PACED),
    "anti-curriculum-model": ("anti-curriculum", BssConfig(score_source="model"), PACED),
    "bss-l-manifest": ("bss-l", BssConfig(score_source="manifest"), PACED),
    "bss-l-paper": ("bss-l", BssConfig(every_epochs=2), OrderConfig(draw="replacement", weight="softmax")),
    "posterior-again": ("posterior", None, OrderConfig(draw="replacement")),
    "dus-h-single": ("dus-h", DusConfig(paired=False, dead_zone=0.0, kappa=3.0), PACED),
    "dus-rl-single": ("dus-rl", DusConfig(paired=False, lr=0.1), PACED),
    "dus-rl-ppo": ("dus-rl", DusConfig(policy="ppo", horizon=3, lr=0.1), PACED),
}
FIXED_SIZE = [kind for kind, (name, _, _) in KINDS.items() if not name.startswith("dus")]


class FakeTraining:
    """Planted samples in a given row order and an untrained network: a ModelReader and a training loop."""

    def __init__(self, order: Sequence[int] = range(N)) -> None:
        rng = np.random.default_rng(0)
        ids = np.array([f"s{number}" for number in range(N)])
        columns: dict[str, NDArray[Any]] = {
            "key": id_keys(ids),
            "rank": rng.permutation(N),
            "discrepancy": rng.uniform(-1, 1, N),
            "balance": rng.uniform(-1, 1, N),
            "p_balanced": rng.random(N) * (rng.random(N) < 0.9),
            "label": rng.choice(K, N, p=[0.7, 0.2, 0.1]),
        }
        moved = {name: column[list(order)] for name, column in columns.items()}
        for column in moved.values():
            column.flags.writeable = False
        self.pool = Pool(**moved, num_classes=K, num_modalities=2)
        self.label = torch.tensor(moved["label"])
        self.inputs = [torch.tensor(rng.standard_normal((N, 4)), dtype=torch.float32)[list(order)] for _ in range(2)]
        torch.manual_seed(0)
        config = ModelConfig(modalities=("audio", "visual"), shapes=((4,), (4,)), classes=("x", "y", "z"), hidden=8)
        self.net = FusionNet(config).eval()
        self.num_train = N

    @torch.no_grad()
    def read(
        self, function: OutputFunction, *, rows: NDArray[np.int64] | None = None, net: FusionNet | None = None
    ) -> Tensor:
        return function((net or self.net)(self.inputs), self.label).float()

    def read_validation(self, function: OutputFunction, *, net: FusionNet | None = None) -> Tensor:
        raise AssertionError("samplers learn nothing of validation samples")

    def train_copy(self, loss: Loss, *, epochs: int) -> FusionNet:
        raise AssertionError("samplers train nothing")

    @torch.no_grad()
    def train(self, sampler: Sampler, epoch: int, *, after: int = 0, until: int = 10**6) -> list[Step]:
        """Run an epoch as the training loop does, from step `after` to step `until`."""
        if after == 0:
            sampler.begin_epoch(epoch, self)
        steps = []
        for step in sampler.steps(epoch, after=after):
            steps.append(step)
            inputs = select_rows(step.present, [matrix[torch.from_numpy(step.rows)] for matrix in self.inputs])
            batch = to_batch(step, inputs, label=self.label, weight=np.ones(N, np.float32), distributed=SINGLE_PROCESS)
            sampler.observe(self.net(batch.inputs, batch.present), batch)
            if after + len(steps) == until:
                break
        return steps


def build_kind(kind: str, pool: Pool, *, seed: int = 0) -> Sampler:
    name, config, order = KINDS[kind]
    sampler: Sampler = SAMPLERS.load(name)(pool, order, config, batch_size=B, seed=seed, distributed=SINGLE_PROCESS)
    return sampler


def comparable(steps: Sequence[Step]) -> list[tuple[Any, ...]]:
    """Convert steps to lists that can be compared."""
    masks = [(step.present, step.fused) for step in steps]
    plain_masks = [tuple(None if mask is None else mask.tolist() for mask in mask_pair) for mask_pair in masks]
    return [(step.rows.tolist(), *mask_pair) for step, mask_pair in zip(steps, plain_masks, strict=True)]


def round_trip(state: dict[str, Any]) -> dict[str, Any]:
    """Write a state and load it as a checkpoint does."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


def test_contract_covers_every_sampler() -> None:
    assert {name for name, _, _ in KINDS.values()} == set(SAMPLERS)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_valid_rows_and_masks(kind: str) -> None:
    training = FakeTraining()
    sampler = build_kind(kind, training.pool)
    for epoch in range(1, 4):
        steps = training.train(sampler, epoch)
        assert steps
        for step in steps:
            assert step.rows.dtype == np.int64
            assert len(step.rows) > 0
            assert step.rows.min() >= 0
            assert step.rows.max() < N
            if step.present is not None:
                assert step.present.shape == (len(step.rows), 2)
                assert step.present.dtype == np.bool_
                assert step.present.any(axis=1).all()
            if step.fused is not None:
                assert step.fused.shape == (len(step.rows),)
                assert step.fused.dtype == np.bool_


@pytest.mark.parametrize("kind", FIXED_SIZE)
def test_all_steps_but_the_last_have_the_batch_size(kind: str) -> None:
    training = FakeTraining()
    sampler = build_kind(kind, training.pool)
    for epoch in range(1, 4):
        *full, last = [len(step.rows) for step in training.train(sampler, epoch)]
        assert set(full) <= {B}
        assert 1 <= last <= B


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_gives_same_steps(kind: str) -> None:
    training = FakeTraining()
    first, second = build_kind(kind, training.pool), build_kind(kind, training.pool)
    for epoch in range(1, 4):
        assert comparable(training.train(first, epoch)) == comparable(training.train(second, epoch))
    assert first.epoch_metrics() == second.epoch_metrics()


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_and_epochs_give_different_steps(kind: str) -> None:
    training = FakeTraining()
    drawn = []
    for seed in range(4):
        sampler = build_kind(kind, training.pool, seed=seed)
        drawn += [str(comparable(training.train(sampler, epoch))) for epoch in range(1, 5)]
    assert len(set(drawn)) == 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", [1, 2])
def test_interrupted_epoch_continues_exactly(kind: str, num_steps: int) -> None:
    training = FakeTraining()
    uninterrupted = build_kind(kind, training.pool)
    expected = [comparable(training.train(uninterrupted, epoch)) for epoch in range(1, 6)]
    interrupted = build_kind(kind, training.pool)
    for epoch in (1, 2, 3):
        training.train(interrupted, epoch)
    training.train(interrupted, 4, until=num_steps)
    resumed = build_kind(kind, training.pool)
    resumed.load_state_dict(round_trip(interrupted.state_dict()))
    assert comparable(training.train(resumed, 4, after=num_steps)) == expected[3][num_steps:]
    assert comparable(training.train(resumed, 5)) == expected[4]
    assert resumed.epoch_metrics() == uninterrupted.epoch_metrics()
    assert str(round_trip(resumed.state_dict())) == str(round_trip(uninterrupted.state_dict()))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_do_not_depend_on_the_row_order(kind: str) -> None:
    order = np.random.default_rng(1).permutation(N)
    training, moved = FakeTraining(), FakeTraining(order.tolist())
    sampler, moved_sampler = build_kind(kind, training.pool), build_kind(kind, moved.pool)
    for epoch in range(1, 4):
        steps, moved_steps = training.train(sampler, epoch), moved.train(moved_sampler, epoch)
        mapped = [Step(rows=order[step.rows], present=step.present, fused=step.fused) for step in moved_steps]
        assert comparable(mapped) == comparable(steps)


@pytest.mark.parametrize("kind", KINDS)
def test_epoch_metrics_are_finite_json(kind: str) -> None:
    training = FakeTraining()
    sampler = build_kind(kind, training.pool)
    for epoch in range(1, 4):
        training.train(sampler, epoch)
        metrics = json.loads(json.dumps(sampler.epoch_metrics()))
        assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("kind", KINDS)
def test_only_adaptive_samplers_depend_on_observed_steps(kind: str) -> None:
    """Steps of the other samplers are the same whether or not earlier steps were observed."""
    training = FakeTraining()
    observing, not_observing = build_kind(kind, training.pool), build_kind(kind, training.pool)
    for epoch in (1, 2, 3):
        not_observing.begin_epoch(epoch, training)
        same = comparable(training.train(observing, epoch)) == comparable(list(not_observing.steps(epoch)))
    assert same is not observing.adaptive


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
