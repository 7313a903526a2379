"""Laws of MMPareto: the closed form against a search for the shortest vector, and what moves by which gradient."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor
from training import draw_batch

from mmaudit.train.balancing.config import BalancingConfig, MmParetoConfig
from mmaudit.train.balancing.mmpareto import MmPareto, combine_gradients
from mmaudit.train.batches import Batch
from mmaudit.train.config import OptimConfig
from mmaudit.train.distributed import SINGLE_PROCESS, DistributedContext
from mmaudit.train.network import FusionNet, ModelConfig, cross_entropies
from mmaudit.train.optimizer import Optimization

torch.set_num_threads(1)

GAMMA = 1.5
SEEDS = st.integers(0, 10**6)


@dataclass(frozen=True, kw_only=True)
class Twins(DistributedContext):
    """Two processes with the same rows: sums are twice what one has."""

    size: int = 2

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor *= 2


def make(
    *,
    precision: str = "float32",
    fusion: str = "concat",
    freeze: tuple[int, ...] = (),
    distributed: DistributedContext = SINGLE_PROCESS,
) -> MmPareto:
    """One step of plain gradient descent at rate 1: what a parameter loses is its gradient."""
    torch.manual_seed(0)
    plan = ModelConfig(
        modalities=("audio", "visual"),
        shapes=((5,), (4,)),
        classes=("a", "b", "c"),
        fusion=fusion,
        own_heads=True,
        hidden=6,
        dropout=0.0,
    )
    net = FusionNet(plan)
    net.freeze_encoders(freeze)
    config = OptimConfig(optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, precision=precision)
    return MmPareto(net, Optimization(net, config, device="cpu", distributed=distributed), BalancingConfig(), epochs=2)


def draw(present: list[list[bool]] | None = None, *, seed: int = 1) -> Batch:
    return draw_batch([0, 1, 2, 1, 0, 0], weight=[1, 2, 3, 2, 1, 1], present=present, seed=seed)


def moves(balancer: MmPareto, batch: Batch) -> dict[str, Tensor]:
    before = copy.deepcopy(dict(balancer.net.named_parameters()))
    balancer.step(batch)
    return {name: (before[name] - p).detach() for name, p in balancer.net.named_parameters()}


def expected(balancer: MmPareto, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give the gradients of the fused loss and of the sum of the own ones."""
    net = copy.deepcopy(balancer.net)
    fused, own = cross_entropies(net(batch.inputs, batch.present), batch.label)
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    found = []
    for loss in ((fused * batch.loss_weight[0]).sum(), (own * batch.loss_weight[1:]).sum()):
        some = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        found.append(
            {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(named.items(), some, strict=True)}
        )
    return found[0], found[1]


@given(SEEDS, st.floats(0.05, 20))
def test_against_a_search_for_the_shortest_vector(seed: int, length: float) -> None:
    rng = np.random.default_rng(seed)
    f, u = rng.standard_normal(4), length * rng.standard_normal(4)
    found = combine_gradients(torch.from_numpy(f), torch.from_numpy(u), gamma=GAMMA).numpy()
    if f @ u > 0:
        assert found == pytest.approx(GAMMA * (f + u))
        return
    a = minimize_scalar(
        lambda a: float(np.linalg.norm(a * f + (1 - a) * u)), bounds=(0, 1), method="bounded", options={"xatol": 1e-12}
    ).x
    shortest = a * f + (1 - a) * u
    wanted = GAMMA * np.linalg.norm(f + u) * shortest / np.linalg.norm(shortest)
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_by_hand() -> None:
    f, u = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])  # a = (2 + 1) / 5; shortest (1, 2) / 5; their sum (0, 1)
    assert combine_gradients(f, u, gamma=1.0).tolist() == pytest.approx([1 / 5**0.5, 2 / 5**0.5])


@given(SEEDS)
def test_neither_loss_is_made_worse(seed: int) -> None:
    rng = np.random.default_rng(seed)
    f, u = torch.from_numpy(rng.standard_normal(5)), torch.from_numpy(rng.standard_normal(5))
    found = combine_gradients(f, u, gamma=GAMMA)
    assert float(found @ f) >= -1e-9
    assert float(found @ u) >= -1e-9
    assert float(found.norm()) == pytest.approx(GAMMA * float((f + u).norm()))
    assert combine_gradients(u, f, gamma=GAMMA).tolist() == pytest.approx(found.tolist())


