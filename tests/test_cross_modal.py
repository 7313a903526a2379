"""Tests of the cross-modal path within two ResNets: its formula by hand, its cut, and samples without a modality."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from training import draw_batch, select_rows

from mmaudit.audit.errors import ConfigError
from mmaudit.train.balancing.greedy import Greedy, GreedyConfig
from mmaudit.train.batches import ModelReader
from mmaudit.train.config import FinetuneConfig, OptimConfig, TrainConfig
from mmaudit.train.cross_modal import MmtmStages
from mmaudit.train.methods import resolve
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.network_encoders import PictureEncoder
from mmaudit.train.optimizer import SINGLE_PROCESS, Optimization

torch.set_num_threads(1)

CONFIG = ModelConfig(
    modalities=("audio", "visual"),
    shapes=((32, 24), (2, 32, 32, 3)),  # a spectrogram, and two frames
    classes=("a", "b", "c"),
    fusion="mmtm-stages",
    hidden=6,
    dropout=0.0,
    width=0.0625,  # 4, 8, 16 and 32 maps
)
SIZES = (32 * 24, 2 * 32 * 32 * 3)


def build_net(config: ModelConfig = CONFIG) -> tuple[FusionNet, MmtmStages]:
    torch.manual_seed(0)
    net = FusionNet(config)
    fusion = net.fusion
    assert isinstance(fusion, MmtmStages)
    for parameter in fusion.parameters():  # biases start at 0, which would hide errors in sums
        nn.init.normal_(parameter, std=0.3)
    nn.init.uniform_(fusion.mean)
    return net, fusion


def random_inputs(rows: int = 6, *, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, size, generator=generator) for size in SIZES]


def branches_by_hand(net: FusionNet, inputs: list[Tensor], *, alone: tuple[int, ...] = ()) -> list[Tensor]:
    """Compute the branches' logits stage by stage; `alone`: modalities that use the mean excitations."""
    w, maps, stages = net.state_dict(), list[Tensor](), list[Any]()
    frames, rows, start = (1, 2), len(inputs[0]), 0
    for encoder, modality_rows in zip(net.encoders, inputs, strict=True):
        assert isinstance(encoder, PictureEncoder)
        trunk: Any = encoder.trunk
        flat = ((encoder.pictures(modality_rows) - trunk.mean) / trunk.scale).flatten(0, 1)
        stages.append(trunk.resnet.encoder.stages)
        maps.append(stages[-1][0](trunk.resnet.embedder(flat)))
    for block in range(3):
        maps = [stages[j][block + 1](m) for j, m in enumerate(maps)]
        means = [
            torch.stack([m.mean(dim=(2, 3)).view(rows, f, -1)[:, frame] for frame in range(f)]).mean(dim=0)
            for m, f in zip(maps, frames, strict=True)
        ]
        name = f"fusion.blocks.{block}"
        squeezed = torch.cat(means, dim=1) @ w[f"{name}.squeeze.weight"].T + w[f"{name}.squeeze.bias"]
        assert squeezed.shape[1] == (8, 16, 32)[block]  # half of the maps of both
        for j, m in enumerate(maps):
            excitation = 1 / (
                1 + (-(squeezed.relu() @ w[f"{name}.excite.{j}.weight"].T + w[f"{name}.excite.{j}.bias"])).exp()
            )
            if j in alone:
                excitation = w["fusion.mean"][start : start + m.shape[1]].expand(rows, -1)
            start += m.shape[1]
            maps[j] = m * excitation.repeat_interleave(frames[j], dim=0)[:, :, None, None]
    assert start == len(w["fusion.mean"])
    features = [m.mean(dim=(2, 3)).view(len(inputs[0]), f, -1).mean(dim=1) for m, f in zip(maps, frames, strict=True)]
    return [f @ w[f"fusion.heads.{j}.weight"].T + w[f"fusion.heads.{j}.bias"] for j, f in enumerate(features)]


@torch.no_grad()
def test_logits_follow_the_formula() -> None:
    net, _ = build_net()
    outputs, branches = net.eval()(random_inputs()), branches_by_hand(net, random_inputs())
    torch.testing.assert_close(outputs.fused, (branches[0] + branches[1]) / 2, rtol=1e-4, atol=1e-5)
    alone = torch.stack(branches_by_hand(net, random_inputs(), alone=(0, 1)))
    torch.testing.assert_close(outputs.unimodal, alone, rtol=1e-4, atol=1e-5)
    assert (torch.stack(branches) - alone).abs().max() > 0.01


@torch.no_grad()
def test_training_counts_the_mean_of_every_excitation() -> None:
    net, fusion = build_net()
    net.train()
    steps, excitations = list[Tensor](), list[Tensor]()
    for block in fusion.blocks:
        block.register_forward_hook(lambda *args: excitations.extend(e.mean(dim=0) for e in args[2]))
    for step in range(3):
        excitations.clear()
        net.encode(random_inputs(seed=step))
        steps.append(torch.cat(excitations))
        torch.testing.assert_close(fusion.mean, torch.stack(steps).mean(dim=0), rtol=1e-5, atol=1e-6)
    before = fusion.mean.clone()
    net.eval().encode(random_inputs())
    assert torch.equal(fusion.mean, before)


@pytest.mark.parametrize("cut", [0, 1])
def test_cut_branch_is_that_of_its_modality_alone(cut: int) -> None:
    """No gradient reaches its excitations nor the other encoder, and the other's input does not change it."""
    net, fusion = build_net()
    net.train()
    fusion.cut[cut] = True
    branch = fusion.branch_logits(net.encode(random_inputs()))[cut]
    torch.autograd.backward(functional.cross_entropy(branch, torch.arange(6) % 3))
    for name, parameter in net.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient is name.startswith((f"encoders.{cut}.", f"fusion.heads.{cut}.")), name


