"""Tests of interrupts: Ctrl-C and SIGTERM set the exit code of a command, and a second signal ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mmaudit.cli.failures import interrupts_recorded, last_signal, raise_if_interrupted

_COMMAND = """
import sys, time, types
from mmaudit.cli.main import main

def report(*, run):
    try:
        print("ready", flush=True)
        exec("time.sleep(60)") if run == "in exec" else time.sleep(60)  # as imports of scipy do
    except KeyboardInterrupt:
        if run == "swallowed":
            return types.SimpleNamespace(to_dict=lambda: {"report": run})
        if run == "cleaning":
            print("cleaning", flush=True)
            time.sleep(60)
        if run == "failing":
            raise ValueError("a worker was stopped, too")
        raise

reporting = types.ModuleType("mmaudit.cli.reporting")  # the real one takes seconds to import
reporting.report = report
sys.modules[reporting.__name__] = reporting
main()
"""


def start(run: str, folder: Path) -> subprocess.Popen[str]:
    """Start the command as `python -m` does: there Python decides on its own about the exit code of an interrupt."""
    (folder / "interruptible.py").write_text(_COMMAND)
    return subprocess.Popen(
        [sys.executable, "-m", "interruptible", "report", "--run", run],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Started commands, which are killed after the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("run", ["plain", "swallowed", "failing", "in exec"])
def test_signal_sets_the_exit_code(
    processes: list[subprocess.Popen[str]], number: signal.Signals, run: str, tmp_path: Path
) -> None:
    processes.append(process := start(run, tmp_path))
    wait_for(process, "ready")
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors == "interrupted; run the same command again to resume\n"


def test_second_signal_ends_the_command_at_once(processes: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    processes.append(process := start("cleaning", tmp_path))
    wait_for(process, "ready")
    process.send_signal(signal.SIGTERM)
    wait_for(process, "cleaning")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


def test_signal_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def interrupted() -> None:
        with interrupts_recorded():
            with suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            raise_if_interrupted()

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert last_signal() == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with interrupts_recorded():
        assert last_signal() is None


def test_no_handlers_outside_the_main_thread() -> None:
    handlers: list[object] = []

    def command() -> None:
        with interrupts_recorded():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]
