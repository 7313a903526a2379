"""Commands of the audit and of training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import manifest_commands
from .app import (
    ConfigOption,
    DataArgument,
    DeviceOption,
    EncoderOption,
    GroupOption,
    IdOption,
    JsonOption,
    LabelOption,
    ModalityOption,
    NamedDataOption,
    NamedEncoderOption,
    NamedOutsideOption,
    OutsideOption,
    OverwriteOption,
    RunOption,
    SeedOption,
    SetOption,
    SplitOption,
    TaskOption,
    WorkersOption,
    app,
    command,
    finish,
    load_settings,
)

if TYPE_CHECKING:
    from .config import RunConfig

__all__ = ["app", "main", "manifest_commands"]


@command
def demo(
    folder: Annotated[str, typer.Argument(metavar="[DIR]", help="Folder to write.")] = "mmaudit-demo",
    num_samples: Annotated[
        int | None,
        typer.Option("--num-samples", min=100, help="Number of samples. \\[default: all 1797]"),
    ] = None,
    seed: SeedOption = None,
    json_: JsonOption = False,
) -> None:
    """Generate a dataset with known imbalance, run all stages on it, and report how well it was recovered."""
    from .console import print_demo, progress_bars
    from .demo import demo as run_demo

    with progress_bars() as progress:
        result = run_demo(folder, num_samples=num_samples, seed=seed or 0, progress=progress)
    finish(result, json_, print_demo)


@command
def ingest(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="cremad, ave, kinetics-sounds, vggsound, ucf101, mosei, image-text or ogm-ge.",
        ),
    ],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of the unpacked download.")],
    list_: Annotated[
        list[str] | None,
        typer.Option("--list", help="List of clips or splits to use in place of the download's own. Repeatable."),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", help="Table to write. \\[default: DIR/metadata.parquet]")] = None,
    json_: JsonOption = False,
) -> None:
    """Convert an official download into metadata.parquet, and list the missing clips."""
    from .console import print_ingest
    from .stages import ingest as run_ingest

    finish(run_ingest(name, folder, lists=list_ or [], out=out), json_, print_ingest)


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
    """Check the data: usable and unusable samples, and leaks between train and test; exit 3 on a leak."""
    from ..audit.errors import GateError
    from .console import print_check, progress_bars
    from .stages import check as run_check

    settings = _with_data(
        load_settings(config, set_, None),
        modality=modality,
        encoder=encoder,
        task=task,
        label=label,
        id_=id_,
        group=group,
        split=split,
        allow_outside=allow_outside,
    )
    with progress_bars() as progress:
        summary = run_check(
            data,
            run=run,
            config=settings,
            device=device,
            num_workers=num_workers,
            progress=progress,
        )
    finish(summary, json_, print_check)
    if summary["leakage"]["leaks"]:
        raise GateError(f"train and test overlap: {len(summary['leakage']['findings'])} leaks found, listed above")


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
        typer.Option("--learn-from", help="all, or train to keep test labels out of the probes. \\[default: all]"),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option("--repeats", help="Repeats of cross-fitting. \\[default: 3]"),
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
    """Fit a probe per modality and score every sample out of fold."""
    from dataclasses import replace

    from .config import override
    from .console import print_score, progress_bars
    from .run import Run
    from .stages import score as run_score

    settings = _with_data(
        load_settings(config, set_, seed),
        modality=modality,
        encoder=encoder,
        task=task,
        label=label,
        id_=id_,
        group=group,
        split=split,
        allow_outside=allow_outside,
    )
    probe = override(settings.probe, learn_from=learn_from, repeats=repeats)
    settings = replace(settings, probe=probe)
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
    finish({**record, "report": str(Run(Path(run)).report_file)}, json_, print_score)


@command
def finetune(
    manifest: Annotated[str, typer.Option("--manifest", "-m", help="Manifest file, or its name in the run.")],
    run: RunOption = "mmaudit-run",
    data: NamedDataOption = None,
    encoder: NamedEncoderOption = None,
    allow_outside: NamedOutsideOption = False,
    sampling: Annotated[
        str | None,
        typer.Option(
            "--sampling",
            help="uniform, bss-h, anti-curriculum, balanced-first, bss-l, dus-h, dus-rl, smv, class-balanced or "
            "posterior. \\[default: uniform]",
        ),
    ] = None,
    balancing: Annotated[
        str | None,
        typer.Option(
            "--balancing",
            help="joint, sum, modality-dropout, gmm, ogm, ogm-ge, gblend, greedy, pmr, agm, mmpareto, mses, "
            "mslr, mmcosine or mla. \\[default: joint, or as sampling or fusion needs]",
        ),
    ] = None,
    fusion: Annotated[
        str | None,
        typer.Option(
            "--fusion",
            help="concat, late, gated, film, mmtm or shared. \\[default: concat, or as the balancing needs]",
        ),
    ] = None,
    only: Annotated[str | None, typer.Option("--only", help="Train on one modality only.")] = None,
    init: Annotated[
        str | None,
        typer.Option("--init", help="Initial weights: a fine-tuning's name in the run, or a file."),
    ] = None,
    keep_posterior: Annotated[
        float | None,
        typer.Option("--keep-posterior", help="Train only on samples with P(balanced) of at least this."),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Number of epochs. \\[default: 60]")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Samples per step. \\[default: 64]")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate. \\[default: 0.001]")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of this fine-tuning.")] = None,
    report_to: Annotated[
        str | None, typer.Option("--report-to", help="tensorboard, wandb or mlflow; separate several with commas.")
    ] = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    num_workers: WorkersOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Train a network on a manifest, and test it overall and by subset. Works under torchrun -m -- mmaudit."""
    from dataclasses import replace

    from .config import override
    from .console import print_finetune, progress_bars
    from .training import finetune as run_finetune

    settings = load_settings(config, set_, seed)
    finetune_config = override(
        settings.finetune,
        sampling=sampling,
        balancing=balancing,
        fusion=fusion,
        only=only,
        init=init,
        keep_posterior=keep_posterior,
        epochs=epochs,
        batch_size=batch_size,
        report_to=None if report_to is None else tuple(report_to.split(",")),
    )
    with progress_bars() as progress:
        metrics = run_finetune(
            manifest,
            run=run,
            data=data,
            encoder=encoder or (),
            allow_outside=allow_outside,
            config=replace(settings, finetune=finetune_config, optim=override(settings.optim, lr=lr)),
            name=name,
            device=device,
            num_workers=num_workers,
            overwrite=overwrite,
            progress=progress,
        )
    if os.environ.get("RANK", "0") == "0":
        finish(metrics, json_, print_finetune)


