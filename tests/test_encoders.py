"""Encoders: one for every kind, vectors are used unchanged, and problems are returned with a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmaudit.audit.dataset.modalities import KINDS, Modality
from mmaudit.audit.errors import ConfigError, Reason, UnusableError
from mmaudit.audit.features import encoders
from mmaudit.audit.features.descriptors import video_statistics
from mmaudit.audit.features.encoders import (
    RESNET18,
    STATISTICS,
    EncodedRows,
    check_encoder,
    encode_cell,
    encode_vectors,
    input_shape,
    preprocessing,
)
from mmaudit.audit.hashing import digest
from mmaudit.audit.media.audio import network_spectrogram
from mmaudit.audit.media.decode import decode_audio, decode_folders, decode_frames, decode_image
from mmaudit.audit.media.files import MediaConfig

MEDIA = MediaConfig()
TYPES = [pa.list_(pa.float32()), pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.int64())]
ROWS = [[1.0, 2.0, 3.0], None, [1.0, 2.0], [], [4.0, None, 6.0], [7.0, 8.0, 9.0]]


def vectors(length: int) -> Modality:
    return Modality(name="v", column="col", kind="features", length=length)


def rows_of(encoded: EncodedRows) -> list[list[float] | None]:
    vectors = iter(encoded.vector.tolist())
    return [next(vectors) if usable else None for usable in encoded.usable]


def test_every_kind_has_an_encoder() -> None:
    assert {*STATISTICS, "features"} == set(KINDS)


@pytest.mark.parametrize("type_", TYPES)
def test_vectors_are_unchanged_and_checked_by_row(type_: pa.DataType) -> None:
    array = pa.array(ROWS, type_)
    for column in (pa.chunked_array([array]), pa.chunked_array([array.slice(0, 2), array.slice(2)])):
        encoded = encode_vectors(column, vectors(3))
        assert rows_of(encoded) == [[1, 2, 3]] + [None] * 4 + [[7, 8, 9]]
        assert encoded.vector.dtype == np.float32
        wrong_length = Reason.WRONG_LENGTH
        reasons = {row: problem.reason for row, problem in encoded.problem.items()}
        assert reasons == {1: Reason.MISSING, 2: wrong_length, 3: wrong_length, 4: Reason.NOT_FINITE}
        assert str(encoded.problem[2]) == "wrong-length: 2 numbers; most rows have 3"
        assert str(encoded.problem[4]) == "not-finite: 1 of 3 numbers are not finite"


def test_null_and_sliced_fixed_length_vectors_are_read() -> None:
    array = pa.array([[9, 9], [1, 2], None, [3, 4], [8, 8]], pa.list_(pa.float32(), 2))
    encoded = encode_vectors(pa.chunked_array([array.slice(1, 3)]), vectors(2))
    assert rows_of(encoded) == [[1, 2], None, [3, 4]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_values_outside_float32_are_not_finite(value: float) -> None:
    encoded = encode_vectors(pa.chunked_array([pa.array([[value, 1.0]], pa.list_(pa.float64()))]), vectors(2))
    assert [problem.reason for problem in encoded.problem.values()] == [Reason.NOT_FINITE]


def test_large_integers_are_rounded_to_float32() -> None:
    column = pa.chunked_array([pa.array([[2**24 + 1, 2**53 + 1]], pa.list_(pa.int64()))])
    assert rows_of(encode_vectors(column, vectors(2))) == [[2.0**24, 2.0**53]]


@given(st.lists(st.none() | st.lists(st.floats(width=32), max_size=3), max_size=8))
def test_content_and_problem_depend_only_on_the_row(rows: list[list[float] | None]) -> None:
    column = pa.chunked_array([pa.array(rows, pa.list_(pa.float32()))])
    encoded = encode_vectors(column, vectors(2))
    digests = [digest(np.array(row or [], dtype=np.float32).tobytes()) for row in rows]
    assert encoded.content.tolist() == [row_digest.encode() for row_digest in digests]
    usable = [row is not None and len(row) == 2 and bool(np.isfinite(row).all()) for row in rows]
    assert encoded.usable.tolist() == usable
    assert sorted(encoded.problem) == [row for row, is_usable in enumerate(usable) if not is_usable]
    assert rows_of(encoded) == [row if is_usable else None for row, is_usable in zip(rows, usable, strict=True)]


def test_cell_is_encoded_or_returns_its_error() -> None:
    text = Modality(name="t", column="t", kind="text")
    vector = encode_cell("one two one", text, MEDIA)
    assert isinstance(vector, np.ndarray)
    assert vector.shape == (MEDIA.text_buckets,)
    empty = encode_cell("...", text, MEDIA)
    assert isinstance(empty, UnusableError)
    assert empty.reason is Reason.EMPTY
    missing = UnusableError(Reason.MISSING, "null")
    assert encode_cell(missing, text, MEDIA) is missing
    broken = encode_cell(b"no sound", Modality(name="a", column="a", kind="audio"), MEDIA)
    assert isinstance(broken, UnusableError)
    assert broken.reason is Reason.CORRUPT


@pytest.mark.parametrize("kind", ["audio", "image", "video", "frames", "text"])
def test_every_relevant_setting_changes_the_fingerprint(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modality = Modality(name="m", column="c", kind=kind)
    fingerprints = {preprocessing(modality, MEDIA)}
    assert preprocessing(replace(modality, name="n", column="d"), MEDIA) in fingerprints
    settings: dict[str, Any]
    for settings in ({"max_seconds": 2.0}, {"image_size": 32}, {"text_buckets": 64}):
        fingerprints.add(preprocessing(modality, MediaConfig(**settings)))
    changed = {kind: replace(STATISTICS[kind], version=99)}
    monkeypatch.setattr(encoders, "_encoders_by_kind", lambda name: changed)
    fingerprints.add(preprocessing(modality, MEDIA))
    assert len(fingerprints) == 5


def test_kinds_and_lengths_have_distinct_fingerprints() -> None:
    kinds = [Modality(name="m", column="c", kind=kind) for kind in STATISTICS] + [vectors(2), vectors(3)]
    assert len({preprocessing(modality, MEDIA) for modality in kinds}) == len(kinds)
    assert preprocessing(vectors(2), MEDIA) == preprocessing(vectors(2), MediaConfig(image_size=8))


def test_encoders_have_distinct_fingerprints() -> None:
    fingerprints = {
        preprocessing(Modality(name="m", column="c", kind=kind, encoder=encoder), MEDIA)
        for kind in RESNET18
        for encoder in ("statistics", "resnet18", "os.path:basename")
    }
    assert len(fingerprints) == 3 * len(RESNET18)


@pytest.fixture
def loaded(clip_source: Path, film: Callable[[bool], bytes]) -> dict[str, Any]:
    pictures = tuple((clip_source / f"{number}.png").read_bytes() for number in range(5))
    return {
        "audio": (clip_source / "0.wav").read_bytes(),
        "image": pictures[0],
        "video": film(True),
        "frames": (pictures,),
        "text": "one two",
    }


@pytest.mark.parametrize("media", [MEDIA, MediaConfig(network_seconds=0.15, network_size=20, sample_rate=11_025)])
@pytest.mark.parametrize("kind", RESNET18)
def test_network_inputs_have_the_declared_shape(kind: str, media: MediaConfig, loaded: dict[str, Any]) -> None:
    modality = Modality(name="m", column="c", kind=kind, encoder="resnet18")
    vector = encode_cell(loaded[kind], modality, media)
    assert isinstance(vector, np.ndarray)
    assert vector.dtype == (np.float32 if kind == "audio" else np.uint8)
    unflattened = vector.reshape(input_shape(modality, media))
    frames = replace(media, num_frames=media.network_frames, frame_size=media.network_size)
    expected: dict[str, Callable[[Any], Any]] = {
        "audio": lambda data: network_spectrogram(decode_audio(data, media), media),
        "image": lambda data: decode_image(data, replace(media, image_size=media.network_size)),
        "video": lambda data: decode_frames(data, frames),
        "frames": lambda data: decode_folders(data, frames),
    }
    np.testing.assert_array_equal(unflattened, expected[kind](loaded[kind]))


def test_frames_of_folders_are_encoded_as_video(clip_source: Path) -> None:
    pictures = tuple((clip_source / f"{number}.png").read_bytes() for number in range(6))
    frames = Modality(name="f", column="c", kind="frames")
    vector = encode_cell((pictures,), frames, MEDIA)
    assert isinstance(vector, np.ndarray)
    np.testing.assert_array_equal(vector, video_statistics(decode_folders((pictures,), MEDIA), MEDIA))
    reversed_vector = encode_cell((pictures[::-1],), frames, MEDIA)
    assert isinstance(reversed_vector, np.ndarray)
    assert not np.array_equal(vector, reversed_vector)


@pytest.mark.parametrize(
    ("encoder", "kind", "message"),
    [
        (
            "statistic",
            "audio",
            r"no such encoder; did you mean statistics\? \(available: statistics, resnet18, hf:MODEL",
        ),
        ("resnet18:", "audio", r"no such encoder"),
        ("resnet18", "text", r".*does not read text; available: audio, image, video, frames"),
        ("resnet18", "features", r"vectors are read as they are; the only encoder of kind features is statistics"),
        ("hf:a/b", "features", r"vectors are read as they are"),
        ("os.path:join", "features", r"vectors are read as they are"),
    ],
)
def test_invalid_encoder_is_rejected(encoder: str, kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"--encoder m={encoder}: {message}"):
        check_encoder(Modality(name="m", column="c", kind=kind, encoder=encoder))


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_support_every_kind(kind: str) -> None:
    modality = Modality(name="m", column="c", kind=kind, length=2 if kind == "features" else None)
    check_encoder(modality)
    assert len(preprocessing(modality, MEDIA)) == 16
