"""Encoders by name: one modality of one sample becomes a feature vector.

`statistics` computes hand-made descriptors; `resnet18` prepares the inputs of a network that the probe trains;
`hf:MODEL` is a frozen pretrained network; `package.module:function` is a user-defined function; all other names are
encoders of installed packages, which add them by entry points of the group `mmaudit.encoders`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dataset.modalities import Modality
from ..errors import ConfigError, Reason, UnusableError, choices
from ..hashing import digest
from ..media.audio import decode_audio, network_spectrogram, spectrogram_shape
from ..media.files import MediaConfig
from ..media.pictures import (
    SizedPictures,
    decode_folders,
    decode_frames,
    decode_image,
    decode_sized_folders,
    decode_sized_frames,
    decode_sized_image,
)
from ..registry import Entry, Registry
from .backbone_inputs import decode_input, inputs_version, is_backbone_input, model_of
from .descriptors import audio_statistics, fingerprint, image_statistics, video_statistics
from .pretrained import check_model, local_folder, model_version, open_model, require_transformers
from .vectors import EncodedCell, Vector, check_vector, text_terms

EncodeFunction = Callable[[Any, MediaConfig], Any]

ENCODERS = Registry(
    {
        "statistics": Entry("encoders:STATISTICS", "fixed descriptors of sound, pictures, frames and text"),
        "resnet18": Entry("encoders:RESNET18", "inputs of a ResNet-18, which the probe trains for every fold"),
    },
    package="mmaudit.audit.features",
    group="mmaudit.encoders",
    option="--encoder",
)
_OTHER_FORMS = ("hf:MODEL", "PACKAGE.MODULE:FUNCTION")
_DECODERS: dict[str, EncodeFunction] = {
    "audio": decode_audio,
    "image": decode_image,
    "video": decode_frames,
    "frames": decode_folders,
    "text": lambda text, media: text,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """How an encoder reads one kind of modality. An entry of ENCODERS names a dictionary of these by kind.

    A package adds an encoder by an entry point of the group `mmaudit.encoders`, whose name is the encoder's and whose
    value is `package.module:DICTIONARY`. It is imported only when it is named, as `--encoder MODALITY=NAME`. The
    versions of package and encoder, and the module's source file, are part of the fingerprint of its vectors.

    Args:
        encode: Function of the decoded sample and the media settings that returns a vector (d,) of numbers, of the same
            length for all samples. It depends on nothing else, runs in several processes, and may raise UnusableError.
            Decoded are: audio, a waveform (t,) float32 in [-1, 1] at `media.sample_rate`; image, pixels (h, w, 3)
            uint8; video and frames, (f, h, w, 3) uint8; text, a string.
        version: Changes whenever the same input would give another vector.
        name: Name in the fingerprint; "": that of the encoder.
        decode: Function of the loaded cell (see Dataset.load) and the media settings that replaces the kind's decoder.

    Example:
        >>> def loudness(wave, media):
        ...     return [abs(wave).mean(), abs(wave).max()]
        >>> LOUDNESS = {"audio": Encoder(encode=loudness)}
    """

    encode: EncodeFunction
    version: int | str = 1
    name: str = ""
    decode: EncodeFunction | None = None


def check_encoder(modality: Modality) -> None:
    """Raise ConfigError if the modality's encoder does not exist, or cannot read its kind."""
    name, kind = modality.encoder, modality.kind
    try:
        if kind == "features":
            if name != "statistics":
                raise ConfigError("vectors are read as they are; the only encoder of kind features is statistics")
        elif is_pretrained(modality):
            check_model(name[3:], kind)
        elif all(name.partition(":")):
            load_function(name)
        elif not ENCODERS.offers(name):
            raise ConfigError(f"no such encoder; {choices(name, (*ENCODERS.names(), *_OTHER_FORMS))}")
        elif kind not in _encoders_by_kind(name):
            raise ConfigError(f"it does not read {kind}; {choices(kind, _encoders_by_kind(name))}")
        elif is_network(modality):
            require_transformers()
    except ConfigError as error:
        raise ConfigError(f"--encoder {modality.name}={name}: {error}") from error


