"""Csv and JSON lines files: valid files are read, and a malformed file is reported with line and reason.

Row groups: the shards in any order give all rows, and a large group is never entirely in memory.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.dataset.formats import rows as readers
from mmaudit.audit.dataset.formats.rows import ParquetShard, read_json_lines, read_parquet_schema, row_group_shards
from mmaudit.audit.dataset.formats.tables import read_rows
from mmaudit.audit.errors import DatasetError

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)
ROWS = st.lists(
    st.fixed_dictionaries({"id": TEXTS, "x": st.lists(st.integers(-9, 9), max_size=3), "n": st.none() | TEXTS}),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS, st.sampled_from(["\n", "\r\n", "\n\n", "  \n"]), st.booleans(), st.booleans())
def test_valid_json_lines_are_read(
    tmp_path: Path, rows: list[dict[str, Any]], end: str, ascii_only: bool, last: bool
) -> None:
    text = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows) + (end if last else "")
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8", newline="")
    with (tmp_path / "a.jsonl").open("rb") as file:
        readers._check_json_lines(file)
    assert read_json_lines(tmp_path / "a.jsonl").to_pylist() == rows


def test_json_lines_across_blocks_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"id": f'say "{number}" \\', "x": [{"y": [number]}]} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for size in (1, 7, 64):
        monkeypatch.setattr(readers, "_CHECK_BYTES", size)
        assert read_json_lines(path)["id"].to_pylist() == [row["id"] for row in rows]
    path.write_text(path.read_text() + "null\n")
    with pytest.raises(DatasetError, match="line 41, 'null', is not a JSON object"):
        read_json_lines(path)


GOOD_LINE = b'{"id": "a", "x": [1, 2]}\n'
DEEP_LINE = b'{"id": "b", "x": ' + b'{"x":' * 3_000 + b"1" + b"}" * 3_000 + b"}\n"
BAD_JSON = {
    "nulls": (b"null\n" * 3, "line 1, 'null', is not a JSON object"),
    "scalar": (GOOD_LINE + b"5\n", "line 2, '5', is not a JSON object"),
    "list": (GOOD_LINE + b"[1]\n", r"line 2, '\[1\]', is not a JSON object"),
    "two values": (GOOD_LINE + b'{"id": "b"} null {"id": "c"}\n', "line 2, .*Extra data"),
    "deep": (GOOD_LINE + DEEP_LINE, "line 2, .*nested more than 64 levels deep"),
    "deep list": (GOOD_LINE + b"[" * 3_000 + b"]" * 3_000 + b"\n", "line 2, .*nested more than 64 levels deep"),
    "no utf-8": (GOOD_LINE + b'{"id": "\xff"}\n', "line 2, byte 9 is not UTF-8"),
    "nul": (GOOD_LINE + b'{"id": "a\0"}\n', "line 2 holds a NUL byte"),
    "mixed": (GOOD_LINE + b'{"id": 5}\n', "line 2: 'id' is a number, and text in line 1"),
    "mixed within": (
        GOOD_LINE + b'{"id": "b", "x": [1, {}]}\n',
        r"line 2: 'x\[\]' is an object, and a number in line 1",
    ),
    "truncated": (GOOD_LINE + b'{"id": "b", "x": [1', "line 2, .*delimiter"),
    "open quote": (GOOD_LINE + b'{"id": "b\n{"id": "c"}\n', "line 2, .*Unterminated string"),
    "pretty": (b'{\n "id": "a"\n}\n', "line 1, '{'"),
    "twice": (GOOD_LINE + b'{"id": "b", "id": "c"}\n', "specified twice"),
    "empty": (b"", "Empty JSON file"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_malformed_json_line_is_reported(tmp_path: Path, name: str) -> None:
    content, reason = BAD_JSON[name]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DatasetError, match=rf"a\.jsonl cannot be read: .*{reason}") as caught:
        read_rows(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


def test_number_of_5000_digits_is_infinite(tmp_path: Path) -> None:
    """The same as 1e999; a row with an infinite feature is quarantined later."""
    (tmp_path / "a.jsonl").write_bytes(GOOD_LINE + b'{"id": "b", "x": [' + b"9" * 5_000 + b"]}\n")
    assert read_json_lines(tmp_path / "a.jsonl")["x"].to_pylist() == [[1.0, 2.0], [float("inf")]]


def test_json_line_longer_than_a_block_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "JSON_BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(readers, "_CHECK_BYTES", 1 << 18)
    (tmp_path / "a.jsonl").write_bytes(GOOD_LINE + b'{"id": "' + b"x" * (3 << 20) + b'"}\n')
    with pytest.raises(DatasetError, match="line 2 has more than 1 MiB"):
        read_json_lines(tmp_path / "a.jsonl")


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
    monkeypatch.setattr(readers, "_SHARD_BYTES", 200)


def write(path: Path, num_rows: int, *, row_group_size: int) -> pa.Table:
    vector = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(4 * num_rows), pa.float32()), 4)
    rows = pa.table({"id": list(range(num_rows)), "vector": vector})
    pq.write_table(rows, path, row_group_size=row_group_size)
    return rows


@pytest.mark.usefixtures("small_shards")
@settings(max_examples=examples(30), suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    monkeypatch.setattr(readers, "_SHARD_BYTES", 1_000)
    pq.write_table(cell_rows(40, media=True), tmp_path / "m.parquet", compression="none", use_dictionary=False)
    assert {shard.num_rows for shard in row_group_shards([tmp_path / "m.parquet"], media_rows=7)} == {1}
    monkeypatch.setattr(readers, "_SHARD_BYTES", 30_000)
    sizes = [shard.num_rows for shard in row_group_shards([tmp_path / "m.parquet"], media_rows=7)]
    assert sizes == [7, 7, 7, 7, 7, 5]


def test_large_row_group_is_never_entirely_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 MB of vectors in one row group, divided into shards of 4 MB: only a few are in memory at once."""
    monkeypatch.setattr(readers, "_SHARD_BYTES", 1 << 22)
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
    assert read_parquet_schema(tmp_path / "e.parquet").names == ["id", "x"]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DatasetError, match=r"b\.parquet cannot be read"):
        read_parquet_schema(tmp_path / "b.parquet")


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

    def iter_batches(self: pq.ParquetFile, *arguments: object, **options: object) -> object:
        opened.append(options)
        return original(self, *arguments, **options)

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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_lines_of_other_encodings_are_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"id": "caf\u00e9", "on": "2020-01-01"}\n'.encode(encoding))
    assert read_json_lines(tmp_path / "a.jsonl").to_pylist() == [{"id": "caf\u00e9", "on": "2020-01-01"}]
