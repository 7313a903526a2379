"""Detection of media files whose header promises more bytes than there are.

Each check reads one container's own sizes, in microseconds, and raises nothing: garbage promises nothing, or too much.
Headers that tell no size say nothing: mp3 without Xing, Info or VBRI; matroska of unknown size (written to a pipe or by
a browser); ogg and films in fragments cut exactly between two parts. Not looked into: aiff, au, caf, w64, flv, asf.
"""

from __future__ import annotations

from .files import Medium

MIN_HELD = 0.99  # of what the header promises; less is truncated
SLACK_BYTES = 16  # writers who count the header in, or a byte of padding that is not there
STREAMED_SIZE = 0x7FFFF000  # RIFF sizes from here on mean "unknown": written to a pipe by sox (this) or ffmpeg (-1)

# What follows a box of another name is not looked at: it may be words behind the film, and their size a whim.
MP4_BOXES = frozenset(b"ftyp styp moov moof mdat mfra sidx ssix emsg prft meta uuid udta pdin wide free skip".split())
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
MAX_PARTS = 10_000  # chunks, boxes, segments or tags whose sizes are followed; of more nothing is said
XING_SEARCH = 4096  # bytes behind the ID3v2 tags in which the first frame is looked for: some pad them with zeros
FLAC_TRIALS = 16  # places in coded sound that look like the beginning of a frame: one in 65536


def missing_bytes(data: Medium) -> str:
    """Say what is promised and what is there; "" if that is enough, or if the header does not tell."""
    if data.startswith(b"OggS"):
        return _ogg_shortfall(data)
    if data[4:8] in MP4_BOXES:
        return _mp4_shortfall(data)
    promised = max(end(data) for end in (_wav_end, _riff_end, _matroska_end, _mp3_end))
    return _lacking(data, promised, promised) or _flac_shortfall(data)


def _lacking(data: Medium, promised: int, counted: int) -> str:
    """Whether clearly less is there than promised, by a header that counts so many of the bytes before its end."""
    if promised - len(data) <= max(SLACK_BYTES, (1 - MIN_HELD) * counted):
        return ""
    return f"the header promises {promised} bytes, the file holds {len(data)}"


def _wav_end(data: Medium) -> int:
    """Where the chunk with the samples should end, 0 if unknown."""
    at = 12 if data[:4] == b"RIFF" and data[8:12] == b"WAVE" else len(data)
    for _ in range(MAX_PARTS):
        if at + 8 > len(data):
            return at
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        at = _behind_chunk(data, at, size)
        if name == b"data":
            return 0 if size >= STREAMED_SIZE else at
    return 0


def _riff_end(data: Medium) -> int:
    """Where the last RIFF chunk of an avi (one a gigabyte) or webp should end, 0 if unknown."""
    at = 0
    for _ in range(MAX_PARTS):
        if data[at : at + 4] != b"RIFF" or data[8:12] == b"WAVE":
            return at
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if size >= STREAMED_SIZE:
            return 0
        at = _behind_chunk(data, at, size)
    return 0


def _behind_chunk(data: Medium, at: int, size: int) -> int:
    """Chunks begin at even places, unless the writer forgot; no name begins with the zero that pads."""
    at += 8 + size
    return at + 1 if size % 2 and data[at : at + 1] == b"\0" else at


def _mp4_shortfall(data: Medium) -> str:
    """Whether the last box is whole: all of the file's sound and pictures, or a fragment of a long film."""
    at = size = 0
    name = b""
    for _ in range(MAX_PARTS):
        if data[at + 4 : at + 8] not in MP4_BOXES:
            return _lacking(data, at, size if name in (b"moof", b"mdat") else at)
        name = data[at + 4 : at + 8]
        wide = data[at : at + 4] == b"\0\0\0\1"  # the size stands in 64 bits behind the name
        size = int.from_bytes(data[at + 8 : at + 16] if wide else data[at : at + 4], "big")
        if size < 8:  # 0: the box goes to the end of the file, whatever that is
            return ""
        at += size
    return ""


def _matroska_end(data: Medium) -> int:
    """Where the last segment of an mkv or webm should end, 0 if unknown."""
    at = 0
    for _ in range(MAX_PARTS):
        if data[at : at + 4] not in (EBML, SEGMENT):
            return at
        at += 4
        length = 9 - int.from_bytes(data[at : at + 1], "big").bit_length()  # of the size: zeros before the first one
        most = (1 << 7 * length) - 1  # means "unknown"
        size = int.from_bytes(data[at : at + length], "big") & most
        if length > 8 or size == most:
            return 0
        at += length + size
    return 0


def _mp3_end(data: Medium) -> int:
    """Where the last frame should end by the Xing, Info or VBRI header in the first, 0 if unknown.

    Their count of bytes is read; the one of frames beside it says no more, and bytes only if all frames are walked.
    """
    start = _behind_id3(data)
    for name, side_infos in ((b"Xing", (32, 17, 9)), (b"Info", (32, 17, 9)), (b"VBRI", (32,))):
        at = data.find(name, start, start + XING_SEARCH)
        for frame in (at - 4 - side_info for side_info in side_infos):
            if frame >= start and data[frame] == 0xFF and data[frame + 1] & 0xE6 == 0xE2:  # the sync of layer III
                return _end_of_frames(data, frame, at)
    return start


