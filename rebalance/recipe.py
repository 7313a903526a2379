"""Recipes: all that decides a split, so that it can be made again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..audit.errors import ConfigError, GateError, ManifestError
from ..audit.parsing import build
from ..audit.storage import write_json
from .balanced import BalancedConfig, BalancedRule, plan_balanced
from .binning import Counts
from .manifest import batches_of, provenance_of, rows_of
from .resplit import parse_shares, resplit
from .score_tables import ManifestMembers, ScoreFiles, check_same_dataset, hash_keys
from .selection import Selection, SelectionRule, select_rows
from .split import write_split
from .subsets import all_samples, by_mixture, parse_dominated, parse_subset

log = logging.getLogger("mmaudit")

_MANIFEST_FIELDS = ("like", "intersect", "exclude")  # what names other manifests
_REPORT_BINS = 20  # of the report of subsets that are not made by bins


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One kind of samples (balanced, subset, dominated or gmm; none of them: all), and what else decides.

    like, intersect and exclude name manifests by their files.
    """

    seed: int = 0
    balanced: BalancedConfig | None = None
    subset: str | None = None  # as `parse_subset` reads it
    dominated: str | None = None  # MODALITY:T
    gmm: str | None = None  # balanced or imbalanced
    posterior: float = 0.5  # of `gmm`
    between: str | None = None
    like: str | None = None
    intersect: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    resplit: str | None = None  # 80/8/12

    def __post_init__(self) -> None:
        kinds = [self.balanced is not None, self.subset is not None, self.dominated is not None, self.gmm is not None]
        if sum(kinds) > 1 or (sum(kinds) == 0 and not (self.intersect or self.exclude or self.resplit)):
            raise ConfigError(
                "say which samples: exactly one of --balanced, --subset, --dominated and --gmm, "
                "or --intersect, --exclude or --resplit alone"
            )
        if self.like is not None and (self.subset or "").partition(":")[0] != "random":
            raise ConfigError("--like goes with --subset random: as many samples of each class as that manifest has")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What came of a recipe: the file, unless it was a trial, and Tally.numbers with what else is to be told."""

    path: Path | None
    numbers: dict[str, Any] = field(default_factory=dict)


def make_split(
    score_files: ScoreFiles,
    recipe: Recipe,
    place: Callable[[str], Path],
    *,
    scratch: Path,
    name: str | None = None,
    scores: str | Path | None = None,
    beside: Path | None = None,
    dry: bool = False,
) -> Split:
    """Choose by a recipe and write the manifest where `place` says for its name, with NAME.balance.json beside it.

    `scores` is the file that the manifest says it was made from; it and other manifests are named as they are found
    from the manifest's folder, or from `beside`. A dry run writes nothing.
    Raises GateError where a size, or weights, are farther from uniform than the tolerance given with them.
    """
    members = [
        _read_members(score_files, Path(file), inside=inside)
        for inside, files in ((True, recipe.intersect), (False, recipe.exclude))
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
        if not dry:
            _check_gate(rule, selection)
        if rule.config.grid:
            extra["grid_distances"] = rule.distances(selection.counts, selection.quota)
        extra |= {"curve": [asdict(point) for point in rule.curve(selection.counts)], "grid": rule.config.grid}
    num_bins = rule.num_bins if isinstance(rule, BalancedRule) else _REPORT_BINS
    path = place(name)
    folder = beside or path.parent
    _check_no_overwrite(folder / path.name, recipe)
    record = _recipe_record(recipe, folder=folder, scores=scores)
    numbers = write_split(selection, None if dry else path, name=name, recipe=record, num_bins=num_bins) | extra
    if not dry:
        write_json({**numbers, "recipe": record, "digest": rows_of(path)["digest"]}, balance_path(path))
    return Split(path=None if dry else path, numbers=numbers)


def balance_path(path: Path) -> Path:
    """Name the file of numbers that belongs to a manifest."""
    return path.with_name(f"{path.stem}.balance.json")


def recipe_of(record: dict[str, Any], *, folder: Path) -> Recipe:
    """Give the recipe that a manifest in `folder` records; ManifestError where it records none."""
    if "seed" not in record or "scores" not in record:
        raise ManifestError("the manifest does not say how it was made: it was not written by this mmaudit split")
    values = {each.name: record[each.name] for each in fields(Recipe) if each.name in record}
    try:
        recipe = build(Recipe, {name: value for name, value in values.items() if value is not None}, where="rule.")
    except ConfigError as error:
        raise ManifestError(f"the manifest does not say how it can be made again: {error}") from error
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
    chosen = between or score_files.default_between()
    if recipe.gmm is not None:
        return by_mixture(score_files, recipe.gmm, between=chosen, posterior=recipe.posterior)
    return all_samples(chosen, name=name)


def _read_members(score_files: ScoreFiles, path: Path, *, inside: bool) -> ManifestMembers:
    """Read the ids of a manifest as keys: 8 bytes a row."""
    check_same_dataset(score_files.provenance, provenance_of(path).get("scores", {}), name=str(path))
    ids = [batch["sample_id"] for batch in batches_of(path, columns=["sample_id"])]
    if not ids or any(column.null_count for column in ids):
        raise ManifestError(f"{path} holds {'ids that are null' if ids else 'no rows'}: recreate it with mmaudit split")
    keys = [hash_keys(column, seed=score_files.seed) for column in ids]
    return ManifestMembers(name=path.stem, keys=np.sort(np.concatenate(keys)), inside=inside)


def _check_members_scored(score_files: ScoreFiles) -> None:
    """Raise ManifestError for a manifest that names samples which these scores do not have."""
    if not score_files.members:
        return
    found = [0] * len(score_files.members)
    for batch in score_files.batches():
        for number, members in enumerate(score_files.members):
            found[number] += int((members.admits(batch.key) == members.inside).sum())
    for members, number in zip(score_files.members, found, strict=True):
        if number < len(members.keys):
            raise ManifestError(
                f"{len(members.keys) - number} of the {len(members.keys)} samples of {members.name} are not among "
                "these scores: it was made from others"
            )


def _count_split_classes(score_files: ScoreFiles, path: Path) -> Counts:
    """Count a manifest's samples by split and class, (s * k,)."""
    check_same_dataset(score_files.provenance, provenance_of(path).get("scores", {}), name=str(path))
    members = _read_members(score_files, path, inside=True)
    like = replace(score_files, members=(members,))
    _check_members_scored(like)
    k = len(score_files.classes)
    counts = np.zeros(len(score_files.splits) * k, dtype=np.int64)
    for batch in like.batches():
        kept = batch.excluded_by == 0
        counts += np.bincount(batch.split[kept].astype(np.int64) * k + batch.label[kept], minlength=len(counts))
    return counts


