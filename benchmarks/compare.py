"""Time of `mmaudit compare` against the same trainings by single commands.

    python benchmarks/compare.py av-digits-graded.parquet

Scores the data, makes the manifests `balanced` and `all`, and compares six methods on both with three seeds, without
controls. Then a sample of the same trainings, evenly spaced, runs as single `mmaudit finetune` commands with as many
epochs, one after another. Their time is scaled by the share that these trainings have in the comparison's own training
time, and the ratio printed, in wall time and in CPU seconds of all processes. Bounds, on two idle cores: 5 minutes and
3 times, in wall time.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

METHODS = ("joint", "ogm-ge", "bss-h+sum", "agm", "mmpareto", "pmr")
MANIFESTS = ("balanced", "all")
MAX_SECONDS, MIN_RATIO = 300.0, 3.0
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Wall and CPU seconds of commands with all of their processes."""

    wall: float
    cpu: float


def run(*words: str, folder: Path) -> Cost:
    """Run an mmaudit command in a folder, and wait for the processes that it leaves, so that their CPU time counts."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "mmaudit", *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    wall = time.monotonic() - started
    with suppress(ChildProcessError):
        while True:
            os.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall=wall, cpu=cpu)


def prepare(data: Path, modalities: list[str], *, folder: Path) -> None:
    """Score the data and make both manifests."""
    named = [word for name in modalities for word in ("--modality", f"{name}={name}")]
    run("score", str(data), *named, "--learn-from", "train", "--repeats", "1", folder=folder)
    run("split", "--balanced", folder=folder)
    run("split", "--subset", "most-balanced:100%", "--name", "all", folder=folder)


def options_of(method: str) -> list[str]:
    """Return the options of `finetune` for a method of this benchmark."""
    sampling, plus, balancing = method.rpartition("+")
    return [*(("--sampling", sampling) if plus else ()), "--balancing", balancing]


def train_single(cell: pd.Series, *, folder: Path) -> Cost:
    """Train a cell by a single command."""
    words = ["finetune", "-m", cell["manifest"], *options_of(cell["method"]), "--seed", str(cell["seed"])]
    return run(*words, "--epochs", str(cell["epochs"]), "--name", f"single-{cell.name}", folder=folder)


def seconds_of(cells: pd.DataFrame, *, folder: Path) -> pd.Series:
    """Return the seconds that each cell took within the comparison."""
    files = {
        (about["manifest"], about["method"], about["seed"]): float(about["seconds"])
        for path in folder.glob("mmaudit-run/compare/timed/cells/*/*/*/cell.json")
        for about in [pd.read_json(path, typ="series")]
    }
    return cells.apply(lambda row: files[row["manifest"], row["method"], row["seed"]], axis=1)


def main() -> None:
    """Time both and print a table; exit with 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--modality", action="append", help="column of a modality; by default audio and image")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60, help="of the largest manifest; the default of mmaudit")
    parser.add_argument("--sample", type=int, default=4, help="trainings that run as single commands")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)  # the fork server of a command becomes a child of this process
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(arguments.data.resolve(), arguments.modality or ["audio", "image"], folder=folder)
        words = [word for method in METHODS for word in ("--method", method)]
        words += [word for manifest in MANIFESTS for word in ("--manifest", manifest)]
        words += ["--seeds", str(arguments.seeds), "--set", f"finetune.epochs={arguments.epochs}", "--no-controls"]
        load = os.getloadavg()[0]
        compared = run("compare", *words, "--name", "timed", folder=folder)
        runs = pd.read_parquet(folder / "mmaudit-run/compare/timed/runs.parquet").query("subset == 'all'")
        runs = runs.reset_index(drop=True)
        seconds = seconds_of(runs, folder=folder)
        sample = runs.iloc[[(2 * i + 1) * len(runs) // (2 * arguments.sample) for i in range(arguments.sample)]]
        single = [train_single(cell, folder=folder) for _, cell in sample.iterrows()]
    share = float(seconds[sample.index].sum() / seconds.sum())
    wall, cpu = sum(cost.wall for cost in single), sum(cost.cpu for cost in single)
    print(f"{len(runs)} trainings, {arguments.epochs} epochs of the largest manifest; load before {load:.1f}")
    print(f"single commands: {', '.join(f'{c.method} on {c.manifest}' for c in sample.itertuples())}")
    print("\n| | wall s | CPU s |\n|---|---|---|")
    print(f"| compare | {compared.wall:.0f} | {compared.cpu:.0f} |")
    print(f"| {len(single)} single commands | {wall:.0f} | {cpu:.0f} |")
    print(f"| all by single commands, of which these are {share:.1%} | {wall / share:.0f} | {cpu / share:.0f} |")
    print(f"| ratio | {wall / share / compared.wall:.2f} | {cpu / share / compared.cpu:.2f} |")
    sys.exit(compared.wall > MAX_SECONDS or wall / share / compared.wall < MIN_RATIO)


if __name__ == "__main__":
    main()
