"""Opening of sound and video containers, and detection of truncated files.

Each check reads the sizes of one container format, takes microseconds, and never raises: damaged headers state no size,
or one that is too large. Not detected, for lack of a size: mp3 without Xing, Info or VBRI; matroska of unknown size
(written to a pipe or by a browser); ogg and fragmented mp4 cut exactly between two parts. Not checked: aiff, au, caf,
w64, flv, asf.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from ..errors import Reason, UnusableError
from .files import MAX_FRAME_PIXELS, MediaConfig
from .media_file import Medium, open_stream

MIN_PRESENT = 0.99  # share of the stated size; a file with less is truncated
SLACK_BYTES = 16  # difference due to writers that include the header in the size, or omit a padding byte
STREAMED_SIZE = 0x7FFFF000  # RIFF sizes from here on mean "unknown": written to a pipe by sox (this) or ffmpeg (-1)

# A box with another name ends the check: it may be text after the video, whose size is meaningless.
MP4_BOXES = frozenset(b"ftyp styp moov moof mdat mfra sidx ssix emsg prft meta uuid udta pdin wide free skip".split())
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
MAX_PARTS = 10_000  # chunks, boxes, segments or tags that are read; a file with more is not checked
XING_SEARCH = 4096  # bytes after the ID3v2 tags that are searched for the first frame: some tags are padded with zeros
FLAC_TRIALS = 16  # candidates of the last frame that are tried: one position in 65536 looks like the start of a frame


def missing_bytes(data: Medium) -> str:
    """Return the stated and the actual size as text; "" if the file is complete, or the header states no size."""
    if data.startswith(b"OggS"):
        return _ogg_shortfall(data)
    if data[4:8] in MP4_BOXES:
        return _mp4_shortfall(data)
    stated_end = max(end(data) for end in (_wav_end, _riff_end, _matroska_end, _mp3_end))
    return _byte_shortfall(data, stated_end, stated_end) or _flac_shortfall(data)


def _byte_shortfall(data: Medium, stated_end: int, num_counted: int) -> str:
    """Describe a clear difference to the stated end, by a header that counts `num_counted` of the bytes before it."""
    if stated_end - len(data) <= max(SLACK_BYTES, (1 - MIN_PRESENT) * num_counted):
        return ""
    return f"the header states {stated_end} bytes, the file has {len(data)}"


def _wav_end(data: Medium) -> int:
    """Return where the chunk with the samples should end, 0 if unknown."""
    offset = 12 if data[:4] == b"RIFF" and data[8:12] == b"WAVE" else len(data)
    for _ in range(MAX_PARTS):
        if offset + 8 > len(data):
            return offset
        name, size = data[offset : offset + 4], int.from_bytes(data[offset + 4 : offset + 8], "little")
        offset = _chunk_end(data, offset, size)
        if name == b"data":
            return 0 if size >= STREAMED_SIZE else offset
    return 0


def _riff_end(data: Medium) -> int:
    """Return where the last RIFF chunk of an avi (one per gigabyte) or webp should end, 0 if unknown."""
    offset = 0
    for _ in range(MAX_PARTS):
        if data[offset : offset + 4] != b"RIFF" or data[8:12] == b"WAVE":
            return offset
        size = int.from_bytes(data[offset + 4 : offset + 8], "little")
        if size >= STREAMED_SIZE:
            return 0
        offset = _chunk_end(data, offset, size)
    return 0


def _chunk_end(data: Medium, offset: int, size: int) -> int:
    """Return the end of a chunk, with padding to an even offset if the writer added it; no name starts with zero."""
    offset += 8 + size
    return offset + 1 if size % 2 and data[offset : offset + 1] == b"\0" else offset


def _mp4_shortfall(data: Medium) -> str:
    """Check whether the last box is complete: all sound and pictures of the file, or a fragment of a long video."""
    offset = size = 0
    name = b""
    for _ in range(MAX_PARTS):
        if data[offset + 4 : offset + 8] not in MP4_BOXES:
            return _byte_shortfall(data, offset, size if name in (b"moof", b"mdat") else offset)
        name = data[offset + 4 : offset + 8]
        is_64_bit = data[offset : offset + 4] == b"\0\0\0\1"  # the size follows the name, in 64 bits
        size = int.from_bytes(data[offset + 8 : offset + 16] if is_64_bit else data[offset : offset + 4], "big")
        if size < 8:  # 0: the box extends to the end of the file
            return ""
        offset += size
    return ""


def _matroska_end(data: Medium) -> int:
    """Return where the last segment of an mkv or webm should end, 0 if unknown."""
    offset = 0
    for _ in range(MAX_PARTS):
        if data[offset : offset + 4] not in (EBML, SEGMENT):
            return offset
        offset += 4
        # The size is coded in as many bytes as its first byte has leading zeros, plus one.
        length = 9 - int.from_bytes(data[offset : offset + 1], "big").bit_length()
        unknown_size = (1 << 7 * length) - 1  # means "unknown"
        size = int.from_bytes(data[offset : offset + length], "big") & unknown_size
        if length > 8 or size == unknown_size:
            return 0
        offset += length + size
    return 0


def _mp3_end(data: Medium) -> int:
    """Return where the last frame should end by the Xing, Info or VBRI header in the first frame, 0 if unknown.

    The byte count of the header is used; its frame count adds nothing, and gives bytes only by reading all frames.
    """
    start = _id3_end(data)
    for name, side_infos in ((b"Xing", (32, 17, 9)), (b"Info", (32, 17, 9)), (b"VBRI", (32,))):
        offset = data.find(name, start, start + XING_SEARCH)
        for frame in (offset - 4 - side_info for side_info in side_infos):
            if frame >= start and data[frame] == 0xFF and data[frame + 1] & 0xE6 == 0xE2:  # the sync of layer III
                return _end_of_frames(data, frame, offset)
    return start


def _end_of_frames(data: Medium, frame: int, offset: int) -> int:
    if data[offset : offset + 4] == b"VBRI":
        field = offset + 10
    else:
        flags = data[offset + 7 : offset + 8] or b"\0"
        if not flags[0] & 2:
            return 0
        field = offset + 12 if flags[0] & 1 else offset + 8
    size = int.from_bytes(data[field : field + 4], "big")
    tags_counted = abs(len(data) - size) <= SLACK_BYTES  # the size is that of the file, not of the sound
    return 0 if size >= STREAMED_SIZE or tags_counted else frame + size


def _id3_end(data: Medium) -> int:
    """Return where the ID3v2 tags before the sound end: their size has 28 bits, seven per byte."""
    offset = 0
    for _ in range(MAX_PARTS):
        if data[offset : offset + 3] != b"ID3" or offset + 10 > len(data):
            break
        size = 0
        for byte in data[offset + 6 : offset + 10]:
            size = size << 7 | byte & 0x7F
        offset += 10 + size + (10 if data[offset + 5] & 0x10 else 0)  # a footer repeats the header
    return offset


def _ogg_shortfall(data: Medium) -> str:
    """Check whether the last page is incomplete.

    It should have the end-of-stream flag (RFC 3533), but Android's recorder, Telegram on Android and MuseScore never
    set it. A missing flag therefore counts only if the last packet continues in a page that does not exist.
    """
    offset = data.rfind(b"OggS")
    if offset < 0:
        return ""  # in a large file: none within the searched range before its end
    header = data[offset : offset + 27].ljust(27, b"\xff")
    lacing = data[offset + 27 : offset + 27 + header[26]]
    end = offset + 27 + header[26] + sum(lacing)
    if end > len(data):
        return f"the last page ends at byte {end} or later, the file has {len(data)}"
    is_last_page = header[5] & 4
    if not is_last_page and (lacing[-1:] == b"\xff" or data[end:] in (b"O", b"Og", b"Ogg")):
        return f"the stream continues after its last page, which ends at byte {end}, the file has {len(data)}"
    return ""


def _flac_shortfall(data: Medium) -> str:
    """Compare the number in the header of the last frame with the sample count in the first block.

    This detects truncated long files; a short one, whose last frame may be the truncated one, is detected on decoding.
    """
    start = _id3_end(data)
    first_frame = _flac_first_frame(data, start)
    sync = data[first_frame : first_frame + 2]
    if sync not in (b"\xff\xf8", b"\xff\xf9"):
        return ""
    block = int.from_bytes(data[start + 10 : start + 12], "big")  # samples per frame, except in the last one
    stated_samples = int.from_bytes(data[start + 18 : start + 26], "big") & (1 << 36) - 1
    offset = len(data)
    for _ in range(FLAC_TRIALS):
        offset = data.rfind(sync, first_frame, offset)
        if offset < 0:
            return ""
        number = _flac_number(data[offset : offset + 16])
        if number is None:
            continue
        num_samples = block + number * (block if sync == b"\xff\xf8" else 1)  # numbers count frames, or samples
        if num_samples >= MIN_PRESENT * stated_samples:
            return ""
        return f"the header states {stated_samples} samples, the last frame ends with number {num_samples}"
    return ""


def _flac_first_frame(data: Medium, offset: int) -> int:
    """Return where the metadata blocks end; the end of the data if this is not flac."""
    is_last = data[offset : offset + 4] != b"fLaC"
    offset = len(data) if is_last else offset + 4
    for _ in range(MAX_PARTS):
        if is_last or offset + 4 > len(data):
            break
        is_last = data[offset] >= 0x80
        offset += 4 + int.from_bytes(data[offset + 1 : offset + 4], "big")
    return offset


def _flac_number(header: bytes) -> int | None:
    """Return the number of the frame, or of its first sample; None if the CRC-8 of the header is wrong.

    It is coded as in UTF-8, in up to seven bytes, followed by block sizes and rates that have no code of their own.
    """
    header = header.ljust(16, b"\0")
    num_ones = 8 - (header[4] ^ 0xFF).bit_length()  # leading ones of the first byte: the number of bytes, 0 for one
    length = 4 + max(1, num_ones) + {6: 1, 7: 2}.get(header[2] >> 4, 0) + {12: 1, 13: 2, 14: 2}.get(header[2] & 15, 0)
    if num_ones in (1, 8) or _crc8(header[: length + 1]):
        return None
    number = header[4] & 0x7F >> num_ones
    for byte in header[5 : 4 + max(1, num_ones)]:
        number = number << 6 | byte & 0x3F
    return number


def _crc8(message: bytes) -> int:
    """Compute the remainder modulo x^8 + x^2 + x + 1: 0 if the last byte is the CRC of the bytes before it."""
    crc = 0
    for byte in message:
        crc ^= byte
        for _ in range(8):
            crc = crc << 1 ^ (0x107 if crc & 0x80 else 0)
    return crc


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
    import av

    try:
        container = _open(file, {**limits, **_UNPROBED})
    except av.FFmpegError:
        yield None
        return
    with container:
        # The header of a fragmented mp4 states neither the number of samples nor the delay of its frames.
        yield container if all(stream.frames for stream in container.streams) else None


def _open(file: Any, options: dict[str, str]) -> Any:
    """Open a container. PyAV is imported where media are decoded: training from cached features does not need it."""
    import av

    return av.open(file, options={"format_whitelist": CONTAINERS, **options}, metadata_errors="replace")


def select_stream(container: Any, kind: str, config: MediaConfig) -> Any:
    """Return the first stream of a kind, audio or video; raise UnusableError if none can be decoded."""
    streams = getattr(container.streams, kind)
    if not streams:
        stream_types = ", ".join(sorted({stream.type for stream in container.streams}))
        if not stream_types:
            raise UnusableError(Reason.CORRUPT, "no stream in the file")
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
    import av

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
