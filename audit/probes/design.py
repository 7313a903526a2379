"""Design matrices: standardised features and the principal axes along which a linear fit converges fast.

Legend: n rows, d features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..features.matrix import Inputs, RowIndex, chunks, reading_order

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
        position, chunk_rows = 0, max(256, _CHUNK_BYTES // (4 * inputs.num_features))
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
    curvature (d,) its eigenvalues. The penalty of a fit and the rows are both in units of the standard deviation, so
    that the Hessian is diagonal along these axes. With robust scaling alone, 200 steps left a fit of 120 pictures,
    whose features are mostly 0, far from its minimum, at a point that depended on rounding.
    """

    rows: Tensor
    units: Units
    basis: Tensor | None
    curvature: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, losses and gradients: that of the units, also where the rows are bfloat16."""
        return self.curvature.dtype

    def take(self, rows: Tensor) -> Design:
        """Return the design with a subset of its rows."""
        return replace(self, rows=self.rows[rows])

    def to_axes(self, weight: Tensor) -> Tensor:
        """Transform weights (q, d, k) from features to principal axes."""
        return weight if self.basis is None else _product(self.basis.T, weight)

    def from_axes(self, weight: Tensor) -> Tensor:
        """Transform weights (q, d, k) from principal axes to features."""
        return weight if self.basis is None else _product(self.basis, weight)


def _product(basis: Tensor, weight: Tensor) -> Tensor:
    """Multiply basis (d, d) with q weights (q, d, k) in one product, which takes half the time of q products."""
    q, d, k = weight.shape
    return (basis @ weight.transpose(0, 1).reshape(d, q * k)).view(d, q, k).transpose(0, 1)


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
    if sample.shape[1] > _MAX_FEATURES_FOR_AXES:
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
