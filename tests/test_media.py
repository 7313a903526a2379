"""Tests of decoding: written media round-trip, and every damaged file has the right reason."""

from __future__ import annotations

import contextlib
import io
import struct
import wave as wave_module
from fractions import Fraction
from functools import lru_cache
from typing import Any

import av
import numpy as np
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.signal import resample_poly

from mmaudit.audit.errors import ConfigError, Reason, UnusableError
from mmaudit.audit.media.audio import decode_audio, has_sound, resample
from mmaudit.audit.media.container import open_container
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.media.pictures import decode_frames, decode_image, segment_middles

CONFIG = MediaConfig()


def sine(rate: int = 8_000, *, seconds: float = 0.5, hertz: float = 440.0, peak: float = 0.5) -> NDArray[np.float64]:
    return peak * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write_wav(wave: NDArray[np.float64], rate: int = 8_000, *, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave_module.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(np.round(wave * 32767).astype("<i2").tobytes())
    return file.getvalue()


def write_float_wav(wave: NDArray[np.float64], rate: int = 8_000) -> bytes:
    samples = wave.astype("<f4").tobytes()
    chunks = b"fmt " + struct.pack("<IHHIIHH", 16, 3, 1, rate, 4 * rate, 4, 32)
    chunks += b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def write_picture(pixels: NDArray[Any], kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def write_media(
    kind: str,
    *,
    sound: str | None = None,
    picture: str | None = None,
    layout: str = "mono",
    wave: NDArray[np.float64] | None = None,
    frames: NDArray[np.uint8] | None = None,
    options: dict[str, str] | None = None,
    coding: dict[str, str] | None = None,
) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=kind, options=options or {}) as container:
        picture_stream: Any = container.add_stream(picture, rate=25, options=coding or {}) if picture else None
        sound_stream: Any = container.add_stream(sound, rate=48_000, layout=layout) if sound else None
        if picture_stream is not None:
            picture_frames = moving() if frames is None else frames
            picture_stream.height, picture_stream.width = picture_frames.shape[1:3]
            picture_stream.pix_fmt = "yuv420p"
            for pixels in picture_frames:
                container.mux(picture_stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(picture_stream.encode(None))
        if sound_stream is not None:
            sound_wave = sine(48_000) if wave is None else wave
            for start in range(0, len(sound_wave), 960):  # the frame size of opus
                samples = np.round(np.pad(sound_wave, (0, 960))[None, start : start + 960] * 32767).astype(np.int16)
                frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
                frame.rate, frame.pts, frame.time_base = 48_000, start, Fraction(1, 48_000)
                resampler = av.AudioResampler(sound_stream.codec_context.format, layout, 48_000)
                for part in resampler.resample(frame):
                    container.mux(sound_stream.encode(part))
            container.mux(sound_stream.encode(None))
    return file.getvalue()


def moving(count: int = 20) -> NDArray[np.uint8]:
    """Return dark frames (count, 48, 64, 3) with a bright bar that moves from left to right."""
    frames = np.full((count, 48, 64, 3), 20, dtype=np.uint8)
    for index in range(count):
        frames[index, :, index * 2 : index * 2 + 20] = 230
    return frames


def checker(height: int = 40, width: int = 60) -> NDArray[np.uint8]:
    rows, columns = np.indices((height, width))
    return np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 2 * 99], axis=-1).astype(np.uint8)


def strongest_hertz(wave: NDArray[np.float32], rate: int) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(wave * np.hanning(len(wave))))) * rate / len(wave))


