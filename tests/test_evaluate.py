"""Tests of test metrics: equal to scikit-learn and scipy, by subset, of a model file; and of contributions."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, recall_score
from torch import Tensor
from training import QUICK, fine_tune, make_examples, with_options

from mmaudit.audit.errors import ManifestError
from mmaudit.audit.metrics import wilson_interval
from mmaudit.train.checkpoint import load_model, read_model_config, save_model
from mmaudit.train.config import ANSWERS
from mmaudit.train.evaluate import (
    compute_class_metrics,
    compute_metrics,
    confusion,
    contribution,
    evaluate,
    evaluate_classes,
    evaluate_file,
    evaluate_network,
    measure_contribution,
    sets_without,
    subsets,
    values_by_set,
)
from mmaudit.train.examples import Examples
from mmaudit.train.methods import resolve
from mmaudit.train.network import FusionNet, ModelConfig, correct_by_set, shapley_sets
from mmaudit.train.optimizer import SINGLE_PROCESS
from mmaudit.train.predictions import predict
from mmaudit.train.training_data import NetworkReader, set_up


def random_predictions(n: int, k: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, k, n)
    logits = rng.standard_normal((n, k)) + 1.5 * np.eye(k)[label]
    return (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32), label


@pytest.mark.parametrize(("n", "k", "seed"), [(200, 2, 0), (300, 5, 1), (90, 7, 2)])
def test_metrics_equal_scikit_learn(n: int, k: int, seed: int) -> None:
    probability, label = random_predictions(n, k, seed)
    metrics = compute_metrics(probability, label)
    predicted = probability.argmax(axis=1)
    assert set(label.tolist()) == set(range(k))
    assert metrics["accuracy"] == pytest.approx(accuracy_score(label, predicted))
    assert metrics["macro_f1"] == pytest.approx(f1_score(label, predicted, average="macro"))
    assert metrics["map"] == pytest.approx(average_precision_score(np.eye(k)[label], probability, average="macro"))
    interval = binomtest(int((predicted == label).sum()), n).proportion_ci(method="wilson")
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == pytest.approx(tuple(interval), abs=1e-6)


def test_map_and_f1_are_over_occurring_classes() -> None:
    probability, label = random_predictions(120, 4, 3)
    rows = label < 2
    metrics = compute_metrics(probability[rows], label[rows])
    predicted = probability[rows].argmax(axis=1)
    assert (predicted > 1).any()  # so that an average over all classes would differ
    precisions = [average_precision_score(label[rows] == index, probability[rows, index]) for index in (0, 1)]
    assert metrics["map"] == pytest.approx(np.mean(precisions))
    assert metrics["macro_f1"] == pytest.approx(np.mean(f1_score(label[rows], predicted, average=None, labels=[0, 1])))


def test_class_never_predicted_has_f1_of_0() -> None:
    metrics = compute_metrics(np.array([[0.9, 0.1], [0.8, 0.2]], np.float32), np.array([0, 1]))
    assert metrics["accuracy"] == 0.5
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(2, 5), st.integers(0, 999))
def test_row_order_does_not_change_metrics(n: int, k: int, seed: int) -> None:
    probability, label = random_predictions(n, k, seed)
    order = np.random.default_rng(seed).permutation(n)
    assert compute_metrics(probability[order], label[order]) == pytest.approx(compute_metrics(probability, label))


@given(st.integers(1, 500), st.data())
def test_wilson_interval_equals_scipy(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    expected = binomtest(successes, trials).proportion_ci(confidence_level=0.95, method="wilson")
    low, high = wilson_interval(successes, trials)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert 0 <= low <= successes / trials <= high <= 1


def test_subsets_by_hand() -> None:
    masks = subsets(np.array([-1, -0.4, -0.3, -0.2, 0, 0.2, 0.3, 0.5]), first="audio", second="visual")
    assert {name: np.flatnonzero(rows).tolist() for name, rows in masks.items()} == {
        "all": [0, 1, 2, 3, 4, 5, 6, 7],
        "audio-preferred": [5, 6, 7],
        "audio-dominated-0.2": [6, 7],
        "audio-dominated-0.4": [7],
        "visual-preferred": [0, 1, 2, 3],
        "visual-dominated-0.2": [0, 1, 2],
        "visual-dominated-0.4": [0],
        "balanced-within-0.2": [3, 4, 5],
    }


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_swapping_modalities_swaps_the_subsets(values: list[float]) -> None:
    original = subsets(np.array(values), first="a", second="b")
    swapped = subsets(-np.array(values), first="b", second="a")
    assert {name: rows.tolist() for name, rows in original.items()} == {
        name: rows.tolist() for name, rows in swapped.items()
    }


def test_every_branch_has_metrics_on_every_subset() -> None:
    fused, label = random_predictions(60, 3, 0)
    audio, _ = random_predictions(60, 3, 1)
    masks = {"all": np.ones(60, bool), "few": np.arange(60) < 12, "none": np.zeros(60, bool)}
    report: dict[str, Any] = evaluate({"fused": fused, "audio": audio}, label, masks)
    assert report["none"] == {"n": 0}
    assert report["all"] == {
        "n": 60,
        "branches": {"fused": compute_metrics(fused, label), "audio": compute_metrics(audio, label)},
    }
    assert report["few"]["n"] == 12
    assert report["few"]["branches"]["audio"] == compute_metrics(audio[:12], label[:12])


def test_calibration_error_by_hand() -> None:
    """Bins (12/15, 13/15] and (14/15, 1], two samples each, one of them wrong."""
    confidence = np.array([0.85, 0.86, 0.95, 1.0])
    metrics = compute_metrics(np.stack([confidence, 1 - confidence], axis=1).astype(np.float32), np.array([0, 1, 0, 1]))
    assert metrics["ece"] == pytest.approx((abs(0.85 + 0.86 - 1) + abs(0.95 + 1.0 - 1)) / 4, abs=1e-6)
    perfect = compute_metrics(np.eye(3, dtype=np.float32)[[0, 1, 2, 1]], np.array([0, 1, 2, 1]))
    assert perfect["ece"] == 0
    assert perfect["map"] == perfect["macro_f1"] == perfect["accuracy"] == 1


def test_true_probabilities_are_calibrated_and_overconfident_ones_are_not() -> None:
    """The ECE of overconfident probabilities is the amount by which they are too high."""
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.55, 0.95, 20_000)
    label = (rng.random(20_000) > probability).astype(np.int64)
    calibrated = compute_metrics(np.stack([probability, 1 - probability], axis=1).astype(np.float32), label)
    raised = np.minimum(probability + 0.04, 1)
    overconfident = compute_metrics(np.stack([raised, 1 - raised], axis=1).astype(np.float32), label)
    assert calibrated["ece"] < 0.02
    assert overconfident["ece"] == pytest.approx(0.04, abs=0.01)
    assert overconfident["accuracy"] == calibrated["accuracy"]


@pytest.mark.parametrize(("n", "k", "seed"), [(200, 2, 0), (300, 5, 1), (90, 7, 2)])
def test_class_metrics_equal_scikit_learn(n: int, k: int, seed: int) -> None:
    probability, label = random_predictions(n, k, seed)
    classes = compute_class_metrics(probability, label)
    predicted = probability.argmax(axis=1)
    assert list(classes) == list(range(k))
    for name, expected in (
        ("recall", recall_score(label, predicted, average=None)),
        ("f1", f1_score(label, predicted, average=None)),
        ("average_precision", average_precision_score(np.eye(k)[label], probability, average=None)),
    ):
        assert [metrics[name] for metrics in classes.values()] == pytest.approx(expected.tolist())
    for index, metrics in classes.items():
        rows = label == index
        interval = binomtest(int((predicted[rows] == index).sum()), int(rows.sum())).proportion_ci(method="wilson")
        assert (metrics["recall_low"], metrics["recall_high"]) == pytest.approx(tuple(interval), abs=1e-6)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(2, 6), st.integers(0, 999))
def test_overall_metrics_follow_from_class_metrics(n: int, k: int, seed: int) -> None:
    probability, label = random_predictions(n, k, seed)
    overall, classes = compute_metrics(probability, label), compute_class_metrics(probability, label)
    assert sorted(classes) == np.unique(label).tolist()
    counts = np.bincount(label)
    assert overall["accuracy"] == pytest.approx(
        sum(counts[index] * metrics["recall"] for index, metrics in classes.items()) / n
    )
    assert overall["macro_f1"] == pytest.approx(np.mean([metrics["f1"] for metrics in classes.values()]))
    assert overall["map"] == pytest.approx(np.mean([metrics["average_precision"] for metrics in classes.values()]))


def test_every_branch_has_metrics_on_every_class() -> None:
    fused, label = random_predictions(60, 3, 0)
    audio, _ = random_predictions(60, 4, 1)
    fused = np.pad(fused, ((0, 0), (0, 1)))  # class 3 is never true, and audio predicts it sometimes
    assert (audio.argmax(axis=1) == 3).any()
    report = evaluate_classes({"fused": fused, "audio": audio}, label, ["a", "b", "c", "d"])
    assert [(name, entry["n"]) for name, entry in report.items()] == [
        *zip("abc", np.bincount(label).tolist(), strict=True),
        ("d", 0),
    ]
    assert report["d"] == {"n": 0}
    assert report["b"]["branches"] == {
        "fused": compute_class_metrics(fused, label)[1],
        "audio": compute_class_metrics(audio, label)[1],
    }


def reader_of(examples: Examples, folder: Path) -> NetworkReader:
    path = folder / "model.safetensors"
    net = FusionNet(read_model_config(path))
    net.load_state_dict(load_model(path))
    return NetworkReader(set_up(examples, resolve(QUICK), seed=0, device="cpu", distributed=SINGLE_PROCESS), net)


@pytest.mark.parametrize("answer", ANSWERS)
def test_evaluate_file_repeats_the_metrics_of_training(tmp_path: Path, answer: str) -> None:
    """The tested answer is that of the model, not of the config that evaluates it."""
    examples = make_examples(160, noise=2.0)
    metrics = fine_tune(examples, tmp_path, with_options(answer=answer, own_heads=True)).metrics
    result = evaluate_file(
        tmp_path / "model.safetensors",
        examples,
        split="test",
        between="audio:visual",
        config=QUICK,
        seed=0,
        device="cpu",
    )
    assert result.pop("n") == 40
    assert result == {name: metrics[name] for name in ("task", "answer", "test", "test_by_class", "contribution")}
    assert result["answer"] == answer


def test_metrics_are_of_the_given_rows(tmp_path: Path) -> None:
    examples = make_examples(160, noise=2.0)
    fine_tune(examples, tmp_path)
    reader, rows = reader_of(examples, tmp_path), np.array([5, 77, 31, 140])
    branch_probabilities = predict(reader, rows, examples.modalities)
    all_probabilities = predict(reader, np.arange(160), examples.modalities)
    for branch, probabilities in branch_probabilities.items():
        assert probabilities.shape == (4, 4)
        np.testing.assert_allclose(probabilities, all_probabilities[branch][rows], atol=1e-6)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    metrics = evaluate_network(reader, rows, examples, between="audio:visual", seed=0)["test"]["all"]
    assert metrics["n"] == 4
    assert metrics["branches"]["fused"] == compute_metrics(branch_probabilities["fused"], examples.label[rows])


def test_complementary_modalities_share_the_contribution(tmp_path: Path) -> None:
    """Each modality has one bit of two: accuracy 1 together, about a half alone, and a quarter with neither."""
    examples = make_examples(400)
    config = replace(QUICK, finetune=replace(QUICK.finetune, epochs=30, hidden=16))
    contribution = fine_tune(examples, tmp_path, config).metrics["contribution"]["contribution"]
    assert contribution["all"] > 0.95
    shapley_means = [contribution["modalities"][name]["mean"] for name in ("audio", "visual")]
    assert sum(shapley_means) == pytest.approx(contribution["all"] - contribution["nobody"], abs=1e-6)
    assert min(shapley_means) > 0.25


@pytest.mark.parametrize("field_name", ["modalities", "inputs", "classes"])
def test_samples_of_other_modalities_inputs_or_classes_raise(tmp_path: Path, field_name: str) -> None:
    examples = make_examples()
    fine_tune(examples, tmp_path)
    path = tmp_path / "model.safetensors"
    config = read_model_config(path)
    changed = {
        "modalities": replace(config, modalities=("audio", "touch")),
        "inputs": replace(config, shapes=((3,), (4,))),
        "classes": replace(config, classes=("a", "b", "c", "e")),
    }
    save_model(load_model(path), path, about=asdict(changed[field_name]))
    with pytest.raises(ManifestError, match=f"was trained on other {field_name}") as raised:
        evaluate_file(path, examples, split="test", between="audio:visual", config=QUICK, seed=0, device="cpu")
    if field_name == "modalities":
        assert str(raised.value).endswith("modalities: audio, touch; the samples have audio, visual")


CorrectBySet = dict[frozenset[int], NDArray[np.bool_]]
SETS_OF_TWO = [frozenset[int](), frozenset({0}), frozenset({1}), frozenset({0, 1})]


def correct_of_two(none: str, first: str, second: str, fused: str) -> CorrectBySet:
    """Parse digits 1 and 0, one per sample, for each set of two modalities."""
    strings = (none, first, second, fused)
    return {
        modality_set: np.array([digit == "1" for digit in string])
        for modality_set, string in zip(SETS_OF_TWO, strings, strict=True)
    }


def random_correct(num_modalities: int, n: int, seed: int = 0) -> CorrectBySet:
    rng = np.random.default_rng(seed)
    return {
        modality_set: rng.random(n) < 0.2 + 0.1 * len(modality_set) for modality_set in shapley_sets(num_modalities)
    }


def test_contribution_of_two_modalities_by_hand() -> None:
    """phi^a = ((v(a) - v()) + (v(ab) - v(b))) / 2 of v() = 1/4, v(a) = 3/4, v(b) = 1/4, v(ab) = 1."""
    result = contribution(correct_of_two("1000", "1110", "0100", "1111"), ["audio", "visual"])
    assert result["nobody"] == 0.25
    assert result["all"] == 1.0
    assert result["modalities"]["audio"]["mean"] == pytest.approx((0.5 + 0.75) / 2)
    assert result["modalities"]["visual"]["mean"] == pytest.approx((0.0 + 0.25) / 2)
    assert result["sets"] == [
        {"modalities": [], "accuracy": 0.25},
        {"modalities": ["audio"], "accuracy": 0.75},
        {"modalities": ["visual"], "accuracy": 0.25},
        {"modalities": ["audio", "visual"], "accuracy": 1.0},
    ]


def test_interval_is_students_t_over_samples() -> None:
    correct = correct_of_two("10001000", "11101011", "01001100", "11110111")
    interval = contribution(correct, ["audio", "visual"])["modalities"]["audio"]
    none, audio, visual, fused = (correct[modality_set].astype(float) for modality_set in SETS_OF_TWO)
    shapley_values = (audio - none + fused - visual) / 2
    low, high = stats.t.interval(0.95, 7, loc=shapley_values.mean(), scale=stats.sem(shapley_values))
    assert (interval["mean"], interval["low"], interval["high"]) == pytest.approx((shapley_values.mean(), low, high))


def test_grouped_samples_widen_the_interval() -> None:
    names, correct = ["audio", "visual"], random_correct(2, 30)
    repeated = {modality_set: np.repeat(is_correct, 4) for modality_set, is_correct in correct.items()}
    once, ungrouped = (contribution(outcomes, names)["modalities"]["audio"] for outcomes in (correct, repeated))
    grouped = contribution(repeated, names, groups=np.repeat(np.arange(30), 4))["modalities"]["audio"]
    assert grouped == pytest.approx(once)
    assert ungrouped["high"] - ungrouped["low"] < 0.6 * (grouped["high"] - grouped["low"])


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 99))
def test_contributions_sum_to_the_gain_over_the_empty_set(num_modalities: int, n: int, seed: int) -> None:
    result = contribution(random_correct(num_modalities, n, seed), [f"m{index}" for index in range(num_modalities)])
    total = sum(interval["mean"] for interval in result["modalities"].values())
    assert total == pytest.approx(result["all"] - result["nobody"], abs=1e-6)
    assert all(
        -1 <= interval["low"] <= interval["mean"] <= interval["high"] <= 1 for interval in result["modalities"].values()
    )


def test_three_modalities_by_the_shapley_formula() -> None:
    """phi^j = sum over S without j of |S|! (m - |S| - 1)! / m! (v(S + j) - v(S))."""
    correct = random_correct(3, 50)
    modalities = contribution(correct, ["a", "b", "c"])["modalities"]
    weight = {0: 1 / 3, 1: 1 / 6, 2: 1 / 3}
    for index, name in enumerate("abc"):
        other_indices = [other_index for other_index in range(3) if other_index != index]
        expected = sum(
            weight[size] * (correct[frozenset({*subset, index})].mean() - correct[frozenset(subset)].mean())
            for size in range(3)
            for subset in combinations(other_indices, size)
        )
        assert modalities[name]["mean"] == pytest.approx(expected)


def test_modality_without_effect_contributes_0() -> None:
    correct = random_correct(2, 40)
    without_visual = {modality_set: correct[modality_set & {0}] for modality_set in correct}
    result = contribution(without_visual, ["audio", "visual"])
    assert result["modalities"]["visual"] == {"mean": 0, "low": 0, "high": 0}
    assert result["modalities"]["audio"]["mean"] == pytest.approx(result["all"] - result["nobody"])


def test_equal_modalities_contribute_equally_and_swapping_swaps() -> None:
    correct = random_correct(2, 40)
    swapped = {
        frozenset(1 - index for index in modality_set): is_correct for modality_set, is_correct in correct.items()
    }
    original, relabelled = contribution(correct, ["a", "b"]), contribution(swapped, ["b", "a"])
    assert original["modalities"] == relabelled["modalities"]
    symmetric = {modality_set: correct[frozenset(range(len(modality_set)))] for modality_set in correct}
    is_correct = contribution(symmetric, ["a", "b"])["modalities"]
    assert is_correct["a"] == is_correct["b"]


@pytest.mark.parametrize("num_modalities", [1, 2, 3, 6])
def test_all_sets_are_used_up_to_six_modalities(num_modalities: int) -> None:
    sets = shapley_sets(num_modalities)
    assert sets[0] == frozenset()
    assert sets[-1] == frozenset(range(num_modalities))
    assert len(sets) == len(set(sets)) == 2**num_modalities


def test_beyond_six_modalities_only_needed_sets_are_used() -> None:
    sets = shapley_sets(9, seed=3)
    assert len(sets) < 2**9
    assert {len(modality_set) for modality_set in sets} == set(range(10))
    correct = {modality_set: np.random.default_rng(len(modality_set)).random(20) < 0.5 for modality_set in sets}
    result = contribution(correct, [str(index) for index in range(9)], seed=3)
    total = sum(interval["mean"] for interval in result["modalities"].values())
    assert total == pytest.approx(result["all"] - result["nobody"], abs=1e-6)


def test_confusion_and_synergy_by_hand() -> None:
    """Samples: correct in all ways; audio only; visual only; both alone but not fused; fused only; never."""
    fused_correct = np.array([1, 0, 0, 0, 1, 0], bool)
    unimodal_correct = np.array([[1, 1], [1, 0], [0, 1], [1, 1], [0, 0], [0, 0]], bool)
    result = confusion(fused_correct, unimodal_correct, ["audio", "visual"])
    assert {name: count["n"] for name, count in result["confused_by"].items()} == {"audio": 2, "visual": 2}
    low, high = wilson_interval(3, 6)
    assert result["confused"] == {"n": 3, "share": 0.5, "low": low, "high": high}
    assert (result["synergy"]["n"], result["synergy"]["share"]) == (1, pytest.approx(1 / 6))


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_confusion_and_synergy_are_the_losses_and_gains_of_fusion(rows: list[tuple[bool, bool, bool]]) -> None:
    """Against an oracle that selects a correct modality: accuracy = oracle - confused + synergy."""
    fused_correct, unimodal_correct = np.array([row[0] for row in rows]), np.array([row[1:] for row in rows])
    result = confusion(fused_correct, unimodal_correct, ["a", "b"])
    lost, gained = result["confused"]["n"], result["synergy"]["n"]
    assert fused_correct.sum() == unimodal_correct.any(axis=1).sum() - lost + gained
    counts = [count["n"] for count in result["confused_by"].values()]
    assert max(counts) <= lost <= sum(counts)


def test_single_modality_has_no_confusion() -> None:
    correct = np.array([True, False, True])
    result = confusion(correct, correct[:, None], ["audio"])
    assert result["confused"]["n"] == result["confused_by"]["audio"]["n"] == result["synergy"]["n"] == 0


def test_measure_contribution_has_both_parts_and_none_without_samples() -> None:
    correct, unimodal_correct = random_correct(2, 12), np.random.default_rng(5).random((12, 2)) < 0.5
    result = measure_contribution(correct, unimodal_correct, ["audio", "visual"])
    assert result == {
        "n": 12,
        "contribution": contribution(correct, ["audio", "visual"]),
        "confusion": confusion(correct[frozenset({0, 1})], unimodal_correct, ["audio", "visual"]),
    }
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    empty = {modality_set: is_correct[:0] for modality_set, is_correct in correct.items()}
    assert measure_contribution(empty, unimodal_correct[:0], ["audio", "visual"]) == {"n": 0}


@pytest.mark.parametrize("answer", ANSWERS)
def test_tested_answer_by_hand(tmp_path: Path, answer: str) -> None:
    """Validation, test and contribution are by W [f; g] + b, by the sum of the heads' logits, or by both together."""
    examples = make_examples(160, noise=1.5)
    finetuned = fine_tune(examples, tmp_path, with_options(answer=answer, own_heads=True, epochs=2))
    config, w = read_model_config(tmp_path / "model.safetensors"), load_model(tmp_path / "model.safetensors")
    net = FusionNet(config).eval()
    net.load_state_dict(w)
    rows = examples.rows("test")
    with torch.no_grad():
        f, g = net.encode([torch.from_numpy(np.array(inputs.read(rows))) for inputs in examples.inputs])

    def predicted(first: Tensor, second: Tensor) -> NDArray[np.int64]:
        fused = first @ w["fusion.heads.0.weight"].T + second @ w["fusion.heads.1.weight"].T + w["fusion.bias"]
        heads = first @ w["heads.0.weight"].T + w["heads.0.bias"] + second @ w["heads.1.weight"].T + w["heads.1.bias"]
        return np.asarray({"fused": fused, "heads": heads, "all": fused + heads}[answer].argmax(dim=1))

    label = examples.label[rows]
    accuracy = np.mean(predicted(f, g) == label)
    assert finetuned.metrics["test"]["all"]["branches"]["fused"]["accuracy"] == pytest.approx(accuracy)
    contributions = finetuned.metrics["contribution"]["contribution"]["sets"]
    sets = {tuple(row["modalities"]): row["accuracy"] for row in contributions}
    assert sets["audio", "visual"] == pytest.approx(accuracy)
    assert sets[("audio",)] == pytest.approx(np.mean(predicted(f, torch.zeros_like(g)) == label))
    assert finetuned.metrics["answer"] == config.answer == answer


