"""Contents that recur by chance are no duplicates, in check and in score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.errors import Reason
from mmaudit.audit.features.encode import encode_dataset
from mmaudit.audit.features.encoded_samples import EncodedSamples, collect_encoded, select_usable
from mmaudit.audit.findings import Leakage
from mmaudit.audit.leakage import ModalityContent, find_leakage
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress


def audited(folder: Path, *, seed: int = 0, **matrices: NDArray[Any]) -> tuple[EncodedSamples, Leakage]:
    """Return the encoded samples of a table of vectors, and its leaks; the order of its rows is drawn by the seed."""
    n = len(next(iter(matrices.values())))
    columns: dict[str, Any] = {name: list(matrix.astype(np.float32)) for name, matrix in matrices.items()}
    columns |= {"id": [f"s{row:05d}" for row in range(n)], "label": np.arange(n) // 2 % 2}
    columns["split"] = ["test" if row % 5 == 0 else "train" for row in range(n)]
    order = np.random.default_rng(seed).permutation(n)
    pq.write_table(pa.table(columns).take(order), folder / f"t{seed}.parquet")
    dataset = open_dataset(folder / f"t{seed}.parquet", DataConfig(modality=tuple(f"{m}={m}" for m in matrices)))
    samples = read_samples(dataset, seed=0, test_fraction=0.2)
    tasks = encode_dataset(dataset, folder / f"c{seed}", media=MediaConfig(), num_workers=0, progress=no_progress)
    encoded = collect_encoded(dataset, samples, tasks)
    return encoded, find_leakage(samples, [ModalityContent.of(status, tasks) for status in encoded.statuses])


def duplicates(encoded: EncodedSamples) -> list[str]:
    _, quarantined = select_usable(encoded, keep_duplicates=False)
    return sorted(row.sample_id for row in quarantined if row.reason is Reason.DUPLICATE)


@pytest.mark.parametrize(
    ("name", "length"), [("votes", 6), ("votes", 12), ("one of ten", 10), ("eight bits", 8), ("mostly zero", 40)]
)
def test_vectors_that_recur_by_chance_are_no_duplicates(name: str, length: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrix = {
        "votes": rng.multinomial(10, [0.6, 0.3, 0.1, *[0.0] * (length - 3)], 1500) if length > 3 else None,
        "one of ten": np.eye(10)[rng.integers(0, 10, 1500)],
        "eight bits": rng.integers(0, 2, (1500, 8)),
        "mostly zero": rng.random((1500, 40)) < 0.02,
    }[name]
    assert matrix is not None
    assert len(np.unique(matrix, axis=0)) < 1500
    encoded, leakage = audited(tmp_path, a=np.asarray(matrix), b=np.asarray(matrix)[:, :6])
    assert duplicates(encoded) == []
    assert not leakage.leaks
    assert any("recur by chance" in note for note in leakage.notes)


@pytest.mark.parametrize("name", ["numbers", "levels", "bits"])
def test_copies_of_long_vectors_are_duplicates(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrix = {
        "numbers": rng.standard_normal((300, 8)),
        "levels": rng.integers(0, 7, (300, 40)).astype(float),
        "bits": rng.integers(0, 2, (300, 80)).astype(float),
    }[name]
    short = rng.integers(0, 2, (300, 3)).astype(float)
    matrix[[11, 22]], short[[11, 22]] = matrix[[10, 20]], short[[10, 20]]  # 22 has another label than 20
    encoded, leakage = audited(tmp_path, a=matrix, b=short)
    assert duplicates(encoded) == ["s00011", "s00022"]
    content = [(finding.what, finding.name) for finding in leakage.findings if finding.what.startswith("content")]
    assert content == [
        ("content", "sample"),
        ("content of another label", "sample"),
        ("content", "a"),
    ]
    assert any("of another label" in note and "the features cannot tell" in note for note in leakage.notes)


def test_order_of_rows_changes_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrix = np.round(rng.standard_normal((400, 9)) * 2)
    matrix[::9] = matrix[1]
    first, second = (audited(tmp_path, seed=seed, a=matrix, b=matrix[:, :4]) for seed in (0, 1))
    assert duplicates(first[0]) == duplicates(second[0])
    assert first[1] == second[1]
