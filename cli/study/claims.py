"""Published claims beside what a study shows: each holds, does not hold, or cannot be decided with these data.

Gains are those of the papers' tables, in points over their baseline, as far as they could be read; of the others only
the direction is claimed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isnan
from typing import Any, Literal

from ...train.difference import LEVEL, format_p, holm, smallest_effect_of

Outcome = Literal["holds here", "the opposite here", "not of that size here", "cannot be told"]

# Published gain in points over joint training with concatenation, and its source; None: no baseline could be read.
_GAINS: dict[str, tuple[str, float | None, str]] = {
    "ogm-ge": ("OGM-GE", 2.8, "Kinetics-Sounds, arXiv 2302.10912"),
    "gblend": ("G-Blending", 4.3, "Kinetics-Sounds, arXiv 2302.10912"),
    "greedy": ("Greedy", 4.6, "Kinetics-Sounds, arXiv 2302.10912"),
    "agm": ("AGM", 2.2, "balanced dataset, BalanceBenchmark"),
    "pmr": ("PMR", 0.4, "balanced dataset, BalanceBenchmark"),
    "mla": ("MLA", 0.5, "balanced dataset, BalanceBenchmark"),
    "mmpareto": ("MMPareto", 2.0, "balanced dataset, BalanceBenchmark"),
    "bss-h+sum": ("BSS-H", 17.5, "CREMA-D, arXiv 2501.01470"),
    "bss-l+sum": ("BSS-L", 19.5, "CREMA-D, arXiv 2501.01470"),
    "gmm": ("The adaptive loss", None, "arXiv 2510.21797"),
    "ogm": ("OGM", None, "CVPR 2022"),
    "dus-h+sum": ("DUS by its heuristic", None, "arXiv 2503.03792"),
    "dus-rl+sum": ("DUS by a policy", None, "arXiv 2503.03792"),
    "smv+sum": ("Sample-level resampling", None, "CVPR 2024"),
    "mses": ("MSES", None, "ACPR 2019"),
    "mslr": ("MSLR", None, "Findings of ACL 2022"),
    "mmcosine": ("MMCosine", None, "ICASSP 2023"),
    "lfm": ("LFM", None, "NeurIPS 2024"),
    "reconboost": ("ReconBoost", None, "ICML 2024"),
    "relearning": ("Diagnosing and re-learning", None, "ECCV 2024"),
    "dgl": ("DGL", None, "ICCV 2025"),
    "inforeg": ("InfoReg", None, "CVPR 2025"),
    "remix+sum": ("Remix", None, "ICML 2025"),
}
# What a filter by the mixture is compared with, by its name in the comparison.
_CHOICES = {
    "all data": "all samples",
    "the random control": "as many random samples",
    "filtering by the balance score": "as many of the best balance score",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimOutcome:
    """A published claim on one dataset: its outcome, and the sentence with the numbers that decide it."""

    claim: str
    outcome: Outcome
    sentence: str

    def to_dict(self) -> dict[str, str]:
        """Return the fields by name."""
        return asdict(self)


def check_claims(numbers: Mapping[str, Any]) -> list[ClaimOutcome]:
    """Judge all claims by the numbers of one dataset: gains of methods, BSS, subsets, and the study's own findings."""
    return [
        *_gains(numbers["methods"]),
        *_orders(numbers["methods"]),
        *_subsets(numbers["subsets"]),
        *_findings(numbers["methods"], names=("F1", "F3")),
        *_findings(numbers["subsets"], names=("F2",)),
        *_filters(numbers["subsets"]),
    ]


def _gains(comparison: Mapping[str, Any]) -> Iterator[ClaimOutcome]:
    """Judge the gain of each method over the baseline on all samples."""
    row_of = {row["method"]: row for row in _rows(comparison, kind="method")}
    for method, (name, gain, source) in _GAINS.items():
        size = "" if gain is None else f" ({gain:+.1f} points)"
        claim = f"{name} is better than joint training{size}: {source}"
        if method in row_of:
            yield judge(claim, row_of[method], gain=gain)


