"""Tests of finetune and evaluate: names, initial weights, evaluation, and one-line errors for bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import gaussian_table
from runs import copy_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from mmaudit.cli.main import app
from mmaudit.train.methods import list_methods

pytestmark = pytest.mark.usefixtures("quick_scores")

torch.set_num_threads(1)

TUNE = ["finetune", "--manifest", "all", "--num-workers", "0", "--epochs", "3", "--set", "finetune.hidden=8"]


def mmaudit(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def run_json(*words: str | Path) -> dict[str, Any]:
    result = mmaudit(*words, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def output_of(result: Result) -> str:
    """Return the printed text as one line, without wrapping."""
    return re.sub(r"[\s│]+", " ", result.output)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scored run with a manifest of all samples and a fine-tuning `plain`; read-only."""
    folder = tmp_path_factory.mktemp("training")
    pq.write_table(gaussian_table(num_samples=240), folder / "data.parquet")
    run_json("score", folder / "data.parquet", "--run", folder / "run", "--repeats", "1")
    run_json("split", "--subset", "most-balanced:100%", "--name", "all", "--run", folder / "run")
    run_json("split", "--subset", "audio-preferred", "--run", folder / "run")
    run_json(*TUNE, "--run", folder / "run", "--name", "plain")
    return folder / "run"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A writable copy of the finished run."""
    return copy_run(finished_run, tmp_path / "run")


def weights(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "finetune" / name / "model.safetensors")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "all-concat-uniform"),
        (["--balancing", "gmm", "--sampling", "bss-l"], "all-concat-bss-l-gmm"),
        (["--balancing", "greedy"], "all-mmtm-uniform-greedy"),
        (["--sampling", "dus-h"], "all-concat-dus-h-sum"),
        (["--fusion", "gated"], "all-gated-uniform"),
        (["--only", "audio"], "all-concat-uniform-only-audio"),
        (["--seed", "1"], "all-concat-uniform-seed-1"),
        (["--keep-posterior", "0.5", "--init", "plain"], "all-concat-uniform-p0.5-from-plain"),
    ],
)
def test_default_name_is_built_from_the_settings(run: Path, words: list[str], name: str) -> None:
    metrics = run_json(*TUNE, *words, "--run", run)
    assert (run / "finetune" / name / "metrics.json").exists()
    assert metrics["config"]["finetune"]["fusion"] in name
    assert metrics == run_json(*TUNE, *words, "--run", run)  # finished already
    assert metrics == run_json(*TUNE, *words, "--run", run, "--set", "finetune.save_steps=1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampling", "dus-h", "--balancing", "ogm"], "--balancing ogm has no unimodal loss that trains on them"),
        (["--balancing", "greedy", "--fusion", "concat"], "greedy does not support --fusion concat: it measures"),
        (["--sampling", "bss"], "--sampling bss: no such name; did you mean bss-"),
        (["--set", "balancing.ogmm.alpha=1"], "no config key balancing.ogmm; did you mean balancing.ogm?"),
    ],
)
def test_contradictions_and_unknown_methods_raise_before_data_are_read(words: list[str], message: str) -> None:
    result = mmaudit(*TUNE, *words, "--run", "no-such-run")
    assert result.exit_code == 2
    assert message in output_of(result)


PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mmaudit.train.balancing.balancer import Balancer
from mmaudit.train.fusion import Late
from mmaudit.train.sampling.sampler import Ordered


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfConfig:
    """Half.

    Args:
        share: Share of the samples of an epoch.
    """

    section: ClassVar[str] = "sampling.t-half"
    share: float = 0.5


class Half(Ordered):
    config_type = HalfConfig

    def rows(self, epoch):
        return np.arange(int(len(self.pool) * self.config.share))


class Mean(Late):
    def forward(self, features):
        return self.unimodal_logits(features).mean(dim=0)

    def fused_and_unimodal_logits(self, features):
        return self(features), self.unimodal_logits(features)


class Twice(Balancer):
    fusions = ()
    own_fusion = Mean
    fusion_reason = "it averages logits"

    def loss(self, outputs, batch):
        return 2 * self.fused_loss(outputs, batch)
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a package with the sampler t-half and the balancer t-twice."""
    info = tmp_path / "site" / "t_methods-1.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site" / "t_methods.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: t-methods\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[mmaudit.samplers]\nt-half = t_methods:Half\n[mmaudit.balancers]\nt-twice = t_methods:Twice\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield
    sys.modules.pop("t_methods", None)


