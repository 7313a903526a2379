"""Tally: how uniform is the discrepancy, before and after, overall and in each class, and what is short?

Kept while rows pass by, in memory that depends on the numbers of bins and classes only. Letters: s splits, b bins over
[-1, 1], k classes, f fine bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .choice import Decision
from .levels import bin_of, distance_to_uniform
from .shards import Rows, ScoreShards

_MOST_FINE = 4_096  # the step in which KS is taken: it is right to 1 / 4,096
_MOST_CELLS = 1 << 22
MOST_SHORTAGES = 20


class Tally:
    """Counts of a discrepancy among all rows and the kept ones; the kept ones weigh what their manifest says."""

    def __init__(self, shards: ScoreShards, *, between: str, num_bins: int) -> None:
        self.between, self.num_bins, self.shards = between, num_bins, shards
        k = len(shards.classes)
        fine = min(_MOST_FINE, max(num_bins, 1 << max(4, (_MOST_CELLS // k).bit_length() - 1)))
        self._fine = [np.zeros((k, fine)) for _ in range(2)]
        self._bins = [np.zeros((len(shards.splits), num_bins, k)) for _ in range(2)]
        self._positive = [np.zeros(k) for _ in range(2)]
        self._squares = 0.0  # sum of squared weights of the kept
        self.kept = self.dropped = 0
        self.reasons: dict[str, int] = {}

    def add(self, rows: Rows, decision: Decision, reasons: tuple[str, ...]) -> None:
        """Count some rows."""
        keep, values, weight = decision.keep, decision.discrepancy, decision.told.weight
        kept = int(keep.sum())
        self.kept += kept
        self.dropped += len(rows) - kept
        self._squares += kept if weight is None else float((weight[keep].astype(np.float64) ** 2).sum())
        for reason, number in zip(
            reasons, np.bincount(decision.reason[~keep], minlength=len(reasons)).tolist(), strict=True
        ):
            if number:
                self.reasons[reason] = self.reasons.get(reason, 0) + number
        there = ~np.isnan(values)
        if not there.all():
            rows_there = np.flatnonzero(there)
            values, keep = values[rows_there], keep[rows_there]
            label, split = rows.label[rows_there], rows.split[rows_there]
            weight = None if weight is None else weight[rows_there]
        else:
            label, split = rows.label, rows.split
        k, fine = self._fine[0].shape
        place = label.astype(np.int32)
        self._count(self._fine, place * fine + bin_of(values, num_bins=fine), keep, weight)
        bins = bin_of(values, num_bins=self.num_bins)
        self._count(self._bins, (split.astype(np.int32) * self.num_bins + bins) * k + place, keep, weight)
        up = np.flatnonzero(values > 0)
        self._count(self._positive, place[up], keep[up], None if weight is None else weight[up])

    @staticmethod
    def _count(
        held: list[NDArray[np.float64]],
        cell: NDArray[np.int32],
        keep: NDArray[np.bool_],
        weight: NDArray[np.float32] | None,
    ) -> None:
        """Add to what is held by cell: all rows, and the kept ones by their weight."""
        size = held[0].size
        both = np.bincount(cell * 2 + keep, minlength=2 * size).reshape(size, 2)
        held[0].reshape(-1)[:] += both.sum(axis=1)
        kept = both[:, 1] if weight is None else np.bincount(cell[keep], weights=weight[keep], minlength=size)
        held[1].reshape(-1)[:] += kept

    def numbers(self) -> dict[str, Any]:
        """Give all that is to be told of the split, as plain values."""
        before, after = (counts.sum(axis=0) for counts in self._bins)  # (b, k)
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
        counts = self._bins[place].sum(axis=(0, 2))
        mass = float(counts.sum())
        return {
            "distance": distance_to_uniform(counts, available=self._bins[0].sum(axis=(0, 2))),
            "ks": _ks(self._fine[place].sum(axis=0)),
            "positive": float(self._positive[place].sum()) / mass if mass else 0.0,
        }

    def _by_split(self) -> dict[str, float]:
        """Give the distance to uniform of each split, over the bins that the split itself fills."""
        return {
            name: distance_to_uniform(after.sum(axis=1), available=before.sum(axis=1))
            for name, before, after in zip(self.shards.splits, self._bins[0], self._bins[1], strict=True)
            if before.any()
        }

    def _by_class(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> list[dict[str, Any]]:
        found = []
        for place, name in enumerate(self.shards.class_names):
            there = before[:, place]
            found.append(
                {
                    "name": name,
                    "before": int(there.sum()),
                    "after": float(after[:, place].sum()),
                    "distance_before": distance_to_uniform(there, available=there),
                    "distance_after": distance_to_uniform(after[:, place], available=there),
                    "ks_before": _ks(self._fine[0][place]),
                    "ks_after": _ks(self._fine[1][place]),
                    "empty_bins": int((there == 0).sum()),
                }
            )
        return found

    def _shortages(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> list[dict[str, Any]]:
        """Give the bins and classes that have least of what an even share of their bin would be, the worst first."""
        wanted = after.sum(axis=1, keepdims=True) / max(1, int(before.any(axis=0).sum()))
        lacking = np.where(before.sum(axis=1, keepdims=True) > 0, wanted - before, 0)
        worst = np.argsort(-lacking, axis=None, kind="stable")[:MOST_SHORTAGES]
        bins, classes = np.unravel_index(worst, lacking.shape)
        width = 2 / self.num_bins
        return [
            {
                "class": self.shards.class_names[one],
                "bin": int(row),
                "low": -1 + width * int(row),
                "high": -1 + width * (int(row) + 1),
                "has": int(before[row, one]),
                "even": float(wanted[row, 0]),
            }
            for row, one in zip(bins, classes, strict=True)
            if lacking[row, one] > 0
        ]


def _ks(fine: NDArray[np.float64]) -> float:
    """Largest difference of the distribution function to that of uniform over [-1, 1], at the edges of fine bins (f,).

    In between it can be larger by 1 / f at most. 0 of nothing.
    """
    total = float(fine.sum())
    if total == 0:
        return 0.0
    share = np.r_[0.0, np.cumsum(fine) / total]
    even = np.arange(len(share)) / (len(share) - 1)
    return float(np.abs(share - even).max())
