"""Copies of media that were saved again, brightened, shifted, cropped or resampled, found by their fingerprints.

Two thumbnails are compared by the correlation of their levels, over shifts and crops of either. As for features, a
copy is one that is far nearer than the `neighbours`-th reference row: digits and faces have many alike, and these are
no copies. All constants are mmaudit's own; benchmarks/leaks.py measures what they find and docs/log.md has the figures.

q tested rows, r reference rows, f frames, h x w levels, b pairs. A distance is 1 - correlation, in [0, 2].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .features.descriptors import Thumbnails, resampling
from .features.matrix import RowIndex
from .findings import Links

MAX_RATIO = 0.06  # of the fifth distance; the least ratio of 954 clean rows of four real sets was 0.08
MAX_DISTANCE = 0.03  # of a copy; brighter pictures, clipped at white, reach 0.02
MIN_CHANGE = 0.1  # share of a sound's variance that lies in time: of tones and noise 0.07 to 0.09, of speech above 0.1
CANDIDATES = 10  # reference rows compared in detail
FIRST_CANDIDATES = 3
COARSE_SIDE, GRID_SIDE = 12, 10  # levels per side of the three stages: all pairs, the grid of windows, the local search
ROUGH_RATIO = 0.3  # of the grid's distance: windows between those of the grid lower it by a factor of five
MAX_PAIRS = 400_000_000  # of tested and reference rows: 20 s on two cores
QUERY_BLOCK, PAIR_BLOCK = 512, 4096

Window = tuple[float, float, float, float]  # top, bottom, left, right, in shares of the side
_WHOLE: Window = (0.0, 1.0, 0.0, 1.0)
_STEP = 0.0125  # of the local search, which halves it once


class ThumbnailReader(Protocol):
    """Thumbnails of media of one kind, such as `Fingerprints`."""

    @property
    def kind(self) -> str:
        """Kind of the media: image, audio, video or frames."""

    def read(self, rows: RowIndex) -> Thumbnails:
        """Read these rows, in this order: (b, f, h, w)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """What is compared: coarse windows; shifts down and right; windows, and the directions in which they are varied.

    A window (4,) is height, top, width and left.
    """

    coarse: tuple[Window, ...]
    shifts: tuple[tuple[float, float], ...]
    grid: NDArray[np.float64]
    moves: NDArray[np.float64]


