"""Grids of a comparison: settings tried per method on validation samples, with the same budget, and their choice."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...audit.errors import ConfigError
from ...audit.storage import write_parquet
from ...train.difference import Condition
from ..config import Given, RunConfig, load_settings
from ..effects import HasEffect, effects_in_training
from ..training_source import resolve_methods
from .cells import Cell, CellResult, LoadedManifests, load_manifests, with_epochs
from .plan import Design, Grid, Plan, value_text
from .schedule import Schedule, Shard

log = logging.getLogger("mmaudit")

TUNING_SEED = 1000  # added to the first seed: compared seeds lie below, so that none of them chooses
Setting = tuple[tuple[str, Any], ...]  # keys with one value each


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Trainings by which settings are chosen, those of each condition by setting, and what limits the comparison."""

    cells: Mapping[Condition, Mapping[Setting, Cell]]
    warnings: tuple[str, ...]


def setting_text(setting: Setting) -> str:
    """Return a setting as KEY=VALUE texts."""
    return " ".join(f"{key}={value_text(value)}" for key, value in setting)


def with_setting(config: RunConfig, setting: Setting) -> RunConfig:
    """Return the config of a method with a setting; ConfigError for an unknown key or a value out of range."""
    return resolve_methods(load_settings(config, dict(setting))[0]) if setting else config


def combinations(grid: Grid) -> list[Setting]:
    """Return all combinations of the values, in their order."""
    keys = [key for key, _ in grid]
    return [tuple(zip(keys, values, strict=True)) for values in product(*(values for _, values in grid))]


def check_grid(plan: Plan, given: Given, configs: Mapping[str, tuple[RunConfig, Given]]) -> None:
    """Raise ConfigError for a grid that contradicts other settings, or has an unknown key or a value out of range."""
    for key, _ in plan.grid:
        if key in given:
            raise ConfigError(f"--grid {key} and {key} ({given[key].source}): pass one of them")
    for config, own in configs.values():
        used = tuple((key, values) for key, values in plan.grid if key not in own)
        for setting in combinations(used):
            with_setting(config, setting)
    if plan.grid and plan.seeds > TUNING_SEED:
        raise ConfigError(f"--seeds {plan.seeds}: at most {TUNING_SEED} with --grid, whose own seed follows them")


def design_tuning(design: Design, grid: Grid, own_keys: Mapping[str, Sequence[str]], loaded: LoadedManifests) -> Tuning:
    """Return the trainings of each condition that is tuned: with every combination of the values, and one seed.

    A key that the text of a method sets, or that has no effect on it, is left out of its grid.
    """
    for name in {manifest for manifest, _ in design.tuned}:
        if not len(loaded.examples[name].rows("validation")):
            raise ConfigError(
                f"--grid chooses on validation samples, and {name} has none: see finetune.validation_fraction"
            )
    cells: dict[Condition, dict[Setting, Cell]] = {}
    left_out: dict[str, list[str]] = {}
    for cell in design.cells:
        if not cell.is_first or cell.condition not in design.tuned:
            continue
        own, has_effect = own_keys.get(cell.method.name, ()), _effect(cell, grid, loaded)
        used = tuple((key, values) for key, values in grid if key not in own and has_effect(key))
        cells[cell.condition] = {setting: _tried(cell, setting, loaded) for setting in combinations(used)}
        for key, _ in grid:
            if key not in dict(used):
                reason = "is set by its text" if key in own else "has no effect"
                left_out.setdefault(cell.method.name, []).append(f"{key} {reason}")
    for key, _ in grid:
        if all(key not in dict(setting) for tried in cells.values() for setting in tried):
            raise ConfigError(f"--grid {key} has no effect on any method: remove it")
    warnings = [
        f"the grid of {method} is smaller, {' and '.join(dict.fromkeys(reasons))}: fewer settings were tried"
        for method, reasons in left_out.items()
    ]
    for warning in warnings:
        log.info("%s", warning)
    return Tuning(cells=cells, warnings=tuple(warnings))


def _effect(cell: Cell, grid: Grid, loaded: LoadedManifests) -> HasEffect:
    """Return whether a key has an effect in any combination: momentum has one where sgd is tried."""
    manifest, examples = loaded.sources[cell.manifest].manifest, loaded.examples[cell.manifest]
    effects = [
        effects_in_training(with_setting(cell.config, setting), manifest, examples) for setting in combinations(grid)
    ]
    return lambda key: any(effect(key) for effect in effects)


