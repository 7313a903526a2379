"""Modalities: inference from columns, and the option `--modality`."""

from __future__ import annotations

import logging

import pyarrow as pa
import pytest

from mmaudit.audit.dataset.modalities import (
    FileChecks,
    Modality,
    check_modalities,
    holds_bytes,
    holds_files,
    holds_folders,
    infer_modalities,
)
from mmaudit.audit.dataset.modalities import parse_modality as parse
from mmaudit.audit.errors import ConfigError, DatasetError
from mmaudit.audit.media.files import kind_of_path

HEAD = pa.table(
    {
        "file_name": ["a.WAV", "b.flac"],
        "clip": ["x.mp4", None],
        "mixed": ["a.wav", "b.png"],
        "words": ["two words", "one.Two"],
        "vector": [[1.0, 2.0], [3.0, 4.0]],
        "raw": [b"RIFF", b"RIFF"],
        "heard": [b"fLaC", b"OggS"],
        "folders": [["u/a", "v/a"], ["u/b", "v/b"]],
        "picture": [{"bytes": b"x", "path": "x.png"}] * 2,
        "age": [3, 4],
    }
)


def inferred(**columns: object) -> list[str]:
    return [str(modality) for modality in infer_modalities(pa.table(columns), excluded=["label"])]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("a/b.WAV", "audio"),
        ("a.b.jpeg", "image"),
        ("x.webm", "video"),
        ("wav", None),
        ("a.wav/readme.txt", None),
        ("", None),
        ("http://x.y/a.mp3", "audio"),
    ],
)
def test_kind_is_inferred_from_extension(path: str, kind: str | None) -> None:
    assert kind_of_path(path) == kind


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"file_name": ["a.wav"]}, ["audio=file_name:audio"]),
        (
            {"image_file_name": ["a.png"], "audio_path": ["a.ogg"]},
            ["image=image_file_name:image", "audio=audio_path:audio"],
        ),
        ({"file_name": ["a.mp4"]}, ["audio=file_name:audio", "visual=file_name:video"]),
        ({"video_path": ["a.mp4"]}, ["audio=video_path:audio", "visual=video_path:video"]),
        ({"face_path": ["a.mp4"]}, ["face_audio=face_path:audio", "face_visual=face_path:video"]),
        ({"caption": ["a dog", "cat.png"], "label": ["x.wav", "y.wav"]}, ["caption=caption:text"]),
        ({"tokens": [[1, 2]], "embedding": [[1.0]]}, ["tokens=tokens:features", "embedding=embedding:features"]),
        ({"path": ["a.png", None]}, ["image=path:image"]),
        (
            {"au": [[1.0]], "text": [[2.0]], "au.npy": [[1.0]]},
            ["au=au:features", "text=text:features", "au=au.npy:features"],
        ),
        (
            {"images_file_names": [["a.png"]], "doc_path": ["a.txt"]},
            ["images=images_file_names:image", "doc=doc_path:text"],
        ),
        ({"note": ["no medium at all"], "nothing": pa.nulls(1, pa.string()), "age": [3], "tags": [["a", "b"]]}, []),
        ({"mixed": ["a.wav", "b.png"]}, []),
    ],
)
def test_modalities_are_inferred_from_columns(columns: dict[str, list[object]], expected: list[str]) -> None:
    assert inferred(**columns) == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"sound": [{"bytes": b"?", "path": "a.wav"}]}, ["sound=sound:audio"]),
        ({"sound": [{"bytes": b"fLaC", "path": None}, None]}, ["sound=sound:audio"]),
        ({"raw": [b"\xff\xd8\xff", b"?", b"GIF89a"]}, ["raw=raw:image"]),
        ({"raw": [b"\xff\xd8\xff", b"?"]}, []),
        ({"raw": [b"", None]}, []),
        ({"clip": [{"bytes": b"FLV\1", "path": None}]}, ["audio=clip:audio", "visual=clip:video"]),
        (
            {"wav": [b"?"], "left.png": [b"?"], "mp4": [b"?"]},
            ["audio=wav:audio", "left=left.png:image", "visual=mp4:video"],
        ),
        (
            {"txt": ["a dog"], "caption.txt": ["a cat"], "note.txt": ["x"]},
            ["text=txt:text", "caption=caption.txt:text"],
        ),
        ({"a": [{"text": "x"}], "b": [{"bytes": None, "path": "a.png"}]}, ["b=b:image"]),
    ],
)
def test_kind_of_embedded_media_is_inferred(columns: dict[str, list[object]], expected: list[str]) -> None:
    assert inferred(**columns) == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"AudioWAV": ["a.wav"], "VideoFlash": ["a.flv"]}, ["AudioWAV=AudioWAV:audio", "visual=VideoFlash:video"]),
        ({"face_path": ["a.mp4"], "audio_path": ["a.wav"]}, ["visual=face_path:video", "audio=audio_path:audio"]),
        (
            {"a_path": ["a.mp4"], "b_path": ["b.mp4"], "audio": ["a.wav"]},
            ["a_visual=a_path:video", "b_visual=b_path:video", "audio=audio:audio"],
        ),
        (
            {"visual": ["a.png"], "face": ["a.mp4"], "audio": ["a.wav"]},
            ["visual=visual:image", "face_visual=face:video", "audio=audio:audio"],
        ),
    ],
)
def test_video_with_separate_audio_column_is_visual_only(
    columns: dict[str, list[object]], expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mmaudit")
    assert inferred(**columns) == expected
    assert "only the frames are read, since" in caplog.text


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"flow_frames": [["u/a", "v/a"], None]}, ["flow=flow_frames:frames"]),
        ({"rgb_frames": ["a", "b"]}, ["rgb=rgb_frames:frames"]),
        ({"num_frames": ["120", "80.0"]}, []),
        ({"seen": ["in/a", "in/b"], "other": ["x", "y"]}, ["seen=seen:frames"]),
        ({"seen": [["in/a", "in/b"]]}, ["seen=seen:frames"]),
        ({"kind": ["in/a", "in/a"]}, []),
        ({"x_frames": ["a.mp4", "b.mp4"]}, ["x_frames_audio=x_frames:audio", "x_frames_visual=x_frames:video"]),
        ({"x_frames": [[0.5], [0.25]]}, ["x_frames=x_frames:features"]),
    ],
)
def test_folders_of_images_are_frames(columns: dict[str, list[object]], expected: list[str]) -> None:
    modalities = infer_modalities(
        pa.table(columns), excluded=[], files=FileChecks(holds_pictures=lambda path: path.startswith("in/"))
    )
    assert [str(modality) for modality in modalities] == expected


