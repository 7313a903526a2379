"""New train, validation and test splits, stratified by class and discrepancy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..audit.errors import ConfigError, ScoreError
from ..audit.hashing import hash_ids, splitmix64
from ..audit.metrics import assign_bins
from .score_tables import ScoreBatch, ScoreFiles
from .selection import Counts, ExternalSort

SPLITS_BY_COUNT = {2: ("train", "test"), 3: ("train", "validation", "test")}
_BINS = 20
_MAX_CELLS = 1 << 27  # groups x classes x bins; above, only the sign of the discrepancy is used


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassBins:
    """Cells of class by bin of the discrepancy; an extra bin holds samples without one."""

    between: str
    num_bins: int
    num_classes: int

    @property
    def num_cells(self) -> int:
        """Number of cells."""
        return (self.num_bins + 1) * self.num_classes

    def of(self, batch: ScoreBatch) -> NDArray[np.int32]:
        """Return the cell of each row, (n,)."""
        values = batch.discrepancy(self.between)
        bins = np.where(np.isnan(values), self.num_bins, assign_bins(np.nan_to_num(values), num_bins=self.num_bins))
        return (batch.label * (self.num_bins + 1) + bins).astype(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitByHash:
    """Split of each row by the rank of its hash in its cell."""

    cells: ClassBins
    last_keys: NDArray[np.uint64]  # (s - 1, c) last key of the cell in the splits up to this one
    has_rows: NDArray[np.bool_]  # (s - 1, c) whether the splits up to this one have any rows of the cell

    def __call__(self, batch: ScoreBatch) -> NDArray[np.int16]:
        """Return the split of each row, (n,)."""
        cell, keys = self.cells.of(batch), _split_keys(batch)
        in_split = [
            nonzero[cell] & (keys <= last[cell]) for last, nonzero in zip(self.last_keys, self.has_rows, strict=True)
        ]
        return np.asarray(len(self.last_keys) - np.sum(in_split, axis=0, dtype=np.int64), dtype=np.int16)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitByGroup:
    """Split of each row by its group: sorted keys (g,) of the groups, and their splits (g,)."""

    seed: int
    keys: NDArray[np.uint64]
    split: NDArray[np.int16]

    def __call__(self, batch: ScoreBatch) -> NDArray[np.int16]:
        """Return the split of each row, (n,)."""
        return np.asarray(self.split[np.searchsorted(self.keys, group_keys(batch, seed=self.seed))])


def parse_shares(text: str) -> tuple[float, ...]:
    """Parse `80/8/12` (train, validation, test) or `80/20` (train, test) to shares that sum to 1."""
    try:
        parts = [float(part) for part in text.split("/")]
    except ValueError:
        parts = []
    if len(parts) not in SPLITS_BY_COUNT or min(parts) <= 0 or not np.isfinite(parts).all():
        raise ConfigError(f"--resplit {text}: not of the form 80/8/12 (train, validation, test) or 80/20 (train, test)")
    return tuple(part / sum(parts) for part in parts)


def resplit(scores: ScoreFiles, shares: tuple[float, ...], *, between: str, scratch: Path) -> ScoreFiles:
    """Return the score files with new splits, stratified by class and bin, with no group in two of them.

    Shares refer to the rows that no manifest excludes. With groups, shares are met as closely as whole groups allow,
    and memory grows with the number of groups.
    """
    names = SPLITS_BY_COUNT[len(shares)]
    grouped = "group" in scores.columns and _has_groups(scores)
    assign = _split_by_group(scores, shares, between) if grouped else _split_by_hash(scores, shares, between, scratch)
    return replace(scores, splits=names, assign=assign)


def group_keys(batch: ScoreBatch, *, seed: int) -> NDArray[np.uint64]:
    """Hash the group of each row, (n,); a sample without a group is a group of its own."""
    column = batch.table["group"].cast(pa.string()).combine_chunks()
    missing = column.is_null().to_numpy(zero_copy_only=False)
    return np.where(missing, batch.key, hash_ids(column.fill_null(""), seed=seed, purpose="group"))


def _has_groups(scores: ScoreFiles) -> bool:
    return any(batch.table["group"].null_count < len(batch) for batch in scores.batches())


def _split_by_hash(scores: ScoreFiles, shares: tuple[float, ...], between: str, scratch: Path) -> SplitByHash:
    cells = ClassBins(between=between, num_bins=_BINS, num_classes=len(scores.classes))
    counts = np.zeros(cells.num_cells, dtype=np.int64)
    with ExternalSort(scores.num_rows, scratch) as external_sort:
        for batch in scores.batches():
            eligible = batch.excluded_by == 0
            cell = cells.of(batch)[eligible]
            counts += np.bincount(cell, minlength=cells.num_cells)
            external_sort.add(_split_keys(batch)[eligible], cell, np.zeros(len(cell), dtype=np.uint32))
        quotas = _cumulative_quotas(counts, shares)
        last_keys = [external_sort.last_keys(quota) for quota in quotas]
    return SplitByHash(cells=cells, last_keys=np.stack(last_keys), has_rows=np.stack(quotas) > 0)


def _cumulative_quotas(counts: Counts, shares: tuple[float, ...]) -> list[Counts]:
    """Compute how many rows of each cell (c,) are in the splits up to each one but the last.

    Each split is filled from the rest of the ones before: rounded separately, two boundaries could cross in a cell.
    """
    quotas, total = [], np.zeros_like(counts)
    for split_index, share in enumerate(shares[:-1]):
        total = total + _share_cells(counts - total, share / sum(shares[split_index:]))
        quotas.append(total)
    return quotas


def _share_cells(counts: Counts, share: float) -> Counts:
    """Compute a share of each cell (c,) in whole samples; rounding errors carry over to the next cell."""
    ends: Counts = np.floor(np.cumsum(counts) * share + 0.5).astype(np.int64)
    return np.diff(ends, prepend=0)


def _split_by_group(scores: ScoreFiles, shares: tuple[float, ...], between: str) -> SplitByGroup:
    """Assign whole groups to splits, the largest first, each to the split with the largest shortage."""
    batch_keys = []
    for batch in scores.batches():
        batch_keys.append(np.unique(group_keys(batch, seed=scores.seed)))
    keys = np.unique(np.concatenate(batch_keys))
    num_classes = len(scores.classes)
    cells = ClassBins(
        between=between,
        num_bins=_BINS if len(keys) * num_classes * (_BINS + 1) <= _MAX_CELLS else 2,
        num_classes=num_classes,
    )
    counts = np.zeros((len(keys), cells.num_cells), dtype=np.int32)
    for batch in scores.batches():
        eligible = batch.excluded_by == 0
        group_index = np.searchsorted(keys, group_keys(batch, seed=scores.seed)[eligible])
        np.add.at(counts, (group_index, cells.of(batch)[eligible]), 1)
    num_groups = int(counts.any(axis=1).sum())
    if num_groups < len(shares):
        raise ScoreError(f"{num_groups} groups cannot fill {len(shares)} splits: a group is never in two splits")
    return SplitByGroup(seed=scores.seed, keys=keys, split=_assign_groups(counts, np.array(shares), keys))


def _assign_groups(
    counts: NDArray[np.int32], shares: NDArray[np.float64], keys: NDArray[np.uint64]
) -> NDArray[np.int16]:
    """Compute the split of each group (g, c), (g,): the one with the largest relative shortage of the group's cells.

    A split that would exceed its share of all samples is full as long as another is not; every split gets a group.
    """
    size = counts.sum(axis=1)
    target = shares[:, None] * counts.sum(axis=0)  # (s, c)
    assigned, capacity = np.zeros_like(target), shares * size.sum()
    split_of_group = np.zeros(len(counts), dtype=np.int16)
    order = np.lexsort((keys, -size))[: int((size > 0).sum())]
    for position, group in enumerate(order):
        shortage = ((target - assigned) / np.maximum(target, 1e-9)) @ counts[group] / max(int(size[group]), 1)
        must_fill = (assigned.sum(axis=1) == 0) & (len(order) - position <= int((assigned.sum(axis=1) == 0).sum()))
        fits = assigned.sum(axis=1) + size[group] / 2 <= capacity
        candidates = must_fill if must_fill.any() else fits if fits.any() else np.ones(len(shares), dtype=bool)
        split_of_group[group] = int(np.argmax(np.where(candidates, shortage, -np.inf)))
        assigned[split_of_group[group]] += counts[group]
    return split_of_group


def _split_keys(batch: ScoreBatch) -> NDArray[np.uint64]:
    """Return keys (n,) unlike those a balanced split selects by, or it would favour the training samples."""
    return splitmix64(~batch.key)
