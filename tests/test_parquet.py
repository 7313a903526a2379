"""Laws of our files: whole or not at all, the same bytes for the same table, and what they were made from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmaudit.audit.errors import ManifestError, ScoreError
from mmaudit.audit.parquet import KEY, read_parquet, write_parquet
from mmaudit.audit.storage import write_json

TABLE = pa.table({"id": ["a", "b"], "value": [1.0, None]})


def test_write_then_read_is_equality(tmp_path: Path) -> None:
    provenance = {"seed": 3, "nested": {"list": [1, 2.5, None, "ü"]}}
    write_parquet(TABLE, tmp_path / "new" / "t.parquet", provenance=provenance)
    table, found = read_parquet(tmp_path / "new" / "t.parquet", error=ScoreError)
    assert table.equals(TABLE)
    assert found == provenance
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.parquet"]


def test_the_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    pandas_metadata = TABLE.replace_schema_metadata({"pandas": "somewhere else"})
    write_parquet(TABLE, tmp_path / "one", provenance={"a": 1, "b": 2})
    write_parquet(pandas_metadata, tmp_path / "two", provenance={"b": 2, "a": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_foreign_file_has_no_provenance(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "t.parquet")
    assert read_parquet(tmp_path / "t.parquet", error=ScoreError) == (TABLE, {})


def test_the_provenance_stands_under_one_key(tmp_path: Path) -> None:
    write_parquet(TABLE, tmp_path / "t.parquet", provenance={"a": 1})
    assert json.loads(pq.read_schema(tmp_path / "t.parquet").metadata[KEY]) == {"a": 1}


def test_what_cannot_be_read_is_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file"):
        read_parquet(tmp_path / "none.parquet", error=ManifestError)
    (tmp_path / "odd.parquet").write_text("id,value\na,1\n")
    with pytest.raises(ScoreError, match=r"odd\.parquet cannot be read as Parquet"):
        read_parquet(tmp_path / "odd.parquet", error=ScoreError)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    write_json({"b": 1, "a": [2]}, path)
    old = path.read_bytes()
    assert json.loads(old) == {"a": [2], "b": 1}
    with pytest.raises(ValueError, match="Out of range float"):
        write_json({"a": math.nan}, path)
    assert path.read_bytes() == old
    assert [each.name for each in tmp_path.iterdir()] == ["t.json"]
