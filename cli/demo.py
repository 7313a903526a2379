"""The demo: is what was planted found again?"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..audit.locks import write_lock
from ..audit.storage import write_json
from ..audit.workers import Progress, silent
from .config import RunConfig
from .keypad import KeypadConfig, recovery, write_keypad
from .manifests import split
from .run import Run
from .stages import report, score
from .training import finetune


def demo(
    folder: str | Path = "mmaudit-demo",
    *,
    num_samples: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the planted set into `folder`, run the whole line on it in folder/run, and give what was recovered.

    No probe learns from a test sample here, so that the fine-tunings compare cleanly.
    """
    with write_lock(Path(folder), command="mmaudit demo"):
        return _demo(Path(folder), num_samples=num_samples, seed=seed, progress=progress)


def _demo(folder: Path, *, num_samples: int | None, seed: int, progress: Progress) -> dict[str, Any]:
    place = Run.open(folder / "run")
    config = RunConfig(seed=seed)
    config = replace(config, probe=replace(config.probe, learn_from="train"))
    data = write_keypad(folder, config=KeypadConfig(num_samples=num_samples), seed=seed)
    score(data, run=place.folder, config=config, progress=progress)
    found = asdict(recovery(folder / "truth.parquet", place.scores()))
    write_json({**found, "interval": list(found["interval"])}, place.recovery_file)
    summary = split(run=place.folder, config=config, balanced=True)
    split(run=place.folder, config=config, gmm="balanced")
    for sampling in ("uniform", "bss-h"):
        chosen = replace(config, finetune=replace(config.finetune, sampling=sampling))
        finetune("balanced", run=place.folder, config=chosen, progress=progress)
    page = report(run=place.folder)
    distance = summary["after"]["distance"]
    return {"recovery": found, "kept": summary["kept"], "distance": distance, "report": str(page)}
