"""Inputs of pretrained models in the cache: the vectors of their rows are those of the frozen models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import SQUARE, transformers

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.dataset.modalities import Modality
from mmaudit.audit.errors import ConfigError, Reason, UnusableError
from mmaudit.audit.features.backbone_inputs import (
    PADDING,
    Backbone,
    input_layout,
    with_backbone_inputs,
)
from mmaudit.audit.features.encode import encode_dataset
from mmaudit.audit.features.encoders import encode_cell, preprocessing
from mmaudit.audit.features.pretrained import model_version
from mmaudit.audit.features.vectors import EncodedCell
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress
from mmaudit.train.backbones import PretrainedEncoder
from mmaudit.train.config import LoraConfig

torch.set_num_threads(1)
MEDIA = MediaConfig(num_frames=3, max_seconds=0.25)  # the duration of the sounds


def modality(models: Path, name: str, kind: str, *, form: str = "hf-inputs") -> Modality:
    return Modality(name="m", column="c", kind=kind, encoder=f"{form}:{models / name}")


def encoded(loaded: Any, source: Modality, media: MediaConfig = MEDIA) -> NDArray[Any]:
    cell = encode_cell(loaded, source, media)
    assert isinstance(cell, EncodedCell), cell
    return cell.vector


def sample_of(kind: str, clip_source: Path, film: Callable[[bool], bytes]) -> Any:
    """Return a loaded cell of a kind."""
    picture = (clip_source / "1.png").read_bytes()
    by_kind: dict[str, Any] = {
        "audio": (clip_source / "1.wav").read_bytes(),
        "image": picture,
        "frames": ((picture,) * 4,),
        "text": "a dog and a bird",
    }
    return film(False) if kind == "video" else by_kind[kind]


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        ("ast", "audio", np.float32),
        ("wav2vec2", "audio", np.float32),
        ("clip", "image", np.uint8),
        ("clip", "frames", np.uint8),
        ("clip", "text", np.float32),
        ("dinov2", "image", np.uint8),
        ("videomae", "video", np.uint8),
        ("bert", "text", np.float32),
    ],
)
def test_features_of_a_row_are_the_frozen_vector(
    models: Path, clip_source: Path, film: Callable[[bool], bytes], name: str, kind: str, dtype: type
) -> None:
    """Pixels take a quarter of the size of normalised ones; a missing or blank row has finite features too."""
    loaded = sample_of(kind, clip_source, film)
    row = encoded(loaded, modality(models, name, kind))
    assert row.dtype == dtype
    backbone = Backbone.of(modality(models, name, kind), MEDIA)
    assert backbone is not None
    assert row.shape == (backbone.layout.num_features,)
    encoder = PretrainedEncoder(backbone, lora=LoraConfig(), dropout=0.5).eval()
    expected = encoded(loaded, modality(models, name, kind, form="hf"))
    with torch.no_grad():
        features = encoder(torch.from_numpy(np.stack([row, row])))
        blank = encoder(torch.full((1, len(row)), torch.nan))
    assert features.shape == (2, encoder.num_features)
    np.testing.assert_allclose(features[0].numpy(), expected, atol=2e-5)
    assert blank.isfinite().all()
    assert not torch.allclose(blank[0], features[0], atol=1e-3)


def test_texts_of_a_batch_do_not_change_each_other(models: Path) -> None:
    source = modality(models, "bert", "text")
    rows = [encoded(text, source) for text in ("cat", "a dog and a bird and")]
    assert [int((row != PADDING).sum()) for row in rows] == [3, 8]  # with [CLS] and [SEP], at most 8
    backbone = Backbone.of(source, MEDIA)
    assert backbone is not None
    encoder = PretrainedEncoder(backbone, lora=LoraConfig(), dropout=0.0).eval()
    both = encoder(torch.from_numpy(np.stack(rows)))
    for row, features in zip(rows, both, strict=True):
        torch.testing.assert_close(encoder(torch.from_numpy(row[None]))[0], features)


def test_waveforms_of_another_duration_are_repeated_or_cut(models: Path, clip_source: Path) -> None:
    loaded, source = (clip_source / "1.wav").read_bytes(), modality(models, "wav2vec2", "audio")
    whole = encoded(loaded, source)
    longer = encoded(loaded, source, replace(MEDIA, max_seconds=0.6))
    assert (len(whole), len(longer)) == (4000, 9600)
    np.testing.assert_allclose(longer[:4000], longer[4000:8000], atol=1e-6)  # the normalised first sound twice
    assert len(encoded(loaded, source, replace(MEDIA, max_seconds=0.2))) == 3200


def test_unusable_samples_have_the_reason_of_the_frozen_model(models: Path) -> None:
    for name, kind, loaded in (("bert", "text", "..."), ("clip", "image", b"no picture")):
        errors = [encode_cell(loaded, modality(models, name, kind, form=form), MEDIA) for form in ("hf", "hf-inputs")]
        assert all(isinstance(error, UnusableError) for error in errors)
        assert len({str(error) for error in errors}) == 1
    assert isinstance(errors[0], UnusableError)
    assert errors[0].reason is not Reason.EMPTY


def test_pictures_of_several_sizes_are_refused(models: Path, clip_source: Path, tmp_path: Path) -> None:
    """Without a crop the model's input has the proportions of the picture."""
    transformers.AutoModel.from_pretrained(models / "clip").save_pretrained(tmp_path / "clip")
    transformers.CLIPImageProcessor(**SQUARE, do_center_crop=False).save_pretrained(tmp_path / "clip")
    with pytest.raises(ConfigError, match="reads pictures of several sizes: only models of one size are trained"):
        encode_cell((clip_source / "1.png").read_bytes(), modality(tmp_path, "clip", "image"), MEDIA)


