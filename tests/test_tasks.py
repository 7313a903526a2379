"""Fine-tuning on label sets and numbers: every sampler and balancer trains them or refuses with a reason."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_methods import ACTIVE
from training import (
    QUICK,
    fine_tune,
    make_examples,
    make_label_sets,
    make_numbers,
    metrics_without_seconds,
    model_bytes,
    stop_after,
    with_options,
)
from typer.testing import CliRunner

from mmaudit.audit.errors import ConfigError, ManifestError
from mmaudit.cli.main import app
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.config import TrainConfig
from mmaudit.train.evaluate import evaluate_file
from mmaudit.train.examples import Examples
from mmaudit.train.methods import check_task, list_methods, resolve
from mmaudit.train.sampling import SAMPLERS

pytestmark = pytest.mark.usefixtures("quick_scores")

torch.set_num_threads(1)

TASKS: dict[str, Callable[..., Examples]] = {"multilabel": make_label_sets, "regression": make_numbers}
NEED_CLASSES = {
    "sampler": {"bss-l", "smv", "remix", "class-balanced"},
    "balancer": {"gmm", "ogm", "ogm-ge", "pmr", "mmcosine", "lfm", "reconboost", "relearning", "inforeg", "aug", "mla"},
}


def config_of(sampling: str, balancing: str) -> TrainConfig:
    rates = ("audio=0.5",) if balancing == "mslr" else ()
    return with_options(ACTIVE, sampling=sampling, balancing=balancing, modality_lr=rates)


def refusal(config: TrainConfig, task: str) -> str:
    try:
        check_task(resolve(config), task)
    except ConfigError as error:
        return str(error)
    return ""


METHODS = [("sampler", name, (name, "auto")) for name in SAMPLERS] + [
    ("balancer", name, ("uniform", name)) for name in BALANCERS
]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("kind", "name", "pair"), METHODS, ids=[name for _, name, _ in METHODS])
def test_method_trains_or_refuses_with_a_reason(
    tmp_path: Path, task: str, kind: str, name: str, pair: tuple[str, str]
) -> None:
    config, examples = config_of(*pair), TASKS[task](80)
    message = refusal(config, task)
    assert bool(message) == (name in NEED_CLASSES[kind])
    if message:
        option = "sampling" if kind == "sampler" else "balancing"
        assert message.startswith(f"--{option} {name} needs classes, and the task is {task}: ")
        with pytest.raises(ConfigError, match="needs classes"):
            fine_tune(examples, tmp_path / "whole", config)
        return
    whole = fine_tune(examples, tmp_path / "whole", config)
    assert all(math.isfinite(value) for record in whole.history for value in record.values())
    with pytest.raises(KeyboardInterrupt):
        fine_tune(examples, tmp_path / "part", config, progress=stop_after(1))
    resumed = fine_tune(examples, tmp_path / "part", config)
    assert resumed.history == whole.history
    assert metrics_without_seconds(resumed) == metrics_without_seconds(whole)
    assert model_bytes(tmp_path / "part") == model_bytes(tmp_path / "whole")


N = 240


def mmaudit(*words: str | Path) -> str:
    """Run a command; return its output as one line, after the exit code if it is not 0."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    text = re.sub(r"[\s│]+", " ", result.output)
    return text if result.exit_code == 0 else f"exit {result.exit_code} {text}"


def write_table(folder: Path, task: str) -> Path:
    """Write vectors a and b, and a label by both: the number 4 a + 4 b - 1, or a set of "left", "right", "both"."""
    rng = np.random.default_rng(0)
    first, second = rng.choice([-1.0, 1.0], size=(2, N)) * rng.uniform(0.5, 1.5, size=(2, N))
    label: list[object] = (-1 + 4 * first + 4 * second).tolist()
    if task == "multilabel":
        names = zip(first > 0, second > 0, strict=True)
        label = [["left"] * bool(one) + ["right"] * bool(two) + ["both"] * bool(one and two) for one, two in names]
    columns = {
        name: (value[:, None] + 0.1 * rng.standard_normal((N, 4))).tolist()
        for name, value in (("a", first), ("b", second))
    }
    ids = [f"s{row}" for row in range(N)]
    pq.write_table(pa.table({"id": ids, "label": label, **columns}), folder / "data.parquet")
    return folder / "data.parquet"


