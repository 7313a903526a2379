"""The command finetune: a network trained on a manifest, or on data without scores."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..audit.engine.executors import choose_engine
from ..audit.errors import ConfigError, RunError, choices, quarantine_table
from ..audit.features.encoders import function_file, function_version
from ..audit.locks import Lock, write_lock
from ..audit.storage import write_json, write_parquet, write_text
from ..audit.workers import default_workers, no_progress, release_memory
from ..train.backbones import check_lora
from ..train.finetune import finetune_on
from ..train.methods import check_task, resolve
from ..train.optimizer import DistributedContext, local_device, open_distributed
from ..train.task_metrics import metrics_of
from ..train.tracking import load_trackers
from ..train.unscored import check_without_scores
from .config import RunConfig, load_settings, to_toml
from .effects import check_media_settings, effects_in_training, warn_without_effect, with_engine
from .progress import progress_bars
from .provenance import SourceOptions
from .remote_run import RemoteRun, share_files, with_run
from .run import Run, read_metrics
from .scoring import data_settings, pairs, pick_device
from .swap import new_finetune, swap_finetune
from .training_source import (
    LoadedSource,
    ManifestSource,
    UnscoredSource,
    decisive_settings,
    record_preset,
    resolve_methods,
    training_settings,
)

log = logging.getLogger("mmaudit")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult:
    """Result of `finetune`.

    Attributes:
        name: Name of the fine-tuning in the run.
        folder: Its folder, which holds the weights, config.toml and history.jsonl.
        accuracy: Accuracy of the fused prediction on the test samples, in [0, 1]; NaN where the task has no classes.
        value: Main metric of the task: that accuracy, the MAP of label sets, or the mean absolute error of numbers.
        metrics: Content of metrics.json.
    """

    name: str
    folder: Path
    accuracy: float
    value: float
    metrics: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of metrics.json."""
        return self.metrics


