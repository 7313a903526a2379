"""Tests of fine-tuning: it learns a planted signal, selects on validation, and resumes exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import QUICK, fine_tune, make_examples, metrics_without_seconds, model_bytes, stop_after, with_options

from mmaudit.audit.errors import ConfigError, ManifestError, RunError, TrainError
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.workers import NETWORK_THREADS, NUM_THREADS, no_progress
from mmaudit.rebalance.curriculum import OrderConfig, root_pacing
from mmaudit.train.checkpoint import read_model_config, save_state
from mmaudit.train.config import MIN_VALIDATION_SAMPLES
from mmaudit.train.evaluate import compute_metrics
from mmaudit.train.examples import Examples, in_fixed_threads
from mmaudit.train.finetune import finetune_on
from mmaudit.train.network import FusionNet, ModelConfig

torch.set_num_threads(1)


def change_sample(examples: Examples, split: str, name: str) -> Examples:
    """Change one value of one sample of a split."""
    row = examples.rows(split)[0]
    if name == "inputs":
        matrix = examples.inputs[1].read(np.arange(examples.inputs[1].num_rows)).copy()
        matrix[row, 0] += 1
        return replace(examples, inputs=(examples.inputs[0], MatrixInputs(matrix=matrix)))
    values = getattr(examples, name).copy()
    values[row] = (values[row] + 1) % 4 if name == "label" else values[row] + 1
    return replace(examples, **{name: values})


def test_last_epoch_is_kept_whatever_validation_says(tmp_path: Path) -> None:
    examples = make_examples(240)
    settings: dict[str, Any] = {"epochs": 6, "lr": 0.5}  # so large a rate that the best epoch is not the last
    best = fine_tune(examples, tmp_path / "best", with_options(**settings))
    last = fine_tune(examples, tmp_path / "last", with_options(**settings, keep="last"))
    assert best.metrics["best_epoch"] < 6
    assert last.metrics["best_epoch"] == 6
    assert best.history == last.history


def test_without_validation_samples_all_others_are_trained_on(tmp_path: Path) -> None:
    examples = make_examples(120)
    unsplit = replace(examples, split=np.where(examples.split == "validation", "train", examples.split))
    result = fine_tune(unsplit, tmp_path, with_options(keep="last"))
    assert result.metrics["counts"] == {"train": 90, "validation": 0, "test": 30}
    assert result.metrics["best_epoch"] == 5
    assert "validation_loss" not in result.history[-1]
    with pytest.raises(ManifestError, match=r"no validation samples, .*; or keep the last|keep the last epoch"):
        fine_tune(unsplit, tmp_path / "best")
    with pytest.raises(ConfigError, match="--balancing mses follows validation losses"):
        fine_tune(unsplit, tmp_path / "mses", with_options(keep="last", balancing="mses"))


def test_training_without_a_folder_writes_nothing_and_has_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = fine_tune(make_examples(), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    files = sorted(tmp_path.rglob("*"))
    options: dict[str, Any] = {"between": "audio:visual", "seed": 0, "device": "cpu", "progress": no_progress}
    config = with_options(save_steps=1, report_to=("tensorboard",))
    result = finetune_on(make_examples(), None, config=config, **options)
    assert metrics_without_seconds(result) == metrics_without_seconds(written)
    assert result.history == written.history
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize(("sampling", "balancing"), [("uniform", "joint"), ("dus-h", "sum"), ("smv", "joint")])
def test_rows_read_are_those_of_single_modalities(tmp_path: Path, sampling: str, balancing: str) -> None:
    config = with_options(sampling=sampling, balancing=balancing, epochs=6, save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(make_examples(), tmp_path / "cut", config, progress=stop_after(3))
    result, resumed = (fine_tune(make_examples(), tmp_path / name, config) for name in ("whole", "cut"))
    assert result.metrics["rows_read"] == sum(record["rows_read"] for record in result.history)
    assert metrics_without_seconds(resumed) == metrics_without_seconds(result)
    by_sample = result.metrics["rows_read"] / result.metrics["samples_seen"]
    assert by_sample == 2 if sampling == "uniform" else 1 < by_sample < 2


def test_divergence_in_the_last_step_is_an_error(tmp_path: Path) -> None:
    options: dict[str, Any] = {"between": "audio:visual", "seed": 0, "device": "cpu", "progress": no_progress}
    with pytest.raises(TrainError, match="training has diverged: predictions of epoch 1 are not finite; lower --lr"):
        finetune_on(make_examples(), None, config=with_options(lr=1e30), max_samples=1, **options)


@pytest.mark.usefixtures("usual_threads")
def test_vectors_are_trained_in_one_thread_and_pictures_in_two() -> None:
    examples = make_examples()
    assert examples.num_threads == NUM_THREADS == 1
    assert replace(examples, shapes=((3,), (8, 8, 3))).num_threads == NETWORK_THREADS == 2
    threads = in_fixed_threads(lambda examples: torch.get_num_threads())
    assert (threads(examples), threads(replace(examples, shapes=((3,), (8, 8, 3))))) == (1, 2)


def test_last_smaller_batch_is_left_out(tmp_path: Path) -> None:
    config = with_options(batch_size=16, epochs=1)
    examples = make_examples(120)  # 60 training samples: three batches of 16 and one of 12
    assert [fine_tune(examples, tmp_path / "all", config).history[0][key] for key in ("steps", "samples")] == [4, 60]
    whole = fine_tune(examples, tmp_path / "whole", with_options(config, drop_last=True))
    assert [whole.history[0][key] for key in ("steps", "samples")] == [3, 48]


def test_settings_without_effect_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fine_tune(make_examples(), tmp_path, with_options(epochs=1, drop_last=True, sampling="dus-h", balancing="sum"))
    assert "finetune.drop_last has no effect: --sampling dus-h chooses the size of every step" in caplog.text


@pytest.mark.parametrize("fusion", ["concat", "late"])
@pytest.mark.parametrize("sampling", ["uniform", "bss-h"])
def test_planted_signal_is_learned(tmp_path: Path, fusion: str, sampling: str) -> None:
    config = with_options(epochs=25, hidden=16, fusion=fusion, sampling=sampling)
    metrics = fine_tune(make_examples(240), tmp_path, config).metrics
    accuracies = {name: branch["accuracy"] for name, branch in metrics["test"]["all"]["branches"].items()}
    assert metrics["chance"]["uniform"] == 0.25
    assert accuracies["fused"] > 0.9
    for name in ("audio", "visual"):  # one bit of two
        assert 0.3 < accuracies[name] < 0.75


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA; test_planted_signal_is_learned is its CPU twin")
@pytest.mark.parametrize("sampling", ["uniform", "bss-h"])
def test_planted_signal_is_learned_in_bf16_on_a_gpu(tmp_path: Path, sampling: str) -> None:
    config = with_options(epochs=25, hidden=16, sampling=sampling)
    metrics = fine_tune(make_examples(240), tmp_path, config, device="cuda").metrics
    assert metrics["test"]["all"]["branches"]["fused"]["accuracy"] > 0.9


def test_noise_is_not_learned(tmp_path: Path) -> None:
    examples = make_examples(400)
    shuffled = replace(examples, label=np.random.default_rng(1).permutation(examples.label))
    metrics = fine_tune(shuffled, tmp_path).metrics
    assert metrics["test"]["all"]["branches"]["fused"]["accuracy"] < 0.4  # 100 test samples at chance 0.25: sd 0.04


def test_same_seed_gives_same_bytes(tmp_path: Path) -> None:
    first, repeated = (fine_tune(make_examples(), tmp_path / name) for name in ("a", "b"))
    fine_tune(make_examples(), tmp_path / "c", seed=1)
    assert model_bytes(tmp_path / "a") == model_bytes(tmp_path / "b") != model_bytes(tmp_path / "c")
    assert metrics_without_seconds(first) == metrics_without_seconds(repeated)
    assert first.history == repeated.history


def test_random_numbers_drawn_elsewhere_do_not_matter(tmp_path: Path) -> None:
    fine_tune(make_examples(), tmp_path / "a")

    def disturb(stage: str, done: int, total: int, *, detail: str = "") -> None:
        torch.rand(done)
        np.random.default_rng().random()

    fine_tune(make_examples(), tmp_path / "b", progress=disturb)
    assert model_bytes(tmp_path / "a") == model_bytes(tmp_path / "b")


@pytest.mark.parametrize("epochs", [1, 3, 5])
@pytest.mark.parametrize(("fusion", "sampling"), [("concat", "bss-h"), ("late", "uniform")])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, epochs: int, fusion: str, sampling: str) -> None:
    config = with_options(fusion=fusion, sampling=sampling)
    uninterrupted = fine_tune(make_examples(), tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(make_examples(), tmp_path / "part", config, progress=stop_after(epochs))
    assert not (tmp_path / "part" / "model.safetensors").exists()
    calls: list[tuple[int, int]] = []
    resumed = fine_tune(
        make_examples(),
        tmp_path / "part",
        config,
        progress=lambda stage, done, total, *, detail="": calls.append((done, total)),
    )
    assert calls == [(epoch, 5) for epoch in range(epochs, 6)]
    assert model_bytes(tmp_path / "part") == model_bytes(tmp_path / "whole")
    assert resumed.history == uninterrupted.history
    assert metrics_without_seconds(resumed) == metrics_without_seconds(uninterrupted)


def test_history_is_complete_after_an_interrupted_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine_tune(make_examples(), tmp_path / "whole")
    for moment in ("before", "after"):
        saved: list[Path] = []

        def save(
            state: dict[str, Any], path: Path, moment: str = moment, saved: list[Path] = saved, save: Any = save_state
        ) -> None:
            saved.append(path)
            last = len(saved) == QUICK.finetune.epochs
            if not last or moment == "after":
                save(state, path)
            if last:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("mmaudit.train.finetune.save_state", save)
            with pytest.raises(KeyboardInterrupt):
                fine_tune(make_examples(), tmp_path / moment)
        fine_tune(make_examples(), tmp_path / moment)
        history = (tmp_path / moment / "history.jsonl").read_bytes()
        assert history == (tmp_path / "whole" / "history.jsonl").read_bytes()


Arguments = dict[str, Any]  # the arguments of fine_tune that determine the weights


def change_config(**options: Any) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, "config": with_options(arguments["config"], **options)}


def with_changed_sample(split: str, name: str) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, "examples": change_sample(arguments["examples"], split, name)}


CHANGES: dict[str, Callable[[Arguments], Arguments]] = {
    "lr": change_config(lr=2e-2),
    "epochs": change_config(epochs=6),
    "sampler": change_config(sampling="bss-h"),
    "pacing": lambda arguments: {
        **arguments,
        "config": replace(arguments["config"], order=OrderConfig(start=0.9, grow_epochs=4)),
    },
    "seed": lambda arguments: {**arguments, "seed": 1},
    "classes": lambda arguments: {
        **arguments,
        "examples": replace(arguments["examples"], class_names=("a", "b", "c", "d", "e")),
    },
    "train vector": with_changed_sample("train", "inputs"),
    "train label": with_changed_sample("train", "label"),
    "train rank": with_changed_sample("train", "rank"),
    "train weight": with_changed_sample("train", "weight"),
    "validation vector": with_changed_sample("validation", "inputs"),
    "validation label": with_changed_sample("validation", "label"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_state_of_another_training_is_not_resumed(tmp_path: Path, change: str) -> None:
    arguments: Arguments = {"examples": make_examples(), "config": QUICK, "seed": 0}
    with pytest.raises(KeyboardInterrupt):
        fine_tune(**arguments, folder=tmp_path / "old", progress=stop_after(3))
    changed, epochs_done = CHANGES[change](arguments), list[int]()
    resumed = fine_tune(
        **changed, folder=tmp_path / "old", progress=lambda *step, detail="": epochs_done.append(step[1])
    )
    assert epochs_done == list(range(changed["config"].finetune.epochs + 1))
    expected = fine_tune(**changed, folder=tmp_path / "new")
    assert resumed.history == expected.history
    assert model_bytes(tmp_path / "old") == model_bytes(tmp_path / "new")


def test_damaged_state_raises(tmp_path: Path) -> None:
    fine_tune(make_examples(), tmp_path)
    state = tmp_path / "state" / "last.pt"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"last\.pt is damaged"):
        fine_tune(make_examples(), tmp_path)


def test_test_samples_do_not_affect_training(tmp_path: Path) -> None:
    examples = make_examples()
    spoiled = examples
    for name in ("label", "inputs", "discrepancy", "p_balanced"):
        spoiled = change_sample(spoiled, "test", name)
    label = spoiled.label.copy()
    label[examples.rows("test")] = (label[examples.rows("test")] + 1) % 4
    first, second = fine_tune(examples, tmp_path / "a"), fine_tune(replace(spoiled, label=label), tmp_path / "b")
    assert model_bytes(tmp_path / "a") == model_bytes(tmp_path / "b")
    assert first.history == second.history
    assert first.metrics["test"] != second.metrics["test"]


def rebuild(folder: Path) -> tuple[FusionNet, ModelConfig]:
    """Build the network from its file only."""
    config = read_model_config(folder / "model.safetensors")
    net = FusionNet(config)
    net.load_state_dict(load_file(folder / "model.safetensors"))
    net.eval()
    return net, config


@torch.no_grad()
def evaluate_split(net: FusionNet, examples: Examples, split: str) -> tuple[Any, torch.Tensor]:
    rows = examples.rows(split)
    return net([torch.from_numpy(inputs.read(rows)) for inputs in examples.inputs]), torch.from_numpy(
        examples.label[rows]
    )


def test_selected_epoch_is_the_best_on_validation(tmp_path: Path) -> None:
    examples = make_examples(noise=3.0)  # hard enough to overfit
    result = fine_tune(examples, tmp_path, with_options(epochs=12, hidden=32, lr=3e-2))
    best = max(result.history, key=lambda record: (record["validation_accuracy"], -record["validation_loss"]))
    assert 1 < best["epoch"] < 12
    assert result.metrics["best_epoch"] == best["epoch"]
    net, _ = rebuild(tmp_path)
    outputs, label = evaluate_split(net, examples, "validation")
    accuracy = (outputs.fused.argmax(dim=1) == label).float().mean().item()
    assert accuracy == pytest.approx(best["validation_accuracy"])
    loss = torch.nn.functional.cross_entropy(outputs.fused, label).item()
    assert loss == pytest.approx(best["validation_loss"], rel=1e-5)


def test_too_few_validation_samples_select_the_last_epoch(tmp_path: Path) -> None:
    """Among few samples one epoch is best by chance: with just enough the best is kept, with one fewer the last."""
    epochs = {}
    for num_validation in (MIN_VALIDATION_SAMPLES, MIN_VALIDATION_SAMPLES - 1):
        examples = make_examples(4 * num_validation, noise=3.0)
        assert len(examples.rows("validation")) == num_validation
        result = fine_tune(examples, tmp_path / str(num_validation), with_options(epochs=12, hidden=32, lr=3e-2))
        best = max(result.history, key=lambda record: (record["validation_accuracy"], -record["validation_loss"]))
        epochs[num_validation] = result.metrics["best_epoch"], best["epoch"]
    assert epochs[MIN_VALIDATION_SAMPLES][0] == epochs[MIN_VALIDATION_SAMPLES][1] < 12
    assert epochs[MIN_VALIDATION_SAMPLES - 1][0] == 12 > epochs[MIN_VALIDATION_SAMPLES - 1][1]


@pytest.mark.parametrize("fusion", ["concat", "late"])
def test_model_file_reproduces_the_metrics(tmp_path: Path, fusion: str) -> None:
    examples = make_examples(noise=3.0)
    metrics = fine_tune(examples, tmp_path, with_options(fusion=fusion, epochs=12, hidden=32, lr=3e-2)).metrics
    assert metrics["best_epoch"] < 12  # the last weights differ
    net, config = rebuild(tmp_path)
    assert config.modalities == ("audio", "visual")
    assert config.classes == ("a", "b", "c", "d")
    outputs, label = evaluate_split(net, examples, "test")
    branches = metrics["test"]["all"]["branches"]
    for name, logits in zip(("fused", "audio", "visual"), (outputs.fused, *outputs.unimodal), strict=True):
        assert branches[name] == pytest.approx(compute_metrics(logits.softmax(dim=1).numpy(), label.numpy()))
    assert metrics["num_parameters"] == sum(parameter.numel() for parameter in net.parameters())


def test_sample_of_weight_0_does_not_affect_training(tmp_path: Path) -> None:
    examples = make_examples()
    label, weight = examples.label.copy(), examples.weight.copy()
    spoiled = examples.rows("train")[:10]
    label[spoiled] = (label[spoiled] + 1) % 4
    weight[spoiled] = 0
    fine_tune(replace(examples, weight=weight), tmp_path / "a")
    fine_tune(replace(examples, weight=weight, label=label), tmp_path / "b")
    fine_tune(replace(examples, label=label), tmp_path / "c")
    assert model_bytes(tmp_path / "a") == model_bytes(tmp_path / "b") != model_bytes(tmp_path / "c")


def test_standardisation_is_of_training_samples_only(tmp_path: Path) -> None:
    examples = make_examples()
    fine_tune(examples, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for index, inputs in enumerate(examples.inputs):
        rows = inputs.read(examples.rows("train")).astype(np.float64)
        np.testing.assert_allclose(state[f"encoders.{index}.mean"], rows.mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state[f"encoders.{index}.scale"], rows.std(axis=0), rtol=1e-4)


def test_metrics_count_the_subsets_of_the_test_samples(tmp_path: Path) -> None:
    examples = make_examples()
    metrics = fine_tune(examples, tmp_path).metrics
    test = examples.rows("test")
    values, subsets = examples.discrepancy[test], metrics["test"]
    assert metrics["counts"] == {split: len(examples.rows(split)) for split in ("train", "validation", "test")}
    assert subsets["all"]["n"] == len(test)
    assert subsets["audio-preferred"]["n"] == (values > 0).sum()
    assert subsets["visual-dominated-0.4"]["n"] == (values < -0.4).sum()
    assert subsets["balanced-within-0.2"]["n"] == (np.abs(values) <= 0.2).sum()
    assert subsets["in-manifest"]["n"] == examples.in_manifest[test].sum() < len(test)
    most_common = np.bincount(examples.label[examples.rows("train")]).argmax()
    assert metrics["chance"]["majority"] == pytest.approx((examples.label[test] == most_common).mean())
    json.dumps(metrics, allow_nan=False)


def test_one_modality_against_the_rest_names_the_subset_rest(tmp_path: Path) -> None:
    subsets = fine_tune(make_examples(), tmp_path, between="audio").metrics["test"]
    assert {"audio-preferred", "rest-preferred"} <= set(subsets)


def test_history_counts_samples_and_rates(tmp_path: Path) -> None:
    config = with_options(sampling="bss-h")
    result = fine_tune(make_examples(), tmp_path, config)
    shares = [root_pacing(epoch, start=0.1, grow_epochs=4) for epoch in range(1, 6)]
    assert [record["samples"] for record in result.history] == [math.floor(60 * share) for share in shares]
    assert [record["epoch"] for record in result.history] == [1, 2, 3, 4, 5]
    assert result.metrics["samples_seen"] == sum(record["samples"] for record in result.history)
    # Cosine from lr to 0 over the epochs.
    cosine = [1e-2 * (1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in range(5)]
    assert [record["lr"] for record in result.history] == pytest.approx(cosine)


def test_keep_posterior_equals_training_without_the_filtered_samples(tmp_path: Path) -> None:
    examples = make_examples()
    filtered = fine_tune(examples, tmp_path / "a", with_options(keep_posterior=0.5))
    filtered_out = (examples.split == "train") & (examples.p_balanced < 0.5)
    split = np.where(filtered_out, "unused", examples.split).astype(object)
    expected = fine_tune(replace(examples, split=split), tmp_path / "b")
    assert 0 < filtered.metrics["counts"]["train"] == (~filtered_out & (examples.split == "train")).sum()
    assert filtered.history == expected.history
    assert filtered.metrics["test"] == expected.metrics["test"]
    unfiltered = fine_tune(examples, tmp_path / "c", with_options(keep_posterior=0.0))
    assert unfiltered.metrics["counts"]["train"] == 60


def test_keep_posterior_without_posteriors_raises(tmp_path: Path) -> None:
    examples = make_examples()
    unknown = replace(examples, p_balanced=np.full(120, np.nan))
    with pytest.raises(ManifestError, match="--keep-posterior: the manifest has no p_balanced; rescore"):
        fine_tune(unknown, tmp_path, with_options(keep_posterior=0.5))
    assert fine_tune(unknown, tmp_path).history


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_empty_split_raises(tmp_path: Path, name: str) -> None:
    examples = make_examples()
    split = np.where(examples.split == name, "unused", examples.split).astype(object)
    with pytest.raises(ManifestError, match=f"the manifest leaves no {name} samples"):
        fine_tune(replace(examples, split=split), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_filter_that_leaves_no_sample_raises(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"leaves no train samples: .*--keep-posterior"):
        fine_tune(make_examples(), tmp_path, with_options(keep_posterior=1.0))


def test_no_temporary_files_remain(tmp_path: Path) -> None:
    fine_tune(make_examples(), tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["history.jsonl", "model.safetensors", "state/last.pt"]
