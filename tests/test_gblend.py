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

from mmaudit.audit.errors import ConfigError
from mmaudit.rebalance.curriculum import RowIndex
from mmaudit.train.balancing.gblend import MIN_OVERFIT, MIN_WEIGHT, NUM_TRAIN_ROWS, Gblend, GblendConfig, blend_weights
from mmaudit.train.batches import Batch, Loss, OutputFunction
from mmaudit.train.config import FinetuneConfig, OptimConfig, TrainConfig
from mmaudit.train.methods import list_unused, resolve
from mmaudit.train.network import FusionNet, ModelConfig, Outputs
from mmaudit.train.optimizer import SINGLE_PROCESS, Optimization

torch.set_num_threads(1)

NUMBERS = st.lists(st.floats(-3, 3), min_size=3, max_size=3)


def build_gblend(super_epoch: int = 2, *, weights: tuple[str, ...] = (), own_heads: bool = False) -> Gblend:
    torch.manual_seed(0)
    plan = ModelConfig(
        modalities=("audio", "visual"),
        shapes=((5,), (4,)),
        classes=("a", "b", "c"),
        own_heads=own_heads,
        hidden=6,
        dropout=0.0,
    )
    net = FusionNet(plan)
    optimization = Optimization(net, OptimConfig(precision="float32"), device="cpu", distributed=SINGLE_PROCESS)
    config = GblendConfig(super_epoch=super_epoch, trial_epochs=3, weights=weights)
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


def test_weights_worked_out_by_hand() -> None:
    """Losses before and after, as (train, validation): G is the fall on validation, O the growth of the difference.

    fused (1.0, 1.0) to (0.2, 0.6): G 0.4, O 0.4 - 0.0; audio (1.1, 1.2) to (0.9, 1.1): G 0.1, O 0.2 - 0.1; visual
    (1.2, 1.3) to (0.7, 1.2): G 0.1, O 0.5 - 0.1. G / O^2 is 2.5, 10 and 0.625, which sum to 13.125.
    """
    balancer = build_gblend()
    balancer.begin_epoch(1, TableReader(TRAIN, VALIDATION))
    assert balancer.weights.tolist() == pytest.approx([2.5 / 13.125, 10 / 13.125, 0.625 / 13.125], rel=1e-5)


def test_fixed_weights_are_used_and_nothing_is_measured() -> None:
    balancer, model_reader = build_gblend(weights=("visual=3", "fused=0.5", "audio=0")), TableReader(TRAIN, VALIDATION)
    for epoch in range(1, 5):
        balancer.begin_epoch(epoch, model_reader)
    assert not model_reader.copies
    assert balancer.weights.tolist() == [0.5, 0.0, 3.0]
    batch = make_batch()
    outputs = balancer.net(batch.inputs)
    expected = 0.5 * weighted_loss(outputs.fused, batch) + 3 * weighted_loss(outputs.unimodal[1], batch)
    assert float(balancer.loss(outputs, batch).detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (("fused=1", "audio=1"), "has weights of fused, audio; it needs one of each of fused, audio, visual"),
        (("fused=1", "audio=1", "visual=1", "text=1"), "it needs one of each of fused, audio, visual"),
        (("fused=0", "audio=0", "visual=0"), "not all of them 0"),
    ],
)
def test_fixed_weights_of_other_names_raise(weights: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_gblend(weights=weights)


@pytest.mark.parametrize("entry", ["fused", "fused=-1", "fused=x"])
def test_weight_of_another_form_raises(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"gblend.weights .* not of the form NAME=FACTOR, such as fused=0.5"):
        GblendConfig(weights=(entry,))


def test_heads_of_its_own_by_default_and_their_losses_train_the_encoders() -> None:
    for own_heads in (True, False):
        settings = {"gblend": {"own_heads": own_heads}}
        methods = resolve(TrainConfig(finetune=FinetuneConfig(balancing="gblend"), balancing=settings))
        assert methods.has_own_heads is own_heads
    assert resolve(TrainConfig(finetune=FinetuneConfig(balancing="gblend"))).has_own_heads
    balancer, batch = build_gblend(weights=("fused=0", "audio=1", "visual=0"), own_heads=True), make_batch()
    before = copy.deepcopy(balancer.net.state_dict())
    balancer.step(batch)
    moved = {name for name, tensor in balancer.net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"encoders.0.layers.0.weight", "heads.0.weight"} <= moved


def test_constants_of_measurements_are_named_where_nothing_is_measured() -> None:
    fixed = {"weights": ["fused=1", "audio=1"], "super_epoch": 3}
    for constants, num_warnings in ((fixed, 1), ({"super_epoch": 3}, 0)):
        config = TrainConfig(finetune=FinetuneConfig(balancing="gblend"), balancing={"gblend": constants})
        warnings = list_unused(resolve(config))
        assert len(warnings) == num_warnings
        for warning in warnings:
            assert warning.startswith("balancing.gblend.super_epoch = 3 has no effect: with fixed weights")
