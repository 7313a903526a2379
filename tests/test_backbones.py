"""Pretrained models trained end to end: what is trained, adapters, checkpointing, and whole trainings."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import PICTURE, transformers
from torch import Tensor, nn
from training import fine_tune, metrics_without_seconds, model_bytes, stop_after, with_options
from typer.testing import CliRunner

import mmaudit
from mmaudit.audit.dataset.modalities import Modality
from mmaudit.audit.errors import ConfigError, ManifestError
from mmaudit.audit.features.backbone_inputs import Backbone
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress
from mmaudit.cli.config import load_config
from mmaudit.cli.main import app
from mmaudit.cli.run import Run
from mmaudit.cli.training_source import UnscoredSource
from mmaudit.train.backbones import PretrainedEncoder
from mmaudit.train.balancing.ogm import modulated_parameters
from mmaudit.train.config import LoraConfig, TrainConfig
from mmaudit.train.evaluate import evaluate_file
from mmaudit.train.examples import Examples
from mmaudit.train.methods import resolve
from mmaudit.train.training_data import build_network

pytestmark = pytest.mark.usefixtures("quick_scores")

torch.set_num_threads(1)
MEDIA = MediaConfig(max_seconds=0.25)
BOTH = ("audio", "image")
LORA = LoraConfig(rank=2, alpha=4.0)
CONFIG = with_options(
    TrainConfig(), end_to_end=BOTH, epochs=2, batch_size=8, dropout=0.0, lr=1e-2, keep="last", hidden=6
)

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


def build_encoder(
    models: Path, name: str = "clip", kind: str = "image", *, lora: LoraConfig | None = None
) -> PretrainedEncoder:
    modality = Modality(name="m", column="c", kind=kind, encoder=f"hf-inputs:{models / name}")
    backbone = Backbone.of(modality, MEDIA)
    assert backbone is not None
    torch.manual_seed(0)
    return PretrainedEncoder(backbone, lora=lora or LoraConfig(), dropout=0.0)


def draw_rows(encoder: PretrainedEncoder, num_rows: int = 3) -> Tensor:
    generator, size = torch.Generator().manual_seed(1), encoder.backbone.layout.num_features
    if encoder.backbone.kind == "text":
        return torch.randint(5, 10, (num_rows, size), generator=generator).float()
    if encoder.backbone.layout.scale is not None:
        return torch.randint(0, 256, (num_rows, size), generator=generator, dtype=torch.uint8)
    return torch.randn(num_rows, size, generator=generator)


def gradients(encoder: PretrainedEncoder) -> dict[str, Tensor]:
    torch.manual_seed(2)
    encoder.zero_grad()
    encoder.train()(draw_rows(encoder)).square().sum().backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "kind", "absent"),
    [("clip", "image", "text_model"), ("clip", "text", "vision_model"), ("bert", "text", None), ("ast", "audio", None)],
)
def test_everything_that_is_trained_has_a_gradient(models: Path, name: str, kind: str, absent: str | None) -> None:
    """Of two towers one is kept; the scale of their similarity, which no feature depends on, is not trained."""
    encoder = build_encoder(models, name, kind)
    assert {key for key, p in encoder.named_parameters() if p.requires_grad} == gradients(encoder).keys()
    assert not [key for key in encoder.state_dict() if absent is not None and absent in key]
    frozen = [key for key, p in encoder.named_parameters() if not p.requires_grad]
    assert frozen == (["model.logit_scale"] if name == "clip" else [])


@pytest.mark.parametrize(("name", "kind"), [("bert", "text"), ("ast", "audio")])
def test_checkpointing_has_the_same_gradients(models: Path, name: str, kind: str) -> None:
    """Also with dropout, which BERT has: the same units are dropped when activations are computed again."""
    encoder = build_encoder(models, name, kind)
    expected = gradients(encoder)
    encoder.checkpoint_gradients()
    for key, gradient in gradients(encoder).items():
        torch.testing.assert_close(gradient, expected[key], rtol=0, atol=0)
    called: list[int] = []
    layer = next(module for module in encoder.modules() if type(module).__name__.endswith("Layer"))
    inner = next(module for module in layer.modules() if isinstance(module, nn.Linear))
    hook = inner.register_forward_pre_hook(lambda *_: called.append(1))
    gradients(encoder)
    hook.remove()
    assert len(called) == 2  # forward, and again in the backward pass


def test_model_without_checkpointing_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder(models)
    monkeypatch.setattr(type(encoder.model), "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"finetune.gradient_checkpointing: .*clip \(CLIPModel\) does not support it"):
        encoder.checkpoint_gradients()


def test_the_model_masks_no_input_by_numbers_of_numpy(models: Path) -> None:
    encoder = build_encoder(models, "wav2vec2", "audio")
    features = []
    for seed in (0, 1):
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(0)
        features.append(encoder.train()(draw_rows(encoder)))
    assert torch.equal(*features)


@needs_peft
def test_adapters_are_all_that_is_trained_and_saved(models: Path) -> None:
    whole, encoder = build_encoder(models), build_encoder(models, lora=LORA)
    trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert encoder.state_dict().keys() == set(trained)
    torch.testing.assert_close(encoder.eval()(draw_rows(encoder)), whole.eval()(draw_rows(whole)))  # they start at 0
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    another = build_encoder(models, lora=LORA).eval()
    assert not torch.allclose(another(draw_rows(encoder)), encoder(draw_rows(encoder)), atol=1e-3)
    another.load_state_dict(encoder.state_dict())
    assert torch.equal(another(draw_rows(encoder)), encoder(draw_rows(encoder)))


@needs_peft
def test_adapters_follow_the_formula(models: Path) -> None:
    """LoRA: W x + (alpha / r) B A x."""
    encoder = build_encoder(models, lora=replace(LORA, target_modules=("visual_projection",))).eval()
    layer: Any = encoder.model.visual_projection
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(0))
        x = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert (a.shape, b.shape) == ((2, 16), (8, 2))
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 4.0 / 2 * x @ a.T @ b.T)


@needs_peft
def test_layers_that_do_not_exist_are_refused(models: Path) -> None:
    with pytest.raises(ConfigError, match=r"no layer of .*clip is named query; its linear layers are .*q_proj, v_proj"):
        build_encoder(models, lora=replace(LORA, target_modules=("query",)))


def test_adapters_without_peft_name_the_extra(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else find_spec(name))
    with pytest.raises(ConfigError, match=r'needs peft, which is not installed: pip install "mmaudit\[lora\]"'):
        build_encoder(models, lora=LORA)


def test_ogm_modulates_the_whole_transformer(models: Path, tmp_path: Path) -> None:
    """Its one convolution cuts patches, and has few of the weights."""
    config = transformers.ViTConfig(**{**PICTURE, "patch_size": 4, "num_hidden_layers": 4})
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    transformers.AutoImageProcessor.from_pretrained(models / "dinov2").save_pretrained(tmp_path / "vit")
    encoder = build_encoder(tmp_path, "vit")
    trained = [p for p in encoder.parameters() if p.requires_grad]
    assert any(p.ndim == 4 for p in trained)
    assert [id(p) for p in modulated_parameters(encoder)] == [id(p) for p in trained]


@pytest.fixture(scope="module")
def load(models: Path, clip_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Examples]:
    """A function that loads the clips as inputs of AST and CLIP, decoded once."""
    run_dir = Run(tmp_path_factory.mktemp("run"))

    def examples(end_to_end: tuple[str, ...] = BOTH) -> Examples:
        encoders = [f"audio=hf:{models / 'ast'}", f"image=hf:{models / 'clip'}"]
        config = load_config(settings={"data.encoder": encoders, "finetune.end_to_end": list(end_to_end)})
        source = UnscoredSource(data=clip_source, run_dir=run_dir, device="cpu")
        return source.load(config, num_workers=0, progress=no_progress).examples

    return examples


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def initial_weights(examples: Examples, config: TrainConfig = CONFIG) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return build_network(examples, resolve(config)).state_dict()


@pytest.mark.parametrize(
    "balancing",
    ["ogm-ge", *(pytest.param(name, marks=pytest.mark.slow) for name in ("joint", "agm", "mmpareto", "dgl", "pmr"))],
)
def test_training_is_reproducible_and_resumes(balancing: str, load: Callable[..., Examples], tmp_path: Path) -> None:
    config = with_options(CONFIG, balancing=balancing, dropout=0.2)
    result = fine_tune(load(), tmp_path / "whole", config)
    assert result.history[-1]["train_loss"] < 1.5 * result.history[0]["train_loss"]
    with pytest.raises(KeyboardInterrupt):
        fine_tune(load(), tmp_path / "resumed", config, progress=stop_after(1))
    resumed = fine_tune(load(), tmp_path / "resumed", with_options(config, gradient_checkpointing=True))
    assert metrics_without_seconds(resumed) == metrics_without_seconds(result)
    assert model_bytes(tmp_path / "resumed") == model_bytes(tmp_path / "whole")


def test_frozen_and_slowed_encoders_keep_their_weights(load: Callable[..., Examples], tmp_path: Path) -> None:
    config = with_options(CONFIG, freeze=("audio",), modality_lr=("image=0",), initialisation="xavier", epochs=1)
    fine_tune(load(), tmp_path, config)
    before, after = initial_weights(load(), config), weights_of(tmp_path)
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"fusion"}
    pretrained = initial_weights(load())  # xavier draws the weights of mmaudit's own layers only
    assert {name for name in before if not torch.equal(before[name], pretrained[name])} <= {
        name for name in before if name.startswith("fusion")
    }


def test_one_encoder_trained_and_the_other_frozen_vectors(load: Callable[..., Examples], tmp_path: Path) -> None:
    examples = load(("image",))
    assert [backbone is None for backbone in examples.backbones] == [True, False]
    fine_tune(examples, tmp_path, with_options(CONFIG, end_to_end=("image",), epochs=1))
    before, after = initial_weights(examples), weights_of(tmp_path)
    moved = [name for name in after if name.startswith("encoders.1.") and not torch.equal(after[name], before[name])]
    assert len(moved) > 10


@needs_peft
def test_adapters_are_trained_saved_small_and_tested_again(load: Callable[..., Examples], tmp_path: Path) -> None:
    config = replace(CONFIG, finetune=replace(CONFIG.finetune, lora=LORA, accumulate=2, batch_size=4, epochs=1))
    result = fine_tune(load(), tmp_path / "lora", config)
    weights = weights_of(tmp_path / "lora")
    assert all("lora_" in name or not name.startswith("encoders.") for name in weights)
    state = torch.load(tmp_path / "lora" / "state" / "last.pt", weights_only=True)
    assert state["net"].keys() == weights.keys()
    options: dict[str, Any] = {"split": "test", "between": "audio:image", "config": config, "seed": 0, "device": "cpu"}
    measured = evaluate_file(tmp_path / "lora" / "model.safetensors", load(), **options)
    assert measured["test"]["all"] == result.metrics["test"]["all"]
    with pytest.raises(
        ManifestError, match=r"was trained end to end with other models: .*ast.*; the samples have none"
    ):
        evaluate_file(tmp_path / "lora" / "model.safetensors", load(("image",)), **options)


def test_init_takes_pretrained_encoders_of_another_training(load: Callable[..., Examples], tmp_path: Path) -> None:
    config = with_options(CONFIG, epochs=1)
    fine_tune(load(), tmp_path / "first", config)
    fine_tune(
        load(), tmp_path / "second", with_options(config, freeze=BOTH), init=tmp_path / "first" / "model.safetensors"
    )
    first, second = weights_of(tmp_path / "first"), weights_of(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first if name.startswith("encoders."))


def test_settings_of_backbones_without_any_are_named(
    clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"finetune.gradient_checkpointing": True, "finetune.lora.rank": 2, "finetune.lora.alpha": 3.0}
    with caplog.at_level(logging.WARNING, logger="mmaudit"):
        mmaudit.finetune(data=clips, run=tmp_path, epochs=1, num_workers=0, progress=False, settings=settings)
    (line,) = [text for text in caplog.messages if "without effect" in text]
    assert all(key in line for key in settings)


@pytest.mark.slow
@needs_peft
def test_scored_and_split_data_are_trained_end_to_end(
    models: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Media are read once more for the models' inputs, then from the cache."""
    run = tmp_path / "run"
    encoders = [f"--encoder=audio=hf:{models / 'ast'}", f"--encoder=image=hf:{models / 'clip'}"]
    trained = ["--epochs", "1", "--batch-size", "8", "--set", 'finetune.end_to_end=["audio", "image"]']
    trained += ["--set", "finetune.lora.rank=2", "--num-workers", "0", "--run", str(run)]
    scored = ["--repeats", "1", "--set", "probe.folds=3", "--num-workers", "0", "--run", str(run)]
    commands = [
        ["score", str(clips), *encoders, *scored],
        ["split", "--subset", "random:100%", "--name", "all", "--run", str(run)],
        ["finetune", "--manifest", "all", "--name", "lora", *trained],
        ["evaluate", "lora", "--run", str(run), "--num-workers", "0"],
    ]
    for words in commands:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.output)
    metrics = json.loads((run / "finetune" / "lora" / "metrics.json").read_text())
    evaluation = json.loads((run / "finetune" / "lora" / "evaluation.json").read_text())
    assert evaluation["test"]["all"] == metrics["test"]["all"]
    assert metrics["config"]["finetune"]["lora"] == {"rank": 2, "alpha": 16.0, "dropout": 0.0, "target_modules": []}
    shutil.rmtree(run / "finetune")

    def fail(*_: Any) -> None:
        raise AssertionError("a sample was decoded again")

    monkeypatch.setattr("mmaudit.audit.features.encoders.decode_input", fail)
    again = CliRunner().invoke(app, commands[2])
    assert again.exit_code == 0, again.output
    options = ["--manifest", "all", "--method", "joint", "--set", 'finetune.end_to_end=["audio"]', "--run", str(run)]
    compared = CliRunner().invoke(app, ["compare", *options])
    assert compared.exit_code == 2
    assert "compare trains on cached vectors" in " ".join(compared.output.replace("│", "").split())
