"""Design matrices and targets of probes as tensors, and units of hashed terms.

Hashed counts must not be standardised one by one: a term that occurs in one text would be as loud as a common one (of
691 tweets the loss was .93, where the prior's is .90, and is .82 with these units). Instead a term is multiplied by its
inverse document frequency, log((1 + n) / (1 + df)) + 1, as in scikit-learn's TF-IDF, and all terms by one number that
makes the mean squared norm of a text MEAN_SQUARE. Both belong to the rows that a probe trains on: they are the
same as a penalty of its weights, see TermUnits.penalty, so that probes with different rows share one sparse matrix.

Terms of a single training row are left out, as with scikit-learn's min_df = 2: they are of no use out of fold, but let
a probe fit that row. Of 100,000 drawn texts with a long tail the loss with them is .78, without .73; of 691 tweets .812
and .819, of dialogues and reviews the same.

An l2 chosen on a subset of the classes holds for all of them, since it is a prior of each class's weights. An l2 chosen
on too few rows per class does not: with 5,000 classes of 6 samples, 8,000 rows hold 1.6 rows per class, most held-out
rows are of classes without training rows, and the l2 chosen gives a loss close to chance (8.4 out of fold where
ln 5,000 is 8.5; with an l2 chosen on all rows of 836 classes the loss is 3.0).

Legend: n rows, d features, t terms, p masks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack
from torch import Tensor

from ..dataset.labels import Target
from ..features.matrix import Inputs, Numbers, RowIndex, chunks, read_terms, reading_order
from ..row_arrays import smallest_rows

Floats = NDArray[np.float64]
# Ours: it sets which of the penalties are weak for texts, so that those of thousands and of hundreds of thousands of
# texts lie within the candidates: C of scikit-learn is MEAN_SQUARE / (l2 n).
MEAN_SQUARE = 64.0
MIN_FREQUENCY = 2  # training rows that have a term, fewer leave it out
_LEFT_OUT = 1e6  # factor of the penalty of a term that is left out of a probe, but not of all


@dataclass(frozen=True, slots=True, kw_only=True)
class TermUnits:
    """The terms that probes use (t,), ascending, and the factor of each (t,)."""

    terms: NDArray[np.intp]
    gain: NDArray[np.float32]

    @classmethod
    def of(cls, weights: csr_array, *, max_terms: int) -> TermUnits:
        """Choose the terms that most of these rows have, at most `max_terms`, and compute their factors."""
        terms, frequency = np.unique(weights.indices, return_counts=True)
        num_terms = min(max_terms, int((frequency >= MIN_FREQUENCY).sum()))
        chosen = np.sort(np.argsort(-frequency, kind="stable")[:num_terms])
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
        gain = _gain(frequency, squares, (used * has_text[:, None]).sum(axis=0, dtype=np.float64)).T
        ratio = np.divide(self.gain, gain, out=np.full_like(gain, np.sqrt(_LEFT_OUT)), where=gain > 0)
        return np.square(ratio).astype(np.float32)


def _gain(frequency: Floats, squares: Floats, num_texts: Floats) -> Floats:
    """Compute the factors (t, p) from document frequencies (t, p), sums of squared weights (t, p) and numbers of texts.

    Those of terms that are left out are 0.
    """
    inverse = np.where(frequency >= MIN_FREQUENCY, np.log((1 + num_texts) / (1 + frequency)) + 1, 0)
    total = (np.square(inverse) * squares).sum(axis=0)
    scale = np.sqrt(MEAN_SQUARE * num_texts / np.where(total > 0, total, 1))
    return np.asarray(inverse * scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchTarget:
    """The target of some rows as a tensor: label (n,) or values (n, k); those of a regression are standardised."""

    values: Tensor
    task: str
    num_outputs: int
    centre: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, target: Target, rows: RowIndex, like: Tensor) -> TorchTarget:
        """Build the target of rows, standardised for a regression, so that a fit does not depend on its units."""
        if target.values is None:
            values = torch.from_numpy(target.label[rows].astype(np.int64)).to(like.device)
            return cls(values=values, task=target.task, num_outputs=target.num_outputs)
        values = torch.from_numpy(np.array(target.values[rows])).to(like)
        if target.task != "regression":
            return cls(values=values, task=target.task, num_outputs=target.num_outputs)
        centre, scale = float(values.mean()), float(values.std(correction=0)) or 1.0
        values = (values - centre) / scale
        return cls(values=values, task=target.task, num_outputs=target.num_outputs, centre=centre, scale=scale)


MAX_LOGITS = 1 << 22  # rows times outputs: 8,000 rows of up to 524 outputs are used in full


def choose_outputs(
    label: NDArray[Any],
    key: NDArray[np.uint64],
    *,
    task: str,
    num_outputs: int,
    max_rows: int,
    mask: NDArray[np.bool_] | None = None,
) -> tuple[RowIndex, NDArray[np.intp]]:
    """Choose rows (c,) of n, or of those of a mask (n,), and outputs, both ascending, of about MAX_LOGITS pairs.

    Where `max_rows` rows of all outputs stay within that, these are the first rows by key (n,), and all outputs.
    Otherwise evenly spaced outputs are chosen. Of a multilabel target every row counts for them; of classes, label
    (n,), rows of other classes are dropped and more rows per class are used. The labels do not influence which classes
    are chosen or how many.
    """
    n = len(label) if mask is None else int(np.count_nonzero(mask))
    num_chosen = MAX_LOGITS // max(1, min(n, max_rows))
    if task == "classification":  # more classes where there are few rows per class
        num_chosen = max(num_chosen, isqrt(MAX_LOGITS * num_outputs // max(1, n)))
    num_chosen = min(num_outputs, max(2, num_chosen))
    outputs = np.round(np.linspace(0, num_outputs - 1, num_chosen)).astype(np.intp)
    if task != "classification" or num_chosen == num_outputs:
        return smallest_rows(mask, key, max_rows=max_rows), outputs
    rows = smallest_rows(mask, key, max_rows=max_rows * num_outputs // num_chosen)
    return rows[np.isin(label[rows], outputs)], outputs


def take_outputs(target: Target, outputs: NDArray[np.intp]) -> Target:
    """Return the target with a subset of the outputs, ascending; all its classes must be in the subset."""
    if len(outputs) == target.num_outputs:
        return target
    values = None if target.values is None else target.values[:, outputs]
    label = np.searchsorted(outputs, target.label).astype(np.int32) if values is None else target.label
    return Target(task=target.task, label=label, num_outputs=len(outputs), values=values)


_MAX_DISTANCE = 1e2  # units from the centre at which values are clipped (at 1e3, outliers stop fits 0.02 short)
_ROWS_FOR_UNITS = 1_000
_ROWS_FOR_AXES = 8_000  # the axes change the path of the optimiser, not the solution; more rows do not save a step
_MIN_VARIANCE = 1e-6  # below, a feature is constant: rounding leaves 3e-4 of the overall spread in float32
_MAX_FEATURES_FOR_AXES = 2_048  # above, an eigendecomposition costs more than the steps it saves
_CHUNK_BYTES = 4 << 20  # rows are standardised while they are in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """Standardisation of features: z = (x - centre) / scale / spread, each (d,). NaN becomes 0.

    (x - centre) / scale is clipped to +-_MAX_DISTANCE; spread is the standard deviation of the clipped values, 1 where
    they are constant.
    """

    centre: Tensor
    scale: Tensor
    spread: Tensor

    def standardise(self, x: Tensor) -> Tensor:
        """Return x (n, d) standardised, in the dtype of the units, as a new tensor."""
        z = (x.to(self.centre.dtype) - self.centre).mul_(1 / self.scale)
        return z.clamp_(-_MAX_DISTANCE, _MAX_DISTANCE).nan_to_num_(nan=0.0).mul_(1 / self.spread)

    def read(self, inputs: Inputs, rows: RowIndex) -> Iterator[tuple[slice, Tensor]]:
        """Yield standardised rows a chunk at a time, each with the slice of `rows` that it holds."""
        position, chunk_rows = 0, max(256, _CHUNK_BYTES // (4 * max(1, inputs.num_features)))
        for chunk in chunks(inputs, rows):
            values = as_tensor(inputs.read(chunk), self.centre)
            for first in range(0, len(values), chunk_rows):
                x = values[first : first + chunk_rows]
                start, position = position, position + len(x)
                yield slice(start, position), self.standardise(x)


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """Standardised rows in the dtype of their matrix products, prepared once for any number of fits.

    rows (n, d). basis (d, d) holds the eigenvectors of the covariance of Z, None where there are too many features;
    curvature (d + t,) its eigenvalues, and the mean squares of the terms. terms (n, t) are those of texts in units of
    `term_units`: None without texts, where t is 0. The penalty of a fit and the rows are both in units of the standard
    deviation, so that the Hessian is diagonal along these axes. With robust scaling alone, 200 steps left a fit of 120
    pictures, whose features are mostly 0, far from its minimum, at a point that depended on rounding. relative_l2
    (p, d + t): factors of l2 for each probe and weight, None where they are all 1.
    """

    rows: Tensor
    units: Units
    basis: Tensor | None
    curvature: Tensor
    terms: csr_array | None = None
    term_units: TermUnits | None = None
    relative_l2: Tensor | None = None

    @property
    def num_features(self) -> int:
        """Number of features, d + t."""
        return len(self.curvature)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, losses and gradients: that of the units, also where the rows are bfloat16."""
        return self.curvature.dtype

    def take(self, rows: Tensor) -> Design:
        """Return the design with a subset of its rows."""
        terms = None if self.terms is None else self.terms[rows.cpu().numpy()]
        return replace(self, rows=self.rows[rows], terms=terms)

    def weights_for_products(self, weight: Tensor) -> tuple[Tensor, NDArray[Any]]:
        """Return weights (d + t, c) in the forms that `multiply` takes: of the rows, and of the terms."""
        d = self.rows.shape[1]
        return weight[:d].to(self.rows.dtype), weight[d:].cpu().numpy()

    def multiply(self, rows: slice, weights: tuple[Tensor, NDArray[Any]]) -> Tensor:
        """Multiply a slice of the rows (b, d + t) with weights of `weights_for_products`: (b, c)."""
        product = (self.rows[rows] @ weights[0]).to(self.dtype)
        return product if self.terms is None else product.add_(torch.from_numpy(self.terms[rows] @ weights[1]))

    def multiply_transposed(self, rows: slice, residual: Tensor) -> Tensor:
        """Multiply the transpose of a slice of the rows (b, d + t) with a residual (b, c): (d + t, c)."""
        x = self.rows[rows]
        product = x.T @ residual.to(x.dtype)
        if self.terms is None:
            return product
        return torch.cat([product.to(self.dtype), torch.from_numpy(self.terms[rows].T @ residual.numpy())])

    def to_axes(self, weight: Tensor) -> Tensor:
        """Transform weights (q, d + t, k) from features to principal axes; those of terms stay as they are."""
        return weight if self.basis is None else _product(self.basis.T, weight)

    def from_axes(self, weight: Tensor) -> Tensor:
        """Transform weights (q, d + t, k) from principal axes to features."""
        return weight if self.basis is None else _product(self.basis, weight)


