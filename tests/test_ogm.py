"""Laws of OGM-GE: the coefficients by hand, whom they touch and when, and noise of the gradient's own size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from mmaudit.train.balancing.balancer import Balancer, build_balancer
from mmaudit.train.balancing.config import BalancingConfig, OgmConfig
from mmaudit.train.balancing.ogm import mean_of_others, ogm_coefficients
from mmaudit.train.batches import Batch, ModelReader
from mmaudit.train.config import OptimConfig
from mmaudit.train.distributed import SINGLE_PROCESS, DistributedContext
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import Optimization

torch.set_num_threads(1)
DEFAULT = OgmConfig()
NOBODY: ModelReader = None  # type: ignore[assignment]  # nothing is read


class Twin(DistributedContext):
    """Two processes that see the same."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)


def make(
    name: str, *, ogm: OgmConfig = DEFAULT, distributed: DistributedContext = SINGLE_PROCESS, width: int = 8
) -> Balancer:
    """Give a method at the beginning of epoch 1; a step of SGD at rate 1 moves a weight by minus its gradient."""
    torch.manual_seed(0)
    plan = ModelConfig(modalities=("a", "v"), shapes=((40,), (30,)), classes=("x", "y", "z"), hidden=width, dropout=0.0)
    optimization = Optimization(
        FusionNet(plan),
        OptimConfig(optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant"),
        device="cpu",
        distributed=distributed,
    )
    optimization.begin_epoch(1, epochs=1)
    optimization.begin_step(11)
    method = build_balancer(name, optimization.net, optimization, BalancingConfig(ogm=ogm), epochs=9)
    method.begin_epoch(1, NOBODY)
    return method


def batch(number: int = 12, *, share: float = 1.0, copies: int = 1) -> Batch:
    """The first modality tells the class, so that it is ahead after some steps."""
    chance = torch.Generator().manual_seed(1)
    label = torch.arange(number) % 3
    first = torch.randn(number, 40, generator=chance) * 0.1
    first[torch.arange(number), label] += 3.0
    inputs = (first, torch.randn(number, 30, generator=chance))
    total = number * copies
    return Batch(
        rows=torch.arange(total),
        inputs=tuple(rows.repeat(copies, 1) for rows in inputs),
        label=label.repeat(copies),
        present=None,
        loss_weight=torch.full((3, total), share / total),
        size=total,
    )


def moved(method: Balancer, given_: Batch) -> dict[str, Tensor]:
    before = {name: weight.detach().clone() for name, weight in method.net.named_parameters()}
    method.step(given_)
    return {name: before[name] - weight.detach() for name, weight in method.net.named_parameters()}


def test_two_coefficients_by_hand() -> None:
    """S = 6, 4: rho = 1.5 and 2/3; the first is damped by tanh(0.3 * 1.5), the other left."""
    found = ogm_coefficients(torch.tensor([6.0, 4.0]), alpha=0.3)
    assert found.tolist() == pytest.approx([1 - math.tanh(0.45), 1.0])


def test_three_coefficients_by_hand() -> None:
    """S = 6, 4, 1: rho = 6 / 2.5, 4 / 3.5, 1 / 5."""
    found = ogm_coefficients(torch.tensor([6.0, 4.0, 1.0]), alpha=0.5)
    assert found.tolist() == pytest.approx([1 - math.tanh(0.5 * 2.4), 1 - math.tanh(0.5 * 4 / 3.5), 1.0])


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=4), st.floats(0, 2), st.floats(0.1, 10))
def test_coefficients_damp_the_leader_whatever_the_unit(scores: list[float], alpha: float, unit: float) -> None:
    score = torch.tensor(scores, dtype=torch.float64)
    lead = (len(scores) - 1) * score / (score.sum() - score) - 1
    assume(not bool(((lead > 1e-7) & (lead < 1e-5)).any()))  # k leaps there, and a unit rounds
    found = ogm_coefficients(score, alpha=alpha)
    torch.testing.assert_close(ogm_coefficients(unit * score, alpha=alpha), found, atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(ogm_coefficients(score.flip(0), alpha=alpha).flip(0), found)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert float(found[score.argmin()]) == pytest.approx(1.0)


@pytest.mark.parametrize("number", [2, 3, 4, 7])
@pytest.mark.parametrize("score", [0.1, 1.7695536143097428, 42.76955361430974])
def test_equals_are_not_damped(score: float, number: int) -> None:
    """Their mean may be rounded below them."""
    for dtype in (torch.float32, torch.float64):
        assert ogm_coefficients(torch.full((number,), score, dtype=dtype), alpha=1.0).tolist() == [1.0] * number


def test_a_modality_that_nobody_has_is_compared_with_none() -> None:
    assert ogm_coefficients(torch.tensor([5.0, 0.0]), alpha=0.5).tolist() == [1.0, 1.0]
    both = ogm_coefficients(torch.tensor([6.0, 0.0, 4.0]), alpha=0.3)
    assert both.tolist() == pytest.approx([1 - math.tanh(0.45), 1.0, 1.0])


def test_the_mean_of_the_others_leaves_out_what_is_not_known() -> None:
    found = mean_of_others(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, True, False]))
    assert found.tolist() == [2.0, 1.0, 1.5]


