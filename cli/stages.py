"""Python functions of the audit: ingest, check, score, report.

Each public function is what the command of its name calls, and what a notebook calls.
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
from ..audit.downloads import ingest as ingest_download
from ..audit.errors import ConfigError, RunError
from ..audit.features.encode import EncodeTask, encode_dataset
from ..audit.features.encoded_samples import collect_encoded, select_usable
from ..audit.leakage import ModalityContent, find_leakage, group_columns
from ..audit.locks import WAIT_SECONDS, Lock, write_lock
from ..audit.parquet import write_parquet
from ..audit.quarantine import Quarantined, quarantine_table
from ..audit.scores.score_dataset import Audit, Networks, audit_dataset
from ..audit.scores.table import write_scores
from ..audit.storage import write_json
from ..audit.workers import Progress, default_workers, no_progress
from .config import RunConfig
from .provenance import check_config, open_encodable, record_of, score_provenance
from .run import MADE_FROM_SCORES, REPORT_FILES, SCORE_FILES, Run
from .swap import replacing
from .trust import own_record, signed_record

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
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Tell what would be read of `data`, what is unusable, and what its splits share; nothing is trained.

    What is encoded for it stays in the run's feature cache, where `score` finds it. Without a split column, the split
    that `score` would cut is looked at.
    """
    config = config or RunConfig()
    place = Run.open(run)
    dataset = open_encodable(data, config.data)
    place.check_place()
    samples = read_samples(dataset, seed=config.seed, test_fraction=config.data.test_fraction)
    with write_lock(place.folder, "features", command="mmaudit check"):
        tasks = _encode(place, dataset, config, device=pick_device(device), num_workers=num_workers, progress=progress)
    encoded = collect_encoded(dataset, samples, tasks)
    rows, left_out = select_usable(encoded, keep_duplicates=config.data.keep_duplicates)
    taken = {modality.column for modality in dataset.modalities} | {dataset.columns.id, dataset.columns.label}
    columns = group_columns([name for name in dataset.schema.names if name not in taken])
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
    """Score every sample of `data` into the run folder, write the report, and give run.json's content.

    A finished run of the same data and config is left as it is; features already encoded are used again. Raises
    RunError for a run of other data or config, unless `overwrite`; DatasetError, ConfigError, ScoreError as they come.
    """
    config = config or RunConfig()
    device = pick_device(device)
    dataset = open_encodable(data, config.data)
    place = Run.open(run)
    place.check_place()
    encode = partial(_encode, place, dataset, config, device=device, num_workers=num_workers, progress=progress)
    if overwrite or not place.is_scored():
        with write_lock(place.folder, command="mmaudit score") as lock:
            if overwrite or not place.is_scored():  # another process may just have finished it
                audit, record = _score(place, dataset, config, encode, device=device, progress=progress)
                _write_audit(place, audit, record, overwrite=overwrite, lock=lock)
                _write_report(place)
                return place.record()
    record = _unchanged(place, dataset, config, encode)
    if not place.report_file.exists():
        report(run=place.folder)
    return record


def report(*, run: str | Path = "mmaudit-run") -> Path:
    """Write report.html, report.json and figures/*.png from what the run folder holds, and give the page's path."""
    place = Run.open(run)
    place.record()
    with write_lock(place.folder, "report.html", command="mmaudit report", wait_seconds=WAIT_SECONDS):
        return _write_report(place)


def pick_device(name: str) -> str:
    """Resolve `auto` to cuda where there is one; ConfigError for a device that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    there = kind == "cuda" and torch.cuda.is_available() and (number or "0").isdecimal()
    if name != "cpu" and not (there and int(number or 0) < torch.cuda.device_count()):
        raise ConfigError(f"--device {name}: not there; there are: auto, cpu" + ", cuda" * torch.cuda.is_available())
    return name


def _encode(
    place: Run, dataset: Dataset, config: RunConfig, *, device: str, num_workers: int | None, progress: Progress
) -> list[EncodeTask]:
    """Encode what the run's feature cache lacks."""
    workers = default_workers() if num_workers is None else num_workers
    return encode_dataset(
        dataset, place.features, media=config.media, num_workers=workers, device=device, progress=progress
    )


def _score(
    place: Run,
    dataset: Dataset,
    config: RunConfig,
    encode: Callable[[], list[EncodeTask]],
    *,
    device: str,
    progress: Progress,
) -> tuple[Audit, dict[str, Any]]:
    """Score every sample; return the scores and run.json's content."""
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
            networks=Networks(config=config.network, media=config.media, folder=place.features / "networks"),
            mixture=config.mixture,
            seed=config.seed,
            device=device,
            progress=progress,
            keep_duplicates=config.data.keep_duplicates,
        )
    return audit, record_of(dataset, audit, config, seconds=seconds)


def _unchanged(
    place: Run, dataset: Dataset, config: RunConfig, encode: Callable[[], list[EncodeTask]]
) -> dict[str, Any]:
    """Return run.json's content of a finished run; RunError where it is one of other data or config."""
    done = place.record()
    check_config(place, done, dataset, config)
    samples = read_samples(dataset, seed=config.seed, test_fraction=config.data.test_fraction)
    fingerprint = collect_encoded(dataset, samples, encode()).fingerprint
    if done["fingerprint"] != fingerprint:
        raise RunError(
            f"{place.folder} was made from other data (fingerprint {done['fingerprint'][:8]}, here {fingerprint[:8]}); "
            "name another folder with --run, or pass --overwrite"
        )
    log.info("%s is already scored from these data with this config: nothing to do", place.folder)
    if doubt := own_record(place.folder)[1]:
        log.info("its manifests are not trusted to name data or code, since %s; --overwrite scores it anew", doubt)
    return done


def _write_report(place: Run) -> Path:
    from .report import write_report

    return write_report(place)


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
            "example": f"{example.sample_id} ({example.detail})",
        }
        for (reason, modality), rows in sorted(
            cells.items(), key=lambda cell: (-len(cell[1]), cell[0][0], str(cell[0][1]))
        )
        for example in [min(rows, key=lambda row: (row.sample_id, row.detail))]
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


def _write_audit(place: Run, audit: Audit, record: dict[str, Any], *, overwrite: bool, lock: Lock) -> None:
    """Replace the run as a whole; without `overwrite`, what was made from other score tables stays."""
    manifests, finetunes = place.manifests(), place.finetunes()
    if overwrite and (manifests or finetunes):
        log.info(
            "%d manifests and %d fine-tunings of the old scores are removed with them", len(manifests), len(finetunes)
        )
    replaced = (*SCORE_FILES, *REPORT_FILES, *(MADE_FROM_SCORES if overwrite else ()))
    provenance = score_provenance(record)
    with replacing(place.folder, replaced, lock=lock) as folder:
        new = Run(folder)
        write_scores(replace(audit.scores, provenance=provenance), new.scores_file)
        write_parquet(quarantine_table(audit.quarantined), new.quarantine_file, provenance=provenance)
        write_json(dict(audit.mixture.to_json()), new.mixture_file)
        new.write_record(signed_record(record, folder=place.folder, scores=new.scores_file))
