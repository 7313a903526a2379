"""Tests of all adapters: one row per listed clip, same bytes for the same files, one line per error."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import mmaudit
from mmaudit.audit.dataset.dataset import open_dataset
from mmaudit.audit.downloads import DOWNLOADS
from mmaudit.audit.downloads.clips import list_frame_folders, list_media
from mmaudit.audit.downloads.ingest import Ingested, ingest
from mmaudit.audit.errors import ConfigError, DatasetError
from mmaudit.audit.storage import read_parquet
from mmaudit.cli.console import print_ingest


def write_files(root: Path, *names: str, content: bytes = b"medium") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_cremad(root: Path) -> None:
    clips = ["1001_DFA_ANG_XX", "1001_IEO_HAP_HI", "1002_DFA_NEU_XX"]
    write_files(root, *(f"AudioWAV/{clip}.wav" for clip in clips), *(f"VideoFlash/{clip}.flv" for clip in clips))


def write_ave(root: Path) -> None:
    write_files(root, *(f"AVE/{video}.mp4" for video in ("RUhOCu3LNXM", "fCZi6I6kPpU", "XXXXXXXXXX1")))
    write_files(root, "trainSet.txt", content=b"Church bell&RUhOCu3LNXM&good&0&10\nTruck&RUhOCu3LNXM&good&2&9\n")
    write_files(root, "valSet.txt", content=b"Rodents, rats, mice&fCZi6I6kPpU&good&6&10\n")
    write_files(root, "testSet.txt", content=b"Accordion&XXXXXXXXXX1&good&0&10\n")


def write_vggsound(root: Path) -> None:
    write_files(root, "video/---g-f_I2yQ_000001.mp4", "video/--0PQM4-hqg_30.mp4", "video/--0PQM4-hqg_000060.mp4")
    lines = [
        "---g-f_I2yQ,1,people marching,test",
        '--0PQM4-hqg,30,"waterfall, burbling",train',
        "--0PQM4-hqg,60,rain,train",
    ]
    write_files(root, "vggsound.csv", content="\n".join(lines).encode())


def write_kinetics(root: Path) -> None:
    write_files(root, "train/bowling/abcdefghijk_000010_000020.mp4", "val/singing/bbcdefghijk_000001_000011.mp4")
    write_files(root, "train/abseiling/cbcdefghijk_000001_000011.mp4")
    head = "label,youtube_id,time_start,time_end,split\n"
    train = "bowling,abcdefghijk,10,20,train\nabseiling,cbcdefghijk,1,11,train\n"
    write_files(root, "annotations/train.csv", content=(head + train).encode())
    write_files(root, "annotations/validate.csv", content=f"{head}singing,bbcdefghijk,1,11,validate\n".encode())


def write_ucf101(root: Path) -> None:
    clips = ["v_YoYo_g08_c01", "v_YoYo_g08_c02", "v_HandstandPushups_g01_c01"]
    for clip in clips:
        streams = ("jpegs_256", "tvl1_flow/u", "tvl1_flow/v")
        write_files(root, *(f"{stream}/{clip}/frame000001.jpg" for stream in streams))
    lists = {
        "classInd": "1 HandstandPushups\n2 YoYo\n",
        "trainlist01": "YoYo/v_YoYo_g08_c01.avi 2\nYoYo/v_YoYo_g08_c02.avi 2\n",
        "testlist01": "HandstandPushups/v_HandStandPushups_g01_c01.avi\n",
    }
    for name, text in lists.items():
        write_files(root, f"ucfTrainTestlist/{name}.txt", content=text.encode())


def mosei_part(ids: list[str]) -> dict[str, Any]:
    n, rng = len(ids), np.random.default_rng(0)
    shapes = {"text": (n, 5, 4), "audio": (n, 7, 2), "vision": (n, 3, 3)}
    features = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {"id": ids, "raw_text": ["well"] * n, **features, "regression_labels": np.linspace(-3, 3, n)}


def write_mosei(root: Path) -> None:
    content = {"train": mosei_part(["a$_$0", "a$_$1"]), "valid": mosei_part(["b$_$0"]), "test": mosei_part(["c$_$0"])}
    write_files(root, "Processed/unaligned_50.pkl", content=pickle.dumps(content))


def write_image_text(root: Path) -> None:
    write_files(root, "img/1.png", "img/2.png", "img/3.png")
    lines = [f'{{"id": {n}, "img": "img/{n}.png", "text": "words {n}", "label": {n % 2}}}' for n in (1, 2)]
    write_files(root, "train.jsonl", content="\n".join(lines).encode())
    write_files(root, "dev.jsonl", content=b'{"id": 3, "img": "img/3.png", "text": "others", "label": 1}\n')


def write_mvsa(root: Path) -> None:
    write_files(root, "data/1.jpg", "data/2.jpg")
    write_files(root, "data/1.txt", "data/2.txt", content=b"well")
    write_files(root, "labelResultAll.txt", content=b"ID\ttext,image\n1\tpositive,neutral\n2\tneutral,negative\n")


def write_ogm_ge(root: Path) -> None:
    clips = ["1001_DFA_ANG_XX", "1001_IEO_HAP_HI", "1002_DFA_NEU_XX"]
    write_files(
        root, *(f"AudioWAV/{clip}.wav" for clip in clips), *(f"Image-01-FPS/{clip}/00001.jpg" for clip in clips)
    )
    write_files(root, "train.csv", content=b"\xef\xbb\xbf1001_DFA_ANG_XX,ANG\n1001_IEO_HAP_HI,HAP\n")
    write_files(root, "test.csv", content=b"1002_DFA_NEU_XX,NEU\n")


WRITERS: dict[str, Callable[[Path], None]] = {
    "cremad": write_cremad,
    "ave": write_ave,
    "kinetics-sounds": write_kinetics,
    "vggsound": write_vggsound,
    "ucf101": write_ucf101,
    "mosei": write_mosei,
    "image-text": write_image_text,
    "mvsa": write_mvsa,
    "ogm-ge": write_ogm_ge,
}
# A medium of each download that is removed, the modality that is then missing, and the clip.
REMOVED = {
    "cremad": ("VideoFlash/1001_IEO_HAP_HI.flv", "video", "1001_IEO_HAP_HI"),
    "ave": ("AVE/fCZi6I6kPpU.mp4", "video", "fCZi6I6kPpU"),
    "kinetics-sounds": ("val/singing/bbcdefghijk_000001_000011.mp4", "video", "bbcdefghijk_000001_000011"),
    "vggsound": ("video/--0PQM4-hqg_30.mp4", "video", "--0PQM4-hqg_000030"),
    "ucf101": ("tvl1_flow/v/v_YoYo_g08_c02", "flow", "v_YoYo_g08_c02"),
    "image-text": ("img/2.png", "image", "2"),
    "mvsa": ("data/2.jpg", "image", "2"),
    "ogm-ge": ("Image-01-FPS/1002_DFA_NEU_XX", "visual", "1002_DFA_NEU_XX"),
}

# The modalities that are inferred from the columns.
MODALITIES = {
    "cremad": ["audio=audio_file_name:audio", "visual=video_file_name:video"],
    "ave": ["audio=video_file_name:audio", "visual=video_file_name:video"],
    "kinetics-sounds": ["audio=video_file_name:audio", "visual=video_file_name:video"],
    "vggsound": ["audio=video_file_name:audio", "visual=video_file_name:video"],
    "ucf101": ["rgb=rgb_frames:frames", "flow=flow_frames:frames"],
    "mosei": ["text=text:features", "audio=audio:features", "vision=vision:features"],
    "image-text": ["image=image_file_name:image", "text=text:text"],
    "mvsa": ["image=image_file_name:image", "text=text:text"],
    "ogm-ge": ["audio=audio_file_name:audio", "visual=visual_frames:frames"],
}


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a small download for an adapter."""

    def make(name: str) -> Path:
        root = tmp_path / name
        root.mkdir()
        WRITERS[name](root)
        return root

    return make


