"""Opening and decoding of sound and video containers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import av

from ..quarantine import Reason, UnusableError
from .files import MAX_FRAME_PIXELS, MediaConfig, Medium, open_stream
from .truncation import MP4_BOXES, missing_bytes

MAX_STREAMS = 100  # of a file; FFmpeg's own limit is 1,000, and each stream is probed
_PROBED_FRAMES = 4  # the limit is this much looser when probing, since its errors do not state the size of a frame
_ALIGNED_PIXELS = 1 << 20  # FFmpeg counts rows and columns up to a multiple of 64
MAX_BAD_PACKETS = 0.1  # share of undecodable packets, and one in any case: players skip a few (tags after an mp3)

# A list of names, because playlists (hls, concat) would open other files and addresses.
CONTAINERS = "wav,w64,aiff,au,caf,mp3,aac,amr,flac,ogg,mov,matroska,avi,mpeg,mpegts,flv,asf"

# The header of an mp4 states what FFmpeg finds out of other formats by decoding the first frames: opening a video of
# 480 x 360 takes 4 ms with probing and 0.5 without.
_UNPROBED = {"skip_frame": "all", "probesize": "2048", "analyzeduration": "1", "fpsprobesize": "0"}


@contextmanager
def reading_container(data: Medium) -> Iterator[None]:
    """Convert every error of a decoder to UnusableError with its reason: arbitrary bytes raise almost any error."""
    if not data:
        raise UnusableError(Reason.EMPTY, "0 bytes")
    try:
        if shortfall := missing_bytes(data):
            raise UnusableError(Reason.TRUNCATED, shortfall)
        yield
    except UnusableError:
        raise
    except Exception as error:
        # PyAV raises EOFError; Pillow has no error class for truncated files, only this word in every such message.
        is_truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
        message = (getattr(error, "strerror", None) or str(error)).split(" <")[0]  # Pillow prints a memory address
        detail = f"{len(data)} bytes, {type(error).__name__}: {message}"
        raise UnusableError(Reason.TRUNCATED if is_truncated else Reason.CORRUPT, detail) from error


@contextmanager
def open_container(data: Medium, config: MediaConfig) -> Iterator[Any]:
    """Open a sound or video file."""
    limits = {"max_streams": str(MAX_STREAMS), **_pixel_limit(_PROBED_FRAMES * config.max_frame_pixels)}
    with open_stream(data) as file:
        with _unprobed(file, limits) if data[4:8] in MP4_BOXES else nullcontext() as container:
            if container is not None:
                yield container
                return
        file.seek(0)
        with _open(file, limits) as container:
            yield container


@contextmanager
def _unprobed(file: Any, limits: dict[str, str]) -> Iterator[Any]:
    """Open an mp4 without probing; yield None where its header does not suffice."""
    try:
        container = _open(file, {**limits, **_UNPROBED})
    except av.FFmpegError:
        yield None
        return
    with container:
        # The header of a fragmented mp4 states neither the number of samples nor the delay of its frames.
        yield container if all(stream.frames for stream in container.streams) else None


def _open(file: Any, options: dict[str, str]) -> Any:
    return av.open(file, options={"format_whitelist": CONTAINERS, **options}, metadata_errors="replace")


def select_stream(container: Any, kind: str, config: MediaConfig) -> Any:
    """Return the first stream of a kind, audio or video; raise UnusableError if none can be decoded."""
    streams = getattr(container.streams, kind)
    if not streams:
        stream_types = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise UnusableError(Reason.NO_TRACK, f"no {kind} stream; streams in the file: {stream_types}")
    if streams[0].codec_context is None:
        raise UnusableError(Reason.CORRUPT, f"the {kind} stream has an unknown codec")
    if kind == "video":
        check_frame_size(streams[0].codec_context.width, streams[0].codec_context.height, config)
    streams[0].codec_context.thread_count = 1  # samples are decoded in parallel, not the frames of one
    streams[0].codec_context.options = _pixel_limit(config.max_frame_pixels)
    return streams[0]


def _pixel_limit(num_pixels: int) -> dict[str, str]:
    """Return the FFmpeg option that refuses larger frames anywhere in a stream."""
    return {"max_pixels": str(min(num_pixels + _ALIGNED_PIXELS, MAX_FRAME_PIXELS))}


def count_packets(packets: Iterable[Any], config: MediaConfig) -> Iterator[Any]:
    """Yield packets; raise UnusableError if there are more than the budget allows."""
    for index, packet in enumerate(packets):
        if index >= config.max_packets:
            raise UnusableError(Reason.TOO_LARGE, f"more than {config.max_packets:,} packets (media.max_packets)")
        yield packet


def check_frame_size(width: int, height: int, config: MediaConfig) -> None:
    """Raise UnusableError for video frames larger than the budget allows."""
    if width * height > config.max_frame_pixels:
        limit = f"{config.max_frame_pixels:,} pixels (media.max_frame_pixels)"
        raise UnusableError(Reason.TOO_LARGE, f"frames of {width:,} x {height:,}, the maximum is {limit}")


def decode_packets(packets: Any, stream: Any) -> Iterator[Any]:
    """Yield frames in display order; a few packets may be undecodable, as in any player."""
    num_decoded = num_bad = 0
    decode = stream.codec_context.decode
    for packet in packets:
        try:
            frames = decode(packet)
        except av.FFmpegError:
            num_bad += 1
            continue
        num_decoded += 1
        yield from frames
    if num_bad > max(1, MAX_BAD_PACKETS * (num_decoded + num_bad)):
        raise UnusableError(Reason.CORRUPT, f"{num_bad} of {num_decoded + num_bad} packets cannot be decoded")