def _end_of_frames(data: Medium, frame: int, at: int) -> int:
    if data[at : at + 4] == b"VBRI":
        field = at + 10
    else:
        flags = data[at + 7 : at + 8] or b"\0"
        if not flags[0] & 2:
            return 0
        field = at + 12 if flags[0] & 1 else at + 8
    size = int.from_bytes(data[field : field + 4], "big")
    tags_counted = abs(len(data) - size) <= SLACK_BYTES  # it is the size of the file, not of the sound in it
    return 0 if size >= STREAMED_SIZE or tags_counted else frame + size


def _behind_id3(data: Medium) -> int:
    """Where the ID3v2 tags before the sound end: 28 bits of size, seven in a byte."""
    at = 0
    for _ in range(MAX_PARTS):
        if data[at : at + 3] != b"ID3" or at + 10 > len(data):
            break
        size = 0
        for byte in data[at + 6 : at + 10]:
            size = size << 7 | byte & 0x7F
        at += 10 + size + (10 if data[at + 5] & 0x10 else 0)  # a footer repeats the header
    return at


def _ogg_shortfall(data: Medium) -> str:
    """Whether the last page breaks off.

    It ought to bear the flag that ends the stream (RFC 3533), yet Android's recorder, Telegram on Android and MuseScore
    never set it. So its absence counts only where the last packet goes on in a page that is not there.
    """
    at = data.rfind(b"OggS")
    if at < 0:
        return ""  # in a large file, within no reach of its end
    header = data[at : at + 27].ljust(27, b"\xff")
    lacing = data[at + 27 : at + 27 + header[26]]
    end = at + 27 + header[26] + sum(lacing)
    if end > len(data):
        return f"the last page goes to byte {end} or beyond, the file holds {len(data)}"
    ended = header[5] & 4
    if not ended and (lacing[-1:] == b"\xff" or data[end:] in (b"O", b"Og", b"Ogg")):
        return f"the stream goes on behind its last page, which ends at byte {end}, the file holds {len(data)}"
    return ""


def _flac_shortfall(data: Medium) -> str:
    """Compare the number in the last frame's header with the count of samples in the first block.

    This finds a long file cut off; a short one, whose last frame may be the one cut, shows when it is decoded.
    """
    start = _behind_id3(data)
    first = _flac_first_frame(data, start)
    sync = data[first : first + 2]
    if sync not in (b"\xff\xf8", b"\xff\xf9"):
        return ""
    block = int.from_bytes(data[start + 10 : start + 12], "big")  # samples in a frame, the last one excepted
    promised = int.from_bytes(data[start + 18 : start + 26], "big") & (1 << 36) - 1
    at = len(data)
    for _ in range(FLAC_TRIALS):
        at = data.rfind(sync, first, at)
        if at < 0:
            return ""
        number = _flac_number(data[at : at + 16])
        if number is None:
            continue
        held = block + number * (block if sync == b"\xff\xf8" else 1)  # numbers count frames, or samples
        short = held < MIN_HELD * promised
        return f"the header promises {promised} samples, the last frame ends with number {held}" if short else ""
    return ""


def _flac_first_frame(data: Medium, at: int) -> int:
    """Where the blocks of metadata end; the end of the data if this is no flac."""
    last = data[at : at + 4] != b"fLaC"
    at = len(data) if last else at + 4
    for _ in range(MAX_PARTS):
        if last or at + 4 > len(data):
            break
        last = data[at] >= 0x80
        at += 4 + int.from_bytes(data[at + 1 : at + 4], "big")
    return at


def _flac_number(header: bytes) -> int | None:
    """Give the number of the frame, or of its first sample; None if the header's CRC-8 is wrong.

    It is written as UTF-8 writes letters, in up to seven bytes; behind it stand odd block sizes and rates.
    """
    header = header.ljust(16, b"\0")
    ones = 8 - (header[4] ^ 0xFF).bit_length()  # at the head of the first byte: how many bytes, 0 for one alone
    length = 4 + max(1, ones) + {6: 1, 7: 2}.get(header[2] >> 4, 0) + {12: 1, 13: 2, 14: 2}.get(header[2] & 15, 0)
    if ones in (1, 8) or _crc8(header[: length + 1]):
        return None
    number = header[4] & 0x7F >> ones
    for byte in header[5 : 4 + max(1, ones)]:
        number = number << 6 | byte & 0x3F
    return number


def _crc8(message: bytes) -> int:
    """Remainder by x^8 + x^2 + x + 1: 0 if the last byte is the CRC of the others."""
    crc = 0
    for byte in message:
        crc ^= byte
        for _ in range(8):
            crc = crc << 1 ^ (0x107 if crc & 0x80 else 0)
    return crc
