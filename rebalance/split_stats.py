"""Statistics of a split before and after: distances to uniform, counts by class, shortages.

Updated batch by batch, in memory that depends on the numbers of bins and classes only. Letters: s splits, b bins over
[-1, 1], k classes, f fine bins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..audit.errors import MmauditError
from ..audit.parsing import RequiredKeys
from ..audit.storage import read_json
from .score_tables import ScoreBatch, ScoreFiles
from .selection import Decision

_MAX_FINE_BINS = 1_024  # fine bins of the KS distance, which is then exact to 0.001
_MAX_CELLS = 1 << 18  # of all counts together: they stay in the cache, where adding is ten times as fast
MAX_SHORTAGES = 20

_UNIFORMITY = RequiredKeys(distance=float, ks=float, positive=float)
_SHAPE = RequiredKeys(  # of NAME.balance.json, which also has the recipe
    {
        "name": str,
        "between": str,
        "bins": int,
        "kept": int,
        "dropped": int,
        "scored": int,
        "splits": {"*": int},
        "reasons": {"*": int},
        "effective_size": float,
        "before": _UNIFORMITY,
        "after": _UNIFORMITY,
        "distances": {"*": float},
        "counts_before": [int],
        "counts_after": [float],
        "empty_bins": [int],
        "classes": [
            RequiredKeys(
                name=str,
                before=int,
                after=float,
                distance_before=float,
                distance_after=float,
                ks_before=float,
                ks_after=float,
                empty_bins=int,
            )
        ],
        "shortages": [
            RequiredKeys({"class": str, "bin": int, "low": float, "high": float, "has": int, "even_share": float})
        ],
        "curve?": [RequiredKeys(tolerance=float, size=int, distance=float)],
        "grid?": bool,
        "halves?": (RequiredKeys(num_rows=int, kept=float, selected=float, measured=float, chance=float), type(None)),
        "recipe": {"balanced": (dict, type(None))},
        "digest": str,
    }
)


def distance_to_uniform(mass: NDArray[Any], *, available: NDArray[Any]) -> float:
    """Compute the total-variation distance, in [0, 1], of a mass by bin (b,) to uniform over the non-empty bins."""
    filled = available > 0
    if not filled.any():
        return 0.0
    share = mass[filled] / (mass.sum() or 1)
    return float(np.abs(share - 1 / filled.sum()).sum() / 2)


def distances_by_split(mass: NDArray[Any], *, available: NDArray[Any], splits: tuple[str, ...]) -> dict[str, float]:
    """Compute the distance to uniform of each split with samples, from its mass by bin (s, b)."""
    return {
        name: distance_to_uniform(split_mass, available=split_available)
        for name, split_mass, split_available in zip(splits, mass, available, strict=True)
        if split_available.any()
    }


def read_numbers(path: Path, *, error: type[MmauditError]) -> dict[str, Any]:
    """Read NAME.balance.json: SplitStats.numbers with name, recipe and digest, and `curve` of a balanced split."""
    numbers = read_json(path, error=error, shape=_SHAPE)
    bins = numbers["bins"]
    bin_indices = [*numbers["empty_bins"], *(shortage["bin"] for shortage in numbers["shortages"])]
    if not len(numbers["counts_before"]) == len(numbers["counts_after"]) == bins > max([0, *bin_indices]):
        raise error(f"{path} does not have {bins} bins: recreate the manifest with mmaudit split")
    if min([0, *bin_indices]) < 0:
        raise error(f"{path} names bin {min(bin_indices)}: recreate the manifest with mmaudit split")
    return numbers


class SplitStats:
    """Mass of a discrepancy over all rows (counts) and over the kept rows (their weights in the manifest).

    Both masses are arrays by split, class, bin, and fine bin within each bin: (s, k, b, f / b).
    """

    def __init__(self, scores: ScoreFiles, *, between: str, num_bins: int) -> None:
        self.between, self.num_bins, self.scores = between, num_bins, scores
        cells = len(scores.splits) * len(scores.classes) * num_bins
        fine_per_bin = max(1, min(_MAX_FINE_BINS // num_bins, _MAX_CELLS // cells))
        self._masses = [np.zeros((len(scores.splits), len(scores.classes), num_bins, fine_per_bin)) for _ in range(2)]
        self._positive = [0.0, 0.0]
        self._squares = 0.0  # sum of squared weights of the kept rows
        self.num_kept = self.num_dropped = 0
        self._kept_by_split = np.zeros(len(scores.splits), dtype=np.int64)
        self.reasons: dict[str, int] = {}

    def add(self, batch: ScoreBatch, decision: Decision, reasons: tuple[str, ...]) -> None:
        """Add the rows of a batch."""
        keep, values, weight = decision.keep, decision.discrepancy, decision.outcome.weight
        num_kept = int(np.count_nonzero(keep))
        self.num_kept += num_kept
        self._kept_by_split += np.bincount(batch.split[keep], minlength=len(self.scores.splits))
        self.num_dropped += len(batch) - num_kept
        self._count_reasons(decision.reason[~keep] if decision.reason.any() else None, len(batch) - num_kept, reasons)
        valid = ~np.isnan(values)
        cell = self._cells(batch, np.where(valid, values, 0).astype(np.float64))
        if not valid.all():
            cell, values, keep = cell[valid], values[valid], keep[valid]
            weight = None if weight is None else weight[valid]
        size = self._masses[0].size
        counts_by_keep = np.bincount(cell * 2 + keep, minlength=2 * size).reshape((*self._masses[0].shape, 2))
        self._masses[0] += counts_by_keep.sum(axis=-1)
        self._positive[0] += np.count_nonzero(values > 0)
        if weight is None or (weight == 1).all():
            self._masses[1] += counts_by_keep[..., 1]
            self._positive[1] += np.count_nonzero((values > 0) & keep)
            self._squares += int(counts_by_keep[..., 1].sum())
        else:
            mass = weight[keep].astype(np.float64)
            kept_mass = np.bincount(cell[keep], weights=mass, minlength=size)
            self._masses[1] += kept_mass.reshape(self._masses[1].shape)
            self._positive[1] += float(mass[values[keep] > 0].sum())
            self._squares += float((mass**2).sum())

    def _cells(self, batch: ScoreBatch, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the flat index of each row's fine bin in the masses, (n,)."""
        _, num_classes, num_bins, fine_per_bin = self._masses[0].shape
        position = (values + 1) / 2 * num_bins
        bins = np.clip(position, 0, num_bins - 1).astype(np.int64)  # as in bin_of
        fine = np.clip((position - bins) * fine_per_bin, 0, fine_per_bin - 1).astype(np.int64)
        return np.asarray(
            ((batch.split.astype(np.int64) * num_classes + batch.label) * num_bins + bins) * fine_per_bin + fine
        )

    def _count_reasons(self, reason: NDArray[np.int8] | None, num_dropped: int, reasons: tuple[str, ...]) -> None:
        counts = [num_dropped] if reason is None else np.bincount(reason, minlength=len(reasons)).tolist()
        for name, count in zip(reasons, counts, strict=False):
            if count:
                self.reasons[name] = self.reasons.get(name, 0) + count

    def numbers(self) -> dict[str, Any]:
        """Return all statistics of the split as JSON values."""
        before, after = (mass.sum(axis=(0, 3)).T for mass in self._masses)  # (b, k)
        available, kept = (mass.sum(axis=(1, 3)) for mass in self._masses)  # (s, b)
        total = float(after.sum())
        return {
            "between": self.between,
            "bins": self.num_bins,
            "kept": self.num_kept,
            "dropped": self.num_dropped,
            "scored": self.num_kept + self.num_dropped,
            "splits": dict(zip(self.scores.splits, self._kept_by_split.tolist(), strict=True)),
            "reasons": dict(sorted(self.reasons.items())),
            "effective_size": total**2 / self._squares if self._squares else 0.0,
            "before": self._uniformity(0),
            "after": self._uniformity(1),
            "distances": distances_by_split(kept, available=available, splits=self.scores.splits),
            "counts_before": [int(mass) for mass in before.sum(axis=1)],
            "counts_after": [float(mass) for mass in after.sum(axis=1)],
            "empty_bins": np.flatnonzero(before.sum(axis=1) == 0).tolist(),
            "classes": self._by_class(before, after),
            "shortages": self._shortages(before, after),
        }

    def _uniformity(self, index: int) -> dict[str, float]:
        by_bin = self._masses[index].sum(axis=(0, 1, 3))
        mass = float(by_bin.sum())
        return {
            "distance": distance_to_uniform(by_bin, available=self._masses[0].sum(axis=(0, 1, 3))),
            "ks": _ks_distance(self._masses[index].sum(axis=(0, 1)).reshape(-1)),
            "positive": float(self._positive[index] / mass) if mass else 0.0,
        }

    def _by_class(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> list[dict[str, Any]]:
        classes = []
        fine = [mass.sum(axis=0).reshape(len(self.scores.classes), -1) for mass in self._masses]
        for class_index, name in enumerate(self.scores.class_names):
            class_before = before[:, class_index]
            classes.append(
                {
                    "name": name,
                    "before": int(class_before.sum()),
                    "after": float(after[:, class_index].sum()),
                    "distance_before": distance_to_uniform(class_before, available=class_before),
                    "distance_after": distance_to_uniform(after[:, class_index], available=class_before),
                    "ks_before": _ks_distance(fine[0][class_index]),
                    "ks_after": _ks_distance(fine[1][class_index]),
                    "empty_bins": int((class_before == 0).sum()),
                }
            )
        return classes

    def _shortages(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> list[dict[str, Any]]:
        """Return the cells furthest below a uniform share of their bin, largest shortage first."""
        uniform_share = after.sum(axis=1, keepdims=True) / max(1, int(before.any(axis=0).sum()))
        may_be_short = before.any(axis=1, keepdims=True) & before.any(axis=0)  # no shortage of empty classes
        shortage = np.where(may_be_short, uniform_share - before, 0)
        worst = np.argsort(-shortage, axis=None, kind="stable")[:MAX_SHORTAGES]
        bins, classes = np.unravel_index(worst, shortage.shape)
        width = 2 / self.num_bins
        return [
            {
                "class": self.scores.class_names[class_index],
                "bin": int(bin_index),
                "low": -1 + width * int(bin_index),
                "high": -1 + width * (int(bin_index) + 1),
                "has": int(before[bin_index, class_index]),
                "even_share": float(uniform_share[bin_index, 0]),
            }
            for bin_index, class_index in zip(bins, classes, strict=True)
            if shortage[bin_index, class_index] > 0
        ]


def _ks_distance(fine: NDArray[np.float64]) -> float:
    """Compute the Kolmogorov-Smirnov distance, in [0, 1], to uniform over [-1, 1] at the edges of fine bins (f,).

    Between the edges it can be larger by 1 / f at most. It is 0 without samples.
    """
    total = float(fine.sum())
    if total == 0:
        return 0.0
    cumulative_share = np.r_[0.0, np.cumsum(fine) / total]
    uniform = np.arange(len(cumulative_share)) / (len(cumulative_share) - 1)
    return float(np.abs(cumulative_share - uniform).max())
