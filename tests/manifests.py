"""Small manifests for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

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
