"""Bytes in, waveform (t,), image (h, w, 3) or frames (f, h, w, 3) out: what does the file really hold?

Whatever cannot be used leaves as UnusableError with its reason.
"""

from __future__ import annotations

import io
import logging
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.signal import resample_poly

from .errors import ConfigError
from .quality import Reason, UnusableError
from .truncation import MIN_HELD, shortfall

SILENT_PEAK = 1e-4  # -80 dBFS: three steps of 16-bit sound, above dither, below any recording
CONSTANT_SPREAD = 2  # levels of 255 between darkest and brightest: what a lossy codec makes of one colour
MAX_BAD_PACKETS = 0.1  # of all, and one in any case: players skip a few (tags behind an mp3)

# By name, because playlists (hls, concat) would open other files and addresses.
PICTURES = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # Pillow would run Ghostscript on an EPS
Image.init()  # with a choice of formats Pillow loads no further plug-ins by itself
CONTAINERS = "wav,w64,aiff,au,caf,mp3,aac,amr,flac,ogg,mov,matroska,avi,mpeg,mpegts,flv,asf"
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else broken tiffs print through logging's last resort

# From 17.0 on PyAV scales frames in threads it starts anew for each: 14 frames of 128 x 96 take 14 ms, in one 0.3 ms.
_ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
_LIMITS = {"sample_rate": (2_000, 192_000), "max_seconds": (0.01, 3_600), "mel_bins": (8, 128)}


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaConfig:
    """What every sample of a modality is brought to before anything is measured on it."""

    sample_rate: int = 16_000  # Hz
    max_seconds: float = 10.0  # of sound and of video; the rest of a longer clip is not looked at
    mel_bins: int = 40
    image_size: int = 64  # pixels; pictures become squares
    num_frames: int = 16  # evenly over the clip
    frame_size: int = 64  # pixels; frames become squares
    text_buckets: int = 1024  # hashed words and word pairs

    def __post_init__(self) -> None:
        """Refuse what no sample could be brought to."""
        for field in fields(self):
            (low, high), value = _LIMITS.get(field.name, (1, 4_096)), getattr(self, field.name)
            if not low <= value <= high:
                raise ConfigError(f"{field.name} is {value}; set it to {low} .. {high}")


def decode_audio(data: bytes, config: MediaConfig) -> NDArray[np.float32]:
    """Waveform (t,), mono (mean of the channels), in [-1, 1] at config.sample_rate, at most config.max_seconds.

    Reads sound files and the first sound track of videos.
    """
    with _reading(data):
        wave, rate = _native_wave(data, config.max_seconds)
        peak = float(np.abs(wave).max())
        if not math.isfinite(peak):
            raise UnusableError(Reason.NOT_FINITE, f"{int((~np.isfinite(wave)).sum())} samples are not finite")
        if peak < SILENT_PEAK:
            raise UnusableError(Reason.SILENT, f"peak {peak:.1g} of 1 in {len(wave) / rate:.2f} s")
        return _resampled(wave, rate, config.sample_rate)[: max(1, round(config.max_seconds * config.sample_rate))]


def decode_image(data: bytes, config: MediaConfig) -> NDArray[np.uint8]:
    """Picture (h, w, 3), RGB, upright by its EXIF, h = w = config.image_size.

    The whole picture is stretched onto the square: a crop could lose the object, and bars would add edges of their own.
    16 bits keep the upper 8; what is transparent shows white, as in a viewer; of an animation the first frame.
    """
    with _reading(data), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which does not concern the pixels
        with Image.open(io.BytesIO(data), formats=PICTURES) as image:
            # A jpeg can be decoded at a fraction of its size: one 4000 pixels wide takes 45 ms instead of 150.
            image.draft(None, (2 * config.image_size, 2 * config.image_size))
            image.load()
            square = _rgb(_upright(image)).resize((config.image_size, config.image_size), Image.Resampling.BILINEAR)
    return _not_constant(np.asarray(square, dtype=np.uint8))


