"""Reads run folders with the tested mmaudit: a folder a line on standard input, a JSON list of refusals a line out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mmaudit


def refusals(run: Path) -> list[str]:
    """Return what mmaudit's own readers refuse of the files that lie under their final names."""
    refused = []
    if (run / "run.json").exists():
        try:
            mmaudit.read_scores(run / "scores.parquet")
        except Exception as error:
            refused.append(f"scores.parquet is refused: {error}")
    for path in sorted((run / "manifests").glob("*.parquet")):
        if path.name.startswith(".") or path.name.endswith(".dropped.parquet"):
            continue
        try:
            mmaudit.read_manifest(path)
            checked = mmaudit.verify(path, run=run, media=False)
        except Exception as error:
            refused.append(f"{path.name} is refused: {error}")
            continue
        if not checked.passed:
            refused.append(f"{path.name} is refused by verify: {checked.lines()}")
    return refused


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(refusals(Path(line.rstrip("\n")))), flush=True)
