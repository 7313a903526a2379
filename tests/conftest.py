"""Small data for all tests: clips as wav and png files, Gaussian feature vectors, one short video."""

from __future__ import annotations

import csv
import io
import logging
import os
import shutil
import wave
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from numpy.typing import NDArray
from PIL import Image

# Profile of the option --hypothesis-profile. No deadline: a first call may import torch while other jobs run.
settings.register_profile("quick", deadline=None, max_examples=30)
settings.register_profile("thorough", deadline=None, max_examples=100)


def examples(number: int) -> int:
    """Return how many examples a test draws of which `make test-all` draws another number than 100."""
    return number * settings().max_examples // 100


RATE = 8_000


def pytest_configure(config: pytest.Config) -> None:
    """Make threads sleep while they wait: spinning takes five times as long with another test worker running.

    torch reads the variable when it is imported, so nothing in this file imports torch before.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Else each of the eighty processes that tests start would compile the package again, 0.4 s.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # the process that starts xdist's workers
    import torch

    torch.set_num_threads(1)  # tests run in parallel


@pytest.fixture(autouse=True)
def _same_logging() -> None:
    """Undo what a command of an earlier test or of a module's fixture changed of the logger, which hides the log."""
    logger = logging.getLogger("mmaudit")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder for the tests and the processes that they start, in place of the user's own; a cache too."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("state")
        patch.setenv("XDG_STATE_HOME", str(folder))
        patch.setenv("MMAUDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def unsynced_files() -> Iterator[Callable[[int], None]]:
    """Leave files in the system's cache, which keeps those of a killed process: flushing is a fortieth of all tests.

    Yields os.fsync, for tests of what is flushed.
    """
    flush = os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield flush


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[Callable[[int], int]]:
    """Train networks of tests with one thread: they are so small that two take five times as long.

    Tests of the number of threads ask for `usual_threads`; processes that tests start have those too.
    """
    from mmaudit.audit import workers

    usual = workers._check_limits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "_check_limits", lambda num_threads: min(1, usual(num_threads)))
        yield usual


@pytest.fixture
def usual_threads(one_thread: Callable[[int], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute with as many threads as for users."""
    monkeypatch.setattr("mmaudit.audit.workers._check_limits", one_thread)


@pytest.fixture(scope="session", autouse=True)
def plain_figures() -> Iterator[None]:
    """Build the figures of every report and encode a pixel in place of each: drawing them is half the time of a score.

    Tests that look at the figures ask for `drawn_figures`.
    """
    from mmaudit.cli.report import figures

    pixel = io.BytesIO()
    Image.new("RGB", (1, 1), "white").save(pixel, "png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "png", lambda figure: pixel.getvalue())
        yield


@pytest.fixture
def drawn_figures(plain_figures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the figures of reports, as users have them."""
    from mmaudit.cli.report import drawing, figures

    monkeypatch.setattr(figures, "png", drawing.png)


@pytest.fixture(scope="module")
def no_reports() -> Iterator[None]:
    """Make `score` write empty reports in place of figures, which take most of the time of a small run."""
    from runs import write_empty_report

    from mmaudit.cli import scoring

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_write_report", write_empty_report)
        yield


@pytest.fixture(scope="module")
def quick_scores(no_reports: None) -> Iterator[None]:
    """Make `score` fit the probes of the scores alone, half of the time: none of halves, no controls.

    `make test-all` fits all of them.
    """
    with pytest.MonkeyPatch.context() as patch:
        if examples(100) < 100:
            patch.setenv("MMAUDIT_PROBE_HALVES", "false")
            patch.setenv("MMAUDIT_PROBE_CONTROL", "false")
        yield


@pytest.fixture(scope="session")
def clip_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips of 0.25 s and 16 x 16 pixels, in three classes that pitch and colour both separate; read-only."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(24):
        label = number % 3
        (folder / f"{number}.wav").write_bytes(tone(300 * (label + 1) + 40 * rng.random()))
        (folder / f"{number}.png").write_bytes(picture(label, rng))
        rows.append([f"{number:03d}", f"{number}.wav", f"{number}.png", f"class-{label}", f"speaker-{number // 3}"])
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "audio_file_name", "image_file_name", "label", "speaker"], *rows])
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny pretrained models, each in a folder of its name; read-only."""
    from tiny_models import save_models

    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def clips(clip_source: Path, tmp_path: Path) -> Path:
    """A writable copy of the clips."""
    return Path(shutil.copytree(clip_source, tmp_path / "clips"))


@pytest.fixture(scope="session")
def film() -> Callable[[bool], bytes]:
    """A function that returns an mp4 of ten frames, with or without sound."""
    return make_video


@pytest.fixture
def planted(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the table of `plant` to a Parquet file."""

    def write(name: str = "planted.parquet", **options: Any) -> Path:
        pq.write_table(gaussian_table(**options), tmp_path / name)
        return tmp_path / name

    return write


def gaussian_table(
    *, num_samples: int = 90, num_classes: int = 3, modalities: tuple[str, ...] = ("audio", "visual"), seed: int = 0
) -> pa.Table:
    """Return rows of unit Gaussians around class means, with a random signal strength per sample and modality.

    Columns: id, label, split, and a column of vectors per modality.
    """
    rng = np.random.default_rng(seed)
    label = np.arange(num_samples) % num_classes
    columns = {
        "id": [f"s{number:04d}" for number in range(num_samples)],
        "label": label,
        "split": ["test" if draw < 0.2 else "train" for draw in rng.random(num_samples)],
    }
    for name in modalities:
        clear = 3.0 * rng.random(num_samples)[:, None]
        columns[name] = vectors(clear * np.eye(num_classes)[label] + rng.standard_normal((num_samples, num_classes)))
    return pa.table(columns)


def vectors(matrix: NDArray[np.floating[Any]]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel(), pa.float32()), matrix.shape[1])


def tone(hertz: float) -> bytes:
    samples = 0.5 * np.sin(2 * np.pi * hertz * np.arange(RATE // 4) / RATE)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()


def picture(label: int, rng: np.random.Generator) -> bytes:
    pixels = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
    pixels[:, :, label] += 150
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def make_video(sound: bool) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        video_stream: Any = container.add_stream("mpeg4", rate=10)
        video_stream.width, video_stream.height, video_stream.pix_fmt = 32, 32, "yuv420p"
        audio_stream: Any = container.add_stream("aac", rate=RATE, layout="mono") if sound else None
        for index in range(10):
            pixels = np.zeros((32, 32, 3), dtype=np.uint8)
            pixels[:, 3 * index : 3 * index + 4] = 255
            container.mux(video_stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video_stream.encode(None))
        if audio_stream is not None:
            samples = (0.5 * np.sin(np.arange(RATE // 1024 * 1024) / 3)).astype(np.float32)[None]
            for start in range(0, samples.shape[1], 1024):
                frame = av.AudioFrame.from_ndarray(samples[:, start : start + 1024], format="fltp", layout="mono")
                frame.rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
                container.mux(audio_stream.encode(frame))
            container.mux(audio_stream.encode(None))
    return file.getvalue()
