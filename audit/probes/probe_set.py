"""Calibrated probes of all modalities of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..dataset.labels import Target
from ..errors import ConfigError, choices
from ..features.encoders import is_network
from ..features.matrix import FeatureMatrix, Inputs, JointInputs, Rows, WindowInputs
from ..metrics import Floats
from ..threads import fixed_threads
from .config import ProbeConfig
from .cross_fit import CrossFit, first_rows, gather_fit_rows
from .linear import LinearProbe, fit_linear
from .mlp import MlpProbe, fit_mlp
from .prediction import (
    Prediction,
    correctness,
    expected_calibration_error,
    fit_temperature,
    likelihoods,
    predict,
    target_probability,
)

KINDS = ("auto", "linear", "mlp")


class Probe(Protocol):
    """A cross-fitted probe of one modality: each row is asked of the one that never saw it, r rounds of it.

    Outputs are raw: logits of classes or labels, or the number itself.
    """

    def logits(self, rows: Rows, *, inputs: Inputs | None = None) -> NDArray[np.float32]:
        """Ask about these rows: (r, b, k). `inputs`: the same rows elsewhere, as with a modality masked."""

    def logits_by_epoch(self, rows: Rows) -> NDArray[np.float32]:
        """Ask the first round's probes as they were on the way, at e moments of training: (e, b, k)."""