@lru_cache(maxsize=1)
def samples() -> dict[str, tuple[Any, bytes]]:
    """Return a valid file of each kind, with the function that decodes it."""
    return {
        "wav": (decode_audio, write_wav(sine())),
        "mp3": (decode_audio, write_media("mp3", sound="libmp3lame")),
        "flac": (decode_audio, write_media("flac", sound="flac")),
        "ogg": (decode_audio, write_media("ogg", sound="libopus")),
        "mp4 sound": (decode_audio, write_media("mp4", sound="aac", picture="mpeg4")),
        "webm sound": (decode_audio, write_media("webm", sound="libopus", picture="libvpx")),
        "mkv sound": (decode_audio, write_media("matroska", sound="flac", picture="mpeg4")),
        "png": (decode_image, write_picture(checker())),
        "jpeg": (decode_image, write_picture(checker(), "jpeg")),
        "gif": (decode_image, write_picture(checker(), "gif")),
        "webp": (decode_image, write_picture(checker(), "webp")),
        "tiff": (decode_image, write_picture(checker(), "tiff")),
        "mp4": (decode_frames, write_media("mp4", sound="aac", picture="libx264")),
        "webm": (decode_frames, write_media("webm", picture="libvpx")),
        "avi": (decode_frames, write_media("avi", picture="mpeg4")),
    }


KINDS = list(samples())


def reason_for(read: Any, data: bytes) -> Reason:
    with pytest.raises(UnusableError) as caught:
        read(data, CONFIG)
    assert 0 < len(caught.value.detail) < 200
    assert "0x" not in caught.value.detail, "an address in memory differs from run to run"
    return caught.value.reason


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_is_deterministic_and_prints_nothing(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    read, data = samples()[kind]
    first, second = read(data, CONFIG), read(data, CONFIG)
    np.testing.assert_array_equal(first, second)
    expected = {decode_audio: (np.float32, 1), decode_image: (np.uint8, 3), decode_frames: (np.uint8, 4)}
    assert (first.dtype, first.ndim) == expected[read]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if samples()[kind][0] is decode_audio])
def test_a_sine_keeps_length_pitch_and_amplitude(kind: str) -> None:
    wave = decode_audio(samples()[kind][1], CONFIG)
    assert len(wave) == pytest.approx(8_000, abs=1_200)  # codecs pad to full blocks
    middle = wave[2_000:6_000]
    assert strongest_hertz(middle, 16_000) == pytest.approx(440, abs=4)
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
def test_resampled_sine_equals_sine_at_target_rate(rate: int) -> None:
    wave = decode_audio(write_wav(sine(rate), rate), CONFIG)
    assert len(wave) == int(np.ceil(round(rate / 2) * 16_000 / rate))
    inner = slice(400, 7_500)  # the filter pads both ends with zeros
    np.testing.assert_allclose(wave[inner], sine(16_000)[inner], atol=3e-3)


def test_unusual_rates_are_resampled_and_impossible_ones_corrupt() -> None:
    wave = decode_audio(write_wav(sine(15_991), 15_991), CONFIG)
    assert strongest_hertz(wave, 16_000) == pytest.approx(440, abs=4)
    assert reason_for(decode_audio, write_wav(sine(), 3)) is Reason.CORRUPT


def test_decoding_is_linear_in_gain() -> None:
    quiet, loud = (decode_audio(write_wav(sine(peak=peak)), CONFIG) for peak in (0.2, 0.8))
    np.testing.assert_allclose(loud, 4 * quiet, atol=3e-4)  # rounding to 16 bits


def test_channels_are_averaged() -> None:
    channel = sine()
    stereo = np.stack([channel, np.zeros_like(channel)], axis=1)
    mono = decode_audio(write_wav(channel / 2), CONFIG)
    np.testing.assert_allclose(decode_audio(write_wav(stereo, channels=2), CONFIG), mono, atol=1e-4)


@pytest.mark.parametrize("layout", ["stereo", "5.1", "7.1"])
def test_surround_sound_is_averaged(layout: str) -> None:
    data = write_media("mp4", sound="aac", layout=layout)  # with 7.1, PyAV's own to_ndarray crashes the process
    wave = decode_audio(data, CONFIG)
    assert strongest_hertz(wave[2_000:6_000], 16_000) == pytest.approx(440, abs=4)


