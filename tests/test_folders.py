"""Folder layouts: folders name split, class and modality, files of one stem are one sample."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.dataset.formats import Plan
from mmaudit.audit.dataset.formats.folders import plan_folders
from mmaudit.audit.dataset.formats.tables import OTHER_FORMS
from mmaudit.audit.errors import DatasetError


def write_files(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return root


def rows_of(plan: Plan | None) -> list[dict[str, object]]:
    assert plan is not None
    return [row for shard in plan.shards for row in shard.read(plan.head.column_names).to_pylist()]


def read_layout(root: Path, *paths: str) -> list[dict[str, object]]:
    return rows_of(plan_folders(str(write_files(root, *paths)), shard_rows=2, allow_outside=False))


def test_files_with_one_stem_are_one_sample(tmp_path: Path) -> None:
    assert read_layout(tmp_path, "dog/1.wav", "dog/1.png", "cat/b/1.0.png", "cat/b/1.0.wav", "dog/2.wav") == [
        {"id": "cat/b/1.0", "label": "cat", "audio_file_name": "cat/b/1.0.wav", "image_file_name": "cat/b/1.0.png"},
        {"id": "dog/1", "label": "dog", "audio_file_name": "dog/1.wav", "image_file_name": "dog/1.png"},
        {"id": "dog/2", "label": "dog", "audio_file_name": "dog/2.wav", "image_file_name": None},
    ]


@pytest.mark.parametrize("order", ["{modality}/{split}", "{split}/{modality}"])
def test_modality_and_split_folders_in_either_order(tmp_path: Path, order: str) -> None:
    paths = [
        f"{order.format(modality=modality, split=split)}/dog/{split}1.{suffix}"
        for modality, suffix in (("AudioWAV", "wav"), ("VideoFlash", "flv"))
        for split in ("train", "val")
    ]
    table = read_layout(tmp_path, *paths)
    assert [(row["id"], row["label"], row["split"]) for row in table] == [
        ("train/dog/train1", "dog", "train"), ("val/dog/val1", "dog", "validation")
    ]  # fmt: skip
    assert sorted(str(row[name]) for row in table for name in ("audio_file_name", "video_file_name")) == sorted(paths)


def test_modality_folders_of_one_kind_are_two_modalities(tmp_path: Path) -> None:
    [row] = read_layout(tmp_path, "rgb_image/dog/1.png", "depth_image/dog/1.png", "audio/dog/1.wav")
    assert row == {
        "id": "dog/1",
        "label": "dog",
        "audio_file_name": "audio/dog/1.wav",
        "depth_image_file_name": "depth_image/dog/1.png",
        "rgb_image_file_name": "rgb_image/dog/1.png",
    }


@pytest.mark.parametrize("classes", [("cat_video", "dog_video"), ("train", "dog"), ("audio", "dog")])
def test_class_folders_are_not_modalities_or_splits(tmp_path: Path, classes: tuple[str, str]) -> None:
    layout_rows = read_layout(tmp_path, *(f"{name}/1.mp4" for name in classes))
    assert {str(row["label"]) for row in layout_rows} == set(classes)
    assert all("split" not in row for row in layout_rows)


def test_videos_are_audio_and_visual(tmp_path: Path) -> None:
    data = write_files(tmp_path, "cat/1.mp4", "dog/1.mp4")
    assert [str(modality) for modality in open_dataset(data).modalities] == [
        "audio=video_file_name:audio", "visual=video_file_name:video"
    ]  # fmt: skip
    write_files(tmp_path, "cat/1.wav", "dog/1.wav")
    assert [str(modality) for modality in open_dataset(data).modalities] == [
        "audio=audio_file_name:audio", "visual=video_file_name:video"
    ]  # fmt: skip


def test_skipped_files_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mmaudit")
    assert (
        len(
            read_layout(tmp_path, "dog/1.wav", "dog/1.png", "README.md", "dog/Thumbs.db", ".hidden/x.wav", "dog/.1.wav")
        )
        == 1
    )
    assert "skipped 1 files that are not media, such as README.md" in caplog.text


def test_folder_without_layout_is_rejected(tmp_path: Path) -> None:
    assert plan_folders(str(write_files(tmp_path / "empty", "a/.hidden")), shard_rows=2, allow_outside=False) is None
    with pytest.raises(DatasetError, match=r"empty has none of metadata\.csv"):
        open_dataset(tmp_path / "empty")
    with pytest.raises(DatasetError, match=r"has 2 files, such as a/1\.docx, but no audio, image or video: .* write"):
        read_layout(tmp_path / "words", "a/1.docx", "a/2.xyz")
    for folder in ("empty", "words"):  # one line lists the supported sources
        with pytest.raises(DatasetError, match=rf"^[^\n]*metadata\.csv[^\n]*; {OTHER_FORMS}$"):
            open_dataset(tmp_path / folder)
    with pytest.raises(
        DatasetError, match=r"a/1\.flac and a/1\.wav are two files of kind audio for one sample: rename"
    ):
        read_layout(tmp_path / "twice", "a/1.wav", "a/1.flac")
    with pytest.raises(DatasetError, match=r"1\.wav is not in a folder named after its class: sort the files"):
        read_layout(tmp_path / "flat", "train/1.png", "train/1.wav")


def test_links_outside_the_root_are_rejected(tmp_path: Path) -> None:
    write_files(tmp_path / "outside", "dog/1.wav", "dog/1.png")
    data = write_files(tmp_path / "data", "cat/1.wav", "cat/1.png")
    (data / "dog").symlink_to(tmp_path / "outside" / "dog")
    with pytest.raises(DatasetError, match=r"the folder .*dog leads outside .*--allow-outside"):
        open_dataset(data)
    allowed = open_dataset(data, DataConfig(allow_outside=True))
    assert allowed.num_rows == 2
    assert allowed.load("dog/1.wav", allowed.modalities[0]) == b"dog/1.wav"
    (data / "dog").unlink()
    (data / "cat" / "2.wav").symlink_to(tmp_path / "outside" / "dog" / "1.wav")
    dataset = open_dataset(data)
    with pytest.raises(DatasetError, match="leads outside"):
        dataset.load("cat/2.wav", dataset.modalities[0])


def test_circular_links_are_rejected(tmp_path: Path) -> None:
    data = write_files(tmp_path, "cat/1.wav", "cat/1.png")
    (data / "cat" / "again").symlink_to(data)
    with pytest.raises(DatasetError, match="links to one of its parents: remove this link"):
        open_dataset(data)
