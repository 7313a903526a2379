"""Tests of balancing methods in a loop of the user's: equal to finetune's steps, exact resume, and refusals."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from processes import run_in_processes
from torch import Tensor, nn

import mmaudit
from mmaudit.audit.errors import ConfigError, TrainError
from mmaudit.train import custom_loop
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.balancing.agm import AgmConfig
from mmaudit.train.balancing.balancer import Balancer
from mmaudit.train.batches import Batch, Step, to_batch
from mmaudit.train.config import OptimConfig
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext, Optimization

torch.set_num_threads(1)
SIZES = {"audio": 4, "image": 5}
REFUSED = {  # with batches for train and validation
    "aug": "adds classifiers to a modality",
    "greedy": "cross-modal path",
    "mla": "one classifier that all modalities share",
    "mmcosine": "scaled cosines",
    "reconboost": "share one classifier",
    "gblend": "trains copies of the network",
    "mslr": "learning rate per modality",
}


class Net(nn.Module):
    """A network of the user's: two encoders, and one layer over their features."""

    def __init__(self, *, num_classes: int = 3, hidden: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_features, self.num_classes = dict.fromkeys(SIZES, hidden), num_classes
        self.encoders = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(size, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Dropout(dropout))
                for name, size in SIZES.items()
            }
        )
        self.head = nn.Linear(2 * hidden, num_classes)

    def fuse(self, features: Any) -> Tensor:
        logits: Tensor = self.head(torch.cat(features, dim=1))
        return logits


class Split(Net):
    """The same, with the logits of each modality alone."""

    def unimodal_logits(self, features: Any) -> Tensor:
        parts = self.head.weight.chunk(2, dim=1)
        return torch.stack([f @ part.T + self.head.bias / 2 for f, part in zip(features, parts, strict=True)])


def data(n: int = 48, *, seed: int = 0) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Batches of 16 samples, whose modalities both show the class."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 3
    inputs = {
        name: torch.eye(3)[label] @ torch.ones(3, size).triu() + 0.3 * torch.randn(n, size, generator=generator)
        for name, size in SIZES.items()
    }
    parts = torch.randperm(n, generator=generator).view(-1, 16)
    return [({name: x[rows] for name, x in inputs.items()}, label[rows]) for rows in parts]


def build(name: str, model: nn.Module, *, lr: float = 0.1, **options: Any) -> mmaudit.Balanced:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return mmaudit.balance(model, name, optimizer, **{"train": data(), "validation": data(), **options})


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", list(BALANCERS))
@pytest.mark.parametrize("kind", [Net, Split])
def test_every_method_trains_or_is_refused_before_any_step(name: str, kind: type[Net]) -> None:
    torch.manual_seed(0)
    model = kind()
    if name in REFUSED:
        with pytest.raises(ConfigError, match=f"balancing {name} does not work.*{REFUSED[name]}"):
            build(name, model)
        return
    balanced = build(name, model, settings={"balancing.gmm.warmup_epochs": 1} if name == "gmm" else {}, epochs=4)
    losses = []
    for epoch in range(4):
        balanced.set_epoch(epoch)
        losses.append(float(sum(balanced.step(inputs, label) for inputs, label in data())))
    assert losses[-1] < losses[0]
    assert all(np.isfinite(value) for value in balanced.metrics().values())


def test_what_a_method_evaluates_is_declared() -> None:
    """Without the batches it is refused at once, not in the epoch that needs them."""
    for name, key in (("gmm", "train"), ("pmr", "train"), ("relearning", "train"), ("mses", "validation")):
        missing: dict[str, Any] = {key: None}
        with pytest.raises(ConfigError, match=f"balancing {name} evaluates {key} samples between epochs: pass {key}"):
            build(name, Net(), **missing)
    for name in set(BALANCERS) - {*REFUSED, "gmm", "pmr", "relearning", "mses"}:
        balanced = build(name, Net(), train=None, validation=None)
        for epoch in range(2):
            balanced.set_epoch(epoch)
            balanced.step(*data()[0])


