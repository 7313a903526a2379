"""Decoding of images and video frames to upright RGB, within limits."""

from __future__ import annotations

import logging
import math
import struct
import warnings
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import Reason, UnusableError
from .container import MIN_PRESENT, count_packets, decode_packets, open_container, reading_container, select_stream
from .files import MediaConfig
from .media_file import Medium, open_stream

CONSTANT_SPREAD = 2  # levels of 255 between darkest and brightest pixel that a lossy codec makes of one colour
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # tags of TIFF
_BAND_PIXELS = 1 << 20

PICTURES = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # by name: Pillow would run Ghostscript on an EPS
Image.init()  # Pillow does not load plug-ins by itself when formats are given
logging.getLogger("PIL").addHandler(logging.NullHandler())  # without a handler, damaged tiffs print to the terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedPictures:
    """A picture (h, w, 3) or frames (f, h, w, 3), RGB, and the size of the original in pixels, upright."""

    pixels: NDArray[np.uint8]
    width: int
    height: int


def decode_image(data: Medium, config: MediaConfig) -> NDArray[np.uint8]:
    """Decode a picture (h, w, 3), RGB, rotated by its EXIF data, h = w = config.image_size.

    The full picture is stretched to the square: a crop could lose the object, and padding would add edges. Of 16 bits
    the upper 8 are kept; transparent pixels become white, as in a viewer; of an animation the first frame is read.
    """
    return decode_sized_image(data, size=config.image_size, config=config).pixels


def decode_sized_image(data: Medium, *, size: int | None, config: MediaConfig) -> SizedPictures:
    """Decode a picture as `decode_image` does, stretched to a square of `size`, or in its own size if that is None."""
    with reading_container(data):
        picture = _read_picture(data, size=size, config=config)
    check_not_constant(picture.pixels)
    return picture


def _read_picture(data: Medium, *, size: int | None, config: MediaConfig) -> SizedPictures:
    """Read a picture; the size in the header is checked before memory for the pixels is allocated."""
    _check_bytes(data, config)
    try:
        with warnings.catch_warnings(), open_stream(data) as file:
            warnings.simplefilter("ignore")  # Pillow warns about unusual metadata, which does not affect the pixels
            with Image.open(file, formats=PICTURES) as image:
                _check_pixels(image, config)
                return _read(image, size)
    except Image.DecompressionBombError as error:
        raise UnusableError(Reason.TOO_LARGE, str(error)) from error


def _read(image: Image.Image, size: int | None) -> SizedPictures:
    width, height = image.size
    if size is not None:
        # A jpeg can be decoded at a fraction of its size: one 4000 pixels wide takes 45 ms instead of 150.
        image.draft(None, (2 * size, 2 * size))
    image.load()
    decoded_size = image.size
    _turn_upright(image)
    if image.size != decoded_size:
        width, height = height, width
    rgb_image = _rgb(image)
    if size is not None:
        rgb_image = rgb_image.resize((size, size), Image.Resampling.BILINEAR)
    return SizedPictures(pixels=np.asarray(rgb_image, dtype=np.uint8), width=width, height=height)


def _check_bytes(data: Medium, config: MediaConfig) -> None:
    """Check what Pillow allocates when it opens a file: its bytes, and the canvas of a WebP."""
    if len(data) > config.max_image_bytes:
        limit = f"{config.max_image_bytes:,} (media.max_image_bytes)"
        raise UnusableError(Reason.TOO_LARGE, f"a picture of {len(data):,} bytes, the maximum is {limit}")
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X":
        width, height = (1 + int.from_bytes(data[offset : offset + 3], "little") for offset in (24, 27))
        _check_area(width, height, config)


def _check_pixels(image: Image.Image, config: MediaConfig) -> None:
    """Check the size of a picture, and of the tiles of a TIFF, each of which is decoded as one block."""
    _check_area(*image.size, config)
    tags: Any = getattr(image, "tag_v2", {})
    width, height = (tags.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_HEIGHT))
    if isinstance(width, int) and isinstance(height, int):
        _check_area(width, height, config)


def _check_area(width: int, height: int, config: MediaConfig) -> None:
    if width * height > config.max_image_pixels:
        limit = f"{config.max_image_pixels:,} pixels (media.max_image_pixels)"
        raise UnusableError(Reason.TOO_LARGE, f"a picture of {width:,} x {height:,}, the maximum is {limit}")


