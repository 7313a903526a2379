"""Python interface of manifests: split, diff, replay, card, export, order.

Each public function implements the command of the same name and can be called from a notebook.
"""

from __future__ import annotations

import logging
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

from ..audit.errors import ConfigError, ManifestError, RunError, printable
from ..audit.locks import WAIT_SECONDS, Lock, write_lock
from ..rebalance.card import dataset_card as write_card
from ..rebalance.curriculum import batch_rows, epoch_order, id_keys, num_steps
from ..rebalance.diff import diff_manifests as compare
from ..rebalance.manifest import Manifest, compute_digests, dropped_path, read_manifest, read_provenance
from ..rebalance.recipe import Recipe, SplitResult, make_split, recipe_from_record
from ..rebalance.score_tables import ScoreFiles, open_scores
from .config import RunConfig
from .provenance import origin_of, sign_manifest, trusted_folder
from .run import Run, replacing_manifest

# Packages that decode media or train are imported inside functions: a split of 10^8 rows has no memory to spare.

log = logging.getLogger("mmaudit")


def split(
    *,
    run: str | Path = "mmaudit-run",
    scores: str | Path | Sequence[str | Path] | None = None,
    config: RunConfig | None = None,
    balanced: bool = False,
    subset: str | None = None,
    dominated: str | None = None,
    gmm: str | None = None,
    like: str | None = None,
    intersect: Sequence[str] = (),
    exclude: Sequence[str] = (),
    resplit: str | None = None,
    between: str | None = None,
    name: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write a manifest and the table of its dropped rows, from the run's scores or from the score table `scores`.

    At most one of balanced, subset, dominated and gmm selects the samples.

    Args:
        run: the run folder.
        scores: score table of any tool in place of the run's: a file, folder or glob of shards, of any size.
        config: settings of the split.
        balanced: select a subset with uniformly distributed discrepancy.
        subset: `audio-preferred`, `balanced:0.2`, `most-balanced:20%`, `least-balanced:20%` or `random:500`.
        dominated: `visual:0.2`, the samples with discrepancy above 0.2.
        gmm: `balanced` or `imbalanced`, by the gap mixture.
        like: with subset `random`, a manifest whose counts by split and class are matched.
        intersect: manifests that must contain a sample; by file or by name in the run, as are like and exclude.
        exclude: manifests that must not contain a sample.
        resplit: shares of new splits, such as `80/8/12`.
        between: modalities of the discrepancy, `A:B`, or `A` against the rest.
        name: name of the manifest.
        dry_run: write nothing.

    Returns:
        A summary: file, counts, and the uniformity of the discrepancy before and after.
    """
    config = config or RunConfig()
    run_dir = Run.open(run)
    recipe = Recipe(
        seed=config.seed,
        balanced=config.split if balanced else None,
        subset=subset,
        dominated=dominated,
        gmm=gmm,
        posterior=config.posterior,
        between=between,
        like=None if like is None else str(run_dir.find_manifest(like)),
        intersect=tuple(str(run_dir.find_manifest(reference)) for reference in intersect),
        exclude=tuple(str(run_dir.find_manifest(reference)) for reference in exclude),
        resplit=resplit,
    )
    if scores is None:
        run_dir.record()
        scores = run_dir.scores_file
    shards = open_scores(scores, seed=config.seed)
    single_table = scores if isinstance(scores, (str, Path)) else None
    with _staged_manifest(run_dir, dry_run=dry_run) as path_of:
        result = make_split(
            shards,
            recipe,
            path_of,
            scratch=run_dir.folder,
            name=name,
            scores=single_table,
            relative_to=run_dir.manifests_folder,
            dry_run=dry_run,
        )
        if result.path is not None:
            path = run_dir.manifest(result.path.stem)
            table = None if single_table is None else Path(single_table)
            sign_manifest(result.path, path, run=run_dir.folder, scores=table)
            result = replace(result, path=path)
    if balanced and between is None and len(shards.modalities) > 2:
        log.info(
            "of %d modalities, %s is the pair with the largest balanced split; select another with --between",
            len(shards.modalities),
            result.numbers["between"],
        )
    verdict = {"gap_verdict": run_dir.record()["gap_verdict"]} if gmm is not None and run_dir.is_scored() else {}
    return {**_summary(result), **verdict}


@contextmanager
def _staged_manifest(run_dir: Run, *, dry_run: bool) -> Iterator[Callable[[str], Path]]:
    """Yield a function from a manifest's name to the path to write; it locks the name.

    At the end the new manifest replaces an older one of that name. The run's scores are locked meanwhile.
    """
    with ExitStack() as stack:

        def lock(scope: str) -> Lock:
            return stack.enter_context(
                write_lock(run_dir.folder, scope, command="mmaudit split", wait_seconds=WAIT_SECONDS)
            )

        def path_of(name: str) -> Path:
            path = run_dir.manifest(name)
            if dry_run:
                return path
            name_lock = lock(f"manifests/{name}")
            if path.exists():
                log.info("replacing %s", path)
            return stack.enter_context(replacing_manifest(run_dir.folder, name, lock=name_lock)) / path.name

        if not dry_run:
            lock(f"manifests/.{secrets.token_hex(4)}")  # excludes a lock on the whole run, and no other split
        yield path_of


def diff(first: str | Path, second: str | Path, *, run: str | Path = "mmaudit-run") -> dict[str, Any]:
    """Compare two manifests, each by file or by name in the run; returns plain values, and text in `lines`."""
    run_dir = Run.open(run)
    difference = compare(run_dir.find_manifest(str(first)), run_dir.find_manifest(str(second)))
    return {**difference.to_dict(), "lines": difference.lines()}


def card(manifest: str | Path, *, run: str | Path = "mmaudit-run") -> str:
    """Return the dataset card section of a manifest as Markdown."""
    return write_card(Run.open(run).find_manifest(str(manifest)))


def export(
    manifest: str | Path,
    *,
    out: str | Path,
    format: str,
    run: str | Path = "mmaudit-run",
    data: str | Path | None = None,
    allow_outside: bool = False,
    skip_missing: bool = False,
    escape_formulas: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a manifest in another format.

    Only webdataset opens media: those of the manifest's source, or of `data`. A manifest that was not made by this user
    on this machine needs `data` and `allow_outside`.

    Args:
        manifest: a manifest's file, or its name in the run.
        out: the file or folder to write.
        format: csv, jsonl, npy, ogm, webdataset or datasets.
        run: the run folder.
        data: the data, if they moved.
        allow_outside: whether media paths may lead outside the data folder.
        skip_missing: skip missing media.
        escape_formulas: in csv, prefix text that a spreadsheet would evaluate with an apostrophe.
        overwrite: replace an existing `out`.

    Returns:
        The files and counts.

    Raises:
        ConfigError: the format cannot hold the manifest.
        RunError: `out` exists.
        ManifestError: the manifest or its source was not found, or the source is named by an untrusted manifest only.
    """
    from ..rebalance.export import contains_media
    from ..rebalance.export import export_manifest as write_export
    from .provenance import SourceOptions, open_source

    path, out = Run.open(run).find_manifest(str(manifest)), Path(out)
    dataset = None
    if contains_media(path, format):
        origin = origin_of(path, read_provenance(path), compute_digests(path))
        dataset, _ = open_source(origin, SourceOptions(data=data, allow_outside=allow_outside), encoders=False)
    with write_lock(out.absolute().parent, out.name, command="mmaudit export", wait_seconds=WAIT_SECONDS):
        return write_export(
            path,
            out,
            format=format,
            dataset=dataset,
            skip_missing=skip_missing,
            escape_formulas=escape_formulas,
            overwrite=overwrite,
        )


def replay(
    manifest: str | Path, *, run: str | Path = "mmaudit-run", scores: str | Path | None = None
) -> dict[str, Any]:
    """Rebuild a manifest from its score table and its recipe, and compare the files byte by byte.

    Args:
        manifest: a manifest's file, or its name in the run.
        run: the run folder.
        scores: the score table, if it moved.

    Returns:
        The file, its scores, whether the rebuilt files are `identical`, and the names of those that `differ`.

    Raises:
        ManifestError: the manifest or its scores were not found, or the scores are named by an untrusted manifest only.
    """
    path = Run.open(run).find_manifest(str(manifest))
    record = read_provenance(path).get("recipe", {})
    recipe = recipe_from_record(record, folder=path.parent)
    outside = [file for file in (recipe.like, *recipe.intersect, *recipe.exclude) if file is not None]
    outside += [] if scores is not None or record["scores"] is None else [str(path.parent / str(record["scores"]))]
    _check_inside(path, outside)
    before = None if record["scores"] is None else path.parent / str(record["scores"])
    table = before if scores is None else Path(scores)
    if table is None:
        raise ManifestError(f"{path} does not name the score tables it was made from; pass them with --scores")
    if scores is None and not (table.exists() or glob(str(table))):
        raise ManifestError(f"score table {table} of the manifest not found; pass it with --scores")
    shards = open_scores(table, seed=recipe.seed)
    with tempfile.TemporaryDirectory(prefix="mmaudit-replay-") as scratch:
        rebuilt = _rebuild(shards, recipe, path, Path(scratch), scores=before)
        differ = [
            old.name
            for old, new in ((path, rebuilt), (dropped_path(path), dropped_path(rebuilt)))
            if not old.exists() or old.read_bytes() != new.read_bytes()
        ]
    return {"file": str(path), "scores": str(table), "identical": not differ, "differ": differ}


def _check_inside(path: Path, files: Sequence[str]) -> None:
    """Raise ManifestError if an untrusted manifest names files outside its run, or outside its folder."""
    root = trusted_folder(path)
    files_named = [match for file in files for match in glob(file) or [file]]
    outside = [file for file in files_named if not Path(file).resolve().is_relative_to(root)]
    if not outside:
        return
    origin = origin_of(path, read_provenance(path), compute_digests(path))
    if not origin.is_own:
        doubt = origin.doubt or "it was not made by you on this machine"
        raise ManifestError(
            f"{path} is not trusted to name files, since {doubt}; it was made from {printable(outside[0])}: "
            "pass the scores with --scores, or copy the manifests it was made from into its folder"
        )


def _rebuild(shards: ScoreFiles, recipe: Recipe, path: Path, scratch: Path, *, scores: Path | None) -> Path:
    """Write the manifest of a recipe into `scratch`; its source files are named relative to the folder of `path`."""
    rebuilt = make_split(
        shards,
        recipe,
        lambda name: scratch / f"{name}.parquet",
        scratch=scratch,
        name=read_provenance(path)["subset"],
        scores=scores,
        relative_to=path.parent,
    )
    if rebuilt.path is None:
        raise RunError(f"{path} could not be rebuilt")
    return rebuilt.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """Training samples of one epoch: ids (n',) in order, which are `share` of all `total` training samples."""

    ids: np.ndarray[Any, Any]
    share: float
    total: int
    batch_size: int

    def steps(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the number of each step, from 0, and its ids."""
        rows = np.arange(len(self.ids))
        for step in range(num_steps(rows, batch_size=self.batch_size)):
            yield step, self.ids[batch_rows(rows, step=step, batch_size=self.batch_size)].tolist()


def order(
    manifest: str | Path, *, run: str | Path = "mmaudit-run", epoch: int, config: RunConfig | None = None
) -> Epoch:
    """Return the training samples of a manifest in the order of an epoch of fine-tuning.

    Args:
        manifest: a manifest's file, or its name in the run.
        run: the run folder.
        epoch: the epoch, from 1.
        config: settings of the order and of fine-tuning.

    Raises:
        ConfigError: the epoch is below 1.
        ManifestError: the manifest holds no training rows.
    """
    config = config or RunConfig()
    if epoch < 1:
        raise ConfigError(f"--epoch {epoch}: epochs are counted from 1")
    opened = read_manifest(Run.open(run).find_manifest(str(manifest)))
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
        ids=np.asarray(ids.take(order_rows).to_pylist(), dtype=object),
        share=len(order_rows) / len(rows),
        total=len(rows),
        batch_size=config.finetune.batch_size,
    )


def _training_rows(manifest: Manifest, config: RunConfig) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Return the rows that fine-tuning trains on: without validation rows and those that keep_posterior excludes."""
    from ..train.examples import with_validation

    split = with_validation(
        manifest.table,
        manifest.strings("sample_id"),
        np.asarray(manifest.numbers("label"), dtype=np.int32),
        fraction=config.finetune.validation_fraction,
        seed=config.seed,
    )
    train = split == "train"
    if config.finetune.keep_posterior is not None:
        train &= manifest.numbers("p_balanced") >= config.finetune.keep_posterior
    if not train.any():
        raise ManifestError("the manifest holds no rows of the training split: nothing to order")
    return np.flatnonzero(train)


def _summary(result: SplitResult) -> dict[str, Any]:
    numbers = {
        key: value for key, value in result.numbers.items() if key not in ("classes", "counts_before", "counts_after")
    }
    least_uniform = sorted(result.numbers["classes"], key=lambda row: -row["distance_after"])[:5]
    return {
        "file": None if result.path is None else str(result.path),
        **numbers,
        "least_uniform_classes": least_uniform,
    }
