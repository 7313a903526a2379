"""Csv files: every cell is read as a string, and a malformed file is reported with line and reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmaudit.audit.dataset.formats import text_rows as csv_rows
from mmaudit.audit.dataset.formats.text_rows import read_csv_rows
from mmaudit.audit.errors import DatasetError

BAD = {
    "empty": (b"", "Empty CSV file"),
    "blank": (b"\n\n", "cannot infer number of columns"),
    "short row": (b"a,b\n1,2\n3\n", "line 3 has 1 fields, the header 2: '3'"),
    "long row": (b'a,b\n"1\n1",2\n3,4,5\n', "line 4 has 3 fields, the header 2"),
    "no utf-8": (b"a,b\n1,2\n3,\xff\n", "line 3, byte 3 is not UTF-8"),
    "header": (b"a,\xff\n1,2\n", "line 1, byte 3 is not UTF-8"),
    "utf-16": ("a,b\n1,2\n".encode("utf-16"), "line 1, byte 1 is not UTF-8"),
    "open quote": (b'a,b\n1,2\n"3,4\n5,6\n', "line 3: a quote is never closed"),
    "columns": (b",".join([b"c"] * 20_000) + b"\n", "it has 20,000 columns; at most 10,000"),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_line_is_reported(tmp_path: Path, name: str) -> None:
    content, reason = BAD[name]
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DatasetError, match=rf"a\.csv cannot be read: .*{reason}") as caught:
        read_csv_rows(tmp_path / "a.csv")
    assert "\n" not in str(caught.value)


def test_row_longer_than_a_block_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_rows, "CSV_BLOCK_BYTES", 1 << 16)
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,2\n3," + b"x" * (1 << 18) + b"\n5,6\n")
    with pytest.raises(DatasetError, match="line 3 has more than 0 MiB"):
        read_csv_rows(tmp_path / "a.csv")


def test_cells_are_read_as_strings(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,b\n007,"x,\n""y"""\n,2020-01-01\n')
    assert read_csv_rows(tmp_path / "a.csv").to_pylist() == [
        {"a": "007", "b": 'x,\n"y"'},
        {"a": None, "b": "2020-01-01"},
    ]
