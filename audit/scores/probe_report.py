"""Dataset-level results of the probes: accuracy, gains, controls, intervals."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dataset.labels import Target
from ..features.matrix import FeatureMatrix, Inputs, MatrixInputs, Rows
from ..hashing import hash_rank
from ..intervals import Groups, group_codes, mean, share
from ..metrics import Floats, cross_entropy
from ..probes.cross_fit import CrossFit
from ..probes.network_probe import NetworkProbe
from ..probes.prediction import predict
from ..probes.probe_set import CalibratedProbe, Calibration, Fit, ProbeSet, fit_side_by_side
from ..probes.targets import choose_outputs, take_outputs
from ..threads import parallel_map
from .sample_scores import SampleScores

CONTROL_ROWS = 10_000  # by hash of the id: an accuracy on them has an interval of 0.01
METRICS = {"classification": "accuracy", "multilabel": "label accuracy", "regression": "R^2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModalityMetric:
    """How good one probe is out of fold, with a 95% interval; `metric` of the probe_report says in what."""

    name: str
    value: float
    low: float
    high: float
    loss: float
    calibration: Calibration | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What a modality adds: the fused value minus that without it, on the same samples, with a 95% interval."""

    name: str
    gain: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A probe on shuffled labels. It must be at chance: above, something other than the samples told it the labels."""

    name: str
    num_rows: int
    value: float
    low: float
    high: float
    chance: float

    @property
    def leaks(self) -> bool:
        """Whether even the lower end of the interval, of 99.9%, is above chance."""
        return bool(self.low > self.chance)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """The dataset's books: every modality and all of them together, what each adds, and the controls.

    chance: what naming the most common class, or labels, or the mean, would reach. Of all together there is "fused",
    the fusion of the probabilities, from which the gains are taken, and "joint", a probe of all features side by side.
    """

    metric: str
    chance: float
    probe_metrics: tuple[ModalityMetric, ...]
    gain_over_best: Gain  # what all together add to the best single one, which it names
    gains: tuple[Gain, ...]
    controls: tuple[Control, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values, for run.json."""
        controls = [{**asdict(control), "leaks": control.leaks} for control in self.controls]
        return {**asdict(self), "controls": controls}


def compute_probe_report(
    probe_set: ProbeSet,
    sample_scores: SampleScores,
    cross_fit: CrossFit,
    *,
    fit: Fit,
    controls: bool,
    sample_id: NDArray[np.object_],
    group: NDArray[np.object_] | None,
    seed: int,
) -> ProbeReport:
    """Keep the books of what a panel answered about n samples.

    `controls` fits a probe of each modality to shuffled labels as well. For a network that is two, of half the rows
    each, for as many epochs: of r rounds of f folds, 1 / (r (f - 1)) of the work more, a twelfth by default.
    """
    target, groups = probe_set.target, group_codes(group)
    right, fused = to_metric(sample_scores.right, target), to_metric(sample_scores.fused_right, target)
    without = to_metric(sample_scores.without_right, target)
    alone = [
        _modality_metric(
            calibrated.name, right[:, index], sample_scores.confidence[:, index], groups, calibrated.calibration
        )
        for index, calibrated in enumerate(probe_set.probes)
    ]
    together = [_modality_metric("fused", fused, sample_scores.fused_confidence, groups, None)]
    if probe_set.joint is not None:
        joint = to_metric(sample_scores.joint_right, target)
        together.append(
            _modality_metric("joint", joint, sample_scores.joint_confidence, groups, probe_set.joint.calibration)
        )

    def control(calibrated: CalibratedProbe) -> Control:
        return _control(calibrated, target, cross_fit, fit=fit, sample_id=sample_id, seed=seed)

    controlled = probe_set.probes if controls else ()
    side_by_side = fit_side_by_side([calibrated.inputs for calibrated in controlled])
    best = max(range(len(alone)), key=lambda index: alone[index].value)
    return ProbeReport(
        metric=METRICS[target.task],
        chance=chance_level(target),
        probe_metrics=(*alone, *together),
        gain_over_best=_gain(alone[best].name, fused, right[:, best], groups),
        gains=tuple(
            _gain(calibrated.name, fused, without[:, index], groups)
            for index, calibrated in enumerate(probe_set.probes)
        ),
        controls=tuple(parallel_map(control, controlled) if side_by_side else map(control, controlled)),
    )


def chance_level(target: Target) -> float:
    """Give what the most common class, or label decisions, reach; 0 for the R^2 of the mean."""
    if target.task == "classification":
        return float(np.bincount(target.label).max() / len(target))
    if target.task == "multilabel":
        assert target.values is not None
        rate = target.values.mean(axis=0)
        return float(np.maximum(rate, 1 - rate).mean())
    return 0.0


