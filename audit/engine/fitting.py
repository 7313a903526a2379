"""Stage `fit`: probes of all modalities with their calibration, and what else is fitted on a sample of the rows."""

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

from ..dataset.columns import SPLITS
from ..dataset.labels import Target
from ..dataset.modalities import Modality
from ..dataset.samples import Samples
from ..features.cached_matrix import FeatureMatrix
from ..features.encoders import input_shape, is_network, stored_pictures
from ..features.matrix import Inputs, RowIndex
from ..media.files import MediaConfig
from ..probes.config import NetworkConfig, ProbeConfig
from ..probes.crops import PictureView
from ..probes.cross_fit import CrossFit
from ..probes.folds import KEY_PURPOSE
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
from ..scores.probe_report import CONTROL_ROWS, Control, fit_controls
from ..scores.stability import (
    AUDIT_ROWS,
    NUM_BISECTIONS,
    AuditData,
    BisectionAudit,
    HalfAudit,
    audit_bisections,
    audit_halves,
    check_modalities,
)
from ..workers import Progress, parallel_map
from .selection import Selection
from .stored_rows import StoredRows

log = logging.getLogger("mmaudit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Probes of n samples, and the results of fits on some of them.

    halves: its confidences are those of the first samples only, in the order of the selection.
    """

    probe_set: ProbeSet
    controls: tuple[Control, ...]
    halves: HalfAudit | None
    bisections: BisectionAudit | None


def fit_probes(
    selection: Selection,
    inputs: Sequence[FeatureMatrix],
    data: StoredRows,
    *,
    probe: ProbeConfig,
    networks: NetworkSettings,
    seed: int,
    device: str,
    progress: Progress,
) -> Fitted:
    """Fit the probes of all modalities, their controls, and the audits of halves of the features and of the samples.

    With `probe.learn_from = "train"` no probe trains on a test sample, so that no later choice by the scores depends on
    test labels; with "all" each probe has a quarter more training rows on a usual split.
    """
    key = data.hash_rows(selection.row, seed=seed, purpose=KEY_PURPOSE)
    cross_fits, target = [replace(item, key=key) for item in selection.cross_fits], selection.target
    first = cross_fits[0]
    check_modalities(selection.group, inputs, first)
    total = _num_fits([matrix.status.modality for matrix in inputs], probe)
    fit = _ProbeFitter(probe, networks, target, seed=seed, device=device, progress=progress, total=total)
    _log_cost([matrix for matrix in inputs if is_network(matrix.status.modality)], cross_fits, fit)
    probe_set = fit_probe_set(inputs, target, cross_fits, fit=fit)

    def ids_of(samples: RowIndex) -> NDArray[np.object_]:
        return data.ids_of(selection.row[samples])

    controls = fit_controls(probe_set, first, fit=fit, ids_of=ids_of, seed=seed) if probe.control else ()
    audited = _audit_data(selection, inputs, data, config=probe, fit=fit, seed=seed)
    fit.purpose = "halves of the features"
    halves = audit_halves(audited) if probe.halves else None
    fit.purpose = "bisections of the samples"
    bisections = audit_bisections(audited) if probe.thorough else None
    return Fitted(probe_set=probe_set, controls=controls, halves=halves, bisections=bisections)


def _audit_data(
    selection: Selection,
    inputs: Sequence[FeatureMatrix],
    data: StoredRows,
    *,
    config: ProbeConfig,
    fit: _ProbeFitter,
    seed: int,
) -> AuditData:
    """Return the first samples, at most AUDIT_ROWS, with their ids and groups as strings."""
    rows, own = selection.row[:AUDIT_ROWS], slice(0, AUDIT_ROWS)
    values = selection.target.values
    samples = Samples(
        sample_id=data.ids_of(rows),
        label=selection.label_of(selection.target.label[own]),
        class_names=selection.class_names,
        split=np.array(SPLITS, dtype=object)[selection.split[own]],
        group=None if selection.group is None else data.groups_of(rows),
        paths=pa.table({}),
        task=selection.target.task,
        values=None if values is None else values[own],
        outputs=tuple(map(str, range(selection.target.num_outputs))),  # their names are not used
    )
    positions = np.arange(len(rows))
    taken = tuple(matrix.take(positions) for matrix in inputs)
    return AuditData(samples=samples, rows=positions, inputs=taken, config=config, fit=fit, seed=seed)


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
        is_own = target is self.target  # not a control
        name = f"{'probe' if is_own else 'control'} {modality.name}"
        return fit_network(
            inputs,
            picture_view(modality, self.networks.media),
            target,
            cross_fits,
            config=self.networks.config,
            seed=self.seed,
            device=self.device,
            progress=lambda stage, done, total, *, detail="": self.progress(name, done, total, detail=detail),
            folder=self.networks.folder,
            keep_weights=is_own,
        )


def picture_view(modality: Modality, media: MediaConfig) -> PictureView:
    """Return how a network reads the cached rows of a modality."""
    return PictureView(shape=input_shape(modality, media), stored=stored_pictures(modality, media))


def _log_cost(inputs: Sequence[FeatureMatrix], cross_fits: Sequence[CrossFit], fit: _ProbeFitter) -> None:
    """Log how long the networks of these modalities will train, before they do."""
    if not inputs:
        return
    options: dict[str, Any] = {"config": fit.networks.config, "device": fit.device}
    views = [picture_view(matrix.status.modality, fit.networks.media) for matrix in inputs]
    seconds = [seconds_per_row(matrix, view, fit.target, **options) for matrix, view in zip(inputs, views, strict=True)]
    own_fits = [[replace(item, fits=item.fits & matrix.present) for item in cross_fits] for matrix in inputs]
    control_rows = [min(CONTROL_ROWS, int(fits[0].fits.sum())) if fit.config.control else 0 for fits in own_fits]
    names = ", ".join(matrix.status.modality.name for matrix in inputs)
    log.info("networks of %s: %s", names, describe_cost(seconds, own_fits, control_rows=control_rows, **options))


def fit_probe_set(
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
