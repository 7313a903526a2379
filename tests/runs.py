"""Run folders for tests: small ones, records and copies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from conftest import gaussian_table

import mmaudit
from mmaudit.audit.errors import RunError
from mmaudit.audit.storage import read_json, write_json, write_text
from mmaudit.cli.provenance import sign_manifest, signed_record
from mmaudit.cli.run import RUN_SCHEMA, Run


def copy_run(source: Path, target: Path) -> Path:
    """Copy a run, and sign it and its manifests at the new path, so that they are trusted to name their data."""
    run = Run(Path(shutil.copytree(source, target)))
    record = read_json(run.record_file, error=RunError)
    write_json(signed_record(record, folder=run.folder, scores=run.scores_file), run.record_file)
    for path in run.manifests():
        sign_manifest(path, path, run=run.folder, scores=run.scores_file)
    return run.folder


def run_record(*, config: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Return a complete run.json of two modalities, with `changes` to its keys and `config` to its config sections."""
    sections = {
        "seed": 0,
        "data": {"task": "classification"},
        "media": {},
        "probe": {"repeats": 1, "learn_from": "all"},
        "network": {},
        "mixture": {},
    }
    gains = [{"name": name, "gain": 0.0, "low": 0.0, "high": 0.0} for name in ("audio", "visual")]
    calibration = {"temperature": 1.0, "ece_before": 0.1, "ece_after": 0.0, "ece_floor": 0.01, "num_rows": 10}
    probe_metrics = [
        {
            "name": name,
            "value": 0.5,
            "low": 0.4,
            "high": 0.6,
            "loss": 0.7,
            "beats_prior": True,
            "calibration": calibration,
        }
        for name in ("audio", "visual", "fused")
    ]
    record = {
        "schema": RUN_SCHEMA,
        "version": "0.1.0",
        "source": "data.parquet",
        "fingerprint": "f" * 32,
        "seed": 0,
        "config": sections | (config or {}),
        "modalities": [
            {"name": name, "kind": "features", "column": name, "length": 4, "preprocessing": ""}
            for name in ("audio", "visual")
        ],
        "columns": {},
        "code": {},
        "counts": {"input": 0, "scored": 0, "quarantined": 0},
        "quarantine": {},
        "num_classes": 0,
        "num_groups": None,
        "num_folds": 5,
        "probe_report": {
            "metric": "accuracy",
            "chance": {"uniform": 0.5, "majority": 0.5},
            "probe_metrics": probe_metrics,
            "gain_over_best": gains[0],
            "gains": gains,
            "controls": [],
        },
        "gap_verdict": "",
        "class_check": {"verdict": ""},
        "label_leaks": [],
        "margin_check": {"num_permutations": 20, "num_bimodal": None, "survives": False},
        "balanced_side": None,
        "halves": {"num_rows": 0, "reason": "", "reliability": [{"modality": "audio", "r": 0.5, "z": 9.0}]},
        "bisections": None,
        "seconds": {},
    }
    return record | changes


def write_empty_report(run: Run) -> Path:
    """Write an empty report in place of figures, which take most of the time of so small a run."""
    write_json({"verdict": {"headline": "", "warnings": []}}, run.report_file.with_suffix(".json"))
    write_text("", run.report_file)
    return run.report_file


def score_all_and_few(folder: Path) -> Path:
    """Score 240 samples in a folder, and return the run, with the manifests `all` and `few`."""
    pq.write_table(gaussian_table(num_samples=240), folder / "data.parquet")
    run = folder / "run"
    mmaudit.score(folder / "data.parquet", run=run, repeats=1, learn_from="train", num_workers=0, progress=False)
    mmaudit.split(run=run, subset="most-balanced:100%", name="all")
    mmaudit.split(run=run, subset="most-balanced:60%", name="few")
    return run