def test_pixels_that_no_normalisation_restores_stay_normalised(models: Path, tmp_path: Path) -> None:
    transformers.AutoModel.from_pretrained(models / "clip").save_pretrained(tmp_path / "clip")
    transformers.CLIPImageProcessor(**SQUARE, do_rescale=False).save_pretrained(tmp_path / "clip")
    layout = input_layout(str(tmp_path / "clip"), "image", MEDIA)
    assert layout.scale is None
    assert input_layout(str(models / "clip"), "image", MEDIA).scale == pytest.approx(1 / 255)


def test_inputs_have_a_cache_of_their_own(models: Path, clips: Path) -> None:
    encoders = (f"audio=hf:{models / 'ast'}", f"image=hf:{models / 'clip'}")
    dataset = open_dataset(clips, DataConfig(encoder=encoders))
    trained = with_backbone_inputs(dataset, ["image"])
    assert [source.encoder.partition(":")[0] for source in trained.modalities] == ["hf", "hf-inputs"]
    versions = [[preprocessing(source, MEDIA) for source in data.modalities] for data in (dataset, trained)]
    assert versions[0][0] == versions[1][0]
    assert versions[0][1] != versions[1][1]
    folder = clips / "features"
    written = set()
    for _ in range(2):  # the second time nothing is written
        (task,) = encode_dataset(trained, folder, media=MEDIA, num_workers=0, progress=no_progress)
        written.add(task.file(trained.modalities[1]).stat().st_mtime_ns)
    assert len(written) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["visual"], r"finetune.end_to_end: no modality visual; the modalities are audio, image"),
        (["audio"], r"audio is encoded by statistics, and only models hf:MODEL are trained end to end this way; pass"),
    ],
)
def test_modalities_without_a_model_are_refused(clips: Path, names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_backbone_inputs(open_dataset(clips, DataConfig()), names)


def test_a_moved_model_is_the_same_and_another_is_not(models: Path) -> None:
    layout = input_layout(str(models / "clip"), "image", MEDIA)
    version = model_version(str(models / "clip"))
    here = Backbone(model=str(models / "clip"), kind="image", version=version, layout=layout)
    assert here.same_but_place(replace(here, model="elsewhere/clip"))
    assert not here.same_but_place(replace(here, version="1 other"))
    assert not here.same_but_place(replace(here, layout=replace(layout, shape=(3, 16, 16))))
