"""Tests of AGM: Shapley logits by definition, coefficients by hand, and which gradients they scale."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import permutations
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from training import TwoEqualProcesses, weight_changes

from mmaudit.audit.errors import ConfigError
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.balancing.agm import Agm, AgmConfig, clip_by_largest, modality_lead, shapley_weights
from mmaudit.train.balancing.balancer import Balancer
from mmaudit.train.batches import Batch, ModelReader
from mmaudit.train.config import OptimConfig
from mmaudit.train.network import FusionNet, ModelConfig, Outputs
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext, Optimization

torch.set_num_threads(1)
NO_READER: ModelReader = None  # type: ignore[assignment]  # nothing is read
AUTHORS = AgmConfig()
OURS = AgmConfig(absent="features", modulated="encoders", clip=0.0)


def build_method(
    name: str = "agm",
    *,
    fusion: str = "concat",
    modalities: int = 2,
    agm: AgmConfig = OURS,
    dropout: float = 0.0,
    distributed: DistributedContext = SINGLE_PROCESS,
) -> Balancer:
    """Build a method in epoch 1; a step of SGD at rate 1 changes a weight by minus its gradient."""
    torch.manual_seed(0)
    plan = ModelConfig(
        modalities=tuple("abc"[:modalities]),
        shapes=((4,), (5,), (6,))[:modalities],
        classes=("x", "y", "z"),
        fusion=fusion,
        hidden=8,
        dropout=dropout,
    )
    optimization = Optimization(
        FusionNet(plan),
        OptimConfig(optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant"),
        device="cpu",
        distributed=distributed,
    )
    optimization.begin_epoch(1, epochs=1)
    balancer: Balancer = BALANCERS.load(name)(optimization.net, optimization, agm, epochs=9)
    balancer.begin_epoch(1, NO_READER)
    return balancer


def build_agm(fusion: str = "concat", *, modalities: int = 2, agm: AgmConfig = OURS, dropout: float = 0.0) -> Agm:
    method = build_method(fusion=fusion, modalities=modalities, agm=agm, dropout=dropout)
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
    batch = make_batch(modalities=3)
    outputs = method.net(batch.inputs)
    responses = method.responses(outputs, batch)
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
    torch.testing.assert_close(method.responses(outputs, make_batch()), outputs.unimodal.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("agm", [AUTHORS, OURS])
def test_responses_change_neither_buffers_nor_mode(agm: AgmConfig) -> None:
    method = build_agm("mmtm", agm=agm)
    outputs = method.net(make_batch().inputs)
    before = {name: value.clone() for name, value in method.net.named_buffers()}
    method.responses(outputs, make_batch())
    assert all(torch.equal(value, before[name]) for name, value in method.net.named_buffers())
    assert all(module.training for module in method.net.modules())


def eval_logits(method: Agm, batch: Batch, absent: set[int]) -> Tensor:
    """Compute fused logits in eval mode on inputs of 0 for some modalities, with dropout off."""
    net = copy.deepcopy(method.net).eval()
    outputs: Outputs = net([x * 0 if j in absent else x for j, x in enumerate(batch.inputs)])
    return outputs.fused


@pytest.mark.parametrize("fusion", ["concat", "late", "gated", "film", "mmtm"])
def test_responses_of_zeroed_inputs_by_hand(fusion: str) -> None:
    """phi^a = (V(av) - V(v) + V(a)) / 2, V(av) of the training pass, the others in eval mode on inputs of 0."""
    method, batch = build_agm(fusion, agm=AUTHORS, dropout=0.5), make_batch()
    torch.manual_seed(3)
    outputs = method.net(batch.inputs)
    audio, visual = eval_logits(method, batch, {1}), eval_logits(method, batch, {0})
    expected = torch.stack([outputs.fused - visual + audio, outputs.fused - audio + visual]) / 2
    torch.testing.assert_close(method.responses(outputs, batch), expected, atol=1e-5, rtol=1e-4)
    assert (eval_logits(method, batch, set()) - outputs.fused).abs().max() > 0.01  # dropout is on in training
    by_features = build_agm(fusion, dropout=0.5)
    by_features.net.load_state_dict(method.net.state_dict())
    assert (by_features.responses(outputs, batch) - expected).abs().max() > 0.01


def test_missing_modality_has_features_of_0_in_every_set() -> None:
    """For the first three samples V(av) = V(a), and V(v) is the bias and the response of an input of 0 for audio."""
    method, batch = build_agm(agm=AUTHORS), make_batch()
    present = torch.ones(9, 2, dtype=torch.bool)
    present[:3, 1] = False
    masked = batch.with_modality_mask(present)
    outputs = method.net(masked.inputs, masked.present)
    features = method.net.encode(batch.inputs)
    blank = method.net.encoders[0](torch.zeros(3, 4))
    only_audio, only_visual = (method.net.classify([f, torch.zeros(3, 8)]).fused for f in (features[0][:3], blank))
    torch.testing.assert_close(method.responses(outputs, masked)[1, :3], only_visual / 2)
    torch.testing.assert_close(outputs.fused[:3], only_audio)


def authors_step(net: FusionNet, batch: Batch, usual: list[float], *, alpha: float) -> tuple[list[float], list[float]]:
    """Take a step as published for two modalities; set the gradients of `net`, return coefficients and scores.

    The gradient of the logits reaches phi^j times coefficient^j; then all are clipped to a norm of 1 where one of the
    classifier's exceeds 1.
    """
    net.zero_grad()
    audio, visual = batch.inputs
    total = net.train()((audio, visual)).fused
    net.eval()
    only_audio, only_visual = net((audio, visual * 0)).fused, net((audio * 0, visual)).fused
    net.train()
    phi = [(total - only_visual + only_audio) / 2, (total - only_audio + only_visual) / 2]
    scores = []
    for z in phi:
        p = z.detach().double().softmax(dim=1)[torch.arange(len(z)), batch.label]
        scores.append(float(-p.clamp(min=1e-8).log().mean()))
    coefficients = [
        math.exp(alpha * min(math.exp(usual[1 - j] - usual[j]) - math.exp(scores[1 - j] - scores[j]), 10))
        for j in range(2)
    ]
    gradient = (total.detach().softmax(dim=1) - torch.nn.functional.one_hot(batch.label, 3)) / len(total)
    torch.autograd.backward(phi, [coefficient * gradient for coefficient in coefficients])
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    if max(float(head.weight.grad.abs().max()) for head in net.fusion.heads) > 1:  # type: ignore[union-attr]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for g in gradients:
            g *= min(1, 1 / norm)
    return coefficients, scores


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_three_steps_equal_the_published_ones(scale: float) -> None:
    """Inputs of 8 times the size make the gradients so large that they are clipped."""
    method, clipped = build_method(agm=AgmConfig(alpha=0.7)), False
    reference, usual = copy.deepcopy(method.net), [0.0, 0.0]
    for step in range(3):
        batch = make_batch(seed=step)
        batch = replace(batch, inputs=tuple(scale * x for x in batch.inputs))
        if scale > 1:
            for net in (method.net, reference):
                net.fusion.heads[0].weight.data *= scale  # type: ignore[index, union-attr]
        reference.load_state_dict(method.net.state_dict())
        coefficients, scores = authors_step(reference, batch, usual, alpha=0.7)
        usual = [(old * step + new) / (step + 1) for old, new in zip(usual, scores, strict=True)]
        changes = weight_changes(method, batch)
        assert list(method.epoch_metrics().values()) == pytest.approx(coefficients, rel=1e-4)
        for name, parameter in reference.named_parameters():
            torch.testing.assert_close(changes[name], parameter.grad, atol=2e-6 * scale, rtol=1e-3)
        norm = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
        clipped |= norm == pytest.approx(1, abs=1e-3)
        assert max(abs(coefficient - 1) for coefficient in coefficients) > 0.003
    assert clipped is (scale > 1)


def test_window_is_epochs_1_to_20_by_default() -> None:
    for epoch, is_modulated in ((1, True), (20, True), (21, False)):
        plain, method = build_method("joint"), build_method(agm=AgmConfig(clip=0.0))
        method.begin_epoch(epoch, NO_READER)
        plain_changes, changes = weight_changes(plain, make_batch()), weight_changes(method, make_batch())
        same = all(torch.allclose(changes[name], change, atol=1e-6) for name, change in plain_changes.items())
        assert same is not is_modulated
        assert (list(method.epoch_metrics().values()) == [1.0, 1.0]) is not is_modulated


def test_scores_before_the_window_count_as_usual_ones() -> None:
    method = build_method(agm=AgmConfig(first_epoch=2))
    method.step(make_batch())
    assert list(method.epoch_metrics().values()) == [1.0, 1.0]
    assert method.state_dict()["steps"].tolist() == [1.0, 1.0]


def test_clipping_needs_a_large_gradient_of_the_classifier() -> None:
    gradients = [torch.tensor([3.0]), torch.tensor([4.0])]
    clip_by_largest(gradients, [torch.tensor([0.9, -1.0])], bound=1.0)
    assert [float(g) for g in gradients] == [3, 4]
    clip_by_largest(gradients, [torch.tensor([0.9, -1.1])], bound=1.0)
    assert [float(g) for g in gradients] == pytest.approx([0.6, 0.8])
    clip_by_largest(gradients, [torch.tensor([2.0])], bound=1.5)
    assert [float(g) for g in gradients] == pytest.approx([0.6, 0.8])  # shorter than the bound already


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"absent": "input"}, "balancing.agm.absent is 'input'; did you mean inputs"),
        ({"modulated": "all"}, "balancing.agm.modulated is 'all'; .*encoders"),
        ({"clip": -1.0}, "balancing.agm.clip is -1.0; it must be at least 0"),
        ({"first_epoch": 21}, "balancing.agm.first_epoch is 21, after last_epoch 20"),
    ],
)
def test_invalid_settings_raise(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AgmConfig(**options)


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
    plain, method = build_method("joint"), build_method(agm=replace(OURS, alpha=0.7))
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


def compare(method: Agm, features: tuple[Tensor, Tensor], batch: Batch) -> list[float]:
    """Return the coefficients where the encoders compute these features."""
    with mock.patch.object(method.net, "encode", return_value=features):
        method.step(batch)
    return list(method.epoch_metrics().values())


def test_modality_further_ahead_than_usual_is_slowed_and_the_other_sped_up() -> None:
    """Usual scores are equal; in this step the second modality's features are the class, those of the first 0."""
    method, batch = build_agm(), make_batch()
    method.load_state_dict({"epoch": 1, "mean": torch.ones(2), "steps": torch.ones(2), "coefficient": torch.ones(2)})
    method.net.fusion.heads[1].weight.data[:] = torch.eye(3, 8)  # type: ignore[index, union-attr]
    features = (torch.zeros(9, 8), 5.0 * torch.nn.functional.one_hot(batch.label, 8).float())
    behind_coefficient, ahead_coefficient = compare(method, features, batch)
    assert ahead_coefficient < 1 < behind_coefficient


