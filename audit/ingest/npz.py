"""Reading of .npz files, within the memory that their own size allows."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .. import npy
from ..errors import DatasetError
from ..regular_file import open_regular
from .unpickle import FREE_BYTES, MAX_EXPANSION

_BROKEN = (zipfile.BadZipFile, *npy.BROKEN)


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Read the plain arrays of an .npz by name.

    Before anything is read, the sizes in its directory must come to at most 16 times those of the file, and each
    array's shape to the size of its member. Raises DatasetError for what cannot be read so.
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
        raise ValueError(f"it expands to {total:,} bytes, at most {limit:,} are read: write it with numpy.savez")


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(info) as member:
        try:
            npy.check_header(member, num_bytes=info.file_size)
        except ValueError as error:
            raise ValueError(f"{info.filename}: {error}") from error
    with archive.open(info) as member:
        return npy.read_array(member)
