"""Files of a source: kinds of media, hidden files, Git LFS pointers; decoding settings and limits."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ConfigError, Reason, UnusableError
from ..parsing import check_choices, check_ranges, fold_text
from ..remote.paths import AnyPath, RemotePath
from ..storage import open_regular
from .media_file import Medium

EXTENSIONS = {
    "audio": {".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".au", ".caf"},
    "image": {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"},
    "video": {".mp4", ".webm", ".mkv", ".avi", ".mov", ".mpg", ".mpeg", ".flv", ".m4v", ".wmv", ".3gp", ".ogv"},
}
TEXT_EXTENSIONS, ARRAY_EXTENSION = (".txt", ".text"), ".npy"
_SIGNATURES = {
    "audio": (b"fLaC", b"ID3", b"caff", b".snd"),
    "image": (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"),
    # matroska and webm, flv, asf, mpeg (two)
    "video": (b"\x1a\x45\xdf\xa3", b"FLV\x01", b"\x30\x26\xb2\x75", b"\0\0\x01\xba", b"\0\0\x01\xb3"),
}
_RIFF = {b"WAVE": "audio", b"AVI ": "video", b"WEBP": "image"}
_KIND_OF_BRAND = {  # of an mp4 container; its images are not decoded
    **dict.fromkeys((b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1"), None),
    **dict.fromkeys((b"M4A ", b"M4B ", b"M4P "), "audio"),
}
NUM_BYTES = 64  # leading bytes that are enough to recognise a kind


def kind_of_bytes(data: bytes) -> str | None:
    """Return audio, image or video by the first bytes of a medium; None if they match no signature."""
    if data[:4] in (b"RIFF", b"RF64"):
        return _RIFF.get(data[8:12])
    if data[:4] == b"FORM":
        return "audio" if data[8:12] in (b"AIFF", b"AIFC") else None
    if data[:4] == b"OggS":
        return "video" if b"\x80theora" in data[:NUM_BYTES] else "audio"
    if data[4:8] == b"ftyp":
        return _KIND_OF_BRAND.get(data[8:12], "video")
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":  # bmp: the four reserved bytes exclude text that begins with BM
        return "image"
    if data[:2] in (b"P5", b"P6") and data[2:3].isspace():
        return "image"
    if data[:1] == b"\xff" and len(data) > 2 and data[1] & 0xE0 == 0xE0 and data[1] & 0x18 != 0x08:
        # Sync word of an mp3 or aac frame without a preceding tag; FF FE (layer I) is the byte order mark of UTF-16.
        return "audio" if data[1] & 0x06 != 0x06 else None
    return next((kind for kind, signatures in _SIGNATURES.items() if data.startswith(signatures)), None)


def kind_of_path(path: str) -> str | None:
    """Return the kind of medium by a file name's extension: audio, image, video, or None."""
    extension = PurePosixPath(path.lower()).suffix
    return next((kind for kind, extensions in EXTENSIONS.items() if extension in extensions), None)


def is_text_path(path: str) -> bool:
    """Return whether a string is the path of a text file: it ends in .txt or .text, and is one line."""
    return path.lower().endswith(TEXT_EXTENSIONS) and "\n" not in path


def is_array_path(path: str) -> bool:
    """Return whether a string is the path of a .npy file."""
    return path.lower().endswith(ARRAY_EXTENSION)


_SYSTEM_NAMES = {"__MACOSX", "Thumbs.db", "desktop.ini"}


def is_hidden(path: str) -> bool:
    """Return whether a path, relative to its source, is hidden or written by a system, as `._1.wav` and `.DS_Store`."""
    parts = PurePosixPath(path).parts
    return any(part in _SYSTEM_NAMES or (part.startswith(".") and part not in (".", "..")) for part in parts)


_LFS_START = b"version https://git-lfs.github.com/spec/v1"
_MAX_LFS_BYTES = 1024  # the specification allows no larger pointer
LFS_HINT = "it is a Git LFS pointer, not the file itself: run git lfs pull"


