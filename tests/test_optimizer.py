"""Tests of the optimiser and its processes: steps equal torch's, sums and gathers are equal in all processes."""

from __future__ import annotations

import copy
import functools
import io
import json
import math
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_in_processes
from torch import Tensor, distributed, nn

from mmaudit.audit.errors import ConfigError
from mmaudit.train.config import OPTIMIZERS, OptimConfig
from mmaudit.train.network import FusionNet, ModelConfig, separate_losses
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext, Optimization, local_device, open_distributed

torch.set_num_threads(1)

# The tensors of each process follow from its rank, so that the sums are known.
CONTEXT_SCRIPT = """
import json, torch
from mmaudit.train.optimizer import open_distributed

with open_distributed("cpu") as context:
    r = context.rank
    weight = torch.arange(6.0).view(2, 3) * (r + 1)
    count = torch.tensor([r, 10 * r])
    wide = torch.full((2, 1, 2, 3), float(r)).contiguous(memory_format=torch.channels_last)
    halves = torch.tensor([0.5 * r], dtype=torch.float64)
    scalar = torch.tensor(float(r))
    context.sum_([weight, count, wide, halves, scalar])
    context.sum_([])
    rows = torch.arange(5)[context.slice(5)]
    whole = torch.stack([rows, -rows])
    few = torch.arange(2)[context.slice(2)]  # of three processes one has none
    found = {
        "rank": [context.rank, context.world_size, context.is_first],
        "sums": [each.tolist() for each in (weight, count, wide, halves, scalar)],
        "kinds": [str(each.dtype) for each in (weight, count, halves)],
        "joined": context.gather(whole).tolist(),
        "yes": context.gather(rows % 2 == 1).tolist(),
        "few": context.gather(few.float()).tolist(),
        "none": list(context.gather(torch.zeros(3, 0)).shape),
        "uneven": context.gather(torch.full((r * r,), r)).tolist(),
    }
    context.wait()
print(json.dumps({**found, "open": torch.distributed.is_initialized()}))
"""


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3])
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    outputs: list[dict[str, Any]] = run_in_processes(CONTEXT_SCRIPT, size=request.param)
    return outputs


def test_processes_have_their_rank_and_world_size(results: list[dict[str, Any]]) -> None:
    size = len(results)
    assert [result["rank"] for result in results] == [[rank, size, rank == 0] for rank in range(size)]
    assert not any(result["open"] for result in results)


def test_sums_are_over_all_processes_and_equal_in_all(results: list[dict[str, Any]]) -> None:
    total, size = sum(range(len(results))), len(results)
    for result in results:
        weight, count, wide, halves, scalar = result["sums"]
        assert weight == (np.arange(6.0).reshape(2, 3) * (total + size)).tolist()
        assert count == [total, 10 * total]
        assert wide == np.full((2, 1, 2, 3), float(total)).tolist()
        assert halves == [total / 2]
        assert scalar == total
        assert result["kinds"] == ["torch.float32", "torch.int64", "torch.float64"]


def test_gathered_tensors_are_in_the_order_of_ranks(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["joined"] == [[0, 1, 2, 3, 4], [0, -1, -2, -3, -4]]
        assert result["yes"] == [False, True, False, True, False]
        assert result["few"] == [0.0, 1.0]
        assert result["none"] == [3, 0]
        assert result["uneven"] == [rank for rank in range(len(results)) for _ in range(rank * rank)]


def test_single_process_communicates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with open_distributed("cpu") as context:
        assert context == SINGLE_PROCESS
        assert (context.rank, context.world_size, context.is_first) == (0, 1, True)
        tensor = torch.arange(3.0)
        context.sum_([tensor])
        context.wait()
        assert tensor.tolist() == context.gather(tensor).tolist() == [0, 1, 2]
        assert not distributed.is_initialized()


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 9))
def test_slices_of_all_ranks_join_to_the_whole(length: int, size: int) -> None:
    elements = list(range(length))
    slices = [elements[DistributedContext(rank=rank, world_size=size).slice(length)] for rank in range(size)]
    assert [element for part in slices for element in part] == elements
    lengths = [len(part) for part in slices]
    assert max(lengths) - min(lengths) <= 1


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Simulate a machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("device", "rank", "expected"),
    [("cuda", "1", "cuda:1"), ("cuda", None, "cuda"), ("cuda:0", None, "cuda:0"), ("cpu", "5", "cpu")],
)
def test_process_uses_the_device_of_its_local_rank(
    device: str, rank: str | None, expected: str, two_gpus: pytest.MonkeyPatch
) -> None:
    if rank is not None:
        two_gpus.setenv("LOCAL_RANK", rank)
    assert local_device(device) == expected


