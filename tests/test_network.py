"""Laws of the network: who is encoded, who is left as it is, and what it says of whom."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from training import cut_to

from mmaudit.train.config import FUSIONS
from mmaudit.train.network import FusionNet, ModelConfig, Outputs, cross_entropies, cross_entropy

torch.set_num_threads(1)

PLAN = ModelConfig(
    modalities=("audio", "visual", "text"), shapes=((5,), (3,), (4,)), classes=tuple("abcdef"), hidden=7, dropout=0.0
)
FILMED = replace(PLAN, modalities=("audio", "frames"), shapes=((5,), (2, 8, 8, 3)), width=0.05)


def net_of(plan: ModelConfig = PLAN, **options: Any) -> FusionNet:
    torch.manual_seed(0)
    net = FusionNet(replace(plan, **options))
    for name, parameter in net.named_parameters():  # biases start at 0, and a zero hides what is added to what
        if "trunk" not in name:
            nn.init.normal_(parameter, std=0.5)
    return net


def some(plan: ModelConfig = PLAN, rows: int = 11) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, int(torch.tensor(shape).prod()), generator=generator) for shape in plan.shapes]


def gradients(net: FusionNet, loss: Tensor) -> dict[str, Tensor | None]:
    found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return dict(zip(dict(net.named_parameters()), found, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("plan", [PLAN, FILMED], ids=["vectors", "pictures"])
def test_only_those_that_are_present_are_encoded(plan: ModelConfig) -> None:
    net, inputs, m = net_of(plan).eval(), some(plan), len(plan.shapes)
    present = torch.rand(11, m, generator=torch.Generator().manual_seed(3)) < 0.5
    present[:, 0] = True
    for j, features in enumerate(net.encode(cut_to(present, inputs), present)):
        rows = present[:, j]
        assert 0 < rows.sum() < 11 or j == 0
        torch.testing.assert_close(features[rows], net.encoders[j](inputs[j][rows]))
        assert (features[~rows] == 0).all()
        assert (features[rows] != 0).any()
    whole = net.encode(inputs, torch.ones(11, m, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(whole, net.encode(inputs), strict=True))


def test_an_encoder_learns_from_the_rows_that_are_there_alone() -> None:
    """In training: its gradients, and pictures' running means, are those of a batch of these rows."""
    for plan in (PLAN, FILMED):
        present = torch.ones(6, len(plan.shapes), dtype=torch.bool)
        present[2:4, 1] = False
        net, other, inputs = net_of(plan).train(), net_of(plan).train(), some(plan, rows=6)
        features = net.encode(cut_to(present, inputs), present)[1]
        expected = other.encoders[1](inputs[1][present[:, 1]])
        assert torch.equal(features[present[:, 1]], expected)
        mine, theirs = (gradients(each, f.square().sum()) for each, f in ((net, features), (other, expected)))
        for name, gradient in theirs.items():
            assert gradient is None or torch.allclose(mine[name], gradient, atol=1e-6)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(net.buffers(), other.buffers(), strict=True))


@torch.no_grad()
def test_a_modality_that_nobody_has_is_features_of_0() -> None:
    net, inputs = net_of(), some()
    present = torch.ones(11, 3, dtype=torch.bool)
    present[:, 2] = False
    outputs = net(cut_to(present, inputs), present, unimodal=False)
    assert torch.equal(outputs.features[2], torch.zeros(11, 7))
    assert torch.equal(outputs.fused, net.fused_logits(net.encode(inputs), [True, True, False]))


@torch.no_grad()
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_fused_answer_of_some_is_that_of_features_of_0(fusion: str) -> None:
    net, inputs = net_of(fusion=fusion).eval(), some()
    features = net.encode(inputs)
    present = torch.tensor([True, False, True]).expand(11, 3)
    assert torch.equal(net.fused_logits(features, [True, False, True]), net(inputs, present, unimodal=False).fused)
    assert torch.equal(net.fused_logits(features, [True] * 3), net(inputs, unimodal=False).fused)
    nobody = net.fused_logits(features, [False] * 3)
    torch.testing.assert_close(nobody, nobody[:1].expand(11, 6))


@pytest.mark.parametrize("plan", [PLAN, FILMED], ids=["vectors", "pictures"])
def test_a_fixed_encoder_stays_as_it_is(plan: ModelConfig) -> None:
    net, inputs = net_of(plan, dropout=0.5), some(plan)
    buffers = [buffer.clone() for buffer in net.encoders[1].buffers()]
    net.freeze_encoders([1])
    first, second = net(inputs).features, net(inputs).features  # at once, and dropout is for those in training
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])
    for _ in range(2):
        net.eval().train()
        loss = net(inputs).fused.square().mean()
        got = gradients_where_wanted(net, loss)
        assert all((name.startswith("encoders.1.")) is (grad is None) for name, grad in got.items())
    assert torch.equal(net(inputs).features[1], first[1])
    assert all(torch.equal(a, b) for a, b in zip(net.encoders[1].buffers(), buffers, strict=True))
    assert list(net.parameters_of(1)) == []
    assert len(list(net.parameters_of(0))) == 4


