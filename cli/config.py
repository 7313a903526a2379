"""The configs of all stages, nested: from TOML and --set in, to resolved TOML out"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..audit.errors import ConfigError, choices
from ..audit.gap.mixture import MixtureConfig
from ..audit.leakage import LeakageConfig
from ..audit.media.decode import MediaConfig
from ..audit.probing.config import NetworkConfig, ProbeConfig
from ..audit.source.dataset import DataConfig
from ..rebalance.balanced import BalancedConfig
from ..rebalance.curriculum import OrderConfig
from ..train.balancing.config import BalancingConfig
from ..train.config import AugmentConfig, FinetuneConfig, OptimConfig, TrainConfig
from ..train.sampling.config import SamplingConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that decides about results; each part is owned by its stage."""

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    media: MediaConfig = field(default_factory=MediaConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    leakage: LeakageConfig = field(default_factory=LeakageConfig)
    split: BalancedConfig = field(default_factory=BalancedConfig)
    posterior: float = 0.5  # P(balanced) from which a sample is on the balanced side of the mixture
    order: OrderConfig = field(default_factory=OrderConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    balancing: BalancingConfig = field(default_factory=BalancingConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"the seed is {self.seed}; it must be at least 0, and below 2^63")

    def scoring(self) -> dict[str, Any]:
        """Give the part that scores depend on, as plain values: what run.json holds and a rerun must match."""
        config = plain(self)
        return {name: config[name] for name in ("seed", "data", "media", "probe", "network", "mixture")}

    def training(self) -> TrainConfig:
        """Give the part that fine-tuning depends on, but for the seed."""
        sections = {name: getattr(self, name) for name in TrainConfig.__dataclass_fields__ if name != "width"}
        return TrainConfig(**sections, width=self.network.width)


def load_config(path: str | Path | None = None, settings: typing.Sequence[str] = ()) -> RunConfig:
    """Read a TOML file, then `SECTION.KEY=VALUE` settings over it. An unknown key names its nearest neighbour."""
    content: dict[str, Any] = {}
    if path is not None:
        if not Path(path).is_file():
            raise ConfigError(f"no such config file: {path}")
        try:
            content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error
    return build(RunConfig, content, where="", settings=settings)


def override(config: Config, **values: Any) -> Config:
    """Replace what is not None, as the options of a command do."""
    given = {name: value for name, value in values.items() if value is not None}
    return dataclasses.replace(config, **given)  # type: ignore[type-var]


def build(type_: type[Config], content: dict[str, Any], *, where: str, settings: typing.Sequence[str] = ()) -> Config:
    """Build a config from nested plain values and settings; ConfigError for a wrong key or a value of a wrong type."""
    for setting in settings:
        _apply(content, setting)
    hints = typing.get_type_hints(type_)
    values = {}
    for key, value in content.items():
        if key not in hints:
            raise ConfigError(f"no config key {where}{key}; {choices(where + key, [where + name for name in hints])}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"config key {where}{key} is a section; set {where}{key}.KEY")
            values[key] = build(hints[key], value, where=f"{where}{key}.")
        else:
            values[key] = _convert(value, hints[key], name=f"{where}{key}")
    return type_(**values)


def plain(config: Any) -> dict[str, Any]:
    """Give a config as nested plain values, as JSON has them."""
    return {key: _plain_value(value) for key, value in asdict(config).items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_value(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def to_toml(content: dict[str, Any]) -> str:
    """Write nested plain values, as `plain` gives them, as TOML; keys without a value are left out."""
    import tomli_w

    return tomli_w.dumps(without_none(content))


def without_none(content: dict[str, Any]) -> dict[str, Any]:
    """Leave out keys without a value, at every depth."""
    kept = {key: value for key, value in content.items() if value is not None}
    return {key: without_none(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _apply(content: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals:
        raise ConfigError(f"--set {setting}: not of the form SECTION.KEY=VALUE, such as probe.folds=10")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *sections, last = key.strip().split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"--set {setting}: {section} is not a section")
    content[last] = value


def _convert(value: Any, hint: Any, *, name: str) -> Any:
    """Check a plain value against a field's type: an integer is a number, a list is a tuple."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"config key {name} is {value!r}; it must be a list")
        return tuple(_convert(entry, typing.get_args(hint)[0], name=name) for entry in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"config key {name} is {value!r}; it must be of type {hint.__name__}")
    return value
