"""Units of hashed terms: inverse document frequencies, and one scale for all terms.

Hashed counts must not be standardised one by one: a term that occurs in one text would be as loud as a common one (of
691 tweets the loss was .93, where the prior's is .90, and is .80 with these units). Instead a term is multiplied by its
inverse document frequency, log((1 + n) / (1 + df)) + 1, as in scikit-learn's TF-IDF, and all terms by one number that
makes the mean squared norm of a text MEAN_SQUARE. Both belong to the rows that a probe trains on: they are the
same as a penalty of its weights, see TermUnits.penalty, so that probes with different rows share one sparse matrix.

Terms of a single row stay in: without them, as with scikit-learn's min_df = 2, the loss of the tweets is .819 instead
of .812 (mean of three seeds), that of dialogues and of reviews the same.

Legend: n rows, t terms, p masks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

Floats = NDArray[np.float64]
# Ours: it sets which of the penalties are weak for texts, so that those of thousands and of hundreds of thousands of
# texts lie within the candidates: C of scikit-learn is MEAN_SQUARE / (l2 n).
MEAN_SQUARE = 64.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TermUnits:
    """The terms that probes use (t,), ascending, and the factor of each (t,)."""

    terms: NDArray[np.intp]
    gain: NDArray[np.float32]

    @classmethod
    def of(cls, weights: csr_array, *, max_terms: int) -> TermUnits:
        """Choose the terms that most of these rows have, at most `max_terms`, and compute their factors."""
        terms, frequency = np.unique(weights.indices, return_counts=True)
        chosen = np.sort(np.argsort(-frequency, kind="stable")[:max_terms])
        units = cls(terms=terms[chosen], gain=np.ones(len(chosen), np.float32))
        rows = units.standardise(weights)
        squares = np.asarray(rows.power(2).sum(axis=0), dtype=np.float64)
        num_texts = np.array([float(np.count_nonzero(np.diff(weights.indptr)))])
        gain = _gain(frequency[chosen, None].astype(np.float64), squares[:, None], num_texts)[:, 0]
        return replace(units, gain=gain.astype(np.float32))

    def standardise(self, weights: csr_array) -> csr_array:
        """Return rows (n, t) of the terms in use, multiplied by their factors, of weights of all terms."""
        position = np.minimum(np.searchsorted(self.terms, weights.indices), max(0, len(self.terms) - 1))
        is_used = self.terms[position] == weights.indices if len(self.terms) else np.zeros(len(position), bool)
        ends = np.concatenate([[0], np.cumsum(is_used)])[weights.indptr]
        position = position[is_used]
        values = (weights.data[is_used] * self.gain[position]).astype(np.float32)
        return csr_array((values, position.astype(np.int32), ends), shape=(weights.shape[0], len(self.terms)))

    def penalty(self, rows: csr_array, masks: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Return the factors (p, t) of l2 that give each probe the units of its own rows, those of masks (n, p).

        With weights w of terms x g, where g is the factor of all rows and h that of a probe's own, the penalty of the
        weights w g / h of terms x h is w^2 (g / h)^2.
        """
        used, has_text = masks.astype(np.float32), np.diff(rows.indptr) > 0
        ones = csr_array((np.ones_like(rows.data), rows.indices, rows.indptr), shape=rows.shape)
        frequency = np.asarray(ones.T @ used, dtype=np.float64)
        squares = np.asarray(rows.power(2).T @ used, dtype=np.float64) / np.square(self.gain)[:, None]
        gain = _gain(frequency, squares, (used * has_text[:, None]).sum(axis=0, dtype=np.float64))
        return np.square(self.gain / gain.T).astype(np.float32)


def _gain(frequency: Floats, squares: Floats, num_texts: Floats) -> Floats:
    """Compute the factors (t, p) from document frequencies (t, p), sums of squared weights (t, p) and numbers of texts.

    A probe without any text gets the inverse document frequencies alone.
    """
    inverse = np.log((1 + num_texts) / (1 + frequency)) + 1
    total = (np.square(inverse) * squares).sum(axis=0)
    scale = np.sqrt(MEAN_SQUARE * num_texts / np.where(total > 0, total, 1))
    return np.asarray(inverse * np.where(total > 0, scale, 1))
