"""Small data of the fault runs: clips as wav and png files, which workers decode, and a Parquet file of features."""

from __future__ import annotations

import csv
import io
import wave
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NUM_CLIPS, NUM_ROWS, NUM_FEATURES, NUM_CLASSES = 80, 1_500, 12, 3
_RATE = 8_000


def write_clips(folder: Path) -> Path:
    """Write half a second of sound and a picture for each sample, and metadata.csv that lists them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(NUM_CLIPS):
        pitch, colour = (_class_or_another(number % NUM_CLASSES, rng) for _ in range(2))
        (folder / f"{number:03d}.wav").write_bytes(_tone(300.0 * (pitch + 1), rng))
        blocks = rng.integers(0, 100, (20, 20, 3), dtype=np.uint8)
        blocks[:, :, colour] += 40
        # Large, so that workers decode for a second, but of few bytes.
        Image.fromarray(blocks).resize((1_000, 1_000), Image.Resampling.NEAREST).save(folder / f"{number:03d}.png")
        rows.append([f"{number:03d}", f"{number:03d}.wav", f"{number:03d}.png", f"class-{number % NUM_CLASSES}"])
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "audio_file_name", "image_file_name", "label"], *rows])
    return folder


def write_features(path: Path) -> Path:
    """Write planted Gaussians; each sample is clearer in one of its modalities, at random."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, NUM_CLASSES, NUM_ROWS)
    columns = {"id": pa.array([f"s{row:05d}" for row in range(NUM_ROWS)]), "label": pa.array(label)}
    for name in ("audio", "visual"):
        means = 0.8 * rng.standard_normal((NUM_CLASSES, NUM_FEATURES))
        vectors = 2 * rng.random((NUM_ROWS, 1)) * means[label] + rng.standard_normal((NUM_ROWS, NUM_FEATURES))
        values = pa.array(vectors.astype(np.float32).ravel())
        columns[name] = pa.FixedSizeListArray.from_arrays(values, NUM_FEATURES)
    pq.write_table(pa.table(columns), path)
    return path


def _class_or_another(label: int, rng: np.random.Generator) -> int:
    return label if rng.random() < 0.7 else int(rng.integers(NUM_CLASSES))


def _tone(hertz: float, rng: np.random.Generator) -> bytes:
    samples = 0.4 * np.sin(2 * np.pi * hertz * np.arange(_RATE // 2) / _RATE) + 0.1 * rng.standard_normal(_RATE // 2)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(_RATE)
        writer.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()
