"""The documentation against the code: commands, options, settings, names, columns, modules and links of the pages."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.util
import inspect
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import mmaudit
from mmaudit.audit.scores.table import RANGES as SCORE_RANGES
from mmaudit.rebalance.manifest import COLUMNS, DROPPED_COLUMNS
from mmaudit.train import FUSIONS
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.sampling import SAMPLERS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RECORDS = ("log.md", "changelog.md")  # what was, also options of then
PAGES = sorted(page for page in DOCS.rglob("*.md") if not {"_build", "_generated"} & set(page.parts))
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(page for page in PAGES if page.name not in RECORDS)]
LINKED = [*GUIDES, ROOT / "SECURITY.md", DOCS / "log.md"]

_BLOCK = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_REFUSED = re.compile(r"# exit \d+$")  # shown because it is wrong
_SEPARATORS = {"|", "||", "&&", ";", "&", ">", "2>", "do", "done;"}


def _generate() -> Any:
    """Import docs/generate.py, which is no part of the package."""
    if "docs_generate" not in sys.modules:
        spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["docs_generate"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["docs_generate"])
    return sys.modules["docs_generate"]


COMMANDS = {name: command.options for name, command in _generate().commands().items()}
KEYS = _generate().config_keys()


def invocations(text: str) -> list[list[str]]:
    """Return the words of every call of mmaudit in a page: in blocks line by line, and in code within a line."""
    blocks = [body for kind, body in _BLOCK.findall(text) if kind in ("", "console", "bash", "sh")]
    lines = [line.removeprefix("$ ") for body in blocks for line in body.replace("\\\n", " ").splitlines()]
    lines += _CODE.findall(_BLOCK.sub("", text))
    calls = []
    for line in lines:
        if _REFUSED.search(line):
            continue
        if re.match(r"(?:torchrun .*-- |python -m |\.venv/bin/)?mmaudit [\w-]", line):
            words = shlex.split(line.replace("...", ""), comments=True)
            call = words[next(at for at, word in enumerate(words) if word.split("/")[-1] == "mmaudit") + 1 :]
            end = next((at for at, word in enumerate(call) if word in _SEPARATORS), len(call))
            calls.append(call[:end])
    return calls


def _fields(text: str) -> list[str]:
    """Return the names of fields with a default in the dataclasses of a page."""
    return re.findall(r"^    (\w+): (?!ClassVar)\w+ = ", text, flags=re.MULTILINE)


def faults(text: str) -> list[str]:
    """Return what a page shows that the command line, the config or a method on the page itself does not have."""
    sections = re.findall(r'section: ClassVar\[str\] = "([^"]+)"', text)
    keys = KEYS | {"SECTION.KEY"} | {f"{section}.{name}" for section in sections for name in _fields(text)}
    found = []
    for command, *words in invocations(text):
        if command.startswith("-"):
            continue
        options = COMMANDS.get(command)
        if options is None:
            if command != "COMMAND":
                found.append(f"mmaudit {command}: no such command")
            continue
        given = [word.partition("=")[0] for word in words if word.startswith("--")]
        found += [f"mmaudit {command} {option}: no such option" for option in given if option not in options]
        found += [
            f"--set {after}: no such key"
            for word, after in pairwise(words)
            if word == "--set" and after.partition("=")[0] not in keys
        ]
    known = set().union(*COMMANDS.values())
    for code in _CODE.findall(_BLOCK.sub("", text)):
        first = code.split("=")[0].split(" ")[0]
        if code.startswith("--") and len(code) > 2 and first not in known:
            found.append(f"{code}: no command has this option")
        if code.startswith("--set ") and (key := code[6:].strip("'").partition("=")[0]) not in keys:
            found.append(f"{code}: no such key")
        if (section := re.match(r"(\w+)\.[\w.*]+(?:=\S+)?$", code)) and section[1] in {
            key.split(".")[0] for key in KEYS
        }:
            key = code.partition("=")[0]
            is_file = key.rsplit(".")[-1] in ("json", "parquet", "html", "md", "py", "jsonl")
            if not is_file and not fnmatch.filter(KEYS, key):
                found.append(f"{code}: no such key")
    return found


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_options_and_settings_exist(page: Path) -> None:
    assert not faults(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "```console\n$ mmaudit score DATA --learn-form train\n```\n",
        "```\nmmaudit score DATA \\\n    --learn-form train   # a comment\n```\n",
        "```\nmmaudit scores DATA\n```\n",
        "run `mmaudit split --balance` then",
        "`--learn-form train` keeps them out",
        "`--set probe.fold=3` is refused",
        "```\nmmaudit score DATA --set probe.fold=3\n```\n",
        "the key `probe.fold` says",
        "```\ntorchrun --nproc-per-node 4 -m -- mmaudit finetune --manifests balanced\n```\n",
    ],
)
def test_a_wrong_command_option_or_setting_is_found(text: str) -> None:
    assert len(faults(text)) == 1


def test_right_ones_pass() -> None:
    text = (
        "```console\n$ mmaudit score DATA --learn-from train | head -3\n```\n"
        "`mmaudit order x --dump`, `media.max_*`, `--set probe.folds=3`"
    )
    assert len(invocations(text)) == 2
    assert not faults(text)


def test_every_page_shows_only_public_names() -> None:
    for page in GUIDES:
        for name in re.findall(r"\bmmaudit\.([A-Za-z_][\w.]*\w)", page.read_text(encoding="utf-8")):
            first = name.split(".")[0]
            is_module = importlib.util.find_spec(f"mmaudit.{first}") is not None
            is_schema = first in ("run", "manifest", "scores", "metadata")  # such as mmaudit.run/1
            is_group = first in ("balancers", "downloads", "encoders", "exporters", "readers", "samplers")
            assert first in mmaudit.__all__ or is_module or is_schema or is_group, f"{page.name}: mmaudit.{name}"
            if is_module and "." in name and first not in mmaudit.__all__:
                module, _, attribute = f"mmaudit.{name}".rpartition(".")
                parent = importlib.import_module(module)
                is_submodule = hasattr(parent, "__path__") and importlib.util.find_spec(f"mmaudit.{name}") is not None
                assert is_submodule or hasattr(parent, attribute), f"{page.name}: mmaudit.{name}"


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = _CODE.sub("", _BLOCK.sub("", page.read_text(encoding="utf-8")))
    targets = [target.partition("#")[0] for target in _LINK.findall(text)]
    local = [target for target in targets if target and not re.match(r"[a-z]+:", target)]
    assert not [target for target in local if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_headings(page: Path) -> None:
    text = _CODE.sub("", _BLOCK.sub("", page.read_text(encoding="utf-8")))
    targets = [target.partition("#") for target in _LINK.findall(text) if not re.match(r"[a-z]+:", target)]
    missing = []
    for name, _, fragment in targets:
        if fragment:
            content = _BLOCK.sub("", (page.parent / name if name else page).read_text(encoding="utf-8"))
            headings = re.findall(r"^#+ (.*)$", content, flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            if fragment not in anchors | set(re.findall(r"^\((\S+)\)=$", content, flags=re.MULTILINE)):
                missing.append(f"{name}#{fragment}")
    assert not missing


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = set()
    for page in PAGES:
        for kind, body in _BLOCK.findall(page.read_text(encoding="utf-8")):
            if kind == "{toctree}":
                names = [line for line in body.splitlines() if line and not line.startswith(":")]
                listed |= {(page.parent / f"{name}.md").resolve() for name in names}
    assert listed == {page.resolve() for page in PAGES} - {DOCS / "index.md"}


def test_reference_and_explanation_are_complete() -> None:
    def lacking(page: str, names: Any, form: str = "`{}`") -> list[str]:
        text = (DOCS / page).read_text(encoding="utf-8")
        return [name for name in names if form.format(name) not in text]

    assert not lacking("reference/api.md", mmaudit.__all__, "mmaudit.{}")
    assert not lacking("reference/columns.md", [*SCORE_RANGES, *COLUMNS, *DROPPED_COLUMNS])
    assert not lacking("explanation/samplers.md", SAMPLERS)
    assert not lacking("explanation/balancers.md", BALANCERS)
    assert not lacking("howto/finetune.md", FUSIONS)


def test_files_that_the_method_pages_name_exist() -> None:
    for page, folder in (("samplers.md", "sampling"), ("balancers.md", "balancing")):
        text = (DOCS / "explanation" / page).read_text(encoding="utf-8")
        names = re.findall(r"`(\w+\.py)`", text)
        assert names
        assert not [name for name in names if not (ROOT / "train" / folder / name).is_file()]


def test_generated_pages_have_every_command_and_every_key() -> None:
    cli, config = _generate().cli_page(), _generate().config_page()
    for name, options in COMMANDS.items():
        assert f"## mmaudit {name}\n" in cli
        assert all(f"`{option}" in cli for option in options - _generate().GENERAL)
    methods = _generate().methods_page()
    assert not [row.name for row in mmaudit.methods().rows if f"| `{row.name}` |" not in methods]
    presets = _generate().presets_page()
    names = [preset.name for preset in mmaudit.methods(presets=True).presets]
    assert not [name for name in names if f"\n## {name}\n" not in presets]
    sections = {key.rpartition(".")[0] for key in KEYS}
    assert not [key for key in KEYS - sections if f"| `{key}` |" not in config]
    assert not [line for line in config.splitlines() if re.search(r"\|\s*\|$", line)]  # a key without a meaning
    assert not re.findall(r"\b(?:[Oo]ne|[Aa]ny) of `?[A-Z_]{4,}", config)  # a constant in place of its values
    assert "| Table to write. | metadata.parquet in the folder |" in cli
    assert "| Allowed distance to uniform; 0: exact. With --size or weights: exit 3 above it. | 0.05 |" in cli


def test_architecture_names_every_module_and_no_other() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\w+): [^\n]*\n(.*?)(?=^## )", text, flags=re.MULTILINE | re.DOTALL)
    assert [name for name, _ in sections] == ["audit", "rebalance", "train", "cli"]
    named = []
    for package, section in sections:
        for cell in re.findall(r"^\| (`[^|]*) \|", section, flags=re.MULTILINE):
            folder = package
            for name in _CODE.findall(cell):
                if name.endswith("/"):
                    folder = f"{package}/{name.rstrip('/')}"
                    named.append(f"{folder}/__init__.py")
                else:
                    named.append(f"{folder}/{name}.py")
    folders = [ROOT / package for package, _ in sections]
    files = [path.relative_to(ROOT).as_posix() for folder in folders for path in folder.rglob("*.py")]
    assert sorted(named) == sorted(set(files) - {f"{package}/__init__.py" for package, _ in sections})


def test_order_of_imports_on_the_architecture_page_is_that_of_the_contracts() -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    contracts = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.importlinter]")[2]
    chains = [chain.split(" -> ") for chain in re.findall(r"`([a-z_]+(?: -> [a-z_]+)+)`", page)]
    assert len(chains) == 2
    for chain in chains:
        layers = [re.search(rf'"(?:mmaudit\.)?{name}"', contracts) for name in chain]
        assert all(layers)
        assert [match.start() for match in layers if match] == sorted(match.start() for match in layers if match)


def test_files_that_pages_and_readme_name_exist() -> None:
    for page in [*GUIDES, ROOT / "SECURITY.md"]:
        text = page.read_text(encoding="utf-8")
        recipes = set(re.findall(r"the file is `([^`]+)`", text))
        paths = set(re.findall(r"`((?:audit|rebalance|train|cli|tests|docs|benchmarks)/[\w/]+\.\w+)`", text))
        assert not [path for path in paths - recipes if not (ROOT / path).is_file()], page.name


def test_readme_counts_the_methods() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\[(\d+) samplers\]", text) == [str(len(SAMPLERS))]
    assert re.findall(r"\[(\d+) balancers\]", text) == [str(len(BALANCERS))]


def test_sections_of_the_report_are_explained_by_their_names_in_their_order() -> None:
    folder = ROOT / "cli" / "report"
    page = (folder / "report.html.jinja").read_text(encoding="utf-8")
    page = page.replace('{% include "manifests.html.jinja" %}', (folder / "manifests.html.jinja").read_text("utf-8"))
    guide = (DOCS / "howto" / "report.md").read_text(encoding="utf-8")
    headings = re.findall(r"<h2>(.*)</h2>", page)
    assert re.findall(r"^\*\*(.+?)\.\*\*", guide, flags=re.MULTILINE) == ["Headline", *headings]
    assert len(headings) == 12


def test_use_in_the_readme_ends_within_two_screens() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines.index("## Use") < 25
    assert lines.index("## Documentation") <= 56


def test_properties_in_the_reference_have_no_colon() -> None:
    """Sphinx reads what stands before a colon in the first line as the type."""
    names = re.findall(r"autoclass:: mmaudit\.(\S+)", (DOCS / "reference" / "api.md").read_text(encoding="utf-8"))
    for name in names:
        module, _, attribute = f"mmaudit.{name}".rpartition(".")
        members = vars(getattr(importlib.import_module(module), attribute)).values()
        lines = [(member.__doc__ or "").partition("\n")[0] for member in members if isinstance(member, property)]
        assert not [line for line in lines if ": " in line], name


@pytest.mark.parametrize("name", sorted({*mmaudit.__all__} - {"__version__"}))
def test_docstrings_of_public_names_are_complete(name: str) -> None:
    public = getattr(mmaudit, name)
    text = inspect.getdoc(public) or ""
    assert not faults(text)
    sections = re.findall(r"^(\w+):$", text, flags=re.MULTILINE)
    if inspect.isclass(public):
        names = [field.name for field in dataclasses.fields(public)] if dataclasses.is_dataclass(public) else []
        assert {"Args", "Attributes"} & {*sections} or not names
    else:
        signature = inspect.signature(public)
        names = list(signature.parameters)
        returns = [] if signature.return_annotation in (None, "None") else ["Returns"]
        assert {"Args", *returns, "Raises", "Example"} <= {*sections}
    assert not [field for field in names if not re.search(rf"^ +{field}: \S", text, flags=re.MULTILINE)]


def test_notes_of_fields_are_read_from_comments_and_from_docstrings() -> None:
    notes = _generate().field_notes(ExampleConfig)
    assert notes == {"first": "Read first. then this", "second": "From Args, over two lines."}


class ExampleConfig:
    """An example.

    Args:
        second: From Args,
            over two lines.

    Raises:
        ValueError: never.
    """

    # Read first.
    first: int = 1  # then this
    second: int = 2  # not this
    third: int = 3