def test_installed_methods_train_and_are_imported_only_when_named(run: Path, plugin: None) -> None:
    run_json(*TUNE, "--run", run, "--name", "other", "--set", "balancing.ogm.alpha=0.5")
    assert {row.name for row in list_methods()} > {"t-half", "t-twice", "uniform"}
    assert "t_methods" not in sys.modules
    words: list[str | Path] = [*TUNE, "--run", run, "--sampling", "t-half", "--balancing", "t-twice"]
    metrics = run_json(*words, "--set", "sampling.t-half.share=0.25")
    assert "t_methods" in sys.modules
    assert metrics["config"]["finetune"]["fusion"] == "t-twice"
    assert metrics["config"]["sampling"] == {"t-half": {"share": 0.25}}
    assert metrics["samples_seen"] == 3 * (metrics["counts"]["train"] // 4)
    evaluation = run_json("evaluate", "all-t-twice-t-half-t-twice", "--run", run)
    assert evaluation["test"] == metrics["test"]
    refused = mmaudit(*TUNE, "--run", run, "--balancing", "t-twice", "--fusion", "late")
    assert "does not support --fusion late: it averages logits; use --fusion t-twice" in output_of(refused)
    unknown = mmaudit(*words, "--set", "sampling.t-half.shar=0.25")
    assert "no config key sampling.t-half.shar; did you mean sampling.t-half.share?" in output_of(unknown)


def test_model_of_a_method_that_is_not_installed_raises(
    run: Path, plugin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_json(*TUNE, "--run", run, "--balancing", "t-twice", "--name", "twice")
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not folder.endswith("site")])
    result = mmaudit("evaluate", "twice", "--run", run)
    assert result.exit_code == 2
    assert "trained with the fusion t-twice, which is not installed" in output_of(result)


def test_evaluate_repeats_and_extends_test_metrics(run: Path) -> None:
    metrics = json.loads((run / "finetune" / "plain" / "metrics.json").read_text())
    evaluation = run_json("evaluate", "plain", "--run", run)
    assert evaluation["test"] == metrics["test"]
    assert evaluation["contribution"] == metrics["contribution"]
    assert evaluation["n"] == metrics["counts"]["test"]
    assert set(evaluation["test_by_class"]) == {"0", "1", "2"}
    written = json.loads((run / "finetune" / "plain" / "evaluation.json").read_text())
    assert written == {key: value for key, value in evaluation.items() if key != "file"}
    printed = output_of(mmaudit("evaluate", "plain", "--run", run))
    for part in ("split test of all", "audio-preferred", "ece", "lowest recall", "correct with one modality alone"):
        assert part in printed


def test_evaluate_on_other_samples(run: Path) -> None:
    rows = pd.read_parquet(run / "manifests" / "audio-preferred.parquet")
    dropped = pd.read_parquet(run / "manifests" / "audio-preferred.dropped.parquet")
    tests = (rows["split"] == "test").sum() + (dropped["split"] == "test").sum()
    evaluation = run_json("evaluate", "plain", "--run", run, "--manifest", "audio-preferred")
    assert evaluation["n"] == tests
    assert evaluation["manifest"] == "audio-preferred"
    assert evaluation["test"]["in-manifest"]["n"] == (rows["split"] == "test").sum()
    train = run_json("evaluate", "plain", "--run", run, "--split", "train")
    metrics = json.loads((run / "finetune" / "plain" / "metrics.json").read_text())
    assert train["n"] == metrics["counts"]["train"]


