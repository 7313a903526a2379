"""Cross-fitting: folds by group, and the rows that each probe trains on and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ScoreError
from ..features.matrix import Rows
from ..hashing import hash_rank


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
    """Deal n samples into folds: a function of hash(seed, group or id), stratified by class. Shape (n,), in [0, f).

    `fits` (n,) are the samples that probes may learn from; they are dealt evenly among themselves. With groups, a whole
    group is in one fold; there are as many folds as groups where there are fewer groups. `purpose` tells one deal from
    another of the same seed.
    Raises ScoreError for fewer than two groups or samples.
    """
    if group is None:
        if len(sample_id) < 2:
            raise ScoreError(
                f"{len(sample_id)} usable samples cannot be cross-fitted: a probe needs others to learn from"
            )
        return _deal(hash_rank(sample_id, seed=seed, purpose=purpose), label, fits, num_folds=num_folds)
    names, member = np.unique(group.astype(str), return_inverse=True)
    if len(names) < 2:
        raise ScoreError("all usable samples are of one group: a probe must not see the group it scores; drop --group")
    keys = hash_rank(names.tolist(), seed=seed, purpose=purpose)
    fold = np.zeros(len(names), dtype=np.int16)
    # Groups that probes learn from are placed by those rows alone.
    learned = np.isin(np.arange(len(names)), member[fits])
    if learned.sum() < 2:
        raise ScoreError("probes may learn from one group only: they must not see the group they score; drop --group")
    num_folds = min(num_folds, int(learned.sum()))
    for groups, rows in ((learned, fits), (~learned, ~fits)):
        counts = np.zeros((len(names), int(label.max()) + 1))
        np.add.at(counts, (member[rows], label[rows]), 1)
        fold[groups] = _place_groups(counts[groups], keys[groups], num_folds=num_folds)
    return fold[member]


def in_one_fold(label: NDArray[np.int32], fold: NDArray[np.int16], fits: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tell for each sample whether its class cannot be cross-fitted: (n,) bool.

    So it is with a class whose samples that `fits` lie in less than two folds: some probe would score a class it has
    never seen.
    """
    seen = np.zeros((int(label.max()) + 1, int(fold.max()) + 1), dtype=bool)
    seen[label[fits], fold[fits]] = True
    return np.asarray((seen.sum(axis=1) < 2)[label])


def _deal(
    keys: NDArray[np.uint64], label: NDArray[np.int32], fits: NDArray[np.bool_], *, num_folds: int
) -> NDArray[np.int16]:
    """Deal each class in turn, like cards: the next class goes on where the last one stopped.

    Within a class those that probes learn from come first, and they alone count for where it stopped: whoever else is
    there changes nothing among them.
    """
    order = np.lexsort((keys, ~fits, label))
    size, learning = np.bincount(label), np.bincount(label[fits], minlength=int(label.max()) + 1)
    place = np.arange(len(label)) - (np.cumsum(size) - size)[label[order]]
    fold = np.empty(len(label), dtype=np.int16)
    fold[order] = ((np.cumsum(learning) - learning)[label[order]] + place) % num_folds
    return fold


