"""Run folders, one file of which is damaged or of another shape."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import pyarrow.parquet as pq

from .manifests import change_manifest
from .mutate import mutate_bytes, mutate_json, mutate_text
from .scores import json_bytes, split_options
from .seeds import Seeds

_RUN_FILES = (
    "run.json",
    "run.json",
    "run.json",
    "mixture.json",
    "mixture.json",
    "scores.parquet",
    "quarantine.parquet",
    "manifests/balanced.parquet",
    "manifests/balanced.balance.json",
    "finetune/balanced-concat-uniform/metrics.json",
    "finetune/balanced-concat-uniform/metrics.json",
    "finetune/balanced-concat-uniform/history.jsonl",
    "finetune/balanced-concat-uniform/config.toml",
    "finetune/balanced-concat-uniform/model.safetensors",
    "finetune/balanced-concat-uniform/state/last.pt",
    "features/*/*.arrow",
    "report.json",
)


def run_folders(rng: Random, seeds: Seeds) -> list[str]:
    """Damage one file of a whole run folder, and run a command that reads it."""
    shutil.copytree(seeds.path("run"), "run", ignore=shutil.ignore_patterns("figures", "report.html"))
    pattern = rng.choice(_RUN_FILES)
    paths = sorted(Path("run").glob(pattern))
    if not paths:
        pattern, paths = "run.json", [Path("run/run.json")]
    _damage(rng, rng.choice(paths))
    return _run_command(rng, pattern, data=str(seeds.path("features.parquet")))


def _damage(rng: Random, path: Path) -> None:
    """Change a file in the ways of its format, replace it by something else, or damage its bytes."""
    change = rng.random()
    if change < 0.04:
        path.unlink()
        path.mkdir()
    elif change < 0.08:
        path.write_bytes(rng.choice((b"", b"null", b"[]", b"\x00" * 100, b"\xff\xfe")))
    elif path.suffix == ".json" and change < 0.9:
        path.write_bytes(json_bytes(mutate_json(rng, json.loads(path.read_bytes()))))
    elif path.suffix == ".jsonl" and change < 0.9:
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_bytes(b"\n".join(json_bytes(mutate_json(rng, json.loads(line))) for line in lines))
    elif path.suffix == ".toml":
        path.write_text(mutate_text(rng, path.read_text(encoding="utf-8")), encoding="utf-8", errors="replace")
    elif path.suffix == ".parquet" and change < 0.8:
        change_manifest(rng, path, metadata=rng.random() < 0.4 and b"mmaudit" in (pq.read_schema(path).metadata or {}))
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))


def _run_command(rng: Random, pattern: str, *, data: str) -> list[str]:
    """Return a command that reads the damaged file."""
    workers = ["--num-workers", "0"]
    score = ["score", data, "--group", "group", "--repeats", "1", *workers]
    tune = ["finetune", "--manifest", "balanced", "--epochs", "1", *workers, "--data", data]
    evaluate = ["evaluate", "balanced-concat-uniform", *workers, "--data", data]
    report, from_weights = ["report"], [*tune, "--name", "n", "--init", "balanced-concat-uniform"]
    readers: dict[str, tuple[list[str], ...]] = {
        "finetune": (report, evaluate, evaluate, tune, from_weights),
        "features": (score, tune, evaluate),
        "manifests": (report, ["verify", "balanced"], ["replay", "balanced"], evaluate),
    }
    commands = (
        report,
        ["split", *split_options(rng, [])],
        score,
        ["check", data, *workers],
        ["split", "--gmm", "balanced"],
    )
    return [*rng.choice(readers.get(pattern.partition("/")[0], commands)), "--run", "run"]