def _product(basis: Tensor, weight: Tensor) -> Tensor:
    """Multiply basis (d, d) with q weights (q, d + t, k) in one product, which takes half the time of q products."""
    (q, _, k), d = weight.shape, len(basis)
    product = (basis @ weight[:, :d].transpose(0, 1).reshape(d, q * k)).view(d, q, k).transpose(0, 1)
    return product if weight.shape[1] == d else torch.cat([product, weight[:, d:]], dim=1)


def read_design(
    inputs: Inputs,
    rows: RowIndex,
    *,
    products: torch.dtype,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    with_axes: bool = True,
) -> Design:
    """Read rows (n,) of the inputs and standardise them. `products` is the dtype they are stored and multiplied in."""
    like = torch.empty(0, dtype=dtype, device=device)
    sample = as_tensor(inputs.read(rows[:: max(1, len(rows) // _ROWS_FOR_UNITS)]), like)
    units = robust_units(sample.to(dtype))
    if with_axes:
        units = replace(units, spread=_spread(inputs, rows[:: max(1, len(rows) // _ROWS_FOR_AXES)], units))
    standardised = torch.empty(len(rows), inputs.num_features, dtype=products, device=device)
    order = reading_order(inputs, rows)
    for positions, z in units.read(inputs, rows[order]):
        standardised[torch.from_numpy(order[positions]).to(device)] = z.to(products)
    if not with_axes:
        return Design(rows=standardised, units=units, basis=None, curvature=torch.ones_like(units.scale))
    basis, curvature = _axes(standardised[:: max(1, len(rows) // _ROWS_FOR_AXES)].to(dtype), len(rows))
    return Design(rows=standardised, units=units, basis=basis, curvature=curvature)


def read_text_design(inputs: Inputs, rows: RowIndex, *, products: torch.dtype, max_terms: int) -> Design:
    """Read rows (n,) of the inputs as `read_design` does, with texts as sparse rows of at most `max_terms` terms."""
    design = read_design(Numbers(inputs=inputs), rows, products=products)
    order = reading_order(inputs, rows)
    parts = [read_terms(inputs, chunk) for chunk in chunks(inputs, rows[order])]
    weights = vstack(parts, format="csr")[np.argsort(order)]
    term_units = TermUnits.of(weights, max_terms=max_terms)
    terms = term_units.standardise(weights)
    mean_square = torch.from_numpy(terms.power(2).sum(axis=0) / len(rows)).to(design.curvature)
    curvature = torch.cat([design.curvature, mean_square])
    return replace(design, terms=terms, term_units=term_units, curvature=curvature)


def _spread(inputs: Inputs, rows: RowIndex, units: Units) -> Tensor:
    """Compute the standard deviation (d,) of rows in these units; 1 where a feature is constant up to rounding."""
    total = torch.zeros_like(units.centre, dtype=torch.float64)
    square = total.clone()
    for _, z in units.read(inputs, rows):
        total += z.sum(dim=0, dtype=torch.float64)
        square += z.double().square().sum(dim=0)
    variance = square / len(rows) - (total / len(rows)).square()
    return torch.where(variance > _MIN_VARIANCE, variance, 1.0).sqrt().to(units.centre.dtype)


def as_tensor(array: NDArray[np.generic], like: Tensor) -> Tensor:
    """Convert an array, also of bytes or read-only, to a tensor: float64 if `like` is, else float32, on its device."""
    dtype = np.float64 if like.dtype == torch.float64 else np.float32
    return torch.from_numpy(np.require(array, dtype, ["C", "W"])).to(like.device)


def robust_units(sample: Tensor) -> Units:
    """Compute the median and half the range of the middle two thirds of each feature, which one outlier cannot move.

    Where most rows are equal, the scale is the standard deviation; of a constant feature it is 1. The units change the
    path of the optimiser, not the solution, so that a sample of the rows is enough.
    """
    if sample.shape[1] == 0:  # texts alone
        return Units(centre=sample.new_zeros(0), scale=sample.new_ones(0), spread=sample.new_ones(0))
    low, centre, high = torch.nanquantile(sample, sample.new_tensor([1 / 6, 1 / 2, 5 / 6]), dim=0)
    centre = centre.nan_to_num(nan=0.0)  # a feature that is NaN in all these rows
    width = (high - low) / 2
    deviation = (sample - centre).nan_to_num_(nan=0.0).double().square().mean(dim=0).sqrt().to(sample.dtype)
    scale = torch.where(width > 0, width, deviation)
    # A feature that is 0.1 in every row varies by rounding only; scaled by that, its weights would dominate.
    scale = torch.where(scale > 8 * torch.finfo(sample.dtype).eps * centre.abs(), scale, 1.0)
    return Units(centre=centre, scale=scale, spread=torch.ones_like(scale))


def _axes(sample: Tensor, num_rows: int) -> tuple[Tensor | None, Tensor]:
    """Compute the axes (d, d) and curvature (d,) from a sample (s, d) of `num_rows` standardised rows."""
    if not 0 < sample.shape[1] <= _MAX_FEATURES_FOR_AXES:
        return None, torch.ones_like(sample[0])
    values, basis = _decompose(sample.T @ sample / len(sample))
    values = values.clamp_min(0)
    if len(sample) < num_rows:  # a sample underestimates the smallest variances, by at most the mean times d / s
        values = values + values.mean() * sample.shape[1] / len(sample)
    return basis, values


def _decompose(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues and eigenvectors; with scipy's slower "evr" driver where torch's fails to converge.

    torch fails, in float64 as well, where hundreds of features are constant, as those of hashed words are.
    """
    try:
        values, basis = torch.linalg.eigh(covariance)
    except RuntimeError:  # torch.linalg.LinAlgError is one
        arrays = scipy.linalg.eigh(covariance.double().cpu().numpy(), driver="evr")
        values, basis = (torch.from_numpy(array).to(covariance) for array in arrays)
    return values, basis
