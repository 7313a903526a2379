"""Laws of augmentation: vectors are left alone, pictures keep their size, masks hide what they should and no more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mmaudit.audit.errors import ConfigError
from mmaudit.train.batches import Batch
from mmaudit.train.config import AugmentConfig
from mmaudit.train.training_data import augment, mask_spectrograms

torch.set_num_threads(1)

SHAPES = ((5,), (6, 10), (8, 8, 3), (2, 8, 8, 3))
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


def test_each_kind_is_varied_in_its_own_way() -> None:
    batch = batch_of()
    found = augment(batch, SHAPES, CONFIG, seed=3).inputs
    assert found[0] is batch.inputs[0]
    assert [each.shape[1:] for each in found[1:]] == [(1, 1, 6, 10), (1, 3, 8, 8), (2, 3, 8, 8)]
    assert found[1].isnan().any()
    assert not any(each.isnan().any() for each in found[2:])


def test_a_seed_gives_the_same_and_another_something_else() -> None:
    first, again, other = (augment(batch_of(), SHAPES, CONFIG, seed=seed).inputs for seed in (3, 3, 4))
    for one, two, three in zip(first[1:], again[1:], other[1:], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
        assert not torch.equal(one.nan_to_num(9.0), three.nan_to_num(9.0))


def test_a_process_may_have_no_row_of_a_step() -> None:
    assert [len(each) for each in augment(batch_of(0), SHAPES, CONFIG, seed=3).inputs] == [0] * len(SHAPES)


def test_what_is_switched_off_stays_as_it_is() -> None:
    off = replace(CONFIG, pictures=False, sound=False)
    batch = batch_of()
    assert all(a is b for a, b in zip(augment(batch, SHAPES, off, seed=0).inputs, batch.inputs, strict=True))
    vectors = replace(batch, inputs=batch.inputs[:1])
    assert augment(vectors, SHAPES[:1], CONFIG, seed=0).inputs[0] is vectors.inputs[0]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_masks_are_whole_bands_and_times_of_at_most_their_share(number: int) -> None:
    config = AugmentConfig(time_masks=number, band_masks=number, time_share=0.3, band_share=0.25)
    sound = torch.randn(200, 1, 1, 20, 40)
    found = mask_spectrograms(sound, config, np.random.default_rng(0))
    hidden: Tensor = found.isnan()[:, 0, 0]
    bands, times = hidden.all(dim=2), hidden.all(dim=1)
    assert torch.equal(hidden, bands[:, :, None] | times[:, None, :])
    assert int(bands.sum(dim=1).max()) <= number * 5
    assert int(times.sum(dim=1).max()) <= number * 12
    if number == 1:
        assert int(bands.sum(dim=1).max()) == 5  # the widest that may be, among 200
        assert int(times.sum(dim=1).max()) == 12
    torch.testing.assert_close(found[~found.isnan()], sound[~found.isnan()], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_crop": 0.0}, "augment.min_crop is 0.0"),
        ({"time_masks": -1}, "augment.time_masks is -1"),
        ({"band_share": 1.5}, "augment.band_share is 1.5"),
        ({"time_share": float("nan")}, "augment.time_share is nan"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AugmentConfig(**options)  # type: ignore[arg-type]
