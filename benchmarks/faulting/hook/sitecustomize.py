"""Start-up hook of the tested processes: counts file operations under a folder and sends a signal at one of them.

Python imports this module in every process whose PYTHONPATH names this folder. Only the leader of a session counts,
since every tested command gets a session of its own; its workers count nothing. Operations are those that change
files: opening for writing, renaming, removing, making and removing folders. The signal is sent just before the chosen
operation, so that a point is the same in every run.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_CHANGING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class _Operations:
    """Counts the operations under `folder`, appends each to `log`, and sends `number` at operation `strike_at`."""

    def __init__(self, folder: str, log: str, *, strike_at: int, number: int, to_group: bool) -> None:
        self._folder, self._strike_at, self._number, self._to_group = folder, strike_at, number, to_group
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._process = os.getpid()
        self._count = 0

    def __call__(self, event: str, values: tuple[Any, ...]) -> None:
        if event != "open" and event not in _CHANGING:
            return
        if event == "open" and not (isinstance(values[2], int) and values[2] & _WRITING):
            return
        path = values[0]
        if not isinstance(path, (str, bytes)) or os.getpid() != self._process:
            return
        path = os.path.abspath(os.fsdecode(path))
        if path.startswith(self._folder):
            self._add(f"{event} {os.path.relpath(path, self._folder)}")

    def _add(self, operation: str) -> None:
        self._count += 1
        os.write(self._log, f"{operation}\n".encode())
        if self._count == self._strike_at:
            (os.killpg if self._to_group else os.kill)(self._process, self._number)


if "FAULT_FOLDER" in os.environ and os.getpid() == os.getsid(0):
    sys.addaudithook(
        _Operations(
            os.environ["FAULT_FOLDER"],
            os.environ["FAULT_LOG"],
            strike_at=int(os.environ.get("FAULT_OPERATION", "0")),
            number=int(os.environ.get("FAULT_SIGNAL", "0")),
            to_group=os.environ.get("FAULT_GROUP") == "1",
        )
    )
