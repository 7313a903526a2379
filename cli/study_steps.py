"""Steps of a study of one dataset, each complete or absent: scores, subsets, comparisons, agreements, truth."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..audit.agreement import ceiling, rank_agreement, reliability_of_mean, side_agreement
from ..audit.errors import ConfigError, ManifestError, RunError, ScoreError
from ..audit.metrics import DOMINATED_THRESHOLDS, discrepancy_between, is_dominated, mean_interval
from ..audit.metrics import group_codes as code_groups
from ..audit.scores.table import ScoreTable
from ..audit.storage import read_parquet, read_table
from ..rebalance.manifest import read_manifest
from ..rebalance.score_agreement import compare_scores, reliability_by_folds
from ..train.balancing import BALANCERS
from ..train.comparison import Comparison
from ..train.comparison_cells import parse_method
from ..train.sampling import SAMPLERS
from .comparing import compare
from .config import RunConfig, parse_setting
from .run import Run
from .scoring import score
from .splitting import split

log = logging.getLogger("mmaudit")

_ON_SUBSETS = ("joint", "ogm-ge", "gblend", "greedy", "bss-h+sum")  # the methods of arXiv 2302.10912, and a curriculum
_MIN_PER_CLASS = 2  # training samples of a subset; ours
_PLANTED_LEVELS = 5  # of the planted discrepancy, in the figure


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySet:
    """A dataset of a study, and the settings of its data.

    truth: Parquet table of `sample_id` and `discrepancy`, the planted discrepancy, where that is known, in the order of
    `between`; truth_text says how it was planted. probes: settings of further probes by name, on this dataset only.
    """

    name: str
    data: str | Path
    settings: Mapping[str, Any]
    truth: Path | None = None
    truth_text: str = ""
    probes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPlan:
    """What is trained and scored: methods (the baseline first), seeds, other probes by name, common settings."""

    methods: tuple[str, ...]
    seeds: int
    probes: Mapping[str, Mapping[str, Any]]
    config: RunConfig | str | Path | None
    settings: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        methods: Sequence[str],
        *,
        seeds: int,
        probes: Sequence[str],
        config: RunConfig | str | Path | None,
        settings: Mapping[str, Any] | Sequence[str],
    ) -> StudyPlan:
        """Parse the texts of methods, probes and settings; raise ConfigError for those that do not exist."""
        for text in methods:
            parse_method(text)
        common = dict(settings) if isinstance(settings, Mapping) else dict(parse_setting(text) for text in settings)
        named = dict(_parse_probe(text) for text in probes or ("mlp: probe.kind=mlp",))
        if seeds < 1:
            raise ConfigError(f"--seeds {seeds}: at least 1, and at least 2 for a verdict")
        return cls(methods=tuple(methods), seeds=seeds, probes=named, config=config, settings=common)

    @property
    def baseline(self) -> str:
        """The method that the others are compared with."""
        return self.methods[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """Where and how a study runs, without effect on its results."""

    jobs: int
    seed: int
    device: str
    num_workers: int | None
    progress: bool

    def common(self) -> dict[str, Any]:
        """Return the keywords of commands that read data."""
        return {"device": self.device, "num_workers": self.num_workers, "progress": self.progress}


def default_methods() -> tuple[str, ...]:
    """Return all methods: the baseline, every balancer, and every sampler with the sum of losses."""
    balancers = [name for name in BALANCERS if name != "joint"]
    samplers = [f"{name}+sum" for name in SAMPLERS if name not in ("uniform", "anti-curriculum")]
    return ("joint", *balancers, *samplers)


def _parse_probe(text: str) -> tuple[str, dict[str, Any]]:
    name, _, rest = text.partition(":")
    if not name.strip() or not rest.strip() or "/" in name:
        raise ConfigError(f"--probe {text!r}: not of the form NAME: SECTION.KEY=VALUE, such as mlp: probe.kind=mlp")
    return name.strip(), dict(parse_setting(part) for part in rest.split())


def study_set(entry: StudySet, plan: StudyPlan, folder: Path, execution: Execution) -> dict[str, Any]:
    """Do the steps of a study that are not done, and return the numbers of the dataset as JSON values."""
    started, run = time.monotonic(), folder / "run"
    record = _score(entry, plan, run, execution, {}).record
    scores = Run(run).scores()
    manifests = _write_manifests(run, execution.seed)
    chosen: dict[str, Any] = {"config": plan.config, "settings": _training_settings(plan), "seed": execution.seed}
    chosen |= {"run": run, "seeds": plan.seeds, "jobs": execution.jobs, **execution.common()}
    methods = compare(manifest=["all"], method=plan.methods, name="methods", **chosen)
    on_subsets = [text for text in _ON_SUBSETS if text in plan.methods] or [plan.baseline]
    subsets = compare(manifest=manifests, method=on_subsets, name="subsets", **chosen)
    shuffled = [f"shuffled:{text}" for text in plan.methods]
    chance = compare(manifest=["all"], method=shuffled, name="shuffled", controls=False, **{**chosen, "seeds": 1})
    return {
        **_about(entry, record, scores),
        "manifests": {name: _counts(run, name) for name in manifests},
        "methods": _comparison_numbers(methods, plan),
        "subsets": _comparison_numbers(subsets, plan),
        "shuffled": _against_shuffled(methods, chance),
        "probes": list(_probe_agreements(entry, plan, folder, execution, scores)),
        "networks": list(_network_agreements(methods, scores)),
        "truth": _recovery(entry, scores),
        "seconds": time.monotonic() - started,
    }


def _score(entry: StudySet, plan: StudyPlan, run: Path, execution: Execution, changes: Mapping[str, Any]) -> Any:
    settings = {"probe.learn_from": "train", **_scoring_settings(plan), **entry.settings, **changes}
    seed = {} if "seed" in changes else {"seed": execution.seed}
    return score(entry.data, run=run, config=plan.config, settings=settings, **seed, **execution.common())


def _scoring_settings(plan: StudyPlan) -> dict[str, Any]:
    return {
        key: value for key, value in plan.settings.items() if key.startswith(("data.", "probe.", "media.", "network."))
    }


def _training_settings(plan: StudyPlan) -> dict[str, Any]:
    return {key: value for key, value in plan.settings.items() if not key.startswith(("data.", "probe.", "media."))}


def _write_manifests(run: Path, seed: int) -> list[str]:
    """Write all samples and subsets, and return the names of those that have training samples of every class."""
    balanced = _split(run, "balanced", seed, balanced=True)
    _split(run, "all", seed, subset="most-balanced:100%")
    size = read_manifest(balanced).table.num_rows
    _split(run, "imbalanced", seed, subset=f"least-balanced:{size}")
    filtered = read_manifest(_split(run, "gmm-balanced", seed, gmm="balanced")).table.num_rows
    _split(run, "most-balanced", seed, subset=f"most-balanced:{filtered}")
    names = []
    all_classes = _counts(run, "all")["train_by_class"]
    for name in ("all", "balanced", "imbalanced", "gmm-balanced", "most-balanced"):
        counts = _counts(run, name)["train_by_class"]
        fewest = min(counts.get(label, 0) for label in all_classes)
        if fewest < _MIN_PER_CLASS:
            log.warning("%s has %d training samples of a class: nothing is trained on it", name, fewest)
        else:
            names.append(name)
    return names


def _split(run: Path, name: str, seed: int, **selection: Any) -> Path:
    path = Run(run).manifest(name)
    if not path.exists():
        split(run=run, name=name, seed=seed, **selection)
    return path


def _counts(run: Path, name: str) -> dict[str, Any]:
    table = read_manifest(Run(run).manifest(name)).table
    splits, labels = table["split"].to_pylist(), table["label"].to_pylist()
    train = [str(label) for label, name_of_split in zip(labels, splits, strict=True) if name_of_split != "test"]
    return {"train": len(train), "train_by_class": {label: train.count(label) for label in sorted(set(train))}}


def _about(entry: StudySet, record: Mapping[str, Any], scores: ScoreTable) -> dict[str, Any]:
    """Return what the page states of the dataset and its scores."""
    report, groups = record["probe_report"], code_groups(scores.group)
    between = scores.default_between()
    values = scores.discrepancy(between).astype(np.float64)
    valid = ~np.isnan(values)
    leans = is_dominated(values[valid], 0.2).astype(float) - is_dominated(-values[valid], 0.2)
    return {
        "num_samples": len(scores),
        "num_test": 0 if scores.split is None else int((scores.split == "test").sum()),
        "num_classes": int(record["num_classes"]),
        "num_groups": record["num_groups"],
        "modalities": list(scores.modalities),
        "between": between,
        "accuracy": {row["name"]: row["value"] for row in report["probe_metrics"]},
        "reliability": (record["halves"] or {}).get("reliability", []),
        "lean": mean_interval(leans, None if groups is None else groups[valid]),
        "histogram": np.histogram(values[valid], bins=20, range=(-1, 1))[0].tolist(),
        "truth_text": entry.truth_text,
    }


def _comparison_numbers(comparison: Comparison, plan: StudyPlan) -> dict[str, Any]:
    """Return the tables of a comparison as JSON values, and the differences that published claims need."""
    content = comparison.to_dict()
    content.pop("folder")
    runs = comparison.runs[comparison.runs["subset"] == "all"]
    content["epochs"] = int(runs["epochs"].max())
    content["num_trainings"] = len(runs)
    content["accuracies"] = {
        f"{manifest}/{method}": [float(values.mean(axis=1).mean()), float(values.mean(axis=1).std())]
        for (manifest, method), values in comparison.correct.items()
    }
    conditions = {method for manifest, method in comparison.correct if manifest == "all"}
    pairs = [(name, "sum") for name in conditions if name.endswith("+sum")] + [("bss-l+sum", "bss-h+sum")]
    content["pairs"] = [
        {"method": a, "reference": b, **comparison.difference(f"all/{a}", f"all/{b}").to_dict()}
        for a, b in sorted(pairs)
        if a in conditions and b in conditions
    ]
    return content


def _against_shuffled(methods: Comparison, chance: Comparison) -> list[dict[str, Any]]:
    """Return the accuracy of each method, its lowest over seeds, and that on shuffled labels."""
    rows = []
    for (manifest, name), values in chance.correct.items():
        method = name.removeprefix("shuffled:")
        if (manifest, method) in methods.correct:
            accuracy = methods.correct[manifest, method].mean(axis=1)
            control = float(values.mean(axis=1).max())
            row = {"method": method, "accuracy": float(accuracy.mean()), "lowest": float(accuracy.min())}
            rows.append({**row, "shuffled": control, "above": bool(accuracy.min() > control)})
    return rows


def _probe_agreements(
    entry: StudySet, plan: StudyPlan, folder: Path, execution: Execution, scores: ScoreTable
) -> Iterator[dict[str, Any]]:
    """Score by other probes and with another seed, and yield their agreement with the scores of the study."""
    probes: dict[str, Mapping[str, Any]] = {"another seed": {"seed": execution.seed + 1}}
    probes |= {**plan.probes, **entry.probes}
    for name, changes in probes.items():
        run = folder / "probes" / name.replace(" ", "-")
        record = _score(entry, plan, run, execution, changes).record
        accuracy = {row["name"]: row["value"] for row in record["probe_report"]["probe_metrics"]}
        try:
            content = compare_scores(scores, Run(run).scores(), name_a="study", name_b=name).to_dict()
        except ScoreError as error:
            log.warning("%s is not compared: %s", name, error)
            continue
        yield {"name": name, "kind": "seed" if name == "another seed" else "probe", "accuracy": accuracy, **content}


def _network_agreements(comparison: Comparison, scores: ScoreTable) -> Iterator[dict[str, Any]]:
    """Yield, for each method on all samples, the agreement of the probes' discrepancies and its branches'."""
    between = scores.default_between()
    row_of = {name: row for row, name in enumerate(scores.sample_id.tolist())}
    rows = np.array([row_of.get(name, -1) for name in comparison.per_sample["sample_id"]], dtype=np.intp)
    is_scored = rows >= 0
    rows = rows[is_scored]
    label, ids = scores.label[rows], scores.sample_id[rows]
    group = None if scores.group is None else scores.group[rows]
    expected = scores.discrepancy(between)[rows]
    first, _, second = between.partition(":")
    reliability = reliability_by_folds(scores, (first, second)) if second else None
    for manifest, method in comparison.correct:
        spec = parse_method(method) if manifest == "all" and _is_method(method) else None
        if spec is None or comparison.folder is None:
            continue
        folders = sorted((comparison.folder / "cells" / manifest / spec.folder).glob("seed-*"))
        branches = [_branch_discrepancy(path, scores.modalities, between) for path in folders]
        values = [column[is_scored] for column in branches if column is not None]
        if not values:
            continue
        options: dict[str, Any] = {"sample_id": ids, "group": group}
        pairs = [
            rank_agreement(values[i], values[j], label=label, **options).value
            for i in range(len(values))
            for j in range(i)
        ]
        known = [value for value in pairs if value is not None]
        r = float(np.mean(known)) if known else None
        mean = np.mean(values, axis=0)
        rank = rank_agreement(expected, mean, label=label, **options)
        kappa = side_agreement(expected, mean, threshold=DOMINATED_THRESHOLDS[0], **options)
        of_network = None if r is None else reliability_of_mean(r, len(values))
        yield {
            "method": method,
            "rank": rank.to_dict(),
            "kappa": kappa.to_dict(),
            "between_seeds": r,
            "ceiling": ceiling(reliability, of_network),
            "num_seeds": len(values),
        }


def _is_method(text: str) -> bool:
    try:
        return bool(parse_method(text))
    except ConfigError:  # a control, such as "shuffled labels"
        return False


def _branch_discrepancy(folder: Path, modalities: Sequence[str], between: str) -> NDArray[np.float64] | None:
    """Return the discrepancies (n,) of a training's branches on the test samples; None where it diverged."""
    file = folder / "predictions.parquet"
    if not file.exists():
        return None
    table = read_table(file, error=RunError)
    names = [f"branch_{name}" for name in modalities]
    if not set(names) <= set(table.column_names):
        raise RunError(f"{folder} is damaged, it lacks {names[0]}: remove it")
    confidence = np.stack([table[name].to_numpy() for name in names], axis=1)
    return discrepancy_between(confidence, modalities, between).astype(np.float64)


