"""Cross-fitting: folds by group, and the rows that each probe trains on and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import Quarantined, Reason, ScoreError
from ..features.matrix import RowIndex
from ..hashing import hash_rank
from .config import ProbeConfig


def assign_folds(
    sample_id: NDArray[np.object_],
    label: NDArray[np.int32],
    group: NDArray[np.object_] | None,
    fits: NDArray[np.bool_],
    *,
    num_folds: int,
    seed: int,
    purpose: str = "fold",
) -> NDArray[np.int16]:
    """Assign n samples to folds by hash(seed, group or id), stratified by class. Shape (n,), in [0, f).

    `fits` (n,) marks the samples that probes may train on, which are spread evenly over the folds by themselves. All
    samples of a group are in one fold; with fewer groups than `num_folds` there is one fold per group. `purpose`
    separates several assignments of the same seed. Raises ScoreError for fewer than two groups or samples.
    """
    if group is None:
        keys, codes = hash_rank(sample_id, seed=seed, purpose=purpose), None
    else:
        names, codes = np.unique(group.astype(str), return_inverse=True)
        keys = hash_rank(names.tolist(), seed=seed, purpose=purpose)
    return fold_by_keys(keys, codes, label, fits, num_folds=num_folds)


def fold_by_keys(
    keys: NDArray[np.uint64],
    group: NDArray[np.intp] | None,
    label: NDArray[np.int32],
    fits: NDArray[np.bool_],
    *,
    num_folds: int,
) -> NDArray[np.int16]:
    """Assign n samples to folds as `assign_folds` does, by the keys (g,) of groups, group (n,), or (n,) of samples."""
    if group is None:
        if len(keys) < 2:
            raise ScoreError(f"cross-fitting needs at least 2 usable samples, found {len(keys)}")
        return _assign_samples(keys, label, fits, num_folds=num_folds)
    if len(keys) < 2:
        raise ScoreError("all usable samples are of one group, which a probe cannot train on and score; drop --group")
    fold = np.zeros(len(keys), dtype=np.int16)
    # Groups with training rows are placed by those rows only.
    trains = np.bincount(group[fits], minlength=len(keys)) > 0
    if trains.sum() < 2:
        raise ScoreError("all training samples are of one group, which a probe cannot train on and score; drop --group")
    num_folds, num_classes = min(num_folds, int(trains.sum())), int(label.max()) + 1
    for groups, rows in ((trains, fits), (~trains, ~fits)):
        cells = group[rows].astype(np.int64) * num_classes + label[rows]
        counts = np.bincount(cells, minlength=len(keys) * num_classes).reshape(-1, num_classes).astype(np.float64)
        fold[groups] = _assign_groups(counts[groups], keys[groups], num_folds=num_folds)
    return fold[group]


def in_single_fold(label: NDArray[np.int32], fold: NDArray[np.int16], fits: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return for each sample, (n,) bool, whether its class cannot be cross-fitted.

    That is a class whose training samples (`fits`) lie in fewer than two folds: some probe would score a class that is
    not in its training data.
    """
    has_samples = np.zeros((int(label.max()) + 1, int(fold.max()) + 1), dtype=bool)
    has_samples[label[fits], fold[fits]] = True
    return np.asarray((has_samples.sum(axis=1) < 2)[label])


def _assign_samples(
    keys: NDArray[np.uint64], label: NDArray[np.int32], fits: NDArray[np.bool_], *, num_folds: int
) -> NDArray[np.int16]:
    """Assign samples to folds in turn, class by class: a class starts at the fold after the last one of the previous.

    Within a class, training samples come first, and only they count for where the next class starts, so that other
    samples do not change the folds of training samples.
    """
    order = np.lexsort((keys, ~fits, label))
    size, num_training = np.bincount(label), np.bincount(label[fits], minlength=int(label.max()) + 1)
    position = np.arange(len(label)) - (np.cumsum(size) - size)[label[order]]
    fold = np.empty(len(label), dtype=np.int16)
    fold[order] = ((np.cumsum(num_training) - num_training)[label[order]] + position) % num_folds
    return fold


