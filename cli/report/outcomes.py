"""Numbers of the report on manifests and fine-tunings.

All from NAME.balance.json, the numbers that a split leaves beside its manifest: no row is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...audit.errors import RunError
from ...audit.parsing import build, check_shape, parse_data_json
from ...rebalance.balanced import BalancedConfig
from ...rebalance.manifest import batches_of, digests_of, dropped_path, num_rows_of, provenance_of, rows_of
from ...rebalance.recipe import balance_path
from ...rebalance.score_files import NO_SPLIT
from ...rebalance.split_stats import read_numbers
from ..run import Run, read_metrics
from .examples import split_place
from .findings import Numbers, finite, short

Found = Mapping[str, Any]

MOST_CLASSES = 12  # of a manifest, the least uniform first
MOST_SHORTAGES = 8
MOST_RANGES = 6  # of empty bins
_SAME = 5e-4  # distances are told to three places


def uniformity(found: Found, splits: Mapping[str, int]) -> Numbers:
    """Give what the page tells of one split from its numbers; `splits` are the kept samples by split.

    `made` is None where the split was not made to be uniform: then there is no curve, no class and nothing is short.
    """
    recipe = found["recipe"].get("balanced")
    config = None if recipe is None else build(BalancedConfig, recipe, where="recipe.balanced.")
    edges = np.linspace(-1, 1, found["bins"] + 1).round(6).tolist()
    ranges, measures = _ranges(found["empty_bins"], edges), ("distance", "ks", "positive")
    return {
        "made": None if config is None else _made(config, bins=found["bins"]),
        "edges": edges,
        "before": found["counts_before"],
        "after": found["counts_after"],
        **{f"{name}_{when}": found[when][name] for name in measures for when in ("before", "after")},
        "effective_size": found["effective_size"],
        "empty_bins": len(found["empty_bins"]),
        "empty_ranges": ranges[:MOST_RANGES],
        "empty_cut": len(ranges) > MOST_RANGES,
        "distances": [
            {"split": short(name), "kept": splits.get(name, 0), "distance": distance}
            for name, distance in sorted(found["distances"].items(), key=lambda pair: split_place(pair[0]))
        ],
        "curve": [] if config is None else found.get("curve", []),
        "more": None if config is None else _more(found, config),
        "classes": None if config is None else _classes(found["classes"]),
        "shortages": _shortages(found["shortages"], edges) if _cuts_bins(config) else [],
    }


def _made(config: BalancedConfig, *, bins: int) -> Numbers:
    """Say what was made uniform, and how."""
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
    """Tell whether bins of the discrepancy were cut to a level, of which every class has an even share."""
    return config is not None and not config.grid and config.by != "weight"


def _ranges(bins: Sequence[int], edges: Sequence[float]) -> list[list[float]]:
    """Give the stretches [low, high] of the discrepancy that these bins cover, neighbours joined."""
    found: list[list[float]] = []
    for place in bins:
        if found and found[-1][1] == edges[place]:
            found[-1][1] = edges[place + 1]
        else:
            found.append([edges[place], edges[place + 1]])
    return found


def _more(found: Found, config: BalancedConfig) -> Numbers | None:
    """Give the next point of the curve that keeps more: what a larger tolerance would buy."""
    if config.by == "weight" or config.per_class or config.size is not None:
        return None
    larger = [point for point in found.get("curve", []) if point["tolerance"] > config.allowed]
    return next((point for point in larger if point["size"] > found["kept"]), None)


def _classes(classes: Sequence[Found]) -> Numbers:
    """Count the classes that came nearer to uniform, and give those that stand worst: first what keeps nothing."""
    there = [each for each in classes if each["before"]]
    kept = [each for each in there if each["after"]]
    moved = [each["distance_after"] - each["distance_before"] for each in kept]
    worst = sorted(there, key=lambda each: (bool(each["after"]), -each["distance_after"], each["name"]))
    return {
        "number": len(there),
        "lost": len(there) - len(kept),
        "nearer": sum(change < -_SAME for change in moved),
        "farther": sum(change > _SAME for change in moved),
        "median_before": median(each["distance_before"] for each in there) if there else 0.0,
        "median_after": median(each["distance_after"] for each in kept) if kept else 0.0,
        "worst": [_class(each) for each in worst[:MOST_CLASSES]],
    }


def _class(found: Found) -> Numbers:
    """Describe a class; one of which nothing is kept has no distance afterwards."""
    after = ("distance_after", "ks_after")
    return {
        **found,
        "name": short(found["name"], 80),
        **{name: found[name] if found["after"] else None for name in after},
    }


def _shortages(shortages: Sequence[Found], edges: Sequence[float]) -> list[Numbers]:
    """Give the bins and classes that lack most of an even share, with edges that are not 0.09999."""
    return [
        {
            "class": short(each["class"], 80),
            "bin": each["bin"],
            "low": edges[each["bin"]],
            "high": edges[each["bin"] + 1],
            "has": each["has"],
            "even": each["even"],
        }
        for each in shortages[:MOST_SHORTAGES]
        if round(each["even"]) > each["has"]  # half a sample is nothing to look for
    ]


SETTINGS = ("fusion", "sampling", "balancing", "only", "init", "epochs", "keep_posterior")  # those that are told
_HISTORY = ("epoch", "train_loss", "validation_loss", "validation_accuracy")  # what is drawn of history.jsonl
MOST_DETAILED = 8  # manifests, and fine-tunings, with a figure of their own; the others have their line in the table


def manifest_numbers(path: Path, *, fingerprint: str) -> Numbers:
    """Describe one manifest from its files, a batch at a time; `fingerprint` is that of the run's own data.

    `balance` is None where NAME.balance.json does not lie beside it, or is another manifest's: `untold` says which.
    """
    about = provenance_of(path)
    numbers, untold = _numbers_of(path)
    kept = _tally(path, by="split")
    dropped = _tally(dropped_path(path), by="reason") if _belongs(dropped_path(path), path) else None
    reasons = numbers["reasons"] if numbers else {row["name"]: row["n"] for row in dropped or ()}
    splits = {row["name"]: row["n"] for row in kept}
    return {
        "name": path.stem,
        "subset": short(about.get("subset", path.stem)),
        "between": short(about.get("between", "")),
        "kept": sum(row["n"] for row in kept),
        "kept_gap": _mean_gap(kept),
        "dropped": numbers["dropped"] if numbers else None if dropped is None else sum(row["n"] for row in dropped),
        "reasons": [
            {"name": name, "n": count, "gap": _mean_gap([row for row in dropped or () if row["name"] == name])}
            for name, count in sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
        ],
        "splits": splits,
        "of_this_run": about.get("scores", {}).get("fingerprint") == fingerprint,
        "untold": untold,
        "balance": uniformity(numbers, splits) if numbers else None,
    }


def finetune_numbers(folder: Path, run: Run) -> Numbers:
    """Describe one finished fine-tuning from its metrics.json and history.jsonl.

    `current` tells whether the manifest of that name in the run is still the one that was trained on.
    """
    metrics = read_metrics(folder)
    manifest = run.manifest(metrics["manifest"])
    settings = metrics["config"].get("finetune", {})
    found, contribution = metrics["test"]["all"].get("branches", {}), metrics.get("contribution")
    branches = sorted(found, key=lambda name: (name == "fused", name))
    return {
        "name": folder.name,
        "manifest": metrics["manifest"],
        "current": not manifest.exists() or _digest(manifest) == metrics["manifest_digest"],
        "test_labels_in_scores": metrics["test_labels_in_scores"],
        "settings": {key: settings.get(key) for key in SETTINGS},
        "seed": metrics["config"].get("seed"),
        "counts": metrics["counts"],
        "best_epoch": metrics["best_epoch"],
        "chance": metrics["chance"]["majority"],
        "branches": branches,
        "contribution": contribution if contribution and contribution["n"] else None,
        "subsets": [_subset(name, metrics["test"][name], branches) for name in sorted(metrics["test"], key=_place)],
        "history": _history(folder / "history.jsonl"),
    }


def _numbers_of(path: Path) -> tuple[Numbers | None, str | None]:
    """Read the numbers beside a manifest, or say why there are none."""
    beside = balance_path(path)
    if not beside.exists():
        return None, "missing"
    numbers = read_numbers(beside, error=RunError)
    return (numbers, None) if numbers.get("digest") == _digest(path) else (None, "another")


def _digest(path: Path) -> str:
    """Give Manifest.digest() of a file: as it is written there, unless it was written by something else."""
    told = rows_of(path)
    if told.get("rows") == num_rows_of(path):
        return str(told["digest"])
    return digests_of(path).rows


def _belongs(dropped: Path, path: Path) -> bool:
    """Tell whether these are the rows that this manifest left out: a split that was killed leaves another's."""
    return dropped.exists() and rows_of(dropped).get("dropped_from") == _digest(path)


