"""Registries: methods by name, built in or from installed packages, imported when they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

from .errors import ConfigError, choices


class Entry(NamedTuple):
    """One line of a registry: `module:attribute` within the registry's package, and a description in one line."""

    location: str
    help: str


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

    def __init__(self, entries: Mapping[str, Entry], *, package: str, option: str, group: str | None = None) -> None:
        self._entries = dict(entries)
        self._package, self.option, self.group = package, option, group

    def __getitem__(self, name: str) -> Entry:
        """Return the entry of a built-in method."""
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the built-in methods."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Return the number of built-in methods."""
        return len(self._entries)

    def installed(self) -> dict[str, EntryPoint]:
        """Return the entry points of installed packages by name, without those that a built-in method precedes."""
        points = () if self.group is None else entry_points(group=self.group)
        return {point.name: point for point in points if point.name not in self._entries}

    def names(self) -> tuple[str, ...]:
        """Return the names of all methods, built in and installed."""
        return (*self._entries, *sorted(self.installed()))

    def check(self, name: str) -> None:
        """Raise ConfigError for an unknown name, with the nearest one; nothing is imported."""
        if name not in self._entries and name not in (names := self.names()):
            raise ConfigError(f"{self.option} {name}: {choices(name, names)}")

    def load(self, name: str) -> Any:
        """Import a method.

        Raises:
            ConfigError: The name is unknown, or the package that provides it cannot be imported.
        """
        if name in self._entries:
            module, _, attribute = self._entries[name].location.partition(":")
            return getattr(import_module(f"{self._package}.{module}"), attribute)
        self.check(name)
        point = self.installed()[name]
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{self.option} {name}: {point.value} cannot be loaded: {error}") from error