def test_columns_of_media_paths_are_recognised() -> None:
    modalities_named = [field.name for field in HEAD.schema if holds_files(HEAD, field)]
    assert modalities_named == ["file_name", "clip"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("a=file_name", "audio"),
        ("a=file_name:audio", "audio"),
        ("audio=clip", "audio"),
        ("sight=clip", "video"),
        ("a=words", "text"),
        ("a=vector", "features"),
        ("a=raw:audio", "audio"),
        ("a=picture:image", "image"),
        ("a=mixed:image", "image"),
        ("a=picture", "image"),
        ("a=heard", "audio"),
        ("a=words:frames", "frames"),
        ("a=folders:frames", "frames"),
    ],
)
def test_modality_option_is_parsed(text: str, kind: str) -> None:
    name, column = text.split(":")[0].split("=")
    modality = parse(text, HEAD)
    assert modality == Modality(name=name, column=column, kind=kind)
    assert parse(str(modality), HEAD) == modality


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("audio", "not of the form NAME=COLUMN"),
        ("=file_name", "not of the form NAME=COLUMN"),
        ("audio=", "not of the form NAME=COLUMN"),
        ("a=file_nam", "no column 'file_nam'; did you mean file_name?"),
        ("a=zzz", "no column 'zzz'; available: file_name, clip"),
        ("a=file_name:audoi", "no kind 'audoi'; did you mean audio?"),
        ("a=raw", "cannot infer the kind of 'raw'; write a=raw:KIND"),
        ("a=mixed", "cannot infer the kind of 'mixed'"),
        ("a=age", "cannot infer the kind of 'age'"),
        ("a=age:features", "a column of type int64 cannot be read as features"),
        ("a=vector:audio", "double> cannot be read as audio"),
        ("a=raw:text", "of type binary cannot be read as text"),
        ("a=words:features", "of type string cannot be read as features"),
        ("a=vector:frames", "double> cannot be read as frames"),
        ("a=raw:frames", "of type binary cannot be read as frames"),
        ("a=folders", "cannot infer the kind of 'folders'"),
    ],
)
def test_invalid_modality_option_is_rejected(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, HEAD)
    assert f"--modality {text}: " in str(caught.value)
    assert words in str(caught.value)


def modalities_named(*names: str) -> list[Modality]:
    return [Modality(name=name, column="x", kind="audio") for name in names]


def test_fewer_than_two_modalities_are_rejected() -> None:
    with pytest.raises(DatasetError, match="found no modality among the columns x, y; a discrepancy needs two"):
        check_modalities([], ["x", "y"])
    with pytest.raises(DatasetError, match="only one modality, a=x:audio, among"):
        check_modalities(modalities_named("a"), ["x"])


def test_repeated_modality_name_is_rejected() -> None:
    with pytest.raises(ConfigError, match="two modalities are called 'b'"):
        check_modalities(modalities_named("a", "b", "b"), ["x"])


@pytest.mark.parametrize("name", ["../../out", "a/b", "a\\b", "a:b", "a=b"])
def test_modality_name_with_separator_is_rejected(name: str) -> None:
    with pytest.raises(ConfigError, match="must not contain"):
        check_modalities(modalities_named("fine", name), ["x"])


@pytest.mark.parametrize("name", ["a" * 250, "é" * 60, "a\0b"])
def test_modality_name_invalid_as_file_name_is_rejected(name: str) -> None:
    with pytest.raises(ConfigError, match="its name may have at most 100 bytes and no NUL"):
        check_modalities(modalities_named("fine", name), ["x"])


def test_types_of_embedded_media_are_recognised() -> None:
    media_types = [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])]
    assert all(map(holds_bytes, media_types))
    assert not any(map(holds_bytes, [pa.string(), pa.struct([("path", pa.string())]), pa.list_(pa.int8())]))


def test_types_of_folder_names_are_recognised() -> None:
    modalities_named = [pa.string(), pa.list_(pa.string()), pa.large_list(pa.large_string())]
    assert all(map(holds_folders, modalities_named))
    assert not any(map(holds_folders, [pa.binary(), pa.list_(pa.int8()), pa.list_(pa.list_(pa.string()))]))
