"""Columns and files that no modality is read from: the lines that name them, and warnings of codes taken for texts."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from arrow_columns import CASES, DOORS, VALUES, N, write_rows

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.dataset.modalities import FileChecks, infer_modalities, parse_modality
from mmaudit.audit.dataset.not_read import NotRead, code_warnings, files_not_read, find_not_read
from mmaudit.audit.errors import ConfigError, DatasetError
from mmaudit.cli.checking import check

SHAPES = {"a.npy": (4, 8), "b.npy": (4, 8), "c.npy": (1, 8), "d.npy": (9, 8)}
FILES = FileChecks(array_shape=SHAPES.get)


def not_read(**columns: Any) -> list[tuple[str, str, str]]:
    sample = pa.table(columns)
    modalities = infer_modalities(sample, excluded=["label"], files=FILES)
    entries = find_not_read(sample, modalities, roles=["label"], files=FILES)
    return [(entry.name, entry.form, entry.remedy) for entry in entries]


@pytest.mark.parametrize(
    ("cells", "form", "remedy"),
    [
        ([[[0.5] * 98] * 40] * 2, "lists of lists of double, 40 x 98", "--modality x=x:features: all its numbers"),
        (
            [[[0.5] * 9] * 40, [[0.5] * 9] * 12],
            "lists of lists of double, 12..40 x 9",
            "pool each to one vector of the",
        ),
        (["a.npy", "b.npy"], ".npy files, 4 x 8", "--modality x=x:features: all its numbers, row by row"),
        (["a.npy", "d.npy"], ".npy files, 4..9 x 8", "pool each to one vector of the same length"),
        (["f/1.pt", "f/2.pt"], "paths of .pt files", "files of pickled objects are never loaded"),
        (["1.pkl", "2.pkl"], "paths of .pkl files", "save the numbers with numpy.save"),
        (["f/1.xyz", "f/2.xyz"], "paths of .xyz files", "no media that are known"),
        (["1.heic", "2.heic"], "paths of .heic files", "convert them to .png or .jpg"),
        (["1.wav", "2.png"], "paths of audio and image files", "write one column for each kind"),
        (["['a.jpg', 'b.jpg']"] * 2, "lists written as text, such as ['a.jpg', 'b.jpg']", "write lists to Parquet"),
        (["[0.5, 1e-3, ...]"] * 2, "lists written as text, such as [0.5", "one path per cell to a csv"),
        (["tensor([1., 2.])"] * 2, "lists written as text", "write lists to Parquet"),
        (["{'bytes': b'x'}"] * 2, "lists written as text", "write lists to Parquet"),
        (["a dog barks", "two cats"], "text", "name all modalities, this one with --modality x=x:text"),
        ([["1.wav", "2.wav"]], "lists of audio files", "write one file per row"),
        ([["red", "blue"]], "lists of strings", "join the strings of a row"),
        ([[{"bytes": b"fLaC"}]], "lists of structs", "of media in lists only pictures are read"),
        ([{"array": [0.5], "path": "1.wav"}], "struct of array, path", "add a field sampling_rate in Hz"),
        ([{"path": "1.wav"}], "struct of path", "write the path as a column of strings"),
        ([{"a": 1}], "struct of a", "write its fields as columns"),
        ([{"bytes": b"?", "path": None}], "struct of bytes, path", "name the kind with --modality"),
        ([b"\x80\x04]q\0."], "pickled objects", "pickled objects are never loaded"),
        ([b"\x93NUMPY\1"], "bytes of .npy", "write the vectors as lists"),
        ([b"?"], "bytes of no known medium", "--modality x=x:KIND"),
        (pa.nulls(2, pa.string()), "string", "null in all rows that were read"),
    ],
)
def test_column_that_is_not_read_is_named_with_type_and_remedy(cells: Any, form: str, remedy: str) -> None:
    [(name, found_form, found_remedy)] = not_read(x=cells)
    assert name == "x"
    assert form in found_form
    assert remedy in found_remedy


def test_name_of_the_modality_is_that_of_the_column() -> None:
    assert "--modality fbank=fbank_path:features" in not_read(fbank_path=["a.npy", "b.npy"])[0][2]


def test_scalars_share_one_line() -> None:
    entries = not_read(age=[3, 4], speaker=["a", "b"], when=["2020-01-01"] * 2, ratio=[0.5, None], label=[1, 2])
    assert entries == [("age, speaker, when, ratio", "numbers, dates or short texts", "no modality")]
    assert not_read(__index_level_0__=[3, 4], label=[1, 2]) == []  # the index of a pandas frame


@pytest.mark.parametrize(
    ("columns", "kind", "in_files"),
    [
        ({"x": ["c.npy", None]}, "features", False),
        ({"x": ["missing.npy"]}, "features", False),
        ({"x": ["t/1.txt", "t/2.TXT", "none"]}, "text", True),
        ({"caption": ["a [b] c", "[noise] hm", "x"]}, "text", False),
        ({"x": [["1.png", "2.png"], [], None]}, "image", False),
        ({"x": [[{"bytes": b"GIF89a", "path": None}], []]}, "image", False),
        ({"x": [[b"GIF89a"]]}, "image", False),
        ({"x": [{"array": [0.5], "path": "1.wav", "sampling_rate": 8_000}]}, "audio", False),
        ({"x": [{"array": [[1], [2]], "sampling_rate": 8_000}]}, "audio", False),
    ],
)
def test_column_is_read(columns: dict[str, list[Any]], kind: str, in_files: bool) -> None:
    [modality] = infer_modalities(pa.table(columns), excluded=[], files=FILES)
    assert (modality.kind, modality.in_files) == (kind, in_files)
    assert parse_modality(str(modality), pa.table(columns), files=FILES) == modality
    assert not_read(**columns) == []


@pytest.mark.parametrize(
    ("cells", "kind", "words"),
    [
        (
            ["['a.jpg', 'b.jpg']"] * 2,
            "text",
            "lists written as text, such as ['a.jpg', 'b.jpg']: write lists to Parquet",
        ),
        (["['a.jpg', 'b.jpg']"] * 2, "image", "lists written as text"),
        (["a.npy", "b.npy"], "text", "cannot be read as text"),
        (["f/1.pt"], "features", "cannot be read as features"),
    ],
)
def test_kind_that_a_column_does_not_hold_is_rejected(cells: list[str], kind: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_modality(f"x=x:{kind}", pa.table({"x": cells}), files=FILES)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["[0.5 1.2\n 3.1]", "['a']", "(1, 2)", "array([1.])", "[None, 1]", "[[1, 2], [3, 4]]"])
def test_printed_lists_are_no_texts(text: str) -> None:
    assert not_read(caption=[text] * 3)[0][1].startswith("lists written as text")


def test_files_are_named_by_extension() -> None:
    entries = files_not_read(["a/1.npy", "a/2.npy", "x", *(f"{number}.e{number}" for number in range(9))])
    assert [str(entry) for entry in entries[:2]] == [
        "not read: *.npy (2 files, such as a/1.npy): name them in a column of a metadata file: they are then read",
        "not read: files without extension (1 file, x): no media that are known",
    ]
    assert [entry.name for entry in entries[2:]] == ["*.e0", "*.e1", "*.e2", "*.e3", "other files"]
    assert entries[-1].form == "5 files, such as 4.e4"


@pytest.mark.parametrize("door", DOORS)
def test_every_type_of_column_is_read_or_named(tmp_path: Path, door: str, caplog: pytest.LogCaptureFixture) -> None:
    """Columns of all types beside two modalities: no error, and each is a modality or in a line."""
    caplog.set_level(logging.INFO, "mmaudit")
    stored = {name: array for name, (array, _, _) in CASES.items() if door == "saved" or "view" not in name}
    if door == "parquet":
        stored = {
            name: array for name, array in stored.items() if name not in ("run ends", "interval", "list of halves")
        }
    columns = {name: pa.concat_arrays([array.slice(0, 1)] * N) for name, array in stored.items()}
    columns |= {"label": pa.array(VALUES["label"])}
    dataset = open_dataset(write_rows(columns, door, tmp_path / "d"))
    named = {name for entry in dataset.not_read for name in entry.name.split(", ")}
    assert {modality.column for modality in dataset.modalities} >= {"a", "b"}
    assert named | {modality.column for modality in dataset.modalities} | {"label"} == set(dataset.schema.names)
    assert all(str(entry) in caplog.text for entry in dataset.not_read)


def table_folder(folder: Path, source: Path, rows: list[dict[str, Any]]) -> Path:
    shutil.copytree(source, folder)
    (folder / "metadata.csv").unlink()
    lines = [
        json.dumps({"audio_path": f"{n}.wav", "image_path": f"{n}.png", "label": str(n % 2), **row})
        for n, row in enumerate(rows)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_check_returns_what_is_not_read(tmp_path: Path, clip_source: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"mfcc": [[0.5] * 3] * 2, "model": f"{n}.pt", "age": n} for n in range(12)]
    data = table_folder(tmp_path / "d", clip_source, rows)
    result = check(data, run=tmp_path / "run", num_workers=0, progress=False)
    assert [entry["name"] for entry in result.to_dict()["not_read"]] == ["mfcc", "model", "age"]
    assert result.not_read[2] == NotRead(
        name="age", form="numbers, dates or short texts", remedy="no modality", is_minor=True
    )
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.split(" (")[0] for text in warned] == ["not read: mfcc", "not read: model"]


def test_named_modalities_leave_nothing_to_name(tmp_path: Path, clip_source: Path) -> None:
    data = table_folder(tmp_path / "d", clip_source, [{"mfcc": [[0.5] * 3] * 2} for _ in range(12)])
    modality = ("a=audio_path", "i=image_path")
    assert open_dataset(data, DataConfig(modality=modality)).not_read == ()


def test_columns_are_named_before_too_few_modalities_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", np.zeros((4, 8), np.float32))
    lines = [f"{number}.png,{number}.npy,{number % 2}" for number in range(4)]
    (tmp_path / "metadata.csv").write_text("\n".join(["image_path,fbank_path,label", *lines]))
    with pytest.raises(DatasetError, match="only one modality, image"):
        open_dataset(tmp_path)
    assert "not read: fbank_path (.npy files, 4 x 8): pool each to one vector" in caplog.text


@pytest.mark.parametrize(
    ("column", "values", "warns"),
    [
        ("sentence", ["IEO", "TIE", "IOM"] * 20, True),
        ("utterance", [f"Ses01F_impro{row:02d}" for row in range(60)], True),
        ("title", ["01", "02"] * 30, True),
        ("sentence", ["IEO", "TIE", "IOM"] * 2, False),  # too few rows to tell
        ("text", ["IEO", "TIE", "IOM"] * 20, False),
        ("caption", ["a dog", "a cat", "dogs"] * 20, False),
        ("review", [f"word{chr(97 + row % 26)}{chr(97 + row // 26)}" for row in range(60)], False),
        ("sentence", ["好的", "不好"] * 30, False),
        ("transcript", ["yes", "no", "this is a longer answer"] * 20, False),
    ],
)
def test_codes_that_are_read_as_text_are_warned_of(column: str, values: list[str], warns: bool) -> None:
    sample = pa.table({column: values})
    modalities = infer_modalities(sample, excluded=[])
    assert [modality.kind for modality in modalities] == ["text"]
    warnings = list(code_warnings(sample, modalities))
    assert len(warnings) == warns
    if warns:
        number = len(set(values))
        assert f"{column} is read as text, but holds codes ({number} different in {len(values)} rows" in warnings[0]
