"""Parsing within limits: text of any Unicode encoding, JSON and its structure, configs, and .npy arrays."""

from __future__ import annotations

import codecs
import dataclasses
import json
import math
import operator
import struct
import tokenize
import types
import typing
import unicodedata
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import IO, Any, NoReturn, TypeAlias, TypeVar

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from .errors import ConfigError, choices

MAX_DEPTH = 64  # of nested lists and objects: `json` itself fails at about 1,000, Arrow crashes at 3,000
MAX_BYTES = 1 << 26  # of one document: the largest that mmaudit writes, for 5,000 classes, has 2 MiB
_TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"
_SHOWN = 60  # characters of a wrong value that a message repeats
_WORDS = {str: "text", int: "an integer", float: "a number", bool: "true or false", dict: "an object", list: "a list"}

# Expected structure of JSON: a type, or a tuple of types (NoneType: null), one of which may be a mapping; a mapping
# from keys to the shapes of their values, where "*" is the shape of all other keys and keys are optional unless the
# mapping is `RequiredKeys`; a list with one shape, that of every entry.
Shape: TypeAlias = "type | tuple[type | Mapping[str, Shape], ...] | Mapping[str, Shape] | list[Shape]"


class RequiredKeys(dict[str, Any]):
    """The shape of an object whose keys are all required, except those that end in "?" and "*", any other key."""


# UTF-32 first: its little-endian mark begins with that of UTF-16. Excel ("Unicode text") and PowerShell write UTF-16.
_ENCODING_OF_MARK = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def encoding_of(data: bytes) -> str:
    """Return the encoding that the byte order mark at the start of a text states; "utf-8-sig" if it has none."""
    return next((encoding for mark, encoding in _ENCODING_OF_MARK.items() if data.startswith(mark)), "utf-8-sig")


def decode_text(data: bytes) -> str:
    """Decode UTF-8, UTF-16 or UTF-32 text without its byte order mark; ValueError with line and byte otherwise."""
    encoding = encoding_of(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line, start = data.count(b"\n", 0, error.start) + 1, data.rfind(b"\n", 0, error.start) + 1
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(f"line {line}, byte {error.start - start + 1} is not {name}: save it as UTF-8") from error


def fold_text(text: str) -> str:
    """Return a text without differences of case, of blanks and of Unicode form (NFC or NFD), to compare it."""
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split())


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON document of finite numbers below 2^63 and at most 64 levels; raise ValueError with the reason."""
    content = parse_data_json(text)
    for value in _leaves(content):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value} is not a JSON number")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("it contains an integer of more than 64 bits")
    return content


def parse_data_json(text: str | bytes) -> Any:
    """Parse JSON of at most 64 levels and 64 MiB, NaN and large integers included; raise ValueError with the reason."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text):,} bytes, the maximum is {MAX_BYTES:,}")
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    for _ in _leaves(content):
        pass
    return content


def check_shape(content: Any, shape: Shape, *, key: str = "") -> None:
    """Raise ValueError, naming the key, if parsed JSON does not have this shape."""
    if isinstance(shape, Mapping):
        if not isinstance(content, dict):
            _raise_wrong(key, content, "an object")
        _check_keys(content, shape, key=key)
    elif isinstance(shape, list):
        if not isinstance(content, list):
            _raise_wrong(key, content, "a list")
        for index, entry in enumerate(content):
            check_shape(entry, shape[0], key=f"{key}[{index}]")
    else:
        shapes = shape if isinstance(shape, tuple) else (shape,)
        mapping = next((option for option in shapes if isinstance(option, Mapping)), None)
        if mapping is not None and isinstance(content, dict):
            check_shape(content, mapping, key=key)
        else:
            _check_type(content, tuple(option for option in shapes if isinstance(option, type)), key=key)


def _check_keys(content: dict[str, Any], shape: Mapping[str, Shape], *, key: str) -> None:
    required = [name for name in shape if name != "*" and name[-1:] != "?"] if isinstance(shape, RequiredKeys) else []
    missing = [name for name in required if name not in content]
    if missing:
        raise ValueError(f"{key or 'the document'} lacks {', '.join(missing)}")
    for name, value in content.items():
        value_shape = next((shape[shape_key] for shape_key in (name, f"{name}?", "*") if shape_key in shape), None)
        if value_shape is not None:
            check_shape(value, value_shape, key=f"{key}.{name}" if key else name)


def _check_type(value: Any, types: tuple[type, ...], *, key: str) -> None:
    allowed = (*types, int) if float in types else types
    is_unexpected_bool = isinstance(value, bool) and bool not in types
    if is_unexpected_bool or not isinstance(value, allowed):
        _raise_wrong(key, value, " or ".join(_WORDS.get(type_, "null") for type_ in types))
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{key or 'the document'} contains a NUL character")


def _raise_wrong(key: str, value: Any, expected: str) -> NoReturn:
    shown = json.dumps(value)[:_SHOWN]
    raise ValueError(f"{key or 'the document'} is {shown}; it must be {expected}")


