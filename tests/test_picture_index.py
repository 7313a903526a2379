"""Tests of the search for the pictures that a list names."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmaudit.audit.downloads.names import PictureIndex
from mmaudit.audit.errors import DatasetError

FILES = ["images/train/dog/1.jpg", "images/train/cat/1.jpg", "images/test/dog/2.jpg", "a/3.JPG", "b/3.png", "img/4.jpg"]


def find(root: Path, name: str, *, split: str | None = None, label: str | None = None) -> str:
    index = PictureIndex(root, FILES, labels={"dog", "cat"})
    return index.find(name, list_path=root / "list.csv", where="list.csv, line 2", split=split, label=label)


@pytest.mark.parametrize(
    ("name", "label", "path"),
    [
        ("1.jpg", "dog", "images/train/dog/1.jpg"),
        ("1", "cat", "images/train/cat/1.jpg"),
        ("4", None, "img/4.jpg"),
        ("3.jpg", None, "a/3.JPG"),
        ("train\\dog\\1.jpg", None, "images/train/dog/1.jpg"),
        ("./food/img/4.jpg", None, "img/4.jpg"),
    ],
)
def test_picture_is_searched_for_below_the_folder(tmp_path: Path, name: str, label: str | None, path: str) -> None:
    assert find(tmp_path, name, label=label) == path


@pytest.mark.parametrize(
    ("name", "split", "label"),
    [("2.jpg", "train", "dog"), ("2.jpg", "test", "cat"), ("test/dog/1.jpg", None, "dog"), ("other/4.jpg", None, None)],
)
def test_picture_of_another_split_class_or_folder_does_not_match(
    tmp_path: Path, name: str, split: str | None, label: str | None
) -> None:
    assert find(tmp_path, name, split=split, label=label) == name


def test_two_pictures_of_one_name_raise_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"line 2: '3' matches 2 pictures, such as a/3\.JPG and b/3\.png: write"):
        find(tmp_path, "3")
