"""The commands of scores: score, report."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from ..audit.dataset.dataset import Dataset
from ..audit.dataset.joined import join_vectors
from ..audit.engine.executors import choose_engine
from ..audit.errors import ConfigError, RunError
from ..audit.features.encode import EncodeTask, encode_dataset
from ..audit.locks import write_lock
from ..audit.parsing import RequiredKeys, build_config
from ..audit.scores.table import ScoreTable
from ..audit.storage import read_json
from ..audit.workers import Progress, default_workers
from .appending import append_rows, check_unchanged, run_append_stage
from .config import RunConfig, load_settings, preset_content, preset_record
from .effects import effects_in_scoring, warn_without_effect, with_engine
from .progress import progress_bars
from .provenance import open_encodable
from .remote_run import RemoteRun, share_files, with_run
from .reporting import report
from .run import Run
from .staging import StageResult, check_stage, open_job, publish, run_job, run_stage

log = logging.getLogger("mmaudit")

_REPORT = RequiredKeys(verdict=RequiredKeys(headline=str, warnings=[str]))  # of report.json


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreResult:
    """Result of `score`.

    Attributes:
        run: The run folder.
        report: The report, an HTML page.
        num_samples: Samples in the data: those scored and those quarantined.
        num_scored: Samples with a score.
        num_quarantined: Samples without a score; quarantine.parquet states the reasons.
        gap_verdict: Whether the modality gap has two or more modes, and why not.
        headline: Headline of the report.
        warnings: Warnings of the report.
        record: Content of run.json.
    """

    run: Path
    report: Path
    num_samples: int
    num_scored: int
    num_quarantined: int
    gap_verdict: str
    headline: str
    warnings: tuple[str, ...]
    record: dict[str, Any]

    @property
    def scores(self) -> ScoreTable:
        """The score table, one row per scored sample."""
        return Run(self.run).scores()

    def to_dict(self) -> dict[str, Any]:
        """Return the content of run.json, and the path, headline and warnings of the report."""
        verdict = {"headline": self.headline, "warnings": list(self.warnings)}
        return {**self.record, **verdict, "report": str(self.report)}


@overload
def score(
    data: str | Path | None = None,
    *,
    run: str | Path = "mmaudit-run",
    features: Mapping[str, str | Path] | Sequence[str] | None = None,
    preset: str | None = None,
    modality: Mapping[str, str] | Sequence[str] | None = None,
    encoder: Mapping[str, str] | Sequence[str] | None = None,
    task: str | None = None,
    label: str | None = None,
    id: str | None = None,
    group: str | None = None,
    split: str | None = None,
    allow_outside: bool = False,
    learn_from: str | None = None,
    repeats: int | None = None,
    thorough: bool = False,
    overwrite: bool = False,
    append: bool = False,
    seed: int | None = None,
    device: str = "auto",
    num_workers: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    stage: None = None,
    shard: None = None,
    config: RunConfig | str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    progress: bool = True,
) -> ScoreResult: ...


@overload
def score(
    data: str | Path | None = None,
    *,
    run: str | Path = "mmaudit-run",
    features: Mapping[str, str | Path] | Sequence[str] | None = None,
    preset: str | None = None,
    modality: Mapping[str, str] | Sequence[str] | None = None,
    encoder: Mapping[str, str] | Sequence[str] | None = None,
    task: str | None = None,
    label: str | None = None,
    id: str | None = None,
    group: str | None = None,
    split: str | None = None,
    allow_outside: bool = False,
    learn_from: str | None = None,
    repeats: int | None = None,
    thorough: bool = False,
    overwrite: bool = False,
    append: bool = False,
    seed: int | None = None,
    device: str = "auto",
    num_workers: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    stage: str,
    shard: str | None = None,
    config: RunConfig | str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    progress: bool = True,
) -> ScoreResult | StageResult: ...


@with_run(writes=True)
def score(
    data: str | Path | None = None,
    *,
    run: str | Path = "mmaudit-run",
    features: Mapping[str, str | Path] | Sequence[str] | None = None,
    preset: str | None = None,
    modality: Mapping[str, str] | Sequence[str] | None = None,
    encoder: Mapping[str, str] | Sequence[str] | None = None,
    task: str | None = None,
    label: str | None = None,
    id: str | None = None,
    group: str | None = None,
    split: str | None = None,
    allow_outside: bool = False,
    learn_from: str | None = None,
    repeats: int | None = None,
    thorough: bool = False,
    overwrite: bool = False,
    append: bool = False,
    seed: int | None = None,
    device: str = "auto",
    num_workers: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    stage: str | None = None,
    shard: str | None = None,
    config: RunConfig | str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    progress: bool = True,
) -> ScoreResult | StageResult:
    """Fit a probe per modality, score every sample out of fold, and write the report.

    A finished run of the same data and config is not changed; cached features are reused. With `features` the
    modalities are vectors computed elsewhere, joined to the data by id.

    Args:
        data: Folder, table file, glob, tar shards or their URL, saved dataset, or a Hugging Face dataset name.
        run: Run folder, a path or a URL.
        features: Vectors of a modality: a .parquet, .npz or .npy file; in Python also {"audio": "audio.npz"}.
        preset: Published protocol whose media settings to use, as `finetune --preset` does.
        modality: Modality, its column and kind; in Python also {"audio": "mfcc"}.
        encoder: Encoder of a modality: a name listed by `mmaudit methods`, hf:MODEL or package.module:function.
        task: classification, multilabel or regression; by default classification.
        label: Label column.
        id: Id column, or several that are unique together: video_id,clip_id.
        group: Group column: samples of one group always share a fold.
        split: Split column; none: ignore it and cut a test split.
        allow_outside: Allow paths outside the metadata's folder.
        learn_from: all, or train to keep test labels out of the probes; by default all.
        repeats: Repeats of cross-fitting; by default 3.
        thorough: Also measure what holds for other samples of the same kind; takes twice as long.
        overwrite: Replace a finished run, and remove the manifests and fine-tunings of its scores.
        append: Score the rows that were added to the data of a finished run by its own probes.
        seed: Random seed; by default 0.
        device: auto, cpu or cuda.
        num_workers: Processes that decode media; 0: none; by default one per CPU. With Ray the workers of all stages.
        engine: local, or ray to score on workers of a Ray cluster.
        ray_address: HOST:PORT of a Ray cluster, or auto; by default RAY_ADDRESS, else a cluster of this machine.
        stage: One stage, in a process of its own: encode, fit, score or merge; by default all.
        shard: Parts of the stages encode and score, as i/n: those of process i of n, from 1.
        config: TOML file with settings; in Python also a RunConfig.
        settings: One setting, such as probe.folds=10; in Python also {"probe.folds": 10}.
        progress: Show a progress bar in a terminal or notebook.

    Returns:
        The run folder, the counts and the content of run.json; `.scores` reads the score table. Of a stage before
        merge, its parts and the next stage.

    Raises:
        RunError: The folder holds a run of other data or config and `overwrite` is False.
        DatasetError: The data cannot be read.
        ConfigError: A setting does not fit the data.
        ScoreError: The samples cannot be scored.

    Example:
        >>> result = mmaudit.score("features.parquet", modality={"audio": "mfcc", "visual": "resnet"}, group="actor")
        >>> result.scores.gap.mean()
        >>> mmaudit.score("labels.csv", features={"audio": "wav2vec.npz", "visual": "clip.parquet"})
    """
    if data is None and not features:
        raise ConfigError("pass the data to score, or files of vectors with labels: mmaudit score --features FILE")
    check_stage(stage, shard, engine)
    if append and overwrite:
        raise ConfigError("--append with --overwrite: rows are appended to a finished run, which stays")
    keywords = data_settings(
        modality=modality,
        encoder=encoder,
        task=task,
        label=label,
        id=id,
        group=group,
        split=split,
        allow_outside=allow_outside,
    )
    keywords |= {"seed": seed, "probe.learn_from": learn_from, "probe.repeats": repeats}
    keywords |= {"probe.thorough": thorough or None}
    config, given = load_settings(config, settings, keywords, preset=preset)
    ray = choose_engine(engine, config.ray, address=ray_address, num_workers=num_workers, device=device)
    device = pick_device(device if ray is None else "cpu")
    run_dir = Run.open(run)
    run_dir.check_folder()
    if append:
        run_dir.record()
    about: dict[str, Any] = {} if preset is None else {"preset": _preset_record(preset, config)}
    if files := pairs(features):
        if ray is not None and RemoteRun.of(run_dir.folder) is not None:
            raise ConfigError(
                "--features with --engine ray and a run at a URL: score them with --stage, or without Ray"
            )
        joined = join_vectors(data, files, config.data, folder=run_dir.features / "joined")
        data, about = joined.path, {**about, "joined": joined.to_dict()}
    dataset = open_encodable(str(data), config.data)
    warn_without_effect("score", given, with_engine(effects_in_scoring(config, dataset.modalities), ray))
    with progress_bars(progress) as report_progress:
        options: dict[str, Any] = {"device": device, "num_workers": num_workers, "progress": report_progress}
        if stage is not None and stage != "merge" and append:
            return run_append_stage(run_dir, dataset, config, stage, shard=shard, options=options)
        if stage is not None and stage != "merge":
            job = open_job(run_dir, dataset, config, **options, staged=True)
            return run_stage(run_dir, job, stage, shard=shard)
        if append:
            with write_lock(run_dir.folder, command="mmaudit score --append") as lock:
                append_rows(run_dir, dataset, config, options=options, about=about, lock=lock, stage=stage, ray=ray)
        elif overwrite or not run_dir.is_scored():
            with write_lock(run_dir.folder, command="mmaudit score") as lock:
                if overwrite or not run_dir.is_scored():  # another process may have finished it meanwhile
                    if overwrite and stage is None:
                        shutil.rmtree(run_dir.stages, ignore_errors=True)
                    job = open_job(run_dir, dataset, config, **options, staged=stage is not None or ray is not None)
                    results, merged, seconds = run_job(job, stage, ray)
                    publish(
                        run_dir,
                        job,
                        config,
                        results,
                        merged,
                        seconds=seconds,
                        about=about,
                        overwrite=overwrite,
                        lock=lock,
                    )
                    _write_report(run_dir)
                    return _score_result(run_dir)
        if not append:
            if ray is not None:
                share_files(run_dir.folder, is_first=False)  # features of a run at a URL
            check_unchanged(run_dir, dataset, config, options)
    if not (run_dir.report_file.exists() and run_dir.report_file.with_suffix(".json").exists()):
        report(run=run_dir.folder)
    return _score_result(run_dir)


def _preset_record(name: str, config: RunConfig) -> dict[str, Any]:
    """Return the record of a preset in run.json, of the settings that scores depend on, without the seed."""
    own = build_config(RunConfig, preset_content(name), where="").scoring_config()
    return preset_record(name, own, {**config.scoring_config(), "seed": own["seed"]})


def _write_report(run_dir: Run) -> Path:
    from .report import write_report

    return write_report(run_dir)


def _score_result(run_dir: Run) -> ScoreResult:
    record = run_dir.record()
    counts = record["counts"]
    verdict = read_json(run_dir.report_file.with_suffix(".json"), error=RunError, shape=_REPORT)["verdict"]
    return ScoreResult(
        run=run_dir.folder,
        report=run_dir.report_file,
        num_samples=counts["input"],
        num_scored=counts["scored"],
        num_quarantined=counts["quarantined"],
        gap_verdict=record["gap_verdict"],
        headline=verdict["headline"],
        warnings=tuple(verdict["warnings"]),
        record=record,
    )


def data_settings(
    *,
    modality: Mapping[str, str] | Sequence[str] | None,
    encoder: Mapping[str, str] | Sequence[str] | None,
    allow_outside: bool,
    **columns: str | None,
) -> dict[str, Any]:
    """Return the settings of the section `data`; `columns` are the task and the columns by role."""
    return {
        "data.modality": pairs(modality),
        "data.encoder": pairs(encoder),
        "data.allow_outside": allow_outside or None,
        **{f"data.{name}": value for name, value in columns.items()},
    }


def pairs(values: Mapping[str, str | Path] | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return NAME=VALUE texts, of a mapping or as they are; None if there are none."""
    if isinstance(values, Mapping):
        values = [f"{name}={value}" for name, value in values.items()]
    return tuple(values) if values else None


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


def encode_missing(
    run_dir: Run, dataset: Dataset, config: RunConfig, *, device: str, num_workers: int | None, progress: Progress
) -> list[EncodeTask]:
    """Encode the features that are missing from the run's feature cache."""
    workers = default_workers() if num_workers is None else num_workers
    return encode_dataset(
        dataset, run_dir.features, media=config.media, num_workers=workers, device=device, progress=progress
    )
