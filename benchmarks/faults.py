"""Fault injection: commands that are killed, interrupted, out of disk space or run concurrently.

Run with: python benchmarks/faults.py [--points 20] [--full-points 10] [--minutes M] [--seed 0] [--only score,pairs]
Each command (score, score --overwrite, split, finetune, export ...) gets SIGKILL, SIGTERM and SIGINT at `--points`
points each, half of them just before one of its file operations, half at a time of its duration; and a disk that is
full at `--full-points` sizes: a tmpfs in a mount namespace of its own where root allows, else RLIMIT_FSIZE. After each
fault the folder is checked, the same command runs again, and the bytes are compared with those of an undisturbed run:
all files, but for `seconds` in run.json and metrics.json; checkpoints are compared by what they hold. Pairs of commands
run at once, also as process 1 of two containers, and must leave what they leave one after the other. Prints a Markdown
table; the exit code is 1 if anything in it is not 0 or a fault was never struck. A fault is repeated by itself with
`--repeat` and the words that were printed for it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from faulting.cases import Cases, Reader
from faulting.checks import COLUMNS, Damage
from faulting.commands import COMMANDS, PAIRS, Pair
from faulting.pairs import draw_operations, run_pair
from faulting.processes import Bench, Point
from faulting.strikes import PAGE, SIGNALS, Tested, draw_points, draw_sizes, fill, strike

_NAMESPACE = "FAULTS_IN_NAMESPACE"
_PAIR_RUNS = 4
NUM_FAULTS = len(SIGNALS) + 1  # and a full disk
_REDRAWS = 3  # of points that a command does not reach


@dataclass(slots=True)
class Row:
    """A row of the table: a command, a fault, and the number of failures of each kind."""

    command: str
    fault: str
    strikes: int = 0
    failed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COLUMNS, 0))

    def add(self, damage: Damage, *, repeat: str) -> None:
        """Count a fault, and print its damage with the argument of --repeat that repeats it."""
        self.strikes += 1
        for column, lines in damage.lines.items():
            self.failed[column] += bool(lines)
            if lines:
                suffix = f" (and {len(lines) - 2} more)" * (len(lines) > 2)
                print(f"{repeat}: {column}: {'; '.join(lines[:2])}{suffix}", flush=True)

    def __str__(self) -> str:
        return f"| {self.command} | {self.fault} | {self.strikes} | {' | '.join(map(str, self.failed.values()))} |"


@dataclass(slots=True)
class Budget:
    """Total minutes, None for no limit, divided among the commands."""

    minutes: float | None
    started: float = field(default_factory=time.monotonic)

    def points(self, max_points: int, *, seconds_each: float, commands_left: int) -> int:
        """Return the number of points of each fault for a command, at least 1."""
        if self.minutes is None:
            return max_points
        seconds_left = 60 * self.minutes - (time.monotonic() - self.started)
        return max(1, min(max_points, int(seconds_left / commands_left / NUM_FAULTS / seconds_each)))


def rows_of(tested: Tested, options: argparse.Namespace, budget: Budget, *, commands_left: int) -> Iterator[Row]:
    """Yield a row per signal, and one for full disks."""
    name, seconds = tested.command.name, 2.0 * tested.reference.seconds + 1.0
    count = budget.points(options.points, seconds_each=seconds, commands_left=commands_left)
    if count < options.points:
        print(f"{name}: {count} points instead of {options.points}, for --minutes {options.minutes:g}", flush=True)
    for number in SIGNALS:
        row = Row(name, number.name)
        for attempt in range(_REDRAWS):
            for point in draw_points(tested, number, count - row.strikes, seed=options.seed + 1_000 * attempt):
                if (struck := strike(tested, point)) is not None:
                    damage, operation = struck
                    row.add(damage, repeat=f"--repeat {name}:{point}{f' (before {operation})' * bool(operation)}")
            if row.strikes == count:
                break
        yield row
    row = Row(name, "disk full" if options.by_mount else "file limit")
    for size in draw_sizes(tested, min(count, options.full_points), seed=options.seed, by_mount=options.by_mount):
        while (damage_of_full := fill(tested, size, by_mount=options.by_mount)) is None and size > 0:
            size = size // 2 // PAGE * PAGE  # the space sufficed: replaced files freed some meanwhile
        if damage_of_full is not None:
            row.add(damage_of_full, repeat=f"--repeat {name}:full:{size}")
    yield row


def row_of_pair(cases: Cases, pair: Pair, operations: list[int]) -> Row:
    """Return the row of two commands that run at once, the first waiting before each of some operations."""
    row, num_refused = Row(pair.name, "two writers"), 0
    for operation in operations:
        damage, refused = run_pair(cases, pair, operation)
        row.add(damage, repeat=f"--repeat '{pair.name}:op{operation}'")
        num_refused += refused
    row.fault += f", one refused in {num_refused}" * bool(num_refused)
    return row


def repeat(cases: Cases, reader: Reader, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the row of one fault: COMMAND:SIGNAL:opN, COMMAND:SIGNAL:tSHARE[:group], COMMAND:full:BYTES or PAIR:opN."""
    name, _, text = options.repeat.partition(":")
    if name in (pair.name for pair in PAIRS):
        pair = next(pair for pair in PAIRS if pair.name == name)
        yield row_of_pair(cases, pair, [int(text.removeprefix("op"))])
        return
    command = next(command for command in COMMANDS if command.name == name)
    tested = Tested(command=command, reference=cases.reference(command), cases=cases, reader=reader)
    row = Row(name, text)
    if text.startswith("full:"):
        damage = fill(tested, int(text.removeprefix("full:")), by_mount=options.by_mount)
    else:
        struck = strike(tested, Point.parse(text))
        damage = None if struck is None else struck[0]
    if damage is not None:
        row.add(damage, repeat=options.repeat)
    yield row


