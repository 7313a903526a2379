"""Training on one GPU: correctness of the precisions, the tests that need a GPU, throughput, overhead of the methods.

Run with: python benchmarks/gpu.py [--cpu] [--quick] [SECTION ...], less than eight minutes on one card. It needs torch,
numpy, scipy, scikit-learn, pandas, safetensors, pillow and pyarrow; the section `tests` also pytest and hypothesis.
Media libraries and `datasets` are not imported; without transformers, whose ResNet-18 mmaudit trains, it measures the
throughput of the same layers in plain torch. Sections, which stop when the time is up:

    precisions  losses in bfloat16, float16 and compiled, against float32; the bound is 5% and 2 points of accuracy
    throughput  two ResNet-18s, frames of 224 pixels and spectrograms of 257 x 300: clips/s and share of the peak, which
                is the best of some square products of the same dtype in the same run
    methods     each method over a bare loop of the same network, as in overhead.py: three rounds of joint, one round
                of the others
    tests       pytest -m gpu

--cpu --quick: tiny sizes, to check the script itself. The exit code is 1 if a bound is missed or a test fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import overhead
import resnet
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmaudit.audit.errors import ConfigError
from mmaudit.audit.probes import network
from mmaudit.audit.workers import no_progress
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.config import FinetuneConfig, OptimConfig, TrainConfig
from mmaudit.train.finetune import finetune_on
from mmaudit.train.methods import resolve
from mmaudit.train.sampling import SAMPLERS

SECONDS = 450.0  # of all sections
MAX_LOSS_RATIO, MAX_ACCURACY_LOSS = 0.05, 0.02
PRECISIONS = (
    ("float32", False),
    ("bfloat16", False),
    ("float16", False),
    ("float32", True),
    ("bfloat16", True),
)


class PlainResNet(nn.Module):
    """The layers of a ResNet-18 (He et al., 2016), 11,176,512 weights with three channels, as a stand-in."""

    def __init__(self, num_channels: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(num_channels, sizes[0], 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(sizes[0]),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        sizes_in = [sizes[0], *sizes[:-1]]
        self.blocks = nn.Sequential(
            *(
                PlainBlock(size if second else size_in, size, stride=1 if second or not stage else 2)
                for stage, (size_in, size) in enumerate(zip(sizes_in, sizes, strict=True))
                for second in (False, True)
            )
        )

    def forward(self, pictures: Tensor) -> SimpleNamespace:
        """Compute the pooled features (b, d, 1, 1) of pictures (b, c, h, w), in the form of transformers."""
        return SimpleNamespace(pooler_output=self.blocks(self.stem(pictures)).mean(dim=(2, 3), keepdim=True))


class PlainBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, size_in: int, size: int, *, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(size_in, size, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(size),
            nn.ReLU(inplace=True),
            nn.Conv2d(size, size, 3, padding=1, bias=False),
            nn.BatchNorm2d(size),
        )
        shortcut = nn.Sequential(nn.Conv2d(size_in, size, 1, stride=stride, bias=False), nn.BatchNorm2d(size))
        self.shortcut = shortcut if stride > 1 or size_in != size else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Compute features (b, d, h, w)."""
        return functional.relu(self.layers(features) + self.shortcut(features))


def plain_trunk(shape: tuple[int, ...], *, width: float) -> network.Trunk:
    """Build the trunk of `network.build_trunk` without transformers."""
    sizes = [max(1, round(width * size)) for size in network.SIZES]
    num_channels = 1 if len(shape) == 2 else shape[-1]
    return network.Trunk(PlainResNet(num_channels, sizes), num_channels=num_channels, num_features=sizes[-1])


Row = tuple[list[str], bool]  # cells of a table, and whether the bound is met


def precisions(device: str, *, quick: bool, seconds_left: float) -> Iterator[Row]:
    """Train the same network in each precision, and compare the last training loss and the test accuracy."""
    yield ["precision", "compiled", "training loss", "test accuracy", "seconds"], True
    examples = overhead.draw(replace(overhead.SMALL, rows=2_048 if quick else 8_192))
    reference: tuple[float, float] | None = None
    for precision, compiled in PRECISIONS:
        config = TrainConfig(
            finetune=FinetuneConfig(epochs=3 if quick else 10, dropout=0.0, compile=compiled),
            optim=OptimConfig(precision=precision),
        )
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result = finetune_on(
                examples,
                Path(folder),
                config=config,
                between="audio:visual",
                seed=0,
                device=device,
                progress=no_progress,
            )
        loss = result.history[-1]["train_loss"]
        accuracy = result.metrics["test"]["all"]["branches"]["fused"]["accuracy"]
        reference = reference or (loss, accuracy)
        is_close = abs(loss / reference[0] - 1) <= MAX_LOSS_RATIO and accuracy >= reference[1] - MAX_ACCURACY_LOSS
        seconds = time.perf_counter() - started
        yield [precision, "yes" if compiled else "no", f"{loss:.4f}", f"{accuracy:.3f}", f"{seconds:.1f}"], is_close


