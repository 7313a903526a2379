"""Safe replacements for the NumPy classes and functions that a pickle refers to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def _names() -> dict[tuple[str, str], Callable[..., Any]]:
    stand_in_of_name: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "dtype"): DtypeStandIn,
        ("numpy", "ndarray"): ArrayStandIn,
        ("_codecs", "encode"): _encode,
        ("collections", "OrderedDict"): partial(_pairs, OrderedDict),
    }
    for core in ("numpy.core", "numpy._core"):
        stand_in_of_name[f"{core}.multiarray", "_reconstruct"] = ArrayStandIn
        stand_in_of_name[f"{core}.multiarray", "scalar"] = _scalar
        stand_in_of_name[f"{core}.numeric", "_frombuffer"] = _from_buffer
    for module in ("builtins", "__builtin__"):
        stand_in_of_name |= {(module, "list"): partial(list), (module, "tuple"): partial(tuple), (module, "set"): _set}
        stand_in_of_name |= {(module, "dict"): partial(_pairs, dict)}
        stand_in_of_name |= {(module, "bytes"): _bytes, (module, "bytearray"): _bytes}
    return stand_in_of_name


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str) or len(value) > _MAX_CODE:
        raise TypeError(f"expected a type code, found {type(value).__name__}")
    return value


KNOWN = _names()
