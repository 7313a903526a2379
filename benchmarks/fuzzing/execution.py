"""Forked children, each of which runs the mmaudit command line on one input, within limits."""

from __future__ import annotations

import faulthandler
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .faults import GENERATOR_FAILED, HANG_SECONDS, SECRET, fault_of, read_text

_MAX_FILE_BYTES = 1 << 30
_MAX_KEPT_BYTES = 100 << 20
_ROOM_BYTES = 6 << 30  # address space beyond the parent's, so that excessive allocations end in a MemoryError
_HOSTILE_CODE = "import pathlib\npathlib.Path('../executed').touch()\n\ndef run(*_):\n    return [0.0]\n"

Generate = Callable[[random.Random], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of one input: the exit of the child, and its fault ("" for none).

    `fault` is one of traceback, signal, hang, memory, message, escape and generator; `group` is its location; `detail`
    is the last line of stderr, or a description of the fault.
    """

    name: str
    kind: str
    argv: tuple[str, ...]
    exit_code: int | None
    seconds: float
    peak_bytes: int
    fault: str = ""
    group: str = ""
    detail: str = ""


def run_input(name: str, generate: Generate, *, kind: str, rng_seed: str, scratch: Path, keep: Path | None) -> Outcome:
    """Write an input into a folder of its own, run mmaudit on it, and remove the folder.

    Each step is a forked child, so that the memory measured is that of mmaudit. The folder holds `input`, in which the
    command runs, `outside`, which it must not read or change, and what the child wrote. It is copied to `keep` where
    something is wrong.
    """
    folder = scratch / name
    _prepare(folder)
    child = os.fork()
    if child == 0:
        _generate_input(folder, generate, rng_seed=rng_seed)
    _, status, usage = os.wait4(child, 0)
    start = time.perf_counter()
    if status == 0:
        child = os.fork()
        if child == 0:
            _run_child(folder)
        _, status, usage = os.wait4(child, 0)
        _end_group(child)
    seconds = time.perf_counter() - start
    outcome = _judge(folder, name=name, kind=kind, status=status, seconds=seconds, peak=usage.ru_maxrss * 1024)
    if keep is not None and outcome.fault:
        shutil.copytree(folder, keep / name, symlinks=True, dirs_exist_ok=True, ignore=_not_kept)
    shutil.rmtree(folder, ignore_errors=True)
    return outcome


def run_command(argv: list[str], folder: Path) -> None:
    """Run mmaudit in `folder` in a forked child, as seeds are made; RuntimeError where it fails."""
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        _redirect(folder)
        os._exit(_call_main(argv, folder / "traceback"))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 3):
        last = read_text(folder / "stderr").strip().rpartition("\n")[2]
        raise RuntimeError(f"mmaudit {shlex.join(argv)} ended with {code} while the seeds were made: {last}")


def _prepare(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("input", "outside"):
        (folder / name).mkdir(parents=True)
    (folder / "outside" / "secret.txt").write_bytes(SECRET)
    (folder / "outside" / "secret.wav").write_bytes(SECRET)
    (folder / "input" / "hostile_code.py").write_text(_HOSTILE_CODE, encoding="utf-8")


def _end_group(child: int) -> None:
    """Kill the processes that the child left running; it leads its own session."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        return


def _generate_input(folder: Path, generate: Generate, *, rng_seed: str) -> NoReturn:
    """Write the input and, into `cmd`, the command that reads it; never returns."""
    os.chdir(folder / "input")
    _redirect(folder)
    try:
        text = shlex.join(["mmaudit", *generate(random.Random(rng_seed))])
        (folder / "cmd").write_bytes(f"cd input && {text}\n".encode("utf-8", "surrogateescape"))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(GENERATOR_FAILED)
    os._exit(0)


def _run_child(folder: Path) -> NoReturn:
    """Set the limits, run the command in `cmd` and leave with its exit code; never returns."""
    os.setsid()
    os.chdir(folder / "input")
    _redirect(folder)
    _set_limits()
    log = (folder / "crash").open("w")
    faulthandler.enable(log)
    faulthandler.register(signal.SIGALRM, log, chain=True)  # logs the stack of a hang, then ends the child
    signal.alarm(HANG_SECONDS)
    code = _call_main(list(_read_command(folder)), folder / "traceback")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _read_command(folder: Path) -> tuple[str, ...]:
    """Return the words after `mmaudit` of the command in `cmd`."""
    return tuple(shlex.split(read_text(folder / "cmd").removeprefix("cd input && "))[1:])


def _redirect(folder: Path) -> None:
    """Send stdout and stderr to files, encoded as on a terminal of UTF-8."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)


def _set_limits() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        addresses = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + _ROOM_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (2 * HANG_SECONDS,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_FILE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _call_main(argv: list[str], log: Path) -> int:
    """Run the entry point as the `mmaudit` script does, and return its exit code; 1 writes the traceback to `log`."""
    from mmaudit.cli.main import main

    sys.argv = ["mmaudit", *argv]
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if code == 1:
            log.write_text(_cause_of(end), encoding="utf-8", errors="backslashreplace")
        return code
    except BaseException as error:
        traceback.print_exc()
        log.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
        return 1
    return 0


def _cause_of(end: BaseException) -> str:
    """Return the traceback of the exception that a command turned into an exit code."""
    cause: BaseException | None = end
    while cause is not None and (isinstance(cause, SystemExit) or type(cause).__name__ == "Exit"):
        cause = cause.__context__
    return "".join(traceback.format_exception(cause or end))


def _not_kept(folder: str, names: list[str]) -> list[str]:
    """Return what is not copied: pipes, sockets, and files of gigabytes."""
    paths = [Path(folder) / name for name in names]
    return [path.name for path in paths if not (path.is_symlink() or path.is_dir() or _is_small_file(path))]


def _is_small_file(path: Path) -> bool:
    return path.is_file() and path.stat().st_size < _MAX_KEPT_BYTES


def _judge(folder: Path, *, name: str, kind: str, status: int, seconds: float, peak: int) -> Outcome:
    code = os.waitstatus_to_exitcode(status)
    argv = _read_command(folder)
    fault, group, detail = fault_of(folder, code, argv, peak)
    detail = detail or read_text(folder / "stderr").strip().rpartition("\n")[2][:300]
    return Outcome(
        name=name,
        kind=kind,
        argv=argv,
        exit_code=code if code >= 0 else None,
        seconds=seconds,
        peak_bytes=peak,
        fault=fault,
        group=group,
        detail=detail,
    )