def to_metric(right: Floats, target: Target) -> Floats:
    """Give what each sample adds to the metric: of a regression 1 - error^2 / variance, whose mean is R^2."""
    if target.task != "regression":
        return right
    assert target.values is not None
    return np.asarray(1 + right / max(float(target.values.var()), 1e-12), dtype=np.float32)


def _modality_metric(
    name: str, right: Floats, confidence: Floats, groups: Groups, calibration: Calibration | None
) -> ModalityMetric:
    here = ~np.isnan(right)
    found = _interval(right[here], None if groups is None else groups[here])
    return ModalityMetric(
        name=name, **found, loss=float(cross_entropy(confidence[here]).mean()), calibration=calibration
    )


def _interval(right: Floats, groups: Groups) -> dict[str, float]:
    """Give the mean of what samples add to a metric, and its interval: that of a share where all are 0 or 1."""
    if np.isin(right, (0, 1)).all():
        found = share(right > 0.5, groups)
        return {"value": found["share"], "low": found["low"], "high": found["high"]}
    found = mean(right.astype(np.float64), groups, low=-np.inf, high=1)
    return {"value": found["mean"], "low": found["low"], "high": found["high"]}


def _gain(name: str, fused: Floats, without: Floats, groups: Groups) -> Gain:
    """Compare two probes on the same samples, which makes the interval narrower than that of either."""
    here = ~np.isnan(without)
    part = None if groups is None else groups[here]
    found = mean((fused - without)[here].astype(np.float64), part, low=-np.inf, high=np.inf)
    return Gain(name=name, gain=found["mean"], low=found["low"], high=found["high"])


def _control(
    calibrated: CalibratedProbe,
    target: Target,
    cross_fit: CrossFit,
    *,
    fit: Fit,
    sample_id: NDArray[np.object_],
    seed: int,
) -> Control:
    """Fit probes to shuffled labels, on some of the rows that probes learn from, and see what they know out of fold."""
    rows, target = _control_data(np.flatnonzero(cross_fit.fits & calibrated.present), target, cross_fit)
    order = np.argsort(hash_rank(sample_id[rows], seed=seed, purpose="shuffled labels"), kind="stable")
    # Labels move along the order of a hash by one place more than half its length: nobody keeps their own.
    shuffled = np.empty(len(rows), dtype=np.intp)
    shuffled[order] = np.roll(order, len(rows) // 2 + 1)
    truth = target.take(shuffled)
    fold = _halves(cross_fit.key[rows]) if isinstance(calibrated.probe, NetworkProbe) else cross_fit.fold[rows]
    part = CrossFit(fold=fold, inner=cross_fit.inner[rows], fits=np.ones(len(rows), bool), key=cross_fit.key[rows])
    logits = fit(_take(calibrated, rows), truth, [part]).logits(np.arange(len(rows)))
    right = to_metric(predict(logits, np.ones(len(rows), np.float32), truth).right, truth)
    deviation = float(right.std(ddof=1)) / np.sqrt(len(rows))
    value = float(right.mean())
    return Control(
        name=calibrated.name,
        num_rows=len(rows),
        value=value,
        low=float(value - 3.29 * deviation),
        high=float(value + 3.29 * deviation),
        chance=chance_level(truth),
    )


def _control_data(rows: Rows, target: Target, cross_fit: CrossFit) -> tuple[Rows, Target]:
    """Return the rows (c,) of a control, some of those given, and their target: of many outputs, with some of them."""
    k, label = target.num_outputs, target.label if target.values is None else target.values
    chosen, outputs = choose_outputs(
        label[rows], cross_fit.key[rows], task=target.task, num_outputs=k, max_rows=CONTROL_ROWS
    )
    return rows[chosen], take_outputs(target.take(rows[chosen]), outputs)


def _halves(key: NDArray[np.uint64]) -> NDArray[np.int16]:
    """Deal rows into two folds by their keys: groups need not stay together where labels do not go with them."""
    return (np.argsort(np.argsort(key, kind="stable")) % 2).astype(np.int16)


def _take(calibrated: CalibratedProbe, rows: Rows) -> Inputs:
    """Give some rows of a member's inputs, in memory, but for those of a network, of 0.1 MB each: 1 GB together."""
    inputs = calibrated.inputs
    if isinstance(calibrated.probe, NetworkProbe) and isinstance(inputs, FeatureMatrix):
        return replace(inputs, row=inputs.row[rows])
    return MatrixInputs(matrix=inputs.read(rows))
