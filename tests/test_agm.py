"""Tests of AGM: Shapley logits by definition, coefficients by hand, and which gradients they scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import pytest
import torch
from torch import Tensor

from mmaudit.train.balancing import BALANCERS
from mmaudit.train.balancing.agm import Agm, AgmConfig, modality_lead, shapley_weights
from mmaudit.train.balancing.balancer import Balancer
from mmaudit.train.batches import Batch
from mmaudit.train.config import OptimConfig
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext, Optimization

torch.set_num_threads(1)


class TwoEqualProcesses(DistributedContext):
    """Two processes with the same data."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)


def build_method(
    name: str = "agm",
    *,
    fusion: str = "concat",
    modalities: int = 2,
    alpha: float = 1.0,
    distributed: DistributedContext = SINGLE_PROCESS,
) -> Balancer:
    """Build a method; a step of SGD at rate 1 changes a weight by minus its gradient."""
    torch.manual_seed(0)
    plan = ModelConfig(
        modalities=tuple("abc"[:modalities]),
        shapes=((4,), (5,), (6,))[:modalities],
        classes=("x", "y", "z"),
        fusion=fusion,
        hidden=8,
        dropout=0.0,
    )
    optimization = Optimization(
        FusionNet(plan),
        OptimConfig(optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant"),
        device="cpu",
        distributed=distributed,
    )
    optimization.begin_epoch(1, epochs=1)
    balancer: Balancer = BALANCERS.load(name)(optimization.net, optimization, AgmConfig(alpha=alpha), epochs=9)
    return balancer


def build_agm(fusion: str, *, modalities: int) -> Agm:
    method = build_method(fusion=fusion, modalities=modalities)
    assert isinstance(method, Agm)
    return method


def make_batch(*, modalities: int = 2, seed: int = 1, share: float = 1.0, copies: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = tuple(torch.randn(9, 4 + j, generator=generator) for j in range(modalities))
    total = 9 * copies
    return Batch(
        rows=torch.arange(total),
        inputs=tuple(rows.repeat(copies, 1) for rows in inputs),
        label=(torch.arange(9) % 3).repeat(copies),
        present=None,
        loss_weight=torch.full((1 + modalities, total), share / total),
        size=total,
    )


def weight_changes(method: Balancer, batch: Batch) -> dict[str, Tensor]:
    before = {name: weight.detach().clone() for name, weight in method.net.named_parameters()}
    method.step(batch)
    return {name: before[name] - weight.detach() for name, weight in method.net.named_parameters()}


def test_shapley_weights_of_two_and_three_modalities() -> None:
    """phi^1 = (V(1) - V(2) + V(12)) / 2; of three, sets in the order 3, 2, 23, 1, 13, 12, 123."""
    sets, weights = shapley_weights(2)
    assert sets == [(False, True), (True, False), (True, True)]
    assert weights.tolist() == [[-0.5, 0.5, 0.5], [0.5, -0.5, 0.5]]
    assert shapley_weights(3)[1][0].tolist() == pytest.approx([-1 / 6, -1 / 6, -1 / 3, 1 / 3, 1 / 6, 1 / 6, 1 / 3])


@pytest.mark.parametrize("fusion", Balancer.fusions)
def test_responses_are_mean_gains_over_all_orders(fusion: str) -> None:
    """By definition: the gain of a modality over those before it, averaged over all orders."""
    method = build_agm(fusion, modalities=3)
    outputs = method.net(make_batch(modalities=3).inputs)
    responses = method.responses(outputs)
    expected = torch.zeros_like(responses)
    method.net.eval()
    with torch.no_grad():
        for order in permutations(range(3)):
            fused_before = torch.zeros_like(outputs.fused)
            for position, j in enumerate(order):
                fused_after = method.net.fused_logits(
                    outputs.features, [modality in order[: position + 1] for modality in range(3)]
                )
                expected[j] += (fused_after - fused_before) / 6
                fused_before = fused_after
    torch.testing.assert_close(responses, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(responses.sum(dim=0), outputs.fused.detach(), atol=1e-5, rtol=1e-4)


def test_responses_of_concat_equal_its_unimodal_logits() -> None:
    method = build_agm("concat", modalities=2)
    method.net.fusion.bias.data[:] = torch.tensor([0.3, -1.0, 2.0])  # type: ignore[operator]
    outputs = method.net(make_batch().inputs)
    torch.testing.assert_close(method.responses(outputs), outputs.unimodal.detach(), atol=1e-5, rtol=1e-4)


def test_responses_change_neither_buffers_nor_mode() -> None:
    method = build_agm("mmtm", modalities=2)
    outputs = method.net(make_batch().inputs)
    before = {name: value.clone() for name, value in method.net.named_buffers()}
    method.responses(outputs)
    assert all(torch.equal(value, before[name]) for name, value in method.net.named_buffers())
    assert method.net.fusion.training


def test_modality_lead_by_hand() -> None:
    valid = torch.tensor([True, True, True])
    assert modality_lead(torch.tensor([0.2, 1.0, 1.8]), valid).tolist() == pytest.approx(
        [math.exp(1.2), 1.0, math.exp(-1.2)], rel=1e-5
    )
    assert modality_lead(torch.tensor([0.2, 1.0, 0.0]), torch.tensor([True, True, False])).tolist() == pytest.approx(
        [math.exp(0.8), math.exp(-0.8), 1.0]
    )


def mean_log_losses(method: Balancer, batch: Batch) -> list[float]:
    """Compute the mean of minus log of the true class's probability, from the unimodal logits of concatenation."""
    with torch.no_grad():
        return [-float(confidence.log().mean()) for confidence in method.net(batch.inputs).confidence(batch.label)[1:]]


def test_coefficients_of_two_steps_by_hand() -> None:
    """At first tau is 1, then the lead of the first step's scores only, not of both steps."""
    plain, method = build_method("joint"), build_method(alpha=0.7)
    usual_scores = [0.0, 0.0]
    for seed in (1, 2):
        batch = make_batch(seed=seed)
        current = mean_log_losses(method, batch)
        expected = [
            math.exp(0.7 * (math.exp(usual_scores[1 - j] - usual_scores[j]) - math.exp(current[1 - j] - current[j])))
            for j in range(2)
        ]
        plain.net.load_state_dict(method.net.state_dict())
        plain_changes, changes = weight_changes(plain, batch), weight_changes(method, batch)
        assert list(method.epoch_metrics().values()) == pytest.approx(expected, rel=1e-4)
        assert max(abs(coefficient - 1) for coefficient in expected) > 0.01
        for name, step in plain_changes.items():
            factor = next((expected[j] for j in range(2) if name.startswith(f"encoders.{j}.")), 1.0)
            torch.testing.assert_close(changes[name], factor * step, atol=1e-6, rtol=1e-3)
        usual_scores = current


def test_modality_further_ahead_than_usual_is_slowed_and_the_other_sped_up() -> None:
    """Usual scores are equal; in this step the second modality's features are the class, those of the first 0."""
    method, batch = build_method(), make_batch()
    method.load_state_dict({"mean": torch.ones(2), "steps": torch.ones(2), "coefficient": torch.ones(2)})
    method.net.fusion.heads[1].weight.data[:] = torch.eye(3, 8)  # type: ignore[index, union-attr]
    features = (torch.zeros(9, 8), 5.0 * torch.nn.functional.one_hot(batch.label, 8).float())
    method.modulate(method.net.classify(features), batch)
    behind_coefficient, ahead_coefficient = method.epoch_metrics().values()
    assert ahead_coefficient < 1 < behind_coefficient


def test_exponent_has_a_ceiling() -> None:
    """A usual lead of e^9 that is now absent: the exponent would be 8,102."""
    method = build_method(alpha=0.5)
    method.load_state_dict(
        {"mean": torch.tensor([0.0, 9.0]), "steps": torch.tensor([5.0, 5.0]), "coefficient": torch.ones(2)}
    )
    method.step(make_batch())
    assert method.epoch_metrics()["coefficient_a"] == pytest.approx(math.exp(5.0), rel=1e-4)


def test_probabilities_have_a_floor() -> None:
    method, batch = build_method(), make_batch()
    method.net.fusion.heads[1].weight.data[:] = torch.eye(3, 8)  # type: ignore[index, union-attr]
    wrong_features = 1e4 * torch.nn.functional.one_hot((batch.label + 1) % 3, 8).float()
    method.modulate(method.net.classify((torch.zeros(9, 8), wrong_features)), batch)
    assert method.state_dict()["mean"].tolist() == pytest.approx([math.log(3), -math.log(1e-8)], rel=1e-5)


def test_modality_absent_from_all_samples_is_not_compared() -> None:
    method, batch = build_method(), make_batch()
    loss_weight = batch.loss_weight.clone()
    loss_weight[2] = 0.0
    absent = Batch(
        rows=batch.rows,
        inputs=batch.inputs,
        label=batch.label,
        present=torch.tensor([[True, False]]).repeat(9, 1),
        loss_weight=loss_weight,
        size=9,
    )
    before = method.state_dict()
    method.step(absent)
    assert list(method.epoch_metrics().values()) == [1.0, 1.0]
    assert torch.equal(method.state_dict()["mean"], before["mean"])


def test_two_processes_take_the_step_of_one() -> None:
    single, distributed = build_method(), build_method(distributed=TwoEqualProcesses(world_size=2))
    for seed in (1, 2):
        expected = weight_changes(single, make_batch(copies=2, seed=seed))
        for name, step in weight_changes(distributed, make_batch(share=0.5, seed=seed)).items():
            torch.testing.assert_close(step, expected[name], atol=1e-6, rtol=1e-3)


def test_resumed_method_continues_exactly() -> None:
    original, resumed = build_method(), build_method()
    for seed in (1, 2):
        original.step(make_batch(seed=seed))
    resumed.net.load_state_dict(original.net.state_dict())
    resumed.load_state_dict(original.state_dict())
    assert resumed.epoch_metrics() == original.epoch_metrics()
    for a, b in zip(
        weight_changes(original, make_batch(seed=3)).values(),
        weight_changes(resumed, make_batch(seed=3)).values(),
        strict=True,
    ):
        assert torch.equal(a, b)
