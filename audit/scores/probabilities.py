"""Score tables of out-of-fold probabilities that were computed elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import metrics
from ..dataset.labels import Target
from ..dataset.modalities import Modality, check_modalities
from ..errors import ScoreError, choices
from ..metrics import Floats
from ..probes.prediction import Prediction, fuse_predictions, predict
from .mixture import MixtureConfig, fit_mixture
from .table import ScoreTable, check_splits

_MAX_SUM_ERROR = 1e-2  # of a row of probabilities: softmax in float16 stays below


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
    names = tuple(probabilities)
    check_modalities([Modality(name=name, column=name, kind="features") for name in names], names)
    arrays = {name: np.asarray(values, dtype=np.float32) for name, values in probabilities.items()}
    first = arrays[names[0]]
    if first.ndim != 2 or first.shape[0] == 0 or first.shape[1] < 2:
        raise ScoreError(
            f"probabilities of {names[0]} have shape {first.shape}; (n, k) with two or more classes needed"
        )
    n, k = first.shape
    for name, values in arrays.items():
        arrays[name] = _normalised(name, values, shape=(n, k))
    class_names = _strings("classes", range(k) if classes is None else classes, length=k)
    if len(set(class_names)) < k:
        repeated = next(name for name in class_names if (class_names == name).sum() > 1)
        raise ScoreError(f"two classes are called {repeated}: give each class a name of its own")
    label = _class_numbers(labels, class_names, length=n)
    split = None if splits is None else _strings("splits", splits, length=n)
    check_splits(() if split is None else set(split))
    target = Target(task="classification", label=label, num_outputs=k)
    with np.errstate(divide="ignore"):
        predictions = [predict(np.log(values)[None], np.ones(n, np.float32), target) for values in arrays.values()]
    fused = fuse_predictions(predictions, target)
    confidence = metrics.confidence(list(arrays.values()), label)
    present = ~np.isnan(confidence)
    similarity = metrics.similarity(list(arrays.values()))
    loss, loss_fused = metrics.cross_entropy(confidence), metrics.cross_entropy(fused.confidence)
    scores = ScoreTable(
        sample_id=_strings("ids", range(n) if ids is None else ids, length=n),
        label=label,
        label_name=class_names[label],
        modalities=names,
        confidence=confidence,
        split=split,
        group=None if groups is None else _strings("groups", groups, length=n),
        prediction=np.where(present, _by_modality(predictions, "predicted"), -1).astype(np.int32),
        loss=loss,
        entropy=_by_modality(predictions, "entropy"),
        margin=_by_modality(predictions, "margin"),
        confidence_fused=fused.confidence,
        prediction_fused=fused.predicted.astype(np.int32),
        loss_fused=loss_fused,
        similarity=similarity,
    )
    # A missing modality counts as the mean of the others.
    total_loss = loss_fused + len(names) * np.nanmean(loss, axis=1)
    gap_mixture = fit_mixture(scores.gap[scores.not_test], config=mixture or MixtureConfig(), seed=seed)
    return replace(
        scores,
        balance=metrics.balance(similarity, total_loss, fits=scores.not_test),
        p_balanced=gap_mixture.posterior(scores.gap),
    )


def _normalised(name: str, values: Floats, *, shape: tuple[int, int]) -> Floats:
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
        if values.min() < 0 or values.max() >= len(class_names):
            wrong = values[(values < 0) | (values >= len(class_names))][0]
            raise ScoreError(
                f"label {wrong} is no class; the probabilities have the classes 0 to {len(class_names) - 1}"
            )
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


def _by_modality(predictions: Sequence[Prediction], name: str) -> Floats:
    return np.stack([getattr(prediction, name) for prediction in predictions], axis=1).astype(np.float32)
