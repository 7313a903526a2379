"""Python functions of manifests: split, diff, replay, card, export, order.

Each public function is what the command of its name calls, and what a notebook calls.
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
from ..rebalance.card import card as write_card
from ..rebalance.curriculum import batch_of, id_key, num_steps, order_of
from ..rebalance.diff import diff as compare
from ..rebalance.manifest import Manifest, digests_of, dropped_path, provenance_of, read_manifest
from ..rebalance.recipe import Recipe, Split, make_split, recipe_of
from ..rebalance.score_tables import ScoreFiles, open_scores
from .config import RunConfig
from .run import Run
from .swap import replacing_manifest
from .trust import home_of, origin_of, sign_manifest

# What decodes or learns is imported where it is used: a split of 10^8 rows needs neither it nor its memory.

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
    dry: bool = False,
) -> dict[str, Any]:
    """Write one manifest, and its dropped rows beside it, from the run's scores or from anybody's table `scores`.

    At most one of balanced, subset (`audio-preferred`, `balanced:0.2`, `most-balanced:20%`, `random:500`), dominated
    (`visual:0.2`) and gmm (`balanced`, `imbalanced`) says which; like, intersect and exclude name manifests, by file or
    by name in the run. `scores` may be a folder or glob of shards, of any size. Gives a summary: file, counts, and how
    uniform the discrepancy is before and after. `dry` writes nothing.
    """
    config = config or RunConfig()
    place = Run.open(run)
    recipe = Recipe(
        seed=config.seed,
        balanced=config.split if balanced else None,
        subset=subset,
        dominated=dominated,
        gmm=gmm,
        posterior=config.posterior,
        between=between,
        like=None if like is None else str(place.find_manifest(like)),
        intersect=tuple(str(place.find_manifest(each)) for each in intersect),
        exclude=tuple(str(place.find_manifest(each)) for each in exclude),
        resplit=resplit,
    )
    if scores is None:
        place.record()
        scores = place.scores_file
    shards = open_scores(scores, seed=config.seed)
    named = scores if isinstance(scores, (str, Path)) else None
    with _staged_manifest(place, dry=dry) as path_of:
        made = make_split(
            shards,
            recipe,
            path_of,
            scratch=place.folder,
            name=name,
            scores=named,
            beside=place.manifests_folder,
            dry=dry,
        )
        if made.path is not None:
            path = place.manifest(made.path.stem)
            sign_manifest(made.path, path, run=place.folder, scores=None if named is None else Path(named))
            made = replace(made, path=path)
    if balanced and between is None and len(shards.modalities) > 2:
        log.info(
            "of %d modalities, %s is the pair with the largest balanced split; choose another with --between",
            len(shards.modalities),
            made.numbers["between"],
        )
    verdict = {"verdict": place.record()["verdict"]} if gmm is not None and place.is_scored() else {}
    return {**_summary(made), **verdict}


@contextmanager
def _staged_manifest(place: Run, *, dry: bool) -> Iterator[Callable[[str], Path]]:
    """Yield where to write the manifest of a name, which is locked then; it replaces an older one at the end.

    The run's scores stay as they are meanwhile.
    """
    with ExitStack() as stack:

        def lock(scope: str) -> Lock:
            return stack.enter_context(
                write_lock(place.folder, scope, command="mmaudit split", wait_seconds=WAIT_SECONDS)
            )

        def path_of(name: str) -> Path:
            path = place.manifest(name)
            if dry:
                return path
            held = lock(f"manifests/{name}")
            if path.exists():
                log.info("%s is replaced", path)
            return stack.enter_context(replacing_manifest(place.folder, name, lock=held)) / path.name

        if not dry:
            lock(f"manifests/.{secrets.token_hex(4)}")  # overlaps with the whole run, and with no other split
        yield path_of


def diff(first: str | Path, second: str | Path, *, run: str | Path = "mmaudit-run") -> dict[str, Any]:
    """Tell two manifests apart, each by file or by its name in the run; in plain values, and in `lines`."""
    place = Run.open(run)
    found = compare(place.find_manifest(str(first)), place.find_manifest(str(second)))
    return {**found.to_dict(), "lines": found.lines()}


def card(manifest: str | Path, *, run: str | Path = "mmaudit-run") -> str:
    """Give the section of a dataset card on a manifest, as Markdown."""
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
    """Write a manifest as csv, jsonl, npy, ogm, webdataset or datasets to `out`; returns the files and counts.

    Only webdataset opens media: those of the manifest's source, or of `data`. `data` and `allow_outside` (paths may
    lead outside the data's folder) must be given for a manifest that was not made by this user on this machine.
    `skip_missing` leaves out media that are not there; `escape_formulas` has csv put an apostrophe before texts that a
    spreadsheet would run.

    Raises:
        ConfigError: the format cannot hold it.
        RunError: `out` exists.
        ManifestError: there is no manifest, its source is gone, or nobody but the manifest names the source.
    """
    from ..rebalance.export import export as write_export
    from ..rebalance.export import holds_media
    from .provenance import Named, open_source

    path, out = Run.open(run).find_manifest(str(manifest)), Path(out)
    dataset = None
    if holds_media(path, format):
        origin = origin_of(path, provenance_of(path), digests_of(path))
        dataset, _ = open_source(origin, Named(data=data, allow_outside=allow_outside), encoders=False)
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
    """Make a manifest again from its score table and its recipe, and compare the files byte by byte.

    `scores` is the table, if it moved. Gives what was made and whether it is `identical`.
    """
    path = Run.open(run).find_manifest(str(manifest))
    record = provenance_of(path).get("rule", {})
    recipe = recipe_of(record, folder=path.parent)
    outside = [file for file in (recipe.like, *recipe.intersect, *recipe.exclude) if file is not None]
    outside += [] if scores is not None or record["scores"] is None else [str(path.parent / str(record["scores"]))]
    _check_inside(path, outside)
    before = None if record["scores"] is None else path.parent / str(record["scores"])
    table = before if scores is None else Path(scores)
    if table is None:
        raise ManifestError(f"{path} does not name the score tables that it was made from; name them with --scores")
    if scores is None and not (table.exists() or glob(str(table))):
        raise ManifestError(f"the score table {table} that the manifest was made from is gone; name it with --scores")
    shards = open_scores(table, seed=recipe.seed)
    with tempfile.TemporaryDirectory(prefix="mmaudit-replay-") as scratch:
        made = _again(shards, recipe, path, Path(scratch), scores=before)
        differ = [
            old.name
            for old, new in ((path, made), (dropped_path(path), dropped_path(made)))
            if not old.exists() or old.read_bytes() != new.read_bytes()
        ]
    return {"file": str(path), "scores": str(table), "identical": not differ, "differ": differ}


def _check_inside(path: Path, files: Sequence[str]) -> None:
    """Raise ManifestError for files that a manifest of others itself names outside its run, or its folder."""
    home = home_of(path)
    named = [match for file in files for match in glob(file) or [file]]
    outside = [file for file in named if not Path(file).resolve().is_relative_to(home)]
    if not outside:
        return
    origin = origin_of(path, provenance_of(path), digests_of(path))
    if not origin.is_own:
        doubt = origin.doubt or "you did not make it on this machine"
        raise ManifestError(
            f"{path} is not trusted to name files, since {doubt}; it was made from {printable(outside[0])}: "
            "name the scores with --scores, or put a manifest that it was made from beside it"
        )


def _again(shards: ScoreFiles, recipe: Recipe, path: Path, scratch: Path, *, scores: Path | None) -> Path:
    """Write the manifest of a recipe into a folder; files that it was made from are named from the manifest's own."""
    made = make_split(
        shards,
        recipe,
        lambda name: scratch / f"{name}.parquet",
        scratch=scratch,
        name=provenance_of(path)["subset"],
        scores=scores,
        beside=path.parent,
    )
    if made.path is None:
        raise RunError(f"{path} was not made again")
    return made.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """What an epoch of a manifest sees: ids (n',) in order, `share` of all `total` training samples, in steps."""

    ids: np.ndarray[Any, Any]
    share: float
    total: int
    batch_size: int

    def steps(self) -> Iterator[tuple[int, list[str]]]:
        """Give each step's number, from 0, and its ids."""
        rows = np.arange(len(self.ids))
        for step in range(num_steps(rows, batch_size=self.batch_size)):
            yield step, self.ids[batch_of(rows, step=step, batch_size=self.batch_size)].tolist()


