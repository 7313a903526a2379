"""The commands of manifests."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import (
    ConfigOption,
    JsonOption,
    NamedDataOption,
    NamedOutsideOption,
    OverwriteOption,
    RunOption,
    SeedOption,
    SetOption,
    command,
    finish,
    settings_of,
)

ManifestArgument = Annotated[str, typer.Argument(metavar="MANIFEST", help="A manifest's file, or its name in the run.")]
ScoresOption = Annotated[
    str | None,
    typer.Option("--scores", help="Anybody's score table in place of the run's: a file, a folder or glob of shards."),
]
_WHICH, _HOW = "Which samples", "How"


@command
def split(
    run: RunOption = "mmaudit-run",
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Uniformly distributed discrepancy.", rich_help_panel=_WHICH)
    ] = False,
    subset: Annotated[
        str | None,
        typer.Option(
            "--subset",
            metavar="NAME",
            help="MODALITY-preferred, balanced[:T] for |D| <= T, most-balanced:N, least-balanced:N or random:N; "
            "N is a number or a share such as 20%.",
            rich_help_panel=_WHICH,
        ),
    ] = None,
    dominated: Annotated[
        str | None,
        typer.Option(
            "--dominated", metavar="MODALITY:T", help="Samples with discrepancy above T.", rich_help_panel=_WHICH
        ),
    ] = None,
    gmm: Annotated[
        str | None,
        typer.Option(
            "--gmm",
            metavar="SIDE",
            help="balanced or imbalanced, by the gap mixture or the rule in its place.",
            rich_help_panel=_WHICH,
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            "--like",
            metavar="MANIFEST",
            help="With --subset random: as many of each split and class as it has.",
            rich_help_panel=_WHICH,
        ),
    ] = None,
    intersect: Annotated[
        list[str] | None,
        typer.Option(
            "--intersect",
            metavar="MANIFEST",
            help="Only samples that it has; alone or with the above. Repeatable.",
            rich_help_panel=_WHICH,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="MANIFEST",
            help="Only samples that it lacks; alone or with the above. Repeatable.",
            rich_help_panel=_WHICH,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="Distance to uniform allowed; 0: exact. Given with --size or weights: exit 3 above. \\[default: 0.05]",
            rich_help_panel=_HOW,
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", help="Keep so many samples instead.", rich_help_panel=_HOW)
    ] = None,
    bins: Annotated[
        str | None,
        typer.Option(
            "--bins", help="Bins over [-1, 1]; auto: as many as the data bear. \\[default: 20]", rich_help_panel=_HOW
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            help="dropping, or weight: keep all, with weights that make it uniform. \\[default: dropping]",
            rich_help_panel=_HOW,
        ),
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Uniform over both confidences, bins x bins.", rich_help_panel=_HOW)
    ] = False,
    between: Annotated[
        str | None,
        typer.Option(
            "--between",
            metavar="A[:B]",
            help="Which discrepancy: A against B, or A against the rest.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    keep_splits: Annotated[
        bool,
        typer.Option("--keep-splits", help="Balance each split on its own: the default.", rich_help_panel=_HOW),
    ] = False,
    resplit: Annotated[
        str | None,
        typer.Option(
            "--resplit",
            metavar="80/8/12",
            help="New train, validation and test splits first: stratified, groups whole.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    scores: ScoresOption = None,
    name: Annotated[str | None, typer.Option("--name", help="The manifest's name.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what could be had; write nothing.")] = False,
    seed: SeedOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Write a manifest of a subset, and the rows it drops with the reason."""
    from dataclasses import replace

    from ..audit.errors import ConfigError
    from .config import override
    from .console import print_split
    from .manifests import split as run_split

    if keep_splits and resplit is not None:
        raise ConfigError("--keep-splits and --resplit: either keep the splits there are, or make others")
    settings = settings_of(config, set_, seed)
    chosen = override(
        settings.split, tolerance=tolerance, size=size, bins=_bins(bins), by=by, grid=True if grid else None
    )
    summary = run_split(
        run=run,
        scores=scores,
        config=replace(settings, split=chosen),
        balanced=balanced,
        subset=subset,
        dominated=dominated,
        gmm=gmm,
        like=like,
        intersect=intersect or (),
        exclude=exclude or (),
        resplit=resplit,
        between=between,
        name=name,
        dry=dry_run,
    )
    finish(summary, json_, print_split)


