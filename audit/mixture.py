"""The bimodal mixture on the gap: which samples are balanced, and is the gap bimodal at all?

The two-component mixture and its posterior are those of Modality Gap (arXiv 2510.21797). That paper fits without asking
whether there are two groups; the histogram, the tests of bimodality, the monotone posterior and the rule that replaces
it where the tests fail are ours, and so is every default below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dip import dip_of_counts
from .errors import ConfigError, MixtureError

Floats = NDArray[np.float64]
Gap = NDArray[np.floating]

CHUNK = 1 << 15  # rows at a time: 256 KiB of float64 stay in the cache: 1e7 posteriors in 0.06 s, in one piece 0.78 s


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """How the mixture is fitted and what the gap must show to be called bimodal. All defaults are ours."""

    num_bins: int = 4096  # a bin of 0.00024: parameters move by 5e-5 at most against the fit to the values themselves
    tolerance: float = 1e-8  # gain of the mean log-likelihood in one step at which EM stops
    max_steps: int = 1000  # the slowest shape met, a plain normal, stops before that
    min_sd: float = 0.01  # a probe does not resolve less; keeps a component from collapsing on a gap of exactly 0
    min_sd_ratio: float = 0.1  # sd of balanced / imbalanced, from here ...
    max_sd_ratio: float = 1.0  # ... to here: see _maximise; 0 and 1e9 give the paper's plain fit
    min_samples: int = 10  # five parameters are not fitted to fewer
    dip_rows: int = 10_000  # dip of a seeded subsample, so that its p means the same at 1e4 and 1e8 samples; 15 ms
    dip_level: float = 0.01  # one unimodal gap in a hundred may be called bimodal for this alone
    min_dip: float = 0.01  # effect size: the distribution function is 1% of the samples away from any unimodal one
    min_ashman_d: float = 2.0  # the usual bound for a clean separation (Ashman, Bird & Zepf 1994)
    min_weight: float = 0.05  # a side with less is a tail, not a group
    threshold: float = 0.2  # the rule where the gap is not bimodal: balanced means gap <= 0.2

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted with."""
        if self.num_bins < 16:
            raise ConfigError(f"mixture.num_bins = {self.num_bins}: needs at least 16; the default is 4096")
        if self.max_steps < 1 or self.min_samples < 2 or self.dip_rows < 10:
            raise ConfigError("mixture: max_steps must be at least 1, min_samples at least 2, dip_rows at least 10")
        if not 0.0 <= self.min_sd_ratio <= 1.0 <= self.max_sd_ratio:
            raise ConfigError("mixture: min_sd_ratio must lie in [0, 1] and max_sd_ratio must be at least 1")
        if not 0.001 < self.dip_level < 1.0:
            raise ConfigError(f"mixture.dip_level = {self.dip_level}: must lie in (0.001, 1); no smaller p is tabled")
        for name in ("tolerance", "min_sd"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ConfigError(f"mixture.{name} = {getattr(self, name)}: must lie between 0 and 1, without the ends")
        for name in ("min_dip", "min_weight", "threshold"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"mixture.{name} = {getattr(self, name)}: must lie in [0, 1]")


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
class Mixture:
    """Two components, balanced (mean nearest 0) first, and the verdict whether the gap supports them.

    Where nothing could be fitted (constant gap, too few samples) components and all that follows from them are None.
    The log-likelihood is the mean per sample; a lower BIC is better; dip in [0, 1/4], high = far from unimodal.
    """

    num_samples: int
    threshold: float
    reasons: tuple[str, ...]  # each criterion that failed, in words with its number; empty = bimodal
    dip: float
    dip_p: float
    components: Pair | None = None
    log_likelihood: float | None = None
    bic_one: float | None = None
    bic_two: float | None = None
    ashman_d: float | None = None

    def __post_init__(self) -> None:
        """Refuse a verdict without components or reasons."""
        if self.components is None and not self.reasons:
            raise MixtureError("a mixture without components must say why: reasons is empty")

    @property
    def bimodal(self) -> bool:
        """Whether the gap supports two groups: no criterion failed."""
        return not self.reasons

    @property
    def rule(self) -> str:
        """What p_balanced comes from: "posterior" where the gap is bimodal, otherwise "threshold"."""
        return "posterior" if self.bimodal else "threshold"

    def posterior(self, gap: Gap) -> NDArray[np.float32]:
        """P(balanced | gap) of gap (n,), in [0, 1], high = balanced; never rises as the gap grows.

        Where the gap is not bimodal it is 1 up to the threshold and 0 above, so that >= 0.5 selects by the rule.
        """
        _check(gap)
        if self.components is None or not self.bimodal:
            return (gap <= self.threshold).astype(np.float32)
        start, sign, level, slope, curve = _monotone_logit(self.components)
        out = np.empty(len(gap), dtype=np.float32)
        for row in range(0, len(gap), CHUNK):
            part = gap[row : row + CHUNK].astype(np.float64)
            way = np.maximum(sign * (part - start), 0.0)
            logit = level - sign * way * (slope + curve * way)
            out[row : row + CHUNK] = 1.0 / (1.0 + np.exp(np.minimum(-logit, 80.0)))  # e^80: 0 in float32, no overflow
        return out

    def density(self, grid: Floats) -> Floats:
        """Weighted densities (2, len(grid)), balanced first, to draw over a histogram; zeros if nothing was fitted."""
        if self.components is None:
            return np.zeros((2, len(grid)))
        return np.stack([np.exp(component.log_density(grid)) for component in self.components])

    def to_json(self) -> dict[str, object]:
        """As plain values for mixture.json; the verdict and the rule are written out for its readers."""
        components = None if self.components is None else [asdict(component) for component in self.components]
        verdict = {"bimodal": self.bimodal, "rule": self.rule, "reasons": list(self.reasons)}
        return {**asdict(self), "components": components, **verdict}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Mixture:
        """The inverse of to_json, exactly; the verdict follows from the reasons."""
        try:
            fields = {name: found[name] for name in cls.__dataclass_fields__}
            if fields["components"] is not None:
                balanced, imbalanced = (Component(**component) for component in fields["components"])
                fields["components"] = (balanced, imbalanced)
            return cls(**{**fields, "reasons": tuple(fields["reasons"])})
        except (KeyError, TypeError, ValueError) as error:
            raise MixtureError(
                f"not a mixture: {error!r} is missing or malformed; rescore with: mmaudit score DATA"
            ) from error


def fit_mixture(gap: Gap, *, config: MixtureConfig, seed: int) -> Mixture:
    """Fit to gap (n,) in [0, 1]. The order of the rows does not matter; the seed draws the subsample of the dip."""
    return fit_counts(histogram(gap, num_bins=config.num_bins), config=config, seed=seed)


def histogram(gap: Gap, *, num_bins: int) -> NDArray[np.int64]:
    """Counts (num_bins,) of gap (n,) by the nearest of num_bins points from 0 to 1. Shards merge by addition.

    The points include 0 and 1, so that saturated gaps are counted where they are, not half a bin beside.
    """
    _check(gap)
    counts = np.zeros(num_bins, dtype=np.int64)
    for row in range(0, len(gap), CHUNK):
        bins = np.rint(gap[row : row + CHUNK] * np.float64(num_bins - 1)).astype(np.intp)
        counts += np.bincount(bins, minlength=num_bins)
    return counts


def fit_counts(counts: NDArray[np.int64], *, config: MixtureConfig, seed: int) -> Mixture:
    """Fit to a histogram (b,) made by `histogram`, or to the sum of several."""
    num_samples = int(counts.sum())
    if num_samples == 0:
        raise MixtureError("no gap to fit a mixture to: no sample was scored; see quarantine.parquet for the reasons")
    found, p = dip_of_counts(counts, num_values=min(config.dip_rows, num_samples), seed=seed)
    occupied = np.flatnonzero(counts)
    points, shares = occupied / (len(counts) - 1), counts[occupied] / num_samples
    blank = Mixture(num_samples=num_samples, threshold=config.threshold, dip=found, dip_p=p, reasons=("not fitted",))
    if num_samples < config.min_samples:
        few = f"{num_samples} samples are too few for a mixture, which needs {config.min_samples}"
        return replace(blank, reasons=(few,))
    if len(points) == 1:
        return replace(blank, reasons=(f"the gap is constant: {points[0]:.3f} for every sample",))
    components, log_likelihood = _fit(points, shares, config=config)
    fitted = replace(
        blank,
        components=components,
        log_likelihood=log_likelihood,
        bic_one=_bic(_log_likelihood_of_one(points, shares), num_parameters=2, num_samples=num_samples),
        bic_two=_bic(log_likelihood, num_parameters=5, num_samples=num_samples),
        ashman_d=_ashman_d(components),
    )
    return replace(fitted, reasons=_reasons(fitted, config))


def _check(gap: Gap) -> None:
    """The door: gap must be (n,) and every value in [0, 1]. Two passes without a copy."""
    if gap.ndim != 1:
        raise MixtureError(f"the gap must be one value per sample, shape (n,); found shape {gap.shape}")
    if len(gap) == 0 or (gap.min() >= 0.0 and gap.max() <= 1.0):  # NaN fails both comparisons
        return
    wrong = np.flatnonzero(~((gap >= 0.0) & (gap <= 1.0)))
    raise MixtureError(
        f"the gap must lie in [0, 1]; {len(wrong)} of {len(gap)} values do not, the first is {gap[wrong[0]]} at row "
        f"{wrong[0]}. Take the largest minus the least confidence, unsigned, and leave out rows without one"
    )


def _fit(points: Floats, shares: Floats, *, config: MixtureConfig) -> tuple[Pair, float]:
    """EM on points (b,) with shares (b,) that sum to 1, from the best two-means split: components, log-likelihood.

    One start on purpose, not the likeliest of several: on Beta(.3, .3) the likeliest plain fit (-0.108 a sample,
    against -0.193 of two halves) is a needle of 19% at 1, which leaves all gaps below 0.97 to the balanced side.
    """
    balanced = _two_means(points, shares)
    pair = _maximise(points, shares, balanced, config=config)
    balanced, log_likelihood = _expect(points, shares, pair)
    for _ in range(config.max_steps):
        pair = _maximise(points, shares, balanced, config=config)
        before = log_likelihood
        balanced, log_likelihood = _expect(points, shares, pair)
        if log_likelihood - before < config.tolerance:
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


def _maximise(points: Floats, shares: Floats, balanced: Floats, *, config: MixtureConfig) -> Pair:
    """The components with these memberships (b,) of the balanced one, the ratio of their sds held within bounds.

    The bounds (Hathaway 1985; these two are ours) keep a component from becoming a needle on a saturated end. On
    Beta(.3, .3) the plain fit cuts at 0.96, 0.96 and 0.05 for three seeds, with them at 0.50, 0.50 and 0.10. A wider
    balanced component would also win again at the largest gaps. Known groups are still told apart: a spike of sd 0.03
    before a Beta(2, 3) with 97.6% right (plain: 97.3%), 8% at 0.8 and the rest around 0.15 with 100.0% (plain: 100.0%).
    """
    w, m, s = _moments(points, shares * balanced, config.min_sd)
    v, n, t = _moments(points, shares * (1.0 - balanced), config.min_sd)
    ratio = min(max(s / t, config.min_sd_ratio), config.max_sd_ratio)
    sd = math.sqrt(w * (s / ratio) ** 2 + v * t**2)  # the likeliest sd of the other at this ratio; t inside the bounds
    return Component(weight=w, mean=m, sd=ratio * sd), Component(weight=v, mean=n, sd=sd)


def _moments(points: Floats, part: Floats, min_sd: float) -> tuple[float, float, float]:
    """Weight, mean and sd of the shares (b,) that belong to one component; none of them degenerate."""
    weight = min(max(float(part.sum()), 1e-12), 1.0 - 1e-12)
    mean = min(float(part @ points) / weight, 1.0)
    variance = float(part @ (points - mean) ** 2) / weight
    return weight, mean, max(math.sqrt(variance), min_sd)


def _log_likelihood_of_one(points: Floats, shares: Floats) -> float:
    """Mean log-likelihood of a single Gaussian; there are two points at least, so its variance is not zero."""
    variance = float(shares @ (points - shares @ points) ** 2)
    return -0.5 * (math.log(2 * math.pi * variance) + 1.0)


def _bic(log_likelihood: float, *, num_parameters: int, num_samples: int) -> float:
    """Bayesian information criterion from the mean log-likelihood; lower is better."""
    return num_parameters * math.log(num_samples) - 2.0 * num_samples * log_likelihood


def _ashman_d(pair: Pair) -> float:
    """Ashman's D: the distance of the means in units of the root mean square of the two sds; 2 and more is separate."""
    one, other = pair
    return math.sqrt(2.0) * abs(one.mean - other.mean) / math.hypot(one.sd, other.sd)


def _reasons(fitted: Mixture, config: MixtureConfig) -> tuple[str, ...]:
    """Why the gap is not bimodal, every failed criterion with its number. Empty where it is."""
    assert fitted.components is not None
    assert fitted.ashman_d is not None
    assert fitted.bic_one is not None
    assert fitted.bic_two is not None
    smaller = min(component.weight for component in fitted.components)
    failures = {
        f"dip {fitted.dip:.4f} is below {config.min_dip:g}": fitted.dip < config.min_dip,
        f"p of the dip {fitted.dip_p:.3f} is not below {config.dip_level:g}": fitted.dip_p >= config.dip_level,
        f"Ashman's D {fitted.ashman_d:.2f} is below {config.min_ashman_d:g}": fitted.ashman_d < config.min_ashman_d,
        f"the smaller component weighs {smaller:.3f}, less than {config.min_weight:g}": smaller < config.min_weight,
        f"BIC {fitted.bic_two:.1f} of two is not below {fitted.bic_one:.1f} of one": fitted.bic_two >= fitted.bic_one,
    }
    return tuple(reason for reason, failed in failures.items() if failed)


def _monotone_logit(pair: Pair) -> tuple[float, float, float, float, float]:
    """Logit of P(balanced | g), a parabola in g, held level where it would rise: start, sign, level, slope, curve.

    With way = max(sign * (g - start), 0) it is level - sign * way * (slope + curve * way), slope and curve >= 0. A
    narrower balanced component has its peak below both means, and counts as balanced all the way down to 0; a wider
    one has its valley above both, and does not win again beyond. Products of rising factors stay monotone in floats.
    """
    low, high = pair
    precise, loose = 1.0 / low.sd**2, 1.0 / high.sd**2
    bend = loose - precise  # twice the second coefficient
    turn = (low.mean * precise - high.mean * loose) / (precise - loose) if bend else 0.0
    start = max(turn, 0.0) if bend <= 0.0 else min(turn, 1.0)
    at = np.array(start)
    level = float(low.log_density(at) - high.log_density(at))
    slope = (start - low.mean) * precise - (start - high.mean) * loose
    return start, 1.0 if bend <= 0.0 else -1.0, level, max(slope, 0.0), 0.5 * abs(bend)
