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
from mmaudit.audit.features.vectors import count_terms, project_terms, text_terms, weigh_terms
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


def test_selected_columns_and_rows_equal_those_of_the_matrix(opened: Callable[..., FeatureMatrix]) -> None:
    expected = RNG.standard_normal((9, 4)).astype(np.float32)
    columns, rows = np.array([3, 1, 2]), np.array([8, 0, 5])
    selected = opened(expected.tolist()).select_columns(columns)
    assert selected.num_features == 3
    np.testing.assert_array_equal(selected.read(rows), expected[np.ix_(rows, columns)])
    again = selected.take(rows).select_columns(np.array([2]))
    assert (again.num_rows, again.num_features) == (3, 1)
    np.testing.assert_array_equal(again.read(np.array([1])), [[expected[0, 2]]])


def test_halves_of_the_columns_of_a_text_are_halves_of_its_terms(opened: Callable[..., FeatureMatrix]) -> None:
    cells: list[str | None] = [f"word {row} of {row % 3}" for row in range(9)]
    cells[4] = None
    matrix, rows = opened(cells), np.array([7, 4, 0])
    halves = [matrix.select_columns(columns) for columns in (np.arange(0, 32, 2), np.arange(1, 32, 2))]
    terms = [half.read_counts(rows) for half in halves]
    assert (terms[0] + terms[1] != matrix.read_counts(rows)).nnz == 0
    assert (terms[0].multiply(terms[1])).nnz == 0
    for half in halves:
        dense = half.read(rows)
        assert dense.shape == (3, half.num_features) == (3, 16)
        assert np.isnan(dense[1]).all()
        assert not np.isnan(dense[[0, 2]]).any()


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
        expected = np.where(matrix.present[rows, None], project_terms(counts[rows], 32), np.float32(np.nan))
        np.testing.assert_array_equal(matrix.read(rows), expected)
        weights = matrix.read_terms(rows)
        assert weights is not None
        assert (weights != weigh_terms(counts[rows])).nnz == 0
        held = matrix.in_memory(rows)
        np.testing.assert_array_equal(held.read(np.arange(len(rows))), matrix.read(rows))
        assert matrix.read_numbers(rows).shape == (len(rows), 0)
    assert np.isnan(matrix.read(np.array([0, 6]))).all()
