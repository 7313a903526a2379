"""Interrupts: Ctrl-C that is not lost

Python raises KeyboardInterrupt wherever it happens to be, and some libraries drop what is raised there: of 246
interrupts while films were decoded, one was swallowed where PyAV builds an error of its own. So an interrupt is also
remembered, and raised again wherever progress is told.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_seen = threading.Event()


@contextmanager
def remembered() -> Iterator[None]:
    """Remember an interrupt while a command runs, and raise it at the end at the latest."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _seen.clear()
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
        raise_if_seen()
    finally:
        signal.signal(signal.SIGINT, before)


def raise_if_seen() -> None:
    """Raise KeyboardInterrupt if there was an interrupt that went no further."""
    if _seen.is_set():
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    _seen.set()
    raise KeyboardInterrupt
