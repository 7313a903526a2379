"""Decoding of images to upright RGB (h, w, 3), within limits."""

from __future__ import annotations

import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import Reason, UnusableError
from .container import reading_container
from .files import MediaConfig, Medium, open_stream

CONSTANT_SPREAD = 2  # levels of 255 between darkest and brightest pixel that a lossy codec makes of one colour
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # tags of TIFF
_BAND_PIXELS = 1 << 20

PICTURES = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # by name: Pillow would run Ghostscript on an EPS
Image.init()  # Pillow does not load plug-ins by itself when formats are given
logging.getLogger("PIL").addHandler(logging.NullHandler())  # without a handler, damaged tiffs print to the terminal


def decode_image(data: Medium, config: MediaConfig) -> NDArray[np.uint8]:
    """Decode a picture (h, w, 3), RGB, rotated by its EXIF data, h = w = config.image_size.

    The full picture is stretched to the square: a crop could lose the object, and padding would add edges. Of 16 bits
    the upper 8 are kept; transparent pixels become white, as in a viewer; of an animation the first frame is read.
    """
    with reading_container(data):
        return check_not_constant(read_picture(data, size=config.image_size, config=config))


def read_picture(data: Medium, *, size: int | None, config: MediaConfig) -> NDArray[np.uint8]:
    """Read a picture (h, w, 3), RGB, stretched to a square of `size`, or in its own size if `size` is None.

    The size in the header is checked before memory for the pixels is allocated.
    """
    _check_bytes(data, config)
    try:
        with warnings.catch_warnings(), open_stream(data) as file:
            warnings.simplefilter("ignore")  # Pillow warns about unusual metadata, which does not affect the pixels
            with Image.open(file, formats=PICTURES) as image:
                _check_pixels(image, config)
                return _read(image, size)
    except Image.DecompressionBombError as error:
        raise UnusableError(Reason.TOO_LARGE, str(error)) from error


def _read(image: Image.Image, size: int | None) -> NDArray[np.uint8]:
    if size is not None:
        # A jpeg can be decoded at a fraction of its size: one 4000 pixels wide takes 45 ms instead of 150.
        image.draft(None, (2 * size, 2 * size))
    image.load()
    _turn_upright(image)
    rgb_image = _rgb(image)
    if size is not None:
        rgb_image = rgb_image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(rgb_image, dtype=np.uint8)


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
