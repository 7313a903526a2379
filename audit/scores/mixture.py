"""Mixture of the modality gap, and the criteria of its bimodality.

The two-component mixture and its posterior are those of Modality Gap (arXiv 2510.21797). The paper does not test
whether there are two groups; the histogram, the tests of bimodality, the monotone posterior and the threshold that
replaces it where the tests fail are ours, and so is every default below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MixtureError
from ..parsing import RequiredKeys, Shape, check_ranges, check_shape
from . import em
from .dip import dip_of_histogram, dip_p_of_counts
from .em import Component, Floats, Gap, Pair

CHUNK = em.CHUNK


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """How the mixture is fitted, and the criteria for a bimodal gap. All defaults are ours.

    Args:
        num_bins: Bins of the gap: with 4096 of 0.00024, parameters differ by at most 5e-5 from a fit to the values.
        tolerance: EM stops when a step raises the mean log-likelihood by less than this.
        max_steps: Largest number of EM steps; the slowest distribution tested, a single normal, stops before 1000.
        min_sd: Lower bound of each sd, the resolution of a probe; keeps a component from collapsing onto gaps of 0.
        min_sd_ratio: Lower bound of sd of balanced / sd of imbalanced.
        max_sd_ratio: Upper bound of it; 0 and 1e9 give the paper's unbounded fit.
        min_samples: With fewer samples, no mixture of five parameters is fitted.
        min_distinct: Fewest distinct gaps, by bins, or half the samples if that is less: of four atoms every one is a
            mode, and the verdict would be "bimodal" always.
        dip_rows: Size of the seeded subsample for the p of the dip, so that it is comparable at any n; 10,000 take 15
            ms. The dip itself, the effect size, is that of all samples.
        dip_level: Significance level of the dip test.
        min_dip: Effect size: the distribution of the gaps is at least this share of the samples away from any unimodal
            one.
        min_ashman_d: Smallest Ashman's D; 2 is the usual bound for a clean separation (Ashman, Bird & Zepf 1994).
        min_weight: A component with less weight is a tail, not a group.
        threshold: If the gap is not bimodal, a sample is balanced if its gap is at most this.

    Raises:
        ConfigError: A value is out of range.
    """

    num_bins: int = 4096
    tolerance: float = 1e-8
    max_steps: int = 1000
    min_sd: float = 0.01
    min_sd_ratio: float = 0.1
    max_sd_ratio: float = 1.0
    min_samples: int = 10
    min_distinct: int = 50
    dip_rows: int = 10_000
    dip_level: float = 0.01
    min_dip: float = 0.01
    min_ashman_d: float = 2.0
    min_weight: float = 0.05
    threshold: float = 0.2

    @property
    def bounds(self) -> em.Bounds:
        """The settings of EM."""
        return em.Bounds(**{name: getattr(self, name) for name in em.Bounds.__dataclass_fields__})

    def __post_init__(self) -> None:
        check_ranges("mixture", self, num_bins="[16, inf)", max_steps="[1, inf)", min_samples="[2, inf)")
        check_ranges(
            "mixture", self, min_distinct="[0, inf)", dip_rows="[10, inf)", tolerance="(0, 1)", min_sd="(0, 1)"
        )
        check_ranges("mixture", self, min_sd_ratio="[0, 1]", max_sd_ratio="[1, inf]")
        check_ranges("mixture", self, dip_level="(0.001, 1)", min_dip="[0, 1]", min_weight="[0, 1]", threshold="[0, 1]")


_MAYBE_NUMBER = (float, type(None))
_SHAPE: Shape = {
    "num_samples": int,
    "threshold": float,
    "reasons": [str],
    "dip": float,
    "dip_p": float,
    **dict.fromkeys(("log_likelihood", "bic_one", "bic_two", "ashman_d"), _MAYBE_NUMBER),
}
_COMPONENTS: Shape = [RequiredKeys(weight=float, mean=float, sd=float)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Two components of the gap, and the verdict whether the gap is bimodal.

    If no mixture was fitted (constant gap, too few samples), components and the fields that derive from them are None.

    Args:
        num_samples: Number of gaps that it was fitted to.
        threshold: Largest gap of a balanced sample, used if the gap is not bimodal.
        reasons: Each failed criterion of bimodality with its number; empty if the gap is bimodal.
        dip: Dip statistic of all samples in [0, 1/4]; high = far from unimodal.
        dip_p: p value of the dip of a subsample, in [0.001, 1].
        components: The balanced component, of the lower mean, and the imbalanced one.
        log_likelihood: Mean log-likelihood per sample.
        bic_one: BIC of a single Gaussian; lower is better.
        bic_two: BIC of the two components.
        ashman_d: Distance of the means over the root mean square of the sds; from 2 on the components are separate.

    Raises:
        MixtureError: Neither components nor reasons.

    Example:
        >>> import mmaudit, numpy as np
        >>> mixture = mmaudit.fit_mixture(np.linspace(0, 1, 200) ** 2)
        >>> mixture.bimodal, mixture.rule
        (False, 'threshold')
        >>> mixture.posterior(np.array([0.1, 0.9])).tolist()
        [1.0, 0.0]
    """

    num_samples: int
    threshold: float
    reasons: tuple[str, ...]
    dip: float
    dip_p: float
    components: Pair | None = None
    log_likelihood: float | None = None
    bic_one: float | None = None
    bic_two: float | None = None
    ashman_d: float | None = None

    def __post_init__(self) -> None:
        if self.components is None and not self.reasons:
            raise MixtureError("a mixture without components needs reasons, but reasons is empty")

    @property
    def bimodal(self) -> bool:
        """Whether the gap has two groups, which is so if no criterion failed."""
        return not self.reasons

    @property
    def rule(self) -> str:
        """Source of p_balanced, "posterior" if the gap is bimodal, otherwise "threshold"."""
        return "posterior" if self.bimodal else "threshold"

    def posterior(self, gap: Gap) -> NDArray[np.float32]:
        """Compute P(balanced | gap) of gap (n,), in [0, 1], high = balanced; it does not increase with the gap.

        If the gap is not bimodal it is 1 up to the threshold and 0 above, so that >= 0.5 selects by the threshold.
        """
        if self.components is None or not self.bimodal:
            return em.threshold_rule(gap, self.threshold)
        return em.posterior(gap, self.components)

    def density(self, grid: Floats) -> Floats:
        """Compute weighted densities (2, len(grid)), balanced first, to plot over a histogram; 0 without a fit."""
        if self.components is None:
            return np.zeros((2, len(grid)))
        return np.stack([np.exp(component.log_density(grid)) for component in self.components])

    def to_json(self) -> dict[str, object]:
        """Return JSON values for mixture.json, with the derived verdict and rule included."""
        components = None if self.components is None else [asdict(component) for component in self.components]
        verdict = {"bimodal": self.bimodal, "rule": self.rule, "reasons": list(self.reasons)}
        return {**asdict(self), "components": components, **verdict}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Mixture:
        """Build a mixture from the values of to_json, of which it is the exact inverse; the verdict is derived."""
        try:
            fields = {name: values[name] for name in cls.__dataclass_fields__}
            check_shape(fields, _SHAPE)
            if fields["components"] is not None:
                check_shape(fields["components"], _COMPONENTS, key="components")
                balanced, imbalanced = (Component(**component) for component in fields["components"])
                if min(balanced.sd, imbalanced.sd, balanced.weight, imbalanced.weight) <= 0:
                    raise ValueError("a weight or sd of components is not above 0")
                absent = [name for name in ("log_likelihood", "bic_one", "bic_two", "ashman_d") if fields[name] is None]
                if absent:
                    raise ValueError(f"{absent[0]} of a mixture with components")
                fields["components"] = (balanced, imbalanced)
            return cls(**{**fields, "reasons": tuple(fields["reasons"])})
        except (KeyError, TypeError, ValueError) as error:
            raise MixtureError(
                f"not a mixture: {error!r} is missing or malformed; rescore with: mmaudit score DATA"
            ) from error


