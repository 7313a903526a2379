"""Laws of fine-tuning: it learns what is there, selects on validation, and goes on exactly where it stopped."""

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
from training import QUICK, examples_of, setting, stop_after, tune, untimed, weights

from mmaudit.audit.errors import ManifestError, RunError
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.rebalance.curriculum import OrderConfig, root_pacing
from mmaudit.train.checkpoint import read_model_config, save_state
from mmaudit.train.config import LEAST_VALIDATION
from mmaudit.train.evaluate import compute_metrics
from mmaudit.train.examples import Examples
from mmaudit.train.network import FusionNet, ModelConfig

torch.set_num_threads(1)


def changed(examples: Examples, split: str, name: str) -> Examples:
    """Change one value of one sample of a split."""
    row = examples.rows(split)[0]
    if name == "inputs":
        matrix = examples.inputs[1].read(np.arange(examples.inputs[1].num_rows)).copy()
        matrix[row, 0] += 1
        return replace(examples, inputs=(examples.inputs[0], MatrixInputs(matrix=matrix)))
    values = getattr(examples, name).copy()
    values[row] = (values[row] + 1) % 4 if name == "label" else values[row] + 1
    return replace(examples, **{name: values})


@pytest.mark.parametrize("fusion", ["concat", "late"])
@pytest.mark.parametrize("sampling", ["uniform", "bss-h"])
def test_what_is_planted_is_learnt(tmp_path: Path, fusion: str, sampling: str) -> None:
    config = setting(epochs=25, hidden=16, fusion=fusion, sampling=sampling)
    metrics = tune(examples_of(240), tmp_path, config).metrics
    found = {name: branch["accuracy"] for name, branch in metrics["test"]["all"]["branches"].items()}
    assert metrics["chance"]["uniform"] == 0.25
    assert found["fused"] > 0.9
    for name in ("audio", "visual"):  # one bit of two
        assert 0.3 < found[name] < 0.75


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA; test_what_is_planted_is_learnt is its CPU twin")
@pytest.mark.parametrize("sampling", ["uniform", "bss-h"])
def test_what_is_planted_is_learnt_in_bf16_on_a_gpu(tmp_path: Path, sampling: str) -> None:
    config = setting(epochs=25, hidden=16, sampling=sampling)
    metrics = tune(examples_of(240), tmp_path, config, device="cuda").metrics
    assert metrics["test"]["all"]["branches"]["fused"]["accuracy"] > 0.9


def test_noise_is_not_learnt(tmp_path: Path) -> None:
    examples = examples_of(400)
    shuffled = replace(examples, label=np.random.default_rng(1).permutation(examples.label))
    metrics = tune(shuffled, tmp_path).metrics
    assert metrics["test"]["all"]["branches"]["fused"]["accuracy"] < 0.4  # 100 test samples at chance 0.25: sd 0.04


def test_a_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, again = (tune(examples_of(), tmp_path / name) for name in ("a", "b"))
    tune(examples_of(), tmp_path / "c", seed=1)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")
    assert untimed(first) == untimed(again)
    assert first.history == again.history


def test_chance_elsewhere_does_not_matter(tmp_path: Path) -> None:
    tune(examples_of(), tmp_path / "a")

    def disturb(stage: str, done: int, total: int) -> None:
        torch.rand(done)
        np.random.default_rng().random()

    tune(examples_of(), tmp_path / "b", progress=disturb)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.parametrize("epochs", [1, 3, 5])
