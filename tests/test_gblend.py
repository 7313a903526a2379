"""Tests of G-Blending: the paper's weights, their edge cases, and when they are measured."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from training import draw_batch

from mmaudit.rebalance.curriculum import RowIndex
from mmaudit.train.balancing.gblend import MIN_OVERFIT, MIN_WEIGHT, NUM_TRAIN_ROWS, Gblend, GblendConfig, blend_weights
from mmaudit.train.batches import Batch, Loss, OutputFunction
from mmaudit.train.config import OptimConfig
from mmaudit.train.network import FusionNet, ModelConfig, Outputs
from mmaudit.train.optimizer import SINGLE_PROCESS, Optimization

torch.set_num_threads(1)

NUMBERS = st.lists(st.floats(-3, 3), min_size=3, max_size=3)


def build_gblend(super_epoch: int = 2) -> Gblend:
    torch.manual_seed(0)
    net = FusionNet(
        ModelConfig(modalities=("audio", "visual"), shapes=((5,), (4,)), classes=("a", "b", "c"), hidden=6, dropout=0.0)
    )
    optimization = Optimization(net, OptimConfig(precision="float32"), device="cpu", distributed=SINGLE_PROCESS)
    config = GblendConfig(super_epoch=super_epoch, trial_epochs=3)
    return Gblend(net, optimization, config, epochs=8)


def make_batch(present: list[list[bool]] | None = None) -> Batch:
    return draw_batch([0, 1, 2, 1], weight=[1, 2, 3, 2], present=present)


class TableReader:
    """Model reader whose copy k has tabulated losses: train and validation (k, 1 + m)."""

    def __init__(self, train: list[list[float]], validation: list[list[float]], *, num_train: int = 10) -> None:
        self.train, self.validation, self.num_train = train, validation, num_train
        self.net = build_gblend().net
        self.rows: list[RowIndex] = []
        self.losses: list[float] = []
        self.epochs: list[int] = []
        self.copies: list[FusionNet] = []

    def _row(self, table: list[list[float]], net: FusionNet | None) -> Tensor:
        index = 0 if net is None else 1 + next(k for k, copied_net in enumerate(self.copies) if copied_net is net)
        return torch.tensor(table[index])[:, None] + torch.tensor([-0.5, 0.5])  # two samples with this mean

    def read(self, function: OutputFunction, *, rows: RowIndex | None = None, net: FusionNet | None = None) -> Tensor:
        assert rows is not None
        self.rows.append(rows)
        return self._row(self.train, net)

    def read_validation(self, function: OutputFunction, *, net: FusionNet | None = None) -> Tensor:
        return self._row(self.validation, net)

    def train_copy(self, loss: Loss, *, epochs: int) -> FusionNet:
        balancer, batch = build_gblend(), make_batch()
        self.losses.append(float(loss(balancer.net(batch.inputs), batch).detach()))
        self.epochs.append(epochs)
        self.copies.append(copy.deepcopy(balancer.net))
        return self.copies[-1]


# The gain of each of the three copies in its own loss is on the diagonal; other values must not matter.
TRAIN = [[1.0, 1.1, 1.2], [0.2, 9, 9], [9, 0.9, 9], [9, 9, 0.7]]
VALIDATION = [[1.0, 1.2, 1.3], [0.6, 9, 9], [9, 1.1, 9], [9, 9, 1.2]]
GAIN = [0.4, 0.1, 0.1]
OVERFIT = [0.4 - 0.0, 0.2 - 0.1, 0.5 - 0.1]


def test_weights_by_the_published_formula() -> None:
    weights = blend_weights([1.0, 0.5, 0.2], [0.5, 0.25, 0.4])
    assert weights == pytest.approx(np.array([4, 8, 1.25]) / 13.25)


def test_loss_without_gain_gets_the_smallest_weight() -> None:
    for gain in (-0.3, 0.0, float("nan"), float("-inf")):
        weights = blend_weights([1.0, gain, 1.0], [0.5, 0.5, 0.5])
        assert weights == pytest.approx(np.array([0.5, MIN_WEIGHT, 0.5]) / (1 + MIN_WEIGHT))


def test_where_nothing_generalises_all_weigh_the_same() -> None:
    assert blend_weights([-1.0, 0.0, float("nan")], [0.1, 0.2, 0.3]) == pytest.approx([1 / 3] * 3)


def test_no_overfitting_counts_as_a_little() -> None:
    floor = MIN_OVERFIT * 0.5
    expected = blend_weights([0.5, 0.4, 0.4], [floor, floor, 0.2])
    assert blend_weights([0.5, 0.4, 0.4], [0.0, -7.0, 0.2]) == pytest.approx(expected)


@given(NUMBERS, NUMBERS, st.floats(0.1, 10))
def test_weights_sum_to_1_and_ignore_the_unit(gain: list[float], overfit: list[float], unit: float) -> None:
    weights = blend_weights(gain, overfit)
    assert weights.sum() == pytest.approx(1)
    assert weights.min() > MIN_WEIGHT / (1 + 3 * MIN_WEIGHT) - 1e-9
    if not any(0 < value < 1e-7 for value in gain):  # such a gain counts as 0 in some units
        scaled = blend_weights([unit * value for value in gain], [unit * value for value in overfit])
        assert scaled == pytest.approx(weights)


def test_each_loss_is_measured_on_its_own_copy() -> None:
    balancer, model_reader = build_gblend(), TableReader(TRAIN, VALIDATION)
    before = copy.deepcopy(balancer.net.state_dict())
    balancer.begin_epoch(1, model_reader)
    assert list(balancer.epoch_metrics()) == ["weight_fused", "weight_audio", "weight_visual"]
    assert list(balancer.epoch_metrics().values()) == pytest.approx(blend_weights(GAIN, OVERFIT), rel=1e-5)
    batch = make_batch()
    outputs = balancer.net(batch.inputs)
    logits = [outputs.fused, *outputs.unimodal]
    assert model_reader.losses == pytest.approx(
        [weighted_loss(branch_logits, batch) for branch_logits in logits], rel=1e-5
    )
    assert model_reader.epochs == [3, 3, 3]
    assert all(torch.equal(tensor, before[name]) for name, tensor in balancer.net.state_dict().items())


def test_measures_once_per_super_epoch() -> None:
    balancer, model_reader = build_gblend(super_epoch=3), TableReader(TRAIN, VALIDATION)
    measured = []
    for epoch in range(1, 8):
        model_reader.copies.clear()
        balancer.begin_epoch(epoch, model_reader)
        measured.append(bool(model_reader.copies))
    assert measured == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("num_train", [7, 10 * NUM_TRAIN_ROWS])
def test_reads_the_same_bounded_rows_every_time(num_train: int) -> None:
    model_reader = TableReader(TRAIN, VALIDATION, num_train=num_train)
    build_gblend().begin_epoch(1, model_reader)
    assert len(np.unique(model_reader.rows[0])) == len(model_reader.rows[0]) == min(num_train, NUM_TRAIN_ROWS)
    assert model_reader.rows[0].max() < num_train
    assert len(model_reader.rows) == 4
    assert all(np.array_equal(rows, model_reader.rows[0]) for rows in model_reader.rows)


def weighted_loss(logits: Tensor, batch: Batch) -> float:
    losses = functional.cross_entropy(logits, batch.label, reduction="none")
    weight = torch.tensor([1.0, 2.0, 3.0, 2.0])
    return float((losses * weight).sum().detach() / weight.sum())


def test_loss_is_the_weighted_sum() -> None:
    balancer, batch = build_gblend(), make_batch()
    balancer.load_state_dict({"weights": torch.tensor([0.2, 0.7, 0.1])})
    outputs: Outputs = balancer.net(batch.inputs)
    logits = [outputs.fused, *outputs.unimodal]
    expected = sum(
        weight * weighted_loss(branch_logits, batch)
        for weight, branch_logits in zip((0.2, 0.7, 0.1), logits, strict=True)
    )
    assert float(balancer.loss(outputs, batch).detach()) == pytest.approx(expected, rel=1e-5)


def test_absent_modality_does_not_train_its_encoder() -> None:
    batch = make_batch([[True, False]] * 4)
    balancer = build_gblend()
    before = copy.deepcopy(balancer.net.state_dict())
    _, loss = balancer.step(batch)
    assert torch.isfinite(loss)
    moved = {name for name, tensor in balancer.net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("encoders.0") for name in moved)
    assert not any(name.startswith("encoders.1") for name in moved)


def test_state_round_trip() -> None:
    balancer, resumed = build_gblend(), build_gblend()
    balancer.begin_epoch(1, TableReader(TRAIN, VALIDATION))
    state: dict[str, Any] = balancer.state_dict()
    resumed.load_state_dict(state)
    assert resumed.epoch_metrics() == balancer.epoch_metrics()
