"""Encoding into the cache: nothing is encoded twice, changes are detected, and files are complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from mmaudit.audit.dataset.dataset import DataConfig, Dataset, open_dataset
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.errors import DatasetError, Reason
from mmaudit.audit.features import encode, encoders
from mmaudit.audit.features.descriptors import text_counts
from mmaudit.audit.features.encode import EncodeTask, encode_dataset, read_arrow, write_arrow
from mmaudit.audit.features.encoded_samples import read_status
from mmaudit.audit.features.matrix import FeatureMatrix
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress

MEDIA = MediaConfig(image_size=16)
SHARDS = DataConfig(shard_rows=5)


def read_ids(dataset: Dataset) -> NDArray[np.object_]:
    return read_samples(dataset, seed=0, test_fraction=0.5).sample_id


def encode_all(dataset: Dataset, cache: Path, *, num_workers: int = 0, media: MediaConfig = MEDIA) -> list[EncodeTask]:
    return encode_dataset(dataset, cache, media=media, num_workers=num_workers, progress=no_progress)


def num_computed(dataset: Dataset, cache: Path, media: MediaConfig = MEDIA) -> int:
    """Encode what is missing and return the number of computed vectors."""
    calls = 0
    encode_cell = encoders.encode_cell

    def count(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return encode_cell(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "encode_cell", count)
        encode_all(dataset, cache, media=media)
    return calls


def matrices(dataset: Dataset, tasks: list[EncodeTask]) -> list[NDArray[np.float32]]:
    statuses = [read_status(tasks, modality, read_ids(dataset)) for modality in dataset.modalities]
    rows = np.flatnonzero(np.logical_and.reduce([status.usable for status in statuses]))
    return [FeatureMatrix.of(tasks, status, rows).read_all() for status in statuses]


def files(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def test_second_run_computes_nothing(clip_source: Path, tmp_path: Path) -> None:
    dataset = open_dataset(clip_source, SHARDS)
    assert num_computed(dataset, tmp_path) == 48
    before = files(tmp_path)
    assert len(before) == 10  # five shards of two modalities
    assert num_computed(dataset, tmp_path) == 0
    assert files(tmp_path) == before


def test_only_changed_content_is_computed_again(clips: Path, tmp_path: Path) -> None:
    dataset, cache = open_dataset(clips, SHARDS), tmp_path / "cache"
    before = matrices(dataset, encode_all(dataset, cache))
    shutil.copy(clips / "1.wav", clips / "6.wav")  # of another shard
    assert num_computed(dataset, cache) == 1
    after = matrices(dataset, encode_all(dataset, cache))
    np.testing.assert_array_equal(after[0][6], before[0][1])
    unchanged = np.arange(24) != 6
    np.testing.assert_array_equal(after[0][unchanged], before[0][unchanged])
    np.testing.assert_array_equal(after[1], before[1])


def test_files_are_identified_by_content(clips: Path, tmp_path: Path) -> None:
    """A file that is rewritten unchanged, or renamed within its shard, is not encoded again."""
    dataset, cache = open_dataset(clips, SHARDS), tmp_path / "cache"
    encode_all(dataset, cache)
    (clips / "0.png").write_bytes((clips / "0.png").read_bytes())
    (clips / "0.png").rename(clips / "zero.png")
    metadata = clips / "metadata.csv"
    metadata.write_text(metadata.read_text().replace(",0.png,", ",zero.png,"))
    assert num_computed(open_dataset(clips, SHARDS), cache) == 0


def test_added_row_computes_one_row(clips: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    encode_all(open_dataset(clips), cache)
    shutil.copy(clips / "0.wav", clips / "new.wav")
    (clips / "new.png").write_bytes((clips / "0.png").read_bytes() + b"\0")
    with (clips / "metadata.csv").open("a") as file:
        file.write("new,new.wav,new.png,class-0,speaker-0\n")
    dataset = open_dataset(clips)
    assert num_computed(dataset, cache) == 1  # the audio has known content, the image does not
    assert [len(matrix) for matrix in matrices(dataset, encode_all(dataset, cache))] == [25, 25]


def test_other_preprocessing_uses_another_cache(clip_source: Path, tmp_path: Path) -> None:
    dataset = open_dataset(clip_source)
    assert num_computed(dataset, tmp_path) == 48
    assert num_computed(dataset, tmp_path, MediaConfig(image_size=8)) == 48
    assert num_computed(dataset, tmp_path) == 0
    assert len(list(tmp_path.iterdir())) == 4


def test_workers_write_identical_files(clip_source: Path, tmp_path: Path) -> None:
    dataset = open_dataset(clip_source, DataConfig(shard_rows=12))
    steps: list[tuple[str, int, int]] = []
    encode_dataset(dataset, tmp_path / "two", media=MEDIA, num_workers=2, progress=lambda *step: steps.append(step))
    assert steps == [("encode", 1, 2), ("encode", 2, 2)]
    encode_all(dataset, tmp_path / "none")
    assert files(tmp_path / "two") == files(tmp_path / "none")


def test_interrupted_run_leaves_only_complete_files(
    clip_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(clip_source, SHARDS)
    calls = 0
    encode_cell = encoders.encode_cell

    def interrupt(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 17:
            raise KeyboardInterrupt
        return encode_cell(*arguments)

    monkeypatch.setattr(encode, "encode_cell", interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode_all(dataset, tmp_path / "killed")
    interrupted_files = files(tmp_path / "killed")
    assert len(interrupted_files) == 3
    monkeypatch.undo()
    assert num_computed(dataset, tmp_path / "killed") == 48 - 15
    encode_all(dataset, tmp_path / "whole")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert interrupted_files.items() <= files(tmp_path / "whole").items()


def test_failed_write_leaves_no_file(clip_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError("no space left on device")

    dataset = open_dataset(clip_source)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        encode_all(dataset, tmp_path)
    assert list(tmp_path.rglob("*.arrow")) == []


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_damaged_file_is_written_again(clip_source: Path, tmp_path: Path, fraction: float) -> None:
    dataset = open_dataset(clip_source)
    task = encode_all(dataset, tmp_path)[0]
    path = task.file(dataset.modalities[0])
    path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])
    with pytest.raises(DatasetError, match=r"000000\.arrow is damaged .*: delete it, and it is created again"):
        read_arrow(path)
    assert num_computed(dataset, tmp_path) == 24
    assert num_computed(dataset, tmp_path) == 0


def test_problems_of_media_are_reported_by_row(clips: Path, tmp_path: Path) -> None:
    sound, sight = (clips / "0.wav").read_bytes(), (clips / "0.png").read_bytes()
    (clips / "0.wav").unlink()
    (clips / "1.wav").write_bytes(b"no sound at all")
    (clips / "2.wav").write_bytes(sound[:44] + bytes(len(sound) - 44))
    (clips / "3.wav").write_bytes(b"")
    (clips / "4.wav").write_bytes(sound[: len(sound) // 2])
    (clips / "5.wav").write_bytes(sight)
    (clips / "1.png").write_bytes(sound)
    (clips / "6.png").write_bytes(sight[: len(sight) // 2])
    metadata = clips / "metadata.csv"
    metadata.write_text(metadata.read_text().replace(",7.png,", ",,"))
    dataset = open_dataset(clips, SHARDS)
    tasks = encode_all(dataset, tmp_path)
    audio, image = (read_status(tasks, modality, read_ids(dataset)) for modality in dataset.modalities)
    assert [(row, reason) for row, reason, _ in audio.problem] == [
        (0, Reason.MISSING),
        (1, Reason.CORRUPT),
        (2, Reason.SILENT),
        (3, Reason.EMPTY),
        (4, Reason.TRUNCATED),
        (5, Reason.CORRUPT),
    ]
    assert [(row, reason) for row, reason, _ in image.problem] == [
        (1, Reason.CORRUPT),
        (6, Reason.TRUNCATED),
        (7, Reason.MISSING),
    ]
    assert np.flatnonzero(~audio.usable).tolist() == [0, 1, 2, 3, 4, 5]
    assert [len(matrix) for matrix in matrices(dataset, tasks)] == [16, 16]
    assert num_computed(dataset, tmp_path) == 0  # damaged media are not tried again


def test_matrix_has_requested_rows_in_order(clips: Path, tmp_path: Path) -> None:
    """Unusable rows in between do not shift the vectors."""
    clean = open_dataset(clips, SHARDS)
    matrix = matrices(clean, encode_all(clean, tmp_path / "one"))[0]
    (clips / "4.wav").unlink()
    (clips / "11.wav").unlink()
    dataset = open_dataset(clips, SHARDS)
    tasks = encode_all(dataset, tmp_path / "two")
    status = read_status(tasks, dataset.modalities[0], read_ids(dataset))
    rows = np.array([23, 5, 0, 12])
    np.testing.assert_array_equal(FeatureMatrix.of(tasks, status, rows).read_all(), matrix[rows])


def test_problems_of_vectors_are_reported_by_row(tmp_path: Path) -> None:
    column = pa.array([[1.0, 2.0], [float("nan"), 1.0], None, [1.0], [0.0, 0.0]], pa.list_(pa.float32()))
    pq.write_table(
        pa.table({"label": [0] * 5, "u": column, "v": [[1.0]] * 5}), tmp_path / "d.parquet", row_group_size=2
    )
    dataset = open_dataset(tmp_path / "d.parquet")
    tasks = encode_all(dataset, tmp_path / "cache")
    status = read_status(tasks, dataset.modalities[0], read_ids(dataset))
    assert [(row, reason) for row, reason, _ in status.problem] == [
        (1, Reason.NOT_FINITE),
        (2, Reason.MISSING),
        (3, Reason.WRONG_LENGTH),
    ]
    np.testing.assert_array_equal(
        FeatureMatrix.of(tasks, status, np.array([0, 4])).read_all(), np.array([[1, 2], [0, 0]], dtype=np.float32)
    )
    before = tasks[0].file(dataset.modalities[0]).stat().st_ino
    encode_all(dataset, tmp_path / "cache")
    assert tasks[0].file(dataset.modalities[0]).stat().st_ino == before  # not written again


def test_video_is_encoded_as_audio_and_visual(tmp_path: Path, film: Callable[[bool], bytes]) -> None:
    (tmp_path / "a.mp4").write_bytes(film(True))
    (tmp_path / "b.mp4").write_bytes(film(False))
    (tmp_path / "metadata.csv").write_text("file_name,label\na.mp4,0\nb.mp4,1\n")
    dataset = open_dataset(tmp_path)
    tasks = encode_all(dataset, tmp_path / "cache")
    audio, visual = (read_status(tasks, modality, read_ids(dataset)) for modality in dataset.modalities)
    assert [(row, reason) for row, reason, _ in audio.problem] == [(1, Reason.NO_TRACK)]
    assert visual.usable.all()


def test_vector_does_not_depend_on_other_rows(tmp_path: Path) -> None:
    texts = ["a dog", "a cat", "...", "a dog and a cat", "birds"]
    for name, selected in (("all", texts), ("some", texts[1::2])):
        rows = [{"text": text, "label": 0, "v": [1.0]} for text in selected]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet", row_group_size=2)
    dataset_of_all, dataset_of_some = (open_dataset(tmp_path / f"{name}.parquet") for name in ("all", "some"))
    assert [modality.kind for modality in dataset_of_all.modalities] == ["text", "features"]
    matrix_of_all, _ = matrices(dataset_of_all, encode_all(dataset_of_all, tmp_path / "every"))
    matrix_of_some, _ = matrices(dataset_of_some, encode_all(dataset_of_some, tmp_path / "alone"))
    np.testing.assert_array_equal(matrix_of_all[[1, 2]], matrix_of_some)
    np.testing.assert_array_equal(matrix_of_all, [text_counts(text, MEDIA) for text in texts if text != "..."])


def test_modality_without_usable_sample_is_rejected(clips: Path, tmp_path: Path) -> None:
    for path in clips.glob("*.wav"):
        path.unlink()
    dataset = open_dataset(clips)
    tasks = encode_all(dataset, tmp_path / "cache")
    with pytest.raises(DatasetError, match=r"no sample has a usable audio; the first: missing, no file 0\.wav"):
        read_status(tasks, dataset.modalities[0], read_ids(dataset))


def test_data_changed_after_encoding_are_rejected(clip_source: Path, tmp_path: Path) -> None:
    dataset = open_dataset(clip_source)
    tasks = encode_all(dataset, tmp_path)
    with pytest.raises(DatasetError, match="the data changed while they were read"):
        read_status(tasks, dataset.modalities[0], read_ids(dataset)[::-1])


def test_mapped_file_can_be_replaced(clip_source: Path, tmp_path: Path) -> None:
    dataset = open_dataset(clip_source)
    path = encode_all(dataset, tmp_path)[0].file(dataset.modalities[0])
    before = read_arrow(path)
    write_arrow(before.slice(0, 1), path)
    assert before.num_rows == 24
    assert before["vector"][23].is_valid
    assert read_arrow(path).num_rows == 1
