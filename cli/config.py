"""Config of a run: the configs of all stages, read from TOML and --set."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..audit.dataset.dataset import DataConfig
from ..audit.engine.executors import RayConfig
from ..audit.engine.plan import PartsConfig
from ..audit.errors import ConfigError
from ..audit.leakage import LeakageConfig
from ..audit.media.files import MediaConfig
from ..audit.parsing import build_config, plain
from ..audit.probes.config import NetworkConfig, ProbeConfig
from ..audit.remote.settings import VARIABLES
from ..audit.scores.mixture import MixtureConfig
from ..audit.storage import check_regular
from ..rebalance.balanced import BalancedConfig
from ..rebalance.curriculum import OrderConfig
from ..train.config import AugmentConfig, FinetuneConfig, OptimConfig, TrainConfig
from ..train.methods import list_methods
from ..train.presets import read_preset

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

log = logging.getLogger("mmaudit")

NETWORK_FIELDS = ("width", "normalise_pictures", "normalise_sound")  # of section network, that fine-tuning reads
TRAINING_SECTIONS = tuple(name for name in TrainConfig.__dataclass_fields__ if name not in NETWORK_FIELDS)
_PREFIX = "MMAUDIT_"
_OTHER_VARIABLES = {"MMAUDIT_DEBUG", "MMAUDIT_RUN", "MMAUDIT_DEVICE", "MMAUDIT_NUM_WORKERS", *VARIABLES}
_DEEP_KEY = re.compile(r"""(?:["'\w-]{1,100}[ \t]{0,9}\.[ \t]{0,9}){64}""")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """All settings that results depend on; each section is the config of its stage.

    Args:
        seed: seed of every random choice, in [0, 2^63).
        data: how the dataset is read.
        media: how media are decoded.
        probe: the linear probes.
        network: the networks that serve as encoders and probes.
        mixture: the mixture of the modality gap.
        parts: how large data are divided into parts, each scored by itself.
        leakage: the checks for leaks between splits.
        split: the balanced split.
        posterior: P(balanced) from which a sample counts as balanced in `split --gmm`.
        order: the order of a curriculum.
        finetune: fine-tuning: fusion, methods, epochs and batches.
        optim: the optimiser.
        augment: augmentation.
        sampling: constants of the samplers by section, checked when a fine-tuning begins.
        balancing: constants of the balancing methods, likewise.
        ray: what the workers of `--engine ray` reserve; no result depends on it.
    """

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    media: MediaConfig = field(default_factory=MediaConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    parts: PartsConfig = field(default_factory=PartsConfig)
    leakage: LeakageConfig = field(default_factory=LeakageConfig)
    split: BalancedConfig = field(default_factory=BalancedConfig)
    posterior: float = 0.5
    order: OrderConfig = field(default_factory=OrderConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    sampling: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    balancing: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0 and below 2^63")

    def scoring_config(self) -> dict[str, Any]:
        """Return the settings that scores depend on, as plain values: `config` of run.json, which reruns must match."""
        config = plain(self)
        return {name: config[name] for name in ("seed", "data", "media", "probe", "network", "mixture")}

    def training(self) -> TrainConfig:
        """Return the config of fine-tuning; the seed is not part of it."""
        sections = {name: getattr(self, name) for name in TRAINING_SECTIONS}
        return TrainConfig(**sections, **{name: getattr(self.network, name) for name in NETWORK_FIELDS})


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenSetting:
    """A setting made by the user: a plain value, where it was made, and whether a file states what is the default."""

    value: Any
    source: str
    is_default: bool = False


Given = Mapping[str, GivenSetting]


def load_config(
    config: RunConfig | str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    keywords: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
) -> RunConfig:
    """Load the settings of a command. Of a setting that is made in several ways the last of these counts.

    Args:
        config: A TOML file, or a RunConfig. Without a RunConfig, environment variables such as MMAUDIT_PROBE_FOLDS=10
            override the file.
        settings: Settings by key, {"probe.folds": 10}, or as texts, ["probe.folds=10"].
        keywords: Settings by key, from a function's own parameters; those that are None are not made.
        preset: Name of a published protocol, which all of the others override. A RunConfig overrides it where it
            differs from the defaults.

    Returns:
        The settings of all stages.

    Raises:
        ConfigError: The file cannot be read, a key is unknown (the message names the nearest), or a value is invalid.

    Example:
        >>> load_config(settings={"probe.folds": 10}).probe.folds
        10
    """
    return load_settings(config, settings, keywords, preset=preset)[0]


def load_settings(
    config: RunConfig | str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    keywords: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
) -> tuple[RunConfig, Given]:
    """Load the settings of a command as `load_config` does, and return with them those made by the user.

    Of a RunConfig, settings that equal the default do not count as made; those of a preset, and `keywords`, the options
    of the command itself, never do.
    """
    made = {key: value for key, value in (keywords or {}).items() if value is not None}
    content: dict[str, Any] = {} if preset is None else preset_content(preset)
    given: dict[str, str] = {}
    defaults = plain(RunConfig())
    if isinstance(config, RunConfig):
        differing = _differences(plain(config), defaults)
        _update(content, without_none(plain(config)) if preset is None else differing)
        given = {key: "config" for key, _ in leaves(without_none(differing))}
    else:
        if config is not None:
            if not Path(config).exists():
                raise ConfigError(f"config file not found: {config}")
            stated = read_toml(Path(config))
            _update(content, stated)
            given = {key: Path(config).name for key, _ in leaves(stated)}
        for key, text in environment_settings().items():
            _set(content, key, _parse_value(key, text), source=f"{_variable(key)}={text}")
            given[key] = _variable(key)
    pairs = [*(settings.items() if isinstance(settings, Mapping) else map(parse_setting, settings))]
    for key, value in (*pairs, *made.items()):
        if key == "data.encoder" and preset is not None:
            value = _with_encoders(content, value)
        _set(content, key, list(value) if isinstance(value, tuple) else value, source=f"--set {key}")
    given |= {key.strip(): "--set" for key, _ in pairs}
    built = build_config(RunConfig, content, where="")
    values, default_of = dict(leaves(plain(built))), dict(leaves(defaults))
    return built, {
        key: GivenSetting(
            value=values[key],
            source=source,
            is_default=source == Path(str(config)).name and default_of.get(key, ...) == values[key],
        )
        for key, source in given.items()
        if key in values and key not in made
    }


def leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of nested plain values, such as "probe.folds", with their values."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def preset_content(name: str) -> dict[str, Any]:
    """Return the settings of a preset as nested plain values, which the caller may change."""
    return copy.deepcopy(dict(read_preset(name).settings))


def preset_record(name: str, own: Mapping[str, Any], used: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a preset in run.json and metrics.json: its name and digest, and what the user changed.

    Args:
        name: The preset.
        own: Settings of the preset alone, as nested plain values.
        used: Settings in force, in the same form.

    Returns:
        {name, digest, changed: {key: {preset, used}}}; None stands for a key that one of the two does not have.
    """
    values, changed = (dict(leaves(content)) for content in (own, used))
    differing = {
        key: {"preset": values.get(key), "used": changed.get(key)}
        for key in sorted({*values, *changed})
        if values.get(key) != changed.get(key)
    }
    return {"name": name, "digest": read_preset(name).digest, "changed": differing}


def _with_encoders(content: Mapping[str, Any], encoders: Any) -> Any:
    """Return a preset's encoders with those that the user passes, by modality; what is no list is left as it is."""
    own = content.get("data", {}).get("encoder", [])
    if not isinstance(encoders, (list, tuple)) or not all(isinstance(text, str) for text in encoders):
        return encoders
    by_modality = {text.partition("=")[0]: text for text in (*own, *encoders)}
    return list(by_modality.values())


def _update(content: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Change nested settings in place."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(content.get(key), dict):
            _update(content[key], value)
        else:
            content[key] = dict(value) if isinstance(value, Mapping) else value


def _differences(content: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested values that differ from the defaults."""
    differing = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            value = _differences(value, defaults.get(key, {}))
        if value != defaults.get(key) and value != {}:
            differing[key] = value
    return differing


def environment_settings() -> dict[str, str]:
    """Return the settings made by environment variables, by key; log those that look like one and are none."""
    variables = {name: text for name, text in os.environ.items() if name.startswith(_PREFIX)}
    keys = {_variable(key): key for key in config_keys()} if variables else {}
    if any(name.startswith(("MMAUDIT_SAMPLING_", "MMAUDIT_BALANCING_")) for name in variables):
        keys |= {_variable(key.key): key.key for row in list_methods() for key in row.keys}
    for name in sorted(variables.keys() - keys.keys() - _OTHER_VARIABLES):
        log.warning("%s is not a setting and has no effect", name)
    return {keys[name]: text for name, text in variables.items() if name in keys}


def config_keys(config: Any = None, prefix: str = "") -> Iterator[str]:
    """Yield every key of a config, such as "probe.folds"."""
    for item in dataclasses.fields(RunConfig() if config is None else config):
        value = getattr(RunConfig() if config is None else config, item.name)
        key = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            yield from config_keys(value, f"{key}.")
        elif not isinstance(value, Mapping):  # constants of methods, see methods.list_methods
            yield key


def _variable(key: str) -> str:
    return _PREFIX + key.replace(".", "_").upper()


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; raise ConfigError if it cannot be read."""
    try:
        check_regular(path)
        return _parse_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of 5,000 digits
        raise ConfigError(f"{path} is not TOML: {_reason(error)}") from error


def _parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML; raise RecursionError if it is nested too deep."""
    if _DEEP_KEY.search(text):  # a key of 20,000 parts costs the parser 2 GB
        raise RecursionError
    return tomllib.loads(text)


def _reason(error: Exception) -> str:
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]


def to_toml(content: dict[str, Any]) -> str:
    """Format nested plain values, as returned by `plain`, as TOML; keys with value None are omitted."""
    import tomli_w

    return tomli_w.dumps(without_none(content))


def without_none(content: dict[str, Any]) -> dict[str, Any]:
    """Remove keys with value None at every depth."""
    with_values = {key: value for key, value in content.items() if value is not None}
    return {key: without_none(value) if isinstance(value, dict) else value for key, value in with_values.items()}


def setting_text(key: str, value: Any) -> str:
    """Format a setting as KEY=VALUE, which `parse_setting` reads back; ConfigError for a value that TOML lacks.

    Example:
        >>> setting_text("probe.thorough", True), setting_text("data.modality", ("a=b", "c d"))
        ('probe.thorough=true', 'data.modality=["a=b", "c d"]')
    """
    if isinstance(value, str) and _is_bare(value):
        return f"{key}={value}"
    try:
        return f"{key}={_toml_value(value)}"
    except TypeError as error:
        raise ConfigError(f"{key}: {value!r} is no value that --set can state: leave it out") from error


def _is_bare(text: str) -> bool:
    """Return whether a string is read back without quotes."""
    try:
        return bool(_parse_value("", text) == text)
    except ConfigError:
        return False


def _toml_value(value: Any) -> str:
    """Format a value as TOML on one line."""
    import tomli_w

    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_value(str(key))} = {_toml_value(item)}" for key, item in value.items()) + "}"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").removesuffix("\n")


def parse_setting(setting: str) -> tuple[str, Any]:
    """Parse SECTION.KEY=VALUE; raise ConfigError for another form."""
    key, equals, text = setting.partition("=")
    if not equals:
        raise ConfigError(f"--set {setting}: not of the form SECTION.KEY=VALUE, such as probe.folds=10")
    return key, _parse_value(f"--set {key}", text)


def _parse_value(name: str, text: str) -> Any:
    try:
        return _parse_toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: its value cannot be read: {_reason(error)}") from error


def _set(content: dict[str, Any], key: str, value: Any, *, source: str) -> None:
    *sections, last = key.strip().split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"{source}: {section} is not a section")
    content[last] = value