@command
def order(
    manifest: ManifestArgument,
    epoch: Annotated[int, typer.Option("--epoch", help="Which epoch, from 1.")] = 1,
    dump: Annotated[
        bool, typer.Option("--dump", help="Print every step and id as CSV for programs: ids are exact.")
    ] = False,
    run: RunOption = "mmaudit-run",
    sampling: Annotated[
        str | None,
        typer.Option("--order", help="curriculum, anti-curriculum, shuffled or weighted. \\[default: curriculum]"),
    ] = None,
    pacing: Annotated[
        str | None,
        typer.Option("--pacing", help="root, linear, step, geometric or exponential. \\[default: root]"),
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Samples a step. \\[default: 64]")] = None,
    seed: SeedOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Say which training samples an epoch of a curriculum sees, and in which order."""
    from dataclasses import replace

    from .config import override
    from .console import dump_order, print_order
    from .manifests import order as find_order

    settings = settings_of(config, set_, seed)
    settings = replace(
        settings,
        order=override(settings.order, order=sampling, pacing=pacing),
        finetune=override(settings.finetune, batch_size=batch_size),
    )
    found = find_order(manifest, run=run, epoch=epoch, config=settings)
    if dump:
        dump_order(found)
        return
    about = {"epoch": epoch, "samples": len(found.ids), "total": found.total, "share": found.share}
    finish({**about, "first": found.ids[:5].tolist()}, json_, print_order)


@command
def verify(
    manifest: ManifestArgument,
    run: RunOption = "mmaudit-run",
    data: NamedDataOption = None,
    allow_outside: NamedOutsideOption = False,
    no_media: Annotated[bool, typer.Option("--no-media", help="Leave out the files that the manifest names.")] = False,
    json_: JsonOption = False,
) -> None:
    """Check that a manifest is what was written, and that its data are what was scored; exit 3 on drift."""
    from ..audit.errors import GateError
    from .console import print_verify, progress_bars
    from .verification import verify as run_verify

    with progress_bars() as progress:
        found = run_verify(
            manifest, run=run, data=data, allow_outside=allow_outside, media=not no_media, progress=progress
        )
    finish(found, json_, print_verify)
    if not found["held"]:
        raise GateError(f"{found['file']} is not what was written, or its data have changed: see the checks above")


@command
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A manifest's file, or its name in the run.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    run: RunOption = "mmaudit-run",
    json_: JsonOption = False,
) -> None:
    """Tell two manifests apart: ids in one only, moved bins, changed scores, and how each was made."""
    from .console import print_diff
    from .manifests import diff as run_diff

    finish(run_diff(first, second, run=run), json_, print_diff)


@command
def replay(
    manifest: ManifestArgument,
    run: RunOption = "mmaudit-run",
    scores: ScoresOption = None,
    json_: JsonOption = False,
) -> None:
    """Make a manifest again from its score table and its recipe; exit 3 unless it is the same, byte by byte."""
    from ..audit.errors import GateError
    from .console import print_replay
    from .manifests import replay as run_replay

    found = run_replay(manifest, run=run, scores=scores)
    finish(found, json_, print_replay)
    if not found["identical"]:
        raise GateError(f"{' and '.join(found['differ'])} made again is not the same: the scores, or mmaudit, changed")


@command
def card(
    manifest: ManifestArgument,
    run: RunOption = "mmaudit-run",
    out: Annotated[str | None, typer.Option("--out", help="The file to write. \\[default: print it]")] = None,
    json_: JsonOption = False,
) -> None:
    """Write a section for a dataset card: modality balance, how it was made, how to load it."""
    from pathlib import Path

    from ..audit.storage import write_text
    from .console import print_card
    from .manifests import card as make_card

    text = make_card(manifest, run=run)
    if out is not None:
        write_text(text, Path(out))
    finish({"manifest": manifest, "file": out, "card": text}, json_, print_card)


@command
def export(
    manifest: ManifestArgument,
    format_: Annotated[
        str, typer.Option("--format", help="csv, jsonl, npy, ogm, webdataset or datasets.", show_default=False)
    ],
    out: Annotated[str, typer.Option("--out", help="The file or folder to write.", show_default=False)],
    run: RunOption = "mmaudit-run",
    data: NamedDataOption = None,
    allow_outside: NamedOutsideOption = False,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out, and count, media that are not there.")
    ] = False,
    escape_formulas: Annotated[
        bool,
        typer.Option(
            "--escape-formulas/--no-escape-formulas",
            help="csv: put an apostrophe before texts that a spreadsheet would run (= + - @); numbers stay.",
        ),
    ] = True,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Write a manifest in another format; webdataset holds the media as well, the others name their files."""
    from .console import print_export
    from .manifests import export as run_export

    found = run_export(
        manifest,
        out=out,
        format=format_,
        run=run,
        data=data,
        allow_outside=allow_outside,
        skip_missing=skip_missing,
        escape_formulas=escape_formulas,
        overwrite=overwrite,
    )
    finish(found, json_, print_export)


def _bins(text: str | None) -> int | None:
    """Read a number of bins, `auto` as 0."""
    from ..audit.errors import ConfigError

    if text is None or text == "auto":
        return None if text is None else 0
    if not text.isdigit() or int(text) == 0:
        raise ConfigError(f"--bins {text}: give a number from 2 on, or auto")
    return int(text)
