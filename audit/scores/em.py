"""Expectation maximisation of two Gaussians with bounds.

EM on weighted points, and the posterior of the fitted pair. The two-component mixture and its posterior are those of
Modality Gap (arXiv 2510.21797); the bounds on the sds and the monotone posterior are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import MixtureError
from ..workers import default_workers

Floats = NDArray[np.float64]
Gap = NDArray[np.floating]
Part = TypeVar("Part")

CHUNK = 1 << 16  # rows: a numpy call takes 10 us, much longer than its overhead, and all arrays stay in the cache
ROWS_PER_THREAD = 1 << 20  # with fewer, starting a thread takes longer than it saves
MAX_THREADS = 8  # with more, the numpy calls, which hold the interpreter lock in turn, become the limit
KNOTS = 4096  # of the posterior table: linear interpolation is within 3.3e-6 of the curve, see _table
SATURATED = 24 * math.log(2.0)  # a logit beyond which p in float32 is 0 or 1 to 6e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One Gaussian of the mixture: weight in (0, 1), mean in [0, 1], sd > 0."""

    weight: float
    mean: float
    sd: float

    def log_density(self, gap: Floats) -> Floats:
        """Compute the log of weight times density at gap (any shape)."""
        scale = math.log(self.weight / (self.sd * math.sqrt(2 * math.pi)))
        return scale - 0.5 * ((gap - self.mean) / self.sd) ** 2


Pair = tuple[Component, Component]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Stopping rule of EM and bounds on its components; see the fields of MixtureConfig with the same names."""

    tolerance: float
    max_steps: int
    min_sd: float
    min_sd_ratio: float
    max_sd_ratio: float


def fit_pair(points: Floats, shares: Floats, *, bounds: Bounds) -> tuple[Pair, float]:
    """Fit by EM to points (b,) with shares (b,) that sum to 1, from the best two-means split: pair, log-likelihood.

    There is one start on purpose, not the likeliest of several: on Beta(.3, .3) the likeliest unbounded fit (-0.108 per
    sample, against -0.193 for two halves) is a narrow component of 19% at 1, with all gaps below 0.97 balanced.
    """
    balanced = _two_means(points, shares)
    pair = _maximise(points, shares, balanced, bounds=bounds)
    balanced, log_likelihood = _expect(points, shares, pair)
    for _ in range(bounds.max_steps):
        pair = _maximise(points, shares, balanced, bounds=bounds)
        previous = log_likelihood
        balanced, log_likelihood = _expect(points, shares, pair)
        if log_likelihood - previous < bounds.tolerance:
            break
    low, high = sorted(pair, key=lambda component: (component.mean, component.sd))
    return (low, high), log_likelihood


def _two_means(points: Floats, shares: Floats) -> Floats:
    """Compute the membership (b,) of the lower group, 0 or 1, in the two-means split; exact, by trying all splits."""
    weight, moment = np.cumsum(shares)[:-1], np.cumsum(shares * points)[:-1]
    between = (moment - weight * (shares @ points)) ** 2 / (weight * (1.0 - weight))
    return (np.arange(len(points)) <= between.argmax()).astype(np.float64)


def _expect(points: Floats, shares: Floats, pair: Pair) -> tuple[Floats, float]:
    """Compute the membership (b,) of the balanced component and the mean log-likelihood."""
    balanced, imbalanced = (component.log_density(points) for component in pair)
    # np.logaddexp takes three times as long.
    total = np.maximum(balanced, imbalanced) + np.log(1.0 + np.exp(-np.abs(balanced - imbalanced)))
    return np.exp(balanced - total), float(shares @ total)


def _maximise(points: Floats, shares: Floats, balanced: Floats, *, bounds: Bounds) -> Pair:
    """Compute the components from memberships (b,) of the balanced one, with the ratio of their sds within bounds.

    The bounds (Hathaway 1985; these two are ours) keep a component from collapsing onto a saturated end. On
    Beta(.3, .3) the unbounded fit separates at 0.96, 0.96 and 0.05 for three seeds, the bounded one at 0.50, 0.50 and
    0.10. A wider balanced component would also have the higher posterior at the largest gaps. Planted groups are still
    separated: a spike of sd 0.03 and a Beta(2, 3) with 97.6% accuracy (unbounded: 97.3%), 8% at 0.8 and the rest around
    0.15 with 100.0% (unbounded: 100.0%).
    """
    w, m, s = _moments(points, shares * balanced, bounds.min_sd)
    v, n, t = _moments(points, shares * (1.0 - balanced), bounds.min_sd)
    ratio = min(max(s / t, bounds.min_sd_ratio), bounds.max_sd_ratio)
    # The likeliest sd of the imbalanced one at this ratio; t where the bounds do not bind.
    sd = math.sqrt(w * (s / ratio) ** 2 + v * t**2)
    return Component(weight=w, mean=m, sd=ratio * sd), Component(weight=v, mean=n, sd=sd)


def _moments(points: Floats, component_shares: Floats, min_sd: float) -> tuple[float, float, float]:
    """Compute weight, mean and sd of one component from its shares (b,), bounded away from degenerate values."""
    weight = min(max(float(component_shares.sum()), 1e-12), 1.0 - 1e-12)
    mean = min(float(component_shares @ points) / weight, 1.0)
    variance = float(component_shares @ (points - mean) ** 2) / weight
    return weight, mean, max(math.sqrt(variance), min_sd)


def single_log_likelihood(points: Floats, shares: Floats) -> float:
    """Compute the mean log-likelihood of a single Gaussian; with two or more points its variance is above zero."""
    variance = float(shares @ (points - shares @ points) ** 2)
    return -0.5 * (math.log(2 * math.pi * variance) + 1.0)


def bic(log_likelihood: float, *, num_parameters: int, num_samples: int) -> float:
    """Compute the Bayesian information criterion from the mean log-likelihood; lower is better."""
    return num_parameters * math.log(num_samples) - 2.0 * num_samples * log_likelihood


def ashman_d(pair: Pair) -> float:
    """Compute Ashman's D: the distance of the means over the root mean square of the sds; at least 2 is separate."""
    low, high = pair
    return math.sqrt(2.0) * abs(low.mean - high.mean) / math.hypot(low.sd, high.sd)


