"""Inputs of pretrained models that are trained end to end: what a row of the feature cache holds, and how.

The cache holds what a model's processor makes of a sample, flattened: sound and spectrograms as float32, token numbers
with -1 as padding, and pixels as uint8 where that loses nothing, a quarter of the size of normalised ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dataset.dataset import Dataset
from ..dataset.modalities import Modality
from ..errors import ConfigError
from ..media.audio import decode_audio
from ..media.files import MediaConfig
from .pretrained import InputProcessor, ModelInputs, model_version, open_processor
from .vectors import text_words

VERSION = 1  # increased when the same model and input would produce another row
PADDING = -1.0  # in rows of token numbers, which are exact in float32 up to 2^24
_PREFIX = "hf-inputs:"  # of the encoder of such a modality; it is never the user's
_MAX_ERROR = 1e-4  # of pixels restored from uint8: normalised values have a size of about 1


@dataclass(frozen=True, slots=True, kw_only=True)
class InputLayout:
    """How a row (d,) holds the input of a model, its argument `name` of this shape, without a batch dimension.

    scale, mean, deviation: of pixels stored as uint8, x = (pixel scale - mean) / deviation by channel; None and (): the
    row holds x. by_frame: the model reads single images, and its vectors of the f frames of a sample are averaged.
    """

    name: str
    shape: tuple[int, ...]
    scale: float | None = None
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()
    by_frame: bool = False

    @property
    def num_features(self) -> int:
        """Length of a row, d."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """A pretrained model that is trained end to end. version: its commit or the digest of its files."""

    model: str
    kind: str
    version: str
    layout: InputLayout

    @classmethod
    def of(cls, modality: Modality, media: MediaConfig) -> Backbone | None:
        """Return the backbone whose inputs the cache holds for a modality; None where it holds vectors."""
        if not is_backbone_input(modality):
            return None
        name = model_of(modality)
        layout = input_layout(name, modality.kind, media)
        return cls(model=name, kind=modality.kind, version=model_version(name), layout=layout)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Backbone:
        """Build a backbone from plain values; KeyError or TypeError where one is missing."""
        layout: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values["layout"].items()
        }
        return cls(**{**values, "layout": InputLayout(**layout)})

    def same_but_place(self, other: Backbone) -> bool:
        """Return whether another backbone has the same weights and inputs, wherever its model lies."""
        return replace(self, model=other.model) == other


def with_backbone_inputs(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """Return the dataset with the inputs of the models of these modalities in place of their vectors.

    Raises ConfigError where there is no such modality, or it is not encoded by a pretrained model.
    """
    if not names:
        return dataset
    known = {modality.name: modality for modality in dataset.modalities}
    for name in names:
        if name not in known:
            raise ConfigError(f"finetune.end_to_end: no modality {name}; the modalities are {', '.join(known)}")
        if not known[name].encoder.startswith("hf:"):
            raise ConfigError(
                f"finetune.end_to_end: {name} is encoded by {known[name].encoder}, and only models hf:MODEL are "
                f"trained end to end this way; pass --encoder {name}=hf:MODEL, of a manifest's data to mmaudit score"
            )
    modalities = tuple(
        replace(modality, encoder=f"{_PREFIX}{modality.encoder[3:]}") if modality.name in names else modality
        for modality in dataset.modalities
    )
    return replace(dataset, modalities=modalities)


def is_backbone_input(modality: Modality) -> bool:
    """Return whether the rows of a modality are inputs of a pretrained model."""
    return modality.encoder.startswith(_PREFIX)


def model_of(modality: Modality) -> str:
    """Return the name of the model whose inputs are the rows of a modality."""
    return modality.encoder.removeprefix(_PREFIX)


def inputs_version(name: str) -> str:
    """Return the version of a model's inputs."""
    return f"{VERSION} {model_version(name)}"


@lru_cache(maxsize=16)
def input_layout(name: str, kind: str, media: MediaConfig) -> InputLayout:
    """Return how rows hold the inputs of a model. Raises ConfigError for one that needs more than one input."""
    processor = open_processor(name, kind)
    if kind == "text":
        return InputLayout(name="input_ids", shape=(processor.max_tokens,))
    if kind == "audio":
        inputs = processor.from_wave(np.zeros(_num_samples(processor, media), np.float32))
        key = _main_input(inputs, name)
        return InputLayout(name=key, shape=inputs[key].shape)
    num_frames = 1 if kind == "image" else processor.num_frames or media.num_frames
    # Noise, of which resizing and normalisation show: the same in every process.
    noise = np.random.default_rng(0).integers(0, 256, (num_frames, 96, 80, 3), dtype=np.uint8)
    inputs = processor.from_pictures(noise)
    key = _main_input(inputs, name)
    by_frame = kind in ("video", "frames") and processor.num_frames is None
    return _with_pixels(
        InputLayout(name=key, shape=inputs[key].shape, by_frame=by_frame), processor, noise, inputs[key]
    )


