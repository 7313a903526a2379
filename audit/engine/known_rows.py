"""What a run knows of the rows of its parts without reading them: their files, sums of digests, and hashes of ids.

An append reads the rows of those parts only that differ from the run's, from the first of them on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.formats import Shard
from ..errors import RunError
from ..parsing import RequiredKeys, Shape
from ..row_arrays import contains
from ..storage import read_json, read_table, write_json, write_parquet
from .part_store import Store
from .plan import Part, ShardPlan, part_stamp
from .row_data import ORDER_PURPOSE

ROWS_SCHEMA = "mmaudit.rows/1"
_ROWS, _IDS = "rows.json", "ids.parquet"
_SHAPE: Shape = RequiredKeys(schema=str, parts=[RequiredKeys(stamp=str, num_rows=int, sum=str)])

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownPart:
    """A part of a run: a digest of its files with their times, see part_stamp, its rows, and the sum of row_sums."""

    stamp: str
    num_rows: int
    sum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownRows:
    """The parts of a run of large data, and where rows form groups the hashes of all ids (n,), ascending; else None."""

    parts: tuple[KnownPart, ...]
    ids: Hashes | None

    @classmethod
    def of(
        cls, plan: ShardPlan, shards: Sequence[Shard], sums: Sequence[int], *, own: Path, ids: Hashes | None
    ) -> KnownRows:
        """Return what is known of the parts of a plan; `own` is the run folder."""
        parts = tuple(
            KnownPart(
                stamp=part_stamp(shards[part.first_shard : part.end_shard], own=own), num_rows=part.num_rows, sum=value
            )
            for part, value in zip(plan.parts, sums, strict=True)
        )
        return cls(parts=parts, ids=ids)

    def write(self, folder: Path) -> None:
        """Write rows.json and ids.parquet."""
        if self.ids is not None:
            write_parquet(pa.table({"hash": self.ids}), folder / _IDS, provenance={})
        parts = [{"stamp": part.stamp, "num_rows": part.num_rows, "sum": f"{part.sum:032x}"} for part in self.parts]
        write_json({"schema": ROWS_SCHEMA, "parts": parts}, folder / _ROWS)

    @classmethod
    def read(cls, folder: Path) -> KnownRows | None:
        """Read what `write` wrote; None if a run has none, as of data whose fingerprint is no sum."""
        if not (folder / _ROWS).exists():
            return None
        content = read_json(folder / _ROWS, error=RunError, shape=_SHAPE)
        try:
            parts = tuple(
                KnownPart(stamp=part["stamp"], num_rows=part["num_rows"], sum=int(part["sum"], 16))
                for part in content["parts"]
            )
        except ValueError as error:
            raise RunError(f"{folder / _ROWS} is damaged: {error}") from error
        ids = read_table(folder / _IDS, error=RunError)["hash"].to_numpy() if (folder / _IDS).exists() else None
        return cls(parts=parts, ids=ids)

    def num_unchanged(self, plan: ShardPlan, shards: Sequence[Shard], *, own: Path) -> int:
        """Return how many leading parts of a plan are parts of the run, of the same files with the same times."""
        for known, part in zip(self.parts, plan.parts, strict=False):
            stamp = part_stamp(shards[part.first_shard : part.end_shard], own=own)
            if not stamp or (known.stamp, known.num_rows) != (stamp, part.num_rows):
                return part.index
        return min(len(self.parts), len(plan.parts))


def hashes_of_ids(store: Store, num_parts: int) -> Hashes:
    """Return the hashes of all ids, ascending, from the row tables of all parts."""
    name = f"hash {ORDER_PURPOSE}"
    return np.sort(np.concatenate([store.read("rows", index)[name].to_numpy() for index in range(num_parts)]))


def merge_hashes(hashes: Hashes, added: Hashes) -> Hashes:
    """Return ascending hashes (n,) with those of `added` that are not among them."""
    new = np.unique(added[~contains(hashes, added)])
    return np.insert(hashes, np.searchsorted(hashes, new), new)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """The parts of grown data from `first_part` on, whose rows are counted from the first of them.

    first_row: Row of the data that the first part begins with.
    """

    first_part: int
    first_row: int
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, plan: ShardPlan, first_part: int) -> Tail:
        """Return the parts of a plan from one on."""
        first_row = plan.parts[first_part].first
        parts = tuple(replace(part, first=part.first - first_row) for part in plan.parts[first_part:])
        return cls(first_part=first_part, first_row=first_row, parts=parts)
