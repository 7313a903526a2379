"""Datasets: inference of columns and modalities, loading of cells, and paths outside the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmaudit.audit.dataset.columns import Columns
from mmaudit.audit.dataset.dataset import DataConfig, Dataset, open_dataset
from mmaudit.audit.dataset.modalities import Modality
from mmaudit.audit.errors import ConfigError, DatasetError, Reason, RemoteError, UnusableError

CSV = "audio_file_name,image_file_name,label\na.wav,a.png,cat\nb.wav,b.png,dog\n"


def folder(path: Path, text: str = CSV, name: str = "metadata.csv") -> Path:
    path.mkdir(exist_ok=True)
    (path / name).write_text(text, encoding="utf-8")
    return path


def table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def modalities(dataset: Dataset) -> list[str]:
    return [str(modality) for modality in dataset.modalities]


VECTORS = {"u": [[1.0, 2.0]] * 2, "v": [[3.0]] * 2}


def test_folder_of_clips_is_read(clip_source: Path) -> None:
    dataset = open_dataset(clip_source)
    assert dataset.num_rows == 24
    assert modalities(dataset) == ["audio=audio_file_name:audio", "image=image_file_name:image"]
    assert dataset.columns == Columns(id=("id",), label="label", label_name=None, group=None, split=None)
    assert dataset.path_columns == ["audio_file_name", "image_file_name"]
    rows = dataset.read(dataset.shards[0])
    assert rows.column_names == ["id", "audio_file_name", "image_file_name", "label"]
    assert dataset.sample_ids(rows, dataset.shards[0])[:2] == ["000", "001"]
    assert dataset.load("0.wav", dataset.modalities[0]) == (clip_source / "0.wav").read_bytes()
    assert open_dataset(str(clip_source / "metadata.csv")).modalities == dataset.modalities


def test_shards_cover_the_rows(clip_source: Path) -> None:
    dataset = open_dataset(clip_source, DataConfig(shard_rows=10))
    assert [shard.num_rows for shard in dataset.shards] == [10, 10, 4]


def test_roles_are_inferred_or_requested(tmp_path: Path) -> None:
    columns = {"uid": ["a", "b"], "y": [0, 1], "split": ["train"] * 2, "group": ["g", "h"], "speaker": ["s", "t"]}
    data = table(tmp_path / "d.parquet", **columns, **VECTORS)
    assert open_dataset(data).columns == Columns(id=("uid",), label="y", label_name=None, group="group", split="split")
    dataset = open_dataset(data, DataConfig(id="speaker", label="uid", group="speaker", split="none"))
    assert dataset.columns == Columns(id=("speaker",), label="uid", label_name=None, group="speaker", split=None)
    assert open_dataset(data, DataConfig(group="none")).columns.group is None


def test_label_name_column_belongs_to_label_column(tmp_path: Path) -> None:
    data = table(tmp_path / "d.parquet", label=[0, 1], label_name=["cat", "dog"], other=[1, 0], **VECTORS)
    assert open_dataset(data).columns.label_name == "label_name"
    assert open_dataset(data, DataConfig(label="other")).columns.label_name is None
    alone = open_dataset(table(tmp_path / "e.parquet", label_name=["cat", "dog"], **VECTORS)).columns
    assert (alone.label, alone.label_name) == ("label_name", None)


@pytest.mark.parametrize("role", ["id", "label", "group", "split"])
def test_missing_role_column_suggests_the_nearest(tmp_path: Path, role: str) -> None:
    data = folder(tmp_path / "d", CSV.replace("label", "lable"))
    settings: dict[str, Any] = {"label": "lable", role: "labl"}
    config = DataConfig(**settings)
    with pytest.raises(ConfigError, match=rf"--{role} labl: no such column; did you mean lable\?"):
        open_dataset(data, config)


def test_missing_label_column_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no label column among audio_file_name, image_file_name, lable: name it"):
        open_dataset(folder(tmp_path / "d", CSV.replace("label", "lable")))


@pytest.mark.parametrize("text", ["a_file_name,label\na.wav,0\n", "label,age\n0,3\n"])
def test_fewer_than_two_modalities_are_rejected(tmp_path: Path, text: str) -> None:
    with pytest.raises(DatasetError, match="a discrepancy needs two: define them with --modality"):
        open_dataset(folder(tmp_path / "d", text))
    with pytest.raises(DatasetError, match="only one modality, label=label:text"):
        open_dataset(folder(tmp_path / "d", text), DataConfig(modality=("label=label:text",)))


def test_dataset_without_rows_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no rows"):
        open_dataset(folder(tmp_path / "d", CSV.splitlines()[0] + "\n"))
    empty = pa.table({"label": [0], "u": [[1.0]], "v": [[1.0]]}).slice(1)
    pq.write_table(empty, tmp_path / "e.parquet")
    with pytest.raises(DatasetError, match="holds no rows"):
        open_dataset(tmp_path / "e.parquet")


@pytest.mark.parametrize("name", ["label", "audio_file_name"])
def test_repeated_column_name_is_rejected(tmp_path: Path, name: str) -> None:
    text = "\n".join(line + (f",{name}" if index == 0 else ",x") for index, line in enumerate(CSV.splitlines()))
    with pytest.raises(DatasetError, match=f"more than one column is called '{name}'"):
        open_dataset(folder(tmp_path / "d", text + "\n"))


def test_requested_modalities_replace_the_inferred_ones(tmp_path: Path) -> None:
    data = table(tmp_path / "d.parquet", label=[0, 1], w=[[0.5], [0.1]], **VECTORS)
    assert modalities(open_dataset(data)) == ["w=w:features", "u=u:features", "v=v:features"]
    dataset = open_dataset(data, DataConfig(modality=("sight=v", "sound=w:features")))
    assert dataset.modalities == (
        Modality(name="sight", column="v", kind="features", length=1),
        Modality(name="sound", column="w", kind="features", length=1),
    )
    with pytest.raises(ConfigError, match="no column 'z'"):
        open_dataset(data, DataConfig(modality=("a=z", "b=v")))


def test_column_name_with_path_is_rejected(tmp_path: Path) -> None:
    data = table(tmp_path / "d.parquet", label=[0, 1], **{"../../out": [[0.5], [0.1]]}, **VECTORS)
    with pytest.raises(ConfigError, match=r"a modality is called '\.\./\.\./out'"):
        open_dataset(data)


@pytest.mark.parametrize("sound", [True, False])
def test_video_has_audio_modality_only_with_sound(tmp_path: Path, film: Callable[[bool], bytes], sound: bool) -> None:
    data = folder(tmp_path / "d", "file_name,caption,label\na.mp4,one dog,0\nb.mp4,two dogs,1\n")
    (data / "b.mp4").write_bytes(film(sound))  # a.mp4 is missing and is not counted
    expected = ["visual=file_name:video", "caption=caption:text"]
    assert modalities(open_dataset(data)) == (["audio=file_name:audio"] if sound else []) + expected


def test_requested_audio_of_silent_video_is_kept(tmp_path: Path, film: Callable[[bool], bytes]) -> None:
    data = folder(tmp_path / "d", "file_name,label\na.mp4,0\n")
    (data / "a.mp4").write_bytes(film(False))
    dataset = open_dataset(data, DataConfig(modality=("audio=file_name", "visual=file_name")))
    assert modalities(dataset) == ["audio=file_name:audio", "visual=file_name:video"]
    with pytest.raises(DatasetError, match="only one modality, visual=file_name:video"):
        open_dataset(data)


def test_audio_is_kept_if_no_video_can_be_opened(tmp_path: Path) -> None:
    data = folder(tmp_path / "d", "file_name,label\na.mp4,0\n")
    assert modalities(open_dataset(data)) == ["audio=file_name:audio", "visual=file_name:video"]


@pytest.mark.parametrize(
    ("lengths", "expected"), [([2, 3, 3, 3], 3), ([3, 2, 0, 0, 0], 2), ([4, 4, 1, None, None, None], 4), ([5], 5)]
)
def test_vector_length_is_the_most_frequent(tmp_path: Path, lengths: list[int | None], expected: int) -> None:
    varying = pa.array([None if length is None else [0.5] * length for length in lengths], pa.list_(pa.float32()))
    fixed = pa.array([[0.5, 0.5]] * len(lengths), pa.list_(pa.float32(), 2))
    dataset = open_dataset(table(tmp_path / "d.parquet", label=list(range(len(lengths))), odd=varying, fixed=fixed))
    assert [modality.length for modality in dataset.modalities] == [expected, 2]


def test_column_without_any_vector_is_rejected(tmp_path: Path) -> None:
    without_vectors = pa.array([None, []], pa.list_(pa.float32()))
    with pytest.raises(DatasetError, match="column 'odd' holds no vector"):
        open_dataset(table(tmp_path / "d.parquet", label=[0, 1], odd=without_vectors, **VECTORS))


def test_glob_is_one_dataset_and_empty_files_are_skipped(tmp_path: Path) -> None:
    rows_of_dataset = pa.table({"label": list(range(5)), "u": [[float(n)] for n in range(5)], "v": [[1.0]] * 5})
    for number, part in enumerate([rows_of_dataset.slice(0, 0), rows_of_dataset.slice(0, 3), rows_of_dataset.slice(3)]):
        pq.write_table(part, tmp_path / f"{number}.parquet", row_group_size=2)
    dataset = open_dataset(f"{tmp_path}/*.parquet")
    assert dataset.num_rows == 5
    read = [(dataset.sample_ids(rows, shard), rows["u"].to_pylist())
            for shard in dataset.shards for rows in [dataset.read(shard)]]  # fmt: skip
    assert [value for _, values in read for value in values] == [[0.0], [1.0], [2.0], [3.0], [4.0]]
    assert [name for names, _ in read for name in names] == [f"row-{number:09d}" for number in range(5)]


@pytest.mark.parametrize("columns", [{"label": [0, 1], "u": VECTORS["u"]}, {"label": ["x", "y"], **VECTORS}])
def test_files_with_different_columns_are_rejected(tmp_path: Path, columns: dict[str, Any]) -> None:
    table(tmp_path / "0.parquet", label=[0, 1], **VECTORS)
    table(tmp_path / "1.parquet", **columns)
    with pytest.raises(DatasetError, match=r"1\.parquet has different columns from .*0\.parquet"):
        open_dataset(f"{tmp_path}/*.parquet")


def test_damaged_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DatasetError, match=r"d\.parquet cannot be read"):
        open_dataset(tmp_path / "d.parquet")


def test_rows_without_path_have_unique_ids(tmp_path: Path) -> None:
    dataset = open_dataset(folder(tmp_path / "d", CSV + ",c.png,cat\n,d.png,dog\n"))
    shard = dataset.shards[0]
    ids = dataset.sample_ids(dataset.read(shard), shard)
    assert ids == ["a.wav", "b.wav", "row-000000002", "row-000000003"]


def reason_for(dataset: Dataset, cell: object) -> Reason:
    with pytest.raises(UnusableError) as caught:
        dataset.load(cell, dataset.modalities[0])
    return caught.value.reason


@pytest.fixture
def dataset_folder(tmp_path: Path) -> Path:
    """A dataset's folder with a file outside it, and links to that file."""
    data = folder(tmp_path / "data")
    (tmp_path / "secret.wav").write_bytes(b"secret")
    (data / "a.wav").write_bytes(b"mine")
    (data / "deep").mkdir()
    (data / "deep" / "link.wav").symlink_to(tmp_path / "secret.wav")
    (data / "way").symlink_to(tmp_path)
    return data


