"""Tests of OGM-GE: coefficients by hand, which gradients they scale and when, and the size of the noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from training import TwoEqualProcesses, weight_changes

from mmaudit.audit.errors import ConfigError
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.balancing.balancer import Balancer
from mmaudit.train.balancing.ogm import OgmConfig, mean_of_others, modulated_parameters, ogm_coefficients
from mmaudit.train.batches import Batch, ModelReader
from mmaudit.train.config import OptimConfig
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext, Optimization

torch.set_num_threads(1)
DEFAULT = OgmConfig()
NO_READER: ModelReader = None  # type: ignore[assignment]  # nothing is read


def build_method(
    name: str, *, ogm: OgmConfig = DEFAULT, distributed: DistributedContext = SINGLE_PROCESS, width: int = 8
) -> Balancer:
    """Build a method at the start of epoch 1; a step of SGD at rate 1 changes a weight by minus its gradient."""
    torch.manual_seed(0)
    plan = ModelConfig(modalities=("a", "v"), shapes=((40,), (30,)), classes=("x", "y", "z"), hidden=width, dropout=0.0)
    optimization = Optimization(
        FusionNet(plan),
        OptimConfig(optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant"),
        device="cpu",
        distributed=distributed,
    )
    optimization.begin_epoch(1, epochs=1)
    optimization.begin_step(11)
    method: Balancer = BALANCERS.load(name)(optimization.net, optimization, ogm, epochs=9)
    method.begin_epoch(1, NO_READER)
    return method


def make_batch(num_samples: int = 12, *, share: float = 1.0, copies: int = 1) -> Batch:
    """Build a batch whose first modality determines the class, so that it is ahead after some steps."""
    generator = torch.Generator().manual_seed(1)
    label = torch.arange(num_samples) % 3
    first = torch.randn(num_samples, 40, generator=generator) * 0.1
    first[torch.arange(num_samples), label] += 3.0
    inputs = (first, torch.randn(num_samples, 30, generator=generator))
    total = num_samples * copies
    return Batch(
        rows=torch.arange(total),
        inputs=tuple(rows.repeat(copies, 1) for rows in inputs),
        label=label.repeat(copies),
        present=None,
        loss_weight=torch.full((3, total), share / total),
        size=total,
    )


def test_two_coefficients_by_hand() -> None:
    """S = 6, 4: rho = 1.5 and 2/3; the first is damped by tanh(0.3 * 1.5), the other is not."""
    coefficients = ogm_coefficients(torch.tensor([6.0, 4.0]), alpha=0.3)
    assert coefficients.tolist() == pytest.approx([1 - math.tanh(0.45), 1.0])


def test_three_coefficients_by_hand() -> None:
    """S = 6, 4, 1: rho = 6 / 2.5, 4 / 3.5, 1 / 5."""
    coefficients = ogm_coefficients(torch.tensor([6.0, 4.0, 1.0]), alpha=0.5)
    assert coefficients.tolist() == pytest.approx([1 - math.tanh(0.5 * 2.4), 1 - math.tanh(0.5 * 4 / 3.5), 1.0])


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=4), st.floats(0, 2), st.floats(0.1, 10))
def test_coefficients_damp_the_leader_in_any_unit(scores: list[float], alpha: float, unit: float) -> None:
    score = torch.tensor(scores, dtype=torch.float64)
    lead = (len(scores) - 1) * score / (score.sum() - score) - 1
    assume(not bool(((lead > 1e-7) & (lead < 1e-5)).any()))  # k jumps there, and scaling rounds
    coefficients = ogm_coefficients(score, alpha=alpha)
    torch.testing.assert_close(ogm_coefficients(unit * score, alpha=alpha), coefficients, atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(ogm_coefficients(score.flip(0), alpha=alpha).flip(0), coefficients)
    assert float(coefficients.min()) >= 0
    assert float(coefficients.max()) <= 1
    assert float(coefficients[score.argmin()]) == pytest.approx(1.0)


@pytest.mark.parametrize("num_modalities", [2, 3, 4, 7])
@pytest.mark.parametrize("score", [0.1, 1.7695536143097428, 42.76955361430974])
def test_equal_scores_are_not_damped(score: float, num_modalities: int) -> None:
    """Rounding may bring the mean of equal scores below them."""
    for dtype in (torch.float32, torch.float64):
        assert (
            ogm_coefficients(torch.full((num_modalities,), score, dtype=dtype), alpha=1.0).tolist()
            == [1.0] * num_modalities
        )


def test_absent_modality_is_not_compared() -> None:
    assert ogm_coefficients(torch.tensor([5.0, 0.0]), alpha=0.5).tolist() == [1.0, 1.0]
    coefficients = ogm_coefficients(torch.tensor([6.0, 0.0, 4.0]), alpha=0.3)
    assert coefficients.tolist() == pytest.approx([1 - math.tanh(0.45), 1.0, 1.0])


def test_mean_of_others_ignores_invalid_values() -> None:
    means = mean_of_others(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, True, False]))
    assert means.tolist() == [2.0, 1.0, 1.5]


def published_coefficients(method: Balancer, batch: Batch, *, alpha: float) -> list[float]:
    """Compute eq. 10 of the paper in numpy: scores of W_j f_j + b / 2, and 1 - tanh(alpha rho) for rho > 1."""
    weights = {name: tensor.numpy() for name, tensor in method.net.state_dict().items()}
    scores = []
    for j, f in enumerate(method.net.encode(batch.inputs)):
        z = f.detach().numpy() @ weights[f"fusion.heads.{j}.weight"].T + weights["fusion.bias"] / 2
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        scores.append(p[np.arange(len(z)), batch.label.numpy()].sum())
    ratio = scores[1] / scores[0]
    if ratio > 1:
        return [1.0, 1 - np.tanh(alpha * ratio)]
    return [1 - np.tanh(alpha / ratio), 1.0]


def test_only_encoder_gradients_are_damped() -> None:
    leaders = set()
    for seed in range(4):
        plain, method = build_method("joint"), build_method("ogm", ogm=OgmConfig(alpha=0.5))
        torch.manual_seed(seed)
        fusion = {name: torch.randn_like(tensor) for name, tensor in plain.net.fusion.state_dict().items()}
        for balancer in (plain, method):
            balancer.net.fusion.load_state_dict(fusion)
        coefficients = published_coefficients(method, make_batch(), alpha=0.5)
        plain_changes, damped_changes = weight_changes(plain, make_batch()), weight_changes(method, make_batch())
        for name, step in plain_changes.items():
            factor = next((coefficients[j] for j in range(2) if name.startswith(f"encoders.{j}.")), 1.0)
            torch.testing.assert_close(damped_changes[name], factor * step, atol=1e-6, rtol=1e-4)
        assert list(method.epoch_metrics().values()) == pytest.approx(coefficients, rel=1e-5)
        leaders.add(coefficients.index(min(coefficients)))
    assert leaders == {0, 1}


def test_convolutions_alone_are_modulated_and_get_noise() -> None:
    """As in the authors' code; in encoders without any, everything is modulated, and matrices get noise."""
    pictures = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 8))
    assert [p.shape for p in modulated_parameters(pictures)] == [(4, 1, 3, 3)]
    vectors = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    assert len(modulated_parameters(vectors)) == 4


