"""Figures of the report, drawn from the numbers in report.json only; the same numbers give the same bytes."""

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
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from .findings import Numbers, short
from .verdict import percent, signed

Palette = dict[str, str]

WIDTH = 8.8  # inches; one inch is 100 CSS pixels on the page
DPI = 200  # two dots per CSS pixel
INK, SOFT, LEVEL, PALE = "#2b2b2b", "#8a8a8a", "#b4b4b4", "#d9d9d9"  # greys, for elements of no modality
# Okabe & Ito's colour-blind safe colours, without the yellow that is invisible on paper; then two of Tol's.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#332288", "#999933")
_FALLBACKS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai")
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
    return colours.get(sides["positive_side"] if discrepancy > 0 else sides["negative_side"], "#7a7a7a")


def _fonts() -> list[str]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _FALLBACKS if name in installed)]


def draw_manifest(manifest: Numbers, colours: Palette) -> Figure:
    """Draw the discrepancy before and after a split, and size against uniformity if the split was made uniform."""
    balance = manifest["balance"]
    figure = Figure(figsize=(WIDTH, 3.1 if balance["target"] else 2.7))
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
    sides = {"edges": balance["edges"], "positive_side": first, "negative_side": second or "the others"}
    draw_sides(axes, sides, colours, counts=after.tolist())
    axes.stairs(before, sides["edges"], color=INK, linewidth=1.1, label=f"before ({sum(balance['before']):,})")
    target = balance["target"]
    if target and not target["grid"]:
        uniform_share = 1 / max(int((before > 0).sum()), 1)
        axes.axhline(uniform_share, color=INK, linewidth=0.9, linestyle="--", label="exactly uniform")
    suffix = ", weighted" if target and target["weighted"] else ""
    axes.bar(0, 0, color=LEVEL, label=f"after ({manifest['kept']:,}{suffix}), coloured by side")
    axes.set_ylim(0, 1.1 * max(before.max(), after.max(), 1e-9))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.set_xticks([-1, -0.5, 0, 0.5, 1], ["−1", "−0.5", "0", "0.5", "1"])
    axes.set(
        xlabel=f"discrepancy: {short(first, 24)} minus {short(sides['negative_side'], 24)}", ylabel="share of the set"
    )


def _shares(counts: list[float]) -> NDArray[np.float64]:
    return np.array(counts, dtype=np.float64) / max(sum(counts), 1)


def _curve(axes: Axes, balance: Numbers, *, num_kept: int) -> None:
    """Draw the largest set at each distance to uniform, and mark this split.

    The curve of a grid is in distances over the grid, not of the discrepancy, so only the split's size is marked.
    """
    target = balance["target"]
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


def draw(numbers: Numbers) -> dict[str, bytes]:
    """Draw all figures of a report as PNG files, by name."""
    colours = palette([modality["name"] for modality in numbers["facts"]["modalities"]])
    max_detailed = numbers["max_detailed"]
    with canvas():
        figures = {
            "discrepancy": _discrepancy(numbers["discrepancy"], colours),
            "classes": _classes(numbers["classes"], colours),
            "gap": _gap(numbers["gap"]),
            "maps": _maps(numbers["maps"], colours),
        }
        if numbers["training"]:
            figures["training"] = _training(numbers["training"], colours)
        manifests = [row for row in numbers["manifests"] if row["balance"] is not None]
        manifests.sort(key=lambda row: row["balance"]["target"] is None)  # manifests that were made uniform come first
        figures |= {f"manifest-{row['name']}": draw_manifest(row, colours) for row in manifests[:max_detailed]}
        figures |= {f"finetune-{row['name']}": _finetune(row, colours) for row in numbers["finetunes"][:max_detailed]}
        return {name: png(figure) for name, figure in figures.items()}


