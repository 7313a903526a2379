"""The page of a comparison: verdicts in words first, then findings, tables and figures.

`compare.html` is self-contained; `compare.json` holds what the report of the run states of the comparison; `figures/`
has the figures as SVG and PDF.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from ...audit.errors import RunError
from ...audit.parsing import RequiredKeys
from ...audit.storage import atomic_write, read_json, write_json, write_text
from ...train.comparison.metrics import CLASS_PREFIX
from ...train.comparison.verdicts import Comparison
from ...train.difference import NO_VERDICT, format_p
from .findings import Numbers
from .page import compile_template
from .verdict import breakable, breakable_sentence, signed

if TYPE_CHECKING:
    from jinja2 import Template

_TEMPLATE = "compare.html.jinja"
PAGE, STATED = "compare.html", "compare.json"
MAX_SENTENCES = 12  # of verdicts in words; the table has all
MAX_CLASSES = 20  # columns of classes; metrics.parquet has all
_SCALE = 1.45 * 96 / 72  # CSS pixels per point of a figure: text of 7 points is about as large as that of the page
STATED_KEYS = RequiredKeys(
    name=str, baseline=str, headline=str, sentences=[str], verdicts=[str], warnings=[str], num_trainings=int
)


def write_comparison_page(comparison: Comparison, folder: Path, *, command: str) -> Path:
    """Write compare.html, compare.json and figures/ to the folder of a comparison, and return the path of the page.

    command: the command that makes the comparison again. The same comparison gives the same bytes; the page is last.
    """
    from ...train.comparison.figures import draw_files

    numbers, files = comparison_numbers(comparison, command=command), draw_files(comparison.figure_tables())
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with atomic_write(figures / _file_name(name)) as temporary:
            temporary.write_bytes(content)
    for path in [*figures.glob("*.svg"), *figures.glob("*.pdf")]:
        if path.name not in map(_file_name, files):
            path.unlink()  # of a modality or subset that the comparison no longer has
    images = {name.removesuffix(".svg"): content for name, content in files.items() if name.endswith(".svg")}
    page = render_comparison(numbers, images)
    write_json({key: numbers[key] for key in STATED_KEYS}, folder / STATED)
    write_text(page, folder / PAGE)
    return folder / PAGE


def stated_of_comparison(path: Path) -> Numbers:
    """Return what compare.json states, for the report of the run, with the name of its folder and the page's address.

    The page itself is not part of the report: with its figures it is as large as the report, and it stands alone.
    """
    stated = read_json(path, error=RunError, shape=STATED_KEYS)
    folder = path.parent.name
    return {**{key: stated[key] for key in STATED_KEYS}, "name": folder, "href": f"compare/{quote(folder)}/{PAGE}"}


def _file_name(name: str) -> str:
    """Return the name of a figure's file; names of modalities may have characters that names of files lack."""
    return re.sub(r"[^\w.+=-]", "_", name)


def render_comparison(numbers: Numbers, images: Mapping[str, bytes]) -> str:
    """Return the page as HTML from the numbers and the figures in SVG. Names of the user's data are escaped."""
    return _template().render(**numbers, images={name: _image(svg) for name, svg in images.items()}) + "\n"


@cache
def _template() -> Template:
    filters: dict[str, Callable[..., Any]] = {"breakable": breakable, "breakable_sentence": breakable_sentence}
    filters |= {"points": points, "points_interval": points_interval, "share": share}
    filters |= {"share_interval": share_interval, "thousands": "{:,}".format, "p": _p, "minus": minus}
    return compile_template(_TEMPLATE, filters)


