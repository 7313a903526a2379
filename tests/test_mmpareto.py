"""Tests of MMPareto: the closed form against a numerical search, and which gradient each parameter uses."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor
from training import TwoEqualProcesses, draw_batch, weight_changes

from mmaudit.audit.errors import ConfigError
from mmaudit.train.balancing.mmpareto import MmPareto, MmParetoConfig, combine_gradients
from mmaudit.train.batches import Batch
from mmaudit.train.config import OptimConfig
from mmaudit.train.network import FusionNet, ModelConfig, separate_losses
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext, Optimization

torch.set_num_threads(1)

Floats = NDArray[np.float64]

GAMMA = 1.5
SEEDS = st.integers(0, 10**6)


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


def loss_gradients(balancer: MmPareto, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of the fused loss and of the sum of unimodal losses."""
    net = copy.deepcopy(balancer.net)
    fused, unimodal = separate_losses(net(batch.inputs, batch.present), batch.label)
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


def combine(
    fused: Sequence[Tensor], unimodal: Sequence[Tensor], *, gamma: float = GAMMA, rescale: str = "tensor"
) -> list[Tensor]:
    """Return the combination of an encoder's gradients, one tensor for each parameter."""
    total = [f + u for f, u in zip(fused, unimodal, strict=True)]
    combine_gradients(total, list(unimodal), gamma=gamma, rescale=rescale)
    return total


def published(fused: list[Floats], unimodal: list[Floats], *, gamma: float = GAMMA) -> list[Floats]:
    """Combine as the authors' code does; the shortest vector is found by a search instead of in closed form."""
    f, u = np.concatenate([x.ravel() for x in fused]), np.concatenate([x.ravel() for x in unimodal])
    weight = 0.5
    if f @ u <= 0:
        weight = minimize_scalar(
            lambda a: float(np.linalg.norm(a * f + (1 - a) * u)),
            bounds=(0, 1),
            method="bounded",
            options={"xatol": 1e-12},
        ).x
    combined = [2 * weight * x + 2 * (1 - weight) * y for x, y in zip(fused, unimodal, strict=True)]
    ratios = [
        float(np.linalg.norm(x + y) / np.linalg.norm(z)) for x, y, z in zip(fused, unimodal, combined, strict=True)
    ]
    return [gamma * max(1.0, ratio) * z for ratio, z in zip(ratios, combined, strict=True)]


@given(SEEDS, st.floats(0.05, 20))
def test_tensors_equal_the_published_combination(seed: int, length: float) -> None:
    rng = np.random.default_rng(seed)
    shapes, sizes = ((2, 3), (3,), (1, 2)), (1.0, 10.0, 0.1)
    fused = [size * rng.standard_normal(shape) for shape, size in zip(shapes, sizes, strict=True)]
    unimodal = [length * rng.standard_normal(shape) for shape in shapes]
    combined = combine([torch.from_numpy(f) for f in fused], [torch.from_numpy(u) for u in unimodal])
    for gradient, expected in zip(combined, published(fused, unimodal), strict=True):
        assert gradient.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5 * float(np.abs(expected).max()))


def test_tensors_are_only_lengthened() -> None:
    """f = (1, 0 | 2), u = (-3, 1 | 0.5): f.u = -2, a' = 12.25 / 19.25; 2 a' f + 2 (1 - a') u = (-.909, .727 | 2.909).

    The first tensor is brought to the length of (-2, 1), sqrt(5); the second is longer than 2.5 and is left.
    """
    f, u = [torch.tensor([1.0, 0.0]), torch.tensor([2.0])], [torch.tensor([-3.0, 1.0]), torch.tensor([0.5])]
    first, second = combine(f, u, gamma=1.0)
    assert first.tolist() == pytest.approx([-0.90909 * 5**0.5 / 1.16422, 0.72727 * 5**0.5 / 1.16422], rel=1e-4)
    assert second.tolist() == pytest.approx([2.90909], rel=1e-4)
    first, second = combine(f, u, gamma=1.0, rescale="encoder")  # of length 3.1334, which becomes sqrt(5 + 6.25)
    assert [*first, *second] == pytest.approx(
        [z * 11.25**0.5 / 3.13341 for z in (-0.90909, 0.72727, 2.90909)], rel=1e-4
    )


@pytest.mark.parametrize("rescale", ["tensor", "encoder"])
def test_combination_by_hand(rescale: str) -> None:
    f, u = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])  # a = (2 + 1) / 5; shortest (1, 2) / 5; their sum (0, 1)
    (combined,) = combine([f], [u], gamma=1.0, rescale=rescale)
    assert combined.tolist() == pytest.approx([1 / 5**0.5, 2 / 5**0.5])


@given(SEEDS)
def test_encoder_combination_increases_neither_loss(seed: int) -> None:
    rng = np.random.default_rng(seed)
    f, u = torch.from_numpy(rng.standard_normal(5)), torch.from_numpy(rng.standard_normal(5))
    (combined,) = combine([f], [u], rescale="encoder")
    assert float(combined @ f) >= -1e-9
    assert float(combined @ u) >= -1e-9
    assert float(combined.norm()) == pytest.approx(GAMMA * float((f + u).norm()))
    assert combine([u], [f], rescale="encoder")[0].tolist() == pytest.approx(combined.tolist())


@pytest.mark.parametrize("rescale", ["tensor", "encoder"])
def test_gradient_of_0_leaves_the_other(rescale: str) -> None:
    f, zero = torch.tensor([3.0, -4.0]), torch.zeros(2)
    for pair in ((f, zero), (zero, f)):
        assert combine(pair[:1], pair[1:], rescale=rescale)[0].tolist() == [4.5, -6.0]
    assert combine([zero], [zero], rescale=rescale)[0].tolist() == [0, 0]


@pytest.mark.parametrize("rescale", ["tensor", "encoder"])
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e6])
def test_opposite_gradients_stay_finite_at_any_size(size: float, rescale: str) -> None:
    f = size * torch.tensor([1.0, 2.0, -1.0])
    for u in (-f, -3 * f, -f + size * torch.tensor([1e-6, 0.0, 0.0])):
        (combined,) = combine([f], [u], rescale=rescale)
        assert torch.isfinite(combined).all()
        assert float(combined.norm()) <= 1.01 * GAMMA * float((f + u).norm()) + 1e-3 * float(f.norm())


@pytest.mark.parametrize("fusion", ["concat", "gated"])
@pytest.mark.parametrize("seed", range(4))
def test_encoders_use_the_combination_and_the_rest_the_sum(fusion: str, seed: int) -> None:
    balancer, batch = build_mmpareto(fusion=fusion), make_batch(seed=seed)
    fused, unimodal = loss_gradients(balancer, batch)
    changes = weight_changes(balancer, batch)
    for j in range(2):
        names = [name for name in changes if name.startswith(f"encoders.{j}.")]
        f, u = ([gradients[name].double().numpy() for name in names] for gradients in (fused, unimodal))
        for name, expected in zip(names, published(f, u), strict=True):
            assert changes[name].numpy() == pytest.approx(expected, rel=1e-3, abs=1e-5), name
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
    fused, unimodal = separate_losses(balancer.net(batch.inputs), batch.label)
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rescale": "all"}, "balancing.mmpareto.rescale is 'all'; .*tensor"),
        ({"gamma": -1.0}, "balancing.mmpareto.gamma is -1.0"),
    ],
)
def test_invalid_settings_raise(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MmParetoConfig(**options)
