"""The contract of every sampler: what it draws follows from pool, seed, epoch and state, and from nothing else."""

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
from training import cut_to

from mmaudit.rebalance.curriculum import OrderConfig, id_key
from mmaudit.train.batches import Loss, OutputFunction, Step, to_batch
from mmaudit.train.distributed import SINGLE_PROCESS
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.sampling.config import SAMPLERS, BssConfig, DusConfig, SamplingConfig, SmvConfig
from mmaudit.train.sampling.sampler import Pool, Sampler, build_sampler

torch.set_num_threads(1)

N, B, K = 60, 8, 3
SOON = SmvConfig(warmup_epochs=1, every_epochs=2)
PAIRS = SamplingConfig(smv=SOON, bss=BssConfig(every_epochs=2), dus=DusConfig(dead_zone=0.0, kappa=3.0))
PACED = OrderConfig(start=0.3, grow_epochs=4)
# Every sampler, and those of its forms that draw otherwise.
KINDS = {
    **{name: (name, PAIRS, PACED) for name in SAMPLERS},
    "bss-l-manifest": ("bss-l", SamplingConfig(bss=BssConfig(score_source="manifest")), PACED),
    "bss-l-paper": ("bss-l", PAIRS, OrderConfig(draw="replacement", weight="softmax")),
    "posterior-again": ("posterior", PAIRS, OrderConfig(draw="replacement")),
    "dus-h-single": ("dus-h", SamplingConfig(dus=DusConfig(paired=False, dead_zone=0.0, kappa=3.0)), PACED),
    "dus-rl-single": ("dus-rl", SamplingConfig(dus=DusConfig(paired=False, lr=0.1)), PACED),
    "dus-rl-ppo": ("dus-rl", SamplingConfig(dus=DusConfig(policy="ppo", horizon=3, lr=0.1)), PACED),
}
FIXED_SIZE = [kind for kind, (name, _, _) in KINDS.items() if not name.startswith("dus")]


class Studio:
    """Planted samples, rows moved to `places`, and a network that has learned nothing: a `Lab`, and its answers."""

    def __init__(self, places: Sequence[int] = range(N)) -> None:
        rng = np.random.default_rng(0)
        ids = np.array([f"s{number}" for number in range(N)])
        columns: dict[str, NDArray[Any]] = {
            "key": id_key(ids),
            "rank": rng.permutation(N),
            "balance": rng.uniform(-1, 1, N),
            "p_balanced": rng.random(N) * (rng.random(N) < 0.9),
            "label": rng.choice(K, N, p=[0.7, 0.2, 0.1]),
        }
        moved = {name: column[list(places)] for name, column in columns.items()}
        for column in moved.values():
            column.flags.writeable = False
        self.pool = Pool(**moved, num_classes=K, num_modalities=2)
        self.label = torch.tensor(moved["label"])
        self.inputs = [torch.tensor(rng.standard_normal((N, 4)), dtype=torch.float32)[list(places)] for _ in range(2)]
        torch.manual_seed(0)
        plan = ModelConfig(modalities=("audio", "visual"), shapes=((4,), (4,)), classes=("x", "y", "z"), hidden=8)
        self.net = FusionNet(plan).eval()
        self.num_train = N

    @torch.no_grad()
    def read(
        self, what: OutputFunction, *, rows: NDArray[np.int64] | None = None, net: FusionNet | None = None
    ) -> Tensor:
        return what((net or self.net)(self.inputs), self.label).float()

    def read_validation(self, what: OutputFunction, *, net: FusionNet | None = None) -> Tensor:
        raise AssertionError("samplers learn nothing of validation samples")

    def train_copy(self, loss: Loss, *, epochs: int) -> FusionNet:
        raise AssertionError("samplers train nothing")

    @torch.no_grad()
    def train(self, sampler: Sampler, epoch: int, *, after: int = 0, until: int = 10**6) -> list[Step]:
        """Go through an epoch as the loop does, from one step to another."""
        if after == 0:
            sampler.begin_epoch(epoch, self)
        steps = []
        for step in sampler.steps(epoch, after=after):
            steps.append(step)
            inputs = cut_to(step.present, [each[torch.from_numpy(step.rows)] for each in self.inputs])
            batch = to_batch(step, inputs, label=self.label, weight=np.ones(N, np.float32), distributed=SINGLE_PROCESS)
            sampler.observe(self.net(batch.inputs, batch.present), batch)
            if after + len(steps) == until:
                break
        return steps


