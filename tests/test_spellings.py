"""Tests of the forms in which public lists and downloads circulate, for each adapter."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmaudit.audit.downloads import DOWNLOADS
from mmaudit.audit.downloads.ingest import Ingested, ingest
from mmaudit.audit.errors import DatasetError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def write_tree(root: Path, *names: str, **lists: str) -> None:
    """Write media of a few bytes, and lists whose names have `__` for the point."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"medium")
    for name, text in lists.items():
        (root / name.replace("__", ".")).write_text(text, encoding="utf-8")


def rows_of(ingested: Ingested) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(ingested.path).to_pylist()}


# VGGSound and Kinetics-Sounds


def test_vggsound_lists_of_two_columns_have_the_split_in_their_name(tmp_path: Path) -> None:
    write_tree(tmp_path, "video/glLQrEijrKg_000300.mp4", "video/RmMgnHF1kXk_000010.mp4", "data/x")
    write_tree(tmp_path / "data", train__csv="glLQrEijrKg_000300.mp4,playing hammond organ\n")
    write_tree(tmp_path / "data", test__csv='RmMgnHF1kXk_000010.mp4,"bird chirping, tweeting"\n')
    rows = rows_of(ingest("vggsound", tmp_path))
    assert {name: (row["label"], row["group"], row["split"]) for name, row in rows.items()} == {
        "glLQrEijrKg_000300": ("playing hammond organ", "glLQrEijrKg", "train"),
        "RmMgnHF1kXk_000010": ("bird chirping, tweeting", "RmMgnHF1kXk", "test"),
    }


@pytest.mark.parametrize("name", ["{}_1000_11000", "{}_1_11", "{}-1", "{}_000001_000011", "{}"])
def test_vggsound_rows_are_the_same_for_every_spelling(tmp_path: Path, name: str) -> None:
    path = f"people_marching/{name.format('---g-f_I2yQ')}.webm"
    write_tree(
        tmp_path, path, vggsound__csv="youtube_id,start_seconds,label,split\n---g-f_I2yQ,1,people marching,test\n"
    )
    ingested = ingest("vggsound", tmp_path)
    assert (ingested.message, ingested.unlisted) == ("you have 1 of 1", 0)
    assert rows_of(ingested) == {
        "---g-f_I2yQ_000001": {
            "id": "---g-f_I2yQ_000001",
            "label": "people marching",
            "group": "---g-f_I2yQ",
            "split": "test",
            "video_file_name": path,
        }
    }


def test_kinetics_list_in_another_encoding_and_separator(tmp_path: Path) -> None:
    write_tree(tmp_path, "train/playing_piano/abcdefghijk_3000_13000.mp4")
    text = "label\t YouTube ID\ttime_start\ttime_end\tsplit\nplaying piano\tabcdefghijk\t3\t13\ttrain\n"
    (tmp_path / "train.tsv").write_bytes(text.replace(" YouTube ID", " youtube_id").encode("utf-16"))
    assert ingest("kinetics-sounds", tmp_path).message == "you have 1 of 1"


# CREMA-D and the OGM-GE code


@pytest.mark.parametrize(
    "text",
    ["name,label\n1001_DFA_ANG_XX,ANG\n", "1001_DFA_ANG_XX.flv Anger\n", "\ufeff1001_DFA_ANG_XX.wav;anger\r\n"],
)
def test_cremad_list_in_each_form(tmp_path: Path, text: str) -> None:
    write_tree(tmp_path, "AudioWAV/1001_DFA_ANG_XX.wav", "VideoFlash/1001_DFA_ANG_XX.flv", train__txt=text)
    write_tree(tmp_path, "VideoFlash/._1001_DFA_ANG_XX.flv")
    ingested = ingest("cremad", tmp_path, lists=[tmp_path / "train.txt"])
    assert [(row["label"], row["split"]) for row in rows_of(ingested).values()] == [("ANG", "train")]
    assert (ingested.message, ingested.notes) == ("you have 1 of 1", ())


