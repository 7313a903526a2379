"""Recipes of manifests: what a split selects, and how uniform it measures.

A split is uniform by the scores that it is selected by, also where these are noise. So the same split is made by the
scores of one half of the features, and its distance is measured by those of the other half, both ways. Ours.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..audit.errors import ConfigError, GateError, ManifestError
from ..audit.metrics import Floats
from ..audit.parsing import build_config
from ..audit.scores.table import HALVES
from ..audit.storage import write_json
from .balanced import BalancedConfig, BalancedRule, balancing_weights, plan_balanced
from .manifest import balance_path, read_batches_of_manifest, read_provenance, read_stated_digests
from .resplit import parse_shares, resplit
from .score_tables import ManifestMembers, ScoreBatch, ScoreFiles, check_same_dataset, hash_keys
from .selection import Counts, Selection, SelectionRule, select_rows
from .split import write_split
from .split_stats import distance_to_uniform
from .subsets import all_samples, by_mixture, parse_dominated, parse_subset

MAX_ROWS = 200_000  # those of the smallest keys


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Rows in the order of their keys: key, split, and cells and bins by either half, all (n,)."""

    key: NDArray[np.uint64]
    split: NDArray[np.int16]
    cells: tuple[NDArray[np.int32], NDArray[np.int32]]
    bins: tuple[NDArray[np.int32], NDArray[np.int32]]


def measure_by_halves(scores: ScoreFiles, rule: BalancedRule, *, num_eligible: int) -> dict[str, float] | None:
    """Return the distance to uniform of the rule's split by the half of the features that selects, and by the other.

    All are means over the two ways: `selected` and `measured`, in [0, 1], `chance`, what a uniform sample of as many
    rows has on average, and `kept` of `num_rows`. None where the table has no scores by halves. `num_eligible` is the
    number of rows that the rule selects from, by which a requested size is reduced to the rows with such scores.
    """
    rows = _read_rows(scores, rule)
    if rows is None:
        return None
    size = rule.config.size
    if size is not None:
        size = max(1, min(len(rows.key), round(size * len(rows.key) / max(1, num_eligible))))
        rule = replace(rule, config=replace(rule.config, size=size))
    both = [_one_way(rule, rows, by=by) for by in (0, 1)]
    return {"num_rows": len(rows.key), **{name: (both[0][name] + both[1][name]) / 2 for name in both[0]}}


def _read_rows(scores: ScoreFiles, rule: BalancedRule) -> _Rows | None:
    """Read the rows that both halves give a cell; at most MAX_ROWS, in the order of their keys."""
    if not all(f"{half}_{name}" in scores.columns for half in HALVES for name in rule.modalities(scores.modalities)):
        return None
    parts: list[_Rows] = []
    for batch in scores.batches(halves=True):
        views = [replace(batch, confidence=_half(batch, half)) for half in HALVES]
        cells, bins = [rule.cells(view) for view in views], [rule.bins(view) for view in views]
        valid = np.flatnonzero((cells[0] >= 0) & (cells[1] >= 0))
        parts.append(
            _Rows(
                key=batch.key[valid],
                split=batch.split[valid],
                cells=(cells[0][valid], cells[1][valid]),
                bins=(bins[0][valid], bins[1][valid]),
            )
        )
        if sum(len(part.key) for part in parts) > 2 * MAX_ROWS:
            parts = [_first(parts)]
    rows = _first(parts)
    return rows if len(rows.key) else None


def _first(parts: list[_Rows]) -> _Rows:
    """Join parts, and return the MAX_ROWS rows of the smallest keys, sorted by key."""
    key = np.concatenate([part.key for part in parts])
    order = np.argsort(key, kind="stable")[:MAX_ROWS]
    cells, bins = (
        tuple(np.concatenate([getattr(part, name)[half] for part in parts])[order] for half in (0, 1))
        for name in ("cells", "bins")
    )
    split = np.concatenate([part.split for part in parts])[order]
    return _Rows(key=key[order], split=split, cells=(cells[0], cells[1]), bins=(bins[0], bins[1]))


def _half(batch: ScoreBatch, half: str) -> Floats:
    """Return the confidences (n, m) by one half of the features; NaN for a modality without them."""
    columns = [batch.numbers(f"{half}_{name}") for name in batch.modalities]
    missing = np.full(len(batch), np.nan, np.float32)
    return np.stack([missing if column is None else column for column in columns], axis=1)


