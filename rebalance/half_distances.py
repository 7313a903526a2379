"""Distance to uniform of a balanced split, measured by probes of features that it is not selected by.

A split is uniform by the scores that it is selected by, also where these are noise. So the same split is made by the
scores of one half of the features, and its distance is measured by those of the other half, both ways. Ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..audit.metrics import Floats
from ..audit.scores.table import HALVES
from .balanced import BalancedRule, balancing_weights
from .score_tables import ScoreBatch, ScoreFiles
from .split_stats import distance_to_uniform

MAX_ROWS = 200_000  # those of the smallest keys


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Rows in the order of their keys: key, split, and cells and bins by either half, all (n,)."""

    key: NDArray[np.uint64]
    split: NDArray[np.int16]
    cells: tuple[NDArray[np.int32], NDArray[np.int32]]
    bins: tuple[NDArray[np.int32], NDArray[np.int32]]


def measure_by_halves(scores: ScoreFiles, rule: BalancedRule, *, num_eligible: int) -> dict[str, float] | None:
    """Return the distance to uniform of the rule's split by the half of the features that selects, and by the other.

    All are means over the two ways: `selected` and `measured`, in [0, 1], `chance`, what a uniform sample of as many
    rows has on average, and `kept` of `num_rows`. None where the table has no scores by halves. `num_eligible` is the
    number of rows that the rule selects from, by which a requested size is reduced to the rows with such scores.
    """
    rows = _read_rows(scores, rule)
    if rows is None:
        return None
    size = rule.config.size
    if size is not None:
        size = max(1, min(len(rows.key), round(size * len(rows.key) / max(1, num_eligible))))
        rule = replace(rule, config=replace(rule.config, size=size))
    both = [_one_way(rule, rows, by=by) for by in (0, 1)]
    return {"num_rows": len(rows.key), **{name: (both[0][name] + both[1][name]) / 2 for name in both[0]}}


def _read_rows(scores: ScoreFiles, rule: BalancedRule) -> _Rows | None:
    """Read the rows that both halves give a cell; at most MAX_ROWS, in the order of their keys."""
    if not all(f"{half}_{name}" in scores.columns for half in HALVES for name in rule.modalities(scores.modalities)):
        return None
    parts: list[_Rows] = []
    for batch in scores.batches(halves=True):
        views = [replace(batch, confidence=_half(batch, half)) for half in HALVES]
        cells, bins = [rule.cells(view) for view in views], [rule.bins(view) for view in views]
        valid = np.flatnonzero((cells[0] >= 0) & (cells[1] >= 0))
        parts.append(
            _Rows(
                key=batch.key[valid],
                split=batch.split[valid],
                cells=(cells[0][valid], cells[1][valid]),
                bins=(bins[0][valid], bins[1][valid]),
            )
        )
        if sum(len(part.key) for part in parts) > 2 * MAX_ROWS:
            parts = [_first(parts)]
    rows = _first(parts)
    return rows if len(rows.key) else None


def _first(parts: list[_Rows]) -> _Rows:
    """Join parts, and return the MAX_ROWS rows of the smallest keys, sorted by key."""
    key = np.concatenate([part.key for part in parts])
    order = np.argsort(key, kind="stable")[:MAX_ROWS]
    cells, bins = (
        tuple(np.concatenate([getattr(part, name)[half] for part in parts])[order] for half in (0, 1))
        for name in ("cells", "bins")
    )
    split = np.concatenate([part.split for part in parts])[order]
    return _Rows(key=key[order], split=split, cells=(cells[0], cells[1]), bins=(bins[0], bins[1]))


def _half(batch: ScoreBatch, half: str) -> Floats:
    """Return the confidences (n, m) by one half of the features; NaN for a modality without them."""
    columns = [batch.numbers(f"{half}_{name}") for name in batch.modalities]
    missing = np.full(len(batch), np.nan, np.float32)
    return np.stack([missing if column is None else column for column in columns], axis=1)


def _one_way(rule: BalancedRule, rows: _Rows, *, by: int) -> dict[str, float]:
    """Select by one half, and compute the distances over the bins of either half that hold rows."""
    num_splits, num_bins, _ = rule.shape
    cell, selecting, measuring = rows.cells[by], rows.bins[by], rows.bins[1 - by]
    counts = np.bincount(cell, minlength=rule.num_cells)
    quota = np.minimum(rule.quotas(counts), counts)
    order = np.argsort(cell, kind="stable")  # rows are in the order of their keys, as a selection takes them
    rank = np.empty(len(cell), np.int64)
    rank[order] = np.arange(len(cell)) - np.repeat(np.cumsum(counts) - counts, counts)
    keep = rank < quota[cell]
    weight = np.ones(len(cell))
    if rule.config.by == "weight":
        by_split = np.bincount(rows.split.astype(np.int64) * num_bins + selecting, minlength=num_splits * num_bins)
        tables = [balancing_weights(row, max_weight=rule.config.max_weight) for row in by_split.reshape(-1, num_bins)]
        weight = np.stack(tables)[rows.split, selecting]
    mass = weight[keep]
    selected, measured = (
        distance_to_uniform(
            np.bincount(bins[keep], weights=mass, minlength=num_bins), available=np.bincount(bins, minlength=num_bins)
        )
        for bins in (selecting, measuring)
    )
    effective = float(mass.sum() ** 2 / (mass**2).sum())
    filled = len(np.unique(measuring))
    chance = filled / 2 * np.sqrt(2 / np.pi * (1 / filled) * (1 - 1 / filled) / effective)
    return {"kept": float(keep.sum()), "selected": selected, "measured": measured, "chance": float(chance)}