def test_ogm_ge_header_is_no_clip(tmp_path: Path) -> None:
    write_tree(tmp_path, "AudioWAV/1001_DFA_ANG_XX.wav", "Image-01-FPS/1001_DFA_ANG_XX/1.jpg")
    write_tree(tmp_path, train__csv="name,label\n1001_DFA_ANG_XX,ANG\n")
    assert list(rows_of(ingest("ogm-ge", tmp_path))) == ["1001_DFA_ANG_XX"]


def test_ogm_ge_groups_are_videos_in_every_spelling(tmp_path: Path) -> None:
    names = ["--4-0ihtnBU_000058_000068", "--4-0ihtnBU_10", "--4-0ihtnBU-3000", "-3Mwkq-7TV4"]
    write_tree(tmp_path, *(f"audio/{name}.wav" for name in names), *(f"visual/{name}/1.jpg" for name in names))
    write_tree(
        tmp_path,
        my_train__txt=f"{names[0]},10,0\n{names[2]},10,1\n",
        my_test__txt=f"{names[1]} 10 1\n{names[3]} 10 0\n",
    )
    assert {name: row["group"] for name, row in rows_of(ingest("ogm-ge", tmp_path)).items()} == {
        name: name[:11] for name in names
    }


def test_ogm_ge_reads_the_lists_of_ave(tmp_path: Path) -> None:
    write_tree(tmp_path, "audio/fCZi6I6kPpU.wav", "Image-01-FPS-SE/fCZi6I6kPpU/1.jpg")
    write_tree(tmp_path, "audio/c---zaDCTaE.wav", "Image-01-FPS-SE/c---zaDCTaE/1.jpg")
    write_tree(tmp_path, trainSet__txt="Rodents, rats, mice&fCZi6I6kPpU&good&6&10\n")
    write_tree(tmp_path, testSet__txt="Truck&c---zaDCTaE&good&0&10\n")
    rows = rows_of(ingest("ogm-ge", tmp_path))
    assert {name: (row["label"], row["split"]) for name, row in rows.items()} == {
        "fCZi6I6kPpU": ("Rodents, rats, mice", "train"),
        "c---zaDCTaE": ("Truck", "test"),
    }


def test_ogm_ge_reads_lists_with_blanks_and_extensions(tmp_path: Path) -> None:
    clips = {"1085_IWL_SAD_XX": "Sad", "1059_TSI_HAP_XX": "Happy"}
    write_tree(tmp_path, *(f"AudioWAV/{clip}.wav" for clip in clips), *(f"visual/{clip}/1.jpg" for clip in clips))
    write_tree(tmp_path, my_train__txt="".join(f"{clip}.flv {label}\n" for clip, label in clips.items()))
    rows = rows_of(ingest("ogm-ge", tmp_path))
    assert {name: (row["label"], row["group"]) for name, row in rows.items()} == {
        clip: (label, clip[:4]) for clip, label in clips.items()
    }


def test_ogm_ge_reads_sound_and_frames_of_one_folder_by_split(tmp_path: Path) -> None:
    for split, clip in (("train", "abcdefghijk_5"), ("test", "bbcdefghijk_65")):
        write_tree(tmp_path, f"{split}/{clip}/1.jpg", f"{split}/{clip}/{clip}.wav")
        (tmp_path / f"{split}.txt").write_text(f"{clip},10,3\n")
    row = rows_of(ingest("ogm-ge", tmp_path))["bbcdefghijk_65"]
    assert (row["audio_file_name"], row["visual_frames"]) == (
        "test/bbcdefghijk_65/bbcdefghijk_65.wav",
        "test/bbcdefghijk_65",
    )


