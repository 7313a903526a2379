"""Cross-fitting: folds by group, and the rows that each probe trains on and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..dataset.samples import Samples
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
        if len(sample_id) < 2:
            raise ScoreError(f"cross-fitting needs at least 2 usable samples, found {len(sample_id)}")
        return _assign_samples(hash_rank(sample_id, seed=seed, purpose=purpose), label, fits, num_folds=num_folds)
    names, group_index = np.unique(group.astype(str), return_inverse=True)
    if len(names) < 2:
        raise ScoreError("all usable samples are of one group, which a probe cannot train on and score; drop --group")
    keys = hash_rank(names.tolist(), seed=seed, purpose=purpose)
    fold = np.zeros(len(names), dtype=np.int16)
    # Groups with training rows are placed by those rows only.
    trains = np.isin(np.arange(len(names)), group_index[fits])
    if trains.sum() < 2:
        raise ScoreError("all training samples are of one group, which a probe cannot train on and score; drop --group")
    num_folds = min(num_folds, int(trains.sum()))
    for groups, rows in ((trains, fits), (~trains, ~fits)):
        counts = np.zeros((len(names), int(label.max()) + 1))
        np.add.at(counts, (group_index[rows], label[rows]), 1)
        fold[groups] = _assign_groups(counts[groups], keys[groups], num_folds=num_folds)
    return fold[group_index]


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

    @property
    def num_folds(self) -> int:
        """Number of folds in use."""
        return int(self.fold.max()) + 1


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


def plan_cross_fits(
    samples: Samples, rows: NDArray[np.intp], config: ProbeConfig, *, seed: int
) -> tuple[NDArray[np.intp], list[CrossFit], list[Quarantined]]:
    """Assign the rows to folds in each repeat, and drop classes that lie in a single fold in any of them.

    Returns the remaining rows, one CrossFit per repeat, and the quarantined samples of rare classes. Strata that are
    not classes, as those of a regression, are never dropped.
    """
    left_out: list[Quarantined] = []
    while True:
        cross_fits = [_cross_fit(samples, rows, config, seed=seed, repeat=repeat) for repeat in range(config.repeats)]
        if samples.task != "classification":
            return rows, cross_fits, left_out
        label = samples.label[rows]
        rare = np.logical_or.reduce([in_single_fold(label, cross_fit.fold, cross_fit.fits) for cross_fit in cross_fits])
        if not rare.any():
            return rows, cross_fits, left_out
        left_out += [_quarantine_rare(samples, rows, row) for row in rows[rare]]
        rows = rows[~rare]
        if len(rows) == 0:
            raise ScoreError(f"no class can be cross-fitted; the first of them: {left_out[0].detail}")


def _cross_fit(samples: Samples, rows: NDArray[np.intp], config: ProbeConfig, *, seed: int, repeat: int) -> CrossFit:
    train = samples.split[rows] != "test"
    if not train.any():  # the mixture is never fitted to test samples either
        raise ScoreError("every usable sample is in the test split: no samples to train probes on; pass --split none")
    fits = train | (config.learn_from == "all")
    group = None if samples.group is None else samples.group[rows]
    ids, label = samples.sample_id[rows], samples.label[rows]
    folds = [
        assign_folds(ids, label, group, fits, num_folds=config.folds, seed=seed, purpose=f"{purpose} {repeat}")
        for purpose in ("fold", "inner fold")
    ]
    key = hash_rank(ids, seed=seed, purpose="strength rows")
    return CrossFit(fold=folds[0], inner=folds[1], fits=fits, key=key)


def _quarantine_rare(samples: Samples, rows: NDArray[np.intp], row: int) -> Quarantined:
    class_rows = rows[samples.label[rows] == samples.label[row]]
    detail = f"class {samples.class_names[samples.label[row]]!r} has {len(class_rows)} usable samples"
    if samples.group is not None and len(class_rows):
        detail += f", of {len(set(samples.group[class_rows]))} groups"
    detail += ", all in one fold"
    return Quarantined(sample_id=samples.sample_id[row], reason=Reason.RARE_CLASS, detail=detail)