@with_run("stages", writes=True, in_processes=True)
def finetune(
    manifest: str | Path | None = None,
    *,
    run: str | Path = "mmaudit-run",
    preset: str | None = None,
    sampling: str | None = None,
    balancing: str | None = None,
    fusion: str | None = None,
    model: str | None = None,
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
    modality: Mapping[str, str] | Sequence[str] | None = None,
    encoder: Mapping[str, str] | Sequence[str] | None = None,
    task: str | None = None,
    label: str | None = None,
    id: str | None = None,
    group: str | None = None,
    split: str | None = None,
    allow_outside: bool = False,
    seed: int | None = None,
    device: str = "auto",
    num_workers: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    config: RunConfig | str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    progress: bool = True,
) -> FinetuneResult:
    """Train a network on a manifest, or on all samples of data without scores, and test it. Works under torchrun.

    A finished fine-tuning of the same settings is not changed, an interrupted one is resumed. Under torchrun its
    processes train together, and rank 0 writes. A manifest that was not made by this user on this machine needs `data`,
    `encoder` and `allow_outside`. Without a manifest, methods that read scores are refused, and there are no metrics by
    subset.

    Args:
        manifest: Manifest file, or its name in the run; by default none, and all samples of the data are used.
        run: Run folder, a path or a URL.
        preset: Published protocol, listed by `mmaudit methods --presets`; other options and settings override it.
        sampling: Which samples each step uses, in which order; by default uniform.
        balancing: Loss, and what is done to its gradients; by default joint, or as the sampling needs.
        fusion: Fusion of the features; by default concat, or as the balancing needs.
        model: A network of yours, package.module:factory (code), in place of mmaudit's; see MultimodalModel.
        name: Name of this fine-tuning; by default made of the manifest and the methods.
        report_to: Experiment trackers, separated by commas; by default none.
        overwrite: Replace a finished fine-tuning of that name.
        only: Train on one modality only.
        init: Initial weights: a fine-tuning's name in the run, or a file.
        keep_posterior: Train only on samples with P(balanced) of at least this.
        epochs: Number of epochs; by default 60.
        batch_size: Samples per step; by default 64.
        lr: Learning rate; by default 0.001.
        data: The data: without a manifest what is trained on, with one its data, also if your own data moved.
        modality: Without a manifest: modality, its column and kind.
        encoder: Encoder of a modality; with a manifest, confirm it (code or model).
        task: Without a manifest: classification, multilabel or regression; by default classification.
        label: Without a manifest: label column.
        id: Without a manifest: id column.
        group: Without a manifest: group column.
        split: Without a manifest: split column; none: cut a test split.
        allow_outside: Allow paths outside the data folder.
        seed: Random seed; by default 0.
        device: auto, cpu or cuda.
        num_workers: Processes that decode media; 0: none; by default one per CPU. With Ray those that train together.
        engine: local, or ray to train in several processes of a Ray cluster.
        ray_address: HOST:PORT of a Ray cluster, or auto; by default RAY_ADDRESS, else a cluster of this machine.
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
        >>> mmaudit.finetune(data="crema-d", preset="ogm-ge-cremad").accuracy
    """
    arguments = dict(locals())
    columns = {"task": task, "label": label, "id": id, "group": group, "split": split}
    _check_source(manifest, data, {"modality": modality, **columns})
    keywords = {
        "seed": seed,
        "finetune.sampling": sampling,
        "finetune.balancing": balancing,
        "finetune.fusion": fusion,
        "finetune.model": model,
        "finetune.only": only,
        "finetune.init": init,
        "finetune.keep_posterior": keep_posterior,
        "finetune.epochs": epochs,
        "finetune.batch_size": batch_size,
        "finetune.report_to": None if report_to is None else report_to.split(","),
        "optim.lr": lr,
    }
    if manifest is None:
        keywords |= data_settings(modality=modality, encoder=encoder, allow_outside=allow_outside, **columns)
    config, given = load_settings(config, settings, keywords, preset=preset)
    config = resolve_methods(config)
    code = model_code(config)
    in_ray_worker = engine == "ray" and "RANK" in os.environ
    if in_ray_worker and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError("--engine ray starts the processes itself: run it without torchrun")
    if not in_ray_worker and (
        ray := choose_engine(engine, config.ray, address=ray_address, num_workers=num_workers, device=device)
    ):
        from .ray_training import arguments_elsewhere, finetune_on_ray

        run_dir = Run.open(run)
        if (remote := RemoteRun.of(run_dir.folder)) is not None:
            arguments |= arguments_elsewhere(run_dir, arguments)
        folder = run_dir.finetune(finetune_on_ray(arguments, ray, run=run_dir.folder, remote=remote))
        share_files(run_dir.folder, is_first=False)
        return _result(folder, read_metrics(folder))
    run_dir, device = Run.open(run), local_device(pick_device(device))
    workers = default_workers() if num_workers is None else num_workers
    source: ManifestSource | UnscoredSource
    if manifest is None:
        check_without_scores(config.training(), commands=_scoring_commands(data, run, preset))
        source = UnscoredSource(data=str(data), run_dir=run_dir, device=device)
    else:
        options = SourceOptions(data=data, encoder=pairs(encoder) or (), allow_outside=allow_outside)
        source = ManifestSource.open(run_dir.find_manifest(str(manifest)), run_dir, options)
        check_media_settings(given, source.manifest)
        config = source.with_network(config, given)
    check_task(resolve(config.training()), source.task(config))
    folder = run_dir.finetune(name or _finetune_name(source.name or "all", config, preset))
    resolved = {**training_settings(config, source), "manifest": source.name}
    if (folder / "metrics.json").exists() and not overwrite:
        with progress_bars(progress) as report_progress:
            digest = source.digest(config, num_workers=workers, progress=report_progress)
        return _result(folder, _finished(folder, resolved, digest, code=code))
    weights = _initial_weights(run_dir, config, replaced=folder if overwrite else None)
    if config.finetune.end_to_end:
        check_lora(config.finetune.lora)
    if config.finetune.report_to:
        load_trackers(config.finetune.report_to)  # before any data is read
    target = new_finetune(run_dir.folder, folder.name) if overwrite else folder  # moved to `folder` when finished
    with (
        progress_bars(progress) as report_progress,
        open_distributed(device) as distributed,
        _writer(run_dir, folder.name, distributed) as lock,
    ):
        if not distributed.is_first:
            report_progress = no_progress
        with _first_rank_first(distributed, run_dir):
            loaded = source.load(config, num_workers=workers, progress=report_progress)
        release_memory()
        about = {
            "manifest": source.name,
            "manifest_digest": loaded.digest,
            "test_labels_in_scores": loaded.saw_test_labels,
            "config": resolved,
            "code": code,
            "preset": None if preset is None else record_preset(preset, config, source),
            "made_from": loaded.made_from,
        }
        only = config.finetune.only
        examples = loaded.examples if only is None else loaded.examples.only(only)
        effects = effects_in_training(config, loaded.manifest, examples, modalities=loaded.modalities)
        effects = with_engine(effects, in_ray_worker or None)
        warn_without_effect("finetune", given, effects, recorded=source.scored_settings())
        result = finetune_on(
            examples,
            target,
            config=config.training(),
            between=loaded.between,
            seed=config.seed,
            device=device,
            progress=report_progress,
            distributed=distributed,
            init=weights,
        )
        metrics = {**about, **result.metrics}
        if lock is not None:
            lock.check()
            _write_finetune(target, metrics, loaded)
            swap_finetune(run_dir.folder, folder.name)
    return _result(folder, metrics)


def _initial_weights(run_dir: Run, config: RunConfig, *, replaced: Path | None) -> Path | None:
    """Return the file that --init loads; ConfigError where it lies in the folder that is replaced."""
    if config.finetune.init is None:
        return None
    weights = _find_model(run_dir, config.finetune.init)
    if replaced is not None and replaced.resolve() in weights.resolve().parents:
        raise ConfigError(f"--overwrite would delete {weights}, which --init loads: pass another --name")
    return weights


