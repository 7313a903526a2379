"""Cross-fitting: the rows that each probe trains on, holds out and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import Reason, ScoreError
from ..features.left_out import LeftOut
from ..features.matrix import RowIndex
from ..row_arrays import count_codes, gather, slices, smallest_rows, true_rows
from .config import ProbeConfig
from .folds import KEY_PURPOSE, fold_by_keys, fold_purposes


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossFit:
    """Folds of one repeat of cross-fitting: arrays of shape (n,).

    The probe of fold j trains on the rows with `fits` that are not in fold j, and scores the rows of fold j. `inner` is
    a second assignment of the same rows: a probe holds out its inner fold 0 to choose its l2.
    """

    fold: NDArray[np.signedinteger[Any]]
    inner: NDArray[np.signedinteger[Any]]
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
    fits = cross_fits[0].fits
    if any(cross_fit.fits is not fits for cross_fit in cross_fits):
        fits = np.logical_or.reduce([cross_fit.fits for cross_fit in cross_fits])
    rows = smallest_rows(fits, cross_fits[0].key, max_rows=max_rows)
    rows = rows[np.argsort(cross_fits[0].fold[rows], kind="stable")]
    train_mask, holdout_mask = [], []
    for cross_fit in cross_fits:
        not_in_fold = cross_fit.fold[rows, None] != np.arange(cross_fit.num_folds)
        train_mask.append(not_in_fold & cross_fit.fits[rows, None])
        holdout_mask.append(train_mask[-1] & (cross_fit.inner[rows, None] == 0))
    return FitRows(
        rows=rows, train_mask=np.concatenate(train_mask, axis=1), holdout_mask=np.concatenate(holdout_mask, axis=1)
    )


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

    def ids_of(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.object_]:
        """Return the ids of a few rows."""

    def hash_rows(self, rows: NDArray[np.integer[Any]], *, seed: int, purpose: str) -> NDArray[np.uint64]:
        """Return hash(seed, purpose, id) of some samples (b,)."""

    def hash_groups(self, *, seed: int, purpose: str) -> NDArray[np.uint64]:
        """Return hash(seed, purpose, name) of each group (g,)."""


def plan_cross_fits(
    samples: SampleColumns, rows: NDArray[np.integer[Any]], config: ProbeConfig, *, seed: int, with_keys: bool = True
) -> tuple[NDArray[np.integer[Any]], list[CrossFit], LeftOut]:
    """Assign the rows to folds in each repeat, and drop classes that lie in a single fold in any of them.

    Returns the remaining rows, one CrossFit per repeat, and the quarantined samples of rare classes. Strata that are
    not classes, as those of a regression, are never dropped. with_keys: False leaves the keys zero; see keys_of.
    """
    left_out = LeftOut.of((), ids_of=samples.ids_of)
    while True:
        cross_fits = _cross_fits(samples, rows, config, seed=seed)
        rare = np.zeros(len(rows), dtype=bool)
        if samples.task == "classification":
            label = gather(samples.label, rows)
            for cross_fit in cross_fits:
                rare |= in_single_fold(label, cross_fit.fold, cross_fit.fits)
        if not rare.any():
            key = keys_of(samples, rows, seed=seed) if with_keys else cross_fits[0].key
            return rows, [replace(cross_fit, key=key) for cross_fit in cross_fits], left_out
        left_out = left_out.merge(_quarantine_rare(samples, rows, rare))
        rows = rows[~rare]
        if len(rows) == 0:
            raise ScoreError(f"no class can be cross-fitted; the first of them: {left_out[0].detail}")


def no_keys(num_rows: int) -> NDArray[np.uint64]:
    """Return keys that are zero, without memory, of a CrossFit that nothing is fitted with."""
    return np.broadcast_to(np.uint64(0), num_rows)


def keys_of(samples: SampleColumns, rows: NDArray[np.integer[Any]], *, seed: int) -> NDArray[np.uint64]:
    """Return the keys of a CrossFit of these rows."""
    return samples.hash_rows(rows, seed=seed, purpose=KEY_PURPOSE)


def _cross_fits(
    samples: SampleColumns, rows: NDArray[np.integer[Any]], config: ProbeConfig, *, seed: int
) -> list[CrossFit]:
    fits = ~gather(samples.is_test, rows)
    if not fits.any():  # the mixture is never fitted to test samples either
        raise ScoreError("every usable sample is in the test split: no samples to train probes on; pass --split none")
    fits |= config.learn_from == "all"
    label, codes = gather(samples.label, rows), samples.group_codes
    groups, group = (None, None) if codes is None else _renumber(codes, rows)

    def assign(purpose: str) -> NDArray[np.signedinteger[Any]]:
        if groups is None:
            keys = samples.hash_rows(rows, seed=seed, purpose=purpose)
        else:
            keys = samples.hash_groups(seed=seed, purpose=purpose)
            keys = gather(keys, groups, out=keys[: len(groups)])  # groups are ascending
        return fold_by_keys(keys, group, label, fits, num_folds=config.folds)

    folds = [[assign(purpose) for purpose in fold_purposes(repeat)] for repeat in range(config.repeats)]
    return [CrossFit(fold=fold, inner=inner, fits=fits, key=no_keys(len(rows))) for fold, inner in folds]


def _renumber(
    codes: NDArray[np.integer[Any]], rows: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.integer[Any]], NDArray[np.int32]]:
    """Return the codes that occur in some rows, ascending, and the index in them of each row's: np.unique."""
    occurs = np.zeros(int(codes.max(initial=0)) + 1, bool)
    for part in slices(len(rows)):
        occurs[codes[rows[part]]] = True
    number = np.empty(len(occurs), np.int32)
    start = -1
    for part in slices(len(occurs)):
        number[part] = start + np.cumsum(occurs[part])
        start = int(number[part][-1])
    group = np.empty(len(rows), np.int32)
    for part in slices(len(rows)):
        group[part] = number[codes[rows[part]]]
    return true_rows(occurs), group


def _quarantine_rare(samples: SampleColumns, rows: NDArray[np.integer[Any]], rare: NDArray[np.bool_]) -> LeftOut:
    codes = samples.group_codes
    rare_rows = rows[rare]
    label = gather(samples.label, rare_rows)
    sizes = count_codes(label, int(label.max()) + 1)
    details = []
    for number in np.flatnonzero(sizes).tolist():
        detail = f"class {samples.class_names[number]!r} has {sizes[number]} usable samples"
        if codes is not None:
            detail += f", of {len(np.unique(gather(codes, rare_rows[label == number])))} groups"
        details.append(f"{detail}, all in one fold")
    text = (np.cumsum(sizes > 0) - 1)[label].astype(np.int32)
    return LeftOut.alike(rare_rows, Reason.RARE_CLASS, text=text, texts=details, ids_of=samples.ids_of)


def in_single_fold(
    label: NDArray[np.int32], fold: NDArray[np.integer[Any]], fits: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return for each sample, (n,) bool, whether its class cannot be cross-fitted.

    That is a class whose training samples (`fits`) lie in fewer than two folds: some probe would score a class that is
    not in its training data.
    """
    has_samples = np.zeros((int(label.max()) + 1, int(fold.max()) + 1), dtype=bool)
    for part in slices(len(label)):
        has_samples[label[part][fits[part]], fold[part][fits[part]]] = True
    return gather(has_samples.sum(axis=1) < 2, label)
