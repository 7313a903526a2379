"""The report: one self-contained HTML page, with report.json and figures.

Three steps, each from the one before: the run's files -> numbers (report.json) -> figures -> page.
"""

from __future__ import annotations

import base64
import struct
from pathlib import Path
from typing import Any

from ...audit.errors import RunError
from ...audit.parquet import read_parquet
from ...audit.scores.mixture import Mixture
from ...audit.storage import atomic_write, read_json, write_json, write_text
from ...train.config import LEAST_VALIDATION
from ..run import Run
from ..trust import own_record
from .examples import class_numbers, sample_lists
from .findings import (
    Numbers,
    agreement,
    discrepancies,
    facts,
    gaps,
    maps,
    probe_report_numbers,
    quarantined,
    standing_out,
    training,
    values,
)
from .outcomes import MOST_DETAILED, finetune_numbers, manifest_numbers
from .verdict import interval, percent, signed, small, verdict

_TEMPLATE = "report.html.jinja"


def write_report(run: Run) -> Path:
    """Write report.html, report.json and figures/*.png from what the run folder holds, and give the page's path.

    The same run gives the same bytes. Nothing is written before all of it is made, and the page comes last.
    Raises RunError where nothing has been scored.
    """
    from .figures import draw

    if own_record(run.folder)[0] is None:
        run.check_links()  # else a run of others could put the user's own files on the page
    numbers = report_numbers(run)
    figures = draw(numbers)
    page = render(numbers, figures)
    for name, image in figures.items():
        with atomic_write(run.figures / f"{name}.png") as temporary:
            temporary.write_bytes(image)
    for path in run.figures.glob("*.png"):
        if path.stem not in figures:
            path.unlink()  # of a manifest or fine-tuning that is gone
    write_json(numbers, run.report_file.with_suffix(".json"))
    write_text(page, run.report_file)
    return run.report_file


def report_numbers(run: Run) -> Numbers:
    """Give the content of report.json: every number that the page shows and the figures draw."""
    record, scores = run.record(), run.scores()
    if [modality["name"] for modality in record["modalities"]] != list(scores.modalities):
        raise RunError(f"{run.record_file} is of other modalities than {run.scores_file}: rescore")
    mixture = Mixture.from_json(read_json(run.mixture_file, error=RunError))
    quarantine, _ = read_parquet(run.quarantine_file, error=RunError)
    numbers = {
        "schema": "mmaudit.report/1",
        "facts": facts(record, scores),
        "probe_report": probe_report_numbers(record),
        "agreement": agreement(scores),
        "discrepancy": discrepancies(scores),
        "none_ahead": standing_out(scores),
        "gap": gaps(scores, mixture, class_check=record["class_check"]["verdict"]),
        "training": training(scores),
        "values": values(scores),
        "maps": maps(scores),
        "classes": class_numbers(scores),
        "samples": sample_lists(scores),
        "quarantine": quarantined(quarantine),
        "manifests": [manifest_numbers(path, fingerprint=record["fingerprint"]) for path in run.manifests()],
        "finetunes": [finetune_numbers(folder, run) for folder in run.finetunes()],
        "recovery": run.recovery(),
        "most_detailed": MOST_DETAILED,
        "least_validation": LEAST_VALIDATION,
    }
    return {**numbers, "verdict": verdict(numbers)}


def render(numbers: Numbers, figures: dict[str, bytes]) -> str:
    """Give the page. Names and labels are the user's data and not to be trusted: everything is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from .canvas import palette

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "interval": interval,
        "accuracy": _accuracy,
        "probe_metric": _probe_metric,
        "gain": _gain,
        "signed": signed,
        "small": small,
        "thousands": _thousands,
        "amount": _amount,
        "edge": _edge,
    }
    modalities = [modality["name"] for modality in numbers["facts"]["modalities"]]
    images = {name: _image(image) for name, image in figures.items()}
    page = environment.get_template(_TEMPLATE).render(**numbers, images=images, colours=palette(modalities))
    return page + "\n"


def _image(png: bytes) -> dict[str, Any]:
    """Give what the page needs of a figure: its bytes in base64, and its size on the page, half that of the file."""
    width, height = struct.unpack(">II", png[16:24])
    return {"data": base64.b64encode(png).decode(), "width": width // 2, "height": height // 2}


def _accuracy(found: dict[str, Any]) -> str:
    """Write an accuracy with its interval, in percent."""
    low, high = 100 * found["accuracy_low"], 100 * found["accuracy_high"]
    return f"{100 * found['accuracy']:.1f} [{low:.1f}, {high:.1f}]"


def _probe_metric(found: dict[str, Any], metric: str) -> str:
    """Write a probe's standing with its interval: a share in percent, R^2 as it is."""
    scale, digits = (1, 2) if metric == "R^2" else (100, 1)
    value, low, high = (f"{scale * found[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _gain(found: dict[str, Any], metric: str) -> str:
    """Write what something adds, with its interval: a share in points, R^2 as it is."""
    scale, digits = (1, 2) if metric == "R^2" else (100, 1)
    value, low, high = (signed(scale * found[key], digits) for key in ("gain", "low", "high"))
    return f"{value}{'' if metric == 'R^2' else ' points'} [{low}, {high}]"


def _thousands(value: int) -> str:
    return f"{value:,}"


def _amount(value: float) -> str:
    """Write a count that need not be whole: below 10 with a decimal."""
    return f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"


def _edge(value: float) -> str:
    """Write the edge of a bin: no more digits than it has, four at most, and a minus as long as a plus."""
    return f"{round(value, 4) + 0.0:g}".replace("-", "−")
