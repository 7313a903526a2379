"""Published protocols as presets: settings, reported figures, and what cannot be reproduced; one TOML file each.

A file is a config of a run, with a section `preset` that describes it. Importing the list loads no settings.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from ...audit.errors import ConfigError, choices
from ...audit.hashing import digest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FOLDER = Path(__file__).parent
PRESETS = tuple(sorted(map(attrgetter("stem"), _FOLDER.glob("*.toml"))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One published protocol.

    Attributes:
        name: Name of the preset: method and data.
        title: Method and data in words.
        paper: The reference.
        data: Adapters of `mmaudit ingest` that read the data.
        sources: Where the settings were read.
        reported: Figures that the paper or its reviews report, with where they stand.
        not_stated: What no source states, and what is used in its place.
        differs: What the preset cannot reproduce, and how it differs.
        settings: Values by section of a config, as in a file of `--config`.
    """

    name: str
    title: str
    paper: str
    data: tuple[str, ...]
    sources: tuple[str, ...]
    reported: tuple[str, ...]
    not_stated: tuple[str, ...]
    differs: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]]

    @property
    def digest(self) -> str:
        """Digest of the settings, 32 hexadecimal digits; texts do not count."""
        return digest(json.dumps(self.settings, sort_keys=True).encode())


@cache
def read_preset(name: str) -> Preset:
    """Read a preset; with `base` in its section `preset`, its settings complete and change those of that preset.

    Raises ConfigError for an unknown name, with the nearest one.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"--preset {name}: no such preset; {choices(name, PRESETS)}; listed by mmaudit methods --presets"
        )
    sections = tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    about = sections.pop("preset")
    base = about.pop("base", None)
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in about.items()}
    settings = sections if base is None else _merge(read_preset(base).settings, sections)
    return Preset(name=name, settings=settings, **values)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by section with changes; of a method that is replaced no constant remains."""
    merged = {section: dict(values) for section, values in base.items()}
    for key, sections in (("sampling", ("sampling", "order")), ("balancing", ("balancing",))):
        if key in changes.get("finetune", {}):
            merged = {section: values for section, values in merged.items() if section not in sections}
    for section, values in changes.items():
        merged[section] = {**merged.get(section, {}), **values}
    return merged
