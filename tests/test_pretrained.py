"""Pretrained encoders: vectors equal those of the model, independent of batch, cache and order."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as typed
from numpy.typing import NDArray
from PIL import Image

import mmaudit
from mmaudit.audit.dataset.dataset import DataConfig, Dataset, open_dataset
from mmaudit.audit.dataset.modalities import Modality
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.errors import ConfigError, Reason, UnusableError
from mmaudit.audit.features import encode, pretrained
from mmaudit.audit.features.cached_matrix import FeatureMatrix
from mmaudit.audit.features.encode import encode_dataset, read_arrow
from mmaudit.audit.features.encoded_samples import read_status
from mmaudit.audit.features.encoders import check_encoder, encode_cell, preprocessing
from mmaudit.audit.features.pretrained import (
    encode_inputs,
    find_model_folder,
    folder_version,
    model_version,
    open_model,
)
from mmaudit.audit.features.vectors import EncodedCell
from mmaudit.audit.media.audio import decode_audio
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.media.pictures import decode_sized_frames, decode_sized_image
from mmaudit.audit.workers import no_progress

transformers: Any = typed  # incomplete type annotations
MEDIA = MediaConfig(num_frames=4)


KINDS = {
    "ast": ("audio",),
    "wav2vec2": ("audio",),
    "clip": ("image", "video", "frames", "text"),
    "dinov2": ("image", "video", "frames"),
    "classifier": ("image", "video", "frames"),
    "videomae": ("video", "frames"),
    "bert": ("text",),
}
CASES = [(name, kind) for name, kinds in KINDS.items() for kind in kinds]
DIMENSIONS = {"clip": 8}


def modality(models: Path, name: str, kind: str) -> Modality:
    return Modality(name="m", column="c", kind=kind, encoder=f"hf:{models / name}")


@pytest.fixture
def inputs(clip_source: Path, film: Callable[[bool], bytes]) -> dict[str, list[Any]]:
    """Three samples of each kind."""
    pictures = [(clip_source / f"{number}.png").read_bytes() for number in range(9)]
    return {
        "audio": [(clip_source / f"{number}.wav").read_bytes() for number in range(3)],
        "image": pictures[:3],
        "video": [film(False)] * 3,
        "frames": [(tuple(pictures[:4]),), (tuple(pictures[2:8]),), (tuple(pictures[:3]), tuple(pictures[4:7]))],
        "text": ["a dog", "a bird and a cat and a dog and a bird", "cat"],
    }


def vector(models: Path, name: str, kind: str, loaded: Any) -> NDArray[np.float32]:
    encoded = encode_cell(loaded, modality(models, name, kind), MEDIA)
    assert isinstance(encoded, EncodedCell)
    assert encoded.fingerprint == b""
    return encoded.vector


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_vector_is_deterministic_and_independent_of_batch(
    models: Path, inputs: dict[str, list[Any]], name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = np.stack([vector(models, name, kind, loaded) for loaded in inputs[kind]])
    assert alone.shape == (3, DIMENSIONS.get(name, 16))
    assert alone.dtype == np.float32
    assert np.isfinite(alone).all()
    repeated = [vector(models, name, kind, loaded) for loaded in inputs[kind]]
    np.testing.assert_array_equal(alone, repeated)
    model = open_model(str(models / name), kind)
    prepared = list(enumerate(model.prepare(loaded, MEDIA) for loaded in inputs[kind]))
    for max_inputs in (1, 2, 64):
        monkeypatch.setattr(pretrained, "MAX_BATCH_INPUTS", max_inputs)
        rows = dict(encode_inputs(str(models / name), kind, prepared, media=MEDIA, device="cpu"))
        np.testing.assert_array_equal(np.stack([rows[row] for row in range(3)]), alone)


@torch.no_grad()
def test_audio_vectors_equal_direct_forward_pass(models: Path, inputs: dict[str, list[Any]]) -> None:
    wave = decode_audio(inputs["audio"][0], MEDIA)
    for name, pooled in (("ast", True), ("wav2vec2", False)):
        model: Any = transformers.AutoModel.from_pretrained(models / name).eval()
        processor = transformers.AutoFeatureExtractor.from_pretrained(models / name)
        output = model(**processor(wave, sampling_rate=16_000, return_tensors="pt"))
        expected = output.pooler_output if pooled else output.last_hidden_state.mean(1)
        np.testing.assert_allclose(vector(models, name, "audio", inputs["audio"][0]), expected[0], atol=1e-6)


@torch.no_grad()
def test_image_and_video_vectors_equal_direct_forward_pass(models: Path, inputs: dict[str, list[Any]]) -> None:
    picture = Image.fromarray(decode_sized_image(inputs["image"][0], size=None, config=MediaConfig()).pixels)
    frames = {
        count: [
            Image.fromarray(frame)
            for frame in decode_sized_frames(
                inputs["video"][0], num_frames=count, size=None, config=MediaConfig()
            ).pixels
        ]
        for count in (4, 6)
    }
    for name in ("clip", "dinov2", "videomae"):
        model: Any = transformers.AutoModel.from_pretrained(models / name).eval()
        processor = transformers.AutoImageProcessor.from_pretrained(models / name)
        if name == "videomae":
            expected = model(**processor([frames[6]], return_tensors="pt")).last_hidden_state.mean(1)
            np.testing.assert_allclose(vector(models, name, "video", inputs["video"][0]), expected[0], atol=1e-6)
            continue
        forward = model.get_image_features if name == "clip" else model
        for kind, pictures in (("image", [picture]), ("video", frames[4])):
            output = forward(**processor(pictures, return_tensors="pt"))
            pooled = getattr(output, "pooler_output", output)  # a tensor of get_image_features before transformers 5
            np.testing.assert_allclose(vector(models, name, kind, inputs[kind][0]), pooled.mean(0), atol=1e-6)


@torch.no_grad()
def test_text_vectors_equal_direct_forward_pass_and_are_truncated(models: Path) -> None:
    model: Any = transformers.AutoModel.from_pretrained(models / "bert").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "bert")
    expected = model(**tokenizer("a dog and a cat", return_tensors="pt")).pooler_output[0]
    np.testing.assert_allclose(vector(models, "bert", "text", "a dog and a cat"), expected, atol=1e-6)
    long = vector(models, "bert", "text", "a dog and a cat and " * 9)
    np.testing.assert_allclose(long, vector(models, "bert", "text", "a dog and a cat and a bird"), atol=1e-6)


def test_pooler_without_weights_is_not_used(models: Path, inputs: dict[str, list[Any]]) -> None:
    model: Any = transformers.AutoModel.from_pretrained(models / "classifier", add_pooling_layer=False).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(models / "classifier")
    picture = Image.fromarray(decode_sized_image(inputs["image"][0], size=None, config=MediaConfig()).pixels)
    with torch.no_grad():
        expected = model(**processor([picture], return_tensors="pt")).last_hidden_state.mean(1)[0]
    np.testing.assert_allclose(vector(models, "classifier", "image", inputs["image"][0]), expected, atol=1e-6)


def test_unusable_samples_have_a_reason(models: Path, inputs: dict[str, list[Any]]) -> None:
    cases = [("ast", "audio", b""), ("dinov2", "image", b"no picture"), ("clip", "video", inputs["audio"][0])]
    reasons = [encode_cell(loaded, modality(models, name, kind), MEDIA) for name, kind, loaded in cases]
    reasons.append(encode_cell("?!", modality(models, "bert", "text"), MEDIA))
    assert [result.reason if isinstance(result, UnusableError) else None for result in reasons] == [
        Reason.EMPTY,
        Reason.CORRUPT,
        Reason.NO_TRACK,
        Reason.EMPTY,
    ]


def test_media_in_an_unchanged_table_are_not_loaded(
    clip_source: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = [(clip_source / f"{number}.png").read_bytes() for number in range(5)]
    pq.write_table(
        pa.table({"label": [0, 1, 0, 1, 0], "image": media, "text": ["a dog"] * 5}),
        tmp_path / "d.parquet",
        row_group_size=2,
    )
    dataset = open_dataset(tmp_path / "d.parquet", DataConfig(encoder=(f"image=hf:{models / 'dinov2'}",)))
    encode_dataset(dataset, tmp_path / "cache", media=MEDIA, num_workers=0, progress=no_progress)
    before = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.arrow")}
    kinds: list[str] = []
    load = encode.load_cell_content

    def record(dataset: Dataset, modality: Modality, value: Any) -> Any:
        kinds.append(modality.kind)
        return load(dataset, modality, value)

    monkeypatch.setattr(encode, "load_cell_content", record)
    for threads in (0, 2):
        encode_dataset(
            dataset, tmp_path / "cache", media=MEDIA, num_workers=threads, progress=no_progress, trust_unchanged=True
        )
    assert set(kinds) == {"text"}
    assert {path: path.read_bytes() for path in before} == before


def test_vectors_are_cached_by_shard_and_computed_once(
    clips: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (clips / "7.wav").write_bytes(b"no sound")
    encoders = (f"audio=hf:{models / 'wav2vec2'}", f"image=hf:{models / 'dinov2'}")
    dataset = open_dataset(clips, DataConfig(shard_rows=10, encoder=encoders))
    steps: list[tuple[str, int, int]] = []
    tasks_of = {
        threads: encode_dataset(
            dataset,
            tmp_path / str(threads),
            media=MEDIA,
            num_workers=threads,
            progress=no_progress if threads else lambda *step, detail="": steps.append(step),
        )
        for threads in (0, 3)
    }
    assert steps == [("encode", done, 6) for done in range(1, 7)]
    before = {path: path.stat().st_ino for path in (tmp_path / "0").rglob("*.arrow")}
    encode_dataset(dataset, tmp_path / "0", media=MEDIA, num_workers=0, progress=no_progress)
    assert {path: path.stat().st_ino for path in before} == before  # nothing was written again
    ids = read_samples(dataset, seed=0, test_fraction=0.5).sample_id
    for modality_ in dataset.modalities:
        matrices = []
        for tasks in tasks_of.values():
            status = read_status(tasks, modality_, ids)
            assert status.usable.sum() == (23 if modality_.name == "audio" else 24)
            rows = np.flatnonzero(status.usable)
            matrices.append(FeatureMatrix.of(tasks, status, rows).read(np.arange(len(rows))))
        np.testing.assert_array_equal(matrices[0], matrices[1])
        assert matrices[0].shape[1] == 16
    path = tasks_of[0][1].file(dataset.modalities[0])
    path.unlink()
    (clips / "23.wav").write_bytes((clips / "7.png").read_bytes())
    computed: list[int] = []

    def record(*arguments: Any, **options: Any) -> Iterator[Any]:
        for row, encoded in encode_inputs(*arguments, **options):
            computed.append(row)
            yield row, encoded

    monkeypatch.setattr(encode, "encode_inputs", record)
    encode_dataset(dataset, tmp_path / "0", media=MEDIA, num_workers=0, progress=no_progress)
    assert computed == list(range(10))  # a damaged file needs no forward pass
    assert read_arrow(tasks_of[0][2].file(dataset.modalities[0]))["reason"].to_pylist() == [None] * 3 + ["corrupt"]


def test_cached_vectors_do_not_open_the_model(
    clip_source: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(clip_source, DataConfig(encoder=(f"image=hf:{models / 'dinov2'}",)))
    encode_dataset(dataset, tmp_path, media=MEDIA, num_workers=0, progress=no_progress)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.arrow")}

    def fail(*_: object) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(pretrained, "_open_model", fail)
    encode_dataset(dataset, tmp_path, media=MEDIA, num_workers=2, progress=no_progress)
    assert len(before) == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.arrow")} == before


def test_weights_and_model_are_part_of_fingerprint(models: Path, tmp_path: Path) -> None:
    versions = [model_version(str(models / name)) for name in KINDS]
    assert len(set(versions)) == len(versions)
    folder = tmp_path / "moved"
    folder.mkdir()
    for file in (models / "dinov2").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert model_version(str(folder)) == model_version(str(models / "dinov2"))
    copied = Modality(name="m", column="c", kind="image", encoder=f"hf:{folder}")
    before = preprocessing(copied, MEDIA)
    assert preprocessing(copied, replace(MEDIA, num_frames=2)) != before
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert preprocessing(copied, MEDIA) != before


@pytest.mark.parametrize(
    ("name", "kind", "reads"),
    [("ast", "image", "audio"), ("dinov2", "text", "image and video and frames"), ("bert", "audio", "text")],
)
def test_model_of_another_kind_is_rejected(models: Path, name: str, kind: str, reads: str) -> None:
    with pytest.raises(ConfigError, match=rf"--encoder m=hf:.*{name} is a model .*reads {reads}, not {kind}"):
        check_encoder(modality(models, name, kind))


def test_folder_without_model_is_rejected(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        check_encoder(modality(tmp_path, "", "image"))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        check_encoder(modality(tmp_path, "", "image"))
    (tmp_path / "config.json").write_bytes((models / "dinov2" / "config.json").read_bytes())
    check_encoder(modality(tmp_path, "", "image"))
    with pytest.raises(ConfigError, match=r"cannot be loaded"):
        open_model(str(tmp_path), "image")


def test_unavailable_model_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"no local folder 'nobody/nothing', and the hub has no such model: "):
        check_encoder(Modality(name="m", column="c", kind="image", encoder="hf:nobody/nothing"))
    with pytest.raises(ConfigError, match=r"no local folder 'a:b', and the hub has no such model: "):
        check_encoder(Modality(name="m", column="c", kind="image", encoder="hf:a:b"))


def test_missing_transformers_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for encoder in ("hf:a/b", "resnet18"):
        with pytest.raises(ConfigError, match=rf'--encoder m={encoder}: .*pip install "mmaudit\[hf\]"'):
            check_encoder(Modality(name="m", column="c", kind="image", encoder=encoder))


def test_missing_weights_are_logged_and_initialised_equally(
    models: Path, inputs: dict[str, list[Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    vectors = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        for file in (models / "dinov2").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        weights = load_file(folder / "model.safetensors")
        del weights["layernorm.weight"], weights["embeddings.patch_embeddings.projection.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with caplog.at_level(logging.WARNING, logger="mmaudit"):
            vectors.append(vector(tmp_path, name, "image", inputs["image"][0]))
        assert ": 2 weights (" in caplog.text
    np.testing.assert_array_equal(vectors[0], vectors[1])


def test_dataset_of_texts_and_vectors_is_encoded(models: Path, tmp_path: Path) -> None:
    texts = ["a dog", "...", "a cat and a bird"]
    pq.write_table(pa.table({"text": texts, "label": [0, 1, 0], "v": [[1.0]] * 3}), tmp_path / "d.parquet")
    dataset = open_dataset(tmp_path / "d.parquet", DataConfig(encoder=(f"text=hf:{models / 'bert'}",)))
    tasks = encode_dataset(dataset, tmp_path / "cache", media=MEDIA, num_workers=1, progress=no_progress)
    status = read_status(tasks, dataset.modalities[0], read_samples(dataset, seed=0, test_fraction=0.5).sample_id)
    assert status.usable.tolist() == [True, False, True]
    matrix = FeatureMatrix.of(tasks, status, np.array([0, 2])).read(np.arange(2))
    expected = [vector(models, "bert", "text", texts[row]) for row in (0, 2)]
    np.testing.assert_allclose(matrix, expected, atol=1e-5)


def test_stage_without_parts_to_encode_does_nothing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"text": [f"word {row}" for row in range(8)], "label": [0, 1] * 4, "v": [[float(row)] for row in range(8)]}
    pq.write_table(pa.table(rows), tmp_path / "d.parquet")
    options: dict[str, Any] = {"encoder": [f"text=hf:{models / 'bert'}"], "num_workers": 0, "stage": "encode"}
    mmaudit.score(tmp_path / "d.parquet", run=tmp_path / "run", **options)
    monkeypatch.setattr(encode, "encode_inputs", None)
    mmaudit.score(tmp_path / "d.parquet", run=tmp_path / "run", **options)
    result = mmaudit.score(tmp_path / "d.parquet", run=tmp_path / "other", shard="5/7", **options)
    assert result.to_dict()["parts"] == []


@pytest.mark.parametrize("weights_name", ["pytorch_model.bin", "model.bin"])
def test_pickled_weights_are_rejected(models: Path, tmp_path: Path, weights_name: str) -> None:
    folder, mark = Path(shutil.copytree(models / "dinov2", tmp_path / "model")), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    (folder / weights_name).write_bytes(f"cbuiltins\nopen\n(V{mark}\nVw\ntR.".encode())  # runs when it is unpickled
    with pytest.raises(ConfigError, match=r"^.*model cannot be loaded: [^\n]*$"):
        open_model(str(folder), "image")
    assert not mark.exists()


@pytest.mark.parametrize("model_type", ["dinov2", "of-others"])
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_code_in_a_model_folder_is_never_run(
    models: Path, tmp_path: Path, model_type: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if transformers asks the user, who answers yes."""
    folder, mark = Path(shutil.copytree(models / "dinov2", tmp_path / "model")), tmp_path / "ran"
    (folder / "hostile_model.py").write_text(f"open({str(mark)!r}, 'w')")
    names = {"AutoConfig": "C", "AutoModel": "M", "AutoImageProcessor": "P", "AutoFeatureExtractor": "F"}
    content = json.loads((folder / file).read_text())
    content["auto_map"] = {name: f"hostile_model.{class_}" for name, class_ in names.items()}
    content |= {"model_type": model_type} if file == "config.json" else {"image_processor_type": "Of" + model_type}
    (folder / file).write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if file == "config.json" and model_type == "dinov2":  # transformers has a built-in class for it
        open_model(str(folder), "image")
    else:
        with pytest.raises(ConfigError, match=r"^[^\n]*cannot be (loaded|read): [^\n]*$"):
            open_model(str(folder), "image")
    assert not mark.exists()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_model(folder: Path, *, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_version_of_a_folder_depends_only_on_content(tmp_path: Path) -> None:
    original, same, changed = (
        write_model(tmp_path / "one"),
        write_model(tmp_path / "same"),
        write_model(tmp_path / "other", weights=b"weightz"),
    )
    (same / "README.md").write_text("no part of the model")
    os.utime(same / "config.json", (0, 0))
    assert folder_version(original) == folder_version(same)
    assert folder_version(original) != folder_version(changed)
    before = folder_version(original)
    (original / "config.json").write_text("{ }")
    assert folder_version(original) != before


def test_version_of_a_hub_model_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "models--owner--name"
    folder = write_model(cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("owner/name", f"owner/name@{COMMIT}", "owner/name@main"):
        for with_weights in (False, True):
            assert find_model_folder(name, with_weights=with_weights) == folder
    assert folder_version(folder) == COMMIT
    with pytest.raises(ConfigError, match="no local folder 'owner/name@v2', and the hub has no such model"):
        find_model_folder("owner/name@v2", with_weights=False)


def test_local_folder_precedes_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert find_model_folder("owner/name", with_weights=True) == Path("owner/name")
    (tmp_path / "owner" / "name" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"folder owner/name has no config\.json"):
        find_model_folder("owner/name", with_weights=True)
