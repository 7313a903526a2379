"""Executors: which parts of a stage a process works on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .plan import Part, take_parts

RunParts = Callable[[Sequence[Part]], None]


class Executor(Protocol):
    """Runs a stage that works on each part by itself; the results do not depend on the executor."""

    def run(self, stage: RunParts, parts: Sequence[Part]) -> None:
        """Run a stage on these parts; `stage` may be called with any of them, in any order and any process."""


@dataclass(frozen=True, slots=True)
class LocalExecutor:
    """All parts in this process, whose stages start processes and threads of their own."""

    def run(self, stage: RunParts, parts: Sequence[Part]) -> None:
        """Run a stage on all parts in order."""
        stage(parts)


@dataclass(frozen=True, slots=True)
class ShardExecutor:
    """The parts of shard i of n, as --shard states it: one task of an array of processes or machines."""

    shard: str

    def run(self, stage: RunParts, parts: Sequence[Part]) -> None:
        """Run a stage on the parts of this shard in order."""
        stage(take_parts(self.shard, parts))