def load_encoder(modality: Modality) -> Encoder:
    """Return the encoder of a modality; ConfigError if it cannot be loaded."""
    name, kind = modality.encoder, modality.kind
    if is_pretrained(modality):
        return Encoder(
            name="hf",
            version=model_version(name[3:]),
            decode=lambda loaded, media: open_model(name[3:], kind).prepare(loaded, media),
            encode=lambda inputs, media: open_model(name[3:], kind).encode([inputs])[0],
        )
    if is_backbone_input(modality):
        model = model_of(modality)
        return Encoder(
            name="hf-inputs",
            version=inputs_version(model),
            decode=lambda loaded, media: decode_input(loaded, model, kind, media),
            encode=lambda row, media: row,
        )
    if ":" in name:
        function = load_function(name)
        return Encoder(name=name, version=function_version(name), encode=partial(call_function, name, function))
    return _encoders_by_kind(name)[kind]


def _encoders_by_kind(name: str) -> Mapping[str, Encoder]:
    """Return the encoders of a built-in or installed name; ConfigError if there are none."""
    return ENCODERS.load(name) if name in ENCODERS else load_installed(name)


@lru_cache(maxsize=16)
def load_installed(name: str) -> Mapping[str, Encoder]:
    """Import the encoders of an installed package, and add checks of their results and the package's version."""
    loaded, point = ENCODERS.load(name), ENCODERS.installed()[name]
    if not isinstance(loaded, Mapping) or not all(isinstance(encoder, Encoder) for encoder in loaded.values()):
        raise ConfigError(f"{point.value} must be a dictionary of an Encoder for each kind that it reads")
    package = "" if point.dist is None else f"{point.dist.name} {point.dist.version}"
    source = digest(_source_file(sys.modules[point.module]).read_bytes())
    return {
        kind: replace(
            encoder,
            name=encoder.name or name,
            version=f"{package} {source} {encoder.version}",
            encode=partial(call_function, name, encoder.encode),
        )
        for kind, encoder in loaded.items()
    }


def encoder_location(name: str) -> str | None:
    """Return the source file of code, or the local folder of a model, without importing it; None for built-in ones."""
    if name in ENCODERS:
        return None
    if name.startswith("hf:"):
        path = local_folder(name[3:])
    else:
        point = ENCODERS.installed().get(name)
        path = function_file(name if point is None else point.value)
    return None if path is None else str(path.resolve())


def is_pretrained(modality: Modality) -> bool:
    """Return whether a modality is encoded by a pretrained network: in batches, on a device."""
    return modality.encoder.startswith("hf:")


def is_network(modality: Modality) -> bool:
    """Return whether the probe of a modality trains a network; its feature vectors are then the network's inputs."""
    return modality.encoder == "resnet18"


