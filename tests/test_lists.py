"""Tests of the reader of lists: encodings, separators, quotes and headers."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest

from mmaudit.audit.downloads.lists import find_lists, normalize_name, read_list, skip_header
from mmaudit.audit.errors import DatasetError

ROWS = [("1001_DFA_ANG_XX", "ANG"), ("1002_DFA_SAD_XX", "SAD"), ("1003_IEO_HAP_HI", "HAP")]


def fields_of(path: Path, text: str | bytes, separators: str = ",\t;& ") -> list[tuple[str, ...]]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [line.fields for line in read_list(path, separators)]


@pytest.mark.parametrize("separator", [",", "\t", ";", "&", " "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separator_is_inferred(tmp_path: Path, separator: str, end: str) -> None:
    text = "".join(separator.join(row) + end for row in ROWS)
    assert fields_of(tmp_path / "list", text) == ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encoding_does_not_change_the_fields(tmp_path: Path, encoding: str) -> None:
    text = "crème brûlée.jpg,crème\nžbowl.jpg,寿司\n"
    rows = [("crème brûlée.jpg", "crème"), ("žbowl.jpg", "寿司")]
    assert fields_of(tmp_path / "list", text.encode(encoding)) == rows


def test_separator_in_a_class_does_not_divide_it(tmp_path: Path) -> None:
    assert fields_of(tmp_path / "list", "Rodents, rats, mice&fCZi6I6kPpU&good&6&10\n", "&\t;,") == [
        ("Rodents, rats, mice", "fCZi6I6kPpU", "good", "6", "10")
    ]
    assert fields_of(tmp_path / "list", 'a_1.mp4,"bird chirping, tweeting"\nb_1.mp4,sailing\n') == [
        ("a_1.mp4", "bird chirping, tweeting"),
        ("b_1.mp4", "sailing"),
    ]


def test_damaged_line_does_not_change_the_separator(tmp_path: Path) -> None:
    text = "1001_DFA_ANG_XX\n" + "".join(",".join(row) + "\n" for row in ROWS)
    assert fields_of(tmp_path / "list", text) == [("1001_DFA_ANG_XX",), *ROWS]


ROW_LINES = [f"{number}.jpg,title {number},{('dog', 'cat')[number % 2]}" for number in range(12)]


def with_lines(**changed: str) -> str:
    """Return the text of a list of 12 rows with a header, in which lines such as `line3` are replaced."""
    lines = ["image,text,label", *ROW_LINES]
    for name, line in changed.items():
        lines[int(name.removeprefix("line")) - 1] = line
    return "\n".join(lines) + "\n"


OPEN = '2.jpg,"Sausage and egg burrito | recipes,dog'


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (with_lines(line4=OPEN), 4, "is never closed"),
        (with_lines(line4=OPEN, line10='8.jpg,Pizza crust for 12",dog'), 4, "is closed only on line 10"),
        (with_lines(line4=OPEN, line10='8.jpg,"said ""hi"" there",dog'), 4, "is closed only on line 10"),
        (with_lines(line4='2.jpg,"said ""hi",dog', line7='5.jpg,"so","""'), 7, "is never closed"),
        (with_lines(line13='11.jpg,title,"dog'), 13, "is never closed"),
        (with_lines(line3='1.jpg,"two\nlines",cat', line6='4.jpg,"open,dog'), 7, "is never closed"),
    ],
)
def test_open_quote_is_named_with_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    with pytest.raises(DatasetError, match=rf"list, line {line}: the quote that opens here {message}"):
        fields_of(tmp_path / "list", text)


def test_quote_that_swallows_a_field_longer_than_csv_reads_is_named(tmp_path: Path) -> None:
    text = with_lines(line4=OPEN) + "\n".join(f"{number}.jpg,title {number},dog" for number in range(12, 9000)) + "\n"
    with pytest.raises(DatasetError, match=r"list, line 4: the quote that opens here"):
        fields_of(tmp_path / "list", text)


