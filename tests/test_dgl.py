"""Tests of DGL: gradients of encoders and fusion by its two losses, for every fusion."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from training import QUICK, draw_batch, with_options

from mmaudit.audit.errors import ConfigError
from mmaudit.train.balancing.balancer import Joint
from mmaudit.train.balancing.dgl import Dgl, DglConfig
from mmaudit.train.batches import Batch
from mmaudit.train.config import OptimConfig
from mmaudit.train.cross_modal import Mmtm
from mmaudit.train.fusion import Concat
from mmaudit.train.methods import resolve
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import SINGLE_PROCESS, Optimization

torch.set_num_threads(1)

FUSIONS = ("concat", "late", "gated", "film", "mmtm")
LABEL = [0, 1, 2, 1]
WEIGHT = torch.tensor([1.0, 2, 3, 2]) / 8


def network(fusion: str = "concat") -> FusionNet:
    torch.manual_seed(0)
    modalities, shapes = ("audio", "visual", "text"), ((5,), (4,), (3,))
    config = ModelConfig(
        modalities=modalities, shapes=shapes, classes=("a", "b", "c"), fusion=fusion, hidden=6, dropout=0.0
    )
    net = FusionNet(config)
    for parameter in net.fusion.parameters():  # biases start at 0, which would hide errors
        torch.nn.init.normal_(parameter, std=0.5)
    return net


def gradients(net: FusionNet, batch: Batch, *, alpha: float = 4.0) -> dict[str, Tensor]:
    """Return the gradients of a step at a learning rate of 0."""
    optim = OptimConfig(precision="float32", optimizer="sgd", lr=1e-12, momentum=0.0, weight_decay=0.0)
    optimization = Optimization(net, optim, device="cpu", distributed=SINGLE_PROCESS)
    Dgl(net, optimization, DglConfig(alpha=alpha), epochs=1).step(batch)
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def make_batch(*, present: list[list[bool]] | None = None) -> Batch:
    return draw_batch(LABEL, sizes=(5, 4, 3), weight=(8 * WEIGHT).tolist(), present=present)


def test_gradients_of_concatenated_features_by_both_losses() -> None:
    net, batch = network(), make_batch()
    assert isinstance(net.fusion, Concat)
    grads = gradients(net, batch)
    features = net.encode(batch.inputs)
    fused = net.fusion([f.detach() for f in features])
    fusion_names = [name for name in grads if name.startswith("fusion.")]
    loss = functional.cross_entropy(fused, batch.label, reduction="none") @ WEIGHT
    parameters = dict(net.named_parameters())
    for name, expected in zip(
        fusion_names, torch.autograd.grad(loss, [parameters[n] for n in fusion_names]), strict=True
    ):
        torch.testing.assert_close(grads[name], expected)
    for j, f in enumerate(features):
        weight = net.fusion.heads[j].weight
        assert isinstance(weight, Tensor)
        logits = f @ weight.detach().T + net.fusion.bias.detach()  # the others 0, the whole bias
        loss = 4 * functional.cross_entropy(logits, batch.label, reduction="none") @ WEIGHT
        names = [name for name in grads if name.startswith(f"encoders.{j}.")]
        assert len(names) == 4
        for name, expected in zip(names, torch.autograd.grad(loss, [parameters[n] for n in names]), strict=True):
            torch.testing.assert_close(grads[name], expected)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_encoders_and_fusion_do_not_share_gradients(fusion: str) -> None:
    batch = make_batch()
    at_0, at_1, at_2 = (gradients(network(fusion), batch, alpha=alpha) for alpha in (0.0, 1.0, 2.0))
    assert at_0.keys() == at_1.keys() == dict(network(fusion).named_parameters()).keys()
    for name, gradient in at_1.items():
        if name.startswith("encoders."):
            assert not at_0[name].any()
            assert gradient.any()
            torch.testing.assert_close(at_2[name], 2 * gradient)
        else:
            torch.testing.assert_close(at_0[name], gradient)


def test_running_means_of_the_fusion_follow_all_modalities() -> None:
    batch = make_batch()
    means = []
    for method in (Joint, Dgl):
        net = network("mmtm")
        method(net, Optimization(net, OptimConfig(), device="cpu", distributed=SINGLE_PROCESS), epochs=1).step(batch)
        assert isinstance(net.fusion, Mmtm)
        means.append(net.fusion.mean)
        assert net.fusion.training
    assert torch.equal(*means)


def test_samples_without_a_modality_do_not_train_its_encoder() -> None:
    grads = gradients(network(), make_batch(present=[[True, False, True]] * 4))
    assert {name.split(".")[1] for name in grads if name.startswith("encoders.")} == {"0", "2"}


def test_unpaired_samples_are_refused() -> None:
    config = with_options(QUICK, sampling="dus-h", balancing="dgl")
    resolve(config)
    with pytest.raises(ConfigError, match="paired = false leaves no pairs, and with --balancing dgl only pairs train"):
        resolve(replace(config, sampling={"dus": {"paired": False}}))
