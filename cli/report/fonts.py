"""Fonts of the figures: fallbacks for the scripts that DejaVu Sans lacks, and names cut to the width of their label."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from matplotlib import font_manager
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties

from .findings import short

log = logging.getLogger("mmaudit")

FIRST_FAMILY = "DejaVu Sans"  # comes with matplotlib, so that Latin, Greek and Cyrillic look the same everywhere
# Tried first, in this order, before the other installed fonts by name.
_PREFERRED = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR", "Source Han Sans SC"),
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Arial Unicode MS", "Noto Sans Arabic", "Noto Sans Devanagari"),
    *("Noto Sans Thai", "Noto Emoji", "Segoe UI Emoji", "Segoe UI Symbol", "Apple Symbols", "Symbola"),
)
_CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "FULLWIDTH", "IDEOGRAPHIC")
# Boxes for every character; and bitmaps in colour, which matplotlib cannot draw.
_UNUSABLE = ("Last Resort", "LastResort", "Color Emoji")


def font_families(texts: Iterable[str]) -> list[str]:
    """Return the families that draw these texts, and warn once of the scripts that no installed font covers.

    They are DejaVu Sans and those fonts that cover what is missing from it, so that labels in Latin letters give the
    same bytes whatever else is installed.
    """
    missing = {ord(char) for text in texts for char in label_text(text) if not char.isspace()}
    missing -= _characters(FIRST_FAMILY)
    families = [FIRST_FAMILY]
    for name in _installed() if missing else ():
        if missing & _characters(name):
            families.append(name)
            missing -= _characters(name)
        if not missing:
            break
    if missing:
        _warn_of(missing)
    return families


def label_text(text: object) -> str:
    """Return a name as one line that matplotlib draws as it is.

    Selectors of emoji styles are removed, which text fonts lack; a space precedes an underscore at the start, which
    would hide the name from legends.
    """
    line = short(text, max_length=200)
    line = "".join(char for char in line if not unicodedata.name(char, "").startswith("VARIATION SELECTOR"))
    return f" {line}" if line.startswith("_") else line


def text_width(text: str, *, size: float) -> float:
    """Return the width of a text in inches at a font size in points."""
    properties = FontProperties(size=size)
    return float(_renderer().get_text_width_height_descent(text, properties, False)[0]) / 72


def fit(name: object, width: float, *, size: float = 9, template: str = "{}") -> str:
    """Return the template with a name that is cut in the middle so that the whole is at most `width` inches wide."""
    line = label_text(name)
    low, high = 2, max(len(line), 2)
    while low < high:  # the longest that fits; two characters are always drawn
        middle = (low + high + 1) // 2
        fits = text_width(template.format(short(line, middle)), size=size) <= width
        low, high = (middle, high) if fits else (low, middle - 1)
    return template.format(_in_reading_order(short(line, low)))


def fit_names(names: Sequence[object], width: float, *, size: float = 9) -> list[str]:
    """Return names cut to at most about `width` inches, which remain distinct where the names are.

    Where the cut names would be equal, their parts that differ are kept instead, and numbered where that is too long.
    """
    lines = [label_text(name) for name in names]
    cut = {line: fit(line, width, size=size) for line in lines}
    for text, number in Counter(cut.values()).items():
        if number > 1:
            cut |= _cut_around_difference([line for line in cut if cut[line] == text], width, size=size)
    again = Counter(cut.values())
    for text in [text for text, number in again.items() if number > 1]:
        for index, line in enumerate([line for line in cut if cut[line] == text], start=1):
            cut[line] = f"{text} ({index})"
    return [cut[line] for line in lines]


def _cut_around_difference(lines: list[str], width: float, *, size: float) -> dict[str, str]:
    """Cut names to the part that differs, with as much of their start and end as fits."""
    prefix = _common_length(lines)
    suffix = _common_length([line[prefix:][::-1] for line in lines])
    cut = {}
    for line in lines:
        core = line[prefix : len(line) - suffix]
        texts = [f"{line[:k]}…{core}…{line[len(line) - k :]}" for k in range(min(prefix, suffix) + 1)]
        texts = [text for text in texts if text_width(text, size=size) <= width]
        cut[line] = _in_reading_order(texts[-1]) if texts else fit(core, width, size=size)
    return cut


def _in_reading_order(name: str) -> str:
    """Enclose a name in right-to-left letters in marks, without which it would reverse the order of its label."""
    has_right_to_left = any(unicodedata.bidirectional(char) in ("R", "AL") for char in name)
    return f"\u200e{name}\u200e" if has_right_to_left else name


def _common_length(lines: list[str]) -> int:
    """Return the number of characters at the start that all lines have in common."""
    columns = enumerate(zip(*lines, strict=False))
    return next((index for index, chars in columns if len(set(chars)) > 1), min(map(len, lines)))


@lru_cache(maxsize=1)
def _renderer() -> Any:
    renderer: Any = RendererAgg  # untyped in matplotlib
    return renderer(1, 1, 72)  # one pixel is one point


@lru_cache(maxsize=512)
def _characters(family: str) -> frozenset[int]:
    """Return the code points that a family covers; none if its font cannot be drawn in any size."""
    try:
        path = font_manager.findfont(FontProperties(family=[family]), fallback_to_default=False)
        font = font_manager.get_font(path)
        font.set_size(9, 72)
        characters = frozenset(font.get_charmap())
        if characters:
            font.load_char(min(characters))
    except (OSError, RuntimeError, ValueError):  # a font of bitmaps, or a damaged one
        return frozenset()
    return characters


def _installed() -> list[str]:
    """Return the installed families, the preferred ones first.

    matplotlib keeps a list of fonts from its first import, so fonts that were installed since then are added.
    """
    known = {os.path.realpath(entry.fname) for entry in font_manager.fontManager.ttflist}
    for path in sorted(font_manager.findSystemFonts()):
        if os.path.realpath(path) not in known:
            try:
                font_manager.fontManager.addfont(path)
            except (OSError, RuntimeError, ValueError, NotImplementedError):
                continue  # a font of bitmaps, or a damaged one
    names = sorted({entry.name for entry in font_manager.fontManager.ttflist})
    names = [name for name in names if not any(word in name for word in _UNUSABLE)]
    preferred = [name for name in _PREFERRED if name in names]
    return preferred + [name for name in names if name not in preferred]


def _warn_of(missing: set[int]) -> None:
    """Warn of characters that no font covers: their scripts, and what to install."""
    scripts = Counter(_script(chr(code)) for code in missing)
    listed = ", ".join(f"{name} ({number} character{'s' * (number > 1)})" for name, number in sorted(scripts.items()))
    fonts = sorted({_font_for(script) for script in scripts})
    log.warning(
        "figures: no installed font covers %s, drawn as boxes; install %s (Debian, Ubuntu: %s) and run mmaudit report",
        listed,
        ", ".join(fonts),
        ", ".join(sorted({_PACKAGES.get(font, "fonts-noto-core") for font in fonts})),
    )


_PACKAGES = {"Noto Sans CJK": "fonts-noto-cjk", "Symbola": "fonts-symbola"}


def _script(char: str) -> str:
    """Return the script of a character by its Unicode name: "Arabic", "CJK", or "symbols and emoji"."""
    word = unicodedata.name(char, "").split(" ")[0].split("-")[0]
    if word in _CJK:
        return "CJK"
    is_letter = unicodedata.category(char)[0] in "LM"
    return word.capitalize() if is_letter and word else "symbols and emoji"


def _font_for(script: str) -> str:
    """Return a font that covers a script. Colour emoji fonts cannot be drawn, so it is Symbola for symbols."""
    return {"CJK": "Noto Sans CJK", "symbols and emoji": "Symbola"}.get(script, f"Noto Sans {script}")
