"""Scores of samples: from out-of-fold predictions of probes, or from probabilities computed elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import metrics as measures
from ..dataset.labels import Target
from ..dataset.modalities import Modality, check_modalities
from ..errors import ScoreError, choices
from ..features.matrix import RowIndex, chunks
from ..metrics import Floats
from ..probes.prediction import Prediction, fuse_predictions, predict
from ..probes.probe_set import CalibratedProbe, ProbeSet
from ..workers import Progress, parallel_map
from .mixture import Mixture, MixtureConfig, fit_mixture
from .table import ScoreTable, check_splits

_CHUNK_BYTES = 256 << 20  # large, since consecutive rows are scattered over the files of the cache
_CHUNK_LOGITS = 1 << 20  # of a repeat or epoch, for the rows of one piece
_MIN_ROWS, _MAX_ROWS = 256, 8_192
_MAX_SUM_ERROR = 1e-2  # of a row of probabilities: softmax in float16 stays below


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleScores:
    """Out-of-fold predictions for b samples: (b, m) by modality, NaN where missing; (b,) of all modalities.

    `spread` is the standard deviation of the discrepancy over the repeats, (b, 1) or (b, m). The mean of `correct` is
    the metric of the task: see Prediction. `fused` is the fusion of the modalities' probabilities, `without` (b, m)
    the fusion without each of them, `joint` the probe of the concatenated features, NaN if there is none.
    """

    confidence: Floats
    spread: Floats
    entropy: Floats
    margin: Floats
    predicted: Floats
    correct: Floats
    training_confidence: Floats
    training_variability: Floats
    shapley: Floats
    similarity: Floats
    fused_confidence: Floats
    fused_predicted: Floats
    fused_correct: Floats
    without_correct: Floats
    joint_confidence: Floats
    joint_correct: Floats


def compute_sample_scores(probe_set: ProbeSet, *, seed: int, progress: Progress) -> SampleScores:
    """Score all n samples, in chunks: probabilities of all classes for all samples need not fit in memory."""
    n = len(probe_set.target)
    parts = []
    for rows in chunks(probe_set.joint_inputs, np.arange(n), max_bytes=_CHUNK_BYTES):
        pieces = _pieces(probe_set, rows)
        sample_scores = parallel_map(partial(_score_rows, probe_set.in_memory(rows), seed=seed), pieces)
        for piece, part in zip(pieces, sample_scores, strict=True):
            parts.append(part)
            progress("score", int(piece[-1]) + 1, n)
    names = [field.name for field in fields(SampleScores)]
    return SampleScores(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def compute_confidence(probe_set: ProbeSet) -> Floats:
    """Compute the out-of-fold confidences (n, m) of all samples, NaN where missing, and no other score."""
    parts: list[Floats] = []
    for rows in chunks(probe_set.joint_inputs, np.arange(len(probe_set.target)), max_bytes=_CHUNK_BYTES):
        parts += parallel_map(partial(_confidence, probe_set.in_memory(rows)), _pieces(probe_set, rows))
    return np.concatenate(parts)


def _confidence(probe_set: ProbeSet, rows: RowIndex) -> Floats:
    target, min_scale = probe_set.target.take(rows), probe_set.min_scale
    predictions = [_predict_present(probe, rows, target, min_scale=min_scale) for probe in probe_set.probes]
    return np.stack([prediction.confidence for prediction in predictions], axis=1)


def _pieces(probe_set: ProbeSet, rows: RowIndex) -> list[RowIndex]:
    """Split consecutive rows into pieces whose size depends on the number of outputs only."""
    piece_rows = min(_MAX_ROWS, max(_MIN_ROWS, _CHUNK_LOGITS // probe_set.target.num_outputs))
    return [rows[start : start + piece_rows] for start in range(0, len(rows), piece_rows)]


def _score_rows(probe_set: ProbeSet, rows: RowIndex, *, seed: int) -> SampleScores:
    target, probes, min_scale = probe_set.target.take(rows), probe_set.probes, probe_set.min_scale
    predictions = [_predict_present(calibrated, rows, target, min_scale=min_scale) for calibrated in probes]
    by_epoch = [_training_confidence(calibrated, rows, target, min_scale=min_scale) for calibrated in probes]
    joint = None if probe_set.joint is None else probe_set.joint.predict(rows, target, min_scale=min_scale)
    scores = replace(
        _combine(predictions, target, min_scale=min_scale),
        training_confidence=np.stack([confidence.mean(axis=0) for confidence in by_epoch], axis=1),
        training_variability=np.stack([confidence.std(axis=0) for confidence in by_epoch], axis=1),
        shapley=_shapley(probe_set, rows, target, joint, seed=seed),
        without_correct=_without(predictions, target, min_scale=min_scale),
    )
    return scores if joint is None else replace(scores, joint_confidence=joint.confidence, joint_correct=joint.correct)


def _combine(predictions: Sequence[Prediction], target: Target, *, min_scale: float = 1.0) -> SampleScores:
    """Compute what follows from the predictions of each modality alone; the other fields are NaN."""
    fused = fuse_predictions(list(predictions), target, min_scale=min_scale)
    missing = np.full((len(target), len(predictions)), np.nan, np.float32)
    by_modality = {
        name: np.stack([getattr(prediction, name) for prediction in predictions], axis=1).astype(np.float32)
        for name in ("confidence", "entropy", "margin", "predicted", "correct")
    }
    return SampleScores(
        **by_modality,
        **dict.fromkeys(("training_confidence", "training_variability", "shapley", "without_correct"), missing),
        **dict.fromkeys(("joint_confidence", "joint_correct"), missing[:, 0]),
        spread=_spread(np.stack([prediction.by_repeat for prediction in predictions], axis=2)),
        similarity=_similarity(predictions),
        fused_confidence=fused.confidence,
        fused_predicted=fused.predicted,
        fused_correct=fused.correct,
    )


def _predict_present(calibrated: CalibratedProbe, rows: RowIndex, target: Target, *, min_scale: float) -> Prediction:
    """Predict the samples that have the probe's modality; NaN for the others."""
    present = calibrated.present[rows]
    prediction = calibrated.predict(rows[present], target.take(np.flatnonzero(present)), min_scale=min_scale)
    if present.all():
        return prediction
    values: dict[str, Any] = {field.name: getattr(prediction, field.name) for field in fields(prediction)}
    by_repeat = _expand(values.pop("by_repeat").T, present).T
    expanded = {name: _expand(array, present) for name, array in values.items() if array is not None}
    return Prediction(by_repeat=by_repeat, **expanded)


