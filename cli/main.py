"""The commands: one for each arrow from data to report, each a thin call of the public function of its name"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .config import RunConfig

# Heavy packages (torch, scikit-learn, pyarrow) are imported inside the commands: --help answers in a blink.

app = typer.Typer(
    name="mmaudit",
    help="Audit multimodal datasets for modality imbalance, sample by sample, and rebalance them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BAD_INPUT, GATE_FAILED, INTERRUPTED = 2, 3, 130  # 0 is done, 1 a bug of ours: a traceback

DataArgument = Annotated[
    str,
    typer.Argument(help="A folder, a file or glob of rows, a saved dataset, tars, or a name on the Hugging Face hub."),
]
ModalityOption = Annotated[
    list[str] | None,
    typer.Option("--modality", metavar="NAME=COLUMN[:KIND]", help="Read these modalities. Repeatable."),
]
EncoderOption = Annotated[
    list[str] | None,
    typer.Option(
        "--encoder",
        metavar="NAME=ENCODER",
        help="statistics, resnet18, hf:MODEL or package.module:function. Repeatable.",
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option("--task", help="classification, multilabel or regression. [default: classification]"),
]
LabelOption = Annotated[str | None, typer.Option("--label", help="The column of labels.")]
IdOption = Annotated[str | None, typer.Option("--id", help="The column of ids.")]
GroupOption = Annotated[
    str | None,
    typer.Option("--group", help="Samples that share this column's value never score each other."),
]
SplitOption = Annotated[
    str | None,
    typer.Option("--split", help="The column of splits; none: leave it alone, cut a test split."),
]
OutsideOption = Annotated[bool, typer.Option("--allow-outside", help="Let paths lead outside the metadata's folder.")]
RunOption = Annotated[str, typer.Option("--run", help="The run folder.")]
ConfigOption = Annotated[str | None, typer.Option("--config", help="A TOML file with any of the settings.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One setting, such as probe.folds=10. Repeatable."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="The seed of everything. [default: 0]")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
WorkersOption = Annotated[
    int | None,
    typer.Option("--num-workers", min=0, help="Processes that decode media; 0: none. [default: all processors]"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there; score also removes what was made from it.")
]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose errors become one line and an exit code."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        from ..audit.errors import GateError, MmauditError
        from .console import say

        try:
            function(*args, **kwargs)
        except GateError as error:
            say(f"failed: {error}")
            raise typer.Exit(GATE_FAILED) from None
        except MmauditError as error:
            say(f"error: {error}")
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            say("interrupted; run the same command again to go on from here")
            raise typer.Exit(INTERRUPTED) from None

    return app.command()(guarded)


@command
def demo(
    folder: Annotated[str, typer.Argument(metavar="[DIR]", help="Where to write it.")] = "mmaudit-demo",
    num_samples: Annotated[
        int | None,
        typer.Option("--num-samples", min=100, help="Fewer samples for a quick look. [default: all 1797]"),
    ] = None,
    seed: SeedOption = None,
    json_: JsonOption = False,
) -> None:
    """Plant a dataset whose imbalance is known, run the whole line on it, and report what was recovered."""
    from .console import progress_bars, tell_demo
    from .demo import demo as run_demo

    with progress_bars() as progress:
        result = run_demo(folder, num_samples=num_samples, seed=seed or 0, progress=progress)
    _finish(result, json_, tell_demo)


@command
def ingest(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="cremad, ave, kinetics-sounds, vggsound, ucf101, mosei, image-text or ogm-ge.",
        ),
    ],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The download, as it unpacks.")],
    list_: Annotated[
        list[str] | None,
        typer.Option("--list", help="A list of clips or splits, where the download has another. Repeatable."),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="The table to write. [default: DIR/metadata.parquet]")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Turn an official download into metadata.parquet, and say which clips are missing."""
    from .console import tell_ingest
    from .stages import ingest as run_ingest

    _finish(run_ingest(name, folder, lists=list_ or [], out=out), json_, tell_ingest)


