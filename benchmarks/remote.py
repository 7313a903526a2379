"""Encoding of media at URLs against the same files on this machine, as a table; exit code 1 if a bound is missed.

Run with: python benchmarks/remote.py [--clips N] [--workers N] [--rounds N]

Clips of 12 s, 340 x 256, h264 and aac, are encoded by `statistics` from this machine, by S3 from a server on loopback
(moto, a process of its own on the same cores), and by HTTP from a static server that answers each request after 20 ms.
The cache of files at URLs is empty before each round. The three take turns; a rate is the median over the rounds, and
the bound is on its ratio to that of local files. MMAUDIT_REMOTE_THREADS=1 shows them almost without read-ahead.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from encode import MEDIA, padding_box, write_film

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.features.encode import encode_dataset
from mmaudit.audit.remote import requests
from mmaudit.audit.workers import no_progress

BOUND = 0.8  # of the rate of local files
LATENCY = 0.02  # seconds of the static server before each answer
SERVER = Path(__file__).parent.parent / "tests"


def main() -> int:
    """Write the clips, start the servers, and measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("s3", "http"))
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["MMAUDIT_CACHE"] = str(folder / "cache")
        size = write_clips(folder / "data", options.clips)
        sources = {"local files": str(folder / "data")}
        if options.only != "http":
            sources[f"s3, {size / 1e6:.2f} MB each"] = stack.enter_context(s3_server(folder / "data"))
        if options.only != "s3":
            sources["http, 20 ms"] = stack.enter_context(static_server(folder / "data"))
        rates: dict[str, list[float]] = {name: [] for name in sources}
        for _ in range(options.rounds):
            for name, source in sources.items():
                rates[name].append(rate(source, folder, num_workers=options.workers, num_clips=options.clips))
    local = statistics.median(rates["local files"])
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {options.workers} workers")
    print("| source | clips per second | of local files |")
    print("|---|---|---|")
    ratios = {name: statistics.median(values) / local for name, values in rates.items()}
    for name, values in rates.items():
        span = f"{min(values):.1f} to {max(values):.1f}"
        print(f"| {name} | {statistics.median(values):.1f} ({span}) | {ratios[name]:.2f} |")
    return int(min(ratios.values()) < BOUND)


def write_clips(folder: Path, num_clips: int) -> int:
    """Write the clips and their table; return the mean size of a clip in bytes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    films = [write_film("libx264", "stereo", rng=rng, length=12, width=340, height=256) for _ in range(4)]
    lines = ["file_name,label"]
    for number in range(num_clips):
        (folder / f"{number}.mp4").write_bytes(films[number % len(films)] + padding_box(number))
        lines.append(f"{number}.mp4,{number % 2}")
    (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    return sum(map(len, films)) // len(films)


def rate(source: str, folder: Path, *, num_workers: int, num_clips: int) -> float:
    """Return the clips per second of one encoding, with empty caches, the start of worker processes included."""
    for name in ("cache", "features"):
        shutil.rmtree(folder / name, ignore_errors=True)
    dataset = open_dataset(source, DataConfig(allow_outside=True, shard_rows=16))
    start = time.perf_counter()
    encode_dataset(dataset, folder / "features", media=MEDIA, num_workers=num_workers, progress=no_progress)
    return num_clips / (time.perf_counter() - start)


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Serve a folder by S3, in a process of its own; yield its URL."""
    code = (
        "import sys, time; from moto.server import ThreadedMotoServer; server = ThreadedMotoServer('127.0.0.1', 0, "
        "verbose=False); server.start(); print(server.get_host_and_port()[1], flush=True); sys.stdin.read()"
    )
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    with process(["-c", code], environment=keys) as port:
        os.environ |= {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        requests.file_system("s3://clips").mkdir("clips")
        for path in folder.iterdir():
            requests.put_file(f"s3://clips/data/{path.name}", path)
        yield "s3://clips/data"


@contextmanager
def static_server(folder: Path) -> Iterator[str]:
    """Serve a folder by HTTP with ranges, each answer after 20 ms, in a process of its own; yield its URL."""
    code = (
        f"import sys; sys.path.insert(0, {str(SERVER)!r}); from pathlib import Path; from remote_files import Faults, "
        f"range_server; context = range_server(Path({str(folder)!r}), Faults(delay={LATENCY})); "
        "url = context.__enter__(); print(url, flush=True); sys.stdin.read()"
    )
    with process(["-c", code], environment={}) as url:
        yield f"{url}/metadata.csv"


@contextmanager
def process(arguments: list[str], *, environment: dict[str, str]) -> Iterator[str]:
    """Run Python until the end of the block; yield the first line that it prints."""
    server = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
        text=True,
    )
    assert server.stdout is not None
    try:
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