def test_sound_is_clipped_to_one_and_max_seconds() -> None:
    wave = decode_audio(write_float_wav(sine(seconds=2, peak=3.0)), MediaConfig(max_seconds=0.7))
    assert len(wave) == 11_200
    assert np.abs(wave).max() == 1


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_cut_picture_is_truncated(kind: str) -> None:
    read, data = samples()[kind]
    assert reason_for(read, data[: int(len(data) * 0.6)]) is Reason.TRUNCATED


@pytest.mark.parametrize("read", [decode_audio, decode_image, decode_frames])
def test_no_bytes_are_empty_and_garbage_is_corrupt(read: Any) -> None:
    assert reason_for(read, b"") is Reason.EMPTY
    assert reason_for(read, b"no media at all, only words " * 40) is Reason.CORRUPT
    assert reason_for(read, bytes(2_000)) is Reason.CORRUPT


def test_playlist_opens_no_other_file(tmp_path: Any) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(write_wav(sine()))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret.as_uri()}\n#EXT-X-ENDLIST\n"
    assert reason_for(decode_audio, playlist.encode()) is Reason.CORRUPT
    assert reason_for(decode_audio, f"ffconcat version 1.0\nfile {secret.name}\n".encode()) is Reason.CORRUPT


def test_sound_without_samples_signal_or_finite_numbers() -> None:
    assert reason_for(decode_audio, write_wav(np.zeros(0))) is Reason.EMPTY
    assert reason_for(decode_audio, write_wav(np.zeros(8_000))) is Reason.SILENT
    assert reason_for(decode_audio, write_float_wav(sine(peak=5e-5))) is Reason.SILENT
    assert reason_for(decode_audio, write_float_wav(np.array([0.5, np.nan, 0.1]))) is Reason.NOT_FINITE


def test_missing_track_is_reported() -> None:
    silent_video = write_media("mp4", picture="mpeg4")
    assert reason_for(decode_audio, silent_video) is Reason.NO_TRACK
    assert reason_for(decode_frames, write_wav(sine())) is Reason.NO_TRACK
    assert not has_sound(silent_video)
    assert has_sound(samples()["mp4"][1])


def test_single_colour_is_constant() -> None:
    grey = np.full((32, 32, 3), 77, dtype=np.uint8)
    assert reason_for(decode_image, write_picture(grey)) is Reason.CONSTANT
    assert reason_for(decode_image, write_picture(grey, "jpeg")) is Reason.CONSTANT
    black = write_media("mp4", picture="libx264", frames=np.zeros((10, 48, 64, 3), dtype=np.uint8))
    assert reason_for(decode_frames, black) is Reason.CONSTANT
    flicker = np.zeros((10, 48, 64, 3), dtype=np.uint8)
    flicker[::2] = 255
    assert decode_frames(write_media("avi", picture="mpeg4", frames=flicker), CONFIG).std() > 50


def test_picture_modes_decode_to_same_pixels() -> None:
    grey = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    expected = np.repeat(grey[..., None], 3, axis=2)
    palette = io.BytesIO()
    Image.fromarray(grey).convert("P").save(palette, "png")
    forms = [
        write_picture(grey),
        write_picture(expected),
        write_picture(grey.astype(np.uint16) * 256),
        write_picture(grey.astype(np.int32) * 256, "tiff"),
        write_picture(grey.astype(np.float32) / 255, "tiff"),
        write_picture(np.dstack([expected, np.full((64, 64), 255, dtype=np.uint8)])),
        palette.getvalue(),
    ]
    for form in forms:
        np.testing.assert_allclose(decode_image(form, CONFIG), expected, atol=1)


