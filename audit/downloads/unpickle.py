"""Reading of pickled arrays without running any code that a pickle refers to."""

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

# Limits of a pickle. A hostile pickle of a hundred bytes could otherwise exhaust time or memory: by referring to one
# object repeatedly, by a call that copies a large one, or by keys that all have the same hash.
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
    """Read numpy arrays and plain containers from a pickle; nothing else in it is imported, called or built.

    The names that numpy writes are mapped to classes of `stand_ins`, so that the bytes never reach numpy's own
    unpickling. Raises DatasetError, naming the reason, for any other name and beyond the limits above.
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
