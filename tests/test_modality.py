"""Laws of modalities: what columns say about themselves, and what `--modality` may say instead."""

from __future__ import annotations

import pyarrow as pa
import pytest

from mmaudit.audit.errors import ConfigError, DatasetError
from mmaudit.audit.modality import Modality, check_modalities, holds_bytes, infer_modalities, kind_of_path
from mmaudit.audit.modality import parse_modality as parse

HEAD = pa.table(
    {
        "file_name": ["a.WAV", "b.flac"],
        "clip": ["x.mp4", None],
        "mixed": ["a.wav", "b.png"],
        "words": ["two words", "one.Two"],
        "vector": [[1.0, 2.0], [3.0, 4.0]],
        "raw": [b"RIFF", b"RIFF"],
        "picture": [{"bytes": b"x", "path": "x.png"}] * 2,
        "age": [3, 4],
    }
)


def inferred(**columns: object) -> list[str]:
    return [str(modality) for modality in infer_modalities(pa.table(columns), taken=["label"])]


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
def test_extensions_tell_the_kind(path: str, kind: str | None) -> None:
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
        ({"note": ["no medium at all"], "nothing": pa.nulls(1, pa.string()), "age": [3], "tags": [["a", "b"]]}, []),
        ({"mixed": ["a.wav", "b.png"]}, []),
    ],
)
def test_columns_tell_the_modalities(columns: dict[str, list[object]], expected: list[str]) -> None:
    assert inferred(**columns) == expected


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
    ],
)
def test_what_the_option_says(text: str, kind: str) -> None:
    name, column = text.split(":")[0].split("=")
    found = parse(text, HEAD)
    assert found == Modality(name=name, column=column, kind=kind)
    assert parse(str(found), HEAD) == found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("audio", "not of the form NAME=COLUMN"),
        ("=file_name", "not of the form NAME=COLUMN"),
        ("audio=", "not of the form NAME=COLUMN"),
        ("a=file_nam", "no column 'file_nam'; did you mean file_name?"),
        ("a=zzz", "no column 'zzz'; there are: file_name, clip"),
        ("a=file_name:audoi", "no kind 'audoi'; did you mean audio?"),
        ("a=raw", "cannot tell what 'raw' holds; write a=raw:KIND"),
        ("a=mixed", "cannot tell what 'mixed' holds"),
        ("a=age", "cannot tell what 'age' holds"),
        ("a=age:features", "a column of type int64 cannot be read as features"),
        ("a=vector:audio", "double> cannot be read as audio"),
        ("a=raw:text", "of type binary cannot be read as text"),
        ("a=words:features", "of type string cannot be read as features"),
    ],
)
def test_what_the_option_may_not_say(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, HEAD)
    assert f"--modality {text}: " in str(caught.value)
    assert words in str(caught.value)


def named(*names: str) -> list[Modality]:
    return [Modality(name=name, column="x", kind="audio") for name in names]


def test_fewer_than_two_are_refused() -> None:
    with pytest.raises(DatasetError, match="found no modality among the columns x, y; a discrepancy needs two"):
        check_modalities([], ["x", "y"])
    with pytest.raises(DatasetError, match="only one modality, a=x:audio, among"):
        check_modalities(named("a"), ["x"])


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two modalities are called 'b'"):
        check_modalities(named("a", "b", "b"), ["x"])


@pytest.mark.parametrize("name", ["../../out", "a/b", "a\\b", "a:b", "a=b"])
def test_names_that_lead_out_of_the_cache_or_mean_two_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="may hold none of"):
        check_modalities(named("fine", name), ["x"])


def test_what_holds_media_themselves() -> None:
    held = [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])]
    assert all(map(holds_bytes, held))
    assert not any(map(holds_bytes, [pa.string(), pa.struct([("path", pa.string())]), pa.list_(pa.int8())]))
