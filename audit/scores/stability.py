"""Stability of an audit: the discrepancies of samples by other features, and the lean of the set on other samples.

Both audits are repeated with one round of cross-fitting, on at most 200,000 samples. The procedures are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from ..dataset.labels import Target
from ..dataset.samples import Samples
from ..errors import ScoreError
from ..features.cached_matrix import FeatureMatrix
from ..features.encoders import is_network
from ..features.matrix import RowIndex
from ..hashing import hash_rank
from ..metrics import BALANCED_WITHIN, Floats, discrepancy, is_dominated
from ..probes.config import ProbeConfig
from ..probes.cross_fit import CrossFit, plan_cross_fits
from ..probes.probe_set import CalibratedProbe, Fit, ProbeSet, fit_calibrated_probe, fit_in_parallel
from ..workers import parallel_map
from .sample_scores import compute_confidence

AUDIT_ROWS = 200_000  # by position, in the order of the ids' hashes
NUM_BISECTIONS = 6  # the standard error has as many degrees of freedom


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditData:
    """What is audited again: n samples as dataset rows in the order of their ids' hashes, and their features."""

    samples: Samples
    rows: RowIndex
    inputs: tuple[FeatureMatrix, ...]
    config: ProbeConfig
    fit: Fit
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the m modalities."""
        return tuple(matrix.status.modality.name for matrix in self.inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """Correlation r of a discrepancy by one half of the features with that by the other, within classes.

    `modality` is the one that is compared with the others; the first of two. z is r in standard deviations of the same
    with the samples of each class permuted. About 0: the discrepancies of single samples are not shown to be real.
    """

    modality: str
    r: float
    z: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfAudit:
    """Audit by two disjoint random halves of each modality's features, with different folds.

    confidences: of each half, (n, m), NaN where not measured. `reason` says why nothing was measured, else "".
    """

    num_rows: int
    reliability: tuple[Reliability, ...]
    reason: str
    confidences: tuple[Floats, Floats] | None

    def to_json(self) -> dict[str, Any]:
        """Return the results as JSON values, without the confidences, which are columns of the score table."""
        return {
            "num_rows": self.num_rows,
            "reliability": [asdict(row) for row in self.reliability],
            "reason": self.reason,
        }


def audit_halves(data: AuditData) -> HalfAudit:
    """Audit by two halves of the features, and compute the reliability of each discrepancy."""
    positions = np.arange(min(len(data.rows), AUDIT_ROWS))
    unmeasured = HalfAudit(num_rows=0, reliability=(), reason="", confidences=None)
    if reason := _without_halves(data):
        return replace(unmeasured, reason=reason)
    halves = [_feature_half(matrix, seed=data.seed) for matrix in data.inputs]
    confidences = []
    for index, purpose in enumerate(("first half", "second half")):
        inputs = tuple(
            matrix.select_columns(columns[index]) for matrix, columns in zip(data.inputs, halves, strict=True)
        )
        try:
            confidences.append(audit_again(replace(data, inputs=inputs), positions, purpose=purpose))
        except ScoreError as error:
            return replace(unmeasured, reason=str(error))
    label = data.samples.label[data.rows]
    first, second = (discrepancy(confidence).reshape(len(label), -1) for confidence in confidences)
    names = data.names[: first.shape[1]]
    pairs = zip(names, first.T, second.T, strict=True)
    reliability = [_named(name, reliability_within_classes(a, b, label)) for name, a, b in pairs]
    return HalfAudit(
        num_rows=len(positions),
        reliability=tuple(reliability),
        reason="",
        confidences=(confidences[0], confidences[1]),
    )


def reliability_within_classes(
    first: Floats, second: Floats, label: NDArray[np.integer[Any]]
) -> tuple[float, float] | None:
    """Compute r and z of two measures (n,) of the same samples, after subtracting the means of the classes (n,).

    The permutations within classes have sum(a b) = 0 on average and the variance sum over classes of
    sum(a^2) sum(b^2) / (n_c - 1), so that none is drawn. None if one measure does not vary within classes.
    """
    valid = ~(np.isnan(first) | np.isnan(second))
    codes = np.unique(label[valid], return_inverse=True)[1]
    size = np.bincount(codes)
    a, b = (values[valid].astype(np.float64) for values in (first, second))
    a, b = (values - (np.bincount(codes, weights=values) / size)[codes] for values in (a, b))
    squares = [np.bincount(codes, weights=values**2, minlength=len(size)) for values in (a, b)]
    total = float(np.sqrt(squares[0].sum() * squares[1].sum()))
    if not total > 1e-9 * max(1, len(a)):
        return None
    spread = float(np.sqrt((squares[0] * squares[1] / np.maximum(size - 1, 1)).sum()))
    product = float(a @ b)
    return product / total, product / spread if spread > 0 else 0.0


def _named(modality: str, values: tuple[float, float] | None) -> Reliability:
    r, z = values or (0.0, 0.0)
    return Reliability(modality=modality, r=r, z=z)


def _without_halves(data: AuditData) -> str:
    """Return why the features cannot be halved; "" if they can."""
    for matrix in data.inputs:
        name = matrix.status.modality.name
        if is_network(matrix.status.modality):
            return f"{name} has a network probe, which has no features to halve"
        if matrix.num_features < 2:
            return f"{name} has one feature, which cannot be halved"
    return ""


def _feature_half(matrix: FeatureMatrix, *, seed: int) -> tuple[RowIndex, RowIndex]:
    """Draw two disjoint random halves of a modality's features, as sorted columns."""
    name, d = matrix.status.modality.name, matrix.num_features
    drawn = np.random.default_rng([*hash_rank([name], seed=seed, purpose="feature halves")]).permutation(d)
    return np.sort(drawn[: d // 2]), np.sort(drawn[d // 2 :])


@dataclass(frozen=True, slots=True, kw_only=True)
class LeanError:
    """Standard errors over datasets of the shares of samples that a modality is ahead and behind on, and of the lean.

    The lean is the difference of the two shares. Of two modalities the one named is the first.
    """

    modality: str
    ahead: float
    behind: float
    lean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BisectionAudit:
    """Audits of the halves of random bisections of the samples; `reason` says why nothing was measured, else ""."""

    num_bisections: int
    num_rows: int
    errors: tuple[LeanError, ...]
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        return asdict(self)


def audit_bisections(data: AuditData) -> BisectionAudit:
    """Audit both halves of six random bisections of the samples by group, each apart with one round.

    se^2 = mean over bisections of (first half - second half)^2 / 4, with 6 degrees of freedom. Where the modalities are
    equal over datasets, the usual interval, which holds for this run's probes, claims a lean in .28 and .33 of datasets
    of n = 100 and 300, this one in .03 and 0 (benchmarks/honesty.py, 40 datasets each).
    """
    positions = np.arange(min(len(data.rows), AUDIT_ROWS))
    unmeasured = BisectionAudit(num_bisections=NUM_BISECTIONS, num_rows=0, errors=(), reason="")
    networks = [matrix.status.modality.name for matrix in data.inputs if is_network(matrix.status.modality)]
    if networks:
        return replace(unmeasured, reason=f"{networks[0]} has a network probe, which is not fitted again")
    differences = []
    for number in range(NUM_BISECTIONS):
        in_first = _bisect(data, positions, number=number)
        try:
            first, second = (
                _shares(audit_again(data, positions[rows], purpose=f"bisection {number} {name}"))
                for name, rows in (("first", in_first), ("second", ~in_first))
            )
        except ScoreError as error:
            return replace(unmeasured, reason=str(error))
        differences.append(first - second)
    errors = np.sqrt((np.stack(differences) ** 2).mean(axis=0) / 4)  # (3, 1) or (3, m)
    pairs = zip(data.names, errors.T.tolist(), strict=False)  # one pair of two modalities
    leans = tuple(LeanError(modality=name, ahead=a, behind=b, lean=c) for name, (a, b, c) in pairs)
    return replace(unmeasured, num_rows=len(positions), errors=leans)


def intervals_of_sets(
    error: Mapping[str, float], *, share_ahead: float, share_behind: float
) -> dict[str, dict[str, float]]:
    """Compute the 95% intervals over datasets of the two shares of a modality and of the lean, from a LeanError."""
    quantile = float(stdtrit(NUM_BISECTIONS, 0.975))
    values = {
        "share_ahead": (share_ahead, error["ahead"], 0.0),
        "share_behind": (share_behind, error["behind"], 0.0),
        "lean": (share_ahead - share_behind, error["lean"], -1.0),
    }
    return {
        name: {
            "mean": value,
            "low": max(lowest, value - quantile * standard_error),
            "high": min(1.0, value + quantile * standard_error),
        }
        for name, (value, standard_error, lowest) in values.items()
    }


def _bisect(data: AuditData, positions: RowIndex, *, number: int) -> NDArray[np.bool_]:
    """Return which of the samples (b,) are in the first half: half of the groups, or of the samples, by hash."""
    rows = data.rows[positions]
    unit = data.samples.sample_id if data.samples.group is None else data.samples.group
    names, codes = np.unique(unit[rows].astype(str), return_inverse=True)
    rank = np.argsort(np.argsort(hash_rank(names.tolist(), seed=data.seed, purpose=f"bisection {number}")))
    return np.asarray((rank < len(names) // 2)[codes])


def _shares(confidence: Floats) -> NDArray[np.float64]:
    """Compute the shares ahead and behind and their difference, (3, 1) of two modalities, (3, m) of more."""
    values = discrepancy(confidence)
    values = values.reshape(len(values), -1)
    count = np.maximum((~np.isnan(values)).sum(axis=0), 1)
    ahead, behind = (is_dominated(signed, BALANCED_WITHIN).sum(axis=0) / count for signed in (values, -values))
    return np.stack([ahead, behind, ahead - behind])


def audit_again(data: AuditData, positions: RowIndex, *, purpose: str) -> Floats:
    """Fit a probe of each modality on samples at these positions (b,), one round with folds of its own.

    Returns their out-of-fold confidences, (n, m), NaN for the samples that are not among them, lack the modality, or
    are of a class in a single fold. Raises ScoreError if the samples cannot be cross-fitted.
    """
    seed = int(hash_rank([purpose], seed=data.seed, purpose="audit again")[0])
    rows = data.rows[positions]
    kept, cross_fits, _ = plan_cross_fits(data.samples, rows, replace(data.config, repeats=1), seed=seed)
    positions = positions[np.isin(rows, kept)]
    target, _ = target_of(data.samples, kept)
    inputs = [matrix.take(positions) for matrix in data.inputs]
    codes = data.samples.group_codes
    check_modalities(None if codes is None else codes[kept], inputs, cross_fits[0])

    def fit_modality(matrix: FeatureMatrix) -> CalibratedProbe:
        return fit_calibrated_probe(
            matrix.status.modality.name, matrix, target, cross_fits, present=matrix.present, fit=data.fit
        )

    probes = list(parallel_map(fit_modality, inputs) if fit_in_parallel(inputs) else map(fit_modality, inputs))
    confidence = np.full((len(data.rows), len(inputs)), np.nan, np.float32)
    confidence[positions] = compute_confidence(ProbeSet(probes=tuple(probes), joint=None, target=target))
    return confidence


class LabelledSamples(Protocol):
    """Labels of the samples of a dataset: Samples, or columns of a large one."""

    @property
    def task(self) -> str:
        """classification, multilabel or regression."""

    @property
    def label(self) -> NDArray[np.int32]:
        """Class or stratum of each sample (n,)."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes or strata."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs of a probe."""

    @property
    def target(self) -> Target:
        """Training target of all samples."""


def target_of(samples: LabelledSamples, rows: RowIndex) -> tuple[Target, NDArray[np.int32]]:
    """Return the target of these dataset rows, and the source's label of each of its classes."""
    if samples.task != "classification":
        return samples.target.take(rows), np.arange(len(samples.outputs), dtype=np.int32)
    classes, label = np.unique(samples.label[rows], return_inverse=True)
    if len(classes) < 2:
        raise ScoreError(f"only one class is left to score ({samples.class_names[classes[0]]!r}); probes need two")
    target = Target(task=samples.task, label=label.astype(np.int32), num_outputs=len(classes))
    return target, classes.astype(np.int32)


def _count_groups(group: NDArray[np.integer[Any]]) -> int:
    """Count distinct groups (n,), up to two."""
    return 0 if not len(group) else 1 + bool(group.min() < group.max())


def check_modalities(
    group: NDArray[np.integer[Any]] | None, inputs: Sequence[FeatureMatrix], cross_fit: CrossFit
) -> None:
    """Raise ScoreError for a modality that only one group has: its probe could not be tested out of fold.

    group: index of the group of each row of the inputs (n,); None without groups.
    """
    kind = "samples" if group is None else "groups of samples"
    for matrix in inputs:
        trains = cross_fit.fits & matrix.present
        num_units = int(trains.sum()) if group is None else _count_groups(group[trains])
        if num_units < 2:
            raise ScoreError(
                f"modality {matrix.status.modality.name} has {num_units} usable {kind} that probes can train on, "
                "2 needed; select the modalities to score with --modality"
            )