def is_lfs_pointer(data: Medium) -> bool:
    """Return whether these are the bytes of a Git LFS pointer, which a clone without git-lfs has in place of a file."""
    return len(data) < _MAX_LFS_BYTES and data.startswith(_LFS_START)


def is_lfs_pointer_file(path: AnyPath) -> bool:
    """Return whether a regular file is a Git LFS pointer; False if it cannot be read."""
    try:
        if isinstance(path, RemotePath) and path.file_status().size >= _MAX_LFS_BYTES:
            return False
        with open_regular(path) as file:
            return is_lfs_pointer(file.read(_MAX_LFS_BYTES))
    except OSError:
        return False


def require_fetched(data: Medium, name: str) -> Medium:
    """Return a medium; UnusableError if it is a Git LFS pointer."""
    if is_lfs_pointer(data):
        raise UnusableError(Reason.MISSING, f"{name}: {LFS_HINT}")
    return data


def missing_file(root: AnyPath, name: str) -> UnusableError:
    """Return the error of a file that does not exist, which names a similar one that does; see `similar_path`."""
    similar = None if isinstance(root, RemotePath) else similar_path(root, name)
    return UnusableError(Reason.MISSING, f"no file {name}" + (f"; there is {similar}: write it so" if similar else ""))


_MAX_LISTED = 100_000  # entries of a folder that are compared with a name


def similar_path(root: Path, name: str) -> str | None:
    """Return the path below `root` that differs from `name` only by backslashes, case, blanks or Unicode form, if any.

    Lists written on Windows or macOS differ in these from the files they name.
    """
    folder, names = root, []
    for part in name.replace("\\", "/").split("/"):
        if part in ("", "."):
            continue
        entry = _entries(folder).get(fold_text(part)) if part != ".." else None
        exact = part if part != ".." and (folder / part).exists() else entry
        if exact is None:
            return None
        names.append(exact)
        folder = folder / exact
    similar = "/".join(names)
    return similar if similar != name and folder.is_file() else None


def _entries(folder: Path) -> dict[str, str]:
    """Return the names in a folder by their folded form, {} for a folder that cannot be listed or is too long."""
    try:
        return _list_folder(str(folder), os.stat(folder).st_mtime_ns)
    except OSError:
        return {}


@lru_cache(maxsize=16)  # thousands of missing files usually lie in a few folders
def _list_folder(folder: str, modified: int) -> dict[str, str]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in islice(entries, _MAX_LISTED))
    return {fold_text(name): name for name in reversed(names)}


