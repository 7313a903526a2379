"""Tests of DUS: running mean, discrepancy and quantities by hand, and which rows each modality uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from training import make_pool

from mmaudit.audit.errors import ConfigError
from mmaudit.audit.metrics import discrepancy
from mmaudit.rebalance.curriculum import OrderConfig, epoch_order
from mmaudit.train.batches import Batch, ModelReader, Step, to_batch
from mmaudit.train.network import FusionNet, ModelConfig, Outputs
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext
from mmaudit.train.sampling.dus import Dus, DusConfig, DusH, cumulative_discrepancy, lagging_quantities
from mmaudit.train.sampling.dus_rl import DusRl

torch.set_num_threads(1)

N, B = 100, 16
CONFIDENCES = st.lists(st.floats(0.01, 1), min_size=2, max_size=4)


def sampler_of(
    sampler_class: type[Dus] = DusH,
    *,
    num_modalities: int = 2,
    distributed: DistributedContext = SINGLE_PROCESS,
    batch_size: int = B,
    **changes: Any,
) -> Dus:
    pool = make_pool(N, num_modalities=num_modalities)
    config = DusConfig(**{"every_steps": 1, **changes})
    return sampler_class(pool, OrderConfig(), config, batch_size=batch_size, seed=0, distributed=distributed)


def reader_of(fusion: str = "concat", *, own_heads: bool = False) -> ModelReader:
    config = ModelConfig(
        modalities=("audio", "visual"),
        shapes=((2,), (2,)),
        classes=("x", "y"),
        fusion=fusion,
        own_heads=own_heads,
        hidden=4,
    )
    return cast(ModelReader, SimpleNamespace(net=FusionNet(config)))


def outputs_and_batch(
    step: Step, confidence: Sequence[float] | NDArray[np.float64], *, distributed: DistributedContext = SINGLE_PROCESS
) -> tuple[Outputs, Batch]:
    """Build outputs with given confidences in class 0 of 2, fused first: (1 + m,) or (1 + m, n)."""
    c = np.asarray(confidence, dtype=np.float64)
    m = len(c) - 1
    c = np.broadcast_to(c.reshape(1 + m, -1), (1 + m, N))
    inputs = tuple(torch.zeros(len(step.shard(distributed).rows), 1) for _ in range(m))
    label = torch.zeros(N, dtype=torch.int64)
    batch = to_batch(step, inputs, label=label, weight=np.ones(N, np.float32), distributed=distributed)
    logits = torch.from_numpy(np.stack([np.log(c), np.log1p(-c)], axis=2))[:, batch.rows]
    return Outputs(logits[0], logits[1:], ()), batch


def observe(sampler: Dus, confidence: Sequence[float]) -> None:
    sampler.observe(*outputs_and_batch(Step(rows=np.arange(B)), confidence))


def shuffled(sampler: Dus, *, epoch: int = 1) -> NDArray[np.int64]:
    pool = sampler.pool
    return epoch_order(rank=pool.rank, key=pool.key, config=OrderConfig(order="shuffled"), seed=0, epoch=epoch)


def rows_of_modality(step: Step, modality: int) -> list[int]:
    rows = step.rows if step.present is None else step.rows[step.present[:, modality]]
    return sorted(rows.tolist())


# --- cumulative confidence and discrepancy


def test_cumulative_confidence_is_the_running_mean_from_the_start() -> None:
    sampler = sampler_of()
    confidences = [(0.5, 0.9, 0.1), (0.5, 0.6, 0.4), (0.8, 0.3, 0.1)]
    for confidence in confidences:
        observe(sampler, confidence)
    assert sampler.confidence == pytest.approx([(0.9 + 0.6 + 0.3) / 3, (0.1 + 0.4 + 0.1) / 3])
    assert sampler.fused == pytest.approx(0.6)
    metrics = sampler.epoch_metrics()
    assert metrics["cumulative_confidence_0"] == pytest.approx(0.6)
    assert metrics["cumulative_discrepancy_0"] == pytest.approx(0.4)
    assert metrics["cumulative_discrepancy_1"] == pytest.approx(-0.4)


def test_steps_count_equally_and_within_a_step_only_used_rows() -> None:
    sampler = sampler_of()
    confidence = np.full((3, N), 0.5)
    confidence[1] = np.linspace(0.1, 0.9, N)
    rows = np.array([0, 99, 50, 20])
    modality_mask = np.array([[True, True], [True, True], [False, True], [True, False]])
    step = Step(rows=rows, present=modality_mask, fused=modality_mask[:, 0] & modality_mask[:, 1])
    sampler.observe(*outputs_and_batch(step, confidence))
    assert sampler.confidence == pytest.approx([confidence[1, [0, 99, 20]].mean(), 0.5])


def test_cumulative_discrepancy_by_hand() -> None:
    assert cumulative_discrepancy([0.7, 0.2]) == pytest.approx([0.5, -0.5])
    assert cumulative_discrepancy([0.9, 0.3, 0.6]) == pytest.approx([0.45, -0.45, 0.0])


@given(CONFIDENCES)
def test_cumulative_discrepancy_equals_the_audit_discrepancy(confidence: list[float]) -> None:
    cumulative = cumulative_discrepancy(confidence)
    audited = discrepancy(np.array([confidence], dtype=np.float32)).ravel()
    assert cumulative[: len(audited)] == pytest.approx(audited.tolist(), abs=1e-6)
    assert sum(cumulative) == pytest.approx(0, abs=1e-9)


def test_step_that_overflowed_is_ignored() -> None:
    sampler = sampler_of()
    observe(sampler, (0.5, 0.8, 0.2))
    before = sampler.state_dict()
    outputs, batch = outputs_and_batch(Step(rows=np.arange(B)), (0.5, 0.5, 0.5))
    sampler.observe(Outputs(outputs.fused, outputs.unimodal * float("nan"), outputs.features), batch)
    assert sampler.state_dict() == before


@dataclass(frozen=True)
class SecondProcess(DistributedContext):
    """The second of two processes; `first_sums` are the tensors of the first."""

    first_sums: tuple[float, ...] = ()

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor += torch.tensor(self.first_sums, dtype=tensor.dtype)


def test_several_processes_observe_the_same_as_one() -> None:
    confidence = np.random.default_rng(0).uniform(0.1, 0.9, (3, N))
    modality_mask = np.random.default_rng(1).random((11, 2)) < 0.6
    step = Step(rows=np.arange(11), present=modality_mask, fused=modality_mask[:, 0] & modality_mask[:, 1])
    single = sampler_of()
    single.observe(*outputs_and_batch(step, confidence))
    outputs, batch = outputs_and_batch(step, confidence, distributed=DistributedContext(rank=0, world_size=2))
    first_sums = (outputs.confidence(batch.label) * batch.loss_weight).sum(dim=1)
    second = sampler_of(distributed=SecondProcess(rank=1, world_size=2, first_sums=tuple(first_sums.tolist())))
    second.observe(*outputs_and_batch(step, confidence, distributed=DistributedContext(rank=1, world_size=2)))
    assert second.confidence == pytest.approx(single.confidence)
    assert second.fused == pytest.approx(single.fused)
    assert second.quantities == single.quantities


# --- quantities


@pytest.mark.parametrize(
    ("confidence", "quantities"),
    [
        ([0.6, 0.4], [51, 77]),  # mean 0.5: 64 (1 - 0.2) = 51.2, 64 (1 + 0.2) = 76.8
        ([0.9, 0.1], [16, 115]),  # 64 (1 - 0.8) = 12.8, not below 16; 64 * 1.8 = 115.2
        ([0.51, 0.495], [64, 64]),  # difference 0.015: in the dead zone
        ([0.515, 0.485], [62, 66]),
        ([0.9, 0.3, 0.3], [16, 90, 90]),  # mean 0.5: 64 * 0.2 = 12.8; 64 * 1.4 = 89.6
        ([0.0, 0.0], [64, 64]),
    ],
)
def test_quantities_by_hand(confidence: list[float], quantities: list[int]) -> None:
    assert lagging_quantities(confidence, batch_size=64, config=DusConfig()) == quantities


def test_quantities_with_other_constants_by_hand() -> None:
    config = DusConfig(kappa=2.0, min_share=0.5, max_share=1.5, dead_zone=0.3)
    assert lagging_quantities([0.6, 0.4], batch_size=10, config=config) == [10, 10]
    assert lagging_quantities([0.75, 0.25], batch_size=10, config=config) == [5, 15]
    assert lagging_quantities([0.7, 0.3], batch_size=1, config=DusConfig(min_share=0.01, max_share=1.0)) == [1, 1]


@given(CONFIDENCES, st.integers(1, 300))
def test_lower_confidence_never_gets_fewer_samples(confidence: list[float], batch_size: int) -> None:
    config = DusConfig()
    quantities = lagging_quantities(confidence, batch_size=batch_size, config=config)
    by_confidence = [quantity for _, quantity in sorted(zip(confidence, quantities, strict=True), reverse=True)]
    assert all(1 <= quantity <= 2 * batch_size for quantity in quantities)
    assert all(quantity >= round(batch_size / 4) for quantity in quantities)
    assert by_confidence == sorted(by_confidence)


# --- rows of each modality


def test_paired_steps_use_the_first_rows_of_one_pass() -> None:
    sampler = sampler_of()
    order = shuffled(sampler)
    steps = sampler.steps(1)
    first = next(steps)
    assert first.rows.tolist() == order[:B].tolist()
    assert first.present is None
    assert first.fused is None
    observe(sampler, (0.5, 0.6, 0.4))  # 16 * 0.8 = 12.8, 16 * 1.2 = 19.2
    second = next(steps)
    remaining = order[B:]
    assert sorted(second.rows.tolist()) == sorted(remaining[:19].tolist())
    assert rows_of_modality(second, 0) == sorted(remaining[:13].tolist())
    assert rows_of_modality(second, 1) == sorted(remaining[:19].tolist())
    assert second.fused is not None
    assert sorted(second.rows[second.fused].tolist()) == sorted(remaining[:13].tolist())
    assert sorted(next(steps).rows.tolist()) == sorted(remaining[19:38].tolist())


@pytest.mark.parametrize("confidence", [(0.5, 0.6, 0.4), (0.5, 0.1, 0.9), (0.5, 0.5, 0.5)])
def test_paired_epoch_uses_every_row_once(confidence: tuple[float, ...]) -> None:
    sampler = sampler_of()
    rows: list[int] = []
    for step in sampler.steps(1):
        rows += step.rows.tolist()
        observe(sampler, confidence)
    assert sorted(rows) == list(range(N))


def test_last_step_uses_the_remaining_rows() -> None:
    sampler = sampler_of(batch_size=48)
    observe(sampler, (0.5, 0.8, 0.4))  # 48 (1 - 1/3) = 32, 48 (1 + 1/3) = 64
    first, last = list(sampler.steps(1))
    assert len(first.rows) == 64
    assert len(last.rows) == 36
    assert len(rows_of_modality(last, 0)) == 32
    assert len(rows_of_modality(last, 1)) == 36
    assert sampler.epoch_metrics()["samples_0"] == 32
    assert sampler.epoch_metrics()["samples_1"] == 50


def test_unpaired_modalities_have_separate_passes() -> None:
    sampler = sampler_of(paired=False)
    observe(sampler, (0.5, 0.6, 0.4))
    steps = list(sampler.steps(1))
    used_rows: list[list[int]] = [[], []]
    for number, step in enumerate(steps):
        assert step.present is not None
        assert step.fused is not None
        assert (step.present.sum(axis=1) == 1).all()
        assert not step.fused.any()
        for modality in range(2):
            used_rows[modality] += step.rows[step.present[:, modality]].tolist()
        if number < len(steps) - 1:
            assert step.present.sum(axis=0).tolist() == [13, 19]
    assert len(used_rows[1]) == N  # the pass of the weaker modality ends first
    assert len(used_rows[0]) == 6 * 13
    assert all(len(set(rows)) == len(rows) for rows in used_rows)
    assert used_rows[0] != used_rows[1][: len(used_rows[0])]


@pytest.mark.parametrize("paired", [True, False])
@given(st.floats(0.1, 0.9), st.floats(0.1, 0.9), st.integers(2, 5))
def test_processes_get_every_modality_evenly(paired: bool, audio: float, visual: float, size: int) -> None:
    sampler = sampler_of(paired=paired, batch_size=30)
    observe(sampler, (0.5, audio, visual))
    step = next(sampler.steps(1))
    modality_mask = np.ones((len(step.rows), 2), bool) if step.present is None else step.present
    counts = [
        modality_mask[DistributedContext(rank=rank, world_size=size).slice(len(modality_mask))].sum(axis=0)
        for rank in range(size)
    ]
    assert (np.ptp(counts, axis=0) <= 3).all()
    assert np.min(counts) >= 1


def test_unpaired_sampling_requires_a_sum_of_unimodal_logits() -> None:
    for model_reader in (reader_of("concat"), reader_of("late"), reader_of("shared")):
        sampler_of(paired=False).begin_epoch(1, model_reader)
    for model_reader, name in (
        (reader_of("gated"), "gated;"),
        (reader_of("mmtm"), "mmtm;"),
        (reader_of("concat", own_heads=True), "concat beside each modality's own head;"),
    ):
        sampler_of().begin_epoch(1, model_reader)
        with pytest.raises(ConfigError, match=f"nothing else trains the classifier of --fusion {name}"):
            sampler_of(paired=False).begin_epoch(1, model_reader)


def test_epoch_metrics_are_named_by_modality() -> None:
    sampler = sampler_of()
    sampler.begin_epoch(1, reader_of())
    assert {name.rpartition("_")[2] for name in sampler.epoch_metrics()} == {"audio", "visual"}


# --- learned quantities


def test_policy_chooses_multiples_of_the_batch_size() -> None:
    sampler = sampler_of(DusRl)
    assert sampler.quantities == [B, B]
    quantities = set()
    for _ in range(60):
        observe(sampler, (0.5, 0.6, 0.4))
        quantities |= set(sampler.quantities)
    assert quantities == {8, 12, 16, 20, 24}


def test_min_and_max_share_bound_the_policy() -> None:
    sampler = sampler_of(DusRl, min_share=0.75, max_share=1.25)
    quantities = set()
    for _ in range(60):
        observe(sampler, (0.5, 0.6, 0.4))
        quantities |= set(sampler.quantities)
    assert quantities == {12, 16, 20}


@pytest.mark.parametrize("eta", [0.0, 2.0])
def test_reward_by_hand(eta: float) -> None:
    """|D| falls from 0.4 to 0.3, while the fused cumulative confidence rises from 0.5 to 0.6."""
    sampler = sampler_of(DusRl, eta=eta)
    observe(sampler, (0.5, 0.8, 0.4))
    assert sampler.epoch_metrics()["policy_reward"] == 0
    observe(sampler, (0.7, 0.6, 0.4))  # s_hat = 0.7, 0.4
    assert sampler.epoch_metrics()["policy_reward"] == pytest.approx(0.1 * (0.1 + eta * 0.1))


def test_reward_uses_the_largest_discrepancy_of_three_modalities() -> None:
    sampler = sampler_of(DusRl, num_modalities=3, eta=0.0)
    observe(sampler, (0.5, 0.9, 0.3, 0.3))  # D = 0.6, -0.3, -0.3
    observe(sampler, (0.5, 0.3, 0.3, 0.3))  # s_hat = 0.6, 0.3, 0.3: D = 0.3, -0.15, -0.15
    assert sampler.epoch_metrics()["policy_reward"] == pytest.approx(0.1 * 0.3)


def test_policy_follows_from_the_seed_in_all_processes() -> None:
    drawn: list[tuple[int, ...]] = []
    for distributed in (SINGLE_PROCESS, SecondProcess(rank=1, world_size=2, first_sums=(0.0, 0.0, 0.0))):
        torch.manual_seed(len(drawn))
        sampler = sampler_of(DusRl, distributed=distributed)
        for _ in range(20):
            observe(sampler, (0.5, 0.6, 0.4))
            drawn.append(tuple(sampler.quantities))
    assert drawn[:20] == drawn[20:]


@pytest.mark.parametrize("every", [1, 3])
def test_policy_acts_once_in_every_steps(every: int) -> None:
    sampler = sampler_of(DusRl, every_steps=every)
    calls: list[list[float]] = []

    def act(state: list[float]) -> list[int]:
        calls.append(state)
        return [0, 4]

    policy = SimpleNamespace(act=act, learn=lambda reward: None, baseline=0.0)
    sampler.policy = cast(Any, policy)  # type: ignore[attr-defined]
    outputs, batch = outputs_and_batch(Step(rows=np.arange(B)), (0.5, 0.5, 0.6))
    for _ in range(7):
        sampler.observe(outputs, batch)
    assert len(calls) == {1: 7, 3: 3}[every]
    assert sampler.num_observed == 7
