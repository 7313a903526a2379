"""Tests of LFM: the polynomial and the divergences by hand, and the loss over the samples that have both modalities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from training import QUICK, draw_batch, with_options

from mmaudit.audit.errors import ConfigError
from mmaudit.train.balancing.lfm import Lfm, LfmConfig, MeanLate, divergence, fused_weight
from mmaudit.train.config import OptimConfig
from mmaudit.train.methods import load_fusion, resolve
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import SINGLE_PROCESS, Optimization

torch.set_num_threads(1)

COEFFICIENTS = LfmConfig().coefficients
WEIGHT = [1.0, 2.0, 3.0, 2.0]


def build_method(*, num_modalities: int = 2, fusion: str = "lfm", **changes: Any) -> Lfm:
    torch.manual_seed(0)
    config = ModelConfig(
        modalities=("audio", "visual", "text")[:num_modalities],
        shapes=((5,), (4,), (3,))[:num_modalities],
        classes=("a", "b", "c"),
        fusion=fusion,
        hidden=6,
        dropout=0.0,
    )
    net = FusionNet(config, fusion=load_fusion(fusion))
    optimization = Optimization(net, OptimConfig(), device="cpu", distributed=SINGLE_PROCESS)
    return Lfm(net, optimization, LfmConfig(**changes), epochs=10)


def probabilities(logits: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    z = logits.detach().double().numpy()
    return np.asarray(np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True))


def test_polynomial_by_hand() -> None:
    assert fused_weight(1, COEFFICIENTS) == pytest.approx(0.204623704, abs=1e-12)
    # .204623704 + .00335472727 + .000122989557 - .00000292947416 + .0000000223835486 - .0000000000539717505
    assert fused_weight(2, COEFFICIENTS) == pytest.approx(0.20809851368, abs=1e-10)
    # .204623704 + .0335472727 + .0122989557 - .00292947416 + .000223835486 - .00000539717505
    assert fused_weight(11, COEFFICIENTS) == pytest.approx(0.24775889655, abs=1e-10)
    assert fused_weight(4, (0.1, 0.0, 0.05)) == pytest.approx(0.1 + 0.05 * 9)


def test_weight_stays_within_0_and_1_and_after_200_epochs_as_it_is() -> None:
    weights = [fused_weight(epoch, COEFFICIENTS) for epoch in range(1, 400)]
    assert min(weights) == weights[0]
    assert max(weights) == 1.0
    assert set(weights[199:]) == {weights[199]}
    assert fused_weight(5, (-1.0,)) == 0.0


def test_divergences_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    # M = (.375, .625): KL(M || p) = .375 ln .75 + .625 ln 1.25, KL(M || q) = .375 ln 1.5 + .625 ln (5/6)
    reverse = (0.375 * math.log(0.75 * 1.5) + 0.625 * math.log(1.25 * 5 / 6)) / 2
    # KL(p || M) = .5 ln (4/3) + .5 ln .8, KL(q || M) = .25 ln (2/3) + .75 ln 1.2
    js = (0.5 * math.log(4 / 3 * 0.8) + 0.25 * math.log(2 / 3) + 0.75 * math.log(1.2)) / 2
    assert (reverse, js) == pytest.approx((0.0348412, 0.0338221), abs=1e-6)
    for kind, expected in (("reverse", reverse), ("js", js)):
        for first, second in ((p, q), (q, p), (p + 7, q - 3)):
            assert divergence(first, second, kind=kind).item() == pytest.approx(expected, abs=1e-6)
        assert divergence(p, p, kind=kind).item() == pytest.approx(0, abs=1e-7)
    far = torch.tensor([[100.0, 0.0]])
    assert divergence(far, -far, kind="js").item() == pytest.approx(math.log(2))
    assert divergence(far, -far, kind="reverse").item() == pytest.approx(50 - math.log(2))


def test_fused_logits_are_the_mean() -> None:
    method = build_method(num_modalities=3)
    batch = draw_batch([0, 1, 2], sizes=(5, 4, 3))
    outputs = method.net(batch.inputs)
    torch.testing.assert_close(outputs.fused, outputs.unimodal.mean(dim=0))
    torch.testing.assert_close(method.net(batch.inputs, unimodal=False).fused, outputs.fused)


@pytest.mark.parametrize("kind", ["reverse", "js"])
@pytest.mark.parametrize("present", [None, [[True, True], [True, False], [True, True], [False, True]]])
def test_loss_weighs_both_parts(kind: str, present: list[list[bool]] | None) -> None:
    method = build_method(divergence=kind)
    method.epoch = 11
    batch = draw_batch([0, 1, 2, 1], weight=WEIGHT, present=present)
    outputs = method.net(batch.inputs, batch.present)
    p, fused = probabilities(outputs.unimodal), probabilities(outputs.fused)
    ce = -np.log(fused[np.arange(4), batch.label.numpy()])
    mean = p.mean(axis=0)
    terms = (mean * np.log(mean / p) if kind == "reverse" else p * np.log(p / mean)).sum(axis=2).mean(axis=0)
    both = np.array(WEIGHT) * (1 if present is None else np.array(present).all(axis=1))
    expected = 2 * (0.24775889655 * ce @ WEIGHT / 8 + 0.75224110345 * terms @ both / both.sum())
    assert method.loss(outputs, batch).item() == pytest.approx(expected, rel=1e-5)


def test_three_modalities_use_the_mean_over_pairs() -> None:
    method = build_method(num_modalities=3, coefficients=(0.0,))  # the divergence alone
    batch = draw_batch([0, 1, 2, 1], sizes=(5, 4, 3))
    outputs = method.net(batch.inputs)
    z = outputs.unimodal
    pairs = [divergence(z[i], z[j], kind="reverse").mean().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert method.loss(outputs, batch).item() == pytest.approx(2 * sum(pairs) / 3, rel=1e-5)
    batch = draw_batch([0, 1], sizes=(5, 4, 3), present=[[True, False, False], [False, True, False]])
    assert method.loss(method.net(batch.inputs, batch.present), batch).item() == 0.0  # no sample has two


def test_divergence_draws_the_modalities_together() -> None:
    method = build_method(coefficients=(0.0,))
    batch = draw_batch([0, 1, 2, 1])
    for _ in range(30):
        method.step(batch)
    before = build_method(coefficients=(0.0,))
    distances = [m.loss(m.net(batch.inputs), batch).item() for m in (before, method)]
    assert distances[1] < 0.5 * distances[0]


def test_fusion_settings_and_metrics() -> None:
    assert resolve(with_options(QUICK, balancing="lfm")).fusion is MeanLate
    assert resolve(with_options(QUICK, balancing="lfm", fusion="concat")).config.finetune.fusion == "concat"
    assert build_method().epoch_metrics() == {"lfm_fused_weight": pytest.approx(0.204623704)}
    with pytest.raises(ConfigError, match=r"balancing.lfm.divergence is kl; it must be one of reverse, js|kl"):
        LfmConfig(divergence="kl")
