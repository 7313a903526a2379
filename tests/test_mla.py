"""Tests of MLA: algebra of the projection, and which parameters and directions each turn updates."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from training import TwoEqualProcesses, draw_batch, select_rows

from mmaudit.audit.errors import ConfigError
from mmaudit.train.balancing.mla import Mla, MlaConfig, project_out, relax_to_identity
from mmaudit.train.batches import Batch
from mmaudit.train.config import OptimConfig
from mmaudit.train.fusion import Shared
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext, Optimization

torch.set_num_threads(1)

SEEDS = st.integers(0, 10**6)
WEIGHT = np.array([1, 2, 3, 2, 1, 1], dtype=np.float32)
ADAMW = OptimConfig(precision="float32", lr=0.01, weight_decay=0.1)
PLAIN = OptimConfig(precision="float32", lr=0.5, optimizer="sgd", momentum=0.0, weight_decay=0.0)


class RecordingOptimization(Optimization):
    """Records the parameters after each turn."""

    def apply(self) -> None:
        super().apply()
        self.weights_after_turns = [*getattr(self, "weights_after_turns", []), weights(self.net)]


def weights(net: FusionNet) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def build_mla(
    optim: OptimConfig,
    *,
    same_width: bool = True,
    own_heads: bool = False,
    distributed: DistributedContext = SINGLE_PROCESS,
    **constants: Any,
) -> Mla:
    torch.manual_seed(0)
    plan = ModelConfig(
        modalities=("audio", "visual", "text"),
        shapes=((5,), (4,), (3,)),
        classes=("a", "b", "c"),
        fusion="shared",
        own_heads=own_heads,
        hidden=6,
        dropout=0.0,
    )
    net = FusionNet(plan)
    if not same_width:  # as with encoders of different widths
        net.fusion.bring = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))
    ridge = {} if constants.get("projection") == "none" else {"ridge": 1e-6}
    config = MlaConfig(**ridge | constants)
    return Mla(net, RecordingOptimization(net, optim, device="cpu", distributed=distributed), config, epochs=2)


def make_batch(seed: int = 1, *, present: list[list[bool]] | None = None) -> Batch:
    return draw_batch([0, 1, 2, 1, 0, 0], sizes=(5, 4, 3), weight=WEIGHT.tolist(), present=present, seed=seed)


def weight_changes_by_turn(balancer: Mla, batch: Batch) -> list[dict[str, Tensor]]:
    """Run a step and return the change of each parameter in every turn."""
    before = weights(balancer.net)
    assert isinstance(balancer.optimization, RecordingOptimization)
    balancer.optimization.weights_after_turns = []
    balancer.step(batch)
    states = [before, *balancer.optimization.weights_after_turns]
    return [{name: later[name] - earlier[name] for name in later} for earlier, later in pairwise(states)]


def mean_feature(balancer: Mla, batch: Batch, modality: int) -> Tensor:
    """Compute the weighted mean of the classifier's inputs of a modality."""
    assert isinstance(balancer.net.fusion, Shared)
    with torch.no_grad():
        feature = balancer.net.encoders[modality](batch.inputs[modality])
        projected: Tensor = balancer.net.fusion.bring[modality](feature)
    return torch.from_numpy(WEIGHT / WEIGHT.sum()) @ projected


@given(SEEDS, st.integers(1, 6))
def test_project_out_equals_the_inverse_of_the_second_moment(seed: int, num_directions: int) -> None:
    directions = torch.from_numpy(np.random.default_rng(seed).standard_normal((num_directions, 4)))
    projection, ridge = torch.eye(4, dtype=torch.float64), 0.5
    for direction in directions:
        projection = project_out(projection, direction, ridge=ridge)
    expected = torch.linalg.inv(torch.eye(4, dtype=torch.float64) + directions.T @ directions / ridge)
    assert torch.allclose(projection, expected)
    assert torch.equal(projection, projection.T)


def test_project_out_by_hand() -> None:
    projection = project_out(torch.eye(2), torch.tensor([3.0, 0.0]), ridge=1.0)
    assert projection.flatten().tolist() == pytest.approx([0.1, 0, 0, 1])
    assert torch.equal(project_out(projection, torch.zeros(2), ridge=1.0), projection)  # unchanged


def test_relax_to_identity_by_hand() -> None:
    projection = relax_to_identity(torch.tensor([[0.2, 0.4], [0.4, 1.0]]))
    assert projection.flatten().tolist() == pytest.approx([0.6, 0.2, 0.2, 1.0])
    assert torch.equal(relax_to_identity(torch.eye(4)), torch.eye(4))