def posterior(gap: Gap, pair: Pair) -> NDArray[np.float32]:
    """Compute P(balanced | gap) of gap (n,), in [0, 1], high = balanced; it does not increase with the gap.

    It is interpolated linearly from a table of the closed form, which it equals to 1e-5 (for sds of 0.001 and more, see
    _table). It does not increase in float32 either: every step of the arithmetic is monotone, which libraries do not
    guarantee for exp. The bytes do not depend on the number of threads.
    """
    if gap.ndim != 1:
        check_gap(gap)
    out = np.empty(len(gap), dtype=np.float32)
    table = _table(pair, np.result_type(gap, np.float32))
    if not all(in_threads(lambda rows: _read_table(gap[rows], table, out=out[rows]), len(gap))):
        check_gap(gap)
    return out


def threshold_rule(gap: Gap, threshold: float) -> NDArray[np.float32]:
    """Compute 1 where gap (n,) is at most the threshold, 0 above."""
    check_gap(gap)
    out = np.empty(len(gap), dtype=np.float32)
    in_threads(lambda rows: np.less_equal(gap[rows], threshold, out=out[rows]), len(gap))
    return out


def check_gap(gap: Gap) -> None:
    """Raise MixtureError unless gap is (n,) with all values in [0, 1]. A valid gap is not copied."""
    if gap.ndim != 1:
        raise MixtureError(f"the gap must be one value per sample, shape (n,); found shape {gap.shape}")
    if all(in_threads(lambda rows: in_unit_interval(gap[rows]), len(gap))):
        return
    outside = np.flatnonzero(~((gap >= 0.0) & (gap <= 1.0)))
    raise MixtureError(
        f"the gap must lie in [0, 1]; {len(outside)} of {len(gap)} values do not, the first is {gap[outside[0]]} at "
        f"row {outside[0]}. Use the largest minus the smallest confidence, and leave out rows without a gap"
    )


def in_unit_interval(gap: Gap) -> bool:
    """Whether all values of gap (n,) lie in [0, 1]; True if n is 0."""
    return len(gap) == 0 or bool(gap.min() >= 0.0 and gap.max() <= 1.0)  # NaN fails both comparisons


def chunks(num_rows: int) -> Iterator[slice]:
    """Yield ranges of at most CHUNK rows."""
    return (slice(row, min(row + CHUNK, num_rows)) for row in range(0, num_rows, CHUNK))


