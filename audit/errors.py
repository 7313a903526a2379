"""Exceptions of mmaudit, and text that is safe to print.

MmauditError            one line for the user, exit 2
├── ConfigError         an option, a key or a value that does not exist
├── DatasetError        the data cannot be read as a dataset
├── ScoreError          the score table is malformed, or cannot be computed
├── MixtureError        no mixture can be fitted to these samples
├── ManifestError       a manifest is malformed, or its source has changed
├── RunError            the run folder is incomplete, locked, or made from other data
├── TrainError          training cannot continue
└── GateError           a requested check has failed, exit 3
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class MmauditError(Exception):
    """Base of all errors that the user can fix. The message states what, where, what was found, and what to do."""


class ConfigError(MmauditError):
    """An option, a key or a value that does not exist."""


class DatasetError(MmauditError):
    """The data cannot be read as a dataset."""


class ScoreError(MmauditError):
    """The score table is malformed, or cannot be computed from these samples."""


class MixtureError(MmauditError):
    """No mixture can be fitted to these samples."""


class ManifestError(MmauditError):
    """A manifest is malformed, or its source has changed."""


class RunError(MmauditError):
    """The run folder is incomplete, locked by another process, or made from other data."""


class TrainError(MmauditError):
    """Training cannot continue: the loss is not finite, or the initial weights do not fit the network."""


class GateError(MmauditError):
    """A requested check has failed: the data leak."""


def choices(name: str, names: Iterable[str]) -> str:
    """Return the end of a message on an unknown name: the nearest available name, then all of them."""
    available = list(names)
    nearest = difflib.get_close_matches(name, available, n=1, cutoff=0.5)
    listed = ", ".join(available) if available else "none"
    return f"did you mean {nearest[0]}? (available: {listed})" if nearest else f"available: {listed}"


@contextmanager
def attach_file_name(file: object) -> Iterator[None]:
    """Attach the file name to an error raised inside the block, unless it has one; read it with `file_of`."""
    try:
        yield
    except Exception as error:
        if file_of(error) is None:
            error.mmaudit_file = str(file)  # type: ignore[attr-defined]
        raise


def file_of(error: BaseException) -> str | None:
    """Return the file that was being read when an error was raised; None where none is attached."""
    return getattr(error, "mmaudit_file", None)


# C0 and C1 controls (ESC among them), line and paragraph separators, direction marks and overrides, halves of
# surrogate pairs. Joiners (U+200C, U+200D) are parts of words and are kept.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def printable(text: object) -> str:
    r"""Return text with every control character escaped as in Python: ESC as `\x1b`, a line feed as `\n`.

    A name can then not control a terminal, start a new line, or change the order in which text is shown.
    """
    return _UNPRINTABLE.sub(_escape, str(text))


def _escape(match: re.Match[str]) -> str:
    return repr(match.group())[1:-1] if match.group() < "\x80" else f"\\u{ord(match.group()):04x}"