@torch.no_grad()
@pytest.mark.parametrize("absent", [0, 1])
def test_sample_without_a_modality_does_not_use_it(absent: int) -> None:
    """In the data or in an evaluation without it: the other branch is that of its modality alone."""
    net, fusion = build_net()
    net.eval()
    inputs, other = random_inputs(), 1 - absent
    features = net.encode(inputs)
    alone, bias = branches_by_hand(net, inputs, alone=(0, 1))[other], fusion.state_dict()[f"heads.{absent}.bias"]
    used = [j != absent for j in range(2)]
    torch.testing.assert_close(net.fused_logits(features, used), (alone + bias) / 2, rtol=1e-4, atol=1e-5)
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[2:5, absent] = False
    outputs = net(select_rows(mask, inputs), mask)
    complete = net(inputs).fused
    expected = torch.where(mask.all(dim=1)[:, None], complete, (alone + bias) / 2)
    torch.testing.assert_close(outputs.fused, expected, rtol=1e-4, atol=1e-5)
    mask[:, absent] = False
    torch.testing.assert_close(net(select_rows(mask, inputs), mask).fused, (alone + bias) / 2, rtol=1e-4, atol=1e-5)


def test_training_without_a_modality_moves_no_parameter_of_it() -> None:
    net, _ = build_net()
    net.train()
    mask = torch.tensor([[True, False]] * 6)
    torch.autograd.backward(net(select_rows(mask, random_inputs()), mask, unimodal=False).fused.sum())
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert all(gradients[name] is None for name in gradients if name.startswith("encoders.1."))
    assert all(gradients[name] is not None for name in gradients if name.startswith("encoders.0."))


def test_batch_of_one_picture_uses_the_running_means() -> None:
    net, _ = build_net()
    net.train()
    audio = net.encoders[0]
    before = [buffer.clone() for buffer in audio.buffers()]
    net.encode(random_inputs(1))
    assert all(torch.equal(a, b) for a, b in zip(audio.buffers(), before, strict=True))
    assert all(module.training for module in net.modules())


def build_greedy(**constants: float) -> Greedy:
    net, _ = build_net()
    optim = OptimConfig(precision="float32", optimizer="sgd", lr=0.01, momentum=0.0, weight_decay=0.0)
    config = GreedyConfig(**{"alpha": 0.0, "window": 1, "first_epoch": 1} | constants)  # type: ignore[arg-type]
    balancer = Greedy(net, Optimization(net, optim, device="cpu", distributed=SINGLE_PROCESS), config, epochs=2)
    no_reader: ModelReader = None  # type: ignore[assignment]  # nothing is read
    balancer.begin_epoch(1, no_reader)
    return balancer


def test_greedy_trains_by_ordinary_and_rebalancing_steps() -> None:
    """The speeds of a step are those of all blocks, and a rebalancing step moves no excitation of the slow modality."""
    balancer = build_greedy()
    batch = draw_batch([0, 1, 2, 1, 0, 0], sizes=SIZES)
    net = copy.deepcopy(balancer.net)
    assert isinstance(net.fusion, MmtmStages)
    branches = net.fusion.branch_logits(net.encode(batch.inputs))
    torch.autograd.backward(sum(functional.cross_entropy(z, batch.label) for z in branches))  # type: ignore[arg-type]
    gradients = {name: (p.grad, p.detach()) for name, p in net.named_parameters()}
    blocks = [f"fusion.blocks.{block}" for block in range(3)]
    for row, own in enumerate(("cross", "own")):
        for j in range(2):
            prefixes = [f"encoders.{j}.", f"fusion.heads.{j}."]
            if own == "cross":
                prefixes = [f"{block}.{part}." for block in blocks for part in ("squeeze", f"excite.{j}")]
            parts = [pair for name, pair in gradients.items() if name.startswith(tuple(prefixes))]
            moved = sum(float(grad.square().sum()) for grad, _ in parts if grad is not None)
            expected = moved / sum(float(p.square().sum()) for _, p in parts)
            if row == 0 and j == 0:
                balancer.step(batch)
            assert float(balancer.state_dict()["total"][row, j]) == pytest.approx(expected, rel=1e-3)
    slow = int(balancer.state_dict()["slow"])
    assert balancer.state_dict()["steps_left"] == 1
    before = copy.deepcopy(dict(balancer.net.named_parameters()))
    balancer.step(batch)
    for name, parameter in balancer.net.named_parameters():
        assert torch.equal(parameter, before[name]) is (f".excite.{slow}." in name), name
    assert balancer.epoch_metrics()["rebalanced"] == 1


def test_resumed_greedy_continues_exactly() -> None:
    first, second = build_greedy(), build_greedy()
    batch = draw_batch([0, 1, 2, 1, 0, 0], sizes=SIZES)
    first.step(batch)
    second.net.load_state_dict(first.net.state_dict())
    second.load_state_dict(first.state_dict())
    for balancer in (first, second):
        balancer.step(batch)
    for a, b in zip(first.net.state_dict().values(), second.net.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_vectors_and_own_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a modality has none: score with data\.encoder=NAME=resnet18 for each"):
        FusionNet(replace(CONFIG, shapes=((5,), (32, 32, 3))))
    settings = FinetuneConfig(fusion="mmtm-stages", own_heads=True)
    with pytest.raises(ConfigError, match=r"finetune\.own_heads does not work with --fusion mmtm-stages"):
        resolve(TrainConfig(finetune=settings))


def test_stages_take_greedy() -> None:
    assert resolve(TrainConfig(finetune=FinetuneConfig(fusion="mmtm-stages"))).config.finetune.balancing == "greedy"
