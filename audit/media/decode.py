"""Decoding of bytes to a waveform (t,), an image (h, w, 3) or frames (f, h, w, 3).

Whatever cannot be used leaves as UnusableError with its reason.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..quarantine import Reason, UnusableError
from .audio import SILENT_PEAK, clipped_share, decode_native, resample
from .container import open_container, reading_container
from .files import MediaConfig, Medium
from .image import check_not_constant, read_picture
from .video import read_frames, segment_middles

Folders = tuple[tuple[Medium, ...], ...]  # of a sample, each with its pictures in order of time


def decode_audio(data: Medium, config: MediaConfig) -> NDArray[np.float32]:
    """Waveform (t,), mono (mean of the channels), in [-1, 1] at config.sample_rate, at most config.max_seconds.

    Reads sound files and the first sound track of videos.
    """
    with reading_container(data):
        wave, rate = decode_native(data, config)
        peak = float(np.abs(wave).max())
        if not math.isfinite(peak):
            raise UnusableError(Reason.NOT_FINITE, f"{int((~np.isfinite(wave)).sum())} samples are not finite")
        if peak < SILENT_PEAK:
            raise UnusableError(Reason.SILENT, f"peak {peak:.1g} of 1 in {len(wave) / rate:.2f} s")
        clipped = clipped_share(wave)
        if clipped > config.max_clipped:
            raise UnusableError(
                Reason.CLIPPED, f"{clipped:.0%} of {len(wave) / rate:.2f} s stand at the peak {peak:.2f}"
            )
        return resample(wave, rate, config.sample_rate)[: max(1, round(config.max_seconds * config.sample_rate))]


def decode_image(data: Medium, config: MediaConfig) -> NDArray[np.uint8]:
    """Picture (h, w, 3), RGB, upright by its EXIF, h = w = config.image_size.

    The whole picture is stretched onto the square: a crop could lose the object, and bars would add edges of their own.
    16 bits keep the upper 8; what is transparent shows white, as in a viewer; of an animation the first frame.
    """
    with reading_container(data):
        return check_not_constant(read_picture(data, size=config.image_size, config=config))


def decode_frames(data: Medium, config: MediaConfig) -> NDArray[np.uint8]:
    """Frames (f, h, w, 3), RGB, f = config.num_frames, h = w = config.frame_size, stretched as pictures are.

    The clip, or its first config.max_seconds, is cut into f equal parts and the frame in the middle of each is taken;
    a clip of fewer frames shows some of them more than once.
    """
    with reading_container(data):
        frames = read_frames(data, num_frames=config.num_frames, size=config.frame_size, config=config)
        return check_not_constant(frames)


def decode_folders(folders: Folders, config: MediaConfig) -> NDArray[np.uint8]:
    """Frames (f, h, w, 3) of pictures in order of time, chosen and stretched as those of a film are.

    One folder gives RGB. Two or three, such as optical flow in x and y, are grey and stand side by side as colours; the
    third colour of two is 128. UnusableError where a picture that is needed is broken.
    """
    if not 1 <= len(folders) <= 3:
        raise UnusableError(
            Reason.CORRUPT, f"{len(folders)} folders of frames; one of pictures, or two or three of grey"
        )
    shown = [_read_folder(folder, config) for folder in folders]
    if len(shown) == 1:
        return check_not_constant(shown[0])
    grey = [np.rint(frames.mean(axis=-1)).astype(np.uint8) for frames in shown]
    grey += [np.full_like(grey[0], 128)] * (3 - len(grey))
    return check_not_constant(np.stack(grey, axis=-1))


def _read_folder(pictures: tuple[Medium, ...], config: MediaConfig) -> NDArray[np.uint8]:
    if not pictures:
        raise UnusableError(Reason.EMPTY, "a folder without pictures")
    frames: dict[int, NDArray[np.uint8]] = {}
    wanted = segment_middles(len(pictures), config.num_frames)
    for index in set(wanted):
        with reading_container(pictures[index]):
            frames[index] = read_picture(pictures[index], size=config.frame_size, config=config)
    return np.stack([frames[index] for index in wanted])


def has_sound(data: Medium) -> bool:
    """Whether a video has a sound track at all."""
    with reading_container(data), open_container(data, MediaConfig()) as container:
        return len(container.streams.audio) > 0
