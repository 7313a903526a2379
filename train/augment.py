"""Augmentation of pictures and spectrograms in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..audit.probes.crops import PictureView, Uniforms, augment_pictures, to_pictures
from ..rebalance.curriculum import RowIndex
from .batches import Batch, Step
from .config import AugmentConfig
from .optimizer import DistributedContext


@dataclass(frozen=True, slots=True, kw_only=True)
class InputForm:
    """How the rows of a modality become inputs in training: their shape, and of stored pictures the view.

    key: hash of the id (n,) of each training row, by which frames and crops of stored pictures are drawn.
    """

    shape: tuple[int, ...]
    view: PictureView | None = None
    key: NDArray[np.uint64] | None = None

    def whole(self, rows: Tensor) -> Tensor:
        """Return rows as they are tested: of stored pictures the middle frames, whole."""
        return rows if self.view is None else self.view.whole(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRows:
    """Training rows (b_j,) of a modality's inputs in this process: those from `first` on of all `total` of the step."""

    rows: RowIndex
    first: int
    total: int


def local_rows(step: Step, num_modalities: int, distributed: DistributedContext) -> list[LocalRows]:
    """Return this process's rows of a step for each modality."""
    local_step, own = step.shard(distributed), distributed.slice(len(step.rows))
    parts = []
    for modality in range(num_modalities):
        first, total = own.start or 0, len(step.rows)
        if step.present is not None:
            used = step.present[:, modality]
            first, total = int(used[:first].sum()), int(used.sum())
        parts.append(LocalRows(rows=local_step.rows_of(modality), first=first, total=total))
    return parts


def augment(
    batch: Batch, forms: Sequence[InputForm], config: AugmentConfig, *, seed: int, rows: Sequence[LocalRows]
) -> Batch:
    """Augment a batch: pictures and frames are cropped and mirrored, spectrograms masked, vectors not changed.

    Frames and crops of stored pictures follow from the seed and a row's id, all else from the seed and a row's place in
    the whole step: everything is the same in any number of processes.
    """
    rng = np.random.default_rng(seed)
    return replace(
        batch,
        inputs=tuple(
            _augment_inputs(_draw_pictures(inputs, form, config, seed=seed, rows=part.rows), form, config, rng, part)
            for inputs, form, part in zip(batch.inputs, forms, rows, strict=True)
        ),
    )


def _draw_pictures(inputs: Tensor, form: InputForm, config: AugmentConfig, *, seed: int, rows: RowIndex) -> Tensor:
    """Draw frames and crops of stored pictures; other inputs are returned as they are."""
    if form.view is None or form.key is None:
        return inputs
    min_area, flip = (config.min_crop, config.flip) if config.pictures else (1.0, False)
    return form.view.draw(inputs, form.key[rows], seed=seed, min_area=min_area, flip=flip, frames=config.frames)


def _augment_inputs(
    inputs: Tensor, form: InputForm, config: AugmentConfig, rng: np.random.Generator, part: LocalRows
) -> Tensor:
    is_cropped = form.view is not None and form.view.is_sized
    crops, masks = len(form.shape) > 2 and config.pictures and not is_cropped, len(form.shape) == 2 and config.sound
    if part.total == 0 or not (crops or masks):
        return inputs
    # A process without a row of a last step draws too, or the next modality would have other numbers there.
    pictures = inputs if len(inputs) else inputs.new_zeros(1, *inputs.shape[1:])
    pictures = pictures if pictures.ndim == 5 else to_pictures(pictures, form.shape)
    uniforms = _StepUniforms(rng, first=part.first, count=len(pictures), total=part.total)
    if crops:
        augmented = augment_pictures(pictures, uniforms, min_area=config.min_crop, flip=config.flip)
    else:
        augmented = mask_spectrograms(pictures, config, uniforms)
    return augmented[: len(inputs)]


class _StepUniforms:
    """Random numbers for the rows of a whole step, of which a process reads those of its own rows."""

    def __init__(self, rng: np.random.Generator, *, first: int, count: int, total: int) -> None:
        self._rng, self._first, self._count, self._total = rng, min(first, total - 1), count, total

    def random(self, size: tuple[int, ...]) -> NDArray[np.float64]:
        """Draw numbers for the rows of the process; the first dimension is a multiple of their number."""
        per_row = size[0] // self._count
        draws = self._rng.random((self._total * per_row, *size[1:]))
        return draws[self._first * per_row : (self._first + self._count) * per_row]


def mask_spectrograms(pictures: Tensor, config: AugmentConfig, rng: Uniforms) -> Tensor:
    """Mask bands and time spans of spectrograms (b, 1, 1, mel, t), as SpecAugment does, arXiv 1904.08779.

    A mask's width is uniform from 0 to its share of the axis, its position uniform; masked values are NaN, which
    networks replace by the mean.
    """
    masked = pictures.float().clone()
    for axis, num_masks, share in (
        (4, config.time_masks, config.time_share),
        (3, config.band_masks, config.band_share),
    ):
        size = masked.shape[axis]
        width = np.floor(rng.random((len(masked), num_masks)) * (share * size + 1)).astype(np.int64)
        start = np.floor(rng.random((len(masked), num_masks)) * (size - width + 1)).astype(np.int64)
        positions = np.arange(size)
        # (b, size)
        is_masked = ((positions >= start[..., None]) & (positions < (start + width)[..., None])).any(axis=1)
        shape = [len(masked), 1, 1, 1, 1]
        shape[axis] = size
        masked.masked_fill_(torch.from_numpy(is_masked).to(masked.device).view(shape), torch.nan)
    return masked