def in_threads(work: Callable[[slice], Part], num_rows: int) -> list[Part]:
    """Run work(rows) on consecutive ranges of rows, one per thread, and return the results in order.

    The threads run in parallel, since numpy releases the interpreter lock.
    """
    num_threads = min(default_workers(), MAX_THREADS, 1 + num_rows // ROWS_PER_THREAD)
    edges = [num_rows * thread // num_threads for thread in range(num_threads + 1)]
    rows = [slice(first, last) for first, last in pairwise(edges)]
    if num_threads == 1:
        return [work(rows[0])]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(work, rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The posterior at KNOTS + 1 gaps start + k / scale, from start to end; fall: its decrease to the next knot."""

    start: np.floating
    end: np.floating
    scale: np.floating
    value: NDArray[np.float32]
    fall: NDArray[np.float32]


def _table(pair: Pair, dtype: np.dtype[np.floating]) -> Table:
    """Build the table, with knots where the logit lies within SATURATED; outside, the posterior is constant.

    Between the knots the logit, a parabola, decreases by 33.3 at most, by 66.6 / KNOTS from one knot to the next, and
    its curvature is 66.6 / KNOTS^2. With sigmoid' <= 1/4 and |sigmoid''| <= 0.0963 the error of linear interpolation is
    (66.6^2 * 0.0963 + 66.6 / 4) / 8 KNOTS^2 = 3.3e-6. start and scale are of the dtype of the gaps, so that float32
    adds 2e-6 at most. fall is rounded towards 0: value + fall is then at or above the next value, and the posterior
    does not increase.
    """
    logit = MonotoneLogit.of(pair)
    start = np.nextafter(dtype.type(logit.gap_at(SATURATED)), dtype.type(0.0))
    end = dtype.type(max(logit.gap_at(-SATURATED), float(start) + 1e-7))  # float32 gaps near 1 are 6e-8 apart
    scale = dtype.type(KNOTS) / (end - start)
    knots = float(start) + np.arange(KNOTS + 1) / float(scale)
    value = (1.0 / (1.0 + np.exp(-logit.at(knots).clip(-80.0, 80.0)))).astype(np.float32)
    value = np.minimum.accumulate(value)
    decrease = np.append(np.diff(value.astype(np.float64)), 0.0)
    fall = decrease.astype(np.float32)
    fall = np.where(fall < decrease, np.nextafter(fall, np.float32(0.0)), fall)
    return Table(start=start, end=end, scale=scale, value=value, fall=fall)


def _read_table(gap: Gap, table: Table, *, out: NDArray[np.float32]) -> bool:
    """Write the posterior of gap (n,) to out (n,); stop and return False at the first chunk outside [0, 1]."""
    size, dtype = min(CHUNK, len(gap)), table.start.dtype
    position_buffer, fall_buffer = np.empty(size, dtype), np.empty(size, np.float32)
    # Casting to int32 before intp takes half the time of a direct cast.
    short_buffer, index_buffer = np.empty(size, np.int32), np.empty(size, np.intp)
    for rows in chunks(len(gap)):
        part_gap, part_out, n = gap[rows].astype(dtype, copy=False), out[rows], rows.stop - rows.start
        if not in_unit_interval(part_gap):
            return False
        position, part_fall, knot, knot_index = position_buffer[:n], fall_buffer[:n], short_buffer[:n], index_buffer[:n]
        np.clip(part_gap, table.start, table.end, out=position)
        np.subtract(position, table.start, out=position)
        np.multiply(position, table.scale, out=position)  # in [0, KNOTS]
        np.copyto(knot, position, casting="unsafe")  # towards 0: the knot on the left
        np.subtract(position, knot, out=position, dtype=dtype, casting="unsafe")  # exact
        np.copyto(knot_index, knot)
        np.take(table.fall, knot_index, out=part_fall, mode="wrap")  # no index wraps; this is the fastest mode
        np.take(table.value, knot_index, out=part_out, mode="wrap")
        np.multiply(part_fall, position, out=position)
        np.add(part_out, position, out=part_out, casting="same_kind")
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class MonotoneLogit:
    """Logit of P(balanced | g), a parabola in g, made constant where it would increase.

    With d = max(sign * (g - start), 0) it is level - sign * d * (slope + curve * d), with slope and curve >= 0. A
    narrower balanced component has its maximum below both means, and the logit is constant from there down to 0; a
    wider one has its minimum above both means, and the logit is constant from there up to 1.
    """

    start: float
    sign: float
    level: float
    slope: float
    curve: float

    @classmethod
    def of(cls, pair: Pair) -> MonotoneLogit:
        """Build the logit of a pair, balanced component first."""
        low, high = pair
        precise, loose = 1.0 / low.sd**2, 1.0 / high.sd**2
        curvature = loose - precise  # twice the second coefficient
        vertex = (low.mean * precise - high.mean * loose) / (precise - loose) if curvature else 0.0
        start = max(vertex, 0.0) if curvature <= 0.0 else min(vertex, 1.0)
        at = np.array(start)
        level = float(low.log_density(at) - high.log_density(at))
        slope = max((start - low.mean) * precise - (start - high.mean) * loose, 0.0)
        return cls(
            start=start, sign=1.0 if curvature <= 0.0 else -1.0, level=level, slope=slope, curve=0.5 * abs(curvature)
        )

    def at(self, gap: Floats) -> Floats:
        """Compute the logit at gap (any shape)."""
        distance = np.maximum(self.sign * (gap - self.start), 0.0)
        return self.level - self.sign * distance * (self.slope + self.curve * distance)

    def gap_at(self, logit: float) -> float:
        """Compute the gap in [0, 1] at which the logit reaches a value; the nearer end if it is outside its range."""
        decrease = max(self.sign * (self.level - logit), 0.0)
        root = self.slope + math.sqrt(self.slope**2 + 4.0 * self.curve * decrease)
        distance = 0.0 if decrease == 0.0 else 2.0 * decrease / root if root > 0.0 else math.inf
        return min(max(self.start + self.sign * distance, 0.0), 1.0)
