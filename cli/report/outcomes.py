"""Numbers of the report on manifests and fine-tunings.

The uniformity of a manifest comes from NAME.balance.json, which a split writes with the manifest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...audit.errors import RunError, short
from ...audit.parsing import build_config, check_shape, parse_data_json
from ...rebalance import manifest
from ...rebalance.balanced import BalancedConfig
from ...rebalance.score_files import NO_SPLIT
from ...rebalance.split_stats import read_numbers
from ...train.task_metrics import metrics_of
from ..run import Run, read_metrics
from .findings import Numbers, finite, split_order

Section = Mapping[str, Any]

MAX_CLASSES = 12  # per manifest, least uniform first
MAX_SHORTAGES = 8
MAX_RANGES = 6  # of empty bins
_MIN_CHANGE = 5e-4  # distances are shown with three decimals


def uniformity(numbers: Section, splits: Mapping[str, int]) -> Numbers:
    """Return the uniformity of a manifest from its statistics; `splits` are the kept samples by split.

    `target` is None if the split was not made uniform; then curve, classes and shortages are empty.
    """
    recipe = numbers["recipe"].get("balanced")
    config = None if recipe is None else build_config(BalancedConfig, recipe, where="recipe.balanced.")
    edges = np.linspace(-1, 1, numbers["bins"] + 1).round(6).tolist()
    ranges, measures = _ranges(numbers["empty_bins"], edges), ("distance", "ks", "positive")
    return {
        "target": None if config is None else _target_of(config, bins=numbers["bins"]),
        "edges": edges,
        "before": numbers["counts_before"],
        "after": numbers["counts_after"],
        **{f"{name}_{when}": numbers[when][name] for name in measures for when in ("before", "after")},
        "effective_size": numbers["effective_size"],
        "halves": None if config is None else numbers.get("halves"),
        "empty_bins": len(numbers["empty_bins"]),
        "empty_ranges": ranges[:MAX_RANGES],
        "empty_cut": len(ranges) > MAX_RANGES,
        "distances": [
            {"split": short(name), "kept": splits.get(name, 0), "distance": distance}
            for name, distance in sorted(numbers["distances"].items(), key=lambda pair: split_order(pair[0]))
        ],
        "curve": [] if config is None else numbers.get("curve", []),
        "curve_exceeds_tolerance": config is not None and _exceeds_tolerance(numbers, config),
        "next_point": None if config is None else _larger_size(numbers, config),
        "classes": None if config is None else _classes(numbers["classes"]),
        "shortages": _shortages(numbers["shortages"], edges) if _cuts_bins(config) else [],
    }


def _target_of(config: BalancedConfig, *, bins: int) -> Numbers:
    """Return the settings of a uniform split."""
    return {
        "bins": bins,
        "tolerance": config.tolerance if config.size is not None or config.by == "weight" else config.allowed,
        "size": config.size,
        "weighted": config.by == "weight",
        "max_weight": config.max_weight,
        "grid": config.grid,
        "per_class": config.per_class,
    }


def _cuts_bins(config: BalancedConfig | None) -> bool:
    """Return whether bins of the discrepancy were reduced to a quota, of which every class has an even share."""
    return config is not None and not config.grid and config.by != "weight"


def _ranges(bins: Sequence[int], edges: Sequence[float]) -> list[list[float]]:
    """Return the ranges [low, high] of the discrepancy that these bins cover; adjacent bins are joined."""
    ranges: list[list[float]] = []
    for bin_index in bins:
        if ranges and ranges[-1][1] == edges[bin_index]:
            ranges[-1][1] = edges[bin_index + 1]
        else:
            ranges.append([edges[bin_index], edges[bin_index + 1]])
    return ranges


def _exceeds_tolerance(numbers: Section, config: BalancedConfig) -> bool:
    """Return whether a point of the curve is less uniform than its tolerance, which holds for each split by itself."""
    curve = [] if config.grid or config.per_class else numbers.get("curve", [])
    return any(point["distance"] > point["tolerance"] + _MIN_CHANGE for point in curve)


def _larger_size(numbers: Section, config: BalancedConfig) -> Numbers | None:
    """Return the next point of the curve that keeps more samples, at a larger tolerance; None if there is none."""
    if config.by == "weight" or config.per_class or config.size is not None:
        return None
    larger = [point for point in numbers.get("curve", []) if point["tolerance"] > config.allowed]
    return next((point for point in larger if point["size"] > numbers["kept"]), None)


def _classes(classes: Sequence[Section]) -> Numbers:
    """Count the classes that became more uniform, and list the least uniform ones; classes without kept rows first."""
    nonempty = [row for row in classes if row["before"]]
    with_rows = [row for row in nonempty if row["after"]]
    changes = [row["distance_after"] - row["distance_before"] for row in with_rows]
    least_uniform = sorted(nonempty, key=lambda row: (bool(row["after"]), -row["distance_after"], row["name"]))
    return {
        "num_classes": len(nonempty),
        "num_without_rows": len(nonempty) - len(with_rows),
        "more_uniform": sum(change < -_MIN_CHANGE for change in changes),
        "less_uniform": sum(change > _MIN_CHANGE for change in changes),
        "median_before": median(row["distance_before"] for row in nonempty) if nonempty else 0.0,
        "median_after": median(row["distance_after"] for row in with_rows) if with_rows else 0.0,
        "least_uniform": [_class(row) for row in least_uniform[:MAX_CLASSES]],
    }


def _class(row: Section) -> Numbers:
    """Return the numbers of a class; without kept rows its distance afterwards is None."""
    after = ("distance_after", "ks_after")
    return {**row, "name": short(row["name"], 80), **{name: row[name] if row["after"] else None for name in after}}


def _shortages(shortages: Sequence[Section], edges: Sequence[float]) -> list[Numbers]:
    """Return the cells of bin and class that lack most of an even share, with rounded edges."""
    return [
        {
            "class": short(row["class"], 80),
            "bin": row["bin"],
            "low": edges[row["bin"]],
            "high": edges[row["bin"] + 1],
            "has": row["has"],
            "even": row["even_share"],
        }
        for row in shortages[:MAX_SHORTAGES]
        if round(row["even_share"]) > row["has"]  # shortages below half a sample are omitted
    ]


SETTINGS = ("model", "fusion", "sampling", "balancing", "only", "init", "epochs", "keep_posterior")  # shown on the page
_HISTORY = ("epoch", "train_loss", "validation_loss")  # keys of history.jsonl, beside that of the validation metric
MAX_DETAILED = 8  # manifests, and fine-tunings, that have a figure; the others are only in the table


def manifest_numbers(path: Path, *, fingerprint: str) -> Numbers:
    """Return the numbers of a manifest, read in batches; `fingerprint` is that of the run's data.

    `balance` is None if NAME.balance.json is missing, or belongs to another manifest; `balance_problem` is the reason.
    """
    about, dropped_file = manifest.read_provenance(path), manifest.dropped_path(path)
    numbers, problem = _numbers_of(path)
    kept_rows = _count_rows(path, by="split")
    dropped = _count_rows(dropped_file, by="reason") if _is_dropped_from(dropped_file, path) else None
    reasons = numbers["reasons"] if numbers else {row["name"]: row["n"] for row in dropped or ()}
    splits = {row["name"]: row["n"] for row in kept_rows}
    return {
        "name": path.stem,
        "subset": short(about.get("subset", path.stem)),
        "between": short(about.get("between", "")),
        "kept": sum(row["n"] for row in kept_rows),
        "kept_gap": _mean_gap(kept_rows),
        "dropped": numbers["dropped"] if numbers else None if dropped is None else sum(row["n"] for row in dropped),
        "reasons": [
            {"name": name, "n": count, "gap": _mean_gap([row for row in dropped or () if row["name"] == name])}
            for name, count in sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
        ],
        "splits": splits,
        "of_this_run": about.get("scores", {}).get("fingerprint") == fingerprint,
        "balance_problem": problem,
        "balance": uniformity(numbers, splits) if numbers else None,
    }


def finetune_numbers(folder: Path, run: Run, *, fingerprint: str, modalities: Sequence[str]) -> Numbers:
    """Return the numbers of a finished fine-tuning, read from metrics.json and history.jsonl.

    `manifest` is None for a training on data without a manifest. `manifest_is_unchanged` is whether the manifest of
    that name in the run is still the one that was trained on, and `of_this_run` whether it was made from the run's
    data, of that fingerprint. Branches are in the order of the run's modalities, the fused one last.
    """
    metrics = read_metrics(folder)
    path = None if metrics["manifest"] is None else run.manifest(metrics["manifest"])
    settings, of_task = metrics["config"].get("finetune", {}), metrics_of(metrics)
    measured, contribution = metrics["test"]["all"].get("branches", {}), metrics.get("contribution")
    order = [*modalities, *sorted(measured.keys() - {*modalities, "fused"}), "fused"]
    branches = [name for name in order if name in measured]
    return {
        "name": folder.name,
        "manifest": metrics["manifest"],
        "manifest_is_unchanged": path is None or not path.exists() or _digest(path) == metrics["manifest_digest"],
        "of_this_run": _made_from(metrics) in (None, fingerprint),
        "test_labels_in_scores": metrics["test_labels_in_scores"],
        "settings": {key: settings.get(key) for key in SETTINGS},
        "seed": metrics["config"].get("seed"),
        "counts": metrics["counts"],
        "best_epoch": metrics["best_epoch"],
        "task": metrics.get("task", "classification"),
        "metric": of_task.main,
        "metric_name": of_task.name,
        "chance": {name: metrics["chance"][name] for name in of_task.chance},
        "chance_meaning": of_task.chance,
        "other_metrics": [key for key in of_task.keys if key != of_task.main],
        "value_name": of_task.sample_value.replace("_", " ") if of_task.sample_value != "mae" else "MAE",
        "branches": branches,
        "contribution": contribution if contribution and contribution["n"] else None,
        "subsets": [
            _subset(name, metrics["test"][name], branches) for name in sorted(metrics["test"], key=_subset_order)
        ],
        "history": _history(folder / "history.jsonl", metric=of_task.main),
    }


def _made_from(metrics: Section) -> str | None:
    """Return the fingerprint of the data that a manifest was made from; None without a manifest, or one unknown."""
    return ((metrics.get("made_from") or {}).get("scores") or {}).get("fingerprint")


def _numbers_of(path: Path) -> tuple[Numbers | None, str | None]:
    """Read NAME.balance.json of a manifest; else return None and the reason, "missing" or "another"."""
    file = manifest.balance_path(path)
    if not file.exists():
        return None, "missing"
    numbers = read_numbers(file, error=RunError)
    return (numbers, None) if numbers.get("digest") == _digest(path) else (None, "another")


def _digest(path: Path) -> str:
    """Return Manifest.digest() of a file: the recorded one if the row count matches, else computed."""
    recorded = manifest.read_stated_digests(path)
    if recorded.get("rows") == manifest.read_num_rows(path):
        return str(recorded["digest"])
    return manifest.compute_digests(path).rows


def _is_dropped_from(dropped: Path, path: Path) -> bool:
    """Return whether the dropped rows belong to this manifest: a killed split leaves those of an older one."""
    return dropped.exists() and manifest.read_stated_digests(dropped).get("dropped_from") == _digest(path)


def _count_rows(path: Path, *, by: str) -> list[Numbers]:
    """Count the rows by a column of strings and sum their gaps; most frequent first."""
    counted = [("gap", "sum"), ("gap", "count"), ([], "count_all")]
    parts = [batch.group_by(by).aggregate(counted) for batch in _gaps(path, by)]
    if not parts:
        return []
    combined = pa.concat_tables(parts).group_by(by)
    summed = combined.aggregate([(name, "sum") for name in ("gap_sum", "gap_count", "count_all")])
    sums = {"n": "count_all_sum", "gap": "gap_sum_sum", "of": "gap_count_sum"}
    rows = [
        {"name": str(row[by] or NO_SPLIT), **{name: row[column] for name, column in sums.items()}}
        for row in summed.to_pylist()
    ]
    return sorted(rows, key=lambda row: (-row["n"], row["name"]))


def _gaps(path: Path, by: str) -> Iterator[pa.Table]:
    for batch in manifest.read_batches_of_manifest(path, columns=[by, "gap"]):
        yield pa.table({by: batch[by].cast(pa.string()), "gap": pc.cast(batch["gap"], pa.float64())})


def _mean_gap(rows: list[Numbers]) -> float | None:
    """Return the mean modality gap of counted rows; None if no row has a gap."""
    number = sum(row["of"] for row in rows)
    return sum(row["gap"] or 0.0 for row in rows) / number if number else None


def _subset_order(subset: str) -> tuple[int, str]:
    """Return the sort key of a subset: all, those of the manifest, the balanced ones, then by modality."""
    first = ("all", "in-manifest")
    if subset in first:
        return first.index(subset), ""
    # Sorts before NAME-dominated-0.2.
    return 2 if subset.startswith("balanced") else 3, subset.replace("-preferred", "-d")


def _subset(name: str, subset: Mapping[str, Any], branches: list[str]) -> Numbers:
    """Return n and the metrics of each branch in order; None if the subset holds no test samples."""
    measured = subset.get("branches")
    branch_metrics = None if measured is None else [measured[branch] for branch in branches]
    return {"name": name, "n": subset["n"], "branches": branch_metrics}


def _epoch(path: Path, number: int, line: str, *, keys: Sequence[str]) -> dict[str, Any]:
    try:
        record = parse_data_json(line)  # losses may be NaN
        check_shape(record, dict.fromkeys(keys, (float, type(None))))
    except ValueError as error:
        raise RunError(f"{path}, line {number} cannot be read: {error}; train it again with --overwrite") from error
    return dict(record)


def _history(path: Path, *, metric: str) -> dict[str, list[float | None]]:
    """Return the columns of history.jsonl, one value per epoch."""
    keys = (*_HISTORY, f"validation_{metric}")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [_epoch(path, number, line, keys=keys) for number, line in enumerate(lines, start=1) if line]
    return {key: [finite(record.get(key)) for record in records] for key in keys}
