"""Configs built from plain values, as TOML and JSON have them: each value is checked against its field's type."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from .errors import ConfigError, choices

Config = TypeVar("Config")
_SHOWN = 60  # characters of a wrong value that a message repeats


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
