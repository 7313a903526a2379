"""Sentences of the report that follow from its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Found = Mapping[str, Any]

STRONG = 0.2  # difference of two shares from which a lean is called strong ...
SLIGHT = 0.05  # ... and below which it is called slight, however certain; both are ours
MANY = 0.02  # share of quarantined samples from which the verdict says so


def verdict(numbers: Found) -> dict[str, Any]:
    """Give one headline, the sentences beneath it, and the doubts that a reader must know."""
    several = len(numbers["discrepancy"]) > 1
    return {
        "headline": _headline_of_many(numbers) if several else _headline(numbers["discrepancy"][0]),
        "sentences": [_shares_of_many(numbers) if several else _shares(numbers), _gain(numbers), _bimodal(numbers)],
        "doubts": [
            *_leaks(numbers),
            *_left_out(numbers),
            *_weak_probes(numbers),
            *_groups(numbers),
            *_test_labels(numbers),
        ],
    }


def percent(value: float) -> str:
    """Write a share: 0.361 as 36%; with a decimal near an end, and an end only where it is reached."""
    if 1e-9 < value < 0.0005:
        return "<0.1%"
    if 0.9995 < value < 1 - 1e-9:
        return ">99.9%"
    near = 0.0005 <= value < 0.0995 or 0.9905 < value <= 0.9995
    return f"{100 * value:.{1 if near else 0}f}%"


def interval(found: Found) -> str:
    """Write a share with its interval."""
    return f"{percent(found['share'])} [{percent(found['low'])}, {percent(found['high'])}]"


def signed(value: float, digits: int = 2) -> str:
    """Write a number with its sign, and a minus as long as the plus."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def small(p: float) -> str:
    """Write a p value; none below 0.001 is tabled."""
    return "≤ 0.001" if p < 0.0015 else f"{p:.3f}"


def _headline(found: Found) -> str:
    """Say which of two modalities carries more samples, if the interval of the difference leaves out 0."""
    lean, right, left = found["lean"], found["right"], found["left"]
    if lean["low"] <= 0 <= lean["high"]:
        return f"No clear lean between {right} and {left}"
    ahead, behind = (right, left) if lean["mean"] > 0 else (left, right)
    size = abs(lean["mean"])
    how = " strongly" if size > STRONG else " slightly" if size < SLIGHT else ""
    return f"The set leans{how} towards {ahead}, away from {behind}"


def _shares(numbers: Found) -> str:
    found, within = numbers["discrepancy"][0], numbers["facts"]["within"]
    return (
        f"Of the samples, {interval(found['share_right'])} are carried by {found['right']} alone or nearly so (its "
        f"probe gives the true class at least {within:g} more than the other one), {interval(found['share_left'])} by "
        f"{found['left']}. On the remaining {interval(found['share_level'])} the two are about level: both sure, or "
        f"neither."
    )


def _headline_of_many(numbers: Found) -> str:
    several = len(numbers["discrepancy"])
    ahead, behind = _foremost(numbers, "share_right"), _foremost(numbers, "share_left")
    if ahead[0]["share_right"]["share"] < SLIGHT:
        return f"None of {several} modalities stands out on more than a few samples"
    names = [found["right"] for found in ahead]
    if len(names) == several:
        return f"No clear order among {several} modalities"
    told = f"Of {several} modalities, {_listed(names)} {'stands' if len(names) == 1 else 'stand'} out most often"
    return f"{told}; {behind[0]['right']} falls behind most often" if len(behind) == 1 else told


def _foremost(numbers: Found, key: str) -> list[Found]:
    """Give the modality with the largest share, first, and those whose intervals reach into its own."""
    ranked = sorted(numbers["discrepancy"], key=lambda found: -found[key]["share"])
    return [found for found in ranked if found[key]["high"] >= ranked[0][key]["low"]]


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _shares_of_many(numbers: Found) -> str:
    within = numbers["facts"]["within"]
    ahead, behind = (_foremost(numbers, key)[0] for key in ("share_right", "share_left"))
    return (
        f"On {interval(ahead['share_right'])} of the samples, {ahead['right']} gives the true class at least "
        f"{within:g} more than the others do on average. On {interval(behind['share_left'])}, {behind['right']} gives "
        f"it at least {within:g} less. On {interval(numbers['none_ahead'])} no modality is that far ahead."
    )


