"""Colours, style and PNG output of figures, and the figure of a manifest."""

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

WIDTH = 8.8  # inches; one inch is 100 CSS pixels on the page
DPI = 200  # two dots per CSS pixel
INK, SOFT, LEVEL, PALE = "#2b2b2b", "#8a8a8a", "#b4b4b4", "#d9d9d9"  # greys, for elements of no modality
# Okabe & Ito's colour-blind safe colours, without the yellow that is invisible on paper; then two of Tol's.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#332288", "#999933")
_FALLBACKS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai")
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.parse_math": False,  # print a dollar sign in a label as it is
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
    """Return the colour of each modality, and of "fused"; the eight colours repeat."""
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(modalities)}
    return {**colours, "fused": INK}


@contextmanager
def canvas() -> Iterator[None]:
    """Apply the report's style and ignore the user's matplotlibrc, so that the same numbers give the same bytes."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A label in a script that no installed font covers.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "font.family": _fonts()})
        yield


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


def draw_sides(axes: Axes, sides: Numbers, colours: Palette, *, counts: Sequence[float]) -> None:
    """Draw a histogram over [-1, 1] with bars in the colour of their side, grey within 0.2 of 0."""
    edges = np.array(sides["edges"])
    shades = [side_colour(middle, sides, colours) for middle in (edges[1:] + edges[:-1]) / 2]
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=shades, edgecolor="white", linewidth=0.4)
    axes.axvline(0, color=INK, linewidth=0.8, zorder=0.5)
    axes.set_xlim(-1, 1)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=all(isinstance(count, int) for count in counts)))


def side_colour(discrepancy: float, sides: Numbers, colours: Palette) -> str:
    """Return the colour of the modality on the side of a discrepancy, grey within 0.2 of 0."""
    if abs(discrepancy) < 0.2:
        return LEVEL
    return colours.get(sides["right"] if discrepancy > 0 else sides["left"], "#7a7a7a")


def _fonts() -> list[str]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _FALLBACKS if name in installed)]


def draw_manifest(manifest: Numbers, colours: Palette) -> Figure:
    """Draw the discrepancy before and after a split, and size against uniformity if the split was made uniform."""
    balance = manifest["balance"]
    figure = Figure(figsize=(WIDTH, 3.1 if balance["made"] else 2.7))
    if balance["curve"]:
        histogram_axes, curve_axes = figure.subplots(1, 2, width_ratios=(5, 3))
        _curve(curve_axes, balance, num_kept=manifest["kept"])
    else:
        histogram_axes = figure.subplots()
    _before_and_after(histogram_axes, manifest, colours)
    figure.legend(*histogram_axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def _before_and_after(axes: Axes, manifest: Numbers, colours: Palette) -> None:
    """Draw shares by bin: after as bars in the colours of the sides, before as a line."""
    balance = manifest["balance"]
    first, _, second = manifest["between"].partition(":")
    before, after = (_shares(balance[key]) for key in ("before", "after"))
    sides = {"edges": balance["edges"], "right": first, "left": second or "the others"}
    draw_sides(axes, sides, colours, counts=after.tolist())
    axes.stairs(before, sides["edges"], color=INK, linewidth=1.1, label=f"before ({sum(balance['before']):,})")
    target = balance["made"]
    if target and not target["grid"]:
        uniform_share = 1 / max(int((before > 0).sum()), 1)
        axes.axhline(uniform_share, color=INK, linewidth=0.9, linestyle="--", label="exactly uniform")
    suffix = ", weighted" if target and target["weighted"] else ""
    axes.bar(0, 0, color=LEVEL, label=f"after ({manifest['kept']:,}{suffix}), coloured by side")
    axes.set_ylim(0, 1.1 * max(before.max(), after.max(), 1e-9))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.set_xticks([-1, -0.5, 0, 0.5, 1], ["−1", "−0.5", "0", "0.5", "1"])
    axes.set(xlabel=f"discrepancy: {short(first, 24)} minus {short(sides['left'], 24)}", ylabel="share of the set")


def _shares(counts: list[float]) -> NDArray[np.float64]:
    return np.array(counts, dtype=np.float64) / max(sum(counts), 1)


def _curve(axes: Axes, balance: Numbers, *, num_kept: int) -> None:
    """Draw the largest set at each distance to uniform, and mark this split.

    The curve of a grid is in distances over the grid, not of the discrepancy, so only the split's size is marked.
    """
    target = balance["made"]
    distances = [point["distance"] for point in balance["curve"]]
    sizes = [point["size"] for point in balance["curve"]]
    axes.plot(distances, sizes, color=SOFT, linewidth=1.2, marker="o", markersize=3)
    size = balance["effective_size"] if target["weighted"] else num_kept
    name = f"weighted: effective size {size:,.0f}" if target["weighted"] else f"kept: {num_kept:,}"
    if target["grid"]:
        axes.axhline(size, color=INK, linewidth=0.9, linestyle=":", label=name)
    else:
        axes.plot([balance["distance_after"]], [size], color=INK, marker="D", markersize=6, linestyle="", label=name)
    _scale(axes, [*sizes, size])
    axes.set_xlim(left=0)
    over = " over both confidences" if target["grid"] else ""
    axes.set(xlabel=f"distance to uniform{over}", ylabel="samples kept by dropping")
    axes.legend(loc="lower right")


def _scale(axes: Axes, sizes: list[float]) -> None:
    """Set a log scale if sizes differ by more than a factor of 20, else a linear one from 0."""
    if max(sizes) > 20 * max(min(sizes), 1):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.08 * max(sizes))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