@pytest.mark.parametrize("name", list(BALANCERS))
def test_declared_evaluations_are_those_of_the_source(name: str) -> None:
    method = BALANCERS.load(name)
    source = "".join(inspect.getsource(base) for base in method.__mro__[: method.__mro__.index(Balancer)])
    calls = {"train": ".read(", "validation": ".read_validation(", "copies": ".train_copy("}
    called = {key for key, call in calls.items() if f"model_reader{call}" in source}
    called |= {"validation"} if "validation." in inspect.getsource(method.end_epoch) else set()
    assert called == {*method.evaluates}


@pytest.mark.parametrize("kind", [Net, Split])
def test_joint_is_a_plain_loop(kind: type[Net]) -> None:
    torch.manual_seed(0)
    model = kind(dropout=0.5)
    plain = copy.deepcopy(model)
    balanced = build("joint", model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    for inputs, label in data():
        balanced.step(inputs, label)
    torch.manual_seed(1)
    for inputs, label in data():
        optimizer.zero_grad()
        logits = plain.fuse([encoder(inputs[key]) for key, encoder in plain.encoders.items()])
        torch.autograd.backward(nn.functional.cross_entropy(logits, label))
        optimizer.step()
    for ours, expected in zip(weights(model), weights(plain), strict=True):
        torch.testing.assert_close(ours, expected)


def copy_weights(model: Net, net: FusionNet) -> None:
    """Copy the weights of the user's network into one of mmaudit's own of the same form."""
    for encoder, key in zip(net.encoders, SIZES, strict=True):
        encoder.layers.load_state_dict(model.encoders[key].state_dict())  # type: ignore[union-attr]
    for head, part in zip(net.fusion.heads, model.head.weight.chunk(2, dim=1), strict=True):  # type: ignore[arg-type]
        head.weight.data.copy_(part)
    net.fusion.bias.data.copy_(model.head.bias)  # type: ignore[operator]


def batch_of(inputs: dict[str, Tensor], target: Tensor) -> Batch:
    return to_batch(
        Step(rows=np.arange(len(target))),
        tuple(inputs.values()),
        label=target,
        weight=np.ones(len(target), np.float32),
        distributed=SINGLE_PROCESS,
    )


def assert_equal_weights(model: Net, net: FusionNet) -> None:
    torch.testing.assert_close(net.fusion.bias, model.head.bias)
    for encoder, key in zip(net.encoders, SIZES, strict=True):
        for ours, expected in zip(encoder.parameters(), model.encoders[key].parameters(), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ["joint", "sum", "ogm", "ogm-ge", "agm", "lfm", "dgl"])
def test_steps_are_those_of_finetune(name: str) -> None:
    """A network of the form of mmaudit's own has the same weights after the same steps."""
    torch.manual_seed(0)
    model = Split()
    shapes, modalities = tuple((size,) for size in SIZES.values()), tuple(SIZES)
    net = FusionNet(ModelConfig(modalities=modalities, shapes=shapes, classes=("a", "b", "c"), hidden=8, dropout=0.0))
    copy_weights(model, net)
    config = OptimConfig(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.0, precision="float32")
    optimization = Optimization(net, config, device="cpu", distributed=SINGLE_PROCESS)
    balancer = BALANCERS.load(name)(net, optimization, epochs=1)
    balancer.begin_epoch(1, None)
    balanced = build(name, model)
    balanced.set_epoch(0)
    for inputs, label in data():
        balanced.step(inputs, label)
        optimization.generator.manual_seed(balanced._balancer.optimization.generator.initial_seed())
        balancer.step(balancer.prepare(batch_of(inputs, label)))
    assert_equal_weights(model, net)


CLASSES_ONLY = {"gmm", "lfm", "ogm", "ogm-ge", "pmr", "relearning", "inforeg"}


def target_data(task: str, *, seed: int = 0) -> list[tuple[dict[str, Tensor], Tensor]]:
    """The same batches with label sets (16, 3), or with numbers (16,) of mean about 0."""

    def target(label: Tensor) -> Tensor:
        sets = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]])
        return sets[label] if task == "multilabel" else label - 1.0

    return [(inputs, target(label)) for inputs, label in data(seed=seed)]


