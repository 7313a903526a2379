"""What came of the scores: the manifests and fine-tunings of a run, in the numbers that the report shows"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...audit.errors import RunError
from ...audit.json_text import check_shape, parse_data_json
from ...rebalance.manifest import batches_of, digests_of, dropped_path, num_rows_of, provenance_of, rows_of
from ...rebalance.recipe import balance_path
from ...rebalance.score_columns import NO_SPLIT
from ...rebalance.tally import read_numbers
from ..run import Run, read_metrics
from .findings import Numbers, finite, short
from .uniformity import uniformity

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
