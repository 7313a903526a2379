"""Figures of a comparison for a column of a paper: forest plots, and accuracy by subset, threshold and missing share.

They are drawn from tables only, and the same tables give the same bytes. Text remains text, in SVG and in PDF.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..audit.figure_style import COLOURS, INK, PALE, SOFT, canvas, fit_names, text_width
from .comparison_metrics import CLASS_PREFIX

WIDTH = 3.3  # inches, a column of a paper of two columns
SIZE = 7  # points, of all text
MAX_CURVES = 8  # of a plot; more cannot be told apart by colour and marker
_SIDE = re.compile(r"(?P<side>.+)-(?:preferred|dominated-(?P<threshold>[\d.]+))")
_ROW_HEIGHT = 0.155  # inches, of a line of a forest plot
_LABEL_WIDTH = 1.3  # inches, of the names beside a plot
_HANDLE_WIDTH = 0.34  # inches, of a line in a legend
_MARKERS = ("s", "^", "D", "v", "P", "X", "*")
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize"), SIZE),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), SIZE),
    **{"lines.linewidth": 1.0, "lines.markersize": 3.5, "axes.linewidth": 0.6},
    **dict.fromkeys(("xtick.major.width", "ytick.major.width"), 0.6),
    **{
        "legend.borderaxespad": 0.2,
        "legend.columnspacing": 1.0,
        "legend.handlelength": 1.8,
        "legend.labelspacing": 0.3,
    },
    **{"svg.fonttype": "none", "svg.hashsalt": "mmaudit", "pdf.fonttype": 42},
}
# Marker, whether it is filled, and colour by verdict.
_VERDICTS: Mapping[str, tuple[str, bool, str]] = {
    "helps": ("^", True, COLOURS[0]),
    "hurts": ("v", True, COLOURS[1]),
    "no evidence": ("o", False, INK),
    "no verdict": ("D", False, SOFT),
}
_OF_CONTROL = {"better": "helps", "worse": "hurts"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FigureTables:
    """What figures are drawn from, with the columns of the tables of a comparison; a table may have no rows.

    unimodal: differences of the methods from the best unimodal model, with the columns of `summary`.
    unimodal_methods: names of the methods of one modality.
    """

    baseline: str
    summary: pd.DataFrame
    unimodal: pd.DataFrame
    unimodal_methods: frozenset[str]
    metrics: pd.DataFrame
    missing: pd.DataFrame

    def texts(self) -> Iterator[str]:
        """Yield the names that figures show."""
        for table in (self.summary, self.unimodal, self.metrics, self.missing):
            for column in ("manifest", "method", "reference", "reference_manifest", "subset", "modality"):
                if column in table:
                    yield from table[column].unique().tolist()


def figure_kinds(tables: FigureTables) -> list[str]:
    """Return the names of the figures that the tables have data for."""
    accuracy = _accuracies(tables)
    sides = accuracy["subset"].str.fullmatch(_SIDE.pattern) if len(accuracy) else pd.Series(dtype=bool)
    kinds = {
        "forest": len(_overall(tables.summary)),
        "forest-unimodal": len(_overall(tables.unimodal)),
        "subsets": len(accuracy),
        "threshold": sides.any(),
        "missing": len(tables.missing),
    }
    return [kind for kind, number in kinds.items() if number] + [f"missing-{name}" for name in _modalities(tables)]


def build_figure(tables: FigureTables, kind: str) -> Figure:
    """Draw one of `figure_kinds`."""
    with column_canvas(tables):
        if kind == "forest":
            return _forest(_overall(tables.summary))
        if kind == "forest-unimodal":
            return _forest(_overall(tables.unimodal), names_reference=True)
        if kind == "subsets":
            return _subsets(tables)
        if kind == "threshold":
            return _thresholds(tables)
        modalities = _modalities(tables)
        return _missing(tables, modalities if kind == "missing" else [kind.removeprefix("missing-")])


@contextmanager
def column_canvas(tables: FigureTables) -> Iterator[None]:
    """Apply the style of the figures, with fonts for the names of the tables."""
    with canvas(tables.texts()):
        matplotlib.rcParams.update(_STYLE)
        matplotlib.rcParams["font.family"] = [*matplotlib.rcParams["font.family"], "sans-serif"]  # of other machines
        yield


def draw_files(tables: FigureTables) -> dict[str, bytes]:
    """Draw all figures, by file name: NAME.svg and NAME.pdf, without dates and versions."""
    files = {}
    for kind in figure_kinds(tables):
        if kind == "missing":
            continue  # that of each modality is a file
        figure = build_figure(tables, kind)
        with column_canvas(tables):
            figure.draw_without_rendering()  # lays out; each file would do so again, for half of the time
            figure.set_layout_engine("none")
            for suffix, dates in (("svg", {"Date": None, "Creator": None}), ("pdf", {"CreationDate": None})):
                file = io.BytesIO()
                metadata = dates if suffix == "svg" else {**dates, "Creator": None, "Producer": None}
                figure.savefig(file, format=suffix, metadata=metadata)
                files[f"{kind}.{suffix}"] = file.getvalue()
    return files


def side_and_threshold(subset: str) -> tuple[str, float] | None:
    """Return modality and T of a subset dominated(T), T = 0 where it is preferred; None of another subset."""
    match = _SIDE.fullmatch(subset)
    return None if match is None else (match["side"], float(match["threshold"] or 0))


def _overall(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows on all test samples."""
    return table[table["subset"] == "all"] if len(table) else table


