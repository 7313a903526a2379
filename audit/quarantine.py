"""Quarantine: why a sample cannot be scored, and the table of such samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import pyarrow as pa


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
