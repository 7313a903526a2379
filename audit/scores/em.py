"""Expectation maximisation of two Gaussians with bounds.

Expectation-maximisation on weighted points, and the posterior of the pair that it finds. The two-component mixture and
its posterior are those of Modality Gap (arXiv 2510.21797); the bounds on the sds and the monotone posterior are ours.
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

CHUNK = 1 << 16  # rows at a time: a step takes 10 us, long beside the call of it, and all steps stay in the cache
ROWS_A_THREAD = 1 << 20  # with fewer, starting a thread takes longer than it saves
MOST_THREADS = 8  # beyond them the calls themselves, which take turns, would be the limit
KNOTS = 4096  # of the posterior: straight between two of them it is 3.3e-6 from the curve, see _table
SATURATED = 24 * math.log(2.0)  # a logit beyond which float32 holds no p but 0 or 1 to 6e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One Gaussian of the mixture: weight in (0, 1), mean in [0, 1], sd > 0."""

    weight: float
    mean: float
    sd: float

    def log_density(self, gap: Floats) -> Floats:
        """Log of weight times density at gap (any shape)."""
        scale = math.log(self.weight / (self.sd * math.sqrt(2 * math.pi)))
        return scale - 0.5 * ((gap - self.mean) / self.sd) ** 2


Pair = tuple[Component, Component]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """When EM stops, and what a component may be: the fields of MixtureConfig with these names, which say why."""

    tolerance: float
    max_steps: int
    min_sd: float
    min_sd_ratio: float
    max_sd_ratio: float


def fit_pair(points: Floats, shares: Floats, *, bounds: Bounds) -> tuple[Pair, float]:
    """EM on points (b,) with shares (b,) that sum to 1, from the best two-means split: components, log-likelihood.

    One start on purpose, not the likeliest of several: on Beta(.3, .3) the likeliest plain fit (-0.108 a sample,
    against -0.193 of two halves) is a needle of 19% at 1, which leaves all gaps below 0.97 to the balanced side.
    """
    balanced = _two_means(points, shares)
    pair = _maximise(points, shares, balanced, bounds=bounds)
    balanced, log_likelihood = _expect(points, shares, pair)
    for _ in range(bounds.max_steps):
        pair = _maximise(points, shares, balanced, bounds=bounds)
        before = log_likelihood
        balanced, log_likelihood = _expect(points, shares, pair)
        if log_likelihood - before < bounds.tolerance:
            break
    low, high = sorted(pair, key=lambda component: (component.mean, component.sd))
    return (low, high), log_likelihood


def _two_means(points: Floats, shares: Floats) -> Floats:
    """Membership (b,) of the lower group, 0 or 1, in the split with the least variance within: exact, all are tried."""
    weight, moment = np.cumsum(shares)[:-1], np.cumsum(shares * points)[:-1]
    between = (moment - weight * (shares @ points)) ** 2 / (weight * (1.0 - weight))
    return (np.arange(len(points)) <= between.argmax()).astype(np.float64)


def _expect(points: Floats, shares: Floats, pair: Pair) -> tuple[Floats, float]:
    """Membership (b,) of the balanced component, and the mean log-likelihood."""
    one, other = (component.log_density(points) for component in pair)
    both = np.maximum(one, other) + np.log(1.0 + np.exp(-np.abs(one - other)))  # logaddexp, three times as quick
    return np.exp(one - both), float(shares @ both)


def _maximise(points: Floats, shares: Floats, balanced: Floats, *, bounds: Bounds) -> Pair:
    """The components with these memberships (b,) of the balanced one, the ratio of their sds held within bounds.

    The bounds (Hathaway 1985; these two are ours) keep a component from becoming a needle on a saturated end. On
    Beta(.3, .3) the plain fit cuts at 0.96, 0.96 and 0.05 for three seeds, with them at 0.50, 0.50 and 0.10. A wider
    balanced component would also win again at the largest gaps. Known groups are still told apart: a spike of sd 0.03
    before a Beta(2, 3) with 97.6% right (plain: 97.3%), 8% at 0.8 and the rest around 0.15 with 100.0% (plain: 100.0%).
    """
    w, m, s = _moments(points, shares * balanced, bounds.min_sd)
    v, n, t = _moments(points, shares * (1.0 - balanced), bounds.min_sd)
    ratio = min(max(s / t, bounds.min_sd_ratio), bounds.max_sd_ratio)
    sd = math.sqrt(w * (s / ratio) ** 2 + v * t**2)  # the likeliest sd of the other at this ratio; t inside the bounds
    return Component(weight=w, mean=m, sd=ratio * sd), Component(weight=v, mean=n, sd=sd)


