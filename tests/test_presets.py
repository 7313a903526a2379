"""Tests of the presets: every key exists, other settings override them and are recorded, and each trains end to end."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import make_video, picture, tone
from typer.testing import CliRunner, Result

from mmaudit.audit.downloads import DOWNLOADS
from mmaudit.audit.errors import ConfigError
from mmaudit.audit.parsing import plain
from mmaudit.cli.config import RunConfig, load_config, preset_record
from mmaudit.cli.main import app
from mmaudit.cli.provenance import SourceOptions
from mmaudit.cli.run import Run
from mmaudit.cli.training_source import ManifestSource, record_preset
from mmaudit.rebalance.manifest import COLUMNS, Manifest
from mmaudit.train.methods import check_schedule, list_unused, resolve
from mmaudit.train.presets import PRESETS, Preset, read_preset

torch.set_num_threads(1)

# Networks of 4 feature maps, inputs of 32 pixels and of 2 s in place of 20: the rest is as published.
NARROW = ("network.width=0.0625", "media.network_size=32", "media.network_stored_size=64", "media.network_seconds=2")
QUICK = ("ogm-ge-cremad", "bss-h-cremad")
EMOTIONS = ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")


def mmaudit_cli(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def run_json(*words: str | Path) -> dict[str, Any]:
    result = mmaudit_cli(*words, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def options(preset: str, *settings: str) -> list[str]:
    """Return the options of a quick training by a preset."""
    pairs = [word for setting in (*NARROW, *settings) for word in ("--set", setting)]
    return ["--preset", preset, "--epochs", "2", "--batch-size", "8", "--num-workers", "0", *pairs]


@pytest.fixture(scope="module")
def cremad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CREMA-D in its official shape: AudioWAV, Image-01-FPS, VideoFlash and the lists of 18 and 6 made clips."""
    folder, rng = tmp_path_factory.mktemp("cremad"), np.random.default_rng(0)
    for name in ("AudioWAV", "VideoFlash"):
        (folder / name).mkdir()
    lists: dict[str, list[str]] = {"train": [], "test": []}
    film = make_video(True)
    for number in range(24):
        label = number % 6
        clip = f"{1001 + number // 6}_DFA_{EMOTIONS[label]}_XX"
        (folder / "AudioWAV" / f"{clip}.wav").write_bytes(tone(200 * (label + 1) + 20 * rng.random()))
        (folder / "VideoFlash" / f"{clip}.mp4").write_bytes(film)
        frames = folder / "Image-01-FPS" / clip
        frames.mkdir(parents=True)
        for frame in range(1, 4):
            (frames / f"frame_{frame:05d}.png").write_bytes(picture(label % 3, rng))
        lists["train" if number < 18 else "test"].append(f"{clip},{EMOTIONS[label]}")
    for name, lines in lists.items():
        (folder / f"{name}.csv").write_text("\n".join(lines))
    run_json("ingest", "ogm-ge", folder)
    return folder


def train_by(preset: str, data: Path, run: Path) -> dict[str, Any]:
    """Train by a preset and check the record of it."""
    metrics = run_json("finetune", "--data", data, "--run", run, *options(preset))
    record = metrics["preset"]
    assert (record["name"], record["digest"]) == (preset, read_preset(preset).digest)
    expected = {"finetune.epochs", "finetune.batch_size", *(setting.partition("=")[0] for setting in NARROW)}
    own = read_preset(preset).settings
    same = {key for key in expected if own[key.split(".")[0]].get(key.split(".")[1]) == metrics_value(metrics, key)}
    assert set(record["changed"]) == expected - same
    assert metrics["best_epoch"] == 2
    assert metrics["counts"]["test"] == 6
    assert (run / "finetune" / f"all-{preset}" / "model.safetensors").exists()
    return metrics


def metrics_value(metrics: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return metrics["config"][section][name]


@pytest.mark.parametrize("preset", QUICK)
def test_quick_presets_train_on_the_official_shape(cremad: Path, tmp_path: Path, preset: str) -> None:
    metrics = train_by(preset, cremad, tmp_path / "run")
    assert metrics["counts"]["train"] == 18  # all of the official list: no validation split is cut
    assert list(metrics["test"]) == ["all"]


@pytest.mark.slow  # test_quick_presets_train_on_the_official_shape trains two of them
@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in QUICK])
def test_every_preset_trains_on_the_official_shape(
    cremad: Path, tmp_path_factory: pytest.TempPathFactory, preset: str
) -> None:
    train_by(preset, cremad, tmp_path_factory.mktemp("run"))