MAX_FRAME_PIXELS = 2_147_483_647  # FFmpeg uses 32-bit integers
_MAX_PIXELS = 178_956_970  # of a picture that Pillow opens: twice its own MAX_IMAGE_PIXELS
BUDGETS = {
    **{"max_image_pixels": f"[1, {_MAX_PIXELS}]", "max_frame_pixels": f"[1, {MAX_FRAME_PIXELS}]"},
    **dict.fromkeys(("max_image_bytes", "max_video_pixels", "max_video_bytes"), f"[1, {1 << 40}]"),
    **dict.fromkeys(("max_packets", "max_sound_values"), f"[1, {1 << 40}]"),
}
SPECTROGRAMS, EXTENSIONS_OF_SOUND, PADDINGS = ("log-mel", "log-magnitude"), ("tile", "pad"), ("zero", "reflect")
WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010
_MAX_INPUT = 1 << 26  # pixels, or samples in all windows, of one sample: 201 MB as RGB, 268 MB as float32; ours
# Fields that were added after caches existed. At their defaults they are left out of fingerprints.
_LATER_FIELDS = {
    *BUDGETS,
    *("network_spectrogram", "network_linear_bins", "network_n_fft", "network_window", "network_hop"),
    *("network_padding", "network_epsilon", "network_extend", "network_fps", "network_frame_choices"),
    "network_stored_size",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaConfig:
    """Sizes and rates to which all media are decoded, and limits of what is decoded.

    A file beyond one of the limits `max_image_pixels` to `max_sound_values` is quarantined as too-large before it is
    decoded.

    Args:
        sample_rate: Rate of sound in Hz; pretrained networks state their own.
        max_seconds: Duration of sound and video that is read; the rest of a longer clip is ignored.
        mel_bins: Mel bands of the spectrograms of `statistics`.
        image_size: Side of a picture in pixels; pictures are stretched to squares. Not of pretrained networks.
        num_frames: Frames of a video, evenly spaced over the clip; pretrained networks of clips state their own number.
        frame_size: Side of a video frame in pixels; frames are stretched to squares.
        text_buckets: Length of the vectors of texts that networks read; probes read the hashed terms themselves.
        max_clipped: Share of the samples of a sound that may be at full scale; 1 allows all of them.
        network_seconds: Duration of sound for `resnet18`; clips of CREMA-D last 2 to 3 s.
        network_spectrogram: Spectrogram for `resnet18`: "log-mel", the natural log of the power in mel bands, or
            "log-magnitude", log(|X| + network_epsilon) of the linear frequencies, as in OGM-GE's code.
        network_mel_bins: Bands of "log-mel".
        network_linear_bins: Frequencies of "log-magnitude", the lowest ones; by default all, network_n_fft // 2 + 1.
        network_n_fft: Length of the Fourier transform in samples; by default the power of two from the window on.
        network_window: Length of the periodic Hann window in samples; by default network_n_fft where it is set, else
            25 ms.
        network_hop: Samples between two windows; by default 10 ms.
        network_padding: "log-magnitude" centres its windows, as librosa does: half of network_n_fft is added at both
            ends, "zero" (librosa from 0.9 on) or "reflect" (before).
        network_epsilon: Added to the magnitudes of "log-magnitude".
        network_extend: A sound shorter than network_seconds is repeated ("tile") or followed by silence ("pad").
        network_frames: Frames of a clip for `resnet18`, one from the middle of each of as many equal segments.
        network_fps: Frames per second of a video that are considered, from its start on; by default all.
        network_frame_choices: Frames stored for each segment, evenly spaced. Training uses one of them at random in
            every epoch, scoring and testing the middle one; with an odd number it is the middle frame of the segment.
        network_size: Side of pictures and frames for `resnet18` in pixels; the papers use 224, in four times the time.
        network_stored_size: Side in pixels at which pictures and frames are stored; by default network_size. Where it
            is larger, crops in training come from the stored pictures, with sides and shapes drawn in the proportions
            of the original picture, as torchvision's RandomResizedCrop does. A picture takes 3 bytes per pixel.
        max_image_pixels: Pixels of a picture; 8,192 x 8,192 take 256 MiB as RGB.
        max_image_bytes: Bytes of a picture file.
        max_frame_pixels: Pixels of a video frame; 5.3K of action cameras has 15.9 million.
        max_video_pixels: Pixels of all frames of a clip; 10 s of 4K at 60 frames per second have 5.0e9.
        max_video_bytes: Bytes of all coded frames of a clip.
        max_packets: Packets of a clip; an hour of AAC sound has 170,000.
        max_sound_values: Samples per second of all channels; 16 channels at 192 kHz have 3.1e6.

    Raises:
        ConfigError: A value is out of range.
    """

    sample_rate: int = 16_000
    max_seconds: float = 10.0
    mel_bins: int = 40
    image_size: int = 64
    num_frames: int = 16
    frame_size: int = 64
    text_buckets: int = 1024
    max_clipped: float = 0.1
    network_seconds: float = 3.0
    network_spectrogram: str = "log-mel"
    network_mel_bins: int = 64
    network_linear_bins: int | None = None
    network_n_fft: int | None = None
    network_window: int | None = None
    network_hop: int | None = None
    network_padding: str = "zero"
    network_epsilon: float = 1e-7
    network_extend: str = "tile"
    network_frames: int = 3
    network_fps: float | None = None
    network_frame_choices: int = 1
    network_size: int = 112
    network_stored_size: int | None = None
    max_image_pixels: int = 1 << 26
    max_image_bytes: int = 1 << 28
    max_frame_pixels: int = 1 << 24
    max_video_pixels: int = 6_000_000_000
    max_video_bytes: int = 1 << 28
    max_packets: int = 200_000
    max_sound_values: int = 3_200_000

    def __post_init__(self) -> None:
        """Check the range of every value, and the size of what they make together."""
        check_ranges("media", self, **BUDGETS)
        check_ranges("media", self, sample_rate="[2000, 192000]", max_seconds="[0.01, 3600]", max_clipped="[0, 1]")
        check_ranges("media", self, mel_bins="[8, 128]", network_seconds="[0.1, 60]", network_mel_bins="[8, 256]")
        counts = ("num_frames", "text_buckets", "network_frames", "network_frame_choices")
        sizes = ("image_size", "frame_size", "network_size", "network_stored_size")
        check_ranges(
            "media", self, **BUDGETS, **dict.fromkeys(counts, "[1, 4096]"), **dict.fromkeys(sizes, "[4, 1024]")
        )
        samples = dict.fromkeys(("network_window", "network_hop"), "[2, 65536]")
        check_ranges("media", self, network_n_fft="[16, 65536]", network_linear_bins="[8, 32769]", **samples)
        check_ranges("media", self, network_epsilon="[1e-30, 1]", network_fps="[0.01, 1000]")
        check_choices("media", self, network_spectrogram=SPECTROGRAMS, network_padding=PADDINGS)
        check_choices("media", self, network_extend=EXTENSIONS_OF_SOUND)
        self._check_together()

    def _check_together(self) -> None:
        """Raise ConfigError for values that contradict each other, or make inputs of more than _MAX_INPUT numbers."""
        n_fft, window, hop = self.stft_samples
        if window > n_fft:
            raise ConfigError(f"media.network_window is {window}; it may not exceed network_n_fft, which is {n_fft}")
        if (self.network_linear_bins or 0) > n_fft // 2 + 1:
            detail = f"a transform of {n_fft} samples has {n_fft // 2 + 1}"
            raise ConfigError(f"media.network_linear_bins is {self.network_linear_bins}; {detail}")
        if self.stored_size < self.network_size:
            detail = f"it may not be below network_size, which is {self.network_size}"
            raise ConfigError(f"media.network_stored_size is {self.network_stored_size}; {detail}")
        num_windows = 1 + self.num_network_samples // hop
        stored_frames = self.network_frames * self.network_frame_choices
        for names, size in (
            ("num_frames and frame_size", self.num_frames * self.frame_size**2),
            ("network_frames, network_frame_choices and the stored size", stored_frames * self.stored_size**2),
            ("network_seconds, network_n_fft and network_hop", num_windows * n_fft),
        ):
            if size > _MAX_INPUT:
                unit = "samples in all windows" if "n_fft" in names else "pixels"
                raise ConfigError(f"media: {names} make {size:,} {unit} per sample, the maximum is {_MAX_INPUT:,}")

    @property
    def stored_size(self) -> int:
        """Side in pixels at which pictures and frames of networks are stored."""
        return self.network_stored_size or self.network_size

    @property
    def num_network_samples(self) -> int:
        """Samples of sound that a network reads."""
        return round(self.network_seconds * self.sample_rate)

    @property
    def stft_samples(self) -> tuple[int, int, int]:
        """Samples of the Fourier transform, the window and the hop of a network's spectrogram."""
        window = self.network_window or self.network_n_fft or stft_samples(self.sample_rate)[1]
        n_fft = self.network_n_fft or 1 << (window - 1).bit_length()
        return n_fft, window, self.network_hop or stft_samples(self.sample_rate)[2]

    def to_fingerprint(self) -> list[tuple[str, Any]]:
        """Return the sorted names and values of the fields that a feature vector depends on.

        Fields that were added later are left out at their defaults, so that caches from before stay valid.
        """
        values = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        return sorted((name, value) for name, value, default in values if name not in _LATER_FIELDS or value != default)


def stft_samples(sample_rate: int) -> tuple[int, int, int]:
    """Return the samples of a Fourier transform, of a window of 25 ms and of a hop of 10 ms."""
    window = max(2, round(WINDOW_SECONDS * sample_rate))
    return 1 << (window - 1).bit_length(), window, max(1, round(HOP_SECONDS * sample_rate))
