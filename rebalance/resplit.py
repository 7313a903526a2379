"""New train, validation and test splits, stratified by class and discrepancy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..audit.errors import ConfigError, ScoreError
from ..audit.hashing import hash_ids, splitmix64
from .binning import Counts, bin_of
from .external_sort import ExternalSort
from .score_tables import ScoreBatch, ScoreFiles

SPLITS_BY_COUNT = {2: ("train", "test"), 3: ("train", "validation", "test")}
_BINS = 20
_MAX_CELLS = 1 << 27  # of groups by class and bin: above, only the sign of the discrepancy is told apart


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassBins:
    """Class by bin of the discrepancy; one more bin holds samples that have none."""

    between: str
    num_bins: int
    num_classes: int

    @property
    def number(self) -> int:
        """Cells there are."""
        return (self.num_bins + 1) * self.num_classes

    def of(self, batch: ScoreBatch) -> NDArray[np.int32]:
        """Give the cell of each row, (n,)."""
        values = batch.discrepancy(self.between)
        bins = np.where(np.isnan(values), self.num_bins, bin_of(np.nan_to_num(values), num_bins=self.num_bins))
        return (batch.label * (self.num_bins + 1) + bins).astype(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitByHash:
    """The split of each row by where its hash lies among those of its cell. last (s - 1, c)."""

    cells: ClassBins
    last: NDArray[np.uint64]
    some: NDArray[np.bool_]  # (s - 1, c) whether the splits up to this one hold any of the cell

    def __call__(self, batch: ScoreBatch) -> NDArray[np.int16]:
        """Give the split of each row, (n,)."""
        cell, key = self.cells.of(batch), _split_keys(batch)
        within = [some[cell] & (key <= last[cell]) for last, some in zip(self.last, self.some, strict=True)]
        return np.asarray(len(self.last) - np.sum(within, axis=0, dtype=np.int64), dtype=np.int16)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitByGroup:
    """The split of each row by its group's: sorted keys (g,) of groups and their splits (g,)."""

    seed: int
    keys: NDArray[np.uint64]
    split: NDArray[np.int16]

    def __call__(self, batch: ScoreBatch) -> NDArray[np.int16]:
        """Give the split of each row, (n,)."""
        return np.asarray(self.split[np.searchsorted(self.keys, group_keys(batch, seed=self.seed))])


def parse_shares(text: str) -> tuple[float, ...]:
    """Read `80/8/12` (train, validation, test) or `80/20` (train, test) as shares that add up to 1."""
    try:
        parts = [float(each) for each in text.split("/")]
    except ValueError:
        parts = []
    if len(parts) not in SPLITS_BY_COUNT or min(parts) <= 0 or not np.isfinite(parts).all():
        raise ConfigError(f"--resplit {text}: not of the form 80/8/12 (train, validation, test) or 80/20 (train, test)")
    return tuple(each / sum(parts) for each in parts)


def resplit(score_files: ScoreFiles, shares: tuple[float, ...], *, between: str, scratch: Path) -> ScoreFiles:
    """Give the scores with other splits: stratified by class and bin, and no group in two of them.

    The shares are those of the rows that no manifest rules out.
    With groups the shares are held as nearly as whole groups allow, and memory grows with their number.
    """
    names = SPLITS_BY_COUNT[len(shares)]
    grouped = "group" in score_files.columns and _has_groups(score_files)
    assign = (
        _split_by_group(score_files, shares, between)
        if grouped
        else _split_by_hash(score_files, shares, between, scratch)
    )
    return replace(score_files, splits=names, assign=assign)


def group_keys(batch: ScoreBatch, *, seed: int) -> NDArray[np.uint64]:
    """Hash the group of each row, (n,); a sample without a group is one by itself."""
    column = batch.table["group"].cast(pa.string()).combine_chunks()
    missing = column.is_null().to_numpy(zero_copy_only=False)
    return np.where(missing, batch.key, hash_ids(column.fill_null(""), seed=seed, purpose="group"))


def _has_groups(score_files: ScoreFiles) -> bool:
    return any(batch.table["group"].null_count < len(batch) for batch in score_files.batches())


