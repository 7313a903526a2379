"""Text from data as it may be printed: on one line, without control sequences."""

from __future__ import annotations

import re

# C0 and C1 controls (ESC among them), line and paragraph separators, marks and overrides of direction, halves of
# surrogate pairs. What joins letters (U+200C, U+200D) belongs to words and stays.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def printable(text: object) -> str:
    r"""Return text with every control character written out, as in Python: ESC as `\x1b`, a line feed as `\n`.

    A name can then neither steer a terminal, nor begin a line of its own, nor show in another order than it has.
    """
    return _UNPRINTABLE.sub(_written_out, str(text))


def _written_out(match: re.Match[str]) -> str:
    return repr(match.group())[1:-1] if match.group() < "\x80" else f"\\u{ord(match.group()):04x}"
