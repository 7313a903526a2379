"""Tests of the training settings: values out of range raise, and the learning rate follows its schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mmaudit.audit.errors import ConfigError
from mmaudit.train.config import AugmentConfig, FinetuneConfig, OptimConfig


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"report_to": ("wandb", "tensorbord")}, r"--report-to tensorbord: no such name; did you mean tensorboard\?"),
        ({"epochs": 0}, "finetune.epochs is 0; it must be at least 1"),
        ({"batch_size": 0}, "finetune.batch_size is 0; it must be at least 1"),
        ({"hidden": 0}, "finetune.hidden is 0; it must be at least 1"),
        ({"patience": -1}, "finetune.patience is -1; it must be at least 0"),
        ({"save_steps": -1}, "finetune.save_steps is -1; it must be at least 0"),
        ({"resident_mib": -1}, "finetune.resident_mib is -1; it must be at least 0"),
        ({"dropout": 1.0}, r"finetune.dropout is 1.0; it must lie in \[0, 1\)"),
        ({"dropout": math.nan}, "finetune.dropout is nan"),
        ({"validation_fraction": -0.1}, "finetune.validation_fraction is -0.1"),
        ({"keep": "first"}, "finetune.keep is 'first'; available: best, last"),
        ({"initialisation": "kaiming"}, "finetune.initialisation is 'kaiming'"),
        ({"keep": "last", "patience": 5}, "finetune.patience stops by the best epoch, and finetune.keep is last"),
        ({"keep_posterior": 1.5}, r"finetune.keep_posterior is 1.5; it must lie in \[0, 1\]"),
        ({"keep_posterior": math.nan}, "finetune.keep_posterior is nan"),
    ],
)
def test_invalid_finetune_settings_raise(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FinetuneConfig(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "adamax"}, r"optim.optimizer is 'adamax'; did you mean adam\? .*adamw, .*sgd"),
        ({"schedule": "cosin"}, r"optim.schedule is 'cosin'; did you mean cosine\?"),
        ({"precision": "half"}, r"optim.precision is 'half'; .*bfloat16"),
        ({"lr": 0.0}, "optim.lr is 0.0; it must be above 0"),
        ({"lr": math.nan}, "optim.lr is nan; it must be above 0"),
        ({"lr": math.inf}, "optim.lr is inf; it must be above 0"),
        ({"weight_decay": -1.0}, "optim.weight_decay is -1.0; it must be at least 0"),
        ({"weight_decay": math.nan}, "optim.weight_decay is nan; it must be at least 0"),
        ({"momentum": 1.0}, r"optim.momentum is 1.0; it must lie in \[0, 1\)"),
        ({"ema": -0.1}, r"optim.ema is -0.1; it must lie in \[0, 1\)"),
        ({"warmup_epochs": -1}, "optim.warmup_epochs is -1; it must be at least 0"),
        ({"lr_step": 0}, "optim.lr_step is 0; it must be at least 1"),
        ({"lr_fall": 0.0}, r"optim.lr_fall is 0.0; it must lie in \(0, 1\]"),
        ({"lr_fall": math.nan}, r"optim.lr_fall is nan; it must lie in \(0, 1\]"),
        ({"clip_norm": -1.0}, "optim.clip_norm is -1.0; it must be at least 0"),
        ({"clip_norm": math.inf}, "optim.clip_norm is inf"),
    ],
)
def test_invalid_optim_settings_raise(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        OptimConfig(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_crop": 0.0}, r"augment.min_crop is 0.0; it must lie in \(0, 1\]"),
        ({"min_crop": math.nan}, "augment.min_crop is nan"),
        ({"time_masks": -1}, "augment.time_masks is -1; it must be at least 0"),
        ({"band_masks": -1}, "augment.band_masks is -1"),
        ({"time_share": 1.5}, r"augment.time_share is 1.5; it must lie in \[0, 1\]"),
        ({"band_share": math.nan}, "augment.band_share is nan"),
    ],
)
def test_invalid_augment_settings_raise(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AugmentConfig(**options)


def test_modality_rates_are_parsed_by_name() -> None:
    assert OptimConfig().modality_lr_factors() == {}
    factors = OptimConfig(modality_lr=("audio=0.1", "visual=2", "a=b=1e-3", "text=0")).modality_lr_factors()
    assert factors == {"audio": 0.1, "visual": 2.0, "a=b": 1e-3, "text": 0.0}


@pytest.mark.parametrize("text", ["audio", "audio=", "audio=fast", "=0.5", "0.5", "audio=-1", "audio=nan", "audio=inf"])
def test_unparsable_modality_rate_raises(text: str) -> None:
    with pytest.raises(ConfigError, match=f"optim.modality_lr {text}: not of the form NAME=FACTOR, such as audio=0.1"):
        OptimConfig(modality_lr=("visual=1", text))


def lr_multipliers(epochs: int, **options: Any) -> list[float]:
    config = OptimConfig(**options)
    return [config.lr_multiplier(epoch, epochs=epochs) for epoch in range(1, epochs + 1)]


def test_cosine_falls_from_1_towards_0() -> None:
    half = math.sqrt(0.5)
    assert lr_multipliers(4) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert lr_multipliers(1) == [1]
    assert all(later < earlier for earlier, later in zip(lr_multipliers(50), lr_multipliers(50)[1:], strict=False))


def test_warm_up_rises_evenly_before_the_cosine() -> None:
    half = math.sqrt(0.5)
    multipliers = lr_multipliers(7, warmup_epochs=3)
    assert multipliers == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert lr_multipliers(2, warmup_epochs=5) == pytest.approx([1 / 6, 2 / 6])


def test_step_schedule_counts_all_epochs() -> None:
    """BSS's: times 0.1 after 70 epochs."""
    multipliers = lr_multipliers(150, schedule="step", lr_step=70, lr_fall=0.1)
    assert multipliers == pytest.approx([1.0] * 70 + [0.1] * 70 + [0.01] * 10)
    warmed_up = lr_multipliers(5, schedule="step", lr_step=2, lr_fall=0.5, warmup_epochs=1)
    assert warmed_up == pytest.approx([0.5, 1, 0.5, 0.5, 0.25])


def test_constant_schedule_is_constant() -> None:
    assert lr_multipliers(4, schedule="constant") == [1] * 4
    assert lr_multipliers(4, schedule="constant", warmup_epochs=1) == [0.5, 1, 1, 1]


@pytest.mark.parametrize(
    ("options", "warnings"),
    [
        ({}, []),
        ({"optimizer": "sgd", "momentum": 0.5}, []),
        ({"optimizer": "adam", "momentum": 0.5}, ["optim.momentum 0.5 has no effect with optim.optimizer adam"]),
        ({"schedule": "step", "lr_step": 3, "lr_fall": 0.5}, []),
        (
            {"lr_step": 3, "lr_fall": 0.5},
            [
                "optim.lr_step 3 has no effect with optim.schedule cosine",
                "optim.lr_fall 0.5 has no effect with optim.schedule cosine",
            ],
        ),
    ],
)
def test_settings_without_effect_are_named(options: dict[str, Any], warnings: list[str]) -> None:
    assert OptimConfig(**options).without_effect() == warnings
