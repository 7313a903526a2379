"""Selection of rows by a rule, for score tables of any size, and sorting on disk.

Rows are selected by the rank of a hash, which needs a sort. Records are partitioned into scratch files by the first
bits of their key, so that the files are in key order and only one part at a time is sorted in memory.

A rule maps each row to a cell and sets how many rows of each cell are kept; which ones depends on hash(seed, id). Two
passes are enough: the first counts the cells and sorts the hashes on disk, which gives the last hash that each cell
keeps; the second compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..audit.errors import ManifestError, ScoreError
from ..audit.metrics import Floats
from ..audit.storage import scratch_folder
from .score_tables import ScoreBatch, ScoreFiles

Counts = NDArray[np.int64]


RECORD = np.dtype([("key", "<u8"), ("cell", "<i4"), ("imbalance", "<u4")])
_PART_ROWS = 1 << 18  # 4 MB of records
_LARGEST_KEY = np.uint64(2**64 - 1)
_MAX_PARTS = 1_024


class ExternalSort:
    """n records of key, cell (-1: none) and imbalance; above 2^18 rows on disk in `folder`. A context manager."""

    def __init__(self, num_rows: int, folder: Path) -> None:
        self._bits = min(max(0, (num_rows // _PART_ROWS).bit_length()), _MAX_PARTS.bit_length() - 1)
        self._records: list[NDArray[np.void]] = []
        self._scratch = ExitStack()
        self._files: list[Path] = []  # opened per write: the limit of open files may be as low as 256
        if self._bits:
            scratch = self._scratch.enter_context(scratch_folder(folder))
            self._files = [scratch / f"{number}" for number in range(1 << self._bits)]
            for file in self._files:
                file.touch()

    def __enter__(self) -> ExternalSort:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._scratch.close()

    def add(self, key: NDArray[np.uint64], cell: NDArray[np.int32], imbalance: NDArray[np.uint32]) -> None:
        """Add records, arrays (n,)."""
        records = np.empty(len(key), dtype=RECORD)
        records["key"], records["cell"], records["imbalance"] = key, cell, imbalance
        if not self._files:
            self._records.append(records)
            return
        part = (key >> np.uint64(64 - self._bits)).astype(np.uint16)
        records = records[np.argsort(part, kind="stable")]
        ends = np.cumsum(np.bincount(part, minlength=len(self._files)))
        for file, first, end in zip(self._files, np.r_[0, ends[:-1]], ends, strict=True):
            if end > first:
                with file.open("ab") as part_file:
                    part_file.write(records[first:end].tobytes())

    def parts(self) -> Iterator[NDArray[np.void]]:
        """Yield all records in parts: every key of one part is less than every key of the next."""
        if not self._files:
            yield np.concatenate(self._records) if self._records else np.empty(0, dtype=RECORD)
            return
        for file in self._files:
            yield np.fromfile(file, dtype=RECORD)

    def repeated(self) -> NDArray[np.uint64]:
        """Return the keys that occur more than once."""
        return np.concatenate([_repeated_keys(part["key"]) for part in self.parts()])

    def last_keys(
        self, quota: NDArray[np.int64], *, kept_imbalance: NDArray[np.int64] | None = None
    ) -> NDArray[np.uint64]:
        """Compute the quota-th smallest key of each cell, (c,); keys up to it are kept. 0 where the quota is 0.

        For a quota above the cell's count it is the largest possible key. The imbalance of the kept records is counted
        into `kept_imbalance` (r,).
        """
        num_cells = len(quota)
        remaining, last = quota.copy(), np.zeros(num_cells, dtype=np.uint64)
        for part in self.parts():
            if (part["cell"] < 0).any():
                part = part[part["cell"] >= 0]
            cell = part["cell"]
            part_counts = np.bincount(cell, minlength=num_cells)
            ends_here, has_quota = (remaining > 0) & (part_counts >= remaining), remaining > 0
            candidates = part[ends_here[cell]]
            candidates = candidates[np.lexsort((candidates["key"], candidates["cell"]))]
            cells, first = np.unique(candidates["cell"], return_index=True)
            last[cells] = candidates["key"][first + remaining[cells] - 1]
            remaining = np.maximum(remaining - part_counts, 0)
            if kept_imbalance is not None:
                is_kept = has_quota[cell] & (part["key"] <= np.where(remaining > 0, _LARGEST_KEY, last)[cell])
                kept_imbalance += np.bincount(part["imbalance"][is_kept], minlength=len(kept_imbalance))
        last[remaining > 0] = _LARGEST_KEY
        return last


def _repeated_keys(key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the distinct repeated keys of (n,)."""
    key = np.sort(key)
    return np.unique(key[1:][key[1:] == key[:-1]])


