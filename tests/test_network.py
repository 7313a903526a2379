"""Tests of the network: masked encoding, frozen encoders, unimodal logits and cross entropy."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from training import select_rows

from mmaudit.train import FUSIONS
from mmaudit.train.network import (
    FusionNet,
    ModelConfig,
    Outputs,
    correct_by_set,
    cross_entropy,
    separate_losses,
)
from mmaudit.train.network_encoders import initialise_xavier

torch.set_num_threads(1)

OF_FEATURES = [name for name in FUSIONS if not FUSIONS.load(name).encodes_jointly]  # see test_cross_modal

VECTORS_CONFIG = ModelConfig(
    modalities=("audio", "visual", "text"), shapes=((5,), (3,), (4,)), classes=tuple("abcdef"), hidden=7, dropout=0.0
)
FRAMES_CONFIG = replace(VECTORS_CONFIG, modalities=("audio", "frames"), shapes=((5,), (2, 8, 8, 3)), width=0.05)


def build_net(config: ModelConfig = VECTORS_CONFIG, **options: Any) -> FusionNet:
    torch.manual_seed(0)
    net = FusionNet(replace(config, **options))
    for name, parameter in net.named_parameters():  # biases start at 0, which would hide errors in sums
        if "trunk" not in name:
            nn.init.normal_(parameter, std=0.5)
    return net


def random_inputs(config: ModelConfig = VECTORS_CONFIG, rows: int = 11) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, int(torch.tensor(shape).prod()), generator=generator) for shape in config.shapes]


def gradients(net: FusionNet, loss: Tensor) -> dict[str, Tensor | None]:
    grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return dict(zip(dict(net.named_parameters()), grads, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("config", [VECTORS_CONFIG, FRAMES_CONFIG], ids=["vectors", "pictures"])
def test_only_used_rows_are_encoded(config: ModelConfig) -> None:
    net, inputs, m = build_net(config).eval(), random_inputs(config), len(config.shapes)
    modality_mask = torch.rand(11, m, generator=torch.Generator().manual_seed(3)) < 0.5
    modality_mask[:, 0] = True
    for j, features in enumerate(net.encode(select_rows(modality_mask, inputs), modality_mask)):
        rows = modality_mask[:, j]
        assert 0 < rows.sum() < 11 or j == 0
        torch.testing.assert_close(features[rows], net.encoders[j](inputs[j][rows]))
        assert (features[~rows] == 0).all()
        assert (features[rows] != 0).any()
    all_used = net.encode(inputs, torch.ones(11, m, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(all_used, net.encode(inputs), strict=True))


def test_encoder_trains_on_used_rows_only() -> None:
    """In training its gradients, and the running means of pictures, are those of a batch of these rows."""
    for config in (VECTORS_CONFIG, FRAMES_CONFIG):
        modality_mask = torch.ones(6, len(config.shapes), dtype=torch.bool)
        modality_mask[2:4, 1] = False
        net, reference, inputs = build_net(config).train(), build_net(config).train(), random_inputs(config, rows=6)
        features = net.encode(select_rows(modality_mask, inputs), modality_mask)[1]
        expected = reference.encoders[1](inputs[1][modality_mask[:, 1]])
        assert torch.equal(features[modality_mask[:, 1]], expected)
        masked_gradients, expected_gradients = (
            gradients(network, f.square().sum()) for network, f in ((net, features), (reference, expected))
        )
        for name, gradient in expected_gradients.items():
            assert gradient is None or torch.allclose(masked_gradients[name], gradient, atol=1e-6)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(net.buffers(), reference.buffers(), strict=True))


@torch.no_grad()
def test_absent_modality_has_features_of_0() -> None:
    net, inputs = build_net(), random_inputs()
    modality_mask = torch.ones(11, 3, dtype=torch.bool)
    modality_mask[:, 2] = False
    outputs = net(select_rows(modality_mask, inputs), modality_mask, unimodal=False)
    assert torch.equal(outputs.features[2], torch.zeros(11, 7))
    assert torch.equal(outputs.fused, net.fused_logits(net.encode(inputs), [True, True, False]))


@torch.no_grad()
@pytest.mark.parametrize("fusion", OF_FEATURES)
def test_fused_logits_of_a_set_use_features_of_0(fusion: str) -> None:
    net, inputs = build_net(fusion=fusion).eval(), random_inputs()
    features = net.encode(inputs)
    modality_mask = torch.tensor([True, False, True]).expand(11, 3)
    assert torch.equal(
        net.fused_logits(features, [True, False, True]), net(inputs, modality_mask, unimodal=False).fused
    )
    assert torch.equal(net.fused_logits(features, [True] * 3), net(inputs, unimodal=False).fused)
    none = net.fused_logits(features, [False] * 3)
    torch.testing.assert_close(none, none[:1].expand(11, 6))


@pytest.mark.parametrize("config", [VECTORS_CONFIG, FRAMES_CONFIG], ids=["vectors", "pictures"])
def test_frozen_encoder_does_not_change(config: ModelConfig) -> None:
    net, inputs = build_net(config, dropout=0.5), random_inputs(config)
    buffers = [buffer.clone() for buffer in net.encoders[1].buffers()]
    net.freeze_encoders([1])
    first, second = net(inputs).features, net(inputs).features  # dropout is off in a frozen encoder at once
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])
    for _ in range(2):
        net.eval().train()
        loss = net(inputs).fused.square().mean()
        grads = trainable_gradients(net, loss)
        assert all((name.startswith("encoders.1.")) is (grad is None) for name, grad in grads.items())
    assert torch.equal(net(inputs).features[1], first[1])
    assert all(torch.equal(a, b) for a, b in zip(net.encoders[1].buffers(), buffers, strict=True))
    assert list(net.parameters_of(1)) == []
    assert len(list(net.parameters_of(0))) == 4


def trainable_gradients(net: FusionNet, loss: Tensor) -> dict[str, Tensor | None]:
    net.zero_grad()
    torch.autograd.backward(loss)
    return {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("own_heads", [False, True])
@pytest.mark.parametrize("fusion", OF_FEATURES)
def test_each_modality_has_a_say_of_its_own(fusion: str, own_heads: bool) -> None:
    """By the fused classifier's part where there is one, else or if asked for by a head beside it."""
    net, inputs = build_net(fusion=fusion, own_heads=own_heads).eval(), random_inputs()
    outputs = net(inputs)
    assert outputs.fused.shape == (11, 6)
    assert outputs.unimodal.shape == (3, 11, 6)
    assert net.has_own_heads is (own_heads or fusion.startswith(("gated", "film")))
    if net.has_own_heads:
        w = net.state_dict()
        for j, f in enumerate(outputs.features):
            expected = f @ w[f"heads.{j}.weight"].T + w[f"heads.{j}.bias"]
            torch.testing.assert_close(outputs.unimodal[j], expected, rtol=1e-5, atol=1e-5)
    else:
        assert len(net.heads) == 0
        assert torch.equal(outputs.unimodal, net.fusion.unimodal_logits(outputs.features))
    changed = net([inputs[0], inputs[1] + 1, inputs[2]])
    moved = (changed.unimodal - outputs.unimodal).abs().amax(dim=(1, 2))
    assert moved[0] == moved[2] == 0
    assert moved[1] > 0.01
    assert (changed.fused - outputs.fused).abs().max() > 1e-3