@pytest.mark.parametrize(
    ("device", "rank", "line"),
    [
        ("cuda:0", "1", "--device cuda:0 would be shared by all processes: use --device cuda"),
        ("cuda", "2", "process 2 has no GPU: 2 available, set --nproc-per-node to at most 2"),
    ],
)
def test_two_processes_on_one_gpu_raise(device: str, rank: str, line: str, two_gpus: pytest.MonkeyPatch) -> None:
    two_gpus.setenv("LOCAL_RANK", rank)
    with pytest.raises(ConfigError, match=line):
        local_device(device)


CONFIG = ModelConfig(modalities=("audio", "visual"), shapes=((5,), (3,)), classes=tuple("abcd"), hidden=7, dropout=0.0)
LABEL = torch.arange(11) % 4


def build_net(**options: Any) -> FusionNet:
    torch.manual_seed(0)
    return FusionNet(ModelConfig(**{**{name: getattr(CONFIG, name) for name in CONFIG.__slots__}, **options}))


def build_optimization(net: FusionNet, **options: Any) -> Optimization:
    settings: dict[str, Any] = {"schedule": "constant", "weight_decay": 0.1, **options}
    return Optimization(net, OptimConfig(**settings), device="cpu", distributed=SINGLE_PROCESS)


def random_inputs(step: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(11, 5, generator=generator), torch.randn(11, 3, generator=generator)]


def loss_of(net: FusionNet, step: int = 0) -> Tensor:
    fused, unimodal = separate_losses(net(random_inputs(step)), LABEL)
    return fused.mean() + unimodal.mean(dim=1).sum()


def take_steps(optimization: Optimization, num_steps: int = 3, *, first: int = 0) -> None:
    for step in range(first, first + num_steps):
        optimization.begin_step(step)
        with optimization.autocast():
            loss = loss_of(optimization.net, step)
        optimization.backward(loss)
        optimization.apply()


def take_torch_steps(net: FusionNet, optimizer: torch.optim.Optimizer, *, clip_norm: float = 0.0) -> None:
    for step in range(3):
        loss = loss_of(net, step)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        if clip_norm:
            nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
        optimizer.step()


def assert_equal(first: FusionNet, second: FusionNet) -> None:
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


@pytest.mark.parametrize("clip_norm", [0.0, 0.3])
@pytest.mark.parametrize(("name", "optimizer_type"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_step_equals_torch_adam_bitwise(name: str, optimizer_type: type[torch.optim.Adam], clip_norm: float) -> None:
    net, reference = build_net(), build_net()
    take_steps(build_optimization(net, optimizer=name, lr=3e-2, clip_norm=clip_norm))
    optimizer = optimizer_type(reference.parameters(), lr=3e-2, weight_decay=0.1, fused=True)
    take_torch_steps(reference, optimizer, clip_norm=clip_norm)
    assert_equal(net, reference)
    assert not torch.equal(net.get_parameter("fusion.bias"), build_net().get_parameter("fusion.bias"))


@pytest.mark.parametrize("clip_norm", [0.0, 0.3])
def test_step_equals_torch_sgd_bitwise(clip_norm: float) -> None:
    net, reference = build_net(), build_net()
    take_steps(build_optimization(net, optimizer="sgd", lr=3e-2, momentum=0.8, clip_norm=clip_norm))
    optimizer = torch.optim.SGD(reference.parameters(), lr=3e-2, momentum=0.8, weight_decay=0.1, fused=True)
    take_torch_steps(reference, optimizer, clip_norm=clip_norm)
    assert_equal(net, reference)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_sgd_updates_parameters_whose_first_gradient_comes_later(precision: str) -> None:
    """torch's own fused SGD fails there. The steps are m <- 0.8 m + g + 0.1 w, w <- w - 0.01 m, m = 0 at first."""
    net, reference = build_net(), build_net()
    optimization = build_optimization(net, optimizer="sgd", lr=0.01, momentum=0.8, precision=precision)
    momentum = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for step in range(3):
        optimization.frozen = [step > 1, step < 1]
        with optimization.autocast():
            loss = loss_of(net, step)
        optimization.backward(loss)
        gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        assert {name[:11] for name in gradients} >= {"encoders.0." if step < 2 else "encoders.1."}
        assert len(gradients) < len(momentum) or step == 1
        optimization.apply()
        for name, parameter in reference.named_parameters():
            if name in gradients:
                momentum[name] = 0.8 * momentum[name] + gradients[name] + 0.1 * parameter.detach()
                parameter.data -= 0.01 * momentum[name]
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), msg=name)


