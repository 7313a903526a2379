"""Tests of the joint and summed losses: formulas, separate heads, and weights of 0."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmaudit.train.balancing import BALANCERS
from mmaudit.train.balancing.balancer import Balancer, SumConfig
from mmaudit.train.batches import Batch
from mmaudit.train.config import OptimConfig
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import SINGLE_PROCESS, Optimization

torch.set_num_threads(1)
NUM, CLASSES = 6, 3
FUSED_ONLY = SumConfig(unimodal_weight=0.0)
LOSS_WEIGHT = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.1, 0.1])


def build_method(
    name: str, *, own_heads: bool = False, precision: str = "float32", config: SumConfig | None = None
) -> Balancer:
    torch.manual_seed(0)
    shapes, classes = ((4,), (5,)), tuple(map(str, range(CLASSES)))
    net = FusionNet(
        ModelConfig(modalities=("a", "v"), shapes=shapes, classes=classes, hidden=8, dropout=0.0, own_heads=own_heads)
    )
    optim = OptimConfig(optimizer="sgd", lr=0.5, momentum=0.0, weight_decay=0.0, precision=precision)
    optimization = Optimization(net, optim, device="cpu", distributed=SINGLE_PROCESS)
    optimization.begin_epoch(1, epochs=1)
    balancer: Balancer = BALANCERS.load(name)(net, optimization, config, epochs=1)
    return balancer


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    inputs = (torch.randn(NUM, 4, generator=generator), torch.randn(NUM, 5, generator=generator))
    label = torch.arange(NUM) % CLASSES
    return Batch(
        rows=torch.arange(NUM), inputs=inputs, label=label, present=None, loss_weight=LOSS_WEIGHT.repeat(3, 1), size=NUM
    )


def cross_entropy(logits: torch.Tensor, label: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    z = logits.detach().double().numpy()
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    return np.asarray(-np.log(p[np.arange(len(z)), label.numpy()]))


def test_joint_is_the_weighted_fused_cross_entropy() -> None:
    method, batch = build_method("joint"), make_batch()
    outputs = method.net(batch.inputs)
    expected = LOSS_WEIGHT.numpy() @ cross_entropy(outputs.fused, batch.label)
    assert method.loss(outputs, batch).item() == pytest.approx(expected, rel=1e-5)


def test_sum_adds_the_unimodal_cross_entropies() -> None:
    method, batch = build_method("sum"), make_batch()
    outputs = method.net(batch.inputs)
    expected = sum(LOSS_WEIGHT.numpy() @ cross_entropy(z, batch.label) for z in (outputs.fused, *outputs.unimodal))
    assert method.loss(outputs, batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("fused_weight", "unimodal_weight"), [(0.1, 0.9), (0.0, 2.0), (3.0, 1.0)])
def test_sum_has_the_configured_weights(fused_weight: float, unimodal_weight: float) -> None:
    """BSS trains 0.1 CE(fused) + 0.9 (CE(audio) + CE(visual)) on CREMA-D, with a classifier for each."""
    config = SumConfig(fused_weight=fused_weight, unimodal_weight=unimodal_weight)
    method, batch = build_method("sum", own_heads=True, config=config), make_batch()
    outputs = method.net(batch.inputs)
    fused, *unimodal = (LOSS_WEIGHT.numpy() @ cross_entropy(z, batch.label) for z in (outputs.fused, *outputs.unimodal))
    expected = fused_weight * fused + unimodal_weight * sum(unimodal)
    assert method.loss(outputs, batch).item() == pytest.approx(expected, rel=1e-5)


def test_sum_without_unimodal_weight_trains_encoders_as_joint() -> None:
    joint, summed = (build_method("joint", own_heads=True), build_method("sum", own_heads=True, config=FUSED_ONLY))
    for method in (joint, summed):
        method.step(make_batch())
    for name, weight in joint.net.state_dict().items():
        assert torch.equal(weight, summed.net.state_dict()[name])


def test_weight_of_0_removes_a_sample_from_one_loss_only() -> None:
    """Each of the fused and unimodal losses has its own weights."""
    method, batch = build_method("sum"), make_batch()
    loss_weight = batch.loss_weight.clone()
    loss_weight[0, 0] = loss_weight[2, 1] = 0.0
    outputs = method.net(batch.inputs)
    removed = (
        0.1 * cross_entropy(outputs.fused, batch.label)[0] + 0.3 * cross_entropy(outputs.unimodal[1], batch.label)[1]
    )
    before, after = method.loss(outputs, batch), method.loss(outputs, replace(batch, loss_weight=loss_weight))
    assert (before - after).item() == pytest.approx(removed, rel=1e-4)


def test_separate_heads_do_not_train_encoders() -> None:
    plain, with_heads = build_method("joint"), build_method("joint", own_heads=True)
    with_heads.net.load_state_dict(plain.net.state_dict(), strict=False)
    heads = [p.clone() for p in with_heads.net.heads.parameters()]
    for method in (plain, with_heads):
        method.step(make_batch())
    for name, weight in plain.net.state_dict().items():
        assert torch.equal(weight, with_heads.net.state_dict()[name])
    assert all(not torch.equal(old, new) for old, new in zip(heads, with_heads.net.heads.parameters(), strict=True))


def test_sum_trains_encoders_with_unimodal_losses() -> None:
    plain, summed = build_method("joint"), build_method("sum")
    for method in (plain, summed):
        method.step(make_batch())
    for plain_weight, summed_weight in zip(
        plain.net.encoders.parameters(), summed.net.encoders.parameters(), strict=True
    ):
        assert not torch.equal(plain_weight, summed_weight)


@pytest.mark.parametrize("name", ["joint", "sum"])
def test_half_precision_gives_nearly_the_same_loss(name: str) -> None:
    full, half = build_method(name, own_heads=True), build_method(name, own_heads=True, precision="bfloat16")
    assert half.step(make_batch())[1].item() == pytest.approx(full.step(make_batch())[1].item(), rel=0.02)
