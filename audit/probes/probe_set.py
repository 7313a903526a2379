"""Calibrated probes of all modalities of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..dataset.labels import Target
from ..features.cached_matrix import FeatureMatrix
from ..features.encoders import is_network
from ..features.matrix import Inputs, JointInputs, RowIndex, WindowInputs
from ..metrics import Floats, cross_entropy, ece_floor, expected_calibration_error
from ..parsing import check_choices
from ..row_arrays import gather, smallest_rows
from ..workers import fixed_threads
from .config import ProbeConfig
from .cross_fit import CrossFit, gather_fit_rows
from .linear import LinearProbe, fit_linear
from .mlp import MlpProbe, fit_mlp
from .prediction import Prediction, class_prior, correctness, fit_temperature, likelihoods, predict, scale_logits

KINDS = ("auto", "linear", "mlp")


class Probe(Protocol):
    """A cross-fitted probe of one modality: r repeats, each of which scores a row by the fold's probe.

    Outputs are raw: logits of classes or labels, or the predicted number.
    """

    def logits(self, rows: RowIndex, *, inputs: Inputs | None = None) -> NDArray[np.float32]:
        """Compute out-of-fold outputs (r, b, k) of rows; `inputs` replaces the features, e.g. by masked ones."""

    def logits_by_epoch(self, rows: RowIndex) -> NDArray[np.float32]:
        """Compute outputs (e, b, k) of the first repeat's probes at e moments of their training."""

    def take(self, samples: RowIndex, inputs: Inputs) -> Probe:
        """Return the probe for a part of the samples (b,), whose features are `inputs`."""


@fixed_threads()
def fit_probe(
    inputs: Inputs,
    target: Target,
    cross_fits: Sequence[CrossFit],
    *,
    config: ProbeConfig,
    device: str = "cpu",
    parts: Sequence[Probe] = (),
) -> Probe:
    """Fit the probes of all folds of all repeats at once. NaN features are set to the feature's centre.

    Rows outside a repeat's `fits`, and those beyond `max_rows`, are not trained on. Raises ConfigError for an unknown
    kind of probe. parts: of joint inputs, the probes of each part, whose penalties a linear probe keeps in ratio.
    """
    check_choices("probe", config, kind=KINDS)
    fit_rows = gather_fit_rows(cross_fits, max_rows=config.max_rows)
    if config.kind == "mlp":
        return fit_mlp(inputs, target, cross_fits, fit_rows, config=config, device=device)
    part_l2 = [part.l2 for part in parts if isinstance(part, LinearProbe)]
    return fit_linear(inputs, target, cross_fits, fit_rows, config=config, device=device, part_l2=part_l2)


CALIBRATION_ROWS = 20_000  # by hash of the id; enough for one number per probe
_CALIBRATION_LOGITS = 1 << 24  # 20,000 rows of 838 outputs; 3,355 rows of 5,000: gives the temperature to 2%
_MIN_CALIBRATION_ROWS = 1_000
_MAX_PARALLEL_BYTES = 128 << 20  # features of all probes that are fitted at the same time

Fit = Callable[[Inputs, Target, Sequence[CrossFit]], Probe]


