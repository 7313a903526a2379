"""User-defined encoders: functions named as `package.module:function`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, choices
from ..hashing import digest
from ..media.files import MediaConfig
from ..quarantine import Reason, UnusableError

Function = Callable[[Any, MediaConfig], Any]


@lru_cache(maxsize=16)
def load_function(name: str) -> Function:
    """Import `package.module:function`, from the folder the command runs in too; ConfigError where there is none."""
    function_name = name.partition(":")[2]
    module = _load_module(name)
    function = getattr(module, function_name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{_file(module)} has no function {function_name!r}; {choices(function_name, there)}")
    return function  # type: ignore[no-any-return]


@lru_cache(maxsize=16)
def function_version(name: str) -> str:
    """Fingerprint the source file of the function; what that file imports is not looked at."""
    load_function(name)
    return digest(_file(_load_module(name)).read_bytes())


def function_file(name: str) -> Path | None:
    """Return the source file that `package.module:function` would be imported from, without importing anything."""
    _look_in_current_folder()
    first, *rest = name.partition(":")[0].split(".")
    try:
        spec = importlib.util.find_spec(first)  # of a name without a dot: imports nothing
        for number in range(len(rest)):
            inner = ".".join((first, *rest[: number + 1]))
            spec = None if spec is None else PathFinder.find_spec(inner, spec.submodule_search_locations)
    except (ImportError, ValueError):
        return None
    return None if spec is None or not spec.has_location or spec.origin is None else Path(spec.origin)


def call_function(name: str, decoded: Any, media: MediaConfig) -> NDArray[np.float32]:
    """Give what the function makes of a decoded sample, (d,) float32.

    Raises ConfigError for what is no vector of numbers, UnusableError for one that is not finite, and where the
    function itself fails.
    """
    try:
        found = load_function(name)(decoded, media)
    except (UnusableError, ConfigError):
        raise
    except Exception as error:
        raise UnusableError(Reason.FAILED, f"{name} raised {type(error).__name__}: {error}") from error
    try:
        vector = np.array(found, dtype=np.float32)  # a copy: the function may use its own again
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} gives {type(found).__name__}: it must give a vector (d,) of numbers") from error
    if vector.ndim != 1 or not len(vector):
        raise ConfigError(f"{name} gives an array of shape {vector.shape}: it must give a vector (d,)")
    if not np.isfinite(vector).all():
        odd = int((~np.isfinite(vector)).sum())
        raise UnusableError(Reason.NOT_FINITE, f"{odd} of the {len(vector)} numbers of {name} are not finite")
    return vector


def _load_module(name: str) -> ModuleType:
    module_name = name.partition(":")[0]
    _look_in_current_folder()
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # it is the user's code, and may raise anything
        raise ConfigError(
            f"module {module_name!r} cannot be imported ({type(error).__name__}: {error}); "
            f"it must be installed, or lie in {os.getcwd()}"
        ) from error


def _look_in_current_folder() -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # behind all else: a file there must not hide an installed package


def _file(module: ModuleType) -> Path:
    source = getattr(module, "__file__", None)
    if source is None:
        raise ConfigError(f"module {module.__name__!r} has no source file: name the module that defines the function")
    return Path(source)