@fixed_threads()
def fit_probe(
    inputs: Inputs,
    target: Target,
    cross_fits: Sequence[CrossFit],
    *,
    config: ProbeConfig,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Probe:
    """Fit the probes of all folds of all rounds at once. What is NaN counts as the feature's centre.

    A row outside a round's `fits` is learned from by none of its probes, and neither is what `most_rows` leaves out.
    Raises ConfigError for a kind of probe that does not exist.
    """
    if config.kind not in KINDS:
        raise ConfigError(f"probe.kind is {config.kind!r}; {choices(config.kind, KINDS)}")
    fit_rows = gather_fit_rows(cross_fits, most_rows=config.most_rows)
    fit = fit_mlp if config.kind == "mlp" else fit_linear
    probe: Probe = fit(inputs, target, cross_fits, fit_rows, config=config, device=device)
    progress("probe", 1, 1)
    return probe


CALIBRATION_ROWS = 20_000  # by hash of the id; one number a probe is not worth more
_CALIBRATION_LOGITS = 1 << 24  # 20,000 rows of 838 outputs; of 5,000, 3,355 rows: the temperature is known to 2%
_LEAST_CALIBRATION_ROWS = 1_000
_BYTES_TOGETHER = 128 << 20  # features of all probes that are fitted at the same time

Fit = Callable[[Inputs, Target, Sequence[CrossFit]], Probe]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How calibrated a member is on `num_rows` out-of-fold rows, before and after.

    temperature: the mean over its probes; of a regression, the residuals' standard deviation. ece in [0, 1], 0 = the
    confidence in the predicted class is right on average; None of a regression. loss: mean -log confidence.
    """

    num_rows: int
    temperature: float
    ece_before: float | None
    ece_after: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedProbe:
    """The cross-fitted probes of one modality, or of all together.

    present (n,): the samples that have the modality. scale (n,): the temperature of each, or the standard deviation of
    residuals, fitted to the mean of the rounds on samples of other folds of the first round.
    """

    name: str
    inputs: Inputs
    present: NDArray[np.bool_]
    probe: Probe
    scale: Floats
    calibration: Calibration

    @property
    def least_scale(self) -> float:
        """The mean of its scales, to be compared among modalities."""
        return float(self.scale.mean())

    def in_memory(self, rows: Rows) -> CalibratedProbe:
        """Return the same member with the features of these consecutive rows in memory, for no others."""
        return self if self.is_stored else self.with_inputs(WindowInputs.of(self.inputs, rows))

    @property
    def is_stored(self) -> bool:
        """Whether the probe's outputs are stored, as those of a network are: it reads no features any more."""
        return not isinstance(self.probe, LinearProbe | MlpProbe)

    def with_inputs(self, inputs: Inputs) -> CalibratedProbe:
        """Return the same member with its features read from elsewhere."""
        assert isinstance(self.probe, LinearProbe | MlpProbe)
        return replace(self, inputs=inputs, probe=replace(self.probe, inputs=inputs))

    def read(self, rows: Rows, target: Target, *, least_scale: float = 1.0, inputs: Inputs | None = None) -> Prediction:
        """Ask about these samples, whose targets are given; `inputs`: the same samples with something masked."""
        logits = self.probe.logits(rows, inputs=inputs)
        return predict(logits, self.scale[rows], target, least_scale=least_scale)

    def read_epochs(self, rows: Rows, target: Target, *, least_scale: float = 1.0) -> Floats:
        """Give the confidence (e, b) in the target after each recorded epoch of training, in the first round."""
        logits = self.probe.logits_by_epoch(rows)
        return likelihoods(logits, self.scale[rows], target, least_scale=least_scale)

    def read_right(self, rows: Rows, target: Target, *, inputs: Inputs) -> Floats:
        """Return what the metric of the task is the mean of, (b,), for samples read from other inputs."""
        return correctness(self.probe.logits(rows, inputs=inputs), self.scale[rows], target)


def fit_side_by_side(inputs: Sequence[Inputs]) -> bool:
    """Whether probes of these inputs are fitted side by side: all their rows in memory are small, and none a network.

    It changes how long it takes, and no result; probes of more rows share the threads within each step.
    """
    size = 4 * sum(part.num_rows * part.num_features for part in inputs)
    networks = (isinstance(part, FeatureMatrix) and is_network(part.status.modality) for part in inputs)
    return size <= _BYTES_TOGETHER and not any(networks)


def fit_calibrated_probe(
    name: str,
    inputs: Inputs,
    target: Target,
    cross_fits: Sequence[CrossFit],
    *,
    present: NDArray[np.bool_],
    fit: Fit,
) -> CalibratedProbe:
    """Fit a modality's probes on the samples that have it, and calibrate them on their own out-of-fold outputs."""
    mine = [replace(cross_fit, fits=cross_fit.fits & present) for cross_fit in cross_fits]
    probe = fit(inputs, target, mine)
    first = mine[0]
    most = min(CALIBRATION_ROWS, max(_LEAST_CALIBRATION_ROWS, _CALIBRATION_LOGITS // target.num_outputs))
    rows = first_rows(np.flatnonzero(first.fits), first.key, max_rows=most)
    logits, truth = probe.logits(rows), target.take(rows)
    everyone = np.ones(len(rows), dtype=bool)
    by_fold = fit_temperature(logits.mean(axis=0)[None], truth, first.fold[None, rows], everyone)[0].astype(np.float32)
    missing = first.num_folds - len(by_fold)  # folds that hold no row to calibrate on
    scale = np.append(by_fold, np.full(missing, by_fold.mean(), np.float32))[first.fold]
    found = Calibration(num_rows=len(rows), temperature=float(by_fold.mean()), ece_before=None, ece_after=None)
    if target.task != "regression":
        before, after = (
            _error(target_probability(logits, each, truth), truth)
            for each in (np.ones(len(rows), np.float32), scale[rows])
        )
        found = replace(found, ece_before=before, ece_after=after)
    return CalibratedProbe(name=name, inputs=inputs, present=present, probe=probe, scale=scale, calibration=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSet:
    """The members of m modalities, and the one of all features side by side: None if not wanted, or not possible."""

    probes: tuple[CalibratedProbe, ...]
    joint: CalibratedProbe | None
    target: Target

    @property
    def least_scale(self) -> float:
        """The smallest residual of a regression's modalities: the unit of their likelihoods."""
        return min(calibrated.least_scale for calibrated in self.probes)

    def in_memory(self, rows: Rows) -> ProbeSet:
        """Return the same panel with the features of these consecutive rows in memory, for no others."""
        windowed = replace(self, probes=tuple(calibrated.in_memory(rows) for calibrated in self.probes))
        joint = self.joint
        if joint is None or joint.is_stored:
            return windowed
        return replace(windowed, joint=joint.with_inputs(windowed.side_by_side))

    @property
    def side_by_side(self) -> JointInputs:
        """The inputs of all modalities side by side."""
        return JointInputs(parts=tuple(calibrated.inputs for calibrated in self.probes))


def fit_joint_probe(
    probes: Sequence[CalibratedProbe], target: Target, cross_fits: Sequence[CrossFit], *, fit: Fit
) -> CalibratedProbe:
    """Fit and calibrate probes of all modalities side by side; every sample has some of them."""
    inputs = JointInputs(parts=tuple(calibrated.inputs for calibrated in probes))
    present = np.logical_or.reduce([calibrated.present for calibrated in probes])
    return fit_calibrated_probe("joint", inputs, target, cross_fits, present=present, fit=fit)


def _error(probability: Floats, target: Target) -> float:
    if target.task == "classification":
        return expected_calibration_error(probability, target.label)
    assert target.values is not None
    return expected_calibration_error(probability, target.values.astype(np.int32))
