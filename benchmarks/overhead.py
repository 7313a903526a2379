"""Overhead of training by each method over a bare PyTorch loop. --quick: a quarter of the rows.

Run with: python benchmarks/overhead.py [--quick] [--cpu] [SIZE:SAMPLING:BALANCING ...], such as large:bss-l:joint
The bounds are against a loop of torch's own parts, with the same dropout and fused AdamW. They do not apply to --quick,
in which the checkpoint of an epoch weighs four times as much. --cpu: CPU seconds of one thread in place of the time,
for a machine that has other work.

Two modalities of 1,024 features each, encoders of 512, batches of 256, 30 classes. The bare loop below runs over
tensors that are on the device already, with the same layers, loss and optimiser, and the same validation after every
epoch. mmaudit is all of `finetune_on`: order, batches, losses, history, validation and a checkpoint every epoch. The
features-only path is also measured with little computation, with the default network (512 features, 128 hidden, batches
of 64). Both alternate; the overhead is the median over rounds of the ratio of seconds per encoded vector, so that
samplers that use fewer samples, or more of one modality, are compared fairly.

Prints a Markdown table; the exit code is 1 if a bound is missed.
"""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.rebalance.curriculum import OrderConfig
from mmaudit.train.batches import Batch, Step
from mmaudit.train.config import FinetuneConfig, TrainConfig
from mmaudit.train.examples import Examples
from mmaudit.train.finetune import finetune_on
from mmaudit.train.training_data import TrainingData

Clock = Callable[[], float]
NUM_CLASSES = 30
ROUNDS = 3
EPOCHS = 8  # per round, including one evaluation of the model by bss-l


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of a training: rows, features per modality, hidden units of the encoders, batch size."""

    rows: int
    features: int
    hidden: int
    batch: int


LARGE = Size(rows=25_600, features=1024, hidden=512, batch=256)
SMALL = Size(rows=25_600, features=512, hidden=128, batch=64)

AIM = 0.1  # largest overhead
# sampling, balancing, largest allowed overhead; None: no bound.
METHODS = (
    ("uniform", "joint", AIM),
    ("bss-h", "joint", AIM),
    ("bss-l", "joint", AIM),
    ("dus-h", "sum", AIM),
    ("dus-rl", "sum", AIM),
    ("uniform", "gmm", AIM),
    ("uniform", "ogm-ge", AIM),
    ("smv", "joint", None),
    ("uniform", "sum", None),
    ("uniform", "modality-dropout", None),
    ("uniform", "ogm", None),
    ("uniform", "agm", None),
    ("uniform", "pmr", None),
    ("uniform", "greedy", None),
    ("uniform", "mmpareto", None),
    ("uniform", "mses", None),
    ("uniform", "mslr", None),
    ("uniform", "mla", None),
    ("uniform", "gblend", None),
)


def draw(size: Size) -> Examples:
    rng = np.random.default_rng(0)
    n = size.rows + 1024
    label = rng.integers(0, NUM_CLASSES, n)
    inputs = []
    for _ in range(2):
        means = rng.standard_normal((NUM_CLASSES, size.features)).astype(np.float32) / 8
        inputs.append(MatrixInputs(matrix=means[label] + rng.standard_normal((n, size.features), dtype=np.float32)))
    split = np.array(["train"] * size.rows + ["validation"] * 512 + ["test"] * 512, dtype=object)
    return Examples(
        sample_id=pa.array([f"s{number}" for number in range(n)], pa.large_string()),
        inputs=tuple(inputs),
        shapes=((size.features,),) * 2,
        present=np.ones((n, 2), dtype=bool),
        content=np.array([f"c{number}" for number in range(n)], dtype="S32"),
        modalities=("audio", "visual"),
        label=label,
        class_names=tuple(str(number) for number in range(NUM_CLASSES)),
        split=split,
        rank=rng.permutation(n),
        weight=np.ones(n, np.float32),
        discrepancy=rng.uniform(-1, 1, n),
        balance=rng.uniform(-1, 1, n),
        p_balanced=rng.random(n),
        in_manifest=np.ones(n, dtype=bool),
    )


class Bare(nn.Module):
    """The same network, written in plain PyTorch."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(
            nn.Sequential(nn.Linear(size.features, size.hidden), nn.LayerNorm(size.hidden), nn.ReLU(), nn.Dropout(0.3))
            for _ in range(2)
        )
        self.head = nn.Linear(2 * size.hidden, NUM_CLASSES)

    def forward(self, audio: Tensor, visual: Tensor) -> Tensor:
        a, v = self.encoders[0](audio), self.encoders[1](visual)
        logits: Tensor = self.head(torch.cat([a, v], dim=1))
        return logits


