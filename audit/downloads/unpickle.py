"""Pickles of arrays, read without running what they name."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import DatasetError
from ..numpy_files import FREE_BYTES, MAX_EXPANSION
from ..storage import open_regular
from .stand_ins import KNOWN, ArrayStandIn, DtypeStandIn, check_keys, size_of

# What a pickle may ask for. A hostile one of a hundred bytes could otherwise fill any memory: by naming one object
# again and again, by a call that copies a large one, or by keys whose hashes are all the same.
MAX_OPCODES = 5_000_000  # a few seconds; CMU-MOSEI has about 0.3 million
MAX_DEPTH = 50  # of containers in containers
_MAX_SHOWN = 200  # characters of a message
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
    Raises DatasetError that names what a pickle asks for beyond these, or beyond the limits above.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            limit = FREE_BYTES + MAX_EXPANSION * size
            content = _Reader(_Bounded(file, size), limit).load()
            return _Replacement(limit).replace(content)
    except _BROKEN as error:
        reason = str(error)[:_MAX_SHOWN] or type(error).__name__
        raise DatasetError(f"{path} cannot be read as a pickle: {reason}") from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error


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


def _build(reader: Any) -> None:
    """Set the state of an array, whose content may be copied."""
    reader.charge(*reader.stack[-1:])
    pickle._Unpickler.load_build(reader)  # type: ignore[attr-defined]


def _after_keys(load: Callable[[Any], None], items: slice) -> Callable[[Any], None]:
    """Return an opcode's function that checks its keys first; `items` says which of the stack's top they are."""

    def checked(reader: Any) -> None:
        check_keys(reader.stack[items])
        load(reader)

    return checked


class _Counted(dict[int, Callable[[Any], None]]):
    """The functions of the opcodes, which are looked up one by one: so many times and no more."""

    def __init__(self, functions: dict[int, Callable[[Any], None]]) -> None:
        super().__init__(functions)
        self._left = MAX_OPCODES

    def __getitem__(self, opcode: int) -> Callable[[Any], None]:
        self._left -= 1
        if self._left < 0:
            raise pickle.UnpicklingError(f"it has more than {MAX_OPCODES:,} steps; write the arrays with numpy.savez")
        return super().__getitem__(opcode)


class _Reader(pickle._Unpickler):
    """The reader in Python: that in C makes room for as many objects as a damaged file may name, 64 GB at worst."""

    def __init__(self, file: Any, limit: int) -> None:
        super().__init__(file, encoding="latin1")  # pickles of Python 2 keep bytes in strings
        self.dispatch = _Counted(_opcodes())  # type: ignore[misc]
        self._left = limit

    def charge(self, *values: Any) -> None:
        """Count what a call may copy: the values given to it, and their items."""
        self._left -= sum(size_of(value) for value in values)
        self._left -= sum(size_of(item) for value in values if isinstance(value, tuple) for item in value)
        if self._left < 0:
            raise pickle.UnpicklingError("it copies its content again and again; write the arrays with numpy.savez")

    def find_class(self, module: str, name: str) -> Any:
        """Return our stand-in for a name of numpy; refuse all others."""
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(
                f"it asks for {module[:50]}.{name[:50]}, and only numpy arrays and plain containers are read; "
                "write the arrays with numpy.savez and ingest the .npz"
            )
        known = KNOWN[module, name]
        if isinstance(known, type):
            return known

        # A pickle may set attributes of what it is given: functions are given as a copy.
        def call(*arguments: Any) -> Any:
            self.charge(arguments)
            return known(*arguments)

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
        functions[opcode[0]] = _after_keys(functions[opcode[0]], items)
    return functions


class _Replacement:
    """Replaces the stand-ins by the arrays they hold, and checks what the content comes to.

    An object that is named twice is replaced once, and counts twice: whoever goes through the content sees it twice.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._done: dict[int, tuple[Any, int]] = {}
        self._open: set[int] = set()

    def replace(self, value: Any) -> Any:
        """Return the content with arrays; ValueError where it contains itself, is too deep, or comes to too much."""
        return self._replaced(value)[0]

    def _replaced(self, value: Any) -> tuple[Any, int]:
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
            new, size = self._opened(value)
            if size > self._limit:
                raise ValueError(f"it comes to more than {self._limit:,} bytes, {MAX_EXPANSION} times its own size")
            self._open.discard(id(value))
            self._done[id(value)] = new, size
        return self._done[id(value)]

    def _opened(self, value: Any) -> tuple[Any, int]:
        if isinstance(value, ArrayStandIn):
            return self._replaced(value.array)
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, dict):
            pairs = [(key, *self._replaced(item)) for key, item in value.items()]
            return {key: item for key, item, _ in pairs}, sum(8 + size_of(key) + size for key, _, size in pairs)
        items = [self._replaced(item) for item in value]
        return type(value)(item for item, _ in items), 8 + sum(size for _, size in items)

    def _array(self, array: NDArray[Any]) -> tuple[NDArray[Any], int]:
        if array.dtype.kind != "O":
            return array, 8 + array.nbytes
        items = [self._replaced(item) for item in array.ravel()]
        new = np.empty(len(items), dtype=object)
        for index, (item, _) in enumerate(items):
            new[index] = item
        return new.reshape(array.shape), 8 + sum(size for _, size in items)
