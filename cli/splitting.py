"""The commands that make manifests: split, replay."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any

from ..audit.errors import ConfigError, ManifestError, RunError, printable
from ..audit.locks import WAIT_SECONDS, Lock, write_lock
from ..rebalance.manifest import compute_digests, dropped_path, read_provenance
from ..rebalance.recipe import Recipe, make_split, recipe_from_record
from ..rebalance.score_tables import ScoreFiles, open_scores
from .config import RunConfig, load_settings
from .effects import effects_in_splitting, warn_without_effect
from .provenance import origin_of, sign_manifest, trusted_folder
from .remote_run import with_run
from .run import Run
from .swap import replacing_manifest

# Packages that decode media or train are imported inside functions: a split of 10^8 rows has no memory to spare.

log = logging.getLogger("mmaudit")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSummary:
    """Result of `split`.

    Attributes:
        manifest: The manifest; None for a dry run.
        name: Its name.
        num_scored: Samples that were scored.
        num_kept: Samples in the manifest.
        splits: Their number by split.
        distance: Distance of the discrepancy of the kept samples to uniform, in [0, 1]; 0 is uniform.
        numbers: All numbers of the split, as in NAME.balance.json.
    """

    manifest: Path | None
    name: str
    num_scored: int
    num_kept: int
    splits: dict[str, int]
    distance: float
    numbers: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the path of the manifest, and the numbers of the split as JSON values."""
        return {"file": None if self.manifest is None else str(self.manifest), **self.numbers}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """Result of `replay`.

    Attributes:
        manifest: The manifest.
        scores: The score table that it was rebuilt from.
        identical: Whether the rebuilt files are identical, byte by byte.
        differ: Names of the files that differ.
    """

    manifest: Path
    scores: Path
    identical: bool
    differ: tuple[str, ...]

    @property
    def failed_gate(self) -> str:
        """Why the check failed, "" if the files are identical."""
        if self.identical:
            return ""
        return f"{' and '.join(self.differ)} differs when rebuilt: the scores or mmaudit have changed"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "file": str(self.manifest),
            "scores": str(self.scores),
            "identical": self.identical,
            "differ": list(self.differ),
        }


@with_run("features", "stages", writes=True)
def split(
    *,
    run: str | Path = "mmaudit-run",
    balanced: bool = False,
    subset: str | None = None,
    dominated: str | None = None,
    gmm: str | None = None,
    like: str | None = None,
    intersect: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tolerance: float | None = None,
    size: int | None = None,
    bins: int | str | None = None,
    by: str | None = None,
    grid: bool = False,
    between: str | None = None,
    resplit: str | None = None,
    scores: str | Path | list[str | Path] | None = None,
    name: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    seed: int | None = None,
    config: RunConfig | str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
) -> SplitSummary:
    """Write a manifest of a subset, and a table of the dropped rows with their reasons.

    At most one of balanced, subset, dominated and gmm selects the samples.

    Args:
        run: Run folder, a path or a URL.
        balanced: Uniformly distributed discrepancy.
        subset: MODALITY-preferred, balanced[:T] for |D| <= T, most-balanced:N, least-balanced:N or random:N; N is a
            number or a share such as 20%.
        dominated: Discrepancy above T.
        gmm: balanced or imbalanced, by the gap mixture, or by its threshold if not bimodal.
        like: With --subset random: as many samples of each split and class as this manifest has.
        intersect: Keep only samples that are in this manifest; alone or with the above.
        exclude: Keep only samples that are not in this manifest; alone or with the above.
        tolerance: Allowed distance to uniform; 0: exact; by default 0.05. With --size or weights: exit 3 above it.
        size: Number of samples to keep.
        bins: Bins over [-1, 1]; auto: by sample size; by default 20.
        by: dropping, or weight: keep all samples, with weights that make them uniform; by default dropping.
        grid: Uniform over both confidences, bins x bins.
        between: Modalities of the discrepancy: A minus B, or A minus the mean of the rest.
        resplit: Assign new train, validation and test splits first: stratified, groups not divided.
        scores: Score table of any tool in place of the run's: file, folder or glob of shards.
        name: Name of the manifest.
        dry_run: Print the summary without writing anything.
        overwrite: Replace an existing manifest of that name.
        seed: Random seed; by default 0.
        config: TOML file with settings; in Python also a RunConfig.
        settings: One setting, such as split.bins=10; in Python also {"split.bins": 10}.

    Returns:
        The manifest, counts, and the uniformity of the discrepancy before and after.

    Raises:
        RunError: The run is not scored, or has a manifest of that name and `overwrite` is False.
        ConfigError: A setting is invalid, or two contradict each other.
        ScoreError: The score table is malformed.
        GateError: A requested size, or weights, cannot reach the tolerance set with them.

    Example:
        >>> mmaudit.split(balanced=True, tolerance=0.1).num_kept
    """
    keywords = {
        "seed": seed,
        "split.tolerance": tolerance,
        "split.size": size,
        "split.bins": _num_bins(bins),
        "split.by": by,
        "split.grid": grid or None,
    }
    config, given = load_settings(config, settings, keywords)
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
    scored = run_dir.record()["config"] if scores is None else None
    scores = run_dir.score_source if scores is None else scores
    effects = effects_in_splitting(config, balanced=balanced, gmm=gmm is not None)
    warn_without_effect("split", given, effects, recorded=scored)
    shards = open_scores(scores, seed=config.seed)
    single_table = scores if isinstance(scores, (str, Path)) else None
    with _staged_manifest(run_dir, dry_run=dry_run, overwrite=overwrite) as path_of:
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
    return SplitSummary(
        manifest=result.path,
        name=result.numbers["name"],
        num_scored=result.numbers["scored"],
        num_kept=result.numbers["kept"],
        splits=result.numbers["splits"],
        distance=result.numbers["after"]["distance"],
        numbers={**_printed_numbers(result.numbers), **verdict},
    )


