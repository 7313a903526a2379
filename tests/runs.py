"""Copies of run folders for the tests, signed as if they had been made where they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

from mmaudit.audit.errors import RunError
from mmaudit.audit.storage import read_json, write_json
from mmaudit.cli.run import Run
from mmaudit.cli.trust import sign_manifest, signed_record


def copy_run(source: Path, target: Path) -> Path:
    """Copy a run, and sign it and its manifests where they lie now, so that they name their data as before."""
    run = Run(Path(shutil.copytree(source, target)))
    record = read_json(run.record_file, error=RunError)
    write_json(signed_record(record, folder=run.folder, scores=run.scores_file), run.record_file)
    for path in run.manifests():
        sign_manifest(path, path, run=run.folder, scores=run.scores_file)
    return run.folder
