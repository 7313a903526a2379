"""Figures of a comparison for a column of a paper, drawn from its tables only: the same tables give the same bytes.

Text remains text, in SVG and in PDF.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from .column_figure import FigureTables, column_canvas
from .curves import accuracies, draw_missing, draw_subsets, draw_thresholds, side_and_threshold
from .forest import draw_forest


def figure_kinds(tables: FigureTables) -> list[str]:
    """Return the names of the figures that the tables have data for."""
    accuracy = accuracies(tables)
    has_sides = len(accuracy) > 0 and accuracy["subset"].map(side_and_threshold).notna().any()
    kinds = {
        "forest": len(_overall(tables.summary)),
        "forest-unimodal": len(_overall(tables.unimodal)),
        "subsets": len(accuracy),
        "threshold": has_sides,
        "missing": len(tables.missing) and len(accuracy),
    }
    modalities = _modalities(tables) if kinds["missing"] else []
    return [kind for kind, number in kinds.items() if number] + [f"missing-{name}" for name in modalities]


def build_figure(tables: FigureTables, kind: str) -> Figure:
    """Draw one of `figure_kinds`."""
    with column_canvas(tables):
        return _build(tables, kind)


def _build(tables: FigureTables, kind: str) -> Figure:
    if kind == "forest":
        return draw_forest(_overall(tables.summary))
    if kind == "forest-unimodal":
        return draw_forest(_overall(tables.unimodal), names_reference=True)
    if kind == "subsets":
        return draw_subsets(tables)
    if kind == "threshold":
        return draw_thresholds(tables)
    return draw_missing(tables, _modalities(tables) if kind == "missing" else [kind.removeprefix("missing-")])


def draw_files(
    tables: FigureTables, kinds: Sequence[str] | None = None, *, formats: Sequence[str] = ("svg", "pdf")
) -> dict[str, bytes]:
    """Draw figures, by default all, by file name: KIND.svg and KIND.pdf, without dates and versions.

    Of a missing modality there is a figure per modality, and none of all modalities.
    """
    metadata: dict[str, dict[str, None]] = {
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    files = {}
    with column_canvas(tables):
        for kind in [name for name in figure_kinds(tables) if name != "missing"] if kinds is None else kinds:
            figure = _build(tables, kind)
            figure.draw_without_rendering()  # lays out; each file would do so again, for half of the time
            figure.set_layout_engine("none")
            for suffix in formats:
                file = io.BytesIO()
                figure.savefig(file, format=suffix, metadata=metadata[suffix])
                files[f"{kind}.{suffix}"] = file.getvalue()
    return files


def _overall(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows on all test samples."""
    return table[table["subset"] == "all"] if len(table) else table


def _modalities(tables: FigureTables) -> list[str]:
    return list(tables.missing["modality"].unique()) if len(tables.missing) else []