def _assign_groups(counts: NDArray[np.float64], keys: NDArray[np.uint64], *, num_folds: int) -> NDArray[np.int16]:
    """Assign groups to folds greedily, largest first and ties by key, so that classes are spread evenly over the folds.

    `counts` (g, k) are samples by group and class. The rule is that of scikit-learn's StratifiedGroupKFold with the sum
    of squares as the measure of spread; ties go to the fold with the fewest samples.
    """
    order = np.lexsort((keys, -counts.sum(axis=1)))
    share = 1.0 / np.maximum(counts.sum(axis=0), 1)
    fold_counts = np.zeros((num_folds, counts.shape[1]))
    fold = np.empty(len(counts), dtype=np.int16)
    for group in order:
        # Adding counts c to a fold with counts h raises the sum of squares by 2 h.c + c.c; only 2 h.c depends on h.
        cost = (fold_counts * counts[group] * share**2).sum(axis=1)
        best = np.flatnonzero(cost <= cost.min() + 1e-12)
        fold[group] = best[np.argmin(fold_counts[best].sum(axis=1))]
        fold_counts[fold[group]] += counts[group]
    return fold


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossFit:
    """Folds of one repeat of cross-fitting: arrays of shape (n,).

    The probe of fold j trains on the rows with `fits` that are not in fold j, and scores the rows of fold j. `inner` is
    a second assignment of the same rows: a probe holds out its inner fold 0 to choose its l2.
    """

    fold: NDArray[np.int16]
    inner: NDArray[np.int16]
    fits: NDArray[np.bool_]
    key: NDArray[np.uint64]  # hash of the id: subsamples are the rows with the smallest keys

    num_folds: int = 0  # in use; 0: counted

    def __post_init__(self) -> None:
        if not self.num_folds:
            object.__setattr__(self, "num_folds", int(self.fold.max()) + 1)

    def take(self, samples: RowIndex) -> CrossFit:
        """Return the folds of a part of the samples (b,)."""
        return CrossFit(
            fold=self.fold[samples],
            inner=self.inner[samples],
            fits=self.fits[samples],
            key=self.key[samples],
            num_folds=self.num_folds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRows:
    """Rows (s,) that any probe trains on, and masks (s, p) of the rows that each of p probes trains on and holds out.

    Probes are numbered by repeat, and within a repeat by fold. `holdout_mask` is the part of `train_mask` that a probe
    makes its choices on.
    """

    rows: RowIndex
    train_mask: NDArray[np.bool_]
    holdout_mask: NDArray[np.bool_]

    @property
    def can_choose(self) -> bool:
        """Whether every probe has held-out rows and rows that remain to train on."""
        return bool((self.holdout_mask.any(axis=0) & (self.train_mask & ~self.holdout_mask).any(axis=0)).all())

    def take(self, positions: RowIndex) -> FitRows:
        """Return the masks of a subset of the rows."""
        return FitRows(
            rows=self.rows[positions], train_mask=self.train_mask[positions], holdout_mask=self.holdout_mask[positions]
        )


def gather_fit_rows(cross_fits: Sequence[CrossFit], *, max_rows: int) -> FitRows:
    """Collect the rows that any probe trains on, or the first `max_rows` of them by key.

    They are sorted by fold of the first repeat, so that the rows that one of its probes does not use are contiguous.
    """
    fits = np.logical_or.reduce([cross_fit.fits for cross_fit in cross_fits])
    rows = first_rows(np.flatnonzero(fits), cross_fits[0].key, max_rows=max_rows)
    rows = rows[np.argsort(cross_fits[0].fold[rows], kind="stable")]
    train_mask, holdout_mask = [], []
    for cross_fit in cross_fits:
        not_in_fold = cross_fit.fold[rows, None] != np.arange(cross_fit.num_folds)
        train_mask.append(not_in_fold & cross_fit.fits[rows, None])
        holdout_mask.append(train_mask[-1] & (cross_fit.inner[rows, None] == 0))
    return FitRows(
        rows=rows, train_mask=np.concatenate(train_mask, axis=1), holdout_mask=np.concatenate(holdout_mask, axis=1)
    )


def first_rows(rows: RowIndex, key: NDArray[np.uint64], *, max_rows: int) -> RowIndex:
    """Return the `max_rows` of these rows with the smallest keys, in their original order."""
    return rows if len(rows) <= max_rows else np.sort(rows[np.argsort(key[rows], kind="stable")[:max_rows]])


def predict_out_of_fold(
    cross_fits: Sequence[CrossFit], rows: RowIndex, predict: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Predict each row, in each repeat, with the probe that did not train on it: (r, b, k).

    `predict` returns the logits (c, k) of a probe, by number, for the rows at the given positions (c,).
    """
    out: Tensor | None = None
    first = 0
    for index, cross_fit in enumerate(cross_fits):
        fold = cross_fit.fold[rows]
        order = torch.from_numpy(np.argsort(fold, kind="stable"))
        ends = np.cumsum(np.bincount(fold, minlength=cross_fit.num_folds))
        for probe, positions in enumerate(torch.tensor_split(order, torch.from_numpy(ends[:-1])), start=first):
            logits = predict(probe, positions)
            if out is None:
                out = logits.new_empty(len(cross_fits), len(rows), logits.shape[1])
            out[index, positions.to(out.device)] = logits
        first += cross_fit.num_folds
    assert out is not None
    return out


class SampleColumns(Protocol):
    """What cross-fitting needs of the samples of a dataset, in dataset order: Samples, or columns of a large one."""

    @property
    def task(self) -> str:
        """classification, multilabel or regression."""

    @property
    def label(self) -> NDArray[np.int32]:
        """Class or stratum of each sample (n,)."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes or strata."""

    @property
    def is_test(self) -> NDArray[np.bool_]:
        """Mask (n,) of the test split."""

    @property
    def group_codes(self) -> NDArray[np.integer[Any]] | None:
        """Index of each sample's group (n,); None without groups."""

    def ids_of(self, rows: RowIndex) -> NDArray[np.object_]:
        """Return the ids of a few rows."""

    def hash_ids(self, *, seed: int, purpose: str) -> NDArray[np.uint64]:
        """Return hash(seed, purpose, id) of each sample (n,)."""

    def hash_groups(self, *, seed: int, purpose: str) -> NDArray[np.uint64]:
        """Return hash(seed, purpose, name) of each group (g,)."""


KEY_PURPOSE = "strength rows"  # of the hash of ids by which subsamples are drawn


def fold_purposes(repeat: int) -> tuple[str, str]:
    """Return the purposes of the hashes that place samples into the folds of a repeat, and into its inner folds."""
    return f"fold {repeat}", f"inner fold {repeat}"


def plan_cross_fits(
    samples: SampleColumns, rows: NDArray[np.intp], config: ProbeConfig, *, seed: int
) -> tuple[NDArray[np.intp], list[CrossFit], list[Quarantined]]:
    """Assign the rows to folds in each repeat, and drop classes that lie in a single fold in any of them.

    Returns the remaining rows, one CrossFit per repeat, and the quarantined samples of rare classes. Strata that are
    not classes, as those of a regression, are never dropped.
    """
    left_out: list[Quarantined] = []
    while True:
        cross_fits = _cross_fits(samples, rows, config, seed=seed)
        if samples.task != "classification":
            return rows, cross_fits, left_out
        label = samples.label[rows]
        rare = np.zeros(len(rows), dtype=bool)
        for cross_fit in cross_fits:
            rare |= in_single_fold(label, cross_fit.fold, cross_fit.fits)
        if not rare.any():
            return rows, cross_fits, left_out
        left_out += _quarantine_rare(samples, rows, rare)
        rows = rows[~rare]
        if len(rows) == 0:
            raise ScoreError(f"no class can be cross-fitted; the first of them: {left_out[0].detail}")


def _cross_fits(samples: SampleColumns, rows: NDArray[np.intp], config: ProbeConfig, *, seed: int) -> list[CrossFit]:
    train = ~samples.is_test[rows]
    if not train.any():  # the mixture is never fitted to test samples either
        raise ScoreError("every usable sample is in the test split: no samples to train probes on; pass --split none")
    fits = train | (config.learn_from == "all")
    label, key = samples.label[rows], samples.hash_ids(seed=seed, purpose=KEY_PURPOSE)[rows]
    codes = samples.group_codes
    groups, group = (None, None) if codes is None else np.unique(codes[rows], return_inverse=True)

    def assign(purpose: str) -> NDArray[np.int16]:
        if groups is None:
            keys = samples.hash_ids(seed=seed, purpose=purpose)[rows]
        else:
            keys = samples.hash_groups(seed=seed, purpose=purpose)[groups]
        return fold_by_keys(keys, group, label, fits, num_folds=config.folds)

    folds = [[assign(purpose) for purpose in fold_purposes(repeat)] for repeat in range(config.repeats)]
    return [CrossFit(fold=fold, inner=inner, fits=fits, key=key) for fold, inner in folds]


def _quarantine_rare(samples: SampleColumns, rows: NDArray[np.intp], rare: NDArray[np.bool_]) -> list[Quarantined]:
    label, codes = samples.label[rows], samples.group_codes
    details: dict[int, str] = {}
    for number in np.unique(label[rare]).tolist():
        class_rows = rows[label == number]
        details[number] = f"class {samples.class_names[number]!r} has {len(class_rows)} usable samples"
        if codes is not None:
            details[number] += f", of {len(np.unique(codes[class_rows]))} groups"
        details[number] += ", all in one fold"
    return [
        Quarantined(sample_id=name, reason=Reason.RARE_CLASS, detail=details[number])
        for name, number in zip(samples.ids_of(rows[rare]), label[rare].tolist(), strict=True)
    ]
