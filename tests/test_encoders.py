"""Encoders: one for every kind, vectors are used unchanged, and problems are returned with a reason."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.dataset.modalities import KINDS, Modality
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.errors import ConfigError, DatasetError, Reason, UnusableError
from mmaudit.audit.features import encoders
from mmaudit.audit.features.cached_matrix import FeatureMatrix
from mmaudit.audit.features.descriptors import video_statistics
from mmaudit.audit.features.encode import encode_dataset, read_arrow
from mmaudit.audit.features.encoded_samples import read_status
from mmaudit.audit.features.encoders import (
    ENCODERS,
    RESNET18,
    STATISTICS,
    call_function,
    check_encoder,
    encode_cell,
    encoder_location,
    input_shape,
    load_function,
    preprocessing,
)
from mmaudit.audit.features.vectors import EncodedCell, EncodedRows, encode_vectors
from mmaudit.audit.hashing import digest
from mmaudit.audit.media.audio import decode_audio, network_spectrogram
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.media.pictures import decode_folders, decode_frames, decode_image
from mmaudit.audit.workers import no_progress
from mmaudit.cli.main import app

pytestmark = pytest.mark.usefixtures("quick_scores")

MEDIA = MediaConfig()
TYPES = [pa.list_(pa.float32()), pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.int64())]
ROWS = [[1.0, 2.0, 3.0], None, [1.0, 2.0], [], [4.0, None, 6.0], [7.0, 8.0, 9.0]]


def vectors(length: int) -> Modality:
    return Modality(name="v", column="col", kind="features", length=length)


def vector_of(encoded: EncodedCell | UnusableError) -> NDArray[Any]:
    assert isinstance(encoded, EncodedCell)
    return encoded.vector


def rows_of(encoded: EncodedRows) -> list[list[float] | None]:
    ends = np.cumsum(encoded.lengths)[:-1]
    vectors = iter([part.tolist() for part in np.split(encoded.values, ends)])
    return [next(vectors) if usable else None for usable in encoded.usable]


def test_every_kind_has_an_encoder() -> None:
    assert {*STATISTICS, "features"} == set(KINDS)


@pytest.mark.parametrize("type_", TYPES)
def test_vectors_are_unchanged_and_checked_by_row(type_: pa.DataType) -> None:
    array = pa.array(ROWS, type_)
    for column in (pa.chunked_array([array]), pa.chunked_array([array.slice(0, 2), array.slice(2)])):
        encoded = encode_vectors(column, vectors(3))
        assert rows_of(encoded) == [[1, 2, 3]] + [None] * 4 + [[7, 8, 9]]
        assert encoded.values.dtype == np.float32
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
    vector = vector_of(encode_cell("one two one", text, MEDIA))
    assert len(vector) == 3
    assert len(np.unique(vector)) == 2
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
    monkeypatch.setattr(encoders, "STATISTICS", changed)
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
    vector = vector_of(encode_cell(loaded[kind], modality, media))
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
    vector = vector_of(encode_cell((pictures,), frames, MEDIA))
    np.testing.assert_array_equal(vector, video_statistics(decode_folders((pictures,), MEDIA), MEDIA))
    reversed_vector = vector_of(encode_cell((pictures[::-1],), frames, MEDIA))
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


SMALL = MediaConfig(image_size=8)
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
    decoded = decode(loaded, SMALL)  # type: ignore[operator]
    check_encoder(modality(f"{module}:shape", kind))
    vector = vector_of(encode_cell(loaded, modality(f"{module}:shape", kind), SMALL))
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
        preprocessing(modality("sys:exit"), SMALL)


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
        call_function(name, load_function(name), np.zeros((2, 2, 3)), SMALL)


def test_sample_on_which_function_fails_is_unusable(module: str) -> None:
    with pytest.raises(UnusableError, match=rf"{module}:fails raised KeyError: 'gone'") as failed:
        call_function(f"{module}:fails", load_function(f"{module}:fails"), np.zeros(2), SMALL)
    assert failed.value.reason is Reason.FAILED
    with pytest.raises(UnusableError, match=r"2 of the 3 numbers of .*:infinite are not finite") as not_finite:
        call_function(f"{module}:infinite", load_function(f"{module}:infinite"), np.zeros(2), SMALL)
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
            encode_dataset(dataset, tmp_path / "cache", media=SMALL, num_workers=0, progress=no_progress),
            dataset.modalities[1],
            ids,
        )


def test_source_of_function_is_part_of_fingerprint(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}_other.py").write_text(SOURCE + "\n")
    first, changed = (preprocessing(modality(f"{name}:mean"), SMALL) for name in (module, f"{module}_other"))
    assert len({first, changed, preprocessing(modality(f"{module}:shape"), SMALL)}) == 3


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
    tasks = encode_dataset(dataset, tmp_path / "cache", media=SMALL, num_workers=0, progress=no_progress)
    status = read_status(tasks, dataset.modalities[1], read_samples(dataset, seed=0, test_fraction=0.5).sample_id)
    matrix = FeatureMatrix.of(tasks, status, np.arange(24)).read(np.arange(24))
    picture = decode_image((clip_source / "5.png").read_bytes(), SMALL)
    np.testing.assert_allclose(matrix[5], picture.mean(axis=0).ravel()[:3], rtol=1e-6)
    assert read_arrow(tasks[0].file(dataset.modalities[1])).num_rows == 8


def test_guide_states_the_signature_of_functions() -> None:
    guide = (Path(__file__).resolve().parents[1] / "docs" / "howto" / "encoders.md").read_text(encoding="utf-8")
    (signature,) = re.findall(r"`function\((.*)\) -> \(d,\)`", guide)
    assert signature.split(", ") == list(inspect.signature(call_function).parameters)[2:]


PLUGIN = """
import numpy as np
from mmaudit.audit.features.encoders import Encoder

