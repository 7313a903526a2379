"""Tests of MMCosine: logits and gradients by its formula, and a scale that is saved with the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training import QUICK, draw_batch, fine_tune, make_examples, with_options

from mmaudit.audit.errors import ConfigError
from mmaudit.train.balancing.mmcosine import CosineFusion, MmCosine, MmCosineConfig
from mmaudit.train.config import OptimConfig
from mmaudit.train.evaluate import evaluate_file
from mmaudit.train.methods import load_fusion, resolve
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import SINGLE_PROCESS, Optimization

torch.set_num_threads(1)


def network(modalities: tuple[str, ...] = ("audio", "visual")) -> FusionNet:
    torch.manual_seed(0)
    shapes = ((5,), (4,), (3,))[: len(modalities)]
    config = ModelConfig(
        modalities=modalities, shapes=shapes, classes=("a", "b", "c"), fusion="mmcosine", hidden=6, dropout=0.0
    )
    return FusionNet(config, fusion=load_fusion("mmcosine"))


def build_method(net: FusionNet, scale: float = 10.0) -> MmCosine:
    optimization = Optimization(net, OptimConfig(), device="cpu", distributed=SINGLE_PROCESS)
    return MmCosine(net, optimization, MmCosineConfig(scale=scale), epochs=1)


def heads_of(fusion: nn.Module) -> list[nn.Linear]:
    return [layer for layer in fusion.modules() if isinstance(layer, nn.Linear)]


def cosine_logits(features: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Compute s f . w / (|f| |w|) by hand, sample by sample and class by class."""
    rows = [[float(f @ w) / (float(f.norm()) * float(w.norm())) for w in weight] for f in features]
    return scale * torch.tensor(rows)


@pytest.mark.parametrize("scale", [1.0, 10.0, 64.0])
@pytest.mark.parametrize("modalities", [("audio",), ("audio", "visual"), ("audio", "visual", "text")])
@torch.no_grad()
def test_logits_are_scaled_cosines_and_their_sum(modalities: tuple[str, ...], scale: float) -> None:
    net = network(modalities)
    build_method(net, scale)
    batch = draw_batch([0, 1, 2, 1], sizes=(5, 4, 3)[: len(modalities)])
    outputs = net(batch.inputs)
    expected = torch.stack(
        [cosine_logits(f, head.weight, scale) for f, head in zip(outputs.features, heads_of(net.fusion), strict=True)]
    )
    torch.testing.assert_close(outputs.unimodal, expected)
    torch.testing.assert_close(outputs.fused, expected.sum(dim=0))
    torch.testing.assert_close(net(batch.inputs, unimodal=False).fused, outputs.fused)
    assert outputs.unimodal.abs().max() <= scale * (1 + 1e-6)


def test_loss_is_the_cross_entropy_of_the_summed_cosines() -> None:
    net = network()
    method, batch = build_method(net), draw_batch([0, 1, 2, 1], weight=[1.0, 2.0, 0.0, 1.0])
    outputs = net(batch.inputs)
    sample_losses = -outputs.fused.log_softmax(dim=1)[torch.arange(4), batch.label]
    torch.testing.assert_close(method.loss(outputs, batch), (sample_losses * torch.tensor([1.0, 2, 0, 1])).sum() / 4)


def test_lengths_of_features_and_weights_do_not_matter() -> None:
    fusion = CosineFusion((5, 4), num_classes=3, hidden=6)
    features = [torch.randn(7, 5), torch.randn(7, 4)]
    before = fusion(features)
    with torch.no_grad():
        heads_of(fusion)[0].weight.mul_(7.0)
    torch.testing.assert_close(fusion([features[0], 0.01 * features[1]]), before)


def test_absent_modality_has_logits_and_gradients_of_0() -> None:
    fusion = CosineFusion((5, 4), num_classes=3, hidden=6)
    absent = torch.zeros(7, 5, requires_grad=True)
    logits = fusion.unimodal_logits([absent, torch.randn(7, 4)])
    assert not logits[0].any()
    torch.autograd.backward(logits.sum())
    assert absent.grad is not None
    assert absent.grad.isfinite().all()


def test_scale_is_saved_with_the_model(tmp_path: Path) -> None:
    config = replace(with_options(QUICK, balancing="mmcosine"), balancing={"mmcosine": {"scale": 3.0}})
    examples = make_examples()
    trained = fine_tune(examples, tmp_path, config).metrics
    evaluated = evaluate_file(
        tmp_path / "model.safetensors",
        examples,
        split="test",
        between="audio:visual",
        config=QUICK,
        seed=0,
        device="cpu",
    )
    assert evaluated["test"] == trained["test"]


def test_only_its_own_fusion_is_accepted() -> None:
    methods = resolve(with_options(QUICK, balancing="mmcosine"))
    assert methods.fusion is CosineFusion
    assert methods.config.finetune.fusion == "mmcosine"
    with pytest.raises(ConfigError, match="--fusion concat: its logits are scaled cosines; use --fusion mmcosine"):
        resolve(with_options(QUICK, balancing="mmcosine", fusion="concat"))
    with pytest.raises(ConfigError, match=r"balancing.mmcosine.scale is 0.0; it must lie in \[0.001, 1000\]"):
        MmCosineConfig(scale=0.0)
