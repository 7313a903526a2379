"""Figures of the report.

Every figure is drawn from report.json's numbers alone, and the same numbers give the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .canvas import INK, LEVEL, PALE, SOFT, WIDTH, Palette, canvas, draw_manifest, draw_sides, palette, png, side_colour
from .findings import Numbers, short
from .verdict import percent, signed


def draw(numbers: Numbers) -> dict[str, bytes]:
    """Draw all figures of a report as PNG files, by name."""
    colours = palette([modality["name"] for modality in numbers["facts"]["modalities"]])
    most = numbers["most_detailed"]
    with canvas():
        figures = {
            "discrepancy": _discrepancy(numbers["discrepancy"], colours),
            "classes": _classes(numbers["classes"], colours),
            "gap": _gap(numbers["gap"]),
            "maps": _maps(numbers["maps"], colours),
        }
        if numbers["training"]:
            figures["training"] = _training(numbers["training"], colours)
        told = [found for found in numbers["manifests"] if found["balance"] is not None]
        told.sort(key=lambda found: found["balance"]["made"] is None)  # of many, first those that were made uniform
        figures |= {f"manifest-{found['name']}": draw_manifest(found, colours) for found in told[:most]}
        figures |= {f"finetune-{found['name']}": _finetune(found, colours) for found in numbers["finetunes"][:most]}
        return {name: png(figure) for name, figure in figures.items()}


def _discrepancy(found: list[Numbers], colours: Palette) -> Figure:
    """Draw one wide histogram of two modalities, or one small one for each of more."""
    if len(found) == 1:
        figure = Figure(figsize=(WIDTH, 3.3))
        axes = figure.subplots()
        draw_sides(axes, found[0], colours, counts=found[0]["counts"])
        axes.set_xlabel(f"discrepancy: {found[0]['right']} minus {found[0]['left']}")
        axes.set_ylabel("samples")
        _name_sides(axes, found[0], colours)
        return figure
    rows = -(-len(found) // 3)
    figure = Figure(figsize=(WIDTH, 2.0 * rows + 0.3))
    panels = figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, each in zip(panels, found, strict=False):
        draw_sides(axes, each, colours, counts=each["counts"])
        shares = f"{percent(each['share_left']['share'])} behind, {percent(each['share_right']['share'])} ahead"
        axes.set_title(f"{short(each['right'], 20)}: {shares}", color=colours[each["right"]])
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    figure.supxlabel("discrepancy: modality minus the mean of the others", fontsize=9, color=INK)
    figure.supylabel("samples", fontsize=9, color=INK)
    return figure


def _name_sides(axes: Axes, found: Numbers, colours: Palette) -> None:
    """Write above a histogram which side is whose, and its share."""
    axes.set_ylim(0, 1.28 * max(*found["counts"], 1))
    level, right, left = (percent(found[f"share_{side}"]["share"]) for side in ("level", "right", "left"))
    for place, name, text in (
        (-0.6, found["left"], f"← {short(found['left'], 24)} alone: {left}"),
        (0.0, None, f"about level: {level}"),
        (0.6, found["right"], f"{short(found['right'], 24)} alone: {right} →"),
    ):
        shade = colours.get(name, INK) if name is not None else SOFT
        box = {"facecolor": "white", "edgecolor": "none", "pad": 2}
        axes.text(place, 0.97, text, color=shade, ha="center", va="top", transform=axes.get_xaxis_transform(), bbox=box)


def _classes(found: Numbers, colours: Palette) -> Figure:
    """Draw one row for each class: its histogram for two modalities, its mean discrepancies for more."""
    rows, names = found["rows"], found["names"]
    figure = Figure(figsize=(WIDTH, 0.2 * len(rows) + 0.95))
    axes = figure.subplots()
    if len(names) == 1:
        _class_histograms(axes, found, colours)
    else:
        _class_means(axes, found, colours)
    axes.set_yticks(range(len(rows)), [f"{short(row['name'], 24)} ({row['n']:,})" for row in rows], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _class_histograms(axes: Axes, found: Numbers, colours: Palette) -> None:
    counts = np.array([row["counts"] for row in found["rows"]])
    depth = _depth(counts, most=counts.max(axis=1, keepdims=True))
    edges = np.array(found["edges"])
    first, second = found["names"][0], next(name for name in colours if name not in (found["names"][0], "fused"))
    side = {"right": first, "left": second}
    shades = np.array([to_rgb(side_colour(middle, side, colours)) for middle in (edges[1:] + edges[:-1]) / 2])
    axes.imshow(1 - (1 - shades[None]) * depth[:, :, None], aspect="auto", interpolation="nearest")
    middle = len(edges) // 2
    axes.axvline(middle - 0.5, color=INK, linewidth=0.8)
    axes.set_xticks(np.linspace(0, len(edges) - 1, 5) - 0.5, ["−1", "−0.5", "0", "0.5", "1"])
    axes.set_xlabel(f"discrepancy: {first} minus {second}        (at the right end: mean of the class)")
    for place, row in enumerate(found["rows"]):
        axes.text(len(edges) - 1.3, place, signed(row["discrepancy"][0]), va="center", fontsize=8, color=INK)


def _depth(counts: NDArray[Any], *, most: NDArray[Any]) -> NDArray[np.float64]:
    """Give how dark to draw a cell, in [0, 1]: by the root of its count, and one sample is seen beside thousands."""
    return np.where(counts > 0, 0.1 + 0.9 * np.sqrt(counts / np.maximum(most, 1)), 0.0)


def _class_means(axes: Axes, found: Numbers, colours: Palette) -> None:
    """Draw mean discrepancies as a table: ahead in the colour of the modality, behind in grey."""
    means = np.array([row["discrepancy"] for row in found["rows"]])
    strength = 0.7 * np.abs(means) / max(float(np.abs(means).max()), 0.05)
    ahead = np.array([to_rgb(colours[name]) for name in found["names"]])
    shades = np.where(means[:, :, None] > 0, ahead[None], np.array(to_rgb(SOFT)))
    axes.imshow(1 - (1 - shades) * strength[:, :, None], aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(found["names"])), [short(name, 14) for name in found["names"]])
    axes.xaxis.tick_top()
    for place, value in np.ndenumerate(means):
        text = signed(float(value))
        axes.text(place[1], place[0], text, ha="center", va="center", fontsize=8, color=INK)


def _gap(found: Numbers) -> Figure:
    """Draw the histogram of the gap, the mixture's two components and their sum over it, and the border."""
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.subplots()
    edges, fitted, counts = np.array(found["edges"]), np.array(found["fitted"]), np.array(found["counts"])
    axes.bar(edges[:-1], fitted, width=np.diff(edges), align="edge", color=PALE, edgecolor="white", linewidth=0.4)
    if (counts != fitted).any():
        axes.stairs(counts, edges, color=SOFT, linewidth=0.8, label="with test samples")
    _components(axes, found)
    what = "posterior ≥ 0.5" if found["bimodal"] else f"rule: gap ≤ {found['threshold']:g}"
    axes.axvspan(0, found["border"], color="#eceade", zorder=0, label=f"counted as balanced ({what})")
    axes.set(xlim=(0, 1), ylim=(0, 1.15 * max(int(counts.max()), 1)), xlabel="modality gap", ylabel="samples")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def _components(axes: Axes, found: Numbers) -> None:
    if found["components"] is None:
        return
    low, high = np.array(found["curve_balanced"]), np.array(found["curve_imbalanced"])
    shade, end = (INK, "") if found["bimodal"] else (SOFT, " (fitted, not supported)")
    axes.plot(found["grid"], low + high, color=LEVEL, linewidth=3, label="sum of the components")
    axes.plot(found["grid"], low, color=shade, linewidth=1.2, linestyle="--", label="balanced" + end)
    axes.plot(found["grid"], high, color=shade, linewidth=1.2, linestyle=":", label="imbalanced" + end)


