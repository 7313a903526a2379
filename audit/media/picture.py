"""One picture: which colours does a file of bytes show, upright and in RGB?"""

from __future__ import annotations

import io
import logging
import struct
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..quality import Reason, UnusableError

CONSTANT_SPREAD = 2  # levels of 255 between darkest and brightest: what a lossy codec makes of one colour

PICTURES = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # by name: Pillow would run Ghostscript on an EPS
Image.init()  # with a choice of formats Pillow loads no further plug-ins by itself
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else broken tiffs print through logging's last resort


def read_picture(data: bytes, *, size: int | None) -> NDArray[np.uint8]:
    """Picture (h, w, 3), RGB: stretched onto a square of `size`, or in its own size where that is None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which does not concern the pixels
        with Image.open(io.BytesIO(data), formats=PICTURES) as image:
            if size is not None:
                # A jpeg can be decoded at a fraction of its size: one 4000 pixels wide takes 45 ms instead of 150.
                image.draft(None, (2 * size, 2 * size))
            image.load()
            shown = _rgb(_upright(image))
            if size is not None:
                shown = shown.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(shown, dtype=np.uint8)


def not_constant(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pass (..., w, 3) on unless every channel stays within CONSTANT_SPREAD over all frames."""
    rows = pixels.reshape(-1, 3 * pixels.shape[-2])  # down whole rows first: over 3 columns numpy takes 3 ms
    highest, lowest = (extreme(axis=0).reshape(-1, 3) for extreme in (rows.max, rows.min))
    if int(np.max(highest.max(axis=0) - lowest.min(axis=0))) <= CONSTANT_SPREAD:
        raise UnusableError(Reason.CONSTANT, f"one colour, RGB {tuple(lowest.min(axis=0).tolist())}")
    return pixels


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
