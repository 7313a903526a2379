"""Interrupts: Ctrl-C and SIGTERM, remembered until the command has ended.

Python raises KeyboardInterrupt wherever it happens to be, and some libraries drop what is raised there: of 246
interrupts while films were decoded, one was swallowed where PyAV builds an error of its own. So an interrupt is also
remembered, and raised again wherever progress is reported. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pyarrow

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_seen: list[int] = []  # signals of this command


@contextmanager
def remembered() -> Iterator[None]:
    """Remember an interrupt while a command runs, and raise it at the end at the latest, in place of any error."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pyarrow.enable_signal_handlers(False)  # Arrow's own may raise SIGINT where it was SIGTERM: one of 40 ended with 130
    _seen.clear()
    before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
    try:
        yield
        raise_if_seen()
    except Exception:
        raise_if_seen()  # an error of workers that were stopped by the same signal
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_if_seen() -> None:
    """Raise KeyboardInterrupt if there was an interrupt that went no further."""
    if _seen:
        raise KeyboardInterrupt


def last_signal() -> int | None:
    """Return the number of the signal that interrupted the command; None if there was none."""
    return _seen[-1] if _seen else None


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _seen:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    _seen.append(number)
    raise KeyboardInterrupt
