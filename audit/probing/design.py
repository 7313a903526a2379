"""Designs: in which units and along which axes do features make a fit short?

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

from ..encoding.matrix import Inputs, Rows, chunks, reading_order

_FARTHEST = 1e2  # units from the centre; what lies beyond counts as there (at 1e3, wild rows stop fits 0.02 short)
_ROWS_FOR_UNITS = 1_000
_ROWS_FOR_AXES = 8_000  # only the way to the solution depends on the axes; more rows do not save a step
LEAST_VARIANCE = 1e-6  # below, a feature is constant: rounding leaves 3e-4 of the overall spread in float32
_AXES_UP_TO = 2_048  # features; above, an eigendecomposition costs more than the steps it saves
_BYTES_AT_ONCE = 4 << 20  # standardised while it is in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """What makes features comparable: x becomes z = (x - centre) / scale, (d,) each. NaN becomes the centre, 0."""

    centre: Tensor
    scale: Tensor

    def standardise(self, x: Tensor) -> Tensor:
        """Give x (n, d) in these units, in their dtype, as a new tensor."""
        z = (x.to(self.centre.dtype) - self.centre).mul_(1 / self.scale)
        return z.clamp_(-_FARTHEST, _FARTHEST).nan_to_num_(nan=0.0)

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

    rows (n, d). spread (d,) is the standard deviation of each column of Z, 1 where it is constant. basis (d, d) are the
    axes of the correlation matrix of Z, None where there are too many features; curvature (d,) are its eigenvalues.
    The penalty of a fit is in units of the spread: only along these axes, not along those of the covariance, is the
    Hessian diagonal. On 120 pictures whose features are mostly 0, those of the covariance left a fit far from its
    minimum after 200 steps (gradients of .1), and rounding decided where.
    """

    rows: Tensor
    units: Units
    spread: Tensor
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
        """Transform gradients by the features (q, d, k) to gradients along the axes."""
        scaled = weight / self.spread[:, None]
        return scaled if self.basis is None else _product(self.basis.T, scaled)

    def turn_back(self, weight: Tensor) -> Tensor:
        """Transform weights (q, d, k) along the axes to weights of the features: the adjoint of `turn`."""
        return (weight if self.basis is None else _product(self.basis, weight)) / self.spread[:, None]


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
    held = torch.empty(len(rows), inputs.num_features, dtype=products, device=device)
    order = reading_order(inputs, rows)
    for place, z in units.read(inputs, rows[order]):
        held[torch.from_numpy(order[place]).to(device)] = z.to(products)
    ones = torch.ones_like(units.scale)
    if not with_axes:
        return Design(rows=held, units=units, spread=ones, basis=None, curvature=ones)
    spread, basis, curvature = _axes(rows_for_axes(held).to(dtype), len(rows))
    return Design(rows=held, units=units, spread=spread, basis=basis, curvature=curvature)


def rows_for_axes(rows: Tensor) -> Tensor:
    """Return an even part of the rows (n, d) of a design, from which its axes are computed."""
    return rows[:: max(1, len(rows) // _ROWS_FOR_AXES)]


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
    return Units(centre=centre, scale=torch.where(scale > 8 * torch.finfo(some.dtype).eps * centre.abs(), scale, 1.0))


def _axes(some: Tensor, num_rows: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute spread (d,), axes (d, d) and curvature (d,) of a design from rows (s, d) that stand for `num_rows`."""
    variance = some.square().mean(dim=0) - some.mean(dim=0).square()
    spread = torch.where(variance > LEAST_VARIANCE, variance, 1.0).sqrt()
    if some.shape[1] > _AXES_UP_TO:
        return spread, None, torch.ones_like(spread)
    scaled = some / spread
    values, basis = decompose(scaled.T @ scaled / len(some))
    values = values.clamp_min(0)
    if len(some) < num_rows:  # a sample makes the least variances too small, by the mean one times d / s at most
        values = values + values.mean() * some.shape[1] / len(some)
    return spread, basis, values


def decompose(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Give eigenvalues and eigenvectors; by scipy's slower, surer driver where torch's fails to converge.

    So it does, in float64 as well, where hundreds of features are constant, as hashed words are.
    """
    try:
        values, basis = torch.linalg.eigh(covariance)
    except RuntimeError:  # torch.linalg.LinAlgError is one
        found = scipy.linalg.eigh(covariance.double().cpu().numpy(), driver="evr")
        values, basis = (torch.from_numpy(each).to(covariance) for each in found)
    return values, basis
