"""The command `compare`: methods on manifests over several seeds, with controls and verdicts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from ...audit.engine.executors import RayOptions, choose_engine
from ...audit.errors import ConfigError, RunError
from ...audit.locks import WAIT_SECONDS, Lock, write_lock
from ...audit.workers import default_workers
from ...rebalance.manifest import read_dropped, read_manifest
from ...train.comparison.verdicts import Comparison, build_comparison
from ...train.difference import Condition
from ...train.optimizer import local_device
from ..config import Given, RunConfig, load_settings
from ..effects import HasEffect, check_media_settings, effects_in_training, warn_without_effect, with_engine
from ..progress import progress_bars
from ..provenance import SourceOptions
from ..remote_run import with_run
from ..run import Run
from ..scoring import pairs, pick_device
from ..splitting import split
from .cells import (
    Cell,
    CellResult,
    LoadedManifests,
    Loading,
    clear_loaded,
    load_manifests,
)
from .grid import check_grid, search_grid
from .plan import Design, Plan, design_cells, method_config, read_plan, repeat_command
from .results import collect_results, write_tables
from .schedule import Schedule, Shard

log = logging.getLogger("mmaudit")

# No file of a training is kept but its predictions, and all start from random weights.
_WITHOUT_EFFECT = ("finetune.init", "finetune.report_to", "finetune.save_steps")
_RANDOM_SECONDS = 600.0  # to wait for another shard that draws a random control


@with_run("stages", writes=True)
def compare(
    *,
    manifest: Sequence[str] = (),
    method: Sequence[str] = (),
    seeds: int | None = None,
    plan: str | Path | None = None,
    name: str | None = None,
    controls: bool = True,
    run: str | Path = "mmaudit-run",
    jobs: int | None = None,
    shard: str | None = None,
    grid: Mapping[str, Sequence[Any]] | Sequence[str] = (),
    data: str | Path | None = None,
    encoder: Mapping[str, str] | Sequence[str] | None = None,
    allow_outside: bool = False,
    seed: int | None = None,
    device: str = "auto",
    num_workers: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    config: RunConfig | str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    progress: bool = True,
) -> Comparison:
    """Train methods on manifests over several seeds, and state which of them helps, with intervals and controls.

    Every training reads as many samples: those of finetune.epochs epochs of the largest manifest. All are tested on one
    common test set. A finished training is not repeated: run the same command again after an interruption.

    Args:
        manifest: Manifest file, or its name in the run.
        method: Sampler, balancer and fusion joined by +, or preset:NAME, then settings after a colon; the first one is
            the baseline.
        seeds: Trainings of each method on each manifest; by default 5.
        plan: TOML file with manifests, methods, seeds, name, controls and grid; options override it.
        name: Name of the comparison; by default made of the manifests.
        controls: Train no controls (one modality, same-size random subset, opposite order, shuffled labels).
        run: Run folder, a path or a URL.
        jobs: Processes that train at the same time; by default as many as the processors or cards serve.
        shard: Train only the i-th of n parts, i/n, as in a Slurm array; the last call, without it, writes the tables.
        grid: Values tried for each method, such as optim.lr=1e-3,1e-2; the best on validation samples is trained; in
            Python also {"optim.lr": [1e-3, 1e-2]}.
        data: The data, if they moved, or for manifests of others.
        encoder: Confirm the encoder (code or model) of a modality.
        allow_outside: Allow paths outside the data folder.
        seed: First random seed; by default 0.
        device: auto, cpu or cuda.
        num_workers: Processes that decode media; 0: none; by default one per CPU. With Ray the workers that train.
        engine: local, or ray to train on workers of a Ray cluster, in place of --jobs.
        ray_address: HOST:PORT of a Ray cluster, or auto; by default RAY_ADDRESS, else a cluster of this machine.
        config: TOML file with settings; in Python also a RunConfig.
        settings: One setting of all methods, such as finetune.epochs=20; in Python also {"finetune.epochs": 20}.
        progress: Show a progress bar in a terminal or notebook.

    Returns:
        The comparison; its tables are in the folder compare/NAME of the run.

    Raises:
        ConfigError: A method does not exist, or a setting is invalid.
        ManifestError: Manifests are of several datasets or splits, or there are no test samples.
        RunError: The name holds trainings of other code, data or settings.

    Example:
        >>> mmaudit.compare(manifest=["balanced", "all"], method=["joint", "ogm-ge"], seeds=5).summary
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs {jobs}: at least 1")
    if jobs is not None and engine == "ray":
        raise ConfigError(f"--jobs {jobs}: with --engine ray the number of workers is --num-workers")
    part = None if shard is None else Shard.parse(shard)
    chosen = read_plan(
        plan, manifests=manifest, methods=method, seeds=seeds, name=name, controls=controls, grid=grid or ()
    )
    base, given = load_settings(config, settings, {"seed": seed})
    ray = choose_engine(engine, base.ray, address=ray_address, num_workers=num_workers, device=device)
    run_dir, device = Run.open(run), "cpu" if ray else local_device(pick_device(device))
    configs = {spec.name: method_config(spec, config, settings, seed) for spec in chosen.methods}
    check_grid(chosen, given, configs)
    if any(made.finetune.end_to_end for made in (base, *(made for made, _ in configs.values()))):
        raise ConfigError(
            "finetune.end_to_end: compare trains on cached vectors; train pretrained models with mmaudit finetune"
        )
    paths = [run_dir.find_manifest(entry) for entry in chosen.manifests]
    random_of = _random_controls(run_dir, paths, seed=base.seed) if chosen.controls else {}
    loading = Loading(
        run=run_dir.folder,
        manifests=tuple(dict.fromkeys((*paths, *map(run_dir.manifest, random_of)))),
        options=SourceOptions(data=data, encoder=tuple(pairs(encoder) or ()), allow_outside=allow_outside),
        config=base,
        num_workers=default_workers() if num_workers is None or ray else num_workers,
    )
    from ..report.comparison_page import write_comparison_page  # jinja2 and matplotlib, of which errors above need none

    clear_loaded()
    with ExitStack() as stack:
        stack.callback(clear_loaded)
        report = stack.enter_context(progress_bars(progress))
        stack.enter_context(_lock(run_dir, chosen.name, part))
        loaded = load_manifests(loading, report)
        _check_settings(given, configs, loaded, ray)
        design = design_cells(chosen, base, configs, loaded, random_of=random_of)
        folder = run_dir.comparison(chosen.name)
        schedule = Schedule(folder=folder, loading=loading, device=device, jobs=jobs, progress=report, ray=ray)
        results, warnings = _train(chosen, design, configs, schedule, part)
        if results is None:
            return _unfinished(chosen, loaded, folder, warnings)
        comparison = collect_results(chosen, design, results, loaded, folder, warnings)
        with nullcontext() if part is None else _lock(run_dir, chosen.name, None, "tables"):
            write_tables(comparison, folder)
            write_comparison_page(comparison, folder, command=repeat_command(chosen, given, seed=base.seed))
    return comparison


