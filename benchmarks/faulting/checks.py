"""Checks after a fault: results lost or mixed, half files, orphans, wrong exit codes, other bytes after the rerun."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field
from pathlib import Path

from .cases import Reader, Reference
from .commands import Command
from .processes import Outcome
from .trees import Snapshot, half_files, results, snapshot

COLUMNS = ("losses", "half files", "orphans", "bytes differing", "left over", "wrong exits")
_REMADE = re.compile(r"run/(report\.html|report\.json|figures/.*)")  # rewritten by the rerun from the other results
_COMMAND_FRAME = "cli/app.py"  # in the traceback of a command that has begun
_REASONS = ("No space left on device", "File too large", "disk is full", "Disk quota exceeded")


@dataclass(frozen=True, slots=True)
class Damage:
    """Damage found after one fault, one line each, by column."""

    lines: dict[str, list[str]] = field(default_factory=lambda: {column: [] for column in COLUMNS})

    def add(self, column: str, *lines: str) -> None:
        """Add lines to a column."""
        self.lines[column].extend(lines)

    def __bool__(self) -> bool:
        return any(self.lines.values())


def state_of(command: Command, reference: Reference, tree: Snapshot) -> tuple[str, list[str]]:
    """Return `old`, `new`, `partial` or `mixed`, and what is lost or mixed.

    old: as before the command; new: as after it, but for the report, which the rerun writes; partial: results of a
    command that replaces nothing, some of them there. Anything else is a loss.
    """
    visible, before, after = results(tree), results(reference.before), results(reference.after)
    if visible == before:
        return "old", []
    if all(visible.get(path) == after.get(path) for path in {*visible, *after} if not _REMADE.fullmatch(path)):
        return "new", []
    lost = [f"{path} is gone" for path in before if path not in visible]
    changed = [path for path, mark in before.items() if visible.get(path, mark) not in (mark, after.get(path))]
    lost += [f"{path} has changed" for path in changed]
    if command.swaps:
        return "mixed", lost or ["old and new results are mixed"]
    if command.final is not None and command.final in visible:
        expected_paths = [path for path in after if not _REMADE.fullmatch(path)]
        lost += [
            f"{command.final} exists without {path}" for path in expected_paths if visible.get(path) != after[path]
        ]
    return ("mixed" if lost else "partial"), lost


def check_folder(case: Path, command: Command, reference: Reference, reader: Reader, damage: Damage) -> str:
    """Check the case folder after a fault, and return its state."""
    state, lost = state_of(command, reference, snapshot(case))
    damage.add("losses", *lost)
    damage.add("half files", *half_files(case, references=(reference.before, reference.after)))
    if state != "mixed":
        damage.add("losses", *reader.refusals(case / "run"))
    return state


def check_signal(outcome: Outcome, number: signal.Signals, *, is_new: bool, damage: Damage) -> None:
    """Check the exit code and the messages of a command that got a signal; 0 is right where all was done."""
    if outcome.timed_out:
        damage.add("wrong exits", "it did not end")
    if outcome.code != 128 + number and not (outcome.code == 0 and is_new):
        damage.add("wrong exits", f"exit code {outcome.code} after {number.name}: {last_line(outcome)}")
    elif _has_traceback(outcome) and any(_COMMAND_FRAME in line for line in outcome.errors):
        # Python's own start and imports end in a traceback at Ctrl-C, before any command has begun.
        damage.add("wrong exits", f"a traceback after {number.name}: {last_line(outcome)}")


def check_full(outcome: Outcome, damage: Damage) -> None:
    """Check that a command on a full disk ends with 2 and with one line that has the path and the reason."""
    if outcome.timed_out or outcome.code != 2 or _has_traceback(outcome):
        end = "it did not end" if outcome.timed_out else f"exit code {outcome.code}"
        damage.add("wrong exits", f"{end}{', a traceback' * _has_traceback(outcome)}: {last_line(outcome)}")
        return
    messages = [line for line in outcome.errors if line.startswith("error:")]
    has_path = len(messages) == 1 and ("/" in messages[0] or "exported-" in messages[0])
    if not has_path or not any(reason.lower() in messages[0].lower() for reason in _REASONS):
        damage.add("wrong exits", f"no single line with path and reason: {last_line(outcome)}")


def names_holder(outcome: Outcome) -> bool:
    """Return whether a refused command says in its last line which process holds the folder."""
    line = last_line(outcome)
    return line.startswith("error:") and re.search(r"\b(pid|process)\W{0,3}\d+", line) is not None


def last_line(outcome: Outcome) -> str:
    """Return the last line of standard error."""
    return next((line for line in reversed(outcome.errors) if line.strip()), "no message")[:300]


def _has_traceback(outcome: Outcome) -> bool:
    return any(line.startswith("Traceback (most recent call last)") for line in outcome.errors)