def _shifts(down: tuple[float, ...], right: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    return tuple((a, b) for a in down for b in right if a or b)


@cache
def _search_of(kind: str) -> _Search:
    """Return what is compared of sounds, or of pictures."""
    if kind == "audio":
        # Rows are time, columns frequency: the bands of a sound played 5% faster shift by 0.012, a semitone by 0.014.
        ends = ((0.05, 0.95, 0.0, 1.0), (0.0, 0.95, 0.0, 1.0), (0.05, 1.0, 0.0, 1.0))
        return _Search(
            coarse=(*ends, (0, 1, 0.012, 1), (0, 1, 0, 0.988)),
            shifts=_shifts((-0.018, -0.009, 0, 0.009, 0.018), (-0.012, -0.006, 0, 0.006, 0.012)),
            grid=np.array([(scale, (1 - scale) * row / 4, 1.0, 0.0) for scale in (0.9, 0.95) for row in range(5)]),
            moves=np.array([(1.0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 0.5)]),
        )
    corners = [(top, top + 0.9, left, left + 0.9) for top in (0.0, 0.1) for left in (0.0, 0.1)]
    sizes = (0.009, 0.018, 0.036)  # a pixel of 28 is 0.036
    grid = [
        (scale, (1 - scale) * row / 4, scale, (1 - scale) * column / 4)
        for scale in (0.9, 0.95)
        for row in range(5)
        for column in range(5)
    ]
    return _Search(
        coarse=((0.05, 0.95, 0.05, 0.95), *corners),
        shifts=tuple(pair for size in sizes for pair in _shifts((-size, 0, size), (-size, 0, size))),
        grid=np.array(grid),
        moves=np.array([(1.0, 0, 1, 0), (0, 1, 0, 0), (0, 0, 0, 1)]),
    )


def near_media(fingerprints: ThumbnailReader, reference: RowIndex, tested: RowIndex, *, neighbours: int) -> Links:
    """Link `tested` rows to the `reference` rows of which they are copies; at most MAX_PAIRS pairs are compared.

    Three stages: the coarse distances of all pairs give ten candidates of each row; shifts and windows of the first
    three decide which rows may have a copy; of these all ten are searched locally.
    """
    links: Links = {}
    tested = tested[: max_tested(len(reference))]
    if len(reference) <= neighbours:
        return links
    references = fingerprints.read(reference)
    search = _search_of(fingerprints.kind)
    searched = _CoarseReferences.of(references, search)
    for start in range(0, len(tested), QUERY_BLOCK):
        rows = tested[start : start + QUERY_BLOCK]
        queries = fingerprints.read(rows)
        if fingerprints.kind == "audio":
            is_steady = queries.var(axis=-2).mean(axis=(1, 2)) < MIN_CHANGE * queries.var(axis=(1, 2, 3))
            rows, queries = rows[~is_steady], queries[~is_steady]
        candidate, coarse = searched.nearest(queries, k=max(CANDIDATES, neighbours))
        limit = np.minimum(MAX_RATIO * coarse[:, neighbours - 1], MAX_DISTANCE)
        first = _distances(queries, references, candidate[:, :FIRST_CANDIDATES], search, limit=limit)
        close = np.flatnonzero(first.min(axis=1) < limit)
        distance = _distances(queries[close], references, candidate[close], search, limit=None)
        order = np.argsort(distance, axis=1, kind="stable")
        sorted_distance = np.take_along_axis(distance, order, axis=1)
        is_copy = sorted_distance[:, 0] < np.minimum(MAX_RATIO * sorted_distance[:, neighbours - 1], MAX_DISTANCE)
        nearest = candidate[close, order[:, 0]] if len(close) else close
        links |= dict(zip(rows[close[is_copy]].tolist(), reference[nearest[is_copy]].tolist(), strict=True))
    return links


def max_tested(num_references: int) -> int:
    """Return how many rows are compared with so many reference rows."""
    return max(1, MAX_PAIRS // max(1, num_references))


@dataclass(frozen=True, slots=True, kw_only=True)
class _CoarseReferences:
    """Small normalised thumbnails (r, d) of the reference rows, whole and by the coarse windows."""

    search: _Search
    whole: Thumbnails
    windows: tuple[Thumbnails, ...]

    @classmethod
    def of(cls, references: Thumbnails, search: _Search) -> _CoarseReferences:
        return cls(
            search=search,
            whole=_normalised(_cut(references, COARSE_SIDE, _WHOLE)),
            windows=tuple(_normalised(_cut(references, COARSE_SIDE, window)) for window in search.coarse),
        )

    def nearest(self, queries: Thumbnails, *, k: int) -> tuple[RowIndex, NDArray[np.float32]]:
        """Return the k nearest reference rows of each query, nearest first, and their distances: (q, k) each."""
        whole = _normalised(_cut(queries, COARSE_SIDE, _WHOLE))
        correlation = whole @ self.whole.T
        for window, references in zip(self.search.coarse, self.windows, strict=True):
            np.maximum(correlation, whole @ references.T, out=correlation)
            cut = _normalised(_cut(queries, COARSE_SIDE, window))
            np.maximum(correlation, cut @ self.whole.T, out=correlation)
        k = min(k, correlation.shape[1])
        top = np.argpartition(-correlation, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(correlation, top, axis=1)
        order = np.lexsort((top, -values), axis=1)
        return np.take_along_axis(top, order, axis=1), 1 - np.take_along_axis(values, order, axis=1)


def _distances(
    queries: Thumbnails,
    references: Thumbnails,
    candidate: RowIndex,
    search: _Search,
    *,
    limit: NDArray[np.floating[Any]] | None,
) -> NDArray[np.float32]:
    """Return the distances (q, c) of each query to its candidates, over all shifts and windows of either.

    With a `limit` (q,), pairs that are still far above it after the grid of windows are not searched any further.
    """
    num_queries, num_candidates = candidate.shape
    pair_query = np.repeat(np.arange(num_queries), num_candidates)
    pair_reference = candidate.ravel()
    distance = np.empty(len(pair_query), dtype=np.float32)
    for start in range(0, len(pair_query), PAIR_BLOCK):
        pairs = slice(start, start + PAIR_BLOCK)
        first, second = queries[pair_query[pairs]], references[pair_reference[pairs]]
        block, windows = _grid_search(first, second, search)
        searched = (
            np.arange(len(block)) if limit is None else np.flatnonzero(block * ROUGH_RATIO < limit[pair_query[pairs]])
        )
        block[searched] = np.minimum(
            block[searched], _local_search(first[searched], second[searched], windows[:, searched], search)
        )
        distance[pairs] = block
    return distance.reshape(num_queries, num_candidates)


def _grid_search(
    first: Thumbnails, second: Thumbnails, search: _Search
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return the least distance (b,) of pairs over shifts and the grid, and the best windows (2, b, 4) of either."""
    size = first.shape[-1]
    small = [_cut(thumbnails, min(size, 2 * COARSE_SIDE), _WHOLE) for thumbnails in (first, second)]
    whole = [_normalised(_cut(thumbnails, GRID_SIDE, _WHOLE)) for thumbnails in small]
    best = _correlation(*whole)
    for down, right in search.shifts:
        shifted = [
            _normalised(_cut(thumbnails, GRID_SIDE, _overlap(sign * down, sign * right)))
            for thumbnails, sign in zip(small, (1, -1), strict=True)
        ]
        np.maximum(best, _correlation(*shifted), out=best)
    windows = np.tile(np.array([1.0, 0.0, 1.0, 0.0]), (2, len(first), 1))
    for side in (0, 1):
        best_of_side = _correlation(*whole)
        for window in search.grid:
            height, top, width, left = window.tolist()
            cut = _normalised(_cut(small[side], GRID_SIDE, (top, top + height, left, left + width)))
            correlation = _correlation(cut, whole[1 - side])
            better = correlation > best_of_side
            best_of_side[better], windows[side, better] = correlation[better], window
        np.maximum(best, best_of_side, out=best)
    return 1 - best, windows


def _local_search(
    first: Thumbnails, second: Thumbnails, windows: NDArray[np.float64], search: _Search
) -> NDArray[np.float32]:
    """Return the least distance (b,) of pairs over shifts and over the windows near the given ones (2, b, 4)."""
    side = 3 * first.shape[-1] // 4 if first.shape[-1] < 32 else first.shape[-1] // 2
    whole = [_normalised(_cut(thumbnails, side, _WHOLE)) for thumbnails in (first, second)]
    best = _correlation(*whole)
    for down, right in search.shifts:
        shifted = [
            _normalised(_cut(thumbnails, side, _overlap(sign * down, sign * right)))
            for thumbnails, sign in zip((first, second), (1, -1), strict=True)
        ]
        np.maximum(best, _correlation(*shifted), out=best)
    for source, target, window in zip((first, second), whole[::-1], windows, strict=True):
        best_of_side, centre = _correlation(_normalised(_cut_each(source, side, window)), target), window.copy()
        for step in (_STEP, _STEP / 2):
            around = centre.copy()
            for offset in np.ndindex(3, 3, 3):
                trial = around + step * (np.array(offset) - 1) @ search.moves
                correlation = _correlation(_normalised(_cut_each(source, side, trial)), target)
                better = correlation > best_of_side
                best_of_side[better], centre[better] = correlation[better], trial[better]
        np.maximum(best, best_of_side, out=best)
    return 1 - best


def _overlap(down: float, right: float) -> Window:
    """Return the part of a thumbnail that overlaps with another shifted by this much."""
    return max(down, 0.0), 1 + min(down, 0.0), max(right, 0.0), 1 + min(right, 0.0)


def _cut(thumbnails: Thumbnails, side: int, window: Window) -> Thumbnails:
    """Return a window of thumbnails (b, f, h, w) as (b, f, side, side)."""
    top, bottom, left, right = window
    rows = resampling(thumbnails.shape[-2], side, top, bottom)
    return np.asarray(rows @ thumbnails @ resampling(thumbnails.shape[-1], side, left, right).T, dtype=np.float32)


def _cut_each(thumbnails: Thumbnails, side: int, windows: NDArray[np.float64]) -> Thumbnails:
    """Return of each thumbnail (b, f, h, w) its own window (b, 4) as (b, f, side, side)."""
    height, top, width, left = windows.T
    rows = _weights(thumbnails.shape[-2], side, top, height)
    columns = _weights(thumbnails.shape[-1], side, left, width)
    return np.asarray(rows[:, None] @ thumbnails @ columns[:, None].transpose(0, 1, 3, 2), dtype=np.float32)


def _weights(length: int, cells: int, start: NDArray[np.float64], scale: NDArray[np.float64]) -> Thumbnails:
    """Return weights (b, cells, length) like `resampling`, for a part of its own in each row."""
    centres = start[:, None] + (np.arange(cells) + 0.5) / cells * scale[:, None]
    width = np.maximum(1.0, scale * length / cells)[:, None, None]
    weights = np.maximum(0, 1 - np.abs(centres[:, :, None] * length - 0.5 - np.arange(length)) / width)
    return np.asarray(weights / np.maximum(weights.sum(axis=2, keepdims=True), 1e-6), dtype=np.float32)


def _normalised(thumbnails: Thumbnails) -> Thumbnails:
    """Return thumbnails (b, ...) as rows (b, d) of mean 0 and norm 1."""
    flat = thumbnails.reshape(len(thumbnails), int(np.prod(thumbnails.shape[1:])))
    flat = flat - flat.mean(axis=1, keepdims=True)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6), dtype=np.float32)


def _correlation(first: Thumbnails, second: Thumbnails) -> NDArray[np.float32]:
    return np.asarray(np.einsum("bd,bd->b", first, second))