def _maps(found: list[Numbers], colours: Palette) -> Figure:
    """Draw the confidences of each pair of modalities against each other."""
    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    size = (5.3, 4.5) if len(found) == 1 else (WIDTH * columns / 3, (WIDTH / 3 + 0.15) * rows)
    figure = Figure(figsize=size)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, each in zip(panels, found, strict=False):
        _map(axes, each, colours, named=len(found) == 1)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    return figure


def _map(axes: Axes, found: Numbers, colours: Palette, *, named: bool) -> None:
    counts = np.array(found["counts"])
    depth = _depth(counts, most=counts.max())
    axes.imshow(depth, origin="lower", extent=(0, 1, 0, 1), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    for shift in (-0.2, 0.2):
        line = [max(0.0, -shift), min(1.0, 1 - shift)]
        shifted = [value + shift for value in line]
        axes.plot(line, shifted, color="white", linewidth=2)  # to be seen on light and on dark
        axes.plot(line, shifted, color=INK, linewidth=0.8, linestyle="--")
    axes.set_xlabel(f"confidence of {short(found['x'], 24)}", color=colours[found["x"]])
    axes.set_ylabel(f"confidence of {short(found['y'], 24)}", color=colours[found["y"]])
    axes.set_xticks([0, 0.5, 1])
    axes.set_yticks([0, 0.5, 1])
    if named:
        _name_corners(axes, found, colours)


def _training(found: list[Numbers], colours: Palette) -> Figure:
    """Draw mean confidence over training against its standard deviation, a panel for each modality."""
    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(WIDTH * columns / 3 if columns > 1 else 4, (WIDTH / 3 + 0.15) * rows))
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, each in zip(panels, found, strict=False):
        counts = np.array(each["counts"])
        depth = _depth(counts, most=counts.max())
        axes.imshow(
            depth,
            origin="lower",
            extent=(0, 0.5, 0, 1),
            aspect=0.5,
            cmap="Greys",
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        axes.axvline(each["border"], color=INK, linewidth=0.8, linestyle="--")
        axes.set_title(short(each["name"], 24), color=colours[each["name"]])
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    figure.supxlabel("standard deviation over training", fontsize=9, color=INK)
    figure.supylabel("mean confidence", fontsize=9, color=INK)
    return figure


def _name_corners(axes: Axes, found: Numbers, colours: Palette) -> None:
    """Write beside the corners, not over the samples there, what they mean."""
    for x, y, up, text, shade in (
        (0.0, 1.02, "bottom", f"{short(found['y'], 20)} alone", colours[found["y"]]),
        (1.03, 0.97, "top", "both", INK),
        (1.03, 0.03, "bottom", f"{short(found['x'], 20)} alone", colours[found["x"]]),
    ):
        axes.text(x, y, text, va=up, color=shade)


def _finetune(found: Numbers, colours: Palette) -> Figure:
    """Draw accuracy by subset and branch with its interval, and the course of the training."""
    subsets = [subset for subset in found["subsets"] if subset["branches"] is not None]
    figure = Figure(figsize=(WIDTH, max(2.6, 0.34 * len(subsets) + 0.9)))
    left, right = figure.subplots(1, 2, width_ratios=(5, 3))
    for index, branch in enumerate(found["branches"]):
        measured = [subset["branches"][index] for subset in subsets]
        places = np.arange(len(subsets)) + 0.5 * ((index + 0.5) / len(found["branches"]) - 0.5)
        values = [each["accuracy"] for each in measured]
        errors = [
            [each["accuracy"] - each["accuracy_low"] for each in measured],
            [each["accuracy_high"] - each["accuracy"] for each in measured],
        ]
        shade = colours.get(branch, LEVEL)
        left.errorbar(
            values,
            places,
            xerr=np.abs(errors),
            fmt="o",
            color=shade,
            markersize=4,
            linewidth=1,
            label=short(branch, 14),
        )
    left.axvline(found["chance"], color=SOFT, linewidth=0.8, linestyle="--", label="most common class")
    left.set_yticks(range(len(subsets)), [f"{short(subset['name'], 26)} ({subset['n']:,})" for subset in subsets])
    left.set(xlim=(0, 1), ylim=(len(subsets) - 0.4, -0.6), xlabel="accuracy on test samples")
    left.tick_params(axis="y", length=0)
    handles, names = left.get_legend_handles_labels()
    columns = 4 if max(map(len, found["branches"]), default=0) <= 8 else 2  # the losses have their legend on the right
    order = [*range(1, len(names)), 0]  # matplotlib puts the line of chance first
    figure.legend(
        [handles[place] for place in order], [names[place] for place in order], loc="outside upper left", ncols=columns
    )
    _course(right, found)
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


def _course(axes: Axes, found: Numbers) -> None:
    """Draw losses by epoch, and the epoch whose weights were kept."""
    history = found["history"]
    for key, shade, name in (("train_loss", LEVEL, "training"), ("validation_loss", INK, "validation")):
        values = np.array(history[key], dtype=np.float64)  # None becomes NaN, and is not drawn
        if np.isfinite(values).any():
            axes.plot(history["epoch"], values, color=shade, linewidth=1.4, label=name)
    axes.axvline(found["best_epoch"], color=SOFT, linewidth=1, linestyle="--", zorder=0.5, label="kept")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="epoch", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
