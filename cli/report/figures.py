"""Figures of the report, drawn from the numbers in report.json only; the same numbers give the same bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...audit.figure_style import INK, LEVEL, PALE, SOFT, canvas, fit_names, text_width
from .drawing import (
    SIDE_TICKS,
    WIDTH,
    Palette,
    add_panels,
    depth,
    draw_histogram_2d,
    draw_sides,
    name_sides,
    palette,
    png,
    side_colour,
    text_colour,
)
from .findings import Numbers
from .outcome_figures import draw_finetune, draw_manifest
from .verdict import percent, signed

LABEL_WIDTH = 2.9  # inches of the names of classes, next to a figure
_NAME_SIZE = 8  # points, of the names and numbers of classes


def draw(numbers: Numbers) -> dict[str, bytes]:
    """Draw all figures of a report as PNG files, by name. Scripts that no installed font covers are logged once."""
    with canvas(_texts(numbers)):
        return {name: png(figure) for name, figure in build_figures(numbers).items()}


def build_figures(numbers: Numbers) -> dict[str, Figure]:
    """Build all figures of a report, by name."""
    colours = palette(coloured_names(numbers))
    max_detailed = numbers["max_detailed"]
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
    figures |= {f"finetune-{row['name']}": draw_finetune(row, colours) for row in numbers["finetunes"][:max_detailed]}
    return figures


def coloured_names(numbers: Numbers) -> list[str]:
    """Return the names that have a colour: the run's modalities, then those of fine-tunings on other data."""
    names = [modality["name"] for modality in numbers["facts"]["modalities"]]
    branches = [name for finetune in numbers["finetunes"] for name in finetune["branches"] if name != "fused"]
    return list(dict.fromkeys([*names, *branches]))


def _texts(numbers: Numbers) -> Iterator[str]:
    """Yield every name of the user's data that a figure shows."""
    yield from (modality["name"] for modality in numbers["facts"]["modalities"])
    yield from (row["name"] for row in numbers["classes"]["rows"])
    yield from (manifest["between"] for manifest in numbers["manifests"])
    for finetune in numbers["finetunes"]:
        yield from (*finetune["branches"], *(subset["name"] for subset in finetune["subsets"]))


def _discrepancy(discrepancies: list[Numbers], colours: Palette) -> Figure:
    """Draw one wide histogram for two modalities, or one small histogram per modality for more."""
    if len(discrepancies) == 1:
        return _discrepancy_of_pair(discrepancies[0], colours)
    rows = -(-len(discrepancies) // 3)
    figure = Figure(figsize=(WIDTH, 2.15 * rows + 0.3))
    panels = add_panels(figure, len(discrepancies), columns=3, shared=True)
    titles = fit_names([numbers["positive_side"] for numbers in discrepancies], WIDTH / 3 - 0.5)
    for axes, numbers, title in zip(panels, discrepancies, titles, strict=True):
        draw_sides(axes, numbers, colours, counts=numbers["counts"])
        shares = f"{percent(numbers['share_behind']['share'])} behind, {percent(numbers['share_ahead']['share'])} ahead"
        axes.set_title(f"{title}\n{shares}", color=text_colour(colours[numbers["positive_side"]]))
    figure.supxlabel("discrepancy: modality minus the mean of the others", fontsize=9, color=INK)
    figure.supylabel("samples", fontsize=9, color=INK)
    return figure


def _discrepancy_of_pair(numbers: Numbers, colours: Palette) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.3))
    axes = figure.subplots()
    draw_sides(axes, numbers, colours, counts=numbers["counts"])
    axes.set_ylim(0, 1.05 * max(*numbers["counts"], 1))
    axes.set(xlabel=_minus(numbers["positive_side"], numbers["negative_side"], WIDTH - 0.8), ylabel="samples")
    behind, level, ahead = (percent(numbers[f"share_{side}"]["share"]) for side in ("behind", "level", "ahead"))
    name_sides(axes, numbers, colours, width=WIDTH - 0.8, shares=(f" alone: {behind}", f" alone: {ahead}"))
    axes.text(0.5, 1.02, f"about level: {level}", color="#6b6b6b", ha="center", va="bottom", transform=axes.transAxes)
    return figure


