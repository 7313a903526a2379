"""End-to-end tests on the demo data: resume after kills, reproducibility, recovery of the planted discrepancy."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import mmaudit
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.cli.demo import KeypadConfig, write_keypad

SCORE = ["--num-workers", "0", "--repeats", "1", "--set", "data.shard_rows=8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_keypad(tmp_path_factory.mktemp("keypad"), config=KeypadConfig(num_samples=200), seed=0)


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "mmaudit", *map(str, words)]


def run(*words: str | Path) -> str:
    """Run a command to its end and return its stdout."""
    done = subprocess.run(command(*words), capture_output=True, text=True, env=one_thread(), check=True)
    return done.stdout


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def stop_when(words: list[str], *, ready: Any, with_signal: int) -> int:
    """Start a command, send it a signal as soon as `ready()` is true, and return its exit code."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread())
    try:
        deadline = time.monotonic() + 120
        while not ready():
            assert process.poll() is None, "the command ended before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(with_signal)
        return process.wait(timeout=60)
    finally:
        process.kill()


@pytest.mark.slow  # quicker twins: tests/test_scoring.py and tests/test_methods.py
def test_interrupted_score_resumes_to_the_same_bytes(data: Path, tmp_path: Path) -> None:
    undisturbed, resumed = tmp_path / "whole", tmp_path / "broken"
    options = [*SCORE, "--set", "data.shard_rows=1"]  # 400 files: after two, a second of encoding remains
    run("score", data, "--run", undisturbed, *options)

    def shards() -> list[Path]:
        return sorted(resumed.glob("features/*/[0-9]*.arrow"))

    code = stop_when(
        command("score", data, "--run", resumed, *options), ready=lambda: len(shards()) >= 2, with_signal=signal.SIGINT
    )
    assert code == 130
    assert not (resumed / "run.json").exists()
    assert not (resumed / "scores.parquet").exists()
    stamps = {path: path.stat().st_mtime_ns for path in shards()}
    assert 2 <= len(stamps) < 400
    run("score", data, "--run", resumed, *options)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps  # finished shards are not encoded again
    for name in ("scores.parquet", "quarantine.parquet", "mixture.json"):
        assert (resumed / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.slow  # quicker twins: tests/test_scoring.py and tests/test_methods.py
def test_killed_finetune_resumes_to_the_same_bytes(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run("score", data, "--run", folder, *SCORE)
    run("split", "--balanced", "--tolerance", "0.2", "--run", folder)
    words: list[str | Path] = [
        "finetune",
        "--manifest",
        "balanced",
        "--run",
        folder,
        "--epochs",
        "400",
        "--sampling",
        "bss-h",
    ]
    run(*words, "--name", "whole")
    state = folder / "finetune" / "broken" / "state" / "last.pt"
    code = stop_when(command(*words, "--name", "broken"), ready=state.exists, with_signal=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (folder / "finetune" / "broken" / "metrics.json").exists()
    run(*words, "--name", "broken")
    undisturbed, resumed = folder / "finetune" / "whole", folder / "finetune" / "broken"
    for name in ("model.safetensors", "history.jsonl", "config.toml"):
        assert (resumed / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.fixture(scope="module", params=[400, 1_797])
def planted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The demo, run as by users."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, json.loads(run("demo", folder, "--num-samples", str(request.param), "--json"))


@pytest.mark.slow  # its quick twin: tests/test_commands.py
def test_demo_recovers_planted_discrepancy(planted: tuple[Path, dict[str, Any]]) -> None:
    folder, result = planted
    truth = pd.read_parquet(folder / "truth.parquet").set_index("sample_id")
    scores = pd.read_parquet(folder / "run" / "scores.parquet").set_index("sample_id")
    assert set(scores.index) == set(truth.index)
    spearman = scores["discrepancy"].corr(truth["discrepancy"], method="spearman")  # pandas joins them by id
    assert spearman >= 0.8
    assert result["recovery"]["spearman"] == pytest.approx(spearman, abs=1e-6)
    manifest = pd.read_parquet(folder / "run" / "manifests" / "balanced.parquet")
    share = np.bincount(manifest["bin"].astype(int), minlength=20) / len(manifest)
    assert np.abs(share - 1 / 20).sum() / 2 <= 0.05
    assert len(manifest) >= len(truth) / 4


@pytest.mark.slow  # its quick twin: tests/test_commands.py
def test_demo_writes_the_files_of_the_readme(planted: tuple[Path, dict[str, Any]]) -> None:
    folder = planted[0] / "run"
    names = ["run.json", "scores.parquet", "quarantine.parquet", "mixture.json", "report.html", "report.json"]
    assert all((folder / name).stat().st_size > 0 for name in names)
    assert (folder / "report.html").stat().st_size < 2_000_000
    record = json.loads((folder / "run.json").read_text())
    num_samples = len(pd.read_parquet(planted[0] / "truth.parquet"))
    assert record["counts"]["input"] == record["counts"]["scored"] + record["counts"]["quarantined"] == num_samples
    for finetuned in (folder / "finetune").iterdir():
        present = {path.name for path in finetuned.iterdir()}
        assert present >= {"history.jsonl", "metrics.json", "model.safetensors", "config.toml"}
        metrics = json.loads((finetuned / "metrics.json").read_text())
        assert metrics["test"]["all"]["branches"]["fused"]["accuracy"] > 5 * metrics["chance"]["majority"]
        assert not metrics["test_labels_in_scores"]
    assert not [path for path in folder.rglob(".*") if path.is_file()]  # no temporary file was left


@pytest.mark.slow  # quicker twin: tests/test_cross_fit.py, which rows probes are fitted on
def test_probes_fitted_on_train_ignore_test_labels(data: Path, tmp_path: Path) -> None:
    """Scrambled labels of test samples do not change the scores of the others, except for rounding.

    Rows are multiplied in blocks, and the rows of a block depend on the other samples.
    """
    frame = pd.read_csv(data / "metadata.csv")
    frame["split"] = np.where(np.arange(len(frame)) % 4 == 0, "test", "train")
    tables = []
    for name in ("true", "scrambled"):
        if name == "scrambled":
            test = frame["split"] == "test"
            frame.loc[test, "label"] = (frame.loc[test, "label"] + 1) % 10
        frame.to_csv(data / f"{name}.csv", index=False)
        config = mmaudit.RunConfig(probe=ProbeConfig(learn_from="train", repeats=1))
        mmaudit.score(data / f"{name}.csv", run=tmp_path / name, config=config, num_workers=0)
        scores = pd.read_parquet(tmp_path / name / "scores.parquet")
        tables.append(scores[scores["split"] == "train"].reset_index(drop=True))
    columns = ["confidence_audio", "confidence_image", "discrepancy", "balance", "p_balanced"]
    pd.testing.assert_frame_equal(tables[0][columns], tables[1][columns], atol=1e-5, rtol=0)


def test_readme_python_example_runs(data: Path, tmp_path: Path) -> None:
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    frame = pd.read_csv(data / "metadata.csv")
    frame.assign(speaker=[f"speaker {row % 12}" for row in range(len(frame))]).to_csv(data / "spoken.csv", index=False)
    (tmp_path / "example.py").write_text(code.replace('"DATA"', repr(str(data / "spoken.csv"))), encoding="utf-8")
    subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env=one_thread(), capture_output=True, check=True)
    record = json.loads((tmp_path / "my-run" / "run.json").read_text())
    assert record["num_groups"] == 12
    assert record["config"]["probe"]["learn_from"] == "train"
    assert (tmp_path / "my-run" / "finetune" / "balanced-concat-bss-h" / "metrics.json").exists()
