"""Design of a comparison: its plan, the configs of its methods, its controls and cells."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..audit.errors import ConfigError, choices
from ..train.comparison_cells import MethodSpec, anti_curriculum, parse_method
from ..train.difference import Condition
from .comparing_cells import Cell, LoadedManifests, with_epochs
from .config import Given, RunConfig, load_settings, parse_setting, read_toml
from .training_source import resolve_methods

log = logging.getLogger("mmaudit")

_DEFAULT_SEEDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is compared. `controls`: whether the controls are trained too."""

    manifests: tuple[str, ...]
    methods: tuple[MethodSpec, ...]
    seeds: int
    name: str
    controls: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """The cells of a comparison, and of each control what it is compared with."""

    cells: tuple[Cell, ...]
    controls: Mapping[Condition, Condition]


def read_plan(
    file: str | Path | None,
    *,
    manifests: Sequence[str],
    methods: Sequence[str],
    seeds: int | None,
    name: str | None,
    controls: bool,
) -> Plan:
    """Return the plan of a file, with the options that override it."""
    kinds: dict[str, type] = {"manifests": list, "methods": list, "seeds": int, "name": str, "controls": bool}
    words = {list: "a list of texts", int: "a whole number", str: "a text", bool: "true or false"}
    content = {} if file is None else read_toml(Path(file))
    for key, value in content.items():
        if key not in kinds:
            raise ConfigError(f"{file}: no key {key}; {choices(key, kinds)}")
        is_texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
        if type(value) is not kinds[key] or (kinds[key] is list and not is_texts):
            raise ConfigError(f"{file}: {key} is {value!r}; it must be {words[kinds[key]]}")
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
    )


def method_config(
    spec: MethodSpec,
    config: RunConfig | str | Path | None,
    settings: Mapping[str, Any] | Sequence[str],
    seed: int | None,
) -> tuple[RunConfig, Given]:
    """Return the resolved config of a method, and the settings made by its own text."""
    common = settings if isinstance(settings, Mapping) else _pairs_of(settings)
    own = _pairs_of(spec.settings)
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
    names = [name for name in loaded.examples if name not in random_of]
    baseline = plan.methods[0]
    trained = [(name, spec, configs[spec.name][0]) for name in names for spec in plan.methods]
    controls: dict[Condition, Condition] = {}
    if plan.controls:
        for name, spec, config, reference in _controls(plan, base, configs, loaded, names=names, random_of=random_of):
            trained.append((name, spec, config))
            controls[name, spec.name] = reference
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
    return Design(cells=tuple(with_epochs(cell, loaded) for cell in cells), controls=controls)


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
