"""Tests of the plan of parts: it follows from the shards and the size of a part alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pytest

from mmaudit.audit.engine.plan import SINGLE, PartsConfig, plan_parts, take_parts
from mmaudit.audit.errors import ConfigError, RunError


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredShard:
    """A shard of a file that is not read."""

    index: int
    first: int
    num_rows: int
    location: tuple[str, int, int] | None = None

    def read(self, columns: list[str]) -> pa.Table:
        raise AssertionError(f"{columns} are read")


def shards_of(*sizes: int, file: str = "a.parquet") -> list[StoredShard]:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    pairs = enumerate(zip(starts, sizes, strict=True))
    return [StoredShard(index=index, first=first, num_rows=n, location=(file, index, 0)) for index, (first, n) in pairs]


def parts_of(*sizes: int, rows: int) -> list[int]:
    return [part.num_rows for part in plan_parts(shards_of(*sizes), config=PartsConfig(rows=rows), depends_on=()).parts]


def test_small_data_are_one_part() -> None:
    assert parts_of(*[10] * 4, rows=10) == [10 * SINGLE]
    assert parts_of(*[10] * 5, rows=10) == [10] * 5


def test_parts_are_filled_with_consecutive_shards() -> None:
    assert parts_of(3, 4, 5, 6, 7, 8, 9, rows=10) == [7, 5, 6, 7, 8, 9]
    assert parts_of(50, 1, 1, rows=10) == [50, 2]  # a shard is not divided


def test_parts_cover_all_rows_in_order() -> None:
    shards = shards_of(*range(1, 30))
    plan = plan_parts(shards, config=PartsConfig(rows=40), depends_on=())
    assert plan.num_rows == sum(range(30)) == sum(part.num_rows for part in plan.parts)
    for before, after in zip(plan.parts, plan.parts[1:], strict=False):
        assert (after.first, after.first_shard) == (before.first + before.num_rows, before.end_shard)
        assert shards[after.first_shard].first == after.first


@pytest.mark.parametrize("text", ["", "1", "4/3", "0/3", "-1/3", "a/b", "1/", "/2", "0/0"])
def test_invalid_shard_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not of the form i/n with i from 1 to n"):
        take_parts(text, ())


def test_written_plan_is_not_replaced_by_another(tmp_path: Path) -> None:
    shards, config = shards_of(10, 10), PartsConfig(rows=10)
    plan = plan_parts(shards, config=config, depends_on=("seed 0",))
    plan.write(tmp_path / "shards.json", shards)
    before = (tmp_path / "shards.json").read_bytes()
    plan.write(tmp_path / "shards.json", shards)
    other_seed = plan_parts(shards, config=config, depends_on=("seed 1",))
    for other in (other_seed, replace(plan, part_rows=5)):
        with pytest.raises(RunError, match="parts of other data or of another config"):
            other.write(tmp_path / "shards.json", shards)
    assert (tmp_path / "shards.json").read_bytes() == before


def test_changed_file_is_another_plan(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"one")
    shards = shards_of(10, file=str(file))
    before = plan_parts(shards, config=PartsConfig(), depends_on=())
    assert plan_parts(shards, config=PartsConfig(), depends_on=()) == before
    file.write_bytes(b"other")
    assert plan_parts(shards, config=PartsConfig(), depends_on=()).config != before.config
