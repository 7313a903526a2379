"""Reference pages made from the code: the command line and the config keys.

Only the constants of samplers and balancers import torch, since each stands in the file of its method.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import sys
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GENERAL = {"--help", "--debug", "--quiet", "--verbose", "--version", "--install-completion"}
_DEFAULT = re.compile(r"[;:,] by default ((?:[^;.]|\.(?=\w))*)")
_CONSTANT = re.compile(r"`?\b([A-Z][A-Z_]{4,}S)\b`?")


def write_pages(folder: Path) -> None:
    """Write cli.md, config.md, methods.md and presets.md into a folder, each only where its text changed."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"cli.md": cli_page, "config.md": config_page, "methods.md": methods_page, "presets.md": presets_page}
    for name, make_page in pages.items():
        text = make_page()
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """An argument or option of a command, as its signature declares it; `names` are options, () of an argument."""

    names: tuple[str, ...]
    metavar: str
    help: str
    default: str
    panel: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command: its name, its help, its parameters in order."""

    name: str
    help: str
    parameters: tuple[Parameter, ...]

    @property
    def options(self) -> set[str]:
        """Every option, such as --run; the general options are of all commands."""
        return {name for parameter in self.parameters for name in parameter.names} | {
            "--help",
            "--debug",
            "--quiet",
            "--verbose",
            "--version",
            "--install-completion",
        }


def commands() -> dict[str, Command]:
    """Return the commands of mmaudit by name, in the order of the pipeline."""
    from mmaudit.cli.main import app

    result = {}
    for registered in app.registered_commands:
        function, name = registered.callback, registered.name
        assert function is not None
        assert name is not None
        parameters = inspect.signature(function).parameters.values()
        result[name] = Command(
            name=name,
            help=_plain(registered.help or ""),
            parameters=tuple(_parameter(parameter) for parameter in parameters),
        )
    return result


def _parameter(parameter: inspect.Parameter) -> Parameter:
    """Return a parameter as its annotation, Annotated[type, option or argument of typer], describes it."""
    type_, info = typing.get_args(parameter.annotation)
    text, default = _plain(info.help or ""), ""
    if parameter.default is inspect.Parameter.empty:
        default = "required"
    elif parameter.default is not None and parameter.default is not False:
        default = f"`{parameter.default}`"
    elif match := _DEFAULT.search(text):
        text, default = text[: match.start()] + text[match.end() :], match[1]
    # Within Annotated the first name of an option stands where its default would.
    declared = [info.default, *(info.param_decls or ())]
    names = tuple(name for option in declared if isinstance(option, str) for name in option.split("/"))
    return Parameter(
        names=names,
        metavar=info.metavar or _kind(type_),
        help=text,
        default=default,
        panel=info.rich_help_panel or "",
    )


def _plain(text: str) -> str:
    """Return help text without the escapes that keep rich from reading markup."""
    return text.replace("\\[", "[")


def _kind(annotation: Any) -> str:
    """Return what an option takes, "" where it is a flag."""
    kinds = {"bool": "", "int": "INTEGER", "float": "NUMBER"}
    return next((kind for name, kind in kinds.items() if re.search(rf"\b{name}\b", str(annotation))), "TEXT")


def cli_page() -> str:
    """Write a section for each command: its help, its usage, a table of arguments and options."""
    return "\n".join(line for command in commands().values() for line in _command(command))


def _command(command: Command) -> Iterator[str]:
    arguments = [parameter.metavar for parameter in command.parameters if not parameter.names]
    yield from (f"## mmaudit {command.name}", "", command.help, "")
    yield from ("```text", " ".join(["mmaudit", command.name, *arguments, "[OPTIONS]"]), "```", "")
    yield from ("| argument or option | meaning | default |", "|---|---|---|")
    panels: dict[str, list[Parameter]] = {}
    for parameter in command.parameters:
        panels.setdefault(parameter.panel, []).append(parameter)
    for panel, parameters in panels.items():
        if panel:
            yield f"| *{panel}* | | |"
        for parameter in parameters:
            names = [f"`{name} {parameter.metavar}`".replace(" `", "`") for name in parameter.names]
            shown = ", ".join(names) or f"`{parameter.metavar}`"
            yield f"| {_cell(shown)} | {_cell(parameter.help)} | {_cell(parameter.default)} |"
    yield ""


def methods_page() -> str:
    """Write a table for each kind of method: name, meaning, and where there are any paper, needs and settings."""
    from mmaudit.cli.methods import methods

    cells_of_kind: dict[str, list[dict[str, str]]] = {}
    for row in methods().rows:
        sections = dict.fromkeys(f"`{key.key.rpartition('.')[0]}.*`" for key in row.keys)
        cells = {"name": f"`{row.name}`", "meaning": row.help.replace("*", "\\*"), "paper": row.paper}
        cells |= {"needs": "; ".join(row.needs), "settings": ", ".join(sections)}
        cells_of_kind.setdefault(row.kind, []).append(cells)
    lines: list[str] = []
    for kind, rows in cells_of_kind.items():
        columns = [name for name in rows[0] if any(cells[name] for cells in rows)]
        lines += [f"## {kind.capitalize()}s", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(_cell(cells[name]) for name in columns)} |" for cells in rows]
        lines.append("")
    return "\n".join(lines)


def presets_page() -> str:
    """Write a section for each preset: paper, reported figures, what is not stated, what differs, and its settings."""
    from mmaudit.cli.config import to_toml
    from mmaudit.train.presets import PRESETS, read_preset

    presets = [read_preset(name) for name in PRESETS]
    lines = ["| preset | method and data | paper | reported |", "|---|---|---|---|"]
    for preset in presets:
        cells = (
            f"[`{preset.name}`](#{preset.name})",
            preset.title,
            preset.paper,
            "; ".join(preset.reported) or "not read",
        )
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    for preset in presets:
        lines += ["", f"## {preset.name}", "", f"{preset.title}. {preset.paper}.", ""]
        lines += [f"Data: {', '.join(f'`mmaudit ingest {name}`' for name in preset.data)}.", ""]
        for heading, texts in (
            ("Read in", preset.sources),
            ("Reported", preset.reported),
            ("Not stated", preset.not_stated),
            ("Cannot be reproduced, or differs", preset.differs),
        ):
            lines += [f"- {heading}: {text}" for text in texts]
        lines += ["", "```toml", to_toml(preset.settings).strip(), "```"]
    return "\n".join([*lines, ""])


def config_page() -> str:
    """Write a section for each config dataclass of a run, with keys, types, defaults and what they mean."""
    from mmaudit.cli.config import RunConfig

    sections = [_section(f"{section}.", type_) for section, type_ in _method_configs().items()]
    return "\n".join(line for lines in (_section("", RunConfig), *sections) for line in lines)


def config_keys() -> set[str]:
    """Return every key of a run's config, such as probe.folds."""
    from mmaudit.cli.config import RunConfig

    methods = [_keys(f"{section}.", type_()) for section, type_ in _method_configs().items()]
    return set().union(_keys("", RunConfig()), *methods, _method_configs())


