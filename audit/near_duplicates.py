"""Near duplicates: rows of features that are nearer to each other than chance explains.

scipy.stats and torch are imported where they are used: a config of leakage is read by every command.
Letters: d features, p features after projection, k neighbours, q queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .features.matrix import Inputs, Rows, chunks
from .threads import parallel_map

LEAST_FEATURES = 8  # vectors of fewer numbers come close, or equal, by chance
PROJECTED = 64  # features that wider vectors are projected to: distances keep to 9% (Johnson and Lindenstrauss, 1984)
REFERENCE_ROWS = 2048  # rows that scale, and the dimension of the cloud, are taken from
DIMENSION_QUANTILE = 0.2  # so many rows of a cloud may be copies of copies before it seems flatter than it is
QUERY_BLOCK, ROW_BLOCK = 1024, 16_384  # 64 MiB of distances at once

Matrix = NDArray[np.float32]
Links = dict[int, int]  # a tested row, and the known row that it repeats


def near_links(
    inputs: Inputs, known: Rows, tested: Rows, *, ratio: float, neighbours: int, false_alarms: float, seed: int
) -> Links | str:
    """Link the `tested` rows to the `known` ones that they nearly repeat, or say why none can be told.

    A near duplicate is nearer than `ratio` of the distance to the `neighbours`-th known row, or than what chance makes
    of `false_alarms` in all of `tested`, whichever is less. The rule is ours.

    Rows are near in the features' own units or in units of each one's spread. Of pictures saved anew as JPEG the first
    finds .94 and the second .01, of sounds moved by 5 ms .21 and .93.
    """
    projections = _projections(inputs, known[:REFERENCE_ROWS], seed=seed)
    if not projections:
        return f"too few of its {inputs.num_features} features vary; {LEAST_FEATURES} are needed"
    links: Links = {}
    limits = []
    for projection in projections:
        cloud = projection.read(inputs, known)
        chance = false_alarms / len(projections) / len(tested)
        limit, typical = _near_ratio(cloud, chance=chance, most=ratio, k=neighbours)
        limits.append(limit)
        if limit > 0:
            distance, nearest = _nearest(projection.read(inputs, tested), cloud, k=neighbours)
            near = distance[:, 0] < limit * np.minimum(distance[:, -1], typical)
            links |= dict(zip(tested[near].tolist(), known[nearest[near, 0]].tolist(), strict=True))
    return links if any(limits) else "many vectors are equal, or all lie on a line"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Projection:
    """Features (b, d) made into (b, p): (x - mean) @ weights."""

    mean: Matrix
    weights: Matrix

    def read(self, inputs: Inputs, rows: Rows) -> Matrix:
        """Read and project these rows, in this order."""
        parts = [(inputs.read(some).astype(np.float32) - self.mean) @ self.weights for some in chunks(inputs, rows)]
        return np.concatenate([np.zeros((0, self.weights.shape[1]), np.float32), *parts])


def _projections(inputs: Inputs, rows: Rows, *, seed: int) -> list[_Projection]:
    """Make a projection of the features in their own units and one in units of their spread over these rows.

    None where fewer than LEAST_FEATURES vary.
    """
    seen = inputs.read(rows).astype(np.float64)
    mean, spread = seen.mean(axis=0), seen.std(axis=0)
    varies = spread > 1e-6 * np.abs(seen).max(axis=0)
    if varies.sum() < LEAST_FEATURES:
        return []
    if varies.sum() <= PROJECTED:
        mix = np.eye(len(spread))[:, varies]
    else:
        mix = np.random.default_rng(seed).standard_normal((len(spread), PROJECTED)) / np.sqrt(PROJECTED)
    scales = (varies / spread[varies].max(), varies / np.where(varies, spread, 1))
    return [
        _Projection(mean=mean.astype(np.float32), weights=(scale[:, None] * mix).astype(np.float32)) for scale in scales
    ]


def _near_ratio(cloud: Matrix, *, chance: float, most: float, k: int) -> tuple[float, float]:
    """Give the ratio of the first to the k-th distance that a clean row falls below by `chance`; 0: none can be told.

    The second number is the median k-th distance, to which a row is held as well: far out, where rows are few and lie
    along one axis, ratios are small by themselves (of 800 rows of t, 1.5 degrees of freedom, 3 were; so held, none).

    Where rows lie evenly in D dimensions, (d_1 / d_k)^D is Beta(1, k - 1) and (d_2 / d_k)^D is Beta(2, k - 2), however
    dense they lie. The second, which a single copy leaves alone, gives D of this cloud, and then the first the ratio.
    """
    from scipy.stats import beta

    size = min(len(cloud), REFERENCE_ROWS)
    distance = _nearest(cloud[:size], cloud, k=k + 1)[0][:, 1:]  # the nearest is the row itself
    distance = distance[distance[:, -1] > 0]
    if len(distance) < size / 2:
        return 0.0, 0.0
    ratio = float(np.quantile(distance[:, 1] / distance[:, -1], DIMENSION_QUANTILE))
    if ratio == 0:
        return 0.0, 0.0
    dimension = np.log(beta.ppf(DIMENSION_QUANTILE, 2, k - 2)) / np.log(min(ratio, 1 - 1e-6))
    limit = min(most, beta.ppf(chance, 1, k - 1) ** (1 / dimension))
    return float(limit), float(np.median(distance[:, -1]))


def _nearest(queries: Matrix, rows: Matrix, *, k: int) -> tuple[Matrix, Rows]:
    """Give the k nearest rows of each query, nearest first: distances (q, k) and places (q, k).

    Found by blocks of matrix products, then measured anew by differences: |a|^2 + |b|^2 - 2ab loses the near ones.
    """
    import torch

    cloud = torch.from_numpy(rows)
    norm = cloud.square().sum(1)

    def search(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        query = torch.from_numpy(queries[start : start + QUERY_BLOCK])
        score, best = torch.empty((len(query), 0)), torch.empty((len(query), 0), dtype=torch.int64)
        for first in range(0, len(cloud), ROW_BLOCK):
            block = cloud[first : first + ROW_BLOCK]
            found = torch.addmm(-norm[first : first + ROW_BLOCK], query, block.T, alpha=2).topk(min(k, len(block)))
            score, best = torch.cat([score, found.values], 1), torch.cat([best, found.indices + first], 1)
            score, kept = score.topk(min(k, score.shape[1]))
            best = best.gather(1, kept)
        exact, order = (query[:, None] - cloud[best]).square().sum(2).sqrt().sort(stable=True)
        return exact, best.gather(1, order)

    blocks = list(parallel_map(search, range(0, len(queries), QUERY_BLOCK)))
    distance, place = (torch.cat(each).numpy() for each in zip(*blocks, strict=True))
    return distance, place.astype(np.intp)
