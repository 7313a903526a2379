"""Options shared by the commands, and the handling of their errors and results."""

from __future__ import annotations

import functools
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .config import RunConfig

# Heavy packages (torch, scikit-learn, pyarrow) are imported inside the commands, so that --help takes under 0.3 s.

_shows_traceback = False  # set by --debug


class _Commands(typer.core.TyperGroup):
    """The group of commands; accepts --debug before or after a command's name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments after moving every --debug to the front."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(arg for arg in args[:end] if arg != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="mmaudit",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MMAUDIT_DEBUG", help="Print the traceback of any error.")
    ] = False,
) -> None:
    """Audit multimodal datasets for modality imbalance, sample by sample, and rebalance them."""
    global _shows_traceback
    _shows_traceback = debug


DataArgument = Annotated[
    str,
    typer.Argument(help="Folder, table file or glob, saved dataset, tar shards, or a Hugging Face dataset name."),
]
ModalityOption = Annotated[
    list[str] | None,
    typer.Option("--modality", metavar="NAME=COLUMN[:KIND]", help="Modality, its column and kind. Repeatable."),
]
EncoderOption = Annotated[
    list[str] | None,
    typer.Option(
        "--encoder",
        metavar="NAME=ENCODER",
        help="Encoder of a modality: statistics, resnet18, hf:MODEL or package.module:function. Repeatable.",
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option("--task", help="classification, multilabel or regression. \\[default: classification]"),
]
LabelOption = Annotated[str | None, typer.Option("--label", help="Label column.")]
IdOption = Annotated[str | None, typer.Option("--id", help="Id column.")]
GroupOption = Annotated[
    str | None,
    typer.Option("--group", help="Group column: samples of one group always share a fold."),
]
SplitOption = Annotated[
    str | None,
    typer.Option("--split", help="Split column; none: ignore it and cut a test split."),
]
_UNTRUSTED = "For a manifest that was not made by you on this machine"
NamedEncoderOption = Annotated[
    list[str] | None,
    typer.Option(
        "--encoder",
        metavar="NAME=ENCODER",
        help="Confirm the encoder (code or model) of a modality. Repeatable.",
        rich_help_panel=_UNTRUSTED,
    ),
]
NamedDataOption = Annotated[
    str | None,
    typer.Option("--data", help="The data; also if your own data moved.", rich_help_panel=_UNTRUSTED),
]
NamedOutsideOption = Annotated[
    bool,
    typer.Option("--allow-outside", help="Allow paths outside the data folder.", rich_help_panel=_UNTRUSTED),
]
OutsideOption = Annotated[bool, typer.Option("--allow-outside", help="Allow paths outside the metadata's folder.")]
RunOption = Annotated[str, typer.Option("--run", help="Run folder.")]
ConfigOption = Annotated[str | None, typer.Option("--config", help="TOML file with settings.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One setting, such as probe.folds=10. Repeatable."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Random seed. \\[default: 0]")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
WorkersOption = Annotated[
    int | None,
    typer.Option("--num-workers", min=0, help="Processes that decode media; 0: none. \\[default: all CPUs]"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace existing output; score also removes manifests and trainings.")
]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose errors are printed as one line and set the exit code."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        from .failures import begin_stage, describe, interrupts_recorded

        begin_stage("")
        _escape_output()
        try:
            with interrupts_recorded():
                function(*args, **kwargs)
                _flush_output()
        except (typer.Exit, typer.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:
            failure = describe(error, command=function.__name__, parameters=kwargs)
            _print_failure(error, failure.line)
            raise typer.Exit(failure.code) from None

    return app.command()(guarded)


def _escape_output() -> None:
    """Print bytes of names that are not UTF-8 as escape sequences."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def printing() -> Iterator[None]:
    """Set the file name of an OSError raised while printing to "standard output"."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = "standard output"
        raise


def _flush_output() -> None:
    """Flush stdout while errors can still be reported."""
    if sys.stdout is None:
        return
    try:
        with printing():
            sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):  # the unwritten rest would be reported again when Python exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _print_failure(error: BaseException, line: str | None) -> None:
    """Print the line, and with --debug the traceback before it; errors of a closed terminal are ignored."""
    from .console import print_status

    with suppress(OSError):
        if _shows_traceback:
            traceback.print_exception(error)
        if line is not None:
            print_status(line)
    with suppress(OSError):
        _flush_output()


def load_settings(path: str | None, settings: list[str] | None, seed: int | None) -> RunConfig:
    """Load a config file; `settings` override its values, and `seed` overrides both."""
    from .config import load_config, override

    return override(load_config(path, settings or []), seed=seed)


def finish(result: dict[str, Any], as_json: bool, print_result: Callable[[dict[str, Any]], None]) -> None:
    """Print a result on stdout, as JSON or with `print_result`."""
    with printing():
        if as_json:
            print(json.dumps(result, indent=2, allow_nan=False))
        else:
            print_result(result)
