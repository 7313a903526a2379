"""Laws of learning rates by modality: where they begin and end, who is given more, and what the optimiser sees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from training import draw_batch

from mmaudit.train.balancing.balancer import Validation
from mmaudit.train.balancing.config import BalancingConfig, MslrConfig
from mmaudit.train.balancing.mslr import Mslr, dynamic_factors, smooth_factor
from mmaudit.train.batches import Loss, OutputFunction, RowIndex
from mmaudit.train.config import OptimConfig
from mmaudit.train.distributed import SINGLE_PROCESS
from mmaudit.train.network import FusionNet, ModelConfig, Outputs, cross_entropies
from mmaudit.train.optimizer import Optimization

torch.set_num_threads(1)

LEFT = st.lists(st.floats(0.01, 1), min_size=2, max_size=5)


class Start:
    """A laboratory that knows what each modality says of four samples at the start."""

    num_train = 4

    def __init__(self, net: FusionNet) -> None:
        self.net = net

    def read(self, what: OutputFunction, *, rows: RowIndex | None = None, net: FusionNet | None = None) -> Tensor:
        raise AssertionError("training samples decide about no rate")

    def read_validation(self, what: OutputFunction, *, net: FusionNet | None = None) -> Tensor:
        even, odd = torch.zeros(4, 3), torch.tensor([math.log(2), 0, 0]).repeat(4, 1)
        return what(Outputs(even, torch.stack([even, odd]), ()), torch.tensor([0, 1, 2, 0]))

    def train_copy(self, loss: Loss, *, epochs: int) -> FusionNet:
        raise AssertionError("nothing is tried out")


FIRST = (math.log(3), 1.5 * math.log(2))  # the own losses at the start, there


def make(mode: str, *, factors: tuple[str, ...] = (), most: float = 10.0, epochs: int = 5) -> Mslr:
    torch.manual_seed(0)
    net = FusionNet(
        ModelConfig(modalities=("audio", "visual"), shapes=((5,), (4,)), classes=("a", "b", "c"), hidden=6, dropout=0.0)
    )
    optim = OptimConfig(precision="float32", lr=0.1, schedule="constant", modality_lr=factors)
    config = BalancingConfig(mslr=MslrConfig(mode=mode, max_factor=most))
    return Mslr(net, Optimization(net, optim, device="cpu", distributed=SINGLE_PROCESS), config, epochs=epochs)


def rates(balancer: Mslr, epoch: int) -> list[float]:
    """Begin an epoch as the loop does; give the optimiser's rates over the common one: modalities', and the rest's."""
    balancer.begin_epoch(epoch, Start(balancer.net))
    balancer.optimization.begin_epoch(epoch, epochs=balancer.epochs)
    return [group["lr"] / 0.1 for group in balancer.optimization.optimizer.param_groups]


def end(balancer: Mslr, epoch: int, *left: float) -> None:
    """End an epoch with these shares left of the own losses at the start."""
    own = tuple(share * first for share, first in zip(left, FIRST, strict=True))
    balancer.end_epoch(epoch, Validation(loss=1.0, accuracy=0.5, unimodal_loss=own, unimodal_accuracy=(0.5, 0.5)))


def test_keep_keeps_what_was_given() -> None:
    balancer = make("keep", factors=("audio=0.25",))
    for epoch in range(1, 6):
        assert rates(balancer, epoch) == pytest.approx([0.25, 1, 1])
        end(balancer, epoch, 0.1, 1.0)


def test_smooth_goes_from_what_was_given_to_the_common_rate_in_even_ratios() -> None:
    balancer = make("smooth", factors=("audio=0.0625", "visual=16"))
    found = [rates(balancer, epoch) for epoch in range(1, 6)]
    assert [audio for audio, *_ in found] == pytest.approx([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])
    assert [visual for _, visual, _ in found] == pytest.approx([16, 8, 4, 2, 1])
    assert [rest for *_, rest in found] == pytest.approx([1] * 5)