def test_clipping_by_hand() -> None:
    """All gradients together are scaled to a norm of 0.5, which SGD without momentum multiplies by the rate."""
    net = build_net()
    before = copy.deepcopy(net)
    optimization = build_optimization(net, optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, clip_norm=0.5)
    grads = optimization.gradients(loss_of(net), list(net.parameters()))
    length = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
    take_steps(optimization, 1)
    assert optimization.grad_norm is not None
    assert optimization.grad_norm.item() == pytest.approx(length, rel=1e-5)
    assert length > 1
    for parameter, old, grad in zip(net.parameters(), before.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter, old - 0.1 * grad * 0.5 / length, rtol=1e-4, atol=1e-6)


def test_gradients_below_the_norm_are_not_clipped() -> None:
    net, unclipped = build_net(), build_net()
    take_steps(build_optimization(net, clip_norm=1e6))
    take_steps(build_optimization(unclipped))
    assert_equal(net, unclipped)


@pytest.mark.parametrize(
    ("options", "multipliers"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "cosine"}, [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2]),
        ({"schedule": "step", "lr_step": 2, "lr_fall": 0.1}, [1, 1, 0.1, 0.1]),
        ({"schedule": "constant", "warmup_epochs": 2}, [1 / 3, 2 / 3, 1, 1]),
    ],
)
def test_rates_by_epoch_and_modality(options: dict[str, Any], multipliers: list[float]) -> None:
    """A modality's rate: the scheduled one times its configured and its method's factor; fusion has no factor."""
    optimization = build_optimization(build_net(), lr=2e-3, modality_lr=("visual=0.5",), **options)
    for epoch, multiplier in enumerate(multipliers, start=1):
        optimization.lr_factors = [3.0, 10.0] if epoch > 1 else [1.0, 1.0]
        assert optimization.begin_epoch(epoch, epochs=4) == pytest.approx(2e-3 * multiplier)
        rates = [group["lr"] for group in optimization.optimizer.param_groups]
        factors = [3.0, 5.0, 1.0] if epoch > 1 else [1.0, 0.5, 1.0]
        assert rates == pytest.approx([2e-3 * multiplier * factor for factor in factors])


@pytest.mark.parametrize("factors", [(), ("audio=0.5",)])
def test_one_parameter_group_without_modality_rates(factors: tuple[str, ...]) -> None:
    """The steps are equal; a configured factor needs the separate groups again."""
    grouped, ungrouped = build_net(), build_net()
    config = OptimConfig(schedule="constant", modality_lr=factors)
    for net, by_modality in ((grouped, True), (ungrouped, False)):
        optimization = Optimization(net, config, device="cpu", distributed=SINGLE_PROCESS, by_modality=by_modality)
        assert len(optimization.optimizer.param_groups) == (3 if by_modality or factors else 1)
        optimization.begin_epoch(1, epochs=4)
        take_steps(optimization)
    assert_equal(grouped, ungrouped)


@pytest.mark.parametrize("fusion", ["concat", "gated"])
def test_every_parameter_has_the_rate_of_its_modality(fusion: str) -> None:
    net = build_net(fusion=fusion)
    optimization = build_optimization(net, modality_lr=("audio=0.5",))
    optimization.begin_epoch(1, epochs=4)
    rate = {id(p): group["lr"] / 1e-3 for group in optimization.optimizer.param_groups for p in group["params"]}
    expected = {id(p): 0.5 for p in net.parameters_of(0)}
    assert rate == {id(p): expected.get(id(p), 1.0) for p in net.parameters()}
    assert len(expected) == (6 if net.has_own_heads else 4)


def test_rate_of_0_does_not_update_the_modality() -> None:
    net, before = build_net(), build_net()
    optimization = build_optimization(net, modality_lr=("visual=0",))
    optimization.begin_epoch(1, epochs=4)
    take_steps(optimization)
    moved = {name: not torch.equal(p, before.get_parameter(name)) for name, p in net.named_parameters()}
    assert {name for name, m in moved.items() if not m} == {n for n in moved if n.startswith("encoders.1.")}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_modality_is_neither_updated_nor_decayed(optimizer: str) -> None:
    """Momentum of earlier steps has no effect either; after unfreezing it is updated again."""
    net = build_net(own_heads=True)
    optimization = build_optimization(net, optimizer=optimizer, lr=1e-2)
    take_steps(optimization)
    optimization.frozen = [False, True]
    before = copy.deepcopy(net)
    take_steps(optimization, first=3)
    frozen_parameters = {id(parameter) for parameter in net.parameters_of(1)}
    assert len(frozen_parameters) == 6
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)) is (id(parameter) in frozen_parameters), name
    optimization.frozen = [False, False]
    take_steps(optimization, 1, first=6)
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters_of(1), before.parameters_of(1), strict=True))


