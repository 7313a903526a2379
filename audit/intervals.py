"""95% confidence intervals of shares and means of samples that may be grouped.

Without groups every sample counts as independent, and a share has Wilson's interval.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import stdtrit

Array = NDArray[Any]
Groups = NDArray[np.int64] | None  # index of each sample's group, (n,); None where every sample is its own group


def group_codes(group: NDArray[np.object_] | None) -> Groups:
    """Return the group index of each sample (n,); None where the data have no groups."""
    if group is None:
        return None
    codes = pa.array(group, pa.string()).dictionary_encode(null_encoding="encode").indices
    return np.asarray(codes, dtype=np.int64)


def mean_interval(values: Array, groups: Groups, *, low: float = -1, high: float = 1) -> dict[str, float]:
    """Compute the mean of values (n,) in [low, high] and its interval, from the sums over groups and Student's t.

    A single group carries no information on other groups: its interval is all of [low, high].
    """
    centre = float(values.mean())
    sums = values - centre if groups is None else np.bincount(groups, weights=values - centre)
    if len(sums) < 2:
        return {"mean": centre, "low": low, "high": high}
    standard_error = np.sqrt((sums @ sums) * len(sums) / (len(sums) - 1)) / len(values)
    half_width = float(stdtrit(len(sums) - 1, 0.975) * standard_error)
    return {"mean": centre, "low": max(low, centre - half_width), "high": min(high, centre + half_width)}


def share_interval(rows: NDArray[np.bool_], groups: Groups) -> dict[str, float]:
    """Compute the count and the share of true rows (n,) with Wilson's interval, or that of the groups if wider."""
    count = int(rows.sum())
    low, high = wilson_interval(count, len(rows))
    if groups is not None:
        group_interval = mean_interval(rows.astype(np.float64), groups, low=0, high=1)
        low, high = min(low, group_interval["low"]), max(high, group_interval["high"])
    return {"n": count, "share": count / len(rows), "low": low, "high": high}


def wilson_interval(successes: int, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Compute Wilson's score interval of a share, 95% by default (Wilson 1927)."""
    observed_share = successes / trials
    centre = observed_share + z * z / (2 * trials)
    half_width = z * np.sqrt(observed_share * (1 - observed_share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low, high = float((centre - half_width) / scale), float((centre + half_width) / scale)
    # Rounding may exclude a share of exactly 0 or 1.
    return max(0.0, min(low, observed_share)), min(1.0, max(high, observed_share))
