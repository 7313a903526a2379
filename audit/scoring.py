"""Scoring: from a dataset and its features to the score table, the mixture, and what was left out"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from . import measures
from .dataset import Dataset
from .errors import ScoreError
from .features import EncodeTask, Status, read_status
from .folds import assign_folds, in_one_fold
from .hashing import digest, hash_rank
from .matrix import FeatureMatrix
from .mixture import Mixture, MixtureConfig, fit_mixture
from .probe import Crossing, ProbeConfig, cross_fit
from .quality import Quarantined, Reason
from .samples import NO_LABEL, Samples
from .score import ScoreTable
from .workers import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """All that scoring found. Input = scored + quarantined samples, always."""

    scores: ScoreTable
    mixture: Mixture
    quarantined: tuple[Quarantined, ...]
    fingerprint: str
    fused: NDArray[np.int32]  # (n,) the class that the probes name together


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """What a dataset is made of: its samples, and how each fared in each modality."""

    samples: Samples
    statuses: tuple[Status, ...]

    @property
    def content(self) -> NDArray[np.object_]:
        """One digest for each sample (n,) over all its modalities."""
        return row_content(self.statuses)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of ids, labels, splits, groups and content, whatever the row order or the file format."""
        samples = self.samples
        names = np.array([*samples.class_names, ""], dtype=object)[samples.label]  # NO_LABEL is the last
        group = samples.group if samples.group is not None else np.full(len(samples), "", dtype=object)
        rows = zip(samples.sample_id, names, samples.split, group, self.content, strict=True)
        return digest(*sorted("\0".join(row).encode() for row in rows))


def row_content(statuses: Sequence[Status]) -> NDArray[np.object_]:
    """Give one digest for each sample (n,) over all its modalities."""
    parts = zip(*(status.content for status in statuses), strict=True)
    return np.array([digest("".join(row).encode()) for row in parts], dtype=object)


def take_stock(dataset: Dataset, samples: Samples, tasks: Sequence[EncodeTask]) -> Stock:
    """Read from the cache what every sample of an encoded dataset is made of."""
    statuses = tuple(read_status(tasks, modality, samples.sample_id) for modality in dataset.modalities)
    return Stock(samples=samples, statuses=statuses)


def audit_dataset(
    stock: Stock,
    tasks: Sequence[EncodeTask],
    *,
    probe: ProbeConfig,
    mixture: MixtureConfig,
    seed: int,
    device: str,
    progress: Progress,
) -> Audit:
    """Score every usable sample of an encoded dataset.

    With `probe.learn_from = "train"` no probe learns from a test sample, and what is chosen by the scores later is
    never chosen by a test label; with "all" each probe has a quarter more to learn from on a usual split.
    """
    samples, statuses = stock.samples, stock.statuses
    rows, left_out = _usable_rows(samples, statuses)
    rows, crossings, rare = _cross(samples, rows, probe, seed=seed)
    classes, inverse = np.unique(samples.label[rows], return_inverse=True)
    label = inverse.astype(np.int32)
    if len(classes) < 2:
        raise ScoreError(f"only one class is left to score ({samples.class_names[classes[0]]!r}): a probe needs two")
    rounds: list[measures.Floats] = []  # by modality: (repeats, n, k)
    for status in statuses:
        matrix = FeatureMatrix.of(tasks, status, rows).read_all()
        found = cross_fit(matrix, label, crossings, num_classes=len(classes), config=probe, device=device)
        rounds.append(found)
        progress("probe", len(rounds), len(statuses))
    scores = _score_table(stock, rows, rounds, label, classes, crossings[0])
    fitted = fit_mixture(scores.gap[samples.split[rows] != "test"], config=mixture, seed=seed)
    return Audit(
        scores=replace(scores, p_balanced=fitted.posterior(scores.gap), content=stock.content[rows]),
        mixture=fitted,
        quarantined=tuple(left_out + rare),
        fingerprint=stock.fingerprint,
        fused=classes[measures.fuse([each.mean(axis=0) for each in rounds]).argmax(axis=1)].astype(np.int32),
    )


def _usable_rows(samples: Samples, statuses: Sequence[Status]) -> tuple[NDArray[np.intp], list[Quarantined]]:
    """Give the rows that the label and every modality allow to score, and why each other one is left out."""
    left_out = [
        Quarantined(sample_id=samples.sample_id[row], modality=status.modality.name, reason=reason, detail=detail)
        for status in statuses
        for row, reason, detail in status.problem
    ]
    unlabelled = samples.label == NO_LABEL
    left_out += [
        Quarantined(sample_id=name, modality=None, reason=Reason.NO_LABEL, detail="the label is null")
        for name in samples.sample_id[unlabelled]
    ]
    rows = np.flatnonzero(~unlabelled & np.logical_and.reduce([status.usable for status in statuses]))
    if len(rows) == 0:
        raise ScoreError(f"no sample is usable in every modality; the first problem: {left_out[0]}")
    return rows, left_out


