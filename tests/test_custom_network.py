"""Tests of networks of the user's in finetune: equal to mmaudit's own of the same form, exact resume, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import gaussian_table
from safetensors.torch import load_file
from torch import Tensor
from training import (
    fine_tune,
    make_examples,
    make_label_sets,
    make_numbers,
    model_bytes,
    stop_after,
    with_options,
)
from typer.testing import CliRunner, Result

from mmaudit.audit.errors import ConfigError, RunError, TrainError
from mmaudit.audit.features.encoders import function_version
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.cli.main import app
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.checkpoint import read_model_config
from mmaudit.train.config import TrainConfig
from mmaudit.train.custom_network import PictureStandardization, input_shape
from mmaudit.train.evaluate import evaluate_file
from mmaudit.train.examples import Examples
from mmaudit.train.methods import check_task, resolve

torch.set_num_threads(1)

SOURCE = '''
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmaudit.train import FUSIONS


class Concat(nn.Module):
    """The network of --fusion concat: its weights are drawn in the same order."""

    def __init__(self, modalities, shapes, num_classes, hidden=6):
        super().__init__()
        self.num_features, self.num_classes = dict.fromkeys(modalities, hidden), num_classes
        self.encoders = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(d, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Dropout(0.3))
                for name, (d,) in zip(modalities, shapes)
            }
        )
        self.fusion = FUSIONS.load("concat")([hidden] * len(modalities), num_classes=num_classes, hidden=hidden)

    def fuse(self, features):
        return self.fusion(features)

    def unimodal_logits(self, features):
        return self.fusion.unimodal_logits(features)


class Fused(Concat):
    """The same without unimodal logits."""

    unimodal_logits = None


class Net(nn.Module):
    """Lazy layers, batch normalisation in encoders and head, no unimodal logits, and a part that is frozen."""

    def __init__(self, modalities, shapes, num_classes):
        super().__init__()
        self.num_features, self.num_classes = dict.fromkeys(modalities, 5), num_classes
        self.encoders = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5), nn.ReLU())
                if len(shape) == 1
                else nn.Sequential(nn.Conv2d(shape[0], 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
                for name, shape in zip(modalities, shapes)
            }
        )
        self.head = nn.Sequential(nn.BatchNorm1d(5 * len(modalities)), nn.Linear(5 * len(modalities), num_classes))
        self.fixed = nn.Dropout(0.5).eval()

    def fuse(self, features):
        assert not self.fixed.training
        return self.head(torch.cat(features, dim=1))


def wrong_order(modalities, shapes, num_classes):
    net = Net(modalities, shapes, num_classes)
    net.encoders = nn.ModuleDict(reversed(list(net.encoders.items())))
    return net


def wrong_classes(modalities, shapes, num_classes):
    return Net(modalities, shapes, num_classes + 1)


def wrong_logits(modalities, shapes, num_classes):
    net = Net(modalities, shapes, num_classes)
    net.head = nn.Linear(10, num_classes + 1)
    return net


def wrong_inputs(modalities, shapes, num_classes):
    net = Net(modalities, shapes, num_classes)
    net.encoders[modalities[0]] = nn.Linear(99, 5)
    return net


def wrong_features(modalities, shapes, num_classes):
    net = Net(modalities, shapes, num_classes)
    net.num_features[modalities[0]] = 7
    return net


class Tower(nn.Module):
    """The vision tower of a small CLIP, frozen but for its last norm."""

    def __init__(self):
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        self.clip = CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, **sizes))
        for name, parameter in self.clip.named_parameters():
            parameter.requires_grad_("post_layernorm" in name)

    def forward(self, pixels):
        return checkpoint(lambda x: self.clip(pixel_values=x).pooler_output, pixels, use_reentrant=False)


def pretrained(modalities, shapes, num_classes):
    net = Net(modalities, shapes, num_classes)
    net.encoders[modalities[1]], net.num_features[modalities[1]] = Tower(), 8
    net.head = nn.Linear(13, num_classes)
    return net


def no_network(modalities, shapes, num_classes):
    return "a network"


def failing(modalities, shapes, num_classes):
    raise ValueError("no weights")
'''


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of networks that can be imported, in a folder of its own; its name is new in every test."""
    name = f"nets_{tmp_path.name}".replace("-", "_")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    return name


