"""Tests of the media settings: every value that is accepted works in every encoder, every other is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmaudit.audit.dataset.modalities import Modality
from mmaudit.audit.errors import ConfigError, UnusableError
from mmaudit.audit.features.encoders import (
    RESNET18,
    STATISTICS,
    encode_cell,
    input_shape,
    preprocessing,
    stored_pictures,
)
from mmaudit.audit.features.vectors import EncodedCell
from mmaudit.audit.media.files import BUDGETS, PADDINGS, SPECTROGRAMS, MediaConfig
from mmaudit.audit.media.pictures import decode_image, decode_sized_frames
from mmaudit.cli.effects import media_settings


def vector_of(encoded: EncodedCell | UnusableError) -> NDArray[Any]:
    assert isinstance(encoded, EncodedCell), encoded
    return encoded.vector


@pytest.fixture(scope="module")
def loaded(clip_source: Path, film: Callable[[bool], bytes]) -> dict[str, Any]:
    pictures = tuple((clip_source / f"{number}.png").read_bytes() for number in range(5))
    sound = (clip_source / "0.wav").read_bytes()
    return {"audio": sound, "image": pictures[0], "video": film(True), "frames": (pictures,), "text": "one two"}


# Lowest and highest value of every media setting, and the settings that go with it where the default of another would
# make the input too large, or be exceeded.
RANGES: dict[str, tuple[float, float, dict[str, Any]]] = {
    "sample_rate": (2_000, 192_000, {}),
    "max_seconds": (0.01, 3600.0, {}),
    "mel_bins": (8, 128, {}),
    "image_size": (4, 1024, {}),
    "num_frames": (1, 4096, {"frame_size": 8}),
    "frame_size": (4, 1024, {"num_frames": 2}),
    "text_buckets": (1, 4096, {}),
    "max_clipped": (0.0, 1.0, {}),
    "network_seconds": (0.1, 60.0, {}),
    "network_mel_bins": (8, 256, {}),
    "network_linear_bins": (8, 32_769, {"network_n_fft": 65_536, "network_spectrogram": "log-magnitude"}),
    "network_n_fft": (16, 65_536, {}),
    "network_window": (2, 65_536, {}),
    "network_hop": (2, 65_536, {}),
    "network_epsilon": (1e-30, 1.0, {"network_spectrogram": "log-magnitude"}),
    "network_frames": (1, 4096, {"network_size": 8}),
    "network_fps": (0.01, 1000.0, {}),
    "network_frame_choices": (1, 4096, {"network_size": 8, "network_frames": 1}),
    "network_size": (4, 1024, {"network_frames": 1}),
    "network_stored_size": (4, 1024, {"network_size": 4, "network_frames": 1}),
}
NAMES = {"network_spectrogram": SPECTROGRAMS, "network_padding": PADDINGS, "network_extend": ("tile", "pad")}


def test_ranges_cover_all_media_settings() -> None:
    assert {field.name for field in fields(MediaConfig)} == {*RANGES, *BUDGETS, *NAMES}


@pytest.mark.parametrize("name", RANGES)
def test_values_outside_the_range_of_a_media_setting_are_refused(name: str) -> None:
    low, high, others = RANGES[name]
    below, above = (low - 1, high + 1) if isinstance(low, int) else (low / 2 if low else -0.1, high + 0.1)
    for value in (below, above):
        with pytest.raises(ConfigError, match=f"media.{name} is "):
            MediaConfig(**{**others, name: value})


def check_encodes(media: MediaConfig, loaded: dict[str, Any], name: str) -> None:
    """Encode every kind that a setting matters to, by both encoders, and check shape and values."""
    for kind, encoder in [(kind, "statistics") for kind in STATISTICS] + [(kind, "resnet18") for kind in RESNET18]:
        modality = Modality(name="m", column="c", kind=kind, encoder=encoder)
        if name not in media_settings(modality, media):
            continue
        encoded = vector_of(encode_cell(loaded[kind], modality, media))
        assert np.isfinite(np.asarray(encoded, dtype=np.float32)).all()
        if encoder == "resnet18":
            stored = stored_pictures(modality, media)
            size = int(np.prod(input_shape(modality, media))) if stored is None else stored.num_features
            assert encoded.shape == (size,)


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_the_range_of_a_media_setting_work(name: str, loaded: dict[str, Any]) -> None:
    for value in RANGES[name][:2]:
        check_encodes(MediaConfig(**{**RANGES[name][2], name: value}), loaded, name)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NAMES.items() for value in values])
def test_every_name_of_a_media_setting_works(name: str, value: str, loaded: dict[str, Any]) -> None:
    options: dict[str, Any] = {"network_spectrogram": "log-magnitude", name: value}
    check_encodes(MediaConfig(**options), loaded, name)
    with pytest.raises(ConfigError, match=f"media.{name} is 'other'"):
        MediaConfig(**{**options, name: "other"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network_window": 600, "network_n_fft": 512}, "media.network_window is 600; it may not exceed network_n_fft"),
        ({"network_linear_bins": 300}, "media.network_linear_bins is 300; a transform of 512 samples has 257"),
        ({"network_stored_size": 64}, "media.network_stored_size is 64; it may not be below network_size"),
        ({"num_frames": 4096, "frame_size": 1024}, "media: num_frames and frame_size make 4,294,967,296 pixels"),
        ({"network_hop": 2, "network_n_fft": 65_536}, "media: network_seconds, network_n_fft and network_hop make"),
        ({"network_frame_choices": 4096}, "media: network_frames, network_frame_choices and the stored size make"),
    ],
)
def test_media_settings_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MediaConfig(**options)


def test_cache_is_another_one_for_every_media_setting_and_the_old_one_for_the_defaults() -> None:
    modality = Modality(name="m", column="c", kind="video", encoder="resnet18")
    changed = [
        MediaConfig(**{**others, name: value})
        for name, (low, high, others) in RANGES.items()
        for value in (low, high)
        if value != getattr(MediaConfig(), name)
    ]
    names: list[dict[str, Any]] = [{name: values[1]} for name, values in NAMES.items()]
    changed += [MediaConfig(**options) for options in names]
    changed.append(replace(MediaConfig(), max_packets=1))
    keys = [preprocessing(modality, media) for media in (MediaConfig(), *changed)]
    assert len({*keys}) == len(keys)
    assert keys[0] == "802f98c42ed5b990"  # as before there were settings of spectrograms: old caches are read


def test_stored_pictures_hold_the_size_of_the_original(loaded: dict[str, Any]) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3)).astype(np.uint8)).save(file, "png")
    media = MediaConfig(network_size=8, network_stored_size=12)
    modality = Modality(name="m", column="c", kind="image", encoder="resnet18")
    vector = vector_of(encode_cell(file.getvalue(), modality, media))
    assert vector[-4:].view("<u2").tolist() == [50, 30]
    expected = decode_image(file.getvalue(), MediaConfig(image_size=12))
    np.testing.assert_array_equal(vector[:-4].reshape(12, 12, 3), expected)
    film = replace(modality, kind="video")
    assert vector_of(encode_cell(loaded["video"], film, media))[-4:].view("<u2").tolist() == [32, 32]


@pytest.mark.parametrize(("fps", "expected"), [(None, 5), (1.0, 0), (2.0, 5), (5.0, 4), (100.0, 5)])
def test_frames_by_rate_are_those_at_its_times(fps: float | None, expected: int, loaded: dict[str, Any]) -> None:
    """The film has ten frames in a second, the middle one of those at 0, 1 / fps, ... seconds is read."""
    frames = decode_sized_frames(loaded["video"], num_frames=10, size=32, config=MediaConfig()).pixels
    (frame,) = decode_sized_frames(loaded["video"], num_frames=1, size=32, config=MediaConfig(), fps=fps).pixels
    distances = np.abs(frames.astype(int) - frame).mean(axis=(1, 2, 3))
    assert distances.argmin() == expected
    assert distances.min() == 0