def test_authors_window_of_51_epochs() -> None:
    """Their epochs 0 to 50 are epochs 1 to 51."""
    for epoch, is_modulated in ((1, True), (51, True), (52, False)):
        method = build_method("ogm", ogm=OgmConfig(alpha=0.8))
        method.net.fusion.heads[0].weight.data[:] = 0.5 * torch.eye(3, 8)  # type: ignore[index, union-attr]
        method.begin_epoch(epoch, NO_READER)
        method.step(make_batch())
        assert (min(method.epoch_metrics().values()) < 0.95) is is_modulated


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"first_epoch": 3, "last_epoch": 2}, "balancing.ogm.first_epoch is 3, after last_epoch 2: no epoch would be"),
        ({"first_epoch": 0}, r"balancing.ogm.first_epoch is 0; it must lie in \[1, 1e9\]"),
        ({"last_epoch": 0}, r"balancing.ogm.last_epoch is 0; it must lie in \[1, 1e9\]"),
        ({"alpha": -1.0}, r"balancing.ogm.alpha is -1.0; it must lie in \[0, 1000\]"),
    ],
)
def test_invalid_settings_raise(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        OgmConfig(**options)


@pytest.mark.parametrize("name", ["ogm", "ogm-ge"])
@pytest.mark.parametrize("epoch", [1, 4])
def test_no_modulation_outside_its_epochs(name: str, epoch: int) -> None:
    plain, method = build_method("joint"), build_method(name, ogm=OgmConfig(alpha=0.5, first_epoch=2, last_epoch=3))
    plain.needs_unimodal_logits = True  # otherwise it sums in another order
    method.begin_epoch(epoch, NO_READER)
    for plain_change, change in zip(
        weight_changes(plain, make_batch()).values(), weight_changes(method, make_batch()).values(), strict=True
    ):
        assert torch.equal(plain_change, change)


def test_noise_has_the_deviation_of_the_undamped_gradient() -> None:
    plain, quiet, noisy = (
        build_method(name, ogm=OgmConfig(alpha=0.8), width=400) for name in ("joint", "ogm", "ogm-ge")
    )
    plain_changes, damped_changes, noisy_changes = (
        weight_changes(method, make_batch()) for method in (plain, quiet, noisy)
    )
    for name in plain_changes:
        noise = noisy_changes[name] - damped_changes[name]
        if name.startswith("encoders") and noise.ndim == 2:
            assert float(noise.std() / plain_changes[name].std()) == pytest.approx(1.0, abs=0.03)
            assert abs(float(noise.mean())) < 0.03 * float(noise.std())
            kurtosis = float(noise.pow(4).mean() / noise.square().mean() ** 2)
            assert kurtosis == pytest.approx(3.0, abs=0.2)
        else:
            assert float(noise.abs().max()) == 0.0


def test_noise_follows_from_the_step_seed() -> None:
    steps = []
    for seed in (1, 1, 2):
        method = build_method("ogm-ge")
        method.optimization.begin_step(seed)
        steps.append(weight_changes(method, make_batch())["encoders.0.layers.0.weight"])
    assert torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[0], steps[2])