def of_model(model: str, **options: Any) -> TrainConfig:
    return with_options(**{"model": model, **options})


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((6, 5), (8, 8, 3)), ((3,), (2, 8, 8, 3))])
def test_the_network_of_the_guide_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes: tuple[tuple[int, ...], ...]
) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "howto" / "training-loop.md").read_text(encoding="utf-8")
    section = page.partition("## Your own network in finetune\n")[2]
    name = f"guide_{len(shapes[0])}{len(shapes[1])}"
    (tmp_path / f"{name}.py").write_text(section.partition("```python\n")[2].partition("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    examples, rng = make_examples(60), np.random.default_rng(0)
    inputs = [
        matrix if len(shape) == 1 else MatrixInputs(matrix=rng.random((60, int(np.prod(shape))), dtype=np.float32))
        for matrix, shape in zip(examples.inputs, shapes, strict=True)
    ]
    config = of_model(f"{name}:build", balancing="ogm-ge", epochs=2)
    trained = fine_tune(replace(examples, inputs=tuple(inputs), shapes=shapes), tmp_path, config)
    assert np.isfinite(trained.history[-1]["train_loss"])


def evaluate(folder: Path, examples: Examples, config: TrainConfig, *, model: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"split": "test", "between": "audio:visual", "config": config, "seed": 0, "device": "cpu"}
    return evaluate_file(folder / "model.safetensors", examples, **options, model=model)


@pytest.mark.parametrize(
    ("sampling", "balancing"),
    [("uniform", "joint"), ("bss-h", "ogm-ge"), ("uniform", "agm"), ("uniform", "gblend"), ("uniform", "mslr")],
)
def test_a_network_of_the_form_of_ours_trains_the_same(
    nets: str, tmp_path: Path, sampling: str, balancing: str
) -> None:
    """Also by methods that need more than a loop of the user's has: copies of the network, rates by modality.

    Equal up to the rounding of the fused logits, whose parts are summed in another order.
    """
    examples = make_examples()
    options: dict[str, Any] = {"sampling": sampling, "balancing": balancing, "epochs": 3}
    ours = fine_tune(examples, tmp_path / "ours", with_options(**options))
    users = fine_tune(examples, tmp_path / "users", of_model(f"{nets}:Concat", **options))
    for record, expected in zip(users.history, ours.history, strict=True):
        assert record == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for key in ("num_parameters", "samples_seen", "best_epoch"):
        assert users.metrics[key] == ours.metrics[key]
    config = of_model(f"{nets}:Concat", **options)
    evaluated = evaluate(tmp_path / "users", examples, config, model=f"{nets}:Concat")
    assert evaluated["test"] == users.metrics["test"]


@pytest.mark.parametrize("balancing", [name for name in BALANCERS if "concat" in BALANCERS.load(name).fusions])
def test_every_method_trains_without_unimodal_logits(nets: str, tmp_path: Path, balancing: str) -> None:
    """Of the 30 training samples the last batch has one, of which batch normalisation knows no variance."""
    epochs = 4 if balancing == "gmm" else 2
    config = of_model(f"{nets}:Net", balancing=balancing, epochs=epochs, batch_size=29)
    config = replace(config, balancing={"gmm": {"warmup_epochs": 1}} if balancing == "gmm" else {})
    trained = fine_tune(make_examples(60), tmp_path, config)
    assert all(np.isfinite(value) for record in trained.history for value in record.values())
    evaluated = evaluate(tmp_path, make_examples(60), config, model=f"{nets}:Net")
    assert evaluated["test"] == trained.metrics["test"]


TASKS: dict[str, Callable[..., Examples]] = {"multilabel": make_label_sets, "regression": make_numbers}
WITHOUT_CLASSES = ["joint", "sum", "modality-dropout", "gblend", "agm", "mmpareto", "mses", "mslr", "dgl"]


@pytest.mark.parametrize(
    ("task", "balancing"),
    [
        *(("multilabel", name) for name in ("sum", "agm", "mslr")),
        *(("regression", name) for name in ("joint", "gblend")),
    ],
)
def test_other_targets_are_trained_as_by_a_network_of_ours(
    nets: str, tmp_path: Path, task: str, balancing: str
) -> None:
    """Numbers far from 0: their mean and scale are those of the training samples in both."""
    options = {"offset": 300.0, "unit": 40.0} if task == "regression" else {}
    examples = TASKS[task](**options)
    settings: dict[str, Any] = {"balancing": balancing, "epochs": 3}
    ours = fine_tune(examples, tmp_path / "ours", with_options(**settings))
    model = f"{nets}:{'Fused' if task == 'regression' else 'Concat'}"
    users = fine_tune(examples, tmp_path / "users", of_model(model, **settings))
    for record, expected in zip(users.history, ours.history, strict=True):
        assert record == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert users.metrics["num_parameters"] == ours.metrics["num_parameters"]
    evaluated = evaluate(tmp_path / "users", examples, of_model(model, **settings), model=model)
    assert evaluated["test"] == users.metrics["test"]
    if task == "regression":
        weights = load_file(tmp_path / "users" / "model.safetensors")
        values = examples.target[examples.rows("train")]
        assert float(weights["target_mean"]) == pytest.approx(float(values.mean()), rel=1e-6)
        assert users.metrics["test"]["all"]["branches"]["fused"]["mae"] < 70  # guessing the median: 80


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("balancing", [name for name in BALANCERS if "concat" in BALANCERS.load(name).fusions])
def test_methods_train_other_targets_or_refuse_as_without_a_model(
    nets: str, tmp_path: Path, task: str, balancing: str
) -> None:
    config = of_model(f"{nets}:Net", balancing=balancing, epochs=2, batch_size=29)
    examples = TASKS[task](60)
    if balancing not in WITHOUT_CLASSES:
        with pytest.raises(ConfigError, match=f"balancing {balancing} needs classes, and the task is {task}: "):
            check_task(resolve(config), task)
        return
    trained = fine_tune(examples, tmp_path, config)
    assert all(np.isfinite(value) for record in trained.history for value in record.values())
    evaluated = evaluate(tmp_path, examples, config, model=f"{nets}:Net")
    assert evaluated["test"] == trained.metrics["test"]


def test_parts_of_a_number_are_no_unimodal_predictions(nets: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unimodal_logits add up to the fused logits"):
        fine_tune(make_numbers(60), tmp_path, of_model(f"{nets}:Concat", epochs=1))
    with pytest.raises(ConfigError, match="num_classes 2, and the samples have 1 number"):
        fine_tune(make_numbers(60), tmp_path, of_model(f"{nets}:wrong_classes", epochs=1))
    with pytest.raises(ConfigError, match="num_classes 4, and the samples have 3 labels"):
        fine_tune(make_label_sets(60), tmp_path, of_model(f"{nets}:wrong_classes", epochs=1))
    fine_tune(make_numbers(60), tmp_path, of_model(f"{nets}:Concat", epochs=1, own_heads=True))


@pytest.mark.parametrize("balancing", sorted({"aug", "greedy", "mla", "mmcosine", "reconboost"}))
def test_methods_with_a_fusion_of_their_own_are_refused(balancing: str) -> None:
    with pytest.raises(ConfigError, match=f"balancing {balancing} does not work with a network of your own: "):
        resolve(of_model("nets:build", balancing=balancing))


@pytest.mark.parametrize("balancing", ["joint", "ogm-ge", "mses"])
def test_an_interrupted_training_resumes_exactly(nets: str, tmp_path: Path, balancing: str) -> None:
    config = of_model(f"{nets}:Net", balancing=balancing, epochs=4, ema=0.5)
    complete = fine_tune(make_examples(), tmp_path / "complete", config)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(make_examples(), tmp_path / "resumed", config, progress=stop_after(2))
    resumed = fine_tune(make_examples(), tmp_path / "resumed", config)
    assert resumed.history == complete.history
    assert model_bytes(tmp_path / "resumed") == model_bytes(tmp_path / "complete")


def test_a_changed_source_starts_again(
    nets: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = of_model(f"{nets}:Net", epochs=3)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(make_examples(60), tmp_path / "run", config, progress=stop_after(1))
    monkeypatch.setattr("mmaudit.train.checkpoint.function_version", lambda name: "another")
    with caplog.at_level("INFO", logger="mmaudit"):
        fine_tune(make_examples(60), tmp_path / "run", config)
    assert "starting from scratch" in caplog.text


def test_frozen_encoders_keep_their_weights_and_running_means(nets: str, tmp_path: Path) -> None:
    files = []
    for epochs in (1, 3):
        config = of_model(f"{nets}:Net", epochs=epochs, freeze=("audio",), keep="last")
        fine_tune(make_examples(60), tmp_path / str(epochs), config)
        files.append(load_file(tmp_path / str(epochs) / "model.safetensors"))
    changed = {name for name, tensor in files[0].items() if not torch.equal(tensor, files[1][name])}
    assert any(name.startswith("model.encoders.visual.2.running") for name in changed)
    assert not any(name.startswith("model.encoders.audio") for name in changed)


def test_missing_modalities_are_masked(nets: str, tmp_path: Path) -> None:
    examples = make_examples()
    present = examples.present.copy()
    present[::3, 1] = False
    matrix = np.array(examples.inputs[1].read(np.arange(120)))
    matrix[~present[:, 1]] = np.nan
    masked = replace(examples, inputs=(examples.inputs[0], MatrixInputs(matrix=matrix)), present=present)
    config = of_model(f"{nets}:Net", epochs=2, balancing="sum")
    trained = fine_tune(masked, tmp_path, config)
    assert all(np.isfinite(value) for record in trained.history for value in record.values())
    assert evaluate(tmp_path, masked, config, model=f"{nets}:Net")["test"] == trained.metrics["test"]


def picture_examples() -> Examples:
    """Samples whose sound is a spectrogram of (6, 5), and whose images have (8, 8, 3) pixels."""
    examples, rng = make_examples(60), np.random.default_rng(0)
    sound = rng.normal(3, 2, (60, 30)) + examples.label[:, None]
    pixels = rng.integers(0, 100, (60, 192)) + 30 * examples.label[:, None]
    inputs = (MatrixInputs(matrix=sound.astype(np.float32)), MatrixInputs(matrix=pixels.astype(np.uint8)))
    return replace(examples, inputs=inputs, shapes=((6, 5), (8, 8, 3)))


def test_pictures_and_spectrograms_arrive_as_standardised_tensors(nets: str, tmp_path: Path) -> None:
    config = of_model(f"{nets}:Net", epochs=2)
    trained = fine_tune(picture_examples(), tmp_path, config)
    assert read_model_config(tmp_path / "model.safetensors").model == f"{nets}:Net"
    assert evaluate(tmp_path, picture_examples(), config, model=f"{nets}:Net")["test"] == trained.metrics["test"]


@pytest.mark.parametrize("balancing", ["joint", "ogm-ge", "mmpareto"])
def test_parts_without_gradient_stay_as_they_are(nets: str, tmp_path: Path, balancing: str) -> None:
    """As those of a pretrained network of which only some weights are trained."""
    files = []
    for epochs in (1, 3):
        config = of_model(f"{nets}:pretrained", epochs=epochs, balancing=balancing, keep="last")
        config = replace(config, normalise_pictures="imagenet")
        fine_tune(picture_examples(), tmp_path / str(epochs), config)
        files.append(load_file(tmp_path / str(epochs) / "model.safetensors"))
    changed = {name for name, tensor in files[0].items() if not torch.equal(tensor, files[1][name])}
    trained = {name for name in changed if name.startswith("model.encoders.visual")}
    assert len(trained) == 2
    assert all("post_layernorm" in name for name in trained)


@pytest.mark.parametrize("shape", [(6, 5), (8, 8, 3), (2, 8, 8, 3)])
def test_standardised_pictures_have_mean_0_and_deviation_1(shape: tuple[int, ...]) -> None:
    rows = torch.rand(20, int(np.prod(shape))) * 200
    rows[:, 0] = torch.nan if len(shape) == 2 else rows[:, 0]
    channels = 1 if len(shape) == 2 else shape[-1]
    values = rows.view(-1, channels)
    values = values[~values.isnan().any(dim=1)]
    layer = PictureStandardization(shape)
    layer.standardise_by(values.mean(dim=0), values.std(dim=0, correction=0))
    pictures: Tensor = layer(rows)
    assert pictures.shape == (20, *input_shape(shape))
    axes = [0, *range(2, pictures.ndim)] if len(shape) != 4 else [0, 1, 3, 4]
    torch.testing.assert_close(pictures.mean(dim=axes), torch.zeros(channels), atol=1e-5, rtol=0)
    assert bool((pictures.std(dim=axes) - 1).abs().max() < 0.03)  # one value of 30 is NaN, and counts as 0


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("wrong_order", "has encoders of visual, audio; they must be .* in their order: audio, visual"),
        ("wrong_classes", "has num_classes 5, and the samples have 4 classes"),
        ("wrong_logits", r"fuse returns logits of shape \(2, 5\), must be \(2, 4\)"),
        ("wrong_inputs", "raised RuntimeError on the first samples: mat1 and mat2"),
        ("wrong_features", r"features of shape \(2, 5\), must be \(2, 7\)"),
        ("no_network", "str is no nn.Module"),
        ("failing", ":failing raised ValueError: no weights"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_wrong_networks_raise_before_the_first_step(nets: str, tmp_path: Path, factory: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fine_tune(make_examples(60), tmp_path, of_model(f"{nets}:{factory}", epochs=1))
    assert not (tmp_path / "history.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nets"}, "finetune.model nets: not of the form package.module:factory"),
        ({"fusion": "concat"}, "remove --fusion concat, or where a file or preset sets it, pass --fusion auto"),
        ({"init": "plain"}, "--init plain loads weights of mmaudit's own networks; load those of yours in nets:build"),
    ],
)
def test_settings_of_our_networks_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        of_model("nets:build", **options) if "model" not in options else with_options(**options)


def test_a_resolved_config_resolves_to_itself() -> None:
    resolved = resolve(of_model("nets:build", balancing="auto", sampling="dus-h")).config
    assert (resolved.finetune.fusion, resolved.finetune.balancing) == ("own", "sum")
    assert resolve(resolved).config == resolved
    with pytest.raises(ConfigError, match="--fusion own"):
        resolve(with_options(fusion="own"))


def test_files_name_code_and_do_not_run_it(nets: str, tmp_path: Path) -> None:
    config = of_model(f"{nets}:Net", epochs=1)
    fine_tune(make_examples(60), tmp_path / "users", config)
    for model in (None, f"{nets}:Concat"):
        with pytest.raises(RunError, match=f"is a network of your own, .* pass --model {nets}:Net"):
            evaluate(tmp_path / "users", make_examples(60), config, model=model)
    fine_tune(make_examples(60), tmp_path / "ours", with_options(epochs=1))
    with pytest.raises(RunError, match=f"is a network of mmaudit's own: remove --model {nets}:Net"):
        evaluate(tmp_path / "ours", make_examples(60), config, model=f"{nets}:Net")
    with pytest.raises(TrainError, match=f"holds weights of the network of {nets}:Net"):
        fine_tune(make_examples(60), tmp_path / "b", with_options(), init=tmp_path / "users" / "model.safetensors")


def mmaudit(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def line_of(result: Result) -> str:
    return " ".join(result.output.split())


def test_commands(nets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, test again, and refuse to run code that is not named, or that has changed."""
    monkeypatch.chdir(tmp_path)
    pq.write_table(gaussian_table(num_samples=120), "data.parquet")
    train = ("finetune", "--data", "data.parquet", "--epochs", "2", "--num-workers", "0", "--model", f"{nets}:Net")
    result = mmaudit(*train, "--sampling", "class-balanced", "--balancing", "ogm", "--json")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "mmaudit-run" / "finetune" / "all-Net-class-balanced-ogm"
    metrics = json.loads((folder / "metrics.json").read_text())
    file = tmp_path / "code" / f"{nets}.py"
    assert metrics["code"] == {"model": f"{nets}:Net", "file": str(file), "digest": function_version(f"{nets}:Net")}
    assert metrics["config"]["finetune"]["fusion"] == "own"

    test = ("evaluate", folder.name, "--data", "data.parquet", "--num-workers", "0")
    refused = mmaudit(*test)
    assert refused.exit_code == 2
    assert f"pass --model {nets}:Net" in line_of(refused)
    evaluated = mmaudit(*test, "--model", f"{nets}:Net", "--json")
    assert json.loads(evaluated.stdout)["test"] == metrics["test"]

    again = mmaudit(*train[:-2], "--config", folder / "config.toml", "--name", folder.name)
    assert again.exit_code == 0, again.output
    file.write_text(SOURCE + "# changed\n")
    function_version.cache_clear()
    changed = mmaudit(*train[:-2], "--config", folder / "config.toml", "--name", folder.name)
    assert changed.exit_code == 2
    assert f"was trained with another version of {file}" in line_of(changed)
    warned = mmaudit(*test, "--model", f"{nets}:Net")
    assert warned.exit_code == 0
    assert f"({file}) has changed since {folder.name} was trained" in line_of(warned)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--balancing", "greedy"), "balancing greedy does not work with a network of your own"),
        (("--fusion", "gated"), "remove --fusion gated"),
        (("--init", "plain"), "--init plain loads weights of mmaudit's own networks"),
        (("--model", "not_there:build"), "module 'not_there' cannot be imported"),
    ],
)
def test_refusals_come_before_data_are_read(nets: str, words: tuple[str, ...], message: str) -> None:
    result = mmaudit("finetune", "--data", "missing.parquet", "--model", f"{nets}:Net", *words)
    assert result.exit_code == 2
    assert message in line_of(result)


def test_settings_without_effect_are_named(
    nets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--epochs", "1", "--num-workers", "0", "--set", "finetune.hidden=9", "--set", "finetune.dropout=0.1")
    result = mmaudit("finetune", "--data", planted(num_samples=60), "--model", f"{nets}:Net", *words)
    assert result.exit_code == 0, result.output
    assert "settings without effect in mmaudit finetune: finetune.hidden, finetune.dropout" in line_of(result)
