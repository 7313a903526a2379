"""Tests of the limits of decoding: files that need too much memory or time are too-large before they are decoded."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from mmaudit.audit.dataset.modalities import Modality
from mmaudit.audit.errors import Reason, UnusableError
from mmaudit.audit.features.encoders import preprocessing
from mmaudit.audit.media.audio import decode_audio
from mmaudit.audit.media.container import missing_bytes
from mmaudit.audit.media.files import BUDGETS, MediaConfig
from mmaudit.audit.media.pictures import decode_frames, decode_image

Decode = Callable[[bytes, MediaConfig], Any]


def reason_of(decode: Decode, data: bytes, config: MediaConfig | None = None) -> Reason:
    with pytest.raises(UnusableError) as caught:
        decode(data, config or MediaConfig())
    return caught.value.reason


def picture(kind: str, size: tuple[int, int] = (60, 40), **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def tiff(**tags: tuple[int, int, int]) -> bytes:
    """Return a TIFF of 3 KB whose header has arbitrary entries: tag, type (3 short, 4 long) and value."""
    entries = sorted(tags.values())
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return head + body + struct.pack("<I", 0) + bytes(3_072)


def flat_tiff(width: int, height: int, *, tile: int | None = None) -> bytes:
    about = {
        "width": (256, 4, width), "height": (257, 4, height), "bits": (258, 3, 8), "compression": (259, 3, 1),
        "photometric": (262, 3, 1), "samples": (277, 3, 1),
    }  # fmt: skip
    if tile is None:
        about |= {"strips": (273, 4, 140), "rows": (278, 4, height), "bytes": (279, 4, 3_072)}
    else:
        about |= {"tw": (322, 4, tile), "th": (323, 4, tile), "to": (324, 4, 140), "tb": (325, 4, 3_072)}
    return tiff(**about)


def png_of(width: int, height: int) -> bytes:
    """Return a PNG of one colour, whose pixels are compressed by a factor of a thousand."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"x\x9c") + chunk(b"IEND", b"")


