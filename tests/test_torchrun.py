"""Tests of several processes: the same batches and results as one process, also from the command line."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from processes import run_in_processes
from safetensors.torch import load_file
from training import with_options
from typer.testing import CliRunner

import mmaudit
from mmaudit.cli.main import app
from mmaudit.train.config import TrainConfig

pytestmark = pytest.mark.usefixtures("quick_scores")

PAIRS = [
    ("bss-l", "sum"),
    ("smv", "gmm"),
    ("uniform", "reconboost"),
    ("remix", "inforeg"),
]
MORE_PAIRS = [  # left to `make test-all`
    ("class-balanced", "mmpareto"),
    ("uniform", "relearning"),
    ("uniform", "joint"),
    ("dus-h", "sum"),
    ("uniform", "ogm-ge"),
    ("uniform", "lfm"),
    ("remix", "dgl"),
    ("uniform", "aug"),
]

# Prints the rows of each step of each epoch in this process, the history and the test metrics.
SCRIPT = """
import json, sys, tempfile
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_torchrun import {pairs}, config_of
from training import fine_tune, make_examples
from mmaudit.train.training_data import TrainingData
from mmaudit.train.optimizer import open_distributed

seen, cut = [], TrainingData.batches
def batches(self, steps, **options):
    for batch in cut(self, steps, **options):
        seen.append(batch.rows.tolist())
        yield batch
TrainingData.batches = batches
found = []
with open_distributed("cpu") as context:
    for pair in {pairs}:
        seen.clear()
        with tempfile.TemporaryDirectory() as folder:
            result = fine_tune(make_examples(120), Path(folder), config_of(*pair), distributed=context)
        found.append([list(seen), result.history, result.metrics["test"]["all"]])
print(json.dumps(found))
"""


def config_of(sampling: str, balancing: str) -> TrainConfig:
    """Build a config without dropout, whose random numbers differ by process.

    Of four processes one has no row of the last step: 60 = 3 * 19 + 3. Every method is active within three epochs.
    """
    config = with_options(sampling=sampling, balancing=balancing, epochs=3, dropout=0.0, batch_size=19)
    stages: dict[str, dict[str, Any]] = {
        "reconboost": {"stage_epochs": 1, "rectify_epochs": 1},
        "relearning": {"every_epochs": 1},
        "aug": {"every_epochs": 1},
    }
    return replace(config, balancing=stages, sampling={"remix": {"warmup_epochs": 1}})


@functools.cache
def trained_by(size: int, pairs: str) -> list[Any]:
    """Train a list of pairs with `size` processes; return the batches, history and test metrics of each process."""
    return run_in_processes(SCRIPT.format(tests=str(Path(__file__).parent), pairs=pairs), size=size)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "pair", [*PAIRS, *(pytest.param(pair, marks=pytest.mark.slow) for pair in MORE_PAIRS)], ids="-".join
)
def test_any_number_of_processes_trains_on_the_same_batches(size: int, pair: tuple[str, str]) -> None:
    name, pairs = ("PAIRS", PAIRS) if pair in PAIRS else ("MORE_PAIRS", MORE_PAIRS)
    number = pairs.index(pair)
    single, shared = trained_by(1, name)[0][number], [process[number] for process in trained_by(size, name)]
    steps = [list(chain(*row_lists)) for row_lists in zip(*(rows for rows, _, _ in shared), strict=True)]
    assert steps == single[0]
    assert any(len(rows) % size for rows in single[0])  # shards are uneven
    for _, history, tested in shared:
        assert history == shared[0][1]
        assert tested == shared[0][2]
        for record, expected in zip(history, single[1], strict=True):
            assert record == pytest.approx(expected, rel=2e-3, abs=2e-3)


# Trains with all inputs on the device, and with windows of one step; prints both histories, metrics and weights.
STREAMED = """
import hashlib, json, sys, tempfile
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from training import fine_tune, make_examples, with_options
from mmaudit.train.optimizer import open_distributed

