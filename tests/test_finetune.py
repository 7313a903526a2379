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
from safetensors import safe_open
from safetensors.torch import load_file

from mmaudit.audit.errors import ConfigError, ManifestError, RunError
from mmaudit.audit.workers import Progress, silent
from mmaudit.rebalance.pacing import root_pacing
from mmaudit.train.config import FUSIONS, FinetuneConfig
from mmaudit.train.evaluate import measure
from mmaudit.train.examples import Examples
from mmaudit.train.finetune import LEAST_VALIDATION, Finetuned, finetune_on
from mmaudit.train.fusion import FusionNet
from mmaudit.train.sampling import SAMPLERS, SamplingConfig

torch.set_num_threads(1)

QUICK = FinetuneConfig(epochs=5, batch_size=16, hidden=6, lr=1e-2)


def examples_of(n: int = 120, *, noise: float = 0.3, seed: int = 0) -> Examples:
    """Give four classes of which audio tells one bit and visual the other: neither modality alone knows the class."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, n)
    bits = 2.0 * np.stack([label // 2, label % 2], axis=1) - 1
    split = np.array([("train", "train", "validation", "test")[number % 4] for number in range(n)], dtype=object)
    return Examples(
        sample_id=np.array([f"s{number}" for number in range(n)], dtype=object),
        inputs=tuple(
            (bits[:, [side]] * np.ones(3) + noise * rng.standard_normal((n, 3))).astype(np.float32) for side in (0, 1)
        ),
        modalities=("audio", "visual"),
        label=label,
        class_names=("a", "b", "c", "d"),
        split=split,
        rank=rng.permutation(n),
        weight=np.ones(n, np.float32),
        discrepancy=rng.uniform(-1, 1, n),
        p_balanced=rng.random(n),
        chosen=np.arange(n) % 8 != 3,
    )


def tune(examples: Examples, folder: Path, config: FinetuneConfig = QUICK, **options: Any) -> Finetuned:
    settings: dict[str, Any] = {
        "sampling": SamplingConfig(pacing_epochs=4),
        "between": "audio:visual",
        "seed": 0,
        "device": "cpu",
        "progress": silent,
    }
    return finetune_on(examples, folder, config=config, **{**settings, **options})


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def untimed(found: Finetuned) -> dict[str, Any]:
    return {name: value for name, value in found.metrics.items() if name != "seconds"}


def stop_after(epochs: int) -> Progress:
    def progress(stage: str, done: int, total: int) -> None:
        if done == epochs:
            raise KeyboardInterrupt

    return progress


def changed(examples: Examples, split: str, name: str) -> Examples:
    """Change one value of one sample of a split."""
    row = examples.rows(split)[0]
    if name == "inputs":
        inputs = tuple(matrix.copy() for matrix in examples.inputs)
        inputs[1][row, 0] += 1
        return replace(examples, inputs=inputs)
    values = getattr(examples, name).copy()
    values[row] = (values[row] + 1) % 4 if name == "label" else values[row] + 1
    return replace(examples, **{name: values})


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("sampling", SAMPLERS)
def test_what_is_planted_is_learnt(tmp_path: Path, fusion: str, sampling: str) -> None:
    config = replace(QUICK, epochs=25, hidden=16, fusion=fusion, sampling=sampling)
    metrics = tune(examples_of(240), tmp_path, config).metrics
    found = {name: branch["accuracy"] for name, branch in metrics["test"]["all"]["branches"].items()}
    assert metrics["chance"]["uniform"] == 0.25
    assert found["fused"] > 0.9
    for name in ("audio", "visual"):  # one bit of two
        assert 0.3 < found[name] < 0.75


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA; test_what_is_planted_is_learnt is its CPU twin")
@pytest.mark.parametrize("sampling", SAMPLERS)
def test_what_is_planted_is_learnt_in_bf16_on_a_gpu(tmp_path: Path, sampling: str) -> None:
    config = replace(QUICK, epochs=25, hidden=16, sampling=sampling)
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
    config = replace(QUICK, fusion=fusion, sampling=sampling)
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


Settings = dict[str, Any]  # the arguments of tune that decide about the weights


def with_config(**options: Any) -> Callable[[Settings], Settings]:
    return lambda now: {**now, "config": replace(now["config"], **options)}


def with_changed(split: str, name: str) -> Callable[[Settings], Settings]:
    return lambda now: {**now, "examples": changed(now["examples"], split, name)}


OTHERS: dict[str, Callable[[Settings], Settings]] = {
    "lr": with_config(lr=2e-2),
    "epochs": with_config(epochs=6),
    "sampler": with_config(sampling="bss-h"),
    "pacing": lambda now: {**now, "sampling": SamplingConfig(pacing_start=0.9, pacing_epochs=4)},
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
    now: Settings = {"examples": examples_of(), "config": QUICK, "sampling": SamplingConfig(), "seed": 0}
    with pytest.raises(KeyboardInterrupt):
        tune(**now, folder=tmp_path / "old", progress=stop_after(3))
    other, seen = OTHERS[what](now), list[int]()
    found = tune(**other, folder=tmp_path / "old", progress=lambda stage, done, total: seen.append(done))
    assert seen == list(range(1, other["config"].epochs + 1))
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


def rebuild(folder: Path) -> tuple[FusionNet, dict[str, Any]]:
    """Build the network from its file alone."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        about = json.loads(file.metadata()["mmaudit"])
    net = FusionNet(
        dims=about["dims"],
        num_classes=len(about["classes"]),
        hidden=about["hidden"],
        dropout=about["dropout"],
        fusion=about["fusion"],
    )
    net.load_state_dict(load_file(folder / "model.safetensors"))
    net.eval()
    return net, about