class JointFit(Protocol):
    """Fit of a probe of joint inputs, which the probes of their parts precede."""

    def __call__(
        self, inputs: Inputs, target: Target, cross_fits: Sequence[CrossFit], /, *, parts: Sequence[Probe]
    ) -> Probe:
        """Fit the probe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Calibration of a probe on `num_rows` out-of-fold rows, before and after temperature scaling.

    temperature: the mean over the folds, 1 where it does not lower the loss; of a regression, the residuals' standard
    deviation. ece in [0, 1], 0 = the confidence in the predicted class equals its accuracy; ece_floor: its expectation
    for perfectly calibrated probabilities of as many rows, see ece_floor; None of a regression.
    """

    num_rows: int
    temperature: float
    ece_before: float | None
    ece_after: float | None
    ece_floor: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedProbe:
    """The cross-fitted probes of one modality, or of the concatenated features of all.

    present (n,): the samples that have the modality. fold_scale (f,): the temperature of the samples of each fold of
    the first repeat, fold (n,), or the standard deviation of residuals, fitted to the mean of the repeats on samples of
    other folds. anchor (f, k): the logits relative to which each of these folds is scaled; None without temperatures.
    """

    name: str
    inputs: Inputs
    present: NDArray[np.bool_]
    probe: Probe
    fold_scale: Floats
    fold: NDArray[np.signedinteger[Any]]
    calibration: Calibration
    anchor: Floats | None = None

    @property
    def scale(self) -> Floats:
        """The scale of each sample (n,)."""
        return gather(self.fold_scale, self.fold)

    @property
    def mean_scale(self) -> float:
        """The mean of the scales, for comparison between modalities."""
        return float(self.scale.mean())

    def in_memory(self, rows: RowIndex) -> CalibratedProbe:
        """Return the probe with the features of these consecutive rows in memory; it then reads no other rows."""
        return self if self.is_stored else self.with_inputs(WindowInputs.of(self.inputs, rows))

    @property
    def is_stored(self) -> bool:
        """Whether the outputs are stored, as those of a network are, so that no features are read."""
        return not isinstance(self.probe, LinearProbe | MlpProbe)

    def take(self, samples: RowIndex, inputs: Inputs) -> CalibratedProbe:
        """Return the probe for a part of the samples (b,), whose features are `inputs`."""
        return replace(
            self,
            inputs=inputs,
            present=self.present[samples],
            probe=self.probe.take(samples, inputs),
            fold=self.fold[samples],
        )

    def with_inputs(self, inputs: Inputs) -> CalibratedProbe:
        """Return the probe with other inputs."""
        assert isinstance(self.probe, LinearProbe | MlpProbe)
        return replace(self, inputs=inputs, probe=replace(self.probe, inputs=inputs))

    def predict(self, rows: RowIndex, target: Target, *, min_scale: float = 1.0) -> Prediction:
        """Predict these samples, whose targets are given."""
        return predict(*self._calibrate(self.probe.logits(rows), rows), target, min_scale=min_scale)

    def _calibrate(self, outputs: Floats, rows: RowIndex) -> tuple[Floats, Floats]:
        """Return outputs (r, b, k) and the scale (b,) that is left to apply: 1 where they are scaled."""
        fold = self.fold[rows]
        if self.anchor is None:
            return outputs, self.fold_scale[fold]
        scaled = scale_logits(outputs, self.fold_scale[fold], self.anchor[fold])
        return scaled, np.ones(len(rows), np.float32)

    def confidence_by_epoch(self, rows: RowIndex, target: Target, *, min_scale: float = 1.0) -> Floats:
        """Compute the confidence (e, b) in the target after each recorded epoch of training, in the first repeat."""
        outputs, scale = self._calibrate(self.probe.logits_by_epoch(rows), rows)
        return likelihoods(outputs, scale, target, min_scale=min_scale)

    def correctness(self, rows: RowIndex, target: Target, *, inputs: Inputs) -> Floats:
        """Compute the accuracy or label accuracy of each sample, (b,), with other inputs."""
        return correctness(*self._calibrate(self.probe.logits(rows, inputs=inputs), rows), target)


def fit_in_parallel(inputs: Sequence[Inputs]) -> bool:
    """Whether probes of these inputs are fitted in parallel: their rows fit in _MAX_PARALLEL_BYTES, without networks.

    It affects the time, not the results; probes of more rows use the threads within each step.
    """
    num_bytes = 4 * sum(matrix.num_rows * matrix.num_features for matrix in inputs)
    networks = (isinstance(matrix, FeatureMatrix) and is_network(matrix.status.modality) for matrix in inputs)
    return num_bytes <= _MAX_PARALLEL_BYTES and not any(networks)


