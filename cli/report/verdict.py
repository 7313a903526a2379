"""Findings in words: numbers as text, and the sentences of the report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup, escape

MAX_SHORT = 16  # characters of a name that never breaks
MAX_UNBROKEN = 24  # characters of a name without a line break; words of no language are much longer
_BREAKS = re.compile(r"(?<=[/_\-])(?![/_.\-])|(?<=\.)(?![/_.\-\d])")  # not within 0.2


def breakable(name: object) -> Markup:
    """Return a name as HTML that breaks like a sentence; a long one is in a span of class `long`, of minimum width."""
    text = breakable_sentence(name)
    return text if len(str(name)) <= MAX_SHORT else Markup('<span class="long">{}</span>').format(text)


def breakable_sentence(sentence: object) -> Markup:
    """Return text as HTML that may break at spaces, after / _ . - and within parts of more than 24 characters.

    A word of up to 16 characters never breaks, nor does a number at its decimal point.
    """
    words = re.split(r"( +)", str(sentence))
    return Markup("").join(Markup("<wbr>").join(escape(part) for part in _parts(word)) for word in words)


def _parts(word: str) -> list[str]:
    """Cut a word where a line may break."""
    if len(word) <= MAX_SHORT:
        return [word]
    parts = _BREAKS.split(word)
    return [part[start : start + MAX_UNBROKEN] for part in parts for start in range(0, len(part), MAX_UNBROKEN)]


def percent(value: float) -> str:
    """Format a share, 0.361 as 36%: with a decimal near 0 and 1; 0% and 100% only if exact."""
    if 1e-9 < value < 0.0005:
        return "<0.1%"
    if 0.9995 < value < 1 - 1e-9:
        return ">99.9%"
    near = 0.0005 <= value < 0.0995 or 0.9905 < value <= 0.9995
    return f"{100 * value:.{1 if near else 0}f}%"


def interval(numbers: Mapping[str, Any]) -> str:
    """Format a share with its interval."""
    return f"{percent(numbers['share'])} [{percent(numbers['low'])}, {percent(numbers['high'])}]"


def signed(value: float, digits: int = 2) -> str:
    """Format a number with its sign; the minus sign is U+2212."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def plain(value: float, digits: int = 2) -> str:
    """Format a number; the minus sign is U+2212, and what rounds to 0 has none."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def small(p: float) -> str:
    """Format a p value; the table of the dip test ends at 0.001."""
    return "≤ 0.001" if p < 0.0015 else f"{p:.3f}"


def tested(metrics: Mapping[str, Any], key: str) -> str:
    """Format a test metric with its interval, if it has one: a share in percent, an error in the data's units."""
    value, low, high = (metrics.get(name) for name in (key, f"{key}_low", f"{key}_high"))
    if value is None:
        return "–"
    factor, digits = (1, 3) if key == "mae" else (100, 1)
    interval = "" if low is None or high is None else f" [{factor * low:.{digits}f}, {factor * high:.{digits}f}]"
    return f"{factor * value:.{digits}f}{interval}"


def level_of_chance(level: float, key: str) -> str:
    """Format a metric of guessing as `tested` does."""
    return tested({key: level}, key)


