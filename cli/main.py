"""The command line. Each command is one public function: its options are the signature, their help is the docstring.

Signatures and docstrings are read from the source text, so that `--help` takes 0.2 s: importing the functions takes
seconds, because they need torch, scikit-learn and pyarrow. Positional parameters become arguments, keyword-only ones
options; `progress` is replaced by --quiet.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from rich.markup import escape

from .. import __version__
from ..audit.registry import read_arguments
from .failures import begin_stage, describe, interrupts_recorded
from .progress import configure_logging, print_status


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command: its public function, the function of `console` that prints its result, and that of --dump if any."""

    name: str
    module: str
    printer: str
    dump: str | None = None


COMMANDS = (  # in the order of the pipeline
    Command(name="demo", module="demo", printer="print_demo"),
    Command(name="ingest", module="checking", printer="print_ingest"),
    Command(name="check", module="checking", printer="print_check"),
    Command(name="score", module="scoring", printer="print_score"),
    Command(name="apply", module="applying", printer="print_apply"),
    Command(name="plan", module="planning", printer="print_plan"),
    Command(name="split", module="splitting", printer="print_split"),
    Command(name="verify", module="verifying", printer="print_lines"),
    Command(name="diff", module="manifests", printer="print_lines"),
    Command(name="replay", module="splitting", printer="print_replay"),
    Command(name="card", module="manifests", printer="print_card"),
    Command(name="export", module="manifests", printer="print_export"),
    Command(name="order", module="manifests", printer="print_order", dump="dump_order"),
    Command(name="finetune", module="training", printer="print_finetune"),
    Command(name="evaluate", module="evaluating", printer="print_evaluate"),
    Command(name="compare", module="comparison.compare", printer="print_compare"),
    Command(name="study", module="study.study", printer="print_study"),
    Command(name="report", module="reporting", printer="print_report"),
    Command(name="methods", module="methods", printer="print_methods"),
)

_SELECTION, _RULE = "Selection of samples", "Options of the selection"
_UNTRUSTED = "For a manifest that was not made by you on this machine"
_DATA = "Data: to train without scores, or of a manifest that was not made by you on this machine"
_DATA_COLUMNS = ("modality", "label", "id", "group", "split")
_TRAINING, _SETTINGS, _EXECUTION = "Training", "Settings", "Execution"
# Panels of the options that are not in the first one, which holds at most a dozen.
_PANELS: dict[str | tuple[str, str], str] = {
    **dict.fromkeys(("config", "settings", "seed", "learn_from", "repeats", "thorough"), _SETTINGS),
    **dict.fromkeys(
        ("device", "num_workers", "engine", "ray_address", "jobs", "stage", "shard", "json", "dump"), _EXECUTION
    ),
    **dict.fromkeys(("balanced", "subset", "dominated", "gmm", "like", "intersect", "exclude"), _SELECTION),
    **dict.fromkeys(("tolerance", "size", "bins", "by", "grid", "between", "resplit"), _RULE),
    **dict.fromkeys(("model", "only", "init", "keep_posterior", "epochs", "batch_size", "lr"), _TRAINING),
    **{(command, name): _UNTRUSTED for command in ("verify", "export") for name in ("data", "allow_outside")},
    **{("apply", name): _UNTRUSTED for name in ("encoder", "allow_outside")},
    **{("evaluate", name): _UNTRUSTED for name in ("data", "encoder", "allow_outside")},
    **{("compare", name): _UNTRUSTED for name in ("data", "encoder", "allow_outside")},
    ("evaluate", "model"): "",
    ("compare", "grid"): "",
    **{("finetune", name): _DATA for name in ("data", *_DATA_COLUMNS, "encoder", "allow_outside")},
    ("order", "batch_size"): "",
}
_FLAGS: dict[str | tuple[str, str], tuple[str, ...]] = {
    **{(command, "manifest"): ("--manifest", "-m") for command in ("finetune", "evaluate", "compare")},
    "settings": ("--set",),
    "lists": ("--list",),
}
_METAVARS: dict[str | tuple[str, str], str] = {
    "modality": "NAME=COLUMN[:KIND]",
    "encoder": "NAME=ENCODER",
    "features": "[NAME=]FILE",
    "model": "PACKAGE.MODULE:FACTORY",
    "settings": "SECTION.KEY=VALUE",
    "dominated": "MODALITY:T",
    "between": "A[:B]",
    "resplit": "80/8/12",
    "subset": "RULE",
    "stage": "STAGE",
    "engine": "ENGINE",
    "ray_address": "ADDRESS",
    **dict.fromkeys(("like", "intersect", "exclude"), "MANIFEST"),
    "method": "METHOD",
    "probe": "NAME: SECTION.KEY=VALUE",
    "shard": "I/N",
    ("compare", "grid"): "SECTION.KEY=VALUE,VALUE",
}
_REGISTRIES = {  # whose names complete the help of a parameter
    ("ingest", "name"): ("audit.downloads", "DOWNLOADS"),
    ("export", "format"): ("rebalance", "EXPORTERS"),
    ("finetune", "sampling"): ("train.sampling", "SAMPLERS"),
    ("finetune", "balancing"): ("train.balancing", "BALANCERS"),
    ("finetune", "fusion"): ("train", "FUSIONS"),
    ("finetune", "report_to"): ("train", "TRACKERS"),
}
_PRINTERS_OF_RESULTS = (
    "print_lines",
    "print_finetune",
    "dump_order",
)  # the other printers take the result as JSON values
_VARIABLES = {name: f"MMAUDIT_{name.upper()}" for name in ("run", "device", "num_workers")}
_shows_traceback = _is_quiet = False  # set by --debug and --quiet


