"""Tests of media files read in ranges: they behave like their bytes, and only the used part is read."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmaudit.audit.dataset import columns as cells
from mmaudit.audit.dataset.columns import load_cell
from mmaudit.audit.dataset.modalities import Modality
from mmaudit.audit.errors import Reason, UnusableError
from mmaudit.audit.hashing import digest
from mmaudit.audit.media import files as media_file
from mmaudit.audit.media.container import missing_bytes
from mmaudit.audit.media.decode import decode_audio, decode_frames, decode_image, has_sound
from mmaudit.audit.media.files import MediaConfig, MediaFile, open_stream

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