def fit_calibrated_probe(
    name: str, inputs: Inputs, target: Target, cross_fits: Sequence[CrossFit], *, present: NDArray[np.bool_], fit: Fit
) -> CalibratedProbe:
    """Fit a modality's probes on the samples that have it, and calibrate them on their own out-of-fold outputs."""
    own_cross_fits = _of_present(cross_fits, present)
    probe = fit(inputs, target, own_cross_fits)
    first = own_cross_fits[0]
    max_rows = min(CALIBRATION_ROWS, max(_MIN_CALIBRATION_ROWS, _CALIBRATION_LOGITS // target.num_outputs))
    rows = smallest_rows(first.fits, first.key, max_rows=max_rows)
    unscaled = CalibratedProbe(
        name=name,
        inputs=inputs,
        present=present,
        probe=probe,
        fold_scale=np.ones(first.num_folds, np.float32),
        fold=first.fold,
        calibration=Calibration(num_rows=len(rows), temperature=1.0, ece_before=None, ece_after=None, ece_floor=None),
    )
    return _calibrated(unscaled, target, first, rows)


def _of_present(cross_fits: Sequence[CrossFit], present: NDArray[np.bool_]) -> list[CrossFit]:
    """Return cross-fits of the samples that are present; all repeats share the mask."""
    if present.all():
        return list(cross_fits)
    masks = {id(cross_fit.fits): cross_fit.fits for cross_fit in cross_fits}
    own = {number: fits & present for number, fits in masks.items()}
    return [replace(cross_fit, fits=own[id(cross_fit.fits)]) for cross_fit in cross_fits]


def _calibrated(unscaled: CalibratedProbe, target: Target, cross_fit: CrossFit, rows: RowIndex) -> CalibratedProbe:
    """Fit the scale of each fold on these rows of the other folds.

    Classes and labels keep a temperature of 1 unless the fitted ones lower the loss of these rows, of which each is
    scaled without its own fold. Of 1,440 clips by actor, four folds agreed on .76 and the fifth needed 1.6: the loss
    rose from 1.196 to 1.232. That one decision is all that the labels of a fold have to do with its own scale.
    """
    logits, labels, fold = unscaled.probe.logits(rows), target.take(rows), cross_fit.fold
    prior = class_prior(target, fold, cross_fit.fits)
    temperature, anchor = _fit_scale(logits.mean(axis=0), labels, fold[rows], prior)
    num_missing = cross_fit.num_folds - len(temperature)  # folds without calibration rows
    by_fold = np.append(temperature, np.full(num_missing, temperature.mean())).astype(np.float32)
    scaled = replace(unscaled, fold_scale=by_fold, anchor=anchor)
    calibration = replace(unscaled.calibration, temperature=float(by_fold.mean()))
    if anchor is None:
        return replace(scaled, calibration=calibration)
    before, after = (_loss(probe.predict(rows, labels)) for probe in (unscaled, scaled))
    better = scaled if after < before else unscaled
    probabilities = [probe.predict(rows, labels).probability for probe in (unscaled, better)]
    ece_before, ece_after = (_error(probability, labels) for probability in probabilities)
    calibration = replace(
        calibration,
        temperature=calibration.temperature if better is scaled else 1.0,
        ece_before=ece_before,
        ece_after=ece_after,
        ece_floor=ece_floor(probabilities[1], is_multilabel=labels.values is not None),
    )
    return replace(better, calibration=calibration)


def _fit_scale(
    logits: Floats, labels: Target, fold: NDArray[np.signedinteger[Any]], prior: Floats | None
) -> tuple[NDArray[np.float64], Floats | None]:
    """Fit the temperature of each fold (f,) and choose its anchor (f, k), both on the rows (b, k) of the other folds.

    The anchor is the prior or uniform probabilities, whichever gives those rows the lower loss. A probe of noise
    becomes the prior; of tweets, whose texts without a known word are not those of the average class, the uniform
    anchor has the lower loss. Of a regression there is no anchor.
    """
    every_row = np.ones(len(labels), bool)
    temperature = fit_temperature(logits[None], labels, fold[None], every_row)[0]
    if prior is None:
        return temperature, None
    relative = fit_temperature(logits[None], labels, fold[None], every_row, anchor=prior)[0]
    anchor, ones = np.zeros_like(prior), np.ones(len(labels), np.float32)
    for own in range(len(temperature)):
        others = np.flatnonzero(fold != own)
        losses = [
            _loss(predict(_scaled(logits[others], scale, centre), ones[others], labels.take(others)))
            for scale, centre in ((temperature[own], anchor[own]), (relative[own], prior[own]))
        ]
        if losses[1] < losses[0]:
            temperature[own], anchor[own] = relative[own], prior[own]
    return temperature, anchor


def _scaled(logits: Floats, scale: float, anchor: Floats) -> Floats:
    """Return logits (1, b, k) divided by one temperature relative to one anchor (k,)."""
    return scale_logits(logits[None], np.full(len(logits), scale, np.float32), anchor[None])


def _loss(prediction: Prediction) -> float:
    return float(cross_entropy(prediction.confidence).mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSet:
    """Calibrated probes of m modalities, and the joint probe of all features: None if turned off or not possible."""

    probes: tuple[CalibratedProbe, ...]
    joint: CalibratedProbe | None
    target: Target
    unit: float | None = None  # min_scale of the set that this one has a part of the samples of; by default its own

    def __post_init__(self) -> None:
        if self.unit is None:
            object.__setattr__(self, "unit", min(calibrated.mean_scale for calibrated in self.probes))

    @property
    def min_scale(self) -> float:
        """The smallest mean scale of the modalities: of a regression, the unit of their likelihoods."""
        assert self.unit is not None
        return self.unit

    def take(self, samples: RowIndex, inputs: Sequence[Inputs]) -> ProbeSet:
        """Return the probe set of a part of the samples (b,), whose features in each modality are `inputs`."""
        probes = tuple(calibrated.take(samples, matrix) for calibrated, matrix in zip(self.probes, inputs, strict=True))
        joint = None if self.joint is None else self.joint.take(samples, JointInputs(parts=tuple(inputs)))
        return ProbeSet(probes=probes, joint=joint, target=self.target.take(samples), unit=self.min_scale)

    def in_memory(self, rows: RowIndex) -> ProbeSet:
        """Return the probe set with the features of these consecutive rows in memory; it then reads no other rows."""
        in_memory = replace(self, probes=tuple(calibrated.in_memory(rows) for calibrated in self.probes))
        joint = self.joint
        if joint is None or joint.is_stored:
            return in_memory
        return replace(in_memory, joint=joint.with_inputs(in_memory.joint_inputs))

    @property
    def joint_inputs(self) -> JointInputs:
        """The concatenated inputs of all modalities."""
        return JointInputs(parts=tuple(calibrated.inputs for calibrated in self.probes))


def fit_joint_probe(
    probes: Sequence[CalibratedProbe], target: Target, cross_fits: Sequence[CrossFit], *, fit: JointFit
) -> CalibratedProbe:
    """Fit and calibrate probes of the concatenated features of all modalities; every sample has at least one."""
    parts = [calibrated.probe for calibrated in probes]
    inputs = JointInputs(parts=tuple(calibrated.inputs for calibrated in probes))
    present = probes[0].present
    if not present.all():
        present = np.logical_or.reduce([calibrated.present for calibrated in probes])
    return fit_calibrated_probe("joint", inputs, target, cross_fits, present=present, fit=partial(fit, parts=parts))


def _error(probability: Floats, target: Target) -> float:
    if target.task == "classification":
        return expected_calibration_error(probability, target.label)
    assert target.values is not None
    return expected_calibration_error(probability, target.values.astype(np.int32))
