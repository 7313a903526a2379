"""Laws of modality dropout: one modality is always left, and own means are over what is left."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from training import cut_to

from mmaudit.train.balancing.balancer import Balancer, build_balancer
from mmaudit.train.balancing.config import BalancingConfig, DropoutConfig
from mmaudit.train.batches import Batch
from mmaudit.train.config import OptimConfig
from mmaudit.train.distributed import SINGLE_PROCESS, DistributedContext
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import Optimization

torch.set_num_threads(1)


class Twin(DistributedContext):
    """Two processes that see the same."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)


def make(probability: float, *, modalities: int = 2, distributed: DistributedContext = SINGLE_PROCESS) -> Balancer:
    torch.manual_seed(0)
    names = tuple("abcd"[:modalities])
    net = FusionNet(
        ModelConfig(modalities=names, shapes=((3,),) * modalities, classes=("x", "y"), hidden=4, dropout=0.0)
    )
    optimization = Optimization(
        net, OptimConfig(optimizer="sgd", weight_decay=0.0), device="cpu", distributed=distributed
    )
    config = BalancingConfig(dropout=DropoutConfig(probability=probability))
    return build_balancer("modality-dropout", net, optimization, config, epochs=1)


def batch(number: int, *, modalities: int = 2, present: Tensor | None = None, share: float = 1.0) -> Batch:
    weight = torch.arange(1, number + 1).float()
    part = weight.repeat(1 + modalities, 1)
    if present is not None:
        part[1:] *= present.T
    return Batch(
        rows=torch.arange(number),
        inputs=cut_to(present, [torch.ones(number, 3) for _ in range(modalities)]),
        label=torch.arange(number) % 2,
        present=present,
        loss_weight=share * part / part.sum(dim=1, keepdim=True).clamp(min=1.0),
        size=number,
    )


def heard(found: Batch) -> Tensor:
    assert found.present is not None
    return found.present


@given(st.floats(0, 1), st.integers(2, 4), st.integers(0, 10_000))
def test_one_modality_is_always_left(probability: float, modalities: int, seed: int) -> None:
    method = make(probability, modalities=modalities)
    torch.manual_seed(seed)
    left = heard(method.prepare(batch(20, modalities=modalities))).sum(dim=1)
    assert int(left.min()) >= 1
    assert probability > 0 or int(left.min()) == modalities
    assert probability < 1 or int(left.max()) == 1


@given(st.integers(0, 10_000))
def test_nothing_comes_back_that_was_absent(seed: int) -> None:
    torch.manual_seed(seed)
    before = torch.rand(30, 3) < 0.6
    after = heard(make(0.5, modalities=3).prepare(batch(30, modalities=3, present=before)))
    assert not (after & ~before).any()
    assert torch.equal(after.any(dim=1), before.any(dim=1))


def test_each_modality_is_dropped_as_often_as_it_should() -> None:
    """P(dropped) = p but for the p^2 of both, where one of the two at random is left."""
    torch.manual_seed(3)
    dropped = ~heard(make(0.3).prepare(batch(40_000)))
    assert dropped.float().mean(dim=0).tolist() == pytest.approx([0.3 - 0.09 / 2] * 2, abs=0.01)
    assert float((dropped[:, 0] & dropped[:, 1]).float().mean()) == 0.0


def test_own_means_are_over_what_is_left_and_the_fused_over_all() -> None:
    given_, method = batch(50), make(0.5)
    found = method.prepare(given_)
    assert torch.equal(found.loss_weight[0], given_.loss_weight[0])
    torch.testing.assert_close(found.loss_weight.sum(dim=1), torch.ones(3))
    left = heard(found).T
    assert not left.all()
    assert float(found.loss_weight[1:][~left].abs().sum()) == 0.0
    for j in range(2):  # weights of samples stand to each other as before
        ratio = found.loss_weight[1 + j][left[j]] / given_.loss_weight[1 + j][left[j]]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_own_means_are_over_all_processes() -> None:
    found = make(0.5, distributed=Twin(world_size=2)).prepare(batch(50, share=0.5))
    torch.testing.assert_close(found.loss_weight.sum(dim=1), torch.full((3,), 0.5))


def test_the_same_seed_drops_the_same() -> None:
    method, given_ = make(0.5), batch(100)
    found = []
    for seed in (7, 7, 8):
        method.optimization.begin_step(seed)
        found.append(heard(method.prepare(given_)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert given_.present is None


def test_an_encoder_learns_from_what_it_hears_alone() -> None:
    """Where the first modality is never there, its encoder gets no gradient, and the fused answer is the other's."""
    method = make(0.0)
    found = method.prepare(batch(10, present=torch.tensor([[False, True]]).repeat(10, 1)))
    outputs, loss = method.step(found)
    assert float(outputs.features[0].abs().sum()) == 0.0
    assert float(loss) > 0
    gradients = [[p.grad for p in encoder.parameters()] for encoder in method.net.encoders]
    assert all(gradient is None or float(gradient.abs().sum()) == 0.0 for gradient in gradients[0])
    assert any(gradient is not None and float(gradient.abs().sum()) > 0 for gradient in gradients[1])