def _one_way(rule: BalancedRule, rows: _Rows, *, by: int) -> dict[str, float]:
    """Select by one half, and compute the distances over the bins of either half that hold rows."""
    num_splits, num_bins, _ = rule.shape
    cell, selecting, measuring = rows.cells[by], rows.bins[by], rows.bins[1 - by]
    counts = np.bincount(cell, minlength=rule.num_cells)
    quota = np.minimum(rule.quotas(counts), counts)
    order = np.argsort(cell, kind="stable")  # rows are in the order of their keys, as a selection takes them
    rank = np.empty(len(cell), np.int64)
    rank[order] = np.arange(len(cell)) - np.repeat(np.cumsum(counts) - counts, counts)
    keep = rank < quota[cell]
    weight = np.ones(len(cell))
    if rule.config.by == "weight":
        by_split = np.bincount(rows.split.astype(np.int64) * num_bins + selecting, minlength=num_splits * num_bins)
        tables = [balancing_weights(row, max_weight=rule.config.max_weight) for row in by_split.reshape(-1, num_bins)]
        weight = np.stack(tables)[rows.split, selecting]
    mass = weight[keep]
    selected, measured = (
        distance_to_uniform(
            np.bincount(bins[keep], weights=mass, minlength=num_bins), available=np.bincount(bins, minlength=num_bins)
        )
        for bins in (selecting, measuring)
    )
    effective = float(mass.sum() ** 2 / (mass**2).sum())
    filled = len(np.unique(measuring))
    chance = filled / 2 * np.sqrt(2 / np.pi * (1 / filled) * (1 - 1 / filled) / effective)
    return {"kept": float(keep.sum()), "selected": selected, "measured": measured, "chance": float(chance)}


log = logging.getLogger("mmaudit")

