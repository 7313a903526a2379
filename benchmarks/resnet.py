"""Throughput of a fine-tuning of two ResNet-18s, and its share of the peak of the device.

Run with: python benchmarks/resnet.py [--quick]
Audio-visual fine-tuning end to end from decoded tensors on the device: log-mel spectrograms and three frames per clip,
with crops, mirrored frames and masks, in bfloat16 on CUDA (float32 elsewhere), uniform sampling, the joint loss and
gmm. The share of the peak is the GFLOP of a step's products, by torch's counter, over the best of some square products
of the same dtype in the same run. There is no bound. --quick: tiny networks.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.train.config import FinetuneConfig, OptimConfig, TrainConfig
from mmaudit.train.examples import Examples
from mmaudit.train.finetune import finetune_on

FRAMES, CLASSES, EPOCHS = 3, 30, 4


def draw(num_clips: int, *, size: int, mel: tuple[int, int], num_frames: int = FRAMES) -> Examples:
    """Draw clips of `num_frames` frames of size x size pixels and a spectrogram of this shape."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, CLASSES, num_clips)
    frames = rng.integers(0, 256, (num_clips, num_frames * size * size * 3), dtype=np.uint8)
    sound = rng.standard_normal((num_clips, mel[0] * mel[1]), dtype=np.float32)
    split = np.array(["train"] * (num_clips - 64) + ["validation"] * 32 + ["test"] * 32, dtype=object)
    nothing: dict[str, Any] = {name: np.zeros(num_clips) for name in ("discrepancy", "balance", "p_balanced")}
    return Examples(
        sample_id=pa.array([f"s{number}" for number in range(num_clips)], pa.large_string()),
        inputs=(MatrixInputs(matrix=sound), MatrixInputs(matrix=frames)),
        shapes=(mel, (num_frames, size, size, 3)),
        present=np.ones((num_clips, 2), dtype=bool),
        content=np.array([f"c{number}" for number in range(num_clips)], dtype="S32"),
        modalities=("audio", "visual"),
        label=label,
        class_names=tuple(str(number) for number in range(CLASSES)),
        split=split,
        rank=np.arange(num_clips),
        weight=np.ones(num_clips, np.float32),
        in_manifest=np.ones(num_clips, dtype=bool),
        **nothing,
    )


def seconds_per_epoch(examples: Examples, config: TrainConfig, device: str) -> float:
    """Return the median seconds of the epochs after the first; 0 if there is only one."""
    ends: list[float] = []

    def progress(stage: str, done: int, total: int, *, detail: str = "") -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        finetune_on(
            examples, Path(folder), config=config, between="audio:visual", seed=0, device=device, progress=progress
        )
    return float(np.median(np.diff(ends))) if len(ends) > 1 else 0.0


def peak(device: str, dtype: torch.dtype, *, size: int) -> float:
    """Return the highest measured TFLOP/s of a square matrix product."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    rates = []
    for _ in range(6):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        float((a @ b)[0, 0])
        rates.append(2 * size**3 / (time.perf_counter() - started) / 1e12)
    return max(rates)


def gflop_per_clip(examples: Examples, config: TrainConfig, device: str) -> float:
    """Count the GFLOP of one epoch's products by clip, with the evaluation of the validation and test samples."""
    once = replace(config, finetune=replace(config.finetune, epochs=1))
    with FlopCounterMode(display=False) as counter:
        seconds_per_epoch(examples, once, device)
    return float(counter.get_total_flops() / 1e9 / len(examples.rows("train")))


def main(quick: bool) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    peak_rate = peak(device, dtype, size=1024 if quick else 8192)
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}, {dtype}: peak {peak_rate:.2f} TFLOP/s\n")
    print("| batch | balancing | clips/s | frames + spectrograms/s | GFLOP per clip | of peak |")
    print("|---|---|---|---|---|---|")
    size, mel, width = (32, (32, 25), 0.1) if quick else (224, (128, 200), 1.0)
    for batch in (16,) if quick else (64, 128, 256):
        examples = draw(2 * batch + 64 if quick else 8 * batch + 64, size=size, mel=mel)
        for balancing in ("joint", "gmm"):
            config = TrainConfig(
                finetune=FinetuneConfig(epochs=EPOCHS, batch_size=batch, balancing=balancing),
                optim=OptimConfig(optimizer="sgd", lr=1e-2, weight_decay=1e-4),
                balancing={"gmm": {"warmup_epochs": 0}},
                width=width,
            )
            seconds = seconds_per_epoch(examples, config, device)
            rate = len(examples.rows("train")) / seconds
            gflop = gflop_per_clip(examples, config, device)
            share = rate * gflop / 1e3 / peak_rate
            row = f"{rate:.0f} | {rate * (FRAMES + 1):.0f} | {gflop:.2f} | {share:.0%}"
            print(f"| {batch} | {balancing} | {row} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main("--quick" in sys.argv[1:]))
