"""Tests of reproducibility: same bytes on one machine for any threads, folder, language, time zone or row order.

Every case runs the command line in its own process: score, split --balanced and a short finetune. The samples are so
few that the fits are sensitive to rounding.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import RATE, gaussian_table, picture
from scipy.io import wavfile

# Several commands in one process, because importing torch takes longest. Affinity is set before torch counts the cores.
# The bytes of reports, which take as long as the scores, are compared in tests/test_report.py.
SCRIPT = """
import json, os, sys
if sys.argv[1] == "one core":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from mmaudit.cli import scoring
from mmaudit.cli.main import app
if __name__ == "__main__":
    scoring._write_report = lambda run: run.report_file
    for words in json.loads(sys.argv[2]):
        app(words, standalone_mode=False)
"""
TWO = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
ELSEWHERE = {"LC_ALL": "C", "LANG": "de_DE.UTF-8", "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7", "workers": "2"}
CASES: dict[str, dict[str, str]] = {  # as much as possible differs in each, because each takes eight seconds
    "one core": {"OMP_NUM_THREADS": "4", **ELSEWHERE},
    "shuffled": {**TWO, "OMP_NUM_THREADS": "3", "PYTHONHASHSEED": "1"},
}


def run_all(data: Path, run: Path, *, case: str = "", workers: str = "0", **environment: str) -> Path:
    """Score, split and fine-tune in a separate process, and return the run folder."""
    common = ["--run", str(run), "--json"]
    score = ["score", str(data), "--num-workers", workers, "--set", "probe.repeats=2", *common]
    split = ["split", "--balanced", "--set", "split.tolerance=0.5", *common]
    tune = ["finetune", "--manifest", "balanced", "--name", "tuned", "--epochs", "2", "--num-workers", "0", *common]
    script = run.parent / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), case, json.dumps([score, split, tune])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return run


def read(file: Path) -> tuple[pa.Table, dict[bytes, bytes]]:
    """Read a table and its metadata."""
    table = pq.read_table(file)
    return table.replace_schema_metadata(None), table.schema.metadata or {}


def check_same(first: Path, second: Path, *, shuffled: bool) -> None:
    """Compare the files of two runs: bytes, or values for each id where the rows of one are shuffled."""
    for name in ("scores.parquet", "quarantine.parquet", "manifests/balanced.parquet"):
        (expected, expected_metadata), (table, found_metadata) = read(first / name), read(second / name)
        if shuffled:
            expected, table = expected.sort_by("sample_id"), table.sort_by("sample_id")
        assert expected.equals(table), name
        if not shuffled:
            assert expected_metadata == found_metadata, name
    names = ["mixture.json", "finetune/tuned/model.safetensors", "finetune/tuned/history.jsonl"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def write_clips(folder: Path) -> Path:
    """Write 48 short sounds and pictures of four classes, half of them hard to separate; one file is corrupt."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for number in range(48):
        label, noise = number % 4, 0.02 + 0.9 * rng.random()
        hertz = 400 + 40 * label + 60 * rng.standard_normal()
        wave = np.sin(2 * np.pi * hertz * np.arange(RATE // 4) / RATE) + noise * rng.standard_normal(RATE // 4)
        wavfile.write(folder / f"{number}.wav", RATE, (6_000 * wave).astype(np.int16))
        (folder / f"{number}.png").write_bytes(picture(label % 3 if rng.random() < 0.7 else 0, rng))
        rows.append([f"clip-{number:03d}", f"{number}.wav", f"{number}.png", f"class-{label}"])
    (folder / "5.wav").write_bytes(b"no sound")
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "audio_file_name", "image_file_name", "label"], *rows])
    return folder


def shuffle_clips(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    header, *rows = (source / "metadata.csv").read_text(encoding="utf-8").splitlines()
    order = np.random.default_rng(1).permutation(len(rows))
    lines = [header, *(rows[row] for row in order)]
    (target / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def write_features(path: Path) -> Path:
    """Write 90 samples of features that are mostly 0, as histograms are, in two row groups."""
    table = gaussian_table(num_samples=90, num_classes=5)
    rng = np.random.default_rng(2)
    for name in ("audio", "visual"):
        wide = np.stack(table[name].to_numpy()) @ rng.standard_normal((5, 60))
        wide = np.maximum(wide - 1.5, 0) * np.exp(rng.normal(0, 2, 60))
        vector = pa.FixedSizeListArray.from_arrays(pa.array(wide.ravel(), pa.float32()), 60)
        table = table.set_column(table.column_names.index(name), name, vector)
    pq.write_table(table, path, row_group_size=50)
    return path


def shuffle_features(source: Path, target: Path) -> Path:
    table = pq.read_table(source)
    pq.write_table(table.take(np.random.default_rng(1).permutation(len(table))), target, row_group_size=37)
    return target


@pytest.mark.slow  # quick twins: of rows and repetition in tests/test_score_dataset.py, of threads in test_workers.py
@pytest.mark.parametrize(
    ("write", "shuffle", "name", "cases"),
    [
        pytest.param(write_clips, shuffle_clips, "clips", [*CASES], id="clips"),
        pytest.param(write_features, shuffle_features, "features.parquet", [*CASES], id="features"),
    ],
)
def test_runs_are_byte_identical(
    write: Callable[[Path], Path],
    shuffle: Callable[[Path, Path], Path],
    name: str,
    cases: list[str],
    tmp_path: Path,
) -> None:
    data = write(tmp_path / name)
    first = run_all(data, tmp_path / "first")
    assert pc.count_distinct(pq.read_table(first / "scores.parquet")["confidence_audio"]).as_py() > 20
    for case in cases:
        environment, folder = CASES[case], tmp_path / case.replace(" ", "-")
        folder.mkdir()
        case_data = shuffle(data, folder / name) if case == "shuffled" else data
        second = run_all(case_data, folder / "run", case=case, **environment)
        check_same(first, second, shuffled=case == "shuffled")
