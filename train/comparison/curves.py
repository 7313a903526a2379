"""Accuracy of the methods of a comparison by subset, over the threshold T, and over the share of a missing modality."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...audit.figure_style import COLOURS, INK, PALE, SOFT, fit_names
from .column_figure import LABEL_WIDTH, SIZE, WIDTH, FigureTables, legend_layout, place_legend
from .metrics import CLASS_PREFIX

MAX_CURVES = 8  # of a plot; more cannot be told apart by colour and marker
_SIDE = re.compile(r"(?P<side>.+)-(?:preferred|dominated-(?P<threshold>[\d.]+))")
_MARKERS = ("s", "^", "D", "v", "P", "X", "*")


def accuracies(tables: FigureTables) -> pd.DataFrame:
    """Return the accuracies of methods and unimodal models, on manifests of methods."""
    metrics = tables.metrics
    if not len(metrics):
        return metrics
    metrics = metrics[metrics["metric"] == "accuracy"]
    is_method = metrics["kind"] == "method"
    manifests = metrics[is_method]["manifest"].unique()
    return metrics[metrics["manifest"].isin(manifests) & (is_method | metrics["method"].isin(tables.unimodal_methods))]


def side_and_threshold(subset: str) -> tuple[str, float] | None:
    """Return modality and T of a subset dominated(T), T = 0 where it is preferred; None of another subset."""
    match = _SIDE.fullmatch(subset)
    return None if match is None else (match["side"], float(match["threshold"] or 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Curves:
    """The methods that a plot shows, with their styles, and how many there are."""

    styles: Mapping[str, Mapping[str, Any]]
    num_methods: int

    @property
    def note(self) -> str:
        """What is left out."""
        if len(self.styles) == self.num_methods:
            return ""
        return (
            f"{len(self.styles)} of {self.num_methods} methods: the baseline, unimodal models if any, and "
            "the best and worst others on all test samples; the tables have all."
        )

    def only(self, methods: Sequence[str]) -> _Curves:
        """Return those of some methods."""
        return _Curves(
            styles={name: self.styles[name] for name in self.styles if name in methods}, num_methods=len(methods)
        )


def _choose_curves(tables: FigureTables) -> _Curves:
    """Choose at most 8 methods: the baseline, two unimodal models, and the best and the worst on all test samples."""
    accuracy = accuracies(tables)
    overall = accuracy[accuracy["subset"] == "all"].groupby("method", sort=False)["value"].mean()
    unimodal = [name for name in overall.index if name in tables.unimodal_methods]
    methods = [name for name in overall.index if name not in unimodal and name != tables.baseline]
    baseline = [tables.baseline] if tables.baseline in overall.index else []
    if len(overall) > MAX_CURVES:
        unimodal = overall[unimodal].sort_values(ascending=False, kind="stable").index[:2].tolist()
        ranked = overall[methods].sort_values(ascending=False, kind="stable").index.tolist()
        room = MAX_CURVES - len(baseline) - len(unimodal)
        if len(methods) > room:
            methods = [*ranked[: room - room // 2], *ranked[len(ranked) - room // 2 :]]
    styles: dict[str, dict[str, Any]] = {name: {"color": INK, "marker": "o"} for name in baseline}
    for index, name in enumerate(methods):
        styles[name] = {"color": COLOURS[index % len(COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
    for index, name in enumerate(unimodal):
        line = {"color": SOFT, "marker": ("x", "+", "1", "2")[index % 4], "markersize": 4.5}
        styles[name] = {**line, "linestyle": ("--", ":", "-.", (0, (5, 3)))[index % 4]}
    return _Curves(styles=styles, num_methods=len(overall))


def _curve_legend(figure: Figure, curves: _Curves) -> None:
    """Name the curves above the plot, and write below it which were left out."""
    names = list(curves.styles)
    place_legend(figure, [Line2D([], [], label=name, **curves.styles[name]) for name in names])
    if curves.note:
        figure.supxlabel("\n".join(textwrap.wrap(curves.note, 62)), fontsize=SIZE, x=0.02, ha="left", color=INK)


def _legend_height(curves: _Curves) -> float:
    """Return about the height in inches of legend and note."""
    _, columns = legend_layout(list(curves.styles))
    return 0.14 * -(-len(curves.styles) // columns) + 0.11 * len(textwrap.wrap(curves.note, 62)) + 0.1


def draw_subsets(tables: FigureTables) -> Figure:
    """Draw the accuracy of each method by subset, with intervals; a panel per manifest."""
    accuracy, curves = accuracies(tables), _choose_curves(tables)
    accuracy = accuracy[~accuracy["subset"].str.startswith(CLASS_PREFIX)]
    counts = accuracy.groupby("subset", sort=False)["num_samples"].max()
    manifests = accuracy["manifest"].unique()
    height = max(0.22, 0.075 * len(curves.styles) + 0.1)  # inches of a subset, whose intervals stay apart
    heights = [0.45 + height * len(counts)] * len(manifests)
    figure = Figure(figsize=(WIDTH, _legend_height(curves) + sum(heights)))
    labels = fit_names(counts.index.tolist(), LABEL_WIDTH, size=SIZE)
    for axes, manifest in zip(
        figure.subplots(len(manifests), 1, sharex=True, squeeze=False)[:, 0], manifests, strict=True
    ):
        rows = accuracy[accuracy["manifest"] == manifest].set_index(["method", "subset"])
        for index, (name, style) in enumerate(curves.styles.items()):
            offset = 0.8 * ((index + 0.5) / len(curves.styles) - 0.5)
            for position, subset in enumerate(counts.index):
                if (name, subset) in rows.index:
                    row = rows.loc[(name, subset)]
                    _point(axes, row["value"], position + offset, row["low"], row["high"], style=style)
        for position in range(1, len(counts)):
            axes.axhline(position - 0.5, color=PALE, linewidth=0.5, zorder=0)
        axes.set_yticks(range(len(counts)), [f"{label}\n{n:,}" for label, n in zip(labels, counts, strict=True)])
        axes.set_ylim(len(counts) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        _title(axes, str(manifest), is_needed=len(manifests) > 1)
    axes.set_xlabel("accuracy, 95% interval; below subsets their test samples", loc="right")
    _curve_legend(figure, curves)
    return figure


def _point(axes: Axes, x: float, y: float, low: float, high: float, *, style: Mapping[str, Any]) -> None:
    """Draw a value with its interval along x, if it has one."""
    if not np.isnan(low):
        axes.plot([low, high], [y, y], color=style["color"], linewidth=0.8)
    axes.plot(x, y, color=style["color"], marker=style["marker"], markersize=style.get("markersize", 3.5))


def draw_thresholds(tables: FigureTables) -> Figure:
    """Draw the accuracy on dominated(T) over T, a panel per manifest and modality."""
    accuracy, curves = accuracies(tables), _choose_curves(tables)
    places = accuracy["subset"].map(side_and_threshold)
    accuracy, places = accuracy[places.notna()], places[places.notna()]
    accuracy = accuracy.assign(side=[side for side, _ in places], threshold=[value for _, value in places])
    sides, ticks = accuracy["side"].unique().tolist(), sorted(accuracy["threshold"].unique())
    manifests = accuracy["manifest"].unique().tolist()
    figure = Figure(figsize=(WIDTH, _legend_height(curves) + 0.25 + 1.75 * len(manifests)))
    panels = figure.subplots(len(manifests), len(sides), sharey=True, squeeze=False)  # counts differ by side
    spread = 0.5 * float(np.diff(ticks).min()) if len(ticks) > 1 else 0.1
    for (row, manifest), (column, side) in ((a, b) for a in enumerate(manifests) for b in enumerate(sides)):
        axes = panels[row, column]
        part = accuracy[(accuracy["manifest"] == manifest) & (accuracy["side"] == side)]
        for index, (name, style) in enumerate(curves.styles.items()):
            offset = spread * ((index + 0.5) / len(curves.styles) - 0.5)
            values = part[part["method"] == name].sort_values("threshold")
            axes.plot(values["threshold"] + offset, values["value"], **style)
            axes.vlines(
                values["threshold"] + offset, values["low"], values["high"], color=style["color"], linewidth=0.8
            )
        counts = part.groupby("threshold")["num_samples"].max()
        axes.set_xticks(ticks, [f"{tick:g}\n{counts.get(tick, 0):,}" for tick in ticks])
        axes.set_xlim(ticks[0] - 0.75 * spread, ticks[-1] + 0.75 * spread)
        title = f"{manifest}: {side}" if len(manifests) > 1 else str(side)
        _title(axes, title, width=(WIDTH - 0.8) / len(sides))
    figure.supylabel("accuracy, 95% interval", fontsize=SIZE)
    for axes in panels[-1]:
        axes.set_xlabel("dominated by more than T\nand test samples")
    _curve_legend(figure, curves)
    return figure


def draw_missing(tables: FigureTables, modalities: Sequence[str]) -> Figure:
    """Draw the accuracy over the share of test samples without a modality, a panel per manifest and modality."""
    missing, manifests_of_methods = tables.missing, accuracies(tables)["manifest"]
    shown = missing[missing["manifest"].isin(manifests_of_methods) & missing["modality"].isin(modalities)]
    is_shown = (shown["kind"] == "method") | shown["method"].isin(tables.unimodal_methods)
    curves = _choose_curves(tables).only(shown[is_shown]["method"].unique().tolist())
    shown = shown[shown["method"].isin(curves.styles)]
    manifests = shown["manifest"].unique().tolist()
    panels = [(manifest, name) for name in modalities for manifest in manifests]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    height = 2.0 if columns == 1 else 1.6
    figure = Figure(figsize=(WIDTH, _legend_height(curves) + 0.3 + height * rows))
    all_axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    for axes, (manifest, modality) in zip(all_axes, panels, strict=False):
        part = shown[(shown["manifest"] == manifest) & (shown["modality"] == modality)]
        for name, style in curves.styles.items():
            values = part[part["method"] == name].sort_values("rate")
            axes.plot(100 * values["rate"], values["accuracy"], markevery=2, **style)
            axes.fill_between(
                100 * values["rate"], values["low"], values["high"], color=style["color"], alpha=0.12, lw=0
            )
        axes.set_xticks([0, 50, 100], ["0%", "50%", "100%"])
        axes.tick_params(labelbottom=True)
        words = [str(manifest)] * (len(manifests) > 1) + [str(modality)] * (len(modalities) > 1)
        _title(axes, ": ".join(words), is_needed=bool(words), width=(WIDTH - 0.8) / columns)
    what = modalities[0] if len(modalities) == 1 else "the modality"
    figure.supylabel("accuracy, 95% interval", fontsize=SIZE)
    for axes in all_axes[len(panels) - columns : len(panels)]:
        axes.set_xlabel(
            "\n".join(textwrap.wrap(f"test samples without {fit_names([what], 1.2, size=SIZE)[0]}", 24 * (3 - columns)))
        )
    _curve_legend(figure, curves)
    return figure


def _title(axes: Axes, text: str, *, is_needed: bool = True, width: float = WIDTH - 0.5) -> None:
    if is_needed and text:
        axes.set_title(fit_names([text], width, size=SIZE)[0], pad=3)