@pytest.mark.parametrize("inside", ["a.wav", "./a.wav", "deep/../a.wav", "../data/a.wav"])
def test_paths_inside_the_folder_are_read(dataset_folder: Path, inside: str) -> None:
    dataset = open_dataset(dataset_folder)
    assert dataset.load(inside, dataset.modalities[0]) == b"mine"
    assert dataset.load({"bytes": None, "path": inside}, dataset.modalities[0]) == b"mine"
    assert dataset.load(str(dataset_folder / "a.wav"), dataset.modalities[0]) == b"mine"


@pytest.mark.parametrize(
    "outside", ["../secret.wav", "ABSOLUTE", "deep/link.wav", "way/secret.wav", "deep/../../secret.wav"]
)
def test_paths_outside_the_folder_require_allow_outside(dataset_folder: Path, outside: str) -> None:
    name = outside.replace("ABSOLUTE", str(dataset_folder.parent / "secret.wav"))
    dataset = open_dataset(dataset_folder)
    for cell in (name, {"bytes": None, "path": name}):
        with pytest.raises(DatasetError, match=r"leads outside .*make paths relative to the metadata"):
            dataset.load(cell, dataset.modalities[0])
    allowed = open_dataset(dataset_folder, DataConfig(allow_outside=True))
    assert allowed.load(name, allowed.modalities[0]) == b"secret"


