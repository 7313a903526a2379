"""Near duplicates: rows of features that are nearer to each other than by chance.

scipy.stats and torch are imported inside functions, since every command imports the leakage config.
d features, p features after projection, k neighbours, q queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .features.cached_matrix import MIN_FEATURES
from .features.descriptors import Fingerprints
from .features.matrix import Inputs, RowIndex, chunks
from .findings import Links, SplitPair, is_present
from .hashing import hash_rank
from .near_media import max_tested, near_media
from .workers import parallel_map

if TYPE_CHECKING:
    from .leakage import LeakageConfig

MIN_ROWS = 20  # fewer rows do not suffice to estimate the dimension of the features
PROJECTED_DIM = 64  # dimensions of the projection: it keeps distances to 9% (Johnson and Lindenstrauss, 1984)
REFERENCE_ROWS = 2048  # rows from which scale and dimension are estimated
DIMENSION_QUANTILE = 0.2  # share of rows that may be copies of copies before the dimension is underestimated
SUM_ERROR = 1e-2  # of probabilities: softmax in float16 stays below
QUERY_BLOCK, ROW_BLOCK = 1024, 16_384  # 64 MiB of distances at once

Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class NearSearch:
    """Near duplicates between two splits, in the order of the held-out rows, and the numbers of rows compared.

    `num_fingerprints` held-out rows were compared by fingerprint, 0 where there are none.
    """

    links: Links
    num_tested: int
    num_fingerprints: int
    num_heldout: int
    num_searched: int
    num_reference: int


def search_near_duplicates(
    pair: SplitPair,
    content: NDArray[np.object_],
    inputs: Inputs,
    *,
    fingerprints: Fingerprints | None = None,
    config: LeakageConfig,
    seed: int,
) -> NearSearch | str | None:
    """Search the near duplicates of held-out rows, without those of equal content (n,), None where missing.

    Rows are compared by their features and, if media have them, by their fingerprints.

    Returns the reason if the search is not possible, and None if there is nothing to search.
    """
    present = is_present(content)
    reference_rows = pair.reference_rows[present[pair.reference_rows]]
    heldout_rows = pair.heldout_rows[present[pair.heldout_rows]]
    heldout_rows = heldout_rows[~np.isin(content[heldout_rows].astype(str), content[reference_rows].astype(str))]
    searched = _draw(pair, reference_rows, max_rows=config.max_train, seed=seed)
    tested = _draw(pair, heldout_rows, max_rows=config.max_test, seed=seed)
    if not len(tested):
        return None
    min_rows = max(MIN_ROWS, config.neighbours + 1)
    if len(searched) < min_rows:
        return f"{len(searched)} samples, at least {min_rows} needed"
    if (ratios := LogRatioInputs.of(inputs, searched[:REFERENCE_ROWS])) is not None:
        inputs, tested, searched = ratios, ratios.testable(tested), ratios.testable(searched)
        if len(tested) == 0 or len(searched) < min_rows:
            return f"its vectors are probabilities, of which fewer than {MIN_FEATURES} are not 0"
    links = near_links(inputs, searched, tested, config=config, seed=seed)
    if fingerprints is not None:
        copies = near_media(fingerprints, searched, tested, neighbours=config.neighbours)
        links = copies if isinstance(links, str) else links | copies
    if isinstance(links, str):
        return links
    return NearSearch(
        links={row: links[row] for row in pair.heldout_rows.tolist() if row in links},
        num_tested=len(tested),
        num_fingerprints=0 if fingerprints is None else min(len(tested), max_tested(len(searched))),
        num_heldout=len(heldout_rows),
        num_searched=len(searched),
        num_reference=len(reference_rows),
    )


def _draw(pair: SplitPair, rows: RowIndex, *, max_rows: int, seed: int) -> RowIndex:
    """Return the first `max_rows` rows in the order of hash(seed, id)."""
    hashes = hash_rank(pair.sample_id[rows], seed=seed, purpose="near duplicates")
    return rows[np.argsort(hashes, kind="stable")][:max_rows]


def near_links(
    inputs: Inputs, reference: RowIndex, tested: RowIndex, *, config: LeakageConfig, seed: int
) -> Links | str:
    """Link `tested` rows to the `reference` rows that they nearly repeat, or return the reason why that is undecidable.

    A near duplicate is nearer than config.ratio times the distance to the config.neighbours-th reference row, and than
    the limit that chance passes config.false_alarms times in all of `tested`. The rule is mmaudit's.

    Distances are computed in the features' own units and in units of each feature's spread; either may be small. Of
    pictures saved again as JPEG the first finds .94 and the second .01, of sounds shifted by 5 ms .21 and .93.
    """
    projections = _projections(inputs, reference[:REFERENCE_ROWS], seed=seed, min_features=MIN_FEATURES)
    if not projections:
        return f"too few of its {inputs.num_features} features vary; {MIN_FEATURES} are needed"
    links: Links = {}
    limits = []
    for projection in projections:
        reference_features = projection.read(inputs, reference)
        row_false_alarms = config.false_alarms / len(projections) / len(tested)
        limit, typical = _near_ratio(
            reference_features, chance=row_false_alarms, max_ratio=config.ratio, k=config.neighbours
        )
        limits.append(limit)
        if limit > 0:
            distance, nearest = _nearest(projection.read(inputs, tested), reference_features, k=config.neighbours)
            is_near = distance[:, 0] < limit * np.minimum(distance[:, -1], typical)
            links |= dict(zip(tested[is_near].tolist(), reference[nearest[is_near, 0]].tolist(), strict=True))
    return links if any(limits) else "many feature vectors are equal, or all lie on a line"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRatioInputs:
    """Centred log ratios of probabilities, log p - mean log p; zeros count as half the smallest probability.

    Confident probabilities crowd in the corners of the simplex, where the distances of clean rows are small by chance:
    of 10 clean sets of 10 probabilities each, 10 had near duplicates by distances of probabilities and none by these
    (Aitchison, 1982, The Statistical Analysis of Compositional Data).
    """

    inputs: Inputs
    smallest: float

    @classmethod
    def of(cls, inputs: Inputs, rows: RowIndex) -> LogRatioInputs | None:
        """Return the log ratios of features that are probabilities in all these rows: from 0, with the sum 1."""
        if not len(rows):
            return None
        features = inputs.read(rows).astype(np.float64)
        if not (features >= 0).all() or not np.allclose(features.sum(axis=1), 1, atol=SUM_ERROR):
            return None
        return cls(inputs=inputs, smallest=float(features[features > 0].min()) / 2)

    @property
    def num_rows(self) -> int:
        """Number of rows, n."""
        return self.inputs.num_rows

    @property
    def num_features(self) -> int:
        """Number of features, d."""
        return self.inputs.num_features

    def testable(self, rows: RowIndex) -> RowIndex:
        """Return those of these rows that have enough probabilities that are not 0."""
        parts = [(self.inputs.read(batch) > 0).sum(axis=1) >= MIN_FEATURES for batch in chunks(self.inputs, rows)]
        return np.asarray(rows[np.concatenate([np.zeros(0, bool), *parts])])

    def read(self, rows: RowIndex) -> Matrix:
        """Read the log ratios of these rows, in this order: (len(rows), d)."""
        logs = np.log(np.maximum(self.inputs.read(rows).astype(np.float64), self.smallest))
        return np.asarray(logs - logs.mean(axis=1, keepdims=True), dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Projection:
    """Affine projection of features (b, d) to (b, p): (x - mean) @ weights."""

    mean: Matrix
    weights: Matrix

    def read(self, inputs: Inputs, rows: RowIndex) -> Matrix:
        """Read and project these rows, in this order."""
        parts = [(inputs.read(batch).astype(np.float32) - self.mean) @ self.weights for batch in chunks(inputs, rows)]
        return np.concatenate([np.zeros((0, self.weights.shape[1]), np.float32), *parts])


def project(inputs: Inputs, rows: RowIndex, *, seed: int) -> Matrix | None:
    """Return features (b, p) of these rows in units of their spread, in at most 64 dimensions; None if none varies."""
    projections = _projections(inputs, rows[:REFERENCE_ROWS], seed=seed, min_features=1)
    return projections[1].read(inputs, rows) if projections else None


def _projections(inputs: Inputs, rows: RowIndex, *, seed: int, min_features: int) -> list[_Projection]:
    """Build a projection of the features in their own units and one in units of their spread over these rows.

    An empty list where fewer than `min_features` vary.
    """
    if not len(rows):
        return []
    features = inputs.read(rows).astype(np.float64)
    mean, spread = features.mean(axis=0), features.std(axis=0)
    varies = spread > 1e-6 * np.abs(features).max(axis=0)
    if varies.sum() < min_features:
        return []
    if varies.sum() <= PROJECTED_DIM:
        basis = np.eye(len(spread))[:, varies]
    else:
        basis = np.random.default_rng(seed).standard_normal((len(spread), PROJECTED_DIM)) / np.sqrt(PROJECTED_DIM)
    scales = (varies / spread[varies].max(), varies / np.where(varies, spread, 1))
    return [
        _Projection(mean=mean.astype(np.float32), weights=(scale[:, None] * basis).astype(np.float32))
        for scale in scales
    ]


def _near_ratio(features: Matrix, *, chance: float, max_ratio: float, k: int) -> tuple[float, float]:
    """Estimate the ratio of first to k-th distance that clean rows fall below with probability `chance`; 0 if unknown.

    The second number is the median k-th distance, an upper bound on the k-th distance of a row: far out,
    where rows are few and lie along one axis, ratios are small by chance (of 800 rows of t with 1.5 degrees of freedom
    for 3; with this bound, for none).

    Where rows are uniform in D dimensions, (d_1 / d_k)^D is Beta(1, k - 1) and (d_2 / d_k)^D is Beta(2, k - 2) at any
    density. The second, which a single copy does not change, estimates D; the first then gives the ratio.
    """
    from scipy.stats import beta

    size = min(len(features), REFERENCE_ROWS)
    distance = _nearest(features[:size], features, k=k + 1)[0][:, 1:]  # the nearest is the row itself
    distance = distance[distance[:, -1] > 0]
    if len(distance) < size / 2:
        return 0.0, 0.0
    ratio = float(np.quantile(distance[:, 1] / distance[:, -1], DIMENSION_QUANTILE))
    if ratio == 0:
        return 0.0, 0.0
    dimension = np.log(beta.ppf(DIMENSION_QUANTILE, 2, k - 2)) / np.log(min(ratio, 1 - 1e-6))
    ratio_limit = min(max_ratio, beta.ppf(chance, 1, k - 1) ** (1 / dimension))
    return float(ratio_limit), float(np.median(distance[:, -1]))


def _nearest(queries: Matrix, rows: Matrix, *, k: int) -> tuple[Matrix, RowIndex]:
    """Return the k nearest rows of each query, nearest first: distances (q, k) and row indices (q, k).

    Searched by blocks of matrix products, then recomputed from differences: |a|^2 + |b|^2 - 2ab cancels for near rows.
    """
    import torch

    candidates = torch.from_numpy(rows)
    norm = candidates.square().sum(1)

    def search(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        query = torch.from_numpy(queries[start : start + QUERY_BLOCK])
        scores, best = torch.empty((len(query), 0)), torch.empty((len(query), 0), dtype=torch.int64)
        for block_start in range(0, len(candidates), ROW_BLOCK):
            block = candidates[block_start : block_start + ROW_BLOCK]
            block_scores = torch.addmm(-norm[block_start : block_start + ROW_BLOCK], query, block.T, alpha=2)
            top = block_scores.topk(min(k, len(block)))
            scores, best = torch.cat([scores, top.values], 1), torch.cat([best, top.indices + block_start], 1)
            scores, selected = scores.topk(min(k, scores.shape[1]))
            best = best.gather(1, selected)
        exact, order = (query[:, None] - candidates[best]).square().sum(2).sqrt().sort(stable=True)
        return exact, best.gather(1, order)

    blocks = list(parallel_map(search, range(0, len(queries), QUERY_BLOCK)))
    distance, nearest_row = (torch.cat(parts).numpy() for parts in zip(*blocks, strict=True))
    return distance, nearest_row.astype(np.intp)