def gif_of(width: int, height: int) -> bytes:
    data = bytearray(picture("gif"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def webp_of(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunk = b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + size
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


BOMBS = {
    "tiff of one strip": flat_tiff(32, 5_570_592),
    "tiff of large tiles": flat_tiff(64, 64, tile=1 << 17),
    "png": png_of(40_000, 4_000),
    "png beyond Pillow's limit": png_of(400_000, 400_000),
    "gif": gif_of(65_000, 65_000),
    "webp": webp_of(16_000, 16_000),
    "bmp": picture("bmp")[:18] + struct.pack("<ii", 30_000, 30_000) + picture("bmp")[26:],
    "ppm": b"P6 20000 20000 255\n" + bytes(300),
    "progressive jpeg": picture("jpeg", (16, 16), progressive=True),
}


@pytest.mark.parametrize("kind", [kind for kind in BOMBS if "jpeg" not in kind])
def test_pictures_with_huge_stated_size_are_too_large(kind: str) -> None:
    assert reason_of(decode_image, BOMBS[kind]) is Reason.TOO_LARGE


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp", "gif", "bmp", "ppm"])
def test_pictures_are_limited_by_pixels_and_bytes(kind: str) -> None:
    data = picture(kind)
    exact = MediaConfig(max_image_pixels=60 * 40, max_image_bytes=len(data))
    np.testing.assert_array_equal(decode_image(data, exact), decode_image(data, MediaConfig()))
    assert reason_of(decode_image, data, replace(exact, max_image_pixels=60 * 40 - 1)) is Reason.TOO_LARGE
    assert reason_of(decode_image, data, replace(exact, max_image_bytes=len(data) - 1)) is Reason.TOO_LARGE


def test_first_frame_is_decoded_and_metadata_chunks_are_ignored() -> None:
    first = Image.new("RGB", (30, 20), "white")
    first.paste("black", (0, 0, 9, 9))
    file = io.BytesIO()
    first.save(file, "gif", save_all=True, append_images=[Image.new("RGB", (30, 20), (9 * n % 256, 0, 0))
                                                          for n in range(300)])  # fmt: skip
    assert decode_image(file.getvalue(), MediaConfig()).shape == (64, 64, 3)
    chunks: list[dict[str, Any]] = [{"icc_profile": bytes(300_000)}, {"exif": b"Exif\0\0" + bytes(60_000)}]
    for options in chunks:
        assert decode_image(picture("png", **options), MediaConfig()).shape == (64, 64, 3)
    assert reason_of(decode_image, picture("png", icc_profile=bytes(30_000_000))) is Reason.CORRUPT


MEMORY = """
import resource, sys
from mmaudit.audit.media.pictures import decode_image
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.errors import UnusableError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        decode_image(open(name, "rb").read(), MediaConfig())
    except UnusableError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_decompression_bombs_allocate_little_memory(tmp_path: Path) -> None:
    for name, data in BOMBS.items():
        (tmp_path / name).write_bytes(data)
    names = [str(path) for path in sorted(tmp_path.iterdir())]
    ended = subprocess.run([sys.executable, "-c", MEMORY, *names], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 60  # MB


def test_videos_are_limited_by_pixels_bytes_and_packets(film: Callable[[bool], bytes]) -> None:
    data = film(False)  # ten frames of 32 x 32
    exact = MediaConfig(max_frame_pixels=32 * 32, max_video_pixels=10 * 32 * 32, max_packets=11)
    np.testing.assert_array_equal(decode_frames(data, exact), decode_frames(data, MediaConfig()))
    small: list[dict[str, Any]] = [
        {"max_frame_pixels": 32 * 32 - 1},
        {"max_video_pixels": 10 * 32 * 32 - 1},
        {"max_video_bytes": 100},
        {"max_packets": 9},
    ]
    for limits in small:
        assert reason_of(decode_frames, data, replace(exact, **limits)) is Reason.TOO_LARGE


def test_video_with_huge_stated_frame_size_is_too_large() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream: Any = container.add_stream("rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for level in range(0, 250, 25):
            pixels = np.full((32, 32, 3), level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    data = bytearray(file.getvalue())
    assert decode_frames(bytes(data), MediaConfig()).shape == (16, 64, 64, 3)
    for size, reason in ((6_000, Reason.TOO_LARGE), (30_000, Reason.CORRUPT)):
        struct.pack_into("<ii", data, data.find(b"strf") + 12, size, size)
        assert reason_of(decode_frames, bytes(data)) is reason


def wav(*, rate: int = 8_000, channels: int = 1, samples: int = 4_000) -> bytes:
    content = np.random.default_rng(0).integers(-9_000, 9_000, samples * channels).astype("<i2").tobytes()
    chunks = b"fmt " + struct.pack(
        "<IHHIIHH", 16, 1, channels, rate, 2 * rate * channels & 0xFFFFFFFF, 2 * channels, 16
    )
    chunks += b"data" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def test_sound_is_limited_by_values_per_second() -> None:
    assert reason_of(decode_audio, wav(channels=2), MediaConfig(max_sound_values=15_999)) is Reason.TOO_LARGE
    assert len(decode_audio(wav(channels=2), MediaConfig(max_sound_values=16_000)))
    assert reason_of(decode_audio, wav(channels=32_000, samples=2)) is Reason.TOO_LARGE
    assert reason_of(decode_audio, wav(rate=2_000_000_000)) is Reason.CORRUPT


@pytest.mark.parametrize("part", [b"LIST\0\0\0\0", b"\0\0\0\x08free", b"ID3\4\0\0\0\0\0\0"], ids=["riff", "mp4", "id3"])
def test_number_of_container_parts_read_is_limited(part: bytes) -> None:
    head = b"RIFF\xff\xff\0\0WAVE" if part.startswith(b"LIST") else b""
    assert missing_bytes(head + part * 3_000_000) == ""  # 24 MB, in well under a second


def test_default_limits_do_not_change_the_cache_fingerprint() -> None:
    sound = Modality(name="a", column="a", kind="audio")
    names = {pair[0] for pair in MediaConfig().to_fingerprint()}
    assert "max_seconds" in names
    assert not names & set(BUDGETS)
    for name in BUDGETS:
        limit: dict[str, Any] = {name: 1_000}
        config = replace(MediaConfig(), **limit)
        assert preprocessing(sound, config) != preprocessing(sound, MediaConfig())
