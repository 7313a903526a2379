"""Cross-fitting: folds by group, and the rows that each probe trains on and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import Reason, ScoreError
from ..features.left_out import LeftOut
from ..features.matrix import RowIndex
from ..hashing import hash_rank
from ..row_arrays import count_codes, gather, scatter, slices, smallest_rows, sorted_pieces, stable_order, true_rows
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
    return fold_by_keys(keys, codes, label, fits, num_folds=num_folds).astype(np.int16)


def fold_by_keys(
    keys: NDArray[np.uint64],
    group: NDArray[np.integer[Any]] | None,
    label: NDArray[np.int32],
    fits: NDArray[np.bool_],
    *,
    num_folds: int,
) -> NDArray[np.signedinteger[Any]]:
    """Assign n samples to folds as `assign_folds` does, by the keys (g,) of groups, group (n,), or (n,) of samples.

    Folds are of 8 bits where that is enough.
    """
    if group is None:
        if len(keys) < 2:
            raise ScoreError(f"cross-fitting needs at least 2 usable samples, found {len(keys)}")
        return _assign_samples(keys, label, fits, num_folds=num_folds)
    if len(keys) < 2:
        raise ScoreError("all usable samples are of one group, which a probe cannot train on and score; drop --group")
    # Groups with training rows are placed by those rows only.
    train_rows, other_rows = (_group_sizes(group, mask, len(keys)) for mask in (fits, ~fits))
    trains = train_rows > 0
    if trains.sum() < 2:
        raise ScoreError("all training samples are of one group, which a probe cannot train on and score; drop --group")
    num_folds = min(num_folds, int(trains.sum()))
    fold = np.zeros(len(keys), dtype=_fold_type(num_folds))
    for sizes, rows in ((train_rows, fits), (np.where(trains, 0, other_rows), ~fits)):
        order = _order_of_groups(sizes, keys)
        if len(order):
            _assign_groups(fold, order, group, label, rows, num_folds=num_folds)
    return gather(fold, group)


def _fold_type(num_folds: int) -> type[np.signedinteger[Any]]:
    return np.int8 if num_folds <= np.iinfo(np.int8).max else np.int16


def _group_sizes(group: NDArray[np.integer[Any]], rows: NDArray[np.bool_], num_groups: int) -> NDArray[np.int32]:
    """Count the rows of a mask (n,) in each group (g,)."""
    sizes = np.zeros(num_groups, np.int32)
    for part in slices(len(group)):
        np.add.at(sizes, group[part][rows[part]], 1)
    return sizes


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


def _assign_samples(
    keys: NDArray[np.uint64], label: NDArray[np.int32], fits: NDArray[np.bool_], *, num_folds: int
) -> NDArray[np.signedinteger[Any]]:
    """Assign samples to folds in turn, class by class: a class starts at the fold after the last one of the previous.

    Within a class, training samples come first, and only they count for where the next class starts, so that other
    samples do not change the folds of training samples.
    """
    num_classes = int(label.max()) + 1
    num_training = np.zeros(num_classes, np.int64)
    for part in slices(len(label)):
        num_training += np.bincount(label[part][fits[part]], minlength=num_classes)
    start = np.cumsum(num_training) - num_training
    position = np.stack(
        [start + num_training, start], axis=1
    ).ravel()  # of the next sample, by class and whether it fits
    fold = np.empty(len(label), dtype=_fold_type(num_folds))
    for rows in sorted_pieces(keys):
        cell = 2 * label[rows].astype(np.intp) + fits[rows]
        order = np.argsort(cell, kind="stable")
        counts = np.bincount(cell, minlength=2 * num_classes)
        rank = np.arange(len(rows)) + np.repeat(position - (np.cumsum(counts) - counts), counts)
        fold[rows[order]] = rank % num_folds
        position += counts
    return fold


_CELLS = 1 << 22  # counts of classes in groups at a time


def _order_of_groups(sizes: NDArray[np.int32], keys: NDArray[np.uint64]) -> NDArray[np.integer[Any]]:
    """Return the groups that have rows, the largest first, equal ones by key, then by number."""
    order, small = stable_order(keys), 16  # groups of more rows are few, and sorted at once
    size = np.empty(len(order), np.uint8)
    for part in slices(len(order)):
        size[part] = np.minimum(sizes[order[part]], small + 1)
    large = order[size > small]
    pieces = [large[np.argsort(-sizes[large], kind="stable")]]
    pieces += [order[true_rows(size == number)] for number in range(small, 0, -1)]
    return np.concatenate(pieces)


def _assign_groups(
    fold: NDArray[np.signedinteger[Any]],
    order: NDArray[np.integer[Any]],
    group: NDArray[np.integer[Any]],
    label: NDArray[np.int32],
    rows: NDArray[np.bool_],
    *,
    num_folds: int,
) -> None:
    """Assign groups to folds greedily in this order, so that classes are spread over the folds, into `fold` (g,).

    The rule is that of scikit-learn's StratifiedGroupKFold with the sum of squares as the measure of spread; ties go to
    the fold with the fewest samples. group, label, rows (n,): the samples, and which of them count.
    """
    num_classes = int(label.max()) + 1
    step = max(1, _CELLS // num_classes)
    place = scatter(np.arange(len(order), dtype=np.int32), order, np.full(len(fold), -1, np.int32))
    total = np.zeros(num_classes, np.int64)
    for part in slices(len(group)):
        inside = rows[part] & (place[group[part]] >= 0)
        total += np.bincount(label[part][inside], minlength=num_classes)
    weight = (1.0 / np.maximum(total.astype(np.float64), 1)) ** 2
    weights = weight.tolist()
    fold_counts, fold_sizes = np.zeros((num_folds, num_classes)), [0.0] * num_folds
    for groups in slices(len(order), step):
        counts = np.zeros((groups.stop - groups.start) * num_classes)
        for part in slices(len(group)):
            own = place[group[part]]
            inside = rows[part] & (own >= groups.start) & (own < groups.stop)
            cells = (own[inside].astype(np.int64) - groups.start) * num_classes + label[part][inside]
            np.add.at(counts, cells, 1)
        counts = counts.reshape(-1, num_classes)
        main, sizes = counts.argmax(axis=1).tolist(), counts.sum(axis=1).tolist()
        for number, own_counts, code, size in zip(order[groups].tolist(), counts, main, sizes, strict=True):
            # Adding counts c to a fold with counts h raises the sum of squares by 2 h.c + c.c; only 2 h.c depends on h.
            if own_counts[code] == size:  # of one class, as most small groups are: numpy would take 20 times as long
                cost = [count * size * weights[code] for count in fold_counts[:, code].tolist()]
            else:
                cost = (fold_counts * own_counts * weight).sum(axis=1).tolist()
            limit = min(cost) + 1e-12
            best = min((rows_in, index) for index, rows_in in enumerate(fold_sizes) if cost[index] <= limit)[1]
            fold[number] = best
            fold_counts[best] += own_counts
            fold_sizes[best] += size


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

    def ids_of(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.object_]:
        """Return the ids of a few rows."""

    def hash_rows(self, rows: NDArray[np.integer[Any]], *, seed: int, purpose: str) -> NDArray[np.uint64]:
        """Return hash(seed, purpose, id) of some samples (b,)."""

    def hash_groups(self, *, seed: int, purpose: str) -> NDArray[np.uint64]:
        """Return hash(seed, purpose, name) of each group (g,)."""


KEY_PURPOSE = "strength rows"  # of the hash of ids by which subsamples are drawn


def fold_purposes(repeat: int) -> tuple[str, str]:
    """Return the purposes of the hashes that place samples into the folds of a repeat, and into its inner folds."""
    return f"fold {repeat}", f"inner fold {repeat}"


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
