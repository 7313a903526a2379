"""Design matrices: units and axes in which a linear fit converges fast.

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

from ..features.matrix import Inputs, Rows, chunks, reading_order

_FARTHEST = 1e2  # units from the centre; what lies beyond counts as there (at 1e3, wild rows stop fits 0.02 short)
_ROWS_FOR_UNITS = 1_000
_ROWS_FOR_AXES = 8_000  # only the way to the solution depends on the axes; more rows do not save a step
_LEAST_VARIANCE = 1e-6  # below, a feature is constant: rounding leaves 3e-4 of the overall spread in float32
_AXES_UP_TO = 2_048  # features; above, an eigendecomposition costs more than the steps it saves
_BYTES_AT_ONCE = 4 << 20  # standardised while it is in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """What makes features comparable: x becomes z = (x - centre) / scale / spread, (d,) each. NaN becomes 0.

    (x - centre) / scale is cut at _FARTHEST; spread is the standard deviation of what is left, 1 where it is constant.
    """

    centre: Tensor
    scale: Tensor
    spread: Tensor

    def standardise(self, x: Tensor) -> Tensor:
        """Give x (n, d) in these units, in their dtype, as a new tensor."""
        z = (x.to(self.centre.dtype) - self.centre).mul_(1 / self.scale)
        return z.clamp_(-_FARTHEST, _FARTHEST).nan_to_num_(nan=0.0).mul_(1 / self.spread)

    def read(self, inputs: Inputs, rows: Rows) -> Iterator[tuple[slice, Tensor]]:
        """Read rows in these units, a chunk at a time, each with its place among them."""
        end, size = 0, max(256, _BYTES_AT_ONCE // (4 * inputs.num_features))
        for part in chunks(inputs, rows):
            whole = as_tensor(inputs.read(part), self.centre)
            for first in range(0, len(whole), size):
                x = whole[first : first + size]
                start, end = end, end + len(x)
                yield slice(start, end), self.standardise(x)


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """Rows made ready once for any number of fits: standardised, in the dtype of their products.

    rows (n, d). basis (d, d) are the axes of the covariance of Z, None where there are too many features;
    curvature (d,) are its eigenvalues. The penalty of a fit is in units of the standard deviation, and so are the rows:
    then the Hessian is diagonal along these axes. In robust units alone 200 steps left a fit of 120 pictures, whose
    features are mostly 0, far from its minimum, and rounding decided where.
    """

    rows: Tensor
    units: Units
    basis: Tensor | None
    curvature: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, losses and gradients: that of the units, not that of bfloat16 rows."""
        return self.curvature.dtype

    def take(self, rows: Tensor) -> Design:
        """Give the same design of some of its rows."""
        return replace(self, rows=self.rows[rows])

    def turn(self, weight: Tensor) -> Tensor:
        """Transform weights (q, d, k) of the features to weights along the axes."""
        return weight if self.basis is None else _product(self.basis.T, weight)

    def turn_back(self, weight: Tensor) -> Tensor:
        """Transform weights (q, d, k) along the axes to weights of the features."""
        return weight if self.basis is None else _product(self.basis, weight)


def _product(basis: Tensor, weight: Tensor) -> Tensor:
    """Multiply each of weights (q, d, k): as one product, which takes half the time of q."""
    q, d, k = weight.shape
    return (basis @ weight.transpose(0, 1).reshape(d, q * k)).view(d, q, k).transpose(0, 1)


def read_design(
    inputs: Inputs,
    rows: Rows,
    *,
    products: torch.dtype,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    with_axes: bool = True,
) -> Design:
    """Read rows (n,) of the inputs and make them ready. `products` is the dtype they are held and multiplied in."""
    like = torch.empty(0, dtype=dtype, device=device)
    some = as_tensor(inputs.read(rows[:: max(1, len(rows) // _ROWS_FOR_UNITS)]), like)
    units = robust_units(some.to(dtype))
    if with_axes:
        units = replace(units, spread=_spread(inputs, rows[:: max(1, len(rows) // _ROWS_FOR_AXES)], units))
    held = torch.empty(len(rows), inputs.num_features, dtype=products, device=device)
    order = reading_order(inputs, rows)
    for place, z in units.read(inputs, rows[order]):
        held[torch.from_numpy(order[place]).to(device)] = z.to(products)
    if not with_axes:
        return Design(rows=held, units=units, basis=None, curvature=torch.ones_like(units.scale))
    basis, curvature = _axes(held[:: max(1, len(rows) // _ROWS_FOR_AXES)].to(dtype), len(rows))
    return Design(rows=held, units=units, basis=basis, curvature=curvature)


def _spread(inputs: Inputs, rows: Rows, units: Units) -> Tensor:
    """Compute the standard deviation (d,) of rows in some units; 1 where a feature is constant but for rounding."""
    total = torch.zeros_like(units.centre, dtype=torch.float64)
    square = total.clone()
    for _, z in units.read(inputs, rows):
        total += z.sum(dim=0, dtype=torch.float64)
        square += z.double().square().sum(dim=0)
    variance = square / len(rows) - (total / len(rows)).square()
    return torch.where(variance > _LEAST_VARIANCE, variance, 1.0).sqrt().to(units.centre.dtype)


def as_tensor(read: NDArray[np.generic], like: Tensor) -> Tensor:
    """Give what was read, float64 only where `like` is: bytes and read-only maps as well."""
    plain = np.float64 if like.dtype == torch.float64 else np.float32
    return torch.from_numpy(np.require(read, plain, ["C", "W"])).to(like.device)


def robust_units(some: Tensor) -> Units:
    """Find the median and half the middle two thirds of each feature: what one wild row does not move.

    Most rows alike: the standard deviation instead; a constant feature: 1. Only the way to the solution depends on
    these units, not the solution, so that some rows are enough.
    """
    low, centre, high = torch.nanquantile(some, some.new_tensor([1 / 6, 1 / 2, 5 / 6]), dim=0)
    centre = centre.nan_to_num(nan=0.0)  # a feature that none of these rows has
    width = (high - low) / 2
    deviation = (some - centre).nan_to_num_(nan=0.0).double().square().mean(dim=0).sqrt().to(some.dtype)
    scale = torch.where(width > 0, width, deviation)
    # Rounding spreads a feature that is 0.1 throughout, and weights in units of that swamp all the others.
    scale = torch.where(scale > 8 * torch.finfo(some.dtype).eps * centre.abs(), scale, 1.0)
    return Units(centre=centre, scale=scale, spread=torch.ones_like(scale))


def _axes(some: Tensor, num_rows: int) -> tuple[Tensor | None, Tensor]:
    """Compute the axes (d, d) and the curvature (d,) of standardised rows (s, d) that stand for `num_rows`."""
    if some.shape[1] > _AXES_UP_TO:
        return None, torch.ones_like(some[0])
    values, basis = _decompose(some.T @ some / len(some))
    values = values.clamp_min(0)
    if len(some) < num_rows:  # a sample makes the least variances too small, by the mean one times d / s at most
        values = values + values.mean() * some.shape[1] / len(some)
    return basis, values


def _decompose(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Give eigenvalues and eigenvectors; by scipy's slower, surer driver where torch's fails to converge.

    So it does, in float64 as well, where hundreds of features are constant, as hashed words are.
    """
    try:
        values, basis = torch.linalg.eigh(covariance)
    except RuntimeError:  # torch.linalg.LinAlgError is one
        found = scipy.linalg.eigh(covariance.double().cpu().numpy(), driver="evr")
        values, basis = (torch.from_numpy(each).to(covariance) for each in found)
    return values, basis