def check_not_constant(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return `pixels` (..., w, 3); raise UnusableError if no channel varies by more than CONSTANT_SPREAD."""
    rows = pixels.reshape(-1, 3 * pixels.shape[-2])  # reduce over rows of pixels first: numpy takes 3 ms over 3 columns
    highest, lowest = (extreme(axis=0).reshape(-1, 3) for extreme in (rows.max, rows.min))
    if int(np.max(highest.max(axis=0) - lowest.min(axis=0))) <= CONSTANT_SPREAD:
        raise UnusableError(Reason.CONSTANT, f"one colour, RGB {tuple(lowest.min(axis=0).tolist())}")
    return pixels


def _turn_upright(image: Image.Image) -> None:
    # A picture whose EXIF data cannot be read is kept as it is: its pixels are decoded already.
    with suppress(OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        ImageOps.exif_transpose(image, in_place=True)


def _rgb(image: Image.Image) -> Image.Image:
    """Return a picture as RGB, on white where it is transparent.

    Conversions with wide numbers or a second layer run band by band: in one step they take 16 to 48 bytes per pixel.
    """
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield the first row and the picture of each band of about a million pixels."""
    width, height = image.size
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert a picture of 16-bit or 32-bit integers, or of floats, to levels of 0 to 255."""
    scale = 1 / 256
    if image.mode.startswith("F"):
        highest = np.max([np.asarray(band, dtype=np.float64).max(initial=0) for _, band in _bands(image)])
        scale = 255 if highest <= 1 else 1
    levels = np.empty((image.height, image.width), dtype=np.uint8)
    for top, band in _bands(image):
        values = np.nan_to_num(np.asarray(band, dtype=np.float64)) * scale
        levels[top : top + band.height] = np.clip(values, 0, 255).astype(np.uint8)
    return Image.fromarray(levels)


def _on_white(image: Image.Image) -> Image.Image:
    rgb_image = Image.new("RGB", image.size)
    for top, band in _bands(image):
        layer = band.convert("RGBA")
        rgb_image.paste(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"), (0, top))
    return rgb_image


Folders = tuple[tuple[Medium, ...], ...]  # folders of a sample, each with its pictures in temporal order

STILL_SECONDS = 0.5  # shorter clips may show a single picture
# Levels of 255 by which frames of a still video may differ. x264 gives a difference of 0 at its default, 19 at CRF 35,
# MPEG-4 more at low bit rates: such videos pass, since lips that say a digit may change by no more than 38.
STILL_SPREAD = 8


@lru_cache(maxsize=1)
def _one_thread() -> dict[str, Any]:
    """Return the options with which PyAV scales a frame in one thread.

    From 17.0 on it starts new threads for each: 14 frames of 128 x 96 take 14 ms, with one thread 0.3 ms.
    """
    import av

    return {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}


def decode_frames(data: Medium, config: MediaConfig) -> NDArray[np.uint8]:
    """Decode frames (f, h, w, 3), RGB, f = config.num_frames, h = w = config.frame_size, stretched as pictures are.

    The clip, or its first config.max_seconds, is divided into f equal parts, and the middle frame of each is decoded;
    a clip of fewer frames yields some of them more than once.
    """
    return decode_sized_frames(data, num_frames=config.num_frames, size=config.frame_size, config=config).pixels


def decode_sized_frames(
    data: Medium, *, num_frames: int, size: int | None, config: MediaConfig, fps: float | None = None
) -> SizedPictures:
    """Decode frames as `decode_frames` does, in the video's own size if `size` is None.

    With `fps` the parts are those of the frames at 0, 1 / fps, 2 / fps, ... seconds.
    """
    with reading_container(data):
        frames = _read_frames(data, num_frames=num_frames, convert=_Converter(size), config=config, fps=fps)
    check_not_constant(frames.pixels)
    return frames


def decode_folders(folders: Folders, config: MediaConfig) -> NDArray[np.uint8]:
    """Decode frames (f, h, w, 3) from folders of pictures in temporal order, sampled and stretched like a video.

    One folder gives RGB. Two or three, such as optical flow in x and y, are read as grey and become the colour
    channels; with two, the third channel is 128. Raises UnusableError if a required picture cannot be decoded.
    """
    return decode_sized_folders(folders, num_frames=config.num_frames, size=config.frame_size, config=config).pixels


def decode_sized_folders(folders: Folders, *, num_frames: int, size: int, config: MediaConfig) -> SizedPictures:
    """Decode frames as `decode_folders` does; the size is that of the first picture."""
    if not 1 <= len(folders) <= 3:
        raise UnusableError(
            Reason.CORRUPT,
            f"{len(folders)} folders of frames; expected one of RGB, or two or three of grey pictures",
        )
    folder_frames = [_read_folder(folder, num_frames=num_frames, size=size, config=config) for folder in folders]
    if len(folder_frames) == 1:
        check_not_constant(folder_frames[0].pixels)
        return folder_frames[0]
    grey = [np.rint(frames.pixels.mean(axis=-1)).astype(np.uint8) for frames in folder_frames]
    grey += [np.full_like(grey[0], 128)] * (3 - len(grey))
    return replace(folder_frames[0], pixels=check_not_constant(np.stack(grey, axis=-1)))


def _read_folder(pictures: tuple[Medium, ...], *, num_frames: int, size: int, config: MediaConfig) -> SizedPictures:
    if not pictures:
        raise UnusableError(Reason.EMPTY, "a folder without pictures")
    frames: dict[int, SizedPictures] = {}
    frame_indices = segment_middles(len(pictures), num_frames)
    for index in set(frame_indices):
        with reading_container(pictures[index]):
            frames[index] = _read_picture(pictures[index], size=size, config=config)
    pixels = np.stack([frames[index].pixels for index in frame_indices])
    return replace(frames[frame_indices[0]], pixels=pixels)


def segment_middles(count: int, num_parts: int) -> list[int]:
    """Divide `count` frames into equal parts and return the index of the middle frame of each."""
    return [(2 * part + 1) * count // (2 * num_parts) for part in range(num_parts)]


def _read_frames(
    data: Medium, *, num_frames: int, convert: _Converter, config: MediaConfig, fps: float | None
) -> SizedPictures:
    with open_container(data, config) as container:
        stream = select_stream(container, "video", config)
        packets = _video_packets(container, stream, config)
        usable = _frames_at_rate([packet for packet in packets if not packet.is_discard], fps)
        frame_indices = [usable[index] if usable else 0 for index in segment_middles(len(usable), num_frames)]
        requested = set(frame_indices)
        frames = _frames_by_time(packets, stream, requested, convert)
        frames = frames or _frames_at(packets, stream, requested, convert)
    last = max(frames)  # packets without a picture give fewer frames than were counted
    _check_moving(frames, _seconds(packets))
    pixels = np.stack([frames[min(index, last)] for index in frame_indices])
    return SizedPictures(pixels=pixels, width=convert.width, height=convert.height)


def _frames_at_rate(packets: list[Any], fps: float | None) -> Sequence[int]:
    """Return the indices of the frames at 0, 1 / fps, 2 / fps, ... seconds, or the first ones after these times.

    All frames without a rate, or where packets have no times.
    """
    times = np.array([math.nan if packet.pts is None else packet.pts for packet in packets], dtype=np.float64)
    if fps is None or not len(times) or np.isnan(times).any():
        return range(len(packets))
    times = np.sort(times - times.min())
    step = 1 / (fps * float(packets[0].time_base))  # in units of the times
    grid = step * np.arange(1 + math.floor(times[-1] / step + 1e-6))
    indices: list[int] = np.searchsorted(times, grid - 0.5).tolist()  # times are whole numbers
    return indices


def _check_moving(frames: dict[int, NDArray[np.uint8]], seconds: float) -> None:
    """Raise UnusableError if all frames of a clip longer than half a second are equal; a single frame passes.

    Motion is a change by more than STILL_SPREAD of 255 levels in any pixel.
    """
    first, *later_frames = frames.values()
    if not later_frames or seconds <= STILL_SECONDS:
        return
    change = 0
    for frame in later_frames:
        change = max(change, int((np.maximum(first, frame) - np.minimum(first, frame)).max()))
        if change > STILL_SPREAD:
            return
    detail = f"{len(frames)} frames over {seconds:.2f} s differ by at most {change} of 255 levels"
    raise UnusableError(Reason.STILL, detail)


def _seconds(packets: list[Any]) -> float:
    """Return the time from the first to the last displayed frame, 0 where the packets have no times."""
    times = [packet.pts for packet in packets if packet.pts is not None]
    # Multiplying the time of each packet by the time base, a Fraction, would take 2 ms per clip.
    return float((max(times) - min(times)) * packets[0].time_base) if times else 0.0


def _video_packets(container: Any, stream: Any, config: MediaConfig) -> list[Any]:
    """Return the coded packets of the first config.max_seconds, counted first so that few frames are converted."""
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
    # An avi counts empty chunks, which prolong a frame; one written to a pipe states 2^30 frames.
    stated_frames = 0 if container.format.name == "avi" else stream.frames
    if len(packets) < MIN_PRESENT * stated_frames:
        raise UnusableError(Reason.TRUNCATED, f"the header states {stated_frames} frames, the file has {len(packets)}")
    return packets


class _Budget:
    """Counter of the coded bytes of a clip, and of its pixels when decoded, against their limits."""

    def __init__(self, frame_pixels: int, config: MediaConfig) -> None:
        self._num_bytes = self._num_pixels = 0
        self._frame_pixels, self._config = frame_pixels, config

    def add(self, num_bytes: int) -> None:
        """Count one coded frame; raise UnusableError if a limit is exceeded."""
        self._num_bytes += num_bytes
        self._num_pixels += self._frame_pixels
        for name, used in (("max_video_bytes", self._num_bytes), ("max_video_pixels", self._num_pixels)):
            if used > getattr(self._config, name):
                unit = "bytes of coded frames" if name == "max_video_bytes" else "pixels to decode"
                limit = getattr(self._config, name)
                raise UnusableError(Reason.TOO_LARGE, f"more than {limit:,} {unit} (media.{name})")


def _frames_by_time(
    packets: list[Any], stream: Any, frame_indices: set[int], convert: _Converter
) -> dict[int, NDArray[np.uint8]]:
    """Decode the requested frames of h264, by index in the clip; return {} if they are not identifiable or incomplete.

    An h264 frame states whether other frames refer to it. Frames that are neither referred to nor requested are not
    decoded, which saves a quarter of the time. Decoded frames are identified by their times, since not all are counted.
    """
    times = sorted({packet.pts for packet in packets if not packet.is_discard and packet.pts is not None})
    num_shown = sum(not packet.is_discard for packet in packets)
    if stream.codec_context.name != "h264" or len(times) != num_shown or not frame_indices:
        return {}
    index_of_time = {times[index]: index for index in frame_indices}
    frames: dict[int, NDArray[np.uint8]] = {}
    for frame in decode_packets(_skip_unneeded(packets, stream, index_of_time), stream):
        if frame.pts in index_of_time:
            frames[index_of_time[frame.pts]] = convert(frame)
            if len(frames) == len(index_of_time):
                return frames
    stream.codec_context.flush_buffers()
    return {}


def _skip_unneeded(packets: list[Any], stream: Any, times: Container[int]) -> Iterator[Any]:
    """Yield the packets and a final None, setting before each whether the decoder may skip it."""
    for packet in packets:
        stream.codec_context.skip_frame = "DEFAULT" if packet.pts in times else "NONREF"
        yield packet
    stream.codec_context.skip_frame = "DEFAULT"
    yield None


def _frames_at(
    packets: list[Any], stream: Any, frame_indices: set[int], convert: _Converter
) -> dict[int, NDArray[np.uint8]]:
    """Decode the requested frames by index in the clip, and the last frame of a clip that ends before them."""
    frames: dict[int, NDArray[np.uint8]] = {}
    index, frame, last = -1, None, max(frame_indices)
    for index, frame in enumerate(decode_packets([*packets, None], stream)):
        if index in frame_indices:
            frames[index] = convert(frame)
        if index >= last:
            return frames
    if frame is None:
        raise UnusableError(Reason.EMPTY, f"no frame can be decoded from {len(packets)} packets")
    return {**frames, index: convert(frame)}


class _Converter:
    """Conversion of frames to RGB (size, size, 3), or in their own size; `width` and `height` are that of the last."""

    def __init__(self, size: int | None) -> None:
        self._size = size
        self.width = self.height = 0

    def __call__(self, frame: Any) -> NDArray[np.uint8]:
        """Convert a frame, rotated as the file states: telephones record in landscape and store the rotation."""
        width, height = (frame.width, frame.height) if self._size is None else (self._size, self._size)
        scaled = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA", **_one_thread())
        quarters = getattr(frame, "rotation", 0) // 90
        self.width, self.height = (frame.height, frame.width) if quarters % 2 else (frame.width, frame.height)
        return np.ascontiguousarray(np.rot90(scaled.to_ndarray(), quarters))
