"""Tests of the exception classes and of messages on unknown names."""

from __future__ import annotations

import pickle

import pytest

from mmaudit.audit import errors

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
