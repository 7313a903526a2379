"""The dip test of unimodality (Hartigan & Hartigan 1985), of values and of histograms."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import MixtureError
from .em import Floats

SIZES = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975, 0.99, 0.995, 0.999)
# Quantiles of sqrt(n) * dip of n uniform values, rows SIZES, columns LEVELS: the uniform is the unimodal distribution
# with the largest dip. 20,000 draws per row with seed 0, by benchmarks/dip_table.py. The 1985 paper, from 9,999 draws,
# has 0.471 at n = 100 and level 0.9.
QUANTILES = np.array(
    [
        [0.1944, 0.2271, 0.2460, 0.2789, 0.3093, 0.3602, 0.4105, 0.4396, 0.4664, 0.5019, 0.5277, 0.5721],  # 10
        [0.2111, 0.2356, 0.2540, 0.2871, 0.3279, 0.3799, 0.4342, 0.4689, 0.5002, 0.5349, 0.5641, 0.6178],  # 20
        [0.2213, 0.2495, 0.2673, 0.3000, 0.3464, 0.4014, 0.4580, 0.4957, 0.5294, 0.5698, 0.5982, 0.6537],  # 50
        [0.2291, 0.2567, 0.2744, 0.3080, 0.3546, 0.4122, 0.4724, 0.5121, 0.5490, 0.5924, 0.6233, 0.6928],  # 100
        [0.2332, 0.2616, 0.2801, 0.3148, 0.3623, 0.4197, 0.4807, 0.5213, 0.5612, 0.6059, 0.6390, 0.6982],  # 200
        [0.2368, 0.2666, 0.2851, 0.3202, 0.3670, 0.4265, 0.4889, 0.5305, 0.5688, 0.6178, 0.6430, 0.7071],  # 500
        [0.2398, 0.2695, 0.2874, 0.3221, 0.3718, 0.4302, 0.4929, 0.5350, 0.5719, 0.6202, 0.6560, 0.7114],  # 1000
        [0.2416, 0.2712, 0.2899, 0.3251, 0.3733, 0.4341, 0.4961, 0.5355, 0.5734, 0.6202, 0.6538, 0.7229],  # 2000
        [0.2431, 0.2730, 0.2911, 0.3265, 0.3751, 0.4351, 0.4976, 0.5404, 0.5780, 0.6299, 0.6594, 0.7347],  # 5000
    ]
)


def dip(values: NDArray[np.floating]) -> float:
    """Compute Hartigan and Hartigan's dip of values (n,): the smallest sup-distance of their ECDF to a unimodal one.

    In [1 / 2n, 1/4]; high = far from unimodal. Two distant points with weights w and 1 - w have min(w, 1 - w) / 2.
    Source: Hartigan & Hartigan 1985 (Ann. Statist. 13, 70-84) and Algorithm AS 217, implemented on the corners of the
    ECDF, so that tied values are one jump and need no special case. The unimodal distribution may jump at its mode.
    """
    if len(values) == 0 or not np.isfinite(values).all():
        raise MixtureError(f"the dip needs one or more values, all finite: found {len(values)}; drop NaN and infinity")
    knots, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    above = np.cumsum(counts).astype(np.float64)  # the ECDF at a knot, in counts ...
    below = above - counts  # ... and just before it
    # The distance is at least one count, that of a single jump to any continuous distribution.
    return _distance_to_unimodal(knots, below, above, at_least=1.0) / (2 * len(values))


def dip_of_histogram(counts: NDArray[np.int64]) -> float:
    """Compute the dip of a histogram (b,) with values spread evenly within their bins, in [0, 1/4]; exact, of all rows.

    At the centres of the bins values would be ties, and ties are modes.
    """
    cumulative = np.concatenate([[0], np.cumsum(counts)]).astype(np.float64)
    edges = np.arange(len(cumulative), dtype=np.float64)
    return _distance_to_unimodal(edges, cumulative, cumulative, at_least=0.0) / (2 * float(cumulative[-1]))


def _distance_to_unimodal(knots: Floats, below: Floats, above: Floats, *, at_least: float) -> float:
    """Compute twice the distance of a distribution function, in counts at and just before its knots, to a unimodal one.

    Between the knots it is linear, or constant where `below` and `above` differ.
    """
    low, high, distance = 0, len(knots) - 1, at_least
    while low < high:
        interval = slice(low, high + 1)
        first, last, before, after, between = _modal_interval(knots[interval], below[interval], above[interval])
        if between <= distance:
            break
        distance = max(distance, before, after)
        low, high = low + first, low + last
    return distance


def dip_p_value(statistic: float, *, num_values: int) -> float:
    """Compute the probability that num_values uniform values have at least this dip: in [0.001, 1], low = not unimodal.

    Interpolated between the rows of the table by log n, from its first or last row beyond them, and never below the
    0.001 that the table resolves. It does not increase with the dip.
    """
    row = [np.interp(np.log(num_values), np.log(SIZES), column) for column in QUANTILES.T]
    level = np.interp(np.sqrt(num_values) * statistic, [0.0, *row], [0.0, *LEVELS])
    return float(1.0 - level)


def dip_p_of_counts(counts: NDArray[np.int64], *, num_values: int, seed: int) -> float:
    """Compute the p of the dip of num_values values drawn without replacement from a histogram (b,).

    Values are uniform within their bins, as in `dip_of_histogram`.
    """
    rng = np.random.default_rng(seed)
    ranks = rng.choice(int(counts.sum()), size=num_values, replace=False, shuffle=False)
    bins = np.searchsorted(np.cumsum(counts), ranks, side="right")
    return dip_p_value(dip(bins + rng.random(num_values)), num_values=num_values)


def _modal_interval(knots: Floats, below: Floats, above: Floats) -> tuple[int, int, float, float, float]:
    """Compute one iteration of AS 217 on the interval of the ECDF that may contain the mode, as corners (k,).

    Returns the first and last knot of the next, shorter interval, the largest distance of the ECDF to its convex
    minorant before it and to its concave majorant after it, and the largest distance between minorant and majorant.
    The interval always shrinks: its first knot touches the majorant and its last one the minorant.
    """
    touching_below = _lower_hull(knots, below)
    touching_above = _lower_hull(knots, -above)
    minorant = np.interp(knots, knots[touching_below], below[touching_below])
    majorant = np.interp(knots, knots[touching_above], above[touching_above])
    touching = np.union1d(touching_below, touching_above)
    separation = (majorant - minorant)[touching]
    mode = touching[separation.argmax()]
    first = int(touching_below[np.searchsorted(touching_below, mode, side="right") - 1])
    last = int(touching_above[np.searchsorted(touching_above, mode, side="left")])
    distance_before = (above - minorant)[:first].max(initial=0.0)
    distance_after = (majorant - below)[last + 1 :].max(initial=0.0)
    return first, last, float(distance_before), float(distance_after), float(separation.max())


def _lower_hull(x: Floats, y: Floats) -> NDArray[np.intp]:
    """Return the points (k,), x ascending, on their greatest convex minorant, as indices (Andrew's monotone chain)."""
    xs, ys = x.tolist(), y.tolist()  # Python floats: five times faster than numpy scalars in this loop
    hull: list[int] = []
    for i, (xi, yi) in enumerate(zip(xs, ys, strict=True)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (ys[b] - ys[a]) * (xi - xs[a]) < (yi - ys[a]) * (xs[b] - xs[a]):
                break
            hull.pop()
        hull.append(i)
    return np.array(hull, dtype=np.intp)