@torch.no_grad()
def ask(net: FusionNet, examples: Examples, split: str) -> tuple[Any, torch.Tensor]:
    rows = examples.rows(split)
    return net([torch.from_numpy(matrix[rows]) for matrix in examples.inputs]), torch.from_numpy(examples.label[rows])


def test_the_epoch_kept_is_the_best_on_validation(tmp_path: Path) -> None:
    examples = examples_of(noise=3.0)  # hard enough to overfit
    result = tune(examples, tmp_path, replace(QUICK, epochs=12, hidden=32, lr=3e-2))
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
        result = tune(examples, tmp_path / str(number), replace(QUICK, epochs=12, hidden=32, lr=3e-2))
        best = max(result.history, key=lambda record: (record["validation_accuracy"], -record["validation_loss"]))
        kept[number] = result.metrics["best_epoch"], best["epoch"]
    assert kept[LEAST_VALIDATION][0] == kept[LEAST_VALIDATION][1] < 12
    assert kept[LEAST_VALIDATION - 1][0] == 12 > kept[LEAST_VALIDATION - 1][1]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_model_file_alone_gives_the_figures_again(tmp_path: Path, fusion: str) -> None:
    examples = examples_of(noise=3.0)
    metrics = tune(examples, tmp_path, replace(QUICK, fusion=fusion, epochs=12, hidden=32, lr=3e-2)).metrics
    assert metrics["best_epoch"] < 12  # the last weights are others
    net, about = rebuild(tmp_path)
    assert about["modalities"] == ["audio", "visual"]
    assert about["classes"] == ["a", "b", "c", "d"]
    outputs, label = ask(net, examples, "test")
    branches = metrics["test"]["all"]["branches"]
    for name, logits in zip(("fused", "audio", "visual"), (outputs.fused, *outputs.unimodal), strict=True):
        assert branches[name] == pytest.approx(measure(logits.softmax(dim=1).numpy(), label.numpy()))
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
    for index, matrix in enumerate(examples.inputs):
        rows = matrix[examples.rows("train")].astype(np.float64)
        np.testing.assert_allclose(state[f"mean_{index}"], rows.mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state[f"scale_{index}"], rows.std(axis=0), rtol=1e-4)


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
    config = replace(QUICK, sampling="bss-h")
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
    filtered = tune(examples, tmp_path / "a", replace(QUICK, keep_posterior=0.5))
    out = (examples.split == "train") & (examples.p_balanced < 0.5)
    split = np.where(out, "unused", examples.split).astype(object)
    expected = tune(replace(examples, split=split), tmp_path / "b")
    assert 0 < filtered.metrics["counts"]["train"] == (~out & (examples.split == "train")).sum()
    assert filtered.history == expected.history
    assert filtered.metrics["test"] == expected.metrics["test"]
    none = tune(examples, tmp_path / "c", replace(QUICK, keep_posterior=0.0))
    assert none.metrics["counts"]["train"] == 60


def test_a_posterior_that_is_not_there_is_missed(tmp_path: Path) -> None:
    examples = examples_of()
    unknown = replace(examples, p_balanced=np.full(120, np.nan))
    with pytest.raises(ManifestError, match="--keep-posterior: the manifest has no p_balanced; rescore"):
        tune(unknown, tmp_path, replace(QUICK, keep_posterior=0.5))
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
        tune(examples_of(), tmp_path, replace(QUICK, keep_posterior=1.0))


def test_what_is_left_is_whole(tmp_path: Path) -> None:
    tune(examples_of(), tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["model.safetensors", "state/last.pt"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fusion": "conct"}, r"--fusion conct: did you mean concat\? .*late"),
        ({"sampling": "bss"}, r"--sampling bss: .*bss-h"),
        ({"epochs": 0}, "finetune.epochs is 0; it must be at least 1"),
        ({"batch_size": 0}, "finetune.batch_size is 0"),
        ({"hidden": 0}, "finetune.hidden is 0"),
        ({"dropout": 1.0}, r"finetune.dropout is 1.0; it must lie in \[0, 1\)"),
        ({"dropout": float("nan")}, "finetune.dropout is nan"),
        ({"validation_fraction": -0.1}, "finetune.validation_fraction is -0.1"),
        ({"lr": 0.0}, "finetune.lr must be a number above 0"),
        ({"lr": float("nan")}, "finetune.lr must be a number above 0"),
        ({"lr": float("inf")}, "finetune.lr must be a number above 0"),
        ({"weight_decay": -1.0}, "finetune.weight_decay one not below"),
        ({"weight_decay": float("nan")}, "finetune.weight_decay one not below"),
        ({"keep_posterior": 1.5}, r"--keep-posterior 1.5: a probability lies in \[0, 1\]"),
        ({"keep_posterior": float("nan")}, "--keep-posterior nan"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FinetuneConfig(**options)
