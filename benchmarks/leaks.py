"""Leaks: false alarms on clean data and recall of planted copies, by kind of copy, as a Markdown table.

Run with: python benchmarks/leaks.py DATA. DATA holds the media av-digits/, grid-digits/ and mvsa-dev/, and the vectors
ravdess/ravdess.parquet and mfeat/mfeat.parquet. Clean rows are those of the sets without copies, split at random again
and again; copies are made of train rows and added to the test rows. It takes two minutes on two cores.
"""

from __future__ import annotations

import io
import sys
import time
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from scipy.signal import resample_poly

from mmaudit.audit.dataset.samples import Samples
from mmaudit.audit.errors import UnusableError
from mmaudit.audit.features.descriptors import SHAPES, Thumbnails, fingerprint
from mmaudit.audit.features.matrix import MatrixInputs, RowIndex
from mmaudit.audit.group_overlap import ALIKE_Z, likeness
from mmaudit.audit.leakage import LeakageConfig, ModalityContent, find_leakage
from mmaudit.audit.media.audio import decode_audio
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.media.pictures import decode_frames
from mmaudit.audit.near_duplicates import near_links
from mmaudit.audit.near_media import near_media

MEDIA = MediaConfig()
NUM_COPIES, NUM_SPLITS = 60, 5

