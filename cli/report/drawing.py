"""Drawing: colours, axes, fonts, and texts measured and cut to fit."""

from __future__ import annotations

import io
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
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ...audit.errors import cut_distinct
from .findings import Numbers, short

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


Palette = dict[str, str]

WIDTH = 8.8  # inches; one inch is 100 CSS pixels on the page
DPI = 200  # two dots per CSS pixel
INK, SOFT, LEVEL, PALE = "#2b2b2b", "#8a8a8a", "#b4b4b4", "#d9d9d9"  # greys, for elements of no modality
# Okabe & Ito's colour-blind safe colours, without the yellow that is invisible on paper; then two of Tol's.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#332288", "#999933")
SIDE_TICKS = ([-1, -0.5, 0, 0.5, 1], ["−1", "−0.5", "0", "0.5", "1"])
_MAX_LUMINANCE = 0.18  # of coloured text: the contrast to white is then 4.5 to 1, as WCAG 2.1 asks for
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # print a dollar sign in a label as it is
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), SOFT),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **{"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8.5, "axes.titlelocation": "left"},
    **{"axes.linewidth": 0.8, "figure.constrained_layout.use": True},
}


def palette(modalities: Sequence[str]) -> Palette:
    """Return the colour of each modality, and of "fused"; the eight colours repeat."""
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(modalities)}
    return {**colours, "fused": INK}


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


def png(figure: Figure) -> bytes:
    """Encode a figure as a PNG of 256 colours, a third of the size of full colour, without version metadata."""
    from PIL import Image

    figure.set_dpi(DPI)
    surface: Any = FigureCanvasAgg(figure)  # untyped in matplotlib
    surface.draw()
    pixels = np.asarray(surface.buffer_rgba())[:, :, :3]
    image = Image.fromarray(pixels).quantize(255, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    white = pixels.min(axis=2) == 255  # would be quantised to about 250, a grey box on the page
    colour_indices = np.where(white, 255, np.asarray(image)).astype(np.uint8)
    shades = (image.getpalette() or [])[: 3 * 255]
    image, file = Image.frombytes("P", image.size, colour_indices.tobytes()), io.BytesIO()
    image.putpalette(shades + [255] * (3 * 256 - len(shades)))
    image.save(file, "png", optimize=True)
    return file.getvalue()


def text_colour(colour: str) -> str:
    """Return a colour that is dark enough for text on white, of the same hue."""
    rgb = np.array(to_rgb(colour))
    while _luminance(rgb) > _MAX_LUMINANCE:
        rgb = 0.95 * rgb
    return to_hex(tuple(rgb.tolist()))


def _luminance(rgb: NDArray[np.float64]) -> float:
    """Return the relative luminance of an sRGB colour, as WCAG 2.1 defines it."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def draw_sides(axes: Axes, sides: Numbers, colours: Palette, *, counts: Sequence[float]) -> None:
    """Draw a histogram over [-1, 1] with bars in the colour of their side, grey within 0.2 of 0."""
    edges = np.array(sides["edges"])
    shades = [side_colour(middle, sides, colours) for middle in (edges[1:] + edges[:-1]) / 2]
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=shades, edgecolor="white", linewidth=0.4)
    axes.axvline(0, color=INK, linewidth=0.8, zorder=0.5)
    axes.set_xlim(-1, 1)
    axes.set_xticks(*SIDE_TICKS)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=all(isinstance(count, int) for count in counts)))


def side_colour(discrepancy: float, sides: Numbers, colours: Palette) -> str:
    """Return the colour of the modality on the side of a discrepancy, grey within 0.2 of 0."""
    if abs(discrepancy) < 0.2:
        return LEVEL
    return colours.get(sides["positive_side"] if discrepancy > 0 else sides["negative_side"], "#7a7a7a")


def name_sides(axes: Axes, sides: Numbers, colours: Palette, *, width: float, shares: Sequence[str] = ("", "")) -> None:
    """Write the modality of either side, and its share, above a histogram that is about `width` inches wide."""
    templates, names = (f"← {{}}{shares[0]}", f"{{}}{shares[1]} →"), [sides["negative_side"], sides["positive_side"]]
    widest = max(text_width(template.format(""), size=9) for template in templates)
    cut = fit_names(names, 0.37 * width - widest)
    for x, align, template, text, side in zip((0.0, 1.0), ("left", "right"), templates, cut, names, strict=True):
        shade = text_colour(colours.get(side, SOFT))
        axes.text(x, 1.02, template.format(text), color=shade, ha=align, va="bottom", transform=axes.transAxes)


def add_panels(figure: Figure, number: int, *, columns: int, shared: bool) -> list[Axes]:
    """Add a number of axes in rows of `columns`; `shared` axes have common ticks.

    Panels are 0.2 inches apart: at matplotlib's 0.08 the last tick of one and the first of the next, "0.20" and "0.00",
    read as one number.
    """
    rows = -(-number // columns)
    if layout := figure.get_layout_engine():
        layout.set(w_pad=0.1)  # type: ignore[call-arg]
    panels = figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False).ravel()
    for axes in panels[number:]:
        axes.set_visible(False)
    for axes in panels[max(number - columns, 0) : number] if shared else ():
        axes.tick_params(labelbottom=True)  # also above a panel that is not shown
    return list(panels[:number])


def draw_histogram_2d(axes: Axes, counts: NDArray[Any], *, max_x: float) -> None:
    """Draw counts (y, x) over [0, max_x] x [0, 1], darker where there are more."""
    style: dict[str, Any] = {"cmap": "Greys", "vmin": 0, "vmax": 1, "interpolation": "nearest", "aspect": "auto"}
    axes.imshow(depth(counts, max_count=counts.max()), origin="lower", extent=(0, max_x, 0, 1), **style)


def depth(counts: NDArray[Any], *, max_count: NDArray[Any]) -> NDArray[np.float64]:
    """Return the darkness of each cell in [0, 1], by the root of its count, so that single samples stay visible."""
    return np.where(counts > 0, 0.1 + 0.9 * np.sqrt(counts / np.maximum(max_count, 1)), 0.0)
