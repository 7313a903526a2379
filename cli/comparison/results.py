"""Results of a comparison: finished cells as tables, findings and files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...audit.storage import write_json, write_parquet, write_text
from ...rebalance.manifest import dropped_path, read_num_rows
from ...train.comparison.findings import Filtering, StudyDesign
from ...train.comparison.verdicts import Comparison, build_comparison
from ...train.difference import Condition
from ..training_source import ManifestSource
from .cells import Cell, CellResult, LoadedManifests
from .plan import Design, Plan
from .predictions import CellProbabilities

_KEEPS = "finetune.keep_posterior"  # setting of a method that trains on the balanced side of the mixture only


def collect_results(
    plan: Plan,
    design: Design,
    results: Mapping[tuple[Condition, int], CellResult],
    loaded: LoadedManifests,
    folder: Path,
    warnings: Sequence[str] = (),
) -> Comparison:
    """Build the comparison of finished cells."""
    finished: dict[Condition, list[CellResult]] = defaultdict(list)
    correct: dict[Condition, list[NDArray[np.float64]]] = defaultdict(list)
    seeds: dict[Condition, list[int]] = defaultdict(list)
    trainings, diverged = [], defaultdict(list)
    for cell in design.cells:
        result = results[cell.condition, cell.seed]
        identity = {"manifest": cell.manifest, "method": cell.method.name, "seed": cell.seed}
        identity |= {"kind": "control" if cell.condition in design.controls else "method"}
        trainings.append(
            identity | {key: result.about[key] for key in ("status", "epochs", "samples_seen", "rows_read")}
        )
        if result.correct is None:
            diverged[cell.condition].append(cell.seed)
            continue
        finished[cell.condition].append(result)
        correct[cell.condition].append(result.correct)
        seeds[cell.condition].append(cell.seed)
    examples = next(iter(loaded.examples.values()))
    return build_comparison(
        {condition: np.stack(values) for condition, values in correct.items()},
        name=plan.name,
        baseline=plan.methods[0].name,
        subsets=loaded.subsets,
        group=loaded.group,
        trainings=trainings,
        sample_id=loaded.test_ids,
        controls=design.controls,
        seeds=seeds,
        label=examples.label[examples.rows("test")],
        probabilities=CellProbabilities(
            {condition: [entry.folder for entry in entries] for condition, entries in finished.items()},
            loaded.test_ids,
        ),
        without={
            condition: {name: np.stack([entry.without[name] for entry in entries]) for name in examples.modalities}
            for condition, entries in finished.items()
        },
        design=study_design(design.cells, loaded),
        warnings=[*_warnings(design, results, diverged, loaded), *warnings],
        folder=folder,
    )


def study_design(cells: Sequence[Cell], loaded: LoadedManifests) -> StudyDesign:
    """Return which conditions train one modality, which manifests are balanced, and how samples were chosen."""
    recipes = {name: _recipe(source) for name, source in loaded.sources.items()}
    filtering = {
        cell.condition: choice for cell in cells if (choice := _filtering(cell, recipes[cell.manifest])) is not None
    }
    return StudyDesign(
        unimodal={cell.condition: cell.method.only for cell in cells if cell.method.only is not None},
        balanced=frozenset(name for name, recipe in recipes.items() if recipe.get("balanced")),
        greedy=frozenset(cell.method.name for cell in cells if cell.config.finetune.balancing == "greedy"),
        filtering=filtering,
    )


def _recipe(source: ManifestSource) -> dict[str, Any]:
    """Return the recipe of a manifest, and whether it leaves samples out (`drops`)."""
    dropped = dropped_path(source.path)
    drops = dropped.exists() and read_num_rows(dropped) > 0
    return {**source.manifest.provenance.get("recipe", {}), "drops": drops}


def _filtering(cell: Cell, recipe: Mapping[str, Any]) -> Filtering | None:
    """Return how the training samples of a cell were chosen, with the method that is the same without it."""
    if cell.method.only is not None or cell.method.shuffled:
        return None
    settings = tuple(text for text in cell.method.settings if text.partition("=")[0].strip() != _KEEPS)
    method = cell.method.name
    if len(settings) < len(cell.method.settings):
        method = " ".join([_head(method) + (":" if settings else ""), *settings])
    if recipe.get("gmm") == "balanced":
        return Filtering(role="gmm", method=method, manifest=cell.manifest)
    if cell.config.finetune.keep_posterior is not None:
        return Filtering(role="gmm", method=method)
    subset = str(recipe.get("subset") or "")
    if subset.startswith("random") and recipe.get("like"):
        return Filtering(role="random", method=method, manifest=Path(str(recipe["like"])).stem)
    if not recipe["drops"]:
        return Filtering(role="all", method=method)
    return Filtering(role="balance-score", method=method) if subset.startswith("most-balanced") else None


def _head(method: str) -> str:
    """Return the name of a method without its settings."""
    prefix = "preset:" if method.startswith("preset:") else ""
    return prefix + method.removeprefix(prefix).partition(":")[0]


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


def write_tables(comparison: Comparison, folder: Path) -> None:
    """Write the tables as Parquet, the findings as JSON, and the table of differences as Markdown, CSV and LaTeX."""
    for name in ("runs", "per_sample", "summary", "metrics", "missing", "selection"):
        if (content := getattr(comparison, name)) is None:
            (folder / f"{name}.parquet").unlink(missing_ok=True)
            continue
        write_parquet(pa.Table.from_pandas(content, preserve_index=False), folder / f"{name}.parquet", provenance={})
    write_json({"findings": [finding.to_dict() for finding in comparison.findings]}, folder / "findings.json")
    write_text(comparison.to_markdown(), folder / "table.md")
    write_text(comparison.table().to_csv(index=False, lineterminator="\n"), folder / "table.csv")
    write_text(comparison.to_latex(), folder / "table.tex")