def probe_metric(probe: Mapping[str, Any], metric: str) -> str:
    """Format a probe's metric with its interval: a share in percent, R^2 unscaled."""
    scale, digits = (1, 2) if metric == "R^2" else (100, 1)
    value, low, high = (plain(scale * probe[key], digits) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def gain(numbers: Mapping[str, Any], metric: str) -> str:
    """Format a gain with its interval: of a share in points, of R^2 unscaled."""
    scale, digits = (1, 2) if metric == "R^2" else (100, 1)
    value, low, high = (signed(scale * numbers[key], digits) for key in ("gain", "low", "high"))
    return f"{value}{'' if metric == 'R^2' else ' points'} [{low}, {high}]"


def amount(value: float) -> str:
    """Format a fractional count, below 10 with one decimal."""
    return f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"


def edge(value: float) -> str:
    """Format the edge of a bin with at most four decimals, and a minus sign U+2212."""
    return f"{round(value, 4) + 0.0:g}".replace("-", "−")


Section = Mapping[str, Any]

STRONG = 0.2  # difference of two shares above which a lean is called strong; mmaudit's own, as is SLIGHT
SLIGHT = 0.05  # difference below which a lean is called slight, whatever its interval
MANY = 0.02  # share of quarantined samples above which a warning is added
MIN_Z = 3.0  # of a reliability, below which a discrepancy is not shown to be real; mmaudit's own
SCOPE = "For these probes, on this sample"  # of claims whose interval does not hold for other samples


def verdict(numbers: Section) -> dict[str, Any]:
    """Return the headline, its sentences, and the warnings (`warnings`)."""
    several = len(numbers["discrepancy"]) > 1
    warnings = (_leaks, _left_out, _weak_probes, _unreliable, _scope, _sample, _appended, _groups, _test_labels)
    shares = _shares_of_many(numbers) if several else _shares(numbers)
    return {
        "headline": _headline(numbers),
        "sentences": [shares, _gain(numbers), _bimodal(numbers), *_reliability(numbers)],
        "warnings": [text for warn in warnings for text in warn(numbers)],
    }


def _headline(numbers: Section) -> str:
    """Return what the scores say of the set, or of these probes on this sample without intervals for other samples."""
    modalities = [modality["name"] for modality in numbers["facts"]["modalities"]]
    probes = [probe for probe in numbers["probe_report"]["probe_metrics"] if probe["name"] in modalities]
    if not any(probe["beats_prior"] for probe in probes):
        return "Nothing can be read from these scores: no probe is shown to be better than the most common class"
    several = len(numbers["discrepancy"]) > 1
    claim = _headline_of_many(numbers) if several else _lean(numbers["discrepancy"][0])
    if _has_bisections(numbers):
        return claim
    return f"{SCOPE}: {claim[0].lower()}{claim[1:]}"


def _has_bisections(numbers: Section) -> bool:
    return bool(numbers["bisections"] and numbers["bisections"]["errors"])


def _lean(pair: Section) -> str:
    """Return which of two modalities carries more samples, if the interval of the difference excludes 0."""
    lean, positive_side, negative_side = pair["lean"], pair["positive_side"], pair["negative_side"]
    lean = pair["of_sets"]["lean"] if pair["of_sets"] else lean
    if lean["low"] <= 0 <= lean["high"]:
        return f"No clear lean between {positive_side} and {negative_side}"
    stronger, weaker = (positive_side, negative_side) if lean["mean"] > 0 else (negative_side, positive_side)
    size = abs(lean["mean"])
    degree = " strongly" if size > STRONG else " slightly" if size < SLIGHT else ""
    subject = "The set leans" if pair["of_sets"] else "The samples lean"
    return f"{subject}{degree} towards {stronger}, away from {weaker}"


def _shares(numbers: Section) -> str:
    pair, margin = numbers["discrepancy"][0], numbers["facts"]["balanced_margin"]
    ahead, behind = interval(pair["share_ahead"]), interval(pair["share_behind"])
    return (
        f"Of the samples, {ahead} are carried by {pair['positive_side']} alone or nearly so (the confidence of its "
        f"probe in the true class is higher by at least {margin:g}), {behind} by {pair['negative_side']}. On the other "
        f"{interval(pair['share_level'])} the two are about level."
    )


def _headline_of_many(numbers: Section) -> str:
    several = len(numbers["discrepancy"])
    leading, trailing = (_leading(numbers, key) for key in ("share_ahead", "share_behind"))
    if leading[0]["share_ahead"]["share"] < SLIGHT:
        return f"None of {several} modalities stands out on more than a few samples"
    names = [modality["positive_side"] for modality in leading]
    if len(names) == several:
        return f"No clear order among {several} modalities"
    sentence = f"Of {several} modalities, {_listed(names)} {'stands' if len(names) == 1 else 'stand'} out most often"
    return f"{sentence}; {trailing[0]['positive_side']} falls behind most often" if len(trailing) == 1 else sentence


def _leading(numbers: Section, key: str) -> list[Section]:
    """Return the modality with the largest share, and those whose intervals overlap its interval.

    The intervals are those for other samples where bisections were audited.
    """

    def bound(modality: Section, end: str) -> float:
        return float((modality["of_sets"] or modality)[key][end])

    ranked = sorted(numbers["discrepancy"], key=lambda modality: -modality[key]["share"])
    return [modality for modality in ranked if bound(modality, "high") >= bound(ranked[0], "low")]


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _shares_of_many(numbers: Section) -> str:
    margin = numbers["facts"]["balanced_margin"]
    leading, trailing = (_leading(numbers, key)[0] for key in ("share_ahead", "share_behind"))
    return (
        f"On {interval(leading['share_ahead'])} of the samples, the confidence of {leading['positive_side']} in the "
        f"true class is at least {margin:g} above the mean of the others. On {interval(trailing['share_behind'])}, "
        f"that of {trailing['positive_side']} is at least {margin:g} below it. On "
        f"{interval(numbers['share_without_leader'])} no modality is that far ahead. The first two shares overlap: on "
        f"a sample, one modality may be ahead and another behind."
    )


def _gain(numbers: Section) -> str:
    probe_report = numbers["probe_report"]
    over_best, metric = probe_report["gain_over_best"], probe_report["metric"]
    best, points = over_best["name"], gain(over_best, metric)
    if over_best["low"] > 0:
        return f"All modalities together are better than {best} alone, the best single one: {points} of {metric}."
    if over_best["high"] < 0:
        return f"All modalities together are worse than {best} alone, the best single one: {points} of {metric}."
    return f"That all modalities together beat {best} alone, the best single one, is not shown: {points} of {metric}."


def _bimodal(numbers: Section) -> str:
    gap = numbers["gap"]
    balanced = gap["share_balanced"]
    count = "" if balanced is None else f"; by it {interval(balanced)} of the samples are balanced"
    if gap["bimodal"]:
        return (
            f"The modality gap has two or more modes (Ashman's D {gap['ashman_d']:.2f}, dip {gap['dip']:.3f}, p "
            f"{small(gap['dip_p'])}), so the posterior of the mixture defines the balanced samples{count}."
            f"{_balanced_side(numbers)} Class check: {gap['class_check']}.{_margins(numbers)}"
        )
    rule = (
        f"a threshold is used instead of a posterior: balanced is a gap of at most {gap['threshold']:g}{count}."
        f"{_balanced_side(numbers)}"
    )
    reasons = "; ".join(gap["reasons"])
    if gap["components"] is None:
        return f"No mixture could be fitted to the modality gap: {reasons}. So {rule}"
    return f"The modality gap is not bimodal: {reasons}. There are no two groups to separate, and {rule}"


def _balanced_side(numbers: Section) -> str:
    """Return how many of the balanced samples every modality gets right, and how many none does."""
    side, every = numbers["balanced_side"], _every(numbers)
    if side is None:
        return ""
    right, wrong = percent(side["all_correct"]), percent(side["all_wrong"])
    return f" Of these, {right} are right by {every} and {wrong} wrong by {every}."


def _every(numbers: Section) -> str:
    return "both modalities" if len(numbers["facts"]["modalities"]) == 2 else "all modalities"


def _margins(numbers: Section) -> str:
    """Return whether the modes need the pairing of the modalities in a sample."""
    check = numbers["margin_check"]
    if check["num_bimodal"] is None:
        return ""
    counts = f"{check['num_bimodal']} of {check['num_permutations']} random pairings of the modalities within classes"
    if check["survives"]:
        return (
            f" The modes remain in {counts}: they come from how each modality by itself is right or wrong, not from "
            "how the modalities meet in a sample."
        )
    return f" The modes remain in only {counts}: they come from how the modalities meet in a sample."


def _reliability(numbers: Section) -> list[str]:
    """Return how well the discrepancies by two halves of the features agree, or why that was not measured."""
    halves = numbers["halves"]
    if halves is None or halves["reason"]:
        reason = "probe.halves is off" if halves is None else halves["reason"]
        return [f"Whether the discrepancies of single samples are real was not measured: {reason}."]
    rows = halves["reliability"]
    one = f"r = {plain(rows[0]['r'])} (z = {plain(rows[0]['z'], 1)})"
    values = one if len(rows) == 1 else ", ".join(f"{row['modality']} r = {plain(row['r'])}" for row in rows)
    is_sampled = halves["num_rows"] < numbers["facts"]["counts"]["scored"]
    sampled = f" on a sample of {halves['num_rows']:,}" if is_sampled else ""
    return [
        "The discrepancies of single samples by probes of two disjoint halves of the features correlate within classes "
        f"with {values}{sampled}; 0 is noise, 1 the same in both."
    ]


def _unreliable(numbers: Section) -> list[str]:
    """Return a warning for discrepancies on which two halves of the features do not agree."""
    halves = numbers["halves"]
    rows = [] if halves is None else [row for row in halves["reliability"] if row["z"] < MIN_Z]
    if not rows:
        return []
    which = "" if len(numbers["discrepancy"]) == 1 else f" for {_listed([row['modality'] for row in rows])}"
    equals = "=" if len(rows) == 1 else "at most"
    values = ", ".join(f"{key} {equals} {plain(max(row[key] for row in rows), d)}" for key, d in (("r", 2), ("z", 1)))
    return [
        f"The discrepancies of single samples are not shown to be real{which}: by two halves of the features they do "
        f"not agree within classes ({values}). Subsets selected by them are random in part."
    ]


def _scope(numbers: Section) -> list[str]:
    """Return a warning where nothing is claimed of other samples of the same kind."""
    if _has_bisections(numbers):
        num_rows, num_scored = numbers["bisections"]["num_rows"], numbers["facts"]["counts"]["scored"]
        sampled = f"The interval of the headline is from bisections of a random {num_rows:,} of the samples."
        return [sampled] if num_rows < num_scored else []
    reason = numbers["bisections"]["reason"] if numbers["bisections"] else ""
    measured = f"not measured, since {reason}" if reason else "measured by score --thorough"
    return [
        "The headline is on these probes and this sample. For other samples of the same kind the interval is two to "
        f"three times as wide; it is {measured}."
    ]


def _left_out(numbers: Section) -> list[str]:
    """Return a warning if more than 2% of the samples are quarantined and so excluded from all numbers."""
    counts = numbers["facts"]["counts"]
    if counts["quarantined"] <= MANY * counts["input"]:
        return []
    return [
        f"{counts['quarantined']:,} of {counts['input']:,} samples could not be scored and are quarantined. All "
        f"numbers are on the other {counts['scored']:,}."
    ]


def _weak_probes(numbers: Section) -> list[str]:
    """Return a warning for each probe that is not shown to be better than predicting the most common class."""
    probe_report = numbers["probe_report"]
    weak = [probe["name"] for probe in probe_report["probe_metrics"] if not probe["beats_prior"]]
    guess = "always guessing the majority class"
    guess = (
        f"{guess} ({percent(probe_report['chance']['majority'])})"
        if probe_report["metric"] != "R^2"
        else "guessing the mean"
    )
    warnings = [
        f"The probe on {name} is not shown to be better than {guess}: either {name} holds no information on these "
        f"labels, or the probe cannot use it. Its discrepancies mean little."
        for name in weak
        if name not in ("fused", "joint")
    ]
    if "joint" in weak:
        warnings.append(
            f"The joint probe, on the features of all modalities, is not shown to be better than {guess}. The Shapley "
            f"values mean little."
        )
    return warnings


def _sample(numbers: Section) -> list[str]:
    """Return a warning if the report is made of a sample of the scored rows."""
    if (sample := numbers.get("sample")) is None:
        return []
    return [
        f"Shares, figures and lists of samples are those of {sample['num_rows']:,} of {sample['num_scored']:,} "
        "samples, drawn by the hashes of their ids. The probe report, the mixture and the counts are of all."
    ]


def _appended(numbers: Section) -> list[str]:
    """Return a warning if samples were appended that the probes were not fitted for."""
    if (appended := numbers.get("appended")) is None:
        return []
    return [
        f"{appended['scored']:,} samples were appended and are scored by the probes of the first "
        f"{appended['fitted']['scored']:,}. The probe report, the mixture and the checks of the gap are of those alone."
    ]


def _leaks(numbers: Section) -> list[str]:
    """Return a warning for each modality that seems to know the labels, or whose probe predicts shuffled ones."""
    known = [f"LEAK: {leak['message']}." for leak in numbers["label_leaks"]]
    return known + [
        f"LEAK: a probe on {control['name']} fitted on shuffled labels has an accuracy of {percent(control['value'])} "
        f"on held-out samples, above the majority class ({percent(control['majority'])}). The labels leak from "
        f"elsewhere than the samples: do not trust the scores."
        for control in numbers["probe_report"]["controls"]
        if control["leaks"]
    ]


def _groups(numbers: Section) -> list[str]:
    facts = numbers["facts"]
    if facts["num_groups"] is None:
        return []
    return [
        f"The samples belong to {facts['num_groups']} groups ({facts['group_column']}), and no probe scored a group "
        f"that it was fitted on. The intervals account for the groups."
    ]


def _test_labels(numbers: Section) -> list[str]:
    if numbers["facts"]["learn_from"] == "train":
        return []
    return [
        "The probes were fitted on test labels too (never on that of the sample they score). To compare trainings on "
        "these manifests, score with --learn-from train."
    ]
