"""Tests of fine-tuning and comparing on Ray: the bytes of torchrun, and of processes of this machine."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from runs import copy_run, score_all_and_few
from test_ray_cluster import OPTIONS
from test_torchrun import run_torchrun

import mmaudit
from mmaudit.audit.errors import ConfigError, RunError

TRAINING = {"finetune.epochs": 3, "finetune.hidden": 8, "finetune.batch_size": 32, "ray.memory_gb": 1.0}
COMPARED = {"finetune.epochs": 2, "finetune.hidden": 8, "finetune.batch_size": 32, "ray.memory_gb": 1.0}


def test_contradicting_options_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--jobs 2: with --engine ray the number of workers is --num-workers"):
        mmaudit.compare(manifest=["all"], method=["joint"], run=tmp_path, engine="ray", jobs=2)
    with pytest.raises(ConfigError, match="--num-workers 0: with --engine ray"):
        mmaudit.finetune("all", run=tmp_path, engine="ray", num_workers=0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(ConfigError, match="--engine ray starts the processes itself: run it without torchrun"):
        mmaudit.finetune("all", run=tmp_path, engine="ray")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scored run with the manifests `all` and `few`; read-only."""
    return score_all_and_few(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """A cluster of this machine, to which every `engine="ray"` of this process connects."""
    pytest.importorskip("ray")
    from mmaudit.audit.engine.ray_cluster import open_ray

    with open_ray(OPTIONS):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.filterwarnings("ignore")
def test_training_on_ray_has_the_bytes_of_torchrun(scored: Path, tmp_path: Path) -> None:
    run = copy_run(scored, tmp_path / "run")
    result = mmaudit.finetune("all", run=run, engine="ray", num_workers=2, settings=TRAINING, name="on-ray")
    assert result.folder == run / "finetune/on-ray"
    settings = [word for key, value in TRAINING.items() for word in ("--set", f"{key}={value}")]
    words = ["finetune", "--manifest", "all", "--run", str(run), "--name", "by-torchrun", "--device", "cpu", *settings]
    done = run_torchrun(tmp_path, *words, "--num-workers", "0", size=2)
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "history.jsonl", "config.toml"):
        contents = [(run / "finetune" / folder / name).read_bytes() for folder in ("on-ray", "by-torchrun")]
        assert contents[0] == contents[1], name
    metrics = [json.loads((run / f"finetune/{name}/metrics.json").read_text()) for name in ("on-ray", "by-torchrun")]
    for content in metrics:
        content.pop("seconds", None)
    assert metrics[0] == metrics[1]
    # A second call finds it finished.
    again = mmaudit.finetune("all", run=run, engine="ray", num_workers=2, settings=TRAINING, name="on-ray")
    assert again.metrics == result.metrics


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.filterwarnings("ignore")
def test_training_is_resumed_when_a_worker_is_killed(scored: Path, tmp_path: Path) -> None:
    run, many = copy_run(scored, tmp_path / "run"), {**TRAINING, "finetune.epochs": 60}
    killed: list[int] = []

    def kill_one() -> None:
        history = run / "finetune/killed/history.jsonl"
        while not (history.exists() and len(history.read_text().splitlines()) >= 2):
            time.sleep(0.02)
        workers = [child for child in psutil.Process().children(recursive=True) if "RayTrainWorker" in child.name()]
        workers = workers or [
            child
            for child in psutil.Process().children(recursive=True)
            if any("RayTrainWorker" in word for word in child.cmdline())
        ]
        workers[0].kill()
        killed.append(workers[0].pid)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    mmaudit.finetune("all", run=run, engine="ray", num_workers=2, settings=many, name="killed")
    thread.join(60)
    assert killed
    mmaudit.finetune("all", run=run, engine="ray", num_workers=2, settings=many, name="undisturbed")
    models = [(run / f"finetune/{name}/model.safetensors").read_bytes() for name in ("killed", "undisturbed")]
    assert models[0] == models[1]


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.filterwarnings("ignore")
def test_error_of_a_training_is_that_of_the_command(scored: Path, tmp_path: Path) -> None:
    run = copy_run(scored, tmp_path / "run")
    with pytest.raises(RunError, match="no manifest absent"):
        mmaudit.finetune("absent", run=run, engine="ray", num_workers=2, settings=TRAINING)
    assert not list(run.glob(".mmaudit-*"))


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.filterwarnings("ignore")
def test_comparison_on_ray_has_the_bytes_of_processes(scored: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"manifest": ["few", "all"], "method": ["joint", "ogm-ge"], "seeds": 2, "progress": False}
    tables = ("runs", "per_sample", "summary", "metrics")
    contents = []
    for engine in ("local", "ray"):
        run = copy_run(scored, tmp_path / "run")  # the same path, which the tables may state
        extra: dict[str, Any] = (
            {"jobs": 2, "num_workers": 0} if engine == "local" else {"num_workers": 2, "engine": "ray"}
        )
        settings = {key: value for key, value in COMPARED.items() if engine == "ray" or not key.startswith("ray.")}
        folder = mmaudit.compare(run=run, settings=settings, **options, **extra).folder
        assert folder is not None
        frames = {name: pq.read_table(folder / f"{name}.parquet") for name in tables}
        seconds = [name for name in frames["runs"].column_names if "seconds" in name]
        frames["runs"] = frames["runs"].drop_columns(seconds)
        cells = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix == ".parquet" and "cells" in path.parts
        }
        contents.append((frames, cells, (folder / "findings.json").read_bytes()))
        shutil.rmtree(run)
    assert contents[0][1]
    assert contents[0][1:] == contents[1][1:]
    for name, table in contents[0][0].items():
        assert table.equals(contents[1][0][name]), name
