"""Tests of the adapter of MVSA: labels of pairs, texts in several encodings."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmaudit.audit.downloads.ingest import Ingested, ingest
from mmaudit.audit.errors import DatasetError

SINGLE = "ID\ttext,image\n"
MULTIPLE = "ID\ttext,image\ttext,image\ttext,image\n"


def ingest_labels(root: Path, labels: str) -> Ingested:
    for number in range(1, 4):
        (root / "data").mkdir(exist_ok=True)
        (root / "data" / f"{number}.jpg").write_bytes(b"picture")
        (root / "data" / f"{number}.txt").write_bytes(
            f"tweet {number}, café\n".encode("latin-1" if number == 2 else "utf-8")
        )
    (root / "labelResultAll.txt").write_text(labels, encoding="utf-8")
    return ingest("mvsa", root)


@pytest.mark.parametrize(
    ("head", "votes", "label"),
    [
        (SINGLE, "positive,positive", "positive"),
        (SINGLE, "neutral,negative", "negative"),
        (SINGLE, "positive,neutral", "positive"),
        (SINGLE, "positive,negative", None),
        (MULTIPLE, "positive,neutral\tpositive,neutral\tnegative,negative", "positive"),
        (MULTIPLE, "positive,neutral\tneutral,neutral\tnegative,neutral", None),
    ],
)
def test_label_of_a_pair(tmp_path: Path, head: str, votes: str, label: str | None) -> None:
    ingested = ingest_labels(tmp_path, f"{head}1\t{votes}\n")
    (row,) = pq.read_table(ingested.path).to_pylist()
    assert row == {"id": "1", "label": label, "image_file_name": "data/1.jpg", "text": "tweet 1, café"}
    assert len(ingested.notes) == (label is None)


def test_texts_that_are_not_utf8_are_noted(tmp_path: Path) -> None:
    ingested = ingest_labels(tmp_path, f"{SINGLE}1\tneutral,neutral\n2\tneutral,neutral\n9\tneutral,neutral\n")
    assert [row["text"] for row in pq.read_table(ingested.path).to_pylist()] == ["tweet 1, café", "tweet 2, café", None]
    assert ingested.notes == ("1 texts are not UTF-8 and were read as Latin-1",)
    assert [(missing.modality, missing.count) for missing in ingested.missing] == [("image", 1), ("text", 1)]


@pytest.mark.parametrize("line", ["1\tpositive", "1\tgood,bad", "1", "../1\tneutral,neutral"])
def test_damaged_line_raises_error(tmp_path: Path, line: str) -> None:
    with pytest.raises(DatasetError, match=r"labelResultAll\.txt, line 2"):
        ingest_labels(tmp_path, f"{SINGLE}{line}\n")


def test_image_text_refers_to_this_adapter(tmp_path: Path) -> None:
    ingest_labels(tmp_path, f"{SINGLE}1\tneutral,neutral\n")
    with pytest.raises(DatasetError, match=r"labelResultAll\.txt is read by: mmaudit ingest mvsa"):
        ingest("image-text", tmp_path)