def run_bare(examples: Examples, size: Size, device: str, *, clock: Clock = time.perf_counter) -> float:
    """Train the bare loop; return the seconds per encoded vector, without the first epoch."""
    torch.manual_seed(0)
    audio, visual = (torch.from_numpy(m.read(np.arange(m.num_rows))).to(device) for m in examples.inputs)
    label = torch.from_numpy(examples.label).to(device)
    net = Bare(size).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)
    validation = torch.from_numpy(examples.rows("validation")).to(device)
    times = []
    for _ in range(EPOCHS + 1):
        _wait(device)
        started = clock()
        net.train()
        total = torch.zeros((), device=device)
        order = torch.randperm(size.rows, device=device)
        for rows in order.split(size.batch):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(audio[rows], visual[rows]), label[rows])
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.detach()
        net.eval()
        with torch.no_grad():
            float((net(audio[validation], visual[validation]).argmax(dim=1) == label[validation]).float().mean())
        _wait(device)
        times.append(clock() - started)
    return sum(times[1:]) / (EPOCHS * size.rows * 2)


def run_mmaudit(
    examples: Examples, size: Size, sampling: str, balancing: str, device: str, *, clock: Clock = time.perf_counter
) -> float:
    """Train by mmaudit; return the seconds per encoded vector after epoch 1, with evaluations and checkpoints."""
    config = TrainConfig(
        finetune=FinetuneConfig(
            epochs=EPOCHS + 1, batch_size=size.batch, hidden=size.hidden, sampling=sampling, balancing=balancing
        ),
        order=OrderConfig(start=0.5, grow_epochs=4),
        balancing={"gmm": {"warmup_epochs": 0}},
    )
    ends, encoded = list[float](), [0]

    def progress(stage: str, done: int, total: int, *, detail: str = "") -> None:
        _wait(device)
        ends.append(clock())
        encoded.append(0)

    batches = TrainingData.batches

    def counted(self: TrainingData, steps: Iterable[Step], **options: Any) -> Iterator[Batch]:
        for batch in batches(self, steps, **options):
            encoded[-1] += 2 * len(batch.rows) if batch.present is None else int(batch.present.sum())
            yield batch

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(TrainingData, "batches", counted):
        train = finetune_on if clock is time.perf_counter else inspect.unwrap(finetune_on)  # which sets the threads
        result = train(
            examples,
            Path(folder),
            config=config,
            between="audio:visual",
            seed=0,
            device=device,
            progress=progress,
        )
    assert len(result.history) == EPOCHS + 1
    return (ends[-1] - ends[0]) / sum(encoded[1:])


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main(words: list[str]) -> int:
    device = "cuda" if torch.cuda.is_available() and "--cpu" not in words else "cpu"
    quick, clock = "--quick" in words, time.perf_counter
    if "--cpu" in words:
        clock = time.thread_time
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    selected = [word for word in words if not word.startswith("-")]
    print(f"{name}; {ROUNDS} rounds of {EPOCHS} epochs\n")
    print("| size | sampling | balancing | bare, us per vector | overhead: median (min, max) | bound |")
    print("|---|---|---|---|---|---|")
    missed = False
    rows = [("large", LARGE, *method) for method in METHODS] + [("small", SMALL, "uniform", "joint", AIM)]
    for label, full_size, sampling, balancing, bound in rows:
        if selected and f"{label}:{sampling}:{balancing}" not in selected:
            continue
        size = replace(full_size, rows=full_size.rows // 4) if quick else full_size
        examples = draw(size)
        pairs = []
        for _ in range(ROUNDS):
            bare = run_bare(examples, size, device, clock=clock)
            pairs.append((bare, run_mmaudit(examples, size, sampling, balancing, device, clock=clock)))
        ratios = sorted(mmaudit / bare - 1 for bare, mmaudit in pairs)
        overhead = median(ratios)
        missed |= bound is not None and overhead > bound
        bound_text = "-" if bound is None else f"{bound:.0%}"
        print(
            f"| {label} | {sampling} | {balancing} | {median(bare for bare, _ in pairs) * 1e6:.1f} "
            f"| {overhead:+.1%} ({ratios[0]:+.1%}, {ratios[-1]:+.1%}) | {bound_text} |",
            flush=True,
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
