"""Tables of differences of a comparison: from the baseline, of controls, and from the best unimodal model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..difference import (
    LEVEL,
    MIN_TEST_SAMPLES,
    NO_VERDICT,
    Array,
    Condition,
    Difference,
    Mask,
    compare_on,
    holm,
    smallest_effect_of,
)

_VALUES = ("low", "high", "standard_error", "df", "p", "smallest_effect", "num_samples", "num_seeds")
_ROW = (
    *("manifest", "method", "reference_manifest", "reference", "kind", "subset", "accuracy", "reference_accuracy"),
    *("difference", *_VALUES),
)


def tabulate_differences(
    correct: Mapping[Condition, Array],
    *,
    baseline: str,
    controls: Mapping[Condition, Condition],
    subsets: Mapping[str, Mask],
    group: Sequence[str] | None,
) -> pd.DataFrame:
    """Compare each method with the baseline on its manifest, and each control with what it controls."""
    pairs: list[tuple[str, Condition, Condition]] = [
        ("method", condition, (condition[0], baseline))
        for condition in correct
        if condition not in controls and condition[1] != baseline
    ]
    pairs += [("control", control, reference) for control, reference in controls.items()]
    pairs = [(kind, a, b) for kind, a, b in pairs if a in correct and b in correct]
    rows = [row for kind, a, b in pairs for row in _rows(kind, a, b, correct, subsets=subsets, group=group)]
    return _with_verdicts(pd.DataFrame(rows, columns=list(_ROW)))


def tabulate_unimodal(
    correct: Mapping[Condition, Array],
    *,
    unimodal: Sequence[Condition],
    controls: Collection[Condition],
    subsets: Mapping[str, Mask],
    group: Sequence[str] | None,
) -> pd.DataFrame:
    """Compare each method with the unimodal model of its manifest that is the most accurate on all test samples."""
    rows = []
    for condition in correct:
        rivals = [rival for rival in unimodal if rival[0] == condition[0]]
        if rivals and condition not in unimodal and condition not in controls:
            best = max(rivals, key=lambda rival: float(correct[rival].mean()))
            rows += _rows("unimodal", condition, best, correct, subsets=subsets, group=group)
    return _with_verdicts(pd.DataFrame(rows, columns=list(_ROW)))


def _rows(
    kind: str,
    a: Condition,
    b: Condition,
    correct: Mapping[Condition, Array],
    *,
    subsets: Mapping[str, Mask],
    group: Sequence[str] | None,
) -> list[dict[str, Any]]:
    """Return one row per subset of two conditions."""
    return [
        _row(kind, a, b, subset=subset, difference=compare_on(mask, correct[a], correct[b], group=group))
        | {f"{key}accuracy": float(correct[c][:, mask].mean()) for key, c in (("", a), ("reference_", b))}
        for subset, mask in subsets.items()
        if mask.any()
    ]


def _row(kind: str, a: Condition, b: Condition, *, subset: str, difference: Difference) -> dict[str, Any]:
    values = {key: getattr(difference, key) for key in _VALUES}
    names = {"manifest": a[0], "method": a[1], "reference_manifest": b[0], "reference": b[1]}
    return {**names, "kind": kind, "subset": subset, "difference": difference.mean, **values}


def _with_verdicts(summary: pd.DataFrame) -> pd.DataFrame:
    """Add p_holm and verdict: Holm over the methods of a manifest, and over its controls, on all test samples.

    The smallest effects are then those of as many comparisons.
    """
    summary = summary.assign(p_holm=np.nan, verdict="")
    overall = summary[summary["subset"] == "all"]
    for _, rows in overall.groupby(["reference_manifest", "kind"], sort=False):
        summary.loc[rows.index, "p_holm"] = holm(rows["p"].tolist())
        summary.loc[rows.index, "smallest_effect"] = [
            smallest_effect_of(error, df, num_comparisons=len(rows))
            for error, df in zip(rows["standard_error"], rows["df"], strict=True)
        ]
    for index in overall.index:
        row = summary.loc[index]
        verdict = "no evidence"
        if row["num_seeds"] < 2 or row["num_samples"] < MIN_TEST_SAMPLES:
            verdict = NO_VERDICT
        elif row["p_holm"] < LEVEL:
            verdict = "helps" if row["difference"] > 0 else "hurts"
        if verdict in ("helps", "hurts") and row["kind"] != "method":
            verdict = "better" if verdict == "helps" else "worse"
        summary.loc[index, "verdict"] = verdict
    return summary
