"""The stages: what does each command do to the run folder?

Each public function is what the command of its name calls, and what a notebook calls.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..audit.encoding.encoders import is_network
from ..audit.encoding.features import encode_dataset
from ..audit.errors import ConfigError, RunError
from ..audit.files import read_json, write_json, write_text
from ..audit.ingest import ingest as ingest_download
from ..audit.leakage import Material, find_leakage, group_columns
from ..audit.parquet import write_parquet
from ..audit.quality import Quarantined, quarantine_table
from ..audit.score import write_scores
from ..audit.scoring import Audit, Networks, audit_dataset
from ..audit.source.dataset import Dataset, open_dataset
from ..audit.source.samples import read_samples
from ..audit.stock import sort_out, take_stock
from ..audit.workers import Progress, default_workers, silent
from ..rebalance.manifest import Manifest, read_dropped, read_manifest
from ..train.examples import Examples, load_examples
from ..train.finetune import finetune_on
from .config import RunConfig, plain, to_toml
from .provenance import check_config, record_of, saw_test_labels, score_provenance, source_of
from .run import Run

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("mmaudit")


def ingest(
    name: str, folder: str | Path, *, lists: Sequence[str | Path] = (), out: str | Path | None = None
) -> dict[str, Any]:
    """Turn an official download into metadata.parquet, and tell what was listed and what is there.

    Raises ConfigError for an unknown name, DatasetError where the folder is not that download.
    """
    found = ingest_download(name, folder, lists=lists, out=out)
    return {**asdict(found), "path": str(found.path), "message": found.message}


def check(
    data: str | Path,
    *,
    run: str | Path = "mmaudit-run",
    config: RunConfig | None = None,
    device: str = "auto",
    num_workers: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Tell what would be read of `data`, what is unusable, and what its splits share; nothing is trained.

    What is encoded for it stays in the run's feature cache, where `score` finds it. Without a split column, the split
    that `score` would cut is looked at.
    """
    config = config or RunConfig()
    place = Run(Path(run))
    dataset = open_dataset(data, config.data)
    place.check_place()
    samples = read_samples(dataset, seed=config.seed, test_fraction=config.data.test_fraction)
    workers = default_workers() if num_workers is None else num_workers
    tasks = encode_dataset(
        dataset, place.features, media=config.media, num_workers=workers, device=pick_device(device), progress=progress
    )
    stock = take_stock(dataset, samples, tasks)
    rows, left_out = sort_out(stock, keep_duplicates=config.data.keep_duplicates)
    taken = {modality.column for modality in dataset.modalities} | {dataset.columns.id, dataset.columns.label}
    columns = group_columns([name for name in dataset.schema.names if name not in taken])
    if dataset.columns.group and dataset.columns.group not in columns:
        columns = [dataset.columns.group, *columns]
    leakage = find_leakage(
        samples,
        [Material.of(status, tasks) for status in stock.statuses],
        groups={name: _column(dataset, name) for name in columns},
        config=config.leakage,
        seed=config.seed,
        progress=progress,
    )
    return {
        "source": str(data),
        "input": len(samples),
        "usable": len(rows),
        "modalities": [str(modality) for modality in dataset.modalities],
        "unusable": _by_reason(left_out),
        "leakage": leakage.to_json(),
    }


