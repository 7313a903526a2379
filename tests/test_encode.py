"""Encoding into the cache: nothing is encoded twice, changes are detected, and files are complete."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.dataset.dataset import DataConfig, Dataset, open_dataset
from mmaudit.audit.dataset.modalities import Modality
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.errors import DatasetError, Reason, UnusableError
from mmaudit.audit.features import encode, encoders
from mmaudit.audit.features.cached_matrix import FeatureMatrix
from mmaudit.audit.features.encode import (
    CachedVectors,
    EncodeTask,
    content_of,
    encode_dataset,
    encoded_table,
    load_cell_content,
    read_arrow,
    write_arrow,
)
from mmaudit.audit.features.encoded_samples import lengths_of, problems_of, read_status
from mmaudit.audit.features.vectors import (
    EncodedCell,
    EncodeResult,
    combine_results,
    count_terms,
    encode_vectors,
    project_terms,
    text_terms,
)
from mmaudit.audit.hashing import digest
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress

MEDIA = MediaConfig(image_size=16)
VECTORS = Modality(name="v", column="v", kind="features", encoder="e")
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
    return [FeatureMatrix.of(tasks, status, rows).read(np.arange(len(rows))) for status in statuses]


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
    encode_dataset(
        dataset, tmp_path / "two", media=MEDIA, num_workers=2, progress=lambda *step, detail="": steps.append(step)
    )
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
    np.testing.assert_array_equal(FeatureMatrix.of(tasks, status, rows).read(np.arange(4)), matrix[rows])


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
    matrix = FeatureMatrix.of(tasks, status, np.array([0, 4])).read(np.arange(2))
    np.testing.assert_array_equal(matrix, np.array([[1, 2], [0, 0]], dtype=np.float32))
    before = tasks[0].file(dataset.modalities[0]).stat().st_ino
    encode_all(dataset, tmp_path / "cache")
    assert tasks[0].file(dataset.modalities[0]).stat().st_ino == before  # not written again


def test_problems_of_vectors_in_files_are_reported_by_row(tmp_path: Path) -> None:
    arrays = {"0": [1.0, 2.0], "1": [np.nan, 1.0], "2": [1.0], "3": [0.0, 0.0]}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", np.array(array))
    names = [*(f"{name}.npy" for name in arrays), "none.npy", None]
    rows = pa.table({"id": list("abcdef"), "label": [0] * 6, "u": names, "v": [[1.0]] * 6})
    pq.write_table(rows, tmp_path / "d.parquet")
    dataset = open_dataset(tmp_path / "d.parquet")
    assert dataset.modalities[0].length == 2
    tasks = encode_all(dataset, tmp_path / "cache")
    status = read_status(tasks, dataset.modalities[0], read_ids(dataset))
    assert list(status.problem) == [
        (1, Reason.NOT_FINITE, "1 of 2 numbers are not finite"),
        (2, Reason.WRONG_LENGTH, "1 numbers; most rows have 2"),
        (4, Reason.MISSING, "no file none.npy"),
        (5, Reason.MISSING, "u is null"),
    ]
    matrix = FeatureMatrix.of(tasks, status, np.array([0, 3])).read(np.arange(2))
    np.testing.assert_array_equal(matrix, np.array([[1, 2], [0, 0]], dtype=np.float32))
    assert num_computed(dataset, tmp_path / "cache") == 0
    np.save(tmp_path / "3.npy", np.ones(2))
    assert num_computed(dataset, tmp_path / "cache") == 1


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
    terms = [text_terms(text, MEDIA) for text in texts if text != "..."]
    counts = count_terms(np.concatenate(terms), np.array([len(row) for row in terms]))
    np.testing.assert_array_equal(matrix_of_all, project_terms(counts, MEDIA.text_buckets))


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


def write_sources(folder: Path, clips: Path) -> dict[str, Path]:
    """Write the same four samples of images and one more modality in every form of a source."""
    names = [f"{number}.png" for number in range(4)]
    media = {name: (clips / name).read_bytes() for name in names}
    for path in (folder / "files", folder / "frames" / "one", folder / "frames" / "two"):
        path.mkdir(parents=True)
    for name in names:
        (folder / "files" / name).write_bytes(media[name])
        (folder / "frames" / ("one" if name < "2" else "two") / name).write_bytes(media[name])
    table = "file_name,text,label\n" + "".join(f"{name},word {n},{n % 2}\n" for n, name in enumerate(names))
    (folder / "files" / "metadata.csv").write_text(table)
    (folder / "frames" / "metadata.csv").write_text("a_frames,text,label\none,a word,0\ntwo,words,1\n")
    columns = {"label": [0, 1, 0, 1], "v": pa.array([[1.0, n] for n in range(4)], pa.list_(pa.float32(), 2))}
    bytes_ = pa.table({**columns, "image": [media[name] for name in names]})
    pq.write_table(bytes_, folder / "rows.parquet", row_group_size=2)
    structs = [{"bytes": None, "path": f"files/{name}"} for name in names]
    type_ = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({**columns, "image": pa.array(structs, type_)}), folder / "paths.parquet")
    with tarfile.open(folder / "x.tar", "w") as file:
        for number, name in enumerate(names):
            for member, data in (("png", media[name]), ("txt", b"a word"), ("cls", b"%d" % (number % 2))):
                header = tarfile.TarInfo(f"{number}.{member}")
                header.size = len(data)
                file.addfile(header, io.BytesIO(data))
    return {"files": folder / "files", "frames": folder / "frames"} | {
        name: folder / name for name in ("rows.parquet", "paths.parquet", "x.tar")
    }


@pytest.mark.parametrize("form", ["files", "frames", "rows.parquet", "paths.parquet", "x.tar"])
def test_unchanged_source_is_not_read_again(
    form: str, clip_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was touched is hashed, and its new times are recorded; its vectors are kept."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    source = write_sources(data, clip_source)[form]
    dataset = open_dataset(source, DataConfig(shard_rows=2))
    expected = matrices(dataset, encode_all(dataset, cache))
    before = files(cache)
    read: list[str] = []

    def record(dataset: Dataset, modality: Modality, value: Any) -> Any:
        if modality.kind != "text":
            read.append(modality.name)
        return load_cell_content(dataset, modality, value)

    def record_vectors(cells: Any, modality: Modality) -> Any:
        read.append(modality.name)
        return encode_vectors(cells, modality)

    monkeypatch.setattr(encode, "load_cell_content", record)
    monkeypatch.setattr(encode, "encode_vectors", record_vectors)

    def num_read(*, trust_unchanged: bool = True) -> int:
        read.clear()
        tasks = encode_dataset(
            dataset, cache, media=MEDIA, num_workers=0, progress=no_progress, trust_unchanged=trust_unchanged
        )
        for matrix, original in zip(matrices(dataset, tasks), expected, strict=True):
            np.testing.assert_array_equal(matrix, original)
        return len(read)

    assert num_read() == 0
    assert files(cache) == before
    touched = {"files": source / "0.png", "frames": source / "one" / "0.png", "paths.parquet": data / "files" / "0.png"}
    os.utime(touched.get(form, source), ns=(0, 0))
    assert num_read() == {"files": 1, "frames": 1, "paths.parquet": 1, "rows.parquet": 6, "x.tar": 4}[form]
    assert files(cache) != before
    assert num_read() == 0
    assert num_read(trust_unchanged=False) > 1


def test_rewritten_file_is_encoded_again(clips: Path, tmp_path: Path) -> None:
    """A rewritten file of the same size and modification time has another time of status change."""
    dataset, cache = open_dataset(clips, SHARDS), tmp_path / "cache"
    encode_all(dataset, cache)
    path = clips / "3.wav"
    status, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-2] + bytes(2))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    tasks = encode_dataset(dataset, cache, media=MEDIA, num_workers=0, progress=no_progress, trust_unchanged=True)
    rows = np.concatenate([read_arrow(task.file(dataset.modalities[0]))["content"].to_pylist() for task in tasks])
    assert rows[3] == digest(path.read_bytes()).encode()


def test_path_outside_the_folder_is_rejected_when_unchanged(clips: Path, tmp_path: Path) -> None:
    (clips / "0.wav").rename(tmp_path / "0.wav")
    metadata = clips / "metadata.csv"
    metadata.write_text(metadata.read_text().replace(",0.wav,", ",../0.wav,"))
    allowed, cache = open_dataset(clips, DataConfig(allow_outside=True)), tmp_path / "cache"
    encode_all(allowed, cache)
    with pytest.raises(DatasetError, match=r"'\.\./0\.wav' leads outside"):
        encode_dataset(
            open_dataset(clips), cache, media=MEDIA, num_workers=0, progress=no_progress, trust_unchanged=True
        )


def digests(count: int) -> list[bytes]:
    return [digest(str(row).encode()).encode() for row in range(count)]


def results_of(usable: list[bool], dtype: type) -> list[EncodeResult]:
    return [
        EncodedCell(vector=np.arange(row, row + 3, dtype=dtype), fingerprint=bytes([row]) if row % 2 else b"")
        if is_usable
        else UnusableError(Reason.EMPTY, f"row {row}")
        for row, is_usable in enumerate(usable)
    ]


@settings(max_examples=examples(30))
@given(usable=st.lists(st.booleans(), max_size=9), dtype=st.sampled_from([np.float32, np.uint8]))
def test_written_results_are_read_back(
    usable: list[bool], dtype: type, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cache") / "0.arrow"
    results, content = results_of(usable, dtype), digests(len(usable))
    ids = [f"s{row}" for row in range(len(usable))]
    encoded = combine_results(content, results, modality=VECTORS)
    stamps = [None if row % 3 == 2 else f"stamp {row}" for row in range(len(usable))]
    write_arrow(encoded_table(ids, stamps, encoded), path)
    table = read_arrow(path)
    assert content_of(table).tolist() == content
    assert table["vector"].type == pa.large_list(pa.from_numpy_dtype(encoded.values.dtype))
    assert [row for row, _, _ in problems_of(table)] == [row for row, is_usable in enumerate(usable) if not is_usable]
    assert lengths_of(table) == ({3} if any(usable) else set())
    cached = CachedVectors.of(path)
    for key, expected in zip(content, results, strict=True):
        cached_result = cached.result(key)
        if isinstance(expected, UnusableError):
            assert isinstance(cached_result, UnusableError)
            assert (cached_result.reason, cached_result.detail) == (expected.reason, expected.detail)
        else:
            assert isinstance(cached_result, EncodedCell)
            assert cached_result.vector.dtype == dtype
            assert cached_result.fingerprint == expected.fingerprint
            np.testing.assert_array_equal(cached_result.vector, expected.vector)
    assert b"0" * 32 not in cached.row
    assert cached.content_of_stamp == {stamp: key for stamp, key in zip(stamps, content, strict=True) if stamp}
    assert cached.is_current(ids, stamps, encoded.content)
    if ids:
        assert not cached.is_current([*ids[1:], "other"], stamps, encoded.content)
        assert not cached.is_current(ids, [*stamps[1:], "other"], encoded.content)
        assert not cached.is_current(ids, stamps, np.array([*content[1:], b"0" * 32], dtype="S32"))
        assert not cached.is_current(ids[1:], stamps[1:], encoded.content[1:])


def test_missing_or_damaged_file_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "0.arrow"
    assert CachedVectors.of(path).row == {}
    path.write_bytes(b"ARROW1 damaged")
    assert not CachedVectors.of(path).is_current([], [], np.zeros(0, "S32"))


def test_vectors_of_different_lengths_are_rejected() -> None:
    cells = [EncodedCell(vector=np.zeros(size, np.float32)) for size in (3, 2)]
    with pytest.raises(DatasetError, match="v: e returns vectors of 2 and of 3 numbers; vectors of a mod"):
        combine_results(digests(2), cells, modality=VECTORS)
