"""Tests of MMPareto: the closed form against a numerical search, and which gradient each parameter uses."""

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

from mmaudit.train.balancing.mmpareto import MmPareto, MmParetoConfig, combine_gradients
from mmaudit.train.batches import Batch
from mmaudit.train.config import OptimConfig
from mmaudit.train.network import FusionNet, ModelConfig, cross_entropies
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext, Optimization

torch.set_num_threads(1)

GAMMA = 1.5
SEEDS = st.integers(0, 10**6)


@dataclass(frozen=True, kw_only=True)
class TwoEqualProcesses(DistributedContext):
    """Two processes with the same rows: sums are twice those of one."""

    world_size: int = 2

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor *= 2


def build_mmpareto(
    *,
    precision: str = "float32",
    fusion: str = "concat",
    freeze: tuple[int, ...] = (),
    distributed: DistributedContext = SINGLE_PROCESS,
) -> MmPareto:
    """Build the method with gradient descent at rate 1: the change of a parameter is minus its gradient."""
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
    return MmPareto(net, Optimization(net, config, device="cpu", distributed=distributed), epochs=2)


def make_batch(present: list[list[bool]] | None = None, *, seed: int = 1) -> Batch:
    return draw_batch([0, 1, 2, 1, 0, 0], weight=[1, 2, 3, 2, 1, 1], present=present, seed=seed)


def weight_changes(balancer: MmPareto, batch: Batch) -> dict[str, Tensor]:
    before = copy.deepcopy(dict(balancer.net.named_parameters()))
    balancer.step(batch)
    return {name: (before[name] - p).detach() for name, p in balancer.net.named_parameters()}