def gradients_where_wanted(net: FusionNet, loss: Tensor) -> dict[str, Tensor | None]:
    net.zero_grad()
    torch.autograd.backward(loss)
    return {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("own_heads", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_each_modality_has_a_say_of_its_own(fusion: str, own_heads: bool) -> None:
    """By the fused classifier's part where there is one, else or if asked for by a head beside it."""
    net, inputs = net_of(fusion=fusion, own_heads=own_heads).eval(), some()
    outputs = net(inputs)
    assert outputs.fused.shape == (11, 6)
    assert outputs.unimodal.shape == (3, 11, 6)
    assert net.has_own_heads is (own_heads or fusion in ("gated", "film"))
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
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_fused_answer_alone_is_the_same_answer(fusion: str, own_heads: bool) -> None:
    net, inputs = net_of(fusion=fusion, own_heads=own_heads).eval(), some()
    fused, whole = net(inputs, unimodal=False), net(inputs)
    torch.testing.assert_close(fused.fused, whole.fused, rtol=1e-4, atol=1e-5)
    names = [name for name, _ in net.named_parameters() if not name.startswith("heads")]  # those only listen
    one, other = (gradients(net, found.fused.square().sum()) for found in (fused, whole))
    assert {name: one[name] is None for name in names} == {name: other[name] is None for name in names}
    torch.testing.assert_close(*({name: each[name] for name in names} for each in (one, other)), rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="computed fused logits only"):
        _ = fused.unimodal


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_reach_every_parameter(fusion: str) -> None:
    net = net_of(fusion=fusion)
    fused, own = cross_entropies(net(some()), torch.arange(11) % 6)
    for name, grad in gradients(net, fused.mean() + own.mean()).items():
        assert grad is not None, name
        assert grad.abs().max() > 1e-7, name


@pytest.mark.parametrize("own_heads", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_parameters_of_a_modality_are_those_that_it_alone_uses(fusion: str, own_heads: bool) -> None:
    net = net_of(fusion=fusion, own_heads=own_heads)
    mine = [{id(parameter) for parameter in net.parameters_of(j)} for j in range(3)]
    assert all(not (mine[j] & mine[other]) for j in range(3) for other in range(j))
    outside = {id(parameter) for parameter in net.fusion.parameters()}
    assert mine[0] | mine[1] | mine[2] | outside == {id(parameter) for parameter in net.parameters()}
    assert not outside & (mine[0] | mine[1] | mine[2])
    own = torch.autograd.grad(net(some()).unimodal[1].square().sum(), list(net.parameters()), allow_unused=True)
    used = {id(p) for p, grad in zip(net.parameters(), own, strict=True) if grad is not None and grad.abs().max() > 0}
    assert used - outside == mine[1]


def test_dropout_is_for_training_alone() -> None:
    net, inputs = net_of(dropout=0.5), some()
    assert not torch.equal(net(inputs).fused, net(inputs).fused)
    net.eval()
    assert torch.equal(net(inputs).fused, net(inputs).fused)


def test_a_blueprint_goes_through_json() -> None:
    for plan in (PLAN, replace(FILMED, fusion="gated", own_heads=True, dropout=0.25)):
        told = json.loads(json.dumps(asdict(plan)))
        assert ModelConfig.of(told) == plan
        assert ModelConfig.of({**told, "since": "later"}) == plan
        for name in told:
            with pytest.raises(KeyError, match=name):
                ModelConfig.of({key: value for key, value in told.items() if key != name})


def test_the_same_blueprint_is_the_same_network() -> None:
    first, again = net_of(FILMED), FusionNet(FILMED)
    again.load_state_dict(first.state_dict())
    inputs = some(FILMED)
    assert torch.equal(first.eval()(inputs).fused, again.eval()(inputs).fused)
    assert first.num_modalities == 2


def test_confidence_is_the_probability_of_the_true_class() -> None:
    outputs, label = net_of()(some()), torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4])
    found = outputs.confidence(label)
    assert found.shape == (4, 11)
    assert not found.requires_grad
    for row in range(11):
        for place, logits in enumerate([outputs.fused, *outputs.unimodal]):
            shares = logits[row].exp() / logits[row].exp().sum()
            torch.testing.assert_close(found[place, row], shares[label[row]].detach(), rtol=1e-4, atol=1e-6)


def test_cross_entropies_are_minus_the_log_of_confidence() -> None:
    outputs, label = net_of()(some()), torch.arange(11) % 6
    fused, own = cross_entropies(outputs, label)
    torch.testing.assert_close(torch.cat([fused[None], own]).detach(), -outputs.confidence(label).log())
    half = Outputs(outputs.fused.bfloat16(), outputs.unimodal.bfloat16(), outputs.features)
    assert [each.dtype for each in cross_entropies(half, label)] == [torch.float32] * 2


@pytest.mark.parametrize("shape", [(11, 6), (3, 11, 6), (2, 3, 11, 6), (3, 0, 6)])
def test_cross_entropy_is_that_of_torch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits, label = 30 * torch.randn(shape, requires_grad=True), torch.arange(shape[-2]) % 6
    found = cross_entropy(logits, label)
    flat = logits.reshape(math.prod(shape[:-2]), *shape[-2:])
    expected = torch.stack([functional.cross_entropy(each, label, reduction="none") for each in flat]).view(shape[:-1])
    torch.testing.assert_close(found, expected)
    weight = torch.rand(shape[:-1])
    mine, theirs = (torch.autograd.grad((each * weight).sum(), logits)[0] for each in (found, expected))
    torch.testing.assert_close(mine, theirs)