def _moments(points: Floats, part: Floats, min_sd: float) -> tuple[float, float, float]:
    """Weight, mean and sd of the shares (b,) that belong to one component; none of them degenerate."""
    weight = min(max(float(part.sum()), 1e-12), 1.0 - 1e-12)
    mean = min(float(part @ points) / weight, 1.0)
    variance = float(part @ (points - mean) ** 2) / weight
    return weight, mean, max(math.sqrt(variance), min_sd)


def log_likelihood_of_one(points: Floats, shares: Floats) -> float:
    """Mean log-likelihood of a single Gaussian; there are two points at least, so its variance is not zero."""
    variance = float(shares @ (points - shares @ points) ** 2)
    return -0.5 * (math.log(2 * math.pi * variance) + 1.0)


def bic(log_likelihood: float, *, num_parameters: int, num_samples: int) -> float:
    """Bayesian information criterion from the mean log-likelihood; lower is better."""
    return num_parameters * math.log(num_samples) - 2.0 * num_samples * log_likelihood


def ashman_d(pair: Pair) -> float:
    """Ashman's D: the distance of the means in units of the root mean square of the two sds; 2 and more is separate."""
    one, other = pair
    return math.sqrt(2.0) * abs(one.mean - other.mean) / math.hypot(one.sd, other.sd)


def posterior(gap: Gap, pair: Pair) -> NDArray[np.float32]:
    """P(balanced | gap) of gap (n,), in [0, 1], high = balanced; never rises as the gap grows.

    Read from a table of the closed form, straight between its knots, so that it equals it to 1e-5 (for sds from 0.001
    on, see _table) and never rises in float32 either: every step of the arithmetic is monotone, which no library
    promises of its exp. The bytes do not depend on the number of threads.
    """
    if gap.ndim != 1:
        check(gap)
    out = np.empty(len(gap), dtype=np.float32)
    table = _table(pair, np.result_type(gap, np.float32))
    if not all(in_threads(lambda rows: _read_table(gap[rows], table, out=out[rows]), len(gap))):
        check(gap)
    return out


def rule(gap: Gap, threshold: float) -> NDArray[np.float32]:
    """1 where gap (n,) is at most the threshold, 0 above."""
    check(gap)
    out = np.empty(len(gap), dtype=np.float32)
    in_threads(lambda rows: np.less_equal(gap[rows], threshold, out=out[rows]), len(gap))
    return out


def check(gap: Gap) -> None:
    """The door: gap must be (n,) and every value in [0, 1]. No copy where it is."""
    if gap.ndim != 1:
        raise MixtureError(f"the gap must be one value per sample, shape (n,); found shape {gap.shape}")
    if all(in_threads(lambda rows: within(gap[rows]), len(gap))):
        return
    wrong = np.flatnonzero(~((gap >= 0.0) & (gap <= 1.0)))
    raise MixtureError(
        f"the gap must lie in [0, 1]; {len(wrong)} of {len(gap)} values do not, the first is {gap[wrong[0]]} at row "
        f"{wrong[0]}. Take the largest minus the least confidence, unsigned, and leave out rows without one"
    )


def within(gap: Gap) -> bool:
    """Whether every one of gap (n,) lies in [0, 1]; true of none at all."""
    return len(gap) == 0 or bool(gap.min() >= 0.0 and gap.max() <= 1.0)  # NaN fails both comparisons


def chunks(num_rows: int) -> Iterator[slice]:
    """Ranges of at most CHUNK rows."""
    return (slice(row, min(row + CHUNK, num_rows)) for row in range(0, num_rows, CHUNK))


