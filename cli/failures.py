"""Failures of commands: interrupts, and the line and exit code of an exception.

Python raises KeyboardInterrupt at any point, and some libraries drop it: of 246 interrupts while films were decoded,
one was lost where PyAV builds an error of its own. So an interrupt is also recorded, and raised again whenever progress
is reported. A second signal ends the process at once.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ..audit.errors import GateError, MmauditError, file_of, printable

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_received: list[int] = []  # signals received during this command


@contextmanager
def interrupts_recorded() -> Iterator[None]:
    """Record interrupts while a command runs; raise them at its end at the latest, in place of any other error."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    import pyarrow  # imported here because --help does not need it

    # Arrow's handlers may turn SIGTERM into SIGINT: 9 of 180 runs exited with 130.
    pyarrow.enable_signal_handlers(False)
    _received.clear()
    before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
    try:
        yield
        raise_if_interrupted()
    except Exception:
        raise_if_interrupted()  # the error may come from workers stopped by the same signal
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        # An interrupt that passed through exec of a text, as of imports in scipy, is noted by CPython, which then ends
        # `python -m mmaudit` by SIGINT whatever the exit code: 1 of 24 SIGTERM ended so. Another exec clears the note.
        exec("")


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if an interrupt was recorded."""
    if _received:
        raise KeyboardInterrupt


def last_signal() -> int | None:
    """Return the number of the signal that interrupted the command; None if there was none."""
    return _received[-1] if _received else None


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _received:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    _received.append(number)
    raise KeyboardInterrupt


BUG, BAD_INPUT, GATE_FAILED = 1, 2, 3

# Errors of the machine rather than of a path: accepted anywhere in the chain of causes, and by their text alone.
_RESOURCES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or lower --num-workers",
    errno.ENFILE: "close other programs, or lower --num-workers",
    errno.EROFS: "use a writable folder",
    errno.EIO: "check the disk",
}
_ADVICE = {
    **{number: f"{mend}, and run the same command again" for number, mend in _RESOURCES.items()},
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.ENAMETOOLONG: "shorten the name",
    errno.ENOTDIR: "one of the folders in this path is a file",
}
_NO_MEMORY = re.compile(r"not enough memory|out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)
_INPUTS = ("data", "manifest", "scores", "first", "folder", "name", "config", "run")  # parameters that name an input

_stage = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Line to print on stderr, None for nothing, and exit code of a failed command."""

    line: str | None
    code: int


def begin_stage(name: str) -> None:
    """Record the running stage for bug reports; "" at the start of a command."""
    global _stage
    _stage = name


def describe(error: BaseException, *, command: str, parameters: Mapping[str, Any]) -> Failure:
    """Return the line and exit code of an exception: errors of the user with a remedy, all others as a bug."""
    file = file_of(error) or _input_of(parameters)
    if isinstance(error, GateError):
        return Failure(line=f"failed: {error}", code=GATE_FAILED)
    if isinstance(error, MmauditError):
        return Failure(line=f"error: {error}", code=BAD_INPUT)
    if isinstance(error, KeyboardInterrupt):
        number = last_signal() or signal.SIGINT
        return Failure(line="interrupted; run the same command again to resume", code=128 + number)
    if isinstance(error, BrokenPipeError):
        return Failure(line=None, code=128 + signal.SIGPIPE)  # the reader, such as `head`, closed the pipe
    reason = _users_reason(error, file)
    if reason is not None:
        return Failure(line=f"error: {reason}", code=BAD_INPUT)
    stage = f"{command}, {_stage}" if _stage else command
    location = f" on {file}" if file else ""
    report = f"please report it with {file}" if file else "please report it with the command"
    text = _one_line(f"{type(error).__name__}: {error}".rstrip(": "))
    return Failure(line=f"mmaudit failed in {stage}{location}: {text}; this is a bug, {report}", code=BUG)


def _users_reason(error: BaseException, file: str | None) -> str | None:
    """Return the message of an error that the user can fix and that is not an MmauditError; None for a bug."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return (
            f"not enough memory ({_one_line(str(error)) or 'none is left'}): lower --num-workers or --batch-size, "
            "close other programs, or use a machine with more memory"
        )
    if isinstance(error, UnicodeEncodeError) and error.reason.startswith("surrogates"):
        return f"the name {printable(error.object)} is not UTF-8: rename it"
    if (system := _system_error(error)) is not None:
        return _reason_of(system, file)
    number = next((number for number in _RESOURCES if os.strerror(number) in str(error)), None)
    if number is not None:
        return f"{_on(file)}{os.strerror(number)}; {_ADVICE[number]}"
    return None


def _system_error(error: BaseException) -> OSError | None:
    """Return the OSError that an error is or was raised from; one that was only being handled does not count."""
    if isinstance(error, OSError):
        return error
    for cause, is_named in _causes(error):
        if isinstance(cause, OSError) and (is_named or cause.errno in _RESOURCES):
            return cause
    return None


def _causes(error: BaseException) -> Iterator[tuple[BaseException, bool]]:
    visited = {id(error)}
    is_named = True
    while True:
        is_named = is_named and error.__cause__ is not None
        following = error.__cause__ or error.__context__
        if following is None or id(following) in visited:
            return
        visited.add(id(following))
        yield following, is_named
        error = following


def _reason_of(error: OSError, file: str | None) -> str:
    """Return path, reason and remedy of an OSError."""
    advice = f"; {_ADVICE[error.errno]}" if error.errno in _ADVICE else ""
    if error.filename is not None:
        name = printable(os.fsdecode(error.filename) if not isinstance(error.filename, int) else str(error.filename))
        reason = type(error).__name__ if error.errno is None else os.strerror(error.errno)
        return f"{name}: {reason}{advice}"
    text = _one_line(str(error)) or type(error).__name__
    return f"{_on(file)}{re.sub(r'^.Errno [0-9]+. ', '', text)}{advice}"


def _on(file: str | None) -> str:
    return f"{file}: " if file else ""


def _input_of(parameters: Mapping[str, Any]) -> str | None:
    """Return the first input named on the command line."""
    from ..audit.remote.paths import is_url, shown_url

    values = (parameters.get(name) for name in _INPUTS)
    value = next((value for value in values if isinstance(value, str)), None)
    return value and (shown_url(value) if is_url(value) else printable(value))


def _one_line(text: str) -> str:
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())
