"""Tests of the image-text adapter: column names, picture paths, and the resulting dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmaudit.audit.dataset.dataset import open_dataset
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.downloads.ingest import Ingested, ingest
from mmaudit.audit.errors import DatasetError


def write_files(root: Path, *names: str) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(rng.bytes(64))


def rows_of(ingested: Ingested) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(ingested.path).to_pylist()}


def write_jsonl(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_written_table_opens_as_dataset(tmp_path: Path) -> None:
    write_files(tmp_path, "img/1.png", "img/2.png", "img/3.png")
    write_jsonl(
        tmp_path / "train.jsonl",
        {"id": 1, "img": "img/1.png", "text": "a dog, alone", "label": 1},
        {"id": 2, "img": "img/2.png", "text": "a cat", "label": 0},
    )
    write_jsonl(tmp_path / "test.jsonl", {"id": 3, "img": "img/3.png", "text": "who knows"})
    ingested = ingest("image-text", tmp_path)
    assert (ingested.message, ingested.notes) == ("you have 3 of 3", ("1 rows have no label",))
    dataset = open_dataset(ingested.path)
    assert [str(modality) for modality in dataset.modalities] == ["image=image_file_name:image", "text=text:text"]
    samples = read_samples(dataset, seed=0, test_fraction=0.2)
    assert samples.sample_id.tolist() == ["1", "2", "3"]
    assert samples.split.tolist() == ["train", "train", "test"]
    assert samples.class_names == ("0", "1")
    assert samples.label.tolist() == [1, 0, -1]
    assert dataset.load("img/1.png", dataset.modalities[0]) == (tmp_path / "img" / "1.png").read_bytes()


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("names", [("image_path", "caption", "class"), ("file_name", "title", "category")])
def test_common_column_names_are_recognized(tmp_path: Path, suffix: str, names: tuple[str, str, str]) -> None:
    write_files(tmp_path, "images/1.png", "2.png")
    separator = "," if suffix == "csv" else "\t"
    lines = [
        separator.join((*names, "split")),
        separator.join(("1.png", '"one, two"', "cat", "train")),
        separator.join(("2.png", "x", "dog", "dev")),
    ]
    (tmp_path / f"all.{suffix}").write_text("\n".join(lines), encoding="utf-8")
    rows = rows_of(ingest("image-text", tmp_path))
    actual = {name: (row["image_file_name"], row["text"], row["label"], row["split"]) for name, row in rows.items()}
    assert actual == {
        "images/1.png": ("images/1.png", "one, two", "cat", "train"),
        "2.png": ("2.png", "x", "dog", "validation"),
    }


def test_picture_with_several_texts_is_a_group(tmp_path: Path) -> None:
    write_files(tmp_path, "1.png", "2.png")
    text = "image,caption,label\n1.png,one,a\n1.png,two,a\n2.png,three,b\n2.png,three,b\n"
    (tmp_path / "captions.csv").write_text(text, encoding="utf-8")
    rows = rows_of(ingest("image-text", tmp_path))
    assert sorted((row["group"], row["text"]) for row in rows.values()) == [
        ("1.png", "one"),
        ("1.png", "two"),
        ("2.png", "three"),
        ("2.png", "three"),
    ]


def test_missing_media_are_counted_by_modality(tmp_path: Path) -> None:
    write_files(tmp_path, "1.png", "spare.png")
    text = "id,image,text,label\na,1.png,one,x\nb,2.png,two,x\nc,1.png,,y\nd,,four,y\n"
    (tmp_path / "all.csv").write_text(text, encoding="utf-8")
    ingested = ingest("image-text", tmp_path)
    examples = [(missing.modality, missing.examples) for missing in ingested.missing]
    assert examples == [("image", ("b", "d")), ("text", ("c",))]
    assert (ingested.listed, ingested.present, ingested.unlisted) == (4, 1, 1)


def test_row_in_two_lists_counts_once(tmp_path: Path) -> None:
    write_files(tmp_path, "img/1.png")
    for name in ("dev_seen", "dev_unseen"):
        write_jsonl(tmp_path / f"{name}.jsonl", {"id": 1, "img": "img/1.png", "text": "x", "label": 1})
    ingested = ingest("image-text", tmp_path)
    assert (ingested.message, ingested.notes) == ("you have 1 of 1", ("1 repeated lines were ignored",))
    write_jsonl(tmp_path / "train.jsonl", {"id": 1, "img": "img/1.png", "text": "x", "label": 1})
    with pytest.raises(DatasetError, match=r"'1' has two different entries: .*dev_seen\.jsonl, line 1 and .*train"):
        ingest("image-text", tmp_path)


@pytest.mark.parametrize("name", ["../1.png", "/etc/1.png", "https://example.org/1.png"])
def test_paths_outside_the_folder_raise_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "all.csv").write_text(f"image,text,label\n{name},x,y\n", encoding="utf-8")
    with pytest.raises(DatasetError, match=rf"all\.csv, line 2: '{name}' leads outside .*: copy the pictures there"):
        ingest("image-text", tmp_path / "d")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("all.csv", "image,text,label\n1.png,x\n", r"line 2: '1\.png,x' is not a line of 3 fields: image, text, label"),
        ("all.csv", "picture,text,label\n1.png,x,y\n", "no column for the image: name it image_file_name or image"),
        (
            "all.csv",
            "image,text,split,label\n1.png,x,most,y\n",
            r"line 2: split is 'most': it must be train",
        ),
        ("all.csv", "id,image,text,label\n,1.png,x,y\n", "line 2: id is empty: every row needs one"),
        ("all.jsonl", '{"image": "1.png"\n', "line 1, .*: Expecting"),
        ("all.jsonl", "\n[1]\n", r"line 2, '\[1\]', is not a JSON object"),
        (
            "all.jsonl",
            '{"image": "1.png", "text": "x", "label": ["a", "b"]}\n',
            "line 1: label is .* a single value",
        ),
    ],
)
def test_damaged_lists_raise_error(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DatasetError, match=message):
        ingest("image-text", tmp_path)


def test_several_lists_without_splits_require_selection(tmp_path: Path) -> None:
    write_files(tmp_path, "1.png")
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("image,text,label\n1.png,x,y\n", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"contains a\.csv, b\.csv: select one with --list"):
        ingest("image-text", tmp_path)
    assert ingest("image-text", tmp_path, lists=[tmp_path / "b.csv"]).listed == 1
