"""Laws of contributions: they share the accuracy out, and confusion is counted sample by sample."""

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

from mmaudit.audit.intervals import wilson
from mmaudit.train.contribution import confusion, contribution, correct_by_set, measure_contribution, shapley_sets
from mmaudit.train.network import FusionNet, ModelConfig

torch.set_num_threads(1)

Right = dict[frozenset[int], NDArray[np.bool_]]
ALL_BOTH = [frozenset[int](), frozenset({0}), frozenset({1}), frozenset({0, 1})]


def both(nobody: str, first: str, second: str, together: str) -> Right:
    """Read strings of 1 and 0, a sample a place."""
    words = (nobody, first, second, together)
    return {chosen: np.array([sign == "1" for sign in word]) for chosen, word in zip(ALL_BOTH, words, strict=True)}


def some(num_modalities: int, n: int, seed: int = 0) -> Right:
    rng = np.random.default_rng(seed)
    return {chosen: rng.random(n) < 0.2 + 0.1 * len(chosen) for chosen in shapley_sets(num_modalities)}


def test_two_modalities_by_hand() -> None:
    """phi^a = ((v(a) - v()) + (v(ab) - v(b))) / 2 of v() = 1/4, v(a) = 3/4, v(b) = 1/4, v(ab) = 1."""
    found = contribution(both("1000", "1110", "0100", "1111"), ["audio", "visual"])
    assert found["nobody"] == 0.25
    assert found["all"] == 1.0
    assert found["modalities"]["audio"]["mean"] == pytest.approx((0.5 + 0.75) / 2)
    assert found["modalities"]["visual"]["mean"] == pytest.approx((0.0 + 0.25) / 2)
    assert found["sets"] == [
        {"modalities": [], "accuracy": 0.25},
        {"modalities": ["audio"], "accuracy": 0.75},
        {"modalities": ["visual"], "accuracy": 0.25},
        {"modalities": ["audio", "visual"], "accuracy": 1.0},
    ]


def test_its_interval_is_students_over_samples() -> None:
    right = both("10001000", "11101011", "01001100", "11110111")
    found = contribution(right, ["audio", "visual"])["modalities"]["audio"]
    nobody, audio, visual, together = (right[chosen].astype(float) for chosen in ALL_BOTH)
    each = (audio - nobody + together - visual) / 2
    low, high = stats.t.interval(0.95, 7, loc=each.mean(), scale=stats.sem(each))
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((each.mean(), low, high))


def test_samples_that_stand_together_tell_less() -> None:
    names, right = ["audio", "visual"], some(2, 30)
    repeated = {chosen: np.repeat(found, 4) for chosen, found in right.items()}
    once, alone = (contribution(each, names)["modalities"]["audio"] for each in (right, repeated))
    grouped = contribution(repeated, names, groups=np.repeat(np.arange(30), 4))["modalities"]["audio"]
    assert grouped == pytest.approx(once)
    assert alone["high"] - alone["low"] < 0.6 * (grouped["high"] - grouped["low"])


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 99))
def test_contributions_share_out_what_all_add_to_nobody(num_modalities: int, n: int, seed: int) -> None:
    found = contribution(some(num_modalities, n, seed), [f"m{index}" for index in range(num_modalities)])
    total = sum(each["mean"] for each in found["modalities"].values())
    assert total == pytest.approx(found["all"] - found["nobody"], abs=1e-6)
    assert all(-1 <= each["low"] <= each["mean"] <= each["high"] <= 1 for each in found["modalities"].values())


def test_three_modalities_by_the_formula_of_shapley() -> None:
    """phi^j = sum over S without j of |S|! (m - |S| - 1)! / m! (v(S + j) - v(S))."""
    right = some(3, 50)
    found = contribution(right, ["a", "b", "c"])["modalities"]
    weight = {0: 1 / 3, 1: 1 / 6, 2: 1 / 3}
    for index, name in enumerate("abc"):
        others = [other for other in range(3) if other != index]
        expected = sum(
            weight[size] * (right[frozenset({*chosen, index})].mean() - right[frozenset(chosen)].mean())
            for size in range(3)
            for chosen in combinations(others, size)
        )
        assert found[name]["mean"] == pytest.approx(expected)


def test_a_modality_that_changes_nothing_contributes_nothing() -> None:
    right = some(2, 40)
    deaf = {chosen: right[chosen & {0}] for chosen in right}
    found = contribution(deaf, ["audio", "visual"])
    assert found["modalities"]["visual"] == {"mean": 0, "low": 0, "high": 0}
    assert found["modalities"]["audio"]["mean"] == pytest.approx(found["all"] - found["nobody"])