def decode_frames(data: bytes, config: MediaConfig) -> NDArray[np.uint8]:
    """Frames (f, h, w, 3), RGB, f = config.num_frames, h = w = config.frame_size, stretched as pictures are.

    The clip, or its first config.max_seconds, is cut into f equal parts and the frame in the middle of each is taken;
    a clip of fewer frames shows some of them more than once.
    """
    with _reading(data), _container(data) as container:
        stream = _track(container, "video")
        packets = _video_packets(container, stream, config.max_seconds)
        shown = sum(not packet.is_discard for packet in packets)
        middles = [(2 * part + 1) * shown // (2 * config.num_frames) for part in range(config.num_frames)]
        frames = _frames_at(packets, stream, set(middles), config.frame_size)
    last = max(frames)  # a packet that held no picture leaves fewer frames than were counted
    return _not_constant(np.stack([frames[min(index, last)] for index in middles]))


def has_sound(data: bytes) -> bool:
    """Whether a video has a sound track at all."""
    with _reading(data), _container(data) as container:
        return len(container.streams.audio) > 0


@contextmanager
def _reading(data: bytes) -> Iterator[None]:
    """Give every failure of a decoder its reason: for arbitrary bytes they raise almost anything."""
    if not data:
        raise UnusableError(Reason.EMPTY, "0 bytes")
    try:
        if missing := shortfall(data):
            raise UnusableError(Reason.TRUNCATED, missing)
        yield
    except UnusableError:
        raise
    except Exception as error:
        # PyAV raises EOFError; Pillow has no class of its own for a file cut off, only this word in every such message.
        ended = isinstance(error, EOFError) or "truncated" in str(error).lower()
        words = (getattr(error, "strerror", None) or str(error)).split(" <")[0]  # Pillow names an address in memory
        detail = f"{len(data)} bytes, {type(error).__name__}: {words}"
        raise UnusableError(Reason.TRUNCATED if ended else Reason.CORRUPT, detail) from error


def _container(data: bytes) -> Any:
    return av.open(io.BytesIO(data), options={"format_whitelist": CONTAINERS}, metadata_errors="replace")


def _track(container: Any, kind: str) -> Any:
    streams = getattr(container.streams, kind)
    if not streams:
        found = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise UnusableError(Reason.NO_TRACK, f"no {kind} stream, only: {found}")
    if streams[0].codec_context is None:
        raise UnusableError(Reason.CORRUPT, f"the {kind} stream is of an unknown codec")
    streams[0].codec_context.thread_count = 1  # samples are what is worked on side by side
    return streams[0]


def _decoded(packets: Any, stream: Any) -> Iterator[Any]:
    """Frames in the order they are shown; a few packets may be undecodable, as in any player."""
    good = bad = 0
    for packet in packets:
        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError:
            bad += 1
            continue
        good += 1
        yield from frames
    if bad > max(1, MAX_BAD_PACKETS * (good + bad)):
        raise UnusableError(Reason.CORRUPT, f"{bad} of {good + bad} packets cannot be decoded")


def _native_wave(data: bytes, max_seconds: float) -> tuple[NDArray[np.float32], int]:
    """Mono sound (t,) at the file's own rate, and that rate in Hz."""
    parts: list[NDArray[np.float32]] = []
    held, rate, wanted = 0, 0, math.inf
    with _container(data) as container:
        stream = _track(container, "audio")
        for frame in _decoded(container.demux(stream), stream):
            rate = rate or frame.sample_rate
            if frame.sample_rate != rate:
                raise UnusableError(Reason.CORRUPT, f"the rate changes from {rate} to {frame.sample_rate} Hz")
            parts.append(_mono(frame))
            held, wanted = held + len(parts[-1]), max(1, math.ceil(max_seconds * rate))
            if held >= wanted:
                break
        # Where sizes tell nothing, flac alone states its duration, in samples; that of others is an estimate.
        promised = (stream.duration or 0) if container.format.name == "flac" else 0
        if held < min(wanted, MIN_HELD * promised):
            raise UnusableError(Reason.TRUNCATED, f"the header promises {promised} samples, {held} can be decoded")
    if not held:
        raise UnusableError(Reason.EMPTY, f"no sample can be decoded from {len(data)} bytes")
    return np.concatenate(parts)[: int(min(wanted, held))], rate


def _mono(frame: Any) -> NDArray[np.float32]:
    """Samples (t,) of one decoded frame, whole numbers scaled so that full scale is 1."""
    if frame.format.is_planar and frame.layout.nb_channels >= 8:  # PyAV 18.1 reads a plane too many: segfault
        frame = av.AudioResampler(frame.format.packed, frame.layout, frame.sample_rate).resample(frame)[0]
    raw = frame.to_ndarray()
    channels = raw if frame.format.is_planar else raw.reshape(-1, frame.layout.nb_channels).T
    if raw.dtype == np.uint8:
        channels = (channels.astype(np.float32) - 128) / 128
    elif raw.dtype.kind == "i":
        channels = channels.astype(np.float32) / -float(np.iinfo(raw.dtype).min)
    return np.asarray(channels.mean(axis=0, dtype=np.float32))


def _resampled(wave: NDArray[np.float32], rate: int, goal: int) -> NDArray[np.float32]:
    """Polyphase, ceil(t * goal / rate) samples; PyAV's resampler costs 0.9 ms to set up, this 0.2 ms in all.

    Ratios are exact for the usual rates; odd ones are rounded (a part in a million) lest the filter gets millions long.
    """
    if not 1_000 <= rate <= 1_000_000:
        raise UnusableError(Reason.CORRUPT, f"the header states {rate} Hz")
    ratio = Fraction(goal, rate).limit_denominator(1_000)
    wave = wave if ratio == 1 else resample_poly(wave, ratio.numerator, ratio.denominator)
    return np.clip(wave, -1, 1).astype(np.float32, copy=False)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return image  # its EXIF cannot be read; the picture is decoded already and may be sound


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        levels = np.asarray(image, dtype=np.float64)
        scale = 1 / 256 if image.mode.startswith("I") else 255 if levels.max(initial=0) <= 1 else 1
        image = Image.fromarray(np.clip(np.nan_to_num(levels) * scale, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _video_packets(container: Any, stream: Any, max_seconds: float) -> list[Any]:
    """Undecoded packets of the first seconds: they are counted first, so that only the wanted frames are converted."""
    packets: list[Any] = []
    end = math.inf
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.pts is not None:
            end = min(end, packet.pts + max_seconds / float(packet.time_base))
            if packet.pts >= end:
                return packets
        packets.append(packet)
    # An avi counts chunks that hold nothing, to show a frame for longer; one written to a pipe promises 2^30 frames.
    promised = 0 if container.format.name == "avi" else stream.frames
    if len(packets) < MIN_HELD * promised:
        raise UnusableError(Reason.TRUNCATED, f"the header promises {promised} frames, {len(packets)} are there")
    return packets


def _frames_at(packets: list[Any], stream: Any, wanted: set[int], size: int) -> dict[int, NDArray[np.uint8]]:
    """The wanted frames by their place in the clip, and the last one decoded if it comes before the last wanted."""
    frames: dict[int, NDArray[np.uint8]] = {}
    index, frame = -1, None
    for index, frame in enumerate(_decoded([*packets, None], stream)):
        if index in wanted:
            frames[index] = _square(frame, size)
        if index >= max(wanted):
            return frames
    if frame is None:
        raise UnusableError(Reason.EMPTY, f"no frame can be decoded from {len(packets)} packets")
    return {**frames, index: _square(frame, size)}


def _square(frame: Any, size: int) -> NDArray[np.uint8]:
    """RGB (size, size, 3), turned as the file says (telephones film lying and note how they were held)."""
    pixels = frame.reformat(width=size, height=size, format="rgb24", interpolation="AREA", **_ONE_THREAD).to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, getattr(frame, "rotation", 0) // 90))


def _not_constant(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pass (..., w, 3) on unless every channel stays within CONSTANT_SPREAD over all frames."""
    rows = pixels.reshape(-1, 3 * pixels.shape[-2])  # down whole rows first: over 3 columns numpy takes 3 ms
    highest, lowest = (extreme(axis=0).reshape(-1, 3) for extreme in (rows.max, rows.min))
    if int(np.max(highest.max(axis=0) - lowest.min(axis=0))) <= CONSTANT_SPREAD:
        raise UnusableError(Reason.CONSTANT, f"one colour, RGB {tuple(lowest.min(axis=0).tolist())}")
    return pixels