_MANIFEST_FIELDS = ("like", "intersect", "exclude")  # fields that name other manifests
_REPORT_BINS = 20  # in the numbers of subsets that are not made by bins


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings of a split: at most one kind of samples (balanced, subset, dominated or gmm; none: all), and the rest.

    Args:
        seed: seed of the hash by which rows are drawn.
        balanced: settings of the balanced split.
        subset: subset as `parse_subset` reads it.
        dominated: MODALITY:T.
        gmm: side of the gap mixture, balanced or imbalanced.
        posterior: threshold on P(balanced) for `gmm`, in (0, 1].
        between: discrepancy as in ScoreTable.discrepancy; None is the default pair.
        like: manifest file whose counts by split and class a random subset copies.
        intersect: manifest files that must all contain a sample.
        exclude: manifest files that must not contain a sample.
        resplit: shares of new splits, such as 80/8/12.

    Raises:
        ConfigError: several kinds, or no kind and no other criterion; `like` without a random subset.
    """

    seed: int = 0
    balanced: BalancedConfig | None = None
    subset: str | None = None
    dominated: str | None = None
    gmm: str | None = None
    posterior: float = 0.5
    between: str | None = None
    like: str | None = None
    intersect: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    resplit: str | None = None

    def __post_init__(self) -> None:
        kinds = [self.balanced is not None, self.subset is not None, self.dominated is not None, self.gmm is not None]
        if sum(kinds) > 1 or (sum(kinds) == 0 and not (self.intersect or self.exclude or self.resplit)):
            raise ConfigError(
                "no subset, or several, requested: pass exactly one of --balanced, --subset, --dominated and --gmm, "
                "or --intersect, --exclude or --resplit alone"
            )
        if self.like is not None and (self.subset or "").partition(":")[0] != "random":
            raise ConfigError("--like requires --subset random: it draws as many of each class as that manifest has")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitResult:
    """Outcome of a recipe: path of the manifest, None for a dry run, and SplitStats.numbers with name and curve."""

    path: Path | None
    numbers: dict[str, Any] = field(default_factory=dict)


def make_split(
    score_files: ScoreFiles,
    recipe: Recipe,
    path_of: Callable[[str], Path],
    *,
    scratch: Path,
    name: str | None = None,
    scores: str | Path | None = None,
    relative_to: Path | None = None,
    dry_run: bool = False,
) -> SplitResult:
    """Select samples by a recipe; write the manifest to `path_of(name)` and NAME.balance.json to the same folder.

    `scores` is the score file recorded in the manifest; it and other manifests are recorded relative to the
    manifest's folder, or to `relative_to`. A dry run writes nothing.
    Raises GateError if a size, or weights, give a larger distance to uniform than the tolerance set with them.
    """
    members = [
        _read_members(score_files, Path(file), include=include)
        for include, files in ((True, recipe.intersect), (False, recipe.exclude))
        for file in files
    ]
    score_files = replace(score_files, members=tuple(members))
    if recipe.resplit is not None:
        between = recipe.between or score_files.default_between()
        score_files = resplit(score_files, parse_shares(recipe.resplit), between=between, scratch=scratch)
    _check_members_scored(score_files)
    rule = _build_rule(score_files, recipe, name="all" if recipe.resplit is None else "resplit")
    selection = select_rows(score_files, rule, scratch=scratch)
    name = name or _default_name(rule.name, members)
    extra: dict[str, Any] = {"name": name}
    if isinstance(rule, BalancedRule):
        if not dry_run:
            _check_gate(rule, selection)
        if rule.config.grid:
            extra["grid_distances"] = rule.distances(selection.counts, selection.quota)
        extra["halves"] = measure_by_halves(score_files, rule, num_eligible=int(selection.counts.sum()))
        extra |= {"curve": [asdict(point) for point in rule.curve(selection.counts)], "grid": rule.config.grid}
    num_bins = rule.num_bins if isinstance(rule, BalancedRule) else _REPORT_BINS
    path = path_of(name)
    folder = relative_to or path.parent
    _check_no_overwrite(folder / path.name, recipe)
    record = _recipe_record(recipe, folder=folder, scores=scores)
    numbers = write_split(selection, None if dry_run else path, name=name, recipe=record, num_bins=num_bins) | extra
    if not dry_run:
        write_json({**numbers, "recipe": record, "digest": read_stated_digests(path)["digest"]}, balance_path(path))
    return SplitResult(path=None if dry_run else path, numbers=numbers)


def recipe_from_record(record: dict[str, Any], *, folder: Path) -> Recipe:
    """Build the recipe recorded in a manifest in `folder`; raises ManifestError if there is none."""
    if "seed" not in record or "scores" not in record:
        raise ManifestError("the manifest records no recipe: it was not written by mmaudit split")
    values = {field.name: record[field.name] for field in fields(Recipe) if field.name in record}
    try:
        recipe = build_config(
            Recipe, {name: value for name, value in values.items() if value is not None}, where="recipe."
        )
    except ConfigError as error:
        raise ManifestError(f"the recipe recorded in the manifest cannot be used: {error}") from error
    return replace(
        recipe,
        intersect=tuple(str(folder / name) for name in recipe.intersect),
        exclude=tuple(str(folder / name) for name in recipe.exclude),
        like=None if recipe.like is None else str(folder / recipe.like),
    )


def _build_rule(score_files: ScoreFiles, recipe: Recipe, *, name: str) -> SelectionRule:
    between = recipe.between
    if recipe.balanced is not None:
        return plan_balanced(score_files, recipe.balanced, between=between)
    if recipe.subset is not None:
        like = (
            None
            if recipe.like is None
            else (Path(recipe.like).stem, _count_split_classes(score_files, Path(recipe.like)))
        )
        return parse_subset(score_files, recipe.subset, between=between, like=like)
    if recipe.dominated is not None:
        return parse_dominated(score_files.modalities, recipe.dominated, between=between)
    between_or_default = between or score_files.default_between()
    if recipe.gmm is not None:
        return by_mixture(score_files, recipe.gmm, between=between_or_default, posterior=recipe.posterior)
    return all_samples(between_or_default, name=name)


def _read_members(score_files: ScoreFiles, path: Path, *, include: bool) -> ManifestMembers:
    """Read the ids of a manifest as hash keys, 8 bytes per row."""
    check_same_dataset(score_files.provenance, read_provenance(path).get("scores", {}), name=str(path))
    ids = [batch["sample_id"] for batch in read_batches_of_manifest(path, columns=["sample_id"])]
    if not ids or any(column.null_count for column in ids):
        raise ManifestError(f"{path} holds {'ids that are null' if ids else 'no rows'}: recreate it with mmaudit split")
    keys = [hash_keys(column, seed=score_files.seed) for column in ids]
    return ManifestMembers(name=path.stem, keys=np.sort(np.concatenate(keys)), include=include)


def _check_members_scored(score_files: ScoreFiles) -> None:
    """Raise ManifestError for a manifest with samples that are not in these scores."""
    if not score_files.members:
        return
    num_found = [0] * len(score_files.members)
    for batch in score_files.batches():
        for index, members in enumerate(score_files.members):
            num_found[index] += int((members.admitted_mask(batch.key) == members.include).sum())
    for members, count in zip(score_files.members, num_found, strict=True):
        if count < len(members.keys):
            raise ManifestError(
                f"{len(members.keys) - count} of the {len(members.keys)} samples of {members.name} are not in these "
                "scores: it was made from other scores"
            )


def _count_split_classes(score_files: ScoreFiles, path: Path) -> Counts:
    """Count a manifest's samples by split and class, (s * k,)."""
    members = _read_members(score_files, path, include=True)
    like = replace(score_files, members=(members,))
    _check_members_scored(like)
    num_classes = len(score_files.classes)
    counts = np.zeros(len(score_files.splits) * num_classes, dtype=np.int64)
    for batch in like.batches():
        keep = batch.excluded_by == 0
        counts += np.bincount(
            batch.split[keep].astype(np.int64) * num_classes + batch.label[keep], minlength=len(counts)
        )
    return counts


