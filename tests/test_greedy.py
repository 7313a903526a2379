"""Tests of Greedy: speeds by hand, start and end of rebalancing, and which parameters it updates."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from training import TwoEqualProcesses, draw_batch

from mmaudit.audit.errors import ConfigError
from mmaudit.train.balancing.greedy import Greedy, GreedyConfig, conditional_speeds, slowest_modality
from mmaudit.train.batches import Batch, ModelReader
from mmaudit.train.config import OptimConfig
from mmaudit.train.cross_modal import Mmtm
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext, Optimization

torch.set_num_threads(1)

NO_READER: ModelReader = None  # type: ignore[assignment]  # nothing is read
ADAMW = OptimConfig(precision="float32")
SGD = OptimConfig(precision="float32", optimizer="sgd", lr=0.5, momentum=0.0, weight_decay=0.0, schedule="constant")
NAMES = ("audio", "visual", "text")
AUDIO_SLOW = torch.tensor([[1e9, 1e7], [1e8, 1e8]])  # so large that a few steps do not change the comparison
BALANCED = torch.tensor([[1e8, 1e8], [1e8, 1e8]])


def build_greedy(
    *,
    m: int = 2,
    own_heads: bool = False,
    optim: OptimConfig = ADAMW,
    distributed: DistributedContext = SINGLE_PROCESS,
    **constants: Any,
) -> Greedy:
    """Build the method in its first epoch; by default it compares in every second step and rebalances one modality."""
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
    values: dict[str, Any] = {"alpha": 0.5, "window": 3, "first_epoch": 1, "rest": 1, "trained": "slow"}
    config = GreedyConfig(**values | constants)
    balancer = Greedy(net, Optimization(net, optim, device="cpu", distributed=distributed), config, epochs=2)
    balancer.begin_epoch(1, NO_READER)
    return balancer


def make_batch(seed: int = 1, *, m: int = 2, present: list[list[bool]] | None = None) -> Batch:
    return draw_batch([0, 1, 2, 1, 0, 0], sizes=(5, 4, 3)[:m], present=present, seed=seed)


def make_state(total: Tensor, *, ordinary: int = 0, slow: int = 0, steps_left: int = 0) -> dict[str, object]:
    state = {"total": total, "ordinary": ordinary, "slow": slow, "steps_left": steps_left}
    return {**state, "epoch": 1, "rebalanced": 0}


def changed_parameters(balancer: Greedy, batch: Batch) -> set[str]:
    before = copy.deepcopy(dict(balancer.net.named_parameters()))
    balancer.step(batch)
    return {name for name, p in balancer.net.named_parameters() if not torch.equal(p, before[name])}


def test_conditional_speeds_by_hand() -> None:
    assert conditional_speeds([1.0, 0.2], [0.1, 20.0]) == pytest.approx([1, -2])
    assert conditional_speeds([0.0], [0.0]) == [0]  # before any step


def test_slowest_modality_by_hand() -> None:
    assert slowest_modality([0.3, -0.2]) == pytest.approx((0, 0.5))
    assert slowest_modality([0.3, 0.9, -0.1]) == pytest.approx((1, 0.8))
    assert slowest_modality([0.4, 0.4]) == (0, 0)


@pytest.mark.parametrize("m", [2, 3])
def test_mu_sums_squared_gradients_over_squared_weights(m: int) -> None:
    balancer = build_greedy(m=m, alpha=1e3)
    expected = torch.zeros(2, m)
    for seed in range(3):
        batch, net = make_batch(seed, m=m), copy.deepcopy(balancer.net)
        fusion = net.fusion
        assert isinstance(fusion, Mmtm)
        branches = fusion.branch_logits(net.encode(batch.inputs))
        sum(functional.cross_entropy(z, batch.label) for z in branches).backward()  # type: ignore[union-attr]
        for j in range(m):
            paths = ((fusion.block.excite[j], fusion.block.squeeze), (net.encoders[j], fusion.heads[j]))
            for row, parts in enumerate(paths):
                parameters = [p for part in parts for p in part.parameters()]
                grads = [p.grad.square().sum() for p in parameters if p.grad is not None]
                assert len(grads) == len(parameters)
                expected[row, j] += sum(grads) / sum(p.detach().square().sum() for p in parameters)
        balancer.step(batch)
    assert balancer.state_dict()["total"].flatten().tolist() == pytest.approx(expected.flatten().tolist(), rel=1e-4)
    speeds = conditional_speeds(*expected.tolist())
    metrics = balancer.epoch_metrics()
    assert [metrics[f"speed_{name}"] for name in NAMES[:m]] == pytest.approx(speeds, abs=1e-4)


def branches_by_hand(w: dict[str, Tensor], batch: Batch, *, cut: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """Compute the branches' logits of two modalities from the weights, and their excitations."""
    features = []
    for j, x in enumerate(batch.inputs):
        h = x @ w[f"encoders.{j}.layers.0.weight"].T + w[f"encoders.{j}.layers.0.bias"]
        h = (h - h.mean(dim=1, keepdim=True)) / (h.var(dim=1, keepdim=True, correction=0) + 1e-5).sqrt()
        features.append((h * w[f"encoders.{j}.layers.1.weight"] + w[f"encoders.{j}.layers.1.bias"]).clamp(min=0))
    squeezed = (torch.cat(features, dim=1) @ w["fusion.block.squeeze.weight"].T + w["fusion.block.squeeze.bias"]).clamp(
        min=0
    )
    logits, excitations = [], []
    for j, f in enumerate(features):
        excitation = 1 / (
            1 + (-(squeezed @ w[f"fusion.block.excite.{j}.weight"].T + w[f"fusion.block.excite.{j}.bias"])).exp()
        )
        excitations.append(excitation)
        used = w[f"mean.{j}"] if j == cut else excitation
        logits.append(2 * f * used @ w[f"fusion.heads.{j}.weight"].T + w[f"fusion.heads.{j}.bias"])
    return logits, excitations


