"""Vectors read by their positions in cache files: those of the mapped files, and errors for files that change."""

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
from mmaudit.audit.errors import DatasetError
from mmaudit.audit.features import vector_files
from mmaudit.audit.features.cached_matrix import FeatureMatrix
from mmaudit.audit.features.encode import encode_dataset
from mmaudit.audit.features.encoded_samples import read_status
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.features.vector_files import FileInputs, from_files
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress

RNG = np.random.default_rng(0)
N, D = 230, 5


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., FeatureMatrix]:
    """Open the modality `audio` of a dataset with these cells, 60 rows per shard, in another order of the rows."""

    def open_(cells: list[Any]) -> FeatureMatrix:
        kind = pa.string() if any(isinstance(cell, str) for cell in cells) else pa.list_(pa.float32())
        columns = {
            "id": [str(row) for row in range(len(cells))],
            "label": [row % 2 for row in range(len(cells))],
            "audio": pa.array(cells, kind),
            "visual": pa.array([[0.0, 1.0]] * len(cells), pa.list_(pa.float32())),
        }
        pq.write_table(pa.table(columns), tmp_path / "d.parquet", row_group_size=60)
        dataset = open_dataset(tmp_path / "d.parquet", DataConfig(modality=("audio=audio", "visual=visual")))
        tasks = encode_dataset(dataset, tmp_path / "f", media=MediaConfig(), num_workers=0, progress=no_progress)
        ids = read_samples(dataset, seed=0, test_fraction=0.2).sample_id
        status = read_status(tasks, dataset.modalities[0], ids)
        return FeatureMatrix.of(tasks, status, np.random.default_rng(1).permutation(len(cells)))

    return open_


def vectors(missing: set[int]) -> list[list[float] | None]:
    """Build n vectors, null in some rows."""
    return [None if row in missing else RNG.standard_normal(D).tolist() for row in range(N)]


@pytest.mark.parametrize("missing", [set(), {0, 7, 59, 60, 229}, set(range(60, 120))])
@pytest.mark.parametrize(("gap", "block"), [(1 << 16, 1 << 22), (0, 1 << 22), (60, 50), (0, 1)])
def test_rows_are_those_of_the_mapped_files(
    opened: Callable[..., FeatureMatrix], monkeypatch: pytest.MonkeyPatch, missing: set[int], gap: int, block: int
) -> None:
    monkeypatch.setattr(vector_files, "MAX_GAP", gap)
    monkeypatch.setattr(vector_files, "BLOCK_BYTES", block)
    matrix = opened(vectors(missing))
    inputs = from_files(matrix)
    assert isinstance(inputs, FileInputs)
    assert (inputs.num_rows, inputs.num_features) == (N, D)
    for rows in (np.arange(N), RNG.integers(0, N, 90), np.array([3, 3, 1]), np.zeros(0, np.intp)):
        read = inputs.read(rows)
        np.testing.assert_array_equal(read, matrix.read(rows))
        assert read.dtype == np.float32


def test_bytes_are_read_as_bytes_until_a_row_is_missing(tmp_path: Path) -> None:
    """uint8 cannot represent NaN: rows are float32 where one of them is missing, as those of the mapped files."""
    pictures = RNG.integers(0, 256, (30, 12), dtype=np.uint8)
    offsets = np.concatenate([[0], np.cumsum(np.where(np.arange(31) % 7 == 3, 0, 12))])
    usable = np.arange(31) % 7 != 3
    column = pa.LargeListArray.from_arrays(offsets, pa.array(pictures[: usable.sum()].ravel()), mask=pa.array(~usable))
    path = tmp_path / "x.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("vector", column.type)])) as file:
        file.write_table(pa.table({"vector": column}))
    found = vector_files.VectorFile.of(path, num_vectors=int(usable.sum()))
    assert found is not None
    assert found.num_features == 12
    assert found.dtype == np.dtype(np.uint8)
    features = np.zeros((3, 12), np.uint8)
    found.read_into(features, np.array([2, 0, 1]), np.array([1, 4, 20]))
    np.testing.assert_array_equal(features[[2, 0, 1]], pictures[[1, 4, 20]])
    assert vector_files.VectorFile.of(path, num_vectors=7) is None


def test_texts_and_selected_columns_are_read_as_before(opened: Callable[..., FeatureMatrix]) -> None:
    matrix = opened(vectors(set()))
    selected = matrix.select_columns(np.array([1]))
    assert from_files(selected) is selected
    other = MatrixInputs(matrix=np.zeros((2, 2), np.float32))
    assert from_files(other) is other
    texts = opened([f"word {row}" for row in range(N)])
    assert from_files(texts) is texts


@pytest.mark.parametrize("damage", ["cut off", "longer", "removed"])
def test_a_file_that_changes_while_it_is_read_is_an_error_of_one_line(
    opened: Callable[..., FeatureMatrix], damage: str
) -> None:
    matrix = opened(vectors(set()))
    inputs = from_files(matrix)
    inputs.read(np.arange(N))
    path = matrix.tasks[1].file(matrix.status.modality)
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut off" else content + b"x")
    with pytest.raises(DatasetError, match=rf"{path.name} (was cut off or changed|cannot be read)") as raised:
        inputs.read(np.arange(N))
    assert "\n" not in str(raised.value)
    first_shard = np.flatnonzero(matrix.row < 60)
    np.testing.assert_array_equal(inputs.read(first_shard), matrix.read(first_shard))