def score(
    data: str | Path,
    *,
    run: str | Path = "mmaudit-run",
    config: RunConfig | None = None,
    device: str = "auto",
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Score every sample of `data` into the run folder, write the report, and give run.json's content.

    A finished run of the same data and config is left as it is; features already encoded are used again. Raises
    RunError for a run of other data or config, unless `overwrite`; DatasetError, ConfigError, ScoreError as they come.
    """
    config = config or RunConfig()
    place, seconds = Run(Path(run)), dict[str, float]()
    device = pick_device(device)
    dataset = open_dataset(data, config.data)
    place.check_place()
    done = place.record() if place.is_scored() and not overwrite else None
    if done is not None:
        check_config(place, done, dataset, config)
    samples = read_samples(dataset, seed=config.seed, test_fraction=config.data.test_fraction)
    if dataset.columns.split is None:
        held = int((samples.split == "test").sum())
        log.info("no split column: %d of %d samples are held out as test", held, len(samples))
    with _timed(seconds, "encode"):
        workers = default_workers() if num_workers is None else num_workers
        tasks = encode_dataset(
            dataset, place.features, media=config.media, num_workers=workers, device=device, progress=progress
        )
    stock = take_stock(dataset, samples, tasks)
    if done is not None:
        if done["fingerprint"] != stock.fingerprint:
            raise RunError(
                f"{place.folder} was made from other data (fingerprint {done['fingerprint'][:8]}, "
                f"here {stock.fingerprint[:8]}); name another folder with --run, or pass --overwrite"
            )
        log.info("%s is already scored from these data with this config: nothing to do", place.folder)
        return done
    with _timed(seconds, "probe"):
        audit = audit_dataset(
            stock,
            tasks,
            probe=config.probe,
            networks=Networks(config=config.network, media=config.media, folder=place.features / "networks"),
            mixture=config.mixture,
            seed=config.seed,
            device=device,
            progress=progress,
            keep_duplicates=config.data.keep_duplicates,
        )
    record = record_of(dataset, audit, config, seconds=seconds)
    if overwrite:
        lost = len(place.manifests()), len(place.finetunes())
        if any(lost):
            log.info("%d manifests and %d fine-tunings of the old scores are removed with them", *lost)
        place.clear()  # only now: a score that fails leaves the old run as it is
    _write_audit(place, audit, record)
    report(run=place.folder)
    return record


def finetune(
    manifest: str | Path,
    *,
    run: str | Path = "mmaudit-run",
    data: str | Path | None = None,
    config: RunConfig | None = None,
    name: str | None = None,
    device: str = "auto",
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Fine-tune a fusion network on a manifest, by file or by its name in the run, and give metrics.json's content.

    The data are the manifest's source, or `data` if they moved. A finished fine-tuning of the same settings is left as
    it is, an interrupted one goes on. Raises ManifestError where the source has changed since.
    """
    config = config or RunConfig()
    place = Run(Path(run))
    path = place.find_manifest(str(manifest))
    found = read_manifest(path)
    folder = place.finetune(name or _finetune_name(path.stem, config))
    settings = {name: plain(config)[name] for name in ("seed", "finetune", "sampling")} | {"manifest": path.stem}
    if (folder / "metrics.json").exists() and not overwrite:
        return _finished(folder, settings, found)
    if overwrite and folder.exists():
        (folder / "metrics.json").unlink(missing_ok=True)  # first of all: without it nothing here is finished
        shutil.rmtree(folder)
    workers = default_workers() if num_workers is None else num_workers
    examples = _examples_of(found, path, place, data, config, num_workers=workers, progress=progress)
    result = finetune_on(
        examples,
        folder,
        config=config.finetune,
        sampling=config.sampling,
        between=str(found.provenance.get("between", ":".join(examples.modalities[:2]))),
        seed=config.seed,
        device=pick_device(device),
        progress=progress,
    )
    metrics = {
        "manifest": path.stem,
        "manifest_digest": found.digest(),
        "test_labels_in_scores": saw_test_labels(found),
        "config": settings,
        "made_from": found.provenance,
        **result.metrics,
    }
    _write_finetune(folder, settings, result.history, metrics)
    return metrics


def report(*, run: str | Path = "mmaudit-run") -> Path:
    """Write report.html, report.json and figures/*.png from what the run folder holds, and give the page's path."""
    from .report import write_report

    return write_report(Run(Path(run)))


def pick_device(name: str) -> str:
    """Resolve `auto` to cuda where there is one; ConfigError for a device that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not (name.split(":")[0] == "cuda" and torch.cuda.is_available()):
        raise ConfigError(f"--device {name}: not there; there are: auto, cpu" + ", cuda" * torch.cuda.is_available())
    return name


def _by_reason(left_out: Sequence[Quarantined]) -> list[dict[str, Any]]:
    """Count unusable samples by reason and modality, the most frequent first, with an example of each."""
    cells: dict[tuple[str, str | None], list[Quarantined]] = {}
    for row in left_out:
        cells.setdefault((row.reason.value, row.modality), []).append(row)
    return [
        {
            "reason": reason,
            "modality": modality,
            "count": len(rows),
            "example": f"{rows[0].sample_id} ({rows[0].detail})",
        }
        for (reason, modality), rows in sorted(cells.items(), key=lambda cell: -len(cell[1]))
    ]


def _column(dataset: Dataset, name: str) -> NDArray[np.object_]:
    """Read a whole column as strings (n,), null as None."""
    cells = [cell for shard in dataset.shards for cell in shard.read([name])[name].to_pylist()]
    return np.array([None if cell is None else str(cell) for cell in cells], dtype=object)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[stage] = round(time.monotonic() - start, 3)


def _write_audit(place: Run, audit: Audit, record: dict[str, Any]) -> None:
    """Write the files of a score, run.json last: a run that has it is whole."""
    provenance = score_provenance(record)
    write_scores(replace(audit.scores, provenance=provenance), place.scores_file)
    write_parquet(quarantine_table(audit.quarantined), place.quarantine_file, provenance=provenance)
    write_json(dict(audit.mixture.to_json()), place.mixture_file)
    place.write_record(record)


def _examples_of(
    manifest: Manifest,
    path: Path,
    place: Run,
    data: str | Path | None,
    config: RunConfig,
    *,
    num_workers: int,
    progress: Progress,
) -> Examples:
    """Open and encode a manifest's source, and give what it trains and tests on."""
    dataset, made = source_of(manifest.provenance, data)
    _check_trainable(dataset, made)
    tasks = encode_dataset(dataset, place.features, media=made.media, num_workers=num_workers, progress=progress)
    samples = read_samples(dataset, seed=made.seed, test_fraction=made.data.test_fraction)
    dropped = read_dropped(path, manifest)
    if dropped is None:
        log.info("no dropped rows beside %s: test figures are on the manifest's own test samples alone", path.name)
    return load_examples(
        manifest,
        dropped,
        samples=samples,
        statuses=take_stock(dataset, samples, tasks).statuses,
        tasks=tasks,
        validation_fraction=config.finetune.validation_fraction,
        seed=config.seed,
    )


def _check_trainable(dataset: Dataset, made: RunConfig) -> None:
    """Refuse what fine-tuning cannot learn from yet."""
    if made.data.task != "classification":
        raise ConfigError(f"finetune trains classifiers, and this manifest's task is {made.data.task}")
    networks = [modality.name for modality in dataset.modalities if is_network(modality)]
    if networks:
        raise ConfigError(
            f"finetune trains on feature vectors, and {networks[0]} was read by a network of its own; "
            f"score with another encoder, such as --encoder {networks[0]}=statistics, and split again"
        )


def _finetune_name(manifest: str, config: RunConfig) -> str:
    filtered = config.finetune.keep_posterior
    end = "" if filtered is None else f"-p{filtered:g}"
    return f"{manifest}-{config.finetune.fusion}-{config.finetune.sampling}{end}"


def _finished(folder: Path, settings: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    metrics = read_json(folder / "metrics.json", error=RunError)
    if metrics["config"] != settings or metrics["manifest_digest"] != manifest.digest():
        raise RunError(f"{folder} holds a fine-tuning of other settings: give this one a --name, or pass --overwrite")
    log.info("%s is already finished with these settings: nothing to do", folder)
    return metrics


def _write_finetune(
    folder: Path, settings: dict[str, Any], history: Sequence[dict[str, float]], metrics: dict[str, Any]
) -> None:
    """Write history, config and, last, metrics.json: a fine-tuning that has it is finished."""
    write_text("".join(json.dumps(record) + "\n" for record in history), folder / "history.jsonl")
    write_text(to_toml({name: value for name, value in settings.items() if name != "manifest"}), folder / "config.toml")
    write_json(metrics, folder / "metrics.json")
