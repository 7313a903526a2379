"""Video: frames evenly spaced over the duration of a file."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from ..quarantine import Reason, UnusableError
from .container import count_packets, decode_packets, open_container, select_stream
from .files import MediaConfig, Medium
from .truncation import MIN_HELD

STILL_SECONDS = 0.5  # a shorter clip may well show one picture
# Levels of 255 by which frames of one picture may differ. x264 leaves none at its default, 19 at CRF 35, MPEG-4 more at
# few bits: those are let pass, for lips that say a digit may change by no more than 38.
STILL_SPREAD = 8

# From 17.0 on PyAV scales frames in threads it starts anew for each: 14 frames of 128 x 96 take 14 ms, in one 0.3 ms.
_ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}


def segment_middles(count: int, parts: int) -> list[int]:
    """Cut `count` frames into equal parts and give the place of the frame in the middle of each."""
    return [(2 * part + 1) * count // (2 * parts) for part in range(parts)]


def read_frames(data: Medium, *, num_frames: int, size: int | None, config: MediaConfig) -> NDArray[np.uint8]:
    """Frames (f, h, w, 3), RGB, squares of `size`, or of the film's own where that is None.

    The clip, or its first seconds, is cut into f equal parts and the frame in the middle of each is taken.
    """
    with open_container(data, config) as container:
        stream = select_stream(container, "video", config)
        packets = _video_packets(container, stream, config)
        shown = sum(not packet.is_discard for packet in packets)
        wanted = segment_middles(shown, num_frames)
        frames = _frames_by_time(packets, stream, set(wanted), size) or _frames_at(packets, stream, set(wanted), size)
    last = max(frames)  # a packet that held no picture leaves fewer frames than were counted
    _check_moving(frames, _seconds(packets))
    return np.stack([frames[min(index, last)] for index in wanted])


def _check_moving(frames: dict[int, NDArray[np.uint8]], seconds: float) -> None:
    """Refuse a clip longer than half a second of which all frames show the same; of one frame nothing is said.

    Motion is a change by more than STILL_SPREAD of 255 levels anywhere.
    """
    first, *others = frames.values()
    if not others or seconds <= STILL_SECONDS:
        return
    change = 0
    for other in others:
        change = max(change, int((np.maximum(first, other) - np.minimum(first, other)).max()))
        if change > STILL_SPREAD:
            return
    raise UnusableError(Reason.STILL, f"{len(frames)} frames over {seconds:.2f} s differ by {change} of 255 levels")


def _seconds(packets: list[Any]) -> float:
    """Time from the first frame shown to the last, 0 where the packets do not tell."""
    times = [packet.pts for packet in packets if packet.pts is not None]
    # A product for each packet would take 2 ms of a clip: its units are fractions.
    return float((max(times) - min(times)) * packets[0].time_base) if times else 0.0


def _video_packets(container: Any, stream: Any, config: MediaConfig) -> list[Any]:
    """Undecoded packets of the first seconds: they are counted first, so that only the wanted frames are converted."""
    packets: list[Any] = []
    end, length = math.inf, config.max_seconds / float(stream.time_base)
    budget = _Budget(stream.codec_context.width * stream.codec_context.height, config)
    for packet in count_packets(container.demux(stream), config):
        if not packet.size:
            continue
        if packet.pts is not None:
            end = min(end, packet.pts + length)
            if packet.pts >= end:
                return packets
        budget.add(packet.size)
        packets.append(packet)
    # An avi counts chunks that hold nothing, to show a frame for longer; one written to a pipe promises 2^30 frames.
    promised = 0 if container.format.name == "avi" else stream.frames
    if len(packets) < MIN_HELD * promised:
        raise UnusableError(Reason.TRUNCATED, f"the header promises {promised} frames, {len(packets)} are there")
    return packets


class _Budget:
    """What the coded frames of a clip may come to: bytes, and pixels when they are decoded."""

    def __init__(self, frame_pixels: int, config: MediaConfig) -> None:
        self._num_bytes = self._num_pixels = 0
        self._frame_pixels, self._config = frame_pixels, config

    def add(self, num_bytes: int) -> None:
        """Count one coded frame; UnusableError where the budget is spent."""
        self._num_bytes += num_bytes
        self._num_pixels += self._frame_pixels
        for name, spent in (("max_video_bytes", self._num_bytes), ("max_video_pixels", self._num_pixels)):
            if spent > getattr(self._config, name):
                what = "bytes of coded frames" if name == "max_video_bytes" else "pixels to decode"
                limit = getattr(self._config, name)
                raise UnusableError(Reason.TOO_LARGE, f"more than {limit:,} {what} (media.{name})")


def _frames_by_time(
    packets: list[Any], stream: Any, wanted: set[int], size: int | None
) -> dict[int, NDArray[np.uint8]]:
    """The wanted frames by their place in the clip, nothing where that cannot be told beforehand or one is missing.

    In h264 a frame says whether others are made from it. Those of which none is, and that are not wanted, need not be
    decoded: a quarter of the time. What comes out is known by its time, for it can no longer be counted.
    """
    times = sorted({packet.pts for packet in packets if not packet.is_discard and packet.pts is not None})
    shown = sum(not packet.is_discard for packet in packets)
    if stream.codec_context.name != "h264" or len(times) != shown or not wanted:
        return {}
    places = {times[index]: index for index in wanted}
    frames: dict[int, NDArray[np.uint8]] = {}
    for frame in decode_packets(_sparing(packets, stream, places), stream):
        if frame.pts in places:
            frames[places[frame.pts]] = _pixels(frame, size)
            if len(frames) == len(places):
                return frames
    stream.codec_context.flush_buffers()
    return {}


def _sparing(packets: list[Any], stream: Any, times: Container[int]) -> Iterator[Any]:
    """The packets, and None behind them; the decoder is told before each whether it may leave it out."""
    for packet in packets:
        stream.codec_context.skip_frame = "DEFAULT" if packet.pts in times else "NONREF"
        yield packet
    stream.codec_context.skip_frame = "DEFAULT"
    yield None


def _frames_at(packets: list[Any], stream: Any, wanted: set[int], size: int | None) -> dict[int, NDArray[np.uint8]]:
    """The wanted frames by their place in the clip, and the last one decoded if it comes before the last wanted."""
    frames: dict[int, NDArray[np.uint8]] = {}
    index, frame, last = -1, None, max(wanted)
    for index, frame in enumerate(decode_packets([*packets, None], stream)):
        if index in wanted:
            frames[index] = _pixels(frame, size)
        if index >= last:
            return frames
    if frame is None:
        raise UnusableError(Reason.EMPTY, f"no frame can be decoded from {len(packets)} packets")
    return {**frames, index: _pixels(frame, size)}


def _pixels(frame: Any, size: int | None) -> NDArray[np.uint8]:
    """RGB (size, size, 3), or of the film's own size, turned as the file says.

    Telephones film lying and note how they were held.
    """
    width, height = (frame.width, frame.height) if size is None else (size, size)
    scaled = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA", **_ONE_THREAD)
    pixels = scaled.to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, getattr(frame, "rotation", 0) // 90))
