"""The command `compare`: methods on manifests over several seeds, with controls and verdicts."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ..audit.errors import ConfigError, RunError
from ..audit.locks import write_lock
from ..audit.storage import write_parquet, write_text
from ..audit.workers import Progress, default_workers, format_duration, run_tasks
from ..rebalance.manifest import read_dropped, read_manifest
from ..train.comparison import Comparison, Condition, build_comparison
from ..train.optimizer import local_device
from .comparing_cells import (
    Cell,
    CellResult,
    LoadedManifests,
    Loading,
    clear_loaded,
    epochs_reported,
    estimate_seconds,
    load_manifests,
    read_cell,
    train_cell,
)
from .comparing_plan import Design, Plan, design_cells, method_config, read_plan
from .config import Given, RunConfig, load_settings
from .effects import HasEffect, check_media_settings, effects_in_training, warn_without_effect
from .progress import progress_bars
from .provenance import SourceOptions
from .run import Run
from .scoring import pairs, pick_device
from .splitting import split

log = logging.getLogger("mmaudit")


def compare(
    *,
    manifest: Sequence[str] = (),
    method: Sequence[str] = (),
    seeds: int | None = None,
    plan: str | Path | None = None,
    name: str | None = None,
    controls: bool = True,
    run: str | Path = "mmaudit-run",
    jobs: int = 1,
    data: str | Path | None = None,
    encoder: Mapping[str, str] | Sequence[str] | None = None,
    allow_outside: bool = False,
    seed: int | None = None,
    device: str = "auto",
    num_workers: int | None = None,
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
        plan: TOML file with manifests, methods, seeds, name and controls; options override it.
        name: Name of the comparison; by default made of the manifests.
        controls: Train no controls (one modality, same-size random subset, opposite order, shuffled labels).
        run: Run folder.
        jobs: Processes that train at the same time; by default 1.
        data: The data, if they moved, or for manifests of others.
        encoder: Confirm the encoder (code or model) of a modality.
        allow_outside: Allow paths outside the data folder.
        seed: First random seed; by default 0.
        device: auto, cpu or cuda.
        num_workers: Processes that decode media; 0: none; by default one per CPU.
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
    chosen = read_plan(plan, manifests=manifest, methods=method, seeds=seeds, name=name, controls=controls)
    run_dir, device = Run.open(run), local_device(pick_device(device))
    base, given = load_settings(config, settings, {"seed": seed})
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: at least 1")
    configs = {spec.name: method_config(spec, config, settings, seed) for spec in chosen.methods}
    if any(made.finetune.end_to_end for made in (base, *(made for made, _ in configs.values()))):
        raise ConfigError(
            "finetune.end_to_end: compare trains on cached vectors; train pretrained models with mmaudit finetune"
        )
    paths = [run_dir.find_manifest(entry) for entry in chosen.manifests]
    random_of = _random_controls(run_dir, paths, seed=base.seed) if chosen.controls else {}
    loading = Loading(
        run=run_dir.folder,
        manifests=(*paths, *map(run_dir.manifest, random_of)),
        options=SourceOptions(data=data, encoder=tuple(pairs(encoder) or ()), allow_outside=allow_outside),
        config=base,
        num_workers=default_workers() if num_workers is None else num_workers,
    )
    folder = run_dir.comparison(chosen.name)
    clear_loaded()
    with ExitStack() as stack:
        stack.callback(clear_loaded)
        report_progress = stack.enter_context(progress_bars(progress))
        stack.enter_context(write_lock(run_dir.folder, f"compare/{chosen.name}", command="mmaudit compare"))
        loaded = load_manifests(loading, report_progress)
        _check_settings(given, configs, loaded)
        design = design_cells(chosen, base, configs, loaded, random_of=random_of)
        _train_missing(design.cells, folder, loading, device=device, jobs=jobs, progress=report_progress)
        results = {}
        for cell in design.cells:
            if (result := read_cell(cell.folder(folder), cell, loaded)) is not None:
                results[cell.condition, cell.seed] = result
        comparison = _collect(chosen, design, results, loaded, folder)
        _write_tables(comparison, folder)
    return comparison


def _check_settings(given: Given, configs: Mapping[str, tuple[RunConfig, Given]], loaded: LoadedManifests) -> None:
    """Refuse media settings of other scores, and name settings without effect."""
    all_effects: list[HasEffect] = []
    for name, (config, own) in configs.items():
        effects = []
        for manifest, source in loaded.sources.items():
            check_media_settings({**given, **own}, source.manifest)
            effects.append(effects_in_training(config, source.manifest, loaded.examples[manifest]))
        warn_without_effect(f"compare, method {name}", own, _any_of(effects))
        all_effects += effects
    warn_without_effect("compare", given, _any_of(all_effects))


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
        if not run_dir.manifest(name).exists():
            split(run=run_dir.folder, subset="random", like=path.stem, name=name, seed=seed)
        inputs = read_manifest(run_dir.manifest(name)).provenance.get("recipe", {}).get("inputs", {})
        if source.digest() not in inputs.values():
            raise RunError(f"{run_dir.manifest(name)} was not drawn like the present {path.stem}: remove it")
        controls[name] = path.stem
    return controls


def _train_missing(
    cells: Sequence[Cell], folder: Path, loading: Loading, *, device: str, jobs: int, progress: Progress
) -> None:
    """Train the cells that are not finished; each is written whole, in one of `jobs` processes."""
    loaded = load_manifests(loading)
    results = [(cell, read_cell(cell.folder(folder), cell, loaded)) for cell in cells]
    missing = [cell for cell, result in results if result is None]
    total, done = len(cells), len(cells) - len(missing)
    if not missing:
        log.info("all %d trainings are finished: nothing to do", total)
        return
    finished = [float(result.about["seconds"]) for _, result in results if result is not None]
    seconds = estimate_seconds(missing, finished, loading=loading, device=device, jobs=jobs)
    log.info("%d of %d trainings to do: about %s", len(missing), total, format_duration(seconds))
    progress("compare", done, total)
    if jobs > 1:
        work = partial(train_cell, loading=loading, comparison=folder, device=device)
        for number, _ in enumerate(run_tasks(work, missing, num_workers=jobs), start=done + 1):
            progress("compare", number, total)
        return
    for number, cell in enumerate(missing, start=done):
        of_epochs = epochs_reported(progress, number, total, f"{cell.method.name} on {cell.manifest}, seed {cell.seed}")
        train_cell(cell, loading=loading, comparison=folder, device=device, progress=of_epochs)
        progress("compare", number + 1, total)


def _collect(
    plan: Plan,
    design: Design,
    results: Mapping[tuple[Condition, int], CellResult],
    loaded: LoadedManifests,
    folder: Path,
) -> Comparison:
    """Build the comparison of finished cells."""
    correct: dict[Condition, list[Any]] = defaultdict(list)
    seeds: dict[Condition, list[int]] = defaultdict(list)
    rows, diverged = [], defaultdict(list)
    for cell in design.cells:
        result = results[cell.condition, cell.seed]
        identity = {"manifest": cell.manifest, "method": cell.method.name, "seed": cell.seed}
        identity |= {"kind": "control" if cell.condition in design.controls else "method"}
        counts = {key: result.about[key] for key in ("status", "epochs", "samples_seen")}
        if result.correct is None:
            diverged[cell.condition].append(cell.seed)
            rows.append({**identity, **counts, "subset": "all", "n": len(loaded.test_ids)})
            continue
        correct[cell.condition].append(result.correct)
        seeds[cell.condition].append(cell.seed)
        rows += [{**identity, **counts, "subset": name, **values} for name, values in result.about["test"].items()]
    columns = [*identity, *counts, "subset", "n", "accuracy", "macro_f1", "map", "ece"]
    return build_comparison(
        {condition: np.stack(values) for condition, values in correct.items()},
        name=plan.name,
        baseline=plan.methods[0].name,
        subsets=loaded.subsets,
        group=loaded.group,
        runs=pd.DataFrame(rows, columns=columns),
        sample_id=loaded.test_ids,
        controls=design.controls,
        seeds=seeds,
        warnings=_warnings(design, results, diverged, loaded),
        folder=folder,
    )


def _warnings(
    design: Design,
    results: Mapping[tuple[Condition, int], CellResult],
    diverged: Mapping[Condition, Sequence[int]],
    loaded: LoadedManifests,
) -> list[str]:
    """Return what limits the comparison: diverged trainings, unequal samples seen, scores that saw test labels."""
    warnings = [
        f"{method} on {manifest} diverged with {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}: "
        "left out of the differences"
        for (manifest, method), seeds in diverged.items()
    ]
    fewer = {
        cell.condition: result.about["samples_seen"] / cell.budget
        for cell in design.cells
        if (result := results[cell.condition, cell.seed]).correct is not None
        and result.about["samples_seen"] < 0.99 * cell.budget
    }
    warnings += [
        f"{method} on {manifest} read {share:.0%} of the samples of the others"
        for (manifest, method), share in fewer.items()
    ]
    if loaded.saw_test_labels:
        warnings.append(
            f"the probes behind {', '.join(loaded.saw_test_labels)} were fitted on test labels too: score with "
            "--learn-from train"
        )
    return warnings


def _write_tables(comparison: Comparison, folder: Path) -> None:
    """Write runs, correctness by sample, the summary, and the table as Markdown, CSV and LaTeX."""
    for name in ("runs", "per_sample", "summary"):
        table = pa.Table.from_pandas(getattr(comparison, name), preserve_index=False)
        write_parquet(table, folder / f"{name}.parquet", provenance={})
    write_text(comparison.to_markdown(), folder / "table.md")
    write_text(comparison.table().to_csv(index=False, lineterminator="\n"), folder / "table.csv")
    write_text(comparison.to_latex(), folder / "table.tex")