def _tried(cell: Cell, setting: Setting, loaded: LoadedManifests) -> Cell:
    config = with_setting(cell.config, setting)
    tried = replace(cell, config=config, seed=cell.seed + TUNING_SEED, setting=setting_text(setting) or "as it is")
    return with_epochs(replace(tried, is_first=False), loaded)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Settings chosen so far, the conditions of this shard, and what limits the comparison."""

    chosen: Mapping[Condition, Setting]
    own: frozenset[Condition]
    warnings: tuple[str, ...]

    def is_own(self, cell: Cell, design: Design) -> bool:
        """Return whether a cell is of this shard."""
        return _tuned_as(cell, design) in self.own

    def apply(self, design: Design, schedule: Schedule) -> list[Cell]:
        """Return the cells with the chosen settings; those whose choice is not known are left out."""
        loaded = load_manifests(schedule.loading)
        known = [(cell, _tuned_as(cell, design)) for cell in design.cells]
        return [
            with_epochs(replace(cell, config=with_setting(cell.config, self.chosen[source])), loaded)
            for cell, source in known
            if source in self.chosen
        ]


def _tuned_as(cell: Cell, design: Design) -> Condition:
    """Return the condition whose choice a cell takes: its own, or that of what it controls."""
    return cell.condition if cell.condition in design.tuned else design.controls[cell.condition]


def search_grid(
    design: Design, grid: Grid, own_keys: Mapping[str, Sequence[str]], schedule: Schedule, shard: Shard | None
) -> Search:
    """Train what is missing of the grid, choose, and write grid.parquet where all is finished.

    All trainings of a method on a manifest are in one shard, so that none waits for the choices of another.
    """
    tuning = design_tuning(design, grid, own_keys, load_manifests(schedule.loading))
    own = [*tuning.cells] if shard is None else shard.select([*tuning.cells], key="/".join)
    schedule.train_missing([cell for condition in own for cell in tuning.cells[condition].values()], stage="grid")
    results = {}
    for condition, by_setting in tuning.cells.items():
        read = dict(zip(by_setting, schedule.read([*by_setting.values()]), strict=True))
        finished = {setting: result for setting, result in read.items() if result is not None}
        if len(finished) == len(by_setting):
            results[condition] = finished
    chosen, warnings = choose(tuning, results)
    if len(results) == len(tuning.cells):
        write_grid(tuning, results, chosen, schedule.folder)
    return Search(chosen=chosen, own=frozenset(own), warnings=(*tuning.warnings, *warnings))


def choose(
    tuning: Tuning, results: Mapping[Condition, Mapping[Setting, CellResult]]
) -> tuple[dict[Condition, Setting], list[str]]:
    """Return the setting of each condition with the best validation accuracy, then the lowest loss; and warnings.

    Of equal ones the first of the grid. Test samples have no part in it: their predictions are not even stored.
    """
    chosen: dict[Condition, Setting] = {}
    warnings = []
    for condition, by_setting in results.items():
        setting = max(by_setting, key=lambda setting: _rank(by_setting[setting]))
        if math.isinf(_rank(by_setting[setting])[0]):
            warnings.append(f"{_text(condition)} diverged with every setting of its grid: the first is used")
        chosen[condition] = setting
    warnings += _at_edges(chosen, tuning)
    return chosen, warnings


def _rank(result: CellResult) -> tuple[float, float]:
    validation = result.about["validation"]
    return (validation["accuracy"], -validation["loss"]) if validation else (-math.inf, 0.0)


def _at_edges(chosen: Mapping[Condition, Setting], tuning: Tuning) -> Iterator[str]:
    """Yield a warning for each numeric key with choices at the least or greatest value that was tried."""
    at_edge: dict[str, list[str]] = {}
    for condition, setting in chosen.items():
        for key, value in setting:
            tried = [dict(other)[key] for other in tuning.cells[condition]]
            is_number = all(isinstance(other, int | float) and not isinstance(other, bool) for other in tried)
            if is_number and value in (min(tried), max(tried)):
                at_edge.setdefault(key, []).append(f"{_text(condition)} ({value_text(value)})")
    for key, conditions in at_edge.items():
        yield f"{key} was chosen at the edge of its grid, and a value beyond it may be better: {', '.join(conditions)}"


def write_grid(
    tuning: Tuning,
    results: Mapping[Condition, Mapping[Setting, CellResult]],
    chosen: Mapping[Condition, Setting],
    folder: Path,
) -> None:
    """Write grid.parquet, one row per setting tried, and log the choices with their budget."""
    rows = []
    for condition, cells in tuning.cells.items():
        for setting, cell in cells.items():
            about = results[condition][setting].about
            validation = about["validation"]
            identity = {"manifest": condition[0], "method": condition[1], "setting": setting_text(setting)}
            measures = {f"validation_{key}": validation.get(key) for key in ("accuracy", "loss")}
            counts = {key: about[key] for key in ("status", "epochs", "samples_seen", "rows_read")}
            rows.append({**identity, "chosen": setting == chosen[condition], "seed": cell.seed, **measures, **counts})
        if chosen[condition]:
            accuracy = results[condition][chosen[condition]].about["validation"].get("accuracy", math.nan)
            log.info(
                "%s: %s, validation accuracy %.3f; %d settings x %d samples seen",
                _text(condition),
                setting_text(chosen[condition]),
                accuracy,
                len(cells),
                next(iter(cells.values())).budget,
            )
    write_parquet(pa.Table.from_pylist(rows), folder / "grid.parquet", provenance={})


def _text(condition: Condition) -> str:
    return f"{condition[1]} on {condition[0]}"