def _method_configs() -> dict[str, type[Any]]:
    """Return the config dataclasses of samplers and balancers by section, such as balancing.ogm."""
    from mmaudit.train.balancing import BALANCERS
    from mmaudit.train.sampling import SAMPLERS

    methods = [registry.load(name) for registry in (SAMPLERS, BALANCERS) for name in registry]
    types = [method.config_type for method in methods if method.config_type is not None]
    return {type_.section: type_ for type_ in types}


def _keys(prefix: str, config: Any) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _keys(f"{prefix}{field.name}.", value)


def _section(prefix: str, cls: type) -> Iterator[str]:
    default, notes = cls(), field_notes(cls)
    nested = [field for field in dataclasses.fields(cls) if dataclasses.is_dataclass(getattr(default, field.name))]
    plain = [f for f in dataclasses.fields(cls) if f not in nested and not isinstance(getattr(default, f.name), dict)]
    if plain:
        yield from (f"## {prefix.rstrip('.') or 'Keys without a section'}", "", _summary(cls), "")
        yield from ("| key | type | default | meaning |", "|---|---|---|---|")
        for field in plain:
            value = _toml(getattr(default, field.name))
            type_ = f"`{field.type}`" if isinstance(field.type, str) else f"`{field.type.__name__}`"
            yield f"| `{prefix}{field.name}` | {_cell(type_)} | {value} | {_cell(notes.get(field.name, ''))} |"
        yield ""
    for field in nested:
        yield from _section(f"{prefix}{field.name}.", type(getattr(default, field.name)))


def _summary(cls: type) -> str:
    """Return the docstring of a class up to its sections."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return re.split(r"^(?:Args|Attributes|Raises|Example|Examples):", text, flags=re.MULTILINE)[0].strip()


def field_notes(cls: type) -> dict[str, str]:
    """Return what is said of each field: in the docstring's Args or Attributes, else in the comments at it."""
    source = textwrap.dedent(inspect.getsource(cls))
    notes = {**_comments(source), **_described(inspect.cleandoc(cls.__doc__ or ""))}
    return {name: _CONSTANT.sub(lambda match: _values(match, cls), note) for name, note in notes.items()}


def _values(match: re.Match[str], cls: type) -> str:
    """Return the values of a constant that a docstring names, such as OPTIMIZERS; other words as they stand."""
    from mmaudit.audit.dataset.formats import READERS
    from mmaudit.train import FUSIONS
    from mmaudit.train.balancing import BALANCERS
    from mmaudit.train.sampling import SAMPLERS

    registries = {"BALANCERS": BALANCERS, "FUSIONS": FUSIONS, "READERS": READERS, "SAMPLERS": SAMPLERS}
    values = getattr(sys.modules[cls.__module__], match[1], registries.get(match[1]))
    return match[0] if values is None else ", ".join(f"`{value}`" for value in values)


def _described(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    inside, name = False, ""
    for line in text.splitlines():
        if re.match(r"\S.*:$", line):
            inside, name = line in ("Args:", "Attributes:"), ""
        elif inside and (match := re.match(r" {4}(\w+)(?: \(.*?\))?: (.*)", line)):
            name = match.group(1)
            found[name] = match.group(2)
        elif inside and name and line.startswith(" " * 8):
            found[name] += " " + line.strip()
        elif line and not line.startswith(" "):
            inside = False
    return found


def _comments(source: str) -> dict[str, str]:
    """Return the comment on each field's last line, with whole comment lines straight before the field."""
    by_line = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        before: list[str] = []
        line = node.lineno - 1
        while line in by_line and by_line[line][1]:
            before.insert(0, by_line[line][0])
            line -= 1
        after = by_line.get(node.end_lineno or node.lineno, ("", False))[0]
        if text := " ".join(filter(None, (*before, after))):
            found[node.target.id] = text
    return found


def _toml(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<-", "\\<-")


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
