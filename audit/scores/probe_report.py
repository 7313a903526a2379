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
from ..probes.cross_fit import Crossing
from ..probes.network_probe import NetworkProbe
from ..probes.prediction import read_logits
from ..probes.probe_set import Calibration, Fit, Member, Panel, fit_together
from ..probes.targets import choose_outputs, take_outputs
from ..threads import parallel_map
from .sample_scores import Answers

CONTROL_ROWS = 10_000  # by hash of the id: an accuracy on them has an interval of 0.01
METRICS = {"classification": "accuracy", "multilabel": "label accuracy", "regression": "R^2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How good one probe is out of fold, with a 95% interval; `metric` of the ledger says in what."""

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
class Ledger:
    """The dataset's books: every modality and all of them together, what each adds, and the controls.

    chance: what naming the most common class, or labels, or the mean, would reach. Of all together there is "fused",
    the fusion of the probabilities, from which the gains are taken, and "joint", a probe of all features side by side.
    """

    metric: str
    chance: float
    standings: tuple[Standing, ...]
    over_best: Gain  # what all together add to the best single one, which it names
    gains: tuple[Gain, ...]
    controls: tuple[Control, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values, for run.json."""
        controls = [{**asdict(control), "leaks": control.leaks} for control in self.controls]
        return {**asdict(self), "controls": controls}


def keep_books(
    panel: Panel,
    answers: Answers,
    crossing: Crossing,
    *,
    fit: Fit,
    controls: bool,
    sample_id: NDArray[np.object_],
    group: NDArray[np.object_] | None,
    seed: int,
) -> Ledger:
    """Keep the books of what a panel answered about n samples.

    `controls` fits a probe of each modality to shuffled labels as well. For a network that is two, of half the rows
    each, for as many epochs: of r rounds of f folds, 1 / (r (f - 1)) of the work more, a twelfth by default.
    """
    target, groups = panel.target, group_codes(group)
    right, fused = to_metric(answers.right, target), to_metric(answers.fused_right, target)
    without = to_metric(answers.without_right, target)
    alone = [
        _stand(member.name, right[:, index], answers.confidence[:, index], groups, member.calibration)
        for index, member in enumerate(panel.members)
    ]
    together = [_stand("fused", fused, answers.fused_confidence, groups, None)]
    if panel.joint is not None:
        joint = to_metric(answers.joint_right, target)
        together.append(_stand("joint", joint, answers.joint_confidence, groups, panel.joint.calibration))

    def control(member: Member) -> Control:
        return _control(member, target, crossing, fit=fit, sample_id=sample_id, seed=seed)

    controlled = panel.members if controls else ()
    side_by_side = fit_together([member.inputs for member in controlled])
    best = max(range(len(alone)), key=lambda index: alone[index].value)
    return Ledger(
        metric=METRICS[target.task],
        chance=chance_of(target),
        standings=(*alone, *together),
        over_best=_gain(alone[best].name, fused, right[:, best], groups),
        gains=tuple(_gain(member.name, fused, without[:, index], groups) for index, member in enumerate(panel.members)),
        controls=tuple(parallel_map(control, controlled) if side_by_side else map(control, controlled)),
    )


def chance_of(target: Target) -> float:
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


def _stand(name: str, right: Floats, confidence: Floats, groups: Groups, calibration: Calibration | None) -> Standing:
    here = ~np.isnan(right)
    found = _interval(right[here], None if groups is None else groups[here])
    return Standing(name=name, **found, loss=float(cross_entropy(confidence[here]).mean()), calibration=calibration)


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
    member: Member, target: Target, crossing: Crossing, *, fit: Fit, sample_id: NDArray[np.object_], seed: int
) -> Control:
    """Fit probes to shuffled labels, on some of the rows that probes learn from, and see what they know out of fold."""
    rows, target = _control_data(np.flatnonzero(crossing.fits & member.present), target, crossing)
    order = np.argsort(hash_rank(sample_id[rows], seed=seed, purpose="shuffled labels"), kind="stable")
    # Labels move along the order of a hash by one place more than half its length: nobody keeps their own.
    shuffled = np.empty(len(rows), dtype=np.intp)
    shuffled[order] = np.roll(order, len(rows) // 2 + 1)
    truth = target.take(shuffled)
    fold = _halves(crossing.key[rows]) if isinstance(member.probe, NetworkProbe) else crossing.fold[rows]
    part = Crossing(fold=fold, inner=crossing.inner[rows], fits=np.ones(len(rows), bool), key=crossing.key[rows])
    logits = fit(_take(member, rows), truth, [part]).logits(np.arange(len(rows)))
    right = to_metric(read_logits(logits, np.ones(len(rows), np.float32), truth).right, truth)
    deviation = float(right.std(ddof=1)) / np.sqrt(len(rows))
    value = float(right.mean())
    return Control(
        name=member.name,
        num_rows=len(rows),
        value=value,
        low=float(value - 3.29 * deviation),
        high=float(value + 3.29 * deviation),
        chance=chance_of(truth),
    )


def _control_data(rows: Rows, target: Target, crossing: Crossing) -> tuple[Rows, Target]:
    """Return the rows (c,) of a control, some of those given, and their target: of many outputs, with some of them."""
    k, label = target.num_outputs, target.label if target.values is None else target.values
    chosen, outputs = choose_outputs(
        label[rows], crossing.key[rows], task=target.task, num_outputs=k, max_rows=CONTROL_ROWS
    )
    return rows[chosen], take_outputs(target.take(rows[chosen]), outputs)


def _halves(key: NDArray[np.uint64]) -> NDArray[np.int16]:
    """Deal rows into two folds by their keys: groups need not stay together where labels do not go with them."""
    return (np.argsort(np.argsort(key, kind="stable")) % 2).astype(np.int16)


def _take(member: Member, rows: Rows) -> Inputs:
    """Give some rows of a member's inputs, in memory, but for those of a network, of 0.1 MB each: 1 GB together."""
    inputs = member.inputs
    if isinstance(member.probe, NetworkProbe) and isinstance(inputs, FeatureMatrix):
        return replace(inputs, row=inputs.row[rows])
    return MatrixInputs(matrix=inputs.read(rows))