@pytest.mark.parametrize("task", ["multilabel", "regression"])
@pytest.mark.parametrize("name", [name for name in BALANCERS if name not in REFUSED])
def test_other_targets_are_trained_or_refused(task: str, name: str) -> None:
    torch.manual_seed(0)
    batches = target_data(task)
    model = Net(num_classes=3 if task == "multilabel" else 1)
    options: dict[str, Any] = {"task": task, "train": batches, "validation": batches}
    options["regression_loss"] = "l1" if task == "multilabel" else "mse"
    if name in CLASSES_ONLY:
        with pytest.raises(ConfigError, match=f"balancing {name} needs classes, and the task is {task}: "):
            build(name, model, **options)
        return
    balanced = build(name, model, lr=0.1 if task == "multilabel" else 0.02, **options)
    losses = []
    for epoch in range(8):
        balanced.set_epoch(epoch)
        losses.append(float(sum(balanced.step(inputs, label) for inputs, label in batches)))
    assert losses[-1] < 0.7 * losses[0]
    assert all(np.isfinite(value) for value in balanced.metrics().values())


@pytest.mark.parametrize(("task", "loss"), [("multilabel", "l1"), ("regression", "l1"), ("regression", "mse")])
@pytest.mark.parametrize("name", ["joint", "sum", "agm", "mmpareto", "dgl"])
def test_steps_on_other_targets_are_those_of_finetune(task: str, loss: str, name: str) -> None:
    """In finetune numbers are in data units; in a loop of the user's they are standardised before."""
    torch.manual_seed(0)
    num_outputs, mean, scale = (3, 0.0, 1.0) if task == "multilabel" else (1, 20.0, 4.0)
    model = Net(num_classes=num_outputs)
    config = ModelConfig(
        modalities=tuple(SIZES),
        shapes=tuple((size,) for size in SIZES.values()),
        classes=("a", "b", "c")[:num_outputs],
        task=task,
        regression_loss=loss,
        own_heads=True,
        hidden=8,
        dropout=0.0,
    )
    net = FusionNet(config)
    if task == "regression":
        net.standardise_target(torch.tensor([[mean - scale], [mean + scale]]))
    constants = {"balancing.agm.clip": 0.0} if name == "agm" else {}  # the norm of finetune counts its heads too
    balanced = build(name, model, task=task, regression_loss=loss, settings=constants)
    copy_weights(model, net)
    for ours, head in zip(net.heads, balanced._net.heads, strict=False):  # joint of the loop has none
        ours.load_state_dict(head.state_dict())
    optim = OptimConfig(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.0, precision="float32")
    optimization = Optimization(net, optim, device="cpu", distributed=SINGLE_PROCESS)
    method = BALANCERS.load(name)
    config_of_method = AgmConfig(clip=0.0) if name == "agm" else None
    balancer = method(net, optimization, config_of_method, epochs=1)
    balancer.begin_epoch(1, None)
    for inputs, label in target_data(task):
        balanced.step(inputs, label)
        target = label.float() if task == "multilabel" else (mean + scale * label)[:, None]
        balancer.step(balancer.prepare(batch_of(inputs, target)))
    assert_equal_weights(model, net)