def input_shape(modality: Modality, media: MediaConfig) -> tuple[int, ...]:
    """Return the input shape of `resnet18` for a sample: (bins, time steps), (h, w, 3) or (f, h, w, 3).

    The cache holds the inputs flattened, float32 logarithms or uint8 pixels, or as `StoredPictures`.
    """
    size = media.network_size
    if modality.kind == "audio":
        return spectrogram_shape(media)
    return (size, size, 3) if modality.kind == "image" else (media.network_frames, size, size, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPictures:
    """How the cache holds pictures of networks where it holds more than what a network reads.

    A row has f segments of `num_choices` frames of (side, side, 3) pixels, and with `is_sized` the width and height of
    the original, uint16 in two bytes each.
    """

    num_frames: int
    num_choices: int
    side: int
    is_sized: bool

    @property
    def num_features(self) -> int:
        """Numbers of a row."""
        return self.num_frames * self.num_choices * self.side**2 * 3 + _SIZE_BYTES * self.is_sized


_SIZE_BYTES = 4


def stored_pictures(modality: Modality, media: MediaConfig) -> StoredPictures | None:
    """Return how the pictures of a network are stored; None for sound, and where they are stored as it reads them."""
    is_clip = modality.kind in ("video", "frames")
    num_choices = media.network_frame_choices if is_clip else 1
    if not is_network(modality) or modality.kind == "audio":
        return None
    if num_choices == 1 and media.network_stored_size is None:
        return None
    return StoredPictures(
        num_frames=media.network_frames if is_clip else 1,
        num_choices=num_choices,
        side=media.stored_size,
        is_sized=media.network_stored_size is not None,
    )


def preprocessing(modality: Modality, media: MediaConfig) -> str:
    """Return the fingerprint, 16 hexadecimal digits, of all settings that determine a modality's vectors."""
    if modality.kind == "features":
        return digest(f"vector 2 {modality.length}".encode())[:16]
    encoder = load_encoder(modality)
    settings = (modality.kind, encoder.name, encoder.version, media.to_fingerprint())
    return digest(repr(settings).encode())[:16]


def decode_cell(loaded: Any, modality: Modality, media: MediaConfig) -> Any:
    """Decode a loaded cell (see Dataset.load) as encoders get it; texts and checked vectors (d,) are returned."""
    if modality.kind != "features":
        return _DECODERS[modality.kind](loaded, media)
    vector = check_vector(np.asarray(loaded, dtype=np.float32).ravel(), modality)
    if isinstance(vector, UnusableError):
        raise vector
    return vector


def encode_cell(loaded: Any, modality: Modality, media: MediaConfig) -> EncodedCell | UnusableError:
    """Encode a loaded cell (see Dataset.load); an UnusableError is returned instead of the vector, not raised.

    What decoders of encoders return may be anything, so that only media in mmaudit's own form have a fingerprint.
    """
    if isinstance(loaded, UnusableError):
        return loaded
    if modality.kind == "features":
        vector = check_vector(loaded, modality)
        return vector if isinstance(vector, UnusableError) else EncodedCell(vector=vector)
    encoder = load_encoder(modality)
    try:
        decoded = (encoder.decode or _DECODERS[modality.kind])(loaded, media)
        pixels = decoded.pixels if isinstance(decoded, SizedPictures) else decoded
        has_own_form = encoder.decode is None or isinstance(decoded, SizedPictures)
        thumbnail = fingerprint(pixels, modality.kind, media) if has_own_form else b""
        return EncodedCell(vector=np.asarray(encoder.encode(decoded, media)), fingerprint=thumbnail)
    except UnusableError as error:
        return error


@lru_cache(maxsize=16)
def load_function(name: str) -> EncodeFunction:
    """Import `package.module:function`, also from the current folder; ConfigError if it does not exist."""
    function_name = name.partition(":")[2]
    module = _load_module(name)
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        suggestion = choices(function_name, functions)
        raise ConfigError(f"{_source_file(module)} has no function {function_name!r}; {suggestion}")
    return function  # type: ignore[no-any-return]


@lru_cache(maxsize=16)
def function_version(name: str) -> str:
    """Return the digest of the function's source file; modules that it imports are not included."""
    load_function(name)
    return digest(_source_file(_load_module(name)).read_bytes())


def function_file(name: str) -> Path | None:
    """Return the source file of `package.module:function` without importing it; None if it is not found."""
    _add_current_folder()
    first, *rest = name.partition(":")[0].split(".")
    try:
        spec = importlib.util.find_spec(first)  # a name without a dot: nothing is imported
        for depth in range(len(rest)):
            submodule = ".".join((first, *rest[: depth + 1]))
            spec = None if spec is None else PathFinder.find_spec(submodule, spec.submodule_search_locations)
    except (ImportError, ValueError):
        return None
    return None if spec is None or not spec.has_location or spec.origin is None else Path(spec.origin)


def call_function(name: str, function: EncodeFunction, decoded: Any, media: MediaConfig) -> NDArray[np.float32]:
    """Return the vector that code of others computes of a decoded sample, float32 (d,).

    Raises ConfigError if the result is not a vector of numbers, UnusableError if the function raises or the vector is
    not finite.
    """
    try:
        output = function(decoded, media)
    except (UnusableError, ConfigError):
        raise
    except Exception as error:
        raise UnusableError(Reason.FAILED, f"{name} raised {type(error).__name__}: {error}") from error
    try:
        vector = np.array(output, dtype=np.float32)  # a copy: the function may reuse its array
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} returns {type(output).__name__}: it must return a vector (d,) of numbers") from error
    if vector.ndim != 1 or not len(vector):
        raise ConfigError(f"{name} returns an array of shape {vector.shape}: it must return a vector (d,)")
    if count := int((~np.isfinite(vector)).sum()):
        raise UnusableError(Reason.NOT_FINITE, f"{count} of the {len(vector)} numbers of {name} are not finite")
    return vector


