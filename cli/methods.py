"""The command `methods`: methods and presets by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..audit.dataset.formats import READERS
from ..audit.downloads import DOWNLOADS
from ..audit.errors import ConfigError, choices
from ..audit.features.encoders import ENCODERS
from ..rebalance import EXPORTERS
from ..train import FUSIONS, TRACKERS
from ..train.balancing import BALANCERS
from ..train.methods import MethodRow, list_methods
from ..train.presets import PRESETS, Preset, read_preset
from ..train.sampling import SAMPLERS

_REGISTRIES = {
    "download": DOWNLOADS,
    "reader": READERS,
    "encoder": ENCODERS,
    "exporter": EXPORTERS,
    "sampler": SAMPLERS,
    "balancer": BALANCERS,
    "fusion": FUSIONS,
    "tracker": TRACKERS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodTable:
    """Result of `methods`.

    Attributes:
        rows: One row for each method, in the order of the pipeline: kind, name, help, paper, needs and settings.
        presets: The presets, where they were asked for; `rows` is then empty.
    """

    rows: tuple[MethodRow, ...]
    presets: tuple[Preset, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the rows, or the presets with their digests, as JSON values."""
        if self.presets:
            return {"presets": [{**asdict(preset), "digest": preset.digest} for preset in self.presets]}
        return {"methods": [asdict(row) for row in self.rows]}


def methods(*, kind: str | None = None, presets: bool = False) -> MethodTable:
    """List the methods by name, built in and installed, with what they need and their settings; or the presets.

    Args:
        kind: Only methods of this kind: download, reader, encoder, exporter, sampler, balancer, fusion or tracker.
        presets: List the presets, with paper, reported figures and what they cannot reproduce.

    Returns:
        The methods; installed ones are not imported. With `presets`, the presets.

    Raises:
        ConfigError: There is no such kind, or `kind` is passed with `presets`.

    Example:
        >>> [row.name for row in mmaudit.methods(kind="sampler").rows][:2]
        ['uniform', 'bss-h']
    """
    if presets:
        if kind is not None:
            raise ConfigError("--kind selects methods, and --presets lists no methods: pass one of them")
        return MethodTable(rows=(), presets=tuple(map(read_preset, PRESETS)))
    if kind is not None and kind not in _REGISTRIES:
        raise ConfigError(f"--kind {kind}: no such kind; {choices(kind, _REGISTRIES)}")
    registries = _REGISTRIES if kind is None else {kind: _REGISTRIES[kind]}
    return MethodTable(rows=tuple(list_methods(registries)))
