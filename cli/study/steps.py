"""Steps of a study of one dataset, each complete or absent: scores, subsets, comparisons, agreements, truth."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...audit.errors import ConfigError, ScoreError
from ...audit.scores.table import ScoreTable
from ...rebalance.manifest import read_manifest
from ...rebalance.score_agreement import compare_scores
from ...train.balancing import BALANCERS
from ...train.comparison.cells import parse_method
from ...train.sampling import SAMPLERS
from ..comparison.compare import compare
from ..config import RunConfig, parse_setting
from ..run import Run
from ..scoring import score
from ..splitting import split
from .numbers import about, against_shuffled, comparison_numbers, network_agreements, recovery

log = logging.getLogger("mmaudit")

_ON_SUBSETS = ("joint", "ogm-ge", "gblend", "greedy", "bss-h+sum")  # the methods of arXiv 2302.10912, and a curriculum
# Of other probes only their agreement is used: half of the time of an MLP, with a deviation over repeats all the same.
_AGREEMENT_ONLY = {"probe.repeats": 2, "probe.joint": False, "probe.control": False}
_MIN_PER_CLASS = 2  # training samples of a subset; ours


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
    run = folder / "run"
    record = _score(entry, plan, run, execution, {}).record
    scores = Run(run).scores()
    manifests = _write_manifests(run, execution.seed)
    chosen: dict[str, Any] = {"run": run, "seeds": plan.seeds, "seed": execution.seed, "config": plan.config}
    chosen |= {"jobs": execution.jobs, **execution.common()}
    everywhere = _training_settings(plan, plan.methods)
    methods = compare(manifest=["all"], method=plan.methods, name="methods", settings=everywhere, **chosen)
    on_subsets = [text for text in _ON_SUBSETS if text in plan.methods] or [plan.baseline]
    fewer = _training_settings(plan, on_subsets)
    subsets = compare(manifest=manifests, method=on_subsets, name="subsets", settings=fewer, **chosen)
    control = {"name": "shuffled", "controls": False, "settings": everywhere, **chosen, "seeds": 1}
    chance = compare(manifest=["all"], method=[f"shuffled:{text}" for text in plan.methods], **control)
    return {
        **about(record, scores),
        "truth_text": entry.truth_text,
        "manifests": {name: _counts(run, name) for name in manifests},
        "methods": comparison_numbers(methods),
        "subsets": comparison_numbers(subsets),
        "shuffled": against_shuffled(methods, chance),
        "probes": list(_probe_agreements(entry, plan, folder, execution, scores)),
        "networks": list(network_agreements(methods, scores)),
        "truth": recovery(entry.truth, scores),
    }


def _score(entry: StudySet, plan: StudyPlan, run: Path, execution: Execution, changes: Mapping[str, Any]) -> Any:
    settings = {"probe.learn_from": "train", **_scoring_settings(plan), **entry.settings, **changes}
    settings = {"seed": execution.seed, **settings}
    return score(entry.data, run=run, config=plan.config, settings=settings, **execution.common())


def _scoring_settings(plan: StudyPlan) -> dict[str, Any]:
    return {
        key: value for key, value in plan.settings.items() if key.startswith(("data.", "probe.", "media.", "network."))
    }


def _training_settings(plan: StudyPlan, methods: Sequence[str]) -> dict[str, Any]:
    """Return the settings of trainings, those of balancers that are not among the methods left out."""
    balancers = {parse_method(text).balancing or "joint" for text in methods}
    settings = {}
    for key, value in plan.settings.items():
        section, _, rest = key.partition(".")
        balancer = rest.partition(".")[0]
        is_used = section != "balancing" or any(name.split("-")[0] == balancer for name in balancers)
        if section not in ("data", "probe", "media") and is_used:
            settings[key] = value
    return settings


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


def _probe_agreements(
    entry: StudySet, plan: StudyPlan, folder: Path, execution: Execution, scores: ScoreTable
) -> Iterator[dict[str, Any]]:
    """Score by other probes and with another seed, and yield their agreement with the scores of the study."""
    probes: dict[str, Mapping[str, Any]] = {"another seed": {"seed": execution.seed + 1}}
    probes |= {name: {**_AGREEMENT_ONLY, **own} for name, own in {**plan.probes, **entry.probes}.items()}
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
