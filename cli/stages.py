"""Python interface of the audit: ingest, check, score, report.

Each public function implements the command of the same name and can be called from a notebook.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..audit.dataset.dataset import Dataset
from ..audit.dataset.samples import read_samples
from ..audit.downloads.ingest import ingest as ingest_download
from ..audit.errors import ConfigError, Quarantined, RunError, quarantine_table
from ..audit.features.encode import EncodeTask, encode_dataset
from ..audit.features.encoded_samples import collect_encoded, select_usable
from ..audit.leakage import ModalityContent, find_leakage, group_columns
from ..audit.locks import WAIT_SECONDS, Lock, write_lock
from ..audit.scores.score_dataset import Audit, NetworkSettings, audit_dataset
from ..audit.scores.table import write_scores
from ..audit.storage import write_json, write_parquet
from ..audit.workers import Progress, default_workers, no_progress
from .config import RunConfig
from .provenance import check_config, open_encodable, own_record, record_of, score_provenance, signed_record
from .run import MADE_FROM_SCORES, REPORT_FILES, SCORE_FILES, Run, replacing

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("mmaudit")


def ingest(
    name: str, folder: str | Path, *, lists: Sequence[str | Path] = (), out: str | Path | None = None
) -> dict[str, Any]:
    """Convert an official download into metadata.parquet.

    Args:
        name: cremad, ave, kinetics-sounds, vggsound, ucf101, mosei, image-text or ogm-ge.
        folder: folder of the unpacked download.
        lists: lists of clips or splits to use in place of the download's own.
        out: the table to write; by default metadata.parquet in the folder.

    Returns:
        The path of the table, and the counts of listed and missing clips.

    Raises:
        ConfigError: the name is unknown.
        DatasetError: the folder is not that download.
    """
    ingested = ingest_download(name, folder, lists=lists, out=out)
    return {**asdict(ingested), "path": str(ingested.path), "message": ingested.message}


def check(
    data: str | Path,
    *,
    run: str | Path = "mmaudit-run",
    config: RunConfig | None = None,
    device: str = "auto",
    num_workers: int | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Check a dataset: modalities, unusable samples, and leaks between its splits. Nothing is trained.

    Encoded features are cached in the run folder, for use by `score`. Without a split column, the split that `score`
    would cut is checked.

    Args:
        data: a folder, table file or glob, saved dataset, tar shards, or a Hugging Face dataset name.
        run: the run folder.
        config: settings of the run.
        device: auto, cpu or cuda.
        num_workers: processes that decode media; None: one per CPU.
        progress: progress callback.

    Returns:
        The source, counts, modalities, unusable samples by reason, and the leakage report.

    Raises:
        DatasetError: the data cannot be read.
        ConfigError: a setting does not fit the data.
        RunError: the run folder holds something other than a run.
    """
    config = config or RunConfig()
    run_dir = Run.open(run)
    dataset = open_encodable(data, config.data)
    run_dir.check_folder()
    samples = read_samples(dataset, seed=config.seed, test_fraction=config.data.test_fraction)
    with write_lock(run_dir.folder, "features", command="mmaudit check"):
        tasks = _encode(
            run_dir, dataset, config, device=pick_device(device), num_workers=num_workers, progress=progress
        )
    encoded = collect_encoded(dataset, samples, tasks)
    rows, left_out = select_usable(encoded, keep_duplicates=config.data.keep_duplicates)
    used_columns = {modality.column for modality in dataset.modalities} | {dataset.columns.id, dataset.columns.label}
    columns = group_columns([name for name in dataset.schema.names if name not in used_columns])
    if dataset.columns.group and dataset.columns.group not in columns:
        columns = [dataset.columns.group, *columns]
    leakage = find_leakage(
        samples,
        [ModalityContent.of(status, tasks) for status in encoded.statuses],
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
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Score every sample of `data` into the run folder, and write the report.

    A finished run of the same data and config is not changed; cached features are reused.

    Args:
        data: a folder, table file or glob, saved dataset, tar shards, or a Hugging Face dataset name.
        run: the run folder.
        config: settings of the run.
        device: auto, cpu or cuda.
        num_workers: processes that decode media; None: one per CPU.
        overwrite: replace a finished run, and remove the manifests and fine-tunings of its scores.
        progress: progress callback.

    Returns:
        The content of run.json.

    Raises:
        RunError: the folder holds a run of other data or config and `overwrite` is False.
        DatasetError: the data cannot be read.
        ConfigError: a setting does not fit the data.
        ScoreError: the samples cannot be scored.
    """
    config = config or RunConfig()
    device = pick_device(device)
    dataset = open_encodable(data, config.data)
    run_dir = Run.open(run)
    run_dir.check_folder()
    encode = partial(_encode, run_dir, dataset, config, device=device, num_workers=num_workers, progress=progress)
    if overwrite or not run_dir.is_scored():
        with write_lock(run_dir.folder, command="mmaudit score") as lock:
            if overwrite or not run_dir.is_scored():  # another process may have finished it meanwhile
                audit, record = _score(run_dir, dataset, config, encode, device=device, progress=progress)
                _write_audit(run_dir, audit, record, overwrite=overwrite, lock=lock)
                _write_report(run_dir)
                return run_dir.record()
    record = _unchanged(run_dir, dataset, config, encode)
    if not run_dir.report_file.exists():
        report(run=run_dir.folder)
    return record


def report(*, run: str | Path = "mmaudit-run") -> Path:
    """Write report.html, report.json and figures/*.png from the files of a run folder.

    Args:
        run: the run folder.

    Returns:
        The path of the page.

    Raises:
        RunError: the run is not scored, or one of its files is damaged.
    """
    run_dir = Run.open(run)
    run_dir.record()
    with write_lock(run_dir.folder, "report.html", command="mmaudit report", wait_seconds=WAIT_SECONDS):
        return _write_report(run_dir)


def pick_device(name: str) -> str:
    """Resolve `auto` to cuda if available, else cpu; raise ConfigError if the device is not available."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    has_cuda = kind == "cuda" and torch.cuda.is_available() and (number or "0").isdecimal()
    if name != "cpu" and not (has_cuda and int(number or 0) < torch.cuda.device_count()):
        raise ConfigError(f"--device {name}: not available; use auto, cpu" + ", cuda" * torch.cuda.is_available())
    return name


def _encode(
    run_dir: Run, dataset: Dataset, config: RunConfig, *, device: str, num_workers: int | None, progress: Progress
) -> list[EncodeTask]:
    """Encode the features that are missing from the run's feature cache."""
    workers = default_workers() if num_workers is None else num_workers
    return encode_dataset(
        dataset, run_dir.features, media=config.media, num_workers=workers, device=device, progress=progress
    )


def _score(
    run_dir: Run,
    dataset: Dataset,
    config: RunConfig,
    encode: Callable[[], list[EncodeTask]],
    *,
    device: str,
    progress: Progress,
) -> tuple[Audit, dict[str, Any]]:
    """Score every sample; return the scores and the content of run.json."""
    seconds: dict[str, float] = {}
    samples = read_samples(dataset, seed=config.seed, test_fraction=config.data.test_fraction)
    if dataset.columns.split is None:
        num_test = int((samples.split == "test").sum())
        log.info("no split column: %d of %d samples are held out as test", num_test, len(samples))
    with _timed(seconds, "encode"):
        tasks = encode()
    encoded = collect_encoded(dataset, samples, tasks)
    with _timed(seconds, "probe"):
        audit = audit_dataset(
            encoded,
            tasks,
            probe=config.probe,
            networks=NetworkSettings(config=config.network, media=config.media, folder=run_dir.features / "networks"),
            mixture=config.mixture,
            seed=config.seed,
            device=device,
            progress=progress,
            keep_duplicates=config.data.keep_duplicates,
        )
    return audit, record_of(dataset, audit, config, seconds=seconds)


def _unchanged(
    run_dir: Run, dataset: Dataset, config: RunConfig, encode: Callable[[], list[EncodeTask]]
) -> dict[str, Any]:
    """Return run.json of a finished run; raise RunError if it was made from other data or another config."""
    record = run_dir.record()
    check_config(run_dir, record, dataset, config)
    samples = read_samples(dataset, seed=config.seed, test_fraction=config.data.test_fraction)
    fingerprint = collect_encoded(dataset, samples, encode()).fingerprint
    if record["fingerprint"] != fingerprint:
        raise RunError(
            f"{run_dir.folder} was made from other data (fingerprint {record['fingerprint'][:8]}, now "
            f"{fingerprint[:8]}); pass another folder with --run, or --overwrite"
        )
    log.info("%s is already scored with these data and this config: nothing to do", run_dir.folder)
    if doubt := own_record(run_dir.folder)[1]:
        log.info("its manifests are not trusted to name data or code, since %s; --overwrite scores it again", doubt)
    return record


def _write_report(run_dir: Run) -> Path:
    from .report import write_report

    return write_report(run_dir)


def _by_reason(left_out: Sequence[Quarantined]) -> list[dict[str, Any]]:
    """Count unusable samples by reason and modality, most frequent first, with an example of each."""
    cells: dict[tuple[str, str | None], list[Quarantined]] = {}
    for row in left_out:
        cells.setdefault((row.reason.value, row.modality), []).append(row)
    return [
        {
            "reason": reason,
            "modality": modality,
            "count": len(rows),
            "example": f"{example.sample_id} ({example.detail})",
        }
        for (reason, modality), rows in sorted(
            cells.items(), key=lambda cell: (-len(cell[1]), cell[0][0], str(cell[0][1]))
        )
        for example in [min(rows, key=lambda row: (row.sample_id, row.detail))]
    ]


def _column(dataset: Dataset, name: str) -> NDArray[np.object_]:
    """Read a column as strings (n,), null as None."""
    cells = [cell for shard in dataset.shards for cell in shard.read([name])[name].to_pylist()]
    return np.array([None if cell is None else str(cell) for cell in cells], dtype=object)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[stage] = round(time.monotonic() - start, 3)


def _write_audit(run_dir: Run, audit: Audit, record: dict[str, Any], *, overwrite: bool, lock: Lock) -> None:
    """Replace the files of the run at once; without `overwrite`, manifests from other score tables are kept."""
    manifests, finetunes = run_dir.manifests(), run_dir.finetunes()
    if overwrite and (manifests or finetunes):
        log.info("removing %d manifests and %d fine-tunings of the old scores", len(manifests), len(finetunes))
    replaced = (*SCORE_FILES, *REPORT_FILES, *(MADE_FROM_SCORES if overwrite else ()))
    provenance = score_provenance(record)
    with replacing(run_dir.folder, replaced, lock=lock) as folder:
        staged_run = Run(folder)
        write_scores(replace(audit.scores, provenance=provenance), staged_run.scores_file)
        write_parquet(quarantine_table(audit.quarantined), staged_run.quarantine_file, provenance=provenance)
        write_json(dict(audit.mixture.to_json()), staged_run.mixture_file)
        staged_run.write_record(signed_record(record, folder=run_dir.folder, scores=staged_run.scores_file))
