"""Commands of manifests."""

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
    load_settings,
)

ManifestArgument = Annotated[str, typer.Argument(metavar="MANIFEST", help="Manifest file, or its name in the run.")]
ScoresOption = Annotated[
    str | None,
    typer.Option("--scores", help="Score table of any tool in place of the run's: file, folder or glob of shards."),
]
_SELECTION, _OPTIONS = "Selection of samples", "Options of the selection"


@command
def split(
    run: RunOption = "mmaudit-run",
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Uniformly distributed discrepancy.", rich_help_panel=_SELECTION)
    ] = False,
    subset: Annotated[
        str | None,
        typer.Option(
            "--subset",
            metavar="NAME",
            help="MODALITY-preferred, balanced[:T] for |D| <= T, most-balanced:N, least-balanced:N or random:N; "
            "N is a number or a share such as 20%.",
            rich_help_panel=_SELECTION,
        ),
    ] = None,
    dominated: Annotated[
        str | None,
        typer.Option("--dominated", metavar="MODALITY:T", help="Discrepancy above T.", rich_help_panel=_SELECTION),
    ] = None,
    gmm: Annotated[
        str | None,
        typer.Option(
            "--gmm",
            metavar="SIDE",
            help="balanced or imbalanced, by the gap mixture, or by its threshold if not bimodal.",
            rich_help_panel=_SELECTION,
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            "--like",
            metavar="MANIFEST",
            help="With --subset random: as many samples of each split and class as this manifest has.",
            rich_help_panel=_SELECTION,
        ),
    ] = None,
    intersect: Annotated[
        list[str] | None,
        typer.Option(
            "--intersect",
            metavar="MANIFEST",
            help="Keep only samples that are in this manifest; alone or with the above. Repeatable.",
            rich_help_panel=_SELECTION,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="MANIFEST",
            help="Keep only samples that are not in this manifest; alone or with the above. Repeatable.",
            rich_help_panel=_SELECTION,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="Allowed distance to uniform; 0: exact. With --size or weights: exit 3 above it. \\[default: 0.05]",
            rich_help_panel=_OPTIONS,
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", help="Number of samples to keep.", rich_help_panel=_OPTIONS)
    ] = None,
    bins: Annotated[
        str | None,
        typer.Option(
            "--bins", help="Bins over [-1, 1]; auto: by sample size. \\[default: 20]", rich_help_panel=_OPTIONS
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            help="dropping, or weight: keep all samples, with weights that make them uniform. \\[default: dropping]",
            rich_help_panel=_OPTIONS,
        ),
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Uniform over both confidences, bins x bins.", rich_help_panel=_OPTIONS)
    ] = False,
    between: Annotated[
        str | None,
        typer.Option(
            "--between",
            metavar="A[:B]",
            help="Modalities of the discrepancy: A minus B, or A minus the mean of the rest.",
            rich_help_panel=_OPTIONS,
        ),
    ] = None,
    resplit: Annotated[
        str | None,
        typer.Option(
            "--resplit",
            metavar="80/8/12",
            help="Assign new train, validation and test splits first: stratified, groups not divided.",
            rich_help_panel=_OPTIONS,
        ),
    ] = None,
    scores: ScoresOption = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the manifest.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the summary without writing anything.")] = False,
    overwrite: OverwriteOption = False,
    seed: SeedOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Write a manifest of a subset, and a table of the dropped rows with their reasons."""
    from dataclasses import replace

    from .config import override
    from .console import print_split
    from .manifests import split as run_split

    settings = load_settings(config, set_, seed)
    split_config = override(
        settings.split, tolerance=tolerance, size=size, bins=_bins(bins), by=by, grid=True if grid else None
    )
    summary = run_split(
        run=run,
        scores=scores,
        config=replace(settings, split=split_config),
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
        dry_run=dry_run,
        overwrite=overwrite,
    )
    finish(summary, json_, print_split)


@command
def order(
    manifest: ManifestArgument,
    epoch: Annotated[int, typer.Option("--epoch", help="Epoch, counted from 1.")] = 1,
    dump: Annotated[
        bool, typer.Option("--dump", help="Print every step and id as CSV for programs, with unchanged ids.")
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
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Samples per step. \\[default: 64]")] = None,
    seed: SeedOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Print the training samples of an epoch of a curriculum, in order."""
    from dataclasses import replace

    from .config import override
    from .console import dump_order, print_order
    from .manifests import order as run_order

    settings = load_settings(config, set_, seed)
    settings = replace(
        settings,
        order=override(settings.order, order=sampling, pacing=pacing),
        finetune=override(settings.finetune, batch_size=batch_size),
    )
    epoch_order = run_order(manifest, run=run, epoch=epoch, config=settings)
    if dump:
        dump_order(epoch_order)
        return
    summary = {"epoch": epoch, "samples": len(epoch_order.ids), "total": epoch_order.total, "share": epoch_order.share}
    finish({**summary, "first": epoch_order.ids[:5].tolist()}, json_, print_order)


@command
def verify(
    manifest: ManifestArgument,
    run: RunOption = "mmaudit-run",
    data: NamedDataOption = None,
    allow_outside: NamedOutsideOption = False,
    no_media: Annotated[bool, typer.Option("--no-media", help="Skip the check of the media files.")] = False,
    json_: JsonOption = False,
) -> None:
    """Check that a manifest and its data are unchanged since they were written and scored; exit 3 on a change."""
    from ..audit.errors import GateError
    from .console import print_verify, progress_bars
    from .verification import verify as run_verify

    with progress_bars() as progress:
        summary = run_verify(
            manifest, run=run, data=data, allow_outside=allow_outside, media=not no_media, progress=progress
        )
    finish(summary, json_, print_verify)
    if not summary["passed"]:
        raise GateError(f"{summary['file']} or its data have changed since it was written: see the checks above")


@command
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="Manifest file, or its name in the run.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Manifest to compare with.")],
    run: RunOption = "mmaudit-run",
    json_: JsonOption = False,
) -> None:
    """Compare two manifests: ids in only one of them, moved bins, changed scores, and their recipes."""
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
    """Rebuild a manifest from its score table and recipe; exit 3 unless it is identical, byte by byte."""
    from ..audit.errors import GateError
    from .console import print_replay
    from .manifests import replay as run_replay

    summary = run_replay(manifest, run=run, scores=scores)
    finish(summary, json_, print_replay)
    if not summary["identical"]:
        raise GateError(f"{' and '.join(summary['differ'])} differs when rebuilt: the scores or mmaudit have changed")