def loudness(wave, media):
    return [np.abs(wave).mean(), np.abs(wave).max()]

def length(text, media):
    return [len(text)]

LOUDNESS = {"audio": Encoder(encode=loudness), "text": Encoder(encode=length, version=2)}
WRONG = [loudness]
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An installed package with the encoder `loudness` for audio and text, and one that is no dictionary."""
    folder = tmp_path / "site"
    info = folder / "loud-1.5.dist-info"
    info.mkdir(parents=True)
    (folder / "loud.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[mmaudit.encoders]\nloudness = loud:LOUDNESS\nwrong = loud:WRONG\n")
    monkeypatch.syspath_prepend(str(folder))
    yield "loudness"
    sys.modules.pop("loud", None)
    encoders.load_installed.cache_clear()


def test_installed_encoder_is_imported_only_when_it_is_named(plugin: str, clip_source: Path, tmp_path: Path) -> None:
    words = ["score", str(clip_source), "--repeats", "1", "--num-workers", "0", "--set", "probe.folds=2"]
    assert CliRunner().invoke(app, [*words, "--run", str(tmp_path / "one")]).exit_code == 0
    assert encoder_location(plugin) == str((tmp_path / "site" / "loud.py").resolve())
    assert "loud" not in sys.modules
    result = CliRunner().invoke(app, [*words, "--run", str(tmp_path / "two"), "--encoder", f"audio={plugin}"])
    assert result.exit_code == 0, result.output
    assert "loud" in sys.modules
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["code"] == {plugin: encoder_location(plugin), "statistics": None}
    assert record["modalities"][0]["encoder"] == plugin


def test_version_of_an_installed_encoder_is_part_of_the_fingerprint(plugin: str, tmp_path: Path) -> None:
    audio = Modality(name="a", column="c", kind="audio", encoder=plugin)
    fingerprints = {preprocessing(audio, MEDIA)}
    assert preprocessing(audio, MEDIA) in fingerprints
    changes = (("loud.py", "version=2", "version=3"), ("loud-1.5.dist-info/METADATA", "1.5", "1.6"))
    for name, old, new in changes:
        path = tmp_path / "site" / name
        path.write_text(path.read_text().replace(old, new))
        encoders.load_installed.cache_clear()
        fingerprints.add(preprocessing(audio, MEDIA))
    assert len(fingerprints) == 3


def test_installed_encoder_reads_its_kinds_only(plugin: str) -> None:
    with pytest.raises(ConfigError, match=r"--encoder m=loudness: it does not read image; available: audio, text"):
        check_encoder(Modality(name="m", column="c", kind="image", encoder=plugin))
    with pytest.raises(ConfigError, match="loud:WRONG must be a dictionary of an Encoder for each kind that it reads"):
        check_encoder(Modality(name="m", column="c", kind="audio", encoder="wrong"))
    with pytest.raises(ConfigError, match=r"no such encoder; did you mean loudness\?"):
        check_encoder(Modality(name="m", column="c", kind="audio", encoder="loudnes"))


def test_every_encoder_keeps_the_contract(
    plugin: str, loaded: dict[str, Any], clip_source: Path, film: Callable[[bool], bytes], tmp_path: Path
) -> None:
    """Vectors of one length, float32 (uint8: pixels of a network) and finite; the same twice, and for any workers."""
    folder = tmp_path / "data"
    rows = [f"{n}.wav,{n}.png,{n}.mp4,{n}_frames,a word and {n},{n % 2}" for n in range(4)]
    for n in range(4):
        (folder / f"{n}_frames").mkdir(parents=True)
        for name in (f"{n}.png", f"{n}.wav"):
            shutil.copy(clip_source / name, folder / name)
        shutil.copy(clip_source / f"{n}.png", folder / f"{n}_frames")
        (folder / f"{n}.mp4").write_bytes(film(True))
    (folder / "metadata.csv").write_text("\n".join(["audio,image,video,frames,text,label", *rows]) + "\n")
    media = MediaConfig(network_size=16)
    for name in (*ENCODERS, plugin):
        kinds = ENCODERS.load(name)
        assert set(kinds) <= set(KINDS)
        modalities = [Modality(name=kind, column=kind, kind=kind, encoder=name) for kind in kinds]
        for modality in modalities:
            check_encoder(modality)
            first, second = (vector_of(encode_cell(loaded[modality.kind], modality, media)) for _ in range(2))
            assert first.ndim == 1
            dtypes = {("resnet18", True): np.uint8, ("statistics", False): np.uint32}  # pixels, terms of a text
            is_visual = modality.kind in ("image", "video", "frames")
            expected = np.float32 if modality.kind == "audio" else dtypes.get((name, is_visual), np.float32)
            assert first.dtype == expected
            assert np.isfinite(first).all()
            np.testing.assert_array_equal(first, second)
        config = DataConfig(
            modality=tuple(f"{kind}={kind}:{kind}" for kind in kinds),
            encoder=tuple(f"{kind}={name}" for kind in kinds),
            shard_rows=2,
        )
        dataset = open_dataset(folder, config)
        files = []
        for workers in (0, 2):
            cache = tmp_path / f"{name}-{workers}"
            encode_dataset(dataset, cache, media=media, num_workers=workers, progress=no_progress)
            files.append({path.relative_to(cache): path.read_bytes() for path in sorted(cache.rglob("*.arrow"))})
        assert files[0] == files[1]
        assert len(files[0]) == 2 * len(kinds)
