"""Laws of the two plain losses: what they are, that listening moves no encoder, and that only what is heard counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmaudit.train.balancing.balancer import Balancer, build_balancer
from mmaudit.train.balancing.config import BalancingConfig
from mmaudit.train.batches import Batch
from mmaudit.train.config import OptimConfig
from mmaudit.train.distributed import SINGLE_PROCESS
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import Optimization

torch.set_num_threads(1)
NUM, CLASSES = 6, 3
PART = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.1, 0.1])


def make(name: str, *, own_heads: bool = False, precision: str = "float32") -> Balancer:
    torch.manual_seed(0)
    shapes, classes = ((4,), (5,)), tuple(map(str, range(CLASSES)))
    net = FusionNet(
        ModelConfig(modalities=("a", "v"), shapes=shapes, classes=classes, hidden=8, dropout=0.0, own_heads=own_heads)
    )
    optim = OptimConfig(optimizer="sgd", lr=0.5, momentum=0.0, weight_decay=0.0, precision=precision)
    optimization = Optimization(net, optim, device="cpu", distributed=SINGLE_PROCESS)
    optimization.begin_epoch(1, epochs=1)
    return build_balancer(name, net, optimization, BalancingConfig(), epochs=1)


def batch() -> Batch:
    chance = torch.Generator().manual_seed(1)
    inputs = (torch.randn(NUM, 4, generator=chance), torch.randn(NUM, 5, generator=chance))
    label = torch.arange(NUM) % CLASSES
    return Batch(
        rows=torch.arange(NUM), inputs=inputs, label=label, present=None, loss_weight=PART.repeat(3, 1), size=NUM
    )


def cross_entropy(logits: torch.Tensor, label: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    z = logits.detach().double().numpy()
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    return np.asarray(-np.log(p[np.arange(len(z)), label.numpy()]))


def test_joint_is_the_weighted_cross_entropy_of_the_fused_answer() -> None:
    method, given = make("joint"), batch()
    outputs = method.net(given.inputs)
    wanted = PART.numpy() @ cross_entropy(outputs.fused, given.label)
    assert method.loss(outputs, given).item() == pytest.approx(wanted, rel=1e-5)


def test_sum_adds_each_modalitys_own() -> None:
    method, given = make("sum"), batch()
    outputs = method.net(given.inputs)
    wanted = sum(PART.numpy() @ cross_entropy(z, given.label) for z in (outputs.fused, *outputs.unimodal))
    assert method.loss(outputs, given).item() == pytest.approx(wanted, rel=1e-5)


def test_sum_learns_alone_from_what_the_fused_answer_does_not_see() -> None:
    """Parts of 0 take a sample out of one loss, and out of that one alone."""
    method, given = make("sum"), batch()
    part = given.loss_weight.clone()
    part[0, 0] = part[2, 1] = 0.0
    outputs = method.net(given.inputs)
    lost = 0.1 * cross_entropy(outputs.fused, given.label)[0] + 0.3 * cross_entropy(outputs.unimodal[1], given.label)[1]
    before, after = method.loss(outputs, given), method.loss(outputs, replace(given, loss_weight=part))
    assert (before - after).item() == pytest.approx(lost, rel=1e-4)


def test_heads_that_listen_move_no_encoder() -> None:
    plain, listening = make("joint"), make("joint", own_heads=True)
    listening.net.load_state_dict(plain.net.state_dict(), strict=False)
    heads = [p.clone() for p in listening.net.heads.parameters()]
    for method in (plain, listening):
        method.step(batch())
    for name, weight in plain.net.state_dict().items():
        assert torch.equal(weight, listening.net.state_dict()[name])
    assert all(not torch.equal(old, new) for old, new in zip(heads, listening.net.heads.parameters(), strict=True))


def test_sum_moves_encoders_by_their_own_loss_too() -> None:
    plain, both = make("joint"), make("sum")
    for method in (plain, both):
        method.step(batch())
    for one, other in zip(plain.net.encoders.parameters(), both.net.encoders.parameters(), strict=True):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("name", ["joint", "sum"])
def test_half_precision_gives_nearly_the_same(name: str) -> None:
    whole, half = make(name, own_heads=True), make(name, own_heads=True, precision="bfloat16")
    assert half.step(batch())[1].item() == pytest.approx(whole.step(batch())[1].item(), rel=0.02)