def fit_mixture(gap: Gap, *, config: MixtureConfig | None = None, seed: int = 0) -> Mixture:
    """Fit a mixture of two Gaussians to the modality gap, and test whether the gap is bimodal.

    Args:
        gap: (n,) gaps in [0, 1], in any order.
        config: Settings of the fit and criteria of bimodality.
        seed: Seed of the dip test's subsample.

    Returns:
        The mixture; without components if the gap is constant or there are too few samples.

    Raises:
        MixtureError: No gap, or one outside [0, 1].

    Example:
        >>> import mmaudit, numpy as np
        >>> rng = np.random.default_rng(0)
        >>> gap = np.concatenate([rng.normal(0.2, 0.05, 500), rng.normal(0.8, 0.05, 500)])
        >>> mixture = mmaudit.fit_mixture(gap)
        >>> mixture.bimodal, [round(component.mean, 1) for component in mixture.components]
        (True, [0.2, 0.8])
    """
    config = config or MixtureConfig()
    return fit_counts(histogram(gap, num_bins=config.num_bins), config=config, seed=seed)


def histogram(gap: Gap, *, num_bins: int) -> NDArray[np.int64]:
    """Count gap (n,) by the nearest of num_bins points from 0 to 1: (num_bins,). Counts of shards can be added.

    The points include 0 and 1, so that saturated gaps are counted exactly, not half a bin off.
    """
    em.check_gap(gap)

    def count(rows: slice) -> NDArray[np.int64]:
        counts, part_gap = np.zeros(num_bins, dtype=np.int64), gap[rows]
        for chunk in em.chunks(len(part_gap)):
            bins = np.rint(part_gap[chunk] * np.float64(num_bins - 1)).astype(np.intp)
            counts += np.bincount(bins, minlength=num_bins)
        return counts

    return sum(em.in_threads(count, len(gap)), np.zeros(num_bins, dtype=np.int64))