@command
def evaluate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a finished fine-tuning in the run.")],
    run: RunOption = "mmaudit-run",
    manifest: Annotated[
        str | None,
        typer.Option("--manifest", "-m", help="Manifest to test on. \\[default: its training manifest]"),
    ] = None,
    data: NamedDataOption = None,
    encoder: NamedEncoderOption = None,
    allow_outside: NamedOutsideOption = False,
    split: Annotated[str, typer.Option("--split", help="test, validation or train.")] = "test",
    device: DeviceOption = "auto",
    num_workers: WorkersOption = None,
    json_: JsonOption = False,
) -> None:
    """Test a finished fine-tuning: metrics by subset and class, and the contribution of each modality."""
    from .console import print_evaluate, progress_bars
    from .training import evaluate as run_evaluate

    with progress_bars() as progress:
        evaluation = run_evaluate(
            name,
            run=run,
            manifest=manifest,
            data=data,
            encoder=encoder or (),
            allow_outside=allow_outside,
            split=split,
            device=device,
            num_workers=num_workers,
            progress=progress,
        )
    finish(evaluation, json_, print_evaluate)


@command
def report(run: RunOption = "mmaudit-run", json_: JsonOption = False) -> None:
    """Write report.html, report.json and the figures from the files of the run folder."""
    from .console import print_report
    from .stages import report as write_report

    page = write_report(run=run)
    finish({"report": str(page)}, json_, print_report)


def main() -> None:
    """Run the command line."""
    from .console import configure_logging

    # Threads that spin while they wait take CPU time from other jobs: with another job running, a small training on two
    # cores took 33 s, and 4 s with threads that sleep. It must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    configure_logging()
    app()


def _with_data(
    settings: RunConfig,
    *,
    modality: list[str] | None,
    encoder: list[str] | None,
    task: str | None,
    label: str | None,
    id_: str | None,
    group: str | None,
    split: str | None,
    allow_outside: bool,
) -> RunConfig:
    """Override the data section of the settings with the options that were passed."""
    from .config import override

    data = override(
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
    return override(settings, data=data)
