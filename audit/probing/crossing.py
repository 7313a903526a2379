"""Crossings: which probe has never seen a row, and on which rows may it learn and choose?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..encoding.matrix import Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
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
class Lesson:
    """The rows (s,) that all probes together learn from; of them, what each of p probes may see: learn, aside (s, p).

    Probes are numbered by round, and in a round by fold. `aside` are the rows of `learn` that a probe chooses by.
    """

    rows: Rows
    learn: NDArray[np.bool_]
    aside: NDArray[np.bool_]

    @property
    def can_choose(self) -> bool:
        """Tell whether every probe has rows to try on and rows to try with."""
        return bool((self.aside.any(axis=0) & (self.learn & ~self.aside).any(axis=0)).all())

    def take(self, places: Rows) -> Lesson:
        """Give the lesson of some of the rows."""
        return Lesson(rows=self.rows[places], learn=self.learn[places], aside=self.aside[places])


def set_lesson(crossings: Sequence[Crossing], *, most_rows: int) -> Lesson:
    """Take the rows that any probe may learn from, or the first `most_rows` of them by key.

    They come fold by fold of the first round: what one of its probes must not see is then skipped as a whole.
    """
    fits = np.logical_or.reduce([crossing.fits for crossing in crossings])
    rows = first_rows(np.flatnonzero(fits), crossings[0].key, most=most_rows)
    rows = rows[np.argsort(crossings[0].fold[rows], kind="stable")]
    learn, aside = [], []
    for crossing in crossings:
        others = crossing.fold[rows, None] != np.arange(crossing.num_folds)
        learn.append(others & crossing.fits[rows, None])
        aside.append(learn[-1] & (crossing.inner[rows, None] == 0))
    return Lesson(rows=rows, learn=np.concatenate(learn, axis=1), aside=np.concatenate(aside, axis=1))


def first_rows(rows: Rows, key: NDArray[np.uint64], *, most: int) -> Rows:
    """Give the first `most` of these rows by key, in their own order."""
    return rows if len(rows) <= most else np.sort(rows[np.argsort(key[rows], kind="stable")[:most]])


def ask_own(crossings: Sequence[Crossing], rows: Rows, ask: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Ask of each row, in each round, the probe that never saw it: (r, b, k).

    `ask` gives the logits (c, k) of a probe, by number, for some of the rows, given by their places (c,).
    """
    out: Tensor | None = None
    first = 0
    for index, crossing in enumerate(crossings):
        fold = crossing.fold[rows]
        order = torch.from_numpy(np.argsort(fold, kind="stable"))
        ends = np.cumsum(np.bincount(fold, minlength=crossing.num_folds))
        for probe, places in enumerate(torch.tensor_split(order, torch.from_numpy(ends[:-1])), start=first):
            logits = ask(probe, places)
            if out is None:
                out = logits.new_empty(len(crossings), len(rows), logits.shape[1])
            out[index, places.to(out.device)] = logits
        first += crossing.num_folds
    assert out is not None
    return out
