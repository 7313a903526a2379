"""Figures of a study as SVG, from its numbers only; the same numbers give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ...audit.errors import printable

Numbers = Mapping[str, Any]
_COLOURS = {"helps": "#2f7d4f", "hurts": "#b3403a"}
_INK, _SOFT = "#3b3b3b", "#9a9a9a"
_STYLE: Any = {"font.size": 8, "svg.hashsalt": "mmaudit", "svg.fonttype": "none", "axes.spines.top": False}


def draw_methods(entry: Numbers) -> str | None:
    """Draw the differences of all methods from the baseline on all samples, largest first."""
    rows = [row for row in entry["methods"]["summary"] if row["subset"] == "all" and row["kind"] == "method"]
    if not rows:
        return None
    rows.sort(key=lambda row: (-row["difference"], row["method"]))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.0, 0.8 + 0.19 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for position, row in enumerate(rows):
            colour = _COLOURS.get(row["verdict"], _INK)
            if row["p"] is not None:
                axes.plot([100 * row["low"], 100 * row["high"]], [position, position], color=colour, linewidth=1.2)
            axes.plot(100 * row["difference"], position, "o", color=colour, markersize=4)
        _finish(figure, [row["method"] for row in rows], f"points over {entry['methods']['baseline']}, 95% interval")
        return _svg(figure)


def draw_agreement(entry: Numbers) -> str | None:
    """Draw the rank agreement with the discrepancies of other probes and of networks, and its ceilings."""
    rows: list[tuple[str, Numbers, float | None]] = []
    for probe in entry["probes"]:
        measure = probe["measures"][0]
        rows.append((f"probes: {probe['name']}", measure["rank"], measure["ceiling_folds"]))
    rows += [(f"network: {row['method']}", row["rank"], row["ceiling"]) for row in entry["networks"]]
    rows = [row for row in rows if row[1]["value"] is not None]
    if not rows:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.0, 0.9 + 0.19 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for position, (_, rank, ceiling) in enumerate(rows):
            axes.plot([rank["low"], rank["high"]], [position, position], color=_INK, linewidth=1.2)
            axes.plot(rank["value"], position, "o", color=_INK, markersize=4)
            if ceiling is not None:
                axes.plot(ceiling, position, "|", color="#b07d2b", markersize=8, markeredgewidth=1.6)
        axes.set_xlim(min(-0.02, *(rank["low"] for _, rank, _ in rows)), 1.02)
        _finish(figure, [name for name, _, _ in rows], "rank agreement within classes, 95% interval; bar: ceiling")
        return _svg(figure)


def draw_truth(entry: Numbers) -> str | None:
    """Draw the mean discrepancy by level of the planted one; None where nothing was planted."""
    if not entry["truth"]:
        return None
    levels = entry["truth"]["levels"]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.0, 2.6), layout="constrained")
        axes = figure.add_subplot()
        planted, means = [row["planted"] for row in levels], [row["mean"] for row in levels]
        errors = [[row["mean"] - row["low"] for row in levels], [row["high"] - row["mean"] for row in levels]]
        axes.errorbar(planted, means, yerr=errors, color=_INK, marker="o", markersize=4, linewidth=1)
        axes.axhline(0, color=_SOFT, linewidth=0.8, zorder=0)
        axes.set_xlabel("planted discrepancy, mean of a level")
        axes.set_ylabel("discrepancy, mean")
        axes.spines["right"].set_visible(False)
        return _svg(figure)


FIGURES: Mapping[str, Callable[[Numbers], str | None]] = {
    "methods": draw_methods,
    "agreement": draw_agreement,
    "truth": draw_truth,
}


def _finish(figure: Figure, names: Sequence[str], label: str) -> None:
    axes = figure.axes[0]
    axes.axvline(0, color=_SOFT, linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(names)), [printable(name).replace("$", r"\$") for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(label)
    axes.spines["right"].set_visible(False)
    axes.grid(axis="y", color="#ececec", linewidth=0.6)
    axes.set_axisbelow(True)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "mmaudit"})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