def _lock(run_dir: Run, name: str, shard: Shard | None, part: str = "") -> AbstractContextManager[Lock]:
    """Return the lock of a comparison, or of one of its shards, which run at the same time; or of a part of it."""
    scope = "/".join(filter(None, ("compare", name, part if shard is None else shard.scope)))
    wait_seconds = WAIT_SECONDS if part else 0.0
    return write_lock(run_dir.folder, scope, command="mmaudit compare", wait_seconds=wait_seconds)


Results = Mapping[tuple[Condition, int], CellResult]


def _train(
    plan: Plan,
    design: Design,
    configs: Mapping[str, tuple[RunConfig, Given]],
    schedule: Schedule,
    shard: Shard | None,
) -> tuple[Results | None, list[str]]:
    """Train what is missing, of the grid first; return all results, None where other shards miss some, and warnings."""
    cells: Sequence[Cell] = design.cells
    if plan.grid:
        own_keys = {name: tuple(own) for name, (_, own) in configs.items()}
        search = search_grid(design, plan.grid, own_keys, schedule, shard)
        cells = search.apply(design, schedule)
        own, warnings = [cell for cell in cells if search.is_own(cell, design)], list(search.warnings)
    else:
        own, warnings = [*cells] if shard is None else shard.select(cells, key=lambda cell: cell.key), []
    schedule.train_missing(own, stage="compare")
    if len(cells) == len(design.cells):
        results = dict(zip(((cell.condition, cell.seed) for cell in cells), schedule.read(cells), strict=True))
        finished = {key: result for key, result in results.items() if result is not None}
        if len(finished) == len(results):
            return finished, warnings
    return None, [f"shard {shard} is finished, and others are not: run them, then the same command without --shard"]


