"""Report of the probes: metrics, gains and controls, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dataset.labels import PackedSets, Target
from ..features.cached_matrix import FeatureMatrix
from ..features.matrix import Inputs, RowIndex, in_memory
from ..hashing import hash_rank
from ..metrics import Floats, Groups, cross_entropy, mean_interval, share_interval
from ..probes.cross_fit import CrossFit
from ..probes.design import choose_outputs, take_outputs
from ..probes.network_weights import NetworkProbe
from ..probes.prediction import predict
from ..probes.probe_set import CalibratedProbe, Calibration, Fit, ProbeSet, fit_in_parallel
from ..workers import parallel_map

CONTROL_ROWS = 10_000  # by hash of the id: an accuracy on 10,000 rows has an interval of 0.01
METRICS = {"classification": "accuracy", "multilabel": "label accuracy", "regression": "R^2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModalityMetric:
    """Out-of-fold metric of one probe, named by `metric` of the report, with a 95% interval; loss: cross entropy.

    beats_prior: whether the probe is shown to be better than predicting the most common class, by the lower end of the
    metric, or, of classes, better than their frequencies, by the lower end of the reduction of the loss.
    """

    name: str
    value: float
    low: float
    high: float
    loss: float
    beats_prior: bool
    calibration: Calibration | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Gain of a modality: the fused metric minus that without it, on the same samples, with a 95% interval."""

    name: str
    gain: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """Metric of a probe fitted to shuffled labels, with a 99.9% interval, and that of their most common class.

    Above the latter, there is a leak of labels.
    """

    name: str
    num_rows: int
    value: float
    low: float
    high: float
    majority: float

    @property
    def leaks(self) -> bool:
        """Whether the lower end of the 99.9% interval is above the rate of the most common class."""
        return bool(self.low > self.majority)

    def to_json(self) -> dict[str, Any]:
        """Return the control as JSON values."""
        return {**asdict(self), "leaks": self.leaks}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Control:
        """Build a control from the values of `to_json`."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """Dataset-level results: the metric of each modality and of all together, the gain of each, and the controls.

    chance: the metric of predictions without features, `majority` and `uniform`, see chance_levels. All modalities
    together are "fused", the fusion of the probabilities, from which gains are computed, and "joint", a probe of all
    features.
    """

    metric: str
    chance: dict[str, float]
    probe_metrics: tuple[ModalityMetric, ...]
    gain_over_best: Gain  # of the fusion over the best single modality, which it names; see gain_over_best()
    gains: tuple[Gain, ...]
    controls: tuple[Control, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values, for run.json."""
        return {**asdict(self), "controls": [control.to_json() for control in self.controls]}


def compute_probe_report(
    read: Callable[[str], Floats],
    target: Target,
    calibrations: Mapping[str, Calibration],
    *,
    groups: Groups,
    controls: Sequence[Control],
) -> ProbeReport:
    """Compute the report from columns of the scores of n samples, which are read when they are needed.

    Args:
        read: Returns a column (n,), NaN where the modality is missing: `confidence_M` of each modality, `fused` and
            `joint`, `correct_M` of the same, see Prediction, and `without_M`, `correct` of the fusion of the others.
        target: The target of the samples.
        calibrations: That of the probe of each modality by name, in order, and of `joint` if there is such a probe.
        groups: Index of each sample's group (n,); None without groups.
        controls: Results of `fit_controls`.
    """
    names = [name for name in calibrations if name != "joint"]

    def metric_of(name: str) -> Floats:
        return to_metric(read(f"correct_{name}"), target)

    metrics = [
        _modality_metric(
            name, metric_of(name), read(f"confidence_{name}"), groups, target=target, calibration=calibrations.get(name)
        )
        for name in (*names, "fused", *({"joint"} & calibrations.keys()))
    ]
    fused = metric_of("fused")
    return ProbeReport(
        metric=METRICS[target.task],
        chance=chance_levels(target),
        probe_metrics=tuple(metrics),
        gain_over_best=_smallest_gain([(name, metric_of(name)) for name in names], fused, groups),
        gains=tuple(_gain(name, fused, to_metric(read(f"without_{name}"), target), groups) for name in names),
        controls=tuple(controls),
    )