@pytest.mark.parametrize("url", ["https://example.org/a.wav", "s3://bucket/a.wav", "other:///a.wav", "file:///a.wav"])
def test_urls_are_not_fetched_unless_allowed(dataset_folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("a request was made")

    monkeypatch.setattr("mmaudit.audit.remote.requests.file_system", fail)
    dataset = open_dataset(dataset_folder)
    with pytest.raises(DatasetError, match="leads outside"):
        dataset.load(url, dataset.modalities[0])
    allowed = open_dataset(dataset_folder, DataConfig(allow_outside=True))
    if url.startswith("file:"):
        assert reason_for(allowed, url) is Reason.MISSING
    else:
        with pytest.raises(RemoteError if url.startswith("other") else AssertionError):
            allowed.load(url, allowed.modalities[0])


@pytest.mark.parametrize("cell", [None, "none.wav", "deep", "a.wav/b.wav", "nul\0.wav", "", "circle.wav"])
def test_missing_files_have_reason_missing(dataset_folder: Path, cell: str | None) -> None:
    (dataset_folder / "circle.wav").symlink_to("circle.wav")
    assert reason_for(open_dataset(dataset_folder), cell) is Reason.MISSING


def test_embedded_bytes_are_loaded(tmp_path: Path) -> None:
    structs = [{"bytes": b"one", "path": "../../x.wav"}, {"bytes": b"", "path": None}]
    data = table(tmp_path / "d.parquet", label=[0, 1], sound=structs, raw=[b"two", None])
    dataset = open_dataset(data, DataConfig(modality=("a=sound:audio", "b=raw:image")))
    assert dataset.path_columns == []
    sound, raw = dataset.modalities
    cells = dataset.read(dataset.shards[0]).to_pydict()
    assert [dataset.load(cell, sound) for cell in cells["sound"]] == [b"one", b""]
    assert dataset.load(cells["raw"][0], raw) == b"two"
    assert reason_for(dataset, cells["raw"][1]) is Reason.MISSING


def test_kind_of_embedded_bytes_is_inferred(tmp_path: Path, clip_source: Path, film: Callable[[bool], bytes]) -> None:
    sound, sight = ([(clip_source / f"{n}.{suffix}").read_bytes() for n in (0, 1)] for suffix in ("wav", "png"))
    structs = [{"bytes": data, "path": None} for data in sight]
    dataset = open_dataset(table(tmp_path / "d.parquet", label=[0, 1], heard=sound, seen=structs))
    assert modalities(dataset) == ["heard=heard:audio", "seen=seen:image"]
    assert "heard" not in dataset.read(dataset.shards[0], modalities=False).column_names
    films = open_dataset(table(tmp_path / "f.parquet", label=[0, 1], clip=[film(True), film(True)]))
    assert modalities(films) == ["audio=clip:audio", "visual=clip:video"]
    combined = open_dataset(table(tmp_path / "g.parquet", label=[0, 1], audio=sound, clip=[film(True), film(True)]))
    assert modalities(combined) == ["audio=audio:audio", "visual=clip:video"]


def test_folders_of_images_are_frames(tmp_path: Path) -> None:
    lines = [
        {"label": n, "seen": f"seen/{n}", "flow_frames": [f"u/{n}", f"v/{n}"], "audio": f"{n}.wav"} for n in (0, 1)
    ]
    data = folder(tmp_path / "d", "".join(json.dumps(line) + "\n" for line in lines), "metadata.jsonl")
    for name in ("seen/0", "seen/1", "u/0", "v/0"):
        (data / name).mkdir(parents=True)
        (data / name / "1.png").write_bytes(name.encode())
    dataset = open_dataset(data)
    assert modalities(dataset) == ["seen=seen:frames", "flow=flow_frames:frames", "audio=audio:audio"]
    rows = dataset.read(dataset.shards[0]).to_pylist()
    assert dataset.load(rows[0]["flow_frames"], dataset.modalities[1]) == ((b"u/0",), (b"v/0",))
    assert dataset.load(rows[1]["seen"], dataset.modalities[0]) == ((b"seen/1",),)
    with pytest.raises(UnusableError, match="no folder u/1"):
        dataset.load(rows[1]["flow_frames"], dataset.modalities[1])


def test_invalid_task_or_classes_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"data\.task is 'multilable'; did you mean multilabel\?"):
        DataConfig(task="multilable")
    with pytest.raises(ConfigError, match=r"data\.classes names 'a' more than once"):
        DataConfig(classes=("a", "b", "a"))


@pytest.mark.parametrize(
    "settings", [{"shard_rows": 0}, {"test_fraction": 0.0}, {"test_fraction": 1.0}, {"test_fraction": float("nan")}]
)
def test_invalid_config_is_rejected(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"data.{next(iter(settings))} is"):
        DataConfig(**settings)


def test_id_of_media_files_stays_a_modality(clips: Path) -> None:
    dataset = open_dataset(clips, DataConfig(id="audio_file_name"))
    assert [modality.column for modality in dataset.modalities] == ["audio_file_name", "image_file_name"]
    rows = dataset.read(dataset.shards[0])
    assert dataset.sample_ids(rows, dataset.shards[0])[0] == "0.wav"


def test_id_that_looks_like_a_path_is_no_modality(tmp_path: Path) -> None:
    data = table(tmp_path / "d.parquet", id=["x/clip_0.wav", "x/clip_1.wav"], label=[0, 1], **VECTORS)
    assert modalities(open_dataset(data)) == [f"{name}={name}:features" for name in VECTORS]