def test_ogm_ge_folders_of_frames_that_are_left_out_are_noted(tmp_path: Path) -> None:
    write_tree(tmp_path, "audio/x.wav", "Image-01-FPS/x/1.jpg", "Image-02-FPS/x/1.jpg", train__csv="x,dog\n")
    assert ingest("ogm-ge", tmp_path).notes == ("Image-02-FPS left out: audio and Image-01-FPS are read",)


# Frames and features


def test_frames_in_folders_of_classes_are_matched(tmp_path: Path) -> None:
    streams = ("jpegs_256", "tvl1_flow/u", "tvl1_flow/v")
    write_tree(tmp_path, *(f"{stream}/YoYo/v_YoYo_g08_c01/1.jpg" for stream in streams), "ucfTrainTestlist/x")
    write_tree(tmp_path / "ucfTrainTestlist", classInd__txt="1 YoYo\n", testlist01__txt="YoYo/v_YoYo_g08_c01.avi\n")
    write_tree(tmp_path / "ucfTrainTestlist", trainlist01__txt="")
    (row,) = rows_of(ingest("ucf101", tmp_path)).values()
    assert row["rgb_frames"] == "jpegs_256/YoYo/v_YoYo_g08_c01"


def test_mosei_group_is_the_video_in_every_spelling(tmp_path: Path) -> None:
    ids = ["03bSnISJMi_$_$11", "03bSnISJMi__11", "03bSnISJMi_[11]", "209758_3", "209758$_$4"]
    features = {name: np.ones((len(ids), 2)) for name in ("text", "audio", "vision")}
    part = {"id": ids, **features, "regression_labels": np.arange(len(ids)) - 2.0}
    (tmp_path / "unaligned_50.pkl").write_bytes(pickle.dumps({"train": part}))
    (tmp_path / "._unaligned_50.pkl").write_bytes(b"x")
    rows = rows_of(ingest("mosei", tmp_path))
    assert {name: row["group"] for name, row in rows.items()} == {
        name: "209758" if name.startswith("2") else "03bSnISJMi_" for name in ids
    }
    (tmp_path / "unaligned_50.pkl").write_bytes(POINTER)
    with pytest.raises(DatasetError, match=r"unaligned_50\.pkl: .*run git lfs pull"):
        ingest("mosei", tmp_path)


# Pictures with texts


def test_lists_without_header_in_a_folder_of_texts(tmp_path: Path) -> None:
    texts: dict[str, str] = {"train": "", "test": ""}
    for split, label, number in itertools.product(texts, ("pie", "soup"), "12"):
        write_tree(tmp_path, f"images/{split}/{label}/{label}_{number}.jpg")
        texts[split] += f'{label}_{number}.jpg,"{split}, {label} {number}",{label}\n'
    (tmp_path / "texts").mkdir()
    write_tree(tmp_path / "texts", train_titles__csv=texts["train"], test_titles__csv=texts["test"])
    ingested = ingest("image-text", tmp_path)
    assert (ingested.message, ingested.unlisted) == ("you have 8 of 8", 0)
    row = rows_of(ingested)["images/test/pie/pie_1.jpg"]
    assert (row["label"], row["text"], row["split"]) == ("pie", "test, pie 1", "test")
    assert ingested.notes[0] == "test_titles.csv has no header: its columns are read as image, text, label"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.jpg,one\n2.jpg,two\n", "has no header, and its 2 columns cannot be inferred: write the names"),
        ("1.jpg,a,b\n2.jpg,c,d\n", "which column is the label cannot be inferred: write the names"),
        ("1.jpg,a,b\n2.jpg,c\n", r"line 2: '2\.jpg,c' is not a line of 3 fields as in line 1"),
    ],
)
def test_lists_without_header_whose_columns_are_unclear_raise_error(tmp_path: Path, text: str, message: str) -> None:
    write_tree(tmp_path, "1.jpg", "2.jpg", all__csv=text)
    with pytest.raises(DatasetError, match=message):
        ingest("image-text", tmp_path)


