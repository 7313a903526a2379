"""Tests of settings without an effect: named in one line by every command that takes settings."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import gaussian_table
from runs import copy_run
from typer.testing import CliRunner

from mmaudit.audit.dataset.modalities import Modality
from mmaudit.audit.errors import RunError
from mmaudit.audit.storage import read_json
from mmaudit.cli.config import RunConfig, load_config, load_settings
from mmaudit.cli.effects import effects_in_scoring, media_settings
from mmaudit.cli.main import app
from mmaudit.cli.run import Run

pytestmark = pytest.mark.usefixtures("no_reports")

FEW = ["--set", "probe.folds=2", "--repeats", "1", "--num-workers", "0"]
TUNE = ["finetune", "--manifest", "all", "--num-workers", "0", "--epochs", "1", "--set", "finetune.hidden=8"]


def unused_of(*words: str | Path, exit_code: int = 0) -> str:
    """Run a command; return the settings that it names as without effect."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    output = re.sub(r"\s+", " ", result.output)
    assert result.exit_code == exit_code, output
    named = re.findall(r"settings without effect in mmaudit \w+: (.*?\(.*?\)(?:; .*?\(.*?\))*)", output)
    assert len(named) <= 1
    return named[0] if named else ""


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("effects")
    pq.write_table(gaussian_table(num_samples=90), folder / "data.parquet")
    assert unused_of("score", folder / "data.parquet", "--run", folder / "run", *FEW) == ""
    assert unused_of("split", "--subset", "most-balanced:100%", "--name", "all", "--run", folder / "run") == ""
    return folder / "run"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return copy_run(finished_run, tmp_path / "run")


def test_score_names_settings_of_media_networks_and_later_commands(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read_json(run / "run.json", error=RunError)["source"]
    monkeypatch.setenv("MMAUDIT_NETWORK_EPOCHS", "3")
    (run.parent / "run.toml").write_text("[finetune]\nepochs = 7\n[optim]\nema = 0.0\n[probe]\nfolds = 3\n")
    words = ["--set", "media.image_size=32", "--set", "probe.hidden=9", "--config", str(run.parent / "run.toml")]
    named = unused_of("score", data, "--run", run.parent / "other", "--repeats", "1", "--num-workers", "0", *words)
    assert named == (
        "finetune.epochs (run.toml); network.epochs (MMAUDIT_NETWORK_EPOCHS); media.image_size, probe.hidden (--set)"
    )


def test_check_names_settings_of_probes(run: Path) -> None:
    data = read_json(run / "run.json", error=RunError)["source"]
    words = ["--set", "probe.folds=3", "--set", "leakage.neighbours=5", "--set", "data.keep_duplicates=true"]
    assert unused_of("check", data, "--run", run.parent / "other", *words) == "probe.folds (--set)"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--balanced", "--set", "split.bins=5", "--set", "posterior=0.6"], "posterior (--set)"),
        (["--gmm", "balanced", "--set", "split.bins=5", "--set", "posterior=0.6"], "split.bins (--set)"),
        (["--balanced", "--set", "split.max_weight=5", "--set", "probe.folds=2"], "split.max_weight (--set)"),
        (
            ["--balanced", "--by", "weight", "--set", "split.max_weight=5", "--set", "probe.max_rows=9"],
            "probe.max_rows (--set)",
        ),
    ],
)
def test_split_names_settings_of_other_rules(run: Path, words: list[str], named: str) -> None:
    """Settings that equal those of the scores, here two folds, were in effect there."""
    assert unused_of("split", "--run", run, "--name", "one", *words) == named


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--set", "order.steps=3"], "order.steps (--set)"),
        (["--pacing", "step", "--set", "order.steps=3"], ""),
        (["--order", "weighted", "--set", "order.start=0.3", "--set", "order.weight=softmax"], "order.start (--set)"),
        (["--set", "optim.lr=0.1", "--set", "finetune.keep_posterior=0.0"], "optim.lr (--set)"),
    ],
)
def test_order_names_settings_of_other_orders(run: Path, words: list[str], named: str) -> None:
    assert unused_of("order", "all", "--epoch", "1", "--run", run, *words) == named


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--sampling", "bss-h", "--set", "sampling.dus.kappa=2.0"], "sampling.dus.kappa (--set)"),
        (["--sampling", "bss-h", "--set", "order.start=0.3", "--set", "order.draw=replacement"], "order.draw (--set)"),
        (["--set", "network.width=0.5", "--set", "augment.flip=false"], "network.width, augment.flip (--set)"),
        (["--set", "optim.momentum=0.5", "--set", "optim.lr_step=3"], "optim.momentum, optim.lr_step (--set)"),
        (["--set", "optim.momentum=0.5", "--set", "optim.optimizer=sgd"], ""),
        (["--set", "media.image_size=32", "--set", "probe.folds=2"], "media.image_size (--set)"),
        (["--set", "balancing.ogm.alpha=0.5", "--balancing", "ogm"], ""),
    ],
)
def test_finetune_names_settings_of_methods_and_inputs_that_it_does_not_use(
    run: Path, words: list[str], named: str
) -> None:
    assert unused_of(*TUNE, "--run", run, "--name", "one", *words) == named


