"""Small manifests for tests."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmaudit.audit.dataset.dataset import open_dataset
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.features.encode import encode_dataset
from mmaudit.audit.features.encoded_samples import collect_encoded
from mmaudit.audit.features.encoders import preprocessing
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress
from mmaudit.cli.config import RunConfig
from mmaudit.rebalance.manifest import COLUMNS, Manifest


def make_manifest(
    n: int = 60, *, splits: tuple[str, ...] = ("train", "train", "train", "validation", "test"), seed: int = 0
) -> Manifest:
    """Build a manifest of ids s000, s001, ..., three classes, and these splits in turn."""
    rng = np.random.default_rng(seed)
    label = (np.arange(n) % 3).astype(np.int32)
    values: dict[str, Any] = {
        "sample_id": [f"s{number:03d}" for number in range(n)],
        "label": label,
        "label_name": [f"class-{code}" for code in label],
        "split": [splits[number % len(splits)] for number in range(n)],
        "subset": ["balanced"] * n,
        "bin": np.zeros(n, np.int16),
        "rank": rng.permutation(n).astype(np.int32),
        "weight": np.ones(n, np.float32),
        "discrepancy": rng.uniform(-1, 1, n).astype(np.float32),
        "gap": rng.random(n).astype(np.float32),
        "balance": rng.uniform(-1, 1, n).astype(np.float32),
        "p_balanced": rng.random(n).astype(np.float32),
        "group": [None] * n,
        "content": [f"{number:032x}" for number in range(n)],
    }
    table = pa.table({name: pa.array(values[name], type_) for name, type_ in COLUMNS.items()})
    return Manifest(table=table, provenance={})


def encode_manifest(data: Path, run: Path) -> Manifest:
    """Encode data into the feature cache of a run, and keep all samples in a manifest with scores of 0."""
    dataset, media = open_dataset(data), MediaConfig()
    tasks = encode_dataset(dataset, run / "features", media=media, num_workers=0, progress=no_progress)
    samples = read_samples(dataset, seed=0, test_fraction=0.2)
    n, encoded = len(samples), collect_encoded(dataset, samples, tasks)
    values: dict[str, Any] = {
        "sample_id": samples.sample_id,
        "label": samples.label,
        "label_name": [samples.class_names[code] for code in samples.label],
        "split": samples.split,
        "content": encoded.content,
        "rank": np.arange(n),
        "weight": np.ones(n),
        **{name: np.zeros(n) for name in ("discrepancy", "gap", "balance", "p_balanced")},
    }
    table = pa.table({name: pa.array(values.get(name, [None] * n), type_) for name, type_ in COLUMNS.items()})
    modalities = [{**asdict(item), "preprocessing": preprocessing(item, media)} for item in dataset.modalities]
    scores = {"config": RunConfig().scoring_config(), "modalities": modalities}
    return Manifest(table=table, provenance={"scores": scores, "features": str(run / "features")})
