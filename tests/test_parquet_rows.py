"""Row groups: the shards in any order give all rows, and a large group is never entirely in memory."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.dataset.formats import parquet_rows
from mmaudit.audit.dataset.formats.parquet_rows import ParquetShard, parquet_head, row_group_shards
from mmaudit.audit.errors import DatasetError


def test_small_row_groups_are_shards_and_empty_ones_are_skipped(tmp_path: Path) -> None:
    rows = pa.table({"id": list(range(7)), "x": [0.5] * 7})
    pq.write_table(rows.slice(0, 0), tmp_path / "a.parquet")
    pq.write_table(rows.slice(0, 5), tmp_path / "b.parquet", row_group_size=2)
    pq.write_table(rows.slice(5), tmp_path / "c.parquet")
    shards = row_group_shards([tmp_path / name for name in ("a.parquet", "b.parquet", "c.parquet")], media_rows=1)
    assert [shard.read(["id"])["id"].to_pylist() for shard in shards] == [[0, 1], [2, 3], [4], [5, 6]]
    assert [(shard.index, shard.first, shard.num_rows) for shard in shards] == [
        (0, 0, 2), (1, 2, 2), (2, 4, 1), (3, 5, 2)
    ]  # fmt: skip


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide every row group of more than 200 bytes."""
    monkeypatch.setattr(parquet_rows, "_SHARD_BYTES", 200)


def write(path: Path, num_rows: int, *, row_group_size: int) -> pa.Table:
    vector = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(4 * num_rows), pa.float32()), 4)
    rows = pa.table({"id": list(range(num_rows)), "vector": vector})
    pq.write_table(rows, path, row_group_size=row_group_size)
    return rows


@pytest.mark.usefixtures("small_shards")
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60), st.integers(1, 60), st.randoms(use_true_random=False))
def test_shards_in_any_order_give_all_rows(tmp_path: Path, num_rows: int, row_group_size: int, random: object) -> None:
    path = tmp_path / "d.parquet"
    path.unlink(missing_ok=True)
    rows = write(path, num_rows, row_group_size=row_group_size)
    shards = row_group_shards([path, path], media_rows=3)
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert [shard.first for shard in shards] == np.cumsum([0, *(shard.num_rows for shard in shards)])[:-1].tolist()
    assert sum(shard.num_rows for shard in shards) == 2 * num_rows
    order = list(shards)
    random.shuffle(order)  # type: ignore[attr-defined]
    rows_of_shard = {shard.index: pickle.loads(pickle.dumps(shard)).read(["vector", "id"]) for shard in order}
    concatenated = pa.concat_tables([rows_of_shard[index] for index in range(len(shards))])
    assert concatenated.equals(pa.concat_tables([rows, rows]).select(["vector", "id"]))


def cell_rows(rows: int, *, media: bool) -> pa.Table:
    cells = pa.array([bytes(number % 251 for number in range(1_000))] * rows) if media else pa.array([[0.5]] * rows)
    return pa.table({"id": list(range(rows)), "x": cells})


@pytest.mark.usefixtures("small_shards")
def test_shards_of_media_have_at_most_media_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows, "_SHARD_BYTES", 1_000)
    pq.write_table(cell_rows(40, media=True), tmp_path / "m.parquet", compression="none", use_dictionary=False)
    assert {shard.num_rows for shard in row_group_shards([tmp_path / "m.parquet"], media_rows=7)} == {1}
    monkeypatch.setattr(parquet_rows, "_SHARD_BYTES", 30_000)
    sizes = [shard.num_rows for shard in row_group_shards([tmp_path / "m.parquet"], media_rows=7)]
    assert sizes == [7, 7, 7, 7, 7, 5]
    assert parquet_head(tmp_path / "m.parquet").num_rows == 16
    pq.write_table(cell_rows(200, media=False), tmp_path / "v.parquet")
    assert parquet_head(tmp_path / "v.parquet").num_rows == 64


def test_large_row_group_is_never_entirely_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 MB of vectors in one row group, divided into shards of 4 MB: only a few are in memory at once."""
    monkeypatch.setattr(parquet_rows, "_SHARD_BYTES", 1 << 22)
    path = tmp_path / "d.parquet"
    matrix = np.random.default_rng(0).standard_normal((5_000, 2_000), dtype=np.float32)
    rows = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), 2_000)})
    pq.write_table(rows, path, row_group_size=5_000, use_dictionary=False, compression="none")
    del rows
    shards = row_group_shards([path], media_rows=256)
    assert len(shards) == 10
    before, allocated_bytes, first = pa.total_allocated_bytes(), [], 0
    for shard in shards:
        part = shard.read(["x"])
        np.testing.assert_array_equal(part["x"].combine_chunks().values.to_numpy()[:2_000], matrix[first])
        first += shard.num_rows
        allocated_bytes.append(pa.total_allocated_bytes() - before)
        del part
    assert max(allocated_bytes) < 0.5 * matrix.nbytes
    assert pa.total_allocated_bytes() - before < 1 << 20  # everything is freed


def test_head_of_empty_file_has_columns_and_damaged_file_is_reported(tmp_path: Path) -> None:
    pq.write_table(
        cell_rows(0, media=False).cast(pa.schema([("id", pa.int64()), ("x", pa.int8())])), tmp_path / "e.parquet"
    )
    assert parquet_head(tmp_path / "e.parquet").column_names == ["id", "x"]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DatasetError, match=r"b\.parquet cannot be read"):
        parquet_head(tmp_path / "b.parquet")


def test_pickled_shard_is_small(tmp_path: Path) -> None:
    write(tmp_path / "d.parquet", 10, row_group_size=10)
    [shard] = row_group_shards([tmp_path / "d.parquet"], media_rows=1)
    assert isinstance(shard, ParquetShard)
    assert len(pickle.dumps(shard)) < 400 + len(str(tmp_path))


@pytest.mark.usefixtures("small_shards")
def test_shards_in_order_decode_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last shard is smaller than the others and still continues after them."""
    opened = []
    original = pq.ParquetFile.iter_batches

    def iter_batches(self: pq.ParquetFile, **options: object) -> object:
        opened.append(options)
        return original(self, **options)

    write(tmp_path / "d.parquet", 50, row_group_size=50)
    shards = row_group_shards([tmp_path / "d.parquet"], media_rows=9)
    assert len({shard.num_rows for shard in shards}) == 2
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    for _ in range(3):
        assert [value for shard in shards for value in shard.read(["id"])["id"].to_pylist()] == list(range(50))
    assert len(opened) == 3


@pytest.mark.usefixtures("small_shards")
def test_changed_file_is_reopened_or_reported(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    write(path, 50, row_group_size=50)
    first, *next_shards = row_group_shards([path], media_rows=9)
    first.read(["id"])
    pq.write_table(pa.table({"id": list(range(1_000, 1_050))}), path)
    assert next_shards[0].read(["id"])["id"].to_pylist()[0] == 1_000 + first.num_rows
    write(path, 12, row_group_size=50)
    with pytest.raises(DatasetError, match="has fewer rows than when it was opened"):
        next_shards[-1].read(["id"])
