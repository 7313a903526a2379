"""Tests of the dataset of a manifest for PyTorch: media, cached vectors, workers, and refused metadata."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import gaussian_table
from manifests import encode_manifest, make_manifest
from torch.utils.data import DataLoader

from mmaudit import Manifest
from mmaudit.audit.errors import ConfigError, DatasetError, ManifestError


@pytest.fixture(scope="module")
def clip_manifest(clip_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A manifest of the clips, split by hand; the run is beside it."""
    return encode_manifest(clip_source, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def vector_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "vectors.parquet"
    words = pa.array([f"word{number % 7} word{number % 3}" for number in range(90)])
    pq.write_table(gaussian_table().append_column("caption", words), path)
    return path


@pytest.fixture(scope="module")
def vector_manifest(vector_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return encode_manifest(vector_source, tmp_path_factory.mktemp("run") / "run")


def test_media_are_decoded_as_score_does(clip_manifest: Manifest, clip_source: Path) -> None:
    dataset = clip_manifest.to_torch(data=clip_source, validation_fraction=0)
    train = clip_manifest.strings("split") == "train"
    assert dataset.ids.to_pylist() == clip_manifest.strings("sample_id")[train].tolist()
    sample = dataset[-1]
    assert list(sample) == ["sample_id", "label", "weight", "audio", "image"]
    assert (sample["audio"].shape, sample["audio"].dtype) == ((4000,), torch.float32)
    assert (sample["image"].shape, sample["image"].dtype) == ((64, 64, 3), torch.uint8)
    assert dataset.class_names[sample["label"]] == clip_manifest.strings("label_name")[train][-1]
    assert sample["weight"] == 1.0
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_splits_and_transforms(clip_manifest: Manifest, clip_source: Path) -> None:
    options: dict[str, Any] = {"data": clip_source, "validation_fraction": 0.2}
    parts = [clip_manifest.to_torch(split=name, **options) for name in ("train", "validation", "test")]
    assert sorted(name for part in parts for name in part.ids.to_pylist()) == sorted(clip_manifest.strings("sample_id"))
    assert clip_manifest.to_torch(transform=lambda sample: sample["sample_id"], **options)[0] == parts[0].ids[0].as_py()


def test_workers_read_the_same_samples(vector_manifest: Manifest, vector_source: Path) -> None:
    features = vector_manifest.provenance["features"]
    sources: list[dict[str, Any]] = [{"data": vector_source}, {"features": features}]
    for options in sources:
        dataset = vector_manifest.to_torch(**options, validation_fraction=0)
        dataset[0]  # fills the cache, which is not pickled
        loaders = [DataLoader(dataset, 8, num_workers=workers) for workers in (0, 1)]
        for alone, parallel in zip(*loaders, strict=True):
            assert torch.equal(alone["audio"], parallel["audio"])
            assert alone["sample_id"] == parallel["sample_id"]
        assert len(pickle.dumps(dataset)) < 100_000


def test_vectors_and_texts_come_from_the_cache(vector_manifest: Manifest, vector_source: Path) -> None:
    rows = pq.read_table(vector_source).to_pydict()
    row_of_id = {name: row for row, name in enumerate(rows["id"])}
    decoded = vector_manifest.to_torch(data=vector_source, validation_fraction=0)
    cached = vector_manifest.to_torch(features=vector_manifest.provenance["features"], validation_fraction=0)
    for index in range(len(cached)):
        row = row_of_id[cached[index]["sample_id"]]
        assert cached[index]["audio"].tolist() == decoded[index]["audio"].tolist() == rows["audio"][row]
        assert decoded[index]["caption"] == rows["caption"][row]
        assert cached[index]["caption"].shape == (1024,)
        assert float(cached[index]["caption"].norm()) == pytest.approx(1)
    same = [row_of_id[cached[index]["sample_id"]] % 21 for index in range(len(cached))]
    first, second = (np.flatnonzero(np.array(same) == same[0])[:2]).tolist()
    assert torch.equal(cached[first]["caption"], cached[second]["caption"])


def test_a_missing_modality_is_none_or_nan(tmp_path: Path) -> None:
    table = gaussian_table(num_samples=60, modalities=("audio", "visual", "touch"))
    cells = table["touch"].to_pylist()
    cells[7] = None
    index = table.column_names.index("touch")
    path = tmp_path / "missing.parquet"
    pq.write_table(table.set_column(index, "touch", pa.array(cells, pa.list_(pa.float32()))), path)
    manifest = encode_manifest(path, tmp_path / "run")
    options: dict[str, Any] = {"split": ("train", "test"), "validation_fraction": 0}
    decoded = manifest.to_torch(data=path, **options)
    cached = manifest.to_torch(features=tmp_path / "run" / "features", **options)
    row = decoded.ids.to_pylist().index("s0007")
    assert decoded[row]["touch"] is None
    assert cached[row]["touch"].isnan().all()
    assert cached[row]["touch"].shape == (3,)


def test_damaged_media_name_the_sample(clip_manifest: Manifest, clips: Path) -> None:
    dataset = clip_manifest.to_torch(data=clips, validation_fraction=0)
    name = dataset.ids[0].as_py()
    (clips / f"{int(name)}.wav").write_bytes(b"no sound")
    with pytest.raises(DatasetError, match=f"sample {name}: "):
        dataset[0]


def test_other_data_and_caches_raise(
    clip_manifest: Manifest, vector_manifest: Manifest, vector_source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match="no vectors in"):
        clip_manifest.to_torch(features=tmp_path)
    table = pq.read_table(vector_source)
    pq.write_table(table.slice(0, 40), tmp_path / "part.parquet")
    with pytest.raises(ManifestError, match="samples of the manifest are not in"):
        vector_manifest.to_torch(data=tmp_path / "part.parquet")
    content = pa.array(["f" * 32] * len(vector_manifest))
    index = vector_manifest.table.column_names.index("content")
    changed = replace(vector_manifest, table=vector_manifest.table.set_column(index, "content", content))
    with pytest.raises(ManifestError, match="have changed since the manifest was made"):
        changed.to_torch(features=vector_manifest.provenance["features"])
    both: dict[str, Any] = {"data": vector_source, "features": tmp_path}
    for options in ({}, both):
        with pytest.raises(ConfigError, match="pass either data"):
            vector_manifest.to_torch(**options)


def test_metadata_open_and_import_nothing(vector_manifest: Manifest, vector_source: Path) -> None:
    def with_scores(change: Any) -> Manifest:
        provenance = copy.deepcopy(vector_manifest.provenance)
        change(provenance["scores"])
        return replace(vector_manifest, provenance=provenance)

    features = vector_manifest.provenance["features"]
    outside = with_scores(lambda scores: scores["modalities"][0].update(preprocessing="x/../../elsewhere"))
    with pytest.raises(ManifestError, match="which is not in"):
        outside.to_torch(features=features)
    reader = with_scores(lambda scores: scores["config"]["data"].update(reader="evil"))
    with pytest.raises(ManifestError, match="reader evil of an installed package"):
        reader.to_torch(data=vector_source)
    encoder = with_scores(lambda scores: scores["modalities"][0].update(encoder="no_such_module:f"))
    assert len(encoder.to_torch(data=vector_source))  # decoding needs no encoder
    own_key = with_scores(lambda scores: scores["modalities"][0].update(name="label"))
    with pytest.raises(ManifestError, match="called label"):
        own_key.to_torch(data=vector_source)
    with pytest.raises(ManifestError, match="does not record the modalities"):
        make_manifest().to_torch(data=vector_source)
