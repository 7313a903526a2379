"""What a sample of a modality is brought to before it is measured, and how much a file may ask for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..errors import ConfigError

MAX_FRAME_PIXELS = 2_147_483_647  # FFmpeg counts in 32 bits
_MAX_PIXELS = 178_956_970  # of a picture that Pillow opens: twice its own MAX_IMAGE_PIXELS
_LIMITS: dict[str, tuple[float, float]] = {
    "sample_rate": (2_000, 192_000),
    "max_seconds": (0.01, 3_600),
    "mel_bins": (8, 128),
    "max_clipped": (0, 1),
    "network_seconds": (0.1, 60),
    "network_mel_bins": (8, 256),
    "max_image_pixels": (1, _MAX_PIXELS),
    "max_frame_pixels": (1, MAX_FRAME_PIXELS),
}
BUDGETS = (
    "max_image_pixels",
    "max_image_bytes",
    "max_frame_pixels",
    "max_video_pixels",
    "max_video_bytes",
    "max_packets",
    "max_sound_values",
)


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
    # Budgets: a file that asks for more is quarantined as too-large, before it is decoded.
    max_image_pixels: int = 1 << 26  # of a picture: 8,192 x 8,192, which take 256 MiB as RGB
    max_image_bytes: int = 1 << 28  # of a picture's file
    max_frame_pixels: int = 1 << 24  # of a frame of video: 5.3K of action cameras is 15.9 million
    max_video_pixels: int = 6_000_000_000  # of the frames of a clip together: 10 s of 4K at 60 a second are 5.0e9
    max_video_bytes: int = 1 << 28  # of a clip's coded frames together
    max_packets: int = 200_000  # of a clip: an hour of sound in AAC has 170,000
    max_sound_values: int = 3_200_000  # samples a second, all channels together: 16 channels at 192 kHz are 3.1e6

    def __post_init__(self) -> None:
        """Refuse what no sample could be brought to."""
        for field in fields(self):
            default = (1, 1 << 40) if field.name in BUDGETS else (1, 4_096)
            (low, high), value = _LIMITS.get(field.name, default), getattr(self, field.name)
            if not low <= value <= high:
                raise ConfigError(f"{field.name} is {value}; set it to {low} .. {high}")

    def to_fingerprint(self) -> list[tuple[str, Any]]:
        """Return names and values of the fields that decide about a vector, sorted.

        A budget at its default is not among them: caches made before there were budgets stay valid.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        return sorted(pair for pair in values.items() if pair[0] not in BUDGETS or pair[1] != defaults[pair[0]])
