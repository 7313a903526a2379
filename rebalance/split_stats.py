"""Statistics of a split before and after: distances to uniform, counts by class, shortages.

Kept while rows pass by, in memory that depends on the numbers of bins and classes only. Letters: s splits, b bins over
[-1, 1], k classes, f fine bins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..audit.errors import MmauditError
from ..audit.parsing import Complete
from ..audit.storage import read_json
from .binning import distance_to_uniform
from .score_tables import ScoreBatch, ScoreFiles
from .selection import Decision

_MAX_FINE_BINS = 1_024  # bins in whose steps KS is taken, which is right to 0.001 then
_MAX_CELLS = 1 << 18  # of all counts together: what stays in the cache is added to ten times as quickly
MAX_SHORTAGES = 20

_UNIFORMITY = Complete(distance=float, ks=float, positive=float)
_SHAPE = Complete(  # of NAME.balance.json, where some of it comes from the recipe
    {
        "name": str,
        "between": str,
        "bins": int,
        "kept": int,
        "dropped": int,
        "scored": int,
        "reasons": {"*": int},
        "effective_size": float,
        "before": _UNIFORMITY,
        "after": _UNIFORMITY,
        "distances": {"*": float},
        "counts_before": [int],
        "counts_after": [float],
        "empty_bins": [int],
        "classes": [
            Complete(
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
        "shortages": [Complete({"class": str, "bin": int, "low": float, "high": float, "has": int, "even": float})],
        "curve?": [Complete(tolerance=float, size=int, distance=float)],
        "grid?": bool,
        "recipe": {"balanced": (dict, type(None))},
        "digest": str,
    }
)


def read_numbers(path: Path, *, error: type[MmauditError]) -> dict[str, Any]:
    """Read NAME.balance.json: Tally.numbers of a split with its name, recipe and digest, `curve` if it is balanced."""
    numbers = read_json(path, error=error, shape=_SHAPE)
    bins = numbers["bins"]
    places = [*numbers["empty_bins"], *(shortage["bin"] for shortage in numbers["shortages"])]
    if not len(numbers["counts_before"]) == len(numbers["counts_after"]) == bins > max([0, *places]):
        raise error(f"{path} does not count {bins} bins: recreate the manifest with mmaudit split")
    if min([0, *places]) < 0:
        raise error(f"{path} names bin {min(places)}: recreate the manifest with mmaudit split")
    return numbers


class SplitStats:
    """Counts of a discrepancy among all rows and the kept ones; the kept ones weigh what their manifest says.

    They are held by split, class, bin, and fine bins within each bin: (s, k, b, f / b).
    """

    def __init__(self, score_files: ScoreFiles, *, between: str, num_bins: int) -> None:
        self.between, self.num_bins, self.score_files = between, num_bins, score_files
        cells = len(score_files.splits) * len(score_files.classes) * num_bins
        within = max(1, min(_MAX_FINE_BINS // num_bins, _MAX_CELLS // cells))
        self._held = [np.zeros((len(score_files.splits), len(score_files.classes), num_bins, within)) for _ in range(2)]
        self._positive = [0.0, 0.0]
        self._squares = 0.0  # sum of squared weights of the kept
        self.kept = self.dropped = 0
        self.reasons: dict[str, int] = {}

    def add(self, batch: ScoreBatch, decision: Decision, reasons: tuple[str, ...]) -> None:
        """Count some rows."""
        keep, values, weight = decision.keep, decision.discrepancy, decision.outcome.weight
        kept = int(np.count_nonzero(keep))
        self.kept += kept
        self.dropped += len(batch) - kept
        self._count_reasons(decision.reason[~keep] if decision.reason.any() else None, len(batch) - kept, reasons)
        there = ~np.isnan(values)
        cell = self._cells(batch, np.where(there, values, 0).astype(np.float64))
        if not there.all():
            cell, values, keep = cell[there], values[there], keep[there]
            weight = None if weight is None else weight[there]
        size = self._held[0].size
        both = np.bincount(cell * 2 + keep, minlength=2 * size).reshape((*self._held[0].shape, 2))
        self._held[0] += both.sum(axis=-1)
        self._positive[0] += np.count_nonzero(values > 0)
        if weight is None or (weight == 1).all():
            self._held[1] += both[..., 1]
            self._positive[1] += np.count_nonzero((values > 0) & keep)
            self._squares += int(both[..., 1].sum())
        else:
            mass = weight[keep].astype(np.float64)
            found = np.bincount(cell[keep], weights=mass, minlength=size)
            self._held[1] += found.reshape(self._held[1].shape)
            self._positive[1] += float(mass[values[keep] > 0].sum())
            self._squares += float((mass**2).sum())

    def _cells(self, batch: ScoreBatch, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Give the place of each row among what is held, (n,)."""
        _, k, b, within = self._held[0].shape
        place = (values + 1) / 2 * b
        bins = np.clip(place, 0, b - 1).astype(np.int64)  # as bin_of has them
        fine = np.clip((place - bins) * within, 0, within - 1).astype(np.int64)
        return np.asarray(((batch.split.astype(np.int64) * k + batch.label) * b + bins) * within + fine)

    def _count_reasons(self, reason: NDArray[np.int8] | None, number: int, reasons: tuple[str, ...]) -> None:
        counts = [number] if reason is None else np.bincount(reason, minlength=len(reasons)).tolist()
        for name, found in zip(reasons, counts, strict=False):
            if found:
                self.reasons[name] = self.reasons.get(name, 0) + found

    def numbers(self) -> dict[str, Any]:
        """Give all that is to be told of the split, as plain values."""
        before, after = (held.sum(axis=(0, 3)).T for held in self._held)  # (b, k)
        total = float(after.sum())
        return {
            "between": self.between,
            "bins": self.num_bins,
            "kept": self.kept,
            "dropped": self.dropped,
            "scored": self.kept + self.dropped,
            "reasons": dict(sorted(self.reasons.items())),
            "effective_size": total**2 / self._squares if self._squares else 0.0,
            "before": self._uniformity(0),
            "after": self._uniformity(1),
            "distances": self._by_split(),
            "counts_before": [int(each) for each in before.sum(axis=1)],
            "counts_after": [float(each) for each in after.sum(axis=1)],
            "empty_bins": np.flatnonzero(before.sum(axis=1) == 0).tolist(),
            "classes": self._by_class(before, after),
            "shortages": self._shortages(before, after),
        }

    def _uniformity(self, place: int) -> dict[str, float]:
        by_bin = self._held[place].sum(axis=(0, 1, 3))
        mass = float(by_bin.sum())
        return {
            "distance": distance_to_uniform(by_bin, available=self._held[0].sum(axis=(0, 1, 3))),
            "ks": _ks_distance(self._held[place].sum(axis=(0, 1)).reshape(-1)),
            "positive": float(self._positive[place] / mass) if mass else 0.0,
        }

    def _by_split(self) -> dict[str, float]:
        """Give the distance to uniform of each split, over the bins that the split itself fills."""
        before, after = (held.sum(axis=(1, 3)) for held in self._held)  # (s, b)
        return {
            name: distance_to_uniform(after[place], available=before[place])
            for place, name in enumerate(self.score_files.splits)
            if before[place].any()
        }

    def _by_class(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> list[dict[str, Any]]:
        found = []
        fine = [held.sum(axis=0).reshape(len(self.score_files.classes), -1) for held in self._held]
        for place, name in enumerate(self.score_files.class_names):
            there = before[:, place]
            found.append(
                {
                    "name": name,
                    "before": int(there.sum()),
                    "after": float(after[:, place].sum()),
                    "distance_before": distance_to_uniform(there, available=there),
                    "distance_after": distance_to_uniform(after[:, place], available=there),
                    "ks_before": _ks_distance(fine[0][place]),
                    "ks_after": _ks_distance(fine[1][place]),
                    "empty_bins": int((there == 0).sum()),
                }
            )
        return found

    def _shortages(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> list[dict[str, Any]]:
        """Give the bins and classes that have least of what an even share of their bin would be, the worst first."""
        wanted = after.sum(axis=1, keepdims=True) / max(1, int(before.any(axis=0).sum()))
        there = before.any(axis=1, keepdims=True) & before.any(axis=0)  # a class without any is short of no bin
        lacking = np.where(there, wanted - before, 0)
        worst = np.argsort(-lacking, axis=None, kind="stable")[:MAX_SHORTAGES]
        bins, classes = np.unravel_index(worst, lacking.shape)
        width = 2 / self.num_bins
        return [
            {
                "class": self.score_files.class_names[one],
                "bin": int(row),
                "low": -1 + width * int(row),
                "high": -1 + width * (int(row) + 1),
                "has": int(before[row, one]),
                "even": float(wanted[row, 0]),
            }
            for row, one in zip(bins, classes, strict=True)
            if lacking[row, one] > 0
        ]


def _ks_distance(fine: NDArray[np.float64]) -> float:
    """Largest difference of the distribution function to that of uniform over [-1, 1], at the edges of fine bins (f,).

    In between it can be larger by 1 / f at most. 0 of nothing.
    """
    total = float(fine.sum())
    if total == 0:
        return 0.0
    share = np.r_[0.0, np.cumsum(fine) / total]
    even = np.arange(len(share)) / (len(share) - 1)
    return float(np.abs(share - even).max())