def test_evaluate_counts_samples_used_in_training(run: Path) -> None:
    words: list[str | Path] = ["evaluate", "plain", "--run", run, "--manifest"]
    assert run_json(*words, "audio-preferred")["num_trained_on"] == 0
    run_json("split", "--balanced", "--resplit", "50/10/40", "--name", "anew", "--run", run)
    own, anew = (pd.read_parquet(run / "manifests" / f"{name}.parquet") for name in ("all", "anew"))
    dropped = pd.read_parquet(run / "manifests" / "anew.dropped.parquet")
    tested = {*anew[anew["split"] == "test"]["sample_id"], *dropped[dropped["split"] == "test"]["sample_id"]}
    number = len(tested & set(own[own["split"] != "test"]["sample_id"]))
    assert number > 0
    assert f"{number} of them were used in training or validation" in output_of(mmaudit(*words, "anew"))
    run_json("split", "--subset", "visual-preferred", "--name", "all", "--overwrite", "--run", run)
    assert "overlap with its training samples unknown" in output_of(mmaudit(*words, "anew"))


def test_init_loads_weights_of_another_finetune(run: Path) -> None:
    words: list[str | Path] = [*TUNE, "--run", run, "--lr", "1e-9", "--set", "optim.weight_decay=0.0"]
    run_json(*words, "--init", "plain", "--name", "second")
    run_json(*words, "--name", "scratch")
    first, second, scratch = (weights(run, name) for name in ("plain", "second", "scratch"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-5, rtol=0)
    assert any((scratch[name] - tensor).abs().max() > 1e-4 for name, tensor in first.items())
    run_json(*words, "--init", run / "finetune" / "plain" / "model.safetensors", "--name", "third")
    assert all(torch.equal(tensor, second[name]) for name, tensor in weights(run, "third").items())


def test_init_from_one_modality(run: Path) -> None:
    """Unimodal pretraining, frozen: the audio encoder keeps its weights, and the rest of the network is trained."""
    run_json(*TUNE, "--run", run, "--only", "audio", "--name", "audio")
    run_json(*TUNE, "--run", run, "--init", "audio", "--name", "both", "--set", 'optim.freeze=["audio"]')
    alone, fused = weights(run, "audio"), weights(run, "both")
    encoder = {name for name in fused if name.startswith("encoders.0.")}
    assert encoder
    assert all(torch.equal(alone[name], fused[name]) for name in encoder)
    first = weights(run, "plain")
    assert torch.equal(
        fused["encoders.1.mean"], first["encoders.1.mean"]
    )  # the other encoder is standardised by the data


def test_frozen_encoder_is_unchanged(run: Path) -> None:
    run_json(*TUNE, "--run", run, "--init", "plain", "--name", "frozen", "--set", 'optim.freeze=["audio"]')
    first, second = weights(run, "plain"), weights(run, "frozen")
    still = {name for name in first if torch.equal(first[name], second[name])}
    assert {name for name in first if name.startswith("encoders.0.")} <= still
    assert not {name for name in first if name.startswith("encoders.1.layers.0")} & still


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--balancing", "gbland"], "--balancing gbland: no such name; did you mean gblend?"),
        (["--fusion", "gates"], "--fusion gates: no such name; did you mean gated?"),
        (["--balancing", "greedy", "--fusion", "concat"], "it measures and cuts the cross-modal path"),
        (["--balancing", "mla", "--fusion", "late"], "it trains one classifier that all modalities share"),
        (["--sampling", "dus-h", "--balancing", "joint"], "--balancing joint has no unimodal loss that trains on them"),
        (["--only", "audio", "--balancing", "gmm"], "--balancing gmm needs at least 2"),
        (["--only", "audoi"], "--only audoi: no such modality; did you mean audio?"),
        (["--init", "plan"], "no finished fine-tuning plan"),
        (["--report-to", "tensorbord"], "--report-to tensorbord: no such name; did you mean tensorboard?"),
        (["--set", "optim.schedule=linear"], "optim.schedule is 'linear'"),
        (["--set", "optim.modality_lr=['audio']"], "not of the form NAME=FACTOR"),
        (["--set", "optim.freeze=['sound']"], "no modality sound; the modalities are audio, visual"),
        (["--seed", "99999999999999999999"], "config key seed has 67 bits; it must have at most 64"),
        (["--set", "sampling.dus.kappa=inf"], "sampling.dus.kappa is inf; it must be a finite number"),
        (["--set", "sampling.bss.alpha=inf"], "sampling.bss.alpha is inf"),
        (["--report-to", "mlflow,wandb"], "mlflow is not installed: pip install mlflow"),
        (["--set", "sampling.bss.beta=0.0"], "sampling.bss.beta is 0.0; it must lie in (0, 1]"),
        (["--set", "balancing.gmm.lam_gap=-1.0"], "balancing.gmm.lam_gap is -1.0"),
        (["--set", "balancing.gmmm.lam_gap=1.0"], "no config key balancing.gmmm; did you mean balancing.gmm?"),
        (["--lr", "1e6", "--set", "optim.optimizer=sgd"], "training has diverged: the loss of epoch"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run: Path, words: list[str], line: str) -> None:
    result = mmaudit(*TUNE, "--run", run, "--name", "new", *words)
    assert result.exit_code == 2
    assert line in output_of(result)
    assert "Traceback" not in result.output
    assert not (run / "finetune" / "new" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["plan"], "no finished fine-tuning plan in"),
        (["plain", "--split", "tset"], "no samples of split tset; did you mean test?"),
        (["plain", "--manifest", "none"], "no manifest none"),
        (["plain", "--device", "gpu"], "--device gpu: not available"),
    ],
)
def test_evaluate_errors_are_one_line(finished_run: Path, words: list[str], line: str) -> None:
    result = mmaudit("evaluate", *words, "--run", finished_run)
    assert result.exit_code == 2
    assert line in output_of(result)