def test_three_steps_equal_the_published_ones() -> None:
    """An ordinary step that starts rebalancing, a rebalancing step, and an ordinary one, by SGD at rate 0.5.

    The gradients are those of CE(x_0) + CE(x_1). The rebalancing step moves every parameter with a gradient, its
    slow branch is excited by the mean over both steps, a constant, and its speeds are not summed.
    """
    balancer = build_greedy(optim=SGD, alpha=0.0, window=1, rest=0, trained="all")
    w = {name: p.detach().clone() for name, p in balancer.net.named_parameters()}
    total, means, slow = torch.zeros(2, 2), list[list[Tensor]](), None
    for step in range(3):
        batch, before = make_batch(step), {name: p.detach().clone() for name, p in balancer.net.named_parameters()}
        w = {name: tensor.requires_grad_() for name, tensor in w.items()}
        cut = slow if step == 1 else None
        means.append([e.detach().mean(dim=0) for e in branches_by_hand(w, batch, cut=None)[1]])
        mean = {f"mean.{j}": torch.stack([earlier[j] for earlier in means]).mean(dim=0) for j in range(2)}
        logits, _ = branches_by_hand(w | mean, batch, cut=cut)
        losses = [-z.log_softmax(dim=1)[torch.arange(6), batch.label].mean() for z in logits]
        loss = torch.stack(losses).sum()
        torch.autograd.backward(loss)
        if step != 1:
            for j in range(2):
                paths = (("fusion.block.squeeze", f"fusion.block.excite.{j}"), (f"encoders.{j}", f"fusion.heads.{j}"))
                for row, prefixes in enumerate(paths):
                    path = [tensor for name, tensor in w.items() if name.startswith(prefixes)]
                    gradients = torch.cat([t.grad.flatten() for t in path if t.grad is not None])
                    weights = torch.cat([t.detach().flatten() for t in path])
                    assert len(gradients) == len(weights)
                    total[row, j] += gradients.square().sum() / weights.square().sum()
            speeds = (total[0] / total[1]).log10()
            slow = int(speeds.argmax())
        outputs, step_loss = balancer.step(batch)
        assert float(step_loss) == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(outputs.fused, (logits[0] + logits[1]) / 2, atol=1e-5, rtol=1e-4)
        moved = {name: t.grad is not None and bool(t.grad.any()) for name, t in w.items()}
        w = {name: t.detach() - (0 if t.grad is None else 0.5 * t.grad) for name, t in w.items()}
        for name, parameter in balancer.net.named_parameters():
            torch.testing.assert_close(parameter.detach(), w[name], atol=1e-5, rtol=1e-4)
            assert moved[name] is not (step == 1 and name.startswith(f"fusion.block.excite.{slow}")), name
            assert moved[name] is not torch.equal(parameter, before[name])
    state = balancer.state_dict()
    torch.testing.assert_close(state["total"], total, rtol=1e-4, atol=1e-8)
    assert (state["rebalanced"], state["steps_left"], state["slow"]) == (1, 1, slow)


