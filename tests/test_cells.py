"""Cells: frames, lists of pictures, vectors, texts and samples of sound; other media are tested in test_dataset.py."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy
from numpy.typing import NDArray

from mmaudit.audit.dataset.cells import CellLoader, check_files, load_cell
from mmaudit.audit.dataset.modalities import Modality
from mmaudit.audit.errors import DatasetError, Reason, UnusableError
from mmaudit.audit.media.audio import decode_audio, decode_native
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.media.media_file import MAX_ARRAY_BYTES

FLOW = Modality(name="flow", column="flow_frames", kind="frames")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for path in (
        "data/u/a/9.jpg",
        "data/u/a/10.jpg",
        "data/u/a/._9.jpg",
        "data/u/a/note.txt",
        "data/v/a/0.PNG",
        "out/0.png",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.removeprefix("data/").encode())
    (tmp_path / "data" / "empty").mkdir()
    (tmp_path / "data" / "out").symlink_to(tmp_path / "out")
    (tmp_path / "data" / "mixed").mkdir()
    (tmp_path / "data" / "mixed" / "0.png").symlink_to(tmp_path / "out" / "0.png")
    return tmp_path / "data"


def load(cell: object, root: Path, *, allow_outside: bool = False) -> object:
    return load_cell(cell, FLOW, root=root, allow_outside=allow_outside)


def test_frames_of_a_folder_are_sorted_naturally(root: Path) -> None:
    assert load("u/a", root) == ((b"u/a/9.jpg", b"u/a/10.jpg"),)
    assert load(["u/a", "v/a/"], root) == ((b"u/a/9.jpg", b"u/a/10.jpg"), (b"v/a/0.PNG",))


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (None, Reason.MISSING),
        ([], Reason.MISSING),
        (["u/a", None], Reason.MISSING),
        ("none", Reason.MISSING),
        (["u/a", "v/none"], Reason.MISSING),
        ("u/a/9.jpg", Reason.MISSING),
        ("empty", Reason.EMPTY),
        (["u/a", "empty"], Reason.EMPTY),
        ("nul\0", Reason.MISSING),
    ],
)
def test_missing_folders_are_unusable_with_reason(root: Path, cell: object, reason: Reason) -> None:
    with pytest.raises(UnusableError) as caught:
        load(cell, root)
    assert caught.value.reason is reason


@pytest.mark.parametrize("cell", ["../out", "out", "mixed", ["u/a", "../out"]])
def test_folders_and_images_outside_the_root_are_rejected(root: Path, cell: object) -> None:
    with pytest.raises(DatasetError, match="leads outside"):
        load(cell, root)
    allowed = load(cell, root, allow_outside=True)
    assert isinstance(allowed, tuple)
    assert allowed[-1] == (b"out/0.png",)


def test_struct_without_bytes_and_path_is_missing(root: Path) -> None:
    sound = Modality(name="a", column="a", kind="audio")
    with pytest.raises(UnusableError, match="neither bytes nor a path"):
        load_cell({"bytes": None, "path": None}, sound, root=root, allow_outside=False)


def test_folders_of_images_are_recognised(root: Path) -> None:
    holds_pictures = check_files(root, allow_outside=False).holds_pictures
    folders = ["u/a", "v/a", "empty", "none", "u/a/9.jpg", "out", "..", "nul\0"]
    assert [folder for folder in folders if holds_pictures(folder)] == ["u/a", "v/a"]


def modality(kind: str, *, in_files: bool = False) -> Modality:
    return Modality(name="x", column="x", kind=kind, in_files=in_files)


def loader(kind: str, root: Path, *, in_files: bool = False) -> CellLoader:
    return CellLoader(modality=modality(kind, in_files=in_files), root=root, allow_outside=False)


@pytest.mark.parametrize(
    ("array", "vector"),
    [
        (np.arange(3), [0, 1, 2]),
        (np.array([[0.5, 1.5]]), [0.5, 1.5]),
        (np.asfortranarray([[1.0, 2.0], [3.0, 4.0]]), [1, 2, 3, 4]),
        (np.array([True, False]), [1, 0]),
        (np.array(2.0, dtype=">f2"), [2]),
    ],
)
def test_arrays_of_files_are_vectors(tmp_path: Path, array: NDArray[Any], vector: list[float]) -> None:
    np.save(tmp_path / "a.npy", array)
    loaded = loader("features", tmp_path).load("a.npy")
    assert (loaded.dtype, loaded.tolist()) == (np.float32, vector)
    assert check_files(tmp_path, allow_outside=False).array_shape("a.npy") == array.shape


def large_header() -> bytes:
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (None, Reason.MISSING, "no file a.npy"),
        (b"", Reason.CORRUPT, "cannot be read as .npy"),
        (b"\x93NUMPY\1\0\4\0what", Reason.CORRUPT, "cannot be read as .npy"),
        (large_header(), Reason.CORRUPT, "its header states 4,398,046,511,104 bytes"),
        (np.array([{}], dtype=object), Reason.CORRUPT, "its header states objects"),
        (np.array(["a"]), Reason.CORRUPT, "holds <U1, not numbers"),
        (np.array([1j]), Reason.CORRUPT, "holds complex128, not numbers"),
        (np.zeros(MAX_ARRAY_BYTES // 4, np.float32), Reason.TOO_LARGE, "the maximum is 67,108,864"),
    ],
)
def test_files_that_are_no_vectors_are_unusable_with_reason(
    tmp_path: Path, data: bytes | NDArray[Any] | None, reason: Reason, words: str
) -> None:
    if isinstance(data, bytes):
        (tmp_path / "a.npy").write_bytes(data)
    elif data is not None:
        np.save(tmp_path / "a.npy", data, allow_pickle=True)
    with pytest.raises(UnusableError) as caught:
        loader("features", tmp_path).load("a.npy")
    assert caught.value.reason is reason
    assert words in caught.value.detail


@pytest.mark.parametrize("kind", ["features", "text", "image"])
@pytest.mark.parametrize("cell", ["../out.npy", "/etc/hostname", "http://x.y/a.npy"])
def test_paths_of_every_kind_stay_inside_the_root(tmp_path: Path, kind: str, cell: str) -> None:
    with pytest.raises(DatasetError, match="leads outside"):
        loader(kind, tmp_path, in_files=True).load(cell)
    assert check_files(tmp_path, allow_outside=False).array_shape(cell) is None


def test_nothing_of_an_array_file_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "opened"),)

    np.save(tmp_path / "a.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("a.npy", "b.npy"):
        with pytest.raises(UnusableError):
            loader("features", tmp_path).load(name)
        assert check_files(tmp_path, allow_outside=False).array_shape(name) is None
    assert not (tmp_path / "opened").exists()


def test_words_of_text_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffzwei Wörter\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"na\xefve")
    assert loader("text", tmp_path, in_files=True).load("a.txt") == "zwei Wörter\n"
    assert loader("text", tmp_path).load("a.txt") == "a.txt"
    for name, words in (("b.txt", "b.txt: byte 3 is not UTF-8"), ("c.txt", "no file c.txt")):
        with pytest.raises(UnusableError, match=words):
            loader("text", tmp_path, in_files=True).load(name)


def test_lists_of_pictures_are_one_picture_or_frames(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(bytes([number]))
    names = [f"{number}.png" for number in (2, 0, 1)]
    structs = [{"bytes": None, "path": names[0]}, {"bytes": b"\0", "path": "?"}, {"bytes": b"\1", "path": None}]
    lists: list[Any] = [names, structs, [b"\2", b"\0", b"\1"]]
    for cell in lists:
        assert loader("image", tmp_path).load(cell) == b"\2"
        assert loader("frames", tmp_path).load(cell) == ((b"\2", b"\0", b"\1"),)
    for no_picture in ([], [None, "0.png"]):
        with pytest.raises(UnusableError) as caught:
            loader("image", tmp_path).load(no_picture)
        assert caught.value.reason is Reason.MISSING
    with pytest.raises(UnusableError, match=r"x\[1\] is null"):
        loader("frames", tmp_path).load(["0.png", None])


def test_stamps_follow_the_files_that_a_cell_is_loaded_from(tmp_path: Path) -> None:
    for name in ("a.npy", "a.txt", "0.png", "1.png", "2.png"):
        (tmp_path / name).write_bytes(b"1")
    cells: list[tuple[str, Any, str]] = [("features", "a.npy", "a.npy"), ("text", "a.txt", "a.txt")]
    cells += [("image", ["0.png", "1.png"], "0.png"), ("frames", ["2.png", "1.png"], "1.png")]
    for kind, cell, file in cells:
        load = loader(kind, tmp_path, in_files=True)
        before = load.stamp(cell, "source")
        assert before not in (None, "source")
        (tmp_path / file).write_bytes(b"22")
        assert load.stamp(cell, "source") not in (before, None)
        (tmp_path / file).unlink()
        assert load.stamp(cell, "source") is None
    assert loader("text", tmp_path).stamp("a.txt", "source") == "source"
    assert loader("image", tmp_path).stamp([{"bytes": b"1", "path": "0.png"}], "source") == "source"
    assert loader("audio", tmp_path).stamp({"array": [0.5], "path": "1.wav", "sampling_rate": 8}, "source") == "source"


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        ([0.5, -0.25] * 800, [0.5, -0.25]),
        ([[0.5, -0.25] * 800, [0.0, 0.25] * 800], [0.25, 0.0]),
        ([16_384, -8_192] * 800, [0.5, -0.25]),
        ([1 << 30, -(1 << 29)] * 800, [0.5, -0.25]),
    ],
)
def test_samples_with_a_rate_are_sound(tmp_path: Path, array: list[Any], expected: list[float]) -> None:
    cell = {"array": array, "path": "1.wav", "sampling_rate": 16_000}
    data = loader("audio", tmp_path).load(cell)
    wave, rate = decode_native(data, MediaConfig())
    assert (rate, len(wave)) == (16_000, 1_600)
    np.testing.assert_allclose(wave[:2], expected, atol=1e-4)
    assert decode_audio(data, MediaConfig()).shape == (1_600,)


@pytest.mark.parametrize(
    ("cell", "reason", "words"),
    [
        ({"array": [], "sampling_rate": 8_000}, Reason.EMPTY, "shape (0,)"),
        ({"array": [0.5], "sampling_rate": None}, Reason.CORRUPT, "the sampling rate is None"),
        ({"array": [0.5], "sampling_rate": -1}, Reason.CORRUPT, "the sampling rate is -1"),
        ({"array": [[0.5], [0.5, 1.0]], "sampling_rate": 8_000}, Reason.CORRUPT, "its rows differ"),
        ({"array": None, "path": None, "sampling_rate": 8_000}, Reason.MISSING, "neither bytes nor a path"),
    ],
)
def test_samples_that_are_no_sound_are_unusable(
    tmp_path: Path, cell: dict[str, Any], reason: Reason, words: str
) -> None:
    with pytest.raises(UnusableError) as caught:
        loader("audio", tmp_path).load(cell)
    assert caught.value.reason is reason
    assert words in caught.value.detail


def test_samples_that_are_null_or_infinite_are_not_finite(tmp_path: Path) -> None:
    data = loader("audio", tmp_path).load({"array": [0.5, None, 0.1] * 500, "sampling_rate": 8_000})
    with pytest.raises(UnusableError) as caught:
        decode_audio(data, MediaConfig())
    assert caught.value.reason is Reason.NOT_FINITE
