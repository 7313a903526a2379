"""Python functions of training: finetune, evaluate.

Each public function is what the command of its name calls, and what a notebook calls.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..audit.dataset.samples import read_samples
from ..audit.errors import ConfigError, ManifestError, RunError, choices
from ..audit.features.encode import encode_dataset
from ..audit.features.encoded_samples import collect_encoded
from ..audit.locks import WAIT_SECONDS, Lock, write_lock
from ..audit.parsing import build
from ..audit.storage import write_json, write_text
from ..audit.workers import Progress, default_workers, no_progress
from ..rebalance.manifest import Manifest, read_dropped, read_manifest
from ..train.config import TrainConfig
from ..train.distributed import DistributedContext, local_device, open_distributed
from ..train.evaluate import evaluate_file
from ..train.examples import Examples, load_examples
from ..train.finetune import finetune_on
from ..train.tracking import check_trackers
from .config import RunConfig, plain, to_toml, without_none
from .provenance import Named, open_source, saw_test_labels
from .run import Run, read_metrics
from .stages import pick_device
from .swap import new_finetune, swap_finetune
from .trust import origin_of

log = logging.getLogger("mmaudit")


def finetune(
    manifest: str | Path,
    *,
    run: str | Path = "mmaudit-run",
    data: str | Path | None = None,
    encoder: Sequence[str] = (),
    allow_outside: bool = False,
    config: RunConfig | None = None,
    name: str | None = None,
    device: str = "auto",
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Fine-tune a fusion network on a manifest, by file or by its name in the run, and give metrics.json's content.

    The data are the manifest's source, or `data` if they moved. `data`, `encoder` (MODALITY=NAME of each that is code
    or a model) and `allow_outside` must be given for a manifest that this user did not make on this machine. A finished
    fine-tuning of the same settings is left as it is, an interrupted one goes on. Under torchrun its processes train
    together, and the first one writes. Raises ManifestError where the source has changed since, TrainError where
    training diverges.
    """
    config = config or RunConfig()
    named = Named(data=data, encoder=encoder, allow_outside=allow_outside)
    place = Run.open(run)
    path = place.find_manifest(str(manifest))
    found = read_manifest(path)
    folder = place.finetune(name or _finetune_name(path.stem, config))
    settings = {**_settings(config), "manifest": path.stem}
    if (folder / "metrics.json").exists() and not overwrite:
        return _finished(folder, settings, found)
    init = None if config.finetune.init is None else _find_model(place, config.finetune.init)
    if overwrite and init is not None and folder.resolve() in init.resolve().parents:
        raise ConfigError(f"--overwrite would delete {init}, which --init begins with: give this fine-tuning a --name")
    check_trackers(config.finetune.report_to)
    device = local_device(pick_device(device))
    new = new_finetune(place.folder, folder.name) if overwrite else folder  # swapped in when it is finished
    with open_distributed(device) as distributed, _writer(place, folder.name, distributed) as lock:
        if not distributed.is_first:
            progress = no_progress
        with _first_alone(distributed):
            workers = default_workers() if num_workers is None else num_workers
            examples = _examples_of(found, path, place, named, config, num_workers=workers, progress=progress)
        only = config.finetune.only
        result = finetune_on(
            examples if only is None else examples.only(only),
            new,
            config=_with_width(config, found).training(),
            between=_between(found, examples),
            seed=config.seed,
            device=device,
            progress=progress,
            distributed=distributed,
            init=init,
        )
        metrics = {
            "manifest": path.stem,
            "manifest_digest": found.digest(),
            "test_labels_in_scores": saw_test_labels(found),
            "config": settings,
            "made_from": found.provenance,
            **result.metrics,
        }
        if lock is not None:
            about = {key: value for key, value in settings.items() if key != "manifest"}
            lock.check()
            write_text(to_toml(about), new / "config.toml")
            write_json(metrics, new / "metrics.json")  # last: a fine-tuning that has it is finished
            swap_finetune(place.folder, folder.name)
    return metrics