def test_where_one_is_nothing_the_other_is_followed() -> None:
    f, nothing = torch.tensor([3.0, -4.0]), torch.zeros(2)
    assert (
        combine_gradients(f, nothing, gamma=GAMMA).tolist()
        == combine_gradients(nothing, f, gamma=GAMMA).tolist()
        == [4.5, -6.0]
    )
    assert combine_gradients(nothing, nothing, gamma=GAMMA).tolist() == [0, 0]


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e6])
def test_opposite_gradients_stay_finite_at_any_size(size: float) -> None:
    f = size * torch.tensor([1.0, 2.0, -1.0])
    for u in (-f, -3 * f, -f + size * torch.tensor([1e-6, 0.0, 0.0])):
        found = combine_gradients(f, u, gamma=GAMMA)
        assert torch.isfinite(found).all()
        assert float(found.norm()) <= 1.01 * GAMMA * float((f + u).norm())


@pytest.mark.parametrize("fusion", ["concat", "gated"])
@pytest.mark.parametrize("seed", range(4))
def test_encoders_follow_the_combination_and_all_else_the_sum(fusion: str, seed: int) -> None:
    balancer, batch = make(fusion=fusion), draw(seed=seed)
    fused, own = expected(balancer, batch)
    found = moves(balancer, batch)
    for j in range(2):
        names = [name for name in found if name.startswith(f"encoders.{j}.")]
        f, u, combined = (torch.cat([each[name].reshape(-1) for name in names]) for each in (fused, own, found))
        assert combined.tolist() == pytest.approx(combine_gradients(f, u, gamma=GAMMA).tolist(), rel=1e-3, abs=1e-5)
    rest = [name for name in found if not name.startswith("encoders.")]
    assert any(name.startswith("heads.") for name in rest)
    for name in rest:
        assert torch.allclose(found[name], fused[name] + own[name], atol=1e-6)


def test_some_seed_has_a_conflict() -> None:
    signs = set()
    for seed in range(4):
        balancer, batch = make(), draw(seed=seed)
        fused, own = expected(balancer, batch)
        for j in range(2):
            names = [name for name in fused if name.startswith(f"encoders.{j}.")]
            signs.add(sum(float((fused[name] * own[name]).sum()) for name in names) > 0)
    assert signs == {True, False}  # else the test above would have seen one case alone


def test_gives_the_sum_of_all_losses_and_no_gradient_with_it() -> None:
    balancer, batch = make(), draw()
    fused, own = cross_entropies(balancer.net(batch.inputs), batch.label)
    _, loss = balancer.step(batch)
    assert float(loss) == pytest.approx(float((torch.cat([fused[None], own]) * batch.loss_weight).sum().detach()))
    assert not loss.requires_grad


def test_what_is_frozen_or_fixed_stays() -> None:
    balancer = make(freeze=(0,))
    found = moves(balancer, draw())
    assert all(float(each.abs().sum()) == 0 for name, each in found.items() if name.startswith("encoders.0"))
    assert all(float(each.abs().sum()) > 0 for name, each in found.items() if name.startswith("encoders.1"))
    balancer.optimization.frozen[1] = True
    found = moves(balancer, draw(seed=2))
    still = [each for name, each in found.items() if name.startswith(("encoders", "heads.1"))]
    assert all(float(each.abs().sum()) == 0 for each in still)
    assert float(found["heads.0.weight"].abs().sum()) > 0


def test_an_absent_modality_is_passed_over() -> None:
    found = moves(make(), draw([[True, False]] * 6))
    assert all(float(each.abs().sum()) == 0 for name, each in found.items() if name.startswith("encoders.1"))
    assert all(float(each.abs().sum()) > 0 for name, each in found.items() if name.startswith("encoders.0"))


def test_half_precision_takes_the_same_step() -> None:
    half, whole = moves(make(precision="float16"), draw()), moves(make(), draw())
    for name, each in whole.items():
        assert torch.allclose(half[name], each, atol=0.02 * float(each.abs().max()) + 1e-3)


def test_gamma_is_a_setting() -> None:
    balancer = make()
    balancer.config = BalancingConfig(mmpareto=MmParetoConfig(gamma=3.0))
    twice, once = moves(balancer, draw()), moves(make(), draw())
    for name in once:
        factor: Any = 2 if name.startswith("encoders.") else 1
        assert torch.allclose(twice[name], factor * once[name], atol=1e-6)


def test_two_processes_with_halves_of_a_batch_do_what_one_does() -> None:
    one, twin = make(distributed=SINGLE_PROCESS), make(distributed=Twins())
    for seed in range(6):
        batch = draw(seed=seed)
        one.step(batch)
        twin.step(replace(batch, loss_weight=batch.loss_weight / 2))
    found = dict(twin.net.named_parameters())
    for name, p in one.net.named_parameters():
        assert torch.allclose(p, found[name], atol=1e-5)
