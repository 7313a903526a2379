"""Reading of arrays from pickles, without running any code, and from .npz files, within memory limits."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import DatasetError
from ..parsing import BROKEN, check_header, read_array
from ..storage import open_regular

MAX_EXPANSION = 16  # bytes that may be read, or copied meanwhile, for each byte of the file
FREE_BYTES = 1 << 26  # allowed in addition
_KINDS = "biufSU"  # booleans, numbers, bytes, strings: types that are built from bytes alone
_MAX_CODE = 32  # characters of a type code, such as <f4
_MAX_KEY = 1 << 60  # larger integers can be chosen to have the same hash


class DtypeStandIn:
    """Replacement for numpy.dtype, built from its code; its state sets the byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.dtype = np.dtype(_text(code))
        if self.dtype.kind not in _KINDS + "O":
            raise ValueError(f"arrays of type {self.dtype} are not read")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if _text(state[1]) == ">":
            self.dtype = self.dtype.newbyteorder(">")


class ArrayStandIn:
    """Replacement for numpy.ndarray, empty until its state sets shape, type and content."""

    def __init__(self, *_: Any) -> None:
        self.array: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_column, content = state
        self.array = _fill(dtype, shape, content, order="F" if by_column else "C")


def _fill(dtype: DtypeStandIn, shape: Any, content: Any, *, order: str) -> NDArray[Any]:
    if not isinstance(dtype, DtypeStandIn):
        raise TypeError("an array without a type")
    if dtype.dtype.kind == "O":
        flat = np.empty(len(content), dtype=object)
        for index, item in enumerate(content):  # one by one: assigned together, items of equal shape become a matrix
            flat[index] = item
    else:
        raw = content.encode("latin1") if isinstance(content, str) else content
        flat = np.frombuffer(raw, dtype=dtype.dtype)
    return flat.reshape(tuple(int(size) for size in shape), order="F" if order == "F" else "C")


def _from_buffer(content: Any, dtype: Any, shape: Any, order: str) -> NDArray[Any]:
    return _fill(dtype, shape, content, order=order)


def _scalar(dtype: DtypeStandIn, content: Any) -> Any:
    return _fill(dtype, (), content, order="C").item()


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise ValueError("bytes that are not text in the encoding latin1")
    return text.encode("latin1")


def _bytes(content: Any = b"", encoding: Any = "latin1") -> bytes:
    if isinstance(content, str):
        return _encode(content, "latin1" if encoding in ("latin1", "latin-1") else encoding)
    if not isinstance(content, (bytes, list)):  # bytes(n) would be n zeros
        raise TypeError(f"expected bytes, found {type(content).__name__}")
    return bytes(content)


def _pairs(kind: type[dict[Any, Any]], content: Any = ()) -> dict[Any, Any]:
    """Build a dictionary from a list of pairs or another dictionary."""
    pairs = list(content.items() if isinstance(content, dict) else content)
    check_keys([key for key, _ in pairs])
    return kind(pairs)


def _set(content: Any = ()) -> set[Any]:
    check_keys(content)
    return set(content)


def check_keys(keys: Iterable[Any]) -> None:
    """Raise TypeError for keys that are slow to hash or compare: nested tuples, large integers with equal hashes."""
    for key in keys:
        if not (key is None or isinstance(key, (str, bytes)) or (isinstance(key, int) and abs(key) < _MAX_KEY)):
            raise TypeError(f"a key of type {type(key).__name__}; keys must be names or integers below 2^60")


def size_of(value: Any) -> int:
    """Return the bytes of a value without those of its items."""
    if isinstance(value, (str, bytes)):
        return len(value)
    return 8 * len(value) if isinstance(value, (list, tuple, dict, set)) else 8


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str) or len(value) > _MAX_CODE:
        raise TypeError(f"expected a type code, found {type(value).__name__}")
    return value