def _cross(
    samples: Samples, rows: NDArray[np.intp], config: ProbeConfig, *, seed: int
) -> tuple[NDArray[np.intp], list[Crossing], list[Quarantined]]:
    """Deal the rows into folds, once a repeat, leaving out classes that one fold holds alone in any of them."""
    left_out: list[Quarantined] = []
    while True:
        crossings = [_crossing(samples, rows, config, seed=seed, repeat=repeat) for repeat in range(config.repeats)]
        label = samples.label[rows]
        rare = np.logical_or.reduce([in_one_fold(label, crossing.fold, crossing.fits) for crossing in crossings])
        if not rare.any():
            return rows, crossings, left_out
        left_out += [_rare(samples, rows, row) for row in rows[rare]]
        rows = rows[~rare]
        if len(rows) == 0:
            raise ScoreError(f"no class can be cross-fitted; the first: {left_out[0].detail}")


def _rare(samples: Samples, rows: NDArray[np.intp], row: int) -> Quarantined:
    peers = rows[samples.label[rows] == samples.label[row]]
    detail = f"class {samples.class_names[samples.label[row]]!r} has {len(peers)} usable samples"
    if samples.group is not None and len(peers):
        detail += f", of {len(set(samples.group[peers]))} groups"
    return Quarantined(
        sample_id=samples.sample_id[row], modality=None, reason=Reason.RARE_CLASS, detail=f"{detail}, all in one fold"
    )


def _crossing(samples: Samples, rows: NDArray[np.intp], config: ProbeConfig, *, seed: int, repeat: int) -> Crossing:
    train = samples.split[rows] != "test"
    if not train.any():  # the mixture is never fitted to test samples either
        raise ScoreError("every usable sample is a test sample: a probe has nothing to learn from; pass --split none")
    fits = train | (config.learn_from == "all")
    group = None if samples.group is None else samples.group[rows]
    ids, label = samples.sample_id[rows], samples.label[rows]
    deals = [
        assign_folds(ids, label, group, fits, num_folds=config.folds, seed=seed, purpose=f"{purpose} {repeat}")
        for purpose in ("fold", "inner fold")
    ]
    key = hash_rank(ids, seed=seed, purpose="strength rows")
    return Crossing(fold=deals[0], inner=deals[1], fits=fits, key=key)


def _score_table(
    stock: Stock,
    rows: NDArray[np.intp],
    rounds: Sequence[measures.Floats],
    label: NDArray[np.int32],
    classes: NDArray[np.int32],
    crossing: Crossing,
) -> ScoreTable:
    samples = stock.samples
    probabilities = [each.mean(axis=0) for each in rounds]
    confidence = measures.confidence(probabilities, label)
    loss = measures.cross_entropy(confidence)
    fused = measures.confidence([measures.fuse(probabilities)], label)
    similarity = measures.similarity(probabilities)
    total = measures.cross_entropy(fused)[:, 0] + loss.sum(axis=1)
    return ScoreTable(
        sample_id=samples.sample_id[rows],
        label=samples.label[rows],
        label_name=np.array(samples.class_names, dtype=object)[samples.label[rows]],
        modalities=tuple(status.modality.name for status in stock.statuses),
        confidence=confidence,
        split=samples.split[rows],
        group=None if samples.group is None else samples.group[rows],
        fold=crossing.fold,
        prediction=np.stack([classes[each.argmax(axis=1)] for each in probabilities], axis=1).astype(np.int32),
        loss=loss,
        discrepancy_sd=_spread(rounds, label),
        similarity=similarity,
        balance=measures.balance(similarity, total, fits=samples.split[rows] != "test"),
        paths=samples.paths.take(pa.array(rows)),
    )


def _spread(rounds: Sequence[measures.Floats], label: NDArray[np.int32]) -> measures.Floats | None:
    """Standard deviation of the discrepancy over repeats, (n, 1) or (n, m); None after one."""
    repeats = len(rounds[0])
    if repeats == 1:
        return None
    each = [measures.discrepancy(measures.confidence([r[repeat] for r in rounds], label)) for repeat in range(repeats)]
    return np.asarray(np.std(np.stack(each), axis=0, ddof=1, dtype=np.float32)).reshape(len(label), -1)
