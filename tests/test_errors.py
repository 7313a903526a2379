"""Tests of the exception classes and of messages on unknown names."""

from __future__ import annotations

import pickle

import pyarrow as pa
import pytest

from mmaudit.audit import errors
from mmaudit.audit.errors import Quarantined, Reason, UnusableError, quarantine_table

KINDS = errors.MmauditError.__subclasses__()


def test_docstring_lists_all_exception_classes() -> None:
    assert errors.__doc__ is not None
    drawn = {line.split()[1] for line in errors.__doc__.splitlines() if line.startswith(("├", "└"))}
    assert drawn == {kind.__name__ for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_errors_derive_from_mmaudit_error_and_can_be_pickled(kind: type[errors.MmauditError]) -> None:
    assert kind.__mro__[1] is errors.MmauditError
    unpickled = pickle.loads(pickle.dumps(kind("what, where, the mend")))
    assert (type(unpickled), str(unpickled)) == (kind, "what, where, the mend")


def test_names_that_are_cut_alike_keep_what_differs() -> None:
    def cut(name: str) -> str:
        return name if len(name) <= 9 else f"{name[:2]}…{name[-6:]}"

    def cut_all(*names: str) -> list[str]:
        return errors.cut_distinct(names, cut=cut, fits=lambda text: len(text) <= 9)

    assert cut_all("audio", "spectrogram of the left", "audio") == ["audio", "sp…e left", "audio"]
    assert cut_all("mel_left_at_16_kHz", "mel_righ_at_16_kHz") == ["m…left…z", "m…righ…z"]
    assert cut_all("x" * 30 + "a" * 10 + "x" * 30, "x" * 70) == ["aa…aaaaaa", "xx…xxxxxx"]


@pytest.mark.parametrize(
    ("name", "names", "message"),
    [
        ("lable", ["id", "label"], "did you mean label? (available: id, label)"),
        ("xyz", ["id", "label"], "available: id, label"),
        ("xyz", [], "available: none"),
    ],
)
def test_unknown_name_lists_available_names(name: str, names: list[str], message: str) -> None:
    assert errors.choices(name, iter(names)) == message


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