def test_frozen_encoder_is_not_updated() -> None:
    net, before = build_net(), build_net()
    net.freeze_encoders([0])
    take_steps(build_optimization(net))
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)) is name.startswith("encoders.0."), name


def test_gradients_equal_autograd_and_change_nothing() -> None:
    net = build_net(own_heads=True)
    optimization, parameters = build_optimization(net), list(net.parameters())
    unimodal = separate_losses(net(random_inputs()), LABEL)[1]
    grads = optimization.gradients(unimodal[0].mean(), parameters)
    expected = torch.autograd.grad(unimodal[0].mean(), parameters, retain_graph=True, allow_unused=True)
    for grad, expected_grad, parameter in zip(grads, expected, parameters, strict=True):
        assert torch.equal(grad, torch.zeros_like(parameter) if expected_grad is None else expected_grad)
    assert sum(expected_grad is None for expected_grad in expected) == 3  # the fused classifier
    assert all(parameter.grad is None for parameter in net.parameters())
    assert (
        optimization.gradients(unimodal[1].mean(), [net.get_parameter("heads.1.bias")])[0].abs().max() > 0
    )  # the graph is kept


def test_backward_replaces_old_gradients() -> None:
    net = build_net()
    optimization = build_optimization(net)
    optimization.backward(loss_of(net, 0))
    optimization.backward(loss_of(net, 1))
    grads = [parameter.grad for parameter in net.parameters()]
    expected = optimization.gradients(loss_of(net, 1), list(net.parameters()))
    assert all(
        grad is not None and torch.equal(grad, expected_grad)
        for grad, expected_grad in zip(grads, expected, strict=True)
    )


@pytest.mark.parametrize(("precision", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_half_precision_takes_nearly_the_same_steps(precision: str, dtype: torch.dtype) -> None:
    net, reference = build_net(), build_net()
    half, full = (
        build_optimization(network, precision=name, optimizer="sgd")
        for network, name in ((net, precision), (reference, "auto"))
    )
    with half.autocast():
        assert net.encode(random_inputs())[0].dtype == dtype
        grads = half.gradients(loss_of(net), list(net.parameters()))
    with full.autocast():
        assert reference.encode(random_inputs())[0].dtype == torch.float32
    expected = full.gradients(loss_of(reference), list(reference.parameters()))
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float32
        assert (
            grad - expected_grad
        ).abs().max() < 0.05 * expected_grad.abs().max() + 1e-3  # unscaled, and rounded by 2^-8 at most
    take_steps(half)
    take_steps(full)
    for half_parameter, full_parameter, start in zip(
        net.parameters(), reference.parameters(), build_net().parameters(), strict=True
    ):
        assert half_parameter.dtype == torch.float32
        assert (half_parameter - full_parameter).abs().max() < 0.1 * (full_parameter - start).abs().max() + 1e-5


def test_overflowing_float16_step_is_skipped() -> None:
    net, before = build_net(), build_net()
    optimization = build_optimization(net, precision="float16", optimizer="sgd")
    scale = optimization.state_dict()["scaler"]["scale"]
    optimization.backward(loss_of(net) * 1e36)
    optimization.apply()
    assert_equal(net, before)
    assert optimization.state_dict()["scaler"]["scale"] == scale / 2
    take_steps(optimization, 1)
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters(), strict=True))
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd"}, {"optimizer": "adam"}, {"precision": "float16"}])
def test_resumed_state_continues_exactly(options: dict[str, Any]) -> None:
    net = build_net()
    optimization = build_optimization(net, **options)
    optimization.lr_factors, optimization.frozen = [0.5, 2.0], [False, False]
    optimization.begin_epoch(1, epochs=4)
    take_steps(optimization)
    optimization.frozen = [True, False]
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "update": optimization.state_dict()}, file)
    resumed_net = build_net()
    resumed = build_optimization(resumed_net, **options)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed_net.load_state_dict(state["net"])
    resumed.load_state_dict(state["update"])
    assert (resumed.lr_factors, resumed.frozen) == ([0.5, 2.0], [True, False])
    for optimizer_state in (optimization, resumed):
        optimizer_state.begin_epoch(2, epochs=4)
        take_steps(optimizer_state, first=3)
    assert_equal(net, resumed_net)