@pytest.mark.parametrize("own_heads", [False, True])
@pytest.mark.parametrize("fusion", OF_FEATURES)
def test_fused_logits_alone_equal_those_with_unimodal_logits(fusion: str, own_heads: bool) -> None:
    net, inputs = build_net(fusion=fusion, own_heads=own_heads).eval(), random_inputs()
    fused, full = net(inputs, unimodal=False), net(inputs)
    torch.testing.assert_close(fused.fused, full.fused, rtol=1e-4, atol=1e-5)
    names = [name for name, _ in net.named_parameters() if not name.startswith("heads")]  # not in fused logits
    fused_gradients, full_gradients = (gradients(net, outputs.fused.square().sum()) for outputs in (fused, full))
    assert {name: fused_gradients[name] is None for name in names} == {
        name: full_gradients[name] is None for name in names
    }
    torch.testing.assert_close(
        *({name: grads[name] for name in names} for grads in (fused_gradients, full_gradients)), rtol=1e-3, atol=1e-3
    )
    with pytest.raises(RuntimeError, match="computed fused logits only"):
        _ = fused.unimodal


@pytest.mark.parametrize("fusion", OF_FEATURES)
def test_gradients_reach_every_parameter(fusion: str) -> None:
    net = build_net(fusion=fusion)
    fused, unimodal = separate_losses(net(random_inputs()), torch.arange(11) % 6)
    for name, grad in gradients(net, fused.mean() + unimodal.mean()).items():
        assert grad is not None, name
        assert grad.abs().max() > 1e-7, name


