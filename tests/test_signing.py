"""Tests of signatures: they are valid for one user, machine and content, and a missing secret is no error."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.hashing import SECRET_BYTES, file_digest, is_signed, sign, state_folder

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
CONTENTS = st.dictionaries(st.text(max_size=3), VALUES, max_size=3)
relaxed = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the state folder of a new user, which does not exist yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "mmaudit"


@relaxed
@given(CONTENTS, CONTENTS)
def test_signature_is_valid_for_one_content_only(content: dict[str, object], other_content: dict[str, object]) -> None:
    signature = sign(content)
    assert signature is not None
    assert is_signed(dict(reversed(content.items())), signature)
    is_same = json.dumps(other_content, sort_keys=True) == json.dumps(content, sort_keys=True)
    assert is_signed(other_content, signature) == is_same


@pytest.mark.parametrize("signature", [None, "", 3, "0" * 64, "é", "\ud800", ["a"]])
def test_other_values_are_not_signatures(signature: object) -> None:
    assert sign({}) is not None
    assert not is_signed({}, signature)


def test_secret_is_private_and_created_once(state: Path) -> None:
    assert not is_signed({}, "0" * 64)
    assert not state.exists()  # checking a signature creates no secret
    first = sign({"a": 1})
    assert state == state_folder()
    assert [path.name for path in state.iterdir()] == ["secret"]
    assert (state / "secret").stat().st_mode & 0o777 == 0o600
    assert state.stat().st_mode & 0o777 == 0o700
    assert len((state / "secret").read_bytes()) == SECRET_BYTES
    assert sign({"a": 1}) == first


def test_another_user_has_another_secret(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = sign({})
    assert is_signed({}, signature)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    assert sign({}) != signature
    assert not is_signed({}, signature)


def test_relative_state_folder_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "state", "./state"):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert state_folder() == tmp_path / ".local" / "state" / "mmaudit"


@pytest.mark.parametrize("fault", ["parent is a file", "folder is a file", "no home"])
def test_without_a_state_folder_nothing_is_signed(
    state: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if fault == "no home":
        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        blocked_path = state.parent if fault == "parent is a file" else state
        blocked_path.parent.mkdir(exist_ok=True)
        blocked_path.write_text("")
    with caplog.at_level(logging.WARNING):
        assert sign({}) is None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("not signed: the secret cannot be stored in the state folder (")
    assert not is_signed({}, "0" * 64)


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [(bytes(5), 0o600, "is damaged"), (bytes(33), 0o600, "is damaged"), (bytes(32), 0o644, "mode 0600")],
)
def test_damaged_or_readable_secret_is_ignored(
    state: Path, content: bytes, mode: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    signature = sign({})
    (state / "secret").write_bytes(content)
    (state / "secret").chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert sign({}) is None
        assert not is_signed({}, signature)
    assert words in caplog.messages[0]
    assert (state / "secret").read_bytes() == content


def test_simultaneous_processes_share_one_secret(state: Path) -> None:
    program = "import sys; sys.stdin.read(); from mmaudit.audit.hashing import sign; print(sign({'a': 1}))"
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.close()
    for process in started:
        process.stdin = None  # closed
    printed = {process.communicate(timeout=60)[0] for process in started}
    assert printed == {f"{sign({'a': 1})}\n"}
    assert os.listdir(state) == ["secret"]


def test_file_digest_equals_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
