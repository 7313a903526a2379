"""Statistics of a comparison of two methods by their correctness on the same test samples.

n test samples, S seeds. Simulated in benchmarks/verdict.py: with a nominal level of .05, a paired t test over seeds or
over samples and percentile bootstraps claim differences that do not exist in up to a fifth of comparisons or more; this
procedure keeps the level, since it has the variance of the samples and that of the trainings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit

from ..audit.errors import ConfigError
from ..audit.metrics import Groups, group_codes, jackknife

LEVEL = 0.05
POWER = 0.8
MIN_TEST_SAMPLES = 30  # of fewer, nothing can be shown; ours
NO_VERDICT = "no verdict"  # in the place of evidence, of one training or too few test samples

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Condition = tuple[str, str]  # manifest, "" without manifests, and method
Evidence = Literal["helps", "hurts", "no evidence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Difference of accuracy between two methods, a minus b, on n test samples.

    Attributes:
        mean: Difference in [-1, 1], above 0 where a is better.
        low, high: 95% interval; [-1, 1] with one seed, which has no variance of training.
        standard_error: Of the mean, over test samples and trainings; NaN with one seed.
        df: Degrees of freedom of Student's t, Satterthwaite's; NaN with one seed.
        p: Two-sided p of no difference; NaN with one seed.
        smallest_effect: Smallest true difference that the same design shows with a probability of .8 at the level .05,
            as the only comparison, see `smallest_effect_of`; NaN with one seed.
        num_samples: Test samples, n.
        num_seeds: Trainings of each method, the smaller number of both.
    """

    mean: float
    low: float
    high: float
    standard_error: float
    df: float
    p: float
    smallest_effect: float
    num_samples: int
    num_seeds: int

    def evidence(self, p: float | None = None) -> Evidence:
        """Return what may be said of method a; `p` is corrected for several comparisons, see `holm`."""
        p = self.p if p is None else p
        if self.num_seeds < 2 or self.num_samples < MIN_TEST_SAMPLES or not p < LEVEL:
            return "no evidence"
        return "helps" if self.mean > 0 else "hurts"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def compare_correctness(a: ArrayLike, b: ArrayLike, *, group: Sequence[object] | None = None) -> Difference:
    """Compare two methods by which test samples they predict correctly.

    With d_i the difference of sample i averaged over seeds, s_M^2 the variance over seeds of the accuracy of method M,
    and MS_M the mean square of the sample x seed residuals, the variance of the mean difference is

        v = v1 + max(0, (s_A^2 / S_A + s_B^2 / S_B) - (MS_A / S_A + MS_B / S_B) / n),

    where v1 is var(d_i) / n, or the variance of the jackknife over groups: MS / (n S) is the part of the variance of
    seeds that v1 has already. The seeds of the methods are independent, and their variances are never pooled: of
    methods of which one is three times noisier, single tests would reach levels of .06 to .19.

    Args:
        a: Correctness (S, n) of each test sample in each training of the method: 0 or 1, or a share in [0, 1].
        b: The same of the other method, on the same samples in the same order; the number of seeds may differ.
        group: Group of each test sample (n,), such as its speaker; None where samples are independent.

    Returns:
        The difference a - b with its interval.

    Raises:
        ConfigError: The arrays are not (S, n) of the same n, or hold values outside [0, 1].

    Example:
        >>> rng = np.random.default_rng(0)
        >>> a, b = rng.random((5, 400)) < 0.8, rng.random((5, 400)) < 0.5
        >>> compare_correctness(a, b).evidence()
        'helps'
    """
    first, second = _correctness(a, "a"), _correctness(b, "b")
    n = first.shape[1]
    if second.shape[1] != n:
        raise ConfigError(f"a has {n} test samples and b {second.shape[1]}: compare methods on the same samples")
    if group is not None and len(group) != n:
        raise ConfigError(f"group has {len(group)} values for {n} test samples")
    d = first.mean(axis=0) - second.mean(axis=0)
    mean, num_seeds = float(d.mean()), min(len(first), len(second))
    groups = None if group is None else group_codes(np.array([str(value) for value in group], dtype=object))
    if num_seeds < 2 or n < 2 or _num_groups(groups, n) < 2:
        nothing = dict.fromkeys(("standard_error", "df", "p", "smallest_effect"), float("nan"))
        return Difference(mean=mean, low=-1.0, high=1.0, num_samples=n, num_seeds=num_seeds, **nothing)
    sample_error, sample_df = jackknife(d, groups)
    parts = [(_seed_variance(correct) / len(correct), len(correct) - 1) for correct in (first, second)]
    inside = sum(residual_square(correct) / (n * len(correct)) for correct in (first, second))
    sample_variance = sample_error**2
    variance = sample_variance + max(0.0, sum(part for part, _ in parts) - inside)
    weights = sample_variance**2 / sample_df + sum(part**2 / df for part, df in parts)
    df = max(1.0, variance**2 / weights) if weights > 0 else float(n - 1)
    standard_error = float(np.sqrt(variance))
    half_width = float(stdtrit(df, 1 - LEVEL / 2)) * standard_error
    return Difference(
        mean=mean,
        low=max(-1.0, mean - half_width),
        high=min(1.0, mean + half_width),
        standard_error=standard_error,
        df=df,
        p=_two_sided_p(mean, standard_error, df),
        smallest_effect=smallest_effect_of(standard_error, df),
        num_samples=n,
        num_seeds=num_seeds,
    )