@pytest.fixture(scope="module", params=list(TASKS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """Score, split and train a planted set by the commands; return task, run, and what finetune printed."""
    task, folder = request.param, tmp_path_factory.mktemp(request.param)
    run, quick = folder / "run", ("--num-workers", "0")
    scored = mmaudit("score", write_table(folder, task), "--task", task, "--run", run, "--repeats", "1", *quick)
    assert not scored.startswith("exit"), scored
    assert not mmaudit("split", "--subset", "balanced:0.9", "--name", "some", "--run", run).startswith("exit")
    settings = ("--epochs", "15", "--balancing", "sum", "--set", "optim.lr=0.01", "--set", "finetune.own_heads=true")
    return task, run, mmaudit("finetune", "--manifest", "some", "--name", "one", *settings, "--run", run, *quick)


def test_planted_targets_are_learned_by_the_commands(trained: tuple[str, Path, str]) -> None:
    task, run, printed = trained
    metrics = json.loads((run / "finetune" / "one" / "metrics.json").read_text())
    branches, chance = metrics["test"]["all"]["branches"], metrics["chance"]
    assert metrics["task"] == task
    if task == "regression":
        assert branches["fused"]["mae"] < 0.3 * min(chance.values())
        assert branches["fused"]["mae"] < min(branches[name]["mae"] for name in "ab")
        assert branches["fused"]["pearson"] > 0.95
        assert branches["fused"]["sign_accuracy"] > 0.85
        assert "guessing: median " in printed
        assert "Pearson r 0.9" in printed
    else:
        assert branches["fused"]["map"] > 0.97
        assert 0.4 < chance["constant"] < 0.6
        assert metrics["test_by_class"]["left"]["branches"]["a"]["recall"] > 0.9
        assert metrics["test_by_class"]["left"]["branches"]["b"]["average_precision"] < 0.8
        assert "label accuracy 0.9" in printed or "label accuracy 1.0" in printed
    shares = metrics["contribution"]["contribution"]
    total = sum(share["mean"] for share in shares["modalities"].values())
    sign = -1 if task == "regression" else 1
    assert total == pytest.approx(sign * (shares["all"] - shares["nobody"]), abs=1e-5)
    assert min(share["low"] for share in shares["modalities"].values()) > 0


def test_evaluation_repeats_the_metrics(trained: tuple[str, Path, str]) -> None:
    task, run, _ = trained
    printed = mmaudit("evaluate", "one", "--run", run, "--num-workers", "0")
    assert ("mae" if task == "regression" else "micro_f1") in printed
    folder = run / "finetune" / "one"
    metrics, result = (json.loads((folder / name).read_text()) for name in ("metrics.json", "evaluation.json"))
    for key in ("task", "test", "test_by_class", "contribution"):
        assert result[key] == metrics[key]


def test_report_names_the_metric(trained: tuple[str, Path, str]) -> None:
    task, run, _ = trained
    assert not mmaudit("report", "--run", run).startswith("exit")
    page = (run / "report.html").read_text()
    name = "MAE" if task == "regression" else "MAP"
    assert f"the {name} of each branch by subset" in page
    numbers = json.loads((run / "report.json").read_text())["finetunes"][0]
    assert (numbers["task"], numbers["metric_name"]) == (task, name)
    assert [len(value) for value in numbers["history"].values()] == [15] * 4


@pytest.mark.parametrize("words", [("--balancing", "ogm"), ("--sampling", "class-balanced"), ("--sampling", "bss-l")])
def test_method_of_classes_is_refused_before_data_are_read(
    trained: tuple[str, Path, str], words: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, run, _ = trained
    monkeypatch.setattr("mmaudit.cli.training_source.open_source", lambda *_: pytest.fail("data were read"))
    printed = mmaudit("finetune", "--manifest", "some", *words, "--run", run)
    assert printed.startswith("exit 2")
    assert f"{words[0]} {words[1]} needs classes, and the task is {task}: " in printed


def test_data_without_scores_are_trained_on(tmp_path: Path) -> None:
    table = write_table(tmp_path, "regression")
    words = ("--data", table, "--task", "regression", "--run", tmp_path / "run", "--num-workers", "0")
    printed = mmaudit("finetune", *words, "--epochs", "2")
    assert "MAE" in printed
    assert not printed.startswith("exit")


def test_answer_that_adds_numbers_is_refused() -> None:
    assert "each predict the whole number" in refusal(with_options(QUICK, answer="heads", own_heads=True), "regression")
    assert not refusal(with_options(QUICK, answer="heads", own_heads=True), "multilabel")


@pytest.mark.parametrize("loss", ["l1", "mse"])
@pytest.mark.parametrize(("offset", "unit"), [(0.0, 1.0), (1e4, 500.0), (-3.0, 1e-3)])
def test_numbers_are_predicted_in_units_of_the_data(tmp_path: Path, loss: str, offset: float, unit: float) -> None:
    config = with_options(QUICK, epochs=12, regression_loss=loss)
    result = fine_tune(make_numbers(offset=offset, unit=unit), tmp_path / "part", config)
    usual = fine_tune(make_numbers(), tmp_path / "usual", config)
    branches = [metrics["test"]["all"]["branches"] for metrics in (result.metrics, usual.metrics)]
    for name in branches[0]:
        assert branches[0][name]["mae"] == pytest.approx(unit * branches[1][name]["mae"], rel=0.02)
    assert branches[1]["fused"]["mae"] < 0.5 < 0.9 < branches[1]["audio"]["mae"]
    assert (branches[0]["fused"]["sign_accuracy"] is None) == bool(offset)


def test_regression_loss_without_effect_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fine_tune(make_examples(40), tmp_path, with_options(QUICK, epochs=1, regression_loss="mse"))
    assert "finetune.regression_loss has no effect: the task is classification" in caplog.text


def test_selected_epoch_is_the_best_by_the_metric_of_the_task(tmp_path: Path) -> None:
    for task, key, best in (("multilabel", "validation_map", max), ("regression", "validation_mae", min)):
        result = fine_tune(TASKS[task](160, noise=2.0), tmp_path / task, with_options(QUICK, epochs=6, lr=0.05))
        values = [record[key] for record in result.history]
        assert values[result.metrics["best_epoch"] - 1] == best(values)


def test_other_values_are_another_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    examples = make_numbers(80)
    assert examples.values is not None
    with pytest.raises(KeyboardInterrupt):
        fine_tune(examples, tmp_path, progress=stop_after(1))
    values = examples.values.copy()
    values[examples.rows("train")[0]] += 0.01
    with caplog.at_level("INFO", logger="mmaudit"):
        fine_tune(replace(examples, values=values), tmp_path)
    assert "starting from scratch" in caplog.text


def test_methods_that_need_classes_say_so() -> None:
    rows = {(row.kind, row.name): row.needs for row in list_methods()}
    for kind, names in NEED_CLASSES.items():
        of_kind = {name for (row_kind, name), needs in rows.items() if row_kind == kind and "classes" in needs}
        assert of_kind == names


def test_warm_start_keeps_the_scale_of_the_new_numbers(tmp_path: Path) -> None:
    fine_tune(make_numbers(), tmp_path / "first", with_options(QUICK, epochs=6))
    init = tmp_path / "first" / "model.safetensors"
    result = fine_tune(make_numbers(offset=100.0), tmp_path / "second", with_options(QUICK, epochs=1), init=init)
    assert result.metrics["test"]["all"]["branches"]["fused"]["mae"] < 0.6 * result.metrics["chance"]["median"]


def test_model_of_another_task_is_refused(tmp_path: Path) -> None:
    fine_tune(make_label_sets(80), tmp_path, with_options(QUICK, epochs=1))
    options: dict[str, Any] = {"split": "test", "between": "audio:visual", "config": QUICK, "seed": 0, "device": "cpu"}
    with pytest.raises(ManifestError, match="was trained on other task: multilabel; the samples have regression"):
        evaluate_file(tmp_path / "model.safetensors", make_numbers(80), **options)
