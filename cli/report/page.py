"""The report: one self-contained HTML page with its sentences, report.json and figures.

Each step uses only the result of the one before: files of the run -> numbers (report.json) -> figures -> page.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...audit.errors import RunError
from ...audit.scores.mixture import Mixture
from ...audit.storage import atomic_write, read_json, read_parquet, write_json, write_text
from ...train.config import MIN_VALIDATION_SAMPLES
from ..provenance import own_record
from ..run import Run
from . import findings
from .findings import Numbers
from .outcomes import MAX_DETAILED, finetune_numbers, manifest_numbers
from .verdict import (
    amount,
    breakable,
    breakable_sentence,
    edge,
    gain,
    interval,
    level_of_chance,
    percent,
    probe_metric,
    signed,
    small,
    tested,
    verdict,
)

if TYPE_CHECKING:
    from jinja2 import Template

_TEMPLATE = "report.html.jinja"


def write_report(run: Run) -> Path:
    """Write report.html, report.json and figures/*.png from the files of a run, and return the path of the page.

    The same run gives the same bytes. Nothing is written before everything is computed; the page is written last.
    Raises RunError if the run is not scored.
    """
    from .figures import draw

    if own_record(run.folder)[0] is None:
        run.check_links()  # else an untrusted run could put the user's own files on the page
    numbers = report_numbers(run)
    figures = draw(numbers)
    page = render(numbers, figures)
    for name, image in figures.items():
        with atomic_write(run.figures / f"{name}.png") as temporary:
            temporary.write_bytes(image)
    for path in run.figures.glob("*.png"):
        if path.stem not in figures:
            path.unlink()  # its manifest or fine-tuning was removed
    write_json(numbers, run.report_file.with_suffix(".json"))
    write_text(page, run.report_file)
    return run.report_file


def report_numbers(run: Run) -> Numbers:
    """Return the content of report.json: all numbers of the page and the figures."""
    record, scores = run.record(), run.report_scores()
    if [modality["name"] for modality in record["modalities"]] != list(scores.modalities):
        raise RunError(f"the modalities of {run.record_file} differ from those of {run.scores_file}: rescore")
    of_run: dict[str, Any] = {"fingerprint": record["fingerprint"], "modalities": list(scores.modalities)}
    mixture = Mixture.from_json(read_json(run.mixture_file, error=RunError))
    quarantine, _ = read_parquet(run.quarantine_file, error=RunError)
    numbers = {
        "schema": "mmaudit.report/1",
        "facts": findings.facts(record, scores),
        "probe_report": findings.probe_report_numbers(record),
        "label_leaks": record["label_leaks"],
        "chance": chance_levels(record),
        "agreement": findings.agreement(scores),
        "discrepancy": findings.discrepancies(scores, bisections=record["bisections"]),
        "share_without_leader": findings.standing_out(scores),
        "gap": findings.gaps(scores, mixture, class_check=record["class_check"]["verdict"]),
        **{key: record[key] for key in ("margin_check", "balanced_side", "halves", "bisections")},
        "training": findings.training(scores),
        "values": findings.values(scores),
        "maps": findings.maps(scores),
        "classes": findings.class_numbers(scores),
        "samples": findings.sample_lists(scores),
        "quarantine": findings.quarantined(quarantine),
        "manifests": [manifest_numbers(path, fingerprint=record["fingerprint"]) for path in run.manifests()],
        "finetunes": [finetune_numbers(folder, run, **of_run) for folder in run.finetunes()],
        "comparisons": _comparisons(run),
        "recovery": run.recovery(),
        "max_detailed": MAX_DETAILED,
        "min_validation": MIN_VALIDATION_SAMPLES,
    }
    if len(scores) < record["counts"]["scored"]:
        numbers["sample"] = {"num_rows": len(scores), "num_scored": record["counts"]["scored"]}
    if "appended" in record:
        numbers["appended"] = record["appended"]
    return {**numbers, "verdict": verdict(numbers)}


def _comparisons(run: Run) -> list[Numbers]:
    """Return what is stated of each comparison of the run."""
    if not run.comparisons():
        return []  # without pandas and torch
    from .comparison_page import stated_of_comparison

    return [stated_of_comparison(path) for path in run.comparisons()]


def chance_levels(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of guessing by name: uniformly over the classes, and always the majority class.

    Of several labels, each is guessed by itself. The guess of a regression is the mean of the target.
    """
    chance = record["probe_report"]["chance"]
    if record["config"]["data"]["task"] == "regression":
        return {"mean": chance["majority"]}
    return {"uniform": chance["uniform"], "majority": chance["majority"]}


def render(numbers: Numbers, figures: dict[str, bytes]) -> str:
    """Return the page as HTML. Names and labels come from the user's data, so everything is escaped."""
    from .drawing import palette
    from .figures import coloured_names

    images = {name: _image(image) for name, image in figures.items()}
    page = _template().render(**numbers, images=images, colours=palette(coloured_names(numbers)))
    return page + "\n"


@cache
def _template() -> Template:
    filters: dict[str, Callable[..., Any]] = {
        "percent": percent,
        "interval": interval,
        "signed": signed,
        "small": small,
    }
    filters |= {"probe_metric": probe_metric, "gain": gain, "breakable": breakable}
    filters |= {"tested": tested, "level_of_chance": level_of_chance}
    filters |= {"breakable_sentence": breakable_sentence}
    filters |= {"thousands": "{:,}".format, "amount": amount, "edge": edge}
    return compile_template(_TEMPLATE, filters)


def compile_template(name: str, filters: Mapping[str, Callable[..., Any]]) -> Template:
    """Compile a template of this folder, which takes as long as three figures; undefined names are errors."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= filters
    return environment.get_template(name)


def _image(png: bytes) -> dict[str, Any]:
    """Return a figure's bytes in base64, and its size in CSS pixels, half that of the file."""
    width, height = struct.unpack(">II", png[16:24])
    return {"data": base64.b64encode(png).decode(), "width": width // 2, "height": height // 2}