@pytest.mark.parametrize(("fusion", "sampling"), [("concat", "bss-h"), ("late", "uniform")])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path, epochs: int, fusion: str, sampling: str) -> None:
    config = setting(fusion=fusion, sampling=sampling)
    whole = tune(examples_of(), tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        tune(examples_of(), tmp_path / "part", config, progress=stop_after(epochs))
    assert not (tmp_path / "part" / "model.safetensors").exists()
    seen: list[tuple[int, int]] = []
    resumed = tune(
        examples_of(), tmp_path / "part", config, progress=lambda stage, done, total: seen.append((done, total))
    )
    assert seen == [(epoch, 5) for epoch in range(epochs + 1, 6)]
    assert weights(tmp_path / "part") == weights(tmp_path / "whole")
    assert resumed.history == whole.history
    assert untimed(resumed) == untimed(whole)


def test_the_history_is_whole_whenever_the_last_state_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(examples_of(), tmp_path / "whole")
    for place in ("before", "after"):
        saved: list[Path] = []

        def save(
            state: dict[str, Any], path: Path, place: str = place, saved: list[Path] = saved, save: Any = save_state
        ) -> None:
            saved.append(path)
            last = len(saved) == QUICK.finetune.epochs
            if not last or place == "after":
                save(state, path)
            if last:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("mmaudit.train.finetune.save_state", save)
            with pytest.raises(KeyboardInterrupt):
                tune(examples_of(), tmp_path / place)
        tune(examples_of(), tmp_path / place)
        history = (tmp_path / place / "history.jsonl").read_bytes()
        assert history == (tmp_path / "whole" / "history.jsonl").read_bytes()


Settings = dict[str, Any]  # the arguments of tune that decide about the weights


def with_config(**options: Any) -> Callable[[Settings], Settings]:
    return lambda now: {**now, "config": setting(now["config"], **options)}


def with_changed(split: str, name: str) -> Callable[[Settings], Settings]:
    return lambda now: {**now, "examples": changed(now["examples"], split, name)}


OTHERS: dict[str, Callable[[Settings], Settings]] = {
    "lr": with_config(lr=2e-2),
    "epochs": with_config(epochs=6),
    "sampler": with_config(sampling="bss-h"),
    "pacing": lambda now: {**now, "config": replace(now["config"], order=OrderConfig(start=0.9, grow_epochs=4))},
    "seed": lambda now: {**now, "seed": 1},
    "classes": lambda now: {**now, "examples": replace(now["examples"], class_names=("a", "b", "c", "d", "e"))},
    "train vector": with_changed("train", "inputs"),
    "train label": with_changed("train", "label"),
    "train rank": with_changed("train", "rank"),
    "train weight": with_changed("train", "weight"),
    "validation vector": with_changed("validation", "inputs"),
    "validation label": with_changed("validation", "label"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_state_of_something_else_is_not_gone_on_from(tmp_path: Path, what: str) -> None:
    now: Settings = {"examples": examples_of(), "config": QUICK, "seed": 0}
    with pytest.raises(KeyboardInterrupt):
        tune(**now, folder=tmp_path / "old", progress=stop_after(3))
    other, seen = OTHERS[what](now), list[int]()
    found = tune(**other, folder=tmp_path / "old", progress=lambda stage, done, total: seen.append(done))
    assert seen == list(range(1, other["config"].finetune.epochs + 1))
    expected = tune(**other, folder=tmp_path / "new")
    assert found.history == expected.history
    assert weights(tmp_path / "old") == weights(tmp_path / "new")


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    tune(examples_of(), tmp_path)
    state = tmp_path / "state" / "last.pt"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"last\.pt is damaged"):
        tune(examples_of(), tmp_path)


def test_test_samples_choose_nothing(tmp_path: Path) -> None:
    examples = examples_of()
    spoiled = examples
    for name in ("label", "inputs", "discrepancy", "p_balanced"):
        spoiled = changed(spoiled, "test", name)
    label = spoiled.label.copy()
    label[examples.rows("test")] = (label[examples.rows("test")] + 1) % 4
    first, second = tune(examples, tmp_path / "a"), tune(replace(spoiled, label=label), tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert first.history == second.history
    assert first.metrics["test"] != second.metrics["test"]


def rebuild(folder: Path) -> tuple[FusionNet, ModelConfig]:
    """Build the network from its file alone."""
    plan = read_model_config(folder / "model.safetensors")
    net = FusionNet(plan)
    net.load_state_dict(load_file(folder / "model.safetensors"))
    net.eval()
    return net, plan


@torch.no_grad()
def ask(net: FusionNet, examples: Examples, split: str) -> tuple[Any, torch.Tensor]:
    rows = examples.rows(split)
    return net([torch.from_numpy(each.read(rows)) for each in examples.inputs]), torch.from_numpy(examples.label[rows])


def test_the_epoch_kept_is_the_best_on_validation(tmp_path: Path) -> None:
    examples = examples_of(noise=3.0)  # hard enough to overfit
    result = tune(examples, tmp_path, setting(epochs=12, hidden=32, lr=3e-2))
    best = max(result.history, key=lambda record: (record["validation_accuracy"], -record["validation_loss"]))
    assert 1 < best["epoch"] < 12
    assert result.metrics["best_epoch"] == best["epoch"]
    net, _ = rebuild(tmp_path)
    outputs, label = ask(net, examples, "validation")
    accuracy = (outputs.fused.argmax(dim=1) == label).float().mean().item()
    assert accuracy == pytest.approx(best["validation_accuracy"])
    loss = torch.nn.functional.cross_entropy(outputs.fused, label).item()
    assert loss == pytest.approx(best["validation_loss"], rel=1e-5)


def test_too_few_validation_samples_choose_no_epoch(tmp_path: Path) -> None:
    """Of a few, one epoch is best by chance: at just enough the best is kept, at one fewer the last."""
    kept = {}
    for number in (LEAST_VALIDATION, LEAST_VALIDATION - 1):
        examples = examples_of(4 * number, noise=3.0)
        assert len(examples.rows("validation")) == number
        result = tune(examples, tmp_path / str(number), setting(epochs=12, hidden=32, lr=3e-2))
        best = max(result.history, key=lambda record: (record["validation_accuracy"], -record["validation_loss"]))
        kept[number] = result.metrics["best_epoch"], best["epoch"]
    assert kept[LEAST_VALIDATION][0] == kept[LEAST_VALIDATION][1] < 12
    assert kept[LEAST_VALIDATION - 1][0] == 12 > kept[LEAST_VALIDATION - 1][1]


@pytest.mark.parametrize("fusion", ["concat", "late"])
def test_the_model_file_alone_gives_the_figures_again(tmp_path: Path, fusion: str) -> None:
    examples = examples_of(noise=3.0)
    metrics = tune(examples, tmp_path, setting(fusion=fusion, epochs=12, hidden=32, lr=3e-2)).metrics
    assert metrics["best_epoch"] < 12  # the last weights are others
    net, plan = rebuild(tmp_path)
    assert plan.modalities == ("audio", "visual")
    assert plan.classes == ("a", "b", "c", "d")
    outputs, label = ask(net, examples, "test")
    branches = metrics["test"]["all"]["branches"]
    for name, logits in zip(("fused", "audio", "visual"), (outputs.fused, *outputs.unimodal), strict=True):
        assert branches[name] == pytest.approx(compute_metrics(logits.softmax(dim=1).numpy(), label.numpy()))
    assert metrics["num_parameters"] == sum(parameter.numel() for parameter in net.parameters())


def test_a_sample_of_no_weight_teaches_nothing(tmp_path: Path) -> None:
    examples = examples_of()
    label, weight = examples.label.copy(), examples.weight.copy()
    spoiled = examples.rows("train")[:10]
    label[spoiled] = (label[spoiled] + 1) % 4
    weight[spoiled] = 0
    tune(replace(examples, weight=weight), tmp_path / "a")
    tune(replace(examples, weight=weight, label=label), tmp_path / "b")
    tune(replace(examples, label=label), tmp_path / "c")
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_standardisation_is_the_training_samples_alone(tmp_path: Path) -> None:
    examples = examples_of()
    tune(examples, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for index, inputs in enumerate(examples.inputs):
        rows = inputs.read(examples.rows("train")).astype(np.float64)
        np.testing.assert_allclose(state[f"encoders.{index}.mean"], rows.mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state[f"encoders.{index}.scale"], rows.std(axis=0), rtol=1e-4)


def test_subsets_of_the_test_samples_are_counted(tmp_path: Path) -> None:
    examples = examples_of()
    metrics = tune(examples, tmp_path).metrics
    test = examples.rows("test")
    values, found = examples.discrepancy[test], metrics["test"]
    assert metrics["counts"] == {split: len(examples.rows(split)) for split in ("train", "validation", "test")}
    assert found["all"]["n"] == len(test)
    assert found["audio-preferred"]["n"] == (values > 0).sum()
    assert found["visual-dominated-0.4"]["n"] == (values < -0.4).sum()
    assert found["balanced-within-0.2"]["n"] == (np.abs(values) <= 0.2).sum()
    assert found["in-manifest"]["n"] == examples.chosen[test].sum() < len(test)
    common = np.bincount(examples.label[examples.rows("train")]).argmax()
    assert metrics["chance"]["majority"] == pytest.approx((examples.label[test] == common).mean())
    json.dumps(metrics, allow_nan=False)


def test_one_modality_against_the_rest_is_called_so(tmp_path: Path) -> None:
    found = tune(examples_of(), tmp_path, between="audio").metrics["test"]
    assert {"audio-preferred", "rest-preferred"} <= set(found)


def test_history_counts_what_was_seen(tmp_path: Path) -> None:
    config = setting(sampling="bss-h")
    result = tune(examples_of(), tmp_path, config)
    shares = [root_pacing(epoch, start=0.1, grow_epochs=4) for epoch in range(1, 6)]
    assert [record["samples"] for record in result.history] == [math.floor(60 * share) for share in shares]
    assert [record["epoch"] for record in result.history] == [1, 2, 3, 4, 5]
    assert result.metrics["samples_seen"] == sum(record["samples"] for record in result.history)
    # Cosine from lr to 0 over the epochs.
    cosine = [1e-2 * (1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in range(5)]
    assert [record["lr"] for record in result.history] == pytest.approx(cosine)


def test_filtering_by_posterior_is_training_without_the_rest(tmp_path: Path) -> None:
    examples = examples_of()
    filtered = tune(examples, tmp_path / "a", setting(keep_posterior=0.5))
    out = (examples.split == "train") & (examples.p_balanced < 0.5)
    split = np.where(out, "unused", examples.split).astype(object)
    expected = tune(replace(examples, split=split), tmp_path / "b")
    assert 0 < filtered.metrics["counts"]["train"] == (~out & (examples.split == "train")).sum()
    assert filtered.history == expected.history
    assert filtered.metrics["test"] == expected.metrics["test"]
    none = tune(examples, tmp_path / "c", setting(keep_posterior=0.0))
    assert none.metrics["counts"]["train"] == 60


def test_a_posterior_that_is_not_there_is_missed(tmp_path: Path) -> None:
    examples = examples_of()
    unknown = replace(examples, p_balanced=np.full(120, np.nan))
    with pytest.raises(ManifestError, match="--keep-posterior: the manifest has no p_balanced; rescore"):
        tune(unknown, tmp_path, setting(keep_posterior=0.5))
    assert tune(unknown, tmp_path).history


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_an_empty_split_is_refused(tmp_path: Path, name: str) -> None:
    examples = examples_of()
    split = np.where(examples.split == name, "unused", examples.split).astype(object)
    with pytest.raises(ManifestError, match=f"the manifest leaves no {name} samples: loosen its rule"):
        tune(replace(examples, split=split), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_filter_that_leaves_nobody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"leaves no train samples: .*--keep-posterior"):
        tune(examples_of(), tmp_path, setting(keep_posterior=1.0))


def test_what_is_left_is_whole(tmp_path: Path) -> None:
    tune(examples_of(), tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["history.jsonl", "model.safetensors", "state/last.pt"]
