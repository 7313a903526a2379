"""Tests of executors: every part belongs to one process."""

from __future__ import annotations

import pytest

from mmaudit.audit.engine.executors import LocalExecutor, ShardExecutor
from mmaudit.audit.engine.plan import Part

PARTS = tuple(
    Part(index=index, first_shard=index, end_shard=index + 1, first=9 * index, num_rows=9) for index in range(6)
)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_every_part_belongs_to_one_process(count: int) -> None:
    done: list[Part] = []
    for number in range(count, 0, -1):
        ShardExecutor(f"{number}/{count}").run(done.extend, PARTS)
    assert sorted(done, key=lambda part: part.index) == list(PARTS)


def test_local_executor_runs_all_parts_in_order() -> None:
    done: list[Part] = []
    LocalExecutor().run(done.extend, PARTS)
    assert done == list(PARTS)