def rows(cases: Cases, reader: Reader, options: argparse.Namespace) -> Iterator[Row]:
    """Yield all rows as they are finished."""
    budget, only = Budget(options.minutes), options.only.split(",") if options.only else []
    commands = [command for command in COMMANDS if not only or any(command.name.startswith(name) for name in only)]
    pairs = [pair for pair in PAIRS if not only or "pairs" in only or pair.name in only]
    for index, command in enumerate(commands):
        tested = Tested(command=command, reference=cases.reference(command), cases=cases, reader=reader)
        undisturbed = Row(command.name, "none: run twice")
        undisturbed.add(_unstable(tested), repeat=f"{command.name}, undisturbed")
        yield undisturbed
        yield from rows_of(tested, options, budget, commands_left=len(commands) - index + len(pairs) // 3)
    for pair in pairs:
        if pair.containers is not None and not options.can_mount:
            print(f"{pair.name}: skipped, containers need root and unshare", flush=True)
            continue
        count = min(_PAIR_RUNS, options.points)
        yield row_of_pair(cases, pair, draw_operations(cases, pair, count, seed=options.seed))


def _unstable(tested: Tested) -> Damage:
    damage = Damage()
    damage.add("bytes differing", *tested.reference.unstable)
    return damage


def main(options: argparse.Namespace) -> int:
    started = time.monotonic()
    done = []
    with tempfile.TemporaryDirectory(prefix="mmaudit-faults-") as scratch:
        bench = Bench(python=options.python, scratch=Path(scratch).resolve())
        cases, reader = Cases(bench), Reader(bench)
        try:
            for row in (repeat if options.repeat else rows)(cases, reader, options):
                print(f"  {row}", flush=True)
                done.append(row)
        finally:
            reader.close()
    print(f"\n| command | fault | strikes | {' | '.join(COLUMNS)} |\n|{'---|' * (3 + len(COLUMNS))}")
    print("\n".join(str(row) for row in done))
    failed = {column: sum(row.failed[column] for row in done) for column in COLUMNS}
    print(f"\n{sum(row.strikes for row in done)} strikes, seed {options.seed}, {time.monotonic() - started:.0f} s")
    print(", ".join(f"{count} {column}" for column, count in failed.items()))
    missed = [f"{row.command}, {row.fault}" for row in done if not row.strikes]
    if missed:
        print(f"never struck: {'; '.join(missed)}")
    return int(any(failed.values()) or bool(missed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=20, help="points per signal and command")
    parser.add_argument("--full-points", type=int, default=10, help="sizes of a full disk per command")
    parser.add_argument("--minutes", type=float, help="approximate total time; fewer points are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="comma-separated prefixes of command names, names of pairs, or pairs for all")
    parser.add_argument("--repeat", help="run one fault, as it was printed")
    parser.add_argument("--file-limit", action="store_true", help="RLIMIT_FSIZE also where a tmpfs can be mounted")
    parser.add_argument("--python", default=sys.executable, help="the interpreter whose mmaudit is tested")
    parsed = parser.parse_args()
    parsed.can_mount = os.geteuid() == 0 and shutil.which("unshare") is not None
    parsed.by_mount = parsed.can_mount and not parsed.file_limit
    if parsed.can_mount and _NAMESPACE not in os.environ:
        arguments = ["unshare", "--mount", sys.executable, *sys.argv]
        os.execvpe(arguments[0], arguments, {**os.environ, _NAMESPACE: "1"})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that scratch is removed and no process left
    sys.exit(main(parsed))
