"""The sentences of the report: what is claimed of the set, of this sample only, and not at all."""

from __future__ import annotations

from typing import Any

import pytest

from mmaudit.cli.report.verdict import plain, probe_metric, verdict

NAMES = ("audio", "image")


def interval(mean: float, half_width: float) -> dict[str, float]:
    return {"mean": mean, "share": mean, "low": mean - half_width, "high": mean + half_width}


def numbers_of(lean: float, *, beats_prior: tuple[bool, ...] = (True, True), **changes: Any) -> dict[str, Any]:
    """Return numbers of a report of two modalities with this lean, of an interval of 0.1 for these probes."""
    pair = {
        "positive_side": "audio",
        "negative_side": "image",
        "share_ahead": interval(0.4, 0.05),
        "share_behind": interval(0.4 - lean, 0.05),
        "share_level": interval(0.2 + lean, 0.05),
        "lean": interval(lean, 0.1),
        "of_sets": None,
    }
    probes = [{"name": name, "beats_prior": beats} for name, beats in zip(NAMES, beats_prior, strict=True)]
    gap = {"bimodal": True, "share_balanced": None, "ashman_d": 3.1, "dip": 0.05, "dip_p": 0.001, "class_check": "None"}
    return {
        "facts": {
            "modalities": [{"name": name} for name in NAMES],
            "balanced_margin": 0.2,
            "counts": {"input": 300, "scored": 300, "quarantined": 0},
            "num_groups": None,
            "learn_from": "train",
        },
        "probe_report": {
            "probe_metrics": [*probes, {"name": "fused", "beats_prior": True}],
            "metric": "accuracy",
            "chance": {"uniform": 0.25, "majority": 0.25},
            "gain_over_best": {"name": "audio", "gain": 0.0, "low": -0.1, "high": 0.1},
            "controls": [],
        },
        "discrepancy": [pair],
        "gap": gap,
        "balanced_side": {"n": 100, "all_correct": 0.3, "all_wrong": 0.46},
        "margin_check": {"num_permutations": 20, "num_bimodal": 20, "survives": True},
        "halves": {"num_rows": 300, "reason": "", "reliability": [{"modality": "audio", "r": 0.57, "z": 21.0}]},
        "bisections": None,
        "label_leaks": [],
        **changes,
    }


def of_sets(numbers: dict[str, Any], half_width: float) -> dict[str, Any]:
    """Add intervals over bisections of this half-width."""
    pair = numbers["discrepancy"][0]
    pair["of_sets"] = {key: interval(pair[key]["mean"], half_width) for key in ("share_ahead", "share_behind", "lean")}
    numbers["bisections"] = {"num_rows": 300, "reason": "", "errors": [{"modality": "audio"}]}
    return numbers


def test_without_bisections_a_lean_is_of_these_probes_on_this_sample() -> None:
    report = verdict(numbers_of(0.15))
    assert report["headline"] == ("For these probes, on this sample: the samples lean towards audio, away from image")
    assert any("two to three times as wide; it is measured by score --thorough" in text for text in report["warnings"])
    assert verdict(numbers_of(0.05))["headline"].endswith("no clear lean between audio and image")


@pytest.mark.parametrize(
    ("lean", "half_width", "headline"),
    [
        (0.15, 0.3, "No clear lean between audio and image"),
        (0.15, 0.12, "The set leans towards audio, away from image"),
        (-0.35, 0.3, "The set leans strongly towards image, away from audio"),
    ],
)
def test_with_bisections_the_wider_interval_decides(lean: float, half_width: float, headline: str) -> None:
    report = verdict(of_sets(numbers_of(lean), half_width))
    assert report["headline"] == headline
    assert not any("--thorough" in text for text in report["warnings"])


def test_an_interval_from_a_sample_is_stated() -> None:
    numbers = of_sets(numbers_of(0.15), 0.1)
    assert not any("bisections of a random" in text for text in verdict(numbers)["warnings"])
    numbers["bisections"]["num_rows"] = 200
    assert any("bisections of a random 200 of the samples" in text for text in verdict(numbers)["warnings"])


def test_why_bisections_are_missing_is_stated() -> None:
    bisections = {"num_rows": 0, "reason": "too few groups", "errors": []}
    report = verdict(numbers_of(0.15, bisections=bisections))
    assert report["headline"].startswith("For these probes, on this sample")
    assert any("it is not measured, since too few groups" in text for text in report["warnings"])


