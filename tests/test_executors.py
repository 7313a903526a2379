"""Tests of executors: every part belongs to one process."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from mmaudit.audit.engine.executors import LocalExecutor, ShardExecutor
from mmaudit.audit.engine.plan import Part

PARTS = tuple(
    Part(index=index, first_shard=index, end_shard=index + 1, first=9 * index, num_rows=9) for index in range(6)
)


def collect(job: Any, parts: Sequence[Part]) -> None:
    """Run as a stage that keeps the parts that it works on."""
    job.done.extend(parts)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_every_part_belongs_to_one_process(count: int) -> None:
    job: Any = SimpleNamespace(done=[])
    for number in range(count, 0, -1):
        ShardExecutor(f"{number}/{count}").run(collect, job, PARTS)
    assert sorted(job.done, key=lambda part: part.index) == list(PARTS)


def test_local_executor_runs_all_parts_in_order() -> None:
    job: Any = SimpleNamespace(done=[])
    LocalExecutor().run(collect, job, PARTS)
    assert job.done == list(PARTS)
