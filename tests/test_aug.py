"""Tests of AUG: losses by hand, two turns against a reference, which modality gets a classifier, and when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training import QUICK, draw_batch, fine_tune, make_examples, model_bytes, stop_after, with_options

from mmaudit.audit.errors import ConfigError
from mmaudit.train.balancing.aug import (
    MAX_CLASSIFIERS,
    Aug,
    AugConfig,
    boosting_losses,
    lagging_modalities,
)
from mmaudit.train.config import OptimConfig
from mmaudit.train.evaluate import evaluate_file
from mmaudit.train.methods import check_schedule, load_fusion, resolve
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import SINGLE_PROCESS, Optimization

torch.set_num_threads(1)

WEIGHT = [1.0, 2.0, 3.0, 2.0]
SGD = OptimConfig(optimizer="sgd", precision="float32", lr=0.1, momentum=0.0, weight_decay=0.0)
ADAMW = OptimConfig(precision="float32", lr=0.01, weight_decay=0.1)


def build_method(optim: OptimConfig = SGD, *, epochs: int = 200, num_modalities: int = 2, **changes: Any) -> Aug:
    torch.manual_seed(0)
    config = ModelConfig(
        modalities=("audio", "visual", "text")[:num_modalities],
        shapes=((5,), (4,), (3,))[:num_modalities],
        classes=("a", "b", "c"),
        fusion="aug",
        hidden=6,
        dropout=0.0,
    )
    net = FusionNet(config, fusion=load_fusion("aug"))
    optimization = Optimization(net, optim, device="cpu", distributed=SINGLE_PROCESS)
    return Aug(net, optimization, AugConfig(**changes), epochs=epochs)


def use(method: Aug, *counts: int) -> Aug:
    method.fusion.num_classifiers.copy_(torch.tensor(counts))
    return method


def softmax(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(np.exp(z) / np.exp(z).sum(axis=1, keepdims=True))


def test_losses_by_hand() -> None:
    rng = np.random.default_rng(0)
    last, earlier, label = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), np.array([0, 2, 1, 1, 0])

    def ce(z: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.asarray(-(target * np.log(softmax(z))).sum(axis=1))

    y = np.eye(3)[label]
    residual_label = y - 0.5 * y * softmax(earlier)
    expected = ce(last + earlier, y) + ce(earlier, y) + ce(last, residual_label)
    tensors = torch.from_numpy(last), torch.from_numpy(earlier), torch.from_numpy(label)
    np.testing.assert_allclose(boosting_losses(*tensors, residual_weight=0.5), expected, rtol=1e-5)
    np.testing.assert_allclose(
        boosting_losses(tensors[0], None, tensors[2], residual_weight=0.5), ce(last, y), rtol=1e-5
    )


def reference_turns(method: Aug, inputs: tuple[Tensor, ...], label: Tensor) -> dict[str, Tensor]:
    """Train audio with one classifier, then visual with three, by plain gradient descent of rate 0.1."""
    weights = {name: w.detach().clone().requires_grad_() for name, w in method.net.named_parameters()}
    features = [
        torch.func.functional_call(
            method.net.encoders[j],
            {n.split(".", 2)[2]: w for n, w in weights.items() if n.startswith(f"encoders.{j}")},
            x,
        )
        for j, x in enumerate(inputs)
    ]
    share = torch.tensor(WEIGHT) / 8
    for j, names in ((0, ["first.0"]), (1, ["first.1", "added.1.0", "added.1.1"])):
        logits = []
        for name in names:
            hidden = (features[j] @ weights[f"fusion.{name}.weight"].T + weights[f"fusion.{name}.bias"]).clamp(min=0)
            logits.append(hidden @ weights["fusion.head.weight"].T + weights["fusion.head.bias"])
        log_p = [
            z.log_softmax(dim=1)[range(4), label]
            for z in (sum(logits), sum(logits[:-1]), logits[-1])
            if torch.is_tensor(z)
        ]
        loss = -log_p[0] if j == 0 else -log_p[0] - log_p[1] - (1 - 0.5 * log_p[1].exp().detach()) * log_p[2]
        used = {n: w for n, w in weights.items() if any(n.startswith(f"fusion.{m}.") for m in (*names, "head"))}
        used |= {n: w for n, w in weights.items() if n.startswith(f"encoders.{j}.")}
        gradients = torch.autograd.grad(loss @ share, list(used.values()), retain_graph=True)
        for (name, w), gradient in zip(used.items(), gradients, strict=True):
            weights[name] = (w - 0.1 * gradient).detach().requires_grad_()
    return weights


def test_two_turns_of_a_step() -> None:
    """The second turn uses the output layer that the first one trained, and features of before the step."""
    method, batch = use(build_method(), 1, 3), draw_batch([0, 1, 2, 1], weight=WEIGHT)
    expected = reference_turns(method, batch.inputs, batch.label)
    method.step(batch)
    for name, weight in method.net.named_parameters():
        torch.testing.assert_close(weight, expected[name], msg=name)


def test_logits_are_sums_over_the_classifiers_in_use() -> None:
    method = use(build_method(weights=(0.4, 0.6)), 1, 2)
    inputs = draw_batch([0, 1, 2, 1]).inputs
    fusion, f = method.fusion, method.net.encode(inputs)
    first = [fusion.head(layer(x).relu()) for layer, x in zip(fusion.first, f, strict=True)]
    added = fusion.head(fusion.added[1][0](f[1]).relu())  # type: ignore[index]
    outputs = method.net(inputs)
    torch.testing.assert_close(outputs.unimodal, torch.stack([first[0], first[1] + added]))
    torch.testing.assert_close(outputs.fused, 0.4 * first[0] + 0.6 * (first[1] + added))


def test_lagging_modalities_by_hand() -> None:
    for confidence, expected in (
        ([0.6, 0.5], [1]),
        ([0.5, 0.6], [0]),
        ([0.500, 0.496], []),  # 0.496 > 0.99 * 0.5
        ([0.500, 0.494], [1]),
        ([0.6, 0.3, 0.5], [1]),  # means of the others: 0.40, 0.55, 0.45
        ([0.6, 0.3, 0.2], [1, 2]),
        ([0.0, 0.0], []),
    ):
        assert lagging_modalities(confidence, tolerance=0.01) == expected


@pytest.mark.parametrize(
    ("epochs", "every", "starts"), [(200, 0, [2, 21, 41, 61]), (5, 0, [2, 3, 4, 5]), (9, 4, [2, 5, 9])]
)
def test_when_classifiers_are_added(epochs: int, every: int, starts: list[int]) -> None:
    method = build_method(epochs=epochs, every_epochs=every)
    reader: Any = None
    found = []
    for epoch in range(1, min(epochs, 61) + 1):
        before = method.fusion.num_classifiers.tolist()
        method.begin_epoch(epoch, reader)
        assert not method.confidence.any()
        if method.fusion.num_classifiers.tolist() != before:
            found.append(epoch)
        method.confidence += torch.tensor([0.2, 0.6])
    assert found == starts
    assert method.fusion.num_classifiers.tolist() == [1 + len(starts), 1]


def test_no_more_classifiers_than_the_limit() -> None:
    method = build_method(every_epochs=1)
    reader: Any = None
    for epoch in range(1, 2 * MAX_CLASSIFIERS):
        method.begin_epoch(epoch, reader)
        method.confidence += torch.tensor([0.6, 0.2])
    assert method.epoch_metrics() == {"classifiers_audio": 1.0, "classifiers_visual": MAX_CLASSIFIERS}
    assert method.net(draw_batch([0, 1, 2, 1]).inputs).fused.isfinite().all()


def test_confidence_is_the_mean_over_the_epochs_samples() -> None:
    method = build_method(replace(SGD, lr=1e-9))
    batches = [draw_batch([0, 1, 2, 1], weight=WEIGHT), draw_batch([2, 1], seed=2)]
    expected = np.zeros(2)
    for batch, weight in zip(batches, (np.array(WEIGHT) / 8, np.ones(2) / 2), strict=True):
        for j, z in enumerate(method.net(batch.inputs).unimodal.detach().double().numpy()):
            expected[j] += softmax(z)[range(batch.size), batch.label] @ weight * batch.size
        method.step(batch)
    np.testing.assert_allclose(method.confidence, expected, rtol=1e-5)


def changed(method: Aug) -> set[str]:
    before = {name: p.detach().clone() for name, p in method.net.named_parameters()}
    method.step(draw_batch([0, 1, 2, 1]))
    names = {name for name, p in method.net.named_parameters() if not torch.equal(before[name], p)}
    return {name.rsplit(".", 1)[0] for name in names if name.startswith("fusion.")}


def test_unused_and_fixed_classifiers_stay_as_they_are() -> None:
    """AdamW would decay every parameter with a gradient."""
    used = {"fusion.first.0", "fusion.first.1", "fusion.head"}
    assert changed(use(build_method(ADAMW), 1, 2)) == {*used, "fusion.added.1.0"}
    assert changed(use(build_method(ADAMW, added="fixed"), 1, 2)) == used


def test_network_is_saved_with_its_classifiers(tmp_path: Path) -> None:
    config = replace(
        with_options(QUICK, balancing="aug", epochs=4), balancing={"aug": {"every_epochs": 1, "tolerance": 0.0}}
    )
    examples = make_examples()
    trained = fine_tune(examples, tmp_path / "whole", config)
    counts = [[record[f"classifiers_{name}"] for name in examples.modalities] for record in trained.history]
    assert [sum(count) for count in counts] == [2, 3, 4, 5]
    options: dict[str, Any] = {"split": "test", "between": "audio:visual", "config": QUICK, "seed": 0, "device": "cpu"}
    evaluated = evaluate_file(tmp_path / "whole" / "model.safetensors", examples, **options)
    assert evaluated["test"] == trained.metrics["test"]
    with pytest.raises(KeyboardInterrupt):
        fine_tune(examples, tmp_path / "part", config, progress=stop_after(2))
    fine_tune(examples, tmp_path / "part", config)
    assert model_bytes(tmp_path / "part") == model_bytes(tmp_path / "whole")


def test_settings_are_checked() -> None:
    (warning,) = check_schedule(resolve(with_options(QUICK, balancing="aug", epochs=1)))
    assert "aug adds the first classifier after epoch 1" in warning
    assert check_schedule(resolve(with_options(QUICK, balancing="aug", epochs=2))) == []
    with pytest.raises(ConfigError, match="adds classifiers to a modality, whose logits are summed; use --fusion aug"):
        resolve(with_options(QUICK, balancing="aug", fusion="late"))
    with pytest.raises(ConfigError, match="2 entries for 3 modalities"):
        build_method(num_modalities=3, weights=(0.4, 0.6))
    with pytest.raises(ConfigError, match="are all 0"):
        AugConfig(weights=(0.0, 0.0))
    with pytest.raises(ConfigError, match=r"balancing\.aug\.tolerance"):
        AugConfig(tolerance=1.0)
