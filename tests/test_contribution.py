"""Tests of contributions: Shapley values of the accuracy, and counts of confused samples."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from mmaudit.audit.metrics import wilson_interval
from mmaudit.train.contribution import confusion, contribution, correct_by_set, measure_contribution, shapley_sets
from mmaudit.train.network import FusionNet, ModelConfig

torch.set_num_threads(1)

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


@pytest.mark.parametrize("fusion", ["concat", "gated"])
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