class _Commands(typer.core.TyperGroup):
    """The group of commands; accepts the general options before or after a command's name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments after moving general options to the front."""
        end = args.index("--") if "--" in args else len(args)
        general = ("--debug", "--quiet", "--verbose")
        moved = [arg for arg in args[:end] if arg in general]
        return super().parse_args(ctx, [*moved, *(arg for arg in args[:end] if arg not in general), *args[end:]])


app = typer.Typer(name="mmaudit", cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"mmaudit {__version__}")
        raise typer.Exit


@app.callback()
def _general_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print results, warnings and errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print more on stderr, with the seconds so far.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MMAUDIT_DEBUG", help="Print the traceback of any error.")
    ] = False,
) -> None:
    """Audit multimodal datasets for modality imbalance, sample by sample, and rebalance them."""
    global _shows_traceback, _is_quiet
    _shows_traceback, _is_quiet = debug, quiet
    configure_logging(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO, with_seconds=verbose)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parameter:
    """A parameter of a public function, as its source text states it; `default` is ... where it is required."""

    name: str
    annotation: str
    default: Any
    is_positional: bool
    help: str

    @property
    def cli_type(self) -> Any:
        """The type that the option's text is converted to."""
        if self.annotation == "bool":
            return bool
        if "Sequence" in self.annotation or "Mapping" in self.annotation:
            return list[str] | None
        if self.annotation in ("int", "int | None", "float | None"):
            return {"int": int, "int | None": int | None, "float | None": float | None}[self.annotation]
        return str if self.default is ... or isinstance(self.default, str) else str | None

    @property
    def cli_default(self) -> Any:
        """What typer passes if the option is absent: lists are None, and --no-NAME is a flag that is off."""
        if self.default is ...:
            return inspect.Parameter.empty
        if self.default is True:
            return False
        return None if self.cli_type == list[str] | None else self.default

    def value(self, passed: Any) -> Any:
        """Return the value of the parameter for what typer passed."""
        if passed is None or passed == []:
            return self.default
        return not passed if self.default is True else passed

    def option(self, command: str) -> Any:
        """Return typer's description of the argument or option."""
        help_text = self.help
        if names := _names_of(command, self.name):
            meaning, default, rest = self.help.removesuffix(".").partition("; by default")
            help_text = f"{meaning}: {names}{default}{rest}."
        panel = _PANELS.get((command, self.name), _PANELS.get(self.name)) or None
        metavar = _METAVARS.get((command, self.name), _METAVARS.get(self.name))
        flags = _FLAGS.get((command, self.name), _FLAGS.get(self.name))
        if self.is_positional and flags is None:
            shown = self.name.upper() if self.default is ... else f"[{self.name.upper()}]"
            return typer.Argument(metavar=shown, help=help_text, rich_help_panel=panel, show_default=False)
        flags = flags or (("--no-" if self.default is True else "--") + self.name.replace("_", "-"),)
        return typer.Option(
            *flags,
            metavar=metavar,
            help=help_text + (" Repeatable." if self.cli_type == list[str] | None else ""),
            envvar=_VARIABLES.get(self.name),
            rich_help_panel=panel,
            show_default=isinstance(self.default, str),
            min=0 if self.name == "num_workers" else None,
        )


def _names_of(command: str, parameter: str) -> str:
    """Return the names that a parameter may have, from the registry of the methods; "" if it has none."""
    if (command, parameter) not in _REGISTRIES:
        return ""
    module, registry = _REGISTRIES[command, parameter]
    return ", ".join(getattr(import_module(f"...{module}", __name__), registry))


