"""What kind of medium are these bytes, by the way they begin?"""

from __future__ import annotations

# (offset, bytes there, kind); the first that fits counts
_SIGNATURES = (
    (0, b"fLaC", "audio"),
    (0, b"ID3", "audio"),
    (0, b"caff", "audio"),
    (0, b".snd", "audio"),
    (0, b"\x89PNG\r\n\x1a\n", "image"),
    (0, b"\xff\xd8\xff", "image"),
    (0, b"GIF87a", "image"),
    (0, b"GIF89a", "image"),
    (0, b"II*\0", "image"),
    (0, b"MM\0*", "image"),
    (0, b"\x1a\x45\xdf\xa3", "video"),  # matroska, webm
    (0, b"FLV\x01", "video"),
    (0, b"\x30\x26\xb2\x75", "video"),  # asf
    (0, b"\0\0\x01\xba", "video"),  # mpeg
    (0, b"\0\0\x01\xb3", "video"),
)
_RIFF = {b"WAVE": "audio", b"AVI ": "video", b"WEBP": "image"}
_PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # an mp4 by its box, a picture in it
NUM_BYTES = 64  # that suffice


def kind_of_bytes(data: bytes) -> str | None:
    """Give audio, image or video by the first bytes of a medium; None where they tell nothing."""
    if data[:4] in (b"RIFF", b"RF64"):
        return _RIFF.get(data[8:12])
    if data[:4] == b"FORM":
        return "audio" if data[8:12] in (b"AIFF", b"AIFC") else None
    if data[:4] == b"OggS":
        return "video" if b"\x80theora" in data[:NUM_BYTES] else "audio"
    if data[4:8] == b"ftyp":
        return _kind_of_brand(data[8:12])
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":  # bmp: the reserved four bytes, lest any text with BM fits
        return "image"
    if data[:2] in (b"P5", b"P6") and data[2:3].isspace():
        return "image"
    if data[:1] == b"\xff" and len(data) > 2 and data[1] & 0xE0 == 0xE0 and data[1] & 0x18 != 0x08:
        # The sync word of a frame of mp3 or aac without a tag before it; FF FE, of layer I, begins UTF-16.
        return "audio" if data[1] & 0x06 != 0x06 else None
    return next((kind for at, start, kind in _SIGNATURES if data[at : at + len(start)] == start), None)


def _kind_of_brand(brand: bytes) -> str | None:
    if brand in _PICTURE_BRANDS:
        return None  # no decoder for these here
    return "audio" if brand in (b"M4A ", b"M4B ", b"M4P ") else "video"
