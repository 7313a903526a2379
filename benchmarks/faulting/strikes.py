"""Signals and full disks: points drawn by a seed, one fault at each, the checks after it, and the rerun."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

from .cases import Cases, Reader, Reference
from .checks import Damage, check_folder, check_full, check_signal, last_line
from .commands import REPORT, Command
from .processes import Outcome, Point, run, run_struck
from .trees import differing, leftovers, snapshot

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PAGE = 4_096  # of a tmpfs
_ROOM = "64m"  # of the small file system, when it is not meant to be full


@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """A command, its reference, and what is needed to check it."""

    command: Command
    reference: Reference
    cases: Cases
    reader: Reader


def draw_points(tested: Tested, number: signal.Signals, count: int, *, seed: int) -> list[Point]:
    """Draw points: half of them before file operations, the others by time, or half of these while workers work.

    Ctrl-C reaches every process of a terminal, SIGTERM the group half the time; kill -9 is sent to the parent alone,
    which is worse than to all.
    """
    rng = _generator(seed, tested.command.name, number.name)
    num_operations = len(tested.reference.operations)
    by_operation = min((count + 1) // 2, num_operations)
    operations = sorted(rng.choice(num_operations, by_operation, replace=False) + 1)
    points = [Point(number=number, operation=int(operation)) for operation in operations]
    shares = sorted(float(share) for share in rng.random(count - by_operation))
    by_workers = (len(shares) + 1) // 2 if tested.command.has_workers else 0
    points += [
        Point(number=number, share=share, in_workers=bool(in_workers))
        for share, in_workers in zip(shares, rng.permutation(len(shares)) < by_workers, strict=True)
    ]
    to_group = [number == signal.SIGINT or (number == signal.SIGTERM and index % 2 == 1) for index in range(count)]
    return [replace(point, to_group=group) for point, group in zip(points, to_group, strict=True)]


def strike(tested: Tested, point: Point) -> tuple[Damage, str] | None:
    """Send a signal at a point, check the files, run the command again, and compare. None: it ended before."""
    command, reference, bench = tested.command, tested.reference, tested.cases.bench
    tested.cases.begin(reference.stage)
    seconds = reference.worker_seconds if point.in_workers else reference.seconds
    outcome = run_struck(bench, command.arguments, point, usual_seconds=seconds)
    operations = bench.operations()
    operation = "" if point.operation is None or not outcome.struck else operations[point.operation - 1]
    damage = None
    if outcome.struck:
        damage = Damage()
        damage.add("orphans", *outcome.orphans)
        state = _check_left(tested, damage)
        check_signal(outcome, point.number, is_new=state == "new", damage=damage)
        _check_rerun(tested, state, damage)
    tested.cases.end()
    return None if damage is None else (damage, operation)


def fill(tested: Tested, num_free: int, *, by_mount: bool) -> Damage | None:
    """Run a command on a disk with `num_free` bytes left, free space, run it again. None: the space sufficed."""
    bench, stage = tested.cases.bench, tested.reference.stage
    if by_mount:
        bench.case.mkdir()
        with _small_disk(tested) as resize:
            tested.cases.begin(stage)
            resize(num_free)
            outcome = run(bench, tested.command.arguments)
            resize(None)
            damage = _check_full(tested, outcome)
    else:
        tested.cases.begin(stage)
        damage = _check_full(tested, run(bench, tested.command.arguments, max_file_bytes=num_free))
    tested.cases.end()
    return damage


def draw_sizes(tested: Tested, count: int, *, seed: int, by_mount: bool) -> list[int]:
    """Draw how many bytes are left: from nothing to what the command writes, in pages where there is a file system."""
    rng = _generator(seed, tested.command.name, "full")
    sizes = tested.reference.new_sizes
    step = PAGE if by_mount else 1
    max_steps = sum(-(-size // PAGE) for size in sizes) if by_mount else max(sizes)
    drawn = rng.choice(max_steps, min(count, max_steps), replace=False)
    return [int(size) * step for size in sorted(drawn)]


def _check_full(tested: Tested, outcome: Outcome) -> Damage | None:
    """Check the files that a full disk left, after freeing space, and run the command again."""
    if outcome.code == 0:
        return None
    damage = Damage()
    damage.add("orphans", *outcome.orphans)
    state = _check_left(tested, damage)
    check_full(outcome, damage)
    _check_rerun(tested, state, damage)
    return damage


def _check_left(tested: Tested, damage: Damage) -> str:
    """Check the files that a fault left. An interrupted swap is completed by the next command, tried on a copy."""
    case, trial = tested.cases.bench.case, Damage()
    state = check_folder(case, tested.command, tested.reference, tested.reader, trial)
    if state == "mixed" and tested.command.swaps:
        copy = case.with_name("kept")
        shutil.copytree(case, copy)
        run(tested.cases.bench, REPORT)
        retried = Damage()
        if check_folder(case, tested.command, tested.reference, tested.reader, retried) != "mixed":
            trial = retried
        for path in case.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(copy, case, dirs_exist_ok=True)
        shutil.rmtree(copy)
    for column, lines in trial.lines.items():
        damage.add(column, *lines)
    return state


def _check_rerun(tested: Tested, state: str, damage: Damage) -> None:
    """Run the same command again; an export that already exists must be refused."""
    outcome = run(tested.cases.bench, tested.command.arguments)
    finished = outcome.code == 0 or (outcome.code == 2 and state == "new")
    if not finished:
        damage.add("wrong exits", f"exit code {outcome.code} of the rerun: {last_line(outcome)}")
    damage.add("orphans", *outcome.orphans)
    tree = snapshot(tested.cases.bench.case)
    damage.add("bytes differing", *differing(tree, tested.reference.after))
    damage.add("left over", *leftovers(tree, tested.reference.after))


@contextmanager
def _small_disk(tested: Tested) -> Iterator[Callable[[int | None], None]]:
    """Mount a small file system as the case folder, in this process's own mount namespace; yields how to resize it."""
    case = tested.cases.bench.case
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_ROOM}", "faults", str(case)], check=True)

    def resize(num_free: int | None) -> None:
        usage = shutil.disk_usage(case)
        size = _ROOM if num_free is None else str(max(PAGE, usage.used + num_free))  # 0 would mean no limit
        subprocess.run(["mount", "-o", f"remount,size={size}", str(case)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", str(case)], check=True)


def _generator(seed: int, *names: str) -> np.random.Generator:
    return np.random.default_rng([seed, *(crc32(name.encode()) for name in names)])