def test_random_numbers_follow_from_the_step_seed() -> None:
    optimization = build_optimization(build_net(dropout=0.5))
    drawn = []
    for seed in (5, 6, 5):
        optimization.begin_step(seed)
        drawn.append(
            [optimization.net(random_inputs()).fused.tolist(), torch.rand(3, generator=optimization.generator).tolist()]
        )
    assert drawn[0] == drawn[2]
    assert drawn[0][0] != drawn[1][0]
    assert drawn[0][1] != drawn[1][1]


# Rows 0 to 10 over one process or two; visual is absent from all rows of the first of two. Of each of two trainings:
# in float32, and in float16 where the loss of the first process overflows in the second step.
SCRIPT = """
import json, torch
from mmaudit.train.config import OptimConfig
from mmaudit.train.network import ModelConfig, FusionNet, separate_losses
from mmaudit.train.optimizer import Optimization
from mmaudit.train.optimizer import open_distributed

torch.set_num_threads(1)
plan = ModelConfig(modalities=("audio", "visual"), shapes=((5,), (3,)), classes=tuple("abcd"), hidden=7, dropout=0.0)

def train(context, precision, overflow):
    torch.manual_seed(0)
    net = FusionNet(plan)
    config = OptimConfig(schedule="constant", weight_decay=0.1, clip_norm=0.3, precision=precision)
    update = Optimization(net, config, device="cpu", distributed=context)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(11, 5, generator=generator), torch.randn(11, 3, generator=generator)]
    present = torch.ones(11, 2, dtype=torch.bool)
    present[:6, 1] = False
    label, mine = torch.arange(11) % 4, context.slice(11)

    def loss():
        with update.autocast():
            rows = [each[mine][present[mine, j]] for j, each in enumerate(inputs)]
            fused, own = separate_losses(net(rows, present[mine]), label[mine])
        return fused.sum() / 11 + own[0].sum() / 11

    asked = [g.double().norm().item() for g in update.gradients(loss(), list(net.parameters()))]
    found, draws = [], []
    for step in range(3):
        update.begin_step(step)
        draws.append([torch.rand(1).item(), torch.rand(1, generator=update.generator).item()])
        update.frozen = [step == 2, False]
        update.backward(loss() * (overflow if step == 1 and context.is_first else 1.0))
        grads = [None if p.grad is None else p.grad.tolist() for p in net.parameters()]
        update.apply()
        found.append(grads)
    weights = {name: p.tolist() for name, p in net.named_parameters()}
    scale = update.state_dict()["scaler"].get("scale")
    return {"asked": asked, "grads": found[0], "none": [[g is None for g in each] for each in found],
        "weights": weights, "draws": draws, "scale": scale}

with open_distributed("cpu") as context:
    found = [train(context, "float32", 1.0), train(context, "float16", 1e38)]
print(json.dumps(found))
"""


@functools.cache
def trained_by_two() -> list[list[dict[str, Any]]]:
    """Run the script in two processes; return both trainings of each."""
    return run_in_processes(SCRIPT, size=2)


def flat(nested: Any) -> list[float]:
    return torch.tensor(nested).flatten().tolist() if nested is not None else []


def test_two_processes_take_the_step_of_one() -> None:
    """A process without a row of a modality still gets the gradient of the other process."""
    with redirect_stdout(io.StringIO()) as output:
        exec(SCRIPT, {})
    single = json.loads(output.getvalue())[0]
    first, second = (trainings[0] for trainings in trained_by_two())
    assert first["weights"] == second["weights"]
    assert first["none"] == second["none"] == single["none"]
    assert sum(single["none"][2]) == 4  # of the frozen encoder
    assert first["asked"] == pytest.approx(single["asked"], rel=1e-5, abs=1e-7)
    for distributed_grads, single_grads in zip(first["grads"], single["grads"], strict=True):
        assert flat(distributed_grads) == pytest.approx(flat(single_grads), rel=1e-4, abs=1e-6)
    for name, values in single["weights"].items():
        assert flat(first["weights"][name]) == pytest.approx(flat(values), rel=1e-3, abs=1e-4)
    assert first["draws"] != second["draws"]  # random numbers of each process ...
    assert [draw[1] for draw in first["draws"]] == [draw[1] for draw in second["draws"]]  # ... and shared ones


def test_step_that_overflows_in_one_process_is_skipped_in_all() -> None:
    first, second = (trainings[1] for trainings in trained_by_two())
    assert first["weights"] == second["weights"]
    assert first["scale"] == second["scale"] == 2**15
    assert all(math.isfinite(value) for values in first["weights"].values() for value in flat(values))