def _place_groups(counts: NDArray[np.float64], keys: NDArray[np.uint64], *, num_folds: int) -> NDArray[np.int16]:
    """Place groups, the largest first and by key among equals, where the classes then lie most evenly over the folds.

    `counts` (g, k) are samples by group and class. A greedy rule, the one of scikit-learn's StratifiedGroupKFold
    with a sum of squares for the spread, and the emptiest fold where that ties.
    """
    order = np.lexsort((keys, -counts.sum(axis=1)))
    share = 1.0 / np.maximum(counts.sum(axis=0), 1)
    held = np.zeros((num_folds, counts.shape[1]))
    fold = np.empty(len(counts), dtype=np.int16)
    for group in order:
        # Adding c to fold f raises the sum of squares by 2 held.c + c.c; only the first part depends on f.
        cost = (held * counts[group] * share**2).sum(axis=1)
        best = np.flatnonzero(cost <= cost.min() + 1e-12)
        fold[group] = best[np.argmin(held[best].sum(axis=1))]
        held[fold[group]] += counts[group]
    return fold


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossFit:
    """Who learns from whom in one round of cross-fitting: arrays of shape (n,).

    The probe of fold j learns from the rows that `fits` and are not in fold j, and scores the rows of fold j.
    `inner` deals the same rows once more, so that each probe can choose its strength on rows it then sets aside.
    """

    fold: NDArray[np.int16]
    inner: NDArray[np.int16]
    fits: NDArray[np.bool_]
    key: NDArray[np.uint64]  # hash of the id: which rows stand for all when there are many

    @property
    def num_folds(self) -> int:
        """Folds that there really are."""
        return int(self.fold.max()) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRows:
    """The rows (s,) that all probes together learn from; of them, what each of p probes may see: learn, aside (s, p).

    Probes are numbered by round, and in a round by fold. `aside` are the rows of `learn` that a probe chooses by.
    """

    rows: Rows
    train_mask: NDArray[np.bool_]
    holdout_mask: NDArray[np.bool_]

    @property
    def can_choose(self) -> bool:
        """Tell whether every probe has rows to try on and rows to try with."""
        return bool((self.holdout_mask.any(axis=0) & (self.train_mask & ~self.holdout_mask).any(axis=0)).all())

    def take(self, places: Rows) -> FitRows:
        """Give the lesson of some of the rows."""
        return FitRows(
            rows=self.rows[places], train_mask=self.train_mask[places], holdout_mask=self.holdout_mask[places]
        )


def gather_fit_rows(cross_fits: Sequence[CrossFit], *, most_rows: int) -> FitRows:
    """Take the rows that any probe may learn from, or the first `most_rows` of them by key.

    They come fold by fold of the first round: what one of its probes must not see is then skipped as a whole.
    """
    fits = np.logical_or.reduce([cross_fit.fits for cross_fit in cross_fits])
    rows = first_rows(np.flatnonzero(fits), cross_fits[0].key, most=most_rows)
    rows = rows[np.argsort(cross_fits[0].fold[rows], kind="stable")]
    train_mask, holdout_mask = [], []
    for cross_fit in cross_fits:
        others = cross_fit.fold[rows, None] != np.arange(cross_fit.num_folds)
        train_mask.append(others & cross_fit.fits[rows, None])
        holdout_mask.append(train_mask[-1] & (cross_fit.inner[rows, None] == 0))
    return FitRows(
        rows=rows, train_mask=np.concatenate(train_mask, axis=1), holdout_mask=np.concatenate(holdout_mask, axis=1)
    )


def first_rows(rows: Rows, key: NDArray[np.uint64], *, most: int) -> Rows:
    """Give the first `most` of these rows by key, in their own order."""
    return rows if len(rows) <= most else np.sort(rows[np.argsort(key[rows], kind="stable")[:most]])


def predict_out_of_fold(cross_fits: Sequence[CrossFit], rows: Rows, ask: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Ask of each row, in each round, the probe that never saw it: (r, b, k).

    `ask` gives the logits (c, k) of a probe, by number, for some of the rows, given by their places (c,).
    """
    out: Tensor | None = None
    first = 0
    for index, cross_fit in enumerate(cross_fits):
        fold = cross_fit.fold[rows]
        order = torch.from_numpy(np.argsort(fold, kind="stable"))
        ends = np.cumsum(np.bincount(fold, minlength=cross_fit.num_folds))
        for probe, places in enumerate(torch.tensor_split(order, torch.from_numpy(ends[:-1])), start=first):
            logits = ask(probe, places)
            if out is None:
                out = logits.new_empty(len(cross_fits), len(rows), logits.shape[1])
            out[index, places.to(out.device)] = logits
        first += cross_fit.num_folds
    assert out is not None
    return out