def evaluate(
    name: str,
    *,
    run: str | Path = "mmaudit-run",
    manifest: str | Path | None = None,
    data: str | Path | None = None,
    encoder: Sequence[str] = (),
    allow_outside: bool = False,
    split: str = "test",
    device: str = "auto",
    num_workers: int | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Test a finished fine-tuning of the run again, and in full, and write evaluation.json beside its metrics.json.

    Measured are the fused answer and each modality alone: ACC, MAP, macro-F1 and ECE, overall, by subset and by class;
    what each modality contributes; and what is right alone and wrong together. manifest: other samples than those it
    was trained with; `learned_from` counts those that it was trained or chosen by nevertheless, None if that is not
    known. split: another than test. What is not the test of its own manifest is written to evaluation-SPLIT.json, or
    evaluation-SPLIT-MANIFEST.json. Raises RunError where there is no such fine-tuning, ManifestError where its
    manifest or the data have changed.
    """
    place = Run.open(run)
    folder = _find_finetune(place, name)
    metrics = read_metrics(folder)
    config = build(RunConfig, without_none({k: v for k, v in metrics["config"].items() if k != "manifest"}), where="")
    path = place.find_manifest(str(manifest)) if manifest is not None else place.own_manifest(metrics["manifest"])
    found = read_manifest(path)
    if manifest is None and found.digest() != metrics["manifest_digest"]:
        raise RunError(f"{path} has changed since {folder.name} was trained on it; name a manifest with --manifest")
    workers = default_workers() if num_workers is None else num_workers
    named = Named(data=data, encoder=encoder, allow_outside=allow_outside)
    own = manifest is None and split == "test"
    file = folder / ("-".join(["evaluation"] + ([] if own else [split]) + ([path.stem] if manifest else [])) + ".json")
    with _evaluation_lock(place, file):
        examples = _examples_of(found, path, place, named, config, num_workers=workers, progress=progress)
        if config.finetune.only is not None:
            examples = examples.only(config.finetune.only)
        measured = evaluate_file(
            folder / "model.safetensors",
            examples,
            split=split,
            between=_between(found, examples),
            config=config.training(),
            seed=config.seed,
            device=pick_device(device),
        )
        result = {"name": folder.name, "manifest": path.stem, "split": split, **measured}
        if manifest is not None:
            result["learned_from"] = _count_learned(place, metrics, examples.sample_id[examples.rows(split)])
        write_json(result, file)
    return {**result, "file": str(file)}


def read_examples(
    manifest: str | Path,
    *,
    run: str | Path = "mmaudit-run",
    named: Named | None = None,
    config: RunConfig | None = None,
    num_workers: int = 0,
    progress: Progress = no_progress,
) -> Examples:
    """Give what a manifest, named by its file or its name in the run, trains and tests on."""
    place = Run.open(run)
    path = place.find_manifest(str(manifest))
    found, named, config = read_manifest(path), named or Named(), config or RunConfig()
    return _examples_of(found, path, place, named, config, num_workers=num_workers, progress=progress)


@contextmanager
def _writer(place: Run, name: str, distributed: DistributedContext) -> Iterator[Lock | None]:
    """Hold the lock on a fine-tuning's folder in the process that writes it; the others yield None."""
    if not distributed.is_first:
        yield None
        return
    with write_lock(place.folder, f"finetune/{name}", command="mmaudit finetune") as lock:
        yield lock


def _evaluation_lock(place: Run, file: Path) -> AbstractContextManager[Lock]:
    """Hold the lock on the file of an evaluation, in the run where the fine-tuning is one of it."""
    folder = file.parent
    in_run = folder.absolute() == place.finetune(folder.name).absolute()
    root, scope = (place.folder, f"finetune/{folder.name}/{file.name}") if in_run else (folder, file.name)
    return write_lock(root, scope, command="mmaudit evaluate", wait_seconds=WAIT_SECONDS)


def _settings(config: RunConfig) -> dict[str, Any]:
    """Give all that decides about a fine-tuning, as plain values by section."""
    sections = [name for name in TrainConfig.__dataclass_fields__ if name != "width"]
    resolved = replace(config, finetune=replace(config.finetune, fusion=config.finetune.fusion_used))
    return {name: plain(resolved)[name] for name in ("seed", *sections, "network")}


def _with_width(config: RunConfig, manifest: Manifest) -> RunConfig:
    """Give ResNets the width that the scores' own had, unless another is asked for."""
    scored = manifest.provenance.get("scores", {}).get("config", {}).get("network", {}).get("width", 1.0)
    asked = config.network.width != RunConfig().network.width
    return config if asked else replace(config, network=replace(config.network, width=float(scored)))


def _between(manifest: Manifest, examples: Examples) -> str:
    return str(manifest.provenance.get("between", ":".join(examples.modalities[:2])))


@contextmanager
def _first_alone(distributed: DistributedContext) -> Iterator[None]:
    """Let the first process go before the others: it encodes, they find what it left."""
    if not distributed.is_first:
        logging.getLogger("mmaudit").setLevel(logging.WARNING)
        distributed.wait()
    yield
    if distributed.is_first:
        distributed.wait()


def _examples_of(
    manifest: Manifest,
    path: Path,
    place: Run,
    named: Named,
    config: RunConfig,
    *,
    num_workers: int,
    progress: Progress,
) -> Examples:
    """Open and encode a manifest's source, and give what it trains and tests on."""
    origin = origin_of(path, manifest.provenance, manifest.digests)
    dataset, made = open_source(origin, named)
    _check_trainable(made)
    tasks = encode_dataset(dataset, place.features, media=made.media, num_workers=num_workers, progress=progress)
    samples = read_samples(dataset, seed=made.seed, test_fraction=made.data.test_fraction)
    dropped = read_dropped(path, manifest)
    if dropped is None:
        log.info("no dropped rows beside %s: test figures are on the manifest's own test samples alone", path.name)
    return load_examples(
        manifest,
        dropped,
        samples=samples,
        statuses=collect_encoded(dataset, samples, tasks).statuses,
        tasks=tasks,
        validation_fraction=config.finetune.validation_fraction,
        seed=config.seed,
    )


def _count_learned(place: Run, metrics: dict[str, Any], asked: Iterable[str]) -> int | None:
    """Count the samples that a fine-tuning was trained or chosen by; None where its manifest is gone or has changed."""
    try:
        own = read_manifest(place.own_manifest(metrics["manifest"]))
    except (RunError, ManifestError):
        return None
    if own.digest() != metrics["manifest_digest"]:
        return None
    splits = zip(own.table["sample_id"].to_pylist(), own.table["split"].to_pylist(), strict=True)
    return len({name for name, split in splits if split != "test"}.intersection(asked))


def _check_trainable(made: RunConfig) -> None:
    """Refuse what fine-tuning cannot learn from."""
    if made.data.task != "classification":
        raise ConfigError(f"finetune trains classifiers, and this manifest's task is {made.data.task}")


def _finetune_name(manifest: str, config: RunConfig) -> str:
    chosen = config.finetune
    parts = [manifest, chosen.fusion_used, chosen.sampling]
    parts += [chosen.balancing] if chosen.balancing != "joint" else []
    parts += [f"only-{chosen.only}"] if chosen.only else []
    parts += [f"p{chosen.keep_posterior:g}"] if chosen.keep_posterior is not None else []
    parts += [f"from-{Path(chosen.init).stem}"] if chosen.init else []
    return "-".join(parts)


def _find_finetune(place: Run, name: str) -> Path:
    """Give the folder of a finished fine-tuning, named by its path or by its name in the run."""
    known = [folder.name for folder in place.finetunes()]
    if name in known:
        return place.finetune(name)
    if (Path(name) / "metrics.json").is_file():
        return Path(name)
    raise RunError(f"no finished fine-tuning {name} in {place.folder}; {choices(name, known)}")


def _find_model(place: Run, name: str) -> Path:
    """Give the weights that --init names: a fine-tuning of the run, a folder of one, or a file."""
    if Path(name).is_file():
        return Path(name)
    return _find_finetune(place, name) / "model.safetensors"


def _finished(folder: Path, settings: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    metrics = read_metrics(folder)
    same = _deciding(metrics["config"]) == _deciding(settings)
    if not same or metrics["manifest_digest"] != manifest.digest():
        raise RunError(f"{folder} holds a fine-tuning of other settings: give this one a --name, or pass --overwrite")
    log.info("%s is already finished with these settings: nothing to do", folder)
    return metrics


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out what does not decide about the weights: who is told, and how often a state is left."""
    told = ("report_to", "save_steps", "resident_mib")
    chosen = {key: value for key, value in settings.get("finetune", {}).items() if key not in told}
    return {**settings, "finetune": chosen}
