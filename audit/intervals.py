"""95% intervals of shares and means, with samples of one group counted together.

All are of 95%. Without groups every sample counts for itself, and a share has Wilson's interval.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import stdtrit

Array = NDArray[Any]
Groups = NDArray[np.int64] | None  # the number of each sample's group, (n,); None where every sample is its own


def group_codes(group: NDArray[np.object_] | None) -> Groups:
    """Number the groups (n,); None where the data have none."""
    if group is None:
        return None
    codes = pa.array(group, pa.string()).dictionary_encode(null_encoding="encode").indices
    return np.asarray(codes, dtype=np.int64)


def mean(values: Array, groups: Groups, *, low: float = -1, high: float = 1) -> dict[str, float]:
    """Give the mean of values (n,) in [low, high], its interval from the sums over groups and Student's t.

    One group alone says nothing about others: its interval is all of [low, high].
    """
    centre = float(values.mean())
    sums = values - centre if groups is None else np.bincount(groups, weights=values - centre)
    if len(sums) < 2:
        return {"mean": centre, "low": low, "high": high}
    error = np.sqrt((sums @ sums) * len(sums) / (len(sums) - 1)) / len(values)
    half = float(stdtrit(len(sums) - 1, 0.975) * error)
    return {"mean": centre, "low": max(low, centre - half), "high": min(high, centre + half)}


def share(rows: NDArray[np.bool_], groups: Groups) -> dict[str, float]:
    """Give the count and the share of rows (n,): with Wilson's interval, or that of the groups where it is wider."""
    count = int(rows.sum())
    low, high = wilson(count, len(rows))
    if groups is not None:
        grouped = mean(rows.astype(np.float64), groups, low=0, high=1)
        low, high = min(low, grouped["low"]), max(high, grouped["high"])
    return {"n": count, "share": count / len(rows), "low": low, "high": high}


def wilson(successes: int, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, 95% by default (Wilson 1927)."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low, high = float((centre - half) / scale), float((centre + half) / scale)
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # rounding may part the ends 0 and 1 from the share
