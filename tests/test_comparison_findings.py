"""Checks of published claims: each outcome with planted accuracies, and filters by the mixture."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from mmaudit.train.comparison.findings import Filtering, StudyDesign
from mmaudit.train.comparison.verdicts import Comparison, build_comparison
from mmaudit.train.difference import holm

N = 1200
HALF = np.arange(N) < N // 2
SUBSETS = {
    "all": np.ones(N, dtype=bool),
    "audio-preferred": HALF,
    "visual-preferred": ~HALF,
    "audio-dominated-0.2": np.arange(N) < 300,
    "visual-dominated-0.2": np.arange(N) >= 900,
    "visual-dominated-0.4": np.arange(N) >= N - 20,
}
# Accuracy on the samples that prefer audio, and on those that prefer visual.
AUDIO, VISUAL = (0.8, 0.4), (0.3, 0.75)


def trained(on_audio: float, on_visual: float, *, seed: int, seeds: int = 4) -> NDArray[np.float64]:
    chance = np.where(HALF, on_audio, on_visual)
    return (np.random.default_rng(seed).random((seeds, N)) < chance).astype(float)


def compared(
    *, balanced: bool = False, seeds: int = 4, subsets: object = None, **methods: tuple[float, float]
) -> Comparison:
    """Compare methods by their accuracy on both halves; those of the first are the baseline's."""
    named = {**methods, "audio alone": AUDIO, "visual alone": VISUAL}
    correct = {
        ("all", name): trained(*chances, seed=index, seeds=seeds) for index, (name, chances) in enumerate(named.items())
    }
    controls = {("all", name): ("all", "joint") for name in ("audio alone", "visual alone")}
    return build_comparison(
        correct,
        name="test",
        baseline="joint",
        subsets=SUBSETS if subsets is None else subsets,  # type: ignore[arg-type]
        group=None,
        trainings=[],
        sample_id=np.arange(N),
        controls=controls,
        design=StudyDesign(
            unimodal={("all", "audio alone"): "audio", ("all", "visual alone"): "visual"},
            balanced=frozenset({"all"} if balanced else ()),
            greedy=frozenset({"greedy"}),
        ),
    )


def outcomes(comparison: Comparison, name: str) -> list[str]:
    return [finding.outcome for finding in comparison.findings if finding.name == name]


@pytest.mark.parametrize(
    ("method", "outcome"),
    [
        ((0.8, 0.6), "seen here"),  # above audio overall, below visual on its own samples
        ((0.8, 0.85), "not seen here"),  # above visual on its own samples
        ((0.5, 0.6), "not seen here"),  # below audio overall
        ((0.8, 0.745), "cannot tell"),
    ],
)
def test_methods_beat_the_best_modality_and_lose_to_the_weak_one(method: tuple[float, float], outcome: str) -> None:
    comparison = compared(joint=(0.7, 0.5), ogm=method)
    assert outcomes(comparison, "F1") == [outcome]
    (finding,) = [finding for finding in comparison.findings if finding.name == "F1"]
    overall = comparison.difference("ogm", "audio alone")
    weak = comparison.difference("ogm", "visual alone", subset="visual-preferred")
    assert finding.sentence.startswith(f"ogm on all: {100 * overall.mean:+.1f} points [{100 * overall.low:+.1f}, ")
    assert f"{100 * weak.mean:+.1f} points [{100 * weak.low:+.1f}, " in finding.sentence
    assert not outcomes(comparison, "F2")


@pytest.mark.parametrize(
    ("name", "method", "outcome"),
    [
        ("ogm", (0.5, 0.6), "seen here"),
        ("ogm", (0.7, 0.4), "not seen here"),
        ("ogm", (0.7, 0.5), "cannot tell"),
        ("greedy", (0.6, 0.6), "seen here"),
        ("greedy", (0.7, 0.6), "cannot tell"),  # it gains on the weak side, and nothing is traded
        ("greedy", (0.8, 0.6), "not seen here"),
    ],
)
def test_on_a_balanced_manifest_methods_help_the_weak_modality(
    name: str, method: tuple[float, float], outcome: str
) -> None:
    comparison = compared(balanced=True, joint=(0.7, 0.5), **{name: method})  # type: ignore[arg-type]
    assert outcomes(comparison, "F2") == [outcome]
    assert not outcomes(comparison, "F1")