def _recovery(entry: StudySet, scores: ScoreTable) -> dict[str, Any] | None:
    """Return how well the scores recover the planted discrepancy: rank agreement, and their mean by its level."""
    if entry.truth is None:
        return None
    table, _ = read_parquet(entry.truth, error=ManifestError)
    planted_of = dict(zip(table["sample_id"].to_pylist(), table["discrepancy"].to_pylist(), strict=True))
    planted = np.array([planted_of.get(name, np.nan) for name in scores.sample_id], dtype=np.float64)
    values = scores.discrepancy(":".join(scores.modalities[:2])).astype(np.float64)
    groups = code_groups(scores.group)
    rank = rank_agreement(planted, values, sample_id=scores.sample_id.tolist(), group=scores.group)
    valid = ~(np.isnan(planted) | np.isnan(values))
    steps = np.unique(planted[valid])
    if len(steps) > 2 * _PLANTED_LEVELS:
        edges = np.quantile(planted[valid], np.linspace(0, 1, _PLANTED_LEVELS + 1)[1:-1])
        code = np.searchsorted(edges, planted)
    else:
        code = np.searchsorted(steps, planted)
    levels = []
    for number in np.unique(code[valid]).tolist():
        rows = valid & (code == number)
        interval = mean_interval(values[rows], None if groups is None else groups[rows])
        levels.append({"planted": float(planted[rows].mean()), "n": int(rows.sum()), **interval})
    return {"rank": rank.to_dict(), "levels": levels}