def _orders(comparison: Mapping[str, Any]) -> Iterator[ClaimOutcome]:
    """Judge the claims of BSS on orders: the opposite order is worse, and the learned schedule is better."""
    for row in _rows(comparison, kind="control"):
        if row["method"].startswith("anti-curriculum for "):
            yield judge(f"The order of {row['reference']} matters: the opposite one is worse", _negated(row))
    pairs = comparison["pairs"]
    for row, p in zip(pairs, holm([_nan(row["p"]) for row in pairs]), strict=True):
        error, df = _nan(row["standard_error"]), _nan(row["df"])
        effect = smallest_effect_of(error, df, num_comparisons=len(pairs))
        tested = {**row, "p_holm": p, "difference": row["mean"], "smallest_effect": None if isnan(effect) else effect}
        if row["reference"] == "bss-h+sum":
            yield judge("BSS-L is better than BSS-H: arXiv 2501.01470", tested)
        elif row["method"].startswith("bss"):
            yield judge(f"{row['method']} is better than the same losses without its order", tested)


def _subsets(comparison: Mapping[str, Any]) -> Iterator[ClaimOutcome]:
    """Judge whether the choice of samples matters, or their number: each subset against a random one of its size.

    That of the mixture is judged as a filter.
    """
    for row in _rows(comparison, kind="control", manifest=None):
        subset = row["reference_manifest"]
        is_random = row["manifest"] == f"random-like-{subset}" and row["method"] == row["reference"]
        if is_random and subset != "gmm-balanced":
            yield judge(f"Training on the subset {subset} is better than on as many random samples", _negated(row))


def _findings(comparison: Mapping[str, Any], *, names: Sequence[str]) -> Iterator[ClaimOutcome]:
    """Return the named checks of a comparison: F1 and F3 are about all samples, F2 about the balanced split."""
    outcomes: dict[str, Outcome] = {"seen here": "holds here", "not seen here": "the opposite here"}
    for row in comparison.get("findings", ()):
        if row["name"] in names:
            outcome = outcomes.get(row["outcome"], "cannot be told")
            yield ClaimOutcome(claim=f"{row['name']}: {row['claim']}", outcome=outcome, sentence=row["sentence"])


def _filters(comparison: Mapping[str, Any]) -> Iterator[ClaimOutcome]:
    """Judge fine-tuning on the balanced side of the mixture, by method, against each other choice of samples."""
    for row in comparison.get("selection") or ():
        if row["comparison"].startswith("anti-curriculum for "):
            continue  # a control, of which nothing is claimed
        pair, _, choice = row["comparison"].removesuffix(")").rpartition(" (")
        outcome = judge(f"Training on the balanced side of the mixture is better than on {_CHOICES[choice]}", row)
        yield replace(outcome, sentence=f"{pair}: {outcome.sentence}")


def judge(claim: str, row: Mapping[str, Any], *, gain: float | None = None) -> ClaimOutcome:
    """Judge the claim that a difference is above 0, of `gain` points in the paper.

    row: difference, low, high and smallest_effect in [-1, 1], p_holm. Not of that size: no difference is shown, and the
    published gain is above the interval.
    """
    low, high, value = (None if row.get(key) is None else 100 * row[key] for key in ("low", "high", "difference"))
    if value is None or low is None or high is None or row.get("p_holm") is None or row["p_holm"] != row["p_holm"]:
        single = "no verdict: one training, or too few test samples"
        return ClaimOutcome(claim=claim, outcome="cannot be told", sentence=single)
    if low == high:
        equal = "no test sample is predicted otherwise: the trainings are the same, or nearly"
        return ClaimOutcome(claim=claim, outcome="cannot be told", sentence=equal)
    text = f"{value:+.1f} points, 95% [{low:+.1f}, {high:+.1f}], p {format_p(row['p_holm'])}"
    if row["p_holm"] < LEVEL:
        return ClaimOutcome(claim=claim, outcome="holds here" if value > 0 else "the opposite here", sentence=text)
    if gain is not None and high < gain:
        sentence = f"{text}; {gain:+.1f} points are excluded"
        return ClaimOutcome(claim=claim, outcome="not of that size here", sentence=sentence)
    smallest = row.get("smallest_effect")
    if smallest is not None:
        text += f"; effects of {100 * smallest:.1f} points would have been shown"
    return ClaimOutcome(claim=claim, outcome="cannot be told", sentence=text)


def _rows(comparison: Mapping[str, Any], *, kind: str, manifest: str | None = "all") -> Sequence[Mapping[str, Any]]:
    """Return the comparisons on all test samples of a kind, on a manifest or on any."""
    return [
        row
        for row in comparison["summary"]
        if row["subset"] == "all" and row["kind"] == kind and manifest in (None, row["manifest"])
    ]


def _negated(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the difference of reference minus control, of which p is the same."""
    signs = {key: None if row[key] is None else -row[key] for key in ("difference", "low", "high")}
    return {**row, "difference": signs["difference"], "low": signs["high"], "high": signs["low"]}


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value