def _tally(path: Path, *, by: str) -> list[Numbers]:
    """Count the rows by a column of strings, and sum their gaps; the most frequent first."""
    parts = [
        batch.group_by(by).aggregate([("gap", "sum"), ("gap", "count"), ([], "count_all")]) for batch in _gaps(path, by)
    ]
    if not parts:
        return []
    every = pa.concat_tables(parts).group_by(by)
    summed = every.aggregate([(name, "sum") for name in ("gap_sum", "gap_count", "count_all")])
    rows = [
        {
            "name": str(row[by] or NO_SPLIT),
            "n": row["count_all_sum"],
            "gap": row["gap_sum_sum"],
            "of": row["gap_count_sum"],
        }
        for row in summed.to_pylist()
    ]
    return sorted(rows, key=lambda row: (-row["n"], row["name"]))


def _gaps(path: Path, by: str) -> Iterator[pa.Table]:
    for batch in batches_of(path, columns=[by, "gap"]):
        yield pa.table({by: batch[by].cast(pa.string()), "gap": pc.cast(batch["gap"], pa.float64())})


def _mean_gap(rows: list[Numbers]) -> float | None:
    """Give the mean modality gap of counted rows; None where none has one."""
    number = sum(row["of"] for row in rows)
    return sum(row["gap"] or 0.0 for row in rows) / number if number else None


def _place(subset: str) -> tuple[int, str]:
    """Order subsets for reading: all, those of the manifest, the balanced ones, then modality by modality."""
    first = ("all", "in-manifest")
    if subset in first:
        return first.index(subset), ""
    return 2 if subset.startswith("balanced") else 3, subset.replace("-preferred", "-d")  # before NAME-dominated-0.2


def _subset(name: str, found: Mapping[str, Any], branches: list[str]) -> Numbers:
    """Give n and, for each branch in order, its measurements; None where the subset holds no test sample."""
    measured = found.get("branches")
    return {
        "name": name,
        "n": found["n"],
        "branches": None if measured is None else [measured[branch] for branch in branches],
    }


def _epoch(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = parse_data_json(line)  # a loss may be NaN
        check_shape(record, dict.fromkeys(_HISTORY, (float, type(None))))
    except ValueError as error:
        raise RunError(f"{path}, line {number} cannot be read: {error}; train it anew with --overwrite") from error
    return dict(record)


def _history(path: Path) -> dict[str, list[float | None]]:
    """Give what history.jsonl says of each epoch, by column."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [_epoch(path, number, line) for number, line in enumerate(lines, start=1) if line]
    return {key: [finite(record.get(key)) for record in records] for key in _HISTORY}