def test_nothing_can_be_read_where_no_probe_beats_the_prior() -> None:
    """A set of 28 samples at chance was reported to be balanced."""
    report = verdict(of_sets(numbers_of(0.3, beats_prior=(False, False)), 0.1))
    assert report["headline"].startswith("Nothing can be read from these scores")
    assert (
        sum("not shown to be better than always guessing the majority class" in text for text in report["warnings"])
        == 2
    )
    assert not verdict(numbers_of(0.3, beats_prior=(True, False)))["headline"].startswith("Nothing")


def test_numbers_that_round_to_zero_have_no_sign() -> None:
    assert [plain(value) for value in (-0.004, 0.0, -0.006, 1.0)] == ["0.00", "0.00", "−0.01", "1.00"]
    assert probe_metric({"value": 0.003, "low": -0.0001, "high": 0.006}, "accuracy") == "0.3 [0.0, 0.6]"


def test_a_warning_of_several_modalities_bounds_the_reliability_of_all() -> None:
    rows = [{"modality": name, "r": r, "z": z} for name, r, z in (("audio", -0.02, -0.6), ("image", 0.04, 1.3))]
    noise = {"num_rows": 300, "reason": "", "reliability": rows}
    numbers = numbers_of(0.0, halves=noise)
    numbers["discrepancy"] *= 2
    numbers["discrepancy"] = [{**pair, "share_ahead": interval(0.4, 0.05)} for pair in numbers["discrepancy"]]
    (text,) = [
        text
        for text in verdict({**numbers, "share_without_leader": interval(0.2, 0.1)})["warnings"]
        if "halves" in text
    ]
    assert text.startswith("The discrepancies of single samples are not shown to be real for audio and image: by two")
    assert "(r at most 0.04, z at most 1.3)" in text
    (pair,) = [
        text
        for text in verdict(numbers_of(0.0, halves=noise | {"reliability": rows[:1]}))["warnings"]
        if "halves" in text
    ]
    assert "(r = −0.02, z = −0.6)" in pair


def test_the_reliability_is_stated_and_its_absence_warned_of() -> None:
    assert any("r = 0.57 (z = 21.0); 0 is noise" in text for text in verdict(numbers_of(0.0))["sentences"])
    noise = {"num_rows": 200, "reason": "", "reliability": [{"modality": "audio", "r": 0.02, "z": 0.4}]}
    report = verdict(numbers_of(0.0, halves=noise))
    assert any("on a sample of 200" in text for text in report["sentences"])
    assert any("not shown to be real: by two halves" in text for text in report["warnings"])
    for halves, reason in ((None, "probe.halves is off"), ({**noise, "reliability": [], "reason": "why"}, "why")):
        report = verdict(numbers_of(0.0, halves=halves))
        assert any(f"was not measured: {reason}" in text for text in report["sentences"])


def test_modes_are_attributed_to_the_margins_or_the_pairing() -> None:
    text = " ".join(verdict(numbers_of(0.0))["sentences"])
    assert "two or more modes (Ashman's D 3.10, dip 0.050, p ≤ 0.001)" in text
    assert "30% are right by both modalities and 46% wrong by both modalities" in text
    assert "remain in 20 of 20 random pairings" in text
    paired = {"num_permutations": 20, "num_bimodal": 1, "survives": False}
    text = " ".join(verdict(numbers_of(0.0, margin_check=paired))["sentences"])
    assert "remain in only 1 of 20 random pairings" in text


def test_of_several_modalities_the_wider_intervals_decide() -> None:
    numbers = numbers_of(0.0)
    rows = [
        {**numbers["discrepancy"][0], "positive_side": name, "share_ahead": interval(ahead, 0.03), "of_sets": None}
        for name, ahead in (("audio", 0.4), ("image", 0.3), ("text", 0.1))
    ]
    numbers |= {"discrepancy": rows, "share_without_leader": interval(0.2, 0.1)}
    assert verdict(numbers)["headline"].startswith(
        "For these probes, on this sample: of 3 modalities, audio stands out"
    )
    for row in rows:
        row["of_sets"] = {key: interval(row[key]["mean"], 0.06) for key in ("share_ahead", "share_behind", "lean")}
    numbers["bisections"] = {"num_rows": 300, "reason": "", "errors": [{"modality": "audio"}]}
    assert verdict(numbers)["headline"].startswith("Of 3 modalities, audio and image stand out most often")
