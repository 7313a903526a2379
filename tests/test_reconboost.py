"""Tests of ReconBoost: stages, the loss of a stage by hand, and which parameters each phase updates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training import QUICK, draw_batch, fine_tune, make_examples, with_options

from mmaudit.audit.errors import ConfigError
from mmaudit.train.balancing.reconboost import Ensemble, ReconBoost, ReconBoostConfig, stage_of
from mmaudit.train.config import OptimConfig
from mmaudit.train.evaluate import evaluate_file
from mmaudit.train.methods import check_schedule, load_fusion, resolve
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import SINGLE_PROCESS, Optimization

torch.set_num_threads(1)

WEIGHT = [1.0, 2.0, 3.0, 2.0]
ADAMW = OptimConfig(precision="float32", lr=0.01, weight_decay=0.1)


def build_method(*, num_modalities: int = 2, own_heads: bool = False, **changes: Any) -> ReconBoost:
    torch.manual_seed(0)
    config = ModelConfig(
        modalities=("audio", "visual", "text")[:num_modalities],
        shapes=((5,), (4,), (3,))[:num_modalities],
        classes=("a", "b", "c"),
        fusion="reconboost",
        own_heads=own_heads,
        hidden=6,
        dropout=0.0,
    )
    net = FusionNet(config, fusion=load_fusion("reconboost"))
    optimization = Optimization(net, ADAMW, device="cpu", distributed=SINGLE_PROCESS)
    return ReconBoost(net, optimization, ReconBoostConfig(**changes), epochs=10)


def at_epoch(method: ReconBoost, epoch: int) -> ReconBoost:
    reader: Any = None
    method.begin_epoch(epoch, reader)
    return method


def changed(method: ReconBoost, **options: Any) -> set[str]:
    """Return the first parts of the names of the parameters that a step changes."""
    before = {name: p.detach().clone() for name, p in method.net.named_parameters()}
    method.step(draw_batch([0, 1, 2, 1], sizes=(5, 4, 3)[: method.net.num_modalities], **options))
    after = dict(method.net.named_parameters())
    names = {name for name, p in before.items() if not torch.equal(p, after[name])}
    return {".".join(name.split(".")[:2]) for name in names}


def confidence(logits: Tensor, label: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    z = logits.detach().double().numpy()
    return np.asarray((np.exp(z) / np.exp(z).sum(axis=1, keepdims=True))[np.arange(len(z)), label.numpy()])


def test_stages_of_four_and_four_epochs() -> None:
    stages = [stage_of(epoch, stage_epochs=4, rectify_epochs=4) for epoch in range(1, 18)]
    assert [stage for stage, *_ in stages] == [0] * 8 + [1] * 8 + [2]
    assert [boosts for _, boosts, _ in stages] == ([True] * 4 + [False] * 4) * 2 + [True]
    assert [epoch for epoch, (*_, begins) in enumerate(stages, start=1) if begins] == [1, 5, 9, 13, 17]
    assert [stage_of(epoch, stage_epochs=2, rectify_epochs=0)[1:] for epoch in (1, 2, 3)] == [
        (True, True),
        (True, False),
        (True, True),
    ]


@pytest.mark.parametrize("num_modalities", [2, 3])
def test_loss_of_a_stage_by_hand(num_modalities: int) -> None:
    method = build_method(num_modalities=num_modalities)
    with torch.no_grad():
        method.fusion.rate.fill_(1.5)
    batch = draw_batch([0, 1, 2, 1], sizes=(5, 4, 3)[:num_modalities], weight=WEIGHT)
    z = method.net(batch.inputs).unimodal
    residual_logits = 1.5 * (z.sum(dim=0) - z[1])
    # (5 CE - 1 q CE) / 3 classes, where q is the others' confidence
    losses = -np.log(confidence(z[1], batch.label)) * (5 - confidence(residual_logits, batch.label)) / 3
    _, loss = at_epoch(method, 9).step(batch)
    assert loss.item() == pytest.approx(losses @ WEIGHT / 8, rel=1e-5)


def test_rectification_is_the_fused_loss_with_the_rate() -> None:
    method, batch = at_epoch(build_method(), 5), draw_batch([0, 1, 2, 1], weight=WEIGHT)
    with torch.no_grad():
        method.fusion.rate.fill_(0.5)
        outputs = method.net(batch.inputs)
    torch.testing.assert_close(outputs.fused, 0.5 * outputs.unimodal.sum(dim=0))
    _, loss = method.step(batch)
    assert loss.item() == pytest.approx(-np.log(confidence(outputs.fused, batch.label)) @ WEIGHT / 8, rel=1e-5)


def test_each_phase_updates_its_parameters_only() -> None:
    # AdamW would decay every parameter with a gradient and keep moments for it.
    method = build_method(num_modalities=3)
    shared = {"fusion.classifier"}
    for epoch, encoder in ((1, 0), (2, 0), (9, 1), (17, 2), (25, 0)):
        assert changed(at_epoch(method, epoch)) == {f"encoders.{encoder}", *shared}
    assert changed(at_epoch(method, 5)) == {*(f"encoders.{j}" for j in range(3)), *shared, "fusion.rate"}


def test_features_of_different_widths_have_a_layer_each() -> None:
    fusion = Ensemble((5, 4), num_classes=3, hidden=8)
    features = [torch.randn(7, 5), torch.randn(7, 4)]
    logits = fusion.unimodal_logits(features)
    assert logits.shape == (2, 7, 3)
    torch.testing.assert_close(fusion(features), logits.sum(dim=0))
    torch.autograd.backward(fusion.logits_of(1, features[1]).sum())
    assert all(p.grad is None for p in fusion.bring[0].parameters())


def test_separate_heads_are_trained_in_every_phase_and_change_nothing_else() -> None:
    plain, with_heads = build_method(), build_method(own_heads=True)
    plain.net.load_state_dict(with_heads.net.state_dict(), strict=False)
    for epoch in (1, 5):
        heads = {"heads.0", "heads.1"}
        assert changed(at_epoch(with_heads, epoch)) == changed(at_epoch(plain, epoch)) | heads
    for name, weight in plain.net.state_dict().items():
        torch.testing.assert_close(weight, with_heads.net.state_dict()[name])


def test_optimiser_starts_anew_with_each_phase() -> None:
    method = build_method()
    num_states = []
    for epoch in (1, 2, 5, 9):
        at_epoch(method, epoch)
        num_states.append(len(method.optimization.optimizer.state))
        method.step(draw_batch([0, 1, 2, 1]))
    assert num_states == [0, 8, 0, 0]  # 4 tensors of an encoder, 4 of the classifier


def test_samples_without_the_modality_have_no_loss() -> None:
    present = [[False, True], [False, True], [False, True], [False, True]]
    method = at_epoch(build_method(), 1)
    _, loss = method.step(draw_batch([0, 1, 2, 1], present=present))
    assert loss.item() == 0.0


def test_network_is_saved_with_its_rate_and_settings_are_checked(tmp_path: Path) -> None:
    config = replace(
        with_options(QUICK, balancing="reconboost", epochs=2),
        balancing={"reconboost": {"stage_epochs": 1, "rectify_epochs": 1}},
    )
    examples = make_examples()
    trained = fine_tune(examples, tmp_path, config)
    options: dict[str, Any] = {"split": "test", "between": "audio:visual", "config": QUICK, "seed": 0, "device": "cpu"}
    assert evaluate_file(tmp_path / "model.safetensors", examples, **options)["test"] == trained.metrics["test"]
    assert [record["boosting"] for record in trained.history] == [1.0, 0.0]
    (warning,) = check_schedule(resolve(config))
    assert "boosts the second modality only from epoch 3 on" in warning
    assert check_schedule(resolve(with_options(config, epochs=3))) == []
    with pytest.raises(ConfigError, match="share one classifier, whose logits are summed; use --fusion reconboost"):
        resolve(with_options(config, fusion="late"))