def test_frozen_encoders_are_not_updated() -> None:
    method = build_method("ogm-ge")
    method.optimization.frozen[1] = True
    for name, step in weight_changes(method, make_batch()).items():
        assert float(step.abs().sum()) == 0 or not name.startswith("encoders.1")


def test_two_processes_take_the_step_of_one() -> None:
    single = build_method("ogm", ogm=OgmConfig(alpha=0.5))
    distributed = build_method("ogm", ogm=OgmConfig(alpha=0.5), distributed=TwoEqualProcesses())
    expected = weight_changes(single, make_batch(copies=2))
    for name, step in weight_changes(distributed, make_batch(share=0.5)).items():
        torch.testing.assert_close(step, expected[name], atol=1e-6, rtol=1e-4)
    assert distributed.epoch_metrics() == pytest.approx(single.epoch_metrics(), rel=1e-5)


def test_resumed_method_continues_exactly() -> None:
    config = OgmConfig(alpha=0.5, first_epoch=2, last_epoch=3)
    original = build_method("ogm", ogm=config)
    original.begin_epoch(2, NO_READER)
    weight_changes(original, make_batch())
    resumed = build_method("ogm", ogm=config)
    resumed.net.load_state_dict(original.net.state_dict())
    resumed.load_state_dict(original.state_dict())
    assert resumed.epoch_metrics() == original.epoch_metrics()
    for a, b in zip(
        weight_changes(original, make_batch()).values(), weight_changes(resumed, make_batch()).values(), strict=True
    ):
        assert torch.equal(a, b)
