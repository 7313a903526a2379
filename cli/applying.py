"""The command apply: other data scored by the probes of a run, and compared with it."""

from __future__ import annotations

import logging
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .. import __version__
from ..audit.dataset.dataset import Dataset
from ..audit.engine.fitting import NetworkSettings
from ..audit.engine.new_rows import NewRows, read_as_in_run, save_selection, select_new
from ..audit.engine.part_store import FolderStore, MemoryStore
from ..audit.engine.plan import PartsConfig, plan_parts
from ..audit.engine.run_state import RunState
from ..audit.engine.selection import fingerprint
from ..audit.engine.stages import ScoringJob, finished_parts, score
from ..audit.errors import ConfigError, DatasetError, RunError, ScoreError, quarantine_table
from ..audit.hashing import digest, file_digest
from ..audit.locks import Lock, write_lock
from ..audit.remote.paths import is_url
from ..audit.scores.drift import compare_distributions
from ..audit.scores.report_scores import read_report_scores
from ..audit.scores.table import ScoreTable, read_scores
from ..audit.storage import read_json, write_json, write_parquet
from ..audit.workers import default_workers
from .appending import check_probes, resumable_store
from .config import RunConfig
from .progress import progress_bars
from .provenance import (
    Origin,
    SourceOptions,
    absolute_source,
    described_modalities,
    open_encodable,
    own_record,
    score_provenance,
    scores_section,
    source_config,
)
from .remote_run import with_run
from .run import REPORT_ROWS, Run
from .scoring import pairs, pick_device
from .staging import describe_rows
from .swap import replacing

log = logging.getLogger("mmaudit")