def order(
    manifest: str | Path, *, run: str | Path = "mmaudit-run", epoch: int, config: RunConfig | None = None
) -> Epoch:
    """Give the training samples of a manifest in the order in which an epoch (1, 2, ...) of fine-tuning sees them."""
    config = config or RunConfig()
    if epoch < 1:
        raise ConfigError(f"--epoch {epoch}: epochs are counted from 1")
    found = read_manifest(Run.open(run).find_manifest(str(manifest)))
    rows = _training_rows(found, config)
    ids = found.table["sample_id"].take(rows)
    chosen = order_of(
        rank=found.table["rank"].to_numpy()[rows],
        balance=None if config.order.order != "weighted" else found.numbers("balance")[rows],
        key=id_key(ids),
        config=config.order,
        seed=config.seed,
        epoch=epoch,
    )
    return Epoch(
        ids=np.asarray(ids.take(chosen).to_pylist(), dtype=object),
        share=len(chosen) / len(rows),
        total=len(rows),
        batch_size=config.finetune.batch_size,
    )


def _training_rows(manifest: Manifest, config: RunConfig) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Give the rows that fine-tuning trains on: without those it validates on, and what keep_posterior leaves out."""
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
        raise ManifestError("no row of the manifest is of the training split: there is nothing to order")
    return np.flatnonzero(train)


def _summary(made: Split) -> dict[str, Any]:
    numbers = {
        key: value for key, value in made.numbers.items() if key not in ("classes", "counts_before", "counts_after")
    }
    worst = sorted(made.numbers["classes"], key=lambda found: -found["distance_after"])[:5]
    return {"file": None if made.path is None else str(made.path), **numbers, "least_uniform_classes": worst}