def fit_controls(
    probe_set: ProbeSet, cross_fit: CrossFit, *, fit: Fit, ids_of: Callable[[RowIndex], NDArray[np.object_]], seed: int
) -> tuple[Control, ...]:
    """Fit a probe of each modality to shuffled labels; `ids_of` returns the ids of a few samples.

    For a network two are fitted, on half the rows each, for as many epochs: with r repeats of f folds,
    1 / (r (f - 1)) more work, a twelfth by default.
    """

    def control(calibrated: CalibratedProbe) -> Control:
        return _control(calibrated, probe_set.target, cross_fit, fit=fit, ids_of=ids_of, seed=seed)

    in_parallel = fit_in_parallel([calibrated.inputs for calibrated in probe_set.probes])
    return tuple(parallel_map(control, probe_set.probes) if in_parallel else map(control, probe_set.probes))


def chance_levels(target: Target) -> dict[str, float]:
    """Compute the metric without features: of always the most common class or labels, and of guessing uniformly.

    `majority` is above `uniform` where classes are not equally frequent. Both are 0 for a number: the R^2 of the mean.
    """
    if target.task == "classification":
        most_common = float(np.bincount(target.label).max() / len(target))
        return {"uniform": 1 / target.num_outputs, "majority": most_common}
    if target.task == "multilabel":
        assert target.values is not None
        values: Any = target.values  # a matrix, or packed
        packed = isinstance(values, PackedSets)
        rate = values.counts().astype(np.float32) / len(target) if packed else values.mean(axis=0)
        return {"uniform": 0.5, "majority": float(np.maximum(rate, 1 - rate).mean())}
    return {"uniform": 0.0, "majority": 0.0}


def to_metric(correct: Floats, target: Target) -> Floats:
    """Return values whose mean is the metric: of a regression 1 - error^2 / variance, else `correct` itself."""
    if target.task != "regression":
        return correct
    assert target.values is not None
    return np.asarray(1 + correct / max(float(target.values.var()), 1e-12), dtype=np.float32)


def _modality_metric(
    name: str,
    values: Floats,
    confidence: Floats,
    groups: Groups,
    *,
    target: Target,
    calibration: Calibration | None = None,
) -> ModalityMetric:
    present = np.flatnonzero(~np.isnan(values))
    groups, losses = None if groups is None else groups[present], cross_entropy(confidence[present])
    interval = _interval(values[present], groups)
    beats_prior = interval["low"] > chance_levels(target)["majority"]
    if not beats_prior and target.task == "classification":
        label = target.label[present]
        prior = -np.log(np.bincount(label)[label] / len(label))
        beats_prior = mean_interval(prior - losses, groups, low=-np.inf, high=np.inf)["low"] > 0
    return ModalityMetric(
        name=name, **interval, loss=float(losses.mean()), beats_prior=bool(beats_prior), calibration=calibration
    )


def _interval(values: Floats, groups: Groups) -> dict[str, float]:
    """Compute the mean of a metric over samples, and its interval: that of a proportion if all values are 0 or 1."""
    if np.isin(values, (0, 1)).all():
        interval = share_interval(values > 0.5, groups)
        return {"value": interval["share"], "low": interval["low"], "high": interval["high"]}
    interval = mean_interval(values.astype(np.float64), groups, low=-np.inf, high=1)
    return {"value": interval["mean"], "low": interval["low"], "high": interval["high"]}


def _gain(name: str, fused: Floats, without: Floats, groups: Groups, *, tail: float = 0.025) -> Gain:
    """Compare two probes on the same samples: the paired interval is narrower than that of either."""
    present = ~np.isnan(without)
    present_groups = None if groups is None else groups[present]
    differences = (fused - without)[present].astype(np.float64)
    interval = mean_interval(differences, present_groups, low=-np.inf, high=np.inf, tail=tail)
    return Gain(name=name, gain=interval["mean"], low=interval["low"], high=interval["high"])