_RANKS = 1 << 20  # steps of balance that ranks distinguish: 2e-6 each
_HALF_BITS, _HASH_UNIT = np.uint64(32), np.float64(2.0**-32)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOutcome:
    """Outcome of a rule for each row (n,): the score of a dropped row is on the wrong side of the threshold.

    Both are NaN for rows excluded before the rule. bin: -1 where there is none; weight: weight in the loss.
    """

    score: NDArray[np.float64]
    threshold: NDArray[np.float64]
    bin: NDArray[np.int16] | None = None
    weight: NDArray[np.float32] | None = None


class SelectionRule(Protocol):
    """Rule that selects rows. Cells are numbered from 0; -1 is a row without a needed modality, never kept."""

    @property
    def name(self) -> str:
        """Default name of the manifest."""

    @property
    def between(self) -> str:
        """Modality pair of the manifest's discrepancy, as in ScoreTable.discrepancy."""

    @property
    def reason(self) -> str:
        """Reason recorded for the rows that are not kept, in one word."""

    @property
    def num_cells(self) -> int:
        """Number of cells."""

    def cells(self, batch: ScoreBatch) -> NDArray[np.int32]:
        """Return the cell of each row, (n,)."""

    def quotas(self, counts: Counts) -> Counts:
        """Compute how many rows of each cell to keep, (c,), from the counts of the cells (c,)."""

    @property
    def by_score(self) -> bool:
        """Whether a cell keeps the rows of smallest `order` instead of smallest hash."""

    @property
    def weighs(self) -> bool:
        """Whether rows have other weights than 1, whose sums are rounded batch by batch."""

    def order(self, batch: ScoreBatch) -> NDArray[np.uint64]:
        """Return the keys (n,) by which rows are selected if by_score is set."""

    def explain(self, batch: ScoreBatch, cell: NDArray[np.int32], hash_outcome: RowOutcome) -> RowOutcome:
        """Return the outcome of each row; `hash_outcome` has its hash and its cell's last one, both in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Decision on each row (n,). rank: number of kept rows that are more balanced; reason: index in Selection.reasons.

    discrepancy is that of the rule's `between`.
    """

    keep: NDArray[np.bool_]
    discrepancy: Floats
    rank: NDArray[np.int32]
    reason: NDArray[np.int8]
    outcome: RowOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Result of the first pass: per cell (c,), counts of available rows, quota of kept rows, and last kept keys."""

    scores: ScoreFiles
    rule: SelectionRule
    counts: Counts
    quota: Counts
    last_keys: NDArray[np.uint64]
    first_ranks: NDArray[np.int64]  # first rank of each step of balance

    @property
    def reasons(self) -> tuple[str, ...]:
        """Reasons for which rows are dropped."""
        return (self.rule.reason, "missing-modality", *(members.reason for members in self.scores.members))

    def decide(self, batch: ScoreBatch) -> Decision:
        """Return the decision on each row of a batch; rows are independent of each other."""
        cell = self.rule.cells(batch)
        key = self.rule.order(batch) if self.rule.by_score else batch.key
        has_quota, last_key = self.quota[cell] > 0, self.last_keys[cell]
        keep = (cell >= 0) & (batch.excluded_by == 0) & has_quota & (key <= last_key)
        reason = (cell < 0).astype(np.int8)
        if self.scores.members:
            reason = np.where(batch.excluded_by > 0, batch.excluded_by + 1, reason).astype(np.int8)
        # 32 bits of a hash are enough, and take half the space.
        score = (key >> _HALF_BITS) * _HASH_UNIT
        threshold = np.where(self.quota > 0, (self.last_keys >> _HALF_BITS) * _HASH_UNIT, 0.0)[cell]
        if reason.any():  # rows that the rule did not consider
            score[reason > 0] = threshold[reason > 0] = np.nan
        hash_outcome = RowOutcome(score=score, threshold=threshold)
        rank = np.zeros(len(batch), dtype=np.int32)
        rank[keep] = self.first_ranks[imbalance_key(batch)[keep]]
        return Decision(
            keep=keep,
            discrepancy=batch.discrepancy(self.rule.between),
            rank=rank,
            reason=reason,
            outcome=self.rule.explain(batch, cell, hash_outcome),
        )


def select_rows(scores: ScoreFiles, rule: SelectionRule, *, scratch: Path) -> Selection:
    """Run the first pass: count the rows of each cell and compute the last key that each keeps.

    `scratch` is a folder for files of 16 bytes per row, used above 262,144 rows.
    Raises ScoreError for repeated ids, and ManifestError if no row is kept.
    """
    counts = np.zeros(rule.num_cells, dtype=np.int64)
    with ExitStack() as stack:
        ids = stack.enter_context(ExternalSort(scores.num_rows, scratch))
        sort_by_key = stack.enter_context(ExternalSort(scores.num_rows, scratch)) if rule.by_score else ids
        for batch in scores.batches(ordered=False):
            cell, imbalance = rule.cells(batch), imbalance_key(batch)
            cell = np.where(batch.excluded_by > 0, -1, cell).astype(np.int32)
            counts += np.bincount(cell[cell >= 0], minlength=rule.num_cells)
            ids.add(batch.key, cell, imbalance)
            if rule.by_score:
                sort_by_key.add(rule.order(batch), cell, imbalance)
        repeated = stack.enter_context(ThreadPoolExecutor(1)).submit(ids.repeated)  # runs while this thread sorts
        quota = np.minimum(rule.quotas(counts), counts)
        if not quota.any():
            raise ManifestError(f"{rule.name}: none of the {scores.num_rows} scored samples qualifies; relax the rule")
        kept_by_imbalance = np.zeros(_RANKS, dtype=np.int64)
        last_keys = sort_by_key.last_keys(quota, kept_imbalance=kept_by_imbalance)
        check_unique(scores, repeated.result())
    return Selection(
        scores=scores,
        rule=rule,
        counts=counts,
        quota=quota,
        last_keys=last_keys,
        first_ranks=np.cumsum(kept_by_imbalance) - kept_by_imbalance,
    )


def imbalance_key(batch: ScoreBatch) -> NDArray[np.uint32]:
    """Compute the imbalance of each row, (n,) in steps: from the balance score, or from the gap if there is none."""
    balance = batch.numbers("balance")
    imbalance = batch.gap if balance is None else (1 - balance) / 2
    steps = imbalance * np.float32(_RANKS - 1)
    return np.where(np.isnan(steps), _RANKS - 1, np.clip(steps, 0, _RANKS - 1)).astype(np.uint32)


def check_unique(scores: ScoreFiles, repeated: NDArray[np.uint64]) -> None:
    """Raise ScoreError if any rows with repeated keys have the same id."""
    if len(repeated) == 0:
        return
    count_of_id: dict[str, int] = {}
    for batch in scores.batches():
        for index in np.flatnonzero(np.isin(batch.key, repeated)):
            sample_id = str(batch.table["sample_id"][int(index)].as_py())
            count_of_id[sample_id] = count_of_id.get(sample_id, 0) + 1
    repeated_ids = sorted(sample_id for sample_id, count in count_of_id.items() if count > 1)
    if repeated_ids:
        raise ScoreError(
            f"{sum(count_of_id[sample_id] - 1 for sample_id in repeated_ids)} ids occur more than once in the score "
            f"table (the first: {repeated_ids[0]}): ids must be unique"
        )


def share_total(total: int, counts: Counts) -> Counts:
    """Share a total among cells (c,) in proportion to counts, by largest remainders; no cell exceeds its count."""
    exact = total * counts / max(int(counts.sum()), 1)
    shares: Counts = np.minimum(np.floor(exact).astype(np.int64), counts)
    extra = np.argsort(np.where(shares < counts, shares - exact, np.inf), kind="stable")[: total - int(shares.sum())]
    shares[extra] += 1
    return shares
