"""Cells of a dataset: loading of the media, vectors and texts that they hold or name."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DatasetError, Reason, UnusableError
from ..hashing import digest
from ..media.files import is_hidden, kind_of_path, missing_file, require_fetched
from ..media.media_file import MAX_ARRAY_BYTES, MAX_IN_MEMORY, MediaFile, Medium, RemoteMediaFile, wave_file
from ..parsing import BROKEN, check_header, read_array
from ..remote.cache import read_cached
from ..remote.paths import AnyPath, RemotePath, is_url, shown_url, source_path
from ..storage import file_stamp, open_regular
from .modalities import FileChecks, Modality

MAX_FOLDER_ENTRIES = 100_000  # files in a folder of frames: an hour at 25 frames a second has 90,000
_DIGITS = re.compile(r"(\d+)")
_MAX_RATE = 1 << 31  # Hz; the header of a wav file has 32 bits
_MAX_WAVE_BYTES = 1 << 31  # of an array of samples: 4.6 hours at 16 kHz as 64-bit floats


def null_error(column: str) -> UnusableError:
    """Return the error of a cell that is null: the modality counts as missing in the source."""
    return UnusableError(Reason.MISSING, f"{column} is null")


@dataclass(frozen=True, slots=True, kw_only=True)
class CellLoader:
    """Loading of the cells of one modality, from files below `root`."""

    modality: Modality
    root: AnyPath
    allow_outside: bool

    def load(self, cell: Any) -> Any:
        """Load a cell: a medium, a text, a vector, or tuple[tuple[Medium, ...], ...] for frames.

        A medium is its bytes, or a MediaFile if it is large. Frames are the images of one or several folders, in order.
        Raises UnusableError if the medium is missing or not a regular file, DatasetError for a path outside `root`
        unless `allow_outside`.
        """
        kind, column = self.modality.kind, self.modality.column
        if cell is None:
            raise null_error(column)
        if kind == "features":
            return self._load_array(cell) if isinstance(cell, str) else cell
        if kind == "text":
            return self._load_text(cell) if self.modality.in_files else cell
        if kind == "frames":
            if _is_picture_list(cell):
                return (self._load_pictures(cell),)
            return tuple(self._load_folder(folder) for folder in _folder_names(cell, column))
        if isinstance(cell, list):
            if not cell or cell[0] is None:
                raise UnusableError(Reason.MISSING, f"{column} has no picture" if not cell else f"{column}[0] is null")
            cell = cell[0]
        return self._load_medium(cell)

    def file_names(self, cell: Any) -> list[str] | None:
        """Return the names of all files that a cell is loaded from; None if the cell holds the data itself."""
        kind = self.modality.kind
        if kind == "frames":
            if _is_picture_list(cell):
                return _path_names(cell)
            folders = _folder_names(cell, self.modality.column) if isinstance(cell, str | list) else []
            return [path for folder in folders for path in self._picture_paths(folder)] or None
        if isinstance(cell, list) and kind == "image":
            return _path_names(cell[:1])
        in_cell = kind == "text" and not self.modality.in_files
        return None if in_cell or isinstance(cell, list) else _path_names([cell])

    def stamp(self, cell: Any, source_stamp: str | None) -> str | None:
        """Return a digest of the paths, sizes and times of the files that a cell names; no file is opened.

        It changes when one of the files does. A cell without a path has the stamp of its source. None if a file is
        missing. Raises DatasetError as `load` does.
        """
        try:
            names = self.file_names(cell)
            if names is None:
                return source_stamp
            stamps = [file_stamp(self._resolve(name)) for name in names]
        except UnusableError:
            return None
        return None if None in stamps else digest(repr((cell, stamps)).encode("utf-8", "surrogatepass"))

    def local_stamps(self, cell: Any) -> list[tuple[int, int] | None]:
        """Return the size and the time of modification in ns of each local file that a cell names, by one stat each.

        None stands for a missing file. Nothing is asked about files at URLs, which are left out.
        """
        folders = cell if isinstance(cell, list) else [cell]
        if isinstance(self.root, RemotePath) or any(is_url(name) for name in folders):
            return []
        try:
            names = self.file_names(cell) or []
        except UnusableError:
            return [None]
        return [_size_and_time(os.path.join(self.root, name)) for name in names if not is_url(name)]

    def _load_medium(self, cell: Any, *, max_bytes: int = MAX_IN_MEMORY) -> Medium:
        column = self.modality.column
        if isinstance(cell, dict):
            if cell.get("array") is not None:
                return _wave_of_struct(cell, column)
            cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
            if cell is None:
                raise UnusableError(Reason.MISSING, f"{column} has neither bytes nor a path")
        if isinstance(cell, bytes):
            return require_fetched(cell, column)
        return self._read_medium(str(cell), max_bytes=max_bytes)

    def _load_array(self, name: str) -> NDArray[np.float32]:
        """Load the numbers (d,) of a .npy file, row by row if it has several dimensions; nothing is unpickled."""
        data = self._read_bytes(name, max_bytes=MAX_ARRAY_BYTES)
        try:
            check_header(io.BytesIO(data), num_bytes=len(data))
            array = read_array(io.BytesIO(data))
        except BROKEN as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            raise UnusableError(Reason.CORRUPT, f"{name} cannot be read as .npy: {reason}") from error
        if array.dtype.kind not in "fiub":
            raise UnusableError(Reason.CORRUPT, f"{name} holds {array.dtype}, not numbers")
        return np.ascontiguousarray(array, dtype=np.float32).ravel()

    def _load_text(self, name: str) -> str:
        try:
            return self._read_bytes(name, max_bytes=MAX_IN_MEMORY).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UnusableError(Reason.CORRUPT, f"{name}: byte {error.start + 1} is not UTF-8") from error

    def _load_pictures(self, cells: Sequence[Any]) -> tuple[Medium, ...]:
        """Load pictures in order: of all together at most MAX_IN_MEMORY bytes, since only a few are decoded."""
        media: list[Medium] = []
        max_bytes = MAX_IN_MEMORY
        for index, cell in enumerate(cells):
            if cell is None:
                raise UnusableError(Reason.MISSING, f"{self.modality.column}[{index}] is null")
            media.append(self._load_medium(cell, max_bytes=max_bytes))
            max_bytes -= len(media[-1]) if isinstance(media[-1], bytes) else 0
        return tuple(media)

    def _load_folder(self, name: str) -> tuple[Medium, ...]:
        return self._load_pictures(self._picture_paths(name))

    def _picture_paths(self, name: str) -> list[str]:
        """Return the paths of the images of a folder, in natural order; UnusableError if there is none."""
        folder = self._resolve(name)
        if not folder.is_dir():
            raise UnusableError(Reason.MISSING, f"no folder {name}")
        try:
            pictures = _pictures(folder)
        except OSError as error:
            raise UnusableError(Reason.CORRUPT, f"{name}: {error.strerror}") from error
        if not pictures:
            raise UnusableError(Reason.EMPTY, f"no picture in the folder {name}")
        return [f"{name}/{picture}" for picture in pictures]

    def _resolve(self, name: str) -> AnyPath:
        return resolve(name, root=self.root, allow_outside=self.allow_outside)

    def _read_bytes(self, name: str, *, max_bytes: int) -> bytes:
        medium = self._read_medium(name, max_bytes=max_bytes)
        if isinstance(medium, MediaFile):
            raise UnusableError(Reason.TOO_LARGE, f"{name} has {len(medium):,} bytes, the maximum is {max_bytes:,}")
        return medium

    def _read_medium(self, name: str, *, max_bytes: int) -> Medium:
        """Read a regular file; one larger than `max_bytes` is returned as a MediaFile, which is read in ranges."""
        path = self._resolve(name)
        try:
            if isinstance(path, RemotePath):
                is_large = path.file_status().size > max_bytes
                return require_fetched(
                    RemoteMediaFile.at(path) if is_large else read_cached(path, Path.read_bytes), name
                )
            with open_regular(path) as file:
                status = os.fstat(file.fileno())
                is_small = status.st_size <= max_bytes
                return require_fetched(file.read(status.st_size) if is_small else MediaFile.of(path, status), name)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise missing_file(self.root, name) from error
        except OSError as error:
            raise UnusableError(Reason.CORRUPT, f"{name}: {error.strerror}") from error


def load_cell(cell: Any, modality: Modality, *, root: AnyPath, allow_outside: bool) -> Any:
    """Load one cell; see CellLoader.load."""
    return CellLoader(modality=modality, root=root, allow_outside=allow_outside).load(cell)


def check_files(root: AnyPath, *, allow_outside: bool) -> FileChecks:
    """Return checks of the files that cells name, for the inference of kinds; outside `root` no file is opened."""

    def exists(name: str) -> bool:
        try:
            return resolve(name, root=root, allow_outside=allow_outside).exists()
        except (DatasetError, UnusableError, OSError):
            return False

    def holds_pictures(name: str) -> bool:
        try:
            folder = resolve(name, root=root, allow_outside=allow_outside)
            return folder.is_dir() and bool(_pictures(folder))
        except (DatasetError, UnusableError, OSError):
            return False

    def array_shape(name: str) -> tuple[int, ...] | None:
        try:
            with open_regular(resolve(name, root=root, allow_outside=allow_outside)) as file:
                num_bytes = file.seek(0, os.SEEK_END)
                file.seek(0)
                return check_header(file, num_bytes=num_bytes)
        except (DatasetError, UnusableError, OSError, *BROKEN):
            return None

    return FileChecks(exists=exists, holds_pictures=holds_pictures, array_shape=array_shape)


def resolve(name: str, *, root: AnyPath, allow_outside: bool) -> AnyPath:
    """Return the path that a name below `root` stands for; DatasetError if it leads outside, unless allowed.

    A URL is outside, and so is a file of this machine for data at a URL, which may never name one.
    """
    outside = DatasetError(
        f"{shown_url(name) if is_url(name) else name!r} leads outside {root}; make paths relative to the metadata, or "
        "pass --allow-outside"
    )
    if isinstance(root, RemotePath) or is_url(name):
        return _resolve_remote(name, root, outside if not allow_outside else None)
    root_path = root.resolve()
    try:
        path = (root_path / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # circular links, or a NUL in the name
        raise UnusableError(Reason.MISSING, f"no file {name!r}: {error}") from error
    if not allow_outside and not path.is_relative_to(root_path):
        raise outside
    return path


def _resolve_remote(name: str, root: AnyPath, refusal: DatasetError | None) -> AnyPath:
    """Return the path of a URL, or of a name below a URL; raise the refusal, if any, for one that leads outside."""
    if is_url(name):
        if refusal is not None:
            raise refusal
        path = source_path(name)
        if isinstance(root, RemotePath) and not isinstance(path, RemotePath):
            raise DatasetError(f"{name!r} names a file of this machine, which data at a URL may not do: {root}")
        return path
    assert isinstance(root, RemotePath)
    if name.startswith("/"):
        raise DatasetError(f"{name!r} names a file of this machine, which data at a URL may not do: {root}")
    names: list[str] = []
    for part in name.split("/"):
        if part == "..":
            if not names:
                raise refusal or DatasetError(f"{name!r} leads outside {root}: write it as a URL")
            names.pop()
        elif part not in ("", "."):
            names.append(part)
    if "\0" in name or not names:
        raise UnusableError(Reason.MISSING, f"no file {name!r}")
    return root / "/".join(names)


def _is_picture_list(cell: Any) -> bool:
    """Return whether a cell is a list of pictures, not of folders of pictures: their paths, bytes, or structs."""
    return isinstance(cell, list) and any(
        element is not None and (not isinstance(element, str) or kind_of_path(element) == "image") for element in cell
    )


def _size_and_time(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _path_names(cells: Sequence[Any]) -> list[str] | None:
    """Return the paths that strings and structs without bytes name; None if there are none."""
    paths = [
        cell.get("path") if isinstance(cell, dict) and cell.get("bytes") is None and not cell.get("array") else cell
        for cell in cells
    ]
    return [path for path in paths if isinstance(path, str)] or None


def _folder_names(cell: str | list[str | None], column: str) -> list[str]:
    """Return the folders of frames that a cell names; UnusableError if there is none, or a null."""
    folders = [cell] if isinstance(cell, str) else cell
    if not folders:
        raise UnusableError(Reason.MISSING, f"{column} names no folder")
    if None in folders:
        raise UnusableError(Reason.MISSING, f"{column} names a folder that is null")
    return folders  # type: ignore[return-value]


def _pictures(folder: AnyPath) -> list[str]:
    """Return the image names of a folder in natural order: numbers compare as numbers, so frame 10 follows frame 9."""
    if isinstance(folder, RemotePath):
        names = list(folder.entries())
    else:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in islice(entries, MAX_FOLDER_ENTRIES + 1)]
    if len(names) > MAX_FOLDER_ENTRIES:
        raise UnusableError(Reason.TOO_LARGE, f"more than {MAX_FOLDER_ENTRIES:,} files in the folder {folder.name}")
    pictures = [name for name in names if kind_of_path(name) == "image" and not is_hidden(name)]
    return sorted(pictures, key=_natural_order)


def _natural_order(name: str) -> tuple[list[tuple[int, str]], str]:
    parts = _DIGITS.split(name)  # text and numbers alternate, starting with text
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)], name


def _wave_of_struct(cell: dict[str, Any], column: str) -> bytes:
    """Return the wav file of a struct of `array` (t,) or (channels, t) and `sampling_rate` in Hz."""
    rate = cell.get("sampling_rate")
    if rate is None or not 0 < rate < _MAX_RATE:
        raise UnusableError(Reason.CORRUPT, f"{column}: the sampling rate is {rate}")
    try:
        samples = np.array(cell["array"])
        samples = samples if samples.dtype.kind in "iu" else samples.astype(np.float64)  # null becomes NaN
    except (TypeError, ValueError) as error:
        raise UnusableError(Reason.CORRUPT, f"{column}: the array is not of numbers, or its rows differ") from error
    if samples.size == 0 or samples.ndim > 2:
        reason = Reason.EMPTY if samples.size == 0 else Reason.CORRUPT
        raise UnusableError(reason, f"{column}: an array of shape {samples.shape}")
    if samples.nbytes > _MAX_WAVE_BYTES:
        raise UnusableError(Reason.TOO_LARGE, f"{column}: an array of {samples.size:,} samples")
    if samples.dtype.kind in "iu" and np.abs(samples.astype(np.float64)).max() > np.iinfo(np.int16).max + 1:
        samples = samples / 2.0**31  # of 24 or 32 bits, as wide integers hold them
    return wave_file(samples, int(rate))