def gain_over_best(names: Sequence[str], correct: Floats, fused: Floats, groups: Groups) -> Gain:
    """Compute the gain of `fused` (n,) over the best single modality of `correct` (n, m), allowing for its choice.

    The best on these samples is best by luck in part. The gain over the truly best one is the smallest of the m gains,
    so its interval goes from the smallest lower end to the smallest upper end. Of m equal modalities the smallest upper
    end is too low by luck, of unequal ones it is that of the best alone: the upper tail is .025 / sqrt(m), ours,
    between one interval and Bonferroni's. With 2 to 8 modalities, equal or 5 or 20 points apart, and 300 samples, the
    coverage is .942 to .978 without groups or with equal ones (one interval .863 to .967, Bonferroni's .955 to .986),
    and .981 to .999 with ten groups of sizes .6^g.
    """
    return _smallest_gain(list(zip(names, correct.T, strict=True)), fused, groups)


def _smallest_gain(metrics: Sequence[tuple[str, Floats]], fused: Floats, groups: Groups) -> Gain:
    gains = [_gain(name, fused, values, groups) for name, values in metrics]
    tail = 0.025 / math.sqrt(len(metrics))
    wider = [_gain(name, fused, values, groups, tail=tail) for name, values in metrics]
    smallest = min(gains, key=lambda gain: gain.gain)
    return replace(smallest, low=min(gain.low for gain in gains), high=min(gain.high for gain in wider))


def _control(
    calibrated: CalibratedProbe,
    target: Target,
    cross_fit: CrossFit,
    *,
    fit: Fit,
    ids_of: Callable[[RowIndex], NDArray[np.object_]],
    seed: int,
) -> Control:
    """Fit probes to shuffled labels on a sample of the training rows, and compute their out-of-fold metric."""
    rows, target = _control_data(cross_fit.fits & calibrated.present, target, cross_fit)
    order = np.argsort(hash_rank(ids_of(rows), seed=seed, purpose="shuffled labels"), kind="stable")
    # Labels are rotated by half the rows plus one, in the order of a hash, so that no row keeps its own label.
    shuffled = np.empty(len(rows), dtype=np.intp)
    shuffled[order] = np.roll(order, len(rows) // 2 + 1)
    shuffled_target = target.take(shuffled)
    fold = _halves(cross_fit.key[rows]) if isinstance(calibrated.probe, NetworkProbe) else cross_fit.fold[rows]
    folds = CrossFit(fold=fold, inner=cross_fit.inner[rows], fits=np.ones(len(rows), bool), key=cross_fit.key[rows])
    logits = fit(_take(calibrated, rows), shuffled_target, [folds]).logits(np.arange(len(rows)))
    values = to_metric(predict(logits, np.ones(len(rows), np.float32), shuffled_target).correct, shuffled_target)
    margin = 3.29 * (float(values.std(ddof=1)) / np.sqrt(len(rows)))
    value, majority = float(values.mean()), chance_levels(shuffled_target)["majority"]
    low, high = (-np.inf, np.inf) if shuffled_target.task == "regression" else (0.0, 1.0)  # of R^2, of an accuracy
    interval = {"value": value, "low": float(max(value - margin, low)), "high": float(min(value + margin, high))}
    return Control(name=calibrated.name, num_rows=len(rows), majority=majority, **interval)


def _control_data(mask: NDArray[np.bool_], target: Target, cross_fit: CrossFit) -> tuple[RowIndex, Target]:
    """Choose the rows (c,) of a control from a mask (n,), and return them with their target, of many outputs with a
    subset of them."""
    options: dict[str, Any] = {"task": target.task, "num_outputs": target.num_outputs, "max_rows": CONTROL_ROWS}
    rows, outputs = choose_outputs(target.label, cross_fit.key, mask=mask, **options)
    return rows, take_outputs(target.take(rows), outputs)


def _halves(key: NDArray[np.uint64]) -> NDArray[np.int16]:
    """Assign rows to two folds by their keys: groups need not stay together, since labels are shuffled."""
    return (np.argsort(np.argsort(key, kind="stable")) % 2).astype(np.int16)


def _take(calibrated: CalibratedProbe, rows: RowIndex) -> Inputs:
    """Return rows of a probe's inputs, in memory except for a network, whose rows of 0.1 MB would take 1 GB."""
    inputs = calibrated.inputs
    if isinstance(calibrated.probe, NetworkProbe) and isinstance(inputs, FeatureMatrix):
        return replace(inputs, row=inputs.row[rows])
    return in_memory(inputs, rows)