def _minus(first: str, second: str, width: float) -> str:
    """Return the label of an axis of `width` inches with the discrepancy of two modalities."""
    first, second = fit_names([first, second], (width - text_width("discrepancy:  minus ", size=9)) / 2)
    return f"discrepancy: {first} minus {second}"


def _classes(classes: Numbers, colours: Palette) -> Figure:
    """Draw one row per class: its histogram for two modalities, its mean discrepancies for more."""
    rows, modalities = classes["rows"], classes["names"]
    figure = Figure(figsize=(WIDTH, 0.2 * len(rows) + (1.05 if len(modalities) == 1 else 0.45)))
    axes = figure.subplots()
    counts = [f" ({row['n']:,})" for row in rows]
    width = LABEL_WIDTH - max(text_width(count, size=_NAME_SIZE) for count in counts)
    labels = fit_names([row["name"] for row in rows], width, size=_NAME_SIZE)
    labels = [label + count for label, count in zip(labels, counts, strict=True)]
    width = WIDTH - 0.2 - max(text_width(label, size=_NAME_SIZE) for label in labels)
    if len(modalities) == 1:
        _class_histograms(axes, classes, colours, width=width - 0.4)
    else:
        _class_means(axes, classes, colours, width=width)
    axes.set_yticks(range(len(rows)), labels, fontsize=_NAME_SIZE)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _class_histograms(axes: Axes, classes: Numbers, colours: Palette, *, width: float) -> None:
    """Draw a histogram of each class as a row of cells on axes of `width` inches, and its mean."""
    counts = np.array([row["counts"] for row in classes["rows"]])
    darkness = depth(counts, max_count=counts.max(axis=1, keepdims=True))
    edges = np.array(classes["edges"])
    first, second = classes["names"][0], next(name for name in colours if name not in (classes["names"][0], "fused"))
    sides = {"positive_side": first, "negative_side": second}
    shades = np.array([to_rgb(side_colour(centre, sides, colours)) for centre in (edges[1:] + edges[:-1]) / 2])
    axes.imshow(1 - (1 - shades[None]) * darkness[:, :, None], aspect="auto", interpolation="nearest")
    axes.axvline(len(edges) // 2 - 0.5, color=INK, linewidth=0.8)
    axes.set_xticks(np.linspace(0, len(edges) - 1, 5) - 0.5, SIDE_TICKS[1])
    axes.set_xlabel(_minus(first, second, width))
    name_sides(axes, sides, colours, width=width)
    right = len(edges) - 1.4
    axes.text(right, -0.6, "mean", va="bottom", fontsize=_NAME_SIZE, color=INK)
    for row_index, row in enumerate(classes["rows"]):
        axes.text(right, row_index, signed(row["discrepancy"][0]), va="center", fontsize=_NAME_SIZE, color=INK)


def _class_means(axes: Axes, classes: Numbers, colours: Palette, *, width: float) -> None:
    """Draw mean discrepancies as a table: positive in the colour of the modality, negative in grey."""
    means = np.array([row["discrepancy"] for row in classes["rows"]])
    strength = 0.7 * np.abs(means) / max(float(np.abs(means).max()), 0.05)
    colours_ahead = np.array([to_rgb(colours[name]) for name in classes["names"]])
    shades = np.where(means[:, :, None] > 0, colours_ahead[None], np.array(to_rgb(SOFT)))
    axes.imshow(1 - (1 - shades) * strength[:, :, None], aspect="auto", interpolation="nearest")
    cell_width = width / len(classes["names"])
    names = fit_names(classes["names"], cell_width - 0.1)
    axes.set_xticks(range(len(names)), names)
    axes.xaxis.tick_top()
    size = min(_NAME_SIZE, _NAME_SIZE * (cell_width - 0.06) / text_width("+0.00", size=_NAME_SIZE))
    for cell, value in np.ndenumerate(means):
        axes.text(cell[1], cell[0], signed(float(value)), ha="center", va="center", fontsize=size, color=INK)


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
    size = (6.4, 4.5) if len(maps) == 1 else (WIDTH * columns / 3, (WIDTH / 3 - 0.05) * rows)
    figure = Figure(figsize=size)
    names = list(dict.fromkeys(numbers[axis] for numbers in maps for axis in ("x", "y")))
    width = (3.4 if len(maps) == 1 else WIDTH / 3 - 0.75) - text_width("confidence of ", size=9)
    labels = dict(zip(names, fit_names(names, width), strict=True))
    for axes, numbers in zip(add_panels(figure, len(maps), columns=columns, shared=False), maps, strict=True):
        _map(axes, numbers, colours, labels=labels)
    if len(maps) == 1:
        _name_corners(figure.axes[0], maps[0], colours)
    return figure


def _map(axes: Axes, numbers: Numbers, colours: Palette, *, labels: dict[str, str]) -> None:
    draw_histogram_2d(axes, np.array(numbers["counts"]), max_x=1)
    axes.set_box_aspect(1)
    for shift in (-0.2, 0.2):
        line = [max(0.0, -shift), min(1.0, 1 - shift)]
        shifted = [value + shift for value in line]
        axes.plot(line, shifted, color="white", linewidth=2)  # visible on light and on dark cells
        axes.plot(line, shifted, color=INK, linewidth=0.8, linestyle="--")
    axes.set_xlabel(f"confidence of {labels[numbers['x']]}", color=text_colour(colours[numbers["x"]]))
    axes.set_ylabel(f"confidence of {labels[numbers['y']]}", color=text_colour(colours[numbers["y"]]))
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    axes.set_xticklabels(["0", "0.5", "1"])
    axes.set_yticklabels(["0", "0.5", "1"])


def _name_corners(axes: Axes, numbers: Numbers, colours: Palette) -> None:
    """Label the corners of a map outside its axes; 1.5 inches are free on its right."""
    names = [numbers["y"], numbers["x"]]
    top_left, bottom_right = fit_names(names, 1.5 - text_width(" alone", size=9))
    shades = [text_colour(colours[name]) for name in names]
    axes.text(0.0, 1.02, f"{top_left} alone", va="bottom", color=shades[0])
    axes.text(1.03, 0.97, "both", va="top", color=INK)
    axes.text(1.03, 0.03, f"{bottom_right} alone", va="bottom", color=shades[1])


def _training(modalities: list[Numbers], colours: Palette) -> Figure:
    """Draw mean confidence over training against its standard deviation, one panel per modality.

    The axis of the standard deviation, up to 0.5, ends where the samples of all modalities end.
    """
    columns = min(len(modalities), 3)
    rows = -(-len(modalities) // columns)
    figure = Figure(figsize=(WIDTH * columns / 3, 2.7 * rows + 0.35))
    panels = add_panels(figure, len(modalities), columns=columns, shared=True)
    counts = np.array([numbers["counts"] for numbers in modalities])
    num_bins = counts.shape[2]
    filled = np.flatnonzero(counts.sum(axis=(0, 1))).max(initial=0) + 1
    shown = min(max(filled, round(3 * modalities[0]["border"] * num_bins)), num_bins)  # 1.5 times the border at least
    titles = fit_names([numbers["name"] for numbers in modalities], WIDTH / 3 - 0.5)
    for axes, numbers, title, cells in zip(panels, modalities, titles, counts, strict=True):
        draw_histogram_2d(axes, cells[:, :shown], max_x=0.5 * shown / num_bins)
        axes.axvline(numbers["border"], color=INK, linewidth=0.8, linestyle="--")
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.set_title(title, color=text_colour(colours[numbers["name"]]))
    figure.supxlabel("standard deviation over training", fontsize=9, color=INK)
    figure.supylabel("mean confidence", fontsize=9, color=INK)
    return figure