@command
def check(
    data: DataArgument,
    run: RunOption = "mmaudit-run",
    modality: ModalityOption = None,
    encoder: EncoderOption = None,
    task: TaskOption = None,
    label: LabelOption = None,
    id_: IdOption = None,
    group: GroupOption = None,
    split: SplitOption = None,
    allow_outside: OutsideOption = False,
    device: DeviceOption = "auto",
    num_workers: WorkersOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Say what would be read, what is unusable and what train and test share; exit 3 if they share anything."""
    from dataclasses import replace

    from ..audit.errors import GateError
    from .config import override
    from .console import progress_bars, tell_check
    from .stages import check as run_check

    settings = _config(config, set_, None)
    data_config = override(
        settings.data,
        modality=tuple(modality) if modality else None,
        encoder=tuple(encoder) if encoder else None,
        task=task,
        label=label,
        id=id_,
        group=group,
        split=split,
        allow_outside=True if allow_outside else None,
    )
    with progress_bars() as progress:
        found = run_check(
            data,
            run=run,
            config=replace(settings, data=data_config),
            device=device,
            num_workers=num_workers,
            progress=progress,
        )
    _finish(found, json_, tell_check)
    if found["leakage"]["leaks"]:
        raise GateError(f"train and test are not apart: see the {len(found['leakage']['findings'])} above")


@command
def score(
    data: DataArgument,
    run: RunOption = "mmaudit-run",
    modality: ModalityOption = None,
    encoder: EncoderOption = None,
    task: TaskOption = None,
    label: LabelOption = None,
    id_: IdOption = None,
    group: GroupOption = None,
    split: SplitOption = None,
    learn_from: Annotated[
        str | None,
        typer.Option("--learn-from", help="all, or train to keep test labels out. [default: all]"),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option("--repeats", help="Rounds of cross-fitting. [default: 3]"),
    ] = None,
    allow_outside: OutsideOption = False,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    num_workers: WorkersOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Train a probe on each modality and score every sample out of fold."""
    from dataclasses import replace

    from .config import override
    from .console import progress_bars, tell_score
    from .run import Run
    from .stages import score as run_score

    settings = _config(config, set_, seed)
    data_config = override(
        settings.data,
        modality=tuple(modality) if modality else None,
        encoder=tuple(encoder) if encoder else None,
        task=task,
        label=label,
        id=id_,
        group=group,
        split=split,
        allow_outside=True if allow_outside else None,
    )
    probe = override(settings.probe, learn_from=learn_from, repeats=repeats)
    settings = replace(settings, data=data_config, probe=probe)
    with progress_bars() as progress:
        record = run_score(
            data,
            run=run,
            config=settings,
            device=device,
            num_workers=num_workers,
            overwrite=overwrite,
            progress=progress,
        )
    _finish({**record, "report": str(Run(Path(run)).report_file)}, json_, tell_score)


@command
def split(
    run: RunOption = "mmaudit-run",
    balanced: Annotated[bool, typer.Option("--balanced", help="Uniformly distributed discrepancy.")] = False,
    subset: Annotated[
        str | None,
        typer.Option("--subset", metavar="NAME", help="MODALITY-preferred, or balanced[:T] for |D| <= T."),
    ] = None,
    dominated: Annotated[
        str | None,
        typer.Option("--dominated", metavar="MODALITY:T", help="Samples with discrepancy above T."),
    ] = None,
    gmm: Annotated[
        str | None,
        typer.Option(
            "--gmm", metavar="SIDE", help="balanced or imbalanced, by the gap mixture or the rule in its place."
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="Distance to uniform allowed; 0: exact. [default: 0.05]"),
    ] = None,
    size: Annotated[int | None, typer.Option("--size", help="Keep so many samples instead.")] = None,
    bins: Annotated[int | None, typer.Option("--bins", help="Bins over [-1, 1]. [default: 20]")] = None,
    between: Annotated[
        str | None,
        typer.Option("--between", metavar="A[:B]", help="Which discrepancy: A against B, or A against the rest."),
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option("--scores", help="Anybody's score table in place of the run's."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The manifest's name.")] = None,
    seed: SeedOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Write a manifest of a subset, and the rows it drops with the reason."""
    from dataclasses import replace

    from .config import override
    from .console import tell_split
    from .stages import split as run_split

    settings = _config(config, set_, seed)
    chosen = override(settings.split, tolerance=tolerance, size=size, bins=bins)
    _, summary = run_split(
        run=run,
        scores=scores,
        config=replace(settings, split=chosen),
        balanced=balanced,
        subset=subset,
        dominated=dominated,
        gmm=gmm,
        between=between,
        name=name,
    )
    _finish(summary, json_, tell_split)


@command
def finetune(
    manifest: Annotated[str, typer.Option("--manifest", "-m", help="A manifest's file, or its name in the run.")],
    run: RunOption = "mmaudit-run",
    data: Annotated[str | None, typer.Option("--data", help="The data, if they moved.")] = None,
    fusion: Annotated[str | None, typer.Option("--fusion", help="concat or late. [default: concat]")] = None,
    sampling: Annotated[
        str | None,
        typer.Option("--sampling", help="uniform, or bss-h for the balance curriculum. [default: uniform]"),
    ] = None,
    keep_posterior: Annotated[
        float | None,
        typer.Option("--keep-posterior", help="Train on samples with P(balanced) of at least this."),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the samples. [default: 60]")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Samples a step. [default: 64]")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate of AdamW. [default: 0.001]")] = None,
    name: Annotated[str | None, typer.Option("--name", help="The name of this fine-tuning.")] = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    num_workers: WorkersOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Train a fusion network on a manifest and test it, overall and by subset."""
    from dataclasses import replace

    from .config import override
    from .console import progress_bars, tell_finetune
    from .stages import finetune as run_finetune

    settings = _config(config, set_, seed)
    chosen = override(
        settings.finetune,
        fusion=fusion,
        sampling=sampling,
        keep_posterior=keep_posterior,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
    )
    with progress_bars() as progress:
        metrics = run_finetune(
            manifest,
            run=run,
            data=data,
            config=replace(settings, finetune=chosen),
            name=name,
            device=device,
            num_workers=num_workers,
            overwrite=overwrite,
            progress=progress,
        )
    _finish(metrics, json_, tell_finetune)


@command
def report(run: RunOption = "mmaudit-run", json_: JsonOption = False) -> None:
    """Write report.html, report.json and the figures from what the run folder holds."""
    from .console import tell_report
    from .stages import report as write_report

    page = write_report(run=run)
    _finish({"report": str(page)}, json_, tell_report)


def main() -> None:
    """Run the command line."""
    from .console import configure_logging

    # Threads that spin while they wait take the processor from other jobs: beside them a small training on two cores
    # took 33 s, and 4 s with threads that sleep. It must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    configure_logging()
    app()


def _config(path: str | None, settings: list[str] | None, seed: int | None) -> RunConfig:
    from .config import load_config, override

    return override(load_config(path, settings or []), seed=seed)


def _finish(result: dict[str, Any], as_json: bool, tell: Callable[[dict[str, Any]], None]) -> None:
    """Print the result as JSON on stdout, or tell it in words."""
    if as_json:
        json.dump(result, sys.stdout, indent=2, allow_nan=False)
        sys.stdout.write("\n")
    else:
        tell(result)
