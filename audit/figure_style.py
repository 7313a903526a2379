"""Style of figures: fonts for any script, texts measured and cut to fit, colours safe for colour-blind readers."""

from __future__ import annotations

import logging
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties

from .errors import cut_distinct, short

log = logging.getLogger("mmaudit")

INK, SOFT, LEVEL, PALE = "#2b2b2b", "#8a8a8a", "#b4b4b4", "#d9d9d9"  # greys, for elements of no modality
# Okabe & Ito's colour-blind safe colours, without the yellow that is invisible on paper; then two of Tol's.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#332288", "#999933")
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # print a dollar sign in a label as it is
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), SOFT),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **{"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8.5, "axes.titlelocation": "left"},
    **{"axes.linewidth": 0.8, "figure.constrained_layout.use": True},
}
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


def _fit_line(line: str, width: float, *, size: float) -> str:
    """Return the longest cut of a line that is at most `width` inches wide."""
    low, high = 2, max(len(line), 2)
    while low < high:  # the longest that fits; two characters are always drawn
        middle = (low + high + 1) // 2
        fits = text_width(short(line, middle), size=size) <= width
        low, high = (middle, high) if fits else (low, middle - 1)
    return short(line, low)


def fit_names(names: Sequence[object], width: float, *, size: float = 9) -> list[str]:
    """Return names cut to at most about `width` inches, which remain distinct where the names are.

    Where the cut names would be equal, their parts that differ are kept instead, and numbered where that is too long.
    """
    cut = cut_distinct(
        [label_text(name) for name in names],
        cut=lambda line: _fit_line(line, width, size=size),
        fits=lambda text: text_width(text, size=size) <= width,
    )
    return [_in_reading_order(name) for name in cut]


def _in_reading_order(name: str) -> str:
    """Enclose a name in right-to-left letters in marks, without which it would reverse the order of its label."""
    has_right_to_left = any(unicodedata.bidirectional(char) in ("R", "AL") for char in name)
    return f"\u200e{name}\u200e" if has_right_to_left else name


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
        "figures: no installed font covers %s, drawn as boxes; install %s (Debian, Ubuntu: %s) and write them again",
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


@contextmanager
def canvas(texts: Iterable[str] = ()) -> Iterator[None]:
    """Apply the report's style, with fonts for these texts, and ignore the user's matplotlibrc.

    The same numbers then give the same bytes with the same fonts.
    """
    font_log = logging.getLogger("matplotlib.font_manager")  # warns where a fallback has no regular weight
    level = font_log.level
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # font_families warns, once and by script
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        matplotlib.rcdefaults()
        font_log.setLevel(logging.ERROR)
        try:
            matplotlib.rcParams.update({**_STYLE, "font.family": font_families(texts)})
            yield
        finally:
            font_log.setLevel(level)
