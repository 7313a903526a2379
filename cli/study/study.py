"""The command `study`: all methods and controls on subsets of the data, agreement of scores, a page of findings."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...audit.errors import ConfigError, RunError
from ...audit.locks import write_lock
from ...audit.storage import read_json, write_json
from ..config import RunConfig
from ..scoring import data_settings, pick_device
from .page import write_page
from .steps import Execution, StudyPlan, StudySet, default_methods, study_set

log = logging.getLogger("mmaudit")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    """Result of `study`.

    Attributes:
        page: The page, Markdown with figures.
        folder: Its folder, which holds the run of each dataset too.
        numbers: What the page is written from, by dataset; also in study.json.
    """

    page: Path
    folder: Path
    numbers: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the path of the page and the numbers."""
        return {"page": str(self.page), **self.numbers}


def study(
    data: Sequence[str | Path],
    *,
    out: str | Path = "mmaudit-study",
    method: Sequence[str] = (),
    seeds: int = 5,
    probe: Sequence[str] = (),
    modality: Mapping[str, str] | Sequence[str] | None = None,
    encoder: Mapping[str, str] | Sequence[str] | None = None,
    label: str | None = None,
    id: str | None = None,
    group: str | None = None,
    split: str | None = None,
    allow_outside: bool = False,
    jobs: int = 1,
    seed: int = 0,
    device: str = "auto",
    num_workers: int | None = None,
    config: RunConfig | str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    progress: bool = True,
) -> StudyResult:
    """Repeat the balanced dataset's study on other data: all methods and controls on subsets, and a page of findings.

    Each dataset is scored without its test labels, and again by other probes and with another seed, split into
    balanced, imbalanced and random subsets, and all methods are compared on them. A finished step is not repeated: run
    the same command again after an interruption.

    Args:
        data: One or more datasets: folders, table files or saved datasets.
        out: Folder of the page and of the runs.
        method: Method to compare, as of `compare`, the baseline first; by default all.
        seeds: Trainings of each method; by default 5.
        probe: Other probe to score with, as NAME: SECTION.KEY=VALUE; by default mlp: probe.kind=mlp.
        modality: Modality, its column and kind; in Python also {"audio": "mfcc"}.
        encoder: Encoder of a modality.
        label: Label column.
        id: Id column, or several that are unique together: video_id,clip_id.
        group: Group column: samples of one group always share a fold.
        split: Split column; none: ignore it and cut a test split.
        allow_outside: Allow paths outside the metadata's folder.
        jobs: Processes that train at the same time; by default 1.
        seed: First random seed.
        device: auto, cpu or cuda.
        num_workers: Processes that decode media; 0: none; by default one per CPU.
        config: TOML file with settings; in Python also a RunConfig.
        settings: One setting of all trainings and scores, such as finetune.epochs=20.
        progress: Show a progress bar in a terminal or notebook.

    Returns:
        The page and its numbers.

    Raises:
        DatasetError: Data cannot be read.
        ConfigError: A method does not exist, or two datasets have one name.

    Example:
        >>> mmaudit.study(["clips"], group="speaker", jobs=2).page
    """
    keywords = data_settings(
        modality=modality,
        encoder=encoder,
        label=label,
        id=id,
        group=group,
        split=split,
        allow_outside=allow_outside,
    )
    common = {key: value for key, value in keywords.items() if value is not None}
    entries = [data] if isinstance(data, str | Path) else data
    sets = [StudySet(name=Path(entry).stem, data=entry, settings=common) for entry in entries]
    plan = StudyPlan.of(method or default_methods(), seeds=seeds, probes=probe, config=config, settings=settings)
    execution = Execution(jobs=jobs, seed=seed, device=pick_device(device), num_workers=num_workers, progress=progress)
    return study_sets(sets, plan, Path(out), execution)


def study_sets(sets: Sequence[StudySet], plan: StudyPlan, out: Path, execution: Execution) -> StudyResult:
    """Study datasets one after another, each with settings of its own, and write the page and study.json."""
    names = [entry.name for entry in sets]
    if not names:
        raise ConfigError("pass at least one dataset")
    if len(set(names)) < len(names):
        raise ConfigError(f"two datasets are named {max(names, key=names.count)}: rename one of them")
    results = {}
    with write_lock(out, "study", command="mmaudit study"):
        for number, entry in enumerate(sets, start=1):
            log.info("%s, dataset %d of %d", entry.name, number, len(sets))
            results[entry.name] = study_set(entry, plan, out / entry.name, execution)
            numbers = {"seeds": plan.seeds, "baseline": plan.baseline, "sets": results}
            write_json(numbers, out / "study.json")
    numbers = read_json(out / "study.json", error=RunError)  # the page follows its order of names
    return StudyResult(page=write_page(numbers, out), folder=out, numbers=numbers)