def _unfinished(plan: Plan, loaded: LoadedManifests, folder: Path, warnings: Sequence[str]) -> Comparison:
    """Return a comparison without trainings: verdicts on a part of the seeds would be looks at unfinished results."""
    return build_comparison(
        {},
        name=plan.name,
        baseline=plan.methods[0].name,
        subsets=loaded.subsets,
        group=loaded.group,
        trainings=(),
        sample_id=loaded.test_ids,
        warnings=warnings,
        folder=folder,
    )


def _check_settings(
    given: Given, configs: Mapping[str, tuple[RunConfig, Given]], loaded: LoadedManifests, ray: RayOptions | None
) -> None:
    """Refuse media settings of other scores, and name settings without effect."""
    all_effects: list[HasEffect] = []
    for name, (config, own) in configs.items():
        effects = []
        for manifest, source in loaded.sources.items():
            check_media_settings({**given, **own}, source.manifest)
            has_effect = effects_in_training(config, source.manifest, loaded.examples[manifest])
            effects.append(lambda key, has_effect=has_effect: key not in _WITHOUT_EFFECT and has_effect(key))
        warn_without_effect(f"compare, method {name}", own, _any_of(effects))
        all_effects += effects
    warn_without_effect("compare", given, with_engine(_any_of(all_effects), ray))


def _any_of(effects: Sequence[HasEffect]) -> HasEffect:
    """Return whether a setting has an effect in any of several trainings."""
    return lambda key: any(has_effect(key) for has_effect in effects)


def _random_controls(run_dir: Run, paths: Sequence[Path], *, seed: int) -> dict[str, str]:
    """Write a random manifest of the size of each that leaves samples out; {name of the control: name}."""
    controls = {}
    for path in paths:
        source = read_manifest(path)
        recipe, dropped = source.provenance.get("recipe", {}), read_dropped(path, source)
        if str(recipe.get("subset", "")).startswith("random") or (dropped is not None and not dropped.num_rows):
            continue
        if recipe.get("resplit") or not run_dir.is_scored() or path.resolve() != run_dir.manifest(path.stem).resolve():
            log.warning("no random control of %s: it has splits of its own, or is of another run", path.stem)
            continue
        name = f"random-like-{path.stem}"
        with write_lock(run_dir.folder, f"compare/.{name}", command="mmaudit compare", wait_seconds=_RANDOM_SECONDS):
            if not run_dir.manifest(name).exists():
                split(run=run_dir.folder, subset="random", like=path.stem, name=name, seed=seed)
        inputs = read_manifest(run_dir.manifest(name)).provenance.get("recipe", {}).get("inputs", {})
        if source.digest() not in inputs.values():
            raise RunError(f"{run_dir.manifest(name)} was not drawn like the present {path.stem}: remove it")
        controls[name] = path.stem
    return controls