_BUILTINS: dict[str, Callable[..., Any]] = {
    **{"list": partial(list), "tuple": partial(tuple), "set": _set, "dict": partial(_pairs, dict)},
    **{"bytes": _bytes, "bytearray": _bytes},
}
KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): DtypeStandIn,
    ("numpy", "ndarray"): ArrayStandIn,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): partial(_pairs, OrderedDict),
    **{(f"{core}.multiarray", "_reconstruct"): ArrayStandIn for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.multiarray", "scalar"): _scalar for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.numeric", "_frombuffer"): _from_buffer for core in ("numpy.core", "numpy._core")},
    **{(module, name): build for module in ("builtins", "__builtin__") for name, build in _BUILTINS.items()},
}


# Limits of a pickle. A hostile pickle of a hundred bytes could otherwise exhaust time or memory: by referring to one
# object repeatedly, by a call that copies a large one, or by keys that all have the same hash.
MAX_OPCODES = 5_000_000  # a few seconds; CMU-MOSEI has about 0.3 million
MAX_DEPTH = 50  # of containers in containers
_MAX_SHOWN = 200  # characters of a message
_BROKEN_PICKLE = (pickle.UnpicklingError, AttributeError, BufferError, ImportError, *BROKEN)
_BROKEN_NPZ = (zipfile.BadZipFile, *BROKEN)


def read_pickle(path: Path) -> Any:
    """Read numpy arrays and plain containers from a pickle; nothing else in it is imported, called or built.

    The names that numpy writes are mapped to stand-ins, so that the bytes never reach numpy's own unpickling.
    Raises DatasetError, naming the reason, for any other name and beyond the limits above.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            limit = FREE_BYTES + MAX_EXPANSION * size
            content = _Reader(_Bounded(file, size), limit).load()
            return _Replacement(limit).replace(content)
    except _BROKEN_PICKLE as error:
        reason = str(error)[:_MAX_SHOWN] or type(error).__name__
        raise DatasetError(f"{path} cannot be read as a pickle: {reason}") from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error


class _Bounded:
    """A file that raises EOFError for reads beyond its end, before memory is allocated."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise EOFError(f"it ends before the {count:,} bytes that it states")
        return self.file.read(count)


def _bytearray(reader: Any) -> None:
    """Read a bytearray as bytes: the base class would first allocate zeros of the stated size."""
    (count,) = struct.unpack("<Q", reader.read(8))
    reader.append(reader.read(count))


def _build(reader: Any) -> None:
    """Set the state of an array, counting the copy of its content."""
    reader.charge(*reader.stack[-1:])
    pickle._Unpickler.load_build(reader)  # type: ignore[attr-defined]


def _with_key_check(load: Callable[[Any], None], items: slice) -> Callable[[Any], None]:
    """Wrap the function of an opcode with a check of its keys; `items` selects them from the top of the stack."""

    def checked(reader: Any) -> None:
        check_keys(reader.stack[items])
        load(reader)

    return checked


class _Counted(dict[int, Callable[[Any], None]]):
    """The functions of the opcodes; raises UnpicklingError after MAX_OPCODES lookups."""

    def __init__(self, functions: dict[int, Callable[[Any], None]]) -> None:
        super().__init__(functions)
        self._num_left = MAX_OPCODES

    def __getitem__(self, opcode: int) -> Callable[[Any], None]:
        self._num_left -= 1
        if self._num_left < 0:
            raise pickle.UnpicklingError(f"it has more than {MAX_OPCODES:,} steps; write the arrays with numpy.savez")
        return super().__getitem__(opcode)