def _training_confidence(calibrated: CalibratedProbe, rows: RowIndex, target: Target, *, min_scale: float) -> Floats:
    """Compute the confidence (e, b) over the epochs of a probe's training, NaN where its modality is missing."""
    present = calibrated.present[rows]
    target = target.take(np.flatnonzero(present))
    return _expand(calibrated.confidence_by_epoch(rows[present], target, min_scale=min_scale).T, present).T


def _expand(values: Floats, present: NDArray[np.bool_]) -> Floats:
    """Expand values (a, ...) of the samples in the mask `present` (b,) to (b, ...), NaN elsewhere."""
    out = np.full((len(present), *values.shape[1:]), np.nan, np.float32)
    out[present] = values
    return out


def _spread(by_repeat: Floats) -> Floats:
    """Compute the standard deviation of the discrepancy over repeats (r, b, m): (b, 1) or (b, m), NaN of one repeat."""
    discrepancies = np.stack([measures.discrepancy(confidence) for confidence in by_repeat])
    if len(discrepancies) == 1:
        return np.full(discrepancies[0].shape, np.nan, np.float32).reshape(by_repeat.shape[1], -1)
    return np.asarray(np.std(discrepancies, axis=0, ddof=1, dtype=np.float32)).reshape(by_repeat.shape[1], -1)


