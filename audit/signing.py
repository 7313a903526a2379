"""Signatures of what this user wrote on this machine: HMAC-SHA256 with a secret in the user's state folder."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("mmaudit")

SECRET_BYTES = 32


def state_folder() -> Path:
    """Return $XDG_STATE_HOME/mmaudit, or ~/.local/state/mmaudit where that is unset or, against its rules, relative."""
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".local" / "state") / "mmaudit"


def sign(content: Mapping[str, Any]) -> str | None:
    """Return the signature of plain values, 64 hexadecimal digits; None, with one line in the log, without a secret.

    The secret is made when it is first needed. A state folder that cannot be written is no error.
    """
    try:
        path = state_folder() / "secret"
        secret = _read_secret(path) if path.exists() else _make_secret(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        log.warning("nothing is signed: no secret can be kept in the state folder (%s)", error)
        return None
    return None if secret is None else _hmac(secret, content)


def is_signed(content: Mapping[str, Any], signature: object) -> bool:
    """Return whether `signature` is this user's signature of these plain values on this machine."""
    try:
        path = state_folder() / "secret"
        secret = _read_secret(path) if path.exists() else None
    except (OSError, RuntimeError):
        return False
    if secret is None or not isinstance(signature, str):
        return False
    return hmac.compare_digest(_hmac(secret, content).encode(), signature.encode("utf-8", "replace"))


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits: 1 to 2 GB a second."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            whole.update(block)
    return whole.hexdigest()


def _hmac(secret: bytes, content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def _read_secret(path: Path) -> bytes | None:
    """Read the secret; None, with one line in the log, for one that is damaged or that others could have read."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        secret = file.read(SECRET_BYTES + 1)
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o077):
        log.warning("%s is not used: it must belong to you, with mode 0600; delete it and score again", path)
        return None
    if len(secret) != SECRET_BYTES:
        log.warning("%s is damaged: delete it and score again", path)
        return None
    return secret


def _make_secret(path: Path) -> bytes | None:
    """Write a new secret, whole or not at all; of two processes that do so at once both return the same."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename it never replaces the secret of a process that was quicker
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return _read_secret(path)