def test_rebalancing_starts_in_the_first_epoch_that_allows_it() -> None:
    """Before it, speeds are summed and no step is counted as rest."""
    balancer = build_greedy(alpha=0.0, window=1, rest=0, first_epoch=2)
    for step in range(3):
        balancer.step(make_batch(step))
    state = balancer.state_dict()
    assert (state["steps_left"], state["ordinary"]) == (0, 0)
    assert state["total"].min() > 0
    balancer.begin_epoch(2, NO_READER)
    balancer.step(make_batch(3))
    assert balancer.state_dict()["steps_left"] == 1


def test_defaults_are_those_of_the_authors_code() -> None:
    config = GreedyConfig()
    assert (config.alpha, config.window, config.first_epoch, config.rest, config.trained) == (0.01, 5, 2, 0, "all")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trained": "fast"}, "balancing.greedy.trained is 'fast'; .*slow"),
        ({"first_epoch": 0}, r"balancing.greedy.first_epoch is 0; it must lie in \[1, 1e9\]"),
        ({"window": 0}, r"balancing.greedy.window is 0; it must lie in \[1, 1e9\]"),
    ],
)
def test_invalid_settings_raise(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GreedyConfig(**options)


def test_comparison_after_rest_and_rebalancing_for_window_steps() -> None:
    balancer = build_greedy(window=3, rest=2)
    balancer.load_state_dict(make_state(AUDIO_SLOW))
    is_ordinary = [len(changed_parameters(balancer, make_batch(step))) > 10 for step in range(12)]
    assert is_ordinary == [True, True, True, False, False, False, True, True, True, False, False, False]
    assert balancer.epoch_metrics()["rebalanced"] == 6


def test_rest_0_compares_at_every_step() -> None:
    balancer = build_greedy(window=1, rest=0)
    balancer.load_state_dict(make_state(AUDIO_SLOW))
    assert [len(changed_parameters(balancer, make_batch(step))) > 10 for step in range(4)] == [True, False, True, False]


@pytest.mark.parametrize(("total", "alpha"), [(BALANCED, 0.01), (AUDIO_SLOW, 2.1)])
def test_nothing_is_rebalanced_up_to_alpha(total: Tensor, alpha: float) -> None:
    balancer = build_greedy(alpha=alpha, rest=0)
    balancer.load_state_dict(make_state(total))
    for step in range(4):
        balancer.step(make_batch(step))
    assert balancer.epoch_metrics()["rebalanced"] == 0


@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.parametrize("own_heads", [False, True])
def test_rebalancing_step_updates_only_the_slow_modality(slow: int, own_heads: bool) -> None:
    balancer = build_greedy(own_heads=own_heads)  # AdamW with decay would also update parameters with a gradient of 0
    balancer.load_state_dict(make_state(BALANCED, slow=slow, steps_left=1))
    changed = changed_parameters(balancer, make_batch())
    prefixes = {f"encoders.{slow}.", f"fusion.heads.{slow}."}
    assert {name for name in changed if not name.startswith("heads.")} == {
        name for name, _ in balancer.net.named_parameters() if any(name.startswith(prefix) for prefix in prefixes)
    }
    assert any(name.startswith("heads.") for name in changed) == own_heads  # they train on detached features
    assert len(changed_parameters(balancer, make_batch())) == len(list(balancer.net.parameters()))  # ordinary step


def test_rebalancing_step_uses_the_mean_excitation() -> None:
    balancer, batch = build_greedy(), make_batch()
    for step in range(3):
        balancer.step(make_batch(step))
    fusion = balancer.net.fusion
    assert isinstance(fusion, Mmtm)
    balancer.load_state_dict(make_state(BALANCED, slow=1, steps_left=1))
    with torch.no_grad():
        reference = copy.deepcopy(balancer.net)
        features = reference.encode(batch.inputs)
        assert isinstance(reference.fusion, Mmtm)
        excitation = reference.fusion.block(features)[0]
        reference.fusion(features)  # updates the mean first
        heads, mean_excitation = reference.fusion.heads, reference.fusion.mean_excitations()[1]
        branches = heads[0](features[0] * 2 * excitation), heads[1](features[1] * 2 * mean_excitation)
        expected = (branches[0] + branches[1]) / 2
    outputs, _ = balancer.step(batch)
    assert torch.allclose(outputs.fused, expected, atol=1e-6)
    assert fusion.cut == [False, False]


def test_failed_step_restores_the_path() -> None:
    balancer = build_greedy()
    balancer.load_state_dict(make_state(BALANCED, slow=1, steps_left=1))
    with pytest.raises(ValueError, match="shorter"):
        balancer.step(make_batch(m=1))
    assert isinstance(balancer.net.fusion, Mmtm)
    assert balancer.net.fusion.cut == [False, False]


def test_frozen_modality_is_not_updated_and_has_no_speed() -> None:
    balancer = build_greedy(own_heads=True)
    balancer.optimization.frozen[0] = True
    moved = changed_parameters(balancer, make_batch())
    assert not any(name.startswith(("encoders.0.", "heads.0.")) for name in moved)
    assert any(name.startswith("encoders.1.") for name in moved)
    assert torch.isfinite(balancer.state_dict()["total"]).all()


def test_absent_modality_updates_no_encoder() -> None:
    balancer = build_greedy()
    moved = changed_parameters(balancer, make_batch(present=[[True, False]] * 6))
    assert not any(name.startswith("encoders.1.") for name in moved)
    assert torch.isfinite(balancer.state_dict()["total"]).all()


def test_resumed_method_continues_exactly() -> None:
    original = build_greedy(window=2, rest=1)
    original.load_state_dict(make_state(AUDIO_SLOW, ordinary=1))
    for step in range(2):  # into the middle of a window
        original.step(make_batch(step))
    copied = copy.deepcopy(original)
    resumed = Greedy(copied.net, copied.optimization, copied.config, epochs=2)
    resumed.load_state_dict(original.state_dict())
    for step in range(2, 7):
        assert changed_parameters(resumed, make_batch(step)) == changed_parameters(original, make_batch(step))
    assert torch.equal(resumed.state_dict()["total"], original.state_dict()["total"])
    assert resumed.epoch_metrics() == original.epoch_metrics()


def test_two_processes_take_the_step_of_one() -> None:
    single, distributed = (
        build_greedy(alpha=0.0, window=2, distributed=SINGLE_PROCESS),
        build_greedy(alpha=0.0, window=2, distributed=TwoEqualProcesses()),
    )
    for seed in range(6):
        batch = make_batch(seed)
        single.step(batch)
        distributed.step(replace(batch, loss_weight=batch.loss_weight / 2))
    parameters = dict(distributed.net.named_parameters())
    for name, p in single.net.named_parameters():
        assert torch.allclose(p, parameters[name], atol=1e-5)
    assert distributed.epoch_metrics() == pytest.approx(single.epoch_metrics(), rel=1e-3)
    assert distributed.epoch_metrics()["rebalanced"] > 0
    buffers = dict(distributed.net.named_buffers())
    assert torch.allclose(buffers["fusion.mean"], dict(single.net.named_buffers())["fusion.mean"], atol=1e-5)
