"""One modality of one sample, as a feature vector: which encoder reads which kind?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .descriptors import image_statistics, sound_statistics, text_counts, video_statistics
from .errors import ConfigError, choices
from .hashing import digest
from .media import MediaConfig, decode_audio, decode_frames, decode_image
from .modality import Modality
from .quality import Reason, UnusableError

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """How a kind becomes a vector. `version` goes up whenever the same input would give another vector.

    `encode` takes what Dataset.load gives. A vector depends on its own sample alone.
    """

    name: str
    version: int
    encode: Callable[[Any, MediaConfig], Vector]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Some rows of one modality: the digest of each row's content, and its vector (d,) or the reason it has none."""

    content: list[str]
    vector: list[Vector | None]
    problem: list[UnusableError | None]


def check_encoder(modality: Modality) -> None:
    """Refuse an encoder that is not there, or cannot read this kind of modality."""
    if modality.encoder != "statistics":
        raise ConfigError(
            f"--encoder {modality.name}={modality.encoder}: no such encoder; {choices(modality.encoder, ('statistics',))}"
        )


def encode_cell(loaded: Any, modality: Modality, media: MediaConfig) -> Vector | UnusableError:
    """Encode what Dataset.load gave for a cell; what was wrong with it comes back in place of the vector."""
    if isinstance(loaded, UnusableError):
        return loaded
    try:
        return ENCODERS[modality.kind].encode(loaded, media)
    except UnusableError as error:
        return error


def encode_vectors(column: pa.ChunkedArray, modality: Modality) -> Encoded:
    """Check a column of feature vectors row by row, a million a few seconds: they are read as they are."""
    cells = column.combine_chunks()
    cells = cells.cast(pa.large_list(pa.float32()), safe=False)  # whole numbers past 2^24 are rounded
    flat = cells.values.to_numpy(zero_copy_only=False)  # nulls inside a vector become NaN
    offsets = cells.offsets.to_numpy()
    valid = cells.is_valid().to_numpy(zero_copy_only=False)
    rows = [flat[start:end] if ok else None for start, end, ok in zip(offsets, offsets[1:], valid, strict=False)]
    problems = [_vector_problem(row, modality) for row in rows]
    return Encoded(
        content=[digest(b"" if row is None else row.tobytes()) for row in rows],
        vector=[row if problem is None else None for row, problem in zip(rows, problems, strict=True)],
        problem=problems,
    )


def _vector_problem(row: Vector | None, modality: Modality) -> UnusableError | None:
    if row is None:
        return UnusableError(Reason.MISSING, f"{modality.column} is null")
    if len(row) != modality.length:
        return UnusableError(Reason.WRONG_LENGTH, f"{len(row)} numbers; most rows have {modality.length}")
    if not np.isfinite(row).all():
        return UnusableError(Reason.NOT_FINITE, f"{(~np.isfinite(row)).sum()} of {len(row)} numbers are not finite")
    return None


def preprocessing(modality: Modality, media: MediaConfig) -> str:
    """Fingerprint everything but the content that decides about a modality's vectors, in 16 hexadecimal digits."""
    if modality.kind == "features":
        return digest(f"vector {modality.length}".encode())[:16]
    encoder = ENCODERS[modality.kind]
    return digest(repr((encoder.name, encoder.version, sorted(asdict(media).items()))).encode())[:16]


def _encode_sound(data: bytes, media: MediaConfig) -> Vector:
    return sound_statistics(decode_audio(data, media), media)


def _encode_image(data: bytes, media: MediaConfig) -> Vector:
    return image_statistics(decode_image(data, media), media)


def _encode_video(data: bytes, media: MediaConfig) -> Vector:
    return video_statistics(decode_frames(data, media), media)


ENCODERS: dict[str, Encoder] = {
    "audio": Encoder(name="sound-statistics", version=1, encode=_encode_sound),
    "image": Encoder(name="image-statistics", version=1, encode=_encode_image),
    "video": Encoder(name="video-statistics", version=1, encode=_encode_video),
    "text": Encoder(name="text-counts", version=2, encode=text_counts),
}