def _check_no_overwrite(path: Path, recipe: Recipe) -> None:
    """Raise ConfigError if the manifest would overwrite one of its inputs."""
    input_files = [*recipe.intersect, *recipe.exclude, *([] if recipe.like is None else [recipe.like])]
    if path.resolve() in [Path(file).resolve() for file in input_files]:
        raise ConfigError(f"{path.stem} would overwrite the manifest that it is made from; choose another --name")


def _default_name(name: str, members: list[ManifestMembers]) -> str:
    """Return a name built from the kind of samples and the input manifests: A-and-B-without-C."""
    included = [member.name for member in members if member.include]
    excluded = "".join(f"-without-{member.name}" for member in members if not member.include)
    if name == "all" and len(members) > 1 and included:
        return "-and-".join(included) + excluded
    return name + "".join(f"-in-{member}" for member in included) + excluded


def _check_gate(rule: BalancedRule, selection: Selection) -> None:
    """Raise GateError if the requested size or weights do not reach the tolerance set with them."""
    config = rule.config
    if config.tolerance is None or (config.size is None and config.by != "weight"):
        return
    reached = max(rule.distances(selection.counts, selection.quota).values())
    if reached <= config.tolerance + 1e-9:
        return
    if config.by == "weight":
        reason = f"weights up to {config.max_weight:g} reach {reached:.4f} at best; raise split.max_weight"
    else:
        largest = rule.curve(selection.counts, (config.tolerance,))[0].size
        shared_note = ", shared among the splits in proportion," if len(rule.splits) > 1 else ""
        reason = f"{config.size} samples{shared_note} reach {reached:.4f}; without --size, {largest} reach it"
    raise GateError(f"distance to uniform {config.tolerance:g} not reached: {reason}; nothing was written")


def _recipe_record(recipe: Recipe, *, folder: Path, scores: str | Path | None) -> dict[str, Any]:
    """Return the set fields of a recipe as JSON values, files relative to the manifest's folder, with input digests."""
    record = {name: value for name, value in asdict(recipe).items() if value not in (None, ())}
    files = {
        name: [record[name]] if name == "like" else list(record[name]) for name in _MANIFEST_FIELDS if name in record
    }
    digests: dict[str, Any] = {}
    for name, paths in files.items():
        relative_paths = [_relative_path(path, folder) for path in paths]
        record[name] = relative_paths[0] if name == "like" else relative_paths
        digests |= {
            key: read_stated_digests(Path(path)).get("digest") for key, path in zip(relative_paths, paths, strict=True)
        }
    return {**record, "scores": None if scores is None else _relative_path(scores, folder), "inputs": digests}


def _relative_path(path: str | Path, folder: Path) -> str:
    return Path(os.path.relpath(Path(path).absolute(), folder.absolute())).as_posix()
