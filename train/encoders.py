"""The encoders: how does one modality of a batch become features, standardised by the training rows?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..audit.probing.networks import build_trunk, to_pictures


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) that on a CPU draws 16 bits for each value: a third of the time of torch's own.

    There torch's, at 128 bits a value from one thread, takes 15% of a step of two encoders of 1024 x 512. The share is
    rounded to a multiple of 2^-16, and what is kept is scaled by what is left of that.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self._dropped = min(round(share * 2**16), 2**16 - 2)  # of 2^16 numbers that are drawn alike

    def forward(self, values: Tensor) -> Tensor:
        """Drop values of any shape, in training."""
        if not self.training or self._dropped == 0:
            return values
        if values.device.type != "cpu" or torch.compiler.is_compiling():
            return functional.dropout(values, self.share)
        drawn = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = drawn.view(torch.int16)[: values.numel()] >= self._dropped - 2**15
        scale = 2**16 / (2**16 - self._dropped)
        return values * kept.view(values.shape).to(values.dtype).mul_(scale)


class VectorEncoder(nn.Module):
    """Vectors (b, d) in, features (b, hidden) out. NaN counts as the training rows' mean."""

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int, *, hidden: int, dropout: float) -> None:
        super().__init__()
        self.num_features = hidden
        self.reads_standard = False  # whether rows come standardised, as those of a store that holds them so
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.ReLU(), Dropout(dropout))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def standardise_by(self, mean: Tensor, scale: Tensor, *, largest: Tensor) -> None:
        """Take mean and standard deviation of each feature (d,); one that only rounding moves keeps scale 1."""
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(scale > 1e-6 * largest, scale, 1.0))

    def standard(self, rows: Tensor) -> Tensor:
        """Standardise rows; NaN becomes 0, the mean."""
        return ((rows - self.mean) / self.scale).nan_to_num(nan=0.0)

    def forward(self, rows: Tensor) -> Tensor:
        """Give features of a batch."""
        found: Tensor = self.layers(rows if self.reads_standard else self.standard(rows))
        return found


class PictureEncoder(nn.Module):
    """Flattened inputs of a network (b, d), or pictures (b, f, c, h, w), in; ResNet-18 features (b, 512 width) out."""

    def __init__(self, shape: tuple[int, ...], *, width: float, dropout: float) -> None:
        super().__init__()
        self.shape = shape
        self.trunk = build_trunk(shape, width=width)
        self.num_features = self.trunk.num_features
        self.dropout = Dropout(dropout)

    def standardise_by(self, mean: Tensor, scale: Tensor) -> None:
        """Take mean and standard deviation of each channel (c,)."""
        self.trunk.standardise_by(np.asarray(mean.double().cpu()), np.asarray(scale.double().cpu()))

    def forward(self, rows: Tensor) -> Tensor:
        """Give features of a batch. One picture alone, or none, has no spread: the running means stand for its own."""
        pictures = rows if rows.ndim == 5 else to_pictures(rows, self.shape)
        by_batch = self.trunk.training and pictures.shape[0] * pictures.shape[1] > 1
        features = self.trunk(pictures) if by_batch == self.trunk.training else self._by_running_means(pictures)
        found: Tensor = self.dropout(features)
        return found

    def _by_running_means(self, pictures: Tensor) -> Tensor:
        self.trunk.eval()
        features: Tensor = self.trunk(pictures)
        self.trunk.train()
        return features


Encoder = VectorEncoder | PictureEncoder


def build_encoder(shape: Sequence[int], *, hidden: int, dropout: float, width: float) -> Encoder:
    """Give the encoder for rows of a shape: (d,) vectors; (mel, t), (h, w, c) or (f, h, w, c) for a ResNet-18."""
    if len(shape) == 1:
        return VectorEncoder(shape[0], hidden=hidden, dropout=dropout)
    return PictureEncoder(tuple(shape), width=width, dropout=dropout)
