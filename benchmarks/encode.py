"""Time of encoding against decoding alone, as a table; exit code 1 if a bound is missed.

Run with: python benchmarks/encode.py [DATA ..] [--workers N]

Each DATA is a dataset of media. Without any, clips are generated with the length and size of common datasets: 10 s of
340 x 256 in stereo as in VGGSound and AVE, 3 s of 480 x 360 as in CREMA-D; sounds of 3 s with images. The bound is for
these. Reported without a bound are videos in mpeg4, which decodes in half the time of h264, and of 1 s of 128 x 96, as
for lip reading, where opening a file takes longer than decoding it.

Decoding alone opens every file once with PyAV and decodes to the same extent: all sound of the first seconds that
encoding uses, to arrays; all frames up to the last one that encoding uses, and those it uses to RGB arrays in their
original size. It does not scale, resample, measure or write. Both sides have one thread per process, and run in the
same number of processes started in the same way, over the same shards, alternating. A ratio is the median over the
rounds, of wall time and of CPU time of the processes; the bound is on the first.
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
from mmaudit.audit.features.encode import EncodeTask, content_of, encode_dataset, read_arrow
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.media.pictures import segment_middles
from mmaudit.audit.workers import default_workers, no_progress, run_tasks

BOUND = 1.3  # times decoding alone
NUM_ROUNDS = 5
MEDIA = MediaConfig()
NUM_CLIPS, SECONDS, SIZE, FRAME_RATE, SAMPLE_RATE = 192, 3, 224, 25, 44_100
FILMS = (  # name, codec, channels, seconds, width, height, clips
    ("10 s, 340 x 256, h264 and aac", "libx264", "stereo", 10, 340, 256, 64),
    ("3 s, 480 x 360, h264 and aac", "libx264", "mono", 3, 480, 360, 96),
    ("unbounded: 10 s, 340 x 256, mpeg4 and aac", "mpeg4", "stereo", 10, 340, 256, 64),
    ("unbounded: 1 s, 128 x 96, h264 and aac", "libx264", "mono", 1, 128, 96, 192),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Wall time, and CPU time of all processes, in seconds."""

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
        for data in arguments.data or write_data(Path(folder)):
            dataset = open_dataset(data, DataConfig(shard_rows=16))
            rounds = measure(dataset, num_workers=arguments.workers)
            ratio = float(np.median([encoding.wall / decoding.wall for decoding, encoding in rounds]))
            of_cpu = float(np.median([encoding.cpu / decoding.cpu for decoding, encoding in rounds]))
            bound = None if Path(data).name.startswith("unbounded") else BOUND
            missed |= bound is not None and ratio > bound
            decoding, encoding = (format_times([pair[side] for pair in rounds], dataset.num_rows) for side in (0, 1))
            print(
                f"| {Path(data).name} | {dataset.num_rows} | {decoding} | {encoding} | {ratio:.2f} | {of_cpu:.2f} "
                f"| {bound or '-'} | {os.getloadavg()[0]:.1f} "
                f"| {'-' if bound is None else 'missed' if ratio > bound else 'met'} |",
                flush=True,
            )
    return int(missed)


def format_times(times: list[Times], num_clips: int) -> str:
    """Format wall and CPU time in milliseconds per clip, medians over the rounds."""
    wall, cpu = (1000 / num_clips * np.median(values) for values in zip(*((s.wall, s.cpu) for s in times), strict=True))
    return f"{wall:.2f}, {cpu:.2f}"


def measure(dataset: Dataset, *, num_workers: int) -> list[tuple[Times, Times]]:
    """Time decoding alone and encoding, alternating in one run; the first round is a warm-up and not returned."""
    empty_dataset = replace(dataset, shards=())

    def time_tasks(work: Callable[[EncodeTask], float]) -> Times:
        with tempfile.TemporaryDirectory() as cache:
            tasks = [
                EncodeTask(dataset=empty_dataset, shard=shard, media=MEDIA, folder=Path(cache))
                for shard in dataset.shards
            ]
            start = time.perf_counter()
            cpu = sum(run_tasks(work, tasks, num_workers=num_workers))
            return Times(wall=time.perf_counter() - start, cpu=cpu)

    return [(time_tasks(decode_task), time_tasks(encode_task)) for _ in range(1 + NUM_ROUNDS)][1:]


