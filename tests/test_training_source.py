"""Tests of fine-tuning on data alone: outputs as on a manifest, tested again, refused where scores are read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import gaussian_table
from typer.testing import CliRunner, Result

from mmaudit.cli.main import app
from mmaudit.cli.report.outcomes import finetune_numbers
from mmaudit.cli.run import Run

pytestmark = pytest.mark.usefixtures("quick_scores")

torch.set_num_threads(1)

TUNE = ["finetune", "--num-workers", "0", "--epochs", "2", "--set", "finetune.hidden=8"]


def mmaudit(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def run_json(*words: str | Path) -> dict[str, Any]:
    result = mmaudit(*words, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def error_of(*words: str | Path) -> str:
    """Return the message of a command that is refused, as one line."""
    result = mmaudit(*words)
    assert result.exit_code == 2, result.output
    return re.sub(r"[\s│]+", " ", result.output)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.parquet and a run in which a network was trained on it; read-only."""
    folder = tmp_path_factory.mktemp("unscored")
    pq.write_table(gaussian_table(num_samples=150), folder / "data.parquet")
    run_json(*TUNE, "--data", folder / "data.parquet", "--run", folder / "run")
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A writable copy of the trained run and its data."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_outputs_are_those_of_a_manifest_without_subsets(trained: Path) -> None:
    tuned = trained / "run" / "finetune" / "all-concat-uniform"
    files = {"config.toml", "history.jsonl", "metrics.json", "model.safetensors", "quarantine.parquet", "state"}
    assert {path.name for path in tuned.iterdir()} == files
    metrics = json.loads((tuned / "metrics.json").read_text())
    assert metrics["manifest"] is None
    assert list(metrics["test"]) == ["all"]
    assert metrics["made_from"]["counts"] == {"input": 150, "used": 150, "quarantined": 0}
    assert sum(metrics["counts"].values()) == 150
    assert metrics["test_labels_in_scores"] is False
    assert not (trained / "run" / "run.json").exists()


def test_same_training_is_not_repeated_and_other_data_are_noticed(folder: Path) -> None:
    words: list[str | Path] = [*TUNE, "--data", folder / "data.parquet", "--run", folder / "run"]
    metrics = json.loads((folder / "run/finetune/all-concat-uniform/metrics.json").read_text())
    assert run_json(*words) == metrics
    pq.write_table(gaussian_table(num_samples=150, seed=1), folder / "data.parquet")
    assert "holds a fine-tuning of other settings" in error_of(*words)


def test_row_order_of_the_data_does_not_change_the_training(folder: Path) -> None:
    shuffled = pq.read_table(folder / "data.parquet").take(np.random.default_rng(0).permutation(150))
    pq.write_table(shuffled, folder / "shuffled.parquet")
    run_json(*TUNE, "--data", folder / "shuffled.parquet", "--run", folder / "other")
    first, second = (
        (folder / name / "finetune/all-concat-uniform/model.safetensors").read_bytes() for name in ("run", "other")
    )
    assert first == second


@pytest.mark.slow  # test_outputs_are_those_of_a_manifest_without_subsets and test_report_names_no_manifest are quick
def test_training_on_data_equals_that_on_a_manifest_of_all_samples(folder: Path) -> None:
    data, run = folder / "data.parquet", folder / "scored"
    run_json("score", data, "--repeats", "1", "--set", "probe.halves=false", "--run", run)
    run_json("split", "--subset", "most-balanced:100%", "--name", "everything", "--run", run)
    scored = run_json(*TUNE, "--manifest", "everything", "--run", run)
    unscored = json.loads((folder / "run/finetune/all-concat-uniform/metrics.json").read_text())
    assert scored["test"]["all"] == unscored["test"]["all"]
    assert len(scored["test"]) > 1
    run_json(*TUNE, "--data", data, "--run", run)
    run_json("report", "--run", run)
    assert "none: all samples" in (run / "report.html").read_text()


def test_report_names_no_manifest(trained: Path) -> None:
    folder = trained / "run/finetune/all-concat-uniform"
    numbers = finetune_numbers(folder, Run(trained / "run"), fingerprint="", modalities=("audio", "visual"))
    assert numbers["manifest"] is None
    assert numbers["manifest_is_unchanged"]
    assert [subset["name"] for subset in numbers["subsets"]] == ["all"]


def test_evaluation_needs_the_data_and_notices_other_ones(folder: Path) -> None:
    words: list[str | Path] = ["evaluate", "all-concat-uniform", "--run", folder / "run"]
    assert "was trained on data without a manifest: pass --data" in error_of(*words)
    evaluated = run_json(*words, "--data", folder / "data.parquet")
    metrics = json.loads((folder / "run/finetune/all-concat-uniform/metrics.json").read_text())
    assert evaluated["test"] == metrics["test"]
    assert run_json(*words, "--data", folder / "data.parquet", "--split", "train")["n"] == metrics["counts"]["train"]
    pq.write_table(gaussian_table(num_samples=150, seed=1), folder / "data.parquet")
    assert "the data have changed since all-concat-uniform" in error_of(*words, "--data", folder / "data.parquet")


def test_metrics_of_others_name_no_code_to_import(folder: Path) -> None:
    file = folder / "run/finetune/all-concat-uniform/metrics.json"
    metrics = json.loads(file.read_text())
    metrics["made_from"]["modalities"][0]["encoder"] = "planted.module:function"
    file.write_text(json.dumps(metrics))
    message = error_of("evaluate", "all-concat-uniform", "--run", folder / "run", "--data", folder / "data.parquet")
    assert "pass --encoder audio=planted.module:function" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "pass --manifest to train on a manifest, or --data to train on all samples"),
        (["--manifest", "all", "--label", "x"], "--label: a manifest's data are read as they were scored"),
        (["--data", "data.parquet", "--sampling", "bss-h"], "mmaudit score data.parquet --learn-from train --run"),
        (
            ["--data", "data.parquet", "--task", "regression", "--balancing", "ogm"],
            "--balancing ogm needs classes, and the task is regression: it compares the probabilities",
        ),
        (["--data", "no-such-file"], "no-such-file"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(trained)
    assert message in error_of(*TUNE, *words, "--run", tmp_path / "run")


def test_columns_are_named_and_damaged_samples_quarantined(clips: Path, tmp_path: Path) -> None:
    (clips / "3.png").write_bytes(b"no picture")
    (clips / "metadata.csv").write_text((clips / "metadata.csv").read_text().replace("label", "emotion"))
    words: list[str | Path] = [
        *TUNE,
        "--data",
        clips,
        "--label",
        "emotion",
        "--group",
        "speaker",
        "--run",
        tmp_path / "run",
    ]
    metrics = run_json(*words)
    assert metrics["made_from"]["counts"] == {"input": 24, "used": 23, "quarantined": 1}
    table = pd.read_parquet(tmp_path / "run/finetune/all-concat-uniform/quarantine.parquet")
    assert table["sample_id"].tolist() == ["003"]
    assert metrics["made_from"]["columns"]["group"] == "speaker"
    assert metrics["config"]["data"]["label"] == "emotion"
