"""Settings of the Sphinx site; `make docs` builds it with warnings as errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import mmaudit

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # generate.py

project = "mmaudit"
author = "the mmaudit authors"
copyright = "the mmaudit authors; Apache License 2.0"
version = release = mmaudit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated", "reference/_generated"]
html_theme = "furo"
html_title = f"mmaudit {release}"
html_show_sourcelink = False
templates_path: list[str] = []

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # log.md and SECURITY.md are read as they stand

smartquotes = False  # they would make one dash of the two before an option
default_role = "literal"  # docstrings write `name` as Markdown does
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True


def _write_generated(_: Any) -> None:
    """Write the pages that are made from the command line and the config dataclasses."""
    from generate import write_pages

    write_pages(HERE / "reference" / "_generated")


def _escape_markup(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Escape | and * outside of code: in docstrings |D| is no substitution, and *.png no emphasis."""
    for place, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(`+[^`]*`+)", line)
            escaped = (part if part[:1] == "`" else re.sub(r"(?<!\\)([|*])", r"\\\1", part) for part in parts)
            lines[place] = "".join(escaped)


def setup(app: Any) -> None:
    """Connect the hooks."""
    app.connect("builder-inited", _write_generated)
    app.connect("autodoc-process-docstring", _escape_markup, priority=100)
