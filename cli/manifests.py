"""The commands that read manifests: verify, diff, card, export, order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..audit.errors import ConfigError, ManifestError, ScoreError
from ..audit.locks import WAIT_SECONDS, write_lock
from ..audit.scores.table import read_scores
from ..audit.storage import read_schema, write_text
from ..rebalance.card import dataset_card
from ..rebalance.curriculum import batch_rows, epoch_order, id_keys, num_steps, training_rows, with_validation
from ..rebalance.diff import ManifestDiff, diff_manifests
from ..rebalance.manifest import Manifest, compute_digests, read_manifest, read_provenance
from ..rebalance.score_agreement import ScoreAgreement, compare_scores
from .config import RunConfig, load_settings
from .effects import effects_in_order, scored_settings, warn_without_effect
from .progress import progress_bars
from .provenance import Origin, SourceOptions, open_source, origin_of
from .remote_run import with_run
from .run import Run

if TYPE_CHECKING:
    from ..audit.features.encoded_samples import ContentHashes
    from ..audit.workers import Progress
    from ..rebalance.verify import Check, Verification

# Packages that decode media or train are imported inside functions: a split of 10^8 rows has no memory to spare.


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Dataset card section of a manifest in Markdown; notebooks render it.

    Attributes:
        manifest: The manifest.
        text: The section.
        file: The file that it was written to, if any.
    """

    manifest: str
    text: str
    file: Path | None

    def __str__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "manifest": self.manifest,
            "file": None if self.file is None else str(self.file),
            "card": self.text,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """Result of `export`.

    Attributes:
        format: The format.
        num_samples: Exported samples.
        files: The written files.
        details: Other counts of the format, such as missing media that were skipped.
    """

    format: str
    num_samples: int
    files: tuple[str, ...]
    details: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {"format": self.format, "rows": self.num_samples, **self.details, "files": list(self.files)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """Training samples of one epoch.

    Attributes:
        epoch: Number of the epoch, from 1.
        ids: Ids (n',) in order.
        share: Share of the training samples, in (0, 1].
        total: Number of all training samples.
        batch_size: Samples per step.
    """

    epoch: int
    ids: np.ndarray[Any, Any]
    share: float
    total: int
    batch_size: int

    def steps(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the number of each step, from 0, and its ids."""
        rows = np.arange(len(self.ids))
        for step in range(num_steps(rows, batch_size=self.batch_size)):
            yield step, self.ids[batch_rows(rows, step=step, batch_size=self.batch_size)].tolist()

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and the first ids as JSON values."""
        return {
            "epoch": self.epoch,
            "samples": len(self.ids),
            "total": self.total,
            "share": self.share,
            "first": self.ids[:5].tolist(),
        }


@with_run("features", "stages", writes=False)
def verify(
    manifest: str | Path,
    *,
    run: str | Path = "mmaudit-run",
    media: bool = True,
    data: str | Path | None = None,
    allow_outside: bool = False,
    progress: bool = True,
) -> Verification:
    """Check that a manifest and its data are unchanged since they were written and scored; exit 3 on a change.

    Checked are schema, ids, digests, ranges, dropped rows and media. Nothing that the metadata name is imported. A
    manifest that was not made by this user on this machine needs `data` and `allow_outside`.

    Args:
        manifest: Manifest file, or its name in the run.
        run: Run folder, a path or a URL.
        media: Check the media files; --no-media skips them.
        data: The data; also if your own data moved.
        allow_outside: Allow paths outside the data folder.
        progress: Show a progress bar in a terminal or notebook.

    Returns:
        The checks, and whether all passed.

    Raises:
        ManifestError: The manifest or its source was not found, or the source is named by an untrusted manifest only.

    Example:
        >>> mmaudit.verify("balanced").lines()
    """
    from ..rebalance.verify import check_media, verify_rows

    path = Run.open(run).find_manifest(str(manifest))
    checked, provenance = verify_rows(path), read_provenance(path)
    origin = origin_of(path, provenance, checked.digests)
    checks = [*checked.checks, _signature_check(origin)]
    has_failed = not checked.passed or bool(origin.changed)
    if not media or (data is None and "modalities" not in origin.scores):
        checks += check_media(path)
    elif has_failed and data is None and origin.record is None:  # the failed checks are more useful than an error
        checks += check_media(path, unopened=f"data not opened, since {origin.doubt}: pass them with --data")
    else:
        options = SourceOptions(data=data, allow_outside=allow_outside)
        with progress_bars(progress) as report_progress:
            contents, fingerprint = _contents_of_source(origin, options, report_progress)
        checks += check_media(path, contents=contents, fingerprint=fingerprint)
    return replace(checked, checks=tuple(checks))


@with_run("features", "stages", writes=False)
def diff(first: str | Path, second: str | Path, *, run: str | Path = "mmaudit-run") -> ManifestDiff | ScoreAgreement:
    """Compare two manifests: ids, bins, scores and recipes; or two runs: the rank agreement of their scores.

    Of two runs, or score tables, it is the agreement of discrepancies and gaps of single samples within classes, and
    that of the subsets, beside the ceiling that the scores' own reliability sets. Only samples in both count.

    Args:
        first: Manifest file, or its name in the run; or a run folder or score table.
        second: The same kind of file, to compare with.
        run: Run folder of manifests that are given by name.

    Returns:
        The differences of the manifests, or the agreement of the score tables.

    Raises:
        RunError: A manifest was not found, or a run is not scored.
        ManifestError: A manifest is malformed.
        ScoreError: A score table is malformed, or two have no samples in common.

    Example:
        >>> mmaudit.diff("balanced", "random").lines()
    """
    scored = [_score_file(entry) for entry in (first, second)]
    if scored[0] is not None and scored[1] is not None:
        return compare_scores(read_scores(scored[0]), read_scores(scored[1]), name_a=str(first), name_b=str(second))
    run_dir = Run.open(run)
    for entry, other, file in ((first, second, scored[0]), (second, first, scored[1])):
        if file is not None:
            raise ConfigError(f"{entry} is a run or a score table, {other} is neither: compare two of a kind")
    return diff_manifests(run_dir.find_manifest(str(first)), run_dir.find_manifest(str(second)))


def _score_file(entry: str | Path) -> Path | None:
    """Return the score table of a run folder, or the path of a score table; None for anything else."""
    path = Path(entry)
    if path.is_dir() and (path / "run.json").exists():
        return Run.open(path).scores_file
    if not path.is_file():
        return None
    names = read_schema(path, error=ScoreError).names
    has_scores = sum(name.startswith("confidence_") for name in names) > 1
    return path if has_scores and not {"subset", "reason"} & set(names) else None


@with_run("features", "stages", writes=False)
def card(manifest: str | Path, *, run: str | Path = "mmaudit-run", out: str | Path | None = None) -> Card:
    """Write a dataset card section on a manifest: modality balance, recipe, and how to load it.

    Args:
        manifest: Manifest file, or its name in the run.
        run: Run folder, a path or a URL.
        out: File to write; by default none.

    Returns:
        The section in Markdown.

    Raises:
        RunError: The manifest was not found.
        ManifestError: The manifest is malformed.

    Example:
        >>> print(mmaudit.card("balanced"))
    """
    text = dataset_card(Run.open(run).find_manifest(str(manifest)))
    if out is not None:
        write_text(text, Path(out))
    return Card(manifest=str(manifest), text=text, file=None if out is None else Path(out))


@with_run("features", "stages", writes=False)
def export(
    manifest: str | Path,
    *,
    format: str,
    out: str | Path,
    run: str | Path = "mmaudit-run",
    skip_missing: bool = False,
    escape_formulas: bool = True,
    overwrite: bool = False,
    data: str | Path | None = None,
    allow_outside: bool = False,
) -> ExportResult:
    """Write a manifest in another format; webdataset contains the media, the others list their paths.

    Only webdataset opens media: those of the manifest's source, or of `data`. A manifest that was not made by this user
    on this machine needs `data` and `allow_outside`.

    Args:
        manifest: Manifest file, or its name in the run.
        format: Name of the format.
        out: File or folder to write.
        run: Run folder, a path or a URL.
        skip_missing: Skip and count missing media.
        escape_formulas: csv: put an apostrophe before text that a spreadsheet would evaluate (= + - @);
            --no-escape-formulas leaves it as it is.
        overwrite: Replace existing output.
        data: The data; also if your own data moved.
        allow_outside: Allow paths outside the data folder.

    Returns:
        The files and counts.

    Raises:
        ConfigError: The format cannot hold the manifest.
        RunError: `out` exists.
        ManifestError: The manifest or its source was not found, or the source is named by an untrusted manifest only.

    Example:
        >>> mmaudit.export("balanced", format="csv", out="balanced.csv").files
        ('balanced.csv',)
    """
    from ..rebalance.export import contains_media, export_manifest

    path, out = Run.open(run).find_manifest(str(manifest)), Path(out)
    dataset = None
    if contains_media(path, format):
        origin = origin_of(path, read_provenance(path), compute_digests(path))
        dataset, _ = open_source(origin, SourceOptions(data=data, allow_outside=allow_outside), encoders=False)
    with write_lock(out.absolute().parent, out.name, command="mmaudit export", wait_seconds=WAIT_SECONDS):
        summary = export_manifest(
            path,
            out,
            format=format,
            dataset=dataset,
            skip_missing=skip_missing,
            escape_formulas=escape_formulas,
            overwrite=overwrite,
        )
    details = {key: value for key, value in summary.items() if key not in ("format", "rows", "files")}
    return ExportResult(
        format=summary["format"], num_samples=summary["rows"], files=tuple(summary["files"]), details=details
    )


@with_run("features", "stages", writes=False)
def order(
    manifest: str | Path,
    *,
    epoch: int = 1,
    run: str | Path = "mmaudit-run",
    order: str | None = None,
    pacing: str | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    config: RunConfig | str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
) -> Epoch:
    """Print the training samples of an epoch of a curriculum, in order.

    Args:
        manifest: Manifest file, or its name in the run.
        epoch: Epoch, counted from 1.
        run: Run folder, a path or a URL.
        order: curriculum, anti-curriculum, shuffled or weighted; by default curriculum.
        pacing: root, linear, step, geometric or exponential; by default root.
        batch_size: Samples per step; by default 64.
        seed: Random seed; by default 0.
        config: TOML file with settings; in Python also a RunConfig.
        settings: One setting, such as order.grow_epochs=10; in Python also {"order.grow_epochs": 10}.

    Returns:
        The ids of the epoch in order; `.steps()` yields those of each step.

    Raises:
        ConfigError: The epoch is below 1.
        ManifestError: The manifest holds no training rows.

    Example:
        >>> for step, ids in mmaudit.order("balanced", epoch=3).steps(): ...
    """
    keywords = {"seed": seed, "order.order": order, "order.pacing": pacing, "finetune.batch_size": batch_size}
    config, given = load_settings(config, settings, keywords)
    if epoch < 1:
        raise ConfigError(f"--epoch {epoch}: epochs are counted from 1")
    opened = read_manifest(Run.open(run).find_manifest(str(manifest)))
    warn_without_effect("order", given, effects_in_order(config), recorded=scored_settings(opened.provenance))
    rows = _training_rows(opened, config)
    ids = opened.table["sample_id"].take(rows)
    order_rows = epoch_order(
        rank=opened.table["rank"].to_numpy()[rows],
        balance=None if config.order.order != "weighted" else opened.numbers("balance")[rows],
        key=id_keys(ids),
        config=config.order,
        seed=config.seed,
        epoch=epoch,
    )
    return Epoch(
        epoch=epoch,
        ids=np.asarray(ids.take(order_rows).to_pylist(), dtype=object),
        share=len(order_rows) / len(rows),
        total=len(rows),
        batch_size=config.finetune.batch_size,
    )


def _signature_check(origin: Origin) -> Check:
    """Check a manifest against this user's signature; without a signature the check has no result."""
    from ..rebalance.verify import Check

    if origin.is_own:
        return Check("signature", passed=True, detail="made by you on this machine")
    if origin.changed:
        return Check("signature", passed=False, detail=f"its {origin.changed} changed since it was made")
    return Check("signature", passed=None, detail=origin.doubt or "not made by you on this machine")


def _contents_of_source(
    origin: Origin, options: SourceOptions, progress: Progress
) -> tuple[dict[str, ContentHashes], str]:
    """Hash the media of a manifest's source; return the hashes by sample id, and the dataset's fingerprint."""
    from ..audit.dataset.samples import read_samples
    from ..audit.features.encoded_samples import content_hashes, dataset_fingerprint

    dataset, scored_config = open_source(origin, options, encoders=False)
    samples = read_samples(dataset, seed=scored_config.seed, test_fraction=scored_config.data.test_fraction)
    contents = {}
    for number, content in enumerate(content_hashes(dataset), start=1):
        contents[content.sample_id] = content
        progress("hash", number, len(samples))
    digests = [contents[name].content for name in samples.sample_id]
    return contents, dataset_fingerprint(samples, np.array(digests, dtype=object))


def _training_rows(manifest: Manifest, config: RunConfig) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Return the rows that fine-tuning trains on: without validation rows and those that keep_posterior excludes."""
    split = with_validation(manifest.table, fraction=config.finetune.validation_fraction, seed=config.seed)
    rows = training_rows(split, manifest.numbers("p_balanced"), keep_posterior=config.finetune.keep_posterior)
    if len(rows) == 0:
        raise ManifestError("the manifest holds no rows of the training split: nothing to order")
    return rows
