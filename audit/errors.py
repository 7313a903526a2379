"""Exceptions of mmaudit, and text that is safe to print.

MmauditError            one line for the user, exit 2
├── ConfigError         an option, a key or a value that does not exist
├── DatasetError        the data cannot be read as a dataset
├── ScoreError          the table of scores is not one, or cannot be made
├── MixtureError        there is nothing a mixture could be fitted to
├── ManifestError       a manifest is malformed, or its source has changed
├── RunError            the run folder is in the way
├── TrainError          training cannot go on
└── GateError           a check that was asked for has failed, exit 3
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class MmauditError(Exception):
    """The user's to mend. The message tells what, where, what was found, and the mend."""


class ConfigError(MmauditError):
    """An option, a key or a value that does not exist."""


class DatasetError(MmauditError):
    """The data cannot be read as a dataset."""


class ScoreError(MmauditError):
    """The table of scores is malformed, or cannot be made from these samples."""


class MixtureError(MmauditError):
    """There is nothing a mixture could be fitted to."""


class ManifestError(MmauditError):
    """A manifest is malformed, or its source has changed."""


class RunError(MmauditError):
    """The run folder is in the way: made from other data, or incomplete."""


class TrainError(MmauditError):
    """Training cannot go on: its loss is no longer a number, or weights to begin with do not fit."""


class GateError(MmauditError):
    """A check that was asked for has failed: the data leak."""


def choices(wrong: str, right: Iterable[str]) -> str:
    """Name the nearest of the right names first, then all of them, for the end of a message."""
    names = list(right)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    listed = ", ".join(names) if names else "none"
    return f"did you mean {near[0]}? (there are: {listed})" if near else f"there are: {listed}"


@contextmanager
def reading(file: object) -> Iterator[None]:
    """Note on an error that is raised inside, unless it has one, which file was being read: see `file_of`."""
    try:
        yield
    except Exception as error:
        if file_of(error) is None:
            error.mmaudit_file = str(file)  # type: ignore[attr-defined]
        raise


def file_of(error: BaseException) -> str | None:
    """Return the file that was being read when an error was raised; None where no reader noted it."""
    return getattr(error, "mmaudit_file", None)


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def printable(text: object) -> str:
    r"""Return text with every control character written out, as in Python: ESC as `\x1b`, a line feed as `\n`.

    A name can then neither steer a terminal, nor begin a line of its own, nor show in another order than it has.
    """
    return _UNPRINTABLE.sub(_written_out, str(text))


def _written_out(match: re.Match[str]) -> str:
    return repr(match.group())[1:-1] if match.group() < "\x80" else f"\\u{ord(match.group()):04x}"