def _discrepancy(discrepancies: list[Numbers], colours: Palette) -> Figure:
    """Draw one wide histogram for two modalities, or one small histogram per modality for more."""
    if len(discrepancies) == 1:
        figure = Figure(figsize=(WIDTH, 3.3))
        axes = figure.subplots()
        draw_sides(axes, discrepancies[0], colours, counts=discrepancies[0]["counts"])
        axes.set_xlabel(f"discrepancy: {discrepancies[0]['positive_side']} minus {discrepancies[0]['negative_side']}")
        axes.set_ylabel("samples")
        _name_sides(axes, discrepancies[0], colours)
        return figure
    rows = -(-len(discrepancies) // 3)
    figure = Figure(figsize=(WIDTH, 2.15 * rows + 0.3))
    panels = _panels(figure, len(discrepancies), columns=3, shared=True)
    for axes, numbers in zip(panels, discrepancies, strict=True):
        draw_sides(axes, numbers, colours, counts=numbers["counts"])
        shares = f"{percent(numbers['share_behind']['share'])} behind, {percent(numbers['share_ahead']['share'])} ahead"
        axes.set_title(f"{short(numbers['positive_side'], 24)}\n{shares}", color=colours[numbers["positive_side"]])
    figure.supxlabel("discrepancy: modality minus the mean of the others", fontsize=9, color=INK)
    figure.supylabel("samples", fontsize=9, color=INK)
    return figure


def _name_sides(axes: Axes, numbers: Numbers, colours: Palette) -> None:
    """Label the sides of a histogram with their modality and share."""
    axes.set_ylim(0, 1.28 * max(*numbers["counts"], 1))
    level_share, ahead_share, behind_share = (
        percent(numbers[f"share_{side}"]["share"]) for side in ("level", "ahead", "behind")
    )
    for x, name, text in (
        (-0.6, numbers["negative_side"], f"← {short(numbers['negative_side'], 24)} alone: {behind_share}"),
        (0.0, None, f"about level: {level_share}"),
        (0.6, numbers["positive_side"], f"{short(numbers['positive_side'], 24)} alone: {ahead_share} →"),
    ):
        shade = colours.get(name, INK) if name is not None else SOFT
        box = {"facecolor": "white", "edgecolor": "none", "pad": 2}
        axes.text(x, 0.97, text, color=shade, ha="center", va="top", transform=axes.get_xaxis_transform(), bbox=box)


def _classes(classes: Numbers, colours: Palette) -> Figure:
    """Draw one row per class: its histogram for two modalities, its mean discrepancies for more."""
    rows, names = classes["rows"], classes["names"]
    figure = Figure(figsize=(WIDTH, 0.2 * len(rows) + 0.95))
    axes = figure.subplots()
    if len(names) == 1:
        _class_histograms(axes, classes, colours)
    else:
        _class_means(axes, classes, colours)
    axes.set_yticks(range(len(rows)), [f"{short(row['name'], 24)} ({row['n']:,})" for row in rows], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _class_histograms(axes: Axes, classes: Numbers, colours: Palette) -> None:
    counts = np.array([row["counts"] for row in classes["rows"]])
    depth = _depth(counts, max_count=counts.max(axis=1, keepdims=True))
    edges = np.array(classes["edges"])
    first, second = classes["names"][0], next(name for name in colours if name not in (classes["names"][0], "fused"))
    sides = {"positive_side": first, "negative_side": second}
    shades = np.array([to_rgb(side_colour(centre, sides, colours)) for centre in (edges[1:] + edges[:-1]) / 2])
    axes.imshow(1 - (1 - shades[None]) * depth[:, :, None], aspect="auto", interpolation="nearest")
    centre = len(edges) // 2
    axes.axvline(centre - 0.5, color=INK, linewidth=0.8)
    axes.set_xticks(np.linspace(0, len(edges) - 1, 5) - 0.5, ["−1", "−0.5", "0", "0.5", "1"])
    axes.set_xlabel(f"discrepancy: {first} minus {second}        (right end: mean of the class)")
    for row_index, row in enumerate(classes["rows"]):
        axes.text(len(edges) - 1.3, row_index, signed(row["discrepancy"][0]), va="center", fontsize=8, color=INK)


def _panels(figure: Figure, number: int, *, columns: int, shared: bool) -> list[Axes]:
    """Return a number of axes in rows of `columns`; `shared` axes have common ticks."""
    rows = -(-number // columns)
    panels = figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False).ravel()
    for axes in panels[number:]:
        axes.set_visible(False)
    return list(panels[:number])


def _histogram_2d(axes: Axes, counts: list[list[int]], *, max_x: float) -> None:
    """Draw counts over [0, max_x] x [0, 1] as a square, darker where there are more."""
    cells = np.array(counts)
    style: dict[str, Any] = {"cmap": "Greys", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    depth = _depth(cells, max_count=cells.max())
    axes.imshow(depth, origin="lower", extent=(0, max_x, 0, 1), aspect=max_x, **style)


def _depth(counts: NDArray[Any], *, max_count: NDArray[Any]) -> NDArray[np.float64]:
    """Return the darkness of each cell in [0, 1], by the root of its count, so that single samples stay visible."""
    return np.where(counts > 0, 0.1 + 0.9 * np.sqrt(counts / np.maximum(max_count, 1)), 0.0)


def _class_means(axes: Axes, classes: Numbers, colours: Palette) -> None:
    """Draw mean discrepancies as a table: positive in the colour of the modality, negative in grey."""
    means = np.array([row["discrepancy"] for row in classes["rows"]])
    strength = 0.7 * np.abs(means) / max(float(np.abs(means).max()), 0.05)
    colours_ahead = np.array([to_rgb(colours[name]) for name in classes["names"]])
    shades = np.where(means[:, :, None] > 0, colours_ahead[None], np.array(to_rgb(SOFT)))
    axes.imshow(1 - (1 - shades) * strength[:, :, None], aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(classes["names"])), [short(name, 14) for name in classes["names"]])
    axes.xaxis.tick_top()
    for cell, value in np.ndenumerate(means):
        text = signed(float(value))
        axes.text(cell[1], cell[0], text, ha="center", va="center", fontsize=8, color=INK)


def _gap(gap: Numbers) -> Figure:
    """Draw the histogram of the gap, the two components of the mixture, their sum, and the threshold."""
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.subplots()
    edges, fitted, counts = np.array(gap["edges"]), np.array(gap["fitted"]), np.array(gap["counts"])
    axes.bar(edges[:-1], fitted, width=np.diff(edges), align="edge", color=PALE, edgecolor="white", linewidth=0.4)
    if (counts != fitted).any():
        axes.stairs(counts, edges, color=SOFT, linewidth=0.8, label="with test samples")
    _components(axes, gap)
    criterion = "posterior ≥ 0.5" if gap["bimodal"] else f"rule: gap ≤ {gap['threshold']:g}"
    axes.axvspan(0, gap["border"], color="#eceade", zorder=0, label=f"counted as balanced ({criterion})")
    axes.set(xlim=(0, 1), ylim=(0, 1.15 * max(int(counts.max()), 1)), xlabel="modality gap", ylabel="samples")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def _components(axes: Axes, gap: Numbers) -> None:
    if gap["components"] is None:
        return
    low, high = np.array(gap["curve_balanced"]), np.array(gap["curve_imbalanced"])
    shade, end = (INK, "") if gap["bimodal"] else (SOFT, " (fitted, not supported)")
    axes.plot(gap["grid"], low + high, color=LEVEL, linewidth=3, label="sum of the components")
    axes.plot(gap["grid"], low, color=shade, linewidth=1.2, linestyle="--", label="balanced" + end)
    axes.plot(gap["grid"], high, color=shade, linewidth=1.2, linestyle=":", label="imbalanced" + end)


def _maps(maps: list[Numbers], colours: Palette) -> Figure:
    """Draw the 2-D histogram of confidence for each pair of modalities."""
    columns = min(len(maps), 3)
    rows = -(-len(maps) // columns)
    size = (6.6, 4.5) if len(maps) == 1 else (WIDTH * columns / 3, (WIDTH / 3 + 0.15) * rows)
    figure = Figure(figsize=size)
    for axes, numbers in zip(_panels(figure, len(maps), columns=columns, shared=False), maps, strict=True):
        _map(axes, numbers, colours, has_corner_names=len(maps) == 1)
    return figure


def _map(axes: Axes, numbers: Numbers, colours: Palette, *, has_corner_names: bool) -> None:
    _histogram_2d(axes, numbers["counts"], max_x=1)
    for shift in (-0.2, 0.2):
        line = [max(0.0, -shift), min(1.0, 1 - shift)]
        shifted = [value + shift for value in line]
        axes.plot(line, shifted, color="white", linewidth=2)  # visible on light and on dark cells
        axes.plot(line, shifted, color=INK, linewidth=0.8, linestyle="--")
    axes.set_xlabel(f"confidence of {short(numbers['x'], 24)}", color=colours[numbers["x"]])
    axes.set_ylabel(f"confidence of {short(numbers['y'], 24)}", color=colours[numbers["y"]])
    axes.set_xticks([0, 0.5, 1])
    axes.set_yticks([0, 0.5, 1])
    if has_corner_names:
        _name_corners(axes, numbers, colours)


def _training(modalities: list[Numbers], colours: Palette) -> Figure:
    """Draw mean confidence over training against its standard deviation, one panel per modality."""
    columns = min(len(modalities), 3)
    rows = -(-len(modalities) // columns)
    figure = Figure(figsize=(WIDTH * columns / 3 if columns > 1 else 4, (WIDTH / 3 + 0.1) * rows + 0.35))
    panels = _panels(figure, len(modalities), columns=columns, shared=True)
    for axes, numbers in zip(panels, modalities, strict=True):
        _histogram_2d(axes, numbers["counts"], max_x=0.5)
        axes.axvline(numbers["border"], color=INK, linewidth=0.8, linestyle="--")
        axes.set_title(short(numbers["name"], 24), color=colours[numbers["name"]])
    figure.supxlabel("standard deviation over training", fontsize=9, color=INK)
    figure.supylabel("mean confidence", fontsize=9, color=INK)
    return figure


def _name_corners(axes: Axes, numbers: Numbers, colours: Palette) -> None:
    """Label the corners of a map outside its axes."""
    for x, y, up, text, shade in (
        (0.0, 1.02, "bottom", f"{short(numbers['y'], 20)} alone", colours[numbers["y"]]),
        (1.03, 0.97, "top", "both", INK),
        (1.03, 0.03, "bottom", f"{short(numbers['x'], 20)} alone", colours[numbers["x"]]),
    ):
        axes.text(x, y, text, va=up, color=shade)


def _finetune(finetune: Numbers, colours: Palette) -> Figure:
    """Draw accuracy by subset and branch with its interval, and the losses by epoch."""
    subsets = [subset for subset in finetune["subsets"] if subset["branches"] is not None]
    figure = Figure(figsize=(WIDTH, max(2.6, 0.34 * len(subsets) + 0.9)))
    accuracy_axes, loss_axes = figure.subplots(1, 2, width_ratios=(5, 3))
    for index, branch in enumerate(finetune["branches"]):
        measured = [subset["branches"][index] for subset in subsets]
        heights = np.arange(len(subsets)) + 0.5 * ((index + 0.5) / len(finetune["branches"]) - 0.5)
        values = [metrics["accuracy"] for metrics in measured]
        errors = [
            [metrics["accuracy"] - metrics["accuracy_low"] for metrics in measured],
            [metrics["accuracy_high"] - metrics["accuracy"] for metrics in measured],
        ]
        shade = colours.get(branch, LEVEL)
        style: dict[str, Any] = {"fmt": "o", "color": shade, "markersize": 4, "linewidth": 1}
        accuracy_axes.errorbar(values, heights, xerr=np.abs(errors), label=short(branch, 14), **style)
    accuracy_axes.axvline(finetune["chance"], color=SOFT, linewidth=0.8, linestyle="--", label="most common class")
    accuracy_axes.set_yticks(
        range(len(subsets)), [f"{short(subset['name'], 26)} ({subset['n']:,})" for subset in subsets]
    )
    accuracy_axes.set(xlim=(0, 1), ylim=(len(subsets) - 0.4, -0.6), xlabel="accuracy on test samples")
    accuracy_axes.tick_params(axis="y", length=0)
    handles, names = accuracy_axes.get_legend_handles_labels()
    # The legend of the losses is on the right.
    columns = 4 if max(map(len, finetune["branches"]), default=0) <= 8 else 2
    order = [*range(1, len(names)), 0]  # matplotlib lists the line of chance first
    figure.legend(
        [handles[index] for index in order], [names[index] for index in order], loc="outside upper left", ncols=columns
    )
    _losses(loss_axes, finetune)
    figure.legend(*loss_axes.get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


def _losses(axes: Axes, finetune: Numbers) -> None:
    """Draw losses by epoch, and the epoch of the selected weights."""
    history = finetune["history"]
    for key, shade, name in (("train_loss", LEVEL, "training"), ("validation_loss", INK, "validation")):
        values = np.array(history[key], dtype=np.float64)  # None becomes NaN, which is not drawn
        if np.isfinite(values).any():
            axes.plot(history["epoch"], values, color=shade, linewidth=1.4, label=name)
    axes.axvline(finetune["best_epoch"], color=SOFT, linewidth=1, linestyle="--", zorder=0.5, label="kept")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="epoch", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