def _image(svg: bytes) -> dict[str, Any]:
    """Return a figure in base64, and its size in CSS pixels."""
    match = re.search(rb'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    width, height = (0.0, 0.0) if match is None else map(float, match.groups())
    return {
        "data": base64.b64encode(svg).decode(),
        "width": round(_SCALE * width),
        "height": round(_SCALE * height),
    }


def points(value: float) -> str:
    """Format a difference of shares in points, with its sign."""
    return signed(100 * value, 1)


def points_interval(row: Mapping[str, Any]) -> str:
    """Format a difference with its interval in points; without one where there is no variance of training."""
    if np.isnan(row["p"]):
        return points(row["difference"])
    return f"{points(row['difference'])} [{points(row['low'])}, {points(row['high'])}]"


def share(value: float | None) -> str:
    """Format a share with three decimals."""
    return "" if value is None or np.isnan(value) else f"{value:.3f}"


def share_interval(row: Mapping[str, Any]) -> str:
    """Format the interval of a share; nothing where there is none."""
    return "" if np.isnan(row["low"]) else f"[{row['low']:.3f}, {row['high']:.3f}]"


def _p(value: float) -> str:
    """Format a corrected p value; nothing where there is none."""
    return "" if np.isnan(value) else format_p(value)


def minus(sentence: str) -> str:
    """Return a sentence with minus signs in place of hyphens before numbers."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", sentence)


def comparison_numbers(comparison: Comparison, *, command: str) -> Numbers:
    """Return what the page shows: sentences, and one entry per manifest with its tables."""
    rows = comparison.summary[comparison.summary["subset"] == "all"]
    methods, unimodal = rows[rows["kind"] == "method"], comparison.against_unimodal()
    unimodal = unimodal[unimodal["subset"] == "all"]
    trainings = _trainings(comparison)
    sentences = dict(zip(rows.index, comparison.sentences(), strict=True))
    in_words = [sentences[index] for index in methods.index]
    clear = [sentences[index] for index in methods.index if methods.loc[index, "verdict"] in ("helps", "hurts")]
    return {
        "name": comparison.name,
        "baseline": comparison.baseline,
        "headline": headline(methods, comparison.baseline),
        "sentences": _summary_sentences(methods, comparison),
        "verdicts": in_words if len(in_words) <= MAX_SENTENCES else clear[:MAX_SENTENCES],
        "num_verdicts": len(in_words),
        "warnings": list(comparison.warnings),
        "findings": _findings(comparison),
        "manifests": [
            _manifest_numbers(comparison, manifest, rows=rows, unimodal=unimodal)
            for manifest in _manifests(comparison, rows)
        ],
        "selection": None if comparison.selection is None else comparison.selection.to_dict("records"),
        "diverged": [row for row in trainings if row["diverged"]],
        "trainings": trainings,
        "num_trainings": sum(len(row["seeds"]) + len(row["diverged"]) for row in trainings),
        "num_test": len(comparison.per_sample),
        "num_groups": None if comparison.group is None else len(set(comparison.group)),
        "command": command,
    }


def headline(methods: pd.DataFrame, baseline: str) -> str:
    """Return the verdicts on all test samples in one sentence."""
    if not len(methods):
        return "No two methods were trained: there is nothing to compare"
    if (methods["verdict"] == NO_VERDICT).all():
        return f"No verdict: whether a method differs from {baseline} cannot be shown"
    names = [f"{row['method']} on {row['manifest']}" if row["manifest"] else row["method"] for row in _dicts(methods)]
    parts = []
    for verdict, verb in (("helps", "help"), ("hurts", "hurt")):
        listed = [name for name, word in zip(names, methods["verdict"], strict=True) if word == verdict]
        if listed:
            parts.append(f"{_enumerate(listed)} {verdict if len(listed) == 1 else verb}")
    if not parts:
        return f"No evidence that any method differs from {baseline}"
    return f"{'; '.join(parts)} against {baseline}"


def _enumerate(names: Sequence[str]) -> str:
    """Join up to three names, or name two and count the others."""
    if len(names) > 3:
        return f"{names[0]}, {names[1]} and {len(names) - 2} others"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _summary_sentences(methods: pd.DataFrame, comparison: Comparison) -> list[str]:
    """Return how many comparisons show nothing, and what the design could have shown."""
    sentences = []
    unclear = methods[methods["verdict"] == "no evidence"]
    if len(unclear):
        low, high = points(unclear["difference"].min()), points(unclear["difference"].max())
        between = f"a difference of {low} points" if low == high else f"differences from {low} to {high} points"
        sentences.append(
            f"No evidence for {len(unclear)} of {len(methods)} comparisons with {comparison.baseline}, which have "
            f"{between}. That is not evidence of no effect."
        )
    effects = 100 * methods["smallest_effect"].dropna()
    if len(effects):
        span = (
            f" (median of {effects.min():.1f} to {effects.max():.1f})" if effects.max() - effects.min() >= 0.05 else ""
        )
        sentences.append(
            f"The smallest effect that this design shows with a probability of .8, after the correction, is "
            f"{effects.median():.1f} points{span}, with {len(comparison.per_sample):,} test samples"
            + ("." if comparison.group is None else f" of {len(set(comparison.group)):,} groups.")
        )
    return sentences


def _manifest_numbers(comparison: Comparison, manifest: str, *, rows: pd.DataFrame, unimodal: pd.DataFrame) -> Numbers:
    """Return the tables of a manifest."""
    metrics = _with_controls(comparison.metrics, rows, manifest)
    accuracy = metrics[metrics["metric"] == "accuracy"]
    is_class = accuracy["subset"].str.startswith(CLASS_PREFIX)
    missing = _with_controls(comparison.missing, rows, manifest)
    own = rows[rows["reference_manifest"] == manifest]
    baseline = comparison.correct.get((manifest, comparison.baseline))
    return {
        "name": manifest,
        "baseline_accuracy": None if baseline is None else float(baseline.mean()),
        "methods": _dicts(own[own["kind"] == "method"]),
        "controls": _dicts(own[own["kind"] == "control"]),
        "unimodal": _dicts(unimodal[unimodal["manifest"] == manifest]),
        "subsets": _pivot(accuracy[~is_class], column="subset", value="value"),
        "classes": _pivot(_first_classes(accuracy[is_class]), column="subset", value="value"),
        "num_classes": int(accuracy[is_class]["subset"].nunique()),
        "metrics": _pivot(metrics[metrics["subset"] == "all"], column="metric", value="value"),
        "missing": [
            {"modality": name, **_pivot(missing[missing["modality"] == name], column="rate", value="accuracy")}
            for name in missing["modality"].unique()
        ],
    }


def _manifests(comparison: Comparison, rows: pd.DataFrame) -> list[str]:
    """Return the manifests, without those that only control another one."""
    controlling = rows[rows["manifest"] != rows["reference_manifest"]]["manifest"].tolist()
    return [name for name in dict.fromkeys(manifest for manifest, _ in comparison.correct) if name not in controlling]


def _with_controls(table: pd.DataFrame, rows: pd.DataFrame, manifest: str) -> pd.DataFrame:
    """Return the rows of a manifest, then those of controls on other manifests, such as a random one."""
    others = rows[(rows["reference_manifest"] == manifest) & (rows["manifest"] != manifest)]["manifest"].unique()
    control = table[table["manifest"].isin(others)]
    renamed = control.assign(method=control["method"] + " on " + control["manifest"])
    return pd.concat([table[table["manifest"] == manifest], renamed])


def _first_classes(accuracy: pd.DataFrame) -> pd.DataFrame:
    return accuracy[accuracy["subset"].isin(accuracy["subset"].unique()[:MAX_CLASSES])]


def _pivot(table: pd.DataFrame, *, column: str, value: str) -> Numbers:
    """Return a table of methods by the values of a column, each cell with value, low and high; None where unknown."""
    columns = table[column].unique().tolist()
    cells = {(row["method"], row[column]): {"value": row[value], **row} for row in _dicts(table)}
    kinds = dict(zip(table["method"], table["kind"], strict=True))
    counts = [
        int(table[table[column] == name]["num_samples"].max()) if "num_samples" in table else None for name in columns
    ]
    return {
        "columns": [{"name": name, "n": count} for name, count in zip(columns, counts, strict=True)],
        "rows": [
            {"method": method, "kind": kind, "cells": [cells.get((method, name)) for name in columns]}
            for method, kind in kinds.items()
        ],
    }


def _trainings(comparison: Comparison) -> list[Numbers]:
    """Return seeds, diverged seeds, epochs and samples seen of each condition."""
    runs = comparison.runs[comparison.runs["subset"] == "all"]
    entries = []
    for (manifest, method), group in runs.groupby(["manifest", "method"], sort=False):
        is_diverged = group["status"] == "diverged" if "status" in group else pd.Series(False, index=group.index)
        finished = group[~is_diverged]
        entries.append(
            {
                "manifest": manifest,
                "method": method,
                "seeds": finished["seed"].tolist(),
                "diverged": group[is_diverged]["seed"].tolist(),
                **{key: _span(finished[key]) if key in finished else "" for key in ("epochs", "samples_seen")},
            }
        )
    return entries


def _span(values: pd.Series) -> str:
    """Format the smallest and the largest of several whole numbers."""
    if not len(values):
        return ""
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _findings(comparison: Comparison) -> list[Numbers]:
    """Return the findings by name and claim, each with its outcomes."""
    outcomes: dict[tuple[str, str], list[dict[str, str]]] = {}
    for finding in comparison.findings:
        outcomes.setdefault((finding.name, finding.claim), []).append(finding.to_dict())
    return [{"name": name, "claim": claim, "outcomes": rows} for (name, claim), rows in outcomes.items()]


def _dicts(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