def _load_module(name: str) -> ModuleType:
    module_name = name.partition(":")[0]
    _add_current_folder()
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # user code may raise anything
        raise ConfigError(
            f"module {module_name!r} cannot be imported ({type(error).__name__}: {error}); "
            f"it must be installed, or be in {os.getcwd()}"
        ) from error


def _add_current_folder() -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a file in it cannot shadow an installed package


def _source_file(module: ModuleType) -> Path:
    source = getattr(module, "__file__", None)
    if source is None:
        raise ConfigError(f"module {module.__name__!r} has no source file: use the module that defines the function")
    return Path(source)


def _network_image(loaded: Any, media: MediaConfig) -> SizedPictures:
    return decode_sized_image(loaded, size=media.stored_size, config=media)


def _network_video(loaded: Any, media: MediaConfig) -> SizedPictures:
    num_frames = media.network_frames * media.network_frame_choices
    size, fps = media.stored_size, media.network_fps
    return decode_sized_frames(loaded, num_frames=num_frames, size=size, fps=fps, config=media)


def _network_folders(loaded: Any, media: MediaConfig) -> SizedPictures:
    num_frames = media.network_frames * media.network_frame_choices
    return decode_sized_folders(loaded, num_frames=num_frames, size=media.stored_size, config=media)


def _flat_pixels(pictures: SizedPictures, media: MediaConfig) -> NDArray[np.uint8]:
    """Return the pixels, and the size of the original where crops need it, see `StoredPictures`."""
    if media.network_stored_size is None:
        return pictures.pixels.ravel()
    size = np.minimum([pictures.width, pictures.height], 65_535).astype("<u2")
    return np.concatenate([pictures.pixels.ravel(), size.view(np.uint8)])


def _flat_spectrogram(wave: NDArray[np.float32], media: MediaConfig) -> Vector:
    return network_spectrogram(wave, media).ravel()


STATISTICS = {
    "audio": Encoder(name="sound-statistics", version=3, encode=audio_statistics),
    "image": Encoder(name="image-statistics", version=1, encode=image_statistics),
    "video": Encoder(name="video-statistics", version=3, encode=video_statistics),
    "frames": Encoder(name="frames-statistics", version=1, encode=video_statistics),
    "text": Encoder(name="text-terms", version=1, encode=text_terms),
}
RESNET18 = {
    "audio": Encoder(name="network-sound", version=2, encode=_flat_spectrogram),
    "image": Encoder(name="network-image", version=1, encode=_flat_pixels, decode=_network_image),
    "video": Encoder(name="network-video", version=2, encode=_flat_pixels, decode=_network_video),
    "frames": Encoder(name="network-frames", version=1, encode=_flat_pixels, decode=_network_folders),
}