def test_evaluate_refuses_changed_manifest_and_model(run: Path) -> None:
    run_json("split", "--subset", "visual-preferred", "--name", "all", "--overwrite", "--run", run)
    result = mmaudit("evaluate", "plain", "--run", run)
    assert result.exit_code == 2
    assert "has changed since plain was trained on it; pass a manifest with --manifest" in output_of(result)
    model = run / "finetune" / "plain" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:100])
    result = mmaudit("evaluate", "plain", "--run", run, "--manifest", "audio-preferred")
    assert result.exit_code == 2
    assert "is not a model of mmaudit finetune" in output_of(result)


def test_networks_are_trained_end_to_end(clips: Path, tmp_path: Path) -> None:
    """Sound and images through two small ResNets, with masked spectrograms and cropped images, then evaluated again."""
    run = tmp_path / "run"
    small = ["--set", "media.network_size=16", "--set", "network.width=0.0625", "--set", "network.epochs=1"]
    few = ["--set", "probe.folds=2", "--repeats", "1", "--num-workers", "0", "--set", "data.test_fraction=0.25"]
    run_json("score", clips, "--run", run, "--encoder", "audio=resnet18", "--encoder", "image=resnet18", *small, *few)
    run_json("split", "--subset", "most-balanced:100%", "--name", "all", "--run", run)
    words: list[str | Path] = [
        "finetune",
        "--manifest",
        "all",
        "--run",
        run,
        "--num-workers",
        "0",
        "--epochs",
        "2",
        "--batch-size",
        "8",
    ]
    words += ["--balancing", "ogm-ge", "--sampling", "bss-l"]  # with the width of the networks of the scores
    resident = run_json(*words, "--name", "held")
    streamed = run_json(*words, "--name", "read", "--set", "finetune.resident_mib=0")
    assert streamed["test"] == resident["test"]
    first, second = weights(run, "held"), weights(run, "read")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any("resnet" in name for name in first)
    assert resident["num_parameters"] < 100_000
    assert run_json("evaluate", "held", "--run", run)["test"] == resident["test"]
    plain = run_json(*words, "--name", "plain", "--set", "augment.pictures=false", "--set", "augment.sound=false")
    assert plain["test"]["all"]["n"] == resident["test"]["all"]["n"]
    third = weights(run, "plain")
    assert any(not torch.equal(tensor, third[name]) for name, tensor in first.items())


def test_settings_change_the_weights(run: Path) -> None:
    """Each setting changes the weights, or the set of parameters."""
    base = weights(run, "plain")
    changes: dict[str, list[str]] = {
        "sgd": ["--set", "optim.optimizer=sgd"],
        "warm": ["--set", "optim.warmup_epochs=2"],
        "step": ["--set", "optim.schedule=step", "--set", "optim.lr_step=1"],
        "clip": ["--set", "optim.clip_norm=0.01"],
        "ema": ["--set", "optim.ema=0.9"],
        "slow": ["--set", 'optim.modality_lr=["audio=0.1"]'],
        "half": ["--set", "optim.precision=bfloat16"],
        "heads": ["--set", "finetune.own_heads=true"],
    }
    for name, words in changes.items():
        run_json(*TUNE, "--run", run, "--name", name, *words)
        changed = weights(run, name)
        assert changed.keys() != base.keys() or any(
            not torch.equal(tensor, changed[key]) for key, tensor in base.items()
        )


