"""Work and encoders for the tests of Ray's workers, which import this module."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmaudit.audit.errors import DatasetError, RemoteError


def double(shared: int, unit: int) -> int:
    """Return the product of what all units share and a unit."""
    return shared * unit


def die_once(folder: Path, unit: int) -> int:
    """Kill the process the first time that a unit is done."""
    if first_time(folder / str(unit)):
        os.kill(os.getpid(), signal.SIGKILL)
    return unit


def fail_once(folder: Path, unit: int) -> int:
    """Fail as a file system may, the first time that a unit is done."""
    if first_time(folder / str(unit)):
        raise OSError(5, "Input/output error", str(folder))
    return unit


def always_fail(kind: str, unit: int) -> None:
    """Fail in one of several ways."""
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    errors = {
        "disk": OSError(28, "No space left on device", "x"),
        "server": RemoteError("s3://b/x: no answer, in 4 tries"),
        "data": DatasetError("the data are bad"),
    }
    raise errors.get(kind, KeyError("a bug"))


def wait_for(folder: Path, unit: int) -> int:
    """State that a unit has begun, and wait for a file named go."""
    (folder / f"begun-{unit}-{os.getpid()}").touch()
    while not (folder / "go").exists():
        time.sleep(0.05)
    return unit


def first_time(path: Path) -> bool:
    """Return whether a file did not exist, and create it."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def encode_and_die(decoded: Any, media: Any) -> NDArray[np.float32]:
    """Encode a picture by its mean colours; kill the process with the tenth picture that any process encodes."""
    folder = Path(os.environ["TEST_FAULTS"])
    count = len(list(folder.iterdir()))
    (folder / f"{count}-{os.getpid()}-{time.monotonic_ns()}").touch()
    if count == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    pixels: NDArray[np.float32] = np.asarray(decoded, dtype=np.float32)
    return np.asarray(pixels.reshape(-1, pixels.shape[-1]).mean(axis=0), dtype=np.float32)
