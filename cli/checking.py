"""The commands that read data and train nothing: ingest, check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..audit.dataset.columns import SPLITS
from ..audit.dataset.not_read import NotRead
from ..audit.dataset.samples import Samples, read_samples
from ..audit.downloads.ingest import Ingested
from ..audit.downloads.ingest import ingest as ingest_download
from ..audit.errors import Quarantined
from ..audit.features.encoded_samples import collect_encoded, select_usable
from ..audit.findings import Leakage
from ..audit.group_overlap import read_group_columns
from ..audit.leakage import ModalityContent, find_leakage
from ..audit.locks import write_lock
from .config import RunConfig, load_settings
from .effects import effects_in_checking, warn_without_effect
from .progress import progress_bars
from .provenance import open_encodable
from .remote_run import with_run
from .run import Run
from .scoring import data_settings, encode_missing, pick_device


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """Result of `check`.

    Attributes:
        source: The data.
        num_samples: Samples in the data.
        num_usable: Samples that can be scored.
        modalities: The modalities, each as NAME=COLUMN:KIND and its encoder.
        unusable: Counts of unusable samples by reason and modality, each with an example.
        task: classification, multilabel or regression.
        classes: Samples of each class; for multilabel of each label, for regression of each stratum. The most frequent
            come first.
        splits: Samples of each split.
        split_source: "data" if the data state the splits, "cut" if they state none and a test split was cut here.
        leakage: What train and test share.
        not_read: Columns and files that no modality is read from, each with the reason.
    """

    source: str
    num_samples: int
    num_usable: int
    modalities: tuple[str, ...]
    unusable: tuple[dict[str, Any], ...]
    task: str
    classes: dict[str, int]
    splits: dict[str, int]
    split_source: str
    leakage: Leakage
    not_read: tuple[NotRead, ...] = ()

    @property
    def failed_gate(self) -> str:
        """Why the check failed, "" if there is no leak."""
        if not self.leakage.leaks:
            return ""
        number = len(self.leakage.findings)
        return f"train and test overlap: {number} {'leak' if number == 1 else 'leaks'} found, listed above"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "source": self.source,
            "input": self.num_samples,
            "usable": self.num_usable,
            "modalities": list(self.modalities),
            "unusable": list(self.unusable),
            "task": self.task,
            "classes": self.classes,
            "splits": self.splits,
            "split_source": self.split_source,
            "leakage": self.leakage.to_json(),
            "not_read": [asdict(entry) for entry in self.not_read],
        }


def ingest(
    name: str, folder: str | Path, *, lists: Sequence[str | Path] = (), out: str | Path | None = None
) -> Ingested:
    """Convert an official download into metadata.parquet, and list the missing clips.

    Args:
        name: Name of the dataset.
        folder: Folder of the unpacked download.
        lists: List of clips or splits to use in place of the download's own.
        out: Table to write; by default metadata.parquet in the folder.

    Returns:
        The path of the table, and the counts of listed and missing clips.

    Raises:
        ConfigError: The name is unknown.
        DatasetError: The folder is not that download.

    Example:
        >>> mmaudit.ingest("cremad", "CREMA-D").path
        PosixPath('CREMA-D/metadata.parquet')
    """
    return ingest_download(name, folder, lists=lists, out=out)


@with_run("stages", writes=True)
def check(
    data: str | Path,
    *,
    run: str | Path = "mmaudit-run",
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
    config: RunConfig | str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    progress: bool = True,
) -> CheckResult:
    """Check the data: usable and unusable samples, and leaks between train and test; exit 3 on a leak.

    Nothing is trained. Encoded features are cached in the run folder, for use by `score`. Without a split column, the
    split that `score` would cut is checked.

    Args:
        data: Folder, table file, glob, tar shards or their URL, saved dataset, or a Hugging Face dataset name.
        run: Run folder, a path or a URL.
        modality: Modality, its column and kind; in Python also {"audio": "mfcc"}.
        encoder: Encoder of a modality: a name listed by `mmaudit methods`, hf:MODEL or package.module:function.
        task: classification, multilabel or regression; by default classification.
        label: Label column.
        id: Id column, or several that are unique together: video_id,clip_id.
        group: Group column: samples of one group always share a fold.
        split: Split column; none: ignore it and cut a test split.
        allow_outside: Allow paths outside the metadata's folder.
        seed: Random seed; by default 0.
        device: auto, cpu or cuda.
        num_workers: Processes that decode media; 0: none; by default one per CPU.
        config: TOML file with settings; in Python also a RunConfig.
        settings: One setting, such as probe.folds=10; in Python also {"probe.folds": 10}.
        progress: Show a progress bar in a terminal or notebook.

    Returns:
        The counts, modalities, unusable samples by reason, and the leakage report.

    Raises:
        DatasetError: The data cannot be read.
        ConfigError: A setting does not fit the data.
        RunError: The run folder holds something other than a run.

    Example:
        >>> result = mmaudit.check("clips", group="actor")
        >>> result.leakage.leaks
        False
    """
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
    config, given = load_settings(config, settings, {**keywords, "seed": seed})
    run_dir = Run.open(run)
    dataset = open_encodable(data, config.data)
    warn_without_effect("check", given, effects_in_checking(config, dataset.modalities))
    run_dir.check_folder()
    samples = read_samples(dataset, seed=config.seed, test_fraction=config.data.test_fraction)
    with progress_bars(progress) as report_progress:
        with write_lock(run_dir.folder, "features", command="mmaudit check"):
            tasks = encode_missing(
                run_dir, dataset, config, device=pick_device(device), num_workers=num_workers, progress=report_progress
            )
        encoded = collect_encoded(dataset, samples, tasks)
        rows, left_out = select_usable(encoded, keep_duplicates=config.data.keep_duplicates)
        leakage = find_leakage(
            samples,
            [ModalityContent.of(status, tasks) for status in encoded.statuses],
            groups=read_group_columns(dataset),
            config=config.leakage,
            seed=config.seed,
            progress=report_progress,
        )
    return CheckResult(
        source=str(data),
        num_samples=len(samples),
        num_usable=len(rows),
        modalities=tuple(str(modality) for modality in dataset.modalities),
        unusable=tuple(_by_reason(left_out)),
        task=samples.task,
        classes=_class_counts(samples),
        splits={name: count for name in SPLITS if (count := int((samples.split == name).sum()))},
        split_source="data" if dataset.columns.split else "cut",
        leakage=leakage,
        not_read=dataset.not_read,
    )


def _class_counts(samples: Samples) -> dict[str, int]:
    """Return the number of samples of each class, label or stratum, the most frequent first."""
    if samples.task == "multilabel" and samples.values is not None:
        names, counts = samples.outputs, np.nansum(samples.values, axis=0).astype(int).tolist()
    else:
        names = samples.class_names
        counts = np.bincount(samples.label[samples.label >= 0], minlength=len(names)).tolist()
    count_of: Counter[str] = Counter()  # two classes may have one name
    for name, count in zip(names, counts, strict=True):
        count_of[name] += count
    return dict(sorted(count_of.items(), key=lambda pair: (-pair[1], pair[0])))


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
