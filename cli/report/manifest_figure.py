"""The figure of a manifest: how was its discrepancy distributed before and after, and what would more samples cost?"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from .canvas import INK, LEVEL, SOFT, WIDTH, Palette, draw_sides
from .findings import Numbers, short


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
