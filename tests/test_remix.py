"""Tests of Remix: the choice of modalities by hand, passes of one modality, warm-up and balancing."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor
from training import QUICK, make_pool, with_options

from mmaudit.rebalance.curriculum import OrderConfig, epoch_order
from mmaudit.train.batches import ModelReader, OutputFunction, Step
from mmaudit.train.methods import check_schedule, resolve
from mmaudit.train.network import Outputs
from mmaudit.train.optimizer import SINGLE_PROCESS
from mmaudit.train.sampling.remix import Remix, RemixConfig, choose_modality

torch.set_num_threads(1)

# Probabilities of class 0 of 2 by audio and visual; KL(p || uniform) in bits is 1 - H(p): 0 at .5, .28 at .8, .53 at
# .1, 1 at 1. Whether the prediction is correct does not count.
AUDIO = [0.5, 0.9, 0.2, 0.9, 0.999, 0.8]
VISUAL = [0.9, 0.5, 0.9, 0.2, 0.99, 0.8]
CHOICE = [0, 1, 0, 1, 1, 1]  # equal values: the last


class FixedReader:
    """Model reader of given probabilities of class 0; a modality of NaN is absent, its features are 0."""

    def __init__(self, *probabilities: list[float]) -> None:
        self.probabilities, self.num_reads = torch.tensor(probabilities), 0
        names = ("audio", "visual", "text")[: len(probabilities)]
        self.net = SimpleNamespace(config=SimpleNamespace(modalities=names))

    def read(self, function: OutputFunction) -> Tensor:
        self.num_reads += 1
        p = self.probabilities.nan_to_num(nan=0.5)
        logits = torch.stack([p.log(), (1 - p).log()], dim=2)
        features = tuple((~modality.isnan())[:, None].float() for modality in self.probabilities)
        return function(Outputs(logits[0], logits, features), torch.zeros(p.shape[1], dtype=torch.int64)).float()


def sampler_of(n: int = 6, *, num_modalities: int = 2, batch_size: int = 4, **changes: int) -> Remix:
    pool = make_pool(n, num_modalities=num_modalities)
    config = RemixConfig(**{"warmup_epochs": 0, **changes})
    return Remix(pool, OrderConfig(), config, batch_size=batch_size, seed=0, distributed=SINGLE_PROCESS)


def begin_epoch(sampler: Remix, epoch: int, *probabilities: list[float]) -> FixedReader:
    reader = FixedReader(*(probabilities or (AUDIO, VISUAL)))
    sampler.begin_epoch(epoch, cast(ModelReader, reader))
    return reader


def modality_of(step: Step) -> int:
    """Return the only modality of a step."""
    assert step.present is not None
    assert step.fused is None  # the fused loss trains on it too
    (modality,) = set(step.present.argmax(axis=1).tolist())
    assert (step.present.sum(axis=1) == 1).all()
    return int(modality)


def test_choice_by_hand() -> None:
    sampler = sampler_of()
    begin_epoch(sampler, 1)
    rows = {modality_of(step): step.rows for step in sampler.steps(1)}
    assert {j: set(of_j.tolist()) for j, of_j in rows.items()} == {0: {0, 2}, 1: {1, 3, 4, 5}}
    assert sampler.epoch_metrics() == pytest.approx({"remix_audio": 2 / 6, "remix_visual": 4 / 6})


def test_smallest_value_is_chosen_and_the_last_of_equal_ones() -> None:
    values = np.array([[0.1, 0.5, 0.5, 0.2], [0.2, 0.5, 0.1, 0.3], [0.3, 0.5, 0.1, 0.1]], np.float32)
    assert choose_modality(values).tolist() == [0, 2, 2, 2]
    assert choose_modality(values[:2]).tolist() == [0, 1, 1, 0]


def test_passes_are_shuffled_and_the_last_modality_comes_first() -> None:
    sampler = sampler_of(90, num_modalities=3, batch_size=16)
    sampler._choice = (np.arange(90) % 3).astype(np.int16)
    steps = list(sampler.steps(1))
    assert [(modality_of(step), len(step.rows)) for step in steps] == [
        (j, size) for j in (2, 1, 0) for size in (16, 14)
    ]
    for j in range(3):
        rows = np.concatenate([step.rows for step in steps if modality_of(step) == j])
        assert sorted(rows.tolist()) == list(range(j, 90, 3))
        assert rows.tolist() != sorted(rows.tolist())
    assert [step.rows.tolist() for step in sampler.steps(1, after=3)] == [step.rows.tolist() for step in steps[3:]]
    assert [step.rows.tolist() for step in sampler.steps(2)] != [step.rows.tolist() for step in steps]


def test_absent_modalities_are_not_chosen() -> None:
    sampler, nan = sampler_of(3), float("nan")
    begin_epoch(sampler, 1, [nan, 0.5, nan], [0.99, nan, 0.9])
    assert {modality_of(step): set(step.rows.tolist()) for step in sampler.steps(1)} == {0: {1}, 1: {0, 2}}


def test_modality_without_samples_has_no_pass() -> None:
    sampler = sampler_of(2)
    begin_epoch(sampler, 1, [0.5, 0.5], [0.9, 0.9])
    assert [modality_of(step) for step in sampler.steps(1)] == [0]
    assert sampler.epoch_metrics() == {"remix_audio": 1.0, "remix_visual": 0.0}


def test_warm_up_is_uniform_and_the_choice_is_renewed() -> None:
    sampler, reads = sampler_of(warmup_epochs=2, every_epochs=2), []
    for epoch in range(1, 8):
        reads.append(begin_epoch(sampler, epoch).num_reads)
        if epoch <= 2:
            pool, config = sampler.pool, OrderConfig(order="shuffled")
            order = epoch_order(rank=pool.rank, key=pool.key, config=config, seed=0, epoch=epoch)
            steps = list(sampler.steps(epoch))
            assert np.concatenate([step.rows for step in steps]).tolist() == order.tolist()
            assert all(step.present is None for step in steps)
            assert sampler.epoch_metrics() == {}
    assert reads == [0, 0, 1, 0, 1, 0, 1]


def test_state_has_the_choice() -> None:
    sampler, resumed = sampler_of(), sampler_of()
    resumed.load_state_dict(sampler.state_dict())  # none yet
    begin_epoch(sampler, 1)
    resumed.load_state_dict(sampler.state_dict())
    pairs = zip(sampler.steps(1, after=1), resumed.steps(1, after=1), strict=True)
    assert all(np.array_equal(first.rows, second.rows) for first, second in pairs)
    assert resumed.epoch_metrics() == sampler.epoch_metrics()


def test_auto_balancing_is_sum_and_joint_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mmaudit"):
        assert resolve(with_options(QUICK, sampling="remix")).config.finetune.balancing == "sum"
    assert caplog.messages == [
        "--sampling remix takes --balancing sum: its samples have one modality each, whose own loss they train too"
    ]
    config = with_options(QUICK, sampling="remix", balancing="joint", epochs=10)
    (warning,) = check_schedule(resolve(config))
    assert "remix starts in epoch 11 (sampling.remix.warmup_epochs); until then it is uniform" in warning
