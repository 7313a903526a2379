"""How long does encoding take, against decoding alone? Prints a table; exit status 1 where a bound is missed.

Run with: python benchmarks/encode.py [DATA ..] [--workers N]

Each DATA is a dataset of media; without any, clips are made as long and large as in the datasets of the field: 10 s
of 340 x 256 as in VGGSound and AVE, 3 s of 480 x 360 as in CREMA-D, with sound; sounds of 3 s with pictures. Told
beside the bound are films of mpeg4, which decodes in half the time of h264, and of 1 s of 128 x 96, where opening a
file takes longer than decoding it. Both sides run in the same processes over the same shards and in turns, and the
best of each counts. Decoding alone opens every file once with PyAV and decodes its sound and its pictures: it scales,
resamples, measures and writes nothing.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from mmaudit.audit.encoding.features import EncodeTask, encode_dataset
from mmaudit.audit.media.decode import MediaConfig
from mmaudit.audit.source.dataset import DataConfig, Dataset, open_dataset
from mmaudit.audit.source.modality import Modality
from mmaudit.audit.workers import default_workers, run_tasks, silent

BOUND = 1.3  # times decoding alone
NUM_ROUNDS = 3
MEDIA = MediaConfig()
NUM_CLIPS, SECONDS, SIZE, FRAME_RATE, SAMPLE_RATE = 192, 3, 224, 25, 44_100
FILMS = (  # name, codec, seconds, width, height, clips
    ("10 s, 340 x 256, h264 and aac", "libx264", 10, 340, 256, 64),
    ("3 s, 480 x 360, h264 and aac", "libx264", 3, 480, 360, 96),
    ("beside: 10 s, 340 x 256, mpeg4 and aac", "mpeg4", 10, 340, 256, 64),
    ("beside: 1 s, 128 x 96, h264 and aac", "libx264", 1, 128, 96, 192),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--workers", type=int, default=default_workers())
    arguments = parser.parse_args()
    missed = False
    print("| data | clips | decoding alone, ms a clip | encoding, ms a clip | ratio | bound | |")
    print("|---|---:|---:|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        for data in arguments.data or made_clips(Path(folder)):
            dataset = open_dataset(data, DataConfig(shard_rows=16))
            decoding, encoding = race(dataset, num_workers=arguments.workers)
            ratio, each = encoding / decoding, 1000 / dataset.num_rows
            bound = None if Path(data).name.startswith("beside") else BOUND
            missed |= bound is not None and ratio > bound
            print(
                f"| {Path(data).name} | {dataset.num_rows} | {decoding * each:.2f} | {encoding * each:.2f} "
                f"| {ratio:.2f} | {bound or '-'} | {'-' if bound is None else 'missed' if ratio > bound else 'held'} |",
                flush=True,
            )
    return int(missed)


def race(dataset: Dataset, *, num_workers: int) -> tuple[float, float]:
    """Seconds of decoding alone and of encoding, by turns in one run, the best round of each."""
    bare = replace(dataset, shards=())
    tasks = [EncodeTask(dataset=bare, shard=shard, media=MEDIA, folder=Path()) for shard in dataset.shards]

    def decode() -> None:
        for _ in run_tasks(decode_shard, tasks, num_workers=num_workers):
            pass

    def encode() -> None:
        with tempfile.TemporaryDirectory() as cache:
            encode_dataset(dataset, Path(cache), media=MEDIA, num_workers=num_workers, progress=silent)

    rounds = [(seconds(decode), seconds(encode)) for _ in range(NUM_ROUNDS)]
    return min(decoding for decoding, _ in rounds), min(encoding for _, encoding in rounds)


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def decode_shard(task: EncodeTask) -> int:
    """Decode what a shard's modalities need, each file once."""
    rows = task.dataset.read(task.shard)
    num_decoded = 0
    for column in dict.fromkeys(modality.column for modality in task.dataset.modalities):
        there = [modality for modality in task.dataset.modalities if modality.column == column]
        for cell in rows[column].to_pylist():
            num_decoded += decode_file(task.dataset.load(cell, there[0]), there)
    return num_decoded


def decode_file(data: bytes, modalities: list[Modality]) -> int:
    kinds = {modality.kind for modality in modalities}
    if kinds == {"image"}:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
        return 1
    container: Any
    with av.open(io.BytesIO(data)) as container:
        streams = [*(container.streams.audio[:1] if "audio" in kinds else ())]
        streams += [*(container.streams.video[:1] if "video" in kinds else ())]
        for stream in streams:
            stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(*streams))


def made_clips(folder: Path) -> list[str]:
    """Write films in two codecs with sound, and sounds with pictures: things that move, over noise."""
    rng = np.random.default_rng(0)
    for name, codec, length, width, height, num_clips in FILMS:
        (folder / name).mkdir()
        different = [film(codec, rng, length=length, width=width, height=height) for _ in range(4)]
        files = [f"{index}.mp4" for index in range(num_clips)]
        for index, file in enumerate(files):
            # What stands behind the film makes every file's content its own: nothing may be encoded only once.
            (folder / name / file).write_bytes(different[index % 4] + box(index))
        write_metadata(folder / name, [f"{file},{index % 2}" for index, file in enumerate(files)], "file_name,label")
    name = "wav and png"
    (folder / name).mkdir()
    rows = []
    for index in range(NUM_CLIPS):
        (folder / name / f"{index}.wav").write_bytes(wav(rng))
        pixels = smooth(rng, SIZE, SIZE)
        Image.fromarray(pixels).save(folder / name / f"{index}.png")
        rows.append(f"{index}.wav,{index}.png,{index % 2}")
    write_metadata(folder / name, rows, "audio_file_name,image_file_name,label")
    return [str(path) for path in sorted(folder.iterdir())]


def write_metadata(folder: Path, rows: list[str], head: str) -> None:
    (folder / "metadata.csv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")


def box(number: int) -> bytes:
    """A box that mp4 allows anywhere and nobody reads."""
    return (16).to_bytes(4, "big") + b"free" + number.to_bytes(8, "big")


def smooth(rng: np.random.Generator, height: int, width: int) -> Any:
    coarse = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def noise(rng: np.random.Generator, length: int = SECONDS) -> Any:
    return (0.1 * rng.standard_normal(length * SAMPLE_RATE)).astype(np.float32)


def wav(rng: np.random.Generator) -> bytes:
    import wave

    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE)
        writer.writeframes((noise(rng) * 32_767).astype("<i2").tobytes())
    return file.getvalue()


def film(codec: str, rng: np.random.Generator, *, length: int, width: int, height: int) -> bytes:
    file = io.BytesIO()
    scene = smooth(rng, height + 600, width + 800).astype(np.int16)
    with av.open(file, "w", format="mp4") as container:
        sight: Any = container.add_stream(codec, rate=FRAME_RATE)
        sight.width, sight.height, sight.pix_fmt = width, height, "yuv420p"
        heard: Any = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for index in range(length * FRAME_RATE):
            pixels = scene[2 * index : 2 * index + height, 3 * index : 3 * index + width]
            pixels = pixels + rng.integers(-8, 9, pixels.shape, dtype=np.int16)
            picture = np.clip(pixels, 0, 255).astype(np.uint8)
            container.mux(sight.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(sight.encode(None))
        wave_ = noise(rng, length)[None]
        for start in range(0, wave_.shape[1], 1024):
            part = np.ascontiguousarray(wave_[:, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
            frame.rate, frame.pts, frame.time_base = SAMPLE_RATE, start, Fraction(1, SAMPLE_RATE)
            container.mux(heard.encode(frame))
        container.mux(heard.encode(None))
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
