"""Overhead of `score --engine ray` over `score` on the same processors. --rows N, --files N: other sizes; 0: none.

Run with: python benchmarks/ray_overhead.py [--rows 1000000] [--files 2000] [--workers 2] [--rounds 2]

Feature rows are 2 x 32 float32 with ids of nine characters and 10 classes, in row groups of 65,536; media are wav files
of a second and pictures of 96 x 96 pixels. Each round scores anew, local and on Ray by turns; the least time of each is
compared. The start of the cluster and of its workers is measured apart: it is the same whatever the data. The files of
both runs must be equal.

Prints a Markdown table; the exit code is 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import wave
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmaudit.audit.engine.executors import RayConfig, RayOptions
from mmaudit.audit.engine.ray_cluster import open_ray
from mmaudit.audit.engine.ray_pool import RayPool
from mmaudit.cli.scoring import score

BOUNDS = {"rows": 0.15, "files": 0.10}
RATE = 16_000


def write_rows(folder: Path, num_rows: int) -> Path:
    """Write rows of two modalities of 32 features, ids and labels."""
    rng = np.random.default_rng(0)
    path, group = folder / "rows.parquet", 65_536
    means = rng.standard_normal((2, 10, 32)).astype(np.float32) * 0.3
    with pq.ParquetWriter(path, schema_of()) as writer:
        for start in range(0, num_rows, group):
            size = min(group, num_rows - start)
            label = rng.integers(0, 10, size)
            features = means[:, label] + rng.standard_normal((2, size, 32), dtype=np.float32)
            columns: dict[str, Any] = {"id": [f"r{row:08d}" for row in range(start, start + size)], "label": label}
            for name, values in zip(("audio", "visual"), features, strict=True):
                columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 32)
            writer.write_table(pa.table(columns, schema_of()))
    return path


def schema_of() -> pa.Schema:
    """Return the schema of the rows."""
    vector = pa.list_(pa.float32(), 32)
    return pa.schema({"id": pa.string(), "label": pa.int64(), "audio": vector, "visual": vector})


def write_files(folder: Path, num_files: int) -> Path:
    """Write half as many samples as files, each of a sound and a picture, with metadata.csv."""
    rng = np.random.default_rng(0)
    data = folder / "media"
    data.mkdir()
    lines = ["id,audio_file_name,image_file_name,label"]
    for number in range(num_files // 2):
        label = number % 4
        tone = np.sin(2 * np.pi * (200 + 150 * label + 40 * rng.random()) * np.arange(RATE) / RATE)
        sound = (8_000 * (tone + 0.3 * rng.standard_normal(RATE))).clip(-32_768, 32_767).astype("<i2")
        with wave.open(str(data / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes(sound.tobytes())
        pixels = rng.integers(0, 120, (96, 96, 3)) + np.array([30, 20, 10]) * label
        Image.fromarray(pixels.astype(np.uint8)).save(data / f"{number}.png")
        lines.append(f"{number:06d},{number}.wav,{number}.png,class-{label}")
    (data / "metadata.csv").write_text("\n".join(lines) + "\n")
    return data


class Starts:
    """Waits for all workers of a pool before its first work, and adds up the seconds."""

    def __init__(self) -> None:
        self.seconds, self.run = 0.0, RayPool.run
        starts = self

        def run(pool: RayPool, *values: Any, **options: Any) -> Any:
            begin = time.monotonic()
            pool._fill()
            while pool.starting:
                for reference in pool.ray.wait([*pool.starting])[0]:
                    pool._finish_start(reference)
            starts.seconds += time.monotonic() - begin
            return starts.run(pool, *values, **options)

        RayPool.run = run  # type: ignore[method-assign, assignment]


def measure(data: Path, folder: Path, *, rounds: int, workers: int, starts: Starts) -> tuple[float, float, float]:
    """Return the seconds of local, of Ray without its start, and of the start of the workers."""
    local, on_ray, start = [], [], []
    for _ in range(rounds):
        for engine in ("local", "ray"):
            run = folder / engine
            shutil.rmtree(run, ignore_errors=True)
            starts.seconds, begin = 0.0, time.monotonic()
            settings = {} if engine == "local" else {"ray.memory_gb": 3.0}
            score(data, run=run, num_workers=workers, engine=engine, settings=settings, progress=False)
            seconds = time.monotonic() - begin
            if engine == "local":
                local.append(seconds)
            else:
                on_ray.append(seconds - starts.seconds)
                start.append(starts.seconds)
            print(f"{engine}: {seconds:.1f} s, of which {starts.seconds:.1f} for workers", file=sys.stderr)
    for name in ("scores.parquet", "mixture.json", "quarantine.parquet", "report.json"):
        if (folder / "local" / name).exists():
            assert (folder / "local" / name).read_bytes() == (folder / "ray" / name).read_bytes(), name
    return min(local), min(on_ray), min(start)


def main() -> int:
    """Print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("rows", 1_000_000), ("files", 2_000), ("workers", 2), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    sizes = {"rows": arguments.rows, "files": arguments.files}
    options = RayOptions(config=RayConfig(memory_gb=3.0), address=None, num_workers=arguments.workers)
    missed, starts, begin = False, Starts(), time.monotonic()
    with open_ray(options), tempfile.TemporaryDirectory() as folder:
        print(f"cluster: {time.monotonic() - begin:.1f} s", file=sys.stderr)
        rows = ["| data | local | Ray | overhead | bound | start of workers |", "|---|---|---|---|---|---|"]
        for kind, write in (("rows", write_rows), ("files", write_files)):
            if not sizes[kind]:
                continue
            (own := Path(folder, kind)).mkdir()
            data = write(own, sizes[kind])
            local, on_ray, start = measure(data, own, rounds=arguments.rounds, workers=arguments.workers, starts=starts)
            overhead = on_ray / local - 1
            missed |= overhead > BOUNDS[kind]
            row = f"{sizes[kind]:,} {kind} | {local:.1f} s | {on_ray:.1f} s | {overhead:+.1%} | {BOUNDS[kind]:.0%}"
            rows.append(f"| {row} | {start:.1f} s |")
    print(*rows, sep="\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
