"""Options that commands share, and their errors and results."""

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

# Heavy packages (torch, scikit-learn, pyarrow) are imported inside the commands: --help answers in a blink.

_shows_traceback = False  # what --debug said


class _Commands(typer.core.TyperGroup):
    """The commands; --debug may stand before or after the name of one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, with every --debug first."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(word for word in args[:end] if word != "--debug"), *args[end:]]
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
_OTHERS = "A manifest that you did not make on this machine"
NamedEncoderOption = Annotated[
    list[str] | None,
    typer.Option(
        "--encoder",
        metavar="NAME=ENCODER",
        help="Run the code or model that it names. Repeatable.",
        rich_help_panel=_OTHERS,
    ),
]
NamedDataOption = Annotated[
    str | None,
    typer.Option("--data", help="The data; also where your own have moved.", rich_help_panel=_OTHERS),
]
NamedOutsideOption = Annotated[
    bool,
    typer.Option("--allow-outside", help="Let paths lead outside the data's folder.", rich_help_panel=_OTHERS),
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
        from .failures import begin_stage, describe, remembered

        begin_stage("")
        _escape_output()
        try:
            with remembered():
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
    """Let names that are not UTF-8 be printed with their bytes escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def printing() -> Iterator[None]:
    """Name standard output in errors of printing."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = "standard output"
        raise


def _flush_output() -> None:
    """Write out what was printed, while errors can still be reported."""
    if sys.stdout is None:
        return
    try:
        with printing():
            sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):  # what is left would be reported again at the end of Python
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _print_failure(error: BaseException, line: str | None) -> None:
    """Print the line, and with --debug the traceback before it; a closed terminal is no matter."""
    from .console import print_status

    with suppress(OSError):
        if _shows_traceback:
            traceback.print_exception(error)
        if line is not None:
            print_status(line)
    with suppress(OSError):
        _flush_output()


def settings_of(path: str | None, settings: list[str] | None, seed: int | None) -> RunConfig:
    """Read a config file, settings over it, and a seed over both."""
    from .config import load_config, override

    return override(load_config(path, settings or []), seed=seed)


def finish(result: dict[str, Any], as_json: bool, tell: Callable[[dict[str, Any]], None]) -> None:
    """Print the result as JSON on stdout, or tell it in words."""
    with printing():
        if as_json:
            print(json.dumps(result, indent=2, allow_nan=False))
        else:
            tell(result)
