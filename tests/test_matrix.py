"""Feature matrices on disk: any rows in any order; missing ones are NaN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmaudit.audit.dataset.dataset import open_dataset
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.features.encode import encode_dataset
from mmaudit.audit.features.encoded_samples import read_status
from mmaudit.audit.features.matrix import FeatureMatrix, JointInputs, MatrixInputs, chunks
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress

RNG = np.random.default_rng(0)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[list[list[float] | None]], FeatureMatrix]:
    """Open the modality `audio` of a dataset with these vectors, four rows per shard."""

    def open_(vectors: list[list[float] | None]) -> FeatureMatrix:
        n = len(vectors)
        table = pa.table(
            {
                "id": [str(row) for row in range(n)],
                "label": [row % 2 for row in range(n)],
                "audio": pa.array(vectors, pa.list_(pa.float32())),
                "visual": pa.array([[0.0, 1.0]] * n, pa.list_(pa.float32())),
            }
        )
        pq.write_table(table, tmp_path / "d.parquet", row_group_size=4)
        dataset = open_dataset(tmp_path / "d.parquet")
        tasks = encode_dataset(dataset, tmp_path / "f", media=MediaConfig(), num_workers=0, progress=no_progress)
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


def test_missing_rows_are_nan(opened: Callable[..., FeatureMatrix]) -> None:
    vectors: list[list[float] | None] = [[float(row), 1.0] for row in range(11)]
    vectors[0] = vectors[6] = None
    matrix = opened(vectors)
    np.testing.assert_array_equal(matrix.present, [row not in (0, 6) for row in range(11)])
    features = matrix.read(np.array([6, 7, 0, 10]))
    np.testing.assert_array_equal(features, np.array([[np.nan] * 2, [7, 1], [np.nan] * 2, [10, 1]], np.float32))


def test_joint_inputs_concatenate_features_and_masked_parts_are_nan() -> None:
    first, second = RNG.standard_normal((2, 5, 3)).astype(np.float32)
    joint = JointInputs(parts=(MatrixInputs(matrix=first), MatrixInputs(matrix=second)))
    rows = np.array([4, 0])
    np.testing.assert_array_equal(joint.read(rows), np.hstack([first, second])[rows])
    assert joint.num_features == 6
    masked = joint.mask(frozenset({0})).read(rows)
    assert np.isnan(masked[:, :3]).all()
    np.testing.assert_array_equal(masked[:, 3:], second[rows])


def test_chunks_partition_rows_within_max_bytes() -> None:
    inputs = MatrixInputs(matrix=np.zeros((5_000, 8), np.float32))
    parts = list(chunks(inputs, max_bytes=4 * 8 * 300))
    assert [len(part) for part in parts[:-1]] == [300] * (len(parts) - 1)
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(5_000))
    assert list(chunks(inputs, np.zeros(0, np.intp))) == []
