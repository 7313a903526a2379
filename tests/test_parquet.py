"""Tests of Parquet files: atomic writing, same bytes for the same table, provenance, and damage."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmaudit.audit.errors import ManifestError, ScoreError
from mmaudit.audit.storage import PROVENANCE_KEY, read_batches, read_parquet, read_schema, write_json, write_parquet

TABLE = pa.table({"id": ["a", "b"], "value": [1.0, None]})


def test_write_then_read_round_trips(tmp_path: Path) -> None:
    provenance = {"seed": 3, "nested": {"list": [1, 2.5, None, "ü"]}}
    write_parquet(TABLE, tmp_path / "new" / "t.parquet", provenance=provenance)
    table, read_provenance = read_parquet(tmp_path / "new" / "t.parquet", error=ScoreError)
    assert table.equals(TABLE)
    assert read_provenance == provenance
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.parquet"]


def test_same_table_gives_same_bytes(tmp_path: Path) -> None:
    pandas_metadata = TABLE.replace_schema_metadata({"pandas": "somewhere else"})
    write_parquet(TABLE, tmp_path / "one", provenance={"a": 1, "b": 2})
    write_parquet(pandas_metadata, tmp_path / "two", provenance={"b": 2, "a": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_file_of_other_writer_has_no_provenance(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "t.parquet")
    assert read_parquet(tmp_path / "t.parquet", error=ScoreError) == (TABLE, {})


def test_provenance_is_stored_under_one_key(tmp_path: Path) -> None:
    write_parquet(TABLE, tmp_path / "t.parquet", provenance={"a": 1})
    assert json.loads(pq.read_schema(tmp_path / "t.parquet").metadata[PROVENANCE_KEY]) == {"a": 1}


def test_unreadable_file_raises_requested_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file"):
        read_parquet(tmp_path / "none.parquet", error=ManifestError)
    (tmp_path / "odd.parquet").write_text("id,value\na,1\n")
    with pytest.raises(ScoreError, match=r"odd\.parquet cannot be read as Parquet"):
        read_parquet(tmp_path / "odd.parquet", error=ScoreError)


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    write_json({"b": 1, "a": [2]}, path)
    old = path.read_bytes()
    assert json.loads(old) == {"a": [2], "b": 1}
    with pytest.raises(ValueError, match="Out of range float"):
        write_json({"a": math.nan}, path)
    assert path.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Return the bytes with some flipped, cut, zeroed, repeated or inserted."""
    data, position = bytearray(content), draw.randrange(len(content))
    kind = draw.choice(("flip", "flip", "cut", "zero", "repeat", "insert"))
    if kind == "flip":
        for _ in range(draw.choice((1, 4, 16))):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif kind == "cut":
        del data[position:]
    elif kind == "zero":
        data[position : position + 32] = bytes(len(data[position : position + 32]))
    elif kind == "repeat":
        data[position:position] = data[position : position + 64]
    else:
        data[position:position] = draw.randbytes(8)
    return bytes(data)


@pytest.mark.parametrize("options", [{}, {"compression": "none", "use_dictionary": False}, {"row_group_size": 8}])
def test_damage_anywhere_raises_requested_error(tmp_path: Path, options: dict[str, object]) -> None:
    rows = {"id": [f"s{n}" for n in range(40)], "label": ["a", "b"] * 20, "x": [[n / 7] for n in range(40)]}
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(rows), path, **options)
    good, draw, messages = path.read_bytes(), random.Random(7), list[str]()
    for _ in range(150):
        path.write_bytes(mutate(good, draw))
        try:
            sum(len(str(batch.to_pylist())) for batch in read_batches(path, error=ScoreError, rows=16))
            read_parquet(path, error=ScoreError)
        except ScoreError as error:
            messages.append(str(error))
    assert len(messages) > 75
    assert all(message.startswith(str(path)) and "\n" not in message for message in messages)


def test_changed_bytes_are_detected_by_checksums(tmp_path: Path) -> None:
    """Pages have checksums, so that changes that decode to other values are detected, too."""
    path = tmp_path / "t.parquet"
    write_parquet(pa.table({"id": [f"sample {n}" for n in range(9)]}), path, provenance={})
    good = path.read_bytes()
    begin, end = 40, pq.read_metadata(path).row_group(0).column(0).total_compressed_size
    for position in range(begin, end):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        try:
            table, _ = read_parquet(path, error=ScoreError)
        except ScoreError:
            continue
        assert table["id"].to_pylist() == [f"sample {n}" for n in range(9)]  # a statistic that is not read


def test_duplicate_columns_and_impossible_row_counts_raise_error(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), path)
    with pytest.raises(ScoreError, match=r"t\.parquet has 2 columns named a: column names must be unique"):
        read_schema(path, error=ScoreError)
    pq.write_table(pa.table({"a": pa.nulls(1_000_000, pa.int8())}), path)
    with pytest.raises(ScoreError, match="the footer states 1,000,000 rows, the file has only"):
        read_parquet(path, error=ScoreError)


def test_views_are_read_as_plain_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": pa.array(["x"], pa.string_view()), "b": pa.array([b"y"], pa.binary_view())}), path)
    schema = pa.schema([("a", pa.string()), ("b", pa.binary())])
    assert read_schema(path, error=ScoreError).equals(schema)
    assert read_parquet(path, error=ScoreError)[0].schema.equals(schema)
    assert [batch.schema.equals(schema) for batch in read_batches(path, error=ScoreError, rows=1)] == [True]


@pytest.mark.parametrize("text", [b"[1]", b"5", b"\xff", b'{"a": NaN}', b"[" * 9_999, b'{"a": ' + b"9" * 5_000 + b"}"])
def test_damaged_provenance_raises_error(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(TABLE.replace_schema_metadata({PROVENANCE_KEY: text}), path)
    with pytest.raises(ScoreError, match=r"t\.parquet: the metadata under the key mmaudit are damaged: "):
        read_parquet(path, error=ScoreError)


def test_huge_footer_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(TABLE.replace_schema_metadata({PROVENANCE_KEY: json.dumps({"a": "x" * (3 << 20)})}), path)
    assert read_parquet(path, error=ScoreError)[0].num_rows == 2
    monkeypatch.setattr("mmaudit.audit.storage._MAX_FOOTER", 1 << 20)
    with pytest.raises(ScoreError, match=r"t\.parquet cannot be read as Parquet: the footer has \d MiB"):
        read_parquet(path, error=ScoreError)


def test_relative_path_like_a_url_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("hf:/owner/a.parquet")
    write_parquet(pa.table({"a": [1, 2]}), path, provenance={})
    assert read_parquet(path, error=ScoreError)[0]["a"].to_pylist() == [1, 2]