def _write_finetune(target: Path, metrics: dict[str, Any], loaded: LoadedSource) -> None:
    """Write the files of a finished fine-tuning other than its weights and history."""
    if metrics["manifest"] is None:
        write_parquet(quarantine_table(loaded.quarantined), target / "quarantine.parquet", provenance={})
    write_text(
        to_toml({key: value for key, value in metrics["config"].items() if key != "manifest"}), target / "config.toml"
    )
    write_json(metrics, target / "metrics.json")  # written last: it marks a finished fine-tuning


def _result(folder: Path, metrics: dict[str, Any]) -> FinetuneResult:
    return FinetuneResult(name=folder.name, folder=folder, metrics=metrics, **main_values(metrics))


def main_values(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the accuracy and the main metric of the fused prediction; NaN where it is not defined."""
    fused, main = metrics["test"]["all"]["branches"]["fused"], metrics_of(metrics).main
    value = math.nan if fused[main] is None else float(fused[main])
    return {"accuracy": float(fused.get("accuracy", math.nan)), "value": value}


@contextmanager
def _writer(run_dir: Run, name: str, distributed: DistributedContext) -> Iterator[Lock | None]:
    """Lock a fine-tuning's folder in the process that writes it, rank 0; yield None in the others."""
    if not distributed.is_first:
        yield None
        return
    with write_lock(run_dir.folder, f"finetune/{name}", command="mmaudit finetune") as lock:
        yield lock


def _check_source(manifest: str | Path | None, data: str | Path | None, columns: Mapping[str, Any]) -> None:
    """Raise ConfigError if there is nothing to train on, or options have no effect on a manifest."""
    if manifest is None and data is None:
        raise ConfigError(
            "pass --manifest to train on a manifest, or --data to train on all samples of data without scores"
        )
    ineffective = [name for name, value in columns.items() if value is not None]
    if manifest is not None and ineffective:
        raise ConfigError(f"--{ineffective[0]}: a manifest's data are read as they were scored; it is for --data alone")


def _scoring_commands(data: str | Path | None, run: str | Path, preset: str | None) -> list[str]:
    """Return the commands that score the data and make a manifest of all samples."""
    in_run = "" if str(run) == "mmaudit-run" else f" --run {run}"
    with_preset = "" if preset is None else f" --preset {preset}"
    return [
        f"mmaudit score {data} --learn-from train{with_preset}{in_run}",
        f"mmaudit split --subset most-balanced:100% --name all{in_run}",
    ]


@contextmanager
def _first_rank_first(distributed: DistributedContext, run_dir: Run) -> Iterator[None]:
    """Run the block in rank 0 before the other ranks: it encodes, and they read its cache, also from a run at a URL."""
    if not distributed.is_first:
        logging.getLogger("mmaudit").setLevel(logging.WARNING)
        distributed.wait()
        share_files(run_dir.folder, is_first=False)
    yield
    if distributed.is_first and distributed.world_size > 1:
        share_files(run_dir.folder, is_first=True)
        distributed.wait()


def _finetune_name(manifest: str, config: RunConfig, preset: str | None) -> str:
    finetune_config = config.finetune
    seed = [f"seed-{config.seed}"] if config.seed else []
    if preset is not None:
        return "-".join([manifest, preset, *seed])
    own = finetune_config.model
    parts = [manifest, finetune_config.fusion if own is None else own.partition(":")[2], finetune_config.sampling]
    parts += [finetune_config.balancing] if finetune_config.balancing != "joint" else []
    parts += [f"only-{finetune_config.only}"] if finetune_config.only else []
    parts += [f"p{finetune_config.keep_posterior:g}"] if finetune_config.keep_posterior is not None else []
    parts += [f"from-{Path(finetune_config.init).stem}"] if finetune_config.init else []
    return "-".join([*parts, *seed])


def find_finetune(run_dir: Run, name: str) -> Path:
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
    return find_finetune(run_dir, name) / "model.safetensors"


def model_code(config: RunConfig) -> dict[str, str | None]:
    """Import the factory of --model; return its name, source file and the digest of that file; {} without one."""
    name = config.finetune.model
    if name is None:
        return {}
    digest, path = function_version(name), function_file(name)
    return {"model": name, "file": None if path is None else str(path.resolve()), "digest": digest}


def _finished(folder: Path, settings: dict[str, Any], digest: str, *, code: dict[str, Any]) -> dict[str, Any]:
    metrics = read_metrics(folder)
    is_same = decisive_settings(metrics["config"]) == decisive_settings(settings)
    if is_same and metrics.get("code", {}).get("digest") != code.get("digest"):
        raise RunError(
            f"{folder} was trained with another version of {code['file']}: pass another --name, or --overwrite"
        )
    if not is_same or metrics["manifest_digest"] != digest:
        raise RunError(f"{folder} holds a fine-tuning of other settings: pass another --name, or --overwrite")
    log.info("%s is already trained with these settings: nothing to do", folder)
    return metrics
