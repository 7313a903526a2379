"""Settings of this machine for files at URLs, from environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSettings:
    """Settings of this machine, from environment variables: they change no result.

    Attributes:
        cache: Folder of the downloaded files, MMAUDIT_CACHE.
        cache_bytes: Their largest size together, MMAUDIT_CACHE_GB in 10^9 bytes.
        num_threads: Concurrent requests of a process, MMAUDIT_REMOTE_THREADS.
        timeout_seconds: Time limit of a request, MMAUDIT_REMOTE_SECONDS.
    """

    cache: Path
    cache_bytes: int
    num_threads: int
    timeout_seconds: float


VARIABLES = ("MMAUDIT_CACHE", "MMAUDIT_CACHE_GB", "MMAUDIT_REMOTE_THREADS", "MMAUDIT_REMOTE_SECONDS")


def remote_settings() -> RemoteSettings:
    """Read the settings from the environment, which worker processes share; raise ConfigError for other values."""
    return _parse_settings(*(os.environ.get(name) for name in (*VARIABLES, "XDG_CACHE_HOME")))


@cache
def _parse_settings(
    folder: str | None, gigabytes: str | None, threads: str | None, seconds: str | None, home: str | None
) -> RemoteSettings:
    base = Path(home or "")
    default = (base if base.is_absolute() else Path.home() / ".cache") / "mmaudit"
    return RemoteSettings(
        cache=Path(folder).absolute() if folder else default,
        cache_bytes=int(_number("MMAUDIT_CACHE_GB", gigabytes, default=20.0, lowest=1e-6) * 1e9),
        num_threads=int(_number("MMAUDIT_REMOTE_THREADS", threads, default=8, lowest=1)),
        timeout_seconds=_number("MMAUDIT_REMOTE_SECONDS", seconds, default=60.0, lowest=0.1),
    )


def _number(name: str, text: str | None, *, default: float, lowest: float) -> float:
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = float("nan")
    if not lowest <= value < 1e9:
        raise ConfigError(f"{name}={text}: it must be a number of at least {lowest:g}")
    return value
