"""Tests of augmentation: vectors are unchanged, pictures keep their size, masks stay within their share."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from mmaudit.audit.errors import ConfigError
from mmaudit.audit.features.encoders import StoredPictures
from mmaudit.audit.probes.crops import PictureView
from mmaudit.train.augment import InputForm, LocalRows, augment, mask_spectrograms
from mmaudit.train.batches import Batch
from mmaudit.train.config import AugmentConfig

torch.set_num_threads(1)

SHAPES = ((5,), (6, 10), (8, 8, 3), (2, 8, 8, 3))
FORMS = tuple(InputForm(shape=shape) for shape in SHAPES)
CONFIG = AugmentConfig()


def batch_of(size: int = 7) -> Batch:
    torch.manual_seed(0)
    inputs = tuple(torch.randn(size, int(np.prod(shape))) for shape in SHAPES)
    return Batch(
        rows=torch.arange(size),
        inputs=inputs,
        label=torch.zeros(size, dtype=torch.int64),
        present=None,
        loss_weight=torch.full((1 + len(SHAPES), size), 1 / max(1, size)),
        size=size,
    )


def parts(size: int, first: int = 0, total: int | None = None, num_forms: int = len(FORMS)) -> list[LocalRows]:
    total = size if total is None else total
    return [LocalRows(rows=np.arange(first, first + size), first=first, total=total)] * num_forms


def test_pictures_are_cropped_spectrograms_masked_vectors_unchanged() -> None:
    batch = batch_of()
    augmented = augment(batch, FORMS, CONFIG, seed=3, rows=parts(7)).inputs
    assert augmented[0] is batch.inputs[0]
    assert [inputs.shape[1:] for inputs in augmented[1:]] == [(1, 1, 6, 10), (1, 3, 8, 8), (2, 3, 8, 8)]
    assert augmented[1].isnan().any()
    assert not any(inputs.isnan().any() for inputs in augmented[2:])


def test_same_seed_gives_same_augmentation_and_another_seed_another() -> None:
    first, repeated, different = (
        augment(batch_of(), FORMS, CONFIG, seed=seed, rows=parts(7)).inputs for seed in (3, 3, 4)
    )
    for first_inputs, repeated_inputs, different_inputs in zip(first[1:], repeated[1:], different[1:], strict=True):
        torch.testing.assert_close(first_inputs, repeated_inputs, rtol=0, atol=0, equal_nan=True)
        assert not torch.equal(first_inputs.nan_to_num(9.0), different_inputs.nan_to_num(9.0))


def test_batch_without_rows_is_accepted() -> None:
    assert [len(inputs) for inputs in augment(batch_of(0), FORMS, CONFIG, seed=3, rows=parts(0)).inputs] == [0] * len(
        SHAPES
    )


def test_disabled_augmentation_changes_nothing() -> None:
    disabled = replace(CONFIG, pictures=False, sound=False)
    batch = batch_of()
    assert all(
        a is b for a, b in zip(augment(batch, FORMS, disabled, seed=0, rows=parts(7)).inputs, batch.inputs, strict=True)
    )
    vectors = replace(batch, inputs=batch.inputs[:1])
    assert augment(vectors, FORMS[:1], CONFIG, seed=0, rows=parts(7)[:1]).inputs[0] is vectors.inputs[0]


@pytest.mark.parametrize("cuts", [(0, 3, 7), (0, 0, 7), (0, 1, 2, 3, 4, 5, 6, 7)])
def test_processes_together_augment_as_one_does(cuts: tuple[int, ...]) -> None:
    stored = StoredPictures(num_frames=2, num_choices=3, side=10, is_sized=True)
    key = np.random.default_rng(1).integers(0, 2**63, 7).astype(np.uint64)
    forms = (*FORMS, InputForm(shape=(2, 8, 8, 3), view=PictureView(shape=(2, 8, 8, 3), stored=stored), key=key))
    rows = torch.randint(0, 255, (7, stored.num_features), dtype=torch.uint8)
    batch = replace(batch_of(), inputs=(*batch_of().inputs, rows))
    whole = augment(batch, forms, CONFIG, seed=3, rows=parts(7, num_forms=5)).inputs
    for start, stop in pairwise(cuts):
        part = replace(batch, inputs=tuple(inputs[start:stop] for inputs in batch.inputs))
        local = parts(stop - start, start, 7, num_forms=5)
        for expected, augmented in zip(whole, augment(part, forms, CONFIG, seed=3, rows=local).inputs, strict=True):
            torch.testing.assert_close(
                augmented.flatten(1), expected[start:stop].flatten(1), rtol=0, atol=1e-4, equal_nan=True
            )


def test_stored_pictures_without_augmentation_are_whole_with_the_middle_frame() -> None:
    stored = StoredPictures(num_frames=1, num_choices=3, side=8, is_sized=True)
    view = PictureView(shape=(1, 8, 8, 3), stored=stored)
    form = InputForm(shape=view.shape, view=view, key=np.arange(7, dtype=np.uint64))
    rows = torch.randint(0, 255, (7, stored.num_features), dtype=torch.uint8)
    batch, disabled = replace(batch_of(), inputs=(rows,)), replace(CONFIG, pictures=False, frames=False)
    (pictures,) = augment(batch, [form], disabled, seed=0, rows=parts(7, num_forms=1)).inputs
    torch.testing.assert_close(pictures, form.whole(rows), rtol=0, atol=0)
    middle = rows[:, 192:384].view(7, 8, 8, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(pictures[:, 0], middle, rtol=0, atol=0)


@pytest.mark.parametrize("num_masks", [0, 1, 2])
def test_masks_are_complete_bands_and_time_spans_within_their_share(num_masks: int) -> None:
    config = AugmentConfig(time_masks=num_masks, band_masks=num_masks, time_share=0.3, band_share=0.25)
    spectrograms = torch.randn(200, 1, 1, 20, 40)
    masked = mask_spectrograms(spectrograms, config, np.random.default_rng(0))
    is_masked: Tensor = masked.isnan()[:, 0, 0]
    bands, times = is_masked.all(dim=2), is_masked.all(dim=1)
    assert torch.equal(is_masked, bands[:, :, None] | times[:, None, :])
    assert int(bands.sum(dim=1).max()) <= num_masks * 5
    assert int(times.sum(dim=1).max()) <= num_masks * 12
    if num_masks == 1:
        assert int(bands.sum(dim=1).max()) == 5  # the widest mask allowed occurs among 200
        assert int(times.sum(dim=1).max()) == 12
    torch.testing.assert_close(masked[~masked.isnan()], spectrograms[~masked.isnan()], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_crop": 0.0}, "augment.min_crop is 0.0"),
        ({"time_masks": -1}, "augment.time_masks is -1"),
        ({"band_share": 1.5}, "augment.band_share is 1.5"),
        ({"time_share": float("nan")}, "augment.time_share is nan"),
    ],
)
def test_invalid_settings_raise(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**options)  # type: ignore[arg-type]
