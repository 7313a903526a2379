"""Likeness of samples with the same value of a column: a permutation test within classes, by mmaudit's own rules.

n samples, b rows, p projected features, v values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .features.matrix import Inputs, RowIndex
from .findings import is_present
from .hashing import hash_rank
from .near_duplicates import project

ALIKE_ROWS = 2048
MAX_ROWS_OF_VALUE = 64
PERMUTATIONS = 200
NEIGHBOURS = 4  # numbers permuted among each other: near numbers are alike in a quantity, not in an identifier


def likeness(
    inputs: Sequence[tuple[Inputs, NDArray[np.bool_]]],
    column: NDArray[np.object_],
    label: NDArray[np.integer],
    *,
    order: RowIndex,
    seed: int,
) -> float | None:
    """Return the largest z, over the modalities, of how alike samples of the same value are; None if not testable.

    `inputs` are features and the mask (n,) of the samples that have them, `order` (n,) is that of the ids' hashes.

    The statistic is the sum of the cosines of all pairs of samples with the same value, after subtraction of the mean
    of the class; its null distribution permutes the values within the class. Whole values are drawn, by their hash, up
    to 2,048 rows. Values that are numbers are permuted among the four nearest numbers only: ages or durations, of which
    near ones are alike too, are no groups.
    """
    scores = []
    rows = _draw_values(column, order, seed=seed)
    for modality_inputs, modality_present in inputs:
        modality_rows = rows[modality_present[rows]]
        projected = project(modality_inputs, modality_rows, seed=seed)
        if projected is not None:
            scores.append(_likeness_z(projected, column[modality_rows], label[modality_rows], seed=seed))
    known = [score for score in scores if score is not None]
    return max(known, default=None)


def _draw_values(column: NDArray[np.object_], order: RowIndex, *, seed: int) -> RowIndex:
    """Return the rows of values drawn by hash, of each the first MAX_ROWS_OF_VALUE in this order of all rows (n,)."""
    rows = order[is_present(column)[order]]
    names, code, counts = np.unique(column[rows].astype(str), return_inverse=True, return_counts=True)
    order = np.argsort(hash_rank(names.tolist(), seed=seed, purpose="groups"), kind="stable")
    sizes = np.minimum(counts, MAX_ROWS_OF_VALUE)
    drawn = order[np.cumsum(sizes[order]) <= max(ALIKE_ROWS, int(sizes[order[0]]))]
    drawn = drawn[counts[drawn] > 1]
    parts = [rows[code == value][:MAX_ROWS_OF_VALUE] for value in drawn.tolist()]
    return np.concatenate([np.zeros(0, np.intp), *parts])


def _likeness_z(
    features: NDArray[np.float32], values: NDArray[np.object_], label: NDArray[np.integer], *, seed: int
) -> float | None:
    names, code = np.unique(values.astype(str), return_inverse=True)
    _, stratum = np.unique(np.stack([label, _neighbourhoods(names)[code]]), axis=1, return_inverse=True)
    stratum = stratum.ravel()
    _, label_code = np.unique(label, return_inverse=True)
    deviation = features - _means(features, label_code)[label_code]
    deviation /= np.maximum(np.linalg.norm(deviation, axis=1, keepdims=True), 1e-12)
    order = np.argsort(stratum, kind="stable")
    generator = np.random.default_rng(seed)

    starts = np.searchsorted(np.sort(code), np.arange(len(names)))  # a permutation keeps the number of rows by value

    def statistic(codes: NDArray[np.intp]) -> float:
        sums = np.add.reduceat(deviation[np.argsort(codes, kind="stable")], starts, axis=0)
        return float((sums**2).sum())

    null = []
    for _ in range(PERMUTATIONS):
        shuffled = np.empty_like(code)
        shuffled[order] = code[np.lexsort((generator.random(len(code)), stratum))]
        null.append(statistic(shuffled))
    spread = float(np.std(null, ddof=1))
    return (statistic(code) - float(np.mean(null))) / spread if spread > 1e-9 * abs(np.mean(null)) else None


def _neighbourhoods(names: NDArray[np.str_]) -> NDArray[np.intp]:
    """Return the number of the neighbourhood of each value (v,): blocks of NEIGHBOURS by size if all are numbers."""
    try:
        numbers = names.astype(np.float64)
    except ValueError:
        return np.zeros(len(names), dtype=np.intp)
    return np.asarray(np.argsort(np.argsort(numbers)) // NEIGHBOURS)


def _means(features: NDArray[np.float32], code: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the mean features (k, p) of each class."""
    sums = np.zeros((code.max() + 1, features.shape[1]))
    np.add.at(sums, code, features)
    return sums / np.bincount(code)[:, None]
