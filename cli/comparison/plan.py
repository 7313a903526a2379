"""Design of a comparison: its plan, the configs of its methods, its grid, its controls and cells."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...audit.errors import ConfigError, choices
from ...train.comparison.cells import MethodSpec, anti_curriculum, parse_method
from ...train.difference import Condition
from ..config import Given, RunConfig, leaves, load_settings, parse_setting, read_toml
from ..training_source import resolve_methods
from .cells import Cell, LoadedManifests, with_epochs

log = logging.getLogger("mmaudit")

_DEFAULT_SEEDS = 5
Grid = tuple[tuple[str, tuple[Any, ...]], ...]  # values of each key
_OF_ALL = {  # keys that one method cannot have for itself
    "seed": "seeds are those of --seed and --seeds",
    "finetune.epochs": "all trainings read as many samples, by finetune.epochs of --set",
    "finetune.validation_fraction": "all trainings have one validation split, by --set",
    "finetune.only": "the controls train on one modality",
}
_PARTS = tuple(f"finetune.{name}" for name in ("sampling", "balancing", "fusion", "model"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is compared. controls: whether the controls are trained too. grid: settings tried for each method."""

    manifests: tuple[str, ...]
    methods: tuple[MethodSpec, ...]
    seeds: int
    name: str
    controls: bool
    grid: Grid = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """The cells of a comparison, and of each control what it is compared with.

    tuned: conditions that a grid is tried for: methods, and one modality alone. Other controls take the choice of what
    they are compared with.
    """

    cells: tuple[Cell, ...]
    controls: Mapping[Condition, Condition]
    tuned: frozenset[Condition]


def read_plan(
    file: str | Path | None,
    *,
    manifests: Sequence[str],
    methods: Sequence[str],
    seeds: int | None,
    name: str | None,
    controls: bool,
    grid: Mapping[str, Sequence[Any]] | Sequence[str] = (),
) -> Plan:
    """Return the plan of a file, with the options that override it."""
    kinds: dict[str, type] = {"manifests": list, "methods": list, "seeds": int, "name": str, "controls": bool}
    kinds["grid"] = dict
    words = {list: "a list of texts", int: "a whole number", str: "a text", bool: "true or false", dict: "a table"}
    content = {} if file is None else read_toml(Path(file))
    for key, value in content.items():
        if key not in kinds:
            raise ConfigError(f"{file}: no key {key}; {choices(key, kinds)}")
        is_texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
        if type(value) is not kinds[key] or (kinds[key] is list and not is_texts):
            raise ConfigError(f"{file}: {key} is {value!r}; it must be {words[kinds[key]]}")
    tried = parse_grid(grid or dict(leaves(content.get("grid", {}))))
    entries: list[str] = [str(entry) for entry in manifests] or content.get("manifests", [])
    specs = [parse_method(text) for text in [*methods] or content.get("methods", [])]
    seeds = content.get("seeds", _DEFAULT_SEEDS) if seeds is None else seeds
    for option, names in (("manifest", entries), ("method", [spec.name for spec in specs])):
        if not names:
            raise ConfigError(f"pass at least one --{option}, or a --plan that names some")
        if len(set(names)) < len(names):
            raise ConfigError(f"--{option} {max(names, key=names.count)} is passed twice")
    stems = [Path(entry).stem if Path(entry).suffix else entry for entry in entries]
    if len(set(stems)) < len(stems):
        raise ConfigError(f"two manifests are named {max(stems, key=stems.count)}: rename one of the files")
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: at least 1, and at least 2 for a verdict")
    return Plan(
        manifests=tuple(entries),
        methods=tuple(specs),
        seeds=seeds,
        name=name or content.get("name") or "-".join(stems),
        controls=controls and content.get("controls", True),
        grid=tried,
    )


def parse_grid(grid: Mapping[str, Sequence[Any]] | Sequence[str]) -> Grid:
    """Parse KEY=VALUE,VALUE texts, or values by key.

    Raises:
        ConfigError: A text is of another form, a key is passed twice, or has fewer than two different values.

    Example:
        >>> parse_grid(["optim.lr=1e-3,1e-2"])
        (('optim.lr', (0.001, 0.01)),)
    """
    pairs = [*grid.items()] if isinstance(grid, Mapping) else [_parse_values(text) for text in grid]
    values_of: dict[str, tuple[Any, ...]] = {}
    for key, values in pairs:
        check_own_key(key, where=f"--grid {key}")
        if not isinstance(values, list | tuple):
            raise ConfigError(f"--grid {key}: its values are {values!r}; they must be a list")
        if key in values_of:
            raise ConfigError(f"--grid {key} is passed twice: list its values in one, {key}=VALUE,VALUE")
        if len(values) < 2:
            raise ConfigError(f"--grid {key} has one value: a grid needs two; for one, --set {key}=VALUE")
        repeated = [value for position, value in enumerate(values) if value in values[:position]]
        if repeated:
            raise ConfigError(f"--grid {key} has the value {value_text(repeated[0])} twice")
        values_of[key] = tuple(values)
    return tuple(values_of.items())


def _parse_values(text: str) -> tuple[str, list[Any]]:
    """Parse KEY=VALUE,VALUE; bare words are texts."""
    key, equals, values = (part.strip() for part in text.partition("="))
    if not (key and equals and values):
        raise ConfigError(f"--grid {text}: not of the form SECTION.KEY=VALUE,VALUE, such as optim.lr=1e-3,1e-2")
    _, parsed = parse_setting(f"{key}=[{values}]")
    if isinstance(parsed, list):
        return key, parsed
    words = [word.strip() for word in values.split(",")]
    if not all(words):
        raise ConfigError(f"--grid {text}: a value is empty")
    return key, [parse_setting(f"{key}={word}")[1] for word in words]