@pytest.mark.slow  # test_quick_presets_train_on_the_official_shape has frames in place of films
def test_preset_trains_on_films_with_the_lists(cremad: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cremad, tmp_path / "cremad"))
    run_json("ingest", "cremad", folder, "--list", folder / "train.csv", "--list", folder / "test.csv")
    assert train_by("ogm-ge-cremad", folder, tmp_path / "run")["made_from"]["columns"]["group"] == "group"


@pytest.mark.slow  # test_other_media_of_a_manifests_scores_are_named_and_recorded is quick
def test_scores_and_training_by_one_preset_have_the_same_media(cremad: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    quick = [*NARROW, "network.epochs=1", "probe.folds=2", "probe.control=false"]
    pairs = [word for setting in quick for word in ("--set", setting)]
    words = ["--preset", "ogm-ge-cremad", "--repeats", "1", "--num-workers", "0", *pairs]
    record = run_json("score", cremad, "--run", run, *words)
    assert record["preset"]["name"] == "ogm-ge-cremad"
    assert record["preset"]["changed"]["media.network_size"] == {"preset": 224, "used": 32}
    run_json("split", "--subset", "most-balanced:100%", "--name", "all", "--run", run)
    metrics = run_json("finetune", "--manifest", "all", "--run", run, *options("ogm-ge-cremad"))
    assert metrics["preset"]["changed"]["media.network_size"] == {"preset": 224, "used": 32}
    assert len(metrics["test"]) > 1


@pytest.mark.parametrize("name", PRESETS)
def test_every_key_of_a_preset_exists_and_has_an_effect(name: str) -> None:
    config = load_config(preset=name)
    methods = resolve(config.training())
    assert not check_schedule(methods)
    assert not list_unused(methods)
    resolved = methods.config
    for axis in ("sampling", "balancing"):  # constants of methods that are not used would be left out
        assert read_preset(name).settings.get(axis, {}).keys() <= getattr(resolved, axis).keys()
    assert config.data.encoder == ("audio=resnet18", "visual=resnet18")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_states_its_sources(name: str) -> None:
    preset = read_preset(name)
    assert preset.sources
    assert preset.title
    assert preset.paper
    assert set(preset.data) <= set(DOWNLOADS)
    texts = (*preset.not_stated, *preset.differs)
    assert preset.reported or any("be read" in text or "not been published" in text for text in texts)
    assert preset.settings["finetune"]["keep"] == "last"  # test data choose nothing, and there is no validation split


def test_unknown_key_in_a_preset_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = read_preset("ogm-ge-cremad")
    broken = Preset(
        **{name: getattr(preset, name) for name in Preset.__dataclass_fields__ if name != "settings"},
        settings={"finetune": {"epoch": 3}},
    )
    monkeypatch.setattr("mmaudit.cli.config.read_preset", lambda name: broken)
    with pytest.raises(ConfigError, match=r"no config key finetune.epoch; did you mean finetune.epochs\?"):
        load_config(preset="ogm-ge-cremad")


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--preset ogmge-cremad: no such preset; did you mean ogm-ge-cremad\?"):
        load_config(preset="ogmge-cremad")


def test_every_other_setting_overrides_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.toml").write_text("[finetune]\nepochs = 3\nbatch_size = 3\nhidden = 3\n")
    monkeypatch.setenv("MMAUDIT_FINETUNE_BATCH_SIZE", "4")
    config = load_config(tmp_path / "run.toml", {"finetune.hidden": 5}, {"optim.lr": 6.0}, preset="ogm-ge-cremad")
    tuned = config.finetune
    assert (tuned.epochs, tuned.batch_size, tuned.hidden, config.optim.lr) == (3, 4, 5, 6.0)
    assert tuned.initialisation == "xavier"
    assert config.balancing["ogm"]["alpha"] == 0.8


def test_run_config_overrides_a_preset_where_it_differs_from_the_defaults() -> None:
    config = load_config(load_config(settings={"finetune.epochs": 7}), preset="ogm-ge-cremad")
    assert (config.finetune.epochs, config.finetune.batch_size, config.media.sample_rate) == (7, 64, 22050)
    assert load_config(RunConfig(), preset="ogm-ge-cremad") == load_config(preset="ogm-ge-cremad")


def test_encoder_of_one_modality_leaves_that_of_the_other() -> None:
    config = load_config(None, {}, {"data.encoder": ("audio=statistics",)}, preset="ogm-ge-cremad")
    assert config.data.encoder == ("audio=statistics", "visual=resnet18")


def test_other_balancing_drops_the_constants_of_the_preset() -> None:
    config = load_config(None, {}, {"finetune.balancing": "mmpareto"}, preset="ogm-ge-cremad")
    assert resolve(config.training()).config.balancing.keys() == {"mmpareto"}


def test_method_that_replaces_that_of_the_base_has_none_of_its_constants() -> None:
    assert "bss" in read_preset("bss-h-cremad").settings["sampling"]
    replaced = read_preset("dus-h-cremad").settings
    assert "sampling" not in replaced
    assert "balancing" not in replaced
    assert replaced["media"] == read_preset("bss-h-cremad").settings["media"]


def test_record_names_what_differs_and_nothing_else() -> None:
    own = {"finetune": {"epochs": 100, "lr": [1]}, "seed": 0}
    assert preset_record("ogm-ge-cremad", own, own)["changed"] == {}
    used = {"finetune": {"epochs": 20, "lr": [1], "hidden": 3}, "seed": 0}
    changed = preset_record("ogm-ge-cremad", own, used)["changed"]
    expected = {"preset": 100, "used": 20}
    assert changed == {"finetune.epochs": expected, "finetune.hidden": {"preset": None, "used": 3}}


def test_digest_is_of_the_settings_alone() -> None:
    digests = {name: read_preset(name).digest for name in PRESETS}
    assert digests["ogm-ge-cremad"] != digests["agm-cremad"]
    assert digests["study-audio-vggsound"] == digests["study-audio-kinetics-sounds"]  # other data, the same settings


def test_presets_are_listed_with_their_figures_and_gaps() -> None:
    listed = run_json("methods", "--presets")["presets"]
    assert [row["name"] for row in listed] == list(PRESETS)
    assert all(row["digest"] and row["settings"] for row in listed)
    text = re.sub(r"\s+", " ", mmaudit_cli("methods", "--presets").output)
    assert "bss-h-cremad BSS-H on CREMA-D (Guan et al., IJCAI 2025, arXiv 2501.01470)" in text
    assert "reported: accuracy 80.78 on CREMA-D (paper)" in text
    assert "dus-h-cremad DUS, heuristic, on CREMA-D (Jiang et al., arXiv 2503.03792) reported: not read" in text
    (number,) = re.findall(r"\[(\d+)\] The lists of 6,698 and 744 clips share all 91 actors", text)  # a note of many
    assert re.search(rf"ogm-ge-cremad OGM-GE [^/]*differs: [\[\]\d ]*\[{number}\]", text)
    refused = mmaudit_cli("methods", "--presets", "--kind", "sampler")
    assert refused.exit_code == 2


def test_other_media_of_a_manifests_scores_are_named_and_recorded(caplog: pytest.LogCaptureFixture) -> None:
    scores = {
        "modalities": [{"name": name, "encoder": "resnet18"} for name in ("audio", "visual")],
        "config": {"media": {**plain(load_config(preset="ogm-ge-cremad").media), "network_size": 112}},
    }
    table = pa.table({name: pa.nulls(0, type_) for name, type_ in COLUMNS.items()})
    manifest = Manifest(table=table, provenance={"scores": scores})
    options = SourceOptions()
    source = ManifestSource(path=Path("all.parquet"), manifest=manifest, run_dir=Run(Path("run")), options=options)
    config = load_config(settings={"finetune.epochs": 5}, preset="ogm-ge-cremad")
    with caplog.at_level(logging.WARNING):
        record = record_preset("ogm-ge-cremad", config, source)
    assert record["changed"].keys() == {"media.network_size", "finetune.epochs"}
    assert record["changed"]["media.network_size"] == {"preset": 224, "used": 112}
    assert "all was scored with other settings than those of --preset ogm-ge-cremad" in caplog.text
    assert "media.network_size; score with mmaudit score --preset ogm-ge-cremad" in caplog.text