def rows_of(ingested: Ingested) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(ingested.path).to_pylist()}


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_all_adapters_are_covered() -> None:
    assert set(WRITERS) == set(MODALITIES) == set(DOWNLOADS)


@pytest.mark.parametrize("name", DOWNLOADS)
def test_every_listed_clip_is_a_row(tree: Callable[[str], Path], name: str) -> None:
    root = tree(name)
    ingested = ingest(name, root)
    table, provenance = read_parquet(ingested.path, error=DatasetError)
    assert ingested.path == root / "metadata.parquet"
    assert table.num_rows == ingested.listed == ingested.present
    assert (ingested.missing, ingested.columns) == ((), tuple(table.column_names))
    assert table["id"].to_pylist() == sorted(set(table["id"].to_pylist()))
    assert table["label"].null_count == 0
    splits = table["split"].to_pylist() if "split" in ingested.columns else []
    assert set(splits) <= {"train", "validation", "test"}
    provenance_keys = {key: provenance[key] for key in ("schema", "adapter", "version", "listed", "present")}
    assert provenance_keys == {
        "schema": "mmaudit.metadata/1",
        "adapter": name,
        "version": mmaudit.__version__,
        "listed": table.num_rows,
        "present": table.num_rows,
    }


@pytest.mark.parametrize("name", DOWNLOADS)
def test_columns_are_inferred_as_intended_modalities(tree: Callable[[str], Path], name: str) -> None:
    dataset = open_dataset(ingest(name, tree(name)).path)
    assert [str(modality) for modality in dataset.modalities] == MODALITIES[name]
    assert (dataset.columns.id, dataset.columns.label) == (("id",), "label")
    assert (dataset.columns.group, dataset.columns.split) == tuple(
        role if role in dataset.schema.names else None for role in ("group", "split")
    )


