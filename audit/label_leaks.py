"""Features that know the labels: accuracies of the same out-of-fold predictions on train rows and on test rows.

A probe of shuffled labels cannot see either leak, since the features were made before the labels are shuffled. The
thresholds are mmaudit's own. n samples, m modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .metrics import Groups, group_codes
from .scores.table import ScoreTable

# Ours: of features fitted on the training labels z was 14.4 and 12.3, of 26 honest sets at most 3.0.
FITTED_Z = 4.0
HOLDS_LABEL = 0.995  # ours: accuracy from which a column of numbers or text may hold the label itself
ERROR_RATIO = 0.25  # ours: of the error of the most common class, above which a high accuracy says nothing
_KINDS = ("features", "text")  # a label inside a picture or a sound is no column


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelLeak:
    """One modality whose features seem to know the labels.

    `what`: "fitted on labels", with `value` on train rows and `test` on test rows, both in [0, 1], and `z`, the
    standard score of their difference; or "holds labels", with `value` on all rows, and None for the others.
    """

    what: str
    modality: str
    value: float
    test: float | None
    z: float | None
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakColumns:
    """Columns of n samples that leaks are found in, of which those of a modality are read when they are needed.

    label (n,): class of each sample. train, test: masks (n,) of two splits; None without splits. groups: index of each
    sample's group (n,), or None. values: returns `correct` (n,), 0 or 1, of a modality of classes, else its confidence,
    NaN where the modality is missing. is_class: whether they are `correct`.
    """

    modalities: tuple[str, ...]
    is_class: bool
    label: NDArray[np.int32]
    train: NDArray[np.bool_] | None
    test: NDArray[np.bool_] | None
    groups: Groups
    values: Callable[[int], NDArray[np.float64]]

    @classmethod
    def of(cls, scores: ScoreTable) -> LeakColumns:
        """Build the columns of a score table."""
        prediction, split = scores.prediction, scores.split
        is_class = prediction is not None and np.issubdtype(prediction.dtype, np.integer)

        def values(index: int) -> NDArray[np.float64]:
            confidence = scores.confidence[:, index].astype(np.float64)
            if prediction is None or not is_class:
                return confidence
            return np.where(np.isnan(confidence), np.nan, prediction[:, index] == scores.label)

        return cls(
            modalities=scores.modalities,
            is_class=bool(is_class),
            label=scores.label,
            train=None if split is None else split == "train",
            test=None if split is None else split == "test",
            groups=group_codes(scores.group),
            values=values,
        )


def find_label_leaks(columns: LeakColumns, *, kinds: Mapping[str, str]) -> list[LabelLeak]:
    """Find the modalities whose features seem to be fitted on the training labels, or to hold the label.

    Classification is judged by accuracy; other tasks, whose table has no predicted class, by the mean confidence, and
    for the first kind only.

    Args:
        columns: Columns of the scores of n samples in m modalities.
        kinds: Kind of each modality by name, such as audio or features.

    Returns:
        The leaks, those of each modality in the order of the table.
    """
    leaks = []
    for index, name in enumerate(columns.modalities):
        values = columns.values(index)
        present = ~np.isnan(values)
        leaks += _fitted_on_labels(columns, values, present, name=name)
        if columns.is_class and kinds.get(name) in _KINDS:
            leaks += _holds_labels(values[present], columns.label[present], name=name)
    return leaks


def _fitted_on_labels(
    columns: LeakColumns, values: NDArray[np.float64], present: NDArray[np.bool_], *, name: str
) -> list[LabelLeak]:
    if columns.train is None or columns.test is None:
        return []
    train, test = present & columns.train, present & columns.test
    if min(train.sum(), test.sum()) < 2:
        return []
    on_train, on_test = float(values[train].mean()), float(values[test].mean())
    error = standard_error_of_difference(values, train, test, columns.groups)
    z = (on_train - on_test) / error if error > 0 else 0.0
    if z <= FITTED_Z:
        return []
    measure = "accuracy" if columns.is_class else "confidence"
    message = (
        f"{name}: the out-of-fold {measure} is {on_train:.3f} on train rows and {on_test:.3f} on test rows "
        f"(z = {z:.1f}): its features look fitted on the training labels, or the test rows come from elsewhere; "
        "compute the features without labels, and name speakers, scenes or sources with --group"
    )
    return [LabelLeak(what="fitted on labels", modality=name, value=on_train, test=on_test, z=z, message=message)]


def standard_error_of_difference(
    values: NDArray[np.float64], first: NDArray[np.bool_], second: NDArray[np.bool_], groups: Groups
) -> float:
    """Compute the standard error of the mean of values (n,) over one mask minus that over another.

    Samples of a group depend on each other: its error is that of the delete-one-group jackknife, sqrt((g - 1) / g *
    sum (t_i - mean t)^2) over the g groups. Without groups, and where the groups are too few to leave one out, the
    samples count as independent.
    """
    independent = float(np.sqrt(values[first].var(ddof=1) / first.sum() + values[second].var(ddof=1) / second.sum()))
    if groups is None:
        return independent
    sums = [np.bincount(groups[mask], weights=values[mask], minlength=groups.max() + 1) for mask in (first, second)]
    counts = [np.bincount(groups[mask], minlength=groups.max() + 1) for mask in (first, second)]
    left = [count.sum() - count for count in counts]
    used = (counts[0] + counts[1] > 0) & (left[0] > 0) & (left[1] > 0)
    if used.sum() < 2:
        return independent
    means = [(total.sum() - total)[used] / rest[used] for total, rest in zip(sums, left, strict=True)]
    difference = means[0] - means[1]
    size = len(difference)
    return max(independent, float(np.sqrt((size - 1) / size * ((difference - difference.mean()) ** 2).sum())))


def _holds_labels(values: NDArray[np.float64], label: NDArray[np.int32], *, name: str) -> list[LabelLeak]:
    accuracy, chance = float(values.mean()), float(np.unique(label, return_counts=True)[1].max() / len(label))
    if accuracy < HOLDS_LABEL or 1 - accuracy > ERROR_RATIO * (1 - chance):
        return []
    message = (
        f"{name}: the out-of-fold accuracy is {accuracy:.3f}: a column or feature may hold the label, as an id that "
        "names the class does; look at what it is made of"
    )
    return [LabelLeak(what="holds labels", modality=name, value=accuracy, test=None, z=None, message=message)]
