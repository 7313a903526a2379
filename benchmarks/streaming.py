"""Training steps per second with inputs read ahead from the feature cache, against inputs on the device.

Vectors of two modalities are written as cache files of 50,000 rows, and the default network is trained on them in a
random order, a share of an epoch. Rows: on the device; read ahead with several bounds of memory; the same with files
that are not in the page cache (Linux); and the reader of before 2026-11-29, one batch at a time from mapped files.
Prints a Markdown table with the largest growth of the resident set over that before the training.

`python benchmarks/streaming.py FOLDER [--rows 1000000] [--features 64] [--steps 2000]` keeps the files in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mmaudit.audit.features.cached_matrix import FeatureMatrix
from mmaudit.audit.features.encode import write_arrow
from mmaudit.train.config import FinetuneConfig
from mmaudit.train.methods import load_fusion
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.store import Store

SHARD_ROWS, NUM_CLASSES, BATCH_SIZE = 50_000, 10, 64
MODES = {"device": 1 << 14, "512": 512, "64": 64, "64 cold": 64, "64 in 1 of 4 processes": 64}


def write(folder: Path, num_rows: int, num_features: int) -> None:
    """Write normal vectors as cache files of two modalities."""
    rng = np.random.default_rng(0)
    for modality in ("audio", "visual"):
        (folder / modality).mkdir(parents=True, exist_ok=True)
        for number, start in enumerate(range(0, num_rows, SHARD_ROWS)):
            path = folder / modality / f"{number:06d}.arrow"
            if not path.exists():
                n = min(SHARD_ROWS, num_rows - start)
                values = pa.array(rng.standard_normal(n * num_features, np.float32))
                offsets = np.arange(n + 1) * num_features
                write_arrow(pa.table({"vector": pa.LargeListArray.from_arrays(offsets, values)}), path)


def opened(folder: Path, num_rows: int, num_features: int) -> list[FeatureMatrix]:
    """Open the cache files as feature matrices."""
    matrices = []
    for modality in ("audio", "visual"):
        files = sorted((folder / modality).glob("*.arrow"))
        sizes = [min(SHARD_ROWS, num_rows - start) for start in range(0, num_rows, SHARD_ROWS)]
        tasks: Any = [
            SimpleNamespace(file=lambda _, path=path: path, shard=SimpleNamespace(num_rows=size))
            for path, size in zip(files, sizes, strict=True)
        ]
        status: Any = SimpleNamespace(modality=SimpleNamespace(kind="features"), usable=np.ones(num_rows, bool))
        matrices.append(FeatureMatrix.of(tasks, status, np.arange(num_rows), num_features=num_features))
    return matrices


def forget(folder: Path) -> None:
    """Remove the files from the page cache."""
    for path in folder.rglob("*.arrow"):
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def train(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train in one mode; return the steps per second, the growth of the resident set in MB, and the sum of losses."""
    torch.set_num_threads(1)
    matrices = opened(folder, options.rows, options.features)
    shapes = ((options.features,),) * 2
    config = ModelConfig(modalities=("audio", "visual"), shapes=shapes, classes=tuple("0123456789"), fusion="concat")
    torch.manual_seed(0)
    net = FusionNet(config, fusion=load_fusion("concat"))
    optimizer = torch.optim.AdamW(net.parameters())
    label = torch.from_numpy(np.random.default_rng(1).integers(0, NUM_CLASSES, options.rows))
    order = np.random.default_rng(2).permutation(options.rows)
    size = BATCH_SIZE // 4 if "of 4" in options.mode else BATCH_SIZE  # its part of each step
    batches = [order[start : start + size] for start in range(0, options.steps * BATCH_SIZE, BATCH_SIZE)]
    if "cold" in options.mode:
        forget(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stream: Iterator[tuple[Any, tuple[torch.Tensor, ...]]]
    if options.mode == "mapped":
        stream = ((rows, tuple(torch.from_numpy(m.read(rows)) for m in matrices)) for rows in batches)
    else:
        settings = FinetuneConfig()
        max_bytes = settings.resident_mib << 20 if options.mode == "device" else 0
        store = Store(matrices, device="cpu", max_bytes=max_bytes, read_ahead_bytes=MODES[options.mode] << 20)
        stream = store.stream(batches, lambda rows: [rows, rows])
    started, cpu, total = time.perf_counter(), time.process_time(), 0.0
    for rows, inputs in stream:
        optimizer.zero_grad()
        outputs = net(inputs, None)
        loss = torch.nn.functional.cross_entropy(outputs.fused, label[torch.from_numpy(rows)])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.item()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps = len(batches)
    return {"rate": steps / seconds, "cpu_ms": 1000 * cpu / steps, "more_mb": (peak - before) / 1024, "loss": total}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--mode", help="run one mode, in this process")
    options = parser.parse_args()
    folder = options.folder / f"{options.rows}-{options.features}"
    if options.mode:
        print(json.dumps(train(folder, options)))
        return 0
    write(folder, options.rows, options.features)
    print(f"load {os.getloadavg()[0]:.1f}")
    print(
        "| inputs | steps per second | CPU ms a step | more resident memory | as on the device |\n|---|---|---|---|---|"
    )
    expected = None
    for mode in [*MODES, "mapped"]:
        words = [sys.executable, __file__, *sys.argv[1:], "--mode", mode]
        found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        expected = found["loss"] if expected is None else expected
        same = "-" if "of 4" in mode else "same losses" if found["loss"] == expected else "OTHER LOSSES"
        print(
            f"| {mode} | {found['rate']:.0f} | {found['cpu_ms']:.2f} | {found['more_mb']:.0f} MB | {same} |", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
