"""Exceptions of mmaudit, reasons for quarantine, and text that is safe to print or cut to fit.

MmauditError            one line for the user, exit 2
├── ConfigError         an option, a key or a value that does not exist
├── DatasetError        the data cannot be read as a dataset
├── ScoreError          the score table is malformed, or cannot be computed
├── MixtureError        no mixture can be fitted to these samples
├── ManifestError       a manifest is malformed, or its source has changed
├── RunError            the run folder is incomplete, locked, or made from other data
├── RemoteError         a file at a URL cannot be reached, read or written
├── TrainError          training cannot continue
└── GateError           a requested check has failed, exit 3
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


class MmauditError(Exception):
    """Base of all errors that the user can fix; the message states what, where, what was found, and what to do.

    The command line prints the message in one line and exits with 2, or 3 for a GateError.

    Example:
        >>> import mmaudit
        >>> try:
        ...     mmaudit.read_scores("missing.parquet")
        ... except mmaudit.MmauditError as error:
        ...     print(error)
        no such file: missing.parquet
    """


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


class RemoteError(MmauditError):
    """A file at a URL cannot be reached, read or written, or the URL is not accepted."""


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


def short(text: object, max_length: int = 160) -> str:
    """Return text of the user's data as one line, cut in the middle to `max_length`; paths differ at their ends."""
    line = "".join(char if char.isprintable() else " " for char in str(text))
    return line if len(line) <= max_length else f"{line[: max_length // 3]}…{line[max_length // 3 + 1 - max_length :]}"


class Reason(str, Enum):
    """Why a sample cannot be scored. The value is written to quarantine.parquet."""

    MISSING = "missing"  # the cell is null, or the file it names does not exist
    EMPTY = "empty"  # zero bytes, zero samples, zero frames, no words
    CORRUPT = "corrupt"  # the bytes cannot be decoded
    TRUNCATED = "truncated"  # the header states clearly more data than the file holds
    TOO_LARGE = "too-large"  # decoding would take more memory or time than the budgets of [media] allow
    NO_TRACK = "no-track"  # a video without the requested audio or video track
    SILENT = "silent"  # sound without any signal
    CLIPPED = "clipped"  # sound that is at full scale for much of its duration
    STILL = "still-frames"  # a video in which nothing moves
    CONSTANT = "constant"  # a picture of one colour
    NOT_FINITE = "not-finite"  # a vector with NaN or infinity
    FAILED = "encoder-failed"  # the user's own encoder raised an error
    WRONG_LENGTH = "wrong-length"  # a vector whose length differs from that of the other samples
    DUPLICATE = "duplicate"  # the same content in every modality as a sample that is kept
    NO_LABEL = "no-label"  # the label is null
    UNKNOWN_LABEL = "unknown-label"  # a label that is not in the class list of the dataset
    RARE_CLASS = "rare-class"  # a class that cannot be cross-fitted: all its samples fall into one fold


class UnusableError(Exception):
    """One modality of one sample cannot be used. Caught where samples are encoded, never raised to the user."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """One reason not to score one sample; `modality` is None where the label is the reason."""

    sample_id: str
    modality: str | None = None
    reason: Reason
    detail: str

    def __str__(self) -> str:
        where = self.sample_id if self.modality is None else f"{self.sample_id}, {self.modality}"
        return f"{where}: {self.reason.value} ({self.detail})"


def quarantine_table(rows: Iterable[Quarantined]) -> pa.Table:
    """Return the content of quarantine.parquet: one row for each reason, so that a sample may have several rows."""
    import pyarrow as pa  # takes 0.1 s, and most users of this module need no table

    table = getattr(rows, "table", None)  # of rows that are columns, see features.left_out
    if isinstance(table, pa.Table):
        return table
    schema = pa.schema([(name, pa.string()) for name in ("sample_id", "modality", "reason", "detail")])
    return pa.Table.from_pylist([{**asdict(row), "reason": row.reason.value} for row in rows], schema)


def cut_distinct(names: Sequence[str], *, cut: Callable[[str], str], fits: Callable[[str], bool]) -> list[str]:
    """Return names as `cut` shortens them, which remain distinct where the names are.

    Where the cut names would be equal, their parts that differ are kept instead, and numbered where that is too long.
    """
    short_of = {name: cut(name) for name in names}
    for alike in _cut_alike(short_of):
        short_of |= _cut_around_difference(alike, cut=cut, fits=fits)
    for alike in _cut_alike(short_of):
        short_of |= {name: f"{short_of[name]} ({index})" for index, name in enumerate(alike, start=1)}
    return [short_of[name] for name in names]


def _cut_alike(short_of: Mapping[str, str]) -> list[list[str]]:
    """Return the names that are cut to the same text, as a list of two or more for each such text."""
    names_of: dict[str, list[str]] = {}
    for name, text in short_of.items():
        names_of.setdefault(text, []).append(name)
    return [names for names in names_of.values() if len(names) > 1]


def _cut_around_difference(
    names: list[str], *, cut: Callable[[str], str], fits: Callable[[str], bool]
) -> dict[str, str]:
    """Cut names to the words that differ, or to the part that does, with as much of their start and end as fits."""
    prefix = _common_length(names)
    suffix = _common_length([name[prefix:][::-1] for name in names])
    words = (_trimmed(names[0][:prefix]), _trimmed(names[0][len(names[0]) - suffix :][::-1]))
    if all(fits(f"…{name[words[0] : len(name) - words[1]]}…") for name in names):
        prefix, suffix = words
    short_of = {}
    for name in names:
        core = name[prefix : len(name) - suffix]
        texts = [f"{name[:k]}…{core}…{name[len(name) - k :]}" for k in range(min(prefix, suffix) + 1)]
        texts = [text for text in texts if fits(text)]
        short_of[name] = texts[-1] if texts else cut(core)
    return short_of


def _trimmed(text: str) -> int:
    """Return the length of a text without the letters and digits at its end, which belong to the next word."""
    return next((length for length in range(len(text), 0, -1) if not text[length - 1].isalnum()), 0)


def _common_length(names: list[str]) -> int:
    """Return the number of characters at the start that all names have in common."""
    columns = enumerate(zip(*names, strict=False))
    return next((index for index, chars in columns if len(set(chars)) > 1), min(map(len, names)))