@pytest.mark.parametrize("seed", range(5))
def test_projection_stays_between_0_and_identity_and_does_not_fade(seed: int) -> None:
    torch.manual_seed(seed)
    projection, mean_direction = torch.eye(8), 10 * torch.randn(8)
    mean_direction[0] = 0
    for _ in range(200):
        direction = mean_direction + torch.randn(8)
        direction[0] = 0  # a feature that is always 0
        projection = project_out(relax_to_identity(projection), direction, ridge=1e-3)
        assert float((projection @ direction).norm()) < 1e-2 * float(direction.norm())
    eigenvalues = torch.linalg.eigvalsh(projection)
    assert float(eigenvalues.min()) > -1e-5
    assert float(eigenvalues.max()) < 1 + 1e-5
    assert float(eigenvalues.mean()) > 0.3
    assert float(projection[0, 0]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("same_width", [True, False])
def test_turn_updates_only_its_encoder_and_the_classifier(same_width: bool) -> None:
    # AdamW would decay every parameter with a gradient and keep moments for it.
    balancer = build_mla(ADAMW, same_width=same_width)
    balancer.step(make_batch(0))
    for j, changes in enumerate(weight_changes_by_turn(balancer, make_batch(1))):
        names = {name for name, change in changes.items() if bool(change.any())}
        prefixes = (f"encoders.{j}.", f"fusion.bring.{j}.", "fusion.head.")
        assert names == {name for name in changes if name.startswith(prefixes)}


@pytest.mark.parametrize("same_width", [True, False])
def test_classifier_update_is_orthogonal_to_the_last_turns_feature(same_width: bool) -> None:
    balancer = build_mla(PLAIN, same_width=same_width)
    last_feature = None
    for seed in range(3):
        batch = make_batch(seed)
        mean_features = [mean_feature(balancer, batch, j) for j in range(3)]
        for change, feature in zip(weight_changes_by_turn(balancer, batch), mean_features, strict=True):
            update = change["fusion.head.weight"]
            if last_feature is not None:
                assert float((update @ last_feature).norm()) < 1e-4 * float(update.norm() * last_feature.norm())
            assert float((update @ feature).norm()) > 1e-3 * float(update.norm() * feature.norm())
            last_feature = feature


def test_first_turn_uses_the_full_gradient() -> None:
    balancer, batch = build_mla(PLAIN), make_batch()
    net = copy.deepcopy(balancer.net)
    logits = net.fusion.unimodal_logits(net.encode(batch.inputs))[0]
    losses = functional.cross_entropy(logits, batch.label, reduction="none")
    (losses @ torch.from_numpy(WEIGHT / WEIGHT.sum())).backward()  # type: ignore[no-untyped-call]
    first = weight_changes_by_turn(balancer, batch)[0]
    for name, p in net.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else -0.5 * p.grad
        assert torch.allclose(first[name], expected, atol=1e-6)


def test_step_returns_outputs_before_the_turns_and_the_mean_loss() -> None:
    balancer, batch = build_mla(PLAIN), make_batch()
    with torch.no_grad():
        before = balancer.net(batch.inputs)
    outputs, loss = balancer.step(batch)
    assert torch.allclose(outputs.fused, before.fused)
    assert torch.allclose(outputs.unimodal, before.unimodal)
    assert not outputs.fused.requires_grad
    assert not loss.requires_grad
    still = build_mla(OptimConfig(precision="float32", optimizer="sgd", lr=1e-9, momentum=0.0, weight_decay=0.0))
    outputs, loss = still.step(batch)
    assert float(loss) == pytest.approx(float(still.loss(outputs, batch)), rel=1e-5)  # at a rate near 0


def test_separate_heads_do_not_change_the_turns() -> None:
    balancer, plain = build_mla(PLAIN, own_heads=True), build_mla(PLAIN)
    plain.net.load_state_dict(balancer.net.state_dict(), strict=False)
    for j, (changes, plain_changes) in enumerate(
        zip(weight_changes_by_turn(balancer, make_batch()), weight_changes_by_turn(plain, make_batch()), strict=True)
    ):
        heads = {name for name, change in changes.items() if name.startswith("heads.") and bool(change.any())}
        assert heads == {f"heads.{j}.weight", f"heads.{j}.bias"}
        assert all(torch.equal(changes[name], change) for name, change in plain_changes.items())


def test_turn_uses_only_rows_with_the_modality() -> None:
    present = [[True, False, True], [False, False, True]] * 3
    balancer = build_mla(PLAIN)
    changes = weight_changes_by_turn(balancer, make_batch(present=present))[1]  # the turn of a modality without rows
    assert not any(bool(change.any()) for change in changes.values())
    batch = make_batch(present=present)
    assert len(batch.inputs[0]) == 3
    masked, reference = build_mla(PLAIN), build_mla(PLAIN)
    masked.step(batch)
    first = replace(
        make_batch(),
        loss_weight=batch.loss_weight,
        present=batch.present,
        inputs=select_rows(batch.present, make_batch().inputs),
    )
    reference.step(first)
    assert all(torch.equal(p, weights(reference.net)[name]) for name, p in weights(masked.net).items())


def test_frozen_encoders_are_not_updated() -> None:
    balancer = build_mla(ADAMW)
    balancer.optimization.frozen[1] = True
    balancer.net.freeze_encoders([2])
    for moved in weight_changes_by_turn(balancer, make_batch()):
        assert not any(
            bool(change.any()) for name, change in moved.items() if name.startswith(("encoders.1", "encoders.2"))
        )


def test_resumed_method_continues_exactly() -> None:
    original = build_mla(ADAMW)
    original.step(make_batch(0))
    copied = copy.deepcopy(original)
    resumed = Mla(copied.net, copied.optimization, copied.config, epochs=2)
    resumed.load_state_dict(original.state_dict())
    for step in range(1, 4):
        original.step(make_batch(step))
        resumed.step(make_batch(step))
    assert all(torch.equal(p, weights(resumed.net)[name]) for name, p in weights(original.net).items())


def test_two_processes_take_the_step_of_one() -> None:
    single, distributed = build_mla(PLAIN, ridge=1.0), build_mla(PLAIN, ridge=1.0, distributed=TwoEqualProcesses())
    for seed in range(6):
        batch = make_batch(seed)
        single.step(batch)
        distributed.step(replace(batch, loss_weight=batch.loss_weight / 2))
    parameters = dict(distributed.net.named_parameters())
    for name, p in single.net.named_parameters():
        assert torch.allclose(p, parameters[name], atol=1e-5)


@pytest.mark.parametrize("projection", ["features", "none"])
def test_three_turns_by_hand(projection: str) -> None:
    """SGD with momentum, MLA's own: every turn updates what has a gradient; m <- 0.9 m + g + 0.1 w, w <- w - 0.2 m.

    Before a turn P moves 1/6 of the way to the identity and loses the direction h of the turn before: P -= (P h)(P
    h)^T / (ridge + h^T P h); the gradient of the classifier's weights is then G P. Without the projection it is G.
    """
    momentum_sgd = replace(PLAIN, lr=0.2, momentum=0.9, weight_decay=0.1, schedule="constant")
    balancer, batch = build_mla(momentum_sgd, projection=projection), make_batch()
    net, share = copy.deepcopy(balancer.net), torch.from_numpy(WEIGHT / WEIGHT.sum())
    features = net.encode(batch.inputs)
    head, bias = (p.detach().double().numpy() for p in net.fusion.head.parameters())  # type: ignore[union-attr]
    p_matrix, direction, momentum = np.eye(6), np.zeros(6), [np.zeros((3, 6)), np.zeros(3)]
    for j, changes in enumerate(weight_changes_by_turn(balancer, batch)):
        h = features[j].detach().double().numpy()
        z = np.exp(h @ head.T + bias)
        error = (z / z.sum(axis=1, keepdims=True) - np.eye(3)[batch.label.numpy()]) * share.numpy()[:, None]
        gradient = [error.T @ h, error.sum(axis=0)]
        if projection == "features":
            p_matrix = p_matrix * 5 / 6 + np.eye(6) / 6
            along = p_matrix @ direction
            p_matrix = p_matrix - np.outer(along, along) / (1e-6 + direction @ along)
            gradient[0], direction = gradient[0] @ p_matrix, share.numpy() @ h
        momentum = [0.9 * m + g + 0.1 * w for m, g, w in zip(momentum, gradient, (head, bias), strict=True)]
        for name, m in zip(("weight", "bias"), momentum, strict=True):
            assert changes[f"fusion.head.{name}"].numpy() == pytest.approx(-0.2 * m, rel=1e-3, abs=1e-6)
        assert {name.split(".")[1] for name in changes if name.startswith("encoders") and changes[name].any()} == {
            str(j)
        }
        head, bias = head - 0.2 * momentum[0], bias - 0.2 * momentum[1]


def test_fixed_weights_are_the_fusion_and_saved_with_it() -> None:
    balancer, batch = build_mla(PLAIN, weights=(0.35, 0.25, 0.4)), make_batch()
    outputs = balancer.net(batch.inputs)
    expected = torch.einsum("j,jbk->bk", torch.tensor([0.35, 0.25, 0.4]), outputs.unimodal)
    torch.testing.assert_close(outputs.fused, expected)
    by_entropy = build_mla(PLAIN)
    assert not torch.allclose(by_entropy.net(batch.inputs).fused, expected, atol=1e-3)
    by_entropy.net.load_state_dict(balancer.net.state_dict())
    torch.testing.assert_close(by_entropy.net(batch.inputs).fused, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"projection": "off"}, "balancing.mla.projection is 'off'; .*none"),
        ({"projection": "none", "ridge": 0.1}, "balancing.mla.ridge has no effect with balancing.mla.projection none"),
        ({"weights": (0.5, -0.5)}, r"balancing.mla.weights is \[0.5, -0.5\]"),
        ({"weights": (0.0, 0.0)}, "balancing.mla.weights are all 0"),
        ({"weights": (0.55, 0.45)}, "balancing.mla.weights has 2 entries for 3 modalities: audio, visual, text"),
    ],
)
def test_invalid_settings_raise(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_mla(PLAIN, **options)
