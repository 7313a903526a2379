"""Tests of InfoReg: growth of the trace and the pull by hand, windows, and what the state holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from training import draw_batch

from mmaudit.train.balancing.balancer import Validation
from mmaudit.train.balancing.inforeg import InfoReg, InfoRegConfig, trace_growth
from mmaudit.train.batches import Batch
from mmaudit.train.config import OptimConfig
from mmaudit.train.network import FusionNet, ModelConfig, Outputs
from mmaudit.train.optimizer import SINGLE_PROCESS, Optimization

torch.set_num_threads(1)

PLAIN = OptimConfig(precision="float32", lr=0.5, optimizer="sgd", momentum=0.0, weight_decay=0.0)


def build_method(*, num_modalities: int = 2, **changes: Any) -> InfoReg:
    torch.manual_seed(0)
    config = ModelConfig(
        modalities=("audio", "visual", "text")[:num_modalities],
        shapes=((5,), (4,), (3,))[:num_modalities],
        classes=("a", "b"),
        own_heads=True,
        hidden=6,
        dropout=0.0,
    )
    net = FusionNet(config)
    optimization = Optimization(net, PLAIN, device="cpu", distributed=SINGLE_PROCESS)
    optimization.begin_epoch(1, epochs=1)
    return InfoReg(net, optimization, InfoRegConfig(**changes), epochs=10)


def begin_epoch(method: InfoReg, epoch: int) -> None:
    reader: Any = None
    method.begin_epoch(epoch, reader)


def outputs_of(confidence: list[float], batch: Batch) -> Outputs:
    """Build outputs with the same confidence of a modality in class 0 for all samples."""
    c = torch.tensor([0.5, *confidence])
    logits = torch.stack([c.log(), (1 - c).log()], dim=1)[:, None].expand(-1, len(batch.label), 2)
    return Outputs(logits[0], logits[1:], ())


def pull(method: InfoReg, confidence: list[float]) -> list[float]:
    """Return the gradient that regulation adds to weights which have moved by 1 from 0 of gradient (m,)."""
    batch = draw_batch([0, 0], sizes=(5, 4, 3)[: method.net.num_modalities])
    with torch.no_grad():
        for parameter in method.net.encoders.parameters():
            parameter.add_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    method.modulate(outputs_of(confidence, batch), batch)
    pulls = []
    for encoder in method.net.encoders:
        values = torch.cat([p.grad.reshape(-1) for p in encoder.parameters() if p.grad is not None])
        torch.testing.assert_close(values, values[:1].expand_as(values))
        pulls.append(values[0].item())
    return pulls


def test_trace_growth_by_hand() -> None:
    assert trace_growth([]) == 1.0
    assert trace_growth([3.0]) == 1.0
    assert trace_growth([3.0, 1.0]) == 0.25
    # (3 + ... + 12) - (2 + ... + 11) over 3 + ... + 12
    assert trace_growth([float(t) for t in range(1, 13)]) == pytest.approx(10 / 75)
    assert trace_growth([1.0] * 11) == 0.0
    assert trace_growth([0.0]) == 1.0


def test_pull_on_the_modality_ahead_by_hand() -> None:
    method = build_method()
    begin_epoch(method, 1)
    # Two samples: S = 1.6 and 1.0, a lead of 0.6.
    assert pull(method, [0.8, 0.5]) == pytest.approx([0.95 * math.exp(math.tanh(0.6)), 0.0], rel=1e-5)
    begin_epoch(method, 1)
    assert pull(method, [0.5, 0.8]) == pytest.approx([0.0, 0.95 * math.exp(math.tanh(0.6))], rel=1e-5)
    begin_epoch(method, 1)
    assert pull(method, [0.7, 0.7]) == pytest.approx([0.0, 0.0])


def test_three_modalities_are_compared_with_the_mean_of_the_others() -> None:
    method = build_method(num_modalities=3, strength=2.0)
    begin_epoch(method, 1)
    # S = 1.8, 1.4, 1.0: leads of 0.6 and 0 over 1.2 and 1.4; none of the third.
    assert pull(method, [0.9, 0.7, 0.5]) == pytest.approx([2 * math.exp(math.tanh(0.6)), 0, 0], abs=1e-5)


def test_closed_window_has_no_pull() -> None:
    method = build_method(threshold=0.3)
    begin_epoch(method, 1)
    method._traces = [[1.0], [1.0]]
    method._trace = torch.tensor([0.25, 1.0])  # k = .25 / 1.25 and 1 / 2
    begin_epoch(method, 2)
    growth = [method.epoch_metrics()[f"trace_growth_{name}"] for name in ("audio", "visual")]
    assert growth == pytest.approx([0.2, 0.5])
    assert pull(method, [0.8, 0.5]) == [0.0, 0.0]
    assert pull(method, [0.5, 0.8])[1] > 0


def test_trace_is_the_mean_squared_gradient_of_weights() -> None:
    method, batch = build_method(strength=0.0), draw_batch([0, 1, 1])
    begin_epoch(method, 1)
    expected = torch.zeros(2)
    for _ in range(2):
        method.step(batch)
        for j, encoder in enumerate(method.net.encoders):
            weights = [p for p in encoder.parameters() if p.ndim > 1]
            assert len(weights) == 1
            expected[j] += sum(float(p.grad.square().mean()) for p in weights if p.grad is not None)
    trace = [method.epoch_metrics()[f"trace_{name}"] for name in ("audio", "visual")]
    assert trace == pytest.approx(expected.tolist(), rel=1e-5)


def test_state_within_and_between_epochs() -> None:
    batch = draw_batch([0, 1, 1])
    method, resumed = build_method(), build_method()
    begin_epoch(method, 1)
    method.step(batch)
    resumed.net.load_state_dict(method.net.state_dict())
    resumed.load_state_dict(method.state_dict())
    for balancer in (method, resumed):
        balancer.step(batch)
    for name, weight in method.net.state_dict().items():
        assert torch.equal(weight, resumed.net.state_dict()[name])
    method.end_epoch(1, Validation(loss=0.0, metric=0.0, unimodal_loss=(), unimodal_metric=()))
    assert method.state_dict()["start"] == [[], []]
    for epoch in range(2, 30):
        begin_epoch(method, epoch)
    assert len(method.state_dict()["traces"][0]) == 11
