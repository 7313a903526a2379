"""Valid files of every kind, written once, that the generators mutate."""

from __future__ import annotations

import io
import pickle
import random
import tarfile
import wave
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from .execution import run_command

NUM_ROWS, NUM_FEATURES, NUM_CLASSES = 48, 6, 3
PICTURES = ("png", "jpg", "gif", "webp", "tiff", "bmp")
SOUNDS = ("wav", "flac", "ogg", "mp3")
FILMS = ("mp4", "mkv", "avi")
SPLITS = ("train", "train", "train", "train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Seeds:
    """Folder of the valid files; a file is read at each use, so that children cannot affect each other."""

    folder: Path

    def path(self, name: str) -> Path:
        """Return the path of a seed, which must not be written to."""
        return self.folder / name

    def data(self, name: str) -> bytes:
        """Return the bytes of a seed."""
        return self.path(name).read_bytes()


def make_seeds(folder: Path) -> Seeds:
    """Write the seeds into a new folder: tables, media, a tar, pickles, a saved dataset, runs with manifests."""
    folder.mkdir(parents=True)
    rows = feature_rows(random.Random("features"))
    pq.write_table(rows, folder / "features.parquet")
    _write_media(folder / "media")
    _write_tar(folder / "media", folder / "shard.tar")
    (folder / "mosei.pkl").write_bytes(pickle.dumps({part: mosei_fields(8) for part in ("train", "valid", "test")}))
    np.savez(folder / "mosei-train.npz", **mosei_fields(8))
    common = ["--repeats", "1", "--num-workers", "0", "--run"]
    run_command(["score", "features.parquet", "--group", "group", *common, "run"], folder)
    run_command(["score", "media", *common, "media-run"], folder)
    for name in ("run", "media-run"):
        run_command(["split", "--balanced", "--tolerance", "0.5", "--run", name], folder)
        run_command(["split", "--subset", "random:60%", "--name", "some", "--run", name], folder)
    run_command(["finetune", "--manifest", "balanced", "--epochs", "1", "--run", "run", "--num-workers", "0"], folder)
    run_command(["export", "balanced", "--format", "datasets", "--out", "saved", "--run", "run", "--json"], folder)
    return Seeds(folder)


def feature_rows(rng: random.Random, *, num_rows: int = NUM_ROWS) -> pa.Table:
    """Return rows of two modalities of features, whose classes a probe can tell apart."""
    numbers = np.random.default_rng(rng.getrandbits(32))
    label = np.arange(num_rows) % NUM_CLASSES
    means = numbers.standard_normal((2, NUM_CLASSES, NUM_FEATURES)) * 1.5
    vectors = [means[m][label] + numbers.standard_normal((num_rows, NUM_FEATURES)) for m in (0, 1)]
    return pa.table(
        {
            "id": [f"s{row:03d}" for row in range(num_rows)],
            "label": [f"c{value}" for value in label],
            "group": [f"g{row % 16}" for row in range(num_rows)],
            "split": [SPLITS[row // 8 % 6] for row in range(num_rows)],
            "audio": pa.array(vectors[0].astype(np.float32).tolist(), pa.list_(pa.float32())),
            "visual": pa.array(vectors[1].astype(np.float32).tolist(), pa.list_(pa.float32())),
        }
    )


def mosei_fields(num_rows: int) -> dict[str, Any]:
    """Return fields of one split as the MMSA files hold them."""
    numbers = np.random.default_rng(num_rows)
    series = {
        name: numbers.standard_normal((num_rows, 5, 4)).astype(np.float32) for name in ("text", "audio", "vision")
    }
    return {
        "id": np.array([f"v{row}$_$0" for row in range(num_rows)]),
        **series,
        "classification_labels": np.arange(num_rows) % 3,
        "regression_labels": numbers.standard_normal(num_rows),
    }


def sound(row: int, *, rate: int = 8_000, seconds: float = 0.25) -> NDArray[np.int16]:
    """Return a noisy tone, (t,) int16, whose pitch is that of the row's class."""
    numbers = np.random.default_rng(row)
    times = np.arange(round(rate * seconds)) / rate
    tone = np.sin(2 * np.pi * (300 + 400 * (row % NUM_CLASSES)) * times) + numbers.standard_normal(len(times)) * 0.5
    return np.asarray(tone / np.abs(tone).max() * 20_000).astype(np.int16)


def picture(row: int, *, size: int = 24) -> Image.Image:
    """Return a noisy picture with a stripe at the place of the row's class."""
    numbers = np.random.default_rng(row + 10_000)
    pixels = numbers.integers(0, 120, (size, size, 3)).astype(np.uint8)
    start = 8 * (row % NUM_CLASSES)
    pixels[:, start : start + 6] += 100
    return Image.fromarray(pixels)


def _write_media(folder: Path) -> None:
    """Write a folder of wav and png files with metadata.csv, and one file of every other format into `formats`."""
    for name in ("audio", "image", "formats"):
        (folder / name).mkdir(parents=True)
    lines = ["id,audio_file_name,image_file_name,label,split"]
    for row in range(24):
        write_wav(folder / "audio" / f"{row}.wav", sound(row))
        picture(row).save(folder / "image" / f"{row}.png")
        lines.append(f"m{row},audio/{row}.wav,image/{row}.png,c{row % NUM_CLASSES},{SPLITS[row // 4 % 6]}")
    (folder / "metadata.csv").write_text("\n".join([*lines, ""]), encoding="utf-8")
    formats = folder.with_name("formats")
    (folder / "formats").rename(formats)
    for suffix in PICTURES:
        picture(1).save(formats / f"x.{suffix}")
    frames = [picture(row) for row in range(3)]
    frames[0].save(formats / "x.gif", save_all=True, append_images=frames[1:])
    write_wav(formats / "x.wav", sound(1))
    for suffix, codec in (("flac", "flac"), ("ogg", "libopus"), ("mp3", "libmp3lame")):
        write_film(formats / f"x.{suffix}", sound_codec=codec, picture_codec=None)
    for suffix, codec in (("mp4", "mpeg4"), ("mkv", "mpeg4"), ("avi", "mpeg4")):
        write_film(formats / f"x.{suffix}", sound_codec="aac" if suffix == "mp4" else "pcm_s16le", picture_codec=codec)


def write_wav(path: Path, samples: NDArray[np.int16], *, rate: int = 8_000) -> None:
    """Write 16-bit mono sound."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, len(samples), "NONE", ""))
        file.writeframes(samples.tobytes())


def write_film(path: Path, *, sound_codec: str, picture_codec: str | None) -> None:
    """Write a film of eight small pictures and half a second of sound, or the sound alone."""
    with av.open(str(path), "w") as container:
        audio: Any = container.add_stream(sound_codec, rate=16_000, layout="mono")
        if picture_codec is not None:
            video: Any = container.add_stream(picture_codec, rate=16)
            video.width = video.height = 32
            video.pix_fmt = "yuv420p"
            for row in range(8):
                image = av.VideoFrame.from_ndarray(np.asarray(picture(row, size=32)), format="rgb24")
                image.pts, image.time_base = row, Fraction(1, 16)
                container.mux(video.encode(image))
            container.mux(video.encode(None))
        samples = np.concatenate([sound(row, rate=16_000) for row in (1, 4)])
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
        resampler = av.AudioResampler(format=audio.format.name, layout="mono", rate=16_000, frame_size=audio.frame_size)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            for packet in audio.encode(part):
                if packet.time_base:  # the last one of some codecs is empty, and has none
                    container.mux(packet)


def _write_tar(media: Path, path: Path) -> None:
    """Write the media folder's first 12 samples as a WebDataset tar with classes, texts and vectors."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for row in range(12):
            vector = io.BytesIO()
            np.save(vector, np.arange(4, dtype=np.float32) + row)
            members = {
                "wav": (media / "audio" / f"{row}.wav").read_bytes(),
                "png": (media / "image" / f"{row}.png").read_bytes(),
                "cls": str(row % NUM_CLASSES).encode(),
                "json": b'{"speaker": "p%d"}' % (row % 4),
                "feat.npy": vector.getvalue(),
            }
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{row:04d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
