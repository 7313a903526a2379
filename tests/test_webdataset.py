"""Tests of WebDataset tars: they are read back, keys are unique, and missing media are named."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import examples
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.errors import ConfigError, DatasetError, ManifestError
from mmaudit.audit.storage import PROVENANCE_KEY
from mmaudit.rebalance import webdataset
from mmaudit.rebalance.export import export_manifest as write_export
from mmaudit.rebalance.manifest import COLUMNS
from mmaudit.rebalance.webdataset import webdataset_key

NUMBER = 24
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)
odd_names = st.one_of(
    names, st.sampled_from(["a.b", "a/b.wav", "ä,ö", 'q"uo"te', "li\nne", "re\rturn", "..", "%2E", " x "])
)
many_names = st.lists(odd_names, min_size=2, max_size=6, unique=True)
relaxed = settings(
    deadline=None, max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MODALITIES = [
    {"name": "audio", "column": "sound_file_name", "kind": "audio"},
    {"name": "visual", "column": "image_file_name", "kind": "image"},
]


def make(folder: Path, ids: list[str] | None = None, *, paths: pa.Table | None = None, **changes: Any) -> Path:
    """Write a manifest of these samples, by default with media folder/data/a/0.wav and folder/data/0.PNG."""
    numbers = np.arange(NUMBER if ids is None else len(ids))
    scores_record = changes.pop("provenance", {"modalities": MODALITIES})
    if paths is None:
        sound, image = [f"a/{number}.wav" for number in numbers], [f"{number}.PNG" for number in numbers]
        paths = pa.table({"sound_file_name": sound, "image_file_name": image})
    columns: dict[str, Any] = {
        "sample_id": ids or [f"s{number}" for number in numbers],
        "label": numbers % 3,
        "label_name": [f"class {number % 3}" for number in numbers],
        "split": [("test", "validation", "train")[min(int(number) % 5, 2)] for number in numbers],
        "rank": numbers,
        "gap": np.random.default_rng(0).random(len(numbers)),
        **changes,
    }
    table = pa.table(
        {name: pa.array(columns.get(name, [None] * len(numbers)), type_) for name, type_ in COLUMNS.items()}
    )
    for name in paths.column_names:
        table = table.append_column(name, paths[name])
    pq.write_table(
        table.replace_schema_metadata({PROVENANCE_KEY: json.dumps({"scores": scores_record})}), folder / "m.parquet"
    )
    return folder / "m.parquet"


def export(manifest: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Export with the media of folder/data."""
    return write_export(manifest, out, **{"root": manifest.parent / "data", **options})


def write_media(folder: Path, n: int = NUMBER) -> None:
    (folder / "data" / "a").mkdir(parents=True)
    for number in range(n):
        (folder / "data" / "a" / f"{number}.wav").write_bytes(b"sound %d" % number)
        (folder / "data" / f"{number}.PNG").write_bytes(b"sight %d" % number)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    write_media(tmp_path)
    return make(tmp_path)


def rows_of(path: Path) -> pa.Table:
    return pq.read_table(path).replace_schema_metadata(None)