@command
def card(
    manifest: ManifestArgument,
    run: RunOption = "mmaudit-run",
    out: Annotated[str | None, typer.Option("--out", help="File to write. \\[default: print it]")] = None,
    json_: JsonOption = False,
) -> None:
    """Write a dataset card section on a manifest: modality balance, recipe, and how to load it."""
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
    out: Annotated[str, typer.Option("--out", help="File or folder to write.", show_default=False)],
    run: RunOption = "mmaudit-run",
    data: NamedDataOption = None,
    allow_outside: NamedOutsideOption = False,
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Skip and count missing media.")] = False,
    escape_formulas: Annotated[
        bool,
        typer.Option(
            "--escape-formulas/--no-escape-formulas",
            help="csv: put an apostrophe before text that a spreadsheet would evaluate (= + - @).",
        ),
    ] = True,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Write a manifest in another format; webdataset contains the media, the others list their paths."""
    from .console import print_export
    from .manifests import export as run_export

    summary = run_export(
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
    finish(summary, json_, print_export)


def _bins(text: str | None) -> int | None:
    """Parse a number of bins; `auto` becomes 0."""
    from ..audit.errors import ConfigError

    if text is None or text == "auto":
        return None if text is None else 0
    if not text.isdigit() or int(text) == 0:
        raise ConfigError(f"--bins {text}: must be a number from 2 on, or auto")
    return int(text)