def test_the_epoch_is_selected_by_the_tested_answer(tmp_path: Path) -> None:
    """The recorded validation accuracy is that of the answer, and the kept epoch has the highest."""
    examples = make_examples(160, noise=1.5)
    accuracies = {}
    for answer in ANSWERS:
        finetuned = fine_tune(examples, tmp_path / answer, with_options(answer=answer, own_heads=True, epochs=4))
        accuracies[answer] = [record["validation_accuracy"] for record in finetuned.history]
        kept = finetuned.metrics["best_epoch"]
        assert accuracies[answer][kept - 1] == max(accuracies[answer])
    assert accuracies["heads"] != accuracies["fused"]  # the trainings are the same


@pytest.mark.parametrize("fusion", ["concat", "gated-unit"])
@torch.no_grad()
def test_correct_by_set_matches_the_network(fusion: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(modalities=("a", "b"), shapes=((4,), (3,)), classes=("x", "y", "z"), fusion=fusion, hidden=8)
    net = FusionNet(config).eval()
    outputs = net([torch.randn(30, 4), torch.randn(30, 3)])
    label = torch.arange(30) % 3
    none, first, second, fused = correct_by_set(net, shapley_sets(2))(outputs, label)
    f, g = outputs.features
    assert torch.equal(fused, outputs.fused.argmax(dim=1) == label)
    assert torch.equal(first, net.fusion([f, torch.zeros_like(g)]).argmax(dim=1) == label)
    assert torch.equal(second, net.fusion([torch.zeros_like(f), g]).argmax(dim=1) == label)
    assert int(none.sum()) == 10  # one class for all
    assert not torch.equal(first, second)


@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_predictions_without_a_modality_are_those_of_the_set_of_the_others(num_modalities: int, tmp_path: Path) -> None:
    examples = make_examples(num_modalities=num_modalities)
    result = fine_tune(examples, tmp_path)
    by_set = {
        frozenset(entry["modalities"]): entry["accuracy"]
        for entry in result.metrics["contribution"]["contribution"]["sets"]
    }
    assert list(result.without) == list(examples.modalities)
    for name, values in result.without.items():
        assert values.mean() == pytest.approx(by_set[frozenset(examples.modalities) - {name}])
    assert len(by_set) == 2**num_modalities


def test_sets_without_a_modality_are_evaluated_also_of_many_modalities() -> None:
    """Of sixteen modalities the orders of `shapley` do not hold all sets of fifteen."""

    class Reader:
        def __init__(self) -> None:
            self.net = FusionNet(
                ModelConfig(modalities=tuple("abcdefghijklmnop"), shapes=((2,),) * 16, classes=("x", "y"))
            )

        def read_samples(self, function: object, rows: NDArray[np.intp]) -> Tensor:
            return torch.zeros(len(sets), len(rows))

    reader = Reader()
    sets = {*shapley_sets(16, seed=0), *sets_without(reader.net)}
    assert len(sets) > len(shapley_sets(16, seed=0))
    assert set(values_by_set(reader, np.arange(3), seed=0)) == sets  # type: ignore[arg-type]