def test_training_stops_early(run: Path) -> None:
    words: list[str | Path] = [
        "finetune",
        "--manifest",
        "all",
        "--num-workers",
        "0",
        "--run",
        run,
        "--epochs",
        "200",
        "--lr",
        "0.05",
    ]
    metrics = run_json(
        *words, "--set", "finetune.patience=3", "--set", "finetune.validation_fraction=0.2", "--name", "early"
    )
    lines = (run / "finetune" / "early" / "history.jsonl").read_text().splitlines()
    assert len(lines) == metrics["best_epoch"] + 3 < 200


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record calls of `compile` without running a compiler."""
    calls: list[bool] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: calls.append(True))
    return calls


def test_network_is_compiled_only_on_request(run: Path, compiled: list[bool]) -> None:
    run_json(*TUNE, "--run", run, "--name", "plainly")
    assert compiled == []
    run_json(*TUNE, "--run", run, "--name", "compiled", "--set", "finetune.compile=true")
    assert compiled == [True]


def test_history_has_one_line_per_epoch_with_method_values(run: Path) -> None:
    run_json(*TUNE, "--run", run, "--balancing", "ogm", "--sampling", "bss-l", "--name", "told")
    lines = (run / "finetune" / "told" / "history.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    common = {"epoch", "steps", "samples", "rows_read", "lr", "train_loss", "validation_loss", "validation_accuracy"}
    assert all(set(record) > common for record in records)


def test_moved_data_are_passed_with_data_option(planted: Callable[..., Path], tmp_path: Path) -> None:
    data = planted()
    run = tmp_path / "run"
    run_json("score", data, "--run", run, "--repeats", "1")
    run_json("split", "--subset", "most-balanced:100%", "--name", "all", "--run", run)
    data.rename(tmp_path / "moved.parquet")
    assert "if it moved, pass --data" in output_of(mmaudit(*TUNE, "--run", run))
    first = run_json(*TUNE, "--run", run, "--data", tmp_path / "moved.parquet", "--name", "moved")
    evaluation = run_json("evaluate", "moved", "--run", run, "--data", tmp_path / "moved.parquet")
    assert evaluation["test"] == first["test"]


def test_each_evaluation_has_its_own_file(run: Path) -> None:
    folder = run / "finetune" / "plain"
    evaluation = run_json("evaluate", "plain", "--run", run)
    run_json("evaluate", "plain", "--run", run, "--split", "train")
    run_json("evaluate", "plain", "--run", run, "--manifest", "audio-preferred")
    names = {path.name for path in folder.glob("evaluation*.json")}
    assert names == {"evaluation.json", "evaluation-train.json", "evaluation-test-audio-preferred.json"}
    assert json.loads((folder / "evaluation.json").read_text())["n"] == evaluation["n"]


def test_damaged_files_are_named(run: Path) -> None:
    folder = run / "finetune" / "plain"
    with safe_open(folder / "model.safetensors", "pt") as file:
        about, names = file.metadata(), list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names[1:]}
    save_file(tensors, folder / "model.safetensors", metadata=about)
    result = mmaudit("evaluate", "plain", "--run", run)
    assert result.exit_code == 2
    assert "is damaged, its weights do not fit its own architecture" in output_of(result)
    (folder / "metrics.json").write_text("{}")
    for words in (["evaluate", "plain"], ["report"], [*TUNE, "--name", "plain"]):
        result = mmaudit(*words, "--run", run)
        assert result.exit_code == 2
        assert "metrics.json cannot be read: the document lacks manifest" in output_of(result)


def test_foreign_checkpoint_is_not_resumed(run: Path) -> None:
    state = run / "finetune" / "other" / "state" / "last.pt"
    state.parent.mkdir(parents=True)
    torch.save({"a": 2}, state)
    run_json(*TUNE, "--run", run, "--name", "other")
    first, second = weights(run, "plain"), weights(run, "other")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture(scope="module")
def opened_names() -> Iterator[list[str]]:
    """Names of the media files that this process opens."""
    names: list[str] = []
    is_finished = False

    def record(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not is_finished and str(arguments[0]).endswith((".wav", ".png")):
            names.append(Path(arguments[0]).name)

    sys.addaudithook(record)  # hooks cannot be removed
    yield names
    is_finished = True


@pytest.fixture
def media_opened(opened_names: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Result, list[str]]]:
    """A function that runs a command, and returns its result and the names of the media files that it opened."""
    monkeypatch.setattr("mmaudit.audit.workers.ProcessPoolExecutor", None)  # of processes the hook would see nothing

    def run(*words: str | Path) -> tuple[Result, list[str]]:
        opened_names.clear()
        result = mmaudit(*words)
        return result, sorted(set(opened_names))

    return run


@pytest.fixture
def scored_clips(clips: Path, tmp_path: Path) -> Path:
    """A run of the clips with a manifest of all samples."""
    run = tmp_path / "run"
    few = ["--set", "probe.folds=2", "--repeats", "1", "--num-workers", "0", "--set", "data.test_fraction=0.25"]
    run_json("score", clips, "--run", run, "--id", "id", *few)
    run_json("split", "--subset", "most-balanced:100%", "--name", "all", "--run", run)
    return run


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unchanged_media_are_not_opened(
    scored_clips: Path, clips: Path, tmp_path: Path, workers: str, media_opened: Callable[..., tuple[Result, list[str]]]
) -> None:
    """Only a touched file is hashed; then its new times are known. Exports of rows open nothing at all."""
    tune = [*TUNE, "--run", scored_clips, "--num-workers", workers]
    evaluate = ["evaluate", "one", "--run", scored_clips, "--num-workers", workers]
    result, opened = media_opened(*tune, "--name", "one")
    assert (result.exit_code, opened) == (0, [])
    result, opened = media_opened(*evaluate)
    assert (result.exit_code, opened) == (0, [])
    for format_ in ("csv", "jsonl", "npy", "ogm", "datasets"):
        result, opened = media_opened(
            "export", "all", "--run", scored_clips, "--format", format_, "--out", tmp_path / format_
        )
        assert (result.exit_code, opened) == (0, []), result.output
    os.utime(clips / "3.wav", ns=(0, 0))
    assert media_opened(*evaluate)[1] == ["3.wav"]
    assert media_opened(*evaluate)[1] == []
    result, opened = media_opened(*tune, "--name", "two")
    assert (result.exit_code, opened) == (0, [])
    first, second = weights(scored_clips, "one"), weights(scored_clips, "two")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert len(media_opened("verify", "all", "--run", scored_clips)[1]) == 48


def test_changed_media_are_refused(
    scored_clips: Path, clips: Path, media_opened: Callable[..., tuple[Result, list[str]]]
) -> None:
    """Also when size and modification time are as before, since the time of the status change is not."""
    status = (clips / "5.png").stat()
    (clips / "5.png").write_bytes((clips / "5.png").read_bytes()[:-1] + b"!")
    os.utime(clips / "5.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    result, opened = media_opened(*TUNE, "--run", scored_clips)
    assert result.exit_code == 2
    assert "1 of 24 samples have changed their content since the manifest was made (the first: 005)" in output_of(
        result
    )
    assert opened == ["5.png"]


def test_cache_of_a_run_that_is_not_signed_is_hashed(
    scored_clips: Path, clips: Path, tmp_path: Path, media_opened: Callable[..., tuple[Result, list[str]]]
) -> None:
    foreign = Path(shutil.copytree(scored_clips, tmp_path / "foreign"))
    result, opened = media_opened(*TUNE, "--run", foreign, "--data", clips)
    assert (result.exit_code, len(opened)) == (0, 48)
    shutil.rmtree(scored_clips / "features")
    result, opened = media_opened(*TUNE, "--run", scored_clips)
    assert (result.exit_code, len(opened)) == (0, 48)