def _check_no_overwrite(path: Path, recipe: Recipe) -> None:
    """Raise ConfigError where a manifest would overwrite one that it is made from."""
    named = [*recipe.intersect, *recipe.exclude, *([] if recipe.like is None else [recipe.like])]
    if path.resolve() in [Path(each).resolve() for each in named]:
        raise ConfigError(f"{path.stem} would overwrite the manifest that it is made from; give it another --name")


def _default_name(name: str, members: list[ManifestMembers]) -> str:
    """Name a manifest by its kind of samples and the manifests that these are in, or are not: A-and-B-without-C."""
    inside = [each.name for each in members if each.inside]
    without = "".join(f"-without-{each.name}" for each in members if not each.inside)
    if name == "all" and len(members) > 1 and inside:
        return "-and-".join(inside) + without
    return name + "".join(f"-in-{each}" for each in inside) + without


def _check_gate(rule: BalancedRule, selection: Selection) -> None:
    """Raise GateError where a tolerance is not reached by the size, or the weights, that were asked for."""
    config = rule.config
    if config.tolerance is None or (config.size is None and config.by != "weight"):
        return
    reached = max(rule.distances(selection.counts, selection.quota).values())
    if reached <= config.tolerance + 1e-9:
        return
    if config.by == "weight":
        mend = f"the best that weights up to {config.max_weight:g} reach is {reached:.4f}; raise split.max_weight"
    else:
        within = rule.curve(selection.counts, (config.tolerance,))[0].size
        shared = ", shared among the splits in proportion," if len(rule.splits) > 1 else ""
        mend = f"{config.size} samples{shared} reach {reached:.4f}; without --size it is reached by {within}"
    raise GateError(f"a distance to uniform of {config.tolerance:g} cannot be reached: {mend}; nothing was written")


def _recipe_record(recipe: Recipe, *, folder: Path, scores: str | Path | None) -> dict[str, Any]:
    """Give the recipe as plain values, without what was not said; files relative to the manifest's folder."""
    found = {name: value for name, value in asdict(recipe).items() if value not in (None, ())}
    files = {name: [found[name]] if name == "like" else list(found[name]) for name in _MANIFEST_FIELDS if name in found}
    digests: dict[str, Any] = {}
    for name, named in files.items():
        there = [_relative_path(each, folder) for each in named]
        found[name] = there[0] if name == "like" else there
        digests |= {each: rows_of(Path(file)).get("digest") for each, file in zip(there, named, strict=True)}
    return {**found, "scores": None if scores is None else _relative_path(scores, folder), "inputs": digests}


def _relative_path(path: str | Path, folder: Path) -> str:
    return Path(os.path.relpath(Path(path).absolute(), folder.absolute())).as_posix()