def _num_samples(processor: InputProcessor, media: MediaConfig) -> int:
    return max(1, round(media.max_seconds * processor.sample_rate))


def _main_input(inputs: ModelInputs, name: str) -> str:
    """Return the name of the one input that is no constant mask."""
    names = [key for key, value in inputs.items() if not (key.endswith("mask") and np.all(value == 1))]
    if len(names) != 1:
        raise ConfigError(
            f"{name} reads {', '.join(names) or 'nothing'}: only models of one input are trained end to end"
        )
    return names[0]


def _with_pixels(
    layout: InputLayout, processor: InputProcessor, pictures: NDArray[np.uint8], values: NDArray[Any]
) -> InputLayout:
    """Return the layout of uint8 pixels if the processor's normalisation restores these values from them."""
    transform = processor.transform
    moments = [getattr(transform, key, None) for key in ("image_mean", "image_std")]
    normalises, rescales = (bool(getattr(transform, key, False)) for key in ("do_normalize", "do_rescale"))
    if not rescales or (normalises and not all(isinstance(value, (list, tuple)) for value in moments)):
        return layout
    num_channels = values.shape[-3] if values.ndim >= 3 else 0
    mean, deviation = moments if normalises else ([0.0] * num_channels, [1.0] * num_channels)
    stored = replace(
        layout,
        scale=float(transform.rescale_factor),
        mean=tuple(map(float, mean or ())),
        deviation=tuple(map(float, deviation or ())),
    )
    if len(stored.mean) != num_channels or len(stored.deviation) != num_channels:
        return layout
    pixels = _raw_pixels(processor, pictures, layout.name)
    if pixels is None:
        return layout
    centre, spread = (np.array(entries)[:, None, None] for entries in (stored.mean, stored.deviation))
    error = np.abs((pixels * float(transform.rescale_factor) - centre) / spread - values).max()
    return stored if error <= _MAX_ERROR else layout


def _raw_pixels(processor: InputProcessor, pictures: NDArray[np.uint8], key: str) -> NDArray[np.float64] | None:
    """Return the pixels in [0, 255] before normalisation; None where they are not integers."""
    try:
        raw = np.asarray(processor.from_pictures(pictures, do_rescale=False, do_normalize=False)[key], np.float64)
    except (TypeError, ValueError, KeyError):
        return None
    return raw if np.array_equal(raw, np.clip(np.rint(raw), 0, 255)) else None


def decode_input(loaded: Any, name: str, kind: str, media: MediaConfig) -> NDArray[Any]:
    """Decode a loaded cell and return the row (d,) of its model's input.

    Where the model reads waveforms of any length a row lasts `media.max_seconds`, and a shorter sound is repeated:
    padding changes what many of these models compute.
    """
    processor, layout = open_processor(name, kind), input_layout(name, kind, media)
    if kind == "text":
        return _token_row(loaded, processor, layout)
    if kind == "audio":
        wave = decode_audio(loaded, media, sample_rate=processor.sample_rate)
        inputs = processor.from_wave(wave)
        if inputs[layout.name].shape != layout.shape:
            inputs = processor.from_wave(np.resize(wave, _num_samples(processor, media)))
        return np.ascontiguousarray(inputs[layout.name], np.float32).ravel()
    pictures = processor.pictures(loaded, media)
    options = {} if layout.scale is None else {"do_rescale": False, "do_normalize": False}
    values = np.asarray(processor.from_pictures(pictures, **options)[layout.name])
    if values.shape != layout.shape:
        raise ConfigError(f"{name} reads pictures of several sizes: only models of one size are trained end to end")
    return values.astype(np.float32 if layout.scale is None else np.uint8).ravel()


def _token_row(text: str, processor: InputProcessor, layout: InputLayout) -> NDArray[np.float32]:
    """Return the token numbers of a text, padded."""
    text_words(text)  # raises for a text without words
    tokens = processor.transform(text, truncation=True, max_length=processor.max_tokens, return_tensors=None)
    row = np.full(layout.num_features, PADDING, np.float32)
    row[: len(tokens["input_ids"])] = tokens["input_ids"]
    return row