@pytest.mark.parametrize("name", DOWNLOADS)
def test_same_files_give_same_bytes(tree: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    first = ingest(name, tree(name)).path.read_bytes()
    root = tmp_path / "elsewhere"
    WRITERS[name](root)  # the same files written in reverse order, in another folder
    for path in sorted((path for path in root.rglob("*") if path.is_file()), reverse=True):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    assert ingest(name, root).path.read_bytes() == first
    assert ingest(name, root).path.read_bytes() == first  # the table itself is not counted as a medium


@pytest.mark.parametrize("name", REMOVED)
def test_missing_medium_is_counted_and_its_row_is_kept(tree: Callable[[str], Path], name: str) -> None:
    root = tree(name)
    all_rows = rows_of(ingest(name, root))
    removed, modality, clip = REMOVED[name]
    (shutil.rmtree if (root / removed).is_dir() else Path.unlink)(root / removed)
    ingested = ingest(name, root)
    assert (ingested.listed, ingested.present) == (len(all_rows), len(all_rows) - 1)
    (missing,) = ingested.missing
    assert (missing.modality, missing.count, missing.examples) == (modality, 1, (clip,))
    assert f"missing: {modality} 1 (such as {clip})" in ingested.message
    rows = rows_of(ingested)
    assert rows.keys() == all_rows.keys()
    assert all(cell is not None for cell in rows[clip].values())


@pytest.mark.parametrize("name", REMOVED)
def test_paths_are_relative_to_the_table(tree: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    root = tree(name)
    default_table, parent_table = ingest(name, root), ingest(name, root, out=tmp_path / "above.parquet")
    assert parent_table.path == tmp_path / "above.parquet"
    for start, rows in ((root, rows_of(default_table)), (tmp_path, rows_of(parent_table))):
        for row in rows.values():
            cells = [row[column] for column in row if column.endswith(("_file_name", "_frames"))]
            paths = [path for cell in cells for path in ([cell] if isinstance(cell, str) else cell)]
            assert paths
            assert all((start / path).exists() for path in paths)


@pytest.mark.parametrize("name", DOWNLOADS)
def test_other_folder_raises_error_naming_missing_files(tmp_path: Path, name: str) -> None:
    write_files(tmp_path, "holiday.doc", "pictures/me.jpg")
    with pytest.raises(DatasetError, match=r"as unpacked: it has no .*; it contains holiday\.doc, pictures/$"):
        ingest(name, tmp_path)
    assert not (tmp_path / "metadata.parquet").exists()
    with pytest.raises(DatasetError, match="no such folder"):
        ingest(name, tmp_path / "none")


@pytest.mark.parametrize("name", DOWNLOADS)
def test_missing_list_raises_error(tree: Callable[[str], Path], name: str) -> None:
    with pytest.raises(DatasetError, match=r"no such list: .*none\.csv"):
        ingest(name, tree(name), lists=["none.csv"])


def test_unknown_adapter_suggests_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ingest crema-d: no such name; did you mean cremad\? \(available: "):
        ingest("crema-d", tmp_path)


def test_installed_adapter_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cremad_twin-1.dist-info").mkdir()
    (tmp_path / "cremad_twin-1.dist-info" / "METADATA").write_text("Name: cremad-twin\nVersion: 1\n")
    entry_points = "[mmaudit.downloads]\ntwin = mmaudit.audit.downloads.cremad:read_cremad\n"
    (tmp_path / "cremad_twin-1.dist-info" / "entry_points.txt").write_text(entry_points)
    monkeypatch.syspath_prepend(tmp_path)
    write_cremad(tmp_path / "data")
    assert ingest("twin", tmp_path / "data").message == "you have 3 of 7,442; 7,439 have no files and no row"


def test_output_must_be_in_or_above_the_folder(tree: Callable[[str], Path], tmp_path: Path) -> None:
    root = tree("cremad")
    for out in (root / "AudioWAV" / "m.parquet", tmp_path / "beside" / "m.parquet"):
        with pytest.raises(DatasetError, match=r"outside its own folder: write it into .*cremad or a folder above"):
            ingest("cremad", root, out=out)
    with pytest.raises(ConfigError, match=r"the file must be \.parquet"):
        ingest("cremad", root, out=root / "metadata.csv")


def test_damaged_list_leaves_existing_table_unchanged(tree: Callable[[str], Path]) -> None:
    root = tree("ogm-ge")
    before = ingest("ogm-ge", root).path.read_bytes()
    replace_text(root / "train.csv", "1001_IEO_HAP_HI,HAP", "1001_IEO_HAP_HI")
    with pytest.raises(DatasetError, match=r"train\.csv, line 2: '1001_IEO_HAP_HI' is not CLIP,LABEL"):
        ingest("ogm-ge", root)
    assert (root / "metadata.parquet").read_bytes() == before


def test_paths_outside_the_folder_raise_error(tree: Callable[[str], Path]) -> None:
    for name, lines in (("ogm-ge", "train.csv"), ("vggsound", "vggsound.csv"), ("ave", "trainSet.txt")):
        root = tree(name)
        text = {"ogm-ge": "../../x,ANG", "vggsound": "../../x,1,rain,train", "ave": "Truck&../../x&good&2&9"}[name]
        write_files(root, lines, content=text.encode())
        with pytest.raises(DatasetError, match=rf"{lines}, line 1: '.*\.\./\.\./x.*' leads outside the folder"):
            ingest(name, root)


def test_empty_files_and_lfs_pointers_count_as_missing(tree: Callable[[str], Path]) -> None:
    root = tree("cremad")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    write_files(root, "AudioWAV/1001_DFA_ANG_XX.wav", content=pointer)
    write_files(root, "AudioWAV/1002_DFA_NEU_XX.wav", content=b"")
    ingested = ingest("cremad", root)
    assert ingested.present == 1
    assert ingested.notes == ("audio: 1 Git LFS pointers (git lfs pull fetches the files)", "audio: 1 empty")


def test_second_metadata_table_is_noted(tree: Callable[[str], Path]) -> None:
    root = tree("cremad")
    write_files(root, "metadata.csv")
    (note,) = ingest("cremad", root).notes
    assert "also contains metadata.csv: pass " in note


def test_printed_notes_are_not_repeated(tree: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    root = tree("cremad")
    write_files(root, "AudioWAV/1001_DFA_ANG_XX.wav", content=b"")
    write_files(root, "metadata.csv")
    summary = mmaudit.ingest("cremad", root).to_dict()
    print_ingest(summary)
    printed = capsys.readouterr().out
    assert len(summary["notes"]) == 2
    for text in (summary["message"], *summary["notes"], summary["path"]):
        assert printed.count(text) == 1 + (text == summary["path"])  # the note on a second table contains the path, too
    assert printed.count("1 empty") == 1


def test_numbers_in_message_have_thousands_separators(tree: Callable[[str], Path]) -> None:
    assert ingest("cremad", tree("cremad")).message == "you have 3 of 7,442; 7,439 have no files and no row"


# CREMA-D


def test_cremad_parses_file_names(tree: Callable[[str], Path]) -> None:
    root = tree("cremad")
    write_files(root, "AudioWAV/1040_ITH_SAD_X.wav", "VideoFlash/1040_ITH_SAD_XX.mp4", "AudioWAV/notes.wav")
    ingested = ingest("cremad", root)
    rows = rows_of(ingested)
    assert rows["1040_ITH_SAD_XX"] == {
        "id": "1040_ITH_SAD_XX",
        "label": "SAD",
        "group": "1040",
        "actor": "1040",
        "sentence_code": "ITH",
        "level": "XX",
        "audio_file_name": "AudioWAV/1040_ITH_SAD_X.wav",
        "video_file_name": "VideoFlash/1040_ITH_SAD_XX.mp4",
    }
    assert (len(rows), ingested.present, ingested.unlisted) == (4, 4, 1)


def test_cremad_lists_define_split_and_keep_actor_groups(tree: Callable[[str], Path]) -> None:
    root = tree("cremad")
    write_files(root, "train.csv", content=b"1001_DFA_ANG_XX,ANG\n1003_DFA_SAD_XX,SAD\n1001_DFA_ANG_XX,ANG\n")
    write_files(root, "test.csv", content=b"1001_IEO_HAP_HI,HAP\n")
    ingested = ingest("cremad", root, lists=[root / "train.csv", root / "test.csv"])
    rows = rows_of(ingested)
    assert {name: (row["split"], row["group"]) for name, row in rows.items()} == {
        "1001_DFA_ANG_XX": ("train", "1001"),
        "1001_IEO_HAP_HI": ("test", "1001"),
        "1003_DFA_SAD_XX": ("train", "1003"),
    }
    assert (ingested.listed, ingested.present, ingested.official, ingested.unlisted) == (3, 2, 3, 2)
    assert ingested.notes == ("1 repeated lines were ignored",)


@pytest.mark.parametrize("line", ["1001_DFA_ANG_XX,HAP", "1001_DFA_ANG_XX", "1001_DFA_JOY_XX,JOY", "clip,label"])
def test_cremad_line_inconsistent_with_name_raises_error(tree: Callable[[str], Path], line: str) -> None:
    root = tree("cremad")
    write_files(root, "train.csv", content=f"1001_DFA_ANG_XX,ANG\n{line}\n".encode())
    with pytest.raises(DatasetError, match=rf"train\.csv, line 2: '{line}' is not CLIP,EMOTION"):
        ingest("cremad", root, lists=[root / "train.csv"])


def test_clip_in_two_splits_raises_error(tree: Callable[[str], Path]) -> None:
    root = tree("cremad")
    write_files(root, "train.csv", "test.csv", content=b"1001_DFA_ANG_XX,ANG\n")
    with pytest.raises(DatasetError, match=r"has two different entries: .*train\.csv, line 1 and .*test\.csv, line 1"):
        ingest("cremad", root, lists=[root / "train.csv", root / "test.csv"])
    write_files(root, "mine.csv", content=b"1001_DFA_ANG_XX,ANG\n")
    with pytest.raises(
        DatasetError, match=r"mine\.csv: the split cannot be inferred from the file name: name it train, val or test"
    ):
        ingest("cremad", root, lists=[root / "mine.csv"])


# AVE


def test_ave_has_one_row_per_event(tree: Callable[[str], Path]) -> None:
    rows = rows_of(ingest("ave", tree("ave")))
    assert {name: (row["label"], row["group"], row["split"]) for name, row in rows.items()} == {
        "RUhOCu3LNXM:Church bell:0-10": ("Church bell", "RUhOCu3LNXM", "train"),
        "RUhOCu3LNXM:Truck:2-9": ("Truck", "RUhOCu3LNXM", "train"),
        "XXXXXXXXXX1": ("Accordion", "XXXXXXXXXX1", "test"),
        "fCZi6I6kPpU": ("Rodents, rats, mice", "fCZi6I6kPpU", "validation"),
    }
    assert rows["RUhOCu3LNXM:Truck:2-9"]["video_file_name"] == "AVE/RUhOCu3LNXM.mp4"
    assert (rows["fCZi6I6kPpU"]["start_seconds"], rows["fCZi6I6kPpU"]["end_seconds"]) == (6, 10)


def test_ave_reads_parent_folder_and_annotations_without_split(tmp_path: Path) -> None:
    write_files(tmp_path, "AVE_Dataset/AVE/RUhOCu3LNXM.mp4")
    text = b"Category&VideoID&Quality&StartTime&EndTime\nChurch bell&RUhOCu3LNXM&good&0&10\n"
    write_files(tmp_path, "AVE_Dataset/Annotations.txt", content=text)
    ingested = ingest("ave", tmp_path)
    assert "split" not in ingested.columns
    assert rows_of(ingested)["RUhOCu3LNXM"]["video_file_name"] == "AVE_Dataset/AVE/RUhOCu3LNXM.mp4"


def test_ave_notes_events_missing_from_split_lists(tree: Callable[[str], Path]) -> None:
    root = tree("ave")
    annotations = b"Category&VideoID&Quality&StartTime&EndTime\nBark&YYYYYYYYYYY&good&0&1\n"
    write_files(root, "Annotations.txt", content=annotations)
    assert ingest("ave", root).notes == ("1 events of Annotations.txt are in none of the lists read and have no row",)
    (root / "valSet.txt").unlink()
    with pytest.raises(DatasetError, match=r"contains testSet\.txt but no valSet\.txt"):
        ingest("ave", root)


@pytest.mark.parametrize("line", ["Truck&RUhOCu3LNXM&good&2", "Truck&RUhOCu3LNXM&good&two&9", "&x&good&2&9"])
def test_ave_damaged_line_raises_error(tree: Callable[[str], Path], line: str) -> None:
    root = tree("ave")
    replace_text(root / "trainSet.txt", "Truck&RUhOCu3LNXM&good&2&9", line)
    with pytest.raises(DatasetError, match=rf"trainSet\.txt, line 2: '{line}' is not Category&VideoID"):
        ingest("ave", root)


# VGGSound and Kinetics-Sounds


def test_vggsound_finds_both_file_name_formats(tree: Callable[[str], Path]) -> None:
    rows = rows_of(ingest("vggsound", tree("vggsound")))
    assert {name: (row["label"], row["group"], row["split"]) for name, row in rows.items()} == {
        "---g-f_I2yQ_000001": ("people marching", "---g-f_I2yQ", "test"),
        "--0PQM4-hqg_000030": ("waterfall, burbling", "--0PQM4-hqg", "train"),
        "--0PQM4-hqg_000060": ("rain", "--0PQM4-hqg", "train"),
    }
    assert rows["--0PQM4-hqg_000030"]["video_file_name"] == "video/--0PQM4-hqg_30.mp4"


@pytest.mark.parametrize("line", ["--0PQM4-hqg,sixty,rain,train", "--0PQM4-hqg,60,rain", "--0PQM4-hqg,60,rain,val"])
def test_vggsound_damaged_line_raises_error(tree: Callable[[str], Path], line: str) -> None:
    root = tree("vggsound")
    replace_text(root / "vggsound.csv", "--0PQM4-hqg,60,rain,train", line)
    with pytest.raises(DatasetError, match=rf"vggsound\.csv, line 3: '{line}' is not YOUTUBE_ID,START,LABEL,SPLIT"):
        ingest("vggsound", root)
    replace_text(root / "vggsound.csv", '"waterfall', '"water"fall')
    with pytest.raises(DatasetError, match=r"vggsound\.csv, line 2: .*correct the quoting"):
        ingest("vggsound", root)


def test_kinetics_keeps_only_kinetics_sounds_classes(tree: Callable[[str], Path]) -> None:
    root = tree("kinetics-sounds")
    write_files(root, "annotations/test.csv", content=b"youtube_id,time_start,time_end,split\nzzzzzzzzzzz,1,2,test\n")
    ingested = ingest("kinetics-sounds", root)
    assert {name: (row["label"], row["group"], row["split"]) for name, row in rows_of(ingested).items()} == {
        "abcdefghijk_000010_000020": ("bowling", "abcdefghijk", "train"),
        "bbcdefghijk_000001_000011": ("singing", "bbcdefghijk", "validation"),
    }
    assert ingested.unlisted == 1
    assert ingested.notes == (
        "test.csv has no labels: skipped",
        "kept 2 of 3 listed classes, those among the 31 of Kinetics-Sounds: 2 of 3 clips",
    )


def test_kinetics_unsuitable_lists_raise_error(tree: Callable[[str], Path]) -> None:
    root = tree("kinetics-sounds")
    write_files(root, "other.csv", content=b"a,b\n1,2\n")
    with pytest.raises(DatasetError, match="it has no csv with the columns label, youtube_id, time_start, time_end"):
        ingest("kinetics-sounds", root, lists=[root / "other.csv"])
    head = b"label,youtube_id,time_start,time_end,split\n"
    write_files(root, "other.csv", content=head + b"abseiling,abcdefghijk,10,20,train\n")
    with pytest.raises(DatasetError, match="none of the 31 classes"):
        ingest("kinetics-sounds", root, lists=[root / "other.csv"])
    for line in (b"bowling,abcdefghijk,10,20", b"bowling,abcdefghijk,10,20,all", b"bowling,abcdefghijk,-1,9,train"):
        write_files(root, "other.csv", content=head + line)
        with pytest.raises(DatasetError, match=rf"other\.csv, line 2: '{line.decode()}' is not a line of label"):
            ingest("kinetics-sounds", root, lists=[root / "other.csv"])


# UCF-101


def test_ucf101_pairs_frames_and_flow(tree: Callable[[str], Path]) -> None:
    root = tree("ucf101")
    rows = rows_of(ingest("ucf101", root))
    assert rows["v_HandStandPushups_g01_c01"] == {
        "id": "v_HandStandPushups_g01_c01",
        "label": "HandstandPushups",
        "group": "HandstandPushups_g01",
        "split": "test",
        "rgb_frames": "jpegs_256/v_HandstandPushups_g01_c01",
        "flow_frames": [f"tvl1_flow/{axis}/v_HandstandPushups_g01_c01" for axis in "uv"],
    }
    assert rows["v_YoYo_g08_c01"]["group"] == rows["v_YoYo_g08_c02"]["group"] == "YoYo_g08"
    (root / "jpegs_256" / "v_YoYo_g08_c01" / "frame000001.jpg").unlink()
    assert ingest("ucf101", root).notes == ("rgb: 1 without pictures",)


def test_ucf101_reads_another_fold(tree: Callable[[str], Path]) -> None:
    root = tree("ucf101")
    write_files(root, "ucfTrainTestlist/testlist02.txt", content=b"YoYo/v_YoYo_g08_c01.avi\n")
    ingested = ingest("ucf101", root, lists=[root / "ucfTrainTestlist" / "testlist02.txt"])
    assert {name: row["split"] for name, row in rows_of(ingested).items()} == {"v_YoYo_g08_c01": "test"}
    assert ingested.unlisted == 6


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("YoYo/v_YoYo_g08_c02.avi 1", "the class YoYo, which is number 2"),
        ("YoYo/v_YoYo_g08_c02", "CLASS/v_CLASS_gNN"),
        ("Yo/v_YoYo_g08_c02.avi 2", "CLASS/v_CLASS_gNN"),
    ],
)
def test_ucf101_damaged_line_raises_error(tree: Callable[[str], Path], line: str, expected: str) -> None:
    root = tree("ucf101")
    replace_text(root / "ucfTrainTestlist" / "trainlist01.txt", "YoYo/v_YoYo_g08_c02.avi 2", line)
    with pytest.raises(DatasetError, match=rf"trainlist01\.txt, line 2: '{line}' is not {expected}"):
        ingest("ucf101", root)


def test_ucf101_videos_instead_of_frames_raise_error(tmp_path: Path) -> None:
    write_files(tmp_path, "UCF-101/YoYo/v_YoYo_g08_c01.avi")
    with pytest.raises(DatasetError, match=r"no jpegs_256/, no .*the folder has the videos, from which frames"):
        ingest("ucf101", tmp_path)


# The OGM-GE code


def test_ogm_ge_groups_by_actor(tree: Callable[[str], Path]) -> None:
    rows = rows_of(ingest("ogm-ge", tree("ogm-ge")))
    assert rows["1002_DFA_NEU_XX"] == {
        "id": "1002_DFA_NEU_XX",
        "label": "NEU",
        "group": "1002",
        "split": "test",
        "audio_file_name": "AudioWAV/1002_DFA_NEU_XX.wav",
        "visual_frames": "Image-01-FPS/1002_DFA_NEU_XX",
    }


def test_ogm_ge_reads_each_list_format(tmp_path: Path) -> None:
    write_files(tmp_path, "audio/abcdefghijk_5.wav", "visual/abcdefghijk_5/1.jpg", "stat.txt", content=b"Bark\nTruck\n")
    write_files(tmp_path, "audio/one.wav", "visual/one/1.jpg")
    write_files(tmp_path, "my_train.txt", content=b"Bark,one\nTruck,one\n")
    write_files(tmp_path, "my_test.txt", content=b"Truck,two\n")
    rows = rows_of(ingest("ogm-ge", tmp_path))
    assert {name: (row["label"], row["group"]) for name, row in rows.items()} == {
        "one:Bark": ("Bark", "one"),
        "one:Truck": ("Truck", "one"),
        "two": ("Truck", "two"),
    }
    (tmp_path / "stat.txt").unlink()
    write_files(tmp_path, "my_train.txt", content=b"abcdefghijk_5,10,23\n")
    write_files(tmp_path, "my_test.txt", content=b"bbcdefghijk_65,10,2\n")
    rows = rows_of(ingest("ogm-ge", tmp_path))
    assert {name: (row["label"], row["group"]) for name, row in rows.items()} == {
        "abcdefghijk_5": ("23", "abcdefghijk"),
        "bbcdefghijk_65": ("2", "bbcdefghijk"),
    }
    assert rows["bbcdefghijk_65"]["audio_file_name"] == "audio/bbcdefghijk_65.wav"


def test_ogm_ge_ambiguous_lists_raise_error(tree: Callable[[str], Path]) -> None:
    root = tree("ogm-ge")
    write_files(root, "stat.csv", content=b"ANG\nHAP\n")
    with pytest.raises(DatasetError, match=r"test\.csv, line 1: .* is not a clip with one of the 2 classes"):
        ingest("ogm-ge", root)
    write_files(root, "my_train.csv")
    with pytest.raises(
        DatasetError, match=r"contains both my_train\.csv and test\.csv: pass the lists to read with --list"
    ):
        ingest("ogm-ge", root)


def test_spectrograms_in_pickles_are_not_read(tree: Callable[[str], Path]) -> None:
    root = tree("ogm-ge")
    (root / "AudioWAV").rename(root / "audio_spec")
    with pytest.raises(DatasetError, match="audio_spec/ contains pickled spectrograms, which are never read"):
        ingest("ogm-ge", root)


def test_list_that_is_not_utf8_raises_error(tree: Callable[[str], Path]) -> None:
    root = tree("ogm-ge")
    write_files(root, "train.csv", content=b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match=r"train\.csv cannot be read as text"):
        ingest("ogm-ge", root)


def test_linked_folders_are_read_unless_they_lead_to_a_parent(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "clip").mkdir(parents=True)
    (elsewhere / "clip" / "0.png").touch()
    (elsewhere / "1.wav").touch()
    root = tmp_path / "root"
    (root / "media").mkdir(parents=True)
    (root / "media" / "link").symlink_to(elsewhere)
    assert list_media(root, "media", kind="audio") == ["media/link/1.wav"]
    assert list_frame_folders(root, "media") == ["media/link/clip"]
    (elsewhere / "back").symlink_to(root)
    for search in (partial(list_media, kind="audio"), list_frame_folders):
        with pytest.raises(DatasetError, match="back links to one of its parents"):
            search(root, "media")