def smallest_effect_of(standard_error: float, df: float, *, num_comparisons: int = 1) -> float:
    """Compute the smallest true difference that is shown with a probability of .8: (t_{1 - a / 2} + t_.8) errors.

    a is .05 divided by the number of comparisons that `holm` corrects for: its first step. If others are shown too, the
    next steps are less strict. 1 where no difference is shown, as with about one degree of freedom; NaN of NaN.
    """
    level = LEVEL / num_comparisons
    effect = float(stdtrit(df, 1 - level / 2) + stdtrit(df, POWER)) * standard_error
    return min(effect, 1.0) if effect == effect else effect


def compare_on(mask: Mask, a: Array, b: Array, *, group: Sequence[object] | None) -> Difference:
    """Compare two methods by their correctness (S, n) on a subset of the test samples, see `compare_correctness`."""
    groups = None if group is None else [value for value, is_used in zip(group, mask, strict=True) if is_used]
    return compare_correctness(a[:, mask], b[:, mask], group=groups)


def holm(p: Sequence[float]) -> list[float]:
    """Return the p values of several comparisons, corrected for their number (Holm, 1979), in the same order.

    With corrected values below .05 the chance of a single false claim among all comparisons is at most .05. NaN counts
    as a comparison that shows nothing and stays NaN.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")  # NaN last
    factors = np.arange(len(values), 0, -1)
    corrected = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    result = np.empty_like(values)
    result[order] = corrected
    return [float(value) for value in result]


def format_p(p: float) -> str:
    """Return a p value with three digits, or "<0.001"."""
    return "<0.001" if p < 0.0005 else f"{p:.3f}"


def _correctness(values: ArrayLike, name: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ConfigError(f"{name} has the shape {array.shape}: correctness is (seeds, test samples)")
    if not ((array >= 0) & (array <= 1)).all():
        raise ConfigError(f"{name} has values outside [0, 1]: correctness is 0 or 1")
    return array


def _num_groups(groups: Groups, n: int) -> int:
    return n if groups is None else int(np.count_nonzero(np.bincount(groups)))


def _seed_variance(correct: Array) -> float:
    """Compute the variance over seeds of the accuracy."""
    return float(correct.mean(axis=1).var(ddof=1))


def residual_square(correct: Array) -> float:
    """Compute the mean square of the residuals (S, n) of samples and seeds without interaction."""
    num_seeds, n = correct.shape
    residual = correct - correct.mean(axis=0) - correct.mean(axis=1, keepdims=True) + correct.mean()
    return float((residual**2).sum() / ((n - 1) * (num_seeds - 1)))


def _two_sided_p(mean: float, standard_error: float, df: float) -> float:
    if standard_error == 0:
        return 0.0 if mean else 1.0
    return float(2 * stdtr(df, -abs(mean) / standard_error))