def _gain(numbers: Found) -> str:
    probe_report = numbers["probe_report"]
    gain, what = probe_report["gain_over_best"], probe_report["metric"]
    best, scale = gain["name"], (1, "") if what == "R^2" else (100, " points")
    points, low, high = (signed(scale[0] * gain[key], 1 if scale[0] == 100 else 2) for key in ("gain", "low", "high"))
    points = f"{points}{scale[1]} [{low}, {high}]"
    if gain["low"] > 0:
        return f"Using all modalities together gains {points} of {what} over {best} alone, the best single one."
    if gain["high"] < 0:
        return f"Using all modalities together loses {points} of {what} against {best} alone, the best single one."
    return f"That all modalities together beat {best} alone, the best single one, is not shown: {points} of {what}."


def _bimodal(numbers: Found) -> str:
    gap = numbers["gap"]
    balanced = gap["share_balanced"]
    count = "" if balanced is None else f"; by it {interval(balanced)} of the samples are balanced"
    if gap["bimodal"]:
        return (
            f"The modality gap is bimodal (Ashman's D {gap['ashman_d']:.2f}, p of the dip {small(gap['dip_p'])}), so "
            f"that the mixture's posterior says which samples are balanced{count}. Is it only "
            f"the classes? {gap['class_check']}."
        )
    rule = f"a plain rule is used instead of a posterior: balanced is a gap of at most {gap['threshold']:g}{count}."
    reasons = "; ".join(gap["reasons"])
    if gap["components"] is None:
        return f"No mixture could be fitted to the modality gap: {reasons}. So {rule}"
    return f"The modality gap is not bimodal: {reasons}. There are no two groups to be told apart, and {rule}"


def _left_out(numbers: Found) -> list[str]:
    """Warn where what could not be scored may tell another story than what could."""
    counts = numbers["facts"]["counts"]
    if counts["quarantined"] <= MANY * counts["input"]:
        return []
    return [
        f"{counts['quarantined']:,} of {counts['input']:,} samples could not be scored and are quarantined. All that "
        f"is said here is about the other {counts['scored']:,}."
    ]


def _weak_probes(numbers: Found) -> list[str]:
    """Name the probes that are not shown to be better than always naming the most common class."""
    probe_report = numbers["probe_report"]
    chance = percent(probe_report["chance"]) if probe_report["metric"] != "R^2" else "R^2 of 0"
    weak = [
        each["name"]
        for each in probe_report["probe_metrics"]
        if each["low"] <= probe_report["chance"] and each["name"] != "fused"
    ]
    return [
        f"The probe on {name} is not shown to be better than chance ({chance}): either {name} says nothing "
        f"about these labels, or the probe cannot read it. Its discrepancies say little."
        for name in weak
    ]


def _leaks(numbers: Found) -> list[str]:
    """Warn where a probe on shuffled labels is above chance: it must have been told them some other way."""
    return [
        f"LEAK: a probe on {each['name']} that learned shuffled labels is right on {percent(each['value'])} of samples "
        f"it never saw, above chance ({percent(each['chance'])}). Something else than the samples tells the labels: "
        f"do not trust the scores."
        for each in numbers["probe_report"]["controls"]
        if each["leaks"]
    ]


def _groups(numbers: Found) -> list[str]:
    facts = numbers["facts"]
    if facts["groups"] is None:
        return []
    return [
        f"The samples belong to {facts['groups']} groups ({facts['group_column']}), and no probe scored a group it had "
        f"learned from. The intervals allow for the groups."
    ]


def _test_labels(numbers: Found) -> list[str]:
    if numbers["facts"]["learn_from"] == "train":
        return []
    return [
        "The probes learned from the labels of test samples too (never of the sample they score). For a clean "
        "comparison of trainings on these manifests, score with --learn-from train."
    ]
