"""Laws of MLA: the projection's algebra, what moves at which turn, and in which directions the classifier does not."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from training import cut_to, draw_batch

from mmaudit.train.balancing.config import BalancingConfig, MlaConfig
from mmaudit.train.balancing.mla import Mla, project_out, relax_to_identity
from mmaudit.train.batches import Batch
from mmaudit.train.config import OptimConfig
from mmaudit.train.distributed import SINGLE_PROCESS, DistributedContext
from mmaudit.train.fusion import Shared
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import Optimization

torch.set_num_threads(1)

SEEDS = st.integers(0, 10**6)
WEIGHT = np.array([1, 2, 3, 2, 1, 1], dtype=np.float32)
ADAMW = OptimConfig(precision="float32", lr=0.01, weight_decay=0.1)
PLAIN = OptimConfig(precision="float32", lr=0.5, optimizer="sgd", momentum=0.0, weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class Twins(DistributedContext):
    """Two processes with the same rows: sums are twice what one has."""

    size: int = 2

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor *= 2


class Told(Optimization):
    """Keeps what the parameters are after each turn."""

    def apply(self) -> None:
        super().apply()
        self.told = [*getattr(self, "told", []), weights(self.net)]


def weights(net: FusionNet) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def make(
    optim: OptimConfig,
    *,
    alike: bool = True,
    own_heads: bool = False,
    ridge: float = 1e-6,
    distributed: DistributedContext = SINGLE_PROCESS,
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
    if not alike:  # as with encoders of different widths
        net.fusion.bring = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))
    config = BalancingConfig(mla=MlaConfig(ridge=ridge))
    return Mla(net, Told(net, optim, device="cpu", distributed=distributed), config, epochs=2)


def draw(seed: int = 1, *, present: list[list[bool]] | None = None) -> Batch:
    return draw_batch([0, 1, 2, 1, 0, 0], sizes=(5, 4, 3), weight=WEIGHT.tolist(), present=present, seed=seed)


def turns(balancer: Mla, batch: Batch) -> list[dict[str, Tensor]]:
    """Take a step, and give what every turn added to each parameter."""
    before = weights(balancer.net)
    assert isinstance(balancer.optimization, Told)
    balancer.optimization.told = []
    balancer.step(batch)
    every = [before, *balancer.optimization.told]
    return [{k: later[k] - earlier[k] for k in later} for earlier, later in pairwise(every)]


def mean_feature(balancer: Mla, batch: Batch, modality: int) -> Tensor:
    """The weighted mean of what the classifier sees of a modality."""
    assert isinstance(balancer.net.fusion, Shared)
    with torch.no_grad():
        feature = balancer.net.encoders[modality](batch.inputs[modality])
        brought: Tensor = balancer.net.fusion.bring[modality](feature)
    return torch.from_numpy(WEIGHT / WEIGHT.sum()) @ brought


@given(SEEDS, st.integers(1, 6))
def test_absorbing_is_the_inverse_of_what_was_seen(seed: int, number: int) -> None:
    seen = torch.from_numpy(np.random.default_rng(seed).standard_normal((number, 4)))
    projection, ridge = torch.eye(4, dtype=torch.float64), 0.5
    for direction in seen:
        projection = project_out(projection, direction, ridge=ridge)
    expected = torch.linalg.inv(torch.eye(4, dtype=torch.float64) + seen.T @ seen / ridge)
    assert torch.allclose(projection, expected)
    assert torch.equal(projection, projection.T)


def test_absorbing_by_hand() -> None:
    found = project_out(torch.eye(2), torch.tensor([3.0, 0.0]), ridge=1.0)
    assert found.flatten().tolist() == pytest.approx([0.1, 0, 0, 1])
    assert torch.equal(project_out(found, torch.zeros(2), ridge=1.0), found)  # nothing was seen


def test_forgetting_by_hand() -> None:
    found = relax_to_identity(torch.tensor([[0.2, 0.4], [0.4, 1.0]]))
    assert found.flatten().tolist() == pytest.approx([0.6, 0.2, 0.2, 1.0])
    assert torch.equal(relax_to_identity(torch.eye(4)), torch.eye(4))


@pytest.mark.parametrize("seed", range(5))
def test_it_stays_between_nothing_and_the_identity_and_does_not_fade(seed: int) -> None:
    torch.manual_seed(seed)
    projection, usual = torch.eye(8), 10 * torch.randn(8)
    usual[0] = 0
    for _ in range(200):
        direction = usual + torch.randn(8)
        direction[0] = 0  # a feature that is never there
        projection = project_out(relax_to_identity(projection), direction, ridge=1e-3)
        assert float((projection @ direction).norm()) < 1e-2 * float(direction.norm())
    eigenvalues = torch.linalg.eigvalsh(projection)
    assert float(eigenvalues.min()) > -1e-5
    assert float(eigenvalues.max()) < 1 + 1e-5
    assert float(eigenvalues.mean()) > 0.3
    assert float(projection[0, 0]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("alike", [True, False])
def test_a_turn_moves_its_encoder_and_the_classifier_alone(alike: bool) -> None:
    balancer = make(ADAMW, alike=alike)  # AdamW would decay whatever has a gradient, and have moments for it
    balancer.step(draw(0))
    for j, moved in enumerate(turns(balancer, draw(1))):
        names = {name for name, change in moved.items() if bool(change.any())}
        mine = (f"encoders.{j}.", f"fusion.bring.{j}.", "fusion.head.")
        assert names == {name for name in moved if name.startswith(mine)}


@pytest.mark.parametrize("alike", [True, False])
def test_the_classifier_does_not_move_along_what_the_last_turn_saw(alike: bool) -> None:
    balancer = make(PLAIN, alike=alike)
    last = None
    for seed in range(3):
        batch = draw(seed)
        seen = [mean_feature(balancer, batch, j) for j in range(3)]
        for change, now in zip(turns(balancer, batch), seen, strict=True):
            moved = change["fusion.head.weight"]
            if last is not None:
                assert float((moved @ last).norm()) < 1e-4 * float(moved.norm() * last.norm())
            assert float((moved @ now).norm()) > 1e-3 * float(moved.norm() * now.norm())
            last = now


def test_the_first_turn_of_all_takes_the_whole_gradient() -> None:
    balancer, batch = make(PLAIN), draw()
    net = copy.deepcopy(balancer.net)
    logits = net.fusion.unimodal_logits(net.encode(batch.inputs))[0]
    each = functional.cross_entropy(logits, batch.label, reduction="none")
    (each @ torch.from_numpy(WEIGHT / WEIGHT.sum())).backward()  # type: ignore[no-untyped-call]
    first = turns(balancer, batch)[0]
    for name, p in net.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else -0.5 * p.grad
        assert torch.allclose(first[name], expected, atol=1e-6)


def test_gives_the_answers_before_the_turns_and_the_mean_of_their_losses() -> None:
    balancer, batch = make(PLAIN), draw()
    with torch.no_grad():
        before = balancer.net(batch.inputs)
    outputs, loss = balancer.step(batch)
    assert torch.allclose(outputs.fused, before.fused)
    assert torch.allclose(outputs.unimodal, before.unimodal)
    assert not outputs.fused.requires_grad
    assert not loss.requires_grad
    still = make(OptimConfig(precision="float32", optimizer="sgd", lr=1e-9, momentum=0.0, weight_decay=0.0))
    outputs, loss = still.step(batch)
    assert float(loss) == pytest.approx(float(still.loss(outputs, batch)), rel=1e-5)  # where turns change nothing


def test_heads_of_their_own_listen() -> None:
    balancer, plain = make(PLAIN, own_heads=True), make(PLAIN)
    plain.net.load_state_dict(balancer.net.state_dict(), strict=False)
    for j, (moved, alone) in enumerate(zip(turns(balancer, draw()), turns(plain, draw()), strict=True)):
        heads = {name for name, change in moved.items() if name.startswith("heads.") and bool(change.any())}
        assert heads == {f"heads.{j}.weight", f"heads.{j}.bias"}
        assert all(torch.equal(moved[name], change) for name, change in alone.items())


def test_a_turn_learns_from_those_who_have_the_modality() -> None:
    present = [[True, False, True], [False, False, True]] * 3
    balancer = make(PLAIN)
    moved = turns(balancer, draw(present=present))[1]  # the turn of one that nobody has
    assert not any(bool(change.any()) for change in moved.values())
    batch = draw(present=present)
    assert len(batch.inputs[0]) == 3
    one, other = make(PLAIN), make(PLAIN)
    one.step(batch)
    first = replace(
        draw(), loss_weight=batch.loss_weight, present=batch.present, inputs=cut_to(batch.present, draw().inputs)
    )
    other.step(first)
    assert all(torch.equal(p, weights(other.net)[name]) for name, p in weights(one.net).items())


def test_what_is_frozen_or_fixed_stays() -> None:
    balancer = make(ADAMW)
    balancer.optimization.frozen[1] = True
    balancer.net.freeze_encoders([2])
    for moved in turns(balancer, draw()):
        assert not any(
            bool(change.any()) for name, change in moved.items() if name.startswith(("encoders.1", "encoders.2"))
        )


def test_an_interrupted_run_goes_on_the_same() -> None:
    one = make(ADAMW)
    one.step(draw(0))
    other = copy.deepcopy(one)
    fresh = Mla(other.net, other.optimization, other.config, epochs=2)
    fresh.load_state_dict(one.state_dict())
    for step in range(1, 4):
        one.step(draw(step))
        fresh.step(draw(step))
    assert all(torch.equal(p, weights(fresh.net)[name]) for name, p in weights(one.net).items())


def test_two_processes_with_halves_of_a_batch_do_what_one_does() -> None:
    one, twin = make(PLAIN, ridge=1.0), make(PLAIN, ridge=1.0, distributed=Twins())
    for seed in range(6):
        batch = draw(seed)
        one.step(batch)
        twin.step(replace(batch, loss_weight=batch.loss_weight / 2))
    found = dict(twin.net.named_parameters())
    for name, p in one.net.named_parameters():
        assert torch.allclose(p, found[name], atol=1e-5)
