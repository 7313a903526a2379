"""First bytes of media: files of real encoders are recognised, other bytes are not."""

from __future__ import annotations

import io
import tarfile
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmaudit.audit.dataset.modalities import NUM_BYTES, kind_of_bytes


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