def _similarity(predictions: Sequence[Prediction]) -> Floats:
    deviations = [prediction.deviation for prediction in predictions if prediction.deviation is not None]
    if deviations:
        return measures.overlap([prediction.probability[:, 0] for prediction in predictions], deviations)
    return measures.similarity([prediction.probability for prediction in predictions])


def _without(predictions: Sequence[Prediction], target: Target, *, min_scale: float) -> Floats:
    """Compute `correct` (b, m) of the fusion of all modalities but one, NaN where that one is missing."""
    columns = []
    for index, excluded in enumerate(predictions):
        rest = [*predictions[:index], *predictions[index + 1 :]]
        correct = rest[0].correct if len(rest) == 1 else fuse_predictions(rest, target, min_scale=min_scale).correct
        columns.append(np.where(np.isnan(excluded.correct), np.nan, correct))
    return np.stack(columns, axis=1).astype(np.float32)


def _shapley(probe_set: ProbeSet, rows: RowIndex, target: Target, full: Prediction | None, *, seed: int) -> Floats:
    """Compute Shapley values (b, m) on the joint probe with the other modalities masked; NaN without a joint probe."""
    m, joint = len(probe_set.probes), probe_set.joint
    if joint is None or full is None or target.task == "regression":
        return np.full((len(rows), m), np.nan, np.float32)

    present = np.stack([calibrated.present[rows] for calibrated in probe_set.probes], axis=1)

    def value(subset: frozenset[int]) -> Floats:
        """Compute SMV's value: the number of these modalities that the sample has if they predict it, else 0."""
        count = present[:, sorted(subset)].sum(axis=1)
        if len(subset) == m:
            return np.asarray(count * full.correct, dtype=np.float32)
        inputs = probe_set.joint_inputs.mask(frozenset(range(m)) - subset)
        return np.asarray(count * joint.correctness(rows, target, inputs=inputs), dtype=np.float32)

    values = measures.shapley(value, m, seed=seed)
    return np.where(present, values, np.nan).astype(np.float32)


def score_columns(sample_scores: SampleScores, *, task: str, classes: NDArray[np.int32]) -> dict[str, Any]:
    """Return the columns of a ScoreTable that follow from predictions; one without any value is None.

    classes (k,) holds the source's label of each class.
    """
    to_source_labels = partial(_source_labels, task=task, classes=classes)
    optional = ("margin", "training_confidence", "training_variability", "shapley")
    return {
        **{name: getattr(sample_scores, name) for name in ("confidence", "entropy", "similarity")},
        **{name: _or_none(getattr(sample_scores, name)) for name in optional},
        "prediction": to_source_labels(sample_scores.predicted),
        "loss": measures.cross_entropy(sample_scores.confidence),
        "confidence_fused": sample_scores.fused_confidence,
        "prediction_fused": to_source_labels(sample_scores.fused_predicted),
        "loss_fused": measures.cross_entropy(sample_scores.fused_confidence),
        "discrepancy_sd": _or_none(sample_scores.spread),
    }


def report_columns(sample_scores: SampleScores, names: Sequence[str], *, joint: bool) -> dict[str, Floats]:
    """Return the columns that the probe report reads, (n,) each; see compute_probe_report."""
    columns = {
        f"{kind}_{name}": values[:, index]
        for kind, values in (
            ("confidence", sample_scores.confidence),
            ("correct", sample_scores.correct),
            ("without", sample_scores.without_correct),
        )
        for index, name in enumerate(names)
    }
    columns |= {"confidence_fused": sample_scores.fused_confidence, "correct_fused": sample_scores.fused_correct}
    if joint:
        columns |= {"confidence_joint": sample_scores.joint_confidence, "correct_joint": sample_scores.joint_correct}
    return columns


