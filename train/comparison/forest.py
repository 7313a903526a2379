"""Forest plots of a comparison: differences of accuracy with intervals, by manifest, with markers by verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ...audit.figure_style import COLOURS, INK, PALE, SOFT, fit_names, text_width
from .column_figure import LABEL_WIDTH, SIZE, WIDTH, place_legend

_ROW_HEIGHT = 0.155  # inches, of a line of a forest plot
# Marker, whether it is filled, and colour by verdict.
_VERDICTS: Mapping[str, tuple[str, bool, str]] = {
    "helps": ("^", True, COLOURS[0]),
    "hurts": ("v", True, COLOURS[1]),
    "no evidence": ("o", False, INK),
    "no verdict": ("D", False, SOFT),
}
_OF_CONTROL = {"better": "helps", "worse": "hurts"}


def draw_forest(rows: pd.DataFrame, *, names_reference: bool = False) -> Figure:
    """Draw differences with intervals, by manifest, methods before controls, with markers by verdict."""
    lines = list(_forest_lines(rows, names_reference=names_reference))
    names = [_label(row) for row in lines if not isinstance(row, str)]
    labels = dict(zip(names, fit_names(names, LABEL_WIDTH, size=SIZE), strict=True))
    figure = Figure(figsize=(WIDTH, 0.72 + _ROW_HEIGHT * len(lines)))
    axes = figure.add_subplot()
    axes.axvline(0, color=PALE, linewidth=0.8, zorder=0)
    limit = _limit(rows)
    left = -72 * max(text_width(text, size=SIZE) for text in labels.values()) - 4
    ticks, texts = [], []
    for position, row in enumerate(lines):
        if isinstance(row, str):
            _heading(axes, row, position=position, left=left)
            continue
        _draw_difference(axes, row, position=position, limit=limit)
        ticks.append(position)
        texts.append(labels[_label(row)])
    axes.set_yticks(ticks, texts)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}".replace("-", "−") if value else "0")
    axes.set_xlabel("difference of accuracy in points, 95% interval", loc="right")
    _verdict_legend(figure, rows["verdict"].unique().tolist())
    return figure


def _limit(rows: pd.DataFrame) -> float:
    """Return the largest difference in points that a forest plot shows, 1.5 times that of the methods' intervals.

    The control of shuffled labels is often far outside, and would leave no width to the methods.
    """
    methods = rows[(rows["kind"] != "control") & rows["p"].notna()]
    if not len(methods):
        return 100.0
    return max(10.0, 150 * float(methods[["low", "high"]].abs().to_numpy().max()))


def _draw_difference(axes: Axes, row: Mapping[Any, Any], *, position: int, limit: float) -> None:
    """Draw a difference and its interval; beyond the limit an arrow with the number."""
    marker, is_filled, colour = _VERDICTS[_OF_CONTROL.get(row["verdict"], row["verdict"])]
    value, sign = 100 * row["difference"], 1 if row["difference"] > 0 else -1
    if abs(value) > limit:
        axes.plot(sign * limit, position, ">" if sign > 0 else "<", color=colour)
        align: Any = "right" if sign > 0 else "left"
        text = f"{value:+.1f}".replace("-", "−")
        axes.annotate(text, (sign * limit, position), (-5 * sign, 0), textcoords="offset points", ha=align, va="center")
        return
    if not np.isnan(row["p"]):
        ends = np.clip([100 * row["low"], 100 * row["high"]], -limit, limit)
        axes.plot(ends, [position, position], color=colour)
    axes.plot(value, position, marker, color=colour, markerfacecolor=colour if is_filled else "white")


def _forest_lines(rows: pd.DataFrame, *, names_reference: bool) -> Iterator[str | dict[Any, Any]]:
    """Yield headings and rows; a heading names the manifest where there are several, and the reference if asked."""
    several = rows["reference_manifest"].nunique() > 1
    for manifest in rows["reference_manifest"].unique().tolist():
        group = rows[rows["reference_manifest"] == manifest]
        is_control = (group["kind"] == "control").to_numpy()
        if names_reference:
            yield f"{manifest}: against {group['reference'].iloc[0]}" if manifest else str(group["reference"].iloc[0])
        elif several:
            yield str(manifest)
        yield from group[~is_control].to_dict("records")
        if is_control.any():
            yield f"controls of {manifest}" if several else "controls"
            yield from group[is_control].to_dict("records")


def _heading(axes: Axes, text: str, *, position: int, left: float) -> None:
    """Write a heading from the left edge of the labels, at an offset in points from the axes."""
    width = WIDTH - 0.2
    axes.annotate(
        fit_names([text], width, size=SIZE)[0],
        (0, position),
        xycoords=axes.get_yaxis_transform(),
        xytext=(left, 0),
        textcoords="offset points",
        va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        annotation_clip=False,
        in_layout=False,
    )


def _label(row: Mapping[Any, Any]) -> str:
    """Return the name of a row, with its manifest where that is another one than its reference's."""
    is_other = row["manifest"] != row["reference_manifest"]
    return f"{row['method']} on {row['manifest']}" if is_other else str(row["method"])


def _verdict_legend(figure: Figure, verdicts: Sequence[str]) -> None:
    """Explain the markers of the verdicts that occur."""
    handles = []
    for verdict, (marker, is_filled, colour) in _VERDICTS.items():
        words = [word for word in verdicts if _OF_CONTROL.get(word, word) == verdict]
        if words:
            fill = colour if is_filled else "white"
            label = " or ".join(sorted(words, key=len, reverse=True))
            handles.append(Line2D([], [], color=colour, marker=marker, markerfacecolor=fill, label=label))
    place_legend(figure, handles)
