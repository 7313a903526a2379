"""Start-up hook of the tested processes: counts file operations under a folder, and strikes or waits at one of them.

Python imports this module in every process whose PYTHONPATH names this folder. Only the leader of a session, or
process 1 of a container, counts: every tested command is one, and its workers are not. Operations are those that
change files: opening for writing, renaming, removing, making and removing folders. Just before the selected one the
process gets a signal, or waits until a file exists, so that a point is the same in every run.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

_CHANGING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class _Operations:
    """Counts the operations under FAULT_FOLDER, appends each to FAULT_LOG, and acts before number FAULT_OPERATION.

    It sends FAULT_SIGNAL, to the group if FAULT_GROUP is 1, or waits until FAULT_GO exists.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._folder, log = settings["FAULT_FOLDER"], settings["FAULT_LOG"]
        self._operation, self._number = (
            int(settings.get("FAULT_OPERATION", "0")),
            int(settings.get("FAULT_SIGNAL", "0")),
        )
        self._to_group, self._go = settings.get("FAULT_GROUP") == "1", settings.get("FAULT_GO")
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
        if self._count != self._operation:
            return
        if self._go is None:
            (os.killpg if self._to_group else os.kill)(self._process, self._number)
        while self._go is not None and not os.path.exists(self._go):
            time.sleep(0.01)


if "FAULT_FOLDER" in os.environ and os.getpid() in (os.getsid(0), 1):
    sys.addaudithook(_Operations(os.environ))
