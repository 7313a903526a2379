"""Comparison of predictions of any framework, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...audit.errors import ConfigError, choices
from ..difference import Condition, Mask
from .metrics import Probabilities
from .verdicts import Comparison, Correctness, build_comparison


def compare_predictions(
    predictions: Mapping[str, ArrayLike],
    *,
    baseline: str | None = None,
    group: Sequence[object] | None = None,
    labels: ArrayLike | None = None,
    subsets: Mapping[str, ArrayLike] | None = None,
    sample_id: Sequence[object] | None = None,
    probabilities: Mapping[str, ArrayLike] | None = None,
) -> Comparison:
    """Compare methods by the test predictions of trainings of any framework, several seeds each.

    Args:
        predictions: By method, correctness (S, n) of n test samples in S trainings, 0 or 1; with `labels` the predicted
            classes (S, n). The samples are the same in the same order; S may differ.
        baseline: Method that the others are compared with; by default the first.
        group: Group of each test sample (n,), such as its speaker, where samples of a group are alike.
        labels: True class of each test sample (n,); by default `predictions` are correctness.
        subsets: Masks (n,) of the test samples by name; by default only `all`.
        sample_id: Ids of the test samples (n,); by default their positions.
        probabilities: By method, probabilities (S, n, k) of the k classes, for macro-F1, MAP and ECE; `labels` are then
            whole numbers in [0, k). Methods without any have accuracy alone.

    Returns:
        The comparison, without files.

    Raises:
        ConfigError: There are fewer than two methods, the baseline is none of them, or shapes do not agree.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> trained = {"joint": rng.random((5, 900)) < 0.6, "ours": rng.random((5, 900)) < 0.7}
        >>> mmaudit.compare_predictions(trained, baseline="joint").difference("ours", "joint").evidence()
        'helps'
    """
    if len(predictions) < 2:
        raise ConfigError(f"{len(predictions)} method: a comparison needs at least two")
    baseline = next(iter(predictions)) if baseline is None else baseline
    if baseline not in predictions:
        raise ConfigError(f"baseline {baseline} is no method; {choices(baseline, predictions)}")
    correct: dict[Condition, Correctness] = {
        ("", method): _correctness(values, labels, method) for method, values in predictions.items()
    }
    n = correct["", baseline].shape[1]
    _check_lengths(correct, n, group=group, sample_id=sample_id)
    masks = {"all": np.ones(n, dtype=bool), **{key: _mask(mask, n, key) for key, mask in (subsets or {}).items()}}
    label, probability = _checked_probabilities(probabilities or {}, correct, labels)
    trainings = [
        {"manifest": "", "method": method, "seed": seed}
        for (_, method), values in correct.items()
        for seed in range(len(values))
    ]
    return build_comparison(
        correct,
        name="predictions",
        baseline=baseline,
        subsets=masks,
        group=None if group is None else [str(value) for value in group],
        trainings=trainings,
        sample_id=np.arange(n) if sample_id is None else list(sample_id),
        label=label,
        probabilities=probability,
    )


def _correctness(values: ArrayLike, labels: ArrayLike | None, method: str) -> Correctness:
    array = np.asarray(values)
    if array.ndim != 2 or not array.size:
        raise ConfigError(f"{method} has the shape {array.shape}: predictions are (seeds, test samples)")
    if labels is None:
        return array.astype(np.float64)
    if np.shape(labels) != array.shape[1:]:
        raise ConfigError(f"{method} has {array.shape[1]} test samples, and labels have the shape {np.shape(labels)}")
    is_correct: Mask = array == np.asarray(labels)
    return is_correct.astype(np.float64)


def _checked_probabilities(
    probabilities: Mapping[str, ArrayLike], correct: Mapping[Condition, Correctness], labels: ArrayLike | None
) -> tuple[NDArray[np.int64] | None, dict[Condition, Probabilities]]:
    """Return labels and probabilities by condition; ConfigError where they do not fit the predictions."""
    if not probabilities:
        return None, {}
    checked: dict[Condition, Probabilities] = {}
    for method, values in probabilities.items():
        if ("", method) not in correct:
            names = [name for _, name in correct]
            raise ConfigError(f"probabilities of {method}, which has no predictions; {choices(method, names)}")
        array = np.asarray(values, dtype=np.float32)
        if array.ndim != 3 or array.shape[:2] != correct["", method].shape:
            expected = ", ".join(map(str, correct["", method].shape))
            raise ConfigError(f"probabilities of {method} have the shape {array.shape}, not ({expected}, classes)")
        if not ((array >= 0) & (array <= 1)).all():
            raise ConfigError(f"probabilities of {method} have values outside [0, 1]")
        checked["", method] = array
    if labels is None:
        raise ConfigError("probabilities need labels: pass the true class of each test sample")
    label, num_classes = np.asarray(labels), min(array.shape[2] for array in checked.values())
    if label.dtype.kind not in "iu" or label.min() < 0 or label.max() >= num_classes:
        raise ConfigError(f"labels are not whole numbers in [0, {num_classes}), the classes of the probabilities")
    return label.astype(np.int64), checked


def _check_lengths(correct: Mapping[Condition, Correctness], n: int, **values: Sequence[object] | None) -> None:
    """Raise ConfigError for methods, groups or ids of another number of test samples."""
    for (_, method), array in correct.items():
        if array.shape[1] != n:
            raise ConfigError(f"{method} has {array.shape[1]} test samples, the baseline {n}: pass the same samples")
    for name, column in values.items():
        if column is not None and len(column) != n:
            raise ConfigError(f"{name} has {len(column)} values for {n} test samples")


def _mask(mask: ArrayLike, n: int, name: str) -> Mask:
    array: Mask = np.asarray(mask)
    if array.shape != (n,) or array.dtype != bool:
        raise ConfigError(f"subset {name} is no mask of {n} test samples")
    return array
