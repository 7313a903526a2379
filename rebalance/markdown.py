"""Markdown: how is a text written so that it reads as the text, whatever it holds?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..audit.printable import printable

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$])")


def escaped(text: object) -> str:
    """Give a name as Markdown that reads as the name, on one line, in a table too."""
    return _SPECIAL.sub(r"\\\1", _one_line(text))


def _one_line(text: object) -> str:
    return printable(" ".join(str(text).split()))


def code_span(value: object) -> str:
    """Give text as a code span, whatever backticks it holds."""
    text = _one_line(value)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def table_of(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Write a table; all columns but the first are of numbers, or bars."""
    marks = ["---", *("---" if name == "" else "---:" for name in head[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (head, marks, *rows)]
