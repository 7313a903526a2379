"""Feature matrices on disk: any rows in any order; missing ones are NaN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.features.cached_matrix import FeatureMatrix
from mmaudit.audit.features.encode import encode_dataset
from mmaudit.audit.features.encoded_samples import read_status
from mmaudit.audit.features.terms import count_terms, project_terms, text_terms, weigh_terms
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress

RNG = np.random.default_rng(0)
MEDIA = MediaConfig(text_buckets=32)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., FeatureMatrix]:
    """Open the modality `audio` of a dataset with these vectors or texts, four rows per shard."""

    def open_(cells: list[Any]) -> FeatureMatrix:
        n = len(cells)
        kind = pa.string() if any(isinstance(cell, str) for cell in cells) else pa.list_(pa.float32())
        table = pa.table(
            {
                "id": [str(row) for row in range(n)],
                "label": [row % 2 for row in range(n)],
                "audio": pa.array(cells, kind),
                "visual": pa.array([[0.0, 1.0]] * n, pa.list_(pa.float32())),
            }
        )
        pq.write_table(table, tmp_path / "d.parquet", row_group_size=4)
        dataset = open_dataset(tmp_path / "d.parquet", DataConfig(modality=("audio=audio", "visual=visual")))
        tasks = encode_dataset(dataset, tmp_path / "f", media=MEDIA, num_workers=0, progress=no_progress)
        ids = read_samples(dataset, seed=0, test_fraction=0.2).sample_id
        return FeatureMatrix.of(tasks, read_status(tasks, dataset.modalities[0], ids), np.arange(n))

    return open_


def test_read_rows_equal_rows_of_the_matrix(opened: Callable[..., FeatureMatrix]) -> None:
    expected = RNG.standard_normal((19, 3)).astype(np.float32)
    matrix = opened(expected.tolist())
    assert (matrix.num_rows, matrix.num_features) == expected.shape
    np.testing.assert_array_equal(matrix.read(np.arange(matrix.num_rows)), expected)
    for _ in range(10):
        rows = RNG.integers(0, 19, 7)
        np.testing.assert_array_equal(matrix.read(rows), expected[rows])
    assert matrix.read(np.zeros(0, np.intp)).shape == (0, 3)


def test_missing_rows_are_nan(opened: Callable[..., FeatureMatrix]) -> None:
    vectors: list[list[float] | None] = [[float(row), 1.0] for row in range(11)]
    vectors[0] = vectors[6] = None
    matrix = opened(vectors)
    np.testing.assert_array_equal(matrix.present, [row not in (0, 6) for row in range(11)])
    features = matrix.read(np.array([6, 7, 0, 10]))
    np.testing.assert_array_equal(features, np.array([[np.nan] * 2, [7, 1], [np.nan] * 2, [10, 1]], np.float32))


def test_texts_are_stored_as_terms(opened: Callable[..., FeatureMatrix]) -> None:
    texts = [f"word {row % 3} and word {row}" for row in range(11)]
    cells: list[str | None] = [None if row in (0, 6) else text for row, text in enumerate(texts)]
    matrix = opened(cells)
    terms = [np.zeros(0, np.uint32) if cell is None else text_terms(cell, MEDIA) for cell in cells]
    counts = count_terms(np.concatenate(terms), np.array([len(row) for row in terms]))
    assert (matrix.has_terms, matrix.num_features, matrix.num_numbers) == (True, 32, 0)
    for rows in (np.arange(11), np.array([9, 0, 3, 3, 6, 1]), np.zeros(0, np.intp)):
        assert (matrix.read_counts(rows) != counts[rows]).nnz == 0
        np.testing.assert_array_equal(matrix.read(rows), project_terms(counts[rows], 32))
        weights = matrix.read_terms(rows)
        assert weights is not None
        assert (weights != weigh_terms(counts[rows])).nnz == 0
        held = matrix.in_memory(rows)
        np.testing.assert_array_equal(held.read(np.arange(len(rows))), matrix.read(rows))
        assert matrix.read_numbers(rows).shape == (len(rows), 0)
    assert np.isnan(matrix.read(np.array([0, 6]))).all()