def fit_counts(counts: NDArray[np.int64], *, config: MixtureConfig, seed: int) -> Mixture:
    """Fit a mixture to a histogram (b,) of `histogram`, or to the sum of several."""
    num_samples = int(counts.sum())
    if num_samples == 0:
        raise MixtureError("no sample was scored, so no mixture can be fitted; see quarantine.parquet for the reasons")
    dip_p = dip_p_of_counts(counts, num_values=min(config.dip_rows, num_samples), seed=seed)
    occupied = np.flatnonzero(counts)
    points, shares = occupied / (len(counts) - 1), counts[occupied] / num_samples
    unfitted = Mixture(
        num_samples=num_samples,
        threshold=config.threshold,
        dip=dip_of_histogram(counts),
        dip_p=dip_p,
        reasons=("not fitted",),
    )
    if num_samples < config.min_samples:
        return replace(unfitted, reasons=(f"a mixture needs {config.min_samples} samples, available {num_samples}",))
    if len(points) == 1:
        return replace(unfitted, reasons=(f"the gap is constant: {points[0]:.3f} for every sample",))
    components, log_likelihood = em.fit_pair(points, shares, bounds=config.bounds)
    fitted = replace(
        unfitted,
        components=components,
        log_likelihood=log_likelihood,
        bic_one=em.bic(em.single_log_likelihood(points, shares), num_parameters=2, num_samples=num_samples),
        bic_two=em.bic(log_likelihood, num_parameters=5, num_samples=num_samples),
        ashman_d=em.ashman_d(components),
    )
    return replace(fitted, reasons=_reasons(fitted, config, num_distinct=len(points)))


def _reasons(fitted: Mixture, config: MixtureConfig, *, num_distinct: int) -> tuple[str, ...]:
    """Return every failed criterion of bimodality with its number; empty if the gap is bimodal."""
    assert fitted.components is not None
    assert fitted.ashman_d is not None
    assert fitted.bic_one is not None
    assert fitted.bic_two is not None
    smaller = min(component.weight for component in fitted.components)
    needed = min(config.min_distinct, fitted.num_samples // 2)
    failures = {
        f"{num_distinct} distinct values of the gap, at least {needed} required": num_distinct < needed,
        f"dip {fitted.dip:.4f}, at least {config.min_dip:g} required": fitted.dip < config.min_dip,
        f"p of the dip {fitted.dip_p:.3f}, less than {config.dip_level:g} required": fitted.dip_p >= config.dip_level,
        f"Ashman's D {fitted.ashman_d:.2f}, at least {config.min_ashman_d:g} required": fitted.ashman_d
        < config.min_ashman_d,
        f"smaller weight {smaller:.3f}, at least {config.min_weight:g} required": smaller < config.min_weight,
        f"BIC {fitted.bic_two:.1f} of two components, less than {fitted.bic_one:.1f}, that of one, required": (
            fitted.bic_two >= fitted.bic_one
        ),
    }
    return tuple(reason for reason, failed in failures.items() if failed)
