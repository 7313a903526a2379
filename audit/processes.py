"""Identity of processes: who wrote a file or holds a lock, and whether that process still runs."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PROC = Path("/proc")
_NO_START = "0"  # where the system does not say when a process started


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessId:
    """One process of one machine; `start` distinguishes it from a later process of the same number.

    `machine` is a digest of the boot and of the namespace of process numbers: in two containers both may be number 1,
    and both hosts may have the same name.
    """

    machine: str
    pid: int
    start: str

    def __str__(self) -> str:
        return f"{self.machine}-{self.pid}-{self.start}"

    @classmethod
    def parse(cls, text: str) -> ProcessId | None:
        """Return the process that `str` named; None for any other text."""
        match = re.fullmatch(r"([0-9a-f]{8})-(\d{1,10})-([0-9a-f]{1,20})", text)
        return None if match is None else cls(machine=match[1], pid=int(match[2]), start=match[3])

    def is_local(self) -> bool:
        """Return whether its number can be looked up here."""
        return self.machine == _machine()

    def is_running(self) -> bool:
        """Return whether a local process still runs."""
        return self.start == _start_of(self.pid)


def this_process() -> ProcessId:
    """Return the identity of this process."""
    return _identity(os.getpid())


@cache
def _identity(pid: int) -> ProcessId:
    return ProcessId(machine=_machine(), pid=pid, start=_start_of(pid) or _NO_START)


@cache
def _machine() -> str:
    """Compute 8 hexadecimal digits from the boot and the namespace of process numbers, or from name and address."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii")
        text = boot + os.readlink(_PROC / "self/ns/pid")
    except OSError:
        text = f"{socket.gethostname()} {uuid.getnode()}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _start_of(pid: int) -> str | None:
    """Return when a process started, in hexadecimal digits of any meaning; None where it has ended."""
    if not (_PROC / "self/stat").exists():
        return _start_by_ps(pid)
    try:
        fields = (_PROC / f"{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{int(fields[19]):x}"  # a zombie has ended


def _start_by_ps(pid: int) -> str | None:
    """Return a digest of the start that ps prints, on systems without /proc."""
    try:
        output = subprocess.run(
            ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=10, check=False
        ).stdout.split(maxsplit=1)
    except (OSError, subprocess.SubprocessError):
        return _NO_START
    if len(output) < 2 or output[0].startswith("Z"):
        return None
    return hashlib.sha256(output[1].strip().encode()).hexdigest()[:16]
