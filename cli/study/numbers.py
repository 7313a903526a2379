"""Numbers of a study of one dataset, as JSON values: what the page is written from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...audit.agreement import ceiling, rank_agreement, rank_correlation, reliability_of_mean, side_agreement
from ...audit.errors import ConfigError, ManifestError
from ...audit.metrics import DOMINATED_THRESHOLDS, discrepancy_between, is_dominated, mean_interval
from ...audit.metrics import group_codes as code_groups
from ...audit.scores.table import ScoreTable
from ...audit.storage import read_parquet
from ...rebalance.score_agreement import reliability_by_folds
from ...train.comparison.cells import parse_method
from ...train.comparison.verdicts import Comparison
from ..comparison.predictions import read_predictions

_PLANTED_LEVELS = 5  # of the planted discrepancy, in the figure


def about(record: Mapping[str, Any], scores: ScoreTable) -> dict[str, Any]:
    """Return what the page states of the dataset and its scores."""
    report, groups = record["probe_report"], code_groups(scores.group)
    between = scores.default_between()
    values = scores.discrepancy(between).astype(np.float64)
    valid = ~np.isnan(values)
    leans = is_dominated(values[valid], 0.2).astype(float) - is_dominated(-values[valid], 0.2)
    return {
        "num_samples": len(scores),
        "num_test": 0 if scores.split is None else int((scores.split == "test").sum()),
        "num_classes": int(record["num_classes"]),
        "num_groups": record["num_groups"],
        "modalities": list(scores.modalities),
        "between": between,
        "accuracy": {row["name"]: row["value"] for row in report["probe_metrics"]},
        "reliability": (record["halves"] or {}).get("reliability", []),
        "lean": mean_interval(leans, None if groups is None else groups[valid]),
        "histogram": np.histogram(values[valid], bins=20, range=(-1, 1))[0].tolist(),
    }


def comparison_numbers(comparison: Comparison) -> dict[str, Any]:
    """Return the tables of a comparison as JSON values, and the differences that published claims need."""
    content = comparison.to_dict()
    content["summary"] = [row for row in content["summary"] if ":" not in row["subset"]]  # classes are not on the page
    for key in ("folder", "metrics", "missing"):
        content.pop(key, None)
    runs = comparison.runs[comparison.runs["subset"] == "all"]
    content["epochs"] = int(runs["epochs"].max())
    content["num_trainings"] = len(runs)
    content["accuracies"] = {
        f"{manifest}/{method}": [float(values.mean(axis=1).mean()), float(values.mean(axis=1).std())]
        for (manifest, method), values in comparison.correct.items()
    }
    conditions = {method for manifest, method in comparison.correct if manifest == "all"}
    pairs = [(name, "sum") for name in conditions if name.endswith("+sum")] + [("bss-l+sum", "bss-h+sum")]
    content["pairs"] = [
        {"method": a, "reference": b, **comparison.difference(f"all/{a}", f"all/{b}").to_dict()}
        for a, b in sorted(pairs)
        if a in conditions and b in conditions
    ]
    return content


def against_shuffled(methods: Comparison, chance: Comparison) -> list[dict[str, Any]]:
    """Return the accuracy of each method, its lowest over seeds, and that on shuffled labels."""
    rows = []
    for (manifest, name), values in chance.correct.items():
        method = name.removeprefix("shuffled:")
        if (manifest, method) in methods.correct:
            accuracy = methods.correct[manifest, method].mean(axis=1)
            control = float(values.mean(axis=1).max())
            row = {"method": method, "accuracy": float(accuracy.mean()), "lowest": float(accuracy.min())}
            rows.append({**row, "shuffled": control, "above": bool(accuracy.min() > control)})
    return rows


def network_agreements(comparison: Comparison, scores: ScoreTable) -> Iterator[dict[str, Any]]:
    """Yield, for each method on all samples, the agreement of the probes' discrepancies and its branches'."""
    between = scores.default_between()
    row_of = {name: row for row, name in enumerate(scores.sample_id.tolist())}
    test_ids = comparison.per_sample["sample_id"].to_numpy()
    rows = np.array([row_of.get(name, -1) for name in test_ids], dtype=np.intp)
    is_scored, tested = rows >= 0, scores.take(rows[rows >= 0])
    first, _, second = between.partition(":")
    reliability = reliability_by_folds(scores, (first, second)) if second else None
    for manifest, method in comparison.correct:
        if manifest != "all" or comparison.folder is None or not _is_method(method):
            continue
        cells = comparison.folder / "cells" / manifest / parse_method(method).folder
        labels = map(str, comparison.per_sample.columns)
        columns = [name for name in labels if name.startswith(f"{manifest}/{method}/")]
        seeds = [name.rpartition("/")[2] for name in columns]
        branches = [_branch_discrepancy(cells / f"seed-{seed}", test_ids, scores.modalities, between) for seed in seeds]
        values = [discrepancies[is_scored] for discrepancies in branches]
        yield {"method": method, **_agreement_with(tested, values, between, reliability=reliability)}


def _agreement_with(
    scores: ScoreTable, values: Sequence[NDArray[np.float64]], between: str, *, reliability: float | None
) -> dict[str, Any]:
    """Return the agreement of scores with the mean over seeds of a network's discrepancies (n,), and its ceiling."""
    pairs = [rank_correlation(a, b, label=scores.label) for a, b in combinations(values, 2)]
    known = [value for value in pairs if value is not None]
    r = float(np.mean(known)) if known else None
    expected, mean = scores.discrepancy(between), np.mean(values, axis=0)
    ids, group = scores.sample_id.tolist(), scores.group
    kappa = side_agreement(expected, mean, threshold=DOMINATED_THRESHOLDS[0], sample_id=ids, group=group)
    return {
        "rank": rank_agreement(expected, mean, label=scores.label, sample_id=ids, group=group).to_dict(),
        "kappa": kappa.to_dict(),
        "between_seeds": r,
        "ceiling": ceiling(reliability, None if r is None else reliability_of_mean(r, len(values))),
        "num_seeds": len(values),
    }