APPLY_SCHEMA = "mmaudit.apply/1"
_RECORD = "apply.json"  # written last, see replacing
_FILES = (_RECORD, "scores.parquet", "scores", "quarantine.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyResult:
    """Result of `apply`.

    Attributes:
        folder: Folder of the scores of the data.
        num_samples: Samples in the data: those scored and those quarantined.
        num_scored: Samples with a score.
        num_known: Of them those whose group, id or content the run knows.
        record: Content of apply.json.
    """

    folder: Path
    num_samples: int
    num_scored: int
    num_known: int
    record: dict[str, Any]

    @property
    def scores(self) -> ScoreTable:
        """The score table of the data."""
        return read_scores(Run(self.folder).score_source)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of apply.json, and the folder."""
        return {**self.record, "folder": str(self.folder)}


@with_run("features", "stages", writes=True)
def apply(
    run: str | Path,
    data: str | Path,
    *,
    out: str | Path | None = None,
    label: str | None = None,
    id: str | None = None,
    group: str | None = None,
    split: str | None = None,
    encoder: Mapping[str, str] | Sequence[str] | None = None,
    allow_outside: bool = False,
    device: str = "auto",
    num_workers: int | None = None,
    progress: bool = True,
) -> ApplyResult:
    """Score other data with the probes of a run, and compare both: drift over time, another source, a new release.

    The probes, their calibration, the mixture and the ranges of the balance score are those of the run. Samples of
    groups that the run knows, or with its ids or contents, are scored only by probes that were not trained on them; so
    the run's own data have its own scores. The scores are confidences in the true class, so the data need labels.

    Args:
        run: Run folder, a path or a URL.
        data: The data, as for `score`, with the columns of the run's data.
        out: Folder of the results; by default RUN/applied/NAME, with the name of the data.
        label: Label column; by default that of the run.
        id: Id column; by default that of the run.
        group: Group column; none: no groups; by default that of the run.
        split: Split column; none: no splits; by default that of the run.
        encoder: Confirm the encoder (code or model) of a modality.
        allow_outside: Allow paths outside the metadata's folder.
        device: auto, cpu or cuda.
        num_workers: Processes that decode media; 0: none; by default one per CPU.
        progress: Show a progress bar in a terminal or notebook.

    Returns:
        The counts and the comparison; `.scores` reads the score table.

    Raises:
        RunError: The run keeps no probes, or `out` holds something else.
        DatasetError: The data cannot be read, or have other modalities or classes.
        ScoreError: No sample can be scored.

    Example:
        >>> result = mmaudit.apply("mmaudit-run", "may.parquet")
        >>> result.record["comparison"]["gap"]["difference"]["mean"]
    """
    if is_url(out):
        raise ConfigError(
            f"--out {out}: pass a folder; without --out, the results of a run at a URL are published there"
        )
    run_dir = Run.open(run)
    probes = _digest_probes(run_dir)
    record = run_dir.record()
    state = check_probes(run_dir, record)
    options = SourceOptions(data=data, encoder=pairs(encoder) or (), allow_outside=allow_outside)
    data_config, config = source_config(_origin(run_dir), options)
    columns = {"label": label, "id": id, "group": group, "split": split}
    config = replace(config, data=replace(data_config, **_columns_of_run(record, columns)))
    dataset = _open_data(str(data), record, config)
    folder = _default_folder(run_dir, data) if out is None else Path(out)
    _check_out(folder)
    Run.open(folder)  # completes a replacement that was interrupted
    with progress_bars(progress) as report_progress, write_lock(folder, command="mmaudit apply") as lock:
        workers = default_workers() if num_workers is None else num_workers
        work: dict[str, Any] = {"device": pick_device(device), "num_workers": workers, "progress": report_progress}
        job = _open_job(run_dir, dataset, config, probes=probes, folder=folder, work=work)
        _score_data(run_dir, job, state, record=record, probes=probes, folder=folder, lock=lock)
    return _result(folder)


def _origin(run_dir: Run) -> Origin:
    """Return the origin of the probes of a run."""
    record, doubt = own_record(run_dir.folder)
    return Origin(
        path=run_dir.record_file,
        scores=scores_section(run_dir.record()),
        record=record,
        doubt=doubt,
        source=None,
        is_own=record is not None,
        changed="",
    )


def _columns_of_run(record: dict[str, Any], columns: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the column of each role: that which is passed, else that of the run."""
    own = {role: record["columns"].get(role) or "none" for role in ("label", "group", "split")}
    own["id"] = ",".join(record["columns"]["id"]) or "none"
    return {role: own[role] if name is None else name for role, name in columns.items()}


def _open_data(data: str, record: dict[str, Any], config: RunConfig) -> Dataset:
    """Open data with the modalities of a run; raise DatasetError if theirs are encoded otherwise."""
    lengths = {entry["name"]: entry["length"] for entry in record["modalities"] if entry.get("length")}
    try:
        dataset = open_encodable(data, config.data, lengths=lengths)  # which may lack a modality in all rows
    except ConfigError as error:
        raise DatasetError(
            f"{data}: {error}; it is read with the columns of the run, since scores are confidences in the true class "
            "of the same modalities: pass --label, --id, --group or --split if yours have other names, or none"
        ) from error
    keys = ("name", "kind", "encoder", "length", "preprocessing")
    for own, other in zip(record["modalities"], described_modalities(dataset, config), strict=True):
        if differing := [key for key in keys if own.get(key) != other.get(key)]:
            key = differing[0]
            raise DatasetError(f"{data}: {key} of {own['name']} is {other.get(key)}, in the run {own.get(key)}")
    return dataset


def _default_folder(run_dir: Run, data: str | Path) -> Path:
    name = re.sub(r"[^\w.-]+", "-", Path(data).name.removesuffix(".parquet")).strip("-.")
    return run_dir.folder / "applied" / (name or "data")


def _check_out(folder: Path) -> None:
    """Raise RunError if the folder holds something other than results of apply."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; pass a folder with --out")
    names = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.exists() else set()
    if foreign := sorted(names - {*_FILES, "features", "stages"}):
        raise RunError(f"{folder} holds {foreign[0]} and is no result of apply; pass another folder with --out")


def _open_job(
    run_dir: Run, dataset: Dataset, config: RunConfig, *, probes: Mapping[str, str], folder: Path, work: dict[str, Any]
) -> ScoringJob:
    """Return the job that scores data by the probes of a run; its tables stay in memory if the data are one part."""
    parts = PartsConfig(rows=read_json(run_dir.shards_file, error=RunError, shape={"part_rows": int})["part_rows"])
    depends_on = [*describe_rows(dataset, config), *probes.values()]
    plan = plan_parts(dataset.shards, config=parts, depends_on=depends_on, own=folder)
    store = MemoryStore() if len(plan.parts) == 1 else resumable_store(folder / "stages", plan.config)
    features = folder / "features"
    return ScoringJob(
        dataset=dataset,
        plan=plan,
        store=store,
        features=features,
        probes=run_dir.probes,
        probe=config.probe,
        networks=NetworkSettings(config=config.network, media=config.media, folder=features / "networks"),
        mixture=config.mixture,
        seed=config.seed,
        test_fraction=config.data.test_fraction,
        keep_duplicates=config.data.keep_duplicates,
        **work,
    )


def _score_data(
    run_dir: Run,
    job: ScoringJob,
    state: RunState,
    *,
    record: dict[str, Any],
    probes: Mapping[str, str],
    folder: Path,
    lock: Lock,
) -> None:
    """Score all rows of a job by the probes of a run, and write the results into a folder at once.

    Raises RunError if the probes are no longer those of `probes`, digests by name.
    """
    encoded = read_as_in_run(job, state, trust_unchanged=False)
    has_media = any(modality.kind not in ("features", "text") for modality in job.dataset.modalities)
    new = select_new(
        encoded,
        state,
        is_new=np.ones(job.plan.num_rows, dtype=bool),
        seed=job.seed,
        copies="trained" if has_media and not job.keep_duplicates else "none",
        fingerprint=fingerprint(encoded),
    )
    del encoded  # its columns are those of all rows
    if not len(new.selection):
        raise ScoreError(f"no sample of {job.dataset.source} can be scored: {new.selection.quarantined[0]}")
    if new.num_trained:
        log.warning(
            "%d samples have the content of a sample of another group, which a probe that scores them was trained on",
            new.num_trained,
        )
    score(job, save_selection(job, new.selection, state), job.plan.parts)
    weights = [value for name, value in probes.items() if name.endswith(".safetensors")]
    about = {"run": record["fingerprint"], "probes": digest(*(value.encode() for value in weights))}
    provenance = score_provenance(_described(record, job.dataset, new)) | {"applied": about}
    with replacing(folder, _FILES, lock=lock) as staged:
        _write_table(job, state, Run(staged), provenance=provenance)
        write_parquet(quarantine_table(new.selection.quarantined), staged / "quarantine.parquet", provenance=provenance)
        scores = read_report_scores(Run(staged).score_source, max_rows=REPORT_ROWS)
        comparison = compare_distributions(run_dir.report_scores(), scores)
        write_json(_apply_record(run_dir, job, new, record=record, comparison=comparison), staged / _RECORD)
        if _digest_probes(run_dir) != probes:
            raise RunError(f"{run_dir.folder} was scored anew while its probes were applied: repeat the command")
    if isinstance(job.store, FolderStore):
        shutil.rmtree(job.store.folder, ignore_errors=True)


def _digest_probes(run_dir: Run) -> dict[str, str]:
    """Return the digest of each file of the probes of a run, with what it knows of their samples; {} without any."""
    with suppress(FileNotFoundError):
        return {file.name: file_digest(file) for file in sorted(run_dir.probes.iterdir())}
    return {}


def _described(record: dict[str, Any], dataset: Dataset, new: NewRows) -> dict[str, Any]:
    """Return the keys of a run's record as they hold for the data."""
    columns = {**asdict(dataset.columns), "id": list(dataset.columns.id)}
    return {**record, "fingerprint": new.selection.fingerprint, "columns": columns}


def _write_table(job: ScoringJob, state: RunState, staged: Run, *, provenance: dict[str, Any]) -> None:
    """Write the score table; the column split is null where neither the data nor the run's cut have one."""
    has_split = job.dataset.columns.split is not None or state.keys.split is not None
    for part, table, _ in finished_parts(job, state.whole):
        if not has_split:
            index = table.column_names.index("split")
            table = table.set_column(index, "split", pa.nulls(len(table), pa.string()))
        file = staged.scores_file if len(job.plan.parts) == 1 else staged.score_part(part.index)
        write_parquet(table, file, provenance={**provenance, "paths": job.dataset.path_columns})


def _apply_record(
    run_dir: Run, job: ScoringJob, new: NewRows, *, record: dict[str, Any], comparison: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of apply.json."""
    num_scored = len(new.selection)
    return {
        "schema": APPLY_SCHEMA,
        "version": __version__,
        "run": str(run_dir.folder.resolve()),
        "run_fingerprint": record["fingerprint"],
        "source": absolute_source(job.dataset.source),
        "fingerprint": new.selection.fingerprint,
        "counts": {
            "input": job.plan.num_rows,
            "scored": num_scored,
            "quarantined": job.plan.num_rows - num_scored,
            "known": new.num_known,
        },
        "quarantine": dict(Counter(row.reason.value for row in new.selection.quarantined)),
        "gap_verdict": record["gap_verdict"],
        "comparison": comparison,
    }


def _result(folder: Path) -> ApplyResult:
    record = read_json(folder / _RECORD, error=RunError)
    counts = record["counts"]
    return ApplyResult(
        folder=folder,
        num_samples=counts["input"],
        num_scored=counts["scored"],
        num_known=counts["known"],
        record=record,
    )