@pytest.mark.parametrize("own_heads", [False, True])
@pytest.mark.parametrize("fusion", OF_FEATURES)
def test_parameters_of_are_those_only_that_modality_uses(fusion: str, own_heads: bool) -> None:
    net = build_net(fusion=fusion, own_heads=own_heads)
    own_parameters = [{id(parameter) for parameter in net.parameters_of(j)} for j in range(3)]
    assert all(not (own_parameters[j] & own_parameters[second]) for j in range(3) for second in range(j))
    shared = {id(parameter) for parameter in net.fusion.parameters()}
    assert own_parameters[0] | own_parameters[1] | own_parameters[2] | shared == {
        id(parameter) for parameter in net.parameters()
    }
    assert not shared & (own_parameters[0] | own_parameters[1] | own_parameters[2])
    grads = torch.autograd.grad(
        net(random_inputs()).unimodal[1].square().sum(), list(net.parameters()), allow_unused=True
    )
    used = {id(p) for p, grad in zip(net.parameters(), grads, strict=True) if grad is not None and grad.abs().max() > 0}
    assert used - shared == own_parameters[1]


def test_dropout_is_active_in_training_only() -> None:
    net, inputs = build_net(dropout=0.5), random_inputs()
    assert not torch.equal(net(inputs).fused, net(inputs).fused)
    net.eval()
    assert torch.equal(net(inputs).fused, net(inputs).fused)


def test_model_config_round_trips_through_json() -> None:
    for config in (VECTORS_CONFIG, replace(FRAMES_CONFIG, fusion="gated", own_heads=True, dropout=0.25)):
        plain = json.loads(json.dumps(asdict(config)))
        assert ModelConfig.of(plain) == config
        assert ModelConfig.of({**plain, "since": "later"}) == config
        for name in plain:
            with pytest.raises(KeyError, match=name):
                ModelConfig.of({key: value for key, value in plain.items() if key != name})


def test_same_config_builds_the_same_network() -> None:
    first, second = build_net(FRAMES_CONFIG), FusionNet(FRAMES_CONFIG)
    second.load_state_dict(first.state_dict())
    inputs = random_inputs(FRAMES_CONFIG)
    assert torch.equal(first.eval()(inputs).fused, second.eval()(inputs).fused)
    assert first.num_modalities == 2


def test_confidence_is_the_probability_of_the_true_class() -> None:
    outputs, label = build_net()(random_inputs()), torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4])
    confidence = outputs.confidence(label)
    assert confidence.shape == (4, 11)
    assert not confidence.requires_grad
    for row in range(11):
        for branch, logits in enumerate([outputs.fused, *outputs.unimodal]):
            shares = logits[row].exp() / logits[row].exp().sum()
            torch.testing.assert_close(confidence[branch, row], shares[label[row]].detach(), rtol=1e-4, atol=1e-6)


def test_cross_entropies_are_minus_log_confidence() -> None:
    outputs, label = build_net()(random_inputs()), torch.arange(11) % 6
    fused, unimodal = separate_losses(outputs, label)
    torch.testing.assert_close(torch.cat([fused[None], unimodal]).detach(), -outputs.confidence(label).log())
    half = Outputs(outputs.fused.bfloat16(), outputs.unimodal.bfloat16(), outputs.features)
    assert [losses.dtype for losses in separate_losses(half, label)] == [torch.float32] * 2