def test_twitter_lists_of_tombert(tmp_path: Path) -> None:
    write_tree(tmp_path, "images/1.jpg", "images/2.jpg")
    head = "index\t#1 Label\t#2 ImageID\t#3 String\t#3 String\n"
    write_tree(tmp_path, train__tsv=f'{head}0\t1\t1.jpg\tRT " $T$ said\tNASA\n1\t2\t1.jpg\tRT " NASA $T$\tsaid\n')
    write_tree(
        tmp_path, test__tsv=f"{head.replace('#1 Label	#2', '#1').replace('#3', '#2')}0\t0\t2.jpg\t$T$ !\tMars\n"
    )
    rows = sorted(rows_of(ingest("image-text", tmp_path)).values(), key=lambda row: row["text"])
    assert [(row["image_file_name"], row["label"], row["text"], row["split"]) for row in rows] == [
        ("images/2.jpg", "0", "$T$ ! Mars", "test"),
        ("images/1.jpg", "1", 'RT " $T$ said NASA', "train"),
        ("images/1.jpg", "2", 'RT " NASA $T$ said', "train"),
    ]


def test_header_with_too_few_names_is_the_fault(tmp_path: Path) -> None:
    write_tree(tmp_path, "1.jpg", all__csv="image,label\n1.jpg,a,b\n1.jpg,c,d\n")
    with pytest.raises(
        DatasetError, match="line 1: the header names 2 columns, image, label, and every row has 3 fields"
    ):
        ingest("image-text", tmp_path)


@pytest.mark.parametrize("separator", [";", "|", "\t"])
def test_names_of_columns_and_separators_as_people_write_them(tmp_path: Path, separator: str) -> None:
    write_tree(tmp_path, "img/1.jpg")
    lines = [separator.join([" Image Path ", "Text", "LABEL"]), separator.join(["img\\1.jpg", "one, two", " dog"])]
    (tmp_path / "train.csv").write_bytes("\n".join(lines).encode("utf-16"))
    (tmp_path / "._train.csv").write_bytes(b"\0\5\26\7")
    (row,) = rows_of(ingest("image-text", tmp_path)).values()
    assert (row["image_file_name"], row["text"], row["label"]) == ("img/1.jpg", "one, two", "dog")


# Any download


def test_no_clip_with_media_is_an_error_with_the_spelling(tmp_path: Path) -> None:
    write_tree(
        tmp_path, "video/clip-1.mp4", ".cache/---g-f_I2yQ_1.mp4", vggsound__csv="---g-f_I2yQ,1,people marching,test\n"
    )
    expected = r"0 of 1 listed clips .*expected: VIDEO\.mp4 .*ID_START.*contains 1 media such as video/clip-1\.mp4"
    with pytest.raises(DatasetError, match=expected):
        ingest("vggsound", tmp_path)
    assert not (tmp_path / "metadata.parquet").exists()


def test_download_of_pointers_is_an_error(tmp_path: Path) -> None:
    for name in ("AudioWAV/1001_DFA_ANG_XX.wav", "VideoFlash/1001_DFA_ANG_XX.flv"):
        write_tree(tmp_path, name)
        (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(DatasetError, match="0 of 1 listed clips have their media; audio: 1 Git LFS pointers"):
        ingest("cremad", tmp_path)


@pytest.mark.parametrize("name", DOWNLOADS)
def test_rubbish_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    write_tree(
        tmp_path, "data/1.jpg", "AVE/x.mp4", "audio/x.wav", "visual/x/1.jpg", "AudioWAV/x.wav", "VideoFlash/x.flv"
    )
    for file in ("train.csv", "vggsound.csv", "labelResultAll.txt", "Annotations.txt", "a.pkl"):
        (tmp_path / file).write_bytes(bytes(range(256)))
    with pytest.raises(DatasetError) as caught:
        ingest(name, tmp_path)
    assert len(str(caught.value).splitlines()) == 1
