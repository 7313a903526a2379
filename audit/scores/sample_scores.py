"""Out-of-fold predictions of all modalities for all samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .. import metrics as measures
from ..dataset.labels import Target
from ..features.matrix import Rows, chunks
from ..metrics import Floats
from ..probes.prediction import Prediction, fuse_predictions
from ..probes.probe_set import CalibratedProbe, ProbeSet
from ..threads import parallel_map
from ..workers import Progress

# The rows lie scattered over the files of the cache: many are read at once, each of them once.
_BYTES_AT_ONCE = 256 << 20
_LOGITS_AT_ONCE = 1 << 20  # of a round or epoch, for the rows of one piece
_LEAST_ROWS, _MOST_ROWS = 256, 8_192


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleScores:
    """What the panel says of b samples: (b, m) by modality, NaN where missing; (b,) of all together.

    `spread` is the standard deviation of the discrepancy over the rounds, (b, 1) or (b, m). `right` is what the metric
    of the task is the mean of: see Reading. `fused` is the fusion of the modalities' probabilities, `without` (b, m)
    the same without each of them, `joint` the probe of all features side by side, NaN where there is none.
    """

    confidence: Floats
    spread: Floats
    entropy: Floats
    margin: Floats
    predicted: Floats
    right: Floats
    training_confidence: Floats
    training_variability: Floats
    shapley: Floats
    similarity: Floats
    fused_confidence: Floats
    fused_predicted: Floats
    fused_right: Floats
    without_right: Floats
    joint_confidence: Floats
    joint_right: Floats


def compute_sample_scores(probe_set: ProbeSet, *, seed: int, progress: Progress) -> SampleScores:
    """Ask about all n samples: the probabilities of all classes are never held for all of them."""
    n = len(probe_set.target)
    parts = []
    for rows in chunks(probe_set.side_by_side, np.arange(n), most_bytes=_BYTES_AT_ONCE):
        pieces = _pieces(probe_set, rows)
        sample_scores = parallel_map(partial(_score_rows, probe_set.in_memory(rows), seed=seed), pieces)
        for piece, part in zip(pieces, sample_scores, strict=True):
            parts.append(part)
            progress("score", int(piece[-1]) + 1, n)
    return SampleScores(
        **{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(SampleScores)}
    )


def _pieces(probe_set: ProbeSet, rows: Rows) -> list[Rows]:
    """Cut consecutive rows into pieces, by nothing but the numbers of features and outputs."""
    size = min(_MOST_ROWS, max(_LEAST_ROWS, _LOGITS_AT_ONCE // probe_set.target.num_outputs))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _score_rows(probe_set: ProbeSet, rows: Rows, *, seed: int) -> SampleScores:
    target = probe_set.target.take(rows)
    predictions = [
        _read(calibrated, rows, target, least_scale=probe_set.least_scale) for calibrated in probe_set.probes
    ]
    by_round = np.stack([prediction.by_round for prediction in predictions], axis=2)  # (r, b, m)
    training = [_train(calibrated, rows, target, least_scale=probe_set.least_scale) for calibrated in probe_set.probes]
    fused = fuse_predictions(predictions, target, least_scale=probe_set.least_scale)
    joint = None if probe_set.joint is None else probe_set.joint.read(rows, target, least_scale=probe_set.least_scale)
    nothing = np.full(len(rows), np.nan, np.float32)
    return SampleScores(
        confidence=_by_modality(predictions, "confidence"),
        spread=_spread(by_round),
        entropy=_by_modality(predictions, "entropy"),
        margin=_by_modality(predictions, "margin"),
        predicted=_by_modality(predictions, "predicted"),
        right=_by_modality(predictions, "right"),
        training_confidence=np.stack([each.mean(axis=0) for each in training], axis=1),
        training_variability=np.stack([each.std(axis=0) for each in training], axis=1),
        shapley=_shapley(probe_set, rows, target, joint, seed=seed),
        similarity=_similarity(predictions),
        fused_confidence=fused.confidence,
        fused_predicted=fused.predicted,
        fused_right=fused.right,
        without_right=_without(predictions, target, least_scale=probe_set.least_scale),
        joint_confidence=nothing if joint is None else joint.confidence,
        joint_right=nothing if joint is None else joint.right,
    )


def _read(calibrated: CalibratedProbe, rows: Rows, target: Target, *, least_scale: float) -> Prediction:
    """Ask a member about the samples that have its modality; NaN for the others."""
    there = calibrated.present[rows]
    found = calibrated.read(rows[there], target.take(np.flatnonzero(there)), least_scale=least_scale)
    if there.all():
        return found
    return replace(
        found,
        by_round=_spread_out(found.by_round.T, there).T,
        **{
            name: _spread_out(values, there)
            for name in ("confidence", "probability", "entropy", "margin", "predicted", "right", "deviation")
            if (values := getattr(found, name)) is not None
        },
    )


def _train(calibrated: CalibratedProbe, rows: Rows, target: Target, *, least_scale: float) -> Floats:
    """Give the confidence (e, b) over the epochs of a member's training, NaN where its modality is missing."""
    there = calibrated.present[rows]
    found = calibrated.read_epochs(rows[there], target.take(np.flatnonzero(there)), least_scale=least_scale)
    return _spread_out(found.T, there).T


