"""Tests of learning rates by modality: start and end of each mode, bounds, and the optimiser's rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from training import draw_batch

from mmaudit.rebalance.curriculum import RowIndex
from mmaudit.train.balancing.balancer import Validation
from mmaudit.train.balancing.mslr import Mslr, MslrConfig, accuracy_factor, dynamic_factors, smooth_factor
from mmaudit.train.batches import Loss, OutputFunction
from mmaudit.train.config import FinetuneConfig, OptimConfig, TrainConfig
from mmaudit.train.methods import list_unused, resolve
from mmaudit.train.network import FusionNet, ModelConfig, Outputs, separate_losses
from mmaudit.train.optimizer import SINGLE_PROCESS, Optimization

torch.set_num_threads(1)

REMAINING = st.lists(st.floats(0.01, 1), min_size=2, max_size=5)


class InitialLosses:
    """Model reader with fixed outputs for four samples before training."""

    num_train = 4

    def __init__(self, net: FusionNet) -> None:
        self.net = net

    def read(self, function: OutputFunction, *, rows: RowIndex | None = None, net: FusionNet | None = None) -> Tensor:
        raise AssertionError("training samples decide about no rate")

    def read_validation(self, function: OutputFunction, *, net: FusionNet | None = None) -> Tensor:
        uniform, informed = torch.zeros(4, 3), torch.tensor([math.log(2), 0, 0]).repeat(4, 1)
        return function(Outputs(uniform, torch.stack([uniform, informed]), ()), torch.tensor([0, 1, 2, 0]))

    def train_copy(self, loss: Loss, *, epochs: int) -> FusionNet:
        raise AssertionError("nothing is tried out")


INITIAL_LOSSES = (math.log(3), 1.5 * math.log(2))  # unimodal losses of InitialLosses


def build_mslr(
    mode: str, *, factors: tuple[str, ...] = (), max_factor: float = 10.0, epochs: int = 5, unimodal_weight: float = 1.0
) -> Mslr:
    torch.manual_seed(0)
    net = FusionNet(
        ModelConfig(modalities=("audio", "visual"), shapes=((5,), (4,)), classes=("a", "b", "c"), hidden=6, dropout=0.0)
    )
    optim = OptimConfig(precision="float32", lr=0.1, schedule="constant", modality_lr=factors)
    config = MslrConfig(mode=mode, max_factor=max_factor, unimodal_weight=unimodal_weight)
    return Mslr(net, Optimization(net, optim, device="cpu", distributed=SINGLE_PROCESS), config, epochs=epochs)


def rates_of_epoch(balancer: Mslr, epoch: int) -> list[float]:
    """Begin an epoch as the loop does; return the rates of modalities and of the rest over the common rate."""
    balancer.begin_epoch(epoch, InitialLosses(balancer.net))
    balancer.optimization.begin_epoch(epoch, epochs=balancer.epochs)
    return [group["lr"] / 0.1 for group in balancer.optimization.optimizer.param_groups]


def end_epoch(balancer: Mslr, epoch: int, *remaining: float) -> None:
    """End an epoch with unimodal losses that are these shares of the initial ones."""
    unimodal_loss = tuple(share * initial for share, initial in zip(remaining, INITIAL_LOSSES, strict=True))
    balancer.end_epoch(epoch, Validation(loss=1.0, metric=0.5, unimodal_loss=unimodal_loss, unimodal_metric=(0.5, 0.5)))


def test_keep_uses_the_configured_factors() -> None:
    balancer = build_mslr("keep", factors=("audio=0.25",))
    for epoch in range(1, 6):
        assert rates_of_epoch(balancer, epoch) == pytest.approx([0.25, 1, 1])
        end_epoch(balancer, epoch, 0.1, 1.0)


def test_smooth_moves_to_the_common_rate_in_even_ratios() -> None:
    balancer = build_mslr("smooth", factors=("audio=0.0625", "visual=16"))
    rates = [rates_of_epoch(balancer, epoch) for epoch in range(1, 6)]
    assert [audio for audio, *_ in rates] == pytest.approx([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])
    assert [visual for _, visual, _ in rates] == pytest.approx([16, 8, 4, 2, 1])
    assert [rest for *_, rest in rates] == pytest.approx([1] * 5)


@given(st.floats(0.001, 100), st.integers(1, 50))
def test_smooth_starts_at_the_factor_and_ends_at_1(factor: float, epochs: int) -> None:
    assert factor * smooth_factor(factor, epoch=1, epochs=epochs) == pytest.approx(factor)
    if epochs > 1:
        assert factor * smooth_factor(factor, epoch=epochs, epochs=epochs) == pytest.approx(1)


def test_factor_of_0_stays_0() -> None:
    assert [rates_of_epoch(build_mslr("smooth", factors=("audio=0",)), epoch)[0] for epoch in (1, 3, 5)] == [0, 0, 0]


def test_dynamic_factors_by_hand() -> None:
    factors = dynamic_factors([0.9, 0.1], strength=1.0, min_factor=0.01, max_factor=100)  # geometric mean 0.3
    assert factors == pytest.approx([3, 1 / 3])
    assert dynamic_factors([0.9, 0.1], strength=0.5, min_factor=0.01, max_factor=100) == pytest.approx(
        [3**0.5, 3**-0.5]
    )
    assert dynamic_factors([0.9, 0.1], strength=0.0, min_factor=0.01, max_factor=100) == pytest.approx([1, 1])
    assert dynamic_factors([0.9, 0.1], strength=1.0, min_factor=0.5, max_factor=2) == pytest.approx([2, 0.5])


@given(REMAINING, st.floats(0, 3))
def test_larger_remaining_loss_gets_a_larger_factor_within_bounds(remaining: list[float], strength: float) -> None:
    factors = np.array(dynamic_factors(remaining, strength=strength, min_factor=0.1, max_factor=10))
    assert (factors >= 0.1 - 1e-9).all()
    assert (factors <= 10 + 1e-9).all()
    assert (np.diff(factors[np.argsort(remaining)]) >= -1e-9).all()
    unbounded = np.array(dynamic_factors(remaining, strength=strength, min_factor=1e-9, max_factor=1e9))
    assert np.log(unbounded).mean() == pytest.approx(0, abs=1e-9)
    assert dynamic_factors(remaining[::-1], strength=strength, min_factor=0.1, max_factor=10) == pytest.approx(
        factors[::-1]
    )


def test_dynamic_follows_the_remaining_unimodal_losses() -> None:
    balancer = build_mslr("dynamic", factors=("audio=0.5",))
    assert rates_of_epoch(balancer, 1) == pytest.approx([0.5, 1, 1])
    end_epoch(balancer, 1, 0.9, 0.1)
    assert rates_of_epoch(balancer, 2) == pytest.approx([0.5 * 3, 1 / 3, 1], rel=1e-5)
    assert balancer.epoch_metrics() == pytest.approx({"rate_audio": 1.5, "rate_visual": 1 / 3}, rel=1e-5)


@pytest.mark.parametrize("risen", [5.0, float("nan"), float("inf")])
def test_overfitting_does_not_raise_the_rate(risen: float) -> None:
    balancer = build_mslr("dynamic")
    rates_of_epoch(balancer, 1)
    end_epoch(balancer, 1, 0.5, 0.5)
    end_epoch(balancer, 2, risen, 0.5)
    assert rates_of_epoch(balancer, 3) == pytest.approx([1, 1, 1])


def test_loss_of_0_stays_within_bounds() -> None:
    balancer = build_mslr("dynamic", max_factor=4.0)
    rates_of_epoch(balancer, 1)
    end_epoch(balancer, 1, 1.0, 0.0)
    assert rates_of_epoch(balancer, 2) == pytest.approx([4, 0.1, 1])


def test_loss_is_the_sum_of_all_losses() -> None:
    balancer = build_mslr("dynamic")
    batch = draw_batch([0, 1, 2], present=[[True, True], [False, True], [True, False]])
    fused, unimodal = separate_losses(balancer.net(batch.inputs, batch.present), batch.label)
    expected = fused.mean() + unimodal[0, [0, 2]].mean() + unimodal[1, [0, 1]].mean()
    _, loss = balancer.step(batch)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_state_round_trip() -> None:
    original, resumed = build_mslr("dynamic"), build_mslr("dynamic")
    rates_of_epoch(original, 1)
    end_epoch(original, 1, 0.9, 0.3)
    resumed.load_state_dict(original.state_dict())
    assert rates_of_epoch(resumed, 2) == rates_of_epoch(original, 2) != [1, 1, 1]


ACCURACIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.48)
# The sixth accuracy over the mean 0.4 of the five before, and the seventh over 0.48, the mean of 0.3 to 0.6.
RATIOS = [1.0] * 6 + [0.6 / 0.4, 0.48 / 0.48]


def test_accuracy_mode_by_hand() -> None:
    """0.9 and 1.1 times the last accuracy over the mean of the five before, from the seventh epoch on."""
    balancer, rates = build_mslr("accuracy", factors=("audio=0.9", "visual=1.1"), epochs=9), []
    for epoch in range(1, 9):
        rates.append(rates_of_epoch(balancer, epoch))
        if epoch <= len(ACCURACIES):
            accuracy = (ACCURACIES[epoch - 1], 0.25)
            balancer.end_epoch(
                epoch, Validation(loss=1.0, metric=0.5, unimodal_loss=(1.0, 1.0), unimodal_metric=accuracy)
            )
    assert [audio for audio, *_ in rates] == pytest.approx([0.9 * ratio for ratio in RATIOS])
    assert [visual for _, visual, _ in rates] == pytest.approx([1.1] * 8)  # its accuracy does not change
    assert [rest for *_, rest in rates] == pytest.approx([1] * 8)


def test_accuracy_of_0_has_factor_1() -> None:
    assert accuracy_factor([0.0] * 5 + [0.3]) == 1
    assert accuracy_factor([0.5] * 5 + [0.0]) == 0


def test_accuracy_mode_resumes() -> None:
    original, resumed = build_mslr("accuracy"), build_mslr("accuracy")
    for epoch, accuracy in enumerate(ACCURACIES[:6], start=1):
        original.begin_epoch(epoch, InitialLosses(original.net))
        original.end_epoch(
            epoch, Validation(loss=1.0, metric=0.5, unimodal_loss=(1.0, 1.0), unimodal_metric=(accuracy, 0.5))
        )
    resumed.load_state_dict(original.state_dict())
    assert rates_of_epoch(resumed, 7) == pytest.approx([1.5, 1, 1])


def test_without_unimodal_terms_the_loss_is_the_fused_one() -> None:
    balancer, batch = build_mslr("accuracy", unimodal_weight=0.0), draw_batch([0, 1, 2])
    outputs = balancer.net(batch.inputs)
    expected = separate_losses(outputs, batch.label)[0].mean()
    assert float(balancer.loss(outputs, batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_constants_of_the_dynamic_mode_are_named_in_others() -> None:
    for mode, num_warnings in (("accuracy", 1), ("dynamic", 0)):
        config = TrainConfig(
            finetune=FinetuneConfig(balancing="mslr"), balancing={"mslr": {"mode": mode, "strength": 2.0}}
        )
        warnings = list_unused(resolve(config))
        assert len(warnings) == num_warnings
        assert all(text.startswith("balancing.mslr.strength = 2.0 has no effect") for text in warnings)