def in_threads(work: Callable[[slice], Part], num_rows: int) -> list[Part]:
    """work(rows) of consecutive ranges of rows, one a thread, in order. numpy lets the threads run at the same time."""
    num_threads = min(default_workers(), MOST_THREADS, 1 + num_rows // ROWS_A_THREAD)
    edges = [num_rows * thread // num_threads for thread in range(num_threads + 1)]
    rows = [slice(first, last) for first, last in pairwise(edges)]
    if num_threads == 1:
        return [work(rows[0])]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(work, rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The posterior at KNOTS + 1 gaps from start to end, start + k / scale, and how far it falls to the next one."""

    start: np.floating
    end: np.floating
    scale: np.floating
    value: NDArray[np.float32]
    fall: NDArray[np.float32]


def _table(pair: Pair, dtype: np.dtype[np.floating]) -> Table:
    """Knots where the logit lies within SATURATED, for gaps of this dtype; outside, the posterior is level.

    There the logit, a parabola, falls by 33.3 at most, by 66.6 / KNOTS from one knot to the next, and its curvature is
    66.6 / KNOTS^2. With sigmoid' <= 1/4 and |sigmoid''| <= 0.0963 a straight line is (66.6^2 * 0.0963 + 66.6 / 4) / 8
    KNOTS^2 = 3.3e-6 away. start and scale are numbers of the dtype, so that float32 adds 2e-6 more, wherever it falls.
    A fall is rounded towards 0: value + fall then ends above the next value or on it, and the whole never rises.
    """
    logit = MonotoneLogit.of(pair)
    start = np.nextafter(dtype.type(logit.reaches(SATURATED)), dtype.type(0.0))
    end = dtype.type(max(logit.reaches(-SATURATED), float(start) + 1e-7))  # float32 gaps near 1 are 6e-8 apart
    scale = dtype.type(KNOTS) / (end - start)
    knots = float(start) + np.arange(KNOTS + 1) / float(scale)
    value = (1.0 / (1.0 + np.exp(-logit.at(knots).clip(-80.0, 80.0)))).astype(np.float32)
    value = np.minimum.accumulate(value)
    exact = np.append(np.diff(value.astype(np.float64)), 0.0)
    fall = exact.astype(np.float32)
    fall = np.where(fall < exact, np.nextafter(fall, np.float32(0.0)), fall)
    return Table(start=start, end=end, scale=scale, value=value, fall=fall)


def _read_table(gap: Gap, table: Table, *, out: NDArray[np.float32]) -> bool:
    """Write the posterior of gap (n,) to out (n,); false, and no more, as soon as a value is not in [0, 1]."""
    size, dtype = min(CHUNK, len(gap)), table.start.dtype
    where, fall = np.empty(size, dtype), np.empty(size, np.float32)
    short, index = np.empty(size, np.int32), np.empty(size, np.intp)  # by int32: half the time of the direct cast
    for rows in chunks(len(gap)):
        part, found, n = gap[rows].astype(dtype, copy=False), out[rows], rows.stop - rows.start
        if not within(part):
            return False
        w, f, s, i = where[:n], fall[:n], short[:n], index[:n]
        np.clip(part, table.start, table.end, out=w)
        np.subtract(w, table.start, out=w)
        np.multiply(w, table.scale, out=w)  # in [0, KNOTS]
        np.copyto(s, w, casting="unsafe")  # towards 0: the knot on the left
        np.subtract(w, s, out=w, dtype=dtype, casting="unsafe")  # exact
        np.copyto(i, s)
        np.take(table.fall, i, out=f, mode="wrap")  # none wraps: it is the quickest mode
        np.take(table.value, i, out=found, mode="wrap")
        np.multiply(f, w, out=w)
        np.add(found, w, out=found, casting="same_kind")
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class MonotoneLogit:
    """Logit of P(balanced | g), a parabola in g, held level where it would rise.

    With way = max(sign * (g - start), 0) it is level - sign * way * (slope + curve * way), slope and curve >= 0. A
    narrower balanced component has its peak below both means, and counts as balanced all the way down to 0; a wider
    one has its valley above both, and does not win again beyond.
    """

    start: float
    sign: float
    level: float
    slope: float
    curve: float

    @classmethod
    def of(cls, pair: Pair) -> MonotoneLogit:
        """The logit of these two, balanced first."""
        low, high = pair
        precise, loose = 1.0 / low.sd**2, 1.0 / high.sd**2
        bend = loose - precise  # twice the second coefficient
        turn = (low.mean * precise - high.mean * loose) / (precise - loose) if bend else 0.0
        start = max(turn, 0.0) if bend <= 0.0 else min(turn, 1.0)
        at = np.array(start)
        level = float(low.log_density(at) - high.log_density(at))
        slope = max((start - low.mean) * precise - (start - high.mean) * loose, 0.0)
        return cls(start=start, sign=1.0 if bend <= 0.0 else -1.0, level=level, slope=slope, curve=0.5 * abs(bend))

    def at(self, gap: Floats) -> Floats:
        """Its values at gap (any shape)."""
        way = np.maximum(self.sign * (gap - self.start), 0.0)
        return self.level - self.sign * way * (self.slope + self.curve * way)

    def reaches(self, logit: float) -> float:
        """The gap in [0, 1] at which it has fallen to this; the end that is nearer where it never is."""
        deep = max(self.sign * (self.level - logit), 0.0)
        root = self.slope + math.sqrt(self.slope**2 + 4.0 * self.curve * deep)
        way = 0.0 if deep == 0.0 else 2.0 * deep / root if root > 0.0 else math.inf
        return min(max(self.start + self.sign * way, 0.0), 1.0)