@given(st.floats(0.001, 100), st.integers(1, 50))
def test_smooth_begins_at_the_factor(given_factor: float, epochs: int) -> None:
    assert given_factor * smooth_factor(given_factor, epoch=1, epochs=epochs) == pytest.approx(given_factor)
    if epochs > 1:
        assert given_factor * smooth_factor(given_factor, epoch=epochs, epochs=epochs) == pytest.approx(1)


def test_a_factor_of_0_stays_0() -> None:
    assert [rates(make("smooth", factors=("audio=0",)), epoch)[0] for epoch in (1, 3, 5)] == [0, 0, 0]


def test_dynamic_by_hand() -> None:
    found = dynamic_factors([0.9, 0.1], strength=1.0, min_factor=0.01, max_factor=100)  # over their geometric mean, 0.3
    assert found == pytest.approx([3, 1 / 3])
    assert dynamic_factors([0.9, 0.1], strength=0.5, min_factor=0.01, max_factor=100) == pytest.approx(
        [3**0.5, 3**-0.5]
    )
    assert dynamic_factors([0.9, 0.1], strength=0.0, min_factor=0.01, max_factor=100) == pytest.approx([1, 1])
    assert dynamic_factors([0.9, 0.1], strength=1.0, min_factor=0.5, max_factor=2) == pytest.approx([2, 0.5])


@given(LEFT, st.floats(0, 3))
def test_who_lags_is_given_more_within_bounds(left: list[float], strength: float) -> None:
    found = np.array(dynamic_factors(left, strength=strength, min_factor=0.1, max_factor=10))
    assert (found >= 0.1 - 1e-9).all()
    assert (found <= 10 + 1e-9).all()
    assert (np.diff(found[np.argsort(left)]) >= -1e-9).all()
    unbounded = np.array(dynamic_factors(left, strength=strength, min_factor=1e-9, max_factor=1e9))
    assert np.log(unbounded).mean() == pytest.approx(0, abs=1e-9)
    assert dynamic_factors(left[::-1], strength=strength, min_factor=0.1, max_factor=10) == pytest.approx(found[::-1])


def test_dynamic_follows_what_each_has_left_of_its_own_loss() -> None:
    balancer = make("dynamic", factors=("audio=0.5",))
    assert rates(balancer, 1) == pytest.approx([0.5, 1, 1])
    end(balancer, 1, 0.9, 0.1)
    assert rates(balancer, 2) == pytest.approx([0.5 * 3, 1 / 3, 1], rel=1e-5)
    assert balancer.epoch_metrics() == pytest.approx({"rate_audio": 1.5, "rate_visual": 1 / 3}, rel=1e-5)


@pytest.mark.parametrize("risen", [5.0, float("nan"), float("inf")])
def test_a_modality_that_overfits_is_not_driven_on(risen: float) -> None:
    balancer = make("dynamic")
    rates(balancer, 1)
    end(balancer, 1, 0.5, 0.5)
    end(balancer, 2, risen, 0.5)
    assert rates(balancer, 3) == pytest.approx([1, 1, 1])


def test_a_loss_of_0_stays_within_bounds() -> None:
    balancer = make("dynamic", max_factor=4.0)
    rates(balancer, 1)
    end(balancer, 1, 1.0, 0.0)
    assert rates(balancer, 2) == pytest.approx([4, 0.1, 1])


def test_learns_by_the_sum_of_all_losses() -> None:
    balancer = make("dynamic")
    batch = draw_batch([0, 1, 2], present=[[True, True], [False, True], [True, False]])
    fused, own = cross_entropies(balancer.net(batch.inputs, batch.present), batch.label)
    expected = fused.mean() + own[0, [0, 2]].mean() + own[1, [0, 1]].mean()
    _, loss = balancer.step(batch)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_state_is_gone_on_from() -> None:
    one, other = make("dynamic"), make("dynamic")
    rates(one, 1)
    end(one, 1, 0.9, 0.3)
    other.load_state_dict(one.state_dict())
    assert rates(other, 2) == rates(one, 2) != [1, 1, 1]
