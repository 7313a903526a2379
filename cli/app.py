"""The command line: what do commands share? Options, errors in one line with an exit code, results as words or JSON"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
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
    typer.Option("--task", help="classification, multilabel or regression. \\[default: classification]"),
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
SeedOption = Annotated[int | None, typer.Option("--seed", help="The seed of everything. \\[default: 0]")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
WorkersOption = Annotated[
    int | None,
    typer.Option("--num-workers", min=0, help="Processes that decode media; 0: none. \\[default: all processors]"),
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
        from .interrupts import remembered

        try:
            with remembered():
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


def settings_of(path: str | None, settings: list[str] | None, seed: int | None) -> RunConfig:
    """Read a config file, settings over it, and a seed over both."""
    from .config import load_config, override

    return override(load_config(path, settings or []), seed=seed)


def finish(result: dict[str, Any], as_json: bool, tell: Callable[[dict[str, Any]], None]) -> None:
    """Print the result as JSON on stdout, or tell it in words."""
    if as_json:
        json.dump(result, sys.stdout, indent=2, allow_nan=False)
        sys.stdout.write("\n")
    else:
        tell(result)
