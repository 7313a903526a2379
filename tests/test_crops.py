"""Tests of crops: equal to Pillow's, drawn as torchvision draws them, and a function of seed and id alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mmaudit.audit.features.encoders import StoredPictures
from mmaudit.audit.probes.crops import PictureView, random_crops, resize_crops, row_uniforms

torch.set_num_threads(1)

STORED = StoredPictures(num_frames=2, num_choices=3, side=12, is_sized=True)
VIEW = PictureView(shape=(2, 8, 8, 3), stored=STORED)
KEY = np.random.default_rng(0).integers(0, 2**63, 9).astype(np.uint64)


def stored_rows(num_rows: int = 9, width: int = 16, height: int = 12) -> torch.Tensor:
    pixels = np.random.default_rng(1).integers(0, 256, (num_rows, STORED.num_features - 4)).astype(np.uint8)
    size = np.tile(np.array([width, height], "<u2").view(np.uint8), (num_rows, 1))
    return torch.from_numpy(np.concatenate([pixels, size], axis=1))


@settings(max_examples=examples(40))
@given(side=st.integers(8, 60), size=st.integers(4, 60), seed=st.integers(0, 99), data=st.data())
def test_crops_equal_those_of_pillow(side: int, size: int, seed: int, data: st.DataObject) -> None:
    left, top = data.draw(st.integers(0, side - 1)), data.draw(st.integers(0, side - 1))
    right, bottom = data.draw(st.integers(left + 1, side)), data.draw(st.integers(top + 1, side))
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    cropped = Image.fromarray(pixels).crop((left, top, right, bottom))
    expected = np.asarray(cropped.resize((size, size), Image.Resampling.BILINEAR), dtype=np.float64)
    boxes = np.array([[left, top, right, bottom], [right, top, left, bottom]]) / side
    pictures = torch.from_numpy(pixels).permute(2, 0, 1)[None].expand(2, -1, -1, -1)
    plain, mirrored = resize_crops(pictures, boxes, size=size).permute(0, 2, 3, 1).numpy()
    assert np.abs(plain.astype(int) - expected).max() <= 1
    np.testing.assert_array_equal(mirrored[:, ::-1], plain)


def reference_crop(width: int, height: int, draws: NDArray[np.float64], min_area: float) -> list[float]:
    """Draw one crop step by step, as RandomResizedCrop is documented."""
    for area_draw, ratio_draw, x_draw, y_draw in draws:
        area = width * height * (min_area + (1 - min_area) * area_draw)
        ratio = math.exp(math.log(3 / 4) + ratio_draw * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(x_draw * (width - w + 1)), int(y_draw * (height - h + 1))
            return [x / width, y / height, (x + w) / width, (y + h) / height]
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    x, y = (width - w) // 2, (height - h) // 2
    return [x / width, y / height, (x + w) / width, (y + h) / height]


@pytest.mark.parametrize("min_area", [0.08, 0.9])
@pytest.mark.parametrize(("width", "height"), [(480, 360), (360, 480), (224, 224), (640, 90), (5, 1)])
def test_crops_are_drawn_as_random_resized_crop_draws_them(width: int, height: int, min_area: float) -> None:
    draws = np.random.default_rng(0).random((200, 10, 4))
    boxes = random_crops(np.tile([float(width), height], (200, 1)), draws, min_area=min_area)
    expected = [reference_crop(width, height, draw, min_area) for draw in draws]
    np.testing.assert_allclose(boxes, expected, atol=1e-9)


def test_a_row_has_the_same_crop_in_any_batch_and_another_one_in_another_epoch() -> None:
    rows = stored_rows()
    together = VIEW.draw(rows, KEY, seed=5, min_area=0.08, flip=True)
    order = np.random.default_rng(2).permutation(9)
    for part in (order[:2], order[2:]):
        torch.testing.assert_close(
            VIEW.draw(rows[part], KEY[part], seed=5, min_area=0.08, flip=True), together[part], rtol=0, atol=0
        )
    assert not torch.equal(VIEW.draw(rows, KEY, seed=6, min_area=0.08, flip=True), together)


def test_frames_are_drawn_from_their_segment_and_the_middle_one_is_tested() -> None:
    rows = stored_rows()
    frames = rows[:, :-4].view(9, 2, 3, 12, 12, 3).permute(0, 1, 2, 5, 3, 4)
    view = PictureView(shape=(2, 12, 12, 3), stored=STORED)
    torch.testing.assert_close(view.whole(rows), frames[:, :, 1], rtol=0, atol=0)
    counts = np.zeros(3, dtype=int)
    for seed in range(40):
        drawn = view.draw(rows, KEY, seed=seed, min_area=1.0, flip=False)
        same = (drawn[:, :, None] == frames).flatten(3).all(dim=3)
        assert same.any(dim=2).all()
        counts += same.sum(dim=(0, 1)).numpy()
    assert counts.sum() == 40 * 9 * 2
    assert counts.min() > 190  # of 240 each


def test_choices_without_sizes_are_drawn_and_not_cropped() -> None:
    stored = StoredPictures(num_frames=2, num_choices=3, side=12, is_sized=False)
    view = PictureView(shape=(2, 12, 12, 3), stored=stored)
    rows = stored_rows()[:, :-4]
    frames = rows.view(9, 2, 3, 12, 12, 3).permute(0, 1, 2, 5, 3, 4)
    assert torch.equal(view.whole(rows), frames[:, :, 1])
    drawn = view.draw(rows, KEY, seed=0, min_area=0.08, flip=True)
    assert (drawn[:, :, None] == frames).flatten(3).all(dim=3).any(dim=2).all()


def test_missing_rows_stay_missing() -> None:
    rows = stored_rows().float()
    rows[3] = torch.nan
    for pictures in (VIEW.whole(rows), VIEW.draw(rows, KEY, seed=0, min_area=0.08, flip=True)):
        assert torch.equal(pictures.isnan().flatten(1).any(dim=1), torch.arange(9) == 3)
        assert pictures[3].isnan().all()


def test_no_rows_give_no_pictures() -> None:
    rows = stored_rows(0)
    assert VIEW.whole(rows).shape == (0, 2, 3, 8, 8)
    assert VIEW.draw(rows, KEY[:0], seed=0, min_area=0.08, flip=True).shape == (0, 2, 3, 8, 8)


def test_numbers_of_rows_are_uniform_and_unrelated() -> None:
    keys = np.arange(2_000, dtype=np.uint64)
    uniforms = row_uniforms(keys, seed=0, count=10)
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    assert np.abs(np.histogram(uniforms, bins=10, range=(0, 1))[0] - 2_000).max() < 200
    assert (
        np.abs(
            np.corrcoef(np.concatenate([uniforms, row_uniforms(keys, seed=1, count=10)], axis=1).T) - np.eye(20)
        ).max()
        < 0.1
    )
