"""Reasons why samples cannot be scored, and the table of such samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import pyarrow as pa


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
    modality: str | None
    reason: Reason
    detail: str


def quarantine_table(rows: Iterable[Quarantined]) -> pa.Table:
    """Return the content of quarantine.parquet: one row for each reason, so that a sample may have several rows."""
    quarantined = list(rows)
    return pa.table(
        {
            "sample_id": pa.array([row.sample_id for row in quarantined], pa.string()),
            "modality": pa.array([row.modality for row in quarantined], pa.string()),
            "reason": pa.array([row.reason.value for row in quarantined], pa.string()),
            "detail": pa.array([row.detail for row in quarantined], pa.string()),
        }
    )