def test_finetune_records_the_network_that_it_trains_and_refuses_other_media(clips: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = ["--set", "media.network_size=16", "--set", "network.width=0.0625", "--set", "network.epochs=1"]
    networks = ["--encoder", "audio=resnet18", "--encoder", "image=resnet18", "--set", "probe.control=false"]
    assert unused_of("score", clips, "--run", run, *networks, *small, *FEW, "--set", "data.test_fraction=0.25") == ""
    assert unused_of("split", "--subset", "most-balanced:100%", "--name", "all", "--run", run) == ""
    assert unused_of(*TUNE, "--run", run, "--name", "scored", "--set", "media.network_size=16") == ""
    assert Run(run).finetune("scored")
    recorded = read_json(run / "finetune" / "scored" / "metrics.json", error=RunError)["config"]["network"]
    assert recorded == {"width": 0.0625, "normalise_pictures": "data", "normalise_sound": "data"}
    words = ["--set", "network.width=0.125", "--set", "network.normalise_pictures=imagenet", "--set", "network.lr=0.1"]
    assert unused_of(*TUNE, "--run", run, "--name", "own", *words) == "network.lr (--set)"
    metrics = read_json(run / "finetune" / "own" / "metrics.json", error=RunError)
    assert metrics["config"]["network"] == {"width": 0.125, "normalise_pictures": "imagenet", "normalise_sound": "data"}
    result = CliRunner().invoke(
        app, [*map(str, TUNE), "--run", str(run), "--name", "no", "--set", "media.network_seconds=2.0"]
    )
    assert result.exit_code == 2
    output = re.sub(r"\s+", " ", result.output)
    assert "media.network_seconds is 2.0 (--set), and the features of this manifest were encoded with 3.0" in output
    assert "mmaudit score DATA --set media.network_seconds=2.0 --overwrite" in output


def test_given_settings_are_those_made_by_the_user(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("seed = 0\n[probe]\nfolds = 4\nrepeats = 3\n")
    config, given = load_settings(tmp_path / "run.toml", ["probe.repeats=2"], {"probe.folds": 9, "seed": None})
    assert config == load_config(tmp_path / "run.toml", ["probe.repeats=2"], {"probe.folds": 9})
    assert {key: (setting.source, setting.value, setting.is_default) for key, setting in given.items()} == {
        "seed": ("run.toml", 0, True),
        "probe.repeats": ("--set", 2, False),
    }
    given = load_settings(RunConfig(posterior=0.6))[1]
    assert {key: setting.value for key, setting in given.items()} == {"posterior": 0.6}


def test_code_of_others_may_read_every_media_setting_but_those_of_networks() -> None:
    names = media_settings(
        Modality(name="m", column="c", kind="audio", encoder="my.module:function"), RunConfig().media
    )
    assert "image_size" in names
    assert "network_size" not in names
    assert media_settings(Modality(name="m", column="c", kind="features"), RunConfig().media) == set()


def test_settings_of_probes_have_an_effect_by_kind() -> None:
    vectors = Modality(name="v", column="v", kind="features")
    network = Modality(name="n", column="n", kind="image", encoder="resnet18")
    for kind, key, expected in (("auto", "hidden", False), ("mlp", "hidden", True), ("mlp", "gaussian", False)):
        config = load_config(settings={"probe.kind": kind})
        assert effects_in_scoring(config, [vectors, vectors])(f"probe.{key}") is expected
    config = RunConfig()
    assert effects_in_scoring(config, [vectors, network])("probe.max_steps")
    assert not effects_in_scoring(config, [vectors, network])("probe.joint")
    assert not effects_in_scoring(config, [network, network])("probe.max_steps")
    assert effects_in_scoring(config, [network, network])("probe.folds")
