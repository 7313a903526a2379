"""How long does encoding take, against decoding alone? Prints a table; exit status 1 where a bound is missed.

Run with: python benchmarks/encode.py [DATA ..] [--workers N]

Each DATA is a dataset of media; without any, clips are made as long and large as in the datasets of the field: 10 s
of 340 x 256 in stereo as in VGGSound and AVE, 3 s of 480 x 360 as in CREMA-D; sounds of 3 s with pictures. The bound is
for these. Told beside it are films of mpeg4, which decodes in half the time of h264, and of 1 s of 128 x 96, mouths,
where opening a file takes longer than decoding it.

Decoding alone opens every file once with PyAV, as it comes, and decodes to the same extent: all sound of the first
seconds that encoding hears, to arrays; all pictures up to the last one that encoding looks at, and those it looks at
to arrays of RGB in their own size. It scales, resamples, measures and writes nothing. Both sides have one thread in
each process, run in the same number of processes started in the same way, over the same shards, in turns. A ratio is
the median over the rounds, of the time that passed (wall) and of what the processes computed (CPU); the first is bound.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from mmaudit.audit.dataset.dataset import DataConfig, Dataset, open_dataset
from mmaudit.audit.dataset.modalities import Modality
from mmaudit.audit.features.encode import EncodeTask, encode_shard
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.media.video import segment_middles
from mmaudit.audit.workers import default_workers, run_tasks

BOUND = 1.3  # times decoding alone
NUM_ROUNDS = 5
MEDIA = MediaConfig()
NUM_CLIPS, SECONDS, SIZE, FRAME_RATE, SAMPLE_RATE = 192, 3, 224, 25, 44_100
FILMS = (  # name, codec, channels, seconds, width, height, clips
    ("10 s, 340 x 256, h264 and aac", "libx264", "stereo", 10, 340, 256, 64),
    ("3 s, 480 x 360, h264 and aac", "libx264", "mono", 3, 480, 360, 96),
    ("beside: 10 s, 340 x 256, mpeg4 and aac", "mpeg4", "stereo", 10, 340, 256, 64),
    ("beside: 1 s, 128 x 96, h264 and aac", "libx264", "mono", 1, 128, 96, 192),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Seconds that passed, and seconds that the processes computed."""

    wall: float
    cpu: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--workers", type=int, default=default_workers())
    arguments = parser.parse_args()
    missed = False
    print(
        "| data | clips | decoding alone, ms a clip: wall, CPU | encoding | ratio of wall | of CPU | bound | load | |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        for data in arguments.data or made_clips(Path(folder)):
            dataset = open_dataset(data, DataConfig(shard_rows=16))
            rounds = race(dataset, num_workers=arguments.workers)
            ratio = float(np.median([encoding.wall / decoding.wall for decoding, encoding in rounds]))
            of_cpu = float(np.median([encoding.cpu / decoding.cpu for decoding, encoding in rounds]))
            bound = None if Path(data).name.startswith("beside") else BOUND
            missed |= bound is not None and ratio > bound
            decoding, encoding = (told([each[side] for each in rounds], dataset.num_rows) for side in (0, 1))
            print(
                f"| {Path(data).name} | {dataset.num_rows} | {decoding} | {encoding} | {ratio:.2f} | {of_cpu:.2f} "
                f"| {bound or '-'} | {os.getloadavg()[0]:.1f} "
                f"| {'-' if bound is None else 'missed' if ratio > bound else 'held'} |",
                flush=True,
            )
    return int(missed)


def told(spent: list[Spent], num_clips: int) -> str:
    """Milliseconds a clip, medians over the rounds: wall, CPU."""
    wall, cpu = (1000 / num_clips * np.median(each) for each in zip(*((s.wall, s.cpu) for s in spent), strict=True))
    return f"{wall:.2f}, {cpu:.2f}"


def race(dataset: Dataset, *, num_workers: int) -> list[tuple[Spent, Spent]]:
    """Decoding alone and encoding, by turns in one run; a round before the others is not counted."""
    bare = replace(dataset, shards=())

    def spent(work: Callable[[EncodeTask], float]) -> Spent:
        with tempfile.TemporaryDirectory() as cache:
            tasks = [EncodeTask(dataset=bare, shard=shard, media=MEDIA, folder=Path(cache)) for shard in dataset.shards]
            start = time.perf_counter()
            cpu = sum(run_tasks(work, tasks, num_workers=num_workers))
            return Spent(wall=time.perf_counter() - start, cpu=cpu)

    return [(spent(decode_task), spent(encode_task)) for _ in range(1 + NUM_ROUNDS)][1:]


def encode_task(task: EncodeTask) -> float:
    """Encode a shard as `mmaudit score` does, and give the seconds computed."""
    start = time.process_time()
    if encode_shard(task) != len(task.dataset.modalities) * task.shard.num_rows:
        raise SystemExit("some vectors were not computed: clips must differ in content")
    return time.process_time() - start


def decode_task(task: EncodeTask) -> float:
    """Decode what a shard's modalities need, each file once, and give the seconds computed."""
    start = time.process_time()
    rows = task.dataset.read(task.shard)
    for column in dict.fromkeys(modality.column for modality in task.dataset.modalities):
        there = [modality for modality in task.dataset.modalities if modality.column == column]
        for cell in rows[column].to_pylist():
            decode_file(task.dataset.load(cell, there[0]), there)
    return time.process_time() - start


def decode_file(data: bytes, modalities: list[Modality]) -> list[Any]:
    """Samples and pictures as arrays."""
    kinds = {modality.kind for modality in modalities}
    if kinds == {"image"}:
        with Image.open(io.BytesIO(data)) as image:
            return [np.asarray(image.convert("RGB"))]
    container: Any
    with av.open(io.BytesIO(data)) as container:
        streams = [*(container.streams.audio[:1] if "audio" in kinds else ())]
        streams += [*(container.streams.video[:1] if "video" in kinds else ())]
        for stream in streams:
            stream.codec_context.thread_count = 1
        return decode_streams(container, streams)


def decode_streams(container: Any, streams: list[Any]) -> list[Any]:
    """Packets come as they lie in the file, those of sound between those of pictures."""
    shown, wanted = 0, set[int]()
    for stream in streams:
        if stream.type == "video":
            seconds = float(stream.duration * stream.time_base)
            wanted = set(segment_middles(round(stream.frames * min(1, MEDIA.max_seconds / seconds)), MEDIA.num_frames))
    arrays, heard = [], 0.0
    for packet in container.demux(*streams):
        if packet.stream.type == "audio" and heard < MEDIA.max_seconds:
            for frame in packet.decode():
                arrays.append(frame.to_ndarray())
                heard += frame.samples / frame.sample_rate
        elif packet.stream.type == "video" and shown <= max(wanted):
            for frame in packet.decode():
                if shown in wanted:  # in one thread: PyAV starts new ones for each frame, which takes longer
                    arrays.append(frame.reformat(format="rgb24", threads=1).to_ndarray())
                shown += 1
    return arrays


def made_clips(folder: Path) -> list[str]:
    """Write films in two codecs with sound, and sounds with pictures: things that move, over noise."""
    rng = np.random.default_rng(0)
    for name, codec, layout, length, width, height, num_clips in FILMS:
        (folder / name).mkdir()
        different = [film(codec, layout, rng=rng, length=length, width=width, height=height) for _ in range(4)]
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


def film(codec: str, layout: str, *, rng: np.random.Generator, length: int, width: int, height: int) -> bytes:
    file = io.BytesIO()
    scene = smooth(rng, height + 600, width + 800).astype(np.int16)
    with av.open(file, "w", format="mp4") as container:
        sight: Any = container.add_stream(codec, rate=FRAME_RATE)
        sight.width, sight.height, sight.pix_fmt = width, height, "yuv420p"
        heard: Any = container.add_stream("aac", rate=SAMPLE_RATE, layout=layout)
        for index in range(length * FRAME_RATE):
            pixels = scene[2 * index : 2 * index + height, 3 * index : 3 * index + width]
            pixels = pixels + rng.integers(-8, 9, pixels.shape, dtype=np.int16)
            picture = np.clip(pixels, 0, 255).astype(np.uint8)
            container.mux(sight.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(sight.encode(None))
        wave_ = np.stack([noise(rng, length) for _ in range(heard.layout.nb_channels)])
        for start in range(0, wave_.shape[1], 1024):
            part = np.ascontiguousarray(wave_[:, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
            frame.rate, frame.pts, frame.time_base = SAMPLE_RATE, start, Fraction(1, SAMPLE_RATE)
            container.mux(heard.encode(frame))
        container.mux(heard.encode(None))
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
