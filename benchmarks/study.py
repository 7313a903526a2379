"""`mmaudit study` on the demo set, on av-digits-graded made lopsided in a known measure, and on ravdess.

Run with: make study DATA=FOLDER, or python benchmarks/study.py [FOLDER] [--seeds 5] [--set NAME ...] [--method ...]
FOLDER holds ravdess/ and av-digits-graded/; sets that it lacks are skipped. The runs are in --out, where an interrupted
study goes on; the page is copied to study-results.md in the folder --page, and its figures to study/. Exit code 1 if a
method is not better than on shuffled labels.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmaudit.audit.hashing import hash_rank
from mmaudit.audit.storage import write_parquet
from mmaudit.cli.demo import KeypadConfig, write_keypad
from mmaudit.cli.progress import configure_logging
from mmaudit.cli.study.steps import Execution, StudyPlan, StudySet, default_methods
from mmaudit.cli.study.study import study_sets

EPOCHS = 30
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DEGRADED_SHARE = 0.5
# A ResNet-18 of a quarter of the channels, 20 epochs in place of 120: minutes on two cores. Digits are not flipped.
RESNET = {
    "data.encoder": ["audio=resnet18", "image=resnet18"],
    "probe.repeats": 1,
    "network.width": 0.25,
    "network.epochs": 20,
    "network.lr_step": 12,
    "network.min_crop": 0.7,
    "network.flip": False,
}


def scaled_settings(epochs: int) -> dict[str, int]:
    """Return settings with schedules of papers, which train for 70 to 120 epochs, scaled to these trainings."""
    return {
        "finetune.epochs": epochs,
        "order.grow_epochs": max(1, epochs // 3),
        "balancing.ogm.last_epoch": epochs,
        "balancing.pmr.last_epoch": epochs,
        "balancing.gmm.warmup_epochs": max(1, epochs // 10),
    }


def find_sets(data: Path | None, scratch: Path) -> Iterator[StudySet]:
    """Yield the sets that are there, and write those that are made here; name those that are not."""
    yield demo_set(scratch / "demo-data")
    for name, make in (("av-digits-graded", lopsided_set), ("ravdess", ravdess_set)):
        file = None if data is None else data / name / f"{name}.parquet"
        if file is None or not file.exists():
            print(f"{name} is skipped: {file or 'no DATA folder'} does not exist")
        else:
            yield make(file, scratch)


def demo_set(folder: Path) -> StudySet:
    data = write_keypad(folder, config=KeypadConfig(), seed=0)
    text = (
        "Images of digits and the telephone tones of their keys, each with noise of a known level: the planted "
        "discrepancy is the quality of the sound minus that of the image."
    )
    return StudySet(
        name="demo",
        data=data,
        settings={},
        truth=folder / "truth.parquet",
        truth_text=text,
        probes={"resnet18": RESNET},
    )


def lopsided_set(file: Path, scratch: Path) -> StudySet:
    """Exchange a share of the audio features of half of the samples; strength 1 leaves nothing of the sample's own."""
    folder = scratch / "lopsided-data"
    table = pd.read_parquet(file)
    data, truth = folder / "lopsided.parquet", folder / "truth.parquet"
    if not data.exists():
        audio = np.array(table["audio"].tolist())
        strength, audio = degrade(table["id"].tolist(), audio, table["split"] + table["speaker"], seed=0)
        columns = {name: table[name].tolist() for name in ("id", "label", "split", "speaker")}
        columns |= {"audio": list(audio), "image": table["image"].tolist()}
        planted = {"sample_id": table["id"].tolist(), "discrepancy": (0.0 - strength).tolist()}
        write_parquet(pa.table(planted), truth, provenance={})
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), data)
    text = (
        f"av-digits-graded, in which {DEGRADED_SHARE:.0%} of the samples, at random, have a share of 25, 50, 75 or "
        "100% of their audio features exchanged for those of another sample of the same speaker and split. The planted "
        "discrepancy is minus that share. The noise that the set has in itself is not part of it, so that the rank "
        "agreement with it cannot be 1."
    )
    settings = {"data.modality": ["audio=audio", "image=image"], "data.group": "speaker"}
    return StudySet(name="lopsided", data=data, settings=settings, truth=truth, truth_text=text)


def degrade(ids: list[str], features: np.ndarray, unit: pd.Series, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the strength of each sample (n,), and the features (n, d), a share `strength` of which is another's."""
    n, d = features.shape
    rank = np.argsort(np.argsort(hash_rank(ids, seed=seed, purpose="degraded")))
    is_degraded = rank < round(DEGRADED_SHARE * n)
    strength = np.where(is_degraded, np.array(STRENGTHS[1:])[rank % (len(STRENGTHS) - 1)], 0.0)
    rng = np.random.default_rng(seed)
    order = np.argsort(np.array(ids, dtype=str))
    changed = features.copy()
    for rows in (order[(unit == value).to_numpy()[order]] for value in sorted(set(unit))):
        for row in rows[strength[rows] > 0]:
            partner = rows[rng.integers(len(rows))]
            columns = rng.permutation(d)[: round(strength[row] * d)]
            changed[row, columns] = features[partner, columns]
    return strength, changed


def ravdess_set(file: Path, scratch: Path) -> StudySet:
    del scratch
    settings = {"data.modality": ["audio=audio", "video=video"], "data.group": "actor"}
    other = {"data.modality": ["audio=audio_env", "video=video"]}
    return StudySet(name="ravdess", data=file, settings=settings, probes={"other audio features": other})


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path, nargs="?", default=None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=None, help="names of sets; by default all")
    parser.add_argument("--method", nargs="*", default=None, help="methods, the baseline first; by default all")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, default=Path("mmaudit-study"))
    parser.add_argument("--page", type=Path, default=None, help="folder to copy the page to")
    options = parser.parse_args()
    configure_logging(logging.INFO)
    sets = [entry for entry in find_sets(options.data, options.out) if options.set is None or entry.name in options.set]
    plan = StudyPlan.of(
        options.method or default_methods(),
        seeds=options.seeds,
        probes=(),
        config=None,
        settings=scaled_settings(options.epochs),
    )
    execution = Execution(jobs=options.jobs, seed=0, device="cpu", num_workers=None, progress=sys.stderr.isatty())
    result = study_sets(sets, plan, options.out, execution)
    if options.page is not None:
        shutil.copy(result.page, options.page / "study-results.md")
        shutil.copytree(options.out / "study", options.page / "study", dirs_exist_ok=True)
    rows = [row for entry in result.numbers["sets"].values() for row in entry["shuffled"]]
    return int(not all(row["above"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
