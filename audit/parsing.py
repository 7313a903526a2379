"""JSON within limits, shapes of JSON documents, and configs built from plain values."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TypeAlias, TypeVar

from .errors import ConfigError, choices

MAX_DEPTH = 64  # of nested lists and objects: `json` itself gives up at some 1,000, Arrow crashes at 3,000
MAX_BYTES = 1 << 26  # of one document: the largest of ours, the numbers of 5,000 classes, has 2 MiB
_SHOWN = 60  # characters of a wrong value that a message repeats
_WORDS = {str: "text", int: "an integer", float: "a number", bool: "true or false", dict: "an object", list: "a list"}

# What JSON should look like. A type, or several of them (NoneType: null), one of which may be a mapping; a mapping of
# the keys that are known, none of which has to be there unless it is a `Complete` one, with the shape of each, "*":
# that of every other key; a list of one shape, which is that of every entry.
Shape: TypeAlias = "type | tuple[type | Mapping[str, Shape], ...] | Mapping[str, Shape] | list[Shape]"


class Complete(dict[str, Any]):
    """The shape of an object that has all of these keys, but for those that end in "?" and "*", which others have."""


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON document of finite numbers below 2^63 and at most 64 levels; ValueError with the reason."""
    content = parse_data_json(text)
    for value in _leaves(content):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value} is no number in JSON")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("it holds an integer of more than 64 bits")
    return content


def parse_data_json(text: str | bytes) -> Any:
    """Parse JSON as anybody writes it, of at most 64 levels and 64 MiB; ValueError with the reason."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text):,} bytes; at most {MAX_BYTES:,} are read")
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    for _ in _leaves(content):
        pass
    return content


def check_shape(content: Any, shape: Shape, *, key: str = "") -> None:
    """Raise ValueError, naming the key, where parsed JSON is of another shape."""
    if isinstance(shape, Mapping):
        if not isinstance(content, dict):
            _raise_wrong(key, content, "an object")
        _check_keys(content, shape, key=key)
    elif isinstance(shape, list):
        if not isinstance(content, list):
            _raise_wrong(key, content, "a list")
        for number, entry in enumerate(content):
            check_shape(entry, shape[0], key=f"{key}[{number}]")
    else:
        shapes = shape if isinstance(shape, tuple) else (shape,)
        mapping = next((option for option in shapes if isinstance(option, Mapping)), None)
        if mapping is not None and isinstance(content, dict):
            check_shape(content, mapping, key=key)
        else:
            _check_type(content, tuple(option for option in shapes if isinstance(option, type)), key=key)


def _check_keys(content: dict[str, Any], shape: Mapping[str, Shape], *, key: str) -> None:
    required = [name for name in shape if name != "*" and name[-1:] != "?"] if isinstance(shape, Complete) else []
    lacking = [name for name in required if name not in content]
    if lacking:
        raise ValueError(f"{key or 'the document'} lacks {', '.join(lacking)}")
    for name, value in content.items():
        inner = next((shape[known] for known in (name, f"{name}?", "*") if known in shape), None)
        if inner is not None:
            check_shape(value, inner, key=f"{key}.{name}" if key else name)


def _check_type(value: Any, types: tuple[type, ...], *, key: str) -> None:
    allowed = (*types, int) if float in types else types
    wrong_bool = isinstance(value, bool) and bool not in types
    if wrong_bool or not isinstance(value, allowed):
        _raise_wrong(key, value, " or ".join(_WORDS.get(type_, "null") for type_ in types))
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{key or 'the document'} holds a NUL character")


def _raise_wrong(key: str, value: Any, expected: str) -> NoReturn:
    shown = json.dumps(value)[:_SHOWN]
    raise ValueError(f"{key or 'the document'} is {shown}; it must be {expected}")


def _leaves(content: Any) -> Iterator[Any]:
    """Yield keys and values that are neither lists nor objects, without recursion; ValueError where they lie deep."""
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                yield from value
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            else:
                yield value
        if not inner:
            return
        level = inner
    raise ValueError(_too_deep())


def _too_deep() -> str:
    return f"it is nested more than {MAX_DEPTH} levels deep"


Config = TypeVar("Config")


def build(type_: type[Config], content: Mapping[str, Any], *, where: str) -> Config:
    """Build a config from nested plain values; ConfigError for a wrong key or a value of a wrong type."""
    hints = typing.get_type_hints(type_)
    values = {}
    for key, value in content.items():
        if key not in hints:
            raise ConfigError(f"no config key {where}{key}; {choices(where + key, [where + name for name in hints])}")
        values[key] = _convert(value, hints[key], name=f"{where}{key}")
    return type_(**values)


def _convert(value: Any, hint: Any, *, name: str) -> Any:
    """Check a plain value against a field's type: an integer is a number, a list is a tuple, an object is a config."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"config key {name} is a section; set {name}.KEY")
        return build(typing.cast("type[Any]", hint), value, where=f"{name}.")
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"config key {name} is {_shown(value)}; it must be a list")
        return tuple(_convert(entry, typing.get_args(hint)[0], name=name) for entry in value)
    wrong_bool = isinstance(value, bool) and hint is not bool
    if wrong_bool or not isinstance(value, (int, float) if hint is float else hint):
        raise ConfigError(f"config key {name} is {_shown(value)}; it must be of type {hint.__name__}")
    _check_value(value, name=name)
    return float(value) if hint is float else value


def _check_value(value: Any, *, name: str) -> None:
    """Raise ConfigError for what no setting can mean: NaN, infinity, an integer of more than 64 bits, a NUL."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"config key {name} is {value}; it must be a finite number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"config key {name} has {value.bit_length():,} bits; a number has at most 64")
    if isinstance(value, str) and ("\0" in value or not value.isascii()):
        _check_text(value, name=name)


def _check_text(value: str, *, name: str) -> None:
    if "\0" in value:
        raise ConfigError(f"config key {name} holds a NUL character: {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"config key {name} is no UTF-8: {_shown(value)}") from error


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length():,} bits"
    text = repr(value) if not isinstance(value, (list, dict)) else f"a {'list' if isinstance(value, list) else 'table'}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