def tests(device: str, *, quick: bool, seconds_left: float) -> Iterator[Row]:
    """Run the tests that need a GPU."""
    yield ["pytest -m gpu"], True
    folder = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    files = ["tests/test_methods.py", "tests/test_finetune.py", "tests/test_network_probe.py"]
    options: dict[str, Any] = {"cwd": folder, "capture_output": True, "text": True, "timeout": max(1.0, seconds_left)}
    try:
        run = subprocess.run([*command, *files], check=False, **options)
    except subprocess.TimeoutExpired:
        yield [f"not finished in {seconds_left:.0f} s"], False
        return
    yield [(run.stdout.strip() or run.stderr.strip()).splitlines()[-1]], run.returncode == 0


def throughput(device: str, *, quick: bool, seconds_left: float) -> Iterator[Row]:
    """Measure the throughput of two ResNet-18s, and the share of the measured peak."""
    if importlib.util.find_spec("transformers") is None:
        mock.patch("mmaudit.train.network.build_trunk", plain_trunk).start()
    yield ["batch", "precision", "clips/s", "GFLOP per clip", "TFLOP/s", "of the peak"], True
    size, mel, width = (32, (33, 30), 0.1) if quick else (224, (257, 300), 1.0)
    kinds = [("float32", torch.float32)] if quick else [("bfloat16", torch.bfloat16), ("float32", torch.float32)]
    for precision, dtype in kinds:
        peak = resnet.peak(device, dtype, size=512 if quick else 8_192)
        for batch in (16,) if quick else (64, 256):
            examples = resnet.draw((2 if quick else 8) * batch + 64, size=size, mel=mel, num_frames=1)
            config = TrainConfig(
                finetune=FinetuneConfig(epochs=resnet.EPOCHS, batch_size=batch),
                optim=OptimConfig(optimizer="sgd", lr=1e-2, weight_decay=1e-4, precision=precision),
                width=width,
            )
            rate = len(examples.rows("train")) / resnet.seconds_per_epoch(examples, config, device)
            gflop = resnet.gflop_per_clip(examples, config, device)
            cells = [f"{rate:.0f}", f"{gflop:.2f}", f"{rate * gflop / 1e3:.1f}", f"{rate * gflop / 1e3 / peak:.1%}"]
            yield [str(batch), precision, *cells], True


def methods(device: str, *, quick: bool, seconds_left: float) -> Iterator[Row]:
    """Measure the overhead of each method over the bare loop of the same network."""
    yield ["sampling", "balancing", "bare, us per vector", "overhead"], True
    size = replace(overhead.LARGE, rows=1_024 if quick else 25_600)
    examples = overhead.draw(size)
    pairs = [("uniform", name) for name in BALANCERS] + [(name, "auto") for name in SAMPLERS if name != "uniform"]
    for sampling, balancing in pairs:
        settings = FinetuneConfig(sampling=sampling, balancing=balancing)
        try:
            balancing = resolve(TrainConfig(finetune=settings)).config.finetune.balancing
        except ConfigError as error:
            yield [sampling, balancing, "-", f"refused: {error}"], True
            continue
        bare, ratios = 0.0, []
        for _ in range(3 if (sampling, balancing) == ("uniform", "joint") else 1):
            bare = overhead.run_bare(examples, size, device)
            ratios.append(overhead.run_mmaudit(examples, size, sampling, balancing, device) / bare - 1)
        yield [sampling, balancing, f"{bare * 1e6:.2f}", f"{median(ratios):+.0%}"], True


SECTIONS: dict[str, Callable[..., Iterator[Row]]] = {
    "precisions": precisions,
    "throughput": throughput,
    "methods": methods,
    "tests": tests,
}


def print_table(rows: Iterator[Row], *, deadline: float) -> bool:
    """Print rows as a Markdown table until the deadline; return whether all bounds are met."""
    header, _ = next(rows)
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    met = True
    for cells, is_met in rows:
        print(f"| {' | '.join(cells)} |{'' if is_met else ' missed'}", flush=True)
        met &= is_met
        if time.perf_counter() > deadline:
            print("\nthe time is up: the rest of this table was not run")
            break
    return met


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"any of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    options: Any = parser.parse_args(words)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    device = "cpu" if options.cpu or not torch.cuda.is_available() else "cuda"
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}")
    deadline, met = time.perf_counter() + SECONDS, True
    for section in options.sections or SECTIONS:
        started = time.perf_counter()
        if started > deadline:
            print(f"\n{section}: not run, the time is up")
            continue
        print(f"\n{section}\n")
        met &= print_table(
            SECTIONS[section](device, quick=options.quick, seconds_left=deadline - started), deadline=deadline
        )
        print(f"\n{time.perf_counter() - started:.0f} s", flush=True)
    return int(not met)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
