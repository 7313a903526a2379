"""Figures of the width of a column of a paper: style, legend, and the tables that figures of a comparison show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...audit.figure_style import canvas, fit_names, text_width

WIDTH = 3.3  # inches, a column of a paper of two columns
SIZE = 7  # points, of all text
LABEL_WIDTH = 1.3  # inches, of the names beside a plot
_HANDLE_WIDTH = 0.34  # inches, of a line in a legend
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


@contextmanager
def column_canvas(tables: FigureTables) -> Iterator[None]:
    """Apply the style of the figures, with fonts for the names of the tables."""
    with canvas(tables.texts()):
        matplotlib.rcParams.update(_STYLE)
        matplotlib.rcParams["font.family"] = [*matplotlib.rcParams["font.family"], "sans-serif"]  # of other machines
        yield


def place_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Place a legend above the plot, in as many columns as fit."""
    labels, columns = legend_layout([str(handle.get_label()) for handle in handles])
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def legend_layout(names: Sequence[str]) -> tuple[list[str], int]:
    """Return the names cut to fit, and the number of columns: at least two for more than three names."""
    room = WIDTH - 0.15 if len(names) <= 3 else (WIDTH - 0.15) / 2
    labels = fit_names(names, room - _HANDLE_WIDTH - 0.1, size=SIZE)
    widest = max(text_width(text, size=SIZE) for text in labels) + _HANDLE_WIDTH + 0.1
    return labels, max(1, min(len(names), int((WIDTH - 0.15) / widest)))
