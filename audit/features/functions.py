"""User-defined encoders: functions referenced as `package.module:function`."""

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

EncodeFunction = Callable[[Any, MediaConfig], Any]


@lru_cache(maxsize=16)
def load_function(name: str) -> EncodeFunction:
    """Import `package.module:function`, also from the current folder; ConfigError if it does not exist."""
    function_name = name.partition(":")[2]
    module = _load_module(name)
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(
            f"{_source_file(module)} has no function {function_name!r}; {choices(function_name, functions)}"
        )
    return function  # type: ignore[no-any-return]


@lru_cache(maxsize=16)
def function_version(name: str) -> str:
    """Return the digest of the function's source file; modules that it imports are not included."""
    load_function(name)
    return digest(_source_file(_load_module(name)).read_bytes())


def function_file(name: str) -> Path | None:
    """Return the source file of `package.module:function` without importing it; None if it is not found."""
    _add_current_folder()
    first, *rest = name.partition(":")[0].split(".")
    try:
        spec = importlib.util.find_spec(first)  # a name without a dot: nothing is imported
        for depth in range(len(rest)):
            submodule = ".".join((first, *rest[: depth + 1]))
            spec = None if spec is None else PathFinder.find_spec(submodule, spec.submodule_search_locations)
    except (ImportError, ValueError):
        return None
    return None if spec is None or not spec.has_location or spec.origin is None else Path(spec.origin)


def call_function(name: str, decoded: Any, media: MediaConfig) -> NDArray[np.float32]:
    """Return the function's vector of a decoded sample, float32 (d,).

    Raises ConfigError if the result is not a vector of numbers, UnusableError if the function raises or the vector is
    not finite.
    """
    try:
        output = load_function(name)(decoded, media)
    except (UnusableError, ConfigError):
        raise
    except Exception as error:
        raise UnusableError(Reason.FAILED, f"{name} raised {type(error).__name__}: {error}") from error
    try:
        vector = np.array(output, dtype=np.float32)  # a copy: the function may reuse its array
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} returns {type(output).__name__}: it must return a vector (d,) of numbers") from error
    if vector.ndim != 1 or not len(vector):
        raise ConfigError(f"{name} returns an array of shape {vector.shape}: it must return a vector (d,)")
    if not np.isfinite(vector).all():
        num_not_finite = int((~np.isfinite(vector)).sum())
        raise UnusableError(
            Reason.NOT_FINITE, f"{num_not_finite} of the {len(vector)} numbers of {name} are not finite"
        )
    return vector


def _load_module(name: str) -> ModuleType:
    module_name = name.partition(":")[0]
    _add_current_folder()
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # user code may raise anything
        raise ConfigError(
            f"module {module_name!r} cannot be imported ({type(error).__name__}: {error}); "
            f"it must be installed, or be in {os.getcwd()}"
        ) from error


def _add_current_folder() -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a file in it cannot shadow an installed package


def _source_file(module: ModuleType) -> Path:
    source = getattr(module, "__file__", None)
    if source is None:
        raise ConfigError(f"module {module.__name__!r} has no source file: use the module that defines the function")
    return Path(source)