def test_transparent_pixels_are_white() -> None:
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[:, :32, 3] = 255
    picture = decode_image(write_picture(pixels), CONFIG)
    assert (picture[:, :32] == 0).all()
    assert (picture[:, 32:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.fromarray(checker(64, 64))
    transpose = Image.Transpose  # what the camera did to the picture: the inverse of the correction
    inverses = [None, transpose.FLIP_LEFT_RIGHT, transpose.ROTATE_180, transpose.FLIP_TOP_BOTTOM]
    inverses += [transpose.TRANSPOSE, transpose.ROTATE_90, transpose.TRANSVERSE, transpose.ROTATE_270]
    inverse = inverses[orientation - 1]
    stored = upright if inverse is None else upright.transpose(inverse)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "png", exif=exif)
    np.testing.assert_array_equal(decode_image(file.getvalue(), CONFIG), checker(64, 64))


def test_damaged_exif_is_ignored() -> None:
    data = write_picture(checker(), "jpeg", exif=b"Exif\0\0MM nonsense")
    np.testing.assert_array_equal(decode_image(data, CONFIG), decode_image(write_picture(checker(), "jpeg"), CONFIG))


def test_large_jpeg_decodes_like_a_small_one() -> None:
    small, large = (
        decode_image(write_picture(np.kron(checker(8, 8), np.ones((k, k, 1), np.uint8)), "jpeg", quality=95), CONFIG)
        for k in (16, 200)
    )
    assert np.abs(small.astype(int) - large).mean() < 6


@pytest.mark.parametrize("num_frames", [1, 4, 20, 50])
def test_frames_are_middles_of_equal_parts(num_frames: int) -> None:
    config = MediaConfig(num_frames=num_frames, frame_size=64)
    data = write_media("mp4", picture="libx264", frames=moving(20))
    frames = decode_frames(data, config)
    assert frames.shape == (num_frames, 64, 64, 3)
    columns = np.arange(64)
    centres = [(frame[32, :, 0] > 125) @ columns / (frame[32, :, 0] > 125).sum() for frame in frames]
    expected = [2 * int((part + 0.5) * 20 / num_frames) + 9.5 for part in range(num_frames)]
    np.testing.assert_allclose(centres, expected, atol=0.6)


def grainy(count: int = 40) -> NDArray[np.uint8]:
    """Return the moving bar with noise, which is coded differently in each frame."""
    noise = np.random.default_rng(0).integers(0, 25, (count, 48, 64, 3), dtype=np.uint8)
    return moving(count) % 200 + noise


def all_frames(data: bytes, *, size: int) -> list[NDArray[np.uint8]]:
    """Return all frames of a video, decoded by PyAV with its defaults."""
    container: Any
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return [
            frame.reformat(width=size, height=size, format="rgb24", interpolation="AREA").to_ndarray()
            for frame in container.decode(video=0)
        ]


FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
CODINGS: dict[str, tuple[str, str, dict[str, str], dict[str, str]]] = {
    "usual": ("mp4", "libx264", {}, {}),
    "no frame before its time": ("mp4", "libx264", {"bf": "0"}, {}),
    "many frames none is made from": ("mp4", "libx264", {"bf": "8", "x264-params": "b-pyramid=none:b-adapt=0"}, {}),
    "frames made from frames before their time": ("mp4", "libx264", {"bf": "5", "x264-params": "b-pyramid=normal"}, {}),
    "open groups": ("mp4", "libx264", {"x264-params": "open-gop=1:keyint=9:bframes=3"}, {}),
    "fragments": ("mp4", "libx264", {"bf": "4"}, FRAGMENTS),
    "matroska": ("matroska", "libx264", {}, {}),
    "transport stream": ("mpegts", "libx264", {}, {}),
    "mpeg4": ("mp4", "mpeg4", {"bf": "2"}, {}),
}


@pytest.mark.parametrize("num_frames", [1, 7, 16, 40])
@pytest.mark.parametrize("coding", CODINGS)
def test_skipping_frames_equals_decoding_all_frames(coding: str, num_frames: int) -> None:
    """Skipped probing and decoding changes no bit of the frames."""
    kind, codec, of_codec, of_file = CODINGS[coding]
    data = write_media(kind, picture=codec, sound="aac", frames=grainy(), coding=of_codec, options=of_file)
    decoded_frames = all_frames(data, size=32)
    assert len(decoded_frames) == 40
    expected = np.stack([decoded_frames[index] for index in segment_middles(40, num_frames)])
    np.testing.assert_array_equal(decode_frames(data, MediaConfig(num_frames=num_frames, frame_size=32)), expected)


def test_fragmented_mp4_is_probed() -> None:
    data = write_media("mp4", picture="libx264", options=FRAGMENTS)
    with open_container(data, CONFIG) as container:
        assert container.streams.video[0].pix_fmt == "yuv420p"


@pytest.mark.parametrize("lost", [1, 2, 20, 39])
def test_frames_after_a_lost_frame_are_counted(lost: int) -> None:
    content = write_media("mp4", picture="libx264", frames=grainy(), coding={"bf": "3"})
    container: Any
    with av.open(io.BytesIO(content)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        start, size = [(packet.pos, packet.size) for packet in packets][lost]
    data = content[:start] + bytes(size) + content[start + size :]
    decoded_frames: list[NDArray[np.uint8]] = []
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in [*container.demux(stream)]:
            with contextlib.suppress(av.FFmpegError):
                decoded_frames += [
                    frame.reformat(32, 32, "rgb24", interpolation="AREA").to_ndarray() for frame in packet.decode()
                ]
    assert len(decoded_frames) < 40
    expected = np.stack([decoded_frames[min(index, len(decoded_frames) - 1)] for index in range(40)])
    np.testing.assert_array_equal(decode_frames(data, MediaConfig(num_frames=40, frame_size=32)), expected)


@given(
    length=st.integers(1, 3_000),
    ratio=st.sampled_from([(160, 441), (320, 441), (1, 3), (1, 6), (1, 12), (2, 1), (1, 2), (8, 1), (999, 1000)]),
)
def test_resample_equals_scipy_at_any_length(length: int, ratio: tuple[int, int]) -> None:
    up, down = ratio
    noise = (0.1 * np.random.default_rng(length).standard_normal(length)).astype(np.float32)
    expected = resample_poly(noise.astype(np.float64), up, down)
    np.testing.assert_allclose(resample(noise, 1_000 * down, 1_000 * up), expected, atol=1e-6)


def test_frames_stop_at_max_seconds() -> None:
    data = write_media("matroska", picture="mpeg4", frames=moving(20))  # 0.8 s, without a frame count in the file
    frames = decode_frames(data, MediaConfig(max_seconds=0.2, num_frames=5))
    first = decode_frames(write_media("matroska", picture="mpeg4", frames=moving(5)), MediaConfig(num_frames=5))
    assert np.abs(frames.astype(int) - first).mean() < 2


@pytest.mark.parametrize(
    ("name", "value"), [("sample_rate", 10), ("max_seconds", 0.0), ("max_seconds", float("nan")), ("num_frames", 0)]
)
def test_config_out_of_range_raises_error(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"media\.{name} is .*; it must lie in \["):
        MediaConfig(**{name: value})


@settings(max_examples=examples(150), suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(min_size=1, max_size=400), head=st.sampled_from(["", *KINDS]))
def test_arbitrary_bytes_raise_only_unusable_error(data: bytes, head: str) -> None:
    data = (samples()[head][1][:16] if head else b"") + data
    for read in (decode_audio, decode_image, decode_frames):
        with pytest.raises(UnusableError):
            read(data, CONFIG)


@settings(max_examples=examples(300), suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(KINDS),
    mutations=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    near_start=st.booleans(),
    kept_share=st.floats(0, 1),
)
def test_mutated_files_are_decoded_or_unusable(
    kind: str, mutations: list[tuple[float, int]], near_start: bool, kept_share: float
) -> None:
    read, data = samples()[kind]
    mutated = bytearray(data)
    for position, value in mutations:
        mutated[int(position * (min(200, len(data)) if near_start else len(data)))] = value
    with contextlib.suppress(UnusableError):
        decoded = read(bytes(mutated[: int(kept_share * len(data))] if kept_share < 0.5 else mutated), CONFIG)
        assert np.isfinite(decoded).all()
        assert decoded.size > 0
