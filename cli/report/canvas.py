"""The canvas: which colours, sizes and fonts do all figures share, and how does one become a file?"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .findings import Numbers

Palette = dict[str, str]

WIDTH = 8.8  # inches; the page shows one inch as 100 pixels
DPI = 200  # two dots to a pixel of the page
INK, SOFT, LEVEL, PALE = "#2b2b2b", "#8a8a8a", "#b4b4b4", "#d9d9d9"  # greys: what belongs to no modality
# Okabe & Ito's, which the colour-blind tell apart, without the yellow that paper does not show; then two of Tol's.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#332288", "#999933")
_FALLBACKS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai")
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.parse_math": False,  # a dollar in a label is a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.use": True,
}


def palette(modalities: Sequence[str]) -> Palette:
    """Give each modality its colour; past eight they come again."""
    named = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(modalities)}
    return {**named, "fused": INK}


@contextmanager
def canvas() -> Iterator[None]:
    """Draw in the style of the report, whatever the user's matplotlibrc says: the same numbers, the same bytes."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a label in a script without a font here
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "font.family": _fonts()})
        yield


def png(figure: Figure) -> bytes:
    """Write a figure as PNG of 256 colours, a third of the size of all, without the version of what made it."""
    from PIL import Image

    figure.set_dpi(DPI)
    drawing: Any = FigureCanvasAgg(figure)  # matplotlib gives it no types
    drawing.draw()
    pixels = np.asarray(drawing.buffer_rgba())[:, :, :3]
    image = Image.fromarray(pixels).quantize(255, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    white = pixels.min(axis=2) == 255  # would come out as 250 or so, a grey box on the page
    places = np.where(white, 255, np.asarray(image)).astype(np.uint8)
    shades = (image.getpalette() or [])[: 3 * 255]
    image, file = Image.frombytes("P", image.size, places.tobytes()), io.BytesIO()
    image.putpalette(shades + [255] * (3 * 256 - len(shades)))
    image.save(file, "png", optimize=True)
    return file.getvalue()


def draw_sides(axes: Axes, found: Numbers, colours: Palette, *, counts: Sequence[float]) -> None:
    """Draw a histogram over [-1, 1] whose bars have the colour of the side they stand on, grey within 0.2."""
    edges = np.array(found["edges"])
    shades = [side_colour(middle, found, colours) for middle in (edges[1:] + edges[:-1]) / 2]
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=shades, edgecolor="white", linewidth=0.4)
    axes.axvline(0, color=INK, linewidth=0.8, zorder=0.5)
    axes.set_xlim(-1, 1)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=all(isinstance(count, int) for count in counts)))


def side_colour(middle: float, found: Numbers, colours: Palette) -> str:
    """Give the colour of the side on which a discrepancy stands, grey within 0.2."""
    if abs(middle) < 0.2:
        return LEVEL
    return colours.get(found["right"] if middle > 0 else found["left"], "#7a7a7a")


def _fonts() -> list[str]:
    known = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _FALLBACKS if name in known)]