class _Reader(pickle._Unpickler):
    """The unpickler in Python: the one in C allocates as many objects as a damaged file states, 64 GB at worst."""

    def __init__(self, file: Any, limit: int) -> None:
        super().__init__(file, encoding="latin1")  # pickles of Python 2 keep bytes in strings
        self.dispatch = _Counted(_opcodes())  # type: ignore[misc]
        self._bytes_left = limit

    def charge(self, *values: Any) -> None:
        """Count the bytes that a call may copy: its arguments and their items."""
        self._bytes_left -= sum(size_of(value) for value in values)
        self._bytes_left -= sum(size_of(item) for value in values if isinstance(value, tuple) for item in value)
        if self._bytes_left < 0:
            raise pickle.UnpicklingError("it copies its content too often; write the arrays with numpy.savez")

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement for a name of numpy; raise UnpicklingError for other names."""
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(
                f"it refers to {module[:50]}.{name[:50]}, and only numpy arrays and plain containers are read; "
                "write the arrays with numpy.savez and ingest the .npz"
            )
        stand_in = KNOWN[module, name]
        if isinstance(stand_in, type):
            return stand_in

        # A pickle may set attributes of the returned object: functions are wrapped anew for each lookup.
        def call(*arguments: Any) -> Any:
            self.charge(arguments)
            return stand_in(*arguments)

        return call


def _opcodes() -> dict[int, Callable[[Any], None]]:
    functions: dict[int, Callable[[Any], None]] = dict(pickle._Unpickler.dispatch)
    functions |= {pickle.BYTEARRAY8[0]: _bytearray, pickle.BUILD[0]: _build}
    for opcode, items in (
        (pickle.SETITEM, slice(-2, -1)),
        (pickle.SETITEMS, slice(0, None, 2)),
        (pickle.DICT, slice(0, None, 2)),
        (pickle.ADDITEMS, slice(None)),
        (pickle.FROZENSET, slice(None)),
    ):
        functions[opcode[0]] = _with_key_check(functions[opcode[0]], items)
    return functions


class _Replacement:
    """Replacement of the stand-ins by the arrays they hold, with a limit on the total size.

    An object that occurs twice is replaced once and counted twice, since iterating over the content yields it twice.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._done: dict[int, tuple[Any, int]] = {}
        self._open: set[int] = set()

    def replace(self, value: Any) -> Any:
        """Return the content with arrays; raise ValueError if it contains itself, is too deep, or too large."""
        return self._replace_value(value)[0]

    def _replace_value(self, value: Any) -> tuple[Any, int]:
        if isinstance(value, DtypeStandIn):
            return str(value.dtype), 8
        if not isinstance(value, (ArrayStandIn, np.ndarray, dict, list, tuple)):
            return value, 8 + size_of(value)
        if id(value) in self._open:
            raise ValueError("a container contains itself")
        if id(value) not in self._done:
            if len(self._open) >= MAX_DEPTH:
                raise ValueError(f"containers are nested more than {MAX_DEPTH} deep")
            self._open.add(id(value))
            replaced, size = self._replace_items(value)
            if size > self._limit:
                raise ValueError(f"it expands to more than {self._limit:,} bytes, {MAX_EXPANSION} times its own size")
            self._open.discard(id(value))
            self._done[id(value)] = replaced, size
        return self._done[id(value)]

    def _replace_items(self, value: Any) -> tuple[Any, int]:
        if isinstance(value, ArrayStandIn):
            return self._replace_value(value.array)
        if isinstance(value, np.ndarray):
            return self._replace_array(value)
        if isinstance(value, dict):
            pairs = [(key, *self._replace_value(item)) for key, item in value.items()]
            return {key: item for key, item, _ in pairs}, sum(8 + size_of(key) + size for key, _, size in pairs)
        items = [self._replace_value(item) for item in value]
        return type(value)(item for item, _ in items), 8 + sum(size for _, size in items)

    def _replace_array(self, array: NDArray[Any]) -> tuple[NDArray[Any], int]:
        if array.dtype.kind != "O":
            return array, 8 + array.nbytes
        items = [self._replace_value(item) for item in array.ravel()]
        replaced = np.empty(len(items), dtype=object)
        for index, (item, _) in enumerate(items):
            replaced[index] = item
        return replaced.reshape(array.shape), 8 + sum(size for _, size in items)


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of an .npz file by name; arrays of objects are refused.

    The sizes in its directory may sum to at most 16 times the size of the file, and each array must fit the size of
    its member; both are checked before anything is read. Raises DatasetError for a file that cannot be read.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            _check_expansion(archive, path.stat().st_size)
            return {info.filename.removesuffix(".npy"): _read_array(archive, info) for info in archive.infolist()}
    except _BROKEN_NPZ as error:
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
