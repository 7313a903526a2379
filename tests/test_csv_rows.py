"""Tests of csv files: encodings, separators, headers and quotes."""

import logging
from pathlib import Path

import pytest

from mmaudit.audit.dataset.formats import csv_rows
from mmaudit.audit.dataset.formats.csv_rows import read_csv_rows, sniff_separator
from mmaudit.audit.errors import DatasetError

BAD_CSV = {
    "empty": (b"", "Empty CSV file"),
    "blank": (b"\n\n", "cannot infer number of columns"),
    "short row": (b"a,b\n1,2\n3\n", "line 3 has 1 fields, the header 2: '3'"),
    "long row": (b'a,b\n"1\n1",2\n3,4,5\n', "line 4 has 3 fields, the header 2"),
    "no utf-8": (b"a,b\n1,2\n3,\xff\n", "line 3, byte 3 is not UTF-8"),
    "header": (b"a,\xff\n1,2\n", "line 1, byte 3 is not UTF-8"),
    "utf-16": ("a,b\n1,2\n".encode("utf-16")[:-1], "line 2, byte 8 is not UTF-16"),
    "early close": (b'a,b\n1,"2\n3,"4"\n5,6\n', "line 2: the quote that opens here closes in line 3, within another"),
    "semicolons": (b"a;b\n1;2\n3;4;5\n", "line 3 has 3 fields, the header 2: '3;4;5'"),
    "blank row": (b'a, b\n1, "2, 3"\n3\n', "line 3 has 1 fields, the header 2: '3'"),
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
    monkeypatch.setattr(csv_rows, "CSV_BLOCK_BYTES", 1 << 16)
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,2\n3," + b"x" * (1 << 18) + b"\n5,6\n")
    with pytest.raises(DatasetError, match="line 3 has more than 0 MiB"):
        read_csv_rows(tmp_path / "a.csv")


def test_csv_cells_are_read_as_strings(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,b\n007,"x,\n""y"""\n,2020-01-01\n')
    assert read_csv_rows(tmp_path / "a.csv").to_pylist() == [
        {"a": "007", "b": 'x,\n"y"'},
        {"a": None, "b": "2020-01-01"},
    ]


TITLES = "file_name,text,label\n0.jpg,title 0,dog\n1.jpg,{},cat\n2.jpg,title 2,dog\n3.jpg,{},cat\n4.jpg,title 4,dog\n"


def test_rows_within_one_quoted_value_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metadata.csv"
    path.write_text(TITLES.format('"burrito', '12"'))
    assert read_csv_rows(path).num_rows == 3
    assert f"{path}, line 3: the quote that opens here closes in line 5" in caplog.text
    assert "(1 such values)" in caplog.text
    caplog.clear()
    path.write_text(TITLES.format('"burrito', '"large" pizza'))
    with pytest.raises(DatasetError, match="line 3: the quote that opens here closes in line 5, within another value"):
        read_csv_rows(path)
    path.write_text(TITLES.format('"two lines,\nof which none is a row"', 'an 8" and a "large" pizza'))
    assert read_csv_rows(path)["text"].to_pylist()[1] == "two lines,\nof which none is a row"
    assert not caplog.records


TABLE = [{"file_name": "0.wav", "label": "a, b"}, {"file_name": "1.wav", "label": None}]


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ('file_name,label\n0.wav,"a, b"\n1.wav,\n', "utf-8"),
        ('file_name,label\r\n0.wav,"a, b"\r\n1.wav,\r\n', "utf-8-sig"),
        ("file_name;label\n0.wav;a, b\n1.wav;\n", "utf-8-sig"),
        ("file_name\tlabel\n0.wav\ta, b\n1.wav\t\n", "utf-16"),
        ("file_name|label\n0.wav|a, b\n1.wav|\n", "utf-32"),
        ('file_name, label\n0.wav, "a, b"\n1.wav, \n', "utf-8"),
        (' file_name ,label\n0.wav,"a, b"\n1.wav,\n', "utf-8"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_encodings_separators_and_blanks_do_not_change_the_rows(
    tmp_path: Path, name: str, content: str, encoding: str
) -> None:
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert read_csv_rows(tmp_path / name).to_pylist() == TABLE


@pytest.mark.parametrize("first", [b"sep=;\r\n", b"\xef\xbb\xbfsep=;\n", b'"SEP=;"\n'])
def test_first_line_that_states_the_separator_is_no_header(tmp_path: Path, first: bytes) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes(first + b'id;label\n1;x,1\n2;"a; b"\n')
    assert read_csv_rows(path).to_pylist() == [{"id": "1", "label": "x,1"}, {"id": "2", "label": "a; b"}]
    path.write_bytes(first + b"id;label\n1;x\n2;y;z\n")
    with pytest.raises(DatasetError, match="line 4 has 3 fields"):
        read_csv_rows(path)


def test_unusual_separator_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mmaudit")
    (tmp_path / "a.csv").write_text("a;b\n1;2\n")
    read_csv_rows(tmp_path / "a.csv")
    assert "a.csv: the fields are separated by semicolons" in caplog.text
    (tmp_path / "b.csv").write_text("file_name label\n1.wav dog\n")
    read_csv_rows(tmp_path / "b.csv")
    assert "b.csv has one column, 'file_name label': separate fields by commas, semicolons, tabs" in caplog.text


@pytest.mark.parametrize(
    ("text", "separator"),
    [
        ("a;b;c\n1;2,5;3\n", ";"),
        ("id\tcaption, short\n1\tx, y\n2\tz\n", "\t"),
        ("a,labels\n1,x|y\n", ","),
        ("a,b\n1;2,3\n", ","),
        ('a,b\n"1;2;3",3\n', ","),
        ("a b\n1 2\n", ","),
        ("", ","),
        (f"a;b\n1;{'x' * 200_000}\n", ";"),
    ],
)
def test_separator_divides_the_lines_alike(text: str, separator: str) -> None:
    assert sniff_separator(text) == separator
