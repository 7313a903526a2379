"""Exceptions of mmaudit, reasons for quarantine, and text that is safe to print.

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
from dataclasses import dataclass
from enum import Enum

import pyarrow as pa


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


class Reason(str, Enum):
    """Why a sample cannot be scored. The value is what stands in quarantine.parquet."""

    MISSING = "missing"  # the cell is null, or the file it names is not there
    EMPTY = "empty"  # zero bytes, zero samples, zero frames, no words
    CORRUPT = "corrupt"  # the bytes cannot be decoded
    TRUNCATED = "truncated"  # the header promises clearly more than the bytes hold
    TOO_LARGE = "too-large"  # decoding would take more memory or time than the budgets of [media] allow
    NO_TRACK = "no-track"  # a video without the sound or picture that is asked for
    SILENT = "silent"  # sound without any signal
    CLIPPED = "clipped"  # sound that stands at full scale for much of its time
    STILL = "still-frames"  # a video in which nothing moves
    CONSTANT = "constant"  # a picture of one colour
    NOT_FINITE = "not-finite"  # a vector with NaN or infinity
    FAILED = "encoder-failed"  # the user's own encoder raised an error
    WRONG_LENGTH = "wrong-length"  # a vector of another length than the others
    DUPLICATE = "duplicate"  # the same content in every modality as a sample that is kept
    NO_LABEL = "no-label"  # the label is null
    UNKNOWN_LABEL = "unknown-label"  # a label that is not in the dataset's own list of classes
    RARE_CLASS = "rare-class"  # a class that cannot be cross-fitted: all its samples fall into one fold


class UnusableError(Exception):
    """One modality of one sample cannot be used. Caught where samples are encoded, never shown as an error."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """One reason not to score one sample; `modality` is None where the label is at fault."""

    sample_id: str
    modality: str | None
    reason: Reason
    detail: str


def quarantine_table(rows: Iterable[Quarantined]) -> pa.Table:
    """Give the columns of quarantine.parquet: one row for each reason, so that a sample may stand there twice."""
    listed = list(rows)
    return pa.table(
        {
            "sample_id": pa.array([row.sample_id for row in listed], pa.string()),
            "modality": pa.array([row.modality for row in listed], pa.string()),
            "reason": pa.array([row.reason.value for row in listed], pa.string()),
            "detail": pa.array([row.detail for row in listed], pa.string()),
        }
    )


# C0 and C1 controls (ESC among them), line and paragraph separators, marks and overrides of direction, halves of
# surrogate pairs. What joins letters (U+200C, U+200D) belongs to words and stays.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def printable(text: object) -> str:
    r"""Return text with every control character written out, as in Python: ESC as `\x1b`, a line feed as `\n`.

    A name can then neither steer a terminal, nor begin a line of its own, nor show in another order than it has.
    """
    return _UNPRINTABLE.sub(_written_out, str(text))


def _written_out(match: re.Match[str]) -> str:
    return repr(match.group())[1:-1] if match.group() < "\x80" else f"\\u{ord(match.group()):04x}"