def loss_gradients(balancer: MmPareto, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of the fused loss and of the sum of unimodal losses."""
    net = copy.deepcopy(balancer.net)
    fused, unimodal = cross_entropies(net(batch.inputs, batch.present), batch.label)
    trainable = {name: p for name, p in net.named_parameters() if p.requires_grad}
    results = []
    for loss in ((fused * batch.loss_weight[0]).sum(), (unimodal * batch.loss_weight[1:]).sum()):
        gradients = torch.autograd.grad(loss, list(trainable.values()), retain_graph=True, allow_unused=True)
        results.append(
            {
                name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(trainable.items(), gradients, strict=True)
            }
        )
    return results[0], results[1]


@given(SEEDS, st.floats(0.05, 20))
def test_combination_equals_a_search_for_the_shortest_vector(seed: int, length: float) -> None:
    rng = np.random.default_rng(seed)
    f, u = rng.standard_normal(4), length * rng.standard_normal(4)
    combined = combine_gradients(torch.from_numpy(f), torch.from_numpy(u), gamma=GAMMA).numpy()
    if f @ u > 0:
        assert combined == pytest.approx(GAMMA * (f + u))
        return
    a = minimize_scalar(
        lambda a: float(np.linalg.norm(a * f + (1 - a) * u)), bounds=(0, 1), method="bounded", options={"xatol": 1e-12}
    ).x
    shortest = a * f + (1 - a) * u
    expected = GAMMA * np.linalg.norm(f + u) * shortest / np.linalg.norm(shortest)
    assert combined == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_combination_by_hand() -> None:
    f, u = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])  # a = (2 + 1) / 5; shortest (1, 2) / 5; their sum (0, 1)
    assert combine_gradients(f, u, gamma=1.0).tolist() == pytest.approx([1 / 5**0.5, 2 / 5**0.5])


@given(SEEDS)
def test_combination_increases_neither_loss(seed: int) -> None:
    rng = np.random.default_rng(seed)
    f, u = torch.from_numpy(rng.standard_normal(5)), torch.from_numpy(rng.standard_normal(5))
    combined = combine_gradients(f, u, gamma=GAMMA)
    assert float(combined @ f) >= -1e-9
    assert float(combined @ u) >= -1e-9
    assert float(combined.norm()) == pytest.approx(GAMMA * float((f + u).norm()))
    assert combine_gradients(u, f, gamma=GAMMA).tolist() == pytest.approx(combined.tolist())


def test_gradient_of_0_leaves_the_other() -> None:
    f, zero = torch.tensor([3.0, -4.0]), torch.zeros(2)
    assert (
        combine_gradients(f, zero, gamma=GAMMA).tolist()
        == combine_gradients(zero, f, gamma=GAMMA).tolist()
        == [4.5, -6.0]
    )
    assert combine_gradients(zero, zero, gamma=GAMMA).tolist() == [0, 0]


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e6])
def test_opposite_gradients_stay_finite_at_any_size(size: float) -> None:
    f = size * torch.tensor([1.0, 2.0, -1.0])
    for u in (-f, -3 * f, -f + size * torch.tensor([1e-6, 0.0, 0.0])):
        combined = combine_gradients(f, u, gamma=GAMMA)
        assert torch.isfinite(combined).all()
        assert float(combined.norm()) <= 1.01 * GAMMA * float((f + u).norm())


@pytest.mark.parametrize("fusion", ["concat", "gated"])
@pytest.mark.parametrize("seed", range(4))
def test_encoders_use_the_combination_and_the_rest_the_sum(fusion: str, seed: int) -> None:
    balancer, batch = build_mmpareto(fusion=fusion), make_batch(seed=seed)
    fused, unimodal = loss_gradients(balancer, batch)
    changes = weight_changes(balancer, batch)
    for j in range(2):
        names = [name for name in changes if name.startswith(f"encoders.{j}.")]
        f, u, combined = (
            torch.cat([gradients[name].reshape(-1) for name in names]) for gradients in (fused, unimodal, changes)
        )
        assert combined.tolist() == pytest.approx(combine_gradients(f, u, gamma=GAMMA).tolist(), rel=1e-3, abs=1e-5)
    rest = [name for name in changes if not name.startswith("encoders.")]
    assert any(name.startswith("heads.") for name in rest)
    for name in rest:
        assert torch.allclose(changes[name], fused[name] + unimodal[name], atol=1e-6)


def test_seeds_include_conflicting_and_agreeing_gradients() -> None:
    signs = set()
    for seed in range(4):
        balancer, batch = build_mmpareto(), make_batch(seed=seed)
        fused, unimodal = loss_gradients(balancer, batch)
        for j in range(2):
            names = [name for name in fused if name.startswith(f"encoders.{j}.")]
            signs.add(sum(float((fused[name] * unimodal[name]).sum()) for name in names) > 0)
    assert signs == {True, False}  # otherwise the test above would cover one case only


def test_step_returns_the_detached_sum_of_losses() -> None:
    balancer, batch = build_mmpareto(), make_batch()
    fused, unimodal = cross_entropies(balancer.net(batch.inputs), batch.label)
    _, loss = balancer.step(batch)
    assert float(loss) == pytest.approx(float((torch.cat([fused[None], unimodal]) * batch.loss_weight).sum().detach()))
    assert not loss.requires_grad


def test_frozen_encoders_are_not_updated() -> None:
    balancer = build_mmpareto(freeze=(0,))
    changes = weight_changes(balancer, make_batch())
    assert all(float(change.abs().sum()) == 0 for name, change in changes.items() if name.startswith("encoders.0"))
    assert all(float(change.abs().sum()) > 0 for name, change in changes.items() if name.startswith("encoders.1"))
    balancer.optimization.frozen[1] = True
    changes = weight_changes(balancer, make_batch(seed=2))
    frozen_changes = [change for name, change in changes.items() if name.startswith(("encoders", "heads.1"))]
    assert all(float(change.abs().sum()) == 0 for change in frozen_changes)
    assert float(changes["heads.0.weight"].abs().sum()) > 0


def test_absent_modality_is_not_updated() -> None:
    changes = weight_changes(build_mmpareto(), make_batch([[True, False]] * 6))
    assert all(float(change.abs().sum()) == 0 for name, change in changes.items() if name.startswith("encoders.1"))
    assert all(float(change.abs().sum()) > 0 for name, change in changes.items() if name.startswith("encoders.0"))


def test_half_precision_takes_nearly_the_same_step() -> None:
    half, full = (
        weight_changes(build_mmpareto(precision="float16"), make_batch()),
        weight_changes(build_mmpareto(), make_batch()),
    )
    for name, change in full.items():
        assert torch.allclose(half[name], change, atol=0.02 * float(change.abs().max()) + 1e-3)


def test_gamma_scales_encoder_gradients() -> None:
    balancer = build_mmpareto()
    balancer.config = MmParetoConfig(gamma=3.0)
    doubled, reference = weight_changes(balancer, make_batch()), weight_changes(build_mmpareto(), make_batch())
    for name in reference:
        factor: Any = 2 if name.startswith("encoders.") else 1
        assert torch.allclose(doubled[name], factor * reference[name], atol=1e-6)


def test_two_processes_take_the_step_of_one() -> None:
    single, distributed = build_mmpareto(distributed=SINGLE_PROCESS), build_mmpareto(distributed=TwoEqualProcesses())
    for seed in range(6):
        batch = make_batch(seed=seed)
        single.step(batch)
        distributed.step(replace(batch, loss_weight=batch.loss_weight / 2))
    parameters = dict(distributed.net.named_parameters())
    for name, p in single.net.named_parameters():
        assert torch.allclose(p, parameters[name], atol=1e-5)