@pytest.mark.parametrize("shape", [(11, 6), (3, 11, 6), (2, 3, 11, 6), (3, 0, 6)])
def test_cross_entropy_equals_torch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits, label = 30 * torch.randn(shape, requires_grad=True), torch.arange(shape[-2]) % 6
    losses = cross_entropy(logits, label)
    flat = logits.reshape(math.prod(shape[:-2]), *shape[-2:])
    expected = torch.stack(
        [functional.cross_entropy(branch_logits, label, reduction="none") for branch_logits in flat]
    ).view(shape[:-1])
    torch.testing.assert_close(losses, expected)
    weight = torch.rand(shape[:-1])
    gradient, expected_gradient = (
        torch.autograd.grad((branch_logits * weight).sum(), logits)[0] for branch_logits in (losses, expected)
    )
    torch.testing.assert_close(gradient, expected_gradient)


def test_xavier_initialisation_has_the_published_variances_and_no_bias() -> None:
    torch.manual_seed(0)
    linear, convolution = nn.Linear(400, 200), nn.Conv2d(16, 64, kernel_size=3)
    normalisation = nn.BatchNorm2d(8)
    nn.init.constant_(normalisation.weight, 3)
    for layer in (linear, convolution, normalisation):
        initialise_xavier(layer)
    assert linear.weight.var().item() == pytest.approx(2 / (400 + 200), rel=0.05)  # Xavier
    assert convolution.weight.var().item() == pytest.approx(2 / (64 * 9), rel=0.05)  # He, fan out
    assert not linear.bias.any()
    assert (normalisation.weight == 1).all()


def output_net(task: str, *, classes: tuple[str, ...] = ("x", "y"), loss: str = "l1") -> FusionNet:
    config = ModelConfig(
        modalities=("a", "b"), shapes=((3,), (3,)), classes=classes, task=task, regression_loss=loss, own_heads=True
    )
    return FusionNet(config)


def test_loss_of_label_sets_is_the_mean_binary_cross_entropy() -> None:
    logits, target = torch.tensor([[0.5, -2.0], [1.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    p = torch.sigmoid(logits)
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).mean(dim=1)
    net = output_net("multilabel")
    torch.testing.assert_close(net.loss_of(logits, target), expected)
    torch.testing.assert_close(net.loss_of(torch.stack([logits, -logits]), target)[0], expected)
    torch.testing.assert_close(net.predict(logits), p)
    outputs = Outputs(logits, logits[None], (), net.loss_of)
    likelihood = torch.where(target > 0, p, 1 - p).prod(dim=1).sqrt()  # geometric mean of two labels
    torch.testing.assert_close(outputs.confidence(target)[0], likelihood)


@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_loss_of_numbers_is_the_error_in_standard_deviations(loss: str) -> None:
    net = output_net("regression", classes=("number",), loss=loss)
    target = torch.tensor([[10.0], [14.0], [18.0]])
    net.standardise_target(target)
    logits, scale = torch.tensor([[0.5], [-1.0], [2.0]]), math.sqrt(32 / 3)
    predicted = logits * scale + 14
    torch.testing.assert_close(net.predict(logits), predicted)
    error = ((predicted - target) / scale).squeeze(1)
    torch.testing.assert_close(net.loss_of(logits, target), error.abs() if loss == "l1" else error**2)
    assert {"target_mean", "target_scale"} <= net.state_dict().keys()
    assert not {"target_mean", "target_scale"} & output_net("classification").state_dict().keys()


def test_constant_target_keeps_its_scale() -> None:
    net = output_net("regression", classes=("number",))
    net.standardise_target(torch.full((5, 1), 0.1))
    assert float(net.target_scale) == 1.0


def test_values_of_sets_follow_the_task() -> None:
    inputs = tuple(torch.randn(6, 3) for _ in range(2))
    for task, target in (("multilabel", (torch.rand(6, 2) > 0.5).float()), ("regression", torch.randn(6, 1))):
        net = output_net(task, classes=("x", "y")[: target.shape[1]]).eval()
        outputs = net(inputs)
        values = correct_by_set(net, [frozenset({0, 1})])(outputs, target)[0]
        if task == "multilabel":
            expected = ((outputs.fused > 0) == (target > 0)).float().mean(dim=1)
        else:
            expected = -(outputs.fused - target).abs().squeeze(1)
        torch.testing.assert_close(values, expected)