def test_targets_of_another_shape_raise(caplog: pytest.LogCaptureFixture) -> None:
    inputs, label = data()[0]
    for task, num_outputs, target, message in (
        ("classification", 3, label[:, None], r"shape \(16, 1\).* the task classification has a class per sample"),
        ("classification", 3, label.float(), "type torch.float32; the task classification"),
        ("multilabel", 3, label, r"0 or 1 for each label \(b, 3\)"),
        ("multilabel", 3, torch.ones(16, 2), r"shape \(16, 2\)"),
        ("regression", 1, torch.ones(16, 2), r"a number per sample, \(b,\) or \(b, 1\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            build("joint", Net(num_classes=num_outputs), task=task).step(inputs, target)
    with pytest.raises(ConfigError, match="unimodal_logits add up to the fused logits"):
        build("sum", Split(num_classes=1), task="regression").step(inputs, label.float())
    with pytest.raises(ConfigError, match="num_classes 3; of a regression it predicts one number"):
        build("joint", Net(), task="regression")
    with pytest.raises(ConfigError, match="task regresion: no such task; did you mean regression"):
        build("joint", Net(), task="regresion")
    with caplog.at_level("WARNING", logger="mmaudit"):
        build("joint", Net(), regression_loss="mse")
    assert "regression_loss mse has no effect: the task is classification" in caplog.text


@pytest.mark.parametrize("name", ["ogm-ge", "agm", "mmpareto", "gmm", "mses"])
def test_a_state_resumes_exactly(name: str) -> None:
    torch.manual_seed(0)
    model = Net()
    balanced = build(name, model)
    for epoch in range(2):
        balanced.set_epoch(epoch)
        for inputs, label in data():
            balanced.step(inputs, label)
    saved = copy.deepcopy(
        (model.state_dict(), balanced.state_dict(), balanced._balancer.optimization.optimizer.state_dict())
    )
    resumed_model = Net()
    resumed = build(name, resumed_model)
    resumed_model.load_state_dict(saved[0])
    resumed._balancer.optimization.optimizer.load_state_dict(saved[2])
    resumed.load_state_dict(saved[1])
    for training in (balanced, resumed):
        training.set_epoch(2)
        for inputs, label in data(seed=1):
            training.step(inputs, label)
    for ours, expected in zip(weights(resumed_model), weights(model), strict=True):
        assert torch.equal(ours, expected)


def test_weights_and_missing_modalities() -> None:
    """A sample of weight 0 counts as none; the rows of an absent modality do not matter."""
    inputs, label = data()[0]
    results = []
    for rows, fill in ((slice(0, 12), 0.0), (slice(None), 1e6)):
        torch.manual_seed(0)
        model = Split()
        balanced = build("sum", model)
        weight = torch.ones(16)
        weight[12:] = 0
        present = torch.ones(16, 2, dtype=torch.bool)
        present[3, 1] = False
        image = inputs["image"].clone()
        image[3] = fill
        batch = {"audio": inputs["audio"][rows], "image": image[rows]}
        balanced.step(batch, label[rows], weight=weight[rows], present=present[rows])
        results.append(weights(model))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_heads_are_added_to_the_optimizer_only_where_they_are_needed() -> None:
    for name, kind, num_groups in (("joint", Net, 1), ("ogm", Net, 2), ("ogm", Split, 1), ("mmpareto", Split, 2)):
        model = kind()
        optimizer = torch.optim.AdamW(model.parameters())
        names = set(model.state_dict())
        mmaudit.balance(model, name, optimizer)
        assert len(optimizer.param_groups) == num_groups
        assert set(model.state_dict()) == names


@pytest.mark.parametrize("name", ["joint", "pmr", "agm", "dgl", "mses"])
def test_the_modes_of_the_network_stay_as_they_are(name: str) -> None:
    model = Net()
    model.train()
    model.encoders["image"].eval()  # a frozen part of the user's
    model.head.eval()
    before = {key: module.training for key, module in model.named_modules()}
    balanced = build(name, model)
    for epoch in range(2):
        balanced.set_epoch(epoch)
        balanced.step(*data()[0])
        assert {key: module.training for key, module in model.named_modules()} == before


def test_token_numbers_are_inputs_too() -> None:
    model = Net()
    model.encoders["image"] = nn.EmbeddingBag(10, 8)
    inputs, label = data()[0]
    for name in ("agm", "ogm-ge"):
        balanced = build(name, model, train=None, validation=None)
        assert balanced.step({**inputs, "image": torch.arange(64).view(16, 4) % 10}, label).isfinite()


def test_wrong_networks_and_settings_raise() -> None:
    optimizer = torch.optim.SGD(Net().parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="the network Linear lacks encoders, num_features, num_classes, fuse"):
        mmaudit.balance(nn.Linear(1, 1), "ogm", optimizer)
    model = Net()
    model.num_features = {"audio": 8}
    with pytest.raises(ConfigError, match="the names must be the same"):
        mmaudit.balance(model, "ogm", optimizer)
    model = Net()
    model.num_features["image"] = 7
    with pytest.raises(TrainError, match=r"features of shape \(16, 8\), must be \(16, 7\)"):
        build("ogm", model).step(*data()[0])
    with pytest.raises(ConfigError, match="--balancing ogmge: no such name; did you mean ogm-ge"):
        build("ogmge", Net())
    with pytest.raises(ConfigError, match=r"no config key balancing\.ogm\.alfa"):
        build("ogm", Net(), settings={"balancing.ogm.alfa": 1.0})
    with pytest.raises(ConfigError, match=r"setting ogm\.alpha"):
        build("ogm", Net(), settings={"ogm.alpha": 1.0})
    with pytest.raises(ConfigError, match="precision float16"):
        build("ogm", Net(), precision="float16")


def test_wrong_batches_raise() -> None:
    balanced, (inputs, label) = build("ogm", Net()), data()[0]
    with pytest.raises(ConfigError, match="the inputs lack image; they are audio"):
        balanced.step({"audio": inputs["audio"]}, label)
    with pytest.raises(ConfigError, match="1 inputs for 2 modalities"):
        balanced.step([inputs["audio"]], label)
    with pytest.raises(ConfigError, match="the input of audio has 16 rows, and label 15"):
        balanced.step(inputs, label[1:])
    with pytest.raises(ConfigError, match="counted from 0"):
        balanced.set_epoch(-1)
    with pytest.raises(ConfigError, match="yielded no batch"):
        build("pmr", Net(), train=iter(())).set_epoch(0)


PARALLEL = ["sum", "ogm-ge", "agm", "mmpareto", "gmm", "inforeg"]


def part_of(batch: tuple[dict[str, Tensor], Tensor], rank: int, size: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return a process's rows of a batch: of two processes 10 and 6 of 16, as loaders do not split evenly either."""
    rows = slice(0, None) if size == 1 else (slice(0, 10), slice(10, None))[rank]
    return {name: x[rows] for name, x in batch[0].items()}, batch[1][rows]


def trained_part(name: str, *, rank: int = 0, size: int = 1) -> list[list[float]]:
    """Train three epochs on this process's parts; return loss and metrics of each step, then the weights."""
    torch.manual_seed(0)
    return run_part(build(name, Net(), settings=_active(name), epochs=3), rank=rank, size=size)


def _active(name: str) -> dict[str, Any]:
    return {"balancing.gmm.warmup_epochs": 1} if name == "gmm" else {}


def run_part(balanced: mmaudit.Balanced, *, rank: int, size: int) -> list[list[float]]:
    results = []
    for epoch in range(3):
        balanced.set_epoch(epoch)
        for batch in data():
            loss = balanced.step(*part_of(batch, rank, size))
            results.append([float(loss), *balanced.metrics().values()])
    return [*results, *(p.detach().flatten().tolist() for p in balanced._net.parameters())]


PROCESSES = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from test_custom_loop import PARALLEL, trained_part
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
print(json.dumps([trained_part(name, rank=rank, size=2) for name in PARALLEL]))
torch.distributed.destroy_process_group()
"""


def assert_same_training(results: list[list[list[float]]], name: str) -> None:
    """Both processes have the same numbers, which are those of one process up to the order of sums."""
    first, second = results
    assert first == second
    for row, expected in zip(first, trained_part(name), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.slow  # test_two_threads_train_as_one_process is quick
def test_two_processes_train_as_one() -> None:
    """Without dropout and batch normalisation, whose random numbers and batches are each process's own."""
    script = PROCESSES.format(tests=str(Path(__file__).parent))
    ranks = run_in_processes(script, size=2)
    for index, name in enumerate(PARALLEL):
        assert_same_training([rank[index] for rank in ranks], name)


class ThreadContext(DistributedContext):
    """One of two threads in place of two processes: sums in the order of ranks."""

    barrier = threading.Barrier(2, timeout=60)
    parts: ClassVar[list[list[Tensor]]] = [[], []]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        self.parts[self.rank] = [tensor.detach().clone() for tensor in tensors]
        self.barrier.wait()
        with torch.no_grad():
            for tensor, first, second in zip(tensors, *self.parts, strict=True):
                tensor.copy_(first + second)
        self.barrier.wait()


@pytest.mark.parametrize("name", PARALLEL)
def test_two_threads_train_as_one_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = []
    for rank in range(2):
        monkeypatch.setattr(custom_loop, "_context", lambda rank=rank: ThreadContext(rank=rank, world_size=2))
        torch.manual_seed(0)
        trainings.append(build(name, Net(), settings=_active(name), epochs=3))
    monkeypatch.undo()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run_part, training, rank=rank, size=2) for rank, training in enumerate(trainings)]
        assert_same_training([future.result(timeout=60) for future in futures], name)
