"""Figures of the manifests and the fine-tunings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from ...audit.figure_style import INK, LEVEL, SOFT, fit_names, text_width
from .drawing import WIDTH, Palette, draw_sides, name_sides
from .findings import Numbers

_HISTOGRAM_WIDTH = 4.7  # inches, next to the curve
_LEGEND_WIDTH = 5.6  # inches of the legend of the branches; the legend of the losses has the rest
_CHANCE_LINES = (":", "--")  # of the levels of guessing
_HANDLE_WIDTH = 0.7  # inches of a line in a legend, with its spaces


def draw_manifest(manifest: Numbers, colours: Palette) -> Figure:
    """Draw the discrepancy before and after a split, and size against uniformity if the split was made uniform."""
    balance = manifest["balance"]
    figure = Figure(figsize=(WIDTH, 3.3 if balance["target"] else 2.9))
    if balance["curve"]:
        histogram_axes, curve_axes = figure.subplots(1, 2, width_ratios=(5, 3))
        _curve(curve_axes, balance, num_kept=manifest["kept"])
        width = _HISTOGRAM_WIDTH
    else:
        histogram_axes, width = figure.subplots(), WIDTH - 0.8
    _before_and_after(histogram_axes, manifest, colours, width=width)
    figure.legend(*histogram_axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def _before_and_after(axes: Axes, manifest: Numbers, colours: Palette, *, width: float) -> None:
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
    name_sides(axes, sides, colours, width=width)
    minus = "discrepancy:  minus "
    names = fit_names([first, sides["negative_side"]], (width - text_width(minus, size=9)) / 2)
    axes.set(xlabel=f"discrepancy: {names[0]} minus {names[1]}", ylabel="share of the set")


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
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    over = " over both confidences" if target["grid"] else ""
    axes.set(xlabel=f"distance to uniform{over}", ylabel="samples kept by dropping")
    axes.legend(loc="lower right", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.2)  # above the axes, not on the curve


def _scale(axes: Axes, sizes: list[float]) -> None:
    """Set a log scale if sizes differ by more than a factor of 20, else a linear one from 0."""
    if max(sizes) > 20 * max(min(sizes), 1):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.08 * max(sizes))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:,.0f}")


def draw_finetune(finetune: Numbers, colours: Palette) -> Figure:
    """Draw the main metric by subset and branch with its interval, if it has one, and the losses by epoch."""
    subsets = [subset for subset in finetune["subsets"] if subset["branches"] is not None]
    row_height = max(0.34, 0.1 + 0.08 * len(finetune["branches"]))  # the intervals of the branches stay apart
    figure = Figure(figsize=(WIDTH, max(2.6, row_height * len(subsets) + 1.0)))
    accuracy_axes, loss_axes = figure.subplots(1, 2, width_ratios=(5, 3))
    branches = _legend_names(finetune["branches"])
    for index, branch in enumerate(finetune["branches"]):
        measured = [subset["branches"][index] for subset in subsets]
        heights = np.arange(len(subsets)) + 0.7 * ((index + 0.5) / len(branches) - 0.5)
        key = finetune["metric"]
        values, low, high = (
            np.array([metrics.get(name) for metrics in measured], dtype=np.float64)  # None becomes NaN: not drawn
            for name in (key, f"{key}_low", f"{key}_high")
        )
        errors = np.nan_to_num([values - low, high - values])
        style: dict[str, Any] = {"fmt": "o", "color": colours.get(branch, LEVEL), "markersize": 4, "linewidth": 1}
        accuracy_axes.errorbar(values, heights, xerr=np.abs(errors), label=branches[index], **style)
    _label_subsets(accuracy_axes, subsets, name=finetune["metric_name"], largest=_largest(finetune))
    chance_lines = dict(zip(finetune["chance"], _CHANCE_LINES, strict=False))
    chance = [
        accuracy_axes.axvline(finetune["chance"][name], color=SOFT, linewidth=0.9, linestyle=line, zorder=0.5)
        for name, line in chance_lines.items()
    ]
    handles, names = accuracy_axes.get_legend_handles_labels()
    handles, names = (
        [*handles, *chance],
        [*names, *(f"{name} {level:.3f}" for name, level in finetune["chance"].items())],
    )
    widest = max(text_width(name, size=8.5) for name in names) + _HANDLE_WIDTH
    columns = max(1, min(4, int(_LEGEND_WIDTH / widest)))
    figure.legend(handles, names, loc="outside upper left", ncols=columns)
    _losses(loss_axes, finetune)
    figure.legend(*loss_axes.get_legend_handles_labels(), loc="outside upper right", ncols=3, columnspacing=1.2)
    return figure


def _legend_names(branches: Sequence[str]) -> list[str]:
    return fit_names(branches, _LEGEND_WIDTH / 2 - _HANDLE_WIDTH, size=8.5)


def _label_subsets(axes: Axes, subsets: Sequence[Numbers], *, name: str, largest: float) -> None:
    """Name the subsets on the vertical axis, with their numbers of samples, and the metric on the horizontal one."""
    names = fit_names([subset["name"] for subset in subsets], 2.1)
    axes.set_yticks(
        range(len(subsets)), [f"{name} ({subset['n']:,})" for name, subset in zip(names, subsets, strict=True)]
    )
    axes.set(ylim=(len(subsets) - 0.4, -0.6), xlabel=f"{name} on test samples")
    axes.set_xlim(0, largest)
    if largest == 1:
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0", "0.2", "0.4", "0.6", "0.8", "1"])
    axes.tick_params(axis="y", length=0)


def _largest(finetune: Numbers) -> float:
    """Return the right end of the axis of the metric: 1 for shares, for errors a little above the largest one."""
    if finetune["task"] != "regression":
        return 1
    key = finetune["metric"]
    branches = [branch for subset in finetune["subsets"] for branch in subset["branches"] or ()]
    values = [branch.get(name) or 0.0 for branch in branches for name in (key, f"{key}_high")]
    return 1.05 * max(*values, *finetune["chance"].values()) or 1


def _losses(axes: Axes, finetune: Numbers) -> None:
    """Draw losses by epoch, and the epoch of the selected weights."""
    history = finetune["history"]
    marker = "o" if len(history["epoch"]) == 1 else ""  # a line through one point is not drawn
    for key, shade, name in (("train_loss", LEVEL, "training"), ("validation_loss", INK, "validation")):
        values = np.array(history[key], dtype=np.float64)  # None becomes NaN, which is not drawn
        if np.isfinite(values).any():
            axes.plot(history["epoch"], values, color=shade, linewidth=1.4, label=name, marker=marker, markersize=4)
    axes.axvline(finetune["best_epoch"], color=SOFT, linewidth=1, linestyle="--", zorder=0.5, label="kept")
    axes.set_ylim(bottom=0)
    if marker:
        axes.set_xlim(history["epoch"][0] - 1, history["epoch"][0] + 1)  # for ticks at whole epochs
    axes.set(xlabel="epoch", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
