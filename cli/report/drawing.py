"""Drawing for the report: histograms by side, panels, and PNG files of few colours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ...audit.figure_style import COLOURS, INK, LEVEL, SOFT, fit_names, text_width
from .findings import Numbers

Palette = dict[str, str]

WIDTH = 8.8  # inches; one inch is 100 CSS pixels on the page
DPI = 200  # two dots per CSS pixel
SIDE_TICKS = ([-1, -0.5, 0, 0.5, 1], ["−1", "−0.5", "0", "0.5", "1"])
_MAX_LUMINANCE = 0.18  # of coloured text: the contrast to white is then 4.5 to 1, as WCAG 2.1 asks for


def palette(modalities: Sequence[str]) -> Palette:
    """Return the colour of each modality, and of "fused"; the eight colours repeat."""
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(modalities)}
    return {**colours, "fused": INK}


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
