"""User-defined encoders: import, call with the decoded sample, and checks of the result."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.dataset.modalities import Modality
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.errors import ConfigError, DatasetError, Reason, UnusableError
from mmaudit.audit.features.encode import encode_dataset, read_arrow
from mmaudit.audit.features.encoded_samples import read_status
from mmaudit.audit.features.encoders import call_function, check_encoder, encode_cell, load_function, preprocessing
from mmaudit.audit.features.matrix import FeatureMatrix
from mmaudit.audit.media.decode import decode_audio, decode_folders, decode_frames, decode_image
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress

MEDIA = MediaConfig(image_size=8)
SOURCE = """
import numpy as np

NOT_CALLABLE = 1

def shape(decoded, media):
    return [media.image_size, *np.shape(decoded), len(decoded)]

def mean(decoded, media):
    return np.asarray(decoded, dtype=float).mean(axis=0).ravel()[:3]

def many(decoded, media):
    return np.zeros(3 + int(decoded[0, 0, 0]) % 2)

def matrix(decoded, media):
    return np.zeros((2, 3))

def number(decoded, media):
    return 3.0

def words(decoded, media):
    return "words"

def infinite(decoded, media):
    return [1.0, float("inf"), float("nan")]

def fails(decoded, media):
    raise KeyError("gone")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module in the current folder, with a unique name per test: Python caches imports by name."""
    name = f"encoder_of_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    return name


def modality(encoder: str, kind: str = "image") -> Modality:
    return Modality(name="m", column="c", kind=kind, encoder=encoder)


@pytest.mark.parametrize("kind", ["audio", "image", "video", "frames", "text"])
def test_function_receives_decoded_sample(module: str, clip_source: Path, film: Any, kind: str) -> None:
    picture = (clip_source / "0.png").read_bytes()
    loaded, decode = {
        "audio": ((clip_source / "0.wav").read_bytes(), decode_audio),
        "image": (picture, decode_image),
        "video": (film(True), decode_frames),
        "frames": (((picture,),), decode_folders),
        "text": ("some words", lambda text, media: text),
    }[kind]
    decoded = decode(loaded, MEDIA)  # type: ignore[operator]
    check_encoder(modality(f"{module}:shape", kind))
    vector = encode_cell(loaded, modality(f"{module}:shape", kind), MEDIA)
    assert isinstance(vector, np.ndarray)
    assert vector.tolist() == [8, *np.shape(decoded), len(decoded)]
    assert vector.dtype == np.float32


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("men", r"has no function 'men'; did you mean mean\? \(available: shape, mean"),
        ("NOT_CALLABLE", r"has no function 'NOT_CALLABLE'"),
    ],
)
def test_missing_function_is_rejected(module: str, function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"--encoder m={module}:{function}: .*{module}\.py {message}"):
        check_encoder(modality(f"{module}:{function}"))


def test_module_that_cannot_be_imported_is_rejected(module: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"module 'no_such' cannot be imported .*; it must be installed, or be in "):
        check_encoder(modality("no_such:f"))
    (tmp_path / f"{module}_broken.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=r"cannot be imported \(ZeroDivisionError: division by zero\)"):
        check_encoder(modality(f"{module}_broken:f"))
    with pytest.raises(ConfigError, match="module 'sys' has no source file"):
        preprocessing(modality("sys:exit"), MEDIA)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("matrix", r"returns an array of shape \(2, 3\): it must return a vector \(d,\)"),
        ("number", r"returns an array of shape \(\): it must return"),
        ("words", r"returns str: it must return a vector \(d,\) of numbers"),
    ],
)
def test_result_that_is_not_a_vector_is_rejected(module: str, function: str, message: str) -> None:
    name = f"{module}:{function}"
    with pytest.raises(ConfigError, match=rf"{name} {message}"):
        call_function(name, load_function(name), np.zeros((2, 2, 3)), MEDIA)


def test_sample_on_which_function_fails_is_unusable(module: str) -> None:
    with pytest.raises(UnusableError, match=rf"{module}:fails raised KeyError: 'gone'") as failed:
        call_function(f"{module}:fails", load_function(f"{module}:fails"), np.zeros(2), MEDIA)
    assert failed.value.reason is Reason.FAILED
    with pytest.raises(UnusableError, match=r"2 of the 3 numbers of .*:infinite are not finite") as not_finite:
        call_function(f"{module}:infinite", load_function(f"{module}:infinite"), np.zeros(2), MEDIA)
    assert not_finite.value.reason is Reason.NOT_FINITE


@pytest.mark.parametrize("shard_rows", [24, 1])
def test_vectors_of_different_lengths_are_rejected(
    module: str, clip_source: Path, tmp_path: Path, shard_rows: int
) -> None:
    dataset = open_dataset(clip_source, DataConfig(encoder=(f"image={module}:many",), shard_rows=shard_rows))
    ids = read_samples(dataset, seed=0, test_fraction=0.5).sample_id
    with pytest.raises(
        DatasetError, match=rf"image: {module}:many returns vectors of 3 and of 4 numbers; vectors of a mod"
    ):
        read_status(
            encode_dataset(dataset, tmp_path / "cache", media=MEDIA, num_workers=0, progress=no_progress),
            dataset.modalities[1],
            ids,
        )


def test_source_of_function_is_part_of_fingerprint(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}_other.py").write_text(SOURCE + "\n")
    first, changed = (preprocessing(modality(f"{name}:mean"), MEDIA) for name in (module, f"{module}_other"))
    assert len({first, changed, preprocessing(modality(f"{module}:shape"), MEDIA)}) == 3


def test_workers_import_function_from_current_folder(module: str, clip_source: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from mmaudit.audit.dataset.dataset import DataConfig, open_dataset\n"
        "from mmaudit.audit.features.encode import encode_dataset\n"
        "from mmaudit.audit.media.files import MediaConfig\n"
        "from mmaudit.audit.workers import no_progress\n"
        "if __name__ == '__main__':\n"
        f"    config = DataConfig(encoder=('image={module}:mean',), shard_rows=8)\n"
        f"    dataset = open_dataset({str(clip_source)!r}, config)\n"
        "    media = MediaConfig(image_size=8)\n"
        "    encode_dataset(dataset, Path('cache'), media=media, num_workers=2, progress=no_progress)\n"
    )
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(program)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, check=True)
    dataset = open_dataset(clip_source, DataConfig(encoder=(f"image={module}:mean",), shard_rows=8))
    tasks = encode_dataset(dataset, tmp_path / "cache", media=MEDIA, num_workers=0, progress=no_progress)
    status = read_status(tasks, dataset.modalities[1], read_samples(dataset, seed=0, test_fraction=0.5).sample_id)
    matrix = FeatureMatrix.of(tasks, status, np.arange(24)).read_all()
    picture = decode_image((clip_source / "5.png").read_bytes(), MEDIA)
    np.testing.assert_allclose(matrix[5], picture.mean(axis=0).ravel()[:3], rtol=1e-6)
    assert read_arrow(tasks[0].file(dataset.modalities[1])).num_rows == 8


def test_readme_states_the_signature_of_functions() -> None:
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    (signature,) = re.findall(r"`function\((.*)\) -> \(d,\)`", readme)
    assert signature.split(", ") == list(inspect.signature(call_function).parameters)[2:]
