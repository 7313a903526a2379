"""Tests of truncation: cut files are detected, complete files are not, with any writer and trailing data."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
from conftest import examples
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmaudit.audit.errors import Reason, UnusableError
from mmaudit.audit.media.audio import decode_audio
from mmaudit.audit.media.container import EBML, MP4_BOXES, SEGMENT, missing_bytes
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.media.pictures import decode_frames, decode_image

SECONDS = 2
# Hypothesis draws constants of the source.
MAGIC_NUMBERS = [
    b"OggS",
    b"RIFF",
    EBML,
    SEGMENT,
    *MP4_BOXES,
]
QUICK = settings(max_examples=examples(100), suppress_health_check=[HealthCheck.too_slow])


class Pipe(io.RawIOBase):
    """A stream that is not seekable, so that sizes cannot be filled in."""

    def __init__(self) -> None:
        self.written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self.written += data
        return len(data)


class Encoding(NamedTuple):
    container: str
    sound: str | None = None
    picture: str | None = None
    options: dict[str, str] = {}  # noqa: RUF012 (never changed)
    exact: bool = False  # the header states the size of the complete file in bytes


ENCODINGS = {
    "wav": Encoding("wav", "pcm_s16le", exact=True),
    "flac": Encoding("flac", "flac"),
    "mp3": Encoding("mp3", "libmp3lame", exact=True),
    "mp3 without id3": Encoding("mp3", "libmp3lame", options={"id3v2_version": "0"}, exact=True),
    "opus": Encoding("ogg", "libopus"),
    "vorbis": Encoding("ogg", "vorbis"),
    "ogg flac": Encoding("ogg", "flac"),
    "webm sound": Encoding("webm", "libopus", exact=True),
    "webm vp8": Encoding("webm", "libopus", "libvpx", exact=True),
    "webm vp9": Encoding("webm", picture="libvpx-vp9", exact=True),
    "mkv": Encoding("matroska", "flac", "mpeg4", exact=True),
    "avi": Encoding("avi", "libmp3lame", "mpeg4", exact=True),
    "avi mjpeg": Encoding("avi", picture="mjpeg", exact=True),
    "mp4": Encoding("mp4", "aac", "libx264"),
    "mp4 index first": Encoding("mp4", "aac", "mpeg4", {"moov_size": "9000"}),
    "mp4 in fragments": Encoding("mp4", "aac", "libx264", {"movflags": "+frag_keyframe+empty_moov"}),
}
KINDS = [*ENCODINGS, "webp"]


def encode(encoding: Encoding, file: Any) -> None:
    """Write two seconds of noise and of a moving picture."""
    rng = np.random.default_rng(0)
    with av.open(file, "w", format=encoding.container, options=encoding.options) as container:
        picture: Any = container.add_stream(encoding.picture, rate=10) if encoding.picture else None
        sound: Any = container.add_stream(encoding.sound, rate=48_000, layout="stereo") if encoding.sound else None
        if picture is not None:
            picture.width, picture.height = 64, 48
            picture.pix_fmt = "yuvj420p" if encoding.picture == "mjpeg" else "yuv420p"
            for index in range(10 * SECONDS):
                pixels = np.roll(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8), index, axis=1)
                container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(picture.encode(None))
        if sound is not None:
            sound.codec_context.options = {"strict": "experimental"}  # vorbis
            resampler = av.AudioResampler(sound.codec_context.format, "stereo", 48_000)
            for start in range(0, SECONDS * 48_000, 960):  # the frame size of opus
                noise = rng.integers(-9_000, 9_000, (1, 2 * 960), dtype=np.int16)
                frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="stereo")
                frame.rate, frame.pts, frame.time_base = 48_000, start, Fraction(1, 48_000)
                for part in resampler.resample(frame):
                    container.mux(sound.encode(part))
            container.mux(sound.encode(None))


@cache
def sample(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "webp":
        pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "webp", lossless=True)
    else:
        encode(ENCODINGS[kind], file)
    return file.getvalue()


def streamed(kind: str) -> bytes:
    pipe = Pipe()
    encode(ENCODINGS[kind], pipe)
    return bytes(pipe.written)


def readers(kind: str) -> list[Any]:
    if kind == "webp":
        return [decode_image]
    return [decode_audio] * bool(ENCODINGS[kind].sound) + [decode_frames] * bool(ENCODINGS[kind].picture)


def reason_for(read: Any, data: bytes, config: MediaConfig) -> Reason:
    with pytest.raises(UnusableError) as caught:
        read(data, config)
    assert 0 < len(caught.value.detail) < 200
    return caught.value.reason


@pytest.mark.parametrize("max_seconds", [0.1, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_cut_file_is_truncated_and_complete_file_is_decoded(kind: str, max_seconds: float) -> None:
    """Also if only a small part of it is decoded."""
    data, config = sample(kind), MediaConfig(max_seconds=max_seconds)
    for read in readers(kind):
        assert read(data, config).size > 0
        for kept_share in (0.3, 0.6, 0.95):
            assert reason_for(read, data[: int(kept_share * len(data))], config) is Reason.TRUNCATED, kept_share


@QUICK
@given(kind=st.sampled_from(KINDS), kept_share=st.floats(0.3, 0.95))
def test_truncation_is_detected_at_any_position(kind: str, kept_share: float) -> None:
    data = sample(kind)
    cut = int(kept_share * len(data))
    assume(data[cut : cut + 4] != b"OggS")  # a cut between two pages is not detected
    assert missing_bytes(data[:cut])
    assert not missing_bytes(data)


@pytest.mark.parametrize("kind", [kind for kind, encoding in ENCODINGS.items() if encoding.exact])
def test_stated_size_equals_file_size(kind: str) -> None:
    data = sample(kind)
    num_kept = len(data) // 3
    assert missing_bytes(data[:num_kept]) == f"the header states {len(data)} bytes, the file has {num_kept}"


@QUICK
@given(kind=st.sampled_from(KINDS), junk=st.binary(max_size=300))
@example(kind="mp4", junk=b"words that are no box of a film")
@example(kind="mp3", junk=b"TAG" + bytes(125))  # ID3v1
@example(kind="mp3", junk=b"APETAGEX" + bytes(200) + b"TAG" + bytes(125))
@example(kind="flac", junk=b"\xff\xf8" * 100)
@example(kind="opus", junk=b"O")
@example(kind="wav", junk=b"LIST\xff\xff\0\0")
def test_trailing_junk_is_ignored(kind: str, junk: bytes) -> None:
    assume(not any(name in junk for name in MAGIC_NUMBERS))
    assert not missing_bytes(sample(kind) + junk)


@pytest.mark.parametrize("kind", [kind for kind in ENCODINGS if kind not in ("mp4", "mp4 index first")])
def test_files_written_to_a_pipe_are_complete(kind: str) -> None:
    data = streamed(kind)
    assert not missing_bytes(data)
    for read in readers(kind):
        assert read(data, MediaConfig()).size > 0


@pytest.mark.parametrize("kind", ["mkv", "webm vp8", "mp3", "wav", "avi"])
def test_stream_of_unknown_size_is_not_checked(kind: str) -> None:
    """Sizes that were never filled in give no information, whether the file is cut or not."""
    data = streamed(kind)
    assert not missing_bytes(data[: len(data) // 2])


@given(size=st.one_of(st.just(0), st.integers(0x7FFFF000, 0xFFFFFFFF)), kind=st.sampled_from(["wav", "avi"]))
def test_unknown_riff_sizes_are_not_checked(size: int, kind: str) -> None:
    data = bytearray(sample(kind))
    data[4:8] = struct.pack("<I", size)
    if kind == "wav":
        offset = data.index(b"data") + 4
        data[offset : offset + 4] = struct.pack("<I", size)
    assert not missing_bytes(bytes(data))


@given(error=st.integers(-100, 16), kind=st.sampled_from(["avi", "avi mjpeg", "webp"]))
def test_riff_sizes_may_differ_by_padding_or_header(error: int, kind: str) -> None:
    for data in (sample(kind), sample(kind)[:100]):
        size = struct.pack("<I", max(0, len(data) - 8 + error))
        assert not missing_bytes(data[:4] + size + data[8:])


@given(size=st.integers(0, 40), padded=st.booleans(), parts=st.integers(1, 3))
def test_chunks_of_odd_size_with_and_without_padding(size: int, padded: bool, parts: int) -> None:
    """Before the samples of a wav, and between the RIFF chunks of a long avi."""
    chunk = struct.pack("<I", size) + b"x" * size + b"\0" * (size % 2 and padded)
    wav = sample("wav")[:12] + (b"LIST" + chunk) * parts + sample("wav")[12:]
    avi = (b"RIFF" + chunk) * parts
    assert not missing_bytes(wav)
    assert missing_bytes(wav[: len(wav) // 2]).startswith(f"the header states {len(wav)} ")
    assert not missing_bytes(avi)


def test_the_last_of_several_riff_chunks_counts() -> None:
    long = sample("avi") + b"RIFF" + struct.pack("<I", 40_004) + b"AVIX" + bytes(40_000)
    assert not missing_bytes(long)
    assert missing_bytes(long[:-20_000]) == f"the header states {len(long)} bytes, the file has {len(long) - 20_000}"


@given(parts=st.integers(1, 300), lost_share=st.floats(0.02, 0.98))
def test_cut_in_last_fragment_of_mp4_is_detected(parts: int, lost_share: float) -> None:
    """Also if that is a small part of the file."""
    fragment = struct.pack(">I", 100) + b"moof" + bytes(92) + struct.pack(">I", 5_000) + b"mdat" + bytes(4_992)
    film = sample("mp4 in fragments")[:36] + fragment * parts
    assert not missing_bytes(film)
    assert missing_bytes(film[: len(film) - int(lost_share * 5_000)])


def id3v2(size: int, *, footer: bool = False) -> bytes:
    sizes = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    head = bytes([4, 0, 0x10 if footer else 0]) + sizes
    return b"ID3" + head + bytes(size) + (b"3DI" + head if footer else b"")


@QUICK
@given(sizes=st.lists(st.integers(0, 60_000), max_size=3), footer=st.booleans(), zeros=st.integers(0, 1_500))
@pytest.mark.parametrize("kind", ["mp3 without id3", "flac"])
def test_leading_id3_tags_are_skipped(kind: str, sizes: list[int], footer: bool, zeros: int) -> None:
    sound = sample(kind)
    tags = b"".join(id3v2(size, footer=footer) for size in sizes) + bytes(zeros if kind != "flac" else 0)
    assert not missing_bytes(tags + sound)
    cut = int(0.6 * len(sound))
    assume(abs(len(tags) + cut - len(sound)) > 16)  # otherwise it equals a complete file whose size includes the tags
    assert missing_bytes(tags + sound[:cut])


def test_mp3_size_that_includes_tags_is_complete() -> None:
    sound = bytearray(sample("mp3 without id3"))
    offset = sound.index(b"Info") + 12
    sound[offset : offset + 4] = struct.pack(">I", len(sound) + 50_010)
    data = id3v2(50_000) + bytes(sound)
    assert not missing_bytes(data)
    assert missing_bytes(data[: int(0.95 * len(data))])


def mp3_header(name: bytes, fields: bytes, *, version: int = 0xFB, side_info: int = 32, size: int = 9_000) -> bytes:
    """Return an mp3 of `size` bytes with a first frame and its size header."""
    return (bytes([0xFF, version, 0x90, 0x64]) + bytes(side_info) + name + fields).ljust(size, b"\x55")


@pytest.mark.parametrize(
    ("version", "side_info"), [(0xFB, 32), (0xFA, 32), (0xFB, 17), (0xF3, 17), (0xF3, 9), (0xE3, 9)]
)
@pytest.mark.parametrize("name", [b"Xing", b"Info"])
def test_xing_headers_of_every_version(name: bytes, version: int, side_info: int) -> None:
    def shortfall_of(fields: bytes) -> str:
        return missing_bytes(mp3_header(name, fields, version=version, side_info=side_info))

    assert shortfall_of(struct.pack(">III", 3, 500, 20_000)) == "the header states 20000 bytes, the file has 9000"
    assert shortfall_of(struct.pack(">II", 2, 20_000)) == "the header states 20000 bytes, the file has 9000"
    assert not shortfall_of(struct.pack(">III", 3, 500, 9_000))
    assert not shortfall_of(struct.pack(">III", 3, 0, 0))  # never filled in
    assert not shortfall_of(struct.pack(">II", 1, 500))  # only the number of frames
    assert not shortfall_of(struct.pack(">I", 0))


def test_vbri_headers() -> None:
    complete, cut = (struct.pack(">HHHII", 1, 0, 75, size, 500) for size in (9_000, 20_000))
    assert not missing_bytes(mp3_header(b"VBRI", complete))
    assert missing_bytes(mp3_header(b"VBRI", cut)) == "the header states 20000 bytes, the file has 9000"


def test_mp3_without_size_header_is_not_checked() -> None:
    file = io.BytesIO()
    encode(Encoding("mp3", "libmp3lame", options={"write_xing": "0"}), file)
    data = file.getvalue()
    assert not missing_bytes(data)
    assert not missing_bytes(data[: len(data) // 2])


@QUICK
@given(
    kinds=st.lists(st.sampled_from(["opus", "vorbis", "ogg flac"]), min_size=1, max_size=3), kept_share=st.floats(0, 1)
)
def test_chained_ogg_streams_are_checked_at_their_last_page(kinds: list[str], kept_share: float) -> None:
    chain = b"".join(sample(kind) for kind in kinds)
    assert not missing_bytes(chain)
    last = chain.rindex(b"OggS")
    cut = last + 1 + int(kept_share * (len(chain) - last - 2))
    if cut - last > 3 or not chain[chain.rindex(b"OggS", 0, last) + 5] & 4:
        assert missing_bytes(chain[:cut])


def flac_header(number: int, *, variable: bool, codes: int) -> bytes:
    """Return the header of one frame, with its CRC-8 by long division."""
    extra_bytes = bytes({6: 1, 7: 2}.get(codes >> 4, 0) + {12: 1, 13: 2, 14: 2}.get(codes & 15, 0))
    header = bytes([0xFF, 0xF8 | variable, codes, 0x18]) + chr(number).encode("utf-8", "surrogatepass") + extra_bytes
    remainder = int.from_bytes(header, "big") << 8
    while remainder.bit_length() > 8:
        remainder ^= 0x107 << remainder.bit_length() - 9
    return header + bytes([remainder])


@QUICK
@given(
    number=st.integers(0, 0x10FFFF),
    variable=st.booleans(),
    codes=st.integers(0, 255),
    num_decoys=st.integers(0, 15),
    picture=st.binary(max_size=50),
)
def test_number_of_last_flac_frame_is_compared_with_header(
    number: int, variable: bool, codes: int, num_decoys: int, picture: bytes
) -> None:
    """Numbers count samples, or frames of 4096 samples; bytes that only look like a frame are skipped."""
    num_samples = number + 4096 if variable else 4096 * (number + 1)
    frames = flac_header(0, variable=variable, codes=codes) + bytes(40)
    frames += flac_header(number, variable=variable, codes=codes) + bytes(40)
    frames += (b"\xff\xf8\xc9\x18" + bytes(9)) * num_decoys
    for stated_samples, message in (
        (num_samples, ""),
        (0, ""),
        (2 * num_samples, f"{2 * num_samples} samples, the last frame ends with number {num_samples}"),
    ):
        info = struct.pack(">HH6xQ16x", 4096, 4096, 48_000 << 44 | 1 << 41 | 15 << 36 | stated_samples)
        head = b"fLaC\0" + len(info).to_bytes(3, "big") + info + b"\x86" + len(picture).to_bytes(3, "big") + picture
        assert missing_bytes(head + frames).endswith(message)
        assert bool(missing_bytes(head + frames)) == bool(message)


def page(*lacing: int, flags: int = 0) -> bytes:
    return b"OggS\0" + bytes([flags]) + bytes(20) + bytes([len(lacing), *lacing]) + bytes(sum(lacing))


@example(lacing=[255], flags=0)
@example(lacing=[3, 255], flags=4)
@given(lacing=st.lists(st.integers(0, 255), max_size=255), flags=st.sampled_from([0, 1, 4, 5]))
def test_ogg_without_end_flag_is_complete_unless_a_packet_continues(lacing: list[int], flags: int) -> None:
    """Android's recorder does not set the flag."""
    data = page(19, flags=2) + page(*lacing, flags=flags)
    assert bool(missing_bytes(data)) == (not flags & 4 and lacing[-1:] == [255])
    assert missing_bytes(data[:-1])


def element(name: str, body: bytes, *, length: int = 8) -> bytes:
    return bytes.fromhex(name) + (len(body) | 1 << 7 * length).to_bytes(length, "big") + body


@given(length=st.integers(2, 8), size=st.integers(500, 9_000), parts=st.integers(1, 3), unknown=st.booleans())
def test_matroska_sizes_of_every_coded_length(length: int, size: int, parts: int, unknown: bool) -> None:
    head, body = element("1a45dfa3", bytes(30), length=1), bytes(size)
    data = (head + element("18538067", body, length=length)) * parts
    if unknown:
        data += head + bytes.fromhex("18538067") + ((1 << 7 * length + 1) - 1).to_bytes(length, "big") + body
    assert not missing_bytes(data)
    assert bool(missing_bytes(data[: -size // 2])) == (not unknown)


@QUICK
@given(kind=st.sampled_from(KINDS), length=st.integers(0, 200), data=st.binary(max_size=300))
def test_garbage_raises_no_error(kind: str, length: int, data: bytes) -> None:
    assert isinstance(missing_bytes(data), str)
    assert isinstance(missing_bytes(sample(kind)[:length] + data), str)
