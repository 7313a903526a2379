"""Contract of every sampler and every balancer, in all pairs that the config accepts."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training import QUICK, fine_tune, make_examples, metrics_without_seconds, model_bytes, stop_after, with_options

from mmaudit.audit.errors import ConfigError
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.train import checkpoint, finetune
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.config import OPTIMIZERS, PRECISIONS, SCHEDULES, TrainConfig
from mmaudit.train.methods import resolve
from mmaudit.train.sampling import SAMPLERS
from mmaudit.train.training_data import build_network

torch.set_num_threads(1)

# Settings in which every method is active within two epochs.
ACTIVE = replace(
    with_options(QUICK, epochs=2),
    balancing={
        "gmm": {"warmup_epochs": 1},
        "gblend": {"super_epoch": 1},
        "mses": {"patience": 1},
        "aug": {"every_epochs": 1, "tolerance": 0.0},
        "reconboost": {"stage_epochs": 1, "rectify_epochs": 1},
        "relearning": {"every_epochs": 1, "strength": 1.0},
    },
    sampling={
        "bss": {"every_epochs": 1},
        "smv": {"every_epochs": 1, "warmup_epochs": 1},
        "remix": {"warmup_epochs": 1},
        "dus": {"horizon": 2},
    },
)


def config_of(sampling: str, balancing: str, **options: Any) -> TrainConfig:
    return with_options(ACTIVE, sampling=sampling, balancing=balancing, **options)


def is_admitted(sampling: str, balancing: str, **options: Any) -> bool:
    try:
        resolve(config_of(sampling, balancing, **options))
    except ConfigError:
        return False
    return True


PAIRS = [(sampling, balancing) for sampling in SAMPLERS for balancing in BALANCERS if is_admitted(sampling, balancing)]
# `make test` trains each method with the plainest admitted partners, `make test-all` all pairs.
PLAIN_SAMPLERS, PLAIN_BALANCERS = ("uniform", "bss-h"), ("joint", "sum")
MARKED_PAIRS = [
    pair if pair[0] in PLAIN_SAMPLERS or pair[1] in PLAIN_BALANCERS else pytest.param(*pair, marks=pytest.mark.slow)
    for pair in PAIRS
]
SPARSELY_MARKED_PAIRS = [  # each method once in `make test`
    pair if pair[0] == "uniform" or pair[1] == "sum" else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS
]


def test_most_pairs_are_admitted() -> None:
    assert len(PAIRS) > 0.85 * len(SAMPLERS) * len(BALANCERS)
    assert {name for name, _ in PAIRS} == set(SAMPLERS)
    assert {name for _, name in PAIRS} == set(BALANCERS)


@pytest.mark.parametrize(("sampling", "balancing"), SPARSELY_MARKED_PAIRS)
def test_pair_repeats_exactly_and_after_an_interruption(tmp_path: Path, sampling: str, balancing: str) -> None:
    config, examples = config_of(sampling, balancing), make_examples(80)
    uninterrupted = fine_tune(examples, tmp_path / "whole", config)
    assert all(math.isfinite(value) for record in uninterrupted.history for value in record.values())
    repeated = fine_tune(examples, tmp_path / "again", config)
    assert repeated.history == uninterrupted.history
    with pytest.raises(KeyboardInterrupt):
        fine_tune(examples, tmp_path / "part", config, progress=stop_after(1))
    resumed = fine_tune(examples, tmp_path / "part", config)
    assert resumed.history == uninterrupted.history
    assert (
        metrics_without_seconds(resumed) == metrics_without_seconds(repeated) == metrics_without_seconds(uninterrupted)
    )
    assert model_bytes(tmp_path / "part") == model_bytes(tmp_path / "again") == model_bytes(tmp_path / "whole")


# Forms of methods that the settings above do not reach.
FORMS: dict[str, dict[str, Any]] = {
    "bss-h by the model": {"sampling": {"bss": {"score_source": "model"}}, "names": ("bss-h", "sum")},
    "mses, restore": {
        "balancing": {"mses": {"mode": "restore", "patience": 1, "smoothing": 0.6}},
        "names": ("", "mses"),
    },
    "mslr, accuracy": {"balancing": {"mslr": {"mode": "accuracy", "unimodal_weight": 0.0}}, "names": ("", "mslr")},
    "gblend, weights": {
        "balancing": {"gblend": {"weights": ["fused=0.5", "audio=0.2", "visual=0.3"]}},
        "names": ("", "gblend"),
    },
    "gblend, split classifier": {"balancing": {"gblend": {"own_heads": False}}, "names": ("", "gblend")},
    "pmr, ratio": {"balancing": {"pmr": {"weight": "ratio"}}, "names": ("", "pmr")},
    "sum, weights": {"balancing": {"sum": {"fused_weight": 0.1, "unimodal_weight": 0.9}}, "names": ("", "sum")},
}


@pytest.mark.parametrize("form", FORMS)
def test_form_of_a_method_repeats_after_an_interruption(tmp_path: Path, form: str) -> None:
    sections = {axis: FORMS[form].get(axis, {}) for axis in ("sampling", "balancing")}
    sampling, balancing = FORMS[form]["names"]
    options = {"sampling": sampling or "uniform", "balancing": balancing, "epochs": 8 if "mslr" in form else 4}
    config = replace(with_options(QUICK, answer="heads", own_heads=True, **options), **sections)
    if form == "gblend, split classifier":
        config = with_options(config, answer="fused", own_heads=False)
    examples = make_examples(80)
    uninterrupted = fine_tune(examples, tmp_path / "whole", config)
    assert all(math.isfinite(value) for record in uninterrupted.history for value in record.values())
    with pytest.raises(KeyboardInterrupt):
        fine_tune(examples, tmp_path / "part", config, progress=stop_after(2))
    resumed = fine_tune(examples, tmp_path / "part", config)
    assert resumed.history == uninterrupted.history
    assert model_bytes(tmp_path / "part") == model_bytes(tmp_path / "whole")


def unused_classifiers(state: dict[str, Tensor]) -> set[str]:
    """Return the parameters of the classifiers of aug that no modality has been given yet."""
    counts = state.get("fusion.num_classifiers", torch.zeros(0)).tolist()
    added = [name for name in state if name.startswith("fusion.added.")]
    return {name for name in added if int(name.split(".")[3]) >= counts[int(name.split(".")[2])] - 1}


@pytest.mark.parametrize(("sampling", "balancing"), MARKED_PAIRS)
def test_pair_updates_all_parameters_but_frozen_encoders(tmp_path: Path, sampling: str, balancing: str) -> None:
    examples = make_examples(80)
    config = config_of(sampling, balancing, freeze=("audio",), own_heads=balancing != "mla")
    fine_tune(examples, tmp_path, config)
    torch.manual_seed(0)
    before = build_network(examples, resolve(config))
    after = load_file(tmp_path / "model.safetensors")
    assert before.state_dict().keys() == after.keys()
    unchanged = {name for name, parameter in before.named_parameters() if torch.equal(parameter, after[name])}
    frozen = {name for name, _ in before.named_parameters() if name.startswith("encoders.0.")}
    assert unchanged - unused_classifiers(after) == frozen


@pytest.mark.parametrize(("sampling", "balancing"), SPARSELY_MARKED_PAIRS)
@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_run_killed_within_an_epoch_resumes_at_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: str, balancing: str, steps: int
) -> None:
    config, examples = config_of(sampling, balancing, save_steps=steps, batch_size=8), make_examples(80)
    uninterrupted = fine_tune(examples, tmp_path / "whole", config)
    saved: list[Path] = []
    save = checkpoint.save_state

    def save_and_die(state: dict[str, Any], path: Path) -> None:
        save(state, path)
        saved.append(path)
        if state["epoch"] == 2 and state["step"] >= 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "save_state", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(examples, tmp_path / "part", config)
    monkeypatch.setattr(finetune, "save_state", save)
    resumed = fine_tune(examples, tmp_path / "part", config)
    assert resumed.history == uninterrupted.history
    assert model_bytes(tmp_path / "part") == model_bytes(tmp_path / "whole")


METHODS = [("uniform", balancing) for balancing in BALANCERS] + [(sampling, "sum") for sampling in SAMPLERS]


def settings_of(number: int) -> set[tuple[str, str, str]]:
    """Return three of the 27 settings with every optimiser, schedule and precision; others for other methods."""
    return {
        (optimizer, SCHEDULES[(index + number) % 3], HALF_AND_FULL[(index + number // 3) % 3])
        for index, optimizer in enumerate(OPTIMIZERS)
    }


# On a CPU "auto" is float32. `make test-all` has all settings of each method.
HALF_AND_FULL = PRECISIONS[1:]
OPTIMISATIONS = [
    pytest.param(*method, *setting, marks=[] if setting in settings_of(number) else pytest.mark.slow)
    for number, method in enumerate(METHODS)
    for setting in product(OPTIMIZERS, SCHEDULES, HALF_AND_FULL)
]


def test_methods_together_train_under_every_setting() -> None:
    assert len(OPTIMIZERS) == len(SCHEDULES) == len(HALF_AND_FULL) == 3
    for number in range(len(METHODS)):
        assert [set(values) for values in zip(*settings_of(number), strict=True)] == [
            set(OPTIMIZERS),
            set(SCHEDULES),
            set(HALF_AND_FULL),
        ]
    assert set().union(*map(settings_of, range(len(METHODS)))) == set(product(OPTIMIZERS, SCHEDULES, HALF_AND_FULL))


@pytest.mark.parametrize(("sampling", "balancing", "optimizer", "schedule", "precision"), OPTIMISATIONS)
def test_method_trains_under_optimizer_schedule_and_precision(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sampling: str,
    balancing: str,
    optimizer: str,
    schedule: str,
    precision: str,
) -> None:
    """Loss and weights are finite, and all parameters move; without files and the test metrics, half of the time."""
    weights: dict[str, Tensor] = {}
    monkeypatch.setattr(finetune, "evaluate_network", lambda *args, **options: {})
    monkeypatch.setattr(finetune, "save_state", lambda state, path: None)
    monkeypatch.setattr(finetune, "save_model", lambda state, path, about: weights.update(state))
    config = config_of(
        sampling, balancing, optimizer=optimizer, schedule=schedule, precision=precision, lr_step=1, lr_fall=0.5
    )
    examples = make_examples(80)
    history = fine_tune(examples, tmp_path, config).history
    assert all(math.isfinite(value) for record in history for value in record.values())
    torch.manual_seed(0)
    before = build_network(examples, resolve(config))
    assert all(weight.isfinite().all() for weight in weights.values())
    unchanged = {name for name, p in before.named_parameters() if torch.equal(p, weights[name])}
    assert not unchanged - unused_classifiers(weights)


@pytest.mark.parametrize("balancing", BALANCERS)
def test_every_balancer_learns_the_planted_signal(tmp_path: Path, balancing: str) -> None:
    config = with_options(QUICK, balancing=balancing, epochs=12, lr=0.03, hidden=16)
    branches = fine_tune(make_examples(240), tmp_path, config).metrics["test"]["all"]["branches"]
    # MLA trains each modality alone: one bit each, so the more confident one is correct at least half the time.
    assert branches["fused"]["accuracy"] > (0.4 if balancing == "mla" else 0.9)


@pytest.mark.parametrize("sampling", SAMPLERS)
def test_every_sampler_learns_the_planted_signal(tmp_path: Path, sampling: str) -> None:
    config = with_options(QUICK, sampling=sampling, balancing="sum", epochs=12, lr=0.03, hidden=16)
    branches = fine_tune(make_examples(240), tmp_path, config).metrics["test"]["all"]["branches"]
    assert branches["fused"]["accuracy"] > 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA; the tests above are its CPU twins")
@pytest.mark.parametrize(("sampling", "balancing"), PAIRS)
def test_pair_trains_in_bf16_on_a_gpu_and_resumes(tmp_path: Path, sampling: str, balancing: str) -> None:
    config, examples = config_of(sampling, balancing), make_examples(80)
    uninterrupted = fine_tune(examples, tmp_path / "whole", config, device="cuda")
    assert all(math.isfinite(value) for record in uninterrupted.history for value in record.values())
    with pytest.raises(KeyboardInterrupt):
        fine_tune(examples, tmp_path / "part", config, device="cuda", progress=stop_after(1))
    resumed = fine_tune(examples, tmp_path / "part", config, device="cuda")
    for record, expected in zip(resumed.history, uninterrupted.history, strict=True):
        assert record == pytest.approx(expected, rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("balancing", BALANCERS)
def test_every_balancer_trains_three_modalities(tmp_path: Path, balancing: str) -> None:
    config = config_of("uniform", balancing)
    history = fine_tune(make_examples(80, num_modalities=3), tmp_path, config).history
    assert all(math.isfinite(record["train_loss"]) for record in history)


@pytest.mark.parametrize("balancing", BALANCERS)
def test_every_balancer_trains_in_half_precision(tmp_path: Path, balancing: str) -> None:
    config = config_of("uniform", balancing)
    expected = fine_tune(make_examples(80), tmp_path / "float32", config).history[0]["train_loss"]
    for precision in ("bfloat16", "float16"):  # the scaler of float16 may skip the first of the three steps
        history = fine_tune(make_examples(80), tmp_path / precision, with_options(config, precision=precision)).history
        assert all(math.isfinite(value) for record in history for value in record.values())
        assert history[0]["train_loss"] == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("sampling", SAMPLERS)
def test_every_sampler_trains_three_modalities(tmp_path: Path, sampling: str) -> None:
    history = fine_tune(make_examples(80, num_modalities=3), tmp_path, config_of(sampling, "sum")).history
    assert all(math.isfinite(record["train_loss"]) for record in history)


@pytest.mark.parametrize("balancing", ["joint", "sum"])
def test_one_modality_is_trained_by_the_same_loop(tmp_path: Path, balancing: str) -> None:
    examples = make_examples(240).only("audio")
    config = with_options(QUICK, balancing=balancing, only="audio", epochs=25, hidden=16)
    branches = fine_tune(examples, tmp_path, config).metrics["test"]["all"]["branches"]
    assert set(branches) == {"fused", "audio"}
    assert 0.4 < branches["fused"]["accuracy"] < 0.65  # one bit of two


@pytest.mark.parametrize("balancing", sorted(set(BALANCERS) - {"joint", "sum"}))
def test_balancer_with_one_modality_raises(tmp_path: Path, balancing: str) -> None:
    with pytest.raises(ConfigError, match=f"--balancing {balancing} needs 2 modalities; the modalities are audio"):
        fine_tune(make_examples(80).only("audio"), tmp_path, config_of("uniform", balancing))


@pytest.mark.parametrize("balancing", BALANCERS)
def test_missing_modalities_and_weights_are_supported(tmp_path: Path, balancing: str) -> None:
    examples = make_examples(80)
    matrix = examples.inputs[0].read(np.arange(80)).copy()
    matrix[::5] = np.nan
    weight = np.linspace(0, 2, 80).astype(np.float32)
    present = np.ones((80, 2), dtype=bool)
    present[::5, 0] = False
    inputs = (MatrixInputs(matrix=matrix), examples.inputs[1])
    examples = replace(examples, inputs=inputs, present=present, weight=weight)
    history = fine_tune(examples, tmp_path, config_of("uniform", balancing)).history
    assert all(math.isfinite(record["train_loss"]) for record in history)