def build(kind: str, pool: Pool, *, seed: int = 0) -> Sampler:
    name, config, order = KINDS[kind]
    return build_sampler(name, pool, config, order, batch_size=B, seed=seed, distributed=SINGLE_PROCESS)


def plain(steps: Sequence[Step]) -> list[tuple[Any, ...]]:
    """Give steps as what can be compared."""
    masks = [(step.present, step.fused) for step in steps]
    told = [tuple(None if mask is None else mask.tolist() for mask in each) for each in masks]
    return [(step.rows.tolist(), *each) for step, each in zip(steps, told, strict=True)]


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Write a state and load it back as a checkpoint does."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


def test_every_sampler_stands_under_the_contract() -> None:
    assert {name for name, _, _ in KINDS.values()} == set(SAMPLERS)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_name_rows_of_the_pool_and_who_hears_them(kind: str) -> None:
    studio = Studio()
    sampler = build(kind, studio.pool)
    for epoch in range(1, 4):
        steps = studio.train(sampler, epoch)
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
def test_all_steps_but_the_last_are_of_the_batch_size(kind: str) -> None:
    studio = Studio()
    sampler = build(kind, studio.pool)
    for epoch in range(1, 4):
        *full, last = [len(step.rows) for step in studio.train(sampler, epoch)]
        assert set(full) <= {B}
        assert 1 <= last <= B


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_repeats(kind: str) -> None:
    studio = Studio()
    first, second = build(kind, studio.pool), build(kind, studio.pool)
    for epoch in range(1, 4):
        assert plain(studio.train(first, epoch)) == plain(studio.train(second, epoch))
    assert first.epoch_metrics() == second.epoch_metrics()


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_and_epochs_have_draws_of_their_own(kind: str) -> None:
    studio = Studio()
    drawn = []
    for seed in range(4):
        sampler = build(kind, studio.pool, seed=seed)
        drawn += [str(plain(studio.train(sampler, epoch))) for epoch in range(1, 5)]
    assert len(set(drawn)) == 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taken", [1, 2])
def test_an_interrupted_epoch_goes_on_exactly(kind: str, taken: int) -> None:
    studio = Studio()
    whole = build(kind, studio.pool)
    expected = [plain(studio.train(whole, epoch)) for epoch in range(1, 6)]
    broken = build(kind, studio.pool)
    for epoch in (1, 2, 3):
        studio.train(broken, epoch)
    studio.train(broken, 4, until=taken)
    resumed = build(kind, studio.pool)
    resumed.load_state_dict(saved(broken.state_dict()))
    assert plain(studio.train(resumed, 4, after=taken)) == expected[3][taken:]
    assert plain(studio.train(resumed, 5)) == expected[4]
    assert resumed.epoch_metrics() == whole.epoch_metrics()
    assert str(saved(resumed.state_dict())) == str(saved(whole.state_dict()))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_does_not_depend_on_how_rows_stand(kind: str) -> None:
    places = np.random.default_rng(1).permutation(N)
    studio, moved = Studio(), Studio(places.tolist())
    sampler, other = build(kind, studio.pool), build(kind, moved.pool)
    for epoch in range(1, 4):
        steps, again = studio.train(sampler, epoch), moved.train(other, epoch)
        turned = [Step(rows=places[step.rows], present=step.present, fused=step.fused) for step in again]
        assert plain(turned) == plain(steps)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_columns_of_history(kind: str) -> None:
    studio = Studio()
    sampler = build(kind, studio.pool)
    for epoch in range(1, 4):
        studio.train(sampler, epoch)
        numbers = json.loads(json.dumps(sampler.epoch_metrics()))
        assert all(math.isfinite(value) for value in numbers.values())


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_listens_to_the_last_step_forbids_reading_ahead(kind: str) -> None:
    """Steps of the others are the same, whether or not the network has answered those before."""
    studio = Studio()
    heard, deaf = build(kind, studio.pool), build(kind, studio.pool)
    for epoch in (1, 2, 3):
        deaf.begin_epoch(epoch, studio)
        same = plain(studio.train(heard, epoch)) == plain(list(deaf.steps(epoch)))
    assert same is not heard.adaptive