def encode_task(task: EncodeTask) -> float:
    """Encode a shard as `mmaudit score` does; return the CPU seconds."""
    start = time.process_time()
    shard_only = replace(task.dataset, shards=(task.shard,))
    encode_dataset(shard_only, task.folder, media=task.media, num_workers=0, progress=no_progress)
    seconds = time.process_time() - start
    for modality in task.dataset.modalities:
        if len(np.unique(content_of(read_arrow(task.file(modality))))) != task.shard.num_rows:
            raise SystemExit("some vectors were not computed: clips must differ in content")
    return seconds


def decode_task(task: EncodeTask) -> float:
    """Decode the files of a shard's modalities, each once; return the CPU seconds."""
    start = time.process_time()
    rows = task.dataset.read(task.shard)
    for column in dict.fromkeys(modality.column for modality in task.dataset.modalities):
        modalities = [modality for modality in task.dataset.modalities if modality.column == column]
        for cell in rows[column].to_pylist():
            decode_file(task.dataset.load(cell, modalities[0]), modalities)
    return time.process_time() - start


def decode_file(data: bytes, modalities: list[Modality]) -> list[Any]:
    """Decode a file to arrays of samples and frames."""
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
    """Decode streams in file order, in which packets of sound and frames are interleaved."""
    num_frames, frame_numbers = 0, set[int]()
    for stream in streams:
        if stream.type == "video":
            seconds = float(stream.duration * stream.time_base)
            frame_numbers = set(
                segment_middles(round(stream.frames * min(1, MEDIA.max_seconds / seconds)), MEDIA.num_frames)
            )
    arrays, audio_seconds = [], 0.0
    for packet in container.demux(*streams):
        if packet.stream.type == "audio" and audio_seconds < MEDIA.max_seconds:
            for frame in packet.decode():
                arrays.append(frame.to_ndarray())
                audio_seconds += frame.samples / frame.sample_rate
        elif packet.stream.type == "video" and num_frames <= max(frame_numbers):
            for frame in packet.decode():
                if (
                    num_frames in frame_numbers
                ):  # in one thread: PyAV starts new ones for each frame, which takes longer
                    arrays.append(frame.reformat(format="rgb24", threads=1).to_ndarray())
                num_frames += 1
    return arrays


def write_data(folder: Path) -> list[str]:
    """Write videos in two codecs with sound, and sounds with images: moving content over noise."""
    rng = np.random.default_rng(0)
    for name, codec, layout, length, width, height, num_clips in FILMS:
        (folder / name).mkdir()
        different = [write_film(codec, layout, rng=rng, length=length, width=width, height=height) for _ in range(4)]
        files = [f"{index}.mp4" for index in range(num_clips)]
        for index, file in enumerate(files):
            # The trailing box makes the content of every file unique, so that none is deduplicated.
            (folder / name / file).write_bytes(different[index % 4] + padding_box(index))
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


def padding_box(number: int) -> bytes:
    """Return a `free` box, which mp4 allows anywhere and decoders skip."""
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


def write_film(codec: str, layout: str, *, rng: np.random.Generator, length: int, width: int, height: int) -> bytes:
    file = io.BytesIO()
    scene = smooth(rng, height + 600, width + 800).astype(np.int16)
    with av.open(file, "w", format="mp4") as container:
        video_stream: Any = container.add_stream(codec, rate=FRAME_RATE)
        video_stream.width, video_stream.height, video_stream.pix_fmt = width, height, "yuv420p"
        audio_stream: Any = container.add_stream("aac", rate=SAMPLE_RATE, layout=layout)
        for index in range(length * FRAME_RATE):
            pixels = scene[2 * index : 2 * index + height, 3 * index : 3 * index + width]
            pixels = pixels + rng.integers(-8, 9, pixels.shape, dtype=np.int16)
            picture = np.clip(pixels, 0, 255).astype(np.uint8)
            container.mux(video_stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video_stream.encode(None))
        wave_ = np.stack([noise(rng, length) for _ in range(audio_stream.layout.nb_channels)])
        for start in range(0, wave_.shape[1], 1024):
            part = np.ascontiguousarray(wave_[:, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
            frame.rate, frame.pts, frame.time_base = SAMPLE_RATE, start, Fraction(1, SAMPLE_RATE)
            container.mux(audio_stream.encode(frame))
        container.mux(audio_stream.encode(None))
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
