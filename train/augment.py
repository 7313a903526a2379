"""Augmentation: how are the inputs of networks varied in training, and in training alone?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..audit.probing.networks import to_pictures, vary
from .batches import Batch
from .config import AugmentConfig


def augment(batch: Batch, shapes: Sequence[tuple[int, ...]], config: AugmentConfig, *, seed: int) -> Batch:
    """Vary a batch: pictures and frames are cropped and mirrored, spectrograms masked, vectors left as they are."""
    rng = np.random.default_rng(seed)
    return replace(
        batch,
        inputs=tuple(_vary_one(rows, shape, config, rng) for rows, shape in zip(batch.inputs, shapes, strict=True)),
    )


def _vary_one(rows: Tensor, shape: tuple[int, ...], config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    if len(rows) == 0:  # as a process may have of a last step; affine_grid refuses it
        return rows
    if len(shape) > 2 and config.pictures:
        return vary(to_pictures(rows, shape), rng, least_area=config.least_crop, flip=config.flip)
    if len(shape) == 2 and config.sound:
        return mask_spectrograms(to_pictures(rows, shape), config, rng)
    return rows


def mask_spectrograms(pictures: Tensor, config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    """Blot out bands and spans of time of spectrograms (b, 1, 1, mel, t): the masks of SpecAugment, arXiv 1904.08779.

    A mask's width is uniform from 0 to its share of the axis, its place uniform; it reads as the mean, which is what a
    network makes of NaN.
    """
    found = pictures.float().clone()
    for axis, number, share in (
        (4, config.time_masks, config.time_share),
        (3, config.band_masks, config.band_share),
    ):
        size = found.shape[axis]
        width = np.floor(rng.random((len(found), number)) * (share * size + 1)).astype(np.int64)
        start = np.floor(rng.random((len(found), number)) * (size - width + 1)).astype(np.int64)
        place = np.arange(size)
        hidden = ((place >= start[..., None]) & (place < (start + width)[..., None])).any(axis=1)  # (b, size)
        shape = [len(found), 1, 1, 1, 1]
        shape[axis] = size
        found.masked_fill_(torch.from_numpy(hidden).to(found.device).view(shape), torch.nan)
    return found
