"""Tests of the quarantine: reasons can be pickled, and each is one row of the table."""

from __future__ import annotations

import pickle

import pyarrow as pa
import pytest

from mmaudit.audit.errors import Quarantined, Reason, UnusableError, quarantine_table


@pytest.mark.parametrize("reason", Reason)
def test_unusable_error_can_be_pickled(reason: Reason) -> None:
    unpickled = pickle.loads(pickle.dumps(UnusableError(reason, "some detail")))
    assert (unpickled.reason, unpickled.detail, str(unpickled)) == (
        reason,
        "some detail",
        f"{reason.value}: some detail",
    )


def test_sample_may_have_several_rows() -> None:
    rows = [
        Quarantined(sample_id="a", modality="audio", reason=Reason.SILENT, detail="peak 0"),
        Quarantined(sample_id="a", modality=None, reason=Reason.NO_LABEL, detail="the label is null"),
    ]
    assert quarantine_table(iter(rows)).to_pylist() == [
        {"sample_id": "a", "modality": "audio", "reason": "silent", "detail": "peak 0"},
        {"sample_id": "a", "modality": None, "reason": "no-label", "detail": "the label is null"},
    ]


def test_an_empty_table_has_the_same_columns() -> None:
    empty = quarantine_table([])
    assert empty.num_rows == 0
    assert empty.schema.names == ["sample_id", "modality", "reason", "detail"]
    assert set(empty.schema.types) == {pa.string()}
