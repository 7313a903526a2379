"""Tests of vectors from elsewhere: joined by id, whatever the order and the format; gaps and repeats are named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmaudit.audit.dataset.dataset import DataConfig
from mmaudit.audit.dataset.joined import Joined, join_vectors
from mmaudit.audit.errors import ConfigError, DatasetError

IDS = [f"clip-{number}" for number in range(12)]
MATRIX = np.arange(12 * 3, dtype=np.float32).reshape(12, 3)
ORDER = np.random.default_rng(0).permutation(12)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with labels.csv of twelve clips."""
    lines = [f"{name},{number % 2},actor-{number // 3}" for number, name in enumerate(IDS)]
    (tmp_path / "labels.csv").write_text("\n".join(["clip_id,emotion,actor", *lines]))
    return tmp_path


def join(folder: Path, *files: str, data: str | None = "labels.csv", **options: Any) -> Joined:
    config = DataConfig(**{"label": "emotion", "group": "actor", **options}) if data else DataConfig(**options)
    named = [
        text if "=" not in text else f"{text.partition('=')[0]}={folder / text.partition('=')[2]}" for text in files
    ]
    paths = [text if "=" in text else str(folder / text) for text in named]
    return join_vectors(None if data is None else folder / data, paths, config, folder=folder / "joined")


def vectors(joined: Joined, name: str) -> list[list[float] | None]:
    return list(pq.read_table(joined.path)[name].to_pylist())


def write(path: Path, ids: list[str], matrix: np.ndarray[Any, Any], *, name: str = "mfcc") -> None:
    """Write vectors in the format of the suffix."""
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {"id": np.array(ids), name: matrix}
        np.savez(path, **arrays)
    elif path.suffix == ".npy":
        np.save(path, matrix)
        path.with_suffix(".ids.txt").write_text("\n".join(ids))
    else:
        pq.write_table(pa.table({"id": ids, name: list(matrix)}), path)


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".parquet"])
def test_vectors_are_joined_by_id_and_never_by_position(folder: Path, suffix: str) -> None:
    write(folder / f"mfcc{suffix}", [IDS[row] for row in ORDER], MATRIX[ORDER])
    joined = join(folder, f"mfcc{suffix}")
    assert vectors(joined, "mfcc") == MATRIX.tolist()
    assert pq.read_table(joined.path)["clip_id"].to_pylist() == IDS
    assert joined.modalities[0].num_missing == joined.modalities[0].num_unused == 0


def test_order_of_the_files_rows_does_not_change_the_joined_vectors(folder: Path) -> None:
    write(folder / "a.npz", IDS, MATRIX)
    write(folder / "b.npz", [IDS[row] for row in ORDER], MATRIX[ORDER])
    assert vectors(join(folder, "audio=a.npz"), "audio") == vectors(join(folder, "audio=b.npz"), "audio")


def test_other_vectors_make_another_file_and_the_same_ones_the_same(folder: Path) -> None:
    write(folder / "a.npz", IDS, MATRIX)
    first = join(folder, "audio=a.npz").path
    assert join(folder, "audio=a.npz").path == first
    write(folder / "a.npz", IDS, MATRIX + 1)
    assert join(folder, "audio=a.npz").path != first


def test_missing_and_unused_rows_are_counted_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(folder / "a.npz", [*IDS[2:], "other"], MATRIX[:11])
    with caplog.at_level(logging.WARNING):
        joined = join(folder, "audio=a.npz")
    assert "audio: 2 of 12 samples have no vector in" in caplog.text
    assert "(the first: clip-0)" in caplog.text
    assert "1 of 11 vectors of" in caplog.text
    assert "(the first: other)" in caplog.text
    assert vectors(joined, "audio")[:3] == [None, None, [0.0, 1.0, 2.0]]
    summary = joined.to_dict()["modalities"][0]
    assert (summary["num_rows"], summary["num_missing"], summary["num_unused"]) == (11, 2, 1)


def test_one_file_may_hold_the_labels_and_several_modalities(folder: Path) -> None:
    label = np.arange(12) % 2
    np.savez(folder / "all.npz", id=np.array(IDS), label=label, audio=MATRIX, visual=MATRIX[:, :2])
    joined = join(folder, "all.npz", data=None)
    table = pq.read_table(joined.path)
    assert table["label"].to_pylist() == label.tolist()
    assert [modality.modality for modality in joined.modalities] == ["audio", "visual"]
    assert vectors(joined, "visual") == MATRIX[:, :2].tolist()


def test_integer_ids_are_compared_as_text(folder: Path) -> None:
    (folder / "numbers.csv").write_text("id,label\n" + "\n".join(f"{number},{number % 2}" for number in range(12)))
    np.savez(folder / "a.npz", id=np.arange(12)[ORDER], audio=MATRIX[ORDER])
    assert vectors(join(folder, "a.npz", data="numbers.csv", label="label", group=None), "audio") == MATRIX.tolist()


@pytest.mark.parametrize(
    ("ids", "matrix", "text", "message"),
    [
        ([*IDS[:11], IDS[0]], MATRIX, "audio=a.npz", r"a.npz: 1 ids are repeated \(the first: clip-0\)"),
        ([f"x{name}" for name in IDS], MATRIX, "audio=a.npz", r"no id of .*a.npz is one of .*'xclip-0'.*'clip-0'"),
        (IDS, MATRIX, "audio=b.npz", "there is no file"),
        (IDS, MATRIX, "audio=labels.csv", "vectors are read from .parquet"),
        (IDS, MATRIX, "emotion=a.npz", "the name 'emotion' is taken by another column"),
        (IDS, MATRIX[:5], "audio=a.npz", "its arrays have different numbers of rows"),
    ],
)
def test_faults_are_named(folder: Path, ids: list[str], matrix: np.ndarray[Any, Any], text: str, message: str) -> None:
    write(folder / "a.npz", ids, matrix)
    with pytest.raises(DatasetError, match=message):
        join(folder, text)


def test_files_that_are_no_vectors_are_refused(folder: Path) -> None:
    np.savez(folder / "objects.npz", id=np.array([{}], dtype=object))
    (folder / "text.npz").write_text("no archive")
    np.save(folder / "alone.npy", MATRIX)
    np.savez(folder / "flat.npz", id=np.array(IDS), audio=MATRIX[:, 0])
    for name, message in (
        ("objects.npz", "is not an npz file of arrays"),
        ("text.npz", "is not an npz file of arrays"),
        ("alone.npy", r"alone.npy with alone.ids.txt cannot be read"),
        ("flat.npz", "holds no vectors"),
    ):
        with pytest.raises(DatasetError, match=message):
            join(folder, name)


def test_data_need_ids_and_labels(folder: Path) -> None:
    write(folder / "a.npz", IDS, MATRIX)
    with pytest.raises(DatasetError, match="has no id column to join vectors by"):
        join(folder, "a.npz", id="none")
    with pytest.raises(DatasetError, match="pass the data that hold them, or one file of vectors with labels"):
        join(folder, "a.npz", data=None)
    with pytest.raises(ConfigError, match="--label emotions: no such column"):
        join(folder, "a.npz", label="emotions")
