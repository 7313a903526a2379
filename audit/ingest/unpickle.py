"""A pickle of arrays: what does it hold, without running what it says?"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import DatasetError

_KINDS = "biufSU"  # booleans, numbers, bytes, strings: what bytes alone can give
_BROKEN = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    BufferError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def read_pickle(path: Path) -> Any:
    """Read numpy arrays and plain containers from a pickle; nothing else in it is looked up, called or built.

    The names that numpy writes stand here for classes of ours, so that not even numpy's own unpickling sees the bytes.
    Raises DatasetError that names what a pickle asks for beyond these.
    """
    try:
        with path.open("rb") as file:
            bounded: Any = _Bounded(file, path.stat().st_size)
            return _plain(_Reader(bounded, encoding="latin1").load())  # pickles of Python 2 keep bytes in strings
    except _BROKEN as error:
        raise DatasetError(f"{path} cannot be read as a pickle: {str(error) or type(error).__name__}") from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error


class _Dtype:
    """Stands for numpy.dtype: made of its code, then told its byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.dtype = np.dtype(_text(code))
        if self.dtype.kind not in _KINDS + "O":
            raise ValueError(f"arrays of type {self.dtype} are not read")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if _text(state[1]) == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """Stands for numpy.ndarray while it is empty: its state brings shape, type and content."""

    def __init__(self, *_: Any) -> None:
        self.array: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_column, content = state
        self.array = _fill(dtype, shape, content, order="F" if by_column else "C")


def _fill(dtype: _Dtype, shape: Any, content: Any, *, order: str) -> NDArray[Any]:
    if not isinstance(dtype, _Dtype):
        raise TypeError("an array without a type")
    if dtype.dtype.kind == "O":
        flat = np.empty(len(content), dtype=object)
        for index, item in enumerate(content):  # not at once: items of one shape would be spread over a matrix
            flat[index] = _plain(item)
    else:
        raw = content.encode("latin1") if isinstance(content, str) else content
        flat = np.frombuffer(raw, dtype=dtype.dtype)
    return flat.reshape(tuple(int(size) for size in shape), order="F" if order == "F" else "C")


def _from_buffer(content: Any, dtype: Any, shape: Any, order: str) -> NDArray[Any]:
    return _fill(dtype, shape, content, order=order)


def _scalar(dtype: _Dtype, content: Any) -> Any:
    return _fill(dtype, (), content, order="C").item()


def _encode(text: Any, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return str(text).encode("latin1")


def _bytes(content: Any = b"", encoding: str = "latin1") -> bytes:
    if isinstance(content, int):
        raise TypeError("a number where bytes were expected")  # bytes(n) would be n zeros
    return _encode(content, encoding.replace("-", "")) if isinstance(content, str) else bytes(content)


def _names() -> dict[tuple[str, str], Callable[..., Any]]:
    known: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "dtype"): _Dtype,
        ("numpy", "ndarray"): _Array,
        ("_codecs", "encode"): _encode,
        ("collections", "OrderedDict"): OrderedDict,
    }
    for core in ("numpy.core", "numpy._core"):
        known[f"{core}.multiarray", "_reconstruct"] = _Array
        known[f"{core}.multiarray", "scalar"] = _scalar
        known[f"{core}.numeric", "_frombuffer"] = _from_buffer
    for module in ("builtins", "__builtin__"):
        known |= {(module, kind.__name__): kind for kind in (list, dict, tuple, set)}
        known |= {(module, "bytes"): _bytes, (module, "bytearray"): _bytes}
    return known


_KNOWN = _names()


class _Bounded:
    """A file that refuses, before any room is made, to read more bytes than it has."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise EOFError(f"it ends before {count:,} bytes that it announces")
        return self.file.read(count)


def _bytearray(reader: Any) -> None:
    """Read a bytearray as bytes: the reader's own way fills the room that is announced with zeros first."""
    (count,) = struct.unpack("<Q", reader.read(8))
    reader.append(reader.read(count))


class _Reader(pickle._Unpickler):
    """The reader in Python: that in C makes room for as many objects as a damaged file may name, 64 GB at worst."""

    def find_class(self, module: str, name: str) -> Any:
        """Give our stand-in for a name of numpy; refuse all others."""
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and only numpy arrays and plain containers are read; "
                "write the arrays with numpy.savez and ingest the .npz"
            )
        known = _KNOWN[module, name]
        # A pickle may set attributes of what it is given: functions are given as a copy.
        return known if isinstance(known, type) else lambda *arguments: known(*arguments)

    dispatch = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: _bytearray}  # noqa: RUF012


def _plain(value: Any) -> Any:
    """Replace the stand-ins by the arrays they hold."""
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, _Dtype):
        return str(value.dtype)
    return value


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where a name of a type was expected")
    return value
