"""Opening and decoding of sound and video containers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import av

from ..quarantine import Reason, UnusableError
from .files import MAX_FRAME_PIXELS, MediaConfig, Medium, stream_of
from .truncation import MP4_BOXES, missing_bytes

MAX_STREAMS = 100  # of a file; FFmpeg's own limit is 1,000, and each is probed
_PROBED_FRAMES = 4  # what is refused when a file is probed has no size that a message could name
_ALIGNED_PIXELS = 1 << 20  # FFmpeg counts rows and columns up to a multiple of 64
MAX_BAD_PACKETS = 0.1  # of all, and one in any case: players skip a few (tags behind an mp3)

# By name, because playlists (hls, concat) would open other files and addresses.
CONTAINERS = "wav,w64,aiff,au,caf,mp3,aac,amr,flac,ogg,mov,matroska,avi,mpeg,mpegts,flv,asf"

# An mp4 says at its head what FFmpeg would find out of others by decoding their first pictures: with it, opening a film
# of 480 x 360 takes 4 ms, without it 0.5.
_UNPROBED = {"skip_frame": "all", "probesize": "2048", "analyzeduration": "1", "fpsprobesize": "0"}


@contextmanager
def reading_container(data: Medium) -> Iterator[None]:
    """Give every failure of a decoder its reason: for arbitrary bytes they raise almost anything."""
    if not data:
        raise UnusableError(Reason.EMPTY, "0 bytes")
    try:
        if missing := missing_bytes(data):
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


@contextmanager
def open_container(data: Medium, config: MediaConfig) -> Iterator[Any]:
    """Open a file of sound or video."""
    limits = {"max_streams": str(MAX_STREAMS), **_pixel_limit(_PROBED_FRAMES * config.max_frame_pixels)}
    with stream_of(data) as file:
        with _unprobed(file, limits) if data[4:8] in MP4_BOXES else nullcontext() as container:
            if container is not None:
                yield container
                return
        file.seek(0)
        with _open(file, limits) as container:
            yield container


@contextmanager
def _unprobed(file: Any, limits: dict[str, str]) -> Iterator[Any]:
    """Open an mp4 without probing; None where that does not tell enough."""
    try:
        container = _open(file, {**limits, **_UNPROBED})
    except av.FFmpegError:
        yield None
        return
    with container:
        # A film in fragments counts no samples at its head, and does not say there how late its frames come.
        yield container if all(stream.frames for stream in container.streams) else None


def _open(file: Any, options: dict[str, str]) -> Any:
    return av.open(file, options={"format_whitelist": CONTAINERS, **options}, metadata_errors="replace")


def select_stream(container: Any, kind: str, config: MediaConfig) -> Any:
    """Give the first stream of a kind, audio or video; UnusableError if there is none that could be decoded."""
    streams = getattr(container.streams, kind)
    if not streams:
        found = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise UnusableError(Reason.NO_TRACK, f"no {kind} stream, only: {found}")
    if streams[0].codec_context is None:
        raise UnusableError(Reason.CORRUPT, f"the {kind} stream is of an unknown codec")
    if kind == "video":
        check_frame_size(streams[0].codec_context.width, streams[0].codec_context.height, config)
    streams[0].codec_context.thread_count = 1  # samples are what is worked on side by side
    streams[0].codec_context.options = _pixel_limit(config.max_frame_pixels)
    return streams[0]


def _pixel_limit(num_pixels: int) -> dict[str, str]:
    """Return the option by which FFmpeg refuses larger frames, wherever in a stream their size is stated."""
    return {"max_pixels": str(min(num_pixels + _ALIGNED_PIXELS, MAX_FRAME_PIXELS))}


def count_packets(packets: Iterable[Any], config: MediaConfig) -> Iterator[Any]:
    """Yield packets; UnusableError where there are more than the budget allows."""
    for number, packet in enumerate(packets):
        if number >= config.max_packets:
            raise UnusableError(Reason.TOO_LARGE, f"more than {config.max_packets:,} packets (media.max_packets)")
        yield packet


def check_frame_size(width: int, height: int, config: MediaConfig) -> None:
    """Raise UnusableError for frames of video larger than the budget allows."""
    if width * height > config.max_frame_pixels:
        limit = f"{config.max_frame_pixels:,} pixels (media.max_frame_pixels)"
        raise UnusableError(Reason.TOO_LARGE, f"frames of {width:,} x {height:,}, at most {limit}")


def decode_packets(packets: Any, stream: Any) -> Iterator[Any]:
    """Frames in the order they are shown; a few packets may be undecodable, as in any player."""
    good = bad = 0
    decode = stream.codec_context.decode
    for packet in packets:
        try:
            frames = decode(packet)
        except av.FFmpegError:
            bad += 1
            continue
        good += 1
        yield from frames
    if bad > max(1, MAX_BAD_PACKETS * (good + bad)):
        raise UnusableError(Reason.CORRUPT, f"{bad} of {good + bad} packets cannot be decoded")