def value_text(value: Any) -> str:
    """Return a value of a setting as it is passed."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_own_key(key: str, *, where: str) -> None:
    """Raise ConfigError for a key that one method, or one setting of a grid, cannot have for itself."""
    if key in _OF_ALL:
        raise ConfigError(f"{where}: {_OF_ALL[key]}")
    if key in _PARTS:
        raise ConfigError(f"{where}: it is a part of a method; pass another --method")


def repeat_command(plan: Plan, given: Given, *, seed: int) -> str:
    """Return the command that makes a comparison, with all settings that were made, for a shell in the run's folder."""
    words = [word for name in plan.manifests for word in ("--manifest", name)]
    words += [word for spec in plan.methods for word in ("--method", spec.name)]
    words += ["--seeds", str(plan.seeds), "--name", plan.name, *([] if plan.controls else ["--no-controls"])]
    words += ["--seed", str(seed)] if seed else []
    for key, values in plan.grid:
        words += ["--grid", f"{key}={','.join(map(value_text, values))}"]
    for key, setting in given.items():
        text = f"{key}={setting.value}"
        if not isinstance(setting.value, str) or parse_setting(text)[1] != setting.value:
            text = f"{key}={json.dumps(setting.value, ensure_ascii=False)}"
        words += ["--set", text]
    return shlex.join(["mmaudit", "compare", *words])


def method_config(
    spec: MethodSpec,
    config: RunConfig | str | Path | None,
    settings: Mapping[str, Any] | Sequence[str],
    seed: int | None,
) -> tuple[RunConfig, Given]:
    """Return the resolved config of a method, and the settings made by its own text."""
    common = settings if isinstance(settings, Mapping) else _pairs_of(settings)
    own = _pairs_of(spec.settings)
    for key in own:
        check_own_key(key, where=f"--method {spec.name}")
    if "finetune.only" in common:
        raise ConfigError(f"--set finetune.only: {_OF_ALL['finetune.only']}")
    made, given = load_settings(config, {**common, **own}, {"seed": seed, **spec.keywords()}, preset=spec.preset)
    return resolve_methods(made), {key: given[key] for key in own if key in given}


def _pairs_of(settings: Sequence[str]) -> dict[str, Any]:
    return dict(parse_setting(text) for text in settings)


def design_cells(
    plan: Plan,
    base: RunConfig,
    configs: Mapping[str, tuple[RunConfig, Given]],
    loaded: LoadedManifests,
    *,
    random_of: Mapping[str, str],
) -> Design:
    """Return all cells, the methods first, with epochs for equal samples seen."""
    named = {*plan.manifests, *(Path(entry).stem for entry in plan.manifests)}
    names = [name for name in loaded.examples if name in named]
    baseline = plan.methods[0]
    trained = [(name, spec, configs[spec.name][0]) for name in names for spec in plan.methods]
    controls: dict[Condition, Condition] = {}
    tuned = {(name, spec.name) for name, spec, _ in trained}
    if plan.controls:
        for name, spec, config, reference in _controls(plan, base, configs, loaded, names=names, random_of=random_of):
            if (name, spec.name) not in tuned:  # a random manifest may be named, too, for all methods
                trained.append((name, spec, config))
            controls[name, spec.name] = reference
            tuned |= {(name, spec.name)} if spec.only is not None else set()
    budget = base.finetune.epochs * max(len(loaded.examples[name].rows("train")) for name in names)
    log.info("every training reads %d samples; the baseline is %s", budget, baseline.name)
    cells = [
        Cell(
            manifest=name,
            method=spec,
            seed=base.seed + offset,
            config=loaded.sources[name].with_network(config, {}),
            budget=budget,
            is_first=offset == 0,
        )
        for offset in range(plan.seeds)
        for name, spec, config in trained
    ]
    cells = [with_epochs(cell, loaded) for cell in cells]
    return Design(cells=tuple(cells), controls=controls, tuned=frozenset(tuned))


def _controls(
    plan: Plan,
    base: RunConfig,
    configs: Mapping[str, tuple[RunConfig, Given]],
    loaded: LoadedManifests,
    *,
    names: Sequence[str],
    random_of: Mapping[str, str],
) -> Iterator[tuple[str, MethodSpec, RunConfig, Condition]]:
    """Yield manifest, method, config and reference of each control."""
    baseline = plan.methods[0]
    baseline_config = configs[baseline.name][0]
    for name in names:
        for modality in loaded.examples[name].modalities if len(loaded.examples[name].modalities) > 1 else ():
            finetune = replace(base.finetune, only=modality, sampling="uniform", balancing="joint", fusion="concat")
            config = resolve_methods(replace(base, finetune=finetune))
            yield name, MethodSpec(name=f"{modality} alone", only=modality), config, (name, baseline.name)
        for spec in plan.methods:
            config = configs[spec.name][0]
            opposite = anti_curriculum(spec, sampling=config.finetune.sampling)
            if opposite is not None:
                finetune = replace(config.finetune, sampling="anti-curriculum")
                yield name, opposite, resolve_methods(replace(config, finetune=finetune)), (name, spec.name)
        shuffled = MethodSpec(name="shuffled labels", shuffled=True)
        yield name, shuffled, baseline_config, (name, baseline.name)
    for control, name in random_of.items():
        yield control, baseline, baseline_config, (name, baseline.name)