def add_balance(scores: ScoreTable, *, config: MixtureConfig, seed: int) -> tuple[ScoreTable, Mixture]:
    """Add the balance score and p_balanced to a table with losses; return it with the mixture of the gap.

    Both are fitted to the rows outside the test split.
    """
    assert scores.similarity is not None
    total = total_loss(scores)
    mixture = fit_mixture(scores.gap[scores.not_test], config=config, seed=seed)
    balance = measures.balance(scores.similarity, total, fits=scores.not_test)
    return replace(scores, balance=balance, p_balanced=mixture.posterior(scores.gap)), mixture


def total_loss(scores: ScoreTable) -> Floats:
    """Compute the fused loss plus those of the modalities (n,); a missing one counts with the mean of the others."""
    assert scores.loss is not None
    assert scores.loss_fused is not None
    return np.asarray(scores.loss_fused + len(scores.modalities) * np.nanmean(scores.loss, axis=1))


def _or_none(values: Floats) -> Floats | None:
    return None if np.isnan(values).all() else values


def _source_labels(predicted: Floats, *, task: str, classes: NDArray[np.int32]) -> NDArray[np.int32] | Floats | None:
    """Map predicted classes to the source's labels, -1 where missing; keep a regression; None for multilabel."""
    if task != "classification":
        return None if task == "multilabel" else predicted
    missing = np.isnan(predicted)
    return np.where(missing, -1, classes[np.where(missing, 0, predicted).astype(np.intp)]).astype(np.int32)


def score_probabilities(
    probabilities: Mapping[str, ArrayLike],
    labels: ArrayLike,
    *,
    ids: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    mixture: MixtureConfig | None = None,
    seed: int = 0,
) -> ScoreTable:
    """Score samples by class probabilities of your own models, one model per modality.

    The probabilities must be out of fold: no model may have seen the samples (nor their groups) that it predicts, or
    every score claims too much. Discrepancy, gap, similarity, balance score and the gap mixture are computed as
    `mmaudit score` computes them; the fused probability is the normalised geometric mean of the modalities.

    Args:
        probabilities: (n, k) for each of two or more modalities, rows that sum to 1. A row of NaN is a sample that
            lacks this modality; a sample needs two.
        labels: (n,) class numbers 0 to k - 1, or names out of `classes`.
        ids: (n,) unique names of the samples; by default "0" to "n - 1".
        groups: (n,) names of what must not be parted, such as speakers. Kept for `split --resplit`.
        splits: (n,) train, validation or test. Test samples have no part in the mixture and the balance score's range.
        classes: k names, in the order of the columns; by default "0" to "k - 1".
        mixture: settings of the gap mixture.
        seed: of the subsample of the dip test.

    Returns:
        A ScoreTable of n rows in the given order, which `mmaudit.split` takes and `write_scores` writes.

    Raises:
        ScoreError: shapes disagree, a value is no probability, a label is no class, an id stands twice.

    Example:
        >>> import mmaudit
        >>> audio = [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]
        >>> video = [[0.6, 0.4], [0.7, 0.3], [0.5, 0.5]]
        >>> scores = mmaudit.score_probabilities({"audio": audio, "video": video}, [0, 1, 0])
        >>> scores.discrepancy().round(2).tolist()
        [0.3, 0.5, 0.1]
    """
    arrays = _checked(probabilities)
    names, (n, k) = tuple(arrays), next(iter(arrays.values())).shape
    class_names = _strings("classes", range(k) if classes is None else classes, length=k)
    if repeated := next((name for name, count in Counter(class_names.tolist()).items() if count > 1), None):
        raise ScoreError(f"two classes are called {repeated}: give each class a name of its own")
    label = _class_numbers(labels, class_names, length=n)
    split = None if splits is None else _strings("splits", splits, length=n)
    check_splits(() if split is None else set(split))
    target, values = Target(task="classification", label=label, num_outputs=k), list(arrays.values())
    with np.errstate(divide="ignore"):
        predictions = [predict(np.log(array)[None], np.ones(n, np.float32), target) for array in values]
    combined = _combine(predictions, target)  # of logarithms: the given probabilities are exact
    confidence, similarity = measures.confidence(values, label), measures.similarity(values)
    predicted = np.where(np.isnan(confidence), np.float32(np.nan), combined.predicted)
    sample_scores = replace(combined, confidence=confidence, similarity=similarity, predicted=predicted)
    scores = ScoreTable(
        sample_id=_strings("ids", range(n) if ids is None else ids, length=n),
        label=label,
        label_name=class_names[label],
        modalities=names,
        split=split,
        group=None if groups is None else _strings("groups", groups, length=n),
        **score_columns(sample_scores, task=target.task, classes=np.arange(k, dtype=np.int32)),
    )
    return add_balance(scores, config=mixture or MixtureConfig(), seed=seed)[0]