@pytest.mark.parametrize(
    ("method", "outcome"),
    [((0.6, 0.5), "seen here"), ((0.95, 0.5), "not seen here"), ((0.8, 0.5), "cannot tell")],
)
def test_methods_are_below_the_dominant_modality(method: tuple[float, float], outcome: str) -> None:
    comparison = compared(joint=(0.6, 0.5), ogm=method)
    assert outcomes(comparison, "F3") == [outcome]
    (finding,) = [finding for finding in comparison.findings if finding.name == "F3"]
    assert "of 4 comparisons" in finding.sentence  # 20 samples of visual-dominated-0.4 show nothing


def test_findings_are_corrected_for_the_number_of_methods() -> None:
    """Of many methods without any gain, each at p just below .05, none is seen to help."""
    methods = {f"m{index}": (0.7, 0.5 + 0.022 * (index == 0)) for index in range(12)}
    comparison = compared(balanced=True, joint=(0.7, 0.5), **methods)  # type: ignore[arg-type]
    p = [comparison.difference(name, "joint", subset="visual-preferred").p for name in methods]
    corrected = holm(p)
    for finding, value in zip(comparison.findings, corrected, strict=False):
        assert (finding.outcome == "cannot tell") == (value >= 0.05)
    assert min(p) < min(corrected)


def test_nothing_can_be_told_from_one_seed_or_few_samples() -> None:
    one = compared(joint=(0.7, 0.5), ogm=(0.8, 0.6), seeds=1)
    assert {finding.outcome for finding in one.findings} == {"cannot tell"}
    few = {"all": SUBSETS["all"], "audio-preferred": HALF, "visual-preferred": np.arange(N) >= N - 20}
    assert outcomes(compared(joint=(0.7, 0.5), ogm=(0.8, 0.6), subsets=few), "F1") == ["cannot tell"]


def test_what_cannot_be_checked_has_the_reason() -> None:
    """Of unscored samples there are no subsets by discrepancy."""
    comparison = compared(joint=(0.7, 0.5), ogm=(0.8, 0.6), subsets={"all": SUBSETS["all"]})
    assert [(finding.name, finding.outcome) for finding in comparison.findings] == [
        ("F1", "cannot tell"),
        ("F3", "cannot tell"),
    ]
    assert comparison.findings[0].sentence.startswith("all: no two modalities were trained alone")
    assert comparison.findings[1].sentence == "all: no modality that was trained alone dominates 30 test samples"


def test_without_modalities_trained_alone_there_are_no_findings() -> None:
    correct = {("all", name): trained(0.5, 0.5, seed=seed) for seed, name in enumerate(("joint", "ogm"))}
    comparison = build_comparison(
        correct, name="t", baseline="joint", subsets=SUBSETS, group=None, trainings=[], sample_id=np.arange(N)
    )
    assert comparison.findings == ()
    assert comparison.selection is None


def filtered(gain: float = 0.1, seeds: int = 4) -> pd.DataFrame | None:
    filtering = {
        ("gmm", "joint"): Filtering(role="gmm", method="joint", manifest="gmm"),
        ("all", "joint"): Filtering(role="all", method="joint"),
        ("all", "ogm"): Filtering(role="all", method="ogm"),
        ("best", "joint"): Filtering(role="balance-score", method="joint"),
        ("random-like-gmm", "joint"): Filtering(role="random", method="joint", manifest="gmm"),
        ("random-like-best", "joint"): Filtering(role="random", method="joint", manifest="best"),
        ("all", "joint: finetune.keep_posterior=0.5"): Filtering(role="gmm", method="joint"),
    }
    correct = {
        condition: trained(0.6 + gain * (choice.role == "gmm"), 0.6, seed=seed, seeds=seeds)
        for seed, (condition, choice) in enumerate(filtering.items())
    }
    return build_comparison(
        correct,
        name="t",
        baseline="joint",
        subsets={"all": SUBSETS["all"]},
        group=None,
        trainings=[],
        sample_id=np.arange(N),
        design=StudyDesign(filtering=filtering),
    ).selection


def test_filters_are_compared_with_all_data_random_control_and_balance_score() -> None:
    table = filtered()
    assert table is not None
    assert table["comparison"].tolist() == [
        "joint on gmm against joint on all (all data)",
        "joint on gmm against joint on best (filtering by the balance score)",
        "joint on gmm against joint on random-like-gmm (the random control)",
        "joint: finetune.keep_posterior=0.5 on all against joint on all (all data)",
        "joint: finetune.keep_posterior=0.5 on all against joint on best (filtering by the balance score)",
    ]
    assert table["p_holm"].tolist() == holm(table["p"].tolist())
    assert set(table["verdict"]) == {"helps"}
    one = filtered(seeds=1)
    assert one is not None
    assert set(one["verdict"]) == {"no verdict"}
