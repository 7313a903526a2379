"""Laws of Greedy: speeds by hand, when a rebalancing starts and ends, what moves in it and what the answer is then."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from training import draw_batch

from mmaudit.train.balancing.config import BalancingConfig, GreedyConfig
from mmaudit.train.balancing.greedy import Greedy, conditional_speeds, slowest_modality
from mmaudit.train.batches import Batch
from mmaudit.train.config import OptimConfig
from mmaudit.train.distributed import SINGLE_PROCESS, DistributedContext
from mmaudit.train.fusion import Mmtm
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import Optimization

torch.set_num_threads(1)

NAMES = ("audio", "visual", "text")
AUDIO_SLOW = torch.tensor([[1e9, 1e7], [1e8, 1e8]])  # so large that a few steps do not change the verdict
BALANCED = torch.tensor([[1e8, 1e8], [1e8, 1e8]])


@dataclass(frozen=True, kw_only=True)
class Twins(DistributedContext):
    """Two processes with the same rows: sums are twice what one has."""

    size: int = 2

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor *= 2


def make(
    *,
    m: int = 2,
    alpha: float = 0.5,
    window: int = 3,
    rest: int = 1,
    own_heads: bool = False,
    distributed: DistributedContext = SINGLE_PROCESS,
) -> Greedy:
    torch.manual_seed(0)
    plan = ModelConfig(
        modalities=NAMES[:m],
        shapes=((5,), (4,), (3,))[:m],
        classes=("a", "b", "c"),
        fusion="mmtm",
        own_heads=own_heads,
        hidden=6,
        dropout=0.0,
    )
    net = FusionNet(plan)
    config = BalancingConfig(greedy=GreedyConfig(alpha=alpha, window=window, rest=rest))
    return Greedy(
        net,
        Optimization(net, OptimConfig(precision="float32"), device="cpu", distributed=distributed),
        config,
        epochs=2,
    )


def draw(seed: int = 1, *, m: int = 2, present: list[list[bool]] | None = None) -> Batch:
    return draw_batch([0, 1, 2, 1, 0, 0], sizes=(5, 4, 3)[:m], present=present, seed=seed)


def state(total: Tensor, *, ordinary: int = 0, slow: int = 0, left: int = 0) -> dict[str, object]:
    return {"total": total, "ordinary": ordinary, "slow": slow, "left": left, "rebalanced": 0}


def moves(balancer: Greedy, batch: Batch) -> set[str]:
    before = copy.deepcopy(dict(balancer.net.named_parameters()))
    balancer.step(batch)
    return {name for name, p in balancer.net.named_parameters() if not torch.equal(p, before[name])}


def test_speeds_by_hand() -> None:
    assert conditional_speeds([1.0, 0.2], [0.1, 20.0]) == pytest.approx([1, -2])
    assert conditional_speeds([0.0], [0.0]) == [0]  # nothing is known of it yet


def test_the_slow_one_and_its_lead() -> None:
    assert slowest_modality([0.3, -0.2]) == pytest.approx((0, 0.5))
    assert slowest_modality([0.3, 0.9, -0.1]) == pytest.approx((1, 0.8))
    assert slowest_modality([0.4, 0.4]) == (0, 0)


@pytest.mark.parametrize("m", [2, 3])
def test_mu_adds_up_squared_gradients_over_squared_weights(m: int) -> None:
    balancer = make(m=m, alpha=1e3)
    expected = torch.zeros(2, m)
    for seed in range(3):
        batch, net = draw(seed, m=m), copy.deepcopy(balancer.net)
        fusion = net.fusion
        assert isinstance(fusion, Mmtm)
        functional.cross_entropy(net(batch.inputs).fused, batch.label).backward()  # type: ignore[no-untyped-call]
        for j in range(m):
            paths = ((fusion.excite[j], fusion.squeeze), (net.encoders[j], fusion.heads[j]))
            for row, parts in enumerate(paths):
                every = [p for part in parts for p in part.parameters()]
                grads = [p.grad.square().sum() for p in every if p.grad is not None]
                assert len(grads) == len(every)
                expected[row, j] += sum(grads) / sum(p.detach().square().sum() for p in every)
        balancer.step(batch)
    assert balancer.state_dict()["total"].flatten().tolist() == pytest.approx(expected.flatten().tolist(), rel=1e-4)
    speeds = conditional_speeds(*expected.tolist())
    numbers = balancer.epoch_metrics()
    assert [numbers[f"speed_{name}"] for name in NAMES[:m]] == pytest.approx(speeds, abs=1e-4)


def test_speeds_are_compared_after_the_rest_and_rebalanced_for_the_window() -> None:
    balancer = make(window=3, rest=2)
    balancer.load_state_dict(state(AUDIO_SLOW))
    whole = [len(moves(balancer, draw(step))) > 10 for step in range(12)]
    assert whole == [True, True, True, False, False, False, True, True, True, False, False, False]
    assert balancer.epoch_metrics()["rebalanced"] == 6


def test_no_rest_compares_at_every_step() -> None:
    balancer = make(window=1, rest=0)
    balancer.load_state_dict(state(AUDIO_SLOW))
    assert [len(moves(balancer, draw(step))) > 10 for step in range(4)] == [True, False, True, False]


@pytest.mark.parametrize(("total", "alpha"), [(BALANCED, 0.01), (AUDIO_SLOW, 2.1)])
def test_up_to_alpha_nothing_is_rebalanced(total: Tensor, alpha: float) -> None:
    balancer = make(alpha=alpha, rest=0)
    balancer.load_state_dict(state(total))
    for step in range(4):
        balancer.step(draw(step))
    assert balancer.epoch_metrics()["rebalanced"] == 0


@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.parametrize("own_heads", [False, True])
def test_only_the_slow_modality_moves_in_a_rebalancing_step(slow: int, own_heads: bool) -> None:
    balancer = make(own_heads=own_heads)  # AdamW with decay: what has a gradient of 0 would move too
    balancer.load_state_dict(state(BALANCED, slow=slow, steps_left=1))
    moved = moves(balancer, draw())
    own = {f"encoders.{slow}.", f"fusion.heads.{slow}."}
    assert {name for name in moved if not name.startswith("heads.")} == {
        name for name, _ in balancer.net.named_parameters() if any(name.startswith(each) for each in own)
    }
    assert any(name.startswith("heads.") for name in moved) == own_heads  # which only listen
    assert len(moves(balancer, draw())) == len(list(balancer.net.parameters()))  # over again


def test_the_slow_modality_is_excited_by_the_usual_in_a_rebalancing_step_alone() -> None:
    balancer, batch = make(), draw()
    for step in range(3):
        balancer.step(draw(step))
    fusion = balancer.net.fusion
    assert isinstance(fusion, Mmtm)
    balancer.load_state_dict(state(BALANCED, slow=1, steps_left=1))
    with torch.no_grad():
        reference = copy.deepcopy(balancer.net)
        features = reference.encode(batch.inputs)
        assert isinstance(reference.fusion, Mmtm)
        now = reference.fusion.excitations(features)[0]
        reference.fusion(features)  # the running mean moves first
        heads, usual = reference.fusion.heads, reference.fusion.mean_excitations()[1]
        expected = heads[0](features[0] * 2 * now.sigmoid()) + heads[1](features[1] * 2 * usual.sigmoid())
    outputs, _ = balancer.step(batch)
    assert torch.allclose(outputs.fused, expected, atol=1e-6)
    assert fusion.cut == [False, False]


def test_the_path_is_whole_again_when_a_step_fails() -> None:
    balancer = make()
    balancer.load_state_dict(state(BALANCED, slow=1, steps_left=1))
    with pytest.raises(ValueError, match="shorter"):
        balancer.step(draw(m=1))
    assert isinstance(balancer.net.fusion, Mmtm)
    assert balancer.net.fusion.cut == [False, False]


def test_what_is_frozen_stays_and_has_no_speed() -> None:
    balancer = make(own_heads=True)
    balancer.optimization.frozen[0] = True
    moved = moves(balancer, draw())
    assert not any(name.startswith(("encoders.0.", "heads.0.")) for name in moved)
    assert any(name.startswith("encoders.1.") for name in moved)
    assert torch.isfinite(balancer.state_dict()["total"]).all()


def test_an_absent_modality_moves_nothing_of_its_own() -> None:
    balancer = make()
    moved = moves(balancer, draw(present=[[True, False]] * 6))
    assert not any(name.startswith("encoders.1.") for name in moved)
    assert torch.isfinite(balancer.state_dict()["total"]).all()


def test_an_interrupted_run_goes_on_the_same() -> None:
    one = make(window=2, rest=1)
    one.load_state_dict(state(AUDIO_SLOW, ordinary=1))
    for step in range(2):  # into the middle of a window
        one.step(draw(step))
    other = copy.deepcopy(one)
    fresh = Greedy(other.net, other.optimization, other.config, epochs=2)
    fresh.load_state_dict(one.state_dict())
    for step in range(2, 7):
        assert moves(fresh, draw(step)) == moves(one, draw(step))
    assert torch.equal(fresh.state_dict()["total"], one.state_dict()["total"])
    assert fresh.epoch_metrics() == one.epoch_metrics()


def test_two_processes_with_halves_of_a_batch_do_what_one_does() -> None:
    one, twin = make(alpha=0.0, window=2, distributed=SINGLE_PROCESS), make(alpha=0.0, window=2, distributed=Twins())
    for seed in range(6):
        batch = draw(seed)
        one.step(batch)
        twin.step(replace(batch, loss_weight=batch.loss_weight / 2))
    found = dict(twin.net.named_parameters())
    for name, p in one.net.named_parameters():
        assert torch.allclose(p, found[name], atol=1e-5)
    assert twin.epoch_metrics() == pytest.approx(one.epoch_metrics(), rel=1e-3)
    assert twin.epoch_metrics()["rebalanced"] > 0
    buffers = dict(twin.net.named_buffers())
    assert torch.allclose(buffers["fusion.mean"], dict(one.net.named_buffers())["fusion.mean"], atol=1e-5)
