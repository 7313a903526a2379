"""Scoring of a dataset: from features to score table, mixture and probe report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.labels import Target
from ..dataset.modalities import Modality
from ..errors import Quarantined
from ..features.cached_matrix import FeatureMatrix
from ..features.encode import EncodeTask
from ..features.encoded_samples import EncodedSamples, select_usable, sort_quarantined
from ..features.encoders import input_shape, is_network, stored_pictures
from ..features.matrix import Inputs, RowIndex
from ..hashing import canonical_order
from ..media.files import MediaConfig
from ..probes.config import NetworkConfig, ProbeConfig
from ..probes.crops import PictureView
from ..probes.cross_fit import CrossFit, plan_cross_fits
from ..probes.network import describe_cost, seconds_per_row
from ..probes.network_probe import fit_network
from ..probes.probe_set import (
    CalibratedProbe,
    Probe,
    ProbeSet,
    fit_calibrated_probe,
    fit_in_parallel,
    fit_joint_probe,
    fit_probe,
)
from ..workers import Progress, fixed_threads, parallel_map
from .gap_checks import ClassCheck, MarginCheck, balanced_side, fit_by_class, permute_within_classes
from .mixture import Mixture, MixtureConfig
from .probe_report import CONTROL_ROWS, ProbeReport, compute_probe_report
from .sample_scores import SampleScores, add_balance, compute_sample_scores, score_columns
from .stability import (
    NUM_BISECTIONS,
    AuditData,
    BisectionAudit,
    HalfAudit,
    audit_bisections,
    audit_halves,
    check_modalities,
    target_of,
)
from .table import ScoreTable

log = logging.getLogger("mmaudit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """All results of scoring. Every input sample is either scored or quarantined."""

    scores: ScoreTable
    mixture: Mixture
    class_check: ClassCheck
    margin_check: MarginCheck
    balanced_side: dict[str, float] | None
    probe_report: ProbeReport
    halves: HalfAudit | None
    bisections: BisectionAudit | None
    quarantined: tuple[Quarantined, ...]
    fingerprint: str


@fixed_threads()
def audit_dataset(
    encoded: EncodedSamples,
    tasks: Sequence[EncodeTask],
    *,
    probe: ProbeConfig,
    networks: NetworkSettings,
    mixture: MixtureConfig,
    seed: int,
    device: str,
    progress: Progress,
    keep_duplicates: bool = False,
) -> Audit:
    """Score every usable sample of an encoded dataset.

    With `probe.learn_from = "train"` no probe trains on a test sample, so that no later choice by the scores depends on
    test labels; with "all" each probe has a quarter more training rows on a usual split.

    All computations use the rows in the order of their ids' hashes; results are returned in the order of the dataset.
    Shuffling the rows of the source therefore gives each sample bitwise the same values.
    """
    rows, left_out = select_usable(encoded, keep_duplicates=keep_duplicates)
    rows = rows[canonical_order(encoded.samples.sample_id[rows])]
    rows, cross_fits, rare = plan_cross_fits(encoded.samples, rows, probe, seed=seed)
    target, classes = target_of(encoded.samples, rows)
    inputs = [FeatureMatrix.of(tasks, status, rows) for status in encoded.statuses]
    check_modalities(encoded.samples, inputs, cross_fits[0], rows)
    total = _num_fits([status.modality for status in encoded.statuses], probe)
    fit = _ProbeFitter(probe, networks, target, seed=seed, device=device, progress=progress, total=total)
    _log_cost([matrix for matrix in inputs if is_network(matrix.status.modality)], cross_fits, fit)
    probe_set = _fit_probe_set(inputs, target, cross_fits, fit=fit)
    sample_scores = compute_sample_scores(probe_set, seed=seed, progress=progress)
    scores = _score_table(encoded, rows, sample_scores, target=target, classes=classes, fold=cross_fits[0].fold)
    ids: dict[str, Any] = {"sample_id": scores.sample_id, "group": scores.group}
    probe_report = compute_probe_report(
        probe_set, sample_scores, cross_fits[0], fit=fit, controls=probe.control, seed=seed, **ids
    )
    data = AuditData(samples=encoded.samples, rows=rows, inputs=tuple(inputs), config=probe, fit=fit, seed=seed)
    fit.purpose = "halves of the features"
    halves = audit_halves(data) if probe.halves else None
    fit.purpose = "bisections of the samples"
    bisections = audit_bisections(data) if probe.thorough else None
    scores, fitted = add_balance(scores, config=mixture, seed=seed)
    if halves is not None and halves.confidences is not None:
        scores = replace(scores, half_a=halves.confidences[0], half_b=halves.confidences[1])
    return Audit(
        scores=scores.take(np.argsort(rows)),
        mixture=fitted,
        **_gap_checks(scores, fitted, config=mixture, seed=seed),
        probe_report=probe_report,
        halves=halves,
        bisections=bisections,
        quarantined=sort_quarantined(left_out + rare, encoded.samples.sample_id),
        fingerprint=encoded.fingerprint,
    )


def _gap_checks(scores: ScoreTable, fitted: Mixture, *, config: MixtureConfig, seed: int) -> dict[str, Any]:
    """Check the modes of the gap on the rows that the mixture is fitted to; the rows are in the order of a hash."""
    chooses = scores.not_test
    confidence, label = scores.confidence[chooses], scores.label[chooses]
    options: dict[str, Any] = {"config": config, "seed": seed}
    return {
        "class_check": fit_by_class(scores.gap[chooses], label, **options),
        "margin_check": permute_within_classes(confidence, label, **options, bimodal=fitted.bimodal),
        "balanced_side": balanced_side(scores),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSettings:
    """Settings of network probes; `folder` stores the outputs of finished folds."""

    config: NetworkConfig
    media: MediaConfig
    folder: Path


class _ProbeFitter:
    """Fits probes on features or as networks, and reports progress; safe to call from several threads."""

    def __init__(
        self,
        config: ProbeConfig,
        networks: NetworkSettings,
        target: Target,
        *,
        seed: int,
        device: str,
        progress: Progress,
        total: int,
    ) -> None:
        self.config, self.networks, self.target, self.seed, self.device = config, networks, target, seed, device
        self.progress, self.total, self.done = progress, total, 0
        self.purpose = ""  # of the fits after those of the scores and their controls
        self.lock = Lock()

    def __call__(
        self, inputs: Inputs, target: Target, cross_fits: Sequence[CrossFit], *, parts: Sequence[Probe] = ()
    ) -> Probe:
        detail = self.purpose or ("" if target is self.target else "controls, on shuffled labels")
        with self.lock:
            self.progress("probe", min(self.done, self.total), self.total, detail=detail)
        if isinstance(inputs, FeatureMatrix) and is_network(inputs.status.modality):
            probe = self._train(inputs, target, cross_fits)
        else:
            probe = fit_probe(inputs, target, cross_fits, config=self.config, device=self.device, parts=parts)
        with self.lock:
            self.done += 1
            self.progress("probe", min(self.done, self.total), self.total, detail=detail)
        return probe

    def _train(self, inputs: FeatureMatrix, target: Target, cross_fits: Sequence[CrossFit]) -> Probe:
        modality = inputs.status.modality
        name = f"{'probe' if target is self.target else 'control'} {modality.name}"
        return fit_network(
            inputs,
            _view(modality, self.networks.media),
            target,
            cross_fits,
            config=self.networks.config,
            seed=self.seed,
            device=self.device,
            progress=lambda stage, done, total, *, detail="": self.progress(name, done, total, detail=detail),
            folder=self.networks.folder,
        )


def _view(modality: Modality, media: MediaConfig) -> PictureView:
    return PictureView(shape=input_shape(modality, media), stored=stored_pictures(modality, media))


def _log_cost(inputs: Sequence[FeatureMatrix], cross_fits: Sequence[CrossFit], fit: _ProbeFitter) -> None:
    """Log how long the networks of these modalities will train, before they do."""
    if not inputs:
        return
    options: dict[str, Any] = {"config": fit.networks.config, "device": fit.device}
    views = [_view(matrix.status.modality, fit.networks.media) for matrix in inputs]
    seconds = [seconds_per_row(matrix, view, fit.target, **options) for matrix, view in zip(inputs, views, strict=True)]
    own_fits = [[replace(item, fits=item.fits & matrix.present) for item in cross_fits] for matrix in inputs]
    control_rows = [min(CONTROL_ROWS, int(fits[0].fits.sum())) if fit.config.control else 0 for fits in own_fits]
    names = ", ".join(matrix.status.modality.name for matrix in inputs)
    log.info("networks of %s: %s", names, describe_cost(seconds, own_fits, control_rows=control_rows, **options))


def _fit_probe_set(
    inputs: Sequence[FeatureMatrix], target: Target, cross_fits: Sequence[CrossFit], *, fit: _ProbeFitter
) -> ProbeSet:
    """Fit a calibrated probe per modality, and a joint one unless a modality has a network probe."""

    def fit_modality(matrix: FeatureMatrix) -> CalibratedProbe:
        return fit_calibrated_probe(
            matrix.status.modality.name, matrix, target, cross_fits, present=matrix.present, fit=fit
        )

    probes = list(parallel_map(fit_modality, inputs) if fit_in_parallel(inputs) else map(fit_modality, inputs))
    has_network = any(is_network(matrix.status.modality) for matrix in inputs)
    joint = None if has_network or not fit.config.joint else fit_joint_probe(probes, target, cross_fits, fit=fit)
    return ProbeSet(probes=tuple(probes), joint=joint, target=target)


def _num_fits(modalities: Sequence[Modality], config: ProbeConfig) -> int:
    """Count the fits: modalities, controls, halves and bisections; those with features also without a network probe."""
    if any(is_network(modality) for modality in modalities):
        return len(modalities) * (1 + config.control)
    num_audits = 1 + config.control + 2 * config.halves + 2 * NUM_BISECTIONS * config.thorough
    return len(modalities) * num_audits + config.joint


def _score_table(
    encoded: EncodedSamples,
    rows: RowIndex,
    sample_scores: SampleScores,
    *,
    target: Target,
    classes: NDArray[np.int32],
    fold: NDArray[np.int16],
) -> ScoreTable:
    samples = encoded.samples
    return ScoreTable(
        sample_id=samples.sample_id[rows],
        label=samples.label[rows],
        label_name=np.array(samples.class_names, dtype=object)[samples.label[rows]],
        modalities=tuple(status.modality.name for status in encoded.statuses),
        split=samples.split[rows],
        group=None if samples.group is None else samples.group[rows],
        fold=fold,
        content=encoded.content[rows],
        paths=samples.paths.take(pa.array(rows)),
        **score_columns(sample_scores, task=target.task, classes=classes),
    )