def tree(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_tars_are_read_back(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "SAMPLES_PER_TAR", 5)
    out = export(manifest, tmp_path / "tars", format="webdataset")
    assert (out["skipped"], out["left_out"]) == (0, [])
    assert {Path(entry).name for entry in out["files"]} >= {"train-000000.tar", "train-000001.tar", "test-000000.tar"}
    dataset = open_dataset(tmp_path / "tars")
    assert {modality.name: modality.kind for modality in dataset.modalities} == {"audio": "audio", "visual": "image"}
    samples, records = read_samples(dataset, seed=0, test_fraction=0.2), rows_of(manifest).to_pylist()
    assert dict(zip(samples.sample_id, samples.split, strict=True)) == {
        row["sample_id"]: row["split"] for row in records
    }
    assert samples.class_names == ("class 0", "class 1", "class 2")
    media = {}
    for shard in dataset.shards:
        rows = dataset.read(shard)
        for name, row in zip(dataset.sample_ids(rows, shard), rows.to_pylist(), strict=True):
            media[name] = tuple(row[modality.column] for modality in dataset.modalities)
    numbers = {row["sample_id"]: int(row["sample_id"][1:]) for row in records}
    assert media == {name: (b"sound %d" % entry, b"sight %d" % entry) for name, entry in numbers.items()}


def test_tar_headers_are_independent_of_the_machine(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset, "SAMPLES_PER_TAR", 5)
    out = export(manifest, tmp_path / "tars", format="webdataset")
    num_members = 0
    for path in out["files"]:
        with tarfile.open(path) as archive:
            assert 0 < len(archive.getnames()) <= 3 * 5
            for member in archive:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                num_members += 1
    assert num_members == 3 * NUMBER


@relaxed
@given(many_names)
def test_any_ids_have_keys_and_are_in_the_json(tmp_path: Path, ids: list[str]) -> None:
    if not (tmp_path / "data").exists():
        write_media(tmp_path, 6)
    manifest = make(tmp_path, ids)
    export(manifest, tmp_path / "tars", format="webdataset", overwrite=True)
    dataset = open_dataset(tmp_path / "tars")
    samples = read_samples(dataset, seed=0, test_fraction=0.2)
    assert sorted(samples.sample_id) == sorted(ids)
    row_of_id = {row["sample_id"]: row for row in rows_of(manifest).to_pylist()}
    for path in (tmp_path / "tars").glob("*.tar"):
        with tarfile.open(path) as archive:
            files = [archive.extractfile(member) for member in archive if member.name.endswith(".json")]
            texts = [json.loads(file.read()) for file in files if file is not None]
        for content in texts:
            row = row_of_id.pop(content["sample_id"])
            paths = content.pop("files")
            assert paths == {name: row.pop(name) for name in list(row) if name.endswith("_file_name")}
            assert set(content) == {name for name, value in row.items() if value is not None}
            assert np.float32(content["gap"]) == np.float32(row["gap"])
    assert not row_of_id


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=300), st.text(st.characters(exclude_categories=["Cs"]))
)
def test_keys_are_file_names_and_unique(first: str, second: str) -> None:
    key = webdataset_key(first)
    assert 0 < len(key) <= 180
    assert not set(key) & set("./\\ \n\0")
    assert key.isascii()
    if len(key) < 140 and first:
        assert unquote(key) == first
    assume(first != second)
    assert key != webdataset_key(second)
    assert webdataset_key("x" * 300 + first) != webdataset_key("x" * 300 + second)


def test_missing_media_are_named(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "a" / "7.wav").unlink()
    with pytest.raises(ManifestError, match=r"sample 's7': sound_file_name 'a/7\.wav' cannot be read in .*--data"):
        export(manifest, tmp_path / "tars", format="webdataset")
    assert not (tmp_path / "tars").exists()
    out = export(manifest, tmp_path / "tars", format="webdataset", skip_missing=True)
    assert (out["skipped"], out["rows"]) == (1, NUMBER)
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(ManifestError, match=r"cannot be read in .*data .*pass --data if the data moved"):
        export(manifest, tmp_path / "again", format="webdataset")
    moved = export(manifest, tmp_path / "again", format="webdataset", root=tmp_path / "moved", skip_missing=True)
    assert tree(tmp_path / "again") == tree(tmp_path / "tars")
    assert moved["skipped"] == 1


def test_media_folder_is_never_taken_from_the_manifest(tmp_path: Path) -> None:
    write_media(tmp_path)
    manifest = make(tmp_path, provenance={"source": str(tmp_path / "data"), "modalities": MODALITIES})
    with pytest.raises(ManifestError, match="the folder of its media is unknown; pass --data"):
        write_export(manifest, tmp_path / "tars", format="webdataset")
    assert not (tmp_path / "tars").exists()