def _is_method(text: str) -> bool:
    try:
        return bool(parse_method(text))
    except ConfigError:  # a control, such as "shuffled labels"
        return False


def _branch_discrepancy(
    folder: Path, test_ids: NDArray[np.object_], modalities: Sequence[str], between: str
) -> NDArray[np.float64]:
    """Return the discrepancies (n,) of a training's branches on the test samples."""
    names = [f"branch_{name}" for name in modalities]
    table = read_predictions(folder, test_ids, columns=names)
    confidence = np.stack([table[name].to_numpy() for name in names], axis=1)
    return discrepancy_between(confidence, modalities, between).astype(np.float64)


def recovery(truth: Path | None, scores: ScoreTable) -> dict[str, Any] | None:
    """Return how well the scores recover the planted discrepancy: rank agreement, and their mean by its level."""
    if truth is None:
        return None
    table, _ = read_parquet(truth, error=ManifestError)
    planted_of = dict(zip(table["sample_id"].to_pylist(), table["discrepancy"].to_pylist(), strict=True))
    planted = np.array([planted_of.get(name, np.nan) for name in scores.sample_id], dtype=np.float64)
    values = scores.discrepancy(":".join(scores.modalities[:2])).astype(np.float64)
    groups = code_groups(scores.group)
    rank = rank_agreement(planted, values, sample_id=scores.sample_id.tolist(), group=scores.group)
    valid = ~(np.isnan(planted) | np.isnan(values))
    steps = np.unique(planted[valid])
    if len(steps) > 2 * _PLANTED_LEVELS:
        edges = np.quantile(planted[valid], np.linspace(0, 1, _PLANTED_LEVELS + 1)[1:-1])
        code = np.searchsorted(edges, planted)
    else:
        code = np.searchsorted(steps, planted)
    levels = []
    for number in np.unique(code[valid]).tolist():
        rows = valid & (code == number)
        interval = mean_interval(values[rows], None if groups is None else groups[rows])
        levels.append({"planted": float(planted[rows].mean()), "n": int(rows.sum()), **interval})
    return {"rank": rank.to_dict(), "levels": levels}