def _checked(probabilities: Mapping[str, ArrayLike]) -> dict[str, Floats]:
    """Return the probabilities (n, k) of each modality, with rows that sum to 1; ScoreError if they are invalid."""
    names = tuple(probabilities)
    check_modalities([Modality(name=name, column=name, kind="features") for name in names], names)
    arrays = {name: np.asarray(values, dtype=np.float32) for name, values in probabilities.items()}
    shape = arrays[names[0]].shape
    if len(shape) != 2 or shape[0] == 0 or shape[1] < 2:
        raise ScoreError(f"probabilities of {names[0]} have shape {shape}; (n, k) with two or more classes needed")
    return {name: _normalised(name, values, shape=shape) for name, values in arrays.items()}


def _normalised(name: str, values: Floats, *, shape: tuple[int, ...]) -> Floats:
    """Check the probabilities (n, k) of one modality, and divide each row by its sum, which is near 1."""
    if values.shape != shape:
        raise ScoreError(f"probabilities of {name} have shape {values.shape}, those of the first modality {shape}")
    missing = np.isnan(values)
    partly = missing.any(axis=1) & ~missing.all(axis=1)
    if partly.any():
        raise ScoreError(f"probabilities of {name}: row {partly.argmax()} is NaN in part; NaN throughout means missing")
    total = values.sum(axis=1)
    invalid = (values < 0).any(axis=1) | (np.abs(total - 1) > _MAX_SUM_ERROR) | np.isinf(total)
    if invalid.any():
        row = int(invalid.argmax())
        raise ScoreError(
            f"probabilities of {name}: row {row} has the least value {values[row].min():g} and the sum {total[row]:g}; "
            "probabilities are at least 0 and sum to 1 (apply softmax to logits)"
        )
    return np.asarray(values / total[:, None])


def _class_numbers(labels: ArrayLike, class_names: NDArray[np.object_], *, length: int) -> NDArray[np.int32]:
    """Return the labels (n,) as class numbers, from numbers or from names."""
    values = np.asarray(labels)
    if values.shape != (length,):
        raise ScoreError(f"labels have shape {values.shape}; ({length},) needed, one for each row of probabilities")
    if values.dtype.kind in "iu":
        k, wrong = len(class_names), values[(values < 0) | (values >= len(class_names))]
        if len(wrong):
            raise ScoreError(f"label {wrong[0]} is no class; the probabilities have the classes 0 to {k - 1}")
        return values.astype(np.int32)
    numbers = {name: number for number, name in enumerate(class_names)}
    unknown = sorted({str(value) for value in values.tolist()} - set(numbers))
    if unknown:
        raise ScoreError(f"label {unknown[0]!r} is no class; {choices(unknown[0], list(numbers))}")
    return np.array([numbers[str(value)] for value in values.tolist()], dtype=np.int32)


def _strings(name: str, values: Iterable[object], *, length: int) -> NDArray[np.object_]:
    """Return names as strings; ScoreError unless there are `length` of them."""
    strings = np.array([str(value) for value in values], dtype=object)
    if len(strings) != length:
        raise ScoreError(f"{name} has {len(strings)} entries; {length} needed")
    return strings
