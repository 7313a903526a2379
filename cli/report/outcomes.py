"""What came of the scores: the manifests and fine-tunings of a run, in the numbers that the report shows"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...audit.errors import RunError
from ...audit.files import read_json
from ...rebalance.balanced import CURVE, BalancedConfig, bin_of, distance_to_uniform, size_curve
from ...rebalance.manifest import Manifest, read_dropped, read_manifest
from ..run import Run
from .findings import Numbers, finite, short

Array = NDArray[Any]

MOST_CLASSES = 12  # of a manifest, the shortest first
MOST_DETAILED = 8  # manifests, and fine-tunings, with a figure of their own; the others have their line in the table


def manifest_numbers(path: Path, *, fingerprint: str) -> Numbers:
    """Describe one manifest from its two files; `fingerprint` is that of the run's own data."""
    manifest = read_manifest(path)
    dropped = read_dropped(path, manifest)
    about = manifest.provenance
    balanced = about.get("rule", {}).get("kind") == "balanced" and dropped is not None
    return {
        "name": path.stem,
        "subset": short(about.get("subset", path.stem)),
        "between": short(about.get("between", "")),
        "kept": len(manifest),
        "dropped": None if dropped is None else len(dropped),
        "reasons": {} if dropped is None else _counts(dropped["reason"]),
        "splits": _counts(manifest.table["split"]),
        "of_this_run": about.get("scores", {}).get("fingerprint") == fingerprint,
        "balance": _balance(manifest, dropped) if balanced and dropped is not None else None,
    }


def finetune_numbers(folder: Path, run: Run) -> Numbers:
    """Describe one finished fine-tuning from its metrics.json and history.jsonl.

    `current` tells whether the manifest of that name in the run is still the one that was trained on.
    """
    metrics = read_json(folder / "metrics.json", error=RunError)
    manifest = run.manifest(metrics["manifest"])
    settings = metrics["config"].get("finetune", {})
    found = metrics["test"]["all"].get("branches", {})
    branches = sorted(found, key=lambda name: (name == "fused", name))
    return {
        "name": folder.name,
        "manifest": metrics["manifest"],
        "current": not manifest.exists() or read_manifest(manifest).digest() == metrics["manifest_digest"],
        "test_labels_in_scores": metrics["test_labels_in_scores"],
        "settings": {key: settings.get(key) for key in ("fusion", "sampling", "epochs", "keep_posterior")},
        "seed": metrics["config"].get("seed"),
        "counts": metrics["counts"],
        "best_epoch": metrics["best_epoch"],
        "chance": metrics["chance"]["majority"],
        "branches": branches,
        "subsets": [_subset(name, metrics["test"][name], branches) for name in sorted(metrics["test"], key=_place)],
        "history": _history(folder / "history.jsonl"),
    }


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Count the values of a column of strings, the most frequent first."""
    found = {str(each["values"] or "none"): int(each["counts"]) for each in column.value_counts().to_pylist()}
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def _balance(manifest: Manifest, dropped: pa.Table) -> Numbers:
    """Compare the kept samples with all that could be kept, from the files alone."""
    num_bins = int(manifest.provenance["rule"].get("bins", BalancedConfig().bins))
    kept = manifest.numbers("discrepancy")
    everything = np.concatenate([kept, np.array(dropped["discrepancy"], dtype=np.float64)])
    after, before = (_bins(values, num_bins) for values in (kept, everything))
    splits = np.array(manifest.table["split"].to_pylist() + dropped["split"].to_pylist(), dtype=object)
    by_split = [_bins(everything[splits == name], num_bins) for name in sorted(set(splits), key=str)]
    return {
        "edges": np.linspace(-1, 1, num_bins + 1).round(6).tolist(),
        "before": before.tolist(),
        "after": after.tolist(),
        "tolerance": manifest.provenance["rule"].get("tolerance"),
        "size": manifest.provenance["rule"].get("size"),
        "distance_before": distance_to_uniform(before, available=before),
        "distance_after": distance_to_uniform(after, available=before),
        "positive_before": float((everything > 0).mean()),
        "positive_after": float((kept > 0).mean()),
        "empty_bins": int((before == 0).sum()),
        "curve": [
            {"tolerance": point.tolerance, "size": point.size, "distance": point.distance}
            for point in size_curve(by_split, CURVE)
        ],
        **_shortest(manifest, dropped),
    }


def _bins(values: Array, num_bins: int) -> NDArray[np.int64]:
    return np.bincount(bin_of(values.astype(np.float32), num_bins=num_bins), minlength=num_bins)


def _shortest(manifest: Manifest, dropped: pa.Table) -> Numbers:
    """Give the classes of which the fewest samples are kept, and how many classes there are and lose all."""
    kept, lost = _counts(manifest.table["label_name"]), _counts(dropped["label_name"])
    names = sorted({*kept, *lost}, key=lambda name: (kept.get(name, 0), name))
    return {
        "num_classes": len(names),
        "classes_lost": sum(name not in kept for name in names),
        "classes": [
            {"name": short(name, 80), "kept": kept.get(name, 0), "of": kept.get(name, 0) + lost.get(name, 0)}
            for name in names[:MOST_CLASSES]
        ],
    }


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


def _history(path: Path) -> dict[str, list[float | None]]:
    """Give what history.jsonl says of each epoch, by column."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line]
    keys = ("epoch", "train_loss", "validation_loss", "validation_accuracy")
    return {key: [finite(record.get(key)) for record in records] for key in keys}