def test_text_over_several_lines_is_one_record(tmp_path: Path) -> None:
    text = with_lines(line4='2.jpg,"Hello, my old\nfriend, bye\n\nsee ""you""",dog')
    fields = fields_of(tmp_path / "list", text)
    assert len(fields) == 13
    assert fields[3] == ("2.jpg", 'Hello, my old\nfriend, bye\n\nsee "you"', "dog")


WORDS = ["the", "old", "friend,", "said", "hello,", "bye;", "12", "eggs", "on", "toast", "ok", "thanks", "a", "lot"]


@pytest.mark.parametrize("seed", range(20))
def test_prose_over_several_lines_is_never_taken_for_rows(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    with (tmp_path / "list").open("w", encoding="utf-8", newline="") as file:
        for number in range(200):
            lines = (" ".join(generator.choices(WORDS, k=generator.randrange(1, 9))) for _ in range(number % 4))
            csv.writer(file).writerow([f"{number}.jpg", "\n".join(lines), generator.choice(["dog", "cat"])])
    assert len(read_list(tmp_path / "list", ",;\t|")) == 200


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("column", [0, 1])
def test_stray_quote_closes_no_open_one_unnoticed(tmp_path: Path, seed: int, column: int) -> None:
    generator = random.Random(seed)
    rows = [[f"{number}.jpg", f"title {number}", generator.choice(["dog", "cat"])] for number in range(50)]
    first = generator.randrange(40)
    last = generator.randrange(first + 1 + (column == 0), 50)
    rows[first][1], rows[last][1] = f'"title {first}', 'for 12"'
    order = [1, 0, 2] if column == 0 else [0, 1, 2]
    text = "".join(",".join(row[index] for index in order) + "\n" for row in rows)
    with pytest.raises(
        DatasetError, match=rf"line {first + 1}: the quote that opens here is closed only on line {last + 1}"
    ):
        fields_of(tmp_path / "list", text, ",;\t|")


def test_quotes_of_lists_with_tabs_may_be_plain_characters(tmp_path: Path) -> None:
    text = 'image\ttext\tlabel\n1.jpg\t" so he said\t0\n2.jpg\t"quoted ""twice"""\t1\n3.jpg\tsize 12"\t0\n'
    assert fields_of(tmp_path / "list", text)[1:] == [
        ("1.jpg", '" so he said', "0"),
        ("2.jpg", 'quoted "twice"', "1"),
        ("3.jpg", 'size 12"', "0"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "run git lfs pull"),
        (b"a,b\n\xe9,c\n", "line 2, byte 1 is not UTF-8"),
        (b"a,b\nc\0,d\n", "line 2 holds a NUL byte"),
    ],
)
def test_file_that_is_no_text_raises_error(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        fields_of(tmp_path / "list", content)


@pytest.mark.parametrize(
    ("first", "is_header"), [("name,label", True), (" Video ID,START,Class,split", True), ("name,dog", False)]
)
def test_header_is_recognized_by_all_its_names(tmp_path: Path, first: str, is_header: bool) -> None:
    (tmp_path / "list").write_text(f"{first}\nx,y\n")
    lines = skip_header(read_list(tmp_path / "list", ","))
    assert [line.number for line in lines] == ([2] if is_header else [1, 2])


def test_names_of_columns_are_normalized() -> None:
    names = ["#1 Label", "#2 ImageID", " image path ", "gold-label"]
    assert [normalize_name(name) for name in names] == ["label", "imageid", "image_path", "gold_label"]


def test_hidden_lists_are_not_found(tmp_path: Path) -> None:
    for name in ("._train.csv", ".DS_Store", "train.csv"):
        (tmp_path / name).write_bytes(b"x")
    assert find_lists(tmp_path, ["train.csv", "._train.csv", ".DS_Store"]) == [tmp_path / "train.csv"]
