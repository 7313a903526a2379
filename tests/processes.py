"""Processes of distributed tests, started as by torchrun: gloo on one machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any

# Imports are done once before forking: importing torch took four fifths of the time.
_LAUNCHER = """
import os, sys, traceback
import mmaudit.train.optimizer

script, pipes = compile(sys.argv[1], "script", "exec"), []
for rank in range(int(os.environ["WORLD_SIZE"])):
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        sys.stdout = os.fdopen(write_end, "w")
        try:
            exec(script, {})
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write_end)
    pipes.append(os.fdopen(read_end))
print(*(pipe.read().strip() for pipe in pipes), sep="\\n")
sys.exit(any([os.wait()[1] for _ in pipes]))
"""


def run_in_processes(script: str, *, size: int, timeout_seconds: float = 120) -> list[Any]:
    """Run a script in `size` processes, each of which prints one line of JSON; return the parsed lines by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    distributed = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
    }
    launcher = subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, script],
        env={**os.environ, **distributed},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = launcher.communicate(timeout=timeout_seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    assert launcher.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines()]
