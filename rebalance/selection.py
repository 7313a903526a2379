"""Selection of rows by a rule, for score tables of any size.

A rule puts each row into a cell and says how many of each cell are kept; which ones is up to hash(seed, id). So two
passes are enough: one counts the cells and spills the hashes, from which the last hash that each cell keeps is read;
the other compares.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..audit.errors import ManifestError, ScoreError
from ..audit.metrics import Floats
from .binning import Counts
from .external_sort import ExternalSort
from .score_tables import ScoreBatch, ScoreFiles

_RANKS = 1 << 20  # steps of balance that ranks tell apart: 2e-6 of it
_HALF_BITS, _HASH_UNIT = np.uint64(32), np.float64(2.0**-32)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOutcome:
    """What a rule says of each row (n,): a dropped one was on the wrong side of `threshold` with its `score`.

    Both are NaN of a row that was ruled out before. bin: -1 where there is none; weight: that of the loss.
    """

    score: NDArray[np.float64]
    threshold: NDArray[np.float64]
    bin: NDArray[np.int16] | None = None
    weight: NDArray[np.float32] | None = None


class SelectionRule(Protocol):
    """Which samples are wanted. Cells are numbered from 0; -1 is a row that lacks a modality, and is never kept."""

    @property
    def name(self) -> str:
        """What the manifest is called unless it is told otherwise."""

    @property
    def between(self) -> str:
        """The discrepancy that the manifest holds, as ScoreTable.discrepancy takes it."""

    @property
    def reason(self) -> str:
        """Why the others are dropped, in one word."""

    @property
    def num_cells(self) -> int:
        """Cells there are."""

    def cells(self, batch: ScoreBatch) -> NDArray[np.int32]:
        """Give the cell of each row, (n,)."""

    def quotas(self, counts: Counts) -> Counts:
        """Give how many rows of each cell to keep, (c,), from how many there are."""

    @property
    def by_score(self) -> bool:
        """Whether a cell keeps the rows of least `order`, not those of least hash."""

    def order(self, batch: ScoreBatch) -> NDArray[np.uint64]:
        """Give the keys (n,) by which rows are chosen where that is not by hash."""

    def explain(self, batch: ScoreBatch, cell: NDArray[np.int32], chance: RowOutcome) -> RowOutcome:
        """Say why each row is kept or dropped; `chance` has its hash and its cell's last one, both in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What becomes of each row (n,). rank: kept rows that are more balanced; reason: a place in Choice.reasons.

    discrepancy is that of the rule's `between`.
    """

    keep: NDArray[np.bool_]
    discrepancy: Floats
    rank: NDArray[np.int32]
    reason: NDArray[np.int8]
    outcome: RowOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A rule made up its mind. counts and quota (c,) are rows by cell, there and kept; last (c,) their last keys."""

    score_files: ScoreFiles
    rule: SelectionRule
    counts: Counts
    quota: Counts
    last: NDArray[np.uint64]
    starts: NDArray[np.int64]  # rank at which each step of balance starts

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why rows are dropped, in words."""
        return (self.rule.reason, "missing-modality", *(each.reason for each in self.score_files.members))

    def decide(self, batch: ScoreBatch) -> Decision:
        """Decide about some rows; what is decided of one depends on no other."""
        cell = self.rule.cells(batch)
        key = self.rule.order(batch) if self.rule.by_score else batch.key
        some, last = self.quota[cell] > 0, self.last[cell]
        keep = (cell >= 0) & (batch.excluded_by == 0) & some & (key <= last)
        reason = (cell < 0).astype(np.int8)
        if self.score_files.members:
            reason = np.where(batch.excluded_by > 0, batch.excluded_by + 1, reason).astype(np.int8)
        # 32 bits of a hash say enough, and take half the space.
        score, threshold = (
            (key >> _HALF_BITS) * _HASH_UNIT,
            np.where(self.quota > 0, (self.last >> _HALF_BITS) * _HASH_UNIT, 0.0)[cell],
        )
        if reason.any():  # those had no part in it
            score[reason > 0] = threshold[reason > 0] = np.nan
        chance = RowOutcome(score=score, threshold=threshold)
        rank = np.zeros(len(batch), dtype=np.int32)
        rank[keep] = self.starts[imbalance_key(batch)[keep]]
        return Decision(
            keep=keep,
            discrepancy=batch.discrepancy(self.rule.between),
            rank=rank,
            reason=reason,
            outcome=self.rule.explain(batch, cell, chance),
        )


def select_rows(score_files: ScoreFiles, rule: SelectionRule, *, scratch: Path) -> Selection:
    """Make the first pass: count the rows of each cell and find the last key each keeps.

    `scratch` is a folder for files of 16 bytes a row, where there are more than a million.
    Raises ScoreError for ids that stand twice, and ManifestError where nothing is kept.
    """
    counts = np.zeros(rule.num_cells, dtype=np.int64)
    with ExitStack() as stack:
        ids = stack.enter_context(ExternalSort(score_files.num_rows, scratch))
        order = stack.enter_context(ExternalSort(score_files.num_rows, scratch)) if rule.by_score else ids
        for batch in score_files.batches(ordered=False):
            cell, bad = rule.cells(batch), imbalance_key(batch)
            cell = np.where(batch.excluded_by > 0, -1, cell).astype(np.int32)
            counts += np.bincount(cell[cell >= 0], minlength=rule.num_cells)
            ids.add(batch.key, cell, bad)
            if rule.by_score:
                order.add(rule.order(batch), cell, bad)
        repeated = stack.enter_context(ThreadPoolExecutor(1)).submit(ids.repeated)  # while this thread sorts as well
        quota = np.minimum(rule.quotas(counts), counts)
        if not quota.any():
            raise ManifestError(
                f"{rule.name}: none of the {score_files.num_rows} scored samples qualifies; widen the rule"
            )
        number = np.zeros(_RANKS, dtype=np.int64)
        last = order.last_keys(quota, kept_imbalance=number)
        check_unique(score_files, repeated.result())
    return Selection(
        score_files=score_files, rule=rule, counts=counts, quota=quota, last=last, starts=np.cumsum(number) - number
    )


def imbalance_key(batch: ScoreBatch) -> NDArray[np.uint32]:
    """Give how far from balanced each row is, (n,) in steps: by balance score, or by the gap where there is none."""
    balance = batch.numbers("balance")
    low = batch.gap if balance is None else (1 - balance) / 2
    steps = low * np.float32(_RANKS - 1)
    return np.where(np.isnan(steps), _RANKS - 1, np.clip(steps, 0, _RANKS - 1)).astype(np.uint32)


def check_unique(score_files: ScoreFiles, repeated: NDArray[np.uint64]) -> None:
    """Raise ScoreError if any of the rows whose keys stand twice are of one id."""
    if len(repeated) == 0:
        return
    seen: dict[str, int] = {}
    for batch in score_files.batches():
        for place in np.flatnonzero(np.isin(batch.key, repeated)):
            name = str(batch.table["sample_id"][int(place)].as_py())
            seen[name] = seen.get(name, 0) + 1
    twice = sorted(name for name, times in seen.items() if times > 1)
    if twice:
        raise ScoreError(
            f"{sum(seen[name] - 1 for name in twice)} ids occur more than once in the score table "
            f"(the first: {twice[0]}): ids are unique"
        )