def _spread_out(values: Floats, there: NDArray[np.bool_]) -> Floats:
    """Put values (a, ...) of the samples that are `there` (b,) into their places among NaN: (b, ...)."""
    out = np.full((len(there), *values.shape[1:]), np.nan, np.float32)
    out[there] = values
    return out


def _by_modality(predictions: Sequence[Prediction], name: str) -> Floats:
    return np.stack([getattr(prediction, name) for prediction in predictions], axis=1).astype(np.float32)


def _spread(by_round: Floats) -> Floats:
    """Standard deviation of the discrepancy over rounds (r, b, m): (b, 1) or (b, m), NaN after one."""
    each = np.stack([measures.discrepancy(one) for one in by_round])
    if len(each) == 1:
        return np.full(each[0].shape, np.nan, np.float32).reshape(by_round.shape[1], -1)
    return np.asarray(np.std(each, axis=0, ddof=1, dtype=np.float32)).reshape(by_round.shape[1], -1)


def _similarity(predictions: Sequence[Prediction]) -> Floats:
    deviations = [prediction.deviation for prediction in predictions if prediction.deviation is not None]
    if deviations:
        return measures.overlap([prediction.probability[:, 0] for prediction in predictions], deviations)
    return measures.similarity([prediction.probability for prediction in predictions])


def _without(predictions: Sequence[Prediction], target: Target, *, least_scale: float) -> Floats:
    """Give what the fusion of all modalities but one adds to the metric, (b, m): NaN where that one is missing."""
    found = []
    for index, left_out in enumerate(predictions):
        others = [prediction for place, prediction in enumerate(predictions) if place != index]
        right = others[0].right if len(others) == 1 else fuse_predictions(others, target, least_scale=least_scale).right
        found.append(np.where(np.isnan(left_out.right), np.nan, right))
    return np.stack(found, axis=1).astype(np.float32)


def _shapley(probe_set: ProbeSet, rows: Rows, target: Target, together: Prediction | None, *, seed: int) -> Floats:
    """Shapley values (b, m) on the joint probe, which hears the modalities of a set alone; NaN without it."""
    m, joint = len(probe_set.probes), probe_set.joint
    if joint is None or together is None or target.task == "regression":
        return np.full((len(rows), m), np.nan, np.float32)

    there = np.stack([calibrated.present[rows] for calibrated in probe_set.probes], axis=1)

    def value(chosen: frozenset[int]) -> Floats:
        """SMV's value: how many of these modalities the sample has, where they name the target, else 0."""
        count = there[:, sorted(chosen)].sum(axis=1)
        if len(chosen) == m:
            return np.asarray(count * together.right, dtype=np.float32)
        inputs = probe_set.side_by_side.mask(frozenset(range(m)) - chosen)
        return np.asarray(count * joint.read_right(rows, target, inputs=inputs), dtype=np.float32)

    found = measures.shapley(value, m, seed=seed)
    return np.where(there, found, np.nan).astype(np.float32)
