"""The report: one self-contained HTML page with its sentences, report.json and figures.

Each step uses only the result of the one before: files of the run -> numbers (report.json) -> figures -> page.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...audit.errors import RunError
from ...audit.scores.mixture import Mixture
from ...audit.storage import atomic_write, read_json, read_parquet, write_json, write_text
from ...train.config import MIN_VALIDATION_SAMPLES
from ..provenance import own_record
from ..run import Run
from . import findings
from .findings import Numbers
from .outcomes import MAX_DETAILED, finetune_numbers, manifest_numbers

_TEMPLATE = "report.html.jinja"


def write_report(run: Run) -> Path:
    """Write report.html, report.json and figures/*.png from the files of a run, and return the path of the page.

    The same run gives the same bytes. Nothing is written before everything is computed; the page is written last.
    Raises RunError if the run is not scored.
    """
    from .figures import draw

    if own_record(run.folder)[0] is None:
        run.check_links()  # else an untrusted run could put the user's own files on the page
    numbers = report_numbers(run)
    figures = draw(numbers)
    page = render(numbers, figures)
    for name, image in figures.items():
        with atomic_write(run.figures / f"{name}.png") as temporary:
            temporary.write_bytes(image)
    for path in run.figures.glob("*.png"):
        if path.stem not in figures:
            path.unlink()  # its manifest or fine-tuning was removed
    write_json(numbers, run.report_file.with_suffix(".json"))
    write_text(page, run.report_file)
    return run.report_file


def report_numbers(run: Run) -> Numbers:
    """Return the content of report.json: all numbers of the page and the figures."""
    record, scores = run.record(), run.scores()
    if [modality["name"] for modality in record["modalities"]] != list(scores.modalities):
        raise RunError(f"the modalities of {run.record_file} differ from those of {run.scores_file}: rescore")
    mixture = Mixture.from_json(read_json(run.mixture_file, error=RunError))
    quarantine, _ = read_parquet(run.quarantine_file, error=RunError)
    numbers = {
        "schema": "mmaudit.report/1",
        "facts": findings.facts(record, scores),
        "probe_report": findings.probe_report_numbers(record),
        "label_leaks": record["label_leaks"],
        "agreement": findings.agreement(scores),
        "discrepancy": findings.discrepancies(scores),
        "share_without_leader": findings.standing_out(scores),
        "gap": findings.gaps(scores, mixture, class_check=record["class_check"]["verdict"]),
        "training": findings.training(scores),
        "values": findings.values(scores),
        "maps": findings.maps(scores),
        "classes": findings.class_numbers(scores),
        "samples": findings.sample_lists(scores),
        "quarantine": findings.quarantined(quarantine),
        "manifests": [manifest_numbers(path, fingerprint=record["fingerprint"]) for path in run.manifests()],
        "finetunes": [finetune_numbers(folder, run) for folder in run.finetunes()],
        "recovery": run.recovery(),
        "max_detailed": MAX_DETAILED,
        "min_validation": MIN_VALIDATION_SAMPLES,
    }
    return {**numbers, "verdict": verdict(numbers)}


def render(numbers: Numbers, figures: dict[str, bytes]) -> str:
    """Return the page as HTML. Names and labels come from the user's data, so everything is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from .figures import palette

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {"percent": percent, "interval": interval, "signed": signed, "small": small}
    environment.filters |= {"accuracy": _accuracy, "probe_metric": _probe_metric, "gain": _format_gain}
    environment.filters |= {"thousands": "{:,}".format, "amount": _amount, "edge": _edge}
    modalities = [modality["name"] for modality in numbers["facts"]["modalities"]]
    images = {name: _image(image) for name, image in figures.items()}
    page = environment.get_template(_TEMPLATE).render(**numbers, images=images, colours=palette(modalities))
    return page + "\n"


def _image(png: bytes) -> dict[str, Any]:
    """Return a figure's bytes in base64, and its size in CSS pixels, half that of the file."""
    width, height = struct.unpack(">II", png[16:24])
    return {"data": base64.b64encode(png).decode(), "width": width // 2, "height": height // 2}


def _accuracy(metrics: dict[str, Any]) -> str:
    """Format an accuracy with its interval, in percent."""
    low, high = 100 * metrics["accuracy_low"], 100 * metrics["accuracy_high"]
    return f"{100 * metrics['accuracy']:.1f} [{low:.1f}, {high:.1f}]"


def _probe_metric(probe: dict[str, Any], metric: str) -> str:
    """Format a probe's metric with its interval: a share in percent, R^2 unscaled."""
    scale, digits = (1, 2) if metric == "R^2" else (100, 1)
    value, low, high = (f"{scale * probe[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _format_gain(numbers: dict[str, Any], metric: str) -> str:
    """Format a gain with its interval: of a share in points, of R^2 unscaled."""
    scale, digits = (1, 2) if metric == "R^2" else (100, 1)
    value, low, high = (signed(scale * numbers[key], digits) for key in ("gain", "low", "high"))
    return f"{value}{'' if metric == 'R^2' else ' points'} [{low}, {high}]"


def _amount(value: float) -> str:
    """Format a fractional count, below 10 with one decimal."""
    return f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"


def _edge(value: float) -> str:
    """Format the edge of a bin with at most four decimals, and a minus sign U+2212."""
    return f"{round(value, 4) + 0.0:g}".replace("-", "−")


Section = Mapping[str, Any]

STRONG = 0.2  # difference of two shares above which a lean is called strong; mmaudit's own, as is SLIGHT
SLIGHT = 0.05  # difference below which a lean is called slight, whatever its interval
MANY = 0.02  # share of quarantined samples above which a warning is added


def verdict(numbers: Section) -> dict[str, Any]:
    """Return the headline, its sentences, and the warnings (`warnings`)."""
    several = len(numbers["discrepancy"]) > 1
    warnings = (_leaks, _left_out, _weak_probes, _groups, _test_labels)
    return {
        "headline": _headline_of_many(numbers) if several else _headline(numbers["discrepancy"][0]),
        "sentences": [_shares_of_many(numbers) if several else _shares(numbers), _gain(numbers), _bimodal(numbers)],
        "warnings": [text for warn in warnings for text in warn(numbers)],
    }


def percent(value: float) -> str:
    """Format a share, 0.361 as 36%: with a decimal near 0 and 1; 0% and 100% only if exact."""
    if 1e-9 < value < 0.0005:
        return "<0.1%"
    if 0.9995 < value < 1 - 1e-9:
        return ">99.9%"
    near = 0.0005 <= value < 0.0995 or 0.9905 < value <= 0.9995
    return f"{100 * value:.{1 if near else 0}f}%"


def interval(numbers: Section) -> str:
    """Format a share with its interval."""
    return f"{percent(numbers['share'])} [{percent(numbers['low'])}, {percent(numbers['high'])}]"


def signed(value: float, digits: int = 2) -> str:
    """Format a number with its sign; the minus sign is U+2212."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def small(p: float) -> str:
    """Format a p value; the table of the dip test ends at 0.001."""
    return "≤ 0.001" if p < 0.0015 else f"{p:.3f}"


def _headline(numbers: Section) -> str:
    """Return which of two modalities carries more samples, if the interval of the difference excludes 0."""
    lean, positive_side, negative_side = numbers["lean"], numbers["positive_side"], numbers["negative_side"]
    if lean["low"] <= 0 <= lean["high"]:
        return f"No clear lean between {positive_side} and {negative_side}"
    stronger, weaker = (positive_side, negative_side) if lean["mean"] > 0 else (negative_side, positive_side)
    size = abs(lean["mean"])
    degree = " strongly" if size > STRONG else " slightly" if size < SLIGHT else ""
    return f"The set leans{degree} towards {stronger}, away from {weaker}"


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
    """Return the modality with the largest share, and those whose intervals overlap its interval."""
    ranked = sorted(numbers["discrepancy"], key=lambda modality: -modality[key]["share"])
    return [modality for modality in ranked if modality[key]["high"] >= ranked[0][key]["low"]]


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _shares_of_many(numbers: Section) -> str:
    margin = numbers["facts"]["balanced_margin"]
    leading, trailing = (_leading(numbers, key)[0] for key in ("share_ahead", "share_behind"))
    return (
        f"On {interval(leading['share_ahead'])} of the samples, the confidence of {leading['positive_side']} in the "
        f"true class is at least {margin:g} above the mean of the others. On {interval(trailing['share_behind'])}, "
        f"that of {trailing['positive_side']} is at least {margin:g} below it. On "
        f"{interval(numbers['share_without_leader'])} no modality is that far ahead."
    )


def _gain(numbers: Section) -> str:
    probe_report = numbers["probe_report"]
    gain, metric = probe_report["gain_over_best"], probe_report["metric"]
    best, points = gain["name"], _format_gain(gain, metric)
    if gain["low"] > 0:
        return f"Using all modalities together gains {points} of {metric} over {best} alone, the best single one."
    if gain["high"] < 0:
        return f"Using all modalities together loses {points} of {metric} against {best} alone, the best single one."
    return f"That all modalities together beat {best} alone, the best single one, is not shown: {points} of {metric}."


def _bimodal(numbers: Section) -> str:
    gap = numbers["gap"]
    balanced = gap["share_balanced"]
    count = "" if balanced is None else f"; by it {interval(balanced)} of the samples are balanced"
    if gap["bimodal"]:
        return (
            f"The modality gap is bimodal (Ashman's D {gap['ashman_d']:.2f}, dip p {small(gap['dip_p'])}), so the "
            f"posterior of the mixture defines the balanced samples{count}. Class check: {gap['class_check']}."
        )
    rule = f"a threshold is used instead of a posterior: balanced is a gap of at most {gap['threshold']:g}{count}."
    reasons = "; ".join(gap["reasons"])
    if gap["components"] is None:
        return f"No mixture could be fitted to the modality gap: {reasons}. So {rule}"
    return f"The modality gap is not bimodal: {reasons}. There are no two groups to separate, and {rule}"


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
    chance = percent(probe_report["chance"]) if probe_report["metric"] != "R^2" else "R^2 of 0"
    probes = {probe["name"]: probe["low"] for probe in probe_report["probe_metrics"] if probe["name"] != "fused"}
    return [
        f"The probe on {name} is not shown to be better than chance ({chance}): either {name} holds no information "
        f"on these labels, or the probe cannot use it. Its discrepancies mean little."
        for name, low in probes.items()
        if low <= probe_report["chance"]
    ]


def _leaks(numbers: Section) -> list[str]:
    """Return a warning for each modality that seems to know the labels, or that predicts shuffled ones."""
    known = [f"LEAK: {leak['message']}." for leak in numbers["label_leaks"]]
    return known + [
        f"LEAK: a probe on {control['name']} fitted on shuffled labels has an accuracy of {percent(control['value'])} "
        f"on held-out samples, above chance ({percent(control['chance'])}). The labels leak from elsewhere than the "
        f"samples: do not trust the scores."
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