@cache
def _functions(module: str) -> dict[str, ast.FunctionDef]:
    """Parse the top-level functions of a module of this package without importing it."""
    spec = find_spec(f".{module}", __package__)
    source = spec.loader.get_source(spec.name)  # type: ignore[union-attr]
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def _summary_and_arguments(docstring: str) -> tuple[str, dict[str, str]]:
    """Return the first paragraph of a Google-style docstring, and the description of each argument."""
    summary = inspect.cleandoc(docstring).split("\n\n")[0]
    return _flow(summary), {name: _flow(meaning) for name, meaning in read_arguments(docstring).items()}


def _flow(text: str) -> str:
    """Return text as one line for the terminal, without what holds in Python only."""
    line = " ".join(text.replace("`", "").split())
    return escape(re.sub(r"; in Python .*(?=\.$)", "", line))


def _parameters(function: ast.FunctionDef, help_of: dict[str, str]) -> Iterator[_Parameter]:
    arguments = function.args
    positional_defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + list(arguments.defaults)
    nodes = [(node, default, True) for node, default in zip(arguments.args, positional_defaults, strict=True)]
    nodes += [(node, default, False) for node, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    for node, default, is_positional in nodes:
        if node.arg == "progress":
            continue
        yield _Parameter(
            name=node.arg,
            annotation=ast.unparse(node.annotation) if node.annotation is not None else "str",
            default=... if default is None else ast.literal_eval(default),
            is_positional=is_positional,
            help=help_of[node.arg],
        )


def _register(command: Command) -> None:
    """Add a command to the app."""
    function = _functions(command.module)[command.name]
    summary, help_of = _summary_and_arguments(ast.get_docstring(function) or "")
    parameters = list(_parameters(function, help_of))
    accepts_progress = any(node.arg == "progress" for node in function.args.kwonlyargs)

    def callback(**values: Any) -> None:
        as_json, dump = values.pop("json"), values.pop("dump", False)
        values = {parameter.name: parameter.value(values[parameter.name]) for parameter in parameters}
        with _reported(command.name, values):
            if accepts_progress:
                values["progress"] = not _is_quiet
            result = getattr(import_module(f".{command.module}", __package__), command.name)(**values)
            _finish(result, "json" if as_json else (dump and command.dump) or command.printer)

    json_option = typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=_PANELS["json"])
    dump_option = typer.Option(
        "--dump", help="Print every step and id as CSV for programs, with unchanged ids.", rich_help_panel=_EXECUTION
    )
    signature = [
        inspect.Parameter(
            parameter.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=parameter.cli_default,
            annotation=Annotated[parameter.cli_type, parameter.option(command.name)],
        )
        for parameter in sorted(parameters, key=lambda parameter: parameter.default is not ...)
    ]
    flags = {"json": json_option} | ({"dump": dump_option} if command.dump else {})
    signature += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])
        for name, option in flags.items()
    ]
    callback.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in signature}
    app.command(command.name, help=summary)(callback)


for _command in COMMANDS:
    _register(_command)


def main() -> None:
    """Run the command line."""
    # Threads that spin while they wait take CPU time from other jobs: with another job running, a small training on two
    # cores took 33 s, and 4 s with threads that sleep. It must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app()


@contextmanager
def _reported(command: str, parameters: dict[str, Any]) -> Iterator[None]:
    """Print an error inside the block as one line, and exit with its code."""
    begin_stage("")
    for stream in (sys.stdout, sys.stderr):  # bytes of names that are not UTF-8 are printed as escape sequences
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with interrupts_recorded():
            yield
            _flush_output()
    except (typer.Exit, typer.Abort):
        raise
    except (Exception, KeyboardInterrupt) as error:
        failure = describe(error, command=command, parameters=parameters)
        with suppress(OSError):  # of a closed terminal
            if _shows_traceback:
                traceback.print_exception(error)
            if failure.line is not None:
                print_status(failure.line)
        with suppress(OSError):
            _flush_output()
        raise typer.Exit(failure.code) from None


def _finish(result: Any, printer: str) -> None:
    """Print a result on stdout, as JSON or by a function of `console`; raise GateError if it is a failed check.

    Of the processes of a distributed training only the first prints.
    """
    from ..audit.errors import GateError

    if os.environ.get("RANK", "0") == "0":
        with _named_output():
            if printer == "json":
                print(json.dumps(result.to_dict(), indent=2, allow_nan=False))
            else:
                print_result: Callable[[Any], None] = getattr(import_module(".console", __package__), printer)
                print_result(result if printer in _PRINTERS_OF_RESULTS else result.to_dict())
    if failed := getattr(result, "failed_gate", ""):
        raise GateError(failed)


@contextmanager
def _named_output() -> Iterator[None]:
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
        with _named_output():
            sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):  # the unwritten rest would be reported again when Python exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