def test_exponent_has_a_ceiling() -> None:
    """A usual lead of e^9 that is now absent: the exponent would be 8,102."""
    method = build_method(agm=replace(OURS, alpha=0.5))
    method.load_state_dict(
        {"epoch": 1, "mean": torch.tensor([0.0, 9.0]), "steps": torch.tensor([5.0, 5.0]), "coefficient": torch.ones(2)}
    )
    method.step(make_batch())
    assert method.epoch_metrics()["coefficient_a"] == pytest.approx(math.exp(5.0), rel=1e-4)


def test_probabilities_have_a_floor() -> None:
    method, batch = build_agm(), make_batch()
    method.net.fusion.heads[1].weight.data[:] = torch.eye(3, 8)  # type: ignore[index, union-attr]
    wrong_features = 1e4 * torch.nn.functional.one_hot((batch.label + 1) % 3, 8).float()
    compare(method, (torch.zeros(9, 8), wrong_features), batch)
    assert method.state_dict()["mean"].tolist() == pytest.approx([math.log(3), -math.log(1e-8)], rel=1e-5)


@pytest.mark.parametrize("agm", [AUTHORS, OURS])
def test_modality_absent_from_all_samples_is_not_compared(agm: AgmConfig) -> None:
    method, batch = build_method(agm=agm), make_batch()
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


@pytest.mark.parametrize("agm", [AUTHORS, OURS])
def test_two_processes_take_the_step_of_one(agm: AgmConfig) -> None:
    single = build_method(agm=agm)
    distributed = build_method(agm=agm, distributed=TwoEqualProcesses())
    for seed in (1, 2):
        expected = weight_changes(single, make_batch(copies=2, seed=seed))
        for name, step in weight_changes(distributed, make_batch(share=0.5, seed=seed)).items():
            torch.testing.assert_close(step, expected[name], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("agm", [AUTHORS, OURS])
def test_resumed_method_continues_exactly(agm: AgmConfig) -> None:
    original, resumed = build_method(agm=agm), build_method(agm=agm)
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
