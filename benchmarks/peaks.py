"""Peak memory of split, report and evaluate on 10^5 and 10^7 scored rows of two modalities of 32 features.

The runs are scored by mmaudit, which takes five minutes of 10^7 rows: a run whose scores repeat those of a few rows has
columns of few distinct values, which are stored, and read, as small dictionaries. `evaluate` takes a network that was
fine-tuned on 4,000 rows. Each command runs in a process of its own, whose largest resident set is read from the system.
Prints a Markdown table; the exit code is 1 if a command takes more than MAX_MORE_MB above its peak on the smallest set.

`python benchmarks/peaks.py FOLDER` keeps data and runs in FOLDER (10 GB) as data-ROWS and run-ROWS, and uses those that
are there. `--rows 100000,1000000` measures other sizes, `--only split,report` some commands.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmaudit.audit.storage import write_json
from mmaudit.rebalance.manifest import read_stated_digests

NUM_FEATURES, NUM_CLASSES = 32, 10
SMALL, PART_ROWS, GROUP_ROWS = 4_000, 200_000, 50_000
MAX_MORE_MB = 100
COMMANDS = {
    "split": ["split", "--balanced", "--name", "peaks", "--overwrite"],
    "report": ["report"],
    "evaluate": ["evaluate", "trained"],
}


def write_data(folder: Path, num_rows: int, *, small: bool = False) -> None:
    """Write Gaussian clusters per class as Parquet files of PART_ROWS rows."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((2, NUM_CLASSES, NUM_FEATURES)).astype(np.float32) * 0.2
    folder.mkdir(parents=True)
    for start in range(0, num_rows, PART_ROWS):
        n = min(PART_ROWS, num_rows - start)
        label = rng.integers(0, NUM_CLASSES, n).astype(np.int32)
        clear = rng.random((2, n, 1), dtype=np.float32) * 2
        matrices = [clear[m] * means[m][label] + rng.standard_normal((n, NUM_FEATURES), np.float32) for m in (0, 1)]
        vectors = [pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), NUM_FEATURES) for matrix in matrices]
        ids = pa.array([f"s{row:08d}" for row in range(start, start + n)])
        split = np.array(["train", "validation", "test"])[rng.choice(3, n, p=[0.8, 0.1, 0.1])]
        columns = {"id": ids, "label": label, "split": split, "audio": vectors[0], "visual": vectors[1]}
        table = pa.table(columns)
        file = folder / f"part-{start // PART_ROWS:05d}.parquet"
        pq.write_table(table, file, compression="none", row_group_size=SMALL // 4 if small else GROUP_ROWS)


def make_run(root: Path, num_rows: int) -> Path:
    """Score so many rows, unless the run is there; an interrupted one is finished."""
    data, run = root / f"data-{num_rows}", root / f"run-{num_rows}"
    if not data.exists():
        write_data(data, num_rows)
    if not (run / "run.json").exists():
        mmaudit("score", str(data), "--run", str(run))
    return run


def add_trained(root: Path, run: Path) -> None:
    """Copy the fine-tuning of the small set into a run, as if it had been trained on the run's manifest."""
    target = run / "finetune" / "trained"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(next((root / "small-run" / "finetune").glob("*/metrics.json")).parent, target)
    metrics = json.loads((target / "metrics.json").read_text())
    metrics["manifest"] = "peaks"
    metrics["manifest_digest"] = read_stated_digests(run / "manifests" / "peaks.parquet")["digest"]
    write_json(metrics, target / "metrics.json")


def mmaudit(*arguments: str) -> tuple[float, float, float]:
    """Run a command; return its largest resident set in MB, its CPU seconds and its seconds."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "mmaudit", *arguments, "--quiet"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"mmaudit {' '.join(arguments)} failed with exit code {process.returncode}")
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime, time.perf_counter() - started


def make_small(root: Path) -> None:
    """Score and fine-tune the small set, in parts as large data are."""
    if (root / "small-run" / "finetune").exists():
        return
    shutil.rmtree(root / "small-run", ignore_errors=True)
    if not (root / "small").exists():
        write_data(root / "small", SMALL, small=True)
    run = ["--run", str(root / "small-run")]
    mmaudit("score", str(root / "small"), *run, "--set", f"parts.rows={SMALL // 8}", "--num-workers", "0")
    mmaudit("split", "--balanced", *run)
    mmaudit("finetune", "--manifest", "balanced", *run, "--epochs", "1", "--num-workers", "0")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", default="100000,10000000")
    parser.add_argument("--only", default=",".join(COMMANDS))
    options = parser.parse_args()
    root, failed = options.folder.absolute(), False
    commands = options.only.split(",")
    if "evaluate" in commands:
        make_small(root)
    print("| command | rows | largest resident set | more than at the fewest rows | CPU s | s |")
    print("|---|---|---|---|---|---|")
    least: dict[str, float] = {}
    for num_rows in sorted(int(text) for text in options.rows.split(",")):
        run = make_run(root, num_rows)
        for name in commands:
            if name == "evaluate":
                add_trained(root, run)
            peak, cpu, seconds = mmaudit(*COMMANDS[name], "--run", str(run))
            more = peak - least.setdefault(name, peak)
            failed |= more > MAX_MORE_MB
            print(
                f"| {name} | {num_rows:,} | {peak:,.0f} MB | {more:+,.0f} MB | {cpu:.0f} | {seconds:.0f} |", flush=True
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
