"""Bytes in, waveform (t,), image (h, w, 3) or frames (f, h, w, 3) out: what does the file really hold?

Whatever cannot be used leaves as UnusableError with its reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..quality import Reason, UnusableError
from .containers import open_container, reading
from .picture import not_constant, read_picture
from .sound import SILENT_PEAK, clipped_share, native_wave, resampled
from .video import middles, read_frames

Folders = tuple[tuple[bytes, ...], ...]  # of a sample, each with its pictures in order of time

_LIMITS: dict[str, tuple[float, float]] = {
    "sample_rate": (2_000, 192_000),
    "max_seconds": (0.01, 3_600),
    "mel_bins": (8, 128),
    "max_clipped": (0, 1),
    "network_seconds": (0.1, 60),
    "network_mel_bins": (8, 256),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaConfig:
    """What every sample of a modality is brought to before anything is measured on it."""

    sample_rate: int = 16_000  # Hz
    max_seconds: float = 10.0  # of sound and of video; the rest of a longer clip is not looked at
    mel_bins: int = 40
    image_size: int = 64  # pixels; pictures become squares
    num_frames: int = 16  # evenly over the clip
    frame_size: int = 64  # pixels; frames become squares
    text_buckets: int = 1024  # hashed words and word pairs
    max_clipped: float = 0.1  # share of the samples that may stand at full scale; 1: all of them
    network_seconds: float = 3.0  # of sound that a network hears: CREMA-D's clips take 2 to 3
    network_mel_bins: int = 64
    network_frames: int = 3  # that a network sees of a clip, as in the papers
    network_size: int = 112  # pixels; the papers have 224, which takes four times as long

    def __post_init__(self) -> None:
        """Refuse what no sample could be brought to."""
        for field in fields(self):
            (low, high), value = _LIMITS.get(field.name, (1, 4_096)), getattr(self, field.name)
            if not low <= value <= high:
                raise ConfigError(f"{field.name} is {value}; set it to {low} .. {high}")


def decode_audio(data: bytes, config: MediaConfig) -> NDArray[np.float32]:
    """Waveform (t,), mono (mean of the channels), in [-1, 1] at config.sample_rate, at most config.max_seconds.

    Reads sound files and the first sound track of videos.
    """
    with reading(data):
        wave, rate = native_wave(data, config.max_seconds)
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
        return resampled(wave, rate, config.sample_rate)[: max(1, round(config.max_seconds * config.sample_rate))]


def decode_image(data: bytes, config: MediaConfig) -> NDArray[np.uint8]:
    """Picture (h, w, 3), RGB, upright by its EXIF, h = w = config.image_size.

    The whole picture is stretched onto the square: a crop could lose the object, and bars would add edges of their own.
    16 bits keep the upper 8; what is transparent shows white, as in a viewer; of an animation the first frame.
    """
    with reading(data):
        return not_constant(read_picture(data, size=config.image_size))


def decode_frames(data: bytes, config: MediaConfig) -> NDArray[np.uint8]:
    """Frames (f, h, w, 3), RGB, f = config.num_frames, h = w = config.frame_size, stretched as pictures are.

    The clip, or its first config.max_seconds, is cut into f equal parts and the frame in the middle of each is taken;
    a clip of fewer frames shows some of them more than once.
    """
    with reading(data):
        frames = read_frames(data, num_frames=config.num_frames, size=config.frame_size, max_seconds=config.max_seconds)
        return not_constant(frames)


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
        return not_constant(shown[0])
    grey = [np.rint(frames.mean(axis=-1)).astype(np.uint8) for frames in shown]
    grey += [np.full_like(grey[0], 128)] * (3 - len(grey))
    return not_constant(np.stack(grey, axis=-1))


def _read_folder(pictures: tuple[bytes, ...], config: MediaConfig) -> NDArray[np.uint8]:
    if not pictures:
        raise UnusableError(Reason.EMPTY, "a folder without pictures")
    frames: dict[int, NDArray[np.uint8]] = {}
    wanted = middles(len(pictures), config.num_frames)
    for index in set(wanted):
        with reading(pictures[index]):
            frames[index] = read_picture(pictures[index], size=config.frame_size)
    return np.stack([frames[index] for index in wanted])


def has_sound(data: bytes) -> bool:
    """Whether a video has a sound track at all."""
    with reading(data), open_container(data) as container:
        return len(container.streams.audio) > 0
