"""Case folders, and references: the folder before a command and after an undisturbed run of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .commands import Arguments, Command
from .data import write_clips, write_features
from .processes import Bench, Outcome, Running, run
from .trees import Snapshot, differing, leftovers, snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """An undisturbed run of a command: the folder before and after it, its duration and its file operations."""

    stage: Path
    before: Snapshot
    after: Snapshot
    seconds: float
    worker_seconds: float  # for which it has worker processes
    operations: tuple[str, ...]
    new_sizes: tuple[int, ...]  # bytes of the files that it writes
    unstable: tuple[str, ...]  # files that differ between two undisturbed runs


class Cases:
    """Case folders; the results of the preceding commands are stored, and copied for every case."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        for name in ("state", "cache", "tmp", "stages"):
            (bench.scratch / name).mkdir()
        write_clips(bench.scratch / "data" / "clips")
        write_features(bench.scratch / "data" / "features.parquet")
        self._stages: dict[tuple[Arguments, ...], Path] = {}
        self._codes: dict[tuple[Arguments, ...], tuple[int, ...]] = {(): ()}
        self._seconds: dict[tuple[Arguments, ...], float] = {}

    def stage(self, commands: tuple[Arguments, ...]) -> Path:
        """Return a folder as the commands leave it, one after another."""
        if commands not in self._stages:
            if commands:
                self.begin(self.stage(commands[:-1]))
                outcome = run(self.bench, commands[-1])
                self._codes[commands] = (*self._codes[commands[:-1]], outcome.code)
                self._seconds[commands] = outcome.seconds
            else:
                self.bench.case.mkdir()
            copy = self.bench.scratch / "stages" / str(len(self._stages))
            shutil.copytree(self.bench.case, copy)
            self.end()
            self._stages[commands] = copy
        return self._stages[commands]

    def codes(self, commands: tuple[Arguments, ...]) -> tuple[int, ...]:
        """Return the exit codes of commands that run one after another."""
        self.stage(commands)
        return self._codes[commands]

    def seconds(self, commands: tuple[Arguments, ...]) -> float:
        """Return how long the last of some commands takes, after the others."""
        self.stage(commands)
        return self._seconds[commands]

    def begin(self, stage: Path) -> None:
        """Make the case folder a copy of a stage."""
        self.bench.case.mkdir(exist_ok=True)  # it may be a mounted file system
        shutil.copytree(stage, self.bench.case, dirs_exist_ok=True)

    def end(self) -> None:
        """Remove the case folder, and what commands left among the temporary files."""
        shutil.rmtree(self.bench.case)
        shutil.rmtree(self.bench.scratch / "tmp")
        (self.bench.scratch / "tmp").mkdir()

    def reference(self, command: Command) -> Reference:
        """Run a command twice, undisturbed. Raises RuntimeError where it does not end with 0."""
        for count in range(1, len(command.before) + 1):
            if self.codes(command.before[:count])[-1] != 0:
                raise RuntimeError(f"mmaudit {' '.join(command.before[count - 1])} does not end with 0")
        stage = self.stage(command.before)
        trees, seconds = list[Snapshot](), list[float]()
        worker_seconds = self._worker_seconds(command, stage) if command.has_workers else 0.0
        for _ in range(2):
            self.begin(stage)
            outcome = run(self.bench, command.arguments)
            _check_undisturbed(command, outcome)
            trees.append(snapshot(self.bench.case))
            seconds.append(outcome.seconds)
            self.end()
        before = snapshot(stage)
        sizes = self._new_sizes(command, before, trees[0])
        return Reference(
            stage=stage,
            before=before,
            after=trees[0],
            seconds=min(seconds),
            worker_seconds=worker_seconds,
            operations=tuple(self.bench.operations()),
            new_sizes=sizes,
            unstable=(*differing(trees[1], trees[0]), *leftovers(trees[1], trees[0])),
        )

    def _worker_seconds(self, command: Command, stage: Path) -> float:
        self.begin(stage)
        running = Running(self.bench, command.arguments)
        seconds = running.worker_seconds()
        running.finish()
        self.end()
        if not seconds:
            raise RuntimeError(f"{command.name} has no workers that could be orphaned: its data are too small")
        return seconds

    def _new_sizes(self, command: Command, before: Snapshot, after: Snapshot) -> tuple[int, ...]:
        folder = self.stage((*command.before, command.arguments))
        return tuple(
            (folder / path).stat().st_size for path, mark in after.items() if mark and before.get(path) != mark
        )


class Reader:
    """A process in which the tested mmaudit reads the files that a fault left."""

    def __init__(self, bench: Bench) -> None:
        self._process = subprocess.Popen(
            [bench.python, str(Path(__file__).parent / "reader.py")],
            env=bench.environment("reader"),
            cwd=bench.scratch,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def refusals(self, run_folder: Path) -> list[str]:
        """Return the files of a run folder that mmaudit refuses."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{run_folder}\n")
        self._process.stdin.flush()
        return list(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def _check_undisturbed(command: Command, outcome: Outcome) -> None:
    if outcome.code != 0 or outcome.orphans:
        last = (outcome.errors or ["it prints nothing"])[-1]
        raise RuntimeError(f"{command.name} undisturbed: exit code {outcome.code}, {last}; {outcome.orphans}")
