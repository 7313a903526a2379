"""Tests of modality dropout: one modality always remains, and unimodal means are over the remaining rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from training import TwoEqualProcesses, select_rows

from mmaudit.train.balancing import BALANCERS
from mmaudit.train.balancing.balancer import Balancer
from mmaudit.train.balancing.modality_dropout import DropoutConfig
from mmaudit.train.batches import Batch
from mmaudit.train.config import OptimConfig
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext, Optimization

torch.set_num_threads(1)


def build_method(
    probability: float, *, modalities: int = 2, distributed: DistributedContext = SINGLE_PROCESS
) -> Balancer:
    torch.manual_seed(0)
    names = tuple("abcd"[:modalities])
    net = FusionNet(
        ModelConfig(modalities=names, shapes=((3,),) * modalities, classes=("x", "y"), hidden=4, dropout=0.0)
    )
    optimization = Optimization(
        net, OptimConfig(optimizer="sgd", weight_decay=0.0), device="cpu", distributed=distributed
    )
    config = DropoutConfig(probability=probability)
    balancer: Balancer = BALANCERS.load("modality-dropout")(net, optimization, config, epochs=1)
    return balancer


def make_batch(num_rows: int, *, modalities: int = 2, present: Tensor | None = None, share: float = 1.0) -> Batch:
    weight = torch.arange(1, num_rows + 1).float()
    loss_weight = weight.repeat(1 + modalities, 1)
    if present is not None:
        loss_weight[1:] *= present.T
    return Batch(
        rows=torch.arange(num_rows),
        inputs=select_rows(present, [torch.ones(num_rows, 3) for _ in range(modalities)]),
        label=torch.arange(num_rows) % 2,
        present=present,
        loss_weight=share * loss_weight / loss_weight.sum(dim=1, keepdim=True).clamp(min=1.0),
        size=num_rows,
    )


def modality_mask_of(batch: Batch) -> Tensor:
    assert batch.present is not None
    return batch.present


@given(st.floats(0, 1), st.integers(2, 4), st.integers(0, 10_000))
def test_one_modality_always_remains(probability: float, modalities: int, seed: int) -> None:
    method = build_method(probability, modalities=modalities)
    torch.manual_seed(seed)
    num_remaining = modality_mask_of(method.prepare(make_batch(20, modalities=modalities))).sum(dim=1)
    assert int(num_remaining.min()) >= 1
    assert probability > 0 or int(num_remaining.min()) == modalities
    assert probability < 1 or int(num_remaining.max()) == 1


@given(st.integers(0, 10_000))
def test_absent_modalities_stay_absent(seed: int) -> None:
    torch.manual_seed(seed)
    before = torch.rand(30, 3) < 0.6
    after = modality_mask_of(build_method(0.5, modalities=3).prepare(make_batch(30, modalities=3, present=before)))
    assert not (after & ~before).any()
    assert torch.equal(after.any(dim=1), before.any(dim=1))


def test_modalities_are_dropped_with_the_right_frequency() -> None:
    """P(dropped) = p - p^2 / 2: where both would be dropped, a random one remains."""
    torch.manual_seed(3)
    dropped = ~modality_mask_of(build_method(0.3).prepare(make_batch(40_000)))
    assert dropped.float().mean(dim=0).tolist() == pytest.approx([0.3 - 0.09 / 2] * 2, abs=0.01)
    assert float((dropped[:, 0] & dropped[:, 1]).float().mean()) == 0.0


def test_unimodal_weights_are_over_remaining_rows_and_fused_over_all() -> None:
    batch, method = make_batch(50), build_method(0.5)
    prepared = method.prepare(batch)
    assert torch.equal(prepared.loss_weight[0], batch.loss_weight[0])
    torch.testing.assert_close(prepared.loss_weight.sum(dim=1), torch.ones(3))
    remaining = modality_mask_of(prepared).T
    assert not remaining.all()
    assert float(prepared.loss_weight[1:][~remaining].abs().sum()) == 0.0
    for j in range(2):  # ratios of sample weights are unchanged
        ratio = prepared.loss_weight[1 + j][remaining[j]] / batch.loss_weight[1 + j][remaining[j]]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_unimodal_weights_sum_over_all_processes() -> None:
    prepared = build_method(0.5, distributed=TwoEqualProcesses()).prepare(make_batch(50, share=0.5))
    torch.testing.assert_close(prepared.loss_weight.sum(dim=1), torch.full((3,), 0.5))


def test_same_seed_drops_the_same_modalities() -> None:
    method, batch = build_method(0.5), make_batch(100)
    masks = []
    for seed in (7, 7, 8):
        method.optimization.begin_step(seed)
        masks.append(modality_mask_of(method.prepare(batch)))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert batch.present is None


def test_encoder_trains_only_on_rows_with_its_modality() -> None:
    """If the first modality is never used its encoder has no gradient, and the fused logits depend on the other."""
    method = build_method(0.0)
    prepared = method.prepare(make_batch(10, present=torch.tensor([[False, True]]).repeat(10, 1)))
    outputs, loss = method.step(prepared)
    assert float(outputs.features[0].abs().sum()) == 0.0
    assert float(loss) > 0
    gradients = [[p.grad for p in encoder.parameters()] for encoder in method.net.encoders]
    assert all(gradient is None or float(gradient.abs().sum()) == 0.0 for gradient in gradients[0])
    assert any(gradient is not None and float(gradient.abs().sum()) > 0 for gradient in gradients[1])