def _split_by_hash(score_files: ScoreFiles, shares: tuple[float, ...], between: str, scratch: Path) -> SplitByHash:
    cells = ClassBins(between=between, num_bins=_BINS, num_classes=len(score_files.classes))
    counts = np.zeros(cells.number, dtype=np.int64)
    with ExternalSort(score_files.num_rows, scratch) as spill:
        for batch in score_files.batches():
            free = batch.excluded_by == 0
            cell = cells.of(batch)[free]
            counts += np.bincount(cell, minlength=cells.number)
            spill.add(_split_keys(batch)[free], cell, np.zeros(len(cell), dtype=np.uint32))
        quotas = _cumulative_quotas(counts, shares)
        last = [spill.last_keys(quota) for quota in quotas]
    return SplitByHash(cells=cells, last=np.stack(last), some=np.stack(quotas) > 0)


def _cumulative_quotas(counts: Counts, shares: tuple[float, ...]) -> list[Counts]:
    """Give how many of each cell (c,) are in the splits up to each but the last.

    Each split takes from what the ones before it left: dealt on their own, the ends of two could cross in a cell.
    """
    found, taken = [], np.zeros_like(counts)
    for place, share in enumerate(shares[:-1]):
        taken = taken + _share_cells(counts - taken, share / sum(shares[place:]))
        found.append(taken)
    return found


def _share_cells(counts: Counts, share: float) -> Counts:
    """Give a share of each cell (c,) in whole samples that add up: what one cell lacks the next one has."""
    ends: Counts = np.floor(np.cumsum(counts) * share + 0.5).astype(np.int64)
    return np.diff(ends, prepend=0)


def _split_by_group(score_files: ScoreFiles, shares: tuple[float, ...], between: str) -> SplitByGroup:
    """Place the groups, the largest first, where they are most wanted."""
    found = []
    for batch in score_files.batches():
        found.append(np.unique(group_keys(batch, seed=score_files.seed)))
    keys = np.unique(np.concatenate(found))
    k = len(score_files.classes)
    cells = ClassBins(
        between=between, num_bins=_BINS if len(keys) * k * (_BINS + 1) <= _MAX_CELLS else 2, num_classes=k
    )
    counts = np.zeros((len(keys), cells.number), dtype=np.int32)
    for batch in score_files.batches():
        free = batch.excluded_by == 0
        place = np.searchsorted(keys, group_keys(batch, seed=score_files.seed)[free])
        np.add.at(counts, (place, cells.of(batch)[free]), 1)
    number = int(counts.any(axis=1).sum())
    if number < len(shares):
        raise ScoreError(f"{number} groups cannot be in {len(shares)} splits: no group may be in two")
    return SplitByGroup(seed=score_files.seed, keys=keys, split=_assign_groups(counts, np.array(shares), keys))


def _assign_groups(
    counts: NDArray[np.int32], shares: NDArray[np.float64], keys: NDArray[np.uint64]
) -> NDArray[np.int16]:
    """Give each group (g, c) a split, (g,): that which lacks most of what the group has, for its share.

    A split that has more than its share of all samples is full, as long as another is not; every split gets one.
    """
    size = counts.sum(axis=1)
    wanted = shares[:, None] * counts.sum(axis=0)  # (s, c)
    has, room = np.zeros_like(wanted), shares * size.sum()
    split = np.zeros(len(counts), dtype=np.int16)
    order = np.lexsort((keys, -size))[: int((size > 0).sum())]
    for place, group in enumerate(order):
        lack = ((wanted - has) / np.maximum(wanted, 1e-9)) @ counts[group] / max(int(size[group]), 1)
        waiting = (has.sum(axis=1) == 0) & (len(order) - place <= int((has.sum(axis=1) == 0).sum()))
        fits = has.sum(axis=1) + size[group] / 2 <= room
        among = waiting if waiting.any() else fits if fits.any() else np.ones(len(shares), dtype=bool)
        split[group] = int(np.argmax(np.where(among, lack, -np.inf)))
        has[split[group]] += counts[group]
    return split


def _split_keys(batch: ScoreBatch) -> NDArray[np.uint64]:
    """Give other keys (n,) than a balanced split chooses by, or it would keep the training samples."""
    return splitmix64(~batch.key)
