"""Decoding of bytes to a waveform (t,), an image (h, w, 3) or frames (f, h, w, 3).

Media that cannot be used raise UnusableError with the reason.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..errors import Reason, UnusableError
from .audio import SILENT_PEAK, clipped_share, decode_native, resample
from .container import open_container, reading_container
from .files import MediaConfig, Medium
from .image import check_not_constant, read_picture
from .video import read_frames, segment_middles

Folders = tuple[tuple[Medium, ...], ...]  # folders of a sample, each with its pictures in temporal order


def decode_audio(data: Medium, config: MediaConfig) -> NDArray[np.float32]:
    """Decode a mono waveform (t,), the mean of the channels, in [-1, 1], at config.sample_rate.

    Reads at most config.max_seconds of sound files, or of the first audio track of videos.
    """
    with reading_container(data):
        wave, rate = decode_native(data, config)
        peak = float(np.abs(wave).max())
        if not math.isfinite(peak):
            raise UnusableError(Reason.NOT_FINITE, f"{int((~np.isfinite(wave)).sum())} samples are not finite")
        if peak < SILENT_PEAK:
            raise UnusableError(Reason.SILENT, f"peak {peak:.1g} of 1 in {len(wave) / rate:.2f} s")
        clipped_fraction = clipped_share(wave)
        if clipped_fraction > config.max_clipped:
            raise UnusableError(
                Reason.CLIPPED, f"{clipped_fraction:.0%} of {len(wave) / rate:.2f} s are at the peak {peak:.2f}"
            )
        return resample(wave, rate, config.sample_rate)[: max(1, round(config.max_seconds * config.sample_rate))]


def decode_image(data: Medium, config: MediaConfig) -> NDArray[np.uint8]:
    """Decode a picture (h, w, 3), RGB, rotated by its EXIF data, h = w = config.image_size.

    The full picture is stretched to the square: a crop could lose the object, and padding would add edges. Of 16 bits
    the upper 8 are kept; transparent pixels become white, as in a viewer; of an animation the first frame is read.
    """
    with reading_container(data):
        return check_not_constant(read_picture(data, size=config.image_size, config=config))


def decode_frames(data: Medium, config: MediaConfig) -> NDArray[np.uint8]:
    """Decode frames (f, h, w, 3), RGB, f = config.num_frames, h = w = config.frame_size, stretched as pictures are.

    The clip, or its first config.max_seconds, is divided into f equal parts, and the middle frame of each is decoded;
    a clip of fewer frames yields some of them more than once.
    """
    with reading_container(data):
        frames = read_frames(data, num_frames=config.num_frames, size=config.frame_size, config=config)
        return check_not_constant(frames)


def decode_folders(folders: Folders, config: MediaConfig) -> NDArray[np.uint8]:
    """Decode frames (f, h, w, 3) from folders of pictures in temporal order, sampled and stretched like a video.

    One folder gives RGB. Two or three, such as optical flow in x and y, are read as grey and become the colour
    channels; with two, the third channel is 128. Raises UnusableError if a required picture cannot be decoded.
    """
    if not 1 <= len(folders) <= 3:
        raise UnusableError(
            Reason.CORRUPT,
            f"{len(folders)} folders of frames; expected one of RGB, or two or three of grey pictures",
        )
    folder_frames = [_read_folder(folder, config) for folder in folders]
    if len(folder_frames) == 1:
        return check_not_constant(folder_frames[0])
    grey = [np.rint(frames.mean(axis=-1)).astype(np.uint8) for frames in folder_frames]
    grey += [np.full_like(grey[0], 128)] * (3 - len(grey))
    return check_not_constant(np.stack(grey, axis=-1))


def _read_folder(pictures: tuple[Medium, ...], config: MediaConfig) -> NDArray[np.uint8]:
    if not pictures:
        raise UnusableError(Reason.EMPTY, "a folder without pictures")
    frames: dict[int, NDArray[np.uint8]] = {}
    frame_indices = segment_middles(len(pictures), config.num_frames)
    for index in set(frame_indices):
        with reading_container(pictures[index]):
            frames[index] = read_picture(pictures[index], size=config.frame_size, config=config)
    return np.stack([frames[index] for index in frame_indices])


def has_sound(data: Medium) -> bool:
    """Return whether a video has an audio track."""
    with reading_container(data), open_container(data, MediaConfig()) as container:
        return len(container.streams.audio) > 0
