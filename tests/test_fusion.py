"""Laws of the fusion network: what the fused answer is made of, and what reaches each encoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmaudit.train.config import FUSIONS
from mmaudit.train.fusion import FusionNet

torch.set_num_threads(1)

DIMS = (5, 3, 4)


def net_and_batch(fusion: str, *, dims: tuple[int, ...] = DIMS, dropout: float = 0.0) -> tuple[FusionNet, list[Tensor]]:
    torch.manual_seed(0)
    net = FusionNet(dims=dims, num_classes=6, hidden=7, dropout=dropout, fusion=fusion)
    for parameter in net.parameters():  # biases start at 0, and a zero hides what is added to what
        nn.init.normal_(parameter, std=0.5)
    inputs = [3 * torch.randn(11, dim) + 2 for dim in dims]
    net.standardise_by(inputs)
    return net, inputs


def encoded(net: FusionNet, inputs: list[Tensor]) -> list[Tensor]:
    """Compute each f_j from the state dict alone."""
    state, found = net.state_dict(), []
    for index, rows in enumerate(inputs):
        standard = (rows - state[f"mean_{index}"]) / state[f"scale_{index}"]
        weight, bias = (state[f"encoders.{index}.0.{name}"] for name in ("weight", "bias"))
        hidden = standard @ weight.T + bias
        centred = hidden - hidden.mean(dim=1, keepdim=True)
        normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        scale, shift = (state[f"encoders.{index}.1.{name}"] for name in ("weight", "bias"))
        found.append((normed * scale + shift).clamp(min=0))
    return found


@pytest.mark.parametrize("dims", [(5, 3), DIMS])
def test_concat_is_one_linear_classifier_of_the_joined_features(dims: tuple[int, ...]) -> None:
    net, inputs = net_and_batch("concat", dims=dims)
    state = net.state_dict()
    joined = torch.cat(encoded(net, inputs), dim=1)
    weight = torch.cat([state[f"heads.{index}.weight"] for index in range(len(dims))], dim=1)
    outputs = net(inputs)
    torch.testing.assert_close(outputs.fused, joined @ weight.T + state["bias"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.unimodal.sum(dim=0), outputs.fused)
    for index, features in enumerate(encoded(net, inputs)):
        alone = features @ state[f"heads.{index}.weight"].T + state["bias"] / len(dims)
        torch.testing.assert_close(outputs.unimodal[index], alone, rtol=1e-4, atol=1e-5)


def test_late_is_the_mean_of_classifiers() -> None:
    net, inputs = net_and_batch("late")
    state, outputs = net.state_dict(), net(inputs)
    torch.testing.assert_close(outputs.unimodal.mean(dim=0), outputs.fused)
    for index, features in enumerate(encoded(net, inputs)):
        alone = features @ state[f"heads.{index}.weight"].T + state[f"heads.{index}.bias"]
        torch.testing.assert_close(outputs.unimodal[index], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_reach_every_parameter(fusion: str) -> None:
    net, inputs = net_and_batch(fusion)
    torch.autograd.backward(net.loss(net(inputs), torch.arange(11) % 6, torch.ones(11)))
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_branch_hears_its_own_modality_alone(fusion: str) -> None:
    net, inputs = net_and_batch(fusion)
    before, after = net(inputs), net([inputs[0], inputs[1] + 1, inputs[2]])
    moved = [(before.unimodal[index] - after.unimodal[index]).abs().max().item() for index in range(3)]
    assert moved[0] == moved[2] == 0
    assert moved[1] > 0.01
    assert (before.fused - after.fused).abs().max() > 0.01


def test_standardisation_is_that_of_the_rows_given() -> None:
    net, _ = net_and_batch("concat", dims=(5, 3))
    rows = [torch.randn(50, 5) * 4 - 7, torch.randn(50, 3)]
    rows[0][:, 2] = 9.0  # constant
    net.standardise_by(rows)
    for index, matrix in enumerate(rows):
        state = net.state_dict()
        standard = (matrix - state[f"mean_{index}"]) / state[f"scale_{index}"]
        varying = [column for column in range(matrix.shape[1]) if (index, column) != (0, 2)]
        torch.testing.assert_close(standard.mean(dim=0), torch.zeros(matrix.shape[1]), rtol=0, atol=1e-5)
        expected = torch.ones(len(varying))
        torch.testing.assert_close(standard.std(dim=0, unbiased=False)[varying], expected, rtol=0, atol=1e-5)
    assert net.state_dict()["scale_0"][2] == 1
    outputs = net([matrix[:4] for matrix in rows])
    assert outputs.fused.isfinite().all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_missing_modality_is_taken_for_the_mean_of_those_it_was_trained_on(fusion: str) -> None:
    net, inputs = net_and_batch(fusion)
    holed = [rows.clone() for rows in inputs]
    holed[0][3] = holed[2][5] = torch.nan
    net.standardise_by(holed)
    state = net.state_dict()
    there = [torch.cat([inputs[0][:3], inputs[0][4:]]), inputs[1], torch.cat([inputs[2][:5], inputs[2][6:]])]
    for index, rows in enumerate(there):
        torch.testing.assert_close(state[f"mean_{index}"], rows.mean(dim=0))
        torch.testing.assert_close(state[f"scale_{index}"], rows.std(dim=0, unbiased=False))
    filled = [rows.clone() for rows in inputs]
    filled[0][3], filled[2][5] = there[0].mean(dim=0), there[2].mean(dim=0)
    found, expected = net(holed), net(filled)
    torch.testing.assert_close(found.fused, expected.fused, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.unimodal, expected.unimodal, rtol=1e-4, atol=1e-5)
    assert (found.fused[3] - net(inputs).fused[3]).abs().max() > 0.01
    torch.autograd.backward(net.loss(found, torch.arange(11) % 6, torch.ones(11)))
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("fusion", FUSIONS)
def test_scale_and_shift_of_a_modality_change_nothing(fusion: str) -> None:
    net, inputs = net_and_batch(fusion)
    before = net(inputs)
    scaled = [10 * inputs[0] - 3, *inputs[1:]]
    net.standardise_by(scaled)
    torch.testing.assert_close(net(scaled).unimodal, before.unimodal, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_loss_is_a_weighted_mean_of_cross_entropies(fusion: str) -> None:
    net, inputs = net_and_batch(fusion)
    with torch.no_grad():
        outputs = net(inputs)
    label = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4])
    weight = torch.rand(11) + 0.1
    parts = [outputs.fused] if fusion == "concat" else [outputs.fused, *outputs.unimodal]
    each = [
        sum(float(part[row].logsumexp(0) - part[row, label[row]]) for part in parts) / len(parts) for row in range(11)
    ]
    expected = sum(float(weight[row]) * each[row] for row in range(11)) / float(weight.sum())
    assert net.loss(outputs, label, weight).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_sample_of_no_weight_is_not_there(fusion: str) -> None:
    net, inputs = net_and_batch(fusion)
    label, weight = torch.arange(11) % 6, torch.ones(11)
    weight[4:] = 0
    few = net.loss(net([rows[:4] for rows in inputs]), label[:4], torch.ones(4))
    assert net.loss(net(inputs), label, weight).item() == pytest.approx(few.item(), rel=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_dropout_is_for_training_alone(fusion: str) -> None:
    net, inputs = net_and_batch(fusion, dropout=0.5)
    assert not torch.equal(net(inputs).fused, net(inputs).fused)
    net.eval()
    assert torch.equal(net(inputs).fused, net(inputs).fused)