results = []
with open_distributed("cpu") as context:
    for memory in ({{}}, dict(resident_mib=0, read_ahead_mib=1)):
        config = with_options(sampling="bss-h", epochs=3, batch_size=19, **memory)
        with tempfile.TemporaryDirectory() as folder:
            result = fine_tune(make_examples(120), Path(folder), config, distributed=context)
            models = [hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).glob("*.safetensors")]
        results.append([result.history, result.metrics["test"], result.predictions.tolist(), models])
print(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_streamed_training_has_the_bytes_of_one_in_memory(size: int) -> None:
    """Its quick twin is test_any_number_of_processes_reads_the_same_global_batches."""
    for resident, streamed in run_in_processes(STREAMED.format(tests=str(Path(__file__).parent)), size=size):
        assert streamed == resident


# Running means of excitations are over each process's own rows, and so are those in the mean of the weights.
AVERAGED = """
import json, sys, tempfile
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from training import fine_tune, make_examples, with_options
from mmaudit.train.evaluate import evaluate_file
from mmaudit.train.optimizer import open_distributed

config = with_options(fusion="mmtm", balancing="sum", ema=0.5, epochs=2)
found = []
with open_distributed("cpu") as context, tempfile.TemporaryDirectory() as folder:
    found.append(fine_tune(make_examples(120), Path(folder), config, distributed=context).metrics["test"]["all"])
    if context.is_first:
        file = Path(folder) / "model.safetensors"
        asked = dict(split="test", between="audio:visual", config=config, seed=0, device="cpu")
        found.append(evaluate_file(file, make_examples(120), **asked)["test"]["all"])
print(json.dumps(found))
"""


@pytest.mark.slow  # its quick twin is test_command_line_gives_the_same_results_under_torchrun
def test_metrics_of_several_processes_are_those_of_the_saved_model() -> None:
    """Also with a running mean of the weights, whose buffers each process collects separately."""
    (measured, reread), *other_processes = run_in_processes(AVERAGED.format(tests=str(Path(__file__).parent)), size=2)
    assert measured == other_processes[0][0]
    for branch, expected in reread["branches"].items():
        assert measured["branches"][branch] == pytest.approx(expected, abs=2e-3)


def run_torchrun(folder: Path, *words: str, size: int) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}"]
    address = ["--master-addr=127.0.0.1", f"--master-port={port}", "-m", "--", "mmaudit"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *address, *words], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def test_command_line_gives_the_same_results_under_torchrun(planted: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "mmaudit-run"
    mmaudit.score(planted(num_samples=300), run=run, repeats=1, num_workers=0)
    mmaudit.split(subset="most-balanced:100%", name="all", run=run)
    tuning = ["finetune", "--manifest", "all", "--device", "cpu", "--epochs", "3", "--set", "finetune.dropout=0.0"]
    alone = CliRunner().invoke(app, [*tuning, "--run", str(run), "--name", "alone", "--json"])
    assert alone.exit_code == 0, alone.output
    # Without the -- before mmaudit, torchrun takes --run for an option of its own.
    together = run_torchrun(tmp_path, *tuning, "--run", "mmaudit-run", "--name", "together", "--json", size=2)
    assert together.returncode == 0, together.stderr
    # Printed once, by the first process.
    alone_report, together_report = (json.loads(done.stdout) for done in (alone, together))
    for branch, expected in alone_report["test"]["all"]["branches"].items():
        assert together_report["test"]["all"]["branches"][branch] == pytest.approx(expected, abs=1e-3)
    folder = tmp_path / "mmaudit-run" / "finetune"
    alone_weights, together_weights = (load_file(folder / name / "model.safetensors") for name in ("alone", "together"))
    for name, tensor in alone_weights.items():
        assert (tensor - together_weights[name]).abs().max() < 1e-4


def test_error_under_torchrun_ends_all_processes(tmp_path: Path) -> None:
    done = run_torchrun(tmp_path, "finetune", "--manifest", "absent", size=2)
    assert done.returncode != 0
    assert "no manifest absent" in done.stderr
