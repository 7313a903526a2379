"""Media files: kinds by name and first bytes; files read in ranges behave like their bytes."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmaudit.audit.dataset import cells
from mmaudit.audit.dataset.cells import load_cell
from mmaudit.audit.dataset.dataset import open_dataset
from mmaudit.audit.dataset.modalities import Modality
from mmaudit.audit.errors import Reason, UnusableError
from mmaudit.audit.hashing import digest
from mmaudit.audit.media import media_file
from mmaudit.audit.media.audio import decode_audio, has_sound
from mmaudit.audit.media.container import missing_bytes
from mmaudit.audit.media.files import (
    NUM_BYTES,
    MediaConfig,
    is_hidden,
    is_lfs_pointer,
    is_lfs_pointer_file,
    kind_of_bytes,
    kind_of_path,
    similar_path,
)
from mmaudit.audit.media.media_file import MediaFile, open_stream
from mmaudit.audit.media.pictures import decode_frames, decode_image

SOUND = Modality(name="audio", column="audio", kind="audio")
FRAMES = Modality(name="frames", column="frames", kind="frames")


def write_media_file(path: Path, content: bytes) -> MediaFile:
    path.write_bytes(content)
    return MediaFile.of(path, path.stat())


@given(content=st.binary(max_size=300), pattern=st.binary(min_size=1, max_size=3), data=st.data())
def test_media_file_behaves_like_bytes(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, pattern: bytes, data: st.DataObject
) -> None:
    file = write_media_file(tmp_path_factory.getbasetemp() / "ranges", content)
    start, stop = (data.draw(st.integers(0, 320)) for _ in range(2))
    assert len(file) == len(content)
    assert file[start:stop] == content[start:stop]
    assert file[-start:] == content[-start:]
    assert file.startswith(pattern) == content.startswith(pattern)
    assert file.find(pattern, start, stop) == content.find(pattern, start, stop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(media_file, "_BLOCK", 7)
        assert file.rfind(pattern, start, stop) == content.rfind(pattern, start, stop)
        assert digest(file) == digest(content)
    if content:
        assert file[start % len(content)] == content[start % len(content)]
    with open_stream(file) as stream:
        assert stream.read() == content


def test_decoding_a_file_equals_decoding_its_bytes(
    clip_source: Path, tmp_path: Path, film: Callable[[bool], bytes]
) -> None:
    for name, decode in (("0.wav", decode_audio), ("0.png", decode_image)):
        content = (clip_source / name).read_bytes()
        file = write_media_file(tmp_path / name, content)
        np.testing.assert_array_equal(decode(file, MediaConfig()), decode(content, MediaConfig()))
    file = write_media_file(tmp_path / "film.mp4", film(True))
    np.testing.assert_array_equal(decode_frames(file, MediaConfig()), decode_frames(film(True), MediaConfig()))
    np.testing.assert_array_equal(decode_audio(file, MediaConfig()), decode_audio(film(True), MediaConfig()))
    assert has_sound(file)
    cut = write_media_file(tmp_path / "cut.mp4", film(True)[:-2_000])
    assert missing_bytes(cut) == missing_bytes(film(True)[:-2_000]) != ""


def test_changed_file_is_unusable(tmp_path: Path) -> None:
    file = write_media_file(tmp_path / "a.wav", b"before")
    (tmp_path / "a.wav").write_bytes(b"afterwards")
    with pytest.raises(UnusableError, match="changed while it was read"):
        file[:4]
    (tmp_path / "a.wav").unlink()
    with pytest.raises(UnusableError, match="missing"):
        file[:4]


def long_wav(path: Path, num_bytes: int, *, rate: int = 8_000) -> Path:
    """Write a wav with noise in its first 12 s and a sparse rest."""
    noise = np.random.default_rng(0).integers(-9_000, 9_000, 12 * rate).astype("<i2").tobytes()
    head = b"RIFF" + struct.pack("<I", num_bytes - 8) + b"WAVEfmt "
    head += struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16) + b"data" + struct.pack("<I", num_bytes - 44)
    with path.open("wb") as file:
        file.write(head + noise)
        file.truncate(num_bytes)
    return path


def test_only_the_used_seconds_of_a_long_sound_are_read(tmp_path: Path) -> None:
    path = long_wav(tmp_path / "long.wav", 1_900_000_000)  # the file system stores 0.2 MB of it
    short = long_wav(tmp_path / "short.wav", 44 + 2 * 12 * 8_000)
    tracemalloc.start()
    try:
        loaded = load_cell("long.wav", SOUND, root=tmp_path, allow_outside=False)
        wave = decode_audio(loaded, MediaConfig())
        content = digest(loaded)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(loaded, MediaFile)
    assert peak < 20e6
    np.testing.assert_array_equal(wave, decode_audio(short.read_bytes(), MediaConfig()))
    assert content == digest(loaded)
    with path.open("r+b") as file:  # the head, which contains all that is used, is hashed
        file.seek(9 * 16_000)
        file.write(b"\1\2\3\4")
    assert digest(load_cell("long.wav", SOUND, root=tmp_path, allow_outside=False)) != content
    path.unlink()


def test_digest_of_large_file_covers_head_end_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MAX_DIGESTED", 1_000), ("HEAD", 100), ("BLOCKS", 4), ("_BLOCK", 10)):
        monkeypatch.setattr(media_file, name, value)
    content = bytearray(np.random.default_rng(0).bytes(2_000))
    first = digest(write_media_file(tmp_path / "a", bytes(content)))
    assert first == digest(write_media_file(tmp_path / "b", bytes(content)))
    for position, is_same in ((0, False), (99, False), (1_999, False), (150, True)):
        changed = content.copy()
        changed[position] ^= 1
        assert (digest(write_media_file(tmp_path / "c", bytes(changed))) == first) == is_same
    assert digest(write_media_file(tmp_path / "d", bytes(content) + b"x")) != first
    assert digest(write_media_file(tmp_path / "e", bytes(content[:900]))) == digest(bytes(content[:900]))


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_special_files_are_unusable(tmp_path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(tmp_path / "a.wav")
    elif kind == "folder":
        (tmp_path / "a.wav").mkdir()
    else:
        (tmp_path / "a.wav").symlink_to("/dev/zero")
    with pytest.raises(UnusableError) as caught:
        load_cell("a.wav", SOUND, root=tmp_path, allow_outside=True)
    assert caught.value.reason is (Reason.MISSING if kind == "folder" else Reason.CORRUPT)
    if kind != "folder":
        assert f"it is a {kind.replace('fifo', 'FIFO')}, not a regular file" in str(caught.value)


def test_folder_of_frames_with_large_pictures_and_fifo(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    sizes = [9 << 20, 9 << 20, 1 << 10]
    for number, size in enumerate(sizes):
        (folder / f"{number}.png").write_bytes(b"x" * size)
    ((first, second, third),) = load_cell("clip", FRAMES, root=tmp_path, allow_outside=False)
    assert [type(picture) for picture in (first, second, third)] == [bytes, MediaFile, bytes]
    assert [len(picture) for picture in (first, second, third)] == sizes
    os.mkfifo(folder / "3.png")
    with pytest.raises(UnusableError, match="not a regular file"):
        load_cell("clip", FRAMES, root=tmp_path, allow_outside=False)


def test_folder_with_too_many_files_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "MAX_FOLDER_ENTRIES", 3)
    (tmp_path / "clip").mkdir()
    for number in range(4):
        (tmp_path / "clip" / f"{number}.png").touch()
    with pytest.raises(UnusableError) as caught:
        load_cell("clip", FRAMES, root=tmp_path, allow_outside=False)
    assert caught.value.reason is Reason.TOO_LARGE


def encode_audio(format_: str, codec: str, *, sample_format: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=format_) as container:
        stream: Any = container.add_stream(codec, rate=16_000, layout="mono")
        for start in range(0, 4_096, 1_024):
            is_integer = sample_format.startswith("s16")
            samples = np.zeros((1, 1_024), dtype=np.int16 if is_integer else np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format=sample_format, layout="mono")
            frame.rate, frame.pts, frame.time_base = 16_000, start, Fraction(1, 16_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def encode_video(format_: str, codec: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=format_) as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("format_", "codec", "sample_format"),
    [
        ("wav", "pcm_s16le", "s16"),
        ("flac", "flac", "s16"),
        ("aiff", "pcm_s16be", "s16"),
        ("au", "pcm_s16be", "s16"),
        ("caf", "pcm_s16le", "s16"),
        ("ipod", "aac", "fltp"),
        ("adts", "aac", "fltp"),
        ("ogg", "flac", "s16"),
    ],
)
def test_audio_formats_are_recognised(format_: str, codec: str, sample_format: str) -> None:
    assert kind_of_bytes(encode_audio(format_, codec, sample_format=sample_format)) == "audio"


@pytest.mark.parametrize("format_", ["png", "jpeg", "gif", "bmp", "webp", "tiff", "ppm"])
def test_image_formats_are_recognised(format_: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, format_)
    assert kind_of_bytes(file.getvalue()) == "image"


@pytest.mark.parametrize(
    ("format_", "codec"),
    [
        ("mp4", "mpeg4"),
        ("mov", "mpeg4"),
        ("matroska", "mpeg4"),
        ("avi", "mpeg4"),
        ("flv", "flv"),
        ("mpeg", "mpeg1video"),
    ],
)
def test_video_formats_are_recognised(format_: str, codec: str) -> None:
    assert kind_of_bytes(encode_video(format_, codec)) == "video"


@pytest.mark.parametrize("start", [b"\xff\xfb\x90\x00", b"\xff\xf3\x40", b"ID3\x04\0\0"])
def test_mp3_is_recognised_with_and_without_tag(start: bytes) -> None:
    assert kind_of_bytes(start + bytes(40)) == "audio"


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff", b"RIFF", b"RIFF\0\0\0\0CDXA", b"BM and other words", b"P5x", "é word".encode("utf-16"),
        b"FORM1234ILBM", b"{}", b"PK\3\4", b"\x93NUMPY\1\0", b"\0\0\0\x1cftypavif", tar(),
    ],
)  # fmt: skip
def test_other_bytes_are_not_recognised(data: bytes) -> None:
    assert kind_of_bytes(data) is None


@given(st.binary(max_size=100))
def test_first_bytes_suffice(data: bytes) -> None:
    assert kind_of_bytes(data[:NUM_BYTES]) == kind_of_bytes(data)


@given(st.text(max_size=60).map(lambda text: text.encode()))
def test_text_is_not_recognised_as_media(data: bytes) -> None:
    signatures = (
        b"ID3",
        b"GIF8",
        b"fLaC",
        b"OggS",
        b"caff",
        b".snd",
        b"P5",
        b"P6",
        b"FLV",
        b"RIFF",
        b"BM",
        b"FORM",
        b"II",
        b"MM",
    )
    if not data.startswith(signatures) and data[4:8] != b"ftyp" and not data.startswith(b"\0"):
        assert kind_of_bytes(data) is None


@pytest.mark.parametrize("name", ["a.jfif", "b.JFIF", "c.jpe", "d.jpg"])
def test_jpeg_is_read_under_every_extension(tmp_path: Path, name: str) -> None:
    """In folders named by class and in lists alike; imagefolder of `datasets` reads them, too."""
    file = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(file, "jpeg")
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        (tmp_path / label / name).write_bytes(file.getvalue())
        (tmp_path / label / f"{name[0]}.wav").write_bytes(b"RIFF")
    assert [modality.kind for modality in open_dataset(tmp_path).modalities] == ["audio", "image"]
    lines = [f"{label},{label}/{name},{label}/{name[0]}.wav" for label in ("cat", "dog")]
    (tmp_path / "list.csv").write_text("\n".join(["label,x,y", *lines]))
    dataset = open_dataset(tmp_path / "list.csv")
    assert {modality.column: modality.kind for modality in dataset.modalities} == {"x": "image", "y": "audio"}
    picture = next(modality for modality in dataset.modalities if modality.kind == "image")
    assert decode_image(dataset.load(f"cat/{name}", picture), MediaConfig()).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("extension", "container", "codec"),
    [("aiff", "aiff", "pcm_s16be"), ("au", "au", "pcm_s16be"), ("caf", "caf", "pcm_s16le")],
)
def test_sound_of_other_extensions_is_decoded(extension: str, container: str, codec: str) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=16_000, layout="mono")
        samples = (8_000 * np.sin(np.arange(1_600) / 3)).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.rate = 16_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    assert kind_of_path(f"a.{extension}") == kind_of_bytes(file.getvalue()) == "audio"
    assert decode_audio(file.getvalue(), MediaConfig()).shape == (1_600,)


@pytest.mark.parametrize(("extension", "container", "codec"), [("wmv", "asf", "wmv2"), ("3gp", "3gp", "mpeg4")])
def test_video_of_other_extensions_is_decoded(extension: str, container: str, codec: str) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for index in range(10):
            pixels = np.zeros((32, 32, 3), dtype=np.uint8)
            pixels[:, 3 * index : 3 * index + 4] = 255
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    assert kind_of_path(f"a.{extension}") == kind_of_bytes(file.getvalue()) == "video"
    assert decode_frames(file.getvalue(), MediaConfig()).shape == (16, 64, 64, 3)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("._1.wav", True),
        ("a/.DS_Store", True),
        ("__MACOSX/a.wav", True),
        ("a/Thumbs.db", True),
        (".cache/a.wav", True),
        ("./a.wav", False),
        ("../a.b/c.wav", False),
        ("a/_1.wav", False),
    ],
)
def test_hidden_files_are_told_by_their_names(path: str, *, expected: bool) -> None:
    assert is_hidden(path) == expected


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 72862\n"


def test_git_lfs_pointer_in_place_of_a_medium_is_named(tmp_path: Path) -> None:
    file = write_media_file(tmp_path / "1.wav", POINTER)
    assert is_lfs_pointer(POINTER)
    assert is_lfs_pointer(file)
    assert is_lfs_pointer_file(file.path)
    assert not is_lfs_pointer_file(tmp_path / "none")
    assert not is_lfs_pointer(POINTER + b"x" * 2_000)
    write_media_file(tmp_path / "1.png", POINTER)
    frames = Modality(name="frames", column="frames", kind="frames")
    for cell, modality in (
        ("1.wav", SOUND),
        (POINTER, SOUND),
        ({"bytes": POINTER, "path": None}, SOUND),
        (".", frames),
    ):
        with pytest.raises(UnusableError, match=r"missing: .*Git LFS pointer.*git lfs pull"):
            load_cell(cell, modality, root=tmp_path, allow_outside=False)


def test_missing_file_names_a_similar_one(tmp_path: Path) -> None:
    (tmp_path / "Audio").mkdir()
    for name in ("1.WAV", "caf\u00e9.wav", "two words.wav"):
        write_media_file(tmp_path / "Audio" / name, b"x")
    for name, similar in {
        "Audio\\1.WAV": "Audio/1.WAV",
        "audio/1.wav": "Audio/1.WAV",
        "Audio/cafe\u0301.wav": "Audio/caf\u00e9.wav",
        "Audio/two  words.wav ": "Audio/two words.wav",
    }.items():
        assert similar_path(tmp_path, name) == similar
        with pytest.raises(UnusableError, match=rf"no file .*; there is {similar}: write it so"):
            load_cell(name, SOUND, root=tmp_path, allow_outside=False)
    for name in ("Audio/2.wav", "Audio", "../Audio/1.wav", "none/1.wav", "Audio/1.WAV"):
        assert similar_path(tmp_path, name) is None