Array = NDArray[Any]
Copy = Callable[[Array, np.random.Generator], Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table: what was tested on which data, and how many of how many were found."""

    test: str
    data: str
    found: int
    of: int

    def __str__(self) -> str:
        return f"| {self.test} | {self.data} | {self.found} of {self.of} |"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFingerprints:
    """Fingerprints of decoded samples in memory."""

    kind: str
    levels: Thumbnails

    @classmethod
    def of(cls, kind: str, decoded: Sequence[Array]) -> MemoryFingerprints:
        """Compute the fingerprints of decoded samples."""
        rows = [np.frombuffer(fingerprint(sample, kind, MEDIA), np.uint8) for sample in decoded]
        return cls(kind=kind, levels=np.stack(rows).reshape(-1, *SHAPES[kind]).astype(np.float32))

    def read(self, rows: RowIndex) -> Thumbnails:
        """Read these rows, in this order."""
        return self.levels[rows]


def _resized(image: Image.Image) -> Array:
    return np.asarray(image.convert("RGB").resize((MEDIA.image_size,) * 2, Image.Resampling.BILINEAR))


def _jpeg(picture: Array, rng: np.random.Generator) -> Array:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=60)
    return _resized(Image.open(file))


def _brightened(picture: Array, rng: np.random.Generator) -> Array:
    return _resized(ImageEnhance.Brightness(Image.fromarray(picture)).enhance(rng.choice([0.7, 1.3])))


def _shifted(picture: Array, rng: np.random.Generator) -> Array:
    return _resized(Image.fromarray(np.roll(picture, rng.choice([-1, 1]), axis=int(rng.integers(2)))))


def _cropped(picture: Array, rng: np.random.Generator) -> Array:
    height, width = (round(0.9 * size) for size in picture.shape[:2])
    top, left = rng.integers(picture.shape[0] - height + 1), rng.integers(picture.shape[1] - width + 1)
    return _resized(Image.fromarray(picture[top : top + height, left : left + width]))


PICTURE_COPIES: dict[str, Copy] = {
    "saved as JPEG, quality 60": _jpeg,
    "brightness 0.7 or 1.3": _brightened,
    "shifted by a pixel": _shifted,
    "cropped by 10%": _cropped,
    "mirrored": lambda picture, rng: _resized(Image.fromarray(picture[:, ::-1])),
}


def _played(wave_: Array, rng: np.random.Generator) -> Array:
    return np.asarray(resample_poly(wave_, int(rng.choice([19, 21])), 20), dtype=np.float32)


def _saved_at(rate: int) -> Copy:
    """Return a copy that is saved as 16-bit WAV at another sample rate and decoded again."""

    def save(wave_: Array, rng: np.random.Generator) -> Array:
        file = io.BytesIO()
        with wave.open(file, "wb") as writer:
            writer.setnchannels(1)
            writer.setsampwidth(2)
            writer.setframerate(rate)
            resampled = resample_poly(wave_, rate // 200, MEDIA.sample_rate // 200)
            writer.writeframes((np.clip(resampled, -1, 1) * 32767).astype("<i2").tobytes())
        return decode_audio(file.getvalue(), MEDIA)

    return save


SOUND_COPIES: dict[str, Copy] = {
    "sample rate 5% higher": _saved_at(16_800),
    "played 5% faster or slower": _played,
    "half the gain": lambda wave_, rng: 0.5 * wave_,
    "5 ms later": lambda wave_, rng: np.r_[np.zeros(80, np.float32), wave_],
    "trimmed by 5%": lambda wave_, rng: wave_[len(wave_) // 20 :],
    "noise at 30 dB": lambda wave_, rng: (
        wave_ + (wave_.std() * 10**-1.5 * rng.standard_normal(len(wave_))).astype(np.float32)
    ),
}


def _decode_all(paths: Sequence[Path], decode: Callable[[Any, MediaConfig], Array]) -> list[Array]:
    """Decode these files; those that are unusable are left out."""
    decoded = []
    for path in paths:
        try:
            decoded.append(decode(path.read_bytes(), MEDIA))
        except UnusableError:
            continue
    return decoded


def _read_pictures(paths: Sequence[Path]) -> list[Array]:
    """Read pictures in their own size, since a pixel of 28 is not one of 64."""
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def _copied(original: Array, copy: Copy, *, kind: str, seed: int) -> Array:
    """Copy a sample; all frames of a video are changed in the same way."""
    if kind == "video":
        return np.stack([copy(frame, np.random.default_rng(seed)) for frame in original])
    return copy(original, np.random.default_rng(seed))


def media_lines(name: str, kind: str, originals: Sequence[Array], copies: Mapping[str, Copy]) -> list[Line]:
    """Return the false alarms over random splits of the originals, and the copies found of each kind."""
    rng = np.random.default_rng(0)
    own_form = [_resized(Image.fromarray(sample)) for sample in originals] if kind == "image" else list(originals)
    clean, count = MemoryFingerprints.of(kind, own_form), len(originals)
    alarms = 0
    for _ in range(NUM_SPLITS):
        order = rng.permutation(count)
        alarms += len(near_media(clean, order[count // 5 :], order[: count // 5], neighbours=5))
    lines = [Line(test="false alarms, near duplicates", data=name, found=alarms, of=NUM_SPLITS * (count // 5))]
    order = rng.permutation(count)
    sources = order[count // 5 :][:NUM_COPIES]
    for copy_name, copy in copies.items():
        copied = [_copied(originals[row], copy, kind=kind, seed=row) for row in sources.tolist()]
        levels = np.concatenate([clean.levels, MemoryFingerprints.of(kind, copied).levels])
        tested = np.arange(count, len(levels))
        links = near_media(MemoryFingerprints(kind=kind, levels=levels), order[count // 5 :], tested, neighbours=5)
        found = sum(links.get(row) == source for row, source in zip(tested.tolist(), sources.tolist(), strict=True))
        lines.append(Line(test=f"recall, {kind}, {copy_name}", data=name, found=found, of=len(copied)))
    return lines


def feature_lines(name: str, matrix: NDArray[np.float32]) -> list[Line]:
    """Return the false alarms over random splits of vectors, and the copies with 1% of noise found."""
    rng, count = np.random.default_rng(0), len(matrix)
    alarms = 0
    for _ in range(NUM_SPLITS):
        order = rng.permutation(count)
        links = near_links(
            MatrixInputs(matrix=matrix), order[count // 5 :], order[: count // 5], config=LeakageConfig(), seed=0
        )
        alarms += 0 if isinstance(links, str) else len(links)
    order = rng.permutation(count)
    sources = order[count // 5 :][:NUM_COPIES]
    noise = 0.01 * matrix.std(axis=0) * rng.standard_normal((len(sources), matrix.shape[1]))
    planted = np.concatenate([matrix, matrix[sources] + noise]).astype(np.float32)
    tested = np.arange(count, len(planted))
    links = near_links(MatrixInputs(matrix=planted), order[count // 5 :], tested, config=LeakageConfig(), seed=0)
    pairs = zip(tested.tolist(), sources.tolist(), strict=True)
    found = 0 if isinstance(links, str) else sum(links.get(row) == source for row, source in pairs)
    return [
        Line(test="false alarms, near duplicates", data=name, found=alarms, of=NUM_SPLITS * (count // 5)),
        Line(test="recall, vectors, noise of 1%", data=name, found=found, of=len(sources)),
    ]


def _samples(count: int, rng: np.random.Generator) -> Samples:
    return Samples(
        sample_id=np.array([f"s{row:05d}" for row in range(count)], dtype=object),
        label=rng.integers(0, 3, count).astype(np.int32),
        class_names=("a", "b", "c"),
        split=np.where(rng.random(count) < 0.2, "test", "train").astype(object),
        group=None,
        paths=pa.table({}),
    )


def probability_lines() -> list[Line]:
    """Return how many of ten clean sets of softmax features have a finding, by the scale of the logits."""
    lines = []
    for scale in (1, 3, 5, 8):
        num_alarms = 0
        for seed in range(10):
            rng = np.random.default_rng(seed)
            logits = rng.standard_normal((1500, 10))
            logits[np.arange(1500), rng.integers(0, 10, 1500)] += 1.5
            exponentials = np.exp(scale * (logits - logits.max(axis=1, keepdims=True)))
            matrix = (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)
            content = ModalityContent(
                modality="probabilities",
                content=np.array([row.tobytes().hex() for row in matrix], dtype=object),
                recurs=np.zeros(1500, dtype=bool),
                inputs=MatrixInputs(matrix=matrix),
            )
            num_alarms += find_leakage(_samples(1500, rng), [content]).leaks
        lines.append(
            Line(test="false alarms, sets of 10 probabilities", data=f"scale {scale}", found=num_alarms, of=10)
        )
    return lines


def group_lines(
    name: str, matrices: Sequence[NDArray[np.float32]], label: Array, groups: Mapping[str, Array]
) -> list[Line]:
    """Return how many columns of random values, and which true groups, group the samples by their likeness."""
    rng, count = np.random.default_rng(0), len(label)
    inputs = [(MatrixInputs(matrix=matrix), np.ones(count, dtype=bool)) for matrix in matrices]
    order = rng.permutation(count)

    def groups_samples(values: Array) -> bool:
        column = np.array([f"v{value}" for value in values], dtype=object)
        z = likeness(inputs, column, label.astype(np.int32), order=order, seed=0)
        return z is not None and z >= ALIKE_Z

    drawn = [rng.integers(0, num_values, count) for num_values in (8, 24, 100, 400) for _ in range(10)]
    random_columns = sum(groups_samples(values) for values in drawn)
    lines = [Line(test="false alarms, columns of random values", data=name, found=random_columns, of=len(drawn))]
    return lines + [
        Line(test=f"recall, groups, {column}", data=name, found=int(groups_samples(values)), of=1)
        for column, values in groups.items()
    ]


def leak_lines(data: Path) -> list[Line]:
    """Return all lines of the table; see the module for what `data` holds."""
    digits, grid, posts = (
        pd.read_csv(data / name / "metadata.csv") for name in ("av-digits", "grid-digits", "mvsa-dev")
    )
    digit_pictures = _read_pictures([data / "av-digits" / name for name in digits.image_file_name])
    post_pictures = _read_pictures([data / "mvsa-dev" / name for name in posts.drop_duplicates("group").image])
    digit_sounds = _decode_all([data / "av-digits" / name for name in digits.audio_file_name], decode_audio)
    clips = [data / "grid-digits" / name for name in grid.file_name]
    films = [film[[2, 6, 10, 14]] for film in _decode_all(clips, decode_frames)]
    film_copies = {name: copy for name, copy in PICTURE_COPIES.items() if name != "shifted by a pixel"}
    faces = pd.read_parquet(data / "ravdess" / "ravdess.parquet")
    moments = pd.read_parquet(data / "mfeat" / "mfeat.parquet")
    vectors = {name: np.stack(faces[name].to_list()).astype(np.float32) for name in ("audio", "video")}
    return [
        *media_lines("av-digits", "image", digit_pictures, PICTURE_COPIES),
        *media_lines("mvsa-dev", "image", post_pictures, PICTURE_COPIES),
        *media_lines("av-digits", "audio", digit_sounds, SOUND_COPIES),
        *media_lines("grid-digits", "audio", _decode_all(clips, decode_audio), SOUND_COPIES),
        *media_lines("grid-digits", "video", films, film_copies),
        *feature_lines("ravdess audio", np.unique(vectors["audio"], axis=0)),
        *feature_lines("mfeat fou", np.unique(np.stack(moments.fou.to_list()).astype(np.float32), axis=0)),
        *probability_lines(),
        *group_lines("ravdess", list(vectors.values()), faces.label.to_numpy(), {"actor": faces.actor.to_numpy()}),
    ]


def main() -> None:
    """Print the table."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    start = time.monotonic()
    print("| test | data | found |")
    print("|---|---|---|")
    for line in leak_lines(Path(sys.argv[1])):
        print(line)
    print(f"\n{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
