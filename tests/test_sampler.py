"""Contract of every sampler: its draws follow from pool, seed, epoch and state only."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from training import select_rows

from mmaudit.rebalance.curriculum import OrderConfig, id_keys
from mmaudit.train.batches import Loss, OutputFunction, Step, to_batch
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import SINGLE_PROCESS
from mmaudit.train.sampling import SAMPLERS
from mmaudit.train.sampling.bss_l import BssConfig
from mmaudit.train.sampling.dus import DusConfig
from mmaudit.train.sampling.sampler import Pool, Sampler
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
