"""Trainings of a comparison: data loaded once per process, and cells that are complete or absent."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ...audit.errors import ManifestError, RunError, TrainError
from ...audit.features.encoders import function_version
from ...audit.features.matrix import MatrixInputs
from ...audit.hashing import digest
from ...audit.parsing import RequiredKeys, plain
from ...audit.storage import atomic_folder, read_json, write_json
from ...audit.workers import Progress, no_progress
from ...rebalance.manifest import read_dropped_batches
from ...rebalance.score_tables import check_same_dataset
from ...train.balancing import BALANCERS
from ...train.comparison.cells import (
    MethodSpec,
    class_and_missing_subsets,
    folder_name,
    planned_epochs,
    shuffle_labels,
)
from ...train.difference import Condition
from ...train.evaluate import subsets_of_rows
from ...train.examples import Examples
from ...train.finetune import Finetuned, finetune_on
from ...train.sampling import SAMPLERS
from ..config import RunConfig
from ..provenance import SourceOptions
from ..run import Run
from ..training_source import ManifestSource, decisive_settings
from .predictions import read_predictions, write_predictions

log = logging.getLogger("mmaudit")

_MAX_RESIDENT = 1 << 30  # bytes of features that are kept in memory between cells
_CODE = ("audit", "rebalance", "train")  # packages that results depend on
_STATISTICS = (  # computed anew from finished cells
    *(f"train/comparison/{name}.py" for name in ("arrays", "column_figure", "curves", "figures", "findings", "forest")),
    *(f"train/comparison/{name}.py" for name in ("metrics", "rows", "verdicts")),
    *("train/difference.py", "train/metric_intervals.py", "audit/figure_style.py", "audit/agreement.py"),
    "rebalance/score_agreement.py",
)
_CELL = RequiredKeys(
    made_by={"*": str},
    status=str,
    message=str,
    seconds=float,
    validation={"*": float},
    test={},
    samples_seen=int,
    rows_read=int,
    epochs=int,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What a process loads once: manifests of one dataset, joined with its features."""

    run: Path
    manifests: tuple[Path, ...]
    options: SourceOptions
    config: RunConfig
    num_workers: int

    def __hash__(self) -> int:
        return hash((self.run, self.manifests))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedManifests:
    """Examples of manifests with one common test set of n samples, its subsets (n,), and groups (n,) if any.

    saw_test_labels: names of manifests whose scores come from probes that were fitted on test labels too.
    """

    examples: Mapping[str, Examples]
    sources: Mapping[str, ManifestSource]
    between: str
    subsets: Mapping[str, NDArray[np.bool_]]
    test_ids: NDArray[np.object_]
    group: list[str] | None
    saw_test_labels: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One training: method, manifest, seed, its config, and the number of samples that it reads."""

    manifest: str
    method: MethodSpec
    seed: int
    config: RunConfig
    budget: int
    is_first: bool  # of its condition, whose warnings are logged
    setting: str = ""  # of a grid, by which it is one of the trainings that choose a setting, and is not tested

    @property
    def condition(self) -> Condition:
        """Manifest and method."""
        return self.manifest, self.method.name

    def folder(self, comparison: Path) -> Path:
        """Return the folder of the cell."""
        if self.setting:
            return comparison / "grid" / self.manifest / self.method.folder / folder_name(self.setting)
        return comparison / "cells" / self.manifest / self.method.folder / f"seed-{self.seed}"

    @property
    def key(self) -> str:
        """Text that is unique among the cells of a comparison."""
        return "/".join((*self.condition, str(self.seed)))

    @property
    def label(self) -> str:
        """Text of the cell for progress and messages."""
        return f"{self.method.name} on {self.manifest}, {self.setting or f'seed {self.seed}'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """Content of cell.json, and correctness of the test samples (n,); None where training diverged.

    without: correctness (n,) with a modality absent, by modality. folder: that of the cell.
    """

    about: Mapping[str, Any]
    correct: NDArray[np.float64] | None
    without: Mapping[str, NDArray[np.float64]]
    folder: Path


def load_manifests(loading: Loading, progress: Progress = no_progress) -> LoadedManifests:
    """Load the manifests, of which the data are read once; until `clear_loaded`, a second call returns the same.

    Raises:
        ManifestError: The task is not classification, a manifest is of another dataset, has other classes or trains on
            test samples of another one, or there are no common test samples.
    """
    if loading not in _loaded:
        _loaded.clear()
        _loaded[loading] = _load(loading, progress)
    return _loaded[loading]


_loaded: dict[Loading, LoadedManifests] = {}  # of this process


def clear_loaded() -> None:
    """Free what `load_manifests` keeps in memory; files may have changed by the next comparison."""
    _loaded.clear()


def _load(loading: Loading, progress: Progress) -> LoadedManifests:
    run_dir = Run(loading.run)
    opened = [ManifestSource.open(path, run_dir, loading.options) for path in loading.manifests]
    sources = {path.stem: source for path, source in zip(loading.manifests, opened, strict=True)}
    first = opened[0]
    for source in opened[1:]:
        scores = [entry.manifest.provenance.get("scores", {}) for entry in (first, source)]
        check_same_dataset(scores[0], scores[1], name=str(source.path))
    if (task := first.task(loading.config)) != "classification":
        raise ManifestError(f"compare needs classes, whose predictions are right or wrong; the scores are of {task}")
    encoded = first.read(loading.config, num_workers=loading.num_workers, progress=progress)
    loaded = {name: source.join(encoded, loading.config) for name, source in sources.items()}
    examples, test_ids = _with_common_test({name: entry.examples for name, entry in loaded.items()})
    examples = {name: _in_memory(entry, len(examples)) for name, entry in examples.items()}
    first_examples, between = examples[next(iter(examples))], next(iter(loaded.values())).between
    test = first_examples.rows("test")
    return LoadedManifests(
        examples=examples,
        sources=sources,
        between=between,
        subsets=subsets_of_rows(first_examples, test, between=between)
        | class_and_missing_subsets(first_examples, test),
        test_ids=test_ids,
        group=_groups(first, test_ids),
        saw_test_labels=tuple(name for name, entry in loaded.items() if entry.saw_test_labels),
    )


def _with_common_test(examples: Mapping[str, Examples]) -> tuple[dict[str, Examples], NDArray[np.object_]]:
    """Restrict the test samples to those of all manifests; the others are left out."""
    test_ids = {name: set(entry.ids(entry.rows("test"))) for name, entry in examples.items()}
    common = set.intersection(*test_ids.values())
    if not common:
        raise ManifestError(
            "the manifests have no common test samples: where the data have none, mmaudit split --resplit 80/8/12 cuts "
            "some"
        )
    first = next(iter(examples.values()))
    for name, entry in examples.items():
        learned = set(entry.ids(np.flatnonzero(np.isin(entry.split.astype(str), ("train", "validation")))))
        if leaked := learned & set.union(*test_ids.values()):
            raise ManifestError(
                f"{name} trains on test samples of another manifest (the first: {min(leaked)}): compare manifests of "
                "the same splits"
            )
        if (entry.class_names, entry.modalities) != (first.class_names, first.modalities):
            raise ManifestError(f"{name} has other classes or modalities than {next(iter(examples))}")
        if len(test_ids[name]) > len(common):
            log.warning(
                "%d test samples of %s are not in all manifests and are left out", len(test_ids[name] - common), name
            )
    restricted = {}
    for name, entry in examples.items():
        is_common = pc.is_in(entry.sample_id, value_set=pa.array(sorted(common), pa.large_string())).to_numpy(False)
        restricted[name] = replace(entry, split=np.where((entry.split == "test") & ~is_common, "unused", entry.split))
    example = restricted[next(iter(restricted))]
    return restricted, example.ids(example.rows("test"))


def _in_memory(examples: Examples, num_manifests: int) -> Examples:
    """Read the features into memory if those of all manifests are not too large: cells then read no files."""
    size = sum(4 * matrix.num_rows * matrix.num_features for matrix in examples.inputs)
    if size * num_manifests > _MAX_RESIDENT:
        return examples
    rows = np.arange(len(examples))
    return replace(examples, inputs=tuple(MatrixInputs(matrix=matrix.read(rows)) for matrix in examples.inputs))


def _groups(source: ManifestSource, test_ids: NDArray[np.object_]) -> list[str] | None:
    """Return the group of each test sample; None without groups."""
    columns = ["sample_id", "group"]
    dropped = read_dropped_batches(source.path, source.manifest, columns=columns)
    group_of = {
        sample_id: group
        for batch in chain(source.manifest.batches(columns), dropped or ())
        for sample_id, group in zip(batch["sample_id"].to_pylist(), batch["group"].to_pylist(), strict=True)
    }
    groups = [group_of.get(sample_id) for sample_id in test_ids]
    return None if any(group is None for group in groups) else [str(group) for group in groups]


def with_epochs(cell: Cell, loaded: LoadedManifests) -> Cell:
    """Return the cell with as many epochs as read its number of samples."""
    num_train = len(loaded.examples[cell.manifest].rows("train"))
    epochs = planned_epochs(cell.config.training(), num_train=num_train, budget=cell.budget)
    return replace(cell, config=replace(cell.config, finetune=replace(cell.config.finetune, epochs=epochs)))


def made_by(cell: Cell, loaded: LoadedManifests) -> dict[str, str]:
    """Return digests of what a cell depends on: code, data, settings."""
    examples = loaded.examples[cell.manifest]
    scores = loaded.sources[cell.manifest].manifest.provenance.get("scores", {})
    texts = [examples.ids(), examples.content.astype(str), examples.split, examples.label]
    preprocessing = json.dumps([scores.get("fingerprint"), scores.get("modalities")], sort_keys=True, default=str)
    settings = decisive_settings(plain(cell.config.training()))
    shuffled, finetune = cell.method.shuffled, cell.config.finetune
    code = [_code_digest(), SAMPLERS.source_digest(finetune.sampling), BALANCERS.source_digest(finetune.balancing)]
    code += [] if finetune.model is None else [function_version(finetune.model)]
    return {
        "code": digest(" ".join(code).encode()),
        "data": digest(preprocessing.encode(), *("\0".join(map(str, column)).encode() for column in texts)),
        "settings": digest(json.dumps([settings, cell.seed, cell.budget, shuffled], sort_keys=True).encode()),
    }


@lru_cache(maxsize=1)
def _code_digest() -> str:
    """Return a digest of the source files that results depend on, and of the versions beneath them."""
    root = Path(__file__).parents[2]
    is_statistics = {root / name for name in _STATISTICS}
    files = [path for name in _CODE for path in sorted((root / name).rglob("*.py")) if path not in is_statistics]
    versions = [f"{name} {version(name)}" for name in ("torch", "numpy")] + [platform.machine()]
    return digest("\n".join(versions).encode(), *(path.read_bytes() for path in files))


def read_cell(folder: Path, cell: Cell, loaded: LoadedManifests) -> CellResult | None:
    """Read a finished cell; None where there is none. Raises RunError for one of other code, data or settings."""
    if not folder.exists():
        return None
    about = read_json(folder / "cell.json", error=RunError, shape=_CELL)
    current = made_by(cell, loaded)
    differing = [name for name in current if about["made_by"].get(name) != current[name]]
    if differing:
        raise RunError(
            f"{folder} was trained with other {' and '.join(differing)}: pass another --name, or remove "
            f"{folder.parents[3]}"
        )
    if about["status"] != "finished" or cell.setting:
        return CellResult(about=about, correct=None, without={}, folder=folder)
    modalities = loaded.examples[cell.manifest].modalities
    names = ["correct", *(f"correct_without_{modality}" for modality in modalities)]
    table = read_predictions(folder, loaded.test_ids, columns=names)
    correct, *without = (np.array(table[name].to_pylist(), dtype=np.float64) for name in names)
    return CellResult(about=about, correct=correct, without=dict(zip(modalities, without, strict=True)), folder=folder)


def train_cell(
    cell: Cell, *, loading: Loading, comparison: Path, device: str, progress: Progress = no_progress
) -> float:
    """Train and test a cell, write its folder whole, and return the seconds that it took."""
    loaded, started = load_manifests(loading), time.monotonic()
    if (finished := read_cell(cell.folder(comparison), cell, loaded)) is not None:  # by another shard meanwhile
        return float(finished.about["seconds"])
    about: dict[str, Any] = {
        "manifest": cell.manifest,
        "method": cell.method.name,
        "seed": cell.seed,
        "setting": cell.setting,
        "made_by": made_by(cell, loaded),
        "config": plain(cell.config.training()),
        "status": "finished",
        "message": "",
        "validation": {},
        "test": {},
        "samples_seen": 0,
        "rows_read": 0,
        "epochs": 0,
    }
    with atomic_folder(cell.folder(comparison)) as target:
        with quiet(not cell.is_first):
            try:
                result = train(cell, loaded, device=device, progress=progress)
                about |= _state_training(result)
                about |= {} if cell.setting else write_predictions(result, loaded.examples[cell.manifest], target)
            except TrainError as error:
                about |= {"status": "diverged", "message": str(error)}
        seconds = time.monotonic() - started
        write_json({**about, "seconds": seconds}, target / "cell.json")
    return seconds


def train(
    cell: Cell, loaded: LoadedManifests, *, device: str, progress: Progress, max_samples: int | None = None
) -> Finetuned:
    """Train a cell without writing files: a cell is complete or absent, so that no state of it is resumed."""
    examples = loaded.examples[cell.manifest]
    if cell.method.only is not None:
        examples = examples.only(cell.method.only)
    if cell.method.shuffled:
        examples = shuffle_labels(examples, seed=cell.seed)
    return finetune_on(
        examples,
        None,
        config=cell.config.training(),
        between=loaded.between,
        seed=cell.seed,
        device=device,
        progress=progress,
        max_samples=cell.budget if max_samples is None else max_samples,
    )


def _state_training(result: Finetuned) -> dict[str, Any]:
    """Return what cell.json states of the training: its length, and the validation results of the tested epoch."""
    epoch = result.history[result.metrics["best_epoch"] - 1]
    names = {"accuracy": "validation_accuracy", "loss": "validation_loss"}
    return {
        "validation": {name: epoch[key] for name, key in names.items() if key in epoch},
        "samples_seen": result.metrics["samples_seen"],
        "rows_read": result.metrics["rows_read"],
        "epochs": len(result.history),
    }


@contextmanager
def quiet(is_quiet: bool) -> Iterator[None]:
    """Log errors only, where the same lines were logged before."""
    level = log.level
    log.setLevel(logging.ERROR if is_quiet else level)
    try:
        yield
    finally:
        log.setLevel(level)
