"""The demo: is what was planted found again?"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

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
    place = Run(Path(folder) / "run")
    config = RunConfig(seed=seed)
    config = replace(config, probe=replace(config.probe, learn_from="train"))
    data = write_keypad(Path(folder), config=KeypadConfig(num_samples=num_samples), seed=seed)
    score(data, run=place.folder, config=config, progress=progress)
    found = asdict(recovery(Path(folder) / "truth.parquet", place.scores()))
    write_json({**found, "interval": list(found["interval"])}, place.recovery_file)
    summary = split(run=place.folder, config=config, balanced=True)
    split(run=place.folder, config=config, gmm="balanced")
    for sampling in ("uniform", "bss-h"):
        chosen = replace(config, finetune=replace(config.finetune, sampling=sampling))
        finetune("balanced", run=place.folder, config=chosen, progress=progress)
    page = report(run=place.folder)
    distance = summary["after"]["distance"]
    return {"recovery": found, "kept": summary["kept"], "distance": distance, "report": str(page)}