def _leaves(content: Any) -> Iterator[Any]:
    """Yield keys and values that are neither lists nor objects, without recursion; ValueError beyond 64 levels."""
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        next_level: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                yield from value
                next_level += value.values()
            elif isinstance(value, list):
                next_level += value
            else:
                yield value
        if not next_level:
            return
        level = next_level
    raise ValueError(_TOO_DEEP)


Config = TypeVar("Config")


def build_config(type_: type[Config], content: Mapping[str, Any], *, where: str) -> Config:
    """Build a config from nested plain values; raise ConfigError for an unknown key or a value of a wrong type."""
    _check_section(content, where=where)
    hints = typing.get_type_hints(type_)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(typing.cast("type[Any]", type_))}
    values = {}
    for key, value in content.items():
        if key not in hints:
            raise ConfigError(f"no config key {where}{key}; {choices(where + key, [where + name for name in hints])}")
        values[key] = _convert(value, hints[key], name=f"{where}{key}")
    return type_(**values)


def check_ranges(section: str, config: object, **intervals: str) -> None:
    """Raise ConfigError for a field outside its interval, such as "[1, inf)" or "(0, 1]".

    A tuple needs one or more entries, all of them inside; None passes. Names of fields are keywords: `lr="(0, inf)"`.
    """
    for name, interval in intervals.items():
        if (value := getattr(config, name)) is None:
            continue
        low, high = (float(bound) for bound in interval[1:-1].split(","))
        above = operator.ge if interval[0] == "[" else operator.gt
        below = operator.le if interval[-1] == "]" else operator.lt
        entries = value if isinstance(value, tuple) else (value,)
        if entries and all(above(entry, low) and below(entry, high) for entry in entries):
            continue
        bound = f"{'at least' if interval[0] == '[' else 'above'} {low:g}"
        needs = f"must lie in {interval}" if high < math.inf else f"must be {bound}"
        if isinstance(value, tuple):
            value, needs = list(value), f"needs one or more values {bound}"
        raise ConfigError(f"{section}.{name} is {value}; it {needs}")


def check_choices(section: str, config: object, **names: Collection[str]) -> None:
    """Raise ConfigError for a field that is not one of the names for it."""
    for name, allowed in names.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ConfigError(f"{section}.{name} is {value!r}; {choices(value, allowed)}")


def _convert(value: Any, hint: Any, *, name: str) -> Any:
    """Convert a plain value to the type of a field: an integer to a float, a list to a tuple, an object to a config."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(type_ for type_ in typing.get_args(hint) if type_ is not type(None))
    if dataclasses.is_dataclass(hint):
        return build_config(typing.cast("type[Any]", hint), value, where=f"{name}.")
    if typing.get_origin(hint) is Mapping:  # sections that are checked where they are used
        _check_section(value, where=f"{name}.")
        return {key: _convert(inner, typing.get_args(hint)[1], name=f"{name}.{key}") for key, inner in value.items()}
    if hint is Any:
        for leaf in value if isinstance(value, list) else [value]:
            _check_value(leaf, name=name)
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"config key {name} is {_shown(value)}; it must be a list")
        return tuple(_convert(entry, typing.get_args(hint)[0], name=name) for entry in value)
    is_unexpected_bool = isinstance(value, bool) and hint is not bool
    if is_unexpected_bool or not isinstance(value, (int, float) if hint is float else hint):
        raise ConfigError(f"config key {name} is {_shown(value)}; it must be of type {hint.__name__}")
    _check_value(value, name=name)
    return float(value) if hint is float else value


def _check_section(value: Any, *, where: str) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"config key {where[:-1]} is a section; set {where}KEY")


def plain(config: Any) -> dict[str, Any]:
    """Return a config as nested JSON values."""
    return {key: _plain_value(value) for key, value in dataclasses.asdict(config).items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_value(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _check_value(value: Any, *, name: str) -> None:
    """Raise ConfigError for values that no setting can have: NaN, infinity, integers of more than 64 bits, NUL."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"config key {name} is {value}; it must be a finite number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"config key {name} has {value.bit_length():,} bits; it must have at most 64")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"config key {name} contains a NUL character: {_shown(value)}")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigError(f"config key {name} is not UTF-8: {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length():,} bits"
    text = repr(value) if not isinstance(value, (list, dict)) else f"a {'list' if isinstance(value, list) else 'table'}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


# Errors that NumPy raises for a damaged header or body, and zlib for a damaged member of an archive.
BROKEN = (
    *(tokenize.TokenError, zlib.error, struct.error, ArithmeticError, EOFError, LookupError, MemoryError),
    *(RuntimeError, SyntaxError, TypeError, ValueError),
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


def provenance_section(provenance: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a section of a manifest's provenance, or {} if there is none of that name."""
    value = provenance.get(name)
    return value if isinstance(value, dict) else {}
