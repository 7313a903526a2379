"""Reading of .npy and .npz files within memory limits set by the size of the file."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from .errors import DatasetError
from .storage import open_regular

MAX_EXPANSION = 16  # bytes that may be read, or copied meanwhile, for each byte of the file
FREE_BYTES = 1 << 26  # allowed in addition
# Errors that NumPy raises for a damaged header or body, and zlib for a damaged member of an archive.
BROKEN = (
    tokenize.TokenError,
    zlib.error,
    struct.error,
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def check_header(stream: IO[bytes], *, num_bytes: int) -> None:
    """Raise one of BROKEN if the header states objects, or more bytes than the `num_bytes` of header and body."""
    version = npy.read_magic(stream)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    stated_bytes = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or stated_bytes > num_bytes:
        stated = "objects" if dtype.hasobject else f"{stated_bytes:,} bytes"
        raise ValueError(f"its header states {stated}, and it has {num_bytes:,} bytes")


def read_array(stream: IO[bytes]) -> NDArray[Any]:
    """Read the array of a stream whose header was checked; raise one of BROKEN if the body is damaged."""
    return np.asarray(npy.read_array(stream, allow_pickle=False))


_BROKEN = (zipfile.BadZipFile, *BROKEN)


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of an .npz file by name; arrays of objects are refused.

    The sizes in its directory may sum to at most 16 times the size of the file, and each array must fit the size of
    its member; both are checked before anything is read. Raises DatasetError for a file that cannot be read.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            _check_expansion(archive, path.stat().st_size)
            return {info.filename.removesuffix(".npy"): _read_array(archive, info) for info in archive.infolist()}
    except _BROKEN as error:
        reason = str(error)[:200] or type(error).__name__
        raise DatasetError(f"{path} cannot be read as .npz of plain arrays: {reason}") from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from error


def _check_expansion(archive: zipfile.ZipFile, size: int) -> None:
    total, limit = sum(info.file_size for info in archive.infolist()), FREE_BYTES + MAX_EXPANSION * size
    if total > limit:
        raise ValueError(f"it expands to {total:,} bytes, the maximum is {limit:,}: write it with numpy.savez")


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(info) as member:
        try:
            check_header(member, num_bytes=info.file_size)
        except ValueError as error:
            raise ValueError(f"{info.filename}: {error}") from error
    with archive.open(info) as member:
        return read_array(member)
