"""Pictures of networks: views of stored inputs, crops and frames at random in training, whole pictures otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..features.encoders import StoredPictures
from ..hashing import hash_rank, splitmix64

RATIO = 4 / 3  # largest aspect ratio of a crop, as in RandomResizedCrop
_TRIES = 10  # crops that are drawn until one fits into the picture, as in RandomResizedCrop

Floats = NDArray[np.float64]
Keys = NDArray[np.uint64]


class Uniforms(Protocol):
    """Source of random numbers, uniform in [0, 1), as of a NumPy generator."""

    def random(self, size: tuple[int, ...]) -> Floats:
        """Draw numbers of a shape."""


def to_pictures(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View rows (b, d) of inputs (mel, t), (h, w, c) or (f, h, w, c) as pictures (b, f, c, h, w), without a copy."""
    if len(shape) == 2:
        return rows.view(len(rows), 1, 1, *shape)
    return rows.view(len(rows), shape[0] if len(shape) == 4 else 1, *shape[-3:]).permute(0, 1, 4, 2, 3)


def augment_pictures(pictures: Tensor, rng: Uniforms, *, min_area: float, flip: bool) -> Tensor:
    """Apply a random crop, resized to the original size, to each picture (b, f, c, h, w), and flip half: float32.

    A crop has between `min_area` and 1 of the picture's area, and an aspect ratio of 3 / 4 to 4 / 3 of the picture's:
    torchvision's RandomResizedCrop, as in the papers, except that a side that is too long is cut to fit instead of
    drawn again. Each frame has its own crop, as in OGM-GE's code.
    """
    frames = pictures.flatten(0, 1).float()
    uniforms = rng.random((len(frames), 5))
    area = min_area + (1 - min_area) * uniforms[:, 0]
    width = np.clip(np.sqrt(area * RATIO ** (2 * uniforms[:, 1] - 1)), area, 1)
    sides = np.stack([width, area / width], axis=1)
    theta = np.zeros((len(frames), 2, 3))
    theta[:, 0, 0] = sides[:, 0] * np.where(flip & (uniforms[:, 4] < 0.5), -1, 1)
    theta[:, 1, 1] = sides[:, 1]
    theta[:, :, 2] = (1 - sides) * (2 * uniforms[:, 2:4] - 1)
    grid = nn.functional.affine_grid(torch.from_numpy(theta).to(frames), list(frames.shape), align_corners=False)
    crops = nn.functional.grid_sample(frames, grid, padding_mode="border", align_corners=False)
    return crops.view(pictures.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureView:
    """Pictures (b, f, c, h, w) that a network reads, of rows (b, d) of the cache.

    shape: (bins, t), (h, w, 3) or (f, h, w, 3), what the network reads. stored: how the cache holds it; None: as it is.
    """

    shape: tuple[int, ...]
    stored: StoredPictures | None = None

    @property
    def is_sized(self) -> bool:
        """Whether crops come from stored pictures, with the sides of the original."""
        return self.stored is not None and self.stored.is_sized

    @property
    def num_features(self) -> int:
        """Numbers of a row of the cache."""
        return int(np.prod(self.shape)) if self.stored is None else self.stored.num_features

    def whole(self, rows: Tensor) -> Tensor:
        """Return the middle frame of each segment, whole; without `stored` a view of the rows."""
        if self.stored is None:
            return to_pictures(rows, self.shape)
        levels, missing = _levels(rows)
        pictures = _choices(levels, self.stored)[:, :, self.stored.num_choices // 2]
        if self.is_sized and len(pictures):
            frames = _resize(pictures.flatten(0, 1), self.shape[-2])
            pictures = frames.view(*pictures.shape[:3], *frames.shape[-2:])
        elif self.is_sized:
            pictures = pictures.new_empty((*pictures.shape[:3], *self.shape[-3:-1]))
        return pictures if missing is None else pictures.float().index_fill(0, missing, torch.nan)

    def draw(self, rows: Tensor, key: Keys, *, seed: int, min_area: float, flip: bool, frames: bool = True) -> Tensor:
        """Draw a frame of each segment, and of sized pictures a crop; which ones depends on seed and key (b,) only.

        Crops are those of torchvision's RandomResizedCrop on the original picture, of at least `min_area` of its area,
        1: whole pictures. frames: whether the frame is drawn, or the middle one. Pictures that are not sized are not
        cropped here, see `augment_pictures`.
        """
        if self.stored is None:
            return to_pictures(rows, self.shape)
        stored, (levels, missing) = self.stored, _levels(rows)
        uniforms = row_uniforms(key, seed=seed, count=stored.num_frames * (2 + 4 * _TRIES))
        uniforms = uniforms.reshape(len(rows) * stored.num_frames, 2 + 4 * _TRIES)
        choice = np.full(len(uniforms), stored.num_choices // 2)
        if frames:
            choice = np.floor(uniforms[:, 0] * stored.num_choices).astype(np.int64)
        choices = _choices(levels, stored).flatten(0, 1)
        index = torch.from_numpy(choice).to(rows.device)
        pictures = choices[torch.arange(len(choices), device=rows.device), index]
        if self.is_sized:
            sizes = _original_sizes(levels, stored).repeat(stored.num_frames, axis=0)
            boxes = random_crops(sizes, uniforms[:, 2:].reshape(-1, _TRIES, 4), min_area=min_area)
            mirrored = flip & (uniforms[:, 1] < 0.5)
            boxes[mirrored] = boxes[mirrored][:, [2, 1, 0, 3]]
            pictures = resize_crops(pictures, boxes, size=self.shape[-2])
        pictures = pictures.view(len(rows), stored.num_frames, *pictures.shape[1:])
        return pictures if missing is None else pictures.float().index_fill(0, missing, torch.nan)


def _levels(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return rows as uint8, and the indices of missing ones, which are NaN, if there are any."""
    if rows.dtype == torch.uint8:
        return rows, None
    missing = rows.isnan().any(dim=1).nonzero().squeeze(1)
    return rows.nan_to_num(nan=0.0).to(torch.uint8), missing


def _choices(rows: Tensor, stored: StoredPictures) -> Tensor:
    """View rows (b, d) as the stored frames (b, f, choices, c, side, side)."""
    num_pixels = stored.num_features - 4 * stored.is_sized
    shape = (len(rows), stored.num_frames, stored.num_choices, stored.side, stored.side, 3)
    return rows[:, :num_pixels].view(shape).permute(0, 1, 2, 5, 3, 4)


def _original_sizes(rows: Tensor, stored: StoredPictures) -> Floats:
    """Return width and height (b, 2) of the original pictures; 1 for missing ones."""
    low_and_high = rows[:, stored.num_features - 4 :].cpu().numpy().astype(np.float64)
    return np.asarray(np.maximum(low_and_high[:, [0, 2]] + 256 * low_and_high[:, [1, 3]], 1))


def row_uniforms(key: Keys, *, seed: int, count: int) -> Floats:
    """Return `count` numbers (b, count), uniform in [0, 1), of each key: of seed and key only, in any batch."""
    start = splitmix64(key ^ hash_rank([str(seed)], seed=0, purpose="augmentation"))
    counters = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.asarray((splitmix64((start[:, None] + counters).ravel()) >> np.uint64(11)) * 2.0**-53).reshape(-1, count)


def random_crops(sizes: Floats, uniforms: Floats, *, min_area: float) -> Floats:
    """Draw crops (n, 4) of pictures of `sizes` (n, 2) in pixels: left, top, right and bottom as shares of the sides.

    As torchvision's RandomResizedCrop: of ten draws (n, 10, 4), each of an area of min_area to 1 and an aspect ratio
    of 3 / 4 to 4 / 3, uniform in its logarithm, in whole pixels, the first that fits counts; else the largest crop in
    the middle whose aspect ratio lies in these bounds.
    """
    size = sizes[:, None]  # (n, 1, 2)
    area = size.prod(axis=2) * (min_area + (1 - min_area) * uniforms[..., 0])
    ratio = RATIO ** (2 * uniforms[..., 1] - 1)
    sides = np.rint(np.sqrt(np.stack([area * ratio, area / ratio], axis=2)))
    fits = ((sides >= 1) & (sides <= size)).all(axis=2)
    first = np.arange(len(sizes)), fits.argmax(axis=1)
    chosen = sides[first]
    corner = np.floor(uniforms[first][:, 2:] * (sizes - chosen + 1))
    fallback = np.rint(np.minimum(sizes, RATIO * sizes[:, ::-1]))
    is_fallback = ~fits.any(axis=1) if min_area < 1 else np.ones(len(sizes), dtype=bool)
    if min_area >= 1:
        fallback = sizes
    chosen[is_fallback] = fallback[is_fallback]
    corner[is_fallback] = np.floor((sizes - fallback) / 2)[is_fallback]
    return np.concatenate([corner / sizes, (corner + chosen) / sizes], axis=1)


def resize_crops(pictures: Tensor, boxes: Floats, *, size: int) -> Tensor:
    """Resize crops of pictures (n, c, side, side) to (n, c, size, size), uint8, with Pillow's bilinear filter.

    boxes (n, 4): left, top, right, bottom, as shares of the sides, rounded to whole pixels; left above right mirrors.
    The filter is as wide as the crop is reduced, as in Pillow, while torch's grid_sample reads four pixels only.
    """
    side = pictures.shape[-1]
    resized = pictures.new_empty((len(pictures), pictures.shape[1], size, size))
    edges = np.rint(boxes * side).astype(np.int64)
    for index, (left, top, right, bottom) in enumerate(edges.tolist()):
        low, high = min(left, right, side - 1), max(left, right)
        top = min(top, side - 1)
        crop = pictures[index : index + 1, :, top : max(bottom, top + 1), low : max(high, low + 1)]
        picture = _resize(crop, size)[0]
        resized[index] = picture.flip(-1) if left > right else picture
    return resized


def _resize(pictures: Tensor, size: int) -> Tensor:
    """Resize pictures (n, c, h, w) to (n, c, size, size), uint8.

    On the CPU with torch's kernel for bytes, which equals Pillow's and takes 18 ms for 64 crops of 280 to 224 pixels;
    in float32 it takes 78 ms. CUDA has only the latter.
    """
    if pictures.shape[-2:] == (size, size):
        return pictures
    options = {"size": (size, size), "mode": "bilinear", "antialias": True}
    if pictures.device.type == "cpu":
        return nn.functional.interpolate(pictures, **options)  # type: ignore[arg-type]
    return nn.functional.interpolate(pictures.float(), **options).round().to(torch.uint8)  # type: ignore[arg-type]
