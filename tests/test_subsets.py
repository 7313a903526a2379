"""Laws of the subsets: who prefers what is a partition, thresholds nest, and modalities can be swapped."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.errors import ConfigError, ManifestError
from mmaudit.audit.score import ScoreTable
from mmaudit.rebalance.manifest import Selection, make_manifest
from mmaudit.rebalance.subsets import by_mixture, parse_dominated, parse_subset, preferred, within
from mmaudit.train.evaluate import subsets

Floats = NDArray[np.float32]
NAMES = ("audio", "visual", "text")

# Ties, thresholds and what float32 makes of them, besides any other confidence.
CONFIDENCE = st.one_of(st.sampled_from([0.0, 0.2, 0.4, 0.5, 1.0]), st.floats(0, 1, width=32))


def confidences(m: int) -> st.SearchStrategy[Floats]:
    row = st.lists(CONFIDENCE, min_size=m, max_size=m)
    return st.lists(row, min_size=1, max_size=30).map(lambda rows: np.array(rows, dtype=np.float32))


def table(confidence: Any, **more: Any) -> ScoreTable:
    values = np.array(confidence, dtype=np.float32)
    n = len(values)
    return ScoreTable(
        sample_id=np.array([f"s{number}" for number in range(n)], dtype=object),
        label=np.zeros(n, np.int32),
        label_name=np.array(["a"] * n, dtype=object),
        modalities=NAMES[: values.shape[1]],
        confidence=values,
        **more,
    )


ONE = table([[0.9, 0.1]])
THREE = table([[0.9, 0.1, 0.5]])


@given(confidences(2))
def test_the_preferred_are_disjoint_and_ties_are_in_neither(confidence: Floats) -> None:
    scores = table(confidence)
    audio, visual = (preferred(scores, name).keep for name in ("audio", "visual"))
    assert audio.tolist() == (confidence[:, 0] > confidence[:, 1]).tolist()
    assert visual.tolist() == (confidence[:, 1] > confidence[:, 0]).tolist()
    assert (~audio & ~visual).tolist() == (confidence[:, 0] == confidence[:, 1]).tolist()


@given(confidences(3))
def test_of_three_a_modality_is_against_the_mean_of_the_others(confidence: Floats) -> None:
    scores = table(confidence)
    for index, name in enumerate(NAMES):
        others = np.delete(confidence.astype(np.float64), index, axis=1).mean(axis=1)
        clear = np.abs(confidence[:, index] - others) > 1e-6
        expected = confidence[:, index] > others
        assert preferred(scores, name).keep[clear].tolist() == expected[clear].tolist()


@given(confidences(3))
def test_between_names_both_sides(confidence: Floats) -> None:
    scores = table(confidence)
    first, second = (preferred(scores, name, between="visual:text").keep for name in ("visual", "text"))
    assert first.tolist() == (confidence[:, 1] > confidence[:, 2]).tolist()
    assert second.tolist() == (confidence[:, 2] > confidence[:, 1]).tolist()
    with pytest.raises(ConfigError, match=r"no modality 'audio' to prefer; .*visual, text"):
        preferred(scores, "audio", between="visual:text")


@given(confidences(3), st.lists(st.sampled_from([None, 0, 1, 2]), min_size=30, max_size=30))
def test_who_lacks_the_modality_is_never_kept_and_others_are_as_without_it(
    confidence: Floats, missing: list[int | None]
) -> None:
    """Of three, a sample without one is a sample of two; without the one that is asked for it is out."""
    holed = confidence.copy()
    for row, gone in enumerate(missing[: len(holed)]):
        if gone is not None:
            holed[row, gone] = np.nan
    scores = table(holed)
    for index, name in enumerate(NAMES):
        expected = []
        for row in holed.astype(np.float64):
            others = np.delete(row, index)
            expected.append(bool(row[index] > np.mean(others[~np.isnan(others)])))
        keep = preferred(scores, name).keep
        others = np.delete(holed.astype(np.float64), index, axis=1)
        clear = ~(np.abs(holed[:, index] - np.nanmean(others, axis=1)) < 1e-6)
        assert keep[clear].tolist() == np.array(expected)[clear].tolist()
    for selection, pair in (
        (preferred(scores, "audio"), [0]),
        (preferred(scores, "text", threshold=0.2, between="text:audio"), [2, 0]),
        (within(scores, threshold=0.9, between="audio:visual"), [0, 1]),
    ):
        lacks = np.isnan(holed[:, pair]).any(axis=1)
        assert not (selection.keep & lacks).any()
        if selection.keep.any():
            rows = make_manifest(scores, selection)[1].to_pylist()
            told = {row["sample_id"] for row in rows if row["reason"] == "missing-modality"}
            assert told == set(scores.sample_id[lacks])
            assert all((row["score"] is None) == (row["sample_id"] in told) for row in rows)


@given(confidences(2), st.lists(st.floats(0, 0.99), min_size=2, max_size=5))
def test_the_dominated_nest_by_threshold(confidence: Floats, thresholds: list[float]) -> None:
    scores = table(confidence)
    for name in ("audio", "visual"):
        kept = [preferred(scores, name, threshold=threshold).keep for threshold in [0.0, *sorted(thresholds)]]
        assert all((small <= large).all() for large, small in pairwise(kept))
    inner = [within(scores, threshold=threshold).keep for threshold in sorted(thresholds)]
    assert all((small <= large).all() for small, large in pairwise(inner))


@given(confidences(2), st.sampled_from([0.2, 0.4, 0.3]))
def test_within_and_the_dominated_are_a_partition(confidence: Floats, threshold: float) -> None:
    scores = table(confidence)
    parts = [within(scores, threshold=threshold)]
    parts += [preferred(scores, name, threshold=threshold) for name in ("audio", "visual")]
    assert np.sum([part.keep for part in parts], axis=0).tolist() == [1] * len(scores)


@given(confidences(2))
def test_swapping_two_modalities_swaps_their_subsets(confidence: Floats) -> None:
    scores = table(confidence)
    swapped = replace(scores, confidence=confidence[:, ::-1])
    for threshold in (0.0, 0.2):
        one, other = (preferred(scores, name, threshold=threshold).keep for name in ("audio", "visual"))
        assert preferred(swapped, "visual", threshold=threshold).keep.tolist() == one.tolist()
        assert preferred(swapped, "audio", threshold=threshold).keep.tolist() == other.tolist()
    assert within(swapped).keep.tolist() == within(scores).keep.tolist()


@given(confidences(2))
def test_evaluation_cuts_the_same_subsets(confidence: Floats) -> None:
    scores = table(confidence)
    found = subsets(scores.discrepancy().astype(np.float64), first="audio", second="visual")
    for name in ("audio", "visual"):
        for threshold, called in ((0.0, "preferred"), (0.2, "dominated-0.2"), (0.4, "dominated-0.4")):
            selection = preferred(scores, name, threshold=threshold)
            assert selection.name == f"{name}-{called}"
            assert found[selection.name].tolist() == selection.keep.tolist()
    assert found[within(scores).name].tolist() == within(scores).keep.tolist()


# By reason: how its selection is made, and what is true of score and threshold of whoever it drops.
RULES: dict[str, tuple[Callable[[ScoreTable], Selection], Callable[[float, float], bool]]] = {
    "discrepancy-too-low": (lambda scores: preferred(scores, "visual", threshold=0.2), operator.le),
    "discrepancy-too-large": (lambda scores: within(scores, threshold=0.2), operator.gt),
    "posterior-too-low": (lambda scores: by_mixture(scores, "balanced"), operator.lt),
    "posterior-too-high": (lambda scores: by_mixture(scores, "imbalanced"), operator.ge),
}


@pytest.mark.parametrize("reason", RULES)
@settings(deadline=None, max_examples=40)
@given(confidences(2), st.data())
def test_the_dropped_are_on_the_wrong_side_of_their_threshold(
    reason: str, confidence: Floats, data: st.DataObject
) -> None:
    posterior = data.draw(st.lists(CONFIDENCE, min_size=len(confidence), max_size=len(confidence)))
    scores = table(confidence, p_balanced=np.array(posterior, np.float32))
    select, is_wrong = RULES[reason]
    selection = select(scores)
    if not selection.keep.any():
        with pytest.raises(ManifestError, match=f"{selection.name}: none of the {len(scores)} scored samples"):
            make_manifest(scores, selection)
        return
    dropped = make_manifest(scores, selection)[1].to_pylist()
    assert [row["sample_id"] for row in dropped] == scores.sample_id[~selection.keep].tolist()
    assert all(row["reason"] == reason and is_wrong(row["score"], row["threshold"]) for row in dropped)


def test_the_threshold_itself_is_within() -> None:
    scores = table([[0.5, 0.25], [0.25, 0.5], [0.5, 0.2]])
    assert within(scores, threshold=0.25).keep.tolist() == [True, True, False]
    assert preferred(scores, "audio", threshold=0.25).keep.tolist() == [False, False, True]


def test_the_mixture_parts_by_its_posterior() -> None:
    posterior = np.array([0, 0.49, 0.5, 0.51, 1], np.float32)
    scores = table([[0.5, 0.5]] * 5, p_balanced=posterior)
    assert by_mixture(scores, "balanced").keep.tolist() == [False, False, True, True, True]
    assert by_mixture(scores, "imbalanced").keep.tolist() == [True, True, False, False, False]
    assert by_mixture(scores, "balanced", posterior=0.75).keep.tolist() == [False] * 4 + [True]


def test_a_side_of_the_mixture_must_be_there() -> None:
    with pytest.raises(ConfigError, match=r"--gmm balancd: .* did you mean balanced\? .*imbalanced"):
        by_mixture(replace(ONE, p_balanced=np.ones(1, np.float32)), "balancd")
    with pytest.raises(ManifestError, match="no p_balanced: rescore with mmaudit score"):
        by_mixture(ONE, "balanced")


def test_texts_name_subsets() -> None:
    scores = table([[0.9, 0.1], [0.6, 0.5], [0.1, 0.9], [0.1, 0.2]])
    assert parse_subset(scores, "audio-preferred").keep.tolist() == [True, True, False, False]
    assert parse_subset(scores, "visual-preferred").keep.tolist() == [False, False, True, True]
    assert parse_subset(scores, "balanced").keep.tolist() == [False, True, False, True]
    assert parse_subset(scores, "balanced:0.9").keep.all()
    assert parse_dominated(scores, "visual:0.2").keep.tolist() == [False, False, True, False]
    assert parse_dominated(scores, "visual:0").name == "visual-preferred"


@pytest.mark.parametrize(
    ("scores", "text", "words"),
    [
        (ONE, "visul-preferred", r"did you mean visual-preferred\? .*audio-preferred, visual-preferred, balanced"),
        (THREE, "txt-preferred", r"did you mean text-preferred\?"),
        (ONE, "text-preferred", "no such subset; .*audio-preferred, visual-preferred, balanced"),
        (ONE, "", "there are: audio-preferred"),
        (ONE, "balanced:x", "--subset balanced:x: 'x' is not a number"),
        (ONE, "balanced:1.5", r"threshold of the balanced subset is 1.5; it lies in \[0, 1\]"),
        (ONE, "balanced:-1", r"threshold of the balanced subset is -1.0"),
        (ONE, "balanced:nan", r"threshold of the balanced subset is nan"),
        (ONE, "audio-preferred:0.3", "takes no threshold; that is --dominated audio:0.3"),
    ],
)
def test_a_wrong_subset_names_the_right_ones(scores: ScoreTable, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_subset(scores, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("visual", "--dominated visual: not of the form MODALITY:T, such as audio:0.2"),
        ("visul:0.2", r"no modality 'visul' to prefer; did you mean visual\?"),
        ("visual:much", "--dominated visual:much: 'much' is not a number"),
        ("visual:", "'' is not a number"),
        ("visual:1", r"threshold of a dominated subset is 1.0; it lies in \[0, 1\)"),
        ("visual:-0.1", "threshold of a dominated subset is -0.1"),
        ("visual:nan", "threshold of a dominated subset is nan"),
    ],
)
def test_a_wrong_domination_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_dominated(ONE, text)


def test_a_wrong_between_names_the_modalities() -> None:
    with pytest.raises(ConfigError, match=r"--between audio:visul: no modality 'visul'; did you mean visual\?"):
        preferred(ONE, "audio", between="audio:visul")