def _num_bins(bins: int | str | None) -> int | None:
    """Return a number of bins; 0 for `auto`."""
    if bins is None or bins == "auto":
        return None if bins is None else 0
    if not str(bins).isdigit() or int(bins) == 0:
        raise ConfigError(f"--bins {bins}: must be a number from 2 on, or auto")
    return int(bins)


@contextmanager
def _staged_manifest(run_dir: Run, *, dry_run: bool, overwrite: bool) -> Iterator[Callable[[str], Path]]:
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
            if path.exists() and not overwrite:
                raise RunError(f"{path} exists: pass another --name, or --overwrite")
            return stack.enter_context(replacing_manifest(run_dir.folder, name, lock=name_lock)) / path.name

        if not dry_run:
            lock(f"manifests/.{secrets.token_hex(4)}")  # excludes a lock on the whole run, and no other split
        yield path_of


def _printed_numbers(numbers: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a split without those of every class, of which the five least uniform are returned."""
    printed = {key: value for key, value in numbers.items() if key not in ("classes", "counts_before", "counts_after")}
    return {**printed, "least_uniform_classes": sorted(numbers["classes"], key=lambda row: -row["distance_after"])[:5]}


@with_run("features", "stages", writes=False)
def replay(manifest: str | Path, *, run: str | Path = "mmaudit-run", scores: str | Path | None = None) -> ReplayResult:
    """Rebuild a manifest from its score table and recipe; exit 3 unless it is identical, byte by byte.

    Args:
        manifest: Manifest file, or its name in the run.
        run: Run folder, a path or a URL.
        scores: Score table, if it moved.

    Returns:
        The manifest, its scores, whether the rebuilt files are identical, and the names of those that differ.

    Raises:
        ManifestError: The manifest or its scores were not found, or the scores are named by an untrusted manifest only.

    Example:
        >>> mmaudit.replay("balanced").identical
        True
    """
    path = Run.open(run).find_manifest(str(manifest))
    record = read_provenance(path).get("recipe", {})
    recipe = recipe_from_record(record, folder=path.parent)
    outside = [file for file in (recipe.like, *recipe.intersect, *recipe.exclude) if file is not None]
    outside += [] if scores is not None or record["scores"] is None else [str(path.parent / str(record["scores"]))]
    _check_inside(path, outside)
    before = None if record["scores"] is None else _without_parents(path.parent / str(record["scores"]))
    table = before if scores is None else Path(scores)
    if table is None:
        raise ManifestError(f"{path} does not name the score tables it was made from; pass them with --scores")
    if scores is None and not (table.exists() or glob(str(table))):
        raise ManifestError(f"score table {table} of the manifest not found; pass it with --scores")
    shards = open_scores(table, seed=recipe.seed)
    with tempfile.TemporaryDirectory(prefix="mmaudit-replay-") as scratch:
        rebuilt = _rebuild(shards, recipe, path, Path(scratch), scores=before)
        differ = tuple(
            old.name
            for old, new in ((path, rebuilt), (dropped_path(path), dropped_path(rebuilt)))
            if not old.exists() or old.read_bytes() != new.read_bytes()
        )
    return ReplayResult(manifest=path, scores=table, identical=not differ, differ=differ)


def _without_parents(path: Path) -> Path:
    """Return the path without `FOLDER/..` where it names the same file, which a link as FOLDER prevents."""
    normal = Path(os.path.normpath(path))
    return normal if normal.resolve() == path.resolve() else path


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
