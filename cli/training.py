"""The commands of training: finetune, evaluate, methods."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..audit.dataset.formats import READERS
from ..audit.dataset.samples import read_samples
from ..audit.downloads import DOWNLOADS
from ..audit.errors import ConfigError, ManifestError, RunError, choices
from ..audit.features.encode import encode_dataset
from ..audit.features.encoded_samples import collect_encoded
from ..audit.features.encoders import ENCODERS
from ..audit.locks import WAIT_SECONDS, Lock, write_lock
from ..audit.parsing import build_config, plain
from ..audit.storage import write_json, write_text
from ..audit.workers import Progress, default_workers, no_progress
from ..rebalance import EXPORTERS
from ..rebalance.manifest import Manifest, read_dropped, read_manifest
from ..train import FUSIONS, TRACKERS
from ..train.balancing import BALANCERS
from ..train.config import TrainConfig
from ..train.evaluate import evaluate_file
from ..train.examples import Examples, load_examples
from ..train.finetune import finetune_on
from ..train.methods import MethodRow, list_methods, resolve
from ..train.optimizer import DistributedContext, local_device, open_distributed
from ..train.sampling import SAMPLERS
from ..train.tracking import load_trackers
from .config import RunConfig, load_config, to_toml, without_none
from .progress import progress_bars
from .provenance import SourceOptions, open_source, origin_of, own_record, saw_test_labels
from .run import Run, new_finetune, read_metrics, swap_finetune
from .scoring import pairs, pick_device

log = logging.getLogger("mmaudit")

_REGISTRIES = {
    "download": DOWNLOADS,
    "reader": READERS,
    "encoder": ENCODERS,
    "exporter": EXPORTERS,
    "sampler": SAMPLERS,
    "balancer": BALANCERS,
    "fusion": FUSIONS,
    "tracker": TRACKERS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult:
    """Result of `finetune`.

    Attributes:
        name: Name of the fine-tuning in the run.
        folder: Its folder, which holds the weights, config.toml and history.jsonl.
        accuracy: Accuracy of the fused prediction on the test samples, in [0, 1].
        metrics: Content of metrics.json.
    """

    name: str
    folder: Path
    accuracy: float
    metrics: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of metrics.json."""
        return self.metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """Result of `evaluate`.

    Attributes:
        name: Name of the fine-tuning.
        file: The file with the results.
        accuracy: Accuracy of the fused prediction, in [0, 1].
        metrics: Content of the file.
    """

    name: str
    file: Path
    accuracy: float
    metrics: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file, and its path."""
        return {**self.metrics, "file": str(self.file)}


def finetune(
    manifest: str | Path,
    *,
    run: str | Path = "mmaudit-run",
    sampling: str | None = None,
    balancing: str | None = None,
    fusion: str | None = None,
    name: str | None = None,
    report_to: str | None = None,
    overwrite: bool = False,
    only: str | None = None,
    init: str | None = None,
    keep_posterior: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    data: str | Path | None = None,
    encoder: Mapping[str, str] | Sequence[str] | None = None,
    allow_outside: bool = False,
    seed: int | None = None,
    device: str = "auto",
    num_workers: int | None = None,
    config: RunConfig | str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    progress: bool = True,
) -> FinetuneResult:
    """Train a network on a manifest, and test it overall and by subset. Works under torchrun -m -- mmaudit.

    A finished fine-tuning of the same settings is not changed, an interrupted one is resumed. Under torchrun its
    processes train together, and rank 0 writes. A manifest that was not made by this user on this machine needs `data`,
    `encoder` and `allow_outside`.

    Args:
        manifest: Manifest file, or its name in the run.
        run: Run folder.
        sampling: Which samples each step uses, in which order; by default uniform.
        balancing: Loss, and what is done to its gradients; by default joint, or as the sampling needs.
        fusion: Fusion of the features; by default concat, or as the balancing needs.
        name: Name of this fine-tuning; by default made of the manifest and the methods.
        report_to: Experiment trackers, separated by commas; by default none.
        overwrite: Replace a finished fine-tuning of that name.
        only: Train on one modality only.
        init: Initial weights: a fine-tuning's name in the run, or a file.
        keep_posterior: Train only on samples with P(balanced) of at least this.
        epochs: Number of epochs; by default 60.
        batch_size: Samples per step; by default 64.
        lr: Learning rate; by default 0.001.
        data: The data; also if your own data moved.
        encoder: Confirm the encoder (code or model) of a modality.
        allow_outside: Allow paths outside the data folder.
        seed: Random seed; by default 0.
        device: auto, cpu or cuda.
        num_workers: Processes that decode media; 0: none; by default one per CPU.
        config: TOML file with settings; in Python also a RunConfig.
        settings: One setting, such as optim.ema=0.99; in Python also {"optim.ema": 0.99}.
        progress: Show a progress bar in a terminal or notebook.

    Returns:
        The folder of the fine-tuning and the content of metrics.json.

    Raises:
        ManifestError: The manifest or its source was not found, or has changed.
        ConfigError: The settings do not fit the manifest, or contradict each other.
        RunError: The folder holds a fine-tuning of other settings and `overwrite` is False.
        TrainError: Training diverged.

    Example:
        >>> mmaudit.finetune("balanced", sampling="bss-h", epochs=20).accuracy
    """
    keywords = {
        "seed": seed,
        "finetune.sampling": sampling,
        "finetune.balancing": balancing,
        "finetune.fusion": fusion,
        "finetune.only": only,
        "finetune.init": init,
        "finetune.keep_posterior": keep_posterior,
        "finetune.epochs": epochs,
        "finetune.batch_size": batch_size,
        "finetune.report_to": None if report_to is None else report_to.split(","),
        "optim.lr": lr,
    }
    config = _resolve_methods(load_config(config, settings, keywords))
    options = SourceOptions(data=data, encoder=pairs(encoder) or (), allow_outside=allow_outside)
    run_dir = Run.open(run)
    path = run_dir.find_manifest(str(manifest))
    opened = read_manifest(path)
    folder = run_dir.finetune(name or _finetune_name(path.stem, config))
    resolved = {**_settings(config), "manifest": path.stem}
    if (folder / "metrics.json").exists() and not overwrite:
        return _result(folder, _finished(folder, resolved, opened))
    weights = None if config.finetune.init is None else _find_model(run_dir, config.finetune.init)
    if overwrite and weights is not None and folder.resolve() in weights.resolve().parents:
        raise ConfigError(f"--overwrite would delete {weights}, which --init loads: pass another --name")
    if config.finetune.report_to:
        load_trackers(config.finetune.report_to)  # before any data is read
    device = local_device(pick_device(device))
    target = new_finetune(run_dir.folder, folder.name) if overwrite else folder  # moved to `folder` when finished
    with (
        progress_bars(progress) as report_progress,
        open_distributed(device) as distributed,
        _writer(run_dir, folder.name, distributed) as lock,
    ):
        if not distributed.is_first:
            report_progress = no_progress
        with _first_rank_first(distributed):
            workers = default_workers() if num_workers is None else num_workers
            examples = _examples_of(
                opened, path, run_dir, options, config, num_workers=workers, progress=report_progress
            )
        only = config.finetune.only
        result = finetune_on(
            examples if only is None else examples.only(only),
            target,
            config=_with_width(config, opened).training(),
            between=_between(opened, examples),
            seed=config.seed,
            device=device,
            progress=report_progress,
            distributed=distributed,
            init=weights,
        )
        metrics = {
            "manifest": path.stem,
            "manifest_digest": opened.digest(),
            "test_labels_in_scores": saw_test_labels(opened),
            "config": resolved,
            "made_from": opened.provenance,
            **result.metrics,
        }
        if lock is not None:
            training_settings = {key: value for key, value in resolved.items() if key != "manifest"}
            lock.check()
            write_text(to_toml(training_settings), target / "config.toml")
            write_json(metrics, target / "metrics.json")  # written last: it marks a finished fine-tuning
            swap_finetune(run_dir.folder, folder.name)
    return _result(folder, metrics)


def evaluate(
    name: str,
    *,
    run: str | Path = "mmaudit-run",
    manifest: str | Path | None = None,
    split: str = "test",
    data: str | Path | None = None,
    encoder: Mapping[str, str] | Sequence[str] | None = None,
    allow_outside: bool = False,
    device: str = "auto",
    num_workers: int | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Test a finished fine-tuning: metrics by subset and class, and the contribution of each modality.

    Measured are accuracy, MAP, macro-F1 and ECE of the fused prediction and of each modality alone, overall, by subset
    and by class; the contribution of each modality; and the samples that are predicted correctly by one modality alone
    but not by all together. They are written to evaluation.json in its folder; of other splits to
    evaluation-SPLIT.json, of other manifests to evaluation-SPLIT-MANIFEST.json.

    Args:
        name: Name of a finished fine-tuning in the run, or its folder.
        run: Run folder.
        manifest: Manifest to test on; by default its training manifest.
        split: test, validation or train.
        data: The data; also if your own data moved.
        encoder: Confirm the encoder (code or model) of a modality.
        allow_outside: Allow paths outside the data folder.
        device: auto, cpu or cuda.
        num_workers: Processes that decode media; 0: none; by default one per CPU.
        progress: Show a progress bar in a terminal or notebook.

    Returns:
        The results and their file. With `manifest`, `metrics["num_trained_on"]` counts the samples that were used in
        training or validation; None if unknown.

    Raises:
        RunError: The fine-tuning was not found, or its manifest has changed.
        ManifestError: The manifest or the data were not found, or have changed.

    Example:
        >>> mmaudit.evaluate("balanced-concat-bss-h").metrics["contribution"]
    """
    run_dir = Run.open(run)
    folder = _find_finetune(run_dir, name)
    metrics = read_metrics(folder)
    config = build_config(
        RunConfig, without_none({k: v for k, v in metrics["config"].items() if k != "manifest"}), where=""
    )
    path = run_dir.find_manifest(str(manifest)) if manifest is not None else run_dir.own_manifest(metrics["manifest"])
    opened = read_manifest(path)
    if manifest is None and opened.digest() != metrics["manifest_digest"]:
        raise RunError(f"{path} has changed since {folder.name} was trained on it; pass a manifest with --manifest")
    workers = default_workers() if num_workers is None else num_workers
    options = SourceOptions(data=data, encoder=pairs(encoder) or (), allow_outside=allow_outside)
    own = manifest is None and split == "test"
    file = folder / ("-".join(["evaluation"] + ([] if own else [split]) + ([path.stem] if manifest else [])) + ".json")
    with progress_bars(progress) as report_progress, _evaluation_lock(run_dir, file):
        examples = _examples_of(opened, path, run_dir, options, config, num_workers=workers, progress=report_progress)
        if config.finetune.only is not None:
            examples = examples.only(config.finetune.only)
        measured = evaluate_file(
            folder / "model.safetensors",
            examples,
            split=split,
            between=_between(opened, examples),
            config=config.training(),
            seed=config.seed,
            device=pick_device(device),
        )
        result = {"name": folder.name, "manifest": path.stem, "split": split, **measured}
        if manifest is not None:
            result["num_trained_on"] = _count_learned(run_dir, metrics, examples.sample_id[examples.rows(split)])
        write_json(result, file)
    accuracy = result["test"]["all"]["branches"]["fused"]["accuracy"]
    return EvaluationResult(name=folder.name, file=file, accuracy=accuracy, metrics=result)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodTable:
    """Result of `methods`.

    Attributes:
        rows: One row for each method, in the order of the pipeline: kind, name, help, paper, needs and settings.
    """

    rows: tuple[MethodRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the rows as JSON values."""
        return {"methods": [asdict(row) for row in self.rows]}


def methods(*, kind: str | None = None) -> MethodTable:
    """List the methods by name, built in and installed, with what they need and their settings.

    Args:
        kind: Only methods of this kind: download, reader, encoder, exporter, sampler, balancer, fusion or tracker.

    Returns:
        The methods; installed ones are not imported.

    Raises:
        ConfigError: There is no such kind.

    Example:
        >>> [row.name for row in mmaudit.methods(kind="sampler").rows][:2]
        ['uniform', 'bss-h']
    """
    if kind is not None and kind not in _REGISTRIES:
        raise ConfigError(f"--kind {kind}: no such kind; {choices(kind, _REGISTRIES)}")
    registries = _REGISTRIES if kind is None else {kind: _REGISTRIES[kind]}
    return MethodTable(rows=tuple(list_methods(registries)))


def _result(folder: Path, metrics: dict[str, Any]) -> FinetuneResult:
    accuracy = metrics["test"]["all"]["branches"]["fused"]["accuracy"]
    return FinetuneResult(name=folder.name, folder=folder, accuracy=accuracy, metrics=metrics)


def read_examples(
    manifest: str | Path,
    *,
    run: str | Path = "mmaudit-run",
    options: SourceOptions | None = None,
    config: RunConfig | None = None,
    num_workers: int = 0,
    progress: Progress = no_progress,
) -> Examples:
    """Load the training and test examples of a manifest, given by file or by name in the run."""
    run_dir = Run.open(run)
    path = run_dir.find_manifest(str(manifest))
    opened, options, config = read_manifest(path), options or SourceOptions(), config or RunConfig()
    return _examples_of(opened, path, run_dir, options, config, num_workers=num_workers, progress=progress)


@contextmanager
def _writer(run_dir: Run, name: str, distributed: DistributedContext) -> Iterator[Lock | None]:
    """Lock a fine-tuning's folder in the process that writes it, rank 0; yield None in the others."""
    if not distributed.is_first:
        yield None
        return
    with write_lock(run_dir.folder, f"finetune/{name}", command="mmaudit finetune") as lock:
        yield lock


def _evaluation_lock(run_dir: Run, file: Path) -> AbstractContextManager[Lock]:
    """Return a lock on an evaluation file, within the run if the fine-tuning belongs to it."""
    folder = file.parent
    in_run = folder.absolute() == run_dir.finetune(folder.name).absolute()
    root, scope = (run_dir.folder, f"finetune/{folder.name}/{file.name}") if in_run else (folder, file.name)
    return write_lock(root, scope, command="mmaudit evaluate", wait_seconds=WAIT_SECONDS)


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that a fine-tuning depends on, as plain values by section."""
    sections = [name for name in TrainConfig.__dataclass_fields__ if name != "width"]
    return {name: plain(config)[name] for name in ("seed", *sections, "network")}


def _resolve_methods(config: RunConfig) -> RunConfig:
    """Return the config with the names and all constants of the methods in use."""
    resolved = resolve(config.training()).config
    return replace(config, **{name: getattr(resolved, name) for name in ("finetune", "sampling", "balancing")})


def _with_width(config: RunConfig, manifest: Manifest) -> RunConfig:
    """Return the config with the network width of the manifest's scores, unless another width is requested."""
    scored = manifest.provenance.get("scores", {}).get("config", {}).get("network", {}).get("width", 1.0)
    is_requested = config.network.width != RunConfig().network.width
    return config if is_requested else replace(config, network=replace(config.network, width=float(scored)))


def _between(manifest: Manifest, examples: Examples) -> str:
    return str(manifest.provenance.get("between", ":".join(examples.modalities[:2])))


@contextmanager
def _first_rank_first(distributed: DistributedContext) -> Iterator[None]:
    """Run the block in rank 0 before the other ranks: it encodes, and they read its cache."""
    if not distributed.is_first:
        logging.getLogger("mmaudit").setLevel(logging.WARNING)
        distributed.wait()
    yield
    if distributed.is_first:
        distributed.wait()


def _examples_of(
    manifest: Manifest,
    path: Path,
    run_dir: Run,
    options: SourceOptions,
    config: RunConfig,
    *,
    num_workers: int,
    progress: Progress,
) -> Examples:
    """Open a manifest's source, encode what the run's cache lacks, and load the training and test examples.

    Media that are unchanged since the run cached their vectors, by path, size and times, are not opened.
    """
    origin = origin_of(path, manifest.provenance, manifest.digests)
    dataset, scored_config = open_source(origin, options)
    _check_trainable(scored_config)
    tasks = encode_dataset(
        dataset,
        run_dir.features,
        media=scored_config.media,
        num_workers=num_workers,
        progress=progress,
        trust_unchanged=own_record(run_dir.folder)[0] is not None,  # others could have planted vectors in the cache
    )
    samples = read_samples(dataset, seed=scored_config.seed, test_fraction=scored_config.data.test_fraction)
    dropped = read_dropped(path, manifest)
    if dropped is None:
        log.info("no dropped rows of %s found: test metrics are on the manifest's own test samples only", path.name)
    return load_examples(
        manifest,
        dropped,
        samples=samples,
        statuses=collect_encoded(dataset, samples, tasks).statuses,
        tasks=tasks,
        validation_fraction=config.finetune.validation_fraction,
        seed=config.seed,
    )


def _count_learned(run_dir: Run, metrics: dict[str, Any], sample_ids: Iterable[str]) -> int | None:
    """Count samples used in training or validation; None if the fine-tuning's manifest was removed or has changed."""
    try:
        own = read_manifest(run_dir.own_manifest(metrics["manifest"]))
    except (RunError, ManifestError):
        return None
    if own.digest() != metrics["manifest_digest"]:
        return None
    splits = zip(own.table["sample_id"].to_pylist(), own.table["split"].to_pylist(), strict=True)
    return len({name for name, split in splits if split != "test"}.intersection(sample_ids))


def _check_trainable(scored_config: RunConfig) -> None:
    """Raise ConfigError if the task of a manifest's scores is not classification."""
    if scored_config.data.task != "classification":
        raise ConfigError(f"finetune requires task classification; the manifest's task is {scored_config.data.task}")


def _finetune_name(manifest: str, config: RunConfig) -> str:
    finetune_config = config.finetune
    parts = [manifest, finetune_config.fusion, finetune_config.sampling]
    parts += [finetune_config.balancing] if finetune_config.balancing != "joint" else []
    parts += [f"only-{finetune_config.only}"] if finetune_config.only else []
    parts += [f"p{finetune_config.keep_posterior:g}"] if finetune_config.keep_posterior is not None else []
    parts += [f"from-{Path(finetune_config.init).stem}"] if finetune_config.init else []
    return "-".join(parts)


def _find_finetune(run_dir: Run, name: str) -> Path:
    """Return the folder of a finished fine-tuning, given by its path or by its name in the run."""
    names = [folder.name for folder in run_dir.finetunes()]
    if name in names:
        return run_dir.finetune(name)
    if (Path(name) / "metrics.json").is_file():
        return Path(name)
    raise RunError(f"no finished fine-tuning {name} in {run_dir.folder}; {choices(name, names)}")


def _find_model(run_dir: Run, name: str) -> Path:
    """Return the weights file of --init: of a fine-tuning of the run, of a fine-tuning's folder, or the file itself."""
    if Path(name).is_file():
        return Path(name)
    return _find_finetune(run_dir, name) / "model.safetensors"


def _finished(folder: Path, settings: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    metrics = read_metrics(folder)
    is_same = _decisive_settings(metrics["config"]) == _decisive_settings(settings)
    if not is_same or metrics["manifest_digest"] != manifest.digest():
        raise RunError(f"{folder} holds a fine-tuning of other settings: pass another --name, or --overwrite")
    log.info("%s is already trained with these settings: nothing to do", folder)
    return metrics


def _decisive_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Remove settings that have no effect on the weights: trackers, checkpoint interval, resident memory."""
    without_effect = ("report_to", "save_steps", "resident_mib")
    finetune_settings = {key: value for key, value in settings.get("finetune", {}).items() if key not in without_effect}
    return {**settings, "finetune": finetune_settings}
