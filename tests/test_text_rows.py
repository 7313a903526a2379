"""Csv and JSON lines files: valid files are read, and a malformed file is reported with line and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.dataset.formats import text_rows
from mmaudit.audit.dataset.formats.tables import read_rows
from mmaudit.audit.dataset.formats.text_rows import read_csv_rows, read_json_lines
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
    text_rows._check_json_lines(tmp_path / "a.jsonl")
    assert read_json_lines(tmp_path / "a.jsonl").to_pylist() == rows


def test_json_lines_across_blocks_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"id": f'say "{number}" \\', "x": [{"y": [number]}]} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for size in (1, 7, 64):
        monkeypatch.setattr(text_rows, "_CHECK_BYTES", size)
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
    monkeypatch.setattr(text_rows, "JSON_BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(text_rows, "_CHECK_BYTES", 1 << 18)
    (tmp_path / "a.jsonl").write_bytes(GOOD_LINE + b'{"id": "' + b"x" * (3 << 20) + b'"}\n')
    with pytest.raises(DatasetError, match="line 2 has more than 1 MiB"):
        read_json_lines(tmp_path / "a.jsonl")


BAD_CSV = {
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


@pytest.mark.parametrize("name", BAD_CSV)
def test_malformed_csv_line_is_reported(tmp_path: Path, name: str) -> None:
    content, reason = BAD_CSV[name]
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DatasetError, match=rf"a\.csv cannot be read: .*{reason}") as caught:
        read_csv_rows(tmp_path / "a.csv")
    assert "\n" not in str(caught.value)


def test_csv_row_longer_than_a_block_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "CSV_BLOCK_BYTES", 1 << 16)
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,2\n3," + b"x" * (1 << 18) + b"\n5,6\n")
    with pytest.raises(DatasetError, match="line 3 has more than 0 MiB"):
        read_csv_rows(tmp_path / "a.csv")


def test_csv_cells_are_read_as_strings(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,b\n007,"x,\n""y"""\n,2020-01-01\n')
    assert read_csv_rows(tmp_path / "a.csv").to_pylist() == [
        {"a": "007", "b": 'x,\n"y"'},
        {"a": None, "b": "2020-01-01"},
    ]
