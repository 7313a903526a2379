"""Colours, sizes and files of figures, and the figure of a manifest."""

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
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from .findings import Numbers, short

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


def draw_manifest(found: Numbers, colours: Palette) -> Figure:
    """Draw the discrepancy before and after a split and, of a uniform one, size against uniformity."""
    balance = found["balance"]
    figure = Figure(figsize=(WIDTH, 3.1 if balance["made"] else 2.7))
    if balance["curve"]:
        left, right = figure.subplots(1, 2, width_ratios=(5, 3))
        _curve(right, balance, kept=found["kept"])
    else:
        left = figure.subplots()
    _before_and_after(left, found, colours)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def _before_and_after(axes: Axes, found: Numbers, colours: Palette) -> None:
    """Draw shares by bin: after as bars in the colours of the sides, before as a line over them."""
    balance = found["balance"]
    first, _, second = found["between"].partition(":")
    before, after = (_shares(balance[key]) for key in ("before", "after"))
    side = {"edges": balance["edges"], "right": first, "left": second or "the others"}
    draw_sides(axes, side, colours, counts=after.tolist())
    axes.stairs(before, side["edges"], color=INK, linewidth=1.1, label=f"before ({sum(balance['before']):,})")
    made = balance["made"]
    if made and not made["grid"]:
        even = 1 / max(int((before > 0).sum()), 1)
        axes.axhline(even, color=INK, linewidth=0.9, linestyle="--", label="exactly uniform")
    weighed = ", weighted" if made and made["weighted"] else ""
    axes.bar(0, 0, color=LEVEL, label=f"after ({found['kept']:,}{weighed}), in the sides' colours")
    axes.set_ylim(0, 1.1 * max(before.max(), after.max(), 1e-9))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.set_xticks([-1, -0.5, 0, 0.5, 1], ["−1", "−0.5", "0", "0.5", "1"])
    axes.set(xlabel=f"discrepancy: {short(first, 24)} minus {short(side['left'], 24)}", ylabel="share of the set")


def _shares(counts: list[float]) -> NDArray[np.float64]:
    return np.array(counts, dtype=np.float64) / max(sum(counts), 1)


def _curve(axes: Axes, balance: Numbers, *, kept: int) -> None:
    """Draw the largest set at each distance to uniform, and where this split stands.

    A grid's curve is in distances over the grid, which are not those of the discrepancy: there only a height is marked.
    """
    made = balance["made"]
    distances = [point["distance"] for point in balance["curve"]]
    sizes = [point["size"] for point in balance["curve"]]
    axes.plot(distances, sizes, color=SOFT, linewidth=1.2, marker="o", markersize=3)
    size = balance["effective_size"] if made["weighted"] else kept
    name = f"weighted: worth {size:,.0f}" if made["weighted"] else f"kept: {kept:,}"
    if made["grid"]:
        axes.axhline(size, color=INK, linewidth=0.9, linestyle=":", label=name)
    else:
        axes.plot([balance["distance_after"]], [size], color=INK, marker="D", markersize=6, linestyle="", label=name)
    _scale(axes, [*sizes, size])
    axes.set_xlim(left=0)
    over = " over both confidences" if made["grid"] else ""
    axes.set(xlabel=f"distance to uniform{over}", ylabel="samples kept by dropping")
    axes.legend(loc="lower right")


def _scale(axes: Axes, sizes: list[float]) -> None:
    """Take powers of ten where sizes differ much."""
    if max(sizes) > 20 * max(min(sizes), 1):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.08 * max(sizes))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