def test_paths_outside_the_folder_raise(tmp_path: Path) -> None:
    write_media(tmp_path)
    (tmp_path / "secret.wav").write_bytes(b"x")
    manifest = make(tmp_path, paths=pa.table({"wav": ["../secret.wav"] * NUMBER}))
    with pytest.raises(DatasetError, match="leads outside"):
        export(manifest, tmp_path / "tars", format="webdataset")
    (tmp_path / "data" / "link.wav").symlink_to(tmp_path / "secret.wav")
    outside = {"scores": {"config": {"data": {"allow_outside": True}}}}
    for path in ("link.wav", str(tmp_path / "secret.wav"), "a/../../secret.wav"):
        manifest = make(tmp_path, paths=pa.table({"wav": [path] * NUMBER}), provenance=outside)
        with pytest.raises(DatasetError, match="leads outside"):
            export(manifest, tmp_path / "tars", format="webdataset")
    assert not (tmp_path / "tars").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"paths": pa.table({})}, ConfigError, "has no path columns: its media are vectors, texts or bytes"),
        ({"split": ["a/b"] * NUMBER}, ConfigError, "split 'a/b' is not usable in file names"),
    ],
)
def test_content_that_tars_cannot_hold_raises(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    write_media(tmp_path)
    with pytest.raises(error, match=message):
        export(make(tmp_path, **changes), tmp_path / "tars", format="webdataset")


def test_frames_raise_and_left_out_columns_are_listed(tmp_path: Path) -> None:
    write_media(tmp_path)
    audio = {"name": "audio", "column": "sound_file_name", "kind": "audio"}
    scores_record = {"modalities": [audio, {"name": "t", "column": "text", "kind": "text"}]}
    out = export(make(tmp_path, provenance=scores_record), tmp_path / "tars", format="webdataset")
    assert out["left_out"] == ["text"]
    scores_record["modalities"] = [audio, {"name": "visual", "column": "image_file_name", "kind": "frames"}]
    with pytest.raises(ConfigError, match="image_file_name has folders of frames"):
        export(make(tmp_path, provenance=scores_record), tmp_path / "others", format="webdataset")


def test_media_are_read_from_the_opened_dataset(clips: Path, tmp_path: Path) -> None:
    dataset = open_dataset(clips, DataConfig(id="id"))
    paths = pa.table({name: [f"{n}.{end}" for n in range(24)] for name, end in
                      (("audio_file_name", "wav"), ("image_file_name", "png"))})  # fmt: skip
    manifest = make(tmp_path, paths=paths, provenance={})
    write_export(manifest, tmp_path / "tars", format="webdataset", dataset=dataset)
    exported = open_dataset(tmp_path / "tars")
    assert {(modality.name, modality.kind) for modality in exported.modalities} == {
        ("audio", "audio"),
        ("image", "image"),
    }


@pytest.mark.parametrize("column", ["file_name", "clip_file_name"])
def test_video_of_two_modalities_is_written_once(tmp_path: Path, film: Callable[[bool], bytes], column: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.mp4").write_bytes(film(True))
    kinds = {"audio": "audio", "visual": "video"}
    modalities = [{"name": name, "column": column, "kind": kind} for name, kind in kinds.items()]
    scores_record = {"modalities": modalities}
    manifest = make(tmp_path, paths=pa.table({column: ["x.mp4"] * NUMBER}), provenance=scores_record)
    out = export(manifest, tmp_path / "tars", format="webdataset")
    with tarfile.open(out["files"][0]) as archive:
        assert {name.partition(".")[2] for name in archive.getnames()} in ({"json", "video.mp4"}, {"json", "clip.mp4"})
    assert {modality.name: modality.kind for modality in open_dataset(tmp_path / "tars").modalities} == kinds
