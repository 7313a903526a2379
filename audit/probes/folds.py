"""Folds: samples or groups, assigned by hashes and stratified by class."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ScoreError
from ..hashing import hash_rank
from ..row_arrays import gather, scatter, slices, sorted_pieces, stable_order, true_rows

KEY_PURPOSE = "strength rows"  # of the hash of ids by which subsamples are drawn


def fold_purposes(repeat: int) -> tuple[str, str]:
    """Return the purposes of the hashes that place samples into the folds of a repeat, and into its inner folds."""
    return f"fold {repeat}", f"inner fold {repeat}"


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
