"""Accuracy of all stages on real datasets, as a Markdown table; exit code 1 if a bound is missed.

Run with: make real DATA=FOLDER. FOLDER holds av-digits/, av-digits-graded/, grid-digits/, ravdess/ravdess.parquet and
mfeat/mfeat.parquet. Each dataset is scored, split and fine-tuned by the commands of the command line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row of the table: the dataset, and the out-of-fold accuracy that each modality must reach or stay below."""

    name: str
    data: str
    words: tuple[str, ...] = ()
    at_least: dict[str, float]
    below: dict[str, float]
    num_modalities: int = 2
    planted: tuple[str, str, float] | None = None  # columns, and the least Spearman of the discrepancy with rank - rank


CASES = (
    Case(name="keypad (demo)", data="", at_least={}, below={}),
    Case(name="av-digits", data="av-digits", at_least={"audio": 0.95, "image": 0.90}, below={}),
    Case(
        name="av-digits by speaker",
        data="av-digits",
        words=("--group", "speaker"),
        at_least={"image": 0.90},
        below={"audio": 0.90},
    ),
    Case(name="grid-digits", data="grid-digits", at_least={"audio": 0.97, "visual": 0.50}, below={}),
    Case(
        name="ravdess by actor",
        data="ravdess/ravdess.parquet",
        words=("--group", "actor", "--modality", "audio=audio", "--modality", "video=video"),
        at_least={"audio": 0.567, "video": 0.560},
        below={},
    ),
    Case(
        name="av-digits-graded",
        data="av-digits-graded/av-digits-graded.parquet",
        words=("--modality", "audio=audio", "--modality", "image=image"),
        at_least={"audio": 0.725, "image": 0.809},
        below={},
        planted=("snr_db", "image_energy", 0.455),
    ),
    Case(name="mfeat", data="mfeat/mfeat.parquet", at_least={}, below={}, num_modalities=6),
)


def main(folder: Path) -> int:
    print("| set | out-of-fold accuracy | balanced split | test accuracy (chance) | seconds | met |")
    print("|---|---|---|---|---|---|")
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            row, holds = demo(Path(scratch)) if not case.data else measure(case, folder, Path(scratch))
            missed += not holds
            print(f"| {case.name} | {row} | {'yes' if holds else 'NO'} |", flush=True)
    return int(missed > 0)


def demo(scratch: Path) -> tuple[str, bool]:
    started = time.monotonic()
    result = mmaudit("demo", str(scratch / "keypad"))
    spearman, distance = result["recovery"]["spearman"], result["distance"]
    row = f"Spearman with the planted discrepancy {spearman:.3f} | {result['kept']} kept, distance {distance:.3f}"
    return f"{row} | - | {time.monotonic() - started:.0f}", spearman >= 0.80 and distance <= 0.05


def measure(case: Case, folder: Path, scratch: Path) -> tuple[str, bool]:
    started = time.monotonic()
    run = ["--run", str(scratch / case.name.replace(" ", "-"))]
    probe_report = mmaudit("score", str(folder / case.data), *case.words, *run)["probe_report"]
    split = mmaudit("split", "--balanced", *run)
    metrics = mmaudit("finetune", "--manifest", "balanced", *run)
    tested, chance = metrics["test"]["all"]["branches"]["fused"], metrics["chance"]["majority"]
    probes = {probe["name"]: probe["value"] for probe in probe_report["probe_metrics"]}
    holds = (
        all(probes[name] >= bound for name, bound in case.at_least.items())
        and all(probes[name] < bound for name, bound in case.below.items())
        and len(probes.keys() - {"fused", "joint"}) == case.num_modalities
        and tested["accuracy_low"] > 2 * chance
        and all(metrics["test"][name]["n"] > 0 for name in ("in-manifest", "balanced-within-0.2"))
    )
    accuracies = ", ".join(f"{name} {value:.3f}" for name, value in probes.items())
    if case.planted is not None:
        spearman = correlation_with_ranks(folder / case.data, Path(run[1]) / "scores.parquet", *case.planted[:2])
        accuracies, holds = f"{accuracies}; Spearman {spearman:.3f}", holds and spearman >= case.planted[2]
    cells = [
        accuracies,
        f"{split['kept']} of {split['scored']} ({split['between']}), distance {split['after']['distance']:.3f}",
        f"{tested['accuracy']:.3f} ({chance:.3f}), n = {metrics['test']['all']['n']}",
        f"{time.monotonic() - started:.0f}",
    ]
    return " | ".join(cells), holds


def correlation_with_ranks(data: Path, scores: Path, first: str, second: str) -> float:
    """Return Spearman's correlation of the discrepancy with the difference of the ranks of two columns."""
    truth = pd.read_parquet(data, columns=["id", first, second]).set_index("id")
    discrepancies = pd.read_parquet(scores, columns=["sample_id", "discrepancy"]).set_index("sample_id")
    truth = truth.loc[discrepancies.index]
    return float(discrepancies["discrepancy"].corr(truth[first].rank() - truth[second].rank(), method="spearman"))


def mmaudit(*words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "mmaudit", *words, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make real DATA=FOLDER")
    sys.exit(main(Path(sys.argv[1])))
