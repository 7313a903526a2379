"""Registries: methods by name, built in or from installed packages, imported when they are used."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ConfigError, choices, printable


class Entry(NamedTuple):
    """One line of a registry: `module:attribute` within the registry's package, and a description in one line."""

    location: str
    help: str


def read_arguments(docstring: str) -> dict[str, str]:
    """Return the entries of the section Args of a Google-style docstring, each on one line."""
    section = re.search(r"^Args:\n((?:(?: .*)?\n)*)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in entries}


@dataclass(frozen=True, eq=False)
class Registry(Mapping[str, Entry]):
    """Built-in methods by name; `load` also finds those that installed packages add by entry points.

    Nothing is imported until a method is loaded. A built-in method precedes an installed one of the same name.

    Args:
        entries: The built-in methods, in the order of the documentation.
        package: Package that the locations are relative to.
        option: Option that selects a method, for messages, such as "--sampling".
        group: Entry point group of installed methods, such as "mmaudit.samplers"; None: built-in methods only.

    Example:
        >>> SAMPLERS = Registry(
        ...     {"uniform": Entry("sampler:Uniform", "every sample once per epoch, in random order")},
        ...     package="mmaudit.train.sampling", group="mmaudit.samplers", option="--sampling",
        ... )
        >>> SAMPLERS.load("uniform").__name__
        'Uniform'
    """

    entries: Mapping[str, Entry]
    package: str
    option: str
    group: str | None = None

    def __getitem__(self, name: str) -> Entry:
        """Return the entry of a built-in method."""
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the built-in methods."""
        return iter(self.entries)

    def __len__(self) -> int:
        """Return the number of built-in methods."""
        return len(self.entries)

    def installed(self) -> dict[str, EntryPoint]:
        """Return the entry points of installed packages by name, without those that a built-in method precedes."""
        points = () if self.group is None else entry_points(group=self.group)
        return {point.name: point for point in points if point.name not in self.entries}

    def names(self) -> tuple[str, ...]:
        """Return the names of all methods, built in and installed."""
        return (*self.entries, *sorted(self.installed()))

    def offers(self, name: str) -> bool:
        """Return whether a method of this name is built in or installed.

        The metadata of all installed packages is read only for a name that is not built in: with 150 packages that
        takes 10 to 50 ms, more than anything else in the settings of a training.
        """
        return name in self.entries or name in self.installed()

    def check(self, name: str) -> None:
        """Raise ConfigError for an unknown name, with the nearest one; nothing is imported."""
        if not self.offers(name):
            raise ConfigError(f"{self.option} {name}: no such name; {choices(name, self.names())}")

    def source_digest(self, name: str) -> str:
        """Return a digest of the source and version of the package of an installed method; "" of a built-in one.

        Of a package these are all of its Python files; nothing is imported.
        """
        if name in self.entries:
            return ""
        self.check(name)
        point = self.installed()[name]
        spec = find_spec(point.module.partition(".")[0])
        folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
        files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
        files += [Path(spec.origin)] if spec is not None and not folders and spec.has_location and spec.origin else []
        version = "" if point.dist is None else f"{point.dist.name} {point.dist.version}"
        from .hashing import digest  # imports numpy and pyarrow, which listing names does not need

        return digest(f"{point.value} {version}".encode(), *(path.read_bytes() for path in files))

    def load(self, name: str) -> Any:
        """Import a method.

        Raises:
            ConfigError: The name is unknown, or the package that provides it cannot be imported.
        """
        if name in self.entries:
            module, _, attribute = self.entries[name].location.partition(":")
            return getattr(import_module(f"{self.package}.{module}"), attribute)
        self.check(name)
        point = self.installed()[name]
        try:
            return point.load()
        except Exception as error:  # code of others may raise anything
            text = f"{type(error).__name__}: {printable(error)}"
            raise ConfigError(f"{self.option} {name}: {point.value} cannot be loaded: {text}") from error