def test_encoders_are_damped_and_nothing_else_is_touched() -> None:
    plain, method = make("joint"), make("ogm", ogm=OgmConfig(alpha=0.5))
    for each in (plain, method):
        each.net.fusion.heads[0].weight.data[:] = 0.5 * torch.eye(3, 8)  # type: ignore[index, union-attr]
    outputs = method.net(batch().inputs)
    score = outputs.confidence(batch().label)[1:].sum(dim=1)
    wanted = ogm_coefficients(score, alpha=0.5)
    assert wanted.min() < 1
    whole, damped = moved(plain, batch()), moved(method, batch())
    for name, step in whole.items():
        factor = next((wanted[j] for j in range(2) if name.startswith(f"encoders.{j}.")), torch.ones(()))
        torch.testing.assert_close(damped[name], factor * step, atol=1e-6, rtol=1e-4)
    assert list(method.epoch_metrics().values()) == pytest.approx(wanted.tolist(), rel=1e-5)


@pytest.mark.parametrize("name", ["ogm", "ogm-ge"])
@pytest.mark.parametrize("epoch", [1, 4])
def test_outside_its_epochs_nothing_is_done(name: str, epoch: int) -> None:
    plain, method = make("joint"), make(name, ogm=OgmConfig(alpha=0.5, first_epoch=2, last_epoch=3))
    plain.needs_unimodal_logits = True  # otherwise it adds up in another order
    method.begin_epoch(epoch, NOBODY)
    for one, other in zip(moved(plain, batch()).values(), moved(method, batch()).values(), strict=True):
        assert torch.equal(one, other)


def test_noise_has_the_deviation_of_the_gradient_before_it_was_damped() -> None:
    plain, quiet, noisy = (make(name, ogm=OgmConfig(alpha=0.8), width=400) for name in ("joint", "ogm", "ogm-ge"))
    whole, damped, shaken = (moved(method, batch()) for method in (plain, quiet, noisy))
    for name in whole:
        noise = shaken[name] - damped[name]
        if name.startswith("encoders") and noise.ndim == 2:
            assert float(noise.std() / whole[name].std()) == pytest.approx(1.0, abs=0.03)
            assert abs(float(noise.mean())) < 0.03 * float(noise.std())
            kurtosis = float(noise.pow(4).mean() / noise.square().mean() ** 2)
            assert kurtosis == pytest.approx(3.0, abs=0.2)
        else:
            assert float(noise.abs().max()) == 0.0


def test_noise_follows_from_the_seed_of_the_step() -> None:
    steps = []
    for seed in (1, 1, 2):
        method = make("ogm-ge")
        method.optimization.begin_step(seed)
        steps.append(moved(method, batch())["encoders.0.layers.0.weight"])
    assert torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[0], steps[2])


def test_frozen_encoders_stay() -> None:
    method = make("ogm-ge")
    method.optimization.frozen[1] = True
    for name, step in moved(method, batch()).items():
        assert float(step.abs().sum()) == 0 or not name.startswith("encoders.1")


def test_two_processes_are_one() -> None:
    alone = make("ogm", ogm=OgmConfig(alpha=0.5))
    two = make("ogm", ogm=OgmConfig(alpha=0.5), distributed=Twin(world_size=2))
    whole = moved(alone, batch(copies=2))
    for name, step in moved(two, batch(share=0.5)).items():
        torch.testing.assert_close(step, whole[name], atol=1e-6, rtol=1e-4)
    assert two.epoch_metrics() == pytest.approx(alone.epoch_metrics(), rel=1e-5)


def test_a_resumed_run_knows_where_it_is() -> None:
    config = OgmConfig(alpha=0.5, first_epoch=2, last_epoch=3)
    one = make("ogm", ogm=config)
    one.begin_epoch(2, NOBODY)
    moved(one, batch())
    other = make("ogm", ogm=config)
    other.net.load_state_dict(one.net.state_dict())
    other.load_state_dict(one.state_dict())
    assert other.epoch_metrics() == one.epoch_metrics()
    for a, b in zip(moved(one, batch()).values(), moved(other, batch()).values(), strict=True):
        assert torch.equal(a, b)
