"""Contents that recur by chance: short texts, short vectors, and vectors of few different values.

Equal contents of such rows are no sign of a copy. All rules here are mmaudit's own. n samples, d features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .cached_matrix import FeatureMatrix
from .encode import EncodeTask
from .matrix import Inputs, RowIndex, chunks

if TYPE_CHECKING:
    from .encoded_samples import Status

MIN_FEATURES = 8  # ours: of 7,442 clips with vectors of 6 small integers, 340 are equal to another by chance
# Ours: bits by which a row must be less probable than one chance pair in the dataset. The features are taken as
# independent; real ones are not, and 16 bits are the allowance for that.
MARGIN_BITS = 16.0
MAX_REPEATS = 10  # ours: rows per distinct vector above which vectors are categories; five captions share an image
SAMPLE_ROWS = 2048
FEATURE_BLOCK = 64


def recurring_rows(tasks: Sequence[EncodeTask], status: Status) -> NDArray[np.bool_]:
    """Return a mask (n,) of the samples whose content in this modality recurs by chance.

    Only rows whose content occurs more than once are tested, so that without copies nothing is read.
    """
    modality, num_rows = status.modality, len(status.usable)
    if modality.kind == "text":
        return np.ones(num_rows, dtype=bool)
    if modality.kind != "features":
        return np.zeros(num_rows, dtype=bool)
    if (modality.length or 0) < MIN_FEATURES:
        return np.ones(num_rows, dtype=bool)
    rows = np.flatnonzero(status.usable)
    distinct, first, inverse, counts = np.unique(
        status.content[rows], return_index=True, return_inverse=True, return_counts=True
    )
    recurs = np.zeros(num_rows, dtype=bool)
    repeated = np.flatnonzero(counts > 1)
    if not len(repeated):
        return recurs
    if len(distinct) * MAX_REPEATS < len(rows):
        return np.ones(num_rows, dtype=bool)
    inputs = FeatureMatrix.of(tasks, status, np.arange(num_rows))
    # Digests are uniform: the first contents in their order are a sample that does not depend on the rows' order.
    sample = inputs.read(rows[first[:SAMPLE_ROWS]])
    is_common = np.zeros(len(distinct), dtype=bool)
    for batch in chunks(inputs, repeated):
        is_common[batch] = _is_common(inputs, rows[first[batch]], sample, num_rows=len(rows))
    recurs[rows] = is_common[inverse]
    return recurs


def _is_common(inputs: Inputs, rows: RowIndex, sample: NDArray[np.float32], *, num_rows: int) -> NDArray[np.bool_]:
    """Return which vectors (b,) have an equal partner in `num_rows` rows by chance, by the frequencies of each number.

    A vector has sum_j -log2 p_j bits, where p_j is the share of the sample with its number in feature j. Of n rows,
    n^2 / 2 pairs meet by chance: 2 log2(n) bits make one such pair.
    """
    needed = 2 * np.log2(num_rows) + MARGIN_BITS
    vectors = inputs.read(rows)
    bits = np.zeros(len(rows))
    for start in range(0, vectors.shape[1], FEATURE_BLOCK):
        for feature in range(start, min(start + FEATURE_BLOCK, vectors.shape[1])):
            values, numbers = np.sort(sample[:, feature]), vectors[:, feature]
            count = np.searchsorted(values, numbers, side="right") - np.searchsorted(values, numbers)
            bits -= np.log2(np.maximum(count, 1) / len(values))
        if (bits >= needed).all():
            break
    return np.asarray(bits < needed)