def test_modalities_that_do_the_same_contribute_the_same_and_swap() -> None:
    right = some(2, 40)
    swapped = {frozenset(1 - index for index in chosen): found for chosen, found in right.items()}
    one, other = contribution(right, ["a", "b"]), contribution(swapped, ["b", "a"])
    assert one["modalities"] == other["modalities"]
    alike = {chosen: right[frozenset(range(len(chosen)))] for chosen in right}
    found = contribution(alike, ["a", "b"])["modalities"]
    assert found["a"] == found["b"]


@pytest.mark.parametrize("num_modalities", [1, 2, 3, 6])
def test_all_sets_are_asked_up_to_six_modalities(num_modalities: int) -> None:
    asked = shapley_sets(num_modalities)
    assert asked[0] == frozenset()
    assert asked[-1] == frozenset(range(num_modalities))
    assert len(asked) == len(set(asked)) == 2**num_modalities


def test_beyond_six_modalities_the_sets_asked_are_those_that_are_needed() -> None:
    asked = shapley_sets(9, seed=3)
    assert len(asked) < 2**9
    assert {len(chosen) for chosen in asked} == set(range(10))
    right = {chosen: np.random.default_rng(len(chosen)).random(20) < 0.5 for chosen in asked}
    found = contribution(right, [str(index) for index in range(9)], seed=3)
    total = sum(each["mean"] for each in found["modalities"].values())
    assert total == pytest.approx(found["all"] - found["nobody"], abs=1e-6)


def test_confusion_and_synergy_by_hand() -> None:
    """Samples: right in all ways; audio alone; visual alone; both alone; together alone; never."""
    together = np.array([1, 0, 0, 0, 1, 0], bool)
    own = np.array([[1, 1], [1, 0], [0, 1], [1, 1], [0, 0], [0, 0]], bool)
    found = confusion(together, own, ["audio", "visual"])
    assert {name: each["n"] for name, each in found["confused_by"].items()} == {"audio": 2, "visual": 2}
    low, high = wilson(3, 6)
    assert found["confused"] == {"n": 3, "share": 0.5, "low": low, "high": high}
    assert (found["synergy"]["n"], found["synergy"]["share"]) == (1, pytest.approx(1 / 6))


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_confusion_and_synergy_are_what_fusion_loses_and_gains(rows: list[tuple[bool, bool, bool]]) -> None:
    """Against an oracle that picks the modality that is right: accuracy = oracle - confused + synergy."""
    together, own = np.array([row[0] for row in rows]), np.array([row[1:] for row in rows])
    found = confusion(together, own, ["a", "b"])
    lost, gained = found["confused"]["n"], found["synergy"]["n"]
    assert together.sum() == own.any(axis=1).sum() - lost + gained
    by = [each["n"] for each in found["confused_by"].values()]
    assert max(by) <= lost <= sum(by)


def test_one_modality_that_is_the_whole_answer_confuses_nobody() -> None:
    right = np.array([True, False, True])
    found = confusion(right, right[:, None], ["audio"])
    assert found["confused"]["n"] == found["confused_by"]["audio"]["n"] == found["synergy"]["n"] == 0


def test_one_report_holds_both_and_no_samples_have_none() -> None:
    right, own = some(2, 12), np.random.default_rng(5).random((12, 2)) < 0.5
    found = measure_contribution(right, own, ["audio", "visual"])
    assert found == {
        "n": 12,
        "contribution": contribution(right, ["audio", "visual"]),
        "confusion": confusion(right[frozenset({0, 1})], own, ["audio", "visual"]),
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    nothing = {chosen: each[:0] for chosen, each in right.items()}
    assert measure_contribution(nothing, own[:0], ["audio", "visual"]) == {"n": 0}


@pytest.mark.parametrize("fusion", ["concat", "gated"])
@torch.no_grad()
def test_a_reading_tells_what_the_network_says_of_each_set(fusion: str) -> None:
    torch.manual_seed(0)
    plan = ModelConfig(modalities=("a", "b"), shapes=((4,), (3,)), classes=("x", "y", "z"), fusion=fusion, hidden=8)
    net = FusionNet(plan).eval()
    outputs = net([torch.randn(30, 4), torch.randn(30, 3)])
    label = torch.arange(30) % 3
    nobody, first, second, together = correct_by_set(net, shapley_sets(2))(outputs, label)
    f, g = outputs.features
    assert torch.equal(together, outputs.fused.argmax(dim=1) == label)
    assert torch.equal(first, net.fusion([f, torch.zeros_like(g)]).argmax(dim=1) == label)
    assert torch.equal(second, net.fusion([torch.zeros_like(f), g]).argmax(dim=1) == label)
    assert int(nobody.sum()) == 10  # one class for all
    assert not torch.equal(first, second)