def _accuracies(tables: FigureTables) -> pd.DataFrame:
    """Return the accuracies of methods and unimodal models, on manifests of methods."""
    metrics = tables.metrics
    if not len(metrics):
        return metrics
    metrics = metrics[metrics["metric"] == "accuracy"]
    is_method = metrics["kind"] == "method"
    manifests = metrics[is_method]["manifest"].unique()
    return metrics[metrics["manifest"].isin(manifests) & (is_method | metrics["method"].isin(tables.unimodal_methods))]


def _modalities(tables: FigureTables) -> list[str]:
    return list(tables.missing["modality"].unique()) if len(tables.missing) else []


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
    accuracy = _accuracies(tables)
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


def _forest(rows: pd.DataFrame, *, names_reference: bool = False) -> Figure:
    """Draw differences with intervals, by manifest, methods before controls, with markers by verdict."""
    lines = list(_forest_lines(rows, names_reference=names_reference))
    names = [_label(row) for row in lines if not isinstance(row, str)]
    labels = dict(zip(names, fit_names(names, _LABEL_WIDTH, size=SIZE), strict=True))
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
    for manifest, group in rows.groupby("reference_manifest", sort=False):
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
    _legend(figure, handles)


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Place a legend above the plot, in as many columns as fit."""
    labels, columns = _legend_layout([str(handle.get_label()) for handle in handles])
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def _legend_layout(names: Sequence[str]) -> tuple[list[str], int]:
    """Return the names cut to fit, and the number of columns: at least two for more than three names."""
    room = WIDTH - 0.15 if len(names) <= 3 else (WIDTH - 0.15) / 2
    labels = fit_names(names, room - _HANDLE_WIDTH - 0.1, size=SIZE)
    widest = max(text_width(text, size=SIZE) for text in labels) + _HANDLE_WIDTH + 0.1
    return labels, max(1, min(len(names), int((WIDTH - 0.15) / widest)))


def _curve_legend(figure: Figure, curves: _Curves) -> None:
    """Name the curves above the plot, and write below it which were left out."""
    names = list(curves.styles)
    _legend(figure, [Line2D([], [], label=name, **curves.styles[name]) for name in names])
    if curves.note:
        figure.supxlabel("\n".join(textwrap.wrap(curves.note, 62)), fontsize=SIZE, x=0.02, ha="left", color=INK)


def _legend_height(curves: _Curves) -> float:
    """Return about the height in inches of legend and note."""
    _, columns = _legend_layout(list(curves.styles))
    return 0.14 * -(-len(curves.styles) // columns) + 0.11 * len(textwrap.wrap(curves.note, 62)) + 0.1


def _subsets(tables: FigureTables) -> Figure:
    """Draw the accuracy of each method by subset, with intervals; a panel per manifest."""
    accuracy, curves = _accuracies(tables), _choose_curves(tables)
    accuracy = accuracy[~accuracy["subset"].str.startswith(CLASS_PREFIX)]
    counts = accuracy.groupby("subset", sort=False)["num_samples"].max()
    manifests = accuracy["manifest"].unique()
    height = max(0.22, 0.075 * len(curves.styles) + 0.1)  # inches of a subset, whose intervals stay apart
    heights = [0.45 + height * len(counts)] * len(manifests)
    figure = Figure(figsize=(WIDTH, _legend_height(curves) + sum(heights)))
    labels = fit_names(counts.index.tolist(), _LABEL_WIDTH, size=SIZE)
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


def _thresholds(tables: FigureTables) -> Figure:
    """Draw the accuracy on dominated(T) over T, a panel per manifest and modality."""
    accuracy, curves = _accuracies(tables), _choose_curves(tables)
    places = accuracy["subset"].map(side_and_threshold)
    accuracy, places = accuracy[places.notna()], places[places.notna()]
    accuracy = accuracy.assign(side=[side for side, _ in places], threshold=[value for _, value in places])
    sides, ticks = accuracy["side"].unique().tolist(), sorted(accuracy["threshold"].unique())
    manifests = accuracy["manifest"].unique().tolist()
    figure = Figure(figsize=(WIDTH, _legend_height(curves) + 0.25 + 1.75 * len(manifests)))
    panels = figure.subplots(len(manifests), len(sides), sharey=True, sharex=True, squeeze=False)
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
        axes.tick_params(labelbottom=True)
        title = f"{manifest}: {side}" if len(manifests) > 1 else str(side)
        _title(axes, title, width=(WIDTH - 0.5) / len(sides))
    figure.supylabel("accuracy, 95% interval", fontsize=SIZE)
    for axes in panels[-1]:
        axes.set_xlabel("dominated by more than T\nand test samples")
    _curve_legend(figure, curves)
    return figure


def _missing(tables: FigureTables, modalities: Sequence[str]) -> Figure:
    """Draw the accuracy over the share of test samples without a modality, a panel per manifest and modality."""
    missing, manifests_of_methods = tables.missing, _accuracies(tables)["manifest"]
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
        _title(axes, ": ".join(words), is_needed=bool(words), width=(WIDTH - 0.5) / columns)
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
